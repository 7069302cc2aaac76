"""Making packs: from a checkpoint's decoder layers, layer by layer, and keeping them for the next run.

Responsibility: writing what a source gives into a pack, finding the pack that was made before, refusing a foreign one.
Knows nothing of the pack's format or of how a layer's bytes are made.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers.utils.logging import tqdm

from hf_lema.files.layout import LayerLayout
from hf_lema.files.pack import PACK_SUFFIX, PackIndex, PackWriter, open_pack
from hf_lema.model.source import CheckpointSource
from hf_lema.units import format_bytes

logger = logging.getLogger(__name__)


def write_pack(source: CheckpointSource, path: str | Path) -> PackIndex:
    """Write all layers of a source into a pack, one layer in memory at a time.

    Says before it starts how much disk space it takes and how much there is; shows a progress bar if it takes longer
    than two seconds.

    Args:
        source: The layers.
        path: The pack's name, by custom ending in ``.lema.safetensors``.

    Returns:
        The finished pack.

    Raises:
        OSError: There is too little disk space.
        ValueError: A finite value does not fit the dtype, or a file of the checkpoint was replaced or cut. No pack is
            left.
    """
    writer = PackWriter(
        path,
        source.layouts,
        source_identity=source.identity,
        dtype=source.dtype,
        source_files=source.fingerprint(),
        made_with=source.made_with,
    )
    logger.warning(
        "Writing the decoder layers to %s, once: %s needed, %s of disk space available (%s)",
        path,
        format_bytes(writer.nbytes),
        format_bytes(writer.available_bytes()),
        source.reason or "asked for",
    )
    buffer = torch.zeros(max((layout.nbytes for layout in source.layouts), default=0), dtype=torch.uint8)
    with writer:
        for layout in tqdm(source.layouts, desc="Writing layers", delay=2):
            source.write_layer(layout.layer_idx, buffer)
            writer.write_layer(layout.layer_idx, buffer)
    return open_pack(path)


def pack_folder() -> Path:
    """Where packs are kept: ``packs`` in ``$HF_LEMA_CACHE``, else in ``~/.cache/hf_lema``."""
    return Path(os.environ.get("HF_LEMA_CACHE") or Path.home() / ".cache" / "hf_lema") / "packs"


def cached_pack(source: CheckpointSource, folder: str | Path | None = None) -> PackIndex:
    """Give the pack of a source, written now or before. Of several processes that ask at once, one writes.

    Args:
        source: The layers.
        folder: Where packs are kept; None for `pack_folder`.

    Returns:
        A pack that was made from this source.

    Raises:
        OSError: There is too little disk space.
        ValueError: As for `write_pack`; or a file with the pack's name is damaged.
    """
    path = _cached_path(source, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return find_pack(source, folder) or write_pack(source, path)


def find_pack(source: CheckpointSource, folder: str | Path | None = None) -> PackIndex | None:
    """Give the pack of a source that was kept from an earlier run, if there is one.

    Raises:
        ValueError: A file with the pack's name is damaged.
    """
    path = _cached_path(source, folder)
    if not path.is_file():
        return None
    pack = open_pack(path)
    is_of_source = pack.source_identity == source.identity and pack.layouts == source.layouts
    return pack if is_of_source else None


def _cached_path(source: CheckpointSource, folder: str | Path | None) -> Path:
    dtype = str(source.dtype).removeprefix("torch.")
    return (pack_folder() if folder is None else Path(folder)) / f"{source.identity[:32]}-{dtype}{PACK_SUFFIX}"


def given_pack(path: str | Path, source: CheckpointSource) -> PackIndex:
    """Open a pack that the caller names, and see that it was made from this source, wherever that lay then.

    Args:
        path: The pack.
        source: What its layers must be.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged, no pack, of another version, of another checkpoint, or packed or cast in another way;
            the message says in which.
    """
    pack = open_pack(path)
    problems = []
    if pack.layouts != source.layouts:
        problems.append(f"it holds {_described(pack.layouts)}, the model asks for {_described(source.layouts)}")
    then, now = (json.loads(text) for text in (pack.source_files, source.fingerprint()))
    differing = sorted({file[0] for file in [*then, *now] if file not in then or file not in now})
    if differing:
        problems.append(f"it was made from a checkpoint with other files: {', '.join(differing)}")
    if problems:
        raise ValueError(
            f"{path} is not the pack of this model: {'; '.join(problems)}. Pack the model again, or ask for the dtype "
            "and quantization that the pack was made with"
        )
    return pack


def _described(layouts: Sequence[LayerLayout]) -> str:
    """Layouts in a few words, for a message."""
    kinds = {
        f"{m.quant_type}{' with double quantization' if m.is_nested else ''} of {m.dtype}"
        for layout in layouts
        for m in layout.packed
    }
    plain = {str(spec.dtype) for layout in layouts if not layout.packed for spec in layout.tensors}
    nbytes = sum(layout.nbytes for layout in layouts)
    return f"{len(layouts)} layers of {', '.join(sorted(kinds | plain))} in {format_bytes(nbytes)}"
