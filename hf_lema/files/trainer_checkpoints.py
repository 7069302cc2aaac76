"""Which checkpoint of a Trainer's output folder is whole.

Responsibility: telling a finished ``checkpoint-N`` from one whose writer was killed, interrupted or ran out of disk.
Reads headers and ends of files, no tensors; opens no pickle. Knows nothing of models or training.

Trainer writes into the folder under its final name: first the weights, then optimizer, scheduler and random state, and
``trainer_state.json`` last. A folder without the last one has lost something. transformers' own ``get_last_checkpoint``
takes it all the same, and the resume then fails.
"""

from __future__ import annotations

import json
import os
import re
import zipfile
from pathlib import Path

from hf_lema.files.safetensors_header import read_header

_NAME = re.compile(r"checkpoint-(\d+)")
_LAST_WRITTEN = "trainer_state.json"
_UNDER_WAY = "checkpoint-is-incomplete.txt"
"""Put there by Trainer (``enable_jit_checkpoint``) while it writes on SIGTERM."""


def last_whole_checkpoint(output_dir: str | os.PathLike[str]) -> str | None:
    """The newest checkpoint of a Trainer from which a run can go on.

    ``trainer.train(resume_from_checkpoint=last_whole_checkpoint(args.output_dir))`` begins anew where there is none.

    Args:
        output_dir: ``TrainingArguments.output_dir``; it need not exist.

    Returns:
        The path of the ``checkpoint-N`` with the largest N that is whole, or None.
    """
    whole = [path for path in _checkpoints(Path(output_dir)) if damage_of(path) is None]
    return str(whole[-1]) if whole else None


def torn_checkpoints(output_dir: Path) -> list[Path]:
    """Checkpoints that are not whole, oldest first."""
    return [path for path in _checkpoints(output_dir) if damage_of(path) is not None]


def damage_of(checkpoint: Path) -> str | None:
    """What a checkpoint lacks, in words; None for a whole one.

    Whole is: everything is there that its writer meant to write, no file was cut. Bytes inside a file are not checked:
    a process that dies leaves no wrong ones, a machine that loses power may.
    """
    if (checkpoint / _UNDER_WAY).exists():
        return f"{_UNDER_WAY} is there: its writer did not come to an end"
    try:
        state = json.loads((checkpoint / _LAST_WRITTEN).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"{_LAST_WRITTEN}, which is written last, is missing"
    except ValueError:
        return f"{_LAST_WRITTEN} was cut"
    num_steps = int(checkpoint.name.rpartition("-")[2])
    if not isinstance(state, dict) or state.get("global_step") != num_steps:
        return f"{_LAST_WRITTEN} is not of step {num_steps}"
    for path in sorted(checkpoint.rglob("*")):
        if path.suffix == ".safetensors":
            try:
                read_header(path)
            except ValueError as error:
                return str(error)
        # torch.save writes a zip archive, whose directory comes last.
        elif path.suffix in (".pt", ".pth") and not zipfile.is_zipfile(path):
            return f"{path.name} was cut"
    return None


def _checkpoints(output_dir: Path) -> list[Path]:
    if not output_dir.is_dir():
        return []
    found = {int(match[1]): path for path in output_dir.iterdir() if (match := _NAME.fullmatch(path.name))}
    return [found[num_steps] for num_steps in sorted(found) if found[num_steps].is_dir()]
