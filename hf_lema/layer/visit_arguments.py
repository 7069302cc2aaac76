"""The arguments of a decoder layer in a training visit: by name, without its cache, and what is refused.

Responsibility: what a layer may be given while gradients are on. Runs no forward.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import nn

_CACHE_ARGUMENTS = ("cache", "past_key_values", "past_key_value", "layer_past")  # the first from transformers 5.24
_LOSING_FLAGS = ("output_attentions", "output_router_logits")


class VisitArguments:
    """What a layer is called with.

    Args:
        layer_idx: Position of the layer in the model.
        layer_class: The layer's own class.
        config: The model's configuration, for flags that ask inner modules for outputs.
    """

    def __init__(self, layer_idx: int, layer_class: type[nn.Module], config: object) -> None:
        self._layer_idx = layer_idx
        self._layer_class = layer_class
        self._config = config
        parameters = inspect.signature(layer_class.forward).parameters.values()
        self._names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD][1:]

    @property
    def num_named(self) -> int:
        """Positional arguments after the hidden states that have a name."""
        return max(0, len(self._names) - 1)  # none in a forward of *args

    def named(self, args: tuple[Any, ...]) -> list[tuple[str, Any]]:
        """Positional arguments after the hidden states, with the names that the layer's forward gives them."""
        return list(zip([*self._names[1:], *(["*args"] * len(args))], args, strict=False))

    def without_cache(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Drops the KV cache while gradients are on: the recompute would append to it a second time.

        Raises:
            ValueError: The cache already holds tokens, so that leaving it out would change the numbers.
        """
        kept_args = tuple(self._dropped(name, value) for name, value in self.named(args))
        return kept_args, {name: self._dropped(name, value) for name, value in kwargs.items()}

    def _dropped(self, name: str, value: Any) -> Any:
        if name == "use_cache":
            return False
        if name not in _CACHE_ARGUMENTS or value is None:
            return value
        # This layer's own part: a frozen layer below, which needs no recompute, may have filled its part just now.
        own = value.layers[self._layer_idx : self._layer_idx + 1]
        if own and _holds_tokens(own[0]):
            raise ValueError(
                f"layer {self._layer_idx}: {name} already holds tokens while gradients are on; train on the whole "
                "sequence, or run under torch.no_grad()"
            )
        return None

    def refuse_written(self, before: Mapping[str, set[int]], after: Mapping[str, set[int]]) -> None:
        """Refuses a layer that hands tensors to later layers through an argument: they have no gradient here.

        Raises:
            ValueError: A container among the arguments holds tensors that were not there before the visit.
        """
        written = [name for name, tensors in after.items() if tensors - before[name]]
        if written:
            raise ValueError(
                f"layer {self._layer_idx} ({self._layer_class.__name__}) writes tensors into its arguments {written}, "
                "for later layers to read; they would lose their gradient through a streamed layer. Train this model "
                "with stock PEFT; evaluation under torch.no_grad() works"
            )

    def refuse_lost_gradients(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Refuses arguments that would get no gradient, and outputs that would have none.

        Raises:
            ValueError: There are some.
        """
        refuse_lost_outputs(f"layer {self._layer_idx}", self._config, kwargs)
        named = [*self.named(args), *kwargs.items()]
        lost = [name for name, value in named if any(t.requires_grad for t in tensors_in(value))]
        if lost:
            raise ValueError(
                f"layer {self._layer_idx}: the arguments {lost} need a gradient, but only the hidden states (first "
                "argument) get one through a streamed layer"
            )


def refuse_lost_outputs(who: str, config: object, kwargs: Mapping[str, Any]) -> None:
    """Refuses outputs of modules inside a layer while gradients are on: captured in the forward, they have none.

    Raises:
        ValueError: A flag asks for such an output.
    """
    # PeftModel hands on None for what its caller did not say; the configuration then decides, as in transformers.
    said = {name: kwargs.get(name) for name in _LOSING_FLAGS}
    asked = [name for name, value in said.items() if (getattr(config, name, False) if value is None else value)]
    if asked:
        raise ValueError(
            f"{who}: {asked} asks for outputs of inner modules, which would be handed out without their gradient; turn "
            "them off while training (evaluation under torch.no_grad() may use them)"
        )


def _holds_tokens(cache_layer: object) -> bool:
    """Whether a layer of a transformers cache has seen tokens.

    By transformers' own flags (``is_initialized``, ``is_conv_states_initialized``, ...) and the tensors behind them,
    not by its length: a recurrent layer has a state and no length, a placeholder is initialized and has nothing.
    """
    flags = [held for flag, held in vars(cache_layer).items() if flag.endswith("initialized")]
    is_initialized = any(any(held.values()) if isinstance(held, dict) else held for held in flags)
    return is_initialized and any(tensor.numel() for tensor in tensors_in(vars(cache_layer)))


def held_by_containers(named: Mapping[str, Any]) -> dict[str, set[int]]:
    """Ids of the floating-point tensors in each argument that a layer could write into."""
    return {
        name: {id(tensor) for tensor in tensors_in(value) if tensor.is_floating_point()}
        for name, value in named.items()
        if isinstance(value, (MutableMapping, list))
    }


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Every tensor in nested tuples, lists and dicts."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
