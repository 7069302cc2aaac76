"""The conditions of a forward visit that its recompute must meet again: random state, autocast, forward hooks.

Responsibility: capture and re-enter. Knows no layers. What ``torch.utils.checkpoint`` preserves is preserved here.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_lema.layer.swaps import changed, mark, undo_to


def generator_of(device: torch.device) -> torch.Generator:
    """The generator from which operators on a device draw."""
    if device.type != "cuda":
        return torch.default_generator
    generators: Sequence[torch.Generator] = torch.cuda.default_generators
    return generators[torch.cuda.current_device() if device.index is None else device.index]


@dataclass(frozen=True)
class RandomState:
    """Random state of the host and of one device."""

    device: torch.device
    cpu: torch.Tensor
    cuda: torch.Tensor | None

    @classmethod
    def capture(cls, device: torch.device) -> RandomState:
        """The state now. Reads no device memory: CUDA's generator keeps its offset on the host."""
        cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(device, torch.get_rng_state(), cuda)

    def restore(self) -> None:
        """Makes this the state."""
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """This state inside the block; afterwards the one from before it."""
        outside = RandomState.capture(self.device)
        self.restore()
        try:
            yield
        finally:
            outside.restore()


@dataclass(frozen=True)
class AutocastState:
    """Autocast settings of the device's type and of the CPU."""

    settings: tuple[tuple[str, bool, torch.dtype], ...]
    cache_enabled: bool

    @classmethod
    def capture(cls, device: torch.device) -> AutocastState:
        """The settings now."""
        types = ("cpu",) if device.type == "cpu" else ("cpu", device.type)
        settings = tuple((t, torch.is_autocast_enabled(t), torch.get_autocast_dtype(t)) for t in types)
        return cls(settings, torch.is_autocast_cache_enabled())

    def half_dtype(self, device: torch.device) -> torch.dtype | None:
        """The dtype to which weights are cast once and for all uses; None where they are not."""
        on = [dtype for kind, is_on, dtype in self.settings if kind == device.type and is_on and self.cache_enabled]
        return next(iter(on), None)

    def entered(self) -> AbstractContextManager[object]:
        """These settings inside the block."""
        return _Autocasts(self)


class _Autocasts(ExitStack):
    """Some autocasts at once.

    No generator: one that an interrupt has cut off leaves its block when it is collected, at any later time, and would
    leave autocast once more than it was entered.
    """

    def __init__(self, state: AutocastState) -> None:
        super().__init__()
        self._state = state

    def __enter__(self) -> _Autocasts:
        for device_type, enabled, dtype in self._state.settings:
            cache_enabled = self._state.cache_enabled
            self.enter_context(torch.autocast(device_type, enabled=enabled, dtype=dtype, cache_enabled=cache_enabled))
        return super().__enter__()


def _autocast_nesting() -> int:
    torch.autocast_increment_nesting()
    return torch.autocast_decrement_nesting()


class SavingHooks:
    """Hooks on what autograd saves, which `Surroundings` takes away where an interrupt has left them in force.

    Attributes:
        num_packed: Calls of `pack`, which counts them.
    """

    def __init__(self) -> None:
        self.num_packed = 0

    def saving(self) -> AbstractContextManager[object]:
        """Has what is saved inside the block go through `pack`, and come back through `unpack`."""
        return _Saving(self)

    def pack(self, tensor: torch.Tensor) -> Any:
        """What is kept of a tensor."""
        raise NotImplementedError

    def unpack(self, kept: Any) -> torch.Tensor:
        """The tensor."""
        raise NotImplementedError


class _Entered(threading.local):
    """The hooks that this thread has in force, or was about to have when an interrupt came."""

    saving: _Saving | None = None


_ENTERED = _Entered()


class _Saving(torch.autograd.graph.saved_tensors_hooks):
    """One block of `SavingHooks`. No generator, for the reason that `_Autocasts` is none."""

    def __init__(self, hooks: SavingHooks) -> None:
        super().__init__(hooks.pack, hooks.unpack)
        self._hooks = hooks

    def __enter__(self) -> None:
        _ENTERED.saving = self
        super().__enter__()

    def __exit__(self, *args: object) -> None:
        super().__exit__(*args)
        _ENTERED.saving = None

    @property
    def is_in_force(self) -> bool:
        """Whether a tensor that is saved now goes through these hooks. Before torch 2.8 nothing but trying tells."""
        before = self._hooks.num_packed
        with torch.inference_mode(False), torch.enable_grad():
            torch.zeros(1, requires_grad=True).exp()
        return self._hooks.num_packed > before


class Surroundings:
    """What a visit changes around itself, for putting it back after an exception has passed the visit's own clean-up.

    That clean-up may be what an interrupt cut off: attributes that stay swapped, gradients that stay off, hooks on what
    autograd saves, or autocast that stays half entered, whose cache then keeps the casts of old weights. See Note
    [interrupts] of `hf_lema.layer.swaps`.

    Args:
        device: Where the layer computes.
    """

    def __init__(self, device: torch.device) -> None:
        self._mark = mark()
        self._autocast = AutocastState.capture(device)
        self._nesting = _autocast_nesting()
        self._is_grad_enabled = torch.is_grad_enabled()

    def put_back(self) -> None:
        """Everything as it was when this was made, by the same thread."""
        undo_to(self._mark)
        if (saving := _ENTERED.saving) is not None:
            if saving.is_in_force:
                saving.__exit__()
            _ENTERED.saving = None
        torch.set_grad_enabled(self._is_grad_enabled)
        for device_type, enabled, dtype in self._autocast.settings:
            torch.set_autocast_enabled(device_type, enabled)
            torch.set_autocast_dtype(device_type, dtype)
        torch.set_autocast_cache_enabled(self._autocast.cache_enabled)
        while _autocast_nesting() > self._nesting:
            if torch.autocast_decrement_nesting() == 0:
                torch.clear_autocast_cache()


_HOOK_TABLES = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
)


@dataclass(frozen=True)
class ForwardHooks:
    """Forward hooks of some modules.

    PEFT hands arguments such as ``alora_offsets`` and ``adapter_names`` to its layers by hooks that live as long as the
    model's forward; without them a recompute gives other numbers.
    """

    tables: tuple[tuple[nn.Module, tuple[dict[int, Any], ...]], ...]

    @classmethod
    def capture(cls, modules: Iterable[nn.Module]) -> ForwardHooks:
        """The hooks now, of those modules that have any."""
        return cls(
            tuple(
                (module, tuple(copy.copy(module.__dict__[table]) for table in _HOOK_TABLES))
                for module in modules
                if module._forward_pre_hooks or module._forward_hooks
            )
        )

    @contextmanager
    def entered(self) -> Iterator[None]:
        """These hooks inside the block."""
        with changed(
            (module.__dict__, name, table)
            for module, tables in self.tables
            for name, table in zip(_HOOK_TABLES, tables, strict=True)
        ):
            yield
