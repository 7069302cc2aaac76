"""The runs of a duel that are done: kept in the output folder, found again, never mixed with those of another job.

A job is what was asked for, the machine, the versions and the sources of hf_lema and of the recipes: when one of them
changes, the old runs stay where they are and do not count. Knows files; does not know how a contender is run.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from contender_process import Outcome
from contender_spec import ContenderSpec

from hf_lema.reporting.contender import ContenderResult

OUTCOME_FILE = "outcome.json"
# A contender that ran out of memory would do so again; one that failed may have been mended.
KEPT_STATUSES = ("ok", "out_of_memory")
_MACHINE = ("gpu_name", "vram_total_bytes", "driver_version", "cpu_model", "num_cpus_usable", "ram_limit_bytes")


class KeptRuns:
    """The runs of one job below an output folder.

    Args:
        output_dir: Of the duel.
        job: What was asked for, all contenders alike.
        environment: As `hf_lema.environment.environment_record` gives it.
    """

    def __init__(self, output_dir: Path, job: Mapping[str, Any], environment: Mapping[str, Any]) -> None:
        versions = {name: value for name, value in environment.items() if name.endswith("_version")}
        machine = {name: environment.get(name) for name in _MACHINE}
        facts = [dict(job), versions, machine, sources_sha256()]
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
        self.folder = output_dir / "runs" / digest[:12]

    def find(self, spec: ContenderSpec) -> list[Outcome]:
        """The runs of a contender, oldest first. One that was set up in another way does not count."""
        outcomes = []
        for folder in self._folders(spec.name):
            path = folder / OUTCOME_FILE
            if not path.is_file():
                continue  # interrupted
            record = json.loads(path.read_text(encoding="utf-8"))
            if record.pop("spec") == dataclasses.asdict(spec):
                result = ContenderResult.from_json(record.pop("result"))
                outcomes.append(Outcome(result=result, **record))
        return outcomes

    def forget(self, name: str) -> None:
        """Deletes the runs of a contender."""
        for folder in self._folders(name):
            shutil.rmtree(folder)

    def new_folder(self, name: str) -> Path:
        """An empty folder for the next run."""
        numbers = [int(folder.name.rpartition(".")[2]) for folder in self._folders(name)]
        folder = self.folder / f"{name}.{max(numbers, default=0) + 1}"
        folder.mkdir(parents=True)
        return folder

    def keep(self, spec: ContenderSpec, outcome: Outcome, folder: Path) -> None:
        """Writes down a run that is done, whole or not at all; one that failed is left to be repeated."""
        if outcome.result.status not in KEPT_STATUSES:
            return
        record = {
            "result": outcome.result.to_json(),
            "details": outcome.details,
            "environment": outcome.environment,
            "wall_s": outcome.wall_s,
            "spec": dataclasses.asdict(spec),
        }
        temporary = folder / f".{OUTCOME_FILE}"
        temporary.write_text(json.dumps(record), encoding="utf-8")
        temporary.rename(folder / OUTCOME_FILE)

    def _folders(self, name: str) -> list[Path]:
        folders = [path for path in self.folder.glob(f"{name}.*") if path.name.rpartition(".")[0] == name]
        return sorted(folders, key=lambda path: int(path.name.rpartition(".")[2]))


def sources_sha256() -> str:
    """SHA-256 over the sources that a run depends on: the package's and the recipes' Python files."""
    root = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for path in sorted([*root.glob("hf_lema/**/*.py"), *root.glob("recipes/*.py")]):
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()
