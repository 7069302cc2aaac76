"""Proof on the user's own machine that streamed visits give what resident layers give.

Responsibility: `SelfCheck` and the visit that is run twice, once with lent weights and once with weights fetched
plainly from where they rest. Knows nothing of slots, streams or files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, cast

import torch

from hf_lema.layer.recompute import Visit
from hf_lema.layer.visit_options import StreamedLayer

NUM_CHECKED_VISITS = 2
"""Training visits of each layer that are checked: the first, and one after every slot has been used again."""

MAX_RELATIVE_ERROR = 1e-2
"""Between the two runs. Equal weights give equal bits unless a kernel adds in an order of its own (flash attention's
backward does): that stays far below, weights of another layer do not."""


class RestingLayer(StreamedLayer, Protocol):
    """What a check asks of a layer besides."""

    def weights_at_rest(self) -> AbstractContextManager[None]:
        """Registers plain copies of the weights at rest, on the device, for the duration of the block."""

    def bytes_at_rest(self) -> Sequence[torch.Tensor]:
        """The weights at rest, on the host."""


class SelfCheck:
    """Counts what was checked; shared by all layers of a model.

    Attributes:
        num_visits: Visits, forward and backward, that were run twice.
        num_equal: Those of them whose results were equal bit for bit.
        max_relative_error: The largest of the others.
    """

    def __init__(self) -> None:
        self.num_visits = 0
        self.num_equal = 0
        self.max_relative_error = 0.0
        self._num_left: dict[int, int] = {}
        self._digests: dict[int, str] = {}

    def wants(self, layer_idx: int) -> bool:
        """Whether the coming training visit of a layer is to be checked."""
        left = self._num_left.setdefault(layer_idx, NUM_CHECKED_VISITS)
        self._num_left[layer_idx] = left - 1
        return left > 0

    def compare(
        self, what: str, streamed: Sequence[torch.Tensor | None], resident: Sequence[torch.Tensor | None]
    ) -> None:
        """Compares two results of one visit.

        Raises:
            RuntimeError: They differ by more than rounding.
        """
        self.num_visits += 1
        pairs = [(a, b) for a, b in zip(streamed, resident, strict=True) if a is not None and b is not None]
        if len(pairs) == sum(a is not None for a in streamed) and all(torch.equal(a, b) for a, b in pairs):
            self.num_equal += 1
            return
        errors = [float((a.float() - b.float()).norm() / b.float().norm().clamp_min(1e-30)) for a, b in pairs]
        worst = max(errors, default=0.0)
        self.max_relative_error = max(self.max_relative_error, worst)
        if not worst <= MAX_RELATIVE_ERROR:
            raise RuntimeError(
                f"self-check: {what} of the streamed layer is off by {worst:.3g} of its norm from the same layer with "
                "its weights fetched plainly. Do not trust this run; please report it with the output of `hf-lema "
                "doctor`"
            )

    def watch_base(self, layer_idx: int, tensors: Sequence[torch.Tensor]) -> None:
        """Remembers a layer's bytes on the host, or sees that they are as they were.

        Raises:
            RuntimeError: They were changed.
        """
        digest = hashlib.blake2b()
        for tensor in tensors:
            digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data)
        if self._digests.setdefault(layer_idx, digest.hexdigest()) != digest.hexdigest():
            raise RuntimeError(f"self-check: layer {layer_idx}: the base weights changed during training")


class CheckedVisit(Visit):
    """A visit that is run a second time with weights that were not streamed; what it gives is the first result."""

    check: SelfCheck

    def run_forward(self, hidden: torch.Tensor, trainables: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """As `Visit.run_forward`.

        Raises:
            RuntimeError: The check failed.
        """
        layer = cast("RestingLayer", self.layer)
        self.check.watch_base(layer.layer_idx, layer.bytes_at_rest())
        outputs = super().run_forward(hidden, trainables)
        self._compare_output(outputs, hidden, trainables)
        return outputs

    def run_kept(
        self, hidden: torch.Tensor, trainables: tuple[torch.Tensor, ...], needs_gradient: bool
    ) -> tuple[torch.Tensor, ...]:
        """As `Visit.run_kept`; the second run keeps no graph.

        Raises:
            RuntimeError: The check failed.
        """
        layer = cast("RestingLayer", self.layer)
        self.check.watch_base(layer.layer_idx, layer.bytes_at_rest())
        outputs = super().run_kept(hidden, trainables, needs_gradient)
        self._compare_output(outputs, hidden, tuple(t.detach() for t in trainables))
        return outputs

    def _compare_output(
        self, outputs: tuple[torch.Tensor, ...], hidden: torch.Tensor, trainables: tuple[torch.Tensor, ...]
    ) -> None:
        layer = cast("RestingLayer", self.layer)
        with self._rng.replayed(), layer.weights_at_rest():
            again = super().run_forward(hidden, trainables)
        self.check.compare(f"layer {layer.layer_idx}: the output", outputs, again)

    def gradients(
        self, hidden: torch.Tensor, trainables: tuple[torch.Tensor, ...], grad_outputs: tuple[torch.Tensor | None, ...]
    ) -> list[torch.Tensor | None]:
        """As `Visit.gradients`.

        Raises:
            RuntimeError: The check failed.
        """
        layer = cast("RestingLayer", self.layer)
        grads = super().gradients(hidden, trainables, grad_outputs)
        with layer.weights_at_rest():
            again = super().gradients(hidden, trainables, grad_outputs)
        self.check.compare(f"layer {layer.layer_idx}: the gradient", grads, again)
        self.check.watch_base(layer.layer_idx, layer.bytes_at_rest())
        return grads


def check_steps(model: Any, *, vocab_size: int, num_steps: int = 3, batch_size: int = 2, seq_len: int = 64) -> int:
    """Trains a wrapped model with adapters on random tokens, so that its self-check sees real steps.

    Args:
        model: With ``LemaConfig(self_check=True)``.
        vocab_size: Of the tokens.
        num_steps: Optimizer steps.
        batch_size: Sequences.
        seq_len: Tokens of each.

    Returns:
        How many trainable tensors there are.

    Raises:
        RuntimeError: A check failed, the loss is not finite, or no adapter moved.
    """
    trainables = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trainables]
    optimizer = torch.optim.AdamW(trainables, lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    model.train()
    for step in range(num_steps):
        ids = torch.randint(0, vocab_size, (batch_size, seq_len), generator=generator).to(trainables[0].device)
        loss = model(input_ids=ids, labels=ids).loss
        if not torch.isfinite(loss):
            raise RuntimeError(f"self-check: the loss of step {step} is {float(loss)}")
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    if all(torch.equal(p, old) for p, old in zip(trainables, before, strict=True)):
        raise RuntimeError(f"self-check: {num_steps} steps moved none of {len(trainables)} trainable tensors")
    return len(trainables)
