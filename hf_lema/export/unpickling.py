"""A checkpoint that exists only as ``.bin`` files, rewritten as safetensors on explicit request.

Responsibility: finding pickled shards, reading them without running code, writing them tensor by tensor. Nothing else
of the package opens a pickled file, and nothing but the user's own command leads here.
"""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers.utils.logging import tqdm

from hf_lema.export.companion_files import GENERATION_FILE, TOKENIZER_FILES, find_files
from hf_lema.files.checkpoint import INDEX_NAME, SINGLE_NAME, read_weight_map
from hf_lema.files.checkpoint_writer import CheckpointWriter, plan_checkpoint
from hf_lema.files.foreign_json import shown
from hf_lema.files.staging import StagedFolder, refuse_occupied
from hf_lema.model.layer_tensors import cast_checked
from hf_lema.model.locating import parse_dtype
from hf_lema.units import MIB, parse_bytes

PICKLE_NAME = "pytorch_model.bin"
PICKLE_INDEX_NAME = "pytorch_model.bin.index.json"
_COPIED = ("config.json", GENERATION_FILE, *TOKENIZER_FILES)


@dataclass(frozen=True, kw_only=True)
class ConvertedCheckpoint:
    """A checkpoint that was rewritten.

    Attributes:
        folder: Where it is.
        nbytes: Bytes of its weights.
        num_tensors: How many tensors it holds.
    """

    folder: Path
    nbytes: int
    num_tensors: int


def find_pickled(name_or_path: str | Path, **hub: Any) -> Path | None:
    """Find a model that has ``.bin`` weights and no safetensors; from the hub, fetch them and what lies beside them.

    Args:
        name_or_path: Folder or hub id.
        **hub: ``revision``, ``token``, ``cache_dir``.

    Returns:
        The folder, or None where there are safetensors or neither.
    """
    name, folder = str(name_or_path), Path(name_or_path)
    if folder.is_dir():
        pickled = [path for file_name in (PICKLE_NAME, PICKLE_INDEX_NAME) if (path := folder / file_name).is_file()]
        return folder if pickled and not any(folder.glob("*.safetensors")) else None
    if any(find_files(name, (SINGLE_NAME, INDEX_NAME), hub)) or not any(
        find_files(name, (PICKLE_NAME, PICKLE_INDEX_NAME), hub)
    ):
        return None
    return Path(snapshot_download(name, allow_patterns=["pytorch_model*.bin", PICKLE_INDEX_NAME, *_COPIED], **hub))


def convert_pickled(
    folder: str | Path,
    output: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    max_shard_size: int | str = "5GB",
) -> ConvertedCheckpoint:
    """Rewrite the ``.bin`` files of a folder as safetensors, with the other files that a model needs.

    The files are mapped, not read: one tensor is in memory at a time. ``torch.load(weights_only=True)`` opens them,
    which builds tensors and runs no code of the file. A tensor that has several names is written under each.

    Args:
        folder: Holds ``pytorch_model.bin``, or its shards and their index, and ``config.json``.
        output: Folder to write. It must not exist, or be empty.
        dtype: What floating tensors are cast to; None leaves them as they are.
        max_shard_size: Bytes, or text such as ``"5GB"``: where a new file begins.

    Returns:
        What was written.

    Raises:
        FileNotFoundError: Files are missing; all are named.
        FileExistsError: The output exists and is not empty.
        ValueError: A file holds more than tensors or is damaged, or a finite value does not fit the dtype.
        OSError: Too little disk space (``ENOSPC``).
    """
    folder, output = Path(folder), Path(output)
    refuse_occupied(output)
    wanted = None if dtype is None else parse_dtype(dtype)
    paths = _pickled_files(folder)
    tensors: dict[str, torch.Tensor] = {}
    for path in paths:
        tensors |= _mapped(path)
    dtypes = {
        name: wanted if wanted is not None and tensor.is_floating_point() else tensor.dtype
        for name, tensor in tensors.items()
    }
    layout = plan_checkpoint(
        {name: (tuple(tensor.shape), dtypes[name]) for name, tensor in tensors.items()}, parse_bytes(max_shard_size)
    )
    companions = [folder / name for name in _COPIED if (folder / name).is_file()]
    needed_bytes = layout.nbytes + sum(path.stat().st_size for path in companions) + MIB
    with StagedFolder(output, needed_bytes, "the converted checkpoint") as staged:
        for path in companions:
            shutil.copyfile(path, staged / path.name)
        with CheckpointWriter(staged, layout) as writer:
            for name, tensor in tqdm(tensors.items(), desc="Converting", delay=2):
                writer.write(name, cast_checked(name, tensor, dtypes[name]))
    return ConvertedCheckpoint(folder=output, nbytes=layout.nbytes, num_tensors=len(tensors))


def _pickled_files(folder: Path) -> list[Path]:
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no config.json")
    if (folder / PICKLE_NAME).is_file():
        return [folder / PICKLE_NAME]
    if not (folder / PICKLE_INDEX_NAME).is_file():
        raise FileNotFoundError(f"{folder} holds neither {PICKLE_NAME} nor {PICKLE_INDEX_NAME}")
    names = sorted(set(read_weight_map(folder / PICKLE_INDEX_NAME).values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder / PICKLE_INDEX_NAME} names {len(names)} files, missing are {len(missing)}: {', '.join(missing)}. "
            "Fetch the checkpoint again"
        )
    return [folder / name for name in names]


def _mapped(path: Path) -> Mapping[str, torch.Tensor]:
    """The tensors of one file, mapped."""
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    # A damaged file fails wherever the unpickler happens to be: in an archive, an opcode, a tensor's own arguments.
    except (
        ArithmeticError,
        AssertionError,
        AttributeError,
        EOFError,
        LookupError,
        MemoryError,
        RuntimeError,
        TypeError,
        ValueError,
        pickle.UnpicklingError,
    ) as error:
        raise ValueError(
            f"{path} cannot be opened safely: {error}\nExpected a file of tensors alone, saved by torch 1.6 or later"
        ) from error
    if not isinstance(loaded, dict):
        raise ValueError(f"{path} holds a {type(loaded).__name__}. Expected a state dict")
    others = [str(name) for name, value in loaded.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise ValueError(
            f"{path} holds entries that are no tensors: {shown(', '.join(others), 2000)}. Expected a state dict"
        )
    return dict(loaded)
