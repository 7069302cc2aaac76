"""Where every tensor of a checkpoint lies: one safetensors file, or several with their index.

Responsibility: finding the files of a checkpoint in a folder, joining their headers, refusing what is incomplete or
damaged before anything is read. Reads no tensor. Knows torch dtypes, but no devices, threads or transformers.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from hf_lema.files.file_set import FileSet, ReadSpan, merge_spans, read_spans_into
from hf_lema.files.foreign_json import MAX_LISTED, listing, parse_json, shown
from hf_lema.files.layout import ALIGNMENT, LayerLayout, PackedMatrix, TensorSpec, align_up, make_layout, tensor_nbytes
from hf_lema.files.safetensors_header import (
    DTYPE_NAMES,
    DTYPES,
    MAX_HEADER_BYTES,
    SafetensorsHeader,
    TensorLocation,
    read_header,
)

__all__ = [
    "ALIGNMENT",
    "DTYPES",
    "DTYPE_NAMES",
    "CheckpointIndex",
    "FileSet",
    "LayerLayout",
    "PackedMatrix",
    "ReadSpan",
    "SafetensorsHeader",
    "TensorLocation",
    "TensorSpec",
    "align_up",
    "make_layout",
    "merge_spans",
    "read_header",
    "read_spans_into",
    "tensor_nbytes",
]

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
_PICKLED_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
_MAX_NAME_BYTES = 255  # Linux takes no longer name of a file
_NUM_SAMPLES = 64
_SAMPLE_BYTES = 4096
_NEVER_OPENED = "Pickled files are never opened here: they can run code"


@dataclass(frozen=True, kw_only=True)
class CheckpointIndex:
    """Every tensor of a checkpoint and where it lies.

    Attributes:
        folder: The folder that was opened.
        headers: One for each file, in the order of the file names.
        tensors: Name -> location, over all files.
        metadata: The free text entries of all headers.
    """

    folder: Path
    headers: tuple[SafetensorsHeader, ...]
    tensors: Mapping[str, TensorLocation]
    metadata: Mapping[str, str]

    @classmethod
    def open(cls, folder: str | Path) -> CheckpointIndex:
        """Index the checkpoint in a folder: ``model.safetensors``, else its shards, else the one safetensors file.

        Args:
            folder: The folder.

        Returns:
            The index. Nothing stays open.

        Raises:
            FileNotFoundError: There is no such folder, no safetensors file in it, or shards are missing.
            ValueError: The folder holds several safetensors files without an index; the index is damaged, names files
                outside its folder or tensors that its shards do not hold; a file is damaged or cut; two shards hold
                the same tensor. The message lists all that is wrong.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is no folder: expected one that holds {SINGLE_NAME} or its shards")
        if (folder / SINGLE_NAME).is_file():
            return cls._join(folder, [SINGLE_NAME], None)
        if (folder / INDEX_NAME).is_file():
            weight_map = read_weight_map(folder / INDEX_NAME)
            names = sorted(set(weight_map.values()))
            missing = [shown(name) for name in names if not (folder / name).is_file()]
            if missing:
                raise FileNotFoundError(
                    f"{folder / INDEX_NAME} names {len(names)} shards, missing are {len(missing)}: "
                    f"{shown(', '.join(missing), 2000)}. Fetch the checkpoint again"
                )
            return cls._join(folder, names, weight_map)
        return cls._join(folder, [_single_file(folder)], None)

    @classmethod
    def _join(cls, folder: Path, names: Sequence[str], weight_map: Mapping[str, str] | None) -> CheckpointIndex:
        results = [_try_header(folder / name) for name in names]
        headers = [result for result in results if isinstance(result, SafetensorsHeader)]
        problems = [result for result in results if isinstance(result, str)]
        tensors: dict[str, TensorLocation] = {}
        for header in headers:
            for name, location in header.tensors.items():
                if name in tensors:
                    paths = f"{tensors[name].path} and {location.path}"
                    problems.append(f"tensor {shown(name)!r} is in two shards: {paths}")
                tensors[name] = location
        if weight_map is not None and not problems:
            problems = [
                f"tensor {shown(name)!r} is not in {shard}, where {INDEX_NAME} expects it"
                for name, shard in weight_map.items()
                if name not in tensors or tensors[name].path != folder / shard
            ]
        if problems:
            raise ValueError(f"the checkpoint in {folder} cannot be used:{listing(problems, max_chars=20_000)}")
        metadata = {key: text for header in headers for key, text in header.metadata.items()}
        return cls(folder=folder, headers=tuple(headers), tensors=tensors, metadata=metadata)

    def identity(self) -> str:
        """A digest that changes when the checkpoint does, to recognise what was made from it.

        It covers path, size, time of the last write and header of each file, not the data: to read that costs as much
        as to make a pack anew. A checkpoint that was copied elsewhere has another identity.

        Returns:
            64 hexadecimal digits.

        Raises:
            FileNotFoundError: A file is gone.
        """
        files = []
        for header in self.headers:
            path = header.path.resolve()
            files.append([str(path), header.nbytes, path.stat().st_mtime_ns, header.sha256])
        return hashlib.sha256(json.dumps(files).encode()).hexdigest()

    def fingerprint(self) -> str:
        """What the checkpoint's files are, wherever they lie: a copy elsewhere has the same, another model has not.

        Returns:
            A JSON list with, for each file, its name, its size, the SHA-256 of its header, and one of samples of its
            data (``_NUM_SAMPLES`` of ``_SAMPLE_BYTES`` bytes, evenly spaced).

        Raises:
            FileNotFoundError: A file is gone.
        """
        found = []
        for header in self.headers:
            samples, last = hashlib.sha256(), max(0, header.nbytes - _SAMPLE_BYTES)
            with header.path.open("rb") as file:
                for number in range(_NUM_SAMPLES):
                    file.seek(last * number // (_NUM_SAMPLES - 1))
                    samples.update(file.read(_SAMPLE_BYTES))
            found.append([header.path.name, header.nbytes, header.sha256, samples.hexdigest()])
        return json.dumps(found)

    def open_files(self) -> FileSet:
        """Give a new set of the checkpoint's files to read from. The caller owns it."""
        return FileSet({header.path: header.nbytes for header in self.headers})


def _try_header(path: Path) -> SafetensorsHeader | str:
    """The header, or what is wrong with the file: one damaged shard must not hide the next."""
    try:
        return read_header(path)
    except ValueError as error:
        return str(error)


def read_weight_map(path: Path) -> dict[str, str]:
    """Read which shard holds which tensor; refuse an index that leads out of its folder.

    Args:
        path: An index as transformers writes it, of safetensors or of other files.

    Returns:
        Name of the tensor -> name of its file, relative to the index.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no such index, or names files outside its folder.
    """
    if path.stat().st_size > MAX_HEADER_BYTES:
        raise ValueError(f"{path} has more than {MAX_HEADER_BYTES} bytes: it is no index. Fetch it again")
    try:
        index, repeated = parse_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON text: {error}. Fetch it again") from error
    if repeated:
        names = ", ".join(repr(shown(name)) for name in repeated[:MAX_LISTED])
        raise ValueError(f"{path} names {len(repeated)} entries more than once: {names}. Fetch it again")
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(n, str) for n in weight_map.values()):
        raise ValueError(f"{path} has no 'weight_map' of tensor names to file names. Fetch it again")
    # A link inside the folder may lead out of it: that is how the hub's cache stores files. An index cannot make one.
    outside = sorted({name for name in weight_map.values() if not _stays_inside(name)})
    if outside:
        names = ", ".join(repr(shown(name)) for name in outside[:MAX_LISTED])
        raise ValueError(
            f"{path} names {len(outside)} files outside its folder: {names}. Expected plain file names. "
            "Do not trust this checkpoint"
        )
    return weight_map


