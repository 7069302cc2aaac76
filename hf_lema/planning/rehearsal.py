"""A training step in parts, run on tensors without data, to know what it takes before anything is allocated.

Responsibility: the measure of a decoder layer's visit (streamed, or as stock PEFT runs it) and of what comes before
and after the layers. The code that runs is the model's own, PEFT's, and this package's `Recompute` and `ChunkedLoss`:
nothing is known here of any architecture. Knows no budgets.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._pytree import tree_flatten
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, masking_utils

from hf_lema.layer.boundaries import Boundaries
from hf_lema.layer.micro_batch import MicroBatches
from hf_lema.layer.piece_draws import active_dropouts
from hf_lema.layer.recompute import Recompute, Visit
from hf_lema.layer.replay import ForwardHooks
from hf_lema.layer.swaps import changed
from hf_lema.layer.token_tiles import TokenTiles
from hf_lema.layer.visit_arguments import tensors_in
from hf_lema.layer.visit_options import LayerParts, VisitOptions
from hf_lema.model.loading import find_decoder_layers
from hf_lema.model.lora_inputs import LORA_INPUT_CASTS
from hf_lema.model.loss import ChunkedLoss
from hf_lema.model.outside import OutsideWeights
from hf_lema.planning.meter import ByteMeter, CudaBehaviour, Kernels, Measure, behaving
from hf_lema.runtime.schedule import Direction

_CPU = torch.device("cpu")

REDRAWN_STARTS = 4
"""What drawing one mask of dropout again costs the host, in starts of kernels: the generator is set twice and a Python
function runs twice, no kernel of their own. Fitted: 0.734 s against 0.681 s (recipes/results/h100-7b-fp16-e.jsonl)."""


@dataclass(frozen=True, kw_only=True)
class PartCost:
    """What one part of a step takes, each measure above what was alive when it began.

    Attributes:
        forward: ``kept_bytes`` are its output and what it keeps for the backward.
        backward: Its backward, recompute included, with the gradient of its output already there.
        output_bytes: Bytes of its output.
    """

    forward: Measure
    backward: Measure
    output_bytes: int


@dataclass(frozen=True)
class _Sweep:
    """A forward through the model: what each layer is called with, and what the layers of each class return."""

    arguments: list[dict[str, Any]]
    embedded: torch.Tensor
    outputs: dict[type[nn.Module], Any]


class UnplannableError(ValueError):
    """A model whose memory cannot be known without running it."""


class Rehearsal:
    """Runs parts of a training step of one model on tensors without data.

    Args:
        lm: The model with its adapters, on meta; its tensors are replaced by fake ones on the CPU.
        precision: dtype of Trainer's autocast; None without.
        has_flash: See `CudaBehaviour`.
        packed: Weights that are at rest in 4 bits.
    """

    def __init__(
        self,
        lm: PreTrainedModel,
        *,
        precision: torch.dtype | None,
        has_flash: bool,
        packed: Sequence[nn.Parameter] = (),
    ) -> None:
        self._mode = FakeTensorMode()
        replaced = _forget_data(lm, self._mode)
        self._lm = lm.train()
        self._layers = list(find_decoder_layers(lm)[1])
        self._behaviour = CudaBehaviour(has_flash, frozenset(id(replaced[id(weight)]) for weight in packed))
        self._precision = precision
        self._sweeps: dict[tuple[int, int], _Sweep] = {}
        self._costs: dict[Any, PartCost] = {}

    def streamed_visit(
        self,
        layer_idx: int,
        batch_size: int,
        seq_len: int,
        micro_batch_size: int,
        tile_tokens: int = 0,
        forward_micro_batch_size: int = 0,
        is_kept: bool = False,
    ) -> PartCost:
        """A training visit of a streamed layer, cut as `StepChoices` says; the layer's weights are not counted.

        Its activations stay from forward to backward, or it recomputes them.
        """
        layer = self._layers[layer_idx]
        stage = _BareLayer(layer_idx, layer, behaving(type(layer).forward, self._behaviour))

        def call(hidden: torch.Tensor, named: dict[str, Any]) -> Any:
            own = [
                (module._parameters, name, parameter)
                for module in layer.modules()
                for name, parameter in module._parameters.items()
                if parameter is not None and parameter.requires_grad
            ]
            slots: list[tuple[dict[str, Any], str]] = [(registry, name) for registry, name, _ in own]
            tiles = TokenTiles(tile_tokens, is_verified=True)
            cut = MicroBatches(micro_batch_size, is_verified=True, forward_micro_batch_size=forward_micro_batch_size)
            options = VisitOptions(cut, tiles, Boundaries(_CPU, len(self._layers)), LORA_INPUT_CASTS)
            visit = Visit(stage, (), named, slots, ForwardHooks.capture(()), _CPU, options, batch_size, is_kept)
            outputs = Recompute.apply(visit, hidden, *(p for *_, p in own))  # type: ignore[no-untyped-call]
            return visit.rebuild(outputs)

        how = ("streamed", micro_batch_size, tile_tokens, forward_micro_batch_size, is_kept)
        # A tile is computed again inside the backward, by a call of the part of the layer that it passes.
        parts = layer.children() if tile_tokens else ()
        with changed((part.__dict__, "forward", behaving(part.forward, self._behaviour)) for part in parts):
            cost = self._visit(layer_idx, batch_size, seq_len, how, call)
        is_redrawn = 0 < micro_batch_size < min(forward_micro_batch_size, batch_size) and not tile_tokens
        if not is_redrawn or is_kept:
            return cost
        num_masks = len(active_dropouts(stage.parts.dropouts)) * -(-batch_size // micro_batch_size)
        redrawing = Kernels(num_flops=0, num_bytes=0, is_half=False, count=REDRAWN_STARTS * num_masks)
        return replace(cost, backward=replace(cost.backward, work=(*cost.backward.work, redrawing)))

    def stock_visit(self, layer_idx: int, batch_size: int, seq_len: int, is_checkpointed: bool) -> PartCost:
        """A visit of a resident layer under stock PEFT, with or without gradient checkpointing."""
        layer = self._layers[layer_idx]
        forward = functools.partial(behaving(type(layer).forward, self._behaviour), layer)

        def call(hidden: torch.Tensor, named: dict[str, Any]) -> Any:
            if is_checkpointed:
                return checkpoint(functools.partial(forward, **named), hidden, use_reentrant=False)
            return forward(hidden, **named)

        return self._visit(layer_idx, batch_size, seq_len, ("stock", is_checkpointed), call)

    def ends(self, batch_size: int, seq_len: int, is_chunked: bool, piece_bytes: int = 0) -> PartCost:
        """Everything but the decoder layers: embedding, final norm, head and loss.

        Args:
            batch_size: Sequences.
            seq_len: Tokens of each.
            is_chunked: Whether the loss is computed as `ChunkedLoss` does it.
            piece_bytes: Most bytes of the head on the device at a time, where it comes from host memory; else 0.
        """
        sweep = self._sweep(batch_size, seq_len)
        output_form = sweep.outputs[type(self._layers[-1])]
        plain = behaving(type(self._lm).forward, self._behaviour)
        outside = OutsideWeights(self._lm, _CPU, piece_bytes) if piece_bytes else None
        forward = ChunkedLoss(self._lm, plain, outside, is_verified=True).forward if is_chunked else None
        with self._mode:
            ids = torch.zeros(batch_size, seq_len, dtype=torch.int64)
            num_items = torch.zeros((), dtype=torch.int64)
            leaf = torch.empty_like(_first(output_form), requires_grad=True)
        inputs = {"input_ids": ids, "labels": ids, "num_items_in_batch": num_items, "use_cache": False}
        meter = ByteMeter()
        lent = outside.rehearsed() if outside else nullcontext()
        stand_ins = self._stand_ins(lambda *_, **__: _with_first(output_form, leaf))
        with stand_ins, lent, _whole_rows(), self._running():
            with meter.measured() as forwards:
                with self._autocast():
                    output = forward(**inputs) if forward else plain(self._lm, **inputs)
                loss, logits = output["loss"], output["logits"]
                if self._precision is not None:  # accelerate hands outputs of autocast out in float32
                    logits = logits.float()
                del output, logits
            with meter.measured() as backwards:
                gradients = torch.autograd.grad(loss, [leaf])
                del loss
        del gradients
        return PartCost(forward=forwards[0], backward=backwards[0], output_bytes=_nbytes(sweep.embedded))

    # ---- how it is done ----

    def _visit(
        self,
        layer_idx: int,
        batch_size: int,
        seq_len: int,
        how: tuple[Any, ...],
        call: Callable[[torch.Tensor, dict[str, Any]], Any],
    ) -> PartCost:
        """Measures a visit; layers that are alike are measured once."""
        layer, sweep = self._layers[layer_idx], self._sweep(batch_size, seq_len)
        named = sweep.arguments[layer_idx]
        key = (how, batch_size, seq_len, type(layer), _spec(dict(layer.named_parameters())), _spec(named))
        if key in self._costs:
            return self._costs[key]
        trainables = [parameter for parameter in layer.parameters() if parameter.requires_grad]
        meter = ByteMeter()
        with self._running():
            hidden = torch.empty_like(sweep.embedded, requires_grad=True)
            with meter.measured() as forwards, self._autocast():
                output = _first(call(hidden, named))
            gradient = torch.empty_like(output)
            with meter.measured() as backwards:
                gradients = torch.autograd.grad(output, [hidden, *trainables], [gradient], allow_unused=True)
        del gradients
        cost = PartCost(forward=forwards[0], backward=backwards[0], output_bytes=_nbytes(output))
        self._costs[key] = cost
        return cost

    def _sweep(self, batch_size: int, seq_len: int) -> _Sweep:
        """A forward without gradients in which one layer of each class is really called."""
        if (batch_size, seq_len) not in self._sweeps:
            arguments: list[dict[str, Any]] = []
            hiddens: list[torch.Tensor] = []
            outputs: dict[type[nn.Module], Any] = {}

            def stand_in(layer: nn.Module, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
                names = list(inspect.signature(type(layer).forward).parameters)[2:]
                arguments.append({**dict(zip(names, args, strict=False)), **kwargs})
                hiddens.append(hidden)
                if type(layer) not in outputs:
                    forward = behaving(type(layer).forward, self._behaviour)
                    outputs[type(layer)] = forward(layer, hidden, **arguments[-1])
                return outputs[type(layer)]

            with self._stand_ins(stand_in), _whole_rows(), self._running(), torch.no_grad(), self._autocast():
                ids = torch.zeros(batch_size, seq_len, dtype=torch.int64)
                self._lm.base_model(input_ids=ids, use_cache=False)
            self._sweeps[batch_size, seq_len] = _Sweep(arguments, hiddens[0], outputs)
        return self._sweeps[batch_size, seq_len]

    @contextmanager
    def _stand_ins(self, call: Callable[..., Any]) -> Iterator[None]:
        """Has ``call(layer, hidden, ...)`` take the place of every layer's forward inside the block."""
        for layer in self._layers:
            layer.__dict__["forward"] = functools.partial(call, layer)
        try:
            yield
        finally:
            for layer in self._layers:
                del layer.__dict__["forward"]

    @contextmanager
    def _running(self) -> Iterator[None]:
        """Operators make tensors without data inside the block.

        Raises:
            UnplannableError: The model's code looks at values.
        """
        # What torch logs before it raises is said by the error.
        log = logging.getLogger("torch._subclasses.fake_tensor")
        level = log.level
        log.setLevel(logging.CRITICAL)
        try:
            with self._mode:
                yield
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise UnplannableError(
                f"{type(self._lm).__name__} decides by the values of its tensors what to compute ({error.func}); its "
                "memory cannot be planned without running it. For a mixture of experts try another "
                'experts_implementation, such as "grouped_mm"; else train a few steps and look at the telemetry'
            ) from error
        finally:
            log.setLevel(level)

    @contextmanager
    def _autocast(self) -> Iterator[None]:
        with torch.autocast("cpu", dtype=self._precision, enabled=self._precision is not None):
            yield


