"""What makes a contender: one small JSON file in ``contenders/`` that holds only what differs from the defaults.

A new contender is a new file. Its keys are the fields of `ContenderSpec`; the file's name is the contender's. Knows
nothing of how a model is built or trained.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_lema import LemaConfig

BUDGET_MARK = "@"
FOLDER = Path(__file__).with_name("contenders")
BUILDS = ("stock", "4bit", "lema")
TRAINING_KEYS = ("gradient_checkpointing",)
CANNOT_KEYS = ("cpu", "several_processes")
# What every contender must share, or their figures say nothing of each other.
SAME_FOR_ALL = (
    "output_dir",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "lr_scheduler_type",
    "optim",
    "seed",
    "data_seed",
    "fp16",
    "bf16",
    "use_cpu",
)


@dataclass(frozen=True, kw_only=True)
class ContenderSpec:
    """A contender.

    Attributes:
        name: In tables and on the command line.
        about: What it is, for ``--help`` and the notes of a result.
        build: How its model is made: ``stock``, ``4bit`` (NF4 by bitsandbytes) or ``lema``.
        lema: Fields of ``LemaConfig`` for a streamed model.
        model: Further arguments of ``from_pretrained``.
        training: How it trains where it may differ: ``gradient_checkpointing``.
        arguments: Further fields of ``TrainingArguments``, such as ``deepspeed``; none that all must share.
        trainer: A subclass of Trainer as ``module:Class``; empty for the stock one.
        trainer_options: Further arguments of that class.
        is_launched: Whether it needs a launcher even when it is one process.
        distributed_type: What Accelerate must say that it does once the training is set up, such as ``FSDP``; empty for
            no such claim. Accelerate passes over what it cannot do somewhere, and a row must not claim it then.
        precision_instead: Precision -> the one that it trains in because it cannot do the first; its row says so.
        cannot: Where it cannot run (``cpu``, ``several_processes``) -> why. It is skipped there, and its row says this.
        caveats: Sentences that a reader of its row must know.
        environment: Variables of its process.
        needs: Package -> the command that installs it. Without one the contender is skipped, and its row says this.
        on_cpu: The same keys again, put over the others on a machine without a GPU.

    Raises:
        ValueError: At making, when something is set that cannot be, or may not differ; all faults are named.
    """

    name: str
    about: str = ""
    build: str = "stock"
    lema: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)
    trainer: str = ""
    trainer_options: Mapping[str, Any] = field(default_factory=dict)
    is_launched: bool = False
    distributed_type: str = ""
    precision_instead: Mapping[str, str] = field(default_factory=dict)
    cannot: Mapping[str, str] = field(default_factory=dict)
    caveats: Sequence[str] = field(default_factory=list)
    environment: Mapping[str, str] = field(default_factory=dict)
    needs: Mapping[str, str] = field(default_factory=dict)
    on_cpu: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        faults = []
        if self.build not in BUILDS:
            faults.append(f"build is {self.build!r}, expected one of {', '.join(BUILDS)}")
        if self.lema and self.build != "lema":
            faults.append(f"lema is set, but build is {self.build!r}")
        if unknown := sorted(set(self.training) - set(TRAINING_KEYS)):
            faults.append(f"training sets {', '.join(unknown)}; it may set {', '.join(TRAINING_KEYS)}")
        if shared := sorted(set(self.arguments) & set(SAME_FOR_ALL)):
            faults.append(f"arguments sets {', '.join(shared)}, which all contenders share")
        if strange := sorted(set(self.cannot) - set(CANNOT_KEYS)):
            faults.append(f"cannot has {', '.join(strange)}; it may have {', '.join(CANNOT_KEYS)}")
        mappings = {f.name for f in dataclasses.fields(self) if f.default_factory is dict}
        overlaid = mappings - {"needs", "cannot", "on_cpu"}
        if strange := sorted(set(self.on_cpu) - overlaid):
            faults.append(f"on_cpu sets {', '.join(strange)}; it may set {', '.join(sorted(overlaid))}")
        if faults:
            raise ValueError(f"contender {self.name!r}: {'; '.join(faults)}")

    def for_device(self, device_type: str) -> ContenderSpec:
        """The spec as it holds on a ``"cuda"`` or a ``"cpu"`` machine."""
        if device_type != "cpu":
            return dataclasses.replace(self, on_cpu={})
        overlaid = {name: {**getattr(self, name), **values} for name, values in self.on_cpu.items()}
        return dataclasses.replace(self, on_cpu={}, **overlaid)

    def missing_packages(self) -> list[str]:
        """For each package that is not installed, a sentence that says how to install it."""
        return [f"{name} is not installed: {how}" for name, how in self.needs.items() if not _is_installed(name)]

    def obstacles(self, device_type: str, num_processes: int) -> list[str]:
        """Why it cannot take part, a sentence each; none where it can."""
        here = {"cpu": device_type == "cpu", "several_processes": num_processes > 1}
        return [f"it {why}" for where, why in self.cannot.items() if here[where]] + self.missing_packages()


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def known_contenders() -> tuple[str, ...]:
    """The names of all files in ``contenders/``."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.json")))


def load_contender(name_or_path: str) -> ContenderSpec:
    """The contender in a file.

    Args:
        name_or_path: Name of a file in ``contenders/``, or a path that ends in ``.json``. ``lema@6GiB`` is the streamed
            contender ``lema`` at another VRAM budget.

    Raises:
        ValueError: There is no such file, or it sets what cannot be set.
    """
    if (parts := name_or_path.rpartition(BUDGET_MARK))[1] and not name_or_path.endswith(".json"):
        spec = load_contender(parts[0])
        if spec.build != "lema":
            raise ValueError(f"{name_or_path}: only a streamed contender has a budget, and {parts[0]} is not streamed")
        LemaConfig(vram_budget=parts[2])  # raises where it is no budget
        return dataclasses.replace(spec, name=name_or_path, lema={**spec.lema, "vram_budget": parts[2]})
    path = Path(name_or_path) if name_or_path.endswith(".json") else FOLDER / f"{name_or_path}.json"
    if not path.is_file():
        known = ", ".join(known_contenders())
        raise ValueError(f"no contender {name_or_path}; there are {known}, and any file of your own that ends in .json")
    values = json.loads(path.read_text(encoding="utf-8"))
    fields = {f.name for f in dataclasses.fields(ContenderSpec)} - {"name"}
    if unknown := sorted(set(values) - fields):
        raise ValueError(f"{path.name} sets {', '.join(unknown)}; a contender has {', '.join(sorted(fields))}")
    return ContenderSpec(name=path.stem, **values)