def _stays_inside(name: str) -> bool:
    """Whether a name is one that a file in the folder, or below it, can have."""
    try:
        encoded = os.fsencode(name)
    except UnicodeEncodeError:
        return False
    path = PurePosixPath(name)
    is_inside = bool(path.parts) and not path.is_absolute() and ".." not in path.parts
    return is_inside and b"\0" not in encoded and len(encoded) <= _MAX_NAME_BYTES


def _single_file(folder: Path) -> str:
    """The one safetensors file of a folder that has neither the usual name nor an index."""
    files = sorted(path.name for path in folder.iterdir() if path.is_file())
    found = [name for name in files if name.endswith(".safetensors")]
    if len(found) == 1 and found[0] != "adapter_model.safetensors":
        return found[0]
    if len(found) > 1:
        raise ValueError(
            f"{folder} holds {len(found)} safetensors files ({', '.join(found)}) but no {SINGLE_NAME} and no "
            f"{INDEX_NAME}. Expected one of them: save the model again with save_pretrained"
        )
    pickled = [name for name in files if name.endswith(_PICKLED_SUFFIXES)]
    if pickled and not found:
        remedy = (
            f"hf-lema pack {folder} OTHER_FOLDER, and train from that"
            if any(name.endswith(".bin") for name in pickled)
            else "AutoModelForCausalLM.from_pretrained(...).save_pretrained(folder), with transformers"
        )
        raise FileNotFoundError(
            f"{folder} holds no safetensors file, only {', '.join(pickled)}. Convert it once where you trust its "
            f"origin: {remedy}. {_NEVER_OPENED}"
        )
    if found:
        raise FileNotFoundError(
            f"{folder} holds only an adapter ({found[0]}), no model. Load the base model first, then "
            "PeftModel.from_pretrained(model, folder)"
        )
    raise FileNotFoundError(f"{folder} holds no safetensors file, expected {SINGLE_NAME} or {INDEX_NAME}")
