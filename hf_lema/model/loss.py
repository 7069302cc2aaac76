"""The causal-LM loss in chunks of tokens, so that the full logits never exist in training.

Responsibility: running a model's own head and loss on a part of the tokens, and logits that are made when somebody
looks at them. Knows nothing of streaming.

Note [stock head]: no head or loss is written again here. The model's own ``forward`` runs once with the backbone and
one token of logits, then once per chunk with the backbone replaced by that chunk's hidden states; scale, soft-cap, bias
and tied weights are whatever that forward does with them. The labels of a chunk go in shifted already
(``shift_labels``, which transformers' ``ForCausalLMLoss`` takes), and every chunk is divided by the count of the whole
batch, never by its own. A model whose loss does not follow (checked once, against its forward on a few tokens uncut)
keeps its own forward.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from hf_lema.layer.replay import AutocastState
from hf_lema.layer.token_tiles import TokenTiles
from hf_lema.model.outside import OutsideWeights
from hf_lema.model.pieced_loss import PiecedHead, PiecedLoss

MAX_CHUNK_BYTES = 256 * 2**20
"""Bytes that one chunk's logits and their gradients may take. 256 MiB are 585 tokens of Llama-2's vocabulary: large
enough for matrix products at full rate, small beside a layer's activations."""

_BYTES_PER_LOGIT = 14
"""Logits in the model's dtype (2), in fp32 (4), log-probabilities (4), gradient (4)."""

_BYTES_PER_HIDDEN = 16
"""What a norm takes for one number of its input: itself in fp32, and what is computed of it."""

IGNORE_INDEX = -100
"""Label of a token without loss, as in ``torch.nn.functional.cross_entropy``."""

_NUM_CHECKED_TOKENS = 32


