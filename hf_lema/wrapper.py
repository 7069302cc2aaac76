"""The seams with transformers, accelerate and peft: build, place, graft, and give back.

Responsibility: `LemaModelWrapper`, and how to find the runtime behind any wrapping. Knows nothing of buffers or events.
"""

from __future__ import annotations

import functools
import logging
import os
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from hf_lema.capability import BF16_CAPABILITY
from hf_lema.choices import StepChoices, StepPlan
from hf_lema.config import LemaConfig
from hf_lema.files.base_files import BaseFiles
from hf_lema.layer.boundaries import Boundaries
from hf_lema.layer.layer_proxy import (
    COPY_MESSAGE,
    LayerProxy,
    ProxyState,
    graft_layer,
    refuse_lost_outputs,
    ungraft_layer,
)
from hf_lema.layer.micro_batch import MicroBatches
from hf_lema.layer.replay import Surroundings
from hf_lema.layer.self_check import SelfCheck
from hf_lema.layer.token_tiles import TokenTiles
from hf_lema.layer.visit_options import VisitOptions
from hf_lema.model.fixed_buffers import fixed_buffers
from hf_lema.model.loading import build_skeleton, find_decoder_layers
from hf_lema.model.lora_inputs import LORA_INPUT_CASTS
from hf_lema.model.loss import ChunkedLoss
from hf_lema.model.merge_hook import install_merge_hooks, remove_merge_hooks
from hf_lema.model.other_ways import (
    COMPILE_MESSAGE,
    DATA_PARALLEL_MESSAGE,
    refuse_data_parallel,
    refuse_other_ways,
)
from hf_lema.model.outside import PIECE_BYTES, OutsideWeights
from hf_lema.model.packing import given_pack
from hf_lema.model.placement import (
    fill_from_model,
    is_packed,
    pack_linears,
    register_at_rest,
    streamed_tensors,
)
from hf_lema.model.stores import store_from_checkpoint, store_of_model
from hf_lema.planning.data_parallel import Launch
from hf_lema.planning.device_rates import rates_of
from hf_lema.planning.planner import best_plan
from hf_lema.planning.rehearsal import UnplannableError
from hf_lema.planning.step_cost import PlanOptions, StepCost
from hf_lema.runtime.host_memory import available_host_bytes
from hf_lema.runtime.local_ranks import LocalGroup
from hf_lema.runtime.residency import BatchShape, Planned, VramBudget
from hf_lema.runtime.streamer import LayerStreamer

logger = logging.getLogger(__name__)


class LemaModelWrapper(nn.Module):
    """Makes a causal language model stream its decoder layers.

    The model stays the object it was: the class of the language model and of each decoder layer becomes a subclass with
    the same name, so that module paths, adapter keys, ``state_dict`` and ``isinstance`` checks are those of the plain
    model. ``LemaModelWrapper(model)`` is the same as ``LemaModelWrapper.wrap(model)``.
    """

    _lema_runtime: _Runtime

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
        _refuse_unfit(lm)
        target = _resolve_device(device)
        _refuse_bf16_without_hardware(lm, target)
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
            _runtime_of(lm).start_budget()
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
        _refuse_bf16_without_hardware(lm, target)
        _, layers = find_decoder_layers(lm)
        layouts = {layout.layer_idx: layout for layout in skeleton.source.layouts}
        with skeleton.source:
            given = None if pack is None else given_pack(pack, skeleton.source)
            group = LocalGroup.find()
            store = store_from_checkpoint(layouts, config, target, skeleton.source, given, group)
        places = register_at_rest(store, layers)
        streamer = LayerStreamer(store, target, len(layers), config.num_slots)
        _assemble(lm, list(layers), places, streamer, config)
        _runtime_of(lm).base = base
        try:
            _runtime_of(lm).start_budget()
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
        runtime = _runtime_of(lm)
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
        for dtype in {view.dtype for state in _runtime_of(self).layers for view in state.host_views.values()}:
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
            for path in _runtime_of(self).streamer.host_store.paths
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
        streamed = {id(parameter) for parameter in _runtime_of(self).streamed_parameters()}
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


