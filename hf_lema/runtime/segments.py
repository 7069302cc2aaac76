"""Segments of the device that PyTorch's allocator holds, and what is free of them.

Responsibility: that what many tensors of a step come and go in is one piece. Knows bytes, not what they are for.

Note [one segment]: PyTorch's allocator takes a segment of the device for each large tensor that fits into none that it
has. Segments do not join, so the sizes of a first step decide what the later ones fit into. Before a plan's first step
one segment is taken for what its largest phase computes with, and left to the allocator, which cuts it up and joins it
again. What is made in that step and stays (workspaces of cuBLAS, the ring of boundary activations) lies in it then, so
it is never given back; a later plan uses the rest. Where layers keep activations it is taken before the second step:
the copies of the first would cut it up for good. While layers become resident what is free of it is held, or they would
settle in it.
"""

from __future__ import annotations

import torch


def take_segment(nbytes: int, device: torch.device) -> None:
    """Has the allocator keep so many bytes in one piece, unless it has half as many: most of what it is for."""
    if max(_free_pieces(device), default=0) < nbytes // 2:
        torch.empty(nbytes, dtype=torch.uint8, device=device)


def hold_free(least_bytes: int, device: torch.device) -> list[torch.Tensor]:
    """Everything that the allocator has free for this stream in pieces of so many bytes or more.

    While the tensors live, what is so large gets memory of its own.
    """
    # The allocator takes the smallest piece that is large enough: the largest first, and each gets its own.
    sizes = sorted((size for size in _free_pieces(device) if size >= least_bytes), reverse=True)
    return [torch.empty(size, dtype=torch.uint8, device=device) for size in sizes]


def _free_pieces(device: torch.device) -> list[int]:
    """Bytes of each piece that the allocator has free for this stream."""
    stream = torch.cuda.current_stream(device)
    return [
        block["size"]
        for segment in torch.cuda.memory_snapshot()
        if segment["device"] == stream.device_index and segment["stream"] == stream.cuda_stream
        for block in segment["blocks"]
        if block["state"] == "inactive"
    ]
