"""The seams with transformers, accelerate and peft: build, place, graft, and give back.

Responsibility: `LemaModelWrapper`, and how to find the runtime behind any wrapping. Knows nothing of buffers or events.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from hf_lema.choices import StepChoices
from hf_lema.config import LemaConfig
from hf_lema.files.base_files import BaseFiles
from hf_lema.layer.boundaries import Boundaries
from hf_lema.layer.layer_proxy import (
    COPY_MESSAGE,
    ProxyState,
    graft_layer,
    ungraft_layer,
)
from hf_lema.layer.micro_batch import MicroBatches
from hf_lema.layer.replay import Surroundings
from hf_lema.layer.self_check import SelfCheck
from hf_lema.layer.token_tiles import TokenTiles
from hf_lema.layer.visit_arguments import refuse_lost_outputs
from hf_lema.layer.visit_options import VisitOptions
from hf_lema.model.fixed_buffers import fixed_buffers
from hf_lema.model.loading import build_skeleton, find_decoder_layers
from hf_lema.model.lora_inputs import LORA_INPUT_CASTS
from hf_lema.model.merge_hook import install_merge_hooks, remove_merge_hooks
from hf_lema.model.other_ways import (
    COMPILE_MESSAGE,
    DATA_PARALLEL_MESSAGE,
    refuse_data_parallel,
    refuse_other_ways,
)
from hf_lema.model.packing import given_pack
from hf_lema.model.placement import (
    fill_from_model,
    is_packed,
    pack_linears,
    register_at_rest,
    streamed_tensors,
)
from hf_lema.model.stores import store_from_checkpoint, store_of_model
from hf_lema.model.tuner_layers import TUNER_LAYERS
from hf_lema.model.unfit import refuse_bf16_without_hardware, refuse_unfit
from hf_lema.model_runtime import ModelRuntime, runtime_of
from hf_lema.runtime.local_ranks import LocalGroup
from hf_lema.runtime.streamer import LayerStreamer


class LemaModelWrapper(nn.Module):
    """Makes a causal language model stream its decoder layers.

    The model stays the object it was: the class of the language model and of each decoder layer becomes a subclass with
    the same name, so that module paths, adapter keys, ``state_dict`` and ``isinstance`` checks are those of the plain
    model. ``LemaModelWrapper(model)`` is the same as ``LemaModelWrapper.wrap(model)``.
    """

    _lema_runtime: ModelRuntime

    def __new__(cls, model: Any, config: LemaConfig | None = None, device: Any = None) -> Any:
        """See `wrap`."""
        return cls.wrap(model, config, device)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing: Python calls it on what ``__new__`` returned, which is built already."""

    @staticmethod
    def wrap(model: nn.Module, config: LemaConfig | None = None, device: torch.device | str | None = None) -> Any:
        """Streams the decoder layers of a model that is already built, in place.

        A model whose parameters all need a gradient is frozen; one with mixed flags keeps them, and its decoder-layer
        parameters that need a gradient stay on the device and train.

        Args:
            model: A transformers causal language model, or a ``PeftModel`` around one.
            config: Budgets; the defaults if None.
            device: Where layers compute; the current accelerator, or the CPU, if None.

        Returns:
            ``model``, the same object.

        Raises:
            ValueError: The model has no list of decoder layers, is quantized, has weights on the meta device or an
                accelerate device map, is in bfloat16 or to be packed on a card without it, or does not fit the budgets.
            RuntimeError: The model is wrapped already, or FSDP, DeepSpeed, tensor parallelism or torch.compile is on.
        """
        config = config or LemaConfig()
        lm = _language_model(model)
        refuse_other_ways(lm)
        refuse_unfit(lm)
        target = _resolve_device(device)
        refuse_bf16_without_hardware(lm, target)
        if all(parameter.requires_grad for parameter in lm.parameters()):
            lm.requires_grad_(False)
        layers_path, layers = find_decoder_layers(lm)
        if config.quantization is not None and not any(is_packed(parameter) for parameter in lm.parameters()):
            pack_linears(lm, layers_path, config, target)
        streamed = streamed_tensors(lm, layers)
        layouts = {i: layout for i, (layout, _) in streamed.items()}
        store = store_of_model(layouts, config, target)
        fill_from_model(store, streamed)
        places = {i: tensors for i, (_, tensors) in streamed.items()}
        _assemble(lm, list(layers), places, LayerStreamer(store, target, len(layers), config.num_slots), config)
        model.to(target)
        try:
            runtime_of(lm).start_budget()
        except ValueError:
            LemaModelWrapper.unwrap(model)
            raise
        return model

    @staticmethod
    def from_pretrained(
        name_or_path: str,
        config: LemaConfig | None = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        pack: str | Path | None = None,
        **kwargs: Any,
    ) -> Any:
        """Builds a causal language model from its checkpoint without ever holding it whole on the device.

        Decoder layers go straight into host memory, or stay in their files where host memory is too small; embedding,
        head and final norm go to the device. Every parameter is frozen. Under torchrun or ``accelerate launch`` the
        processes of a machine share one copy of the layers, which the first of them loads.

        Args:
            name_or_path: Hub id or folder with safetensors files.
            config: Budgets; the defaults if None.
            dtype: Type of the weights; the checkpoint's own if None or ``"auto"``.
            device: Where layers compute; the current accelerator, or the CPU, if None.
            pack: A file with this model's decoder layers, written by ``hf-lema pack``; they are read from it in either
                tier. If None, one that was kept from an earlier run is used where the layers must be converted.
            **kwargs: Passed on as ``AutoModelForCausalLM.from_pretrained`` would take them (``revision``,
                ``attn_implementation``, ``trust_remote_code``, overrides of the configuration, ...).

        Returns:
            The model, an instance of its own class and of `LemaModelWrapper`.

        Raises:
            ValueError: The checkpoint is damaged, has no safetensors files, or does not fit the model or the budgets;
                the pack is damaged or of another model.
            FileNotFoundError: A shard, or the pack, is missing.
            RuntimeError: FSDP, DeepSpeed, tensor parallelism or torch.compile is on.
        """
        config = config or LemaConfig()
        refuse_other_ways()
        target = _resolve_device(device)
        skeleton = build_skeleton(
            name_or_path,
            dtype,
            target,
            quantization=config.quantization,
            double_quantization=config.double_quantization,
            **kwargs,
        )
        lm: Any = skeleton.model
        base = BaseFiles(skeleton.index)
        refuse_bf16_without_hardware(lm, target)
        _, layers = find_decoder_layers(lm)
        layouts = {layout.layer_idx: layout for layout in skeleton.source.layouts}
        with skeleton.source:
            given = None if pack is None else given_pack(pack, skeleton.source)
            group = LocalGroup.find()
            store = store_from_checkpoint(layouts, config, target, skeleton.source, given, group)
        places = register_at_rest(store, layers)
        streamer = LayerStreamer(store, target, len(layers), config.num_slots)
        _assemble(lm, list(layers), places, streamer, config)
        runtime_of(lm).base = base
        try:
            runtime_of(lm).start_budget()
        except ValueError:
            streamer.close()
            raise
        return lm

    @staticmethod
    def unwrap(model: nn.Module) -> Any:
        """Ends streaming and gives the plain model back, in place, with all of its weights on the CPU.

        Args:
            model: A wrapped model, or a ``PeftModel`` around one.

        Returns:
            ``model``, the same object, of its own class again.

        Raises:
            ValueError: The model is not wrapped, or a file that its layers lie in was cut.
        """
        lm = _find_wrapped(model)
        if lm is None:
            raise ValueError("the model is not wrapped")
        runtime = runtime_of(lm)
        runtime.streamer.host_store.refuse_cut_files()
        runtime.streamer.close()
        for state in runtime.layers:
            remove_merge_hooks(state)
            for tensor in state.streamed:
                state.detach(tensor)
            ungraft_layer(state.layer)
        del lm.__dict__["_lema_runtime"]
        lm.__class__ = runtime.plain_class
        return model.to("cpu")

    # ---- what a wrapped model does differently ----

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        for dtype in {view.dtype for state in runtime_of(self).layers for view in state.host_views.values()}:
            cast = fn(torch.empty(0, dtype=dtype)).dtype
            if cast != dtype:
                raise TypeError(
                    f"a wrapped model cannot be cast from {dtype} to {cast}: its layers lie in a store of that dtype. "
                    f"Load it as from_pretrained(..., dtype={cast}), or LemaModelWrapper.unwrap(model) first"
                )
        moved: nn.Module = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return moved

    def dequantize(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: the layers would be unpacked where they rest."""
        raise RuntimeError("a wrapped model cannot be unpacked in place; LemaModelWrapper.unwrap(model) first")

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """As transformers' own, but not into the folder that the layers are streamed from.

        Raises:
            ValueError: The files in that folder are in use; saving would overwrite them.
        """
        folder = Path(save_directory).resolve()
        if any(
            folder in (path.parent.resolve(), path.resolve().parent)
            for path in runtime_of(self).streamer.host_store.paths
        ):
            raise ValueError(
                f"the layers of this model are streamed from {folder}: saving there would overwrite the files in use. "
                "Save to another folder"
            )
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]

    def enable_input_require_grads(self) -> None:
        """Does nothing: gradients flow without it, and it would pull the backward down to the embedding."""

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """What DDP need not send, by the names that its module gives them: this model, or any `PeftModel` around it.

        Streamed parameters, and fixed buffers: for these it would walk over all modules before every forward.
        """
        streamed = {id(parameter) for parameter in runtime_of(self).streamed_parameters()}
        names = [name for name, parameter in self.named_parameters() if id(parameter) in streamed]
        names += fixed_buffers(self)
        prefixes = ("", "base_model.", "base_model.model.")  # the second around prompts, the third around LoRA
        return [prefix + name for prefix in prefixes for name in names]

    @property
    def is_parallelizable(self) -> bool:
        """False. Trainer of transformers 4 reads it before it decides on DataParallel, which is refused there."""
        refuse_data_parallel()
        return False

    @property
    def is_distributed_loading_by_transformers(self) -> bool:
        """As transformers says. Trainer of transformers 5 reads it before it decides on DataParallel."""
        refuse_data_parallel()
        said: bool = super().is_distributed_loading_by_transformers  # type: ignore[misc]
        return said

    @property
    def hf_device_map(self) -> Any:
        """As transformers has set it, if it has. Trainer and ``Accelerator.prepare`` read it before they do anything.

        Raises:
            RuntimeError: They are about to split or compile the model.
        """
        refuse_other_ways()
        if "hf_device_map" not in self.__dict__:
            raise AttributeError("hf_device_map")
        return self.__dict__["hf_device_map"]

    @property
    def _initialize_hook(self) -> Any:
        """Refused: ``torch.compile`` asks every module for it (those of `torch.nn.modules.lazy` have one)."""
        raise RuntimeError(COMPILE_MESSAGE)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Refused: see the message."""
        raise RuntimeError(COMPILE_MESSAGE)

    def _replicate_for_data_parallel(self) -> Any:
        raise RuntimeError(DATA_PARALLEL_MESSAGE)

    def __deepcopy__(self, memo: object) -> Any:
        raise TypeError(COPY_MESSAGE)

    def __reduce_ex__(self, protocol: object) -> Any:
        raise TypeError(COPY_MESSAGE)


def _assemble(
    lm: PreTrainedModel,
    layers: list[nn.Module],
    places: dict[int, Any],
    streamer: LayerStreamer,
    config: LemaConfig,
) -> None:
    boundaries = Boundaries(streamer.device, len(layers))
    options = VisitOptions(
        MicroBatches(config.micro_batch_size), TokenTiles(), boundaries, LORA_INPUT_CASTS, adapters=TUNER_LAYERS
    )
    flags = lm.config.get_text_config()
    states = [ProxyState(i, layer, streamer, places.get(i, ()), flags, options) for i, layer in enumerate(layers)]
    lm.__dict__["_lema_runtime"] = ModelRuntime(lm, states, streamer, config, options)
    for state in states:
        graft_layer(state)
        install_merge_hooks(state)
    lm.__class__ = _wrapped_class(type(lm))  # type: ignore[arg-type]


@functools.cache
def _wrapped_class(plain_class: type[PreTrainedModel]) -> type[PreTrainedModel]:

    @functools.wraps(plain_class.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # a compiled module around the model, such as DDP
            torch._dynamo.graph_break()  # what is raised inside a graph would only end the graph
            raise RuntimeError(COMPILE_MESSAGE)
        if torch.is_grad_enabled():
            refuse_lost_outputs(type(self).__name__, self.config, kwargs)
        surroundings = Surroundings(runtime_of(self).streamer.device)
        try:
            runtime_of(self).before_forward(*args[:1], **kwargs)
            return runtime_of(self).loss.forward(*args, **kwargs)
        except BaseException:
            surroundings.put_back()
            raise

    body = {
        "forward": forward,
        "__module__": plain_class.__module__,
        "__qualname__": plain_class.__qualname__,
        # A call of the class builds a plain model, as some of transformers' code does with ``type(model)(config)``.
        "__new__": lambda cls, *args, **kwargs: plain_class(*args, **kwargs),
    }
    return type(plain_class.__name__, (LemaModelWrapper, plain_class), body)


def _find_wrapped(model: nn.Module) -> Any | None:
    return next((module for module in model.modules() if isinstance(module, LemaModelWrapper)), None)


def find_streamer(model: nn.Module) -> LayerStreamer | None:
    """The runtime behind a model, through ``PeftModel``, DDP or any other module around it; None if there is none."""
    lm = _find_wrapped(model)
    return None if lm is None else runtime_of(lm).streamer


def apply_choices(model: nn.Module, choices: StepChoices) -> None:
    """Has a wrapped model run its steps in a given way from now on; for those who know better than the budget.

    Args:
        model: A wrapped model, or a module around one. No step may be under way.
        choices: The way.

    Raises:
        ValueError: The model is not wrapped, a resident or kept layer does not exist, or a kept one is streamed in 4
            bits.
    """
    get_streamer(model)
    runtime_of(_find_wrapped(model)).apply_given(choices)


def find_choices(model: nn.Module) -> StepChoices:
    """How a wrapped model runs its steps now, whether a plan, a correction of it or the user has chosen that.

    ``outside_in_ram`` says where embedding and head are, which are left on the device where they cannot be moved.

    Raises:
        ValueError: The model is not wrapped.
    """
    get_streamer(model)
    return runtime_of(_find_wrapped(model)).choices


def find_base(model: nn.Module) -> BaseFiles | None:
    """The files that the base behind a model came from; None for one that is not wrapped, or was in memory before."""
    lm = _find_wrapped(model)
    return None if lm is None else runtime_of(lm).base


def find_check(model: nn.Module) -> SelfCheck | None:
    """What the self-check of a wrapped model has counted; None where it is off."""
    get_streamer(model)
    return runtime_of(_find_wrapped(model)).check


def get_streamer(model: nn.Module) -> LayerStreamer:
    """The runtime of a wrapped model, or of a ``PeftModel`` or DDP module around one.

    Raises:
        ValueError: The model is not wrapped.
    """
    streamer = find_streamer(model)
    if streamer is None:
        raise ValueError("the model is not wrapped; call LemaModelWrapper.wrap(model) first")
    return streamer


def _language_model(model: nn.Module) -> PreTrainedModel:
    if _find_wrapped(model) is not None:
        raise RuntimeError("the model is wrapped already; LemaModelWrapper.unwrap(model) gives the plain model back")
    lm = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(lm, PreTrainedModel):
        raise ValueError(f"expected a transformers model or a PeftModel around one, got {type(model).__name__}")
    return lm


def _resolve_device(device: torch.device | str | None) -> torch.device:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    resolved = torch.device(device)
    if resolved.type == "cuda" and resolved.index is None:
        resolved = torch.device("cuda", torch.cuda.current_device())
    if resolved.type not in ("cuda", "cpu"):
        raise ValueError(f"layers can compute on a CUDA device or the CPU, got {resolved}")
    return resolved
