"""The tensors of a decoder layer: which are lent to it for a visit, and where they are between visits.

Responsibility: what is registered when, and what was done to the layer since. Runs no forward.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_lema.files.layout import PackedMatrix
from hf_lema.layer.visit_options import LayerParts, VisitOptions
from hf_lema.runtime.schedule import Direction
from hf_lema.runtime.streamer import LayerStreamer


@dataclass(frozen=True)
class StreamedTensor:
    """Where a streamed tensor of a layer is registered.

    Attributes:
        name: Name relative to the layer as it was when wrapped, before any adapter changed module paths.
        owner: The module that registers it (PEFT moves the module, but keeps the object).
        attribute: Its name there.
        matrix: What it consists of if it is packed to 4 bits.
    """

    name: str
    owner: nn.Module
    attribute: str
    matrix: PackedMatrix | None = None


def rest(tensor: StreamedTensor, views: Mapping[str, torch.Tensor]) -> None:
    """Copies what is registered into the store's memory and has the same parameter rest on it.

    Args:
        tensor: Where it is registered.
        views: The layer's tensors in the store.
    """
    parameter: Any = tensor.owner._parameters[tensor.attribute]
    if tensor.matrix is not None:
        from hf_lema.runtime.quantization import store  # bitsandbytes is not needed where nothing is packed

        store(tensor.matrix, parameter, views)
        return
    views[tensor.name].copy_(parameter.data)
    parameter.data = views[tensor.name]


class LayerWeights:
    """A layer and its tensors.

    Args:
        layer_idx: Position of the layer in the model.
        layer: The layer, not yet grafted.
        streamer: Lends the weights.
        streamed: The tensors that are lent.
        options: How training visits are run.

    Attributes:
        has_trained: Whether a backward has visited the layer.
    """

    def __init__(
        self,
        layer_idx: int,
        layer: nn.Module,
        streamer: LayerStreamer,
        streamed: tuple[StreamedTensor, ...],
        options: VisitOptions,
    ) -> None:
        self.layer_idx = layer_idx
        self.layer = layer
        self.streamer = streamer
        self.streamed = streamed
        self._options = options
        self.has_trained = False
        self._was_visited = False
        self.host_views = streamer.host_store.host_views(layer_idx) if streamed else {}
        self._left: list[tuple[StreamedTensor, int, int]] = []
        self._note_left()
        self._journal: list[tuple[dict[str, Any], str, Any]] = []
        self._modules: list[nn.Module] = []
        self._signature: list[Hashable] | None = None
        self._computed_so: list[int] = []
        self._own: list[tuple[dict[str, Any], str, nn.Parameter]] = []
        self._parts = LayerParts(())
        self.own_parameters()  # what is there now: an adapter that is added later is seen as a change

    def registered(self, tensor: StreamedTensor) -> torch.Tensor:
        """The tensor that the model registers at rest."""
        return tensor.owner._parameters[tensor.attribute]  # type: ignore[return-value]

    @property
    def is_visited(self) -> bool:
        """Whether a visit is under way: what is registered is then lent, or an alias."""
        return bool(self._journal)

    @property
    def parts(self) -> LayerParts:
        """What a visit treats by itself; as fresh as the last `own_parameters`."""
        return self._parts

    def own_parameters(self) -> list[tuple[dict[str, Any], str, nn.Parameter]]:
        """(registry, name, parameter) of everything under the layer that is not streamed: adapters, what trains.

        The walk over some hundred modules is kept until a module or parameter under the layer is another object than
        before, or other adapters are merged (comparing takes a tenth of the walk).
        """
        if self._signature is None or self._signed() != self._signature:
            self._options.kept.forget(self.layer_idx)
            if self._signature is not None and self.streamed:
                # An adapter was added, taken away or merged; some initialisations (OLoRA) and PEFT's own unmerging
                # write to the base through `.data`, which no version counter and no pointer shows.
                self.streamer.invalidate_if_changed(self.layer_idx, was_visited=self._was_visited)
            self._modules = list(self.layer.modules())
            self._parts = LayerParts(self._modules, self._options.input_casts, self._options.adapters)
            streamed = {(id(t.owner), t.attribute) for t in self.streamed}
            self._own = [
                (module._parameters, name, parameter)
                for module in self._modules
                for name, parameter in module._parameters.items()
                if parameter is not None and (id(module), name) not in streamed
            ]
            self._signature = self._signed()
        if self._options.kept.layers and (computing := self._computing()) != self._computed_so:
            self._options.kept.forget(self.layer_idx)
            self._computed_so = computing
        return self._own

    def _signed(self) -> list[Hashable]:
        """What is under the layer now, and what is merged into it."""
        modules, adapters = self._modules, self._options.adapters
        signature: list[Hashable] = [id(child) for module in modules for child in module._modules.values()]
        signature += [id(parameter) for module in modules for parameter in module._parameters.values()]
        if adapters is not None:
            signature.append(adapters.merged(self._parts.tuners))
        return signature

    def _computing(self) -> list[int]:
        """How the modules compute: their classes, forwards put in place of those, and forward hooks."""
        computing = [id(type(module)) for module in self._modules]
        computing += [id(module.__dict__.get("forward")) for module in self._modules]
        return computing + [key for module in self._modules for key in module._forward_hooks]

    def unmerge_disabled(self) -> bool:
        """Unmerges what the forward would unmerge by itself, in lent memory; whether there was any."""
        adapters = self._options.adapters
        return adapters is not None and adapters.unmerge_disabled(self._parts.tuners)

    def bring_to_device(self, own: list[tuple[dict[str, Any], str, nn.Parameter]]) -> None:
        """Moves what is not streamed to the device: PEFT puts a new adapter beside its base, on the host."""
        device = self.streamer.device
        for _, _, parameter in own:
            if parameter.device != device:
                parameter.data = parameter.data.to(device)

    @contextmanager
    def streamed_tensors_hidden(self) -> Iterator[None]:
        """Takes the streamed tensors out of the registers for the duration of the block."""
        entries = [(t.owner._parameters, t.attribute, self.registered(t)) for t in self.streamed]
        with self.swapped(entries, [None] * len(entries)):
            yield

    @contextmanager
    def weights(self, direction: Direction, *, expect_backward: bool = False) -> Iterator[None]:
        """Leases the layer and registers the lent tensors for the duration of the block."""
        if direction is Direction.BACKWARD:
            self.reconcile()
        self.has_trained = self.has_trained or direction is Direction.BACKWARD
        self._was_visited = True
        try:
            with self.streamer.lease(self.layer_idx, direction, expect_backward=expect_backward) as lent:
                at_rest = [(t.owner._parameters, t.attribute, self.registered(t)) for t in self.streamed]
                with self.swapped(at_rest, [lent[tensor.name] for tensor in self.streamed]):
                    yield
        except torch.OutOfMemoryError as error:
            # The same object: callers tell it by its type, and accelerate by its one argument too.
            error.args = (
                f"{error}\nIt was in the {direction.name.lower()} of layer {self.layer_idx}. Give a smaller "
                "vram_budget, a smaller batch or shorter sequences, and resume from the last checkpoint",
            )
            raise

    @contextmanager
    def weights_at_rest(self) -> Iterator[None]:
        """Registers plain copies of the weights at rest, on the device, for the duration of the block."""
        device = self.streamer.device
        copies: list[Any] = []
        for tensor in self.streamed:
            if tensor.matrix is None:
                copy = self.host_views[tensor.name].to(device, copy=True)
                copies.append(nn.Parameter(copy, requires_grad=False))
            else:
                from hf_lema.runtime.quantization import parameter_over

                parts = {name: self.host_views[name].to(device, copy=True) for name in tensor.matrix.tensors()}
                copies.append(parameter_over(tensor.matrix, parts))
        lent = [(t.owner._parameters, t.attribute, self.registered(t)) for t in self.streamed]
        with self.swapped(lent, copies):
            yield

    @property
    def stays(self) -> bool:
        """Whether its weights are lent to every visit in the same memory."""
        return not self.streamed or self.streamer.is_in_place(self.layer_idx)

    @property
    def is_packed(self) -> bool:
        """Whether any of its streamed tensors is packed to 4 bits."""
        return any(tensor.matrix is not None for tensor in self.streamed)

    def lent(self) -> list[torch.Tensor]:
        """The tensors that are lent to the visit under way, always in the same order."""
        return [self.registered(tensor) for tensor in self.streamed]

    @contextmanager
    def copied(self) -> Iterator[None]:
        """Registers copies of the lent tensors for the duration of the block, and overwrites them at its end."""
        lent = [(t.owner._parameters, t.attribute, self.registered(t)) for t in self.streamed]
        copies = [nn.Parameter(tensor.detach().clone(), requires_grad=False) for *_, tensor in lent]
        try:
            with self.swapped(lent, copies):
                yield
        finally:
            for copy in copies:
                copy.data.fill_(torch.nan)  # `.data`: nothing but the numbers is to show who still uses them

    def bytes_at_rest(self) -> list[torch.Tensor]:
        """The weights at rest, on the host."""
        return list(self.host_views.values())

    @contextmanager
    def swapped(self, entries: Sequence[tuple[dict[str, Any], str, Any]], stand_ins: Sequence[Any]) -> Iterator[None]:
        """Registers stand-ins in place of what is registered, for the duration of the block.

        Args:
            entries: (registry, name, what is registered now).
            stand_ins: One for each entry.
        """
        begin = len(self._journal)
        self._journal.extend(entries)
        try:
            for (registry, name, _), stand_in in zip(entries, stand_ins, strict=True):
                registry[name] = stand_in
            yield
        finally:
            self._undo_swaps(begin)  # also of a block inside this one whose clean-up an interrupt has cut off

    def undo_interrupted_swaps(self) -> None:
        """Puts back what an interrupt in the middle of `swapped`'s own clean-up has left. No visit is under way."""
        self._undo_swaps(0)

    def _undo_swaps(self, begin: int) -> None:
        """Registers again what was swapped since the journal had so many entries, the last first."""
        while len(self._journal) > begin:
            registry, name, original = self._journal[-1]
            registry[name] = original
            self._journal.pop()

    def reconcile(self) -> None:
        """Takes over what was done to the layer since its last visit.

        A streamed tensor whose data was replaced (PiSSA, a merge with ``safe_merge``, an upcast) is copied back into
        the store and its slots are forgotten; one that was written to in place (``load_state_dict``) likewise. A write
        through ``.data`` that no version counter shows is not seen. One that was unfrozen becomes resident, before
        training has begun.

        Raises:
            RuntimeError: A streamed tensor was unfrozen after training began.
            ValueError: A replaced tensor has another shape or dtype than the store's.
        """
        touched = [
            tensor
            for tensor, pointer, version in self._left
            if (found := self.registered(tensor))._version != version
            or found.requires_grad
            or found.data_ptr() != pointer
        ]
        if not touched:
            return
        self._options.kept.forget(self.layer_idx)
        promoted = [t for t in touched if self.registered(t).requires_grad]
        if promoted:
            self._promote(promoted)
        kept = [t for t in touched if t not in promoted]
        replaced = [t for t in kept if self.registered(t).data_ptr() != self.host_views[t.name].data_ptr()]
        if replaced:
            self.take_over(replaced)
        elif kept:
            self._refuse_shared()
            self.streamer.invalidate(self.layer_idx)
        self._note_left()

    def _refuse_shared(self) -> None:
        if self.streamer.host_store.is_shared:
            raise RuntimeError(
                f"layer {self.layer_idx}: its base weights were changed (a merge, PiSSA, ...), but the processes of "
                "this machine share one copy of them, and each would change it. Change them in one process, save that "
                "model, and train from the saved one"
            )

    def _note_left(self) -> None:
        """Remembers where the streamed tensors lie at rest, and their versions."""
        self._left = [(t, self.host_views[t.name].data_ptr(), self.registered(t)._version) for t in self.streamed]

    def take_over(self, changed: list[StreamedTensor]) -> None:
        """Copies replaced tensors into the store and registers the store's memory again.

        Raises:
            RuntimeError: Other processes read the same memory.
            ValueError: A tensor has another shape or dtype than the store's.
        """
        self._refuse_shared()
        wrong = [
            f"{t.name}: {self.registered(t).dtype} {tuple(self.registered(t).shape)}, expected "
            f"{self.host_views[t.name].dtype} {tuple(self.host_views[t.name].shape)}"
            for t in changed
            if self.registered(t).dtype != self.host_views[t.name].dtype
            or self.registered(t).shape != self.host_views[t.name].shape
        ]
        if wrong:
            raise ValueError(
                f"layer {self.layer_idx}: streamed weights were replaced by tensors of another dtype or shape: "
                f"{'; '.join(wrong)}. Load the model in the dtype you want instead of casting a wrapped one "
                "(for example LemaModelWrapper.from_pretrained(..., dtype=torch.float32))"
            )
        with torch.no_grad():
            for tensor in changed:
                rest(tensor, self.host_views)
        self.streamer.invalidate(self.layer_idx)

    def detach(self, tensor: StreamedTensor) -> None:
        """Has a registered tensor rest on a copy of its own, for the end of the store's life."""
        parameter: Any = self.registered(tensor)
        if tensor.matrix is not None:
            from hf_lema.runtime.quantization import copied, rest_on

            rest_on(tensor.matrix, parameter, copied(tensor.matrix, parameter, parameter.device))
        else:
            parameter.data = parameter.data.clone()

    def _promote(self, promoted: list[StreamedTensor]) -> None:
        names = [t.name for t in promoted]
        if self.has_trained:
            raise RuntimeError(
                f"layer {self.layer_idx}: {names} were unfrozen after training began; the optimizer does not know "
                "their device copy. Set requires_grad before the first step"
            )
        for tensor in promoted:
            parameter = self.registered(tensor)
            # The optimizer may hold this very object: it must stay, only its data moves.
            parameter.data = parameter.data.to(self.streamer.device, copy=True)
        self.streamed = tuple(t for t in self.streamed if t not in promoted)
        self._signature = None
