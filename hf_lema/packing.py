"""Making packs: from a checkpoint's decoder layers, layer by layer, and keeping them for the next run.

Responsibility: writing what a source gives into a pack, and finding the pack that was made before. Knows nothing of the
pack's format or of how a layer's bytes are made.
"""

from __future__ import annotations

import fcntl
import logging
import os
from pathlib import Path

import torch
from transformers.utils.logging import tqdm

from hf_lema.pack import PACK_SUFFIX, PackIndex, PackWriter, open_pack
from hf_lema.source import CheckpointSource
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
    writer = PackWriter(path, source.layouts, source_identity=source.identity, dtype=source.dtype)
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
    folder = pack_folder() if folder is None else Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    dtype = str(source.dtype).removeprefix("torch.")
    path = folder / f"{source.identity[:32]}-{dtype}{PACK_SUFFIX}"
    with path.with_name(f".{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.is_file():
            pack = open_pack(path)
            if pack.source_identity == source.identity and pack.layouts == source.layouts:
                return pack
        return write_pack(source, path)
