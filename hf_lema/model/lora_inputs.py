"""LoRA's casts of its inputs to float32, where autocast casts them back.

Responsibility: finding PEFT's modules that make them, and having PEFT leave them out. Knows nothing of visits.

PEFT casts what enters an adapter to the dtype of its weights. Under autocast the adapter's own linears cast it back, so
that a half-precision number goes to float32 and returns as it was, unless dropout lies between: then it is scaled in
float32 and rounded once, which dropout does in half precision as well, with another mask.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from peft.tuners.lora.layer import Linear
from torch import nn

from hf_lema.layer.swaps import changed


class LoraInputCasts:
    """The casts of plain LoRA on linears; DoRA and other variants compute with their inputs in other ways too."""

    def find(self, modules: Iterable[nn.Module]) -> list[nn.Module]:
        """The modules that make such casts."""
        return [module for module in modules if type(module) is Linear and not module.lora_variant]

    @contextmanager
    def left_out(self, modules: Sequence[nn.Module]) -> Iterator[None]:
        """PEFT's ``disable_input_dtype_casting`` for some modules, without a walk over all of them."""
        with changed((module.__dict__, "cast_input_dtype_enabled", False) for module in modules):
            yield


LORA_INPUT_CASTS = LoraInputCasts()
