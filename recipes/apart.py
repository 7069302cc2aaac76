"""Things to do in a process of their own, so that this one never holds a CUDA context beside the contenders.

A context takes some hundred MiB of the card, which would be missing to whoever is measured.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

_ENVIRONMENT = """
import json
from hf_lema.environment import environment_record
print(json.dumps(environment_record()))
"""
_CHECKPOINT = """
import sys
from pathlib import Path
import torch
from bench_shapes import ensure_checkpoint
from training import precision_for
shape, precision, device, folder, packed = sys.argv[1:]
device = torch.device(device)
precision = precision or precision_for(device)
print(ensure_checkpoint(shape, None, precision, Path(folder), device, is_packed=packed == "packed"))
"""


def environment_apart() -> dict[str, Any]:
    """As `hf_lema.environment.environment_record`, which initialises CUDA."""
    record = json.loads(_last_line(_ENVIRONMENT))
    assert isinstance(record, dict), "the record is a dictionary"
    return record


def checkpoint_apart(shape: str, precision: str | None, device: str, folder: Path, is_packed: bool = False) -> Path:
    """The folder of a shape's random checkpoint, written first where it is not there; see ``bench_shapes``."""
    packed = "packed" if is_packed else "whole"
    return Path(_last_line(_CHECKPOINT, shape, precision or "", device, str(folder), packed))


def _last_line(code: str, *arguments: str) -> str:
    """What a piece of Python prints last.

    Raises:
        RuntimeError: It failed; its error is told.
    """
    folder = Path(__file__).resolve().parent
    paths = [str(folder), str(folder.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
    )
    if done.returncode != 0:
        raise RuntimeError(f"a process of its own failed: {done.stderr.strip()[-2000:]}")
    return done.stdout.strip().splitlines()[-1]
