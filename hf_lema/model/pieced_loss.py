"""The causal-LM loss with a head of which only a piece of rows is on the device at a time.

Responsibility: the sum over pieces, forward and backward. Knows nothing of models: logits come from a callable.

With rows outside and tokens inside, the head crosses the bus once in the forward and once in the backward, whatever
the number of tokens. The log-sum-exp over the pieces is kept as a running maximum and a running sum (Milakov and
Gimelshein, "Online normalizer calculation for softmax", 2018).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from hf_lema.layer.replay import AutocastState


@dataclass(frozen=True, kw_only=True)
class PiecedHead:
    """A head in pieces.

    Attributes:
        logits_of: Hidden states [tokens, hidden] -> logits [tokens, rows] of the piece that is on the device.
        pieces: Generator of (begin, end) of the rows on the device; takes ``backwards``.
        max_logits: Most logits that may exist at once.
    """

    logits_of: Callable[[torch.Tensor], torch.Tensor]
    pieces: Callable[..., Generator[tuple[int, int], None, None]]
    max_logits: int

    def parts(self, num_tokens: int, num_rows: int) -> Iterator[slice]:
        """The tokens in parts whose logits may exist at once."""
        size = max(64, self.max_logits // num_rows // 64 * 64)
        return (slice(begin, min(begin + size, num_tokens)) for begin in range(0, num_tokens, size))


class PiecedLoss(torch.autograd.Function):
    """Cross-entropy of hidden states against targets, summed and divided by a count of tokens.

    Call as ``PiecedLoss.apply(head, hidden, targets, count, ignore_index)`` with hidden states [tokens, hidden],
    targets [tokens] and a count (number or 0-d tensor). The head itself gets no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, head: PiecedHead, hidden: torch.Tensor, targets: torch.Tensor, count: Any, ignore_index: int
    ) -> torch.Tensor:
        ctx.head, ctx.count, ctx.ignore_index = head, count, ignore_index
        ctx.autocast = AutocastState.capture(hidden.device)
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        highest = torch.full(targets.shape, -torch.inf, dtype=dtype, device=hidden.device)
        total, picked = torch.zeros_like(highest), torch.zeros_like(highest)
        with closing(head.pieces()) as pieces:
            for begin, end in pieces:
                for part in head.parts(len(targets), end - begin):
                    logits = head.logits_of(hidden[part]).to(dtype)
                    above = torch.maximum(highest[part], logits.amax(-1))
                    sums = (logits - above[:, None]).exp_().sum(-1)
                    total[part] = total[part] * (highest[part] - above).exp_() + sums
                    highest[part] = above
                    place, is_inside = _within(targets[part], begin, end)
                    picked[part] = torch.where(is_inside, logits.gather(-1, place[:, None])[:, 0], picked[part])
        log_sums = highest + total.log()
        ctx.save_for_backward(hidden, targets, log_sums)
        losses = torch.where(targets == ignore_index, torch.zeros_like(picked), log_sums - picked)
        loss: torch.Tensor = losses.sum() / count
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        head: PiecedHead = ctx.head
        hidden, targets, log_sums = ctx.saved_tensors
        weights = torch.where(targets == ctx.ignore_index, torch.zeros_like(log_sums), grad / ctx.count)
        sums = torch.zeros(hidden.shape, dtype=log_sums.dtype, device=hidden.device)
        with ctx.autocast.entered(), closing(head.pieces(backwards=True)) as pieces:
            for begin, end in pieces:
                for part in head.parts(len(targets), end - begin):
                    sums[part] += _part_gradient(
                        head, hidden[part], targets[part], log_sums[part], weights[part], begin, end
                    )
        return None, sums.to(hidden.dtype), None, None, None


def _part_gradient(
    head: PiecedHead,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    log_sums: torch.Tensor,
    weights: torch.Tensor,
    begin: int,
    end: int,
) -> torch.Tensor:
    """What one piece of rows gives to the gradient of some tokens: softmax less one at the target, through the head."""
    with torch.enable_grad():
        leaf = hidden.detach().requires_grad_(True)
        logits = head.logits_of(leaf).to(log_sums.dtype)
    slopes = (logits.detach() - log_sums[:, None]).exp_()
    place, is_inside = _within(targets, begin, end)
    slopes.scatter_add_(-1, place[:, None], -is_inside.to(slopes.dtype)[:, None])
    gradients: tuple[torch.Tensor, ...] = torch.autograd.grad(logits, leaf, slopes.mul_(weights[:, None]))
    return gradients[0]


def _within(targets: torch.Tensor, begin: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Column of each target in a piece (any column where it is not in it), and whether it is in it."""
    return (targets - begin).clamp(0, end - begin - 1), (targets >= begin) & (targets < end)