class ChunkedLoss:
    """Stands in for the ``forward`` of a language model.

    Args:
        lm: The model.
        plain_forward: The forward of its own class.
        outside: Where the head lies; None for a head that stays on the device.
        max_chunk_bytes: See `MAX_CHUNK_BYTES`.
        is_verified: Whether the model is known to agree with its chunks; it is then not checked.
    """

    def __init__(
        self,
        lm: PreTrainedModel,
        plain_forward: Callable[..., Any],
        outside: OutsideWeights | None = None,
        max_chunk_bytes: int = MAX_CHUNK_BYTES,
        is_verified: bool = False,
    ) -> None:
        self._lm = lm
        self._outside = outside
        self._max_logits = max_chunk_bytes // _BYTES_PER_LOGIT
        self._tiles = TokenTiles(is_verified=is_verified)
        self._tile_tokens = max(64, max_chunk_bytes // (_BYTES_PER_HIDDEN * lm.config.get_text_config().hidden_size))
        self._plain_forward = plain_forward
        self._names = list(inspect.signature(plain_forward).parameters)[1:]
        self._supported = "logits_to_keep" in self._names and lm.base_model is not lm
        self._checked = is_verified
        self._backbone_output: type[Any] = BaseModelOutputWithPast
        vocab_size = lm.config.get_text_config().vocab_size
        self.chunk_tokens = max(64, max_chunk_bytes // (_BYTES_PER_LOGIT * vocab_size) // 64 * 64)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward; with labels and more tokens than a chunk, the logits of its output are deferred."""
        kwargs = {**dict(zip(self._names, args, strict=False)), **kwargs}
        labels: Any = kwargs.get("labels")
        if not self._can_cut(labels, kwargs):
            return self._plain_forward(self._lm, **kwargs)
        backbone_kwargs = {**kwargs, "labels": None, "logits_to_keep": 1}
        with self._backbone_recorded() as seen, self._ends_in_pieces():
            output = self._plain_forward(self._lm, **backbone_kwargs)
        self._backbone_output = type(seen[0])
        hidden = seen[0].last_hidden_state
        if not self._checked and not self._agrees_with_plain(hidden):
            return self._plain_forward(self._lm, **kwargs)
        vocab_size = self._outside.num_rows if self._head_is_lent else output.logits.shape[-1]  # type: ignore[union-attr]
        shape = (*hidden.shape[:-1], vocab_size)
        autocast = AutocastState.capture(hidden.device)
        logits = DeferredLogits(
            lambda: self._logits(hidden, autocast), shape, output.logits.dtype, output.logits.device
        )
        # Made anew: an output keeps its fields in the order in which they were set, and the loss comes first.
        return type(output)(**{"loss": self._loss(hidden, labels, kwargs), **output, "logits": logits})

    def _can_cut(self, labels: Any, kwargs: dict[str, Any]) -> bool:
        return (
            self._supported
            and isinstance(labels, torch.Tensor)
            and (labels.numel() > self.chunk_tokens or self._head_is_lent)
            and _keeps_all_logits(kwargs.get("logits_to_keep", 0))
            and kwargs.get("shift_labels") is None
            and kwargs.get("return_dict", self._lm.config.return_dict) is not False
            and not kwargs.get("output_router_logits", getattr(self._lm.config, "output_router_logits", False))
        )

    @property
    def _head_is_lent(self) -> bool:
        """Whether the head comes in pieces from host memory; one with trainable parts needs gradients and does not."""
        return (
            self._outside is not None
            and self._outside.head_is_lent
            and not any(p.requires_grad for p in self._lm.get_output_embeddings().parameters())
        )

    @contextmanager
    def _ends_in_pieces(self) -> Iterator[None]:
        """Where the head comes in pieces: skips it, and runs the norm before it in tiles of tokens."""
        if not self._head_is_lent:
            yield
            return
        assert self._outside is not None
        backbone = self._lm.base_model
        norms = {name: child for name, child in backbone.named_children() if _is_frozen_norm(child)}
        with self._outside.head_skipped(), self._tiles.around(type(backbone), norms, self._tile_tokens):
            yield

    def _loss(self, hidden: torch.Tensor, labels: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        ignore_index = kwargs.get("ignore_index", IGNORE_INDEX)
        targets = pad(labels, (0, 1), value=ignore_index)[..., 1:].reshape(-1).to(hidden.device)
        num_items = kwargs.get("num_items_in_batch")
        if num_items is None:
            num_items = (targets != ignore_index).sum()
        flat = hidden.reshape(-1, hidden.shape[-1])
        if self._head_is_lent:
            return self._pieced_loss(flat, targets, num_items, ignore_index)
        losses = [
            self._chunk_loss(chunk, part, num_items, ignore_index)
            for chunk, part in zip(flat.split(self.chunk_tokens), targets.split(self.chunk_tokens), strict=True)
        ]
        return torch.stack(losses).sum()

    def _pieced_loss(self, flat: torch.Tensor, targets: torch.Tensor, num_items: Any, ignore: int) -> torch.Tensor:
        def logits_of(part: torch.Tensor) -> torch.Tensor:
            with self._backbone_replaced(part[None]):
                logits: torch.Tensor = self._plain_forward(self._lm).logits[0]
            return logits

        assert self._outside is not None
        head = PiecedHead(logits_of=logits_of, pieces=self._outside.head_pieces, max_logits=self._max_logits)
        loss: torch.Tensor = PiecedLoss.apply(head, flat, targets, num_items, ignore)  # type: ignore[no-untyped-call]
        return loss

    def _chunk_loss(self, chunk: torch.Tensor, targets: torch.Tensor, num_items: Any, ignore: int) -> torch.Tensor:
        """Loss of one chunk over the count of the whole batch; its logits are recomputed in the backward."""

        def head(hidden: torch.Tensor) -> torch.Tensor:
            labels = targets[None]
            with self._backbone_replaced(hidden[None]):
                loss: torch.Tensor = self._plain_forward(
                    self._lm, labels=labels, shift_labels=labels, num_items_in_batch=num_items, ignore_index=ignore
                ).loss
            return loss

        if not torch.is_grad_enabled():
            return head(chunk)
        loss: torch.Tensor = checkpoint(head, chunk, use_reentrant=False)
        return loss

    def _logits(self, hidden: torch.Tensor, autocast: AutocastState) -> torch.Tensor:
        with autocast.entered(), self._backbone_replaced(hidden):
            logits: torch.Tensor = self._plain_forward(self._lm).logits
        return logits

    def _agrees_with_plain(self, hidden: torch.Tensor) -> bool:
        """Compares the loss of a few tokens, whole and in two chunks; a model that disagrees is left alone for good."""
        self._checked = True
        few = hidden[:1, :_NUM_CHECKED_TOKENS].detach()
        labels = torch.arange(few.shape[1], device=few.device)[None] % self._lm.config.get_text_config().vocab_size
        targets = pad(labels, (0, 1), value=IGNORE_INDEX)[0, 1:]
        half = few.shape[1] // 2
        with torch.no_grad():
            with self._backbone_replaced(few):
                whole = self._plain_forward(self._lm, labels=labels).loss
            one = self._pieced_loss if self._head_is_lent else self._chunk_loss
            parts = [
                one(few[0, part], targets[part], few.shape[1] - 1, IGNORE_INDEX)
                for part in (slice(0, half), slice(half, None))
            ]
        self._supported = bool(torch.isclose(torch.stack(parts).sum().to(whole.dtype), whole, rtol=1e-2))
        if not self._supported:
            warnings.warn(
                f"{type(self._lm).__name__} does not use the plain causal-LM loss; its full logits are kept in VRAM",
                stacklevel=2,
            )
        return self._supported

    @contextmanager
    def _backbone_recorded(self) -> Iterator[list[Any]]:
        """Collects what the backbone returns inside the block."""
        plain = self._lm.base_model.forward
        seen: list[Any] = []

        def record(*args: Any, **kwargs: Any) -> Any:
            seen.append(plain(*args, **kwargs))
            return seen[-1]

        with _forward_replaced(self._lm.base_model, record):
            yield seen

    @contextmanager
    def _backbone_replaced(self, hidden: torch.Tensor) -> Iterator[None]:
        """Has the backbone return these hidden states ([batch, tokens, hidden]) inside the block."""
        output = self._backbone_output(last_hidden_state=hidden)
        with _forward_replaced(self._lm.base_model, lambda *_, **__: output):
            yield


def _keeps_all_logits(logits_to_keep: Any) -> bool:
    """Whether nothing is left out: 0 means all, a number the last ones, a tensor those at its places."""
    return not isinstance(logits_to_keep, torch.Tensor) and logits_to_keep == 0


def _is_frozen_norm(module: torch.nn.Module) -> bool:
    """Whether all that a module has is a few frozen vectors."""
    parameters = list(module.parameters())
    return bool(parameters) and all(p.dim() == 1 and not p.requires_grad for p in parameters)


@contextmanager
def _forward_replaced(module: torch.nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = before


class DeferredLogits(torch.Tensor):
    """Logits that come into being at their first use.

    Shape, dtype and device are there from the start; any computation makes the tensor, with its graph where gradients
    are on, and goes on with that. An upcast (accelerate's mixed precision does one on every output) stays deferred.
    """

    _make: Callable[[], torch.Tensor]
    _made: torch.Tensor | None

    @staticmethod
    def __new__(
        cls, make: Callable[[], torch.Tensor], shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> DeferredLogits:
        """A stand-in for what ``make`` returns, of the given shape, dtype and device."""
        deferred = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        deferred._make = make
        deferred._made = None
        return deferred

    def made(self) -> torch.Tensor:
        """The real logits."""
        if self._made is None:
            self._made = self._make()
        return self._made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func is torch.Tensor.float and isinstance(args[0], DeferredLogits):
            deferred = args[0]
            return DeferredLogits(lambda: deferred.made().float(), deferred.shape, torch.float32, deferred.device)
        return func(*_with_real(args), **_with_real(kwargs))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return func(*_with_real(args), **_with_real(kwargs or {}))


_METADATA = {
    *(getattr(torch.Tensor, name).__get__ for name in ("shape", "dtype", "device", "requires_grad", "is_cuda", "ndim")),
    *(getattr(torch.Tensor, name).__get__ for name in ("grad_fn", "layout", "is_leaf", "is_sparse", "is_meta")),
    *(getattr(torch.Tensor, name) for name in ("size", "dim", "numel", "is_floating_point", "element_size")),
}
"""What can be said of logits without making them."""


def _with_real(value: Any) -> Any:
    if isinstance(value, DeferredLogits):
        return value.made()
    if isinstance(value, (tuple, list)):
        return type(value)(_with_real(item) for item in value)
    if isinstance(value, dict):
        return {key: _with_real(item) for key, item in value.items()}
    return value
