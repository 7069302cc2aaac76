"""Embedding and head off the device: looked up in host memory, and lent to the device for the loss.

Responsibility: where the weights outside the decoder layers lie, the pieces of the head. Knows nothing of losses,
layers or budgets.

Note [mapped weights]: page-locked memory has an address on the device too. A tensor over that address is an ordinary
CUDA tensor to every module: the embedding gathers its few rows over the bus with the kernel that it always uses, tied
weights stay one tensor, and what reads the whole weight is slow, not wrong. The head does read all of it, so its module
computes with a copy on the device, in pieces of rows where the whole would be too large.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_lema.files.layout import align_up
from hf_lema.runtime.events import CopyStream, make_event
from hf_lema.runtime.host_memory import PAGE_LOCK_ADVICE, HostBuffer, device_view, tensor_over
from hf_lema.units import format_bytes

PIECE_BYTES = 64 * 2**20
"""A piece in which a head in host memory comes to the device; two are there, one computed with and one on its way."""


class OutsideWeights:
    """The input embedding and the output head of a language model.

    Only what is frozen and dense is moved; an adapter on either stays on the device and goes on working.

    Args:
        lm: The model.
        device: Where it computes.
        piece_bytes: Most device memory for a piece of the head.

    Attributes:
        on_host: Whether the weights are in host memory.
    """

    def __init__(self, lm: PreTrainedModel, device: torch.device, piece_bytes: int) -> None:
        self._device = device
        self._piece_bytes = piece_bytes
        self._copies = CopyStream(device)
        self._buffer: HostBuffer | None = None  # owned
        self._lm = weakref.ref(lm)  # whoever closes this object must not keep the model alive
        self._head = _dense(lm.get_output_embeddings())
        self._moved: list[tuple[nn.Parameter, torch.Tensor]] = []  # each with its tensor on the host
        self._head_rows: torch.Tensor | None = None  # the head on the host
        self._refused = False
        self.on_host = False

    def __deepcopy__(self, memo: dict[int, Any]) -> OutsideWeights:
        # PEFT copies a head that `modules_to_save` trains, and its forward with it; the copy is on the device.
        other = object.__new__(OutsideWeights)
        other._head, other.on_host = memo[id(self._head)], False
        return other

    def _weights(self) -> list[nn.Parameter]:
        """The weights that may move, each once: the tied ones are one Parameter."""
        lm = self._lm()
        assert lm is not None
        modules = [_dense(lm.get_input_embeddings()), self._head]
        found = {id(w): w for module in modules if module is not None for w in [module._parameters["weight"]]}
        return [w for w in found.values() if w is not None and not w.requires_grad]

    @property
    def nbytes(self) -> int:
        """Bytes that leave the device with `move_to_host`."""
        return sum(align_up(weight.nbytes) for weight in self._weights())

    @property
    def head_is_lent(self) -> bool:
        """Whether the head's weight is in host memory, and its module computes with a copy."""
        return self.on_host and self._head is not None and "forward" in self._head.__dict__

    @property
    def num_rows(self) -> int:
        """Rows of the head: the size of the vocabulary."""
        assert self._head is not None
        return int(self._head._parameters["weight"].shape[0])  # type: ignore[union-attr]

    @property
    def pinned_bytes(self) -> int:
        """Page-locked bytes held."""
        return self._buffer.pinned_bytes if self._buffer is not None else 0

    def move_to_host(self) -> None:
        """Moves the weights to page-locked memory. Only between steps.

        Where page-locking is refused they stay where they are, with one warning.
        """
        weights = self._weights()
        if self.on_host or self._refused or not weights:
            return
        buffer = HostBuffer(self.nbytes)
        views, begin = [], 0
        for weight in weights:
            view = tensor_over(buffer.memory, begin, tuple(weight.shape), weight.dtype)
            view.copy_(weight.data)
            views.append(view)
            begin += align_up(weight.nbytes)
        if self._device.type == "cuda" and not buffer.page_lock():
            self._refused = True
            warnings.warn(
                f"page-locking {format_bytes(buffer.nbytes)} for the embedding was refused; embedding and head stay in "
                f"VRAM. {PAGE_LOCK_ADVICE}",
                stacklevel=2,
            )
            return
        for weight, view in zip(weights, views, strict=True):
            weight.data = device_view(view, self._device)
        self._buffer, self._moved = buffer, list(zip(weights, views, strict=True))
        self.on_host = True
        head = self._head
        for weight, view in self._moved:
            if head is not None and head._parameters["weight"] is weight:
                self._head_rows = view
                head.__dict__["forward"] = self._head_forward

    @contextmanager
    def rehearsed(self) -> Iterator[None]:
        """Has the head come in pieces inside the block as if it were in host memory, for a model without data."""
        head = self._head
        if head is not None and any(head._parameters["weight"] is weight for weight in self._weights()):
            self._head_rows = head._parameters["weight"]
            head.__dict__["forward"] = self._head_forward
        self.on_host = True
        try:
            yield
        finally:
            self.on_host, self._head_rows = False, None
            if head is not None:
                head.__dict__.pop("forward", None)

    def move_to_device(self) -> None:
        """Moves the weights back. Only between steps."""
        if self.on_host:
            self._leave_host(lambda view: view.to(self._device, copy=True))

    def close(self) -> None:
        """Gives the page-lock back; the weights stay readable on the host. May be called any number of times."""
        if self.on_host:
            self._leave_host(lambda view: view)

    def _leave_host(self, moved: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for weight, view in self._moved:
            weight.data = moved(view)
        if self._head is not None:
            self._head.__dict__.pop("forward", None)
        assert self._buffer is not None
        computed = make_event(self._device)
        computed.record()
        computed.synchronize()  # a lookup may still read the memory; rare, and never inside a visit
        self._copies.synchronize()
        self._buffer.close()
        self._buffer, self._head_rows, self._moved, self.on_host = None, None, [], False

    # ---- the head ----

    def head_pieces(self, *, backwards: bool = False) -> Generator[tuple[int, int], None, None]:
        """Has the head compute with one piece of its rows at a time.

        Inside the loop the head's module gives the logits of rows ``begin..end`` only. The next piece is on its way
        meanwhile. Use it in ``contextlib.closing``: an error inside the loop must not leave a piece registered.

        Args:
            backwards: Whether to begin with the last rows.

        Yields:
            (begin, end) of the rows.
        """
        assert self._head is not None
        weight, bias = self._head._parameters["weight"], self._head._parameters.get("bias")
        assert weight is not None
        num_rows = weight.shape[0]
        size = max(1, self._piece_bytes * num_rows // weight.nbytes)
        bounds = [(begin, min(begin + size, num_rows)) for begin in range(0, num_rows, size)]
        if backwards:
            bounds.reverse()
        coming = self._fetch(*bounds[0])
        for i, (begin, end) in enumerate(bounds):
            rows, ready = coming
            ready.wait()
            if i + 1 < len(bounds):
                coming = self._fetch(*bounds[i + 1])
            with self._registered(rows, bias[begin:end] if bias is not None else None):
                yield begin, end
            del rows

    @contextmanager
    def head_skipped(self) -> Iterator[None]:
        """Has the head give the logits of its first row only, for a forward whose logits nobody wants."""
        head: Any = self._head
        bias = head._parameters.get("bias")
        # A copy: the weights may move back to the device while it is registered.
        assert self._head_rows is not None
        with self._registered(self._head_rows[:1].to(self._device, copy=True), None if bias is None else bias[:1]):
            yield

    def _fetch(self, begin: int, end: int) -> tuple[torch.Tensor, Any]:
        # A loss whose forward came before the weights moved back finds them on the device.
        source = (self._head._parameters["weight"] if self._head_rows is None else self._head_rows)[begin:end]  # type: ignore[union-attr,index]
        rows = torch.empty(source.shape, dtype=source.dtype, device=self._device)
        allocated, ready = make_event(self._device), make_event(self._device)
        allocated.record()  # the memory may still be read by what had it before
        with torch.no_grad(), self._copies.use():
            allocated.wait()
            rows.copy_(source, non_blocking=True)
            ready.record()
        return rows, ready

    @contextmanager
    def _registered(self, rows: torch.Tensor, bias: torch.Tensor | None) -> Iterator[None]:
        """Registers a part of the head in place of the whole."""
        head: Any = self._head
        parts = {"weight": rows} if bias is None else {"weight": rows, "bias": bias}
        whole = {name: head._parameters[name] for name in parts}
        forward = head.__dict__.pop("forward", None)
        try:
            for name, part in parts.items():
                head._parameters[name] = nn.Parameter(part.detach(), requires_grad=False)
            yield
        finally:
            head._parameters.update(whole)
            if forward is not None:
                head.__dict__["forward"] = forward

    def _head_forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The head's forward, for whoever calls it outside the loss: generation, evaluation with logits."""
        head: Any = self._head
        if not self.on_host:  # moved back while a part was registered
            head.__dict__.pop("forward", None)
            plain: torch.Tensor = type(head).forward(head, *args, **kwargs)
            return plain
        if head._parameters["weight"].requires_grad:  # unfrozen after it was moved: it trains on the device
            self.move_to_device()
            trained: torch.Tensor = type(head).forward(head, *args, **kwargs)
            return trained
        if torch.is_grad_enabled():
            rows, ready = self._fetch(0, self.num_rows)
            ready.wait()
            with self._registered(rows, head._parameters.get("bias")):
                whole: torch.Tensor = type(head).forward(head, *args, **kwargs)
            return whole
        with closing(self.head_pieces()) as pieces:
            return torch.cat([type(head).forward(head, *args, **kwargs) for _ in pieces], dim=-1)


def _dense(module: nn.Module | None) -> nn.Module | None:
    """The module that registers the weight, under what PEFT may have put around it; None if it has no dense one."""
    while module is not None and "weight" not in module._parameters:
        inner = module._modules.get("base_layer") or module._modules.get("original_module")
        if inner is None:
            return None
        module = inner
    return module
