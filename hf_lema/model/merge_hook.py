"""Lets PEFT merge adapters into weights that are at rest on the host.

Responsibility: one seam. PEFT merges inside ``onload_layer``, which asks a base layer's ``_hf_hook`` (accelerate's
offloading hook) to bring the weights to the device and to put them back; this module answers.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, ModelHook
from torch import nn

from hf_lema.layer.layer_weights import LayerWeights, StreamedTensor


class MergeHook(AlignDevicesHook):  # type: ignore[misc]
    """Brings one module's streamed tensors to the device for a merge, and takes the result back.

    It is only registered as ``_hf_hook``; it wraps no forward.

    Args:
        state: The layer that the module belongs to.
        tensors: The module's streamed tensors.
    """

    def __init__(self, state: LayerWeights, tensors: list[StreamedTensor]) -> None:
        super().__init__(execution_device=state.streamer.device, offload=True)
        self.weights_map = None
        self.original_devices: dict[str, torch.device] = {}
        self._state = state
        self._tensors = tensors

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Puts the tensors on the device."""
        device, tensors = self._state.streamer.device, self._at_rest()
        if tensors:
            self._state.streamer.host_store.refuse_cut_files()
        for tensor in tensors:
            parameter: Any = self._state.registered(tensor)
            if tensor.matrix is not None:
                from hf_lema.runtime.quantization import (  # bitsandbytes is not needed where nothing is packed
                    copied,
                    rest_on,
                )

                rest_on(tensor.matrix, parameter, copied(tensor.matrix, parameter, device))
            else:
                parameter.data = parameter.data.to(device, copy=True)
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        """Takes the tensors back to the host."""
        if tensors := self._at_rest():
            self._state.take_over(tensors)
        self.weights_map = None  # PEFT leaves copies of the merged weights there
        return output

    def _at_rest(self) -> list[StreamedTensor]:
        """The module's tensors that are at rest: one that was unfrozen lives on the device, and none rests in a visit.

        In a visit transformers itself calls the hook, for modules whose weights a fused kernel uses without a call.
        """
        if self._state.is_visited:
            return []
        return [tensor for tensor in self._tensors if tensor in self._state.streamed]

    def __deepcopy__(self, memo: object) -> ModelHook:
        # PEFT copies a module that `modules_to_save` trains; the copy lives on the device and is not streamed.
        return ModelHook()

    def detach_hook(self, module: nn.Module) -> nn.Module:
        """Nothing was attached."""
        return module


def install_merge_hooks(state: LayerWeights) -> None:
    """Registers a `MergeHook` on every module that owns streamed tensors of the layer."""
    owners: dict[int, list[StreamedTensor]] = {}
    for tensor in state.streamed:
        owners.setdefault(id(tensor.owner), []).append(tensor)
    for tensors in owners.values():
        object.__setattr__(tensors[0].owner, "_hf_hook", MergeHook(state, tensors))


def remove_merge_hooks(state: LayerWeights) -> None:
    """Takes the hooks away."""
    for module in state.layer.modules():
        if isinstance(module.__dict__.get("_hf_hook"), MergeHook):
            del module.__dict__["_hf_hook"]