@contextmanager
def _whole_rows() -> Iterator[None]:
    """Has transformers take each row for one sequence inside the block.

    From the values of its positions it would see so in training, and then leave the causal mask to the attention
    kernel; of a tensor without data it takes that several are packed into a row, and builds a mask of [tokens, tokens].
    """
    with changed([(vars(masking_utils), "find_packed_sequence_indices", lambda position_ids: None)]):
        yield


class _BareLayer:
    """A layer whose weights are where they are registered; a `StreamedLayer` for `Visit`."""

    def __init__(self, layer_idx: int, layer: nn.Module, forward: Callable[..., Any]) -> None:
        self.layer_idx = layer_idx
        self.layer = layer
        self.parts = LayerParts(list(layer.modules()), LORA_INPUT_CASTS)
        self._forward = forward

    @contextmanager
    def weights(self, direction: Direction, *, expect_backward: bool = False) -> Iterator[None]:
        """Nothing to lend."""
        yield

    @contextmanager
    def swapped(self, entries: Sequence[tuple[dict[str, Any], str, Any]], stand_ins: Sequence[Any]) -> Iterator[None]:
        """Registers stand-ins for the duration of the block."""
        for (registry, name, _), stand_in in zip(entries, stand_ins, strict=True):
            registry[name] = stand_in
        try:
            yield
        finally:
            for registry, name, original in entries:
                registry[name] = original

    def call_plain(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the forward of the layer's own class."""
        return self._forward(self.layer, *args, **kwargs)

    def undo_interrupted_swaps(self) -> None:
        """Nothing: a rehearsal that fails is over."""

    @property
    def stays(self) -> bool:
        """Nothing is lent, so nothing moves."""
        return True

    def lent(self) -> list[torch.Tensor]:
        """Nothing: what a graph saves of the weights is where they are registered."""
        return []

    def copied(self) -> AbstractContextManager[None]:
        """Nothing to copy."""
        return nullcontext()


def _forget_data(lm: nn.Module, mode: FakeTensorMode) -> dict[int, nn.Parameter]:
    """Replaces every tensor by a fake one on the CPU; tied ones stay tied. Returns them by the old ones' ids."""
    parameters: dict[int, nn.Parameter] = {}
    kept: list[nn.Parameter] = []  # an id is that of one object only while the object lives
    with mode:
        for module in lm.modules():
            for name, parameter in module._parameters.items():
                if parameter is None:
                    continue
                kept.append(parameter)
                if id(parameter) not in parameters:
                    fake = torch.empty(parameter.shape, dtype=parameter.dtype)
                    parameters[id(parameter)] = nn.Parameter(fake, requires_grad=parameter.requires_grad)
                module._parameters[name] = parameters[id(parameter)]
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
    return parameters


def _first(output: Any) -> torch.Tensor:
    return next(tensors_in(output))


def _with_first(output: Any, tensor: torch.Tensor) -> Any:
    """What a layer returned, with another tensor as its hidden states."""
    return type(output)((tensor, *output[1:])) if isinstance(output, (tuple, list)) else tensor


def _nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _spec(value: Any) -> Any:
    """What tells two calls apart that allocate differently: shapes and dtypes, not values."""
    leaves, structure = tree_flatten(value)
    return str(structure), tuple(
        (tuple(leaf.shape), leaf.dtype, leaf.requires_grad) if isinstance(leaf, torch.Tensor) else repr(leaf)
        for leaf in leaves
    )