class _Runtime:
    """What a wrapped language model owns.

    Args:
        plain_class: The model's own class.
        layers: Its proxied layers, in order.
        streamer: Their weights.
        config: The user's choices.
        options: How its layers' visits are run.
    """

    def __init__(
        self,
        lm: PreTrainedModel,
        layers: list[ProxyState],
        streamer: LayerStreamer,
        config: LemaConfig,
        options: VisitOptions,
    ) -> None:
        self.plain_class = type(lm)
        self.layers = layers
        self.streamer = streamer  # owned
        self.config = config
        self.base: BaseFiles | None = None  # of a model that came from files
        self.budget: VramBudget | None = None
        self.options = options
        self.check = SelfCheck() if config.self_check else None
        for state in layers:
            state.check = self.check
        self.outside = OutsideWeights(lm, streamer.device, piece_bytes=PIECE_BYTES)
        self.loss = ChunkedLoss(lm, self.plain_class.forward, self.outside)
        streamer.own(options.boundaries)
        streamer.own(self.outside)
        self._lm = weakref.ref(lm)
        self._is_packed = getattr(lm, "is_loaded_in_4bit", False)
        self._costs: dict[str, Any] = {}  # of the last shape that was planned
        self._lm_buffers_and_parameters: Callable[[], Iterator[torch.Tensor]] = lambda: iter(
            [*lm.parameters(), *lm.buffers()]
        )

    def apply(self, choices: StepChoices) -> None:
        """Runs steps in this way from now on. Only between steps.

        Raises:
            ValueError: A kept or resident layer does not exist.
        """
        unknown = [i for i in choices.kept_layers if i >= len(self.layers)]
        if unknown:
            raise ValueError(f"kept_layers {unknown} do not exist; the model has {len(self.layers)} layers")
        self.options.micro_batches.micro_batch_size = choices.micro_batch_size
        self.options.micro_batches.forward_micro_batch_size = choices.forward_micro_batch_size
        self.options.tiles.tile_tokens = choices.tile_tokens
        self.options.boundaries.in_use = choices.boundaries_in_ram
        if choices.outside_in_ram:
            self.outside.move_to_host()
        else:
            self.outside.move_to_device()
        self.streamer.set_resident(choices.resident_layers)
        self.options.kept.layers = frozenset(choices.kept_layers)

    def apply_given(self, choices: StepChoices) -> None:
        """The same for choices that a user has made.

        Raises:
            ValueError: A layer does not exist, or cannot be run so.
        """
        packed = [i for i in choices.kept_layers if i < len(self.layers) and self.layers[i].is_packed]
        if moving := [i for i in packed if i not in choices.resident_layers]:
            raise ValueError(
                f"kept_layers {moving} are in 4 bits and streamed: bitsandbytes would compute their gradients from "
                "whatever their slots hold by then. Name them in resident_layers too, or do not keep them"
            )
        self.apply(choices)

    @property
    def choices(self) -> StepChoices:
        """How steps run now."""
        return StepChoices(
            micro_batch_size=self.options.micro_batches.micro_batch_size,
            forward_micro_batch_size=self.options.micro_batches.forward_micro_batch_size,
            tile_tokens=self.options.tiles.tile_tokens,
            boundaries_in_ram=self.options.boundaries.in_use,
            outside_in_ram=self.outside.on_host,
            resident_layers=self.streamer.resident_layers,
            kept_layers=tuple(sorted(self.options.kept.layers)),
        )

    def start_budget(self) -> None:
        """Sets the VRAM budget, once everything that is not streamed has been placed."""
        streamed = {id(parameter) for parameter in self.streamed_parameters()}
        other_bytes = sum(
            tensor.numel() * tensor.element_size()
            for tensor in self._lm_buffers_and_parameters()
            if id(tensor) not in streamed
        )
        choices = self.config.choices
        given = self._given(choices) if isinstance(choices, StepPlan) else None
        self.budget = VramBudget(
            self.config, self.streamer, other_bytes, self.outside.nbytes, self._plan, self.apply, given
        )
        if isinstance(choices, StepChoices):
            self.apply_given(choices)
            return
        self.budget.start()
        self.layers[0].on_sweep = self.budget.before_training_step

    def before_forward(self, input_ids: Any = None, **kwargs: Any) -> None:
        """Plans a training step, and makes room for a forward without gradients that is larger than all before.

        A training step is planned here for its embedding and head, and again at its first layer, which knows best.
        """
        tokens = kwargs.get("inputs_embeds") if input_ids is None else input_ids
        if self.budget is None or not isinstance(tokens, torch.Tensor) or tokens.dim() < 2:
            return
        if not torch.is_grad_enabled():
            self.budget.before_evaluation(tokens.shape[0], tokens.shape[1])
        elif self.layers[0].on_sweep is not None:
            self.layers[0].on_sweep(tokens.shape[0], tokens.shape[1])

    def _given(self, plan: StepPlan) -> tuple[BatchShape, Planned]:
        """What somebody has planned for this model."""
        if plan.num_layers != len(self.layers):
            raise ValueError(
                f"choices is a plan for {plan.model}, which has {plan.num_layers} layers; this model has "
                f"{len(self.layers)}. Plan the model that is trained"
            )
        return BatchShape(plan.batch_size, plan.seq_len), Planned(plan.choices, plan.activation_bytes)

    def _plan(self, batch_size: int, seq_len: int, budget_bytes: int | None) -> Planned:
        """How to run within so many bytes of VRAM; whole batches with everything there where that cannot be planned."""
        config = replace(self.config, vram_budget="min" if budget_bytes is None else max(1, budget_bytes))
        num_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        num_hosts = max(1, int(os.environ.get("WORLD_SIZE", "1")) // num_processes)
        options = PlanOptions(
            num_processes=num_processes,
            launch=Launch(num_hosts=num_hosts),
            micro_batch_size=config.micro_batch_size or None,
            quantization="nf4" if self._is_packed else None,
            double_quantization=config.double_quantization,
            # The layers have their RAM already; what is free comes on top of it.
            ram_bytes=available_host_bytes() + self.streamer.host_store.held_bytes,
            file_layers=self.streamer.host_store.file_layers,
        )
        try:
            if self._costs.get("shape") != (batch_size, seq_len):
                self._costs = {"shape": (batch_size, seq_len), "cost": self._cost(batch_size, seq_len, options)}
            plan = best_plan(self._costs["cost"], config, options)
        except (UnplannableError, RuntimeError, NotImplementedError) as error:
            # Any operator may refuse tensors without data; the step itself needs no plan.
            warnings.warn(
                f"steps of {batch_size} x {seq_len} tokens cannot be planned ({error}); they run on the whole batch, "
                "and layers become resident by what is measured",
                stacklevel=2,
            )
            return Planned(StepChoices(micro_batch_size=self.config.micro_batch_size))
        logger.info("planned for %d x %d tokens: %s", batch_size, seq_len, plan)
        return Planned(plan.choices, plan.activation_bytes)

    def _cost(self, batch_size: int, seq_len: int, options: PlanOptions) -> StepCost:
        """What a step takes, counted anew; the step that is about to begin must not notice."""
        lm = self._lm()
        assert lm is not None
        with torch.random.fork_rng(devices=[]):
            return StepCost(lm, batch_size, seq_len, None, rates_of(self.streamer.device), options)

    def streamed_parameters(self) -> list[torch.Tensor]:
        """Every registered tensor that is at rest on the host."""
        return [state.registered(tensor) for state in self.layers for tensor in state.streamed]


def _assemble(
    lm: PreTrainedModel,
    layers: list[nn.Module],
    places: dict[int, Any],
    streamer: LayerStreamer,
    config: LemaConfig,
) -> None:
    boundaries = Boundaries(streamer.device, len(layers))
    options = VisitOptions(MicroBatches(config.micro_batch_size), TokenTiles(), boundaries, LORA_INPUT_CASTS)
    flags = lm.config.get_text_config()
    states = [ProxyState(i, layer, streamer, places.get(i, ()), flags, options) for i, layer in enumerate(layers)]
    lm.__dict__["_lema_runtime"] = _Runtime(lm, states, streamer, config, options)
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
        surroundings = Surroundings(_runtime_of(self).streamer.device)
        try:
            _runtime_of(self).before_forward(*args[:1], **kwargs)
            return _runtime_of(self).loss.forward(*args, **kwargs)
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


def _runtime_of(lm: Any) -> _Runtime:
    runtime: _Runtime = lm.__dict__["_lema_runtime"]
    return runtime


def _find_wrapped(model: nn.Module) -> Any | None:
    return next((module for module in model.modules() if isinstance(module, LemaModelWrapper)), None)


def find_streamer(model: nn.Module) -> LayerStreamer | None:
    """The runtime behind a model, through ``PeftModel``, DDP or any other module around it; None if there is none."""
    lm = _find_wrapped(model)
    return None if lm is None else _runtime_of(lm).streamer


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
    _runtime_of(_find_wrapped(model)).apply_given(choices)


def find_choices(model: nn.Module) -> StepChoices:
    """How a wrapped model runs its steps now, whether a plan, a correction of it or the user has chosen that.

    ``outside_in_ram`` says where embedding and head are, which are left on the device where they cannot be moved.

    Raises:
        ValueError: The model is not wrapped.
    """
    get_streamer(model)
    return _runtime_of(_find_wrapped(model)).choices


def find_base(model: nn.Module) -> BaseFiles | None:
    """The files that the base behind a model came from; None for one that is not wrapped, or was in memory before."""
    lm = _find_wrapped(model)
    return None if lm is None else _runtime_of(lm).base


def find_check(model: nn.Module) -> SelfCheck | None:
    """What the self-check of a wrapped model has counted; None where it is off."""
    get_streamer(model)
    return _runtime_of(_find_wrapped(model)).check


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


def _refuse_unfit(lm: PreTrainedModel) -> None:
    if any(isinstance(module, LayerProxy) for module in lm.modules()):
        raise RuntimeError("some layers of this model are wrapped already")
    # A model that transformers has packed to 4 bits is streamed as it is; linears put in by hand carry no mark.
    is_marked = getattr(lm, "is_loaded_in_4bit", False)
    packed = [
        f"{name} ({type(parameter).__name__}, {parameter.dtype})"
        for name, parameter in lm.named_parameters()
        if (type(parameter) is not nn.Parameter or not parameter.is_floating_point())
        and not (is_marked and is_packed(parameter))
    ]
    quantizer = getattr(lm, "hf_quantizer", None)
    if packed or (quantizer is not None and not is_marked):
        raise ValueError(
            f"the model is quantized ({type(quantizer).__name__}) or has parameters of a kind that cannot be streamed "
            f"({len(packed)}: {', '.join(packed[:8])}). Of quantized models only those can be that transformers has "
            'packed to 4 bits with bitsandbytes: wrap the full-precision model, with LemaConfig(quantization="nf4") '
            "for 4 bits"
        )
    device_map: Any = getattr(lm, "hf_device_map", None)
    if device_map is not None and len(set(device_map.values())) > 1:
        raise ValueError(
            f"accelerate has spread this model over {sorted(map(str, set(device_map.values())))}; load it without "
            "device_map, or with LemaModelWrapper.from_pretrained"
        )
    meta = [name for name, parameter in lm.named_parameters() if parameter.is_meta]
    if meta:
        raise ValueError(
            f"{len(meta)} parameters have no data (meta device), first {meta[0]}; load the weights, or use "
            "LemaModelWrapper.from_pretrained"
        )


def _refuse_bf16_without_hardware(lm: PreTrainedModel, device: torch.device) -> None:
    if device.type != "cuda" or torch.cuda.get_device_capability(device) >= BF16_CAPABILITY:
        return
    if any(parameter.dtype == torch.bfloat16 for parameter in lm.parameters()):
        major, minor = torch.cuda.get_device_capability(device)
        raise ValueError(
            f"the model is in bfloat16, which {torch.cuda.get_device_name(device)} (compute capability "
            f"{major}.{minor}) only emulates; load it with dtype=torch.float16 and train with fp16=True"
        )


def _resolve_device(device: torch.device | str | None) -> torch.device:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    resolved = torch.device(device)
    if resolved.type == "cuda" and resolved.index is None:
        resolved = torch.device("cuda", torch.cuda.current_device())
    if resolved.type not in ("cuda", "cpu"):
        raise ValueError(f"layers can compute on a CUDA device or the CPU, got {resolved}")
    return resolved
