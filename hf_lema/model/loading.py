"""A model from a checkpoint whose decoder layers stay on disk.

Responsibility: building the model as ``AutoModelForCausalLM.from_pretrained`` builds it, with everything outside the
decoder layers loaded and the layers' parameters on meta; finding the list of decoder layers in any model. Knows nothing
of streams, slots or budgets.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm  # type: ignore[import-untyped]
from transformers import GenerationConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_lema.files.checkpoint import CheckpointIndex
from hf_lema.files.pack import PackIndex
from hf_lema.model.conversion import ConversionPlan, convert, plan_conversion, transformers_at_least
from hf_lema.model.layer_tensors import NOTHING_PACKED, Packing, TensorReader
from hf_lema.model.locating import (
    ModelRequest,
    checkpoint_folder,
    load_config,
    model_on_meta,
    parse_dtype,
    read_request,
)
from hf_lema.model.packing import cached_pack, pack_folder, write_pack
from hf_lema.model.source import CheckpointSource
from hf_lema.model.stock_quantizer import (
    make_quantizer,
    mark_as_packed,
    matrices_of,
    put_in_packed_linears,
    transposed_weights,
)
from hf_lema.runtime.packed_checkpoint import StoredMatrix, split_packed

__all__ = [
    "CheckpointSource",
    "Skeleton",
    "build_skeleton",
    "cached_pack",
    "find_decoder_layers",
    "pack_folder",
    "pack_model",
    "write_pack",
]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Skeleton:
    """A model without its decoder layers' weights, and where these are.

    Attributes:
        model: In evaluation mode, nothing requires a gradient. Decoder layer parameters are on meta, with the shapes
            and dtypes that they will have; everything else, buffers included, is on the device.
        layers_path: Path of the list of decoder layers in the model, such as ``model.layers``.
        source: The decoder layers' bytes. Whoever has the skeleton owns it and closes it.
        index: The checkpoint.
        plan: How its tensors become the model's.
        request: What was asked for.
    """

    model: PreTrainedModel
    layers_path: str
    source: CheckpointSource
    index: CheckpointIndex
    plan: ConversionPlan
    request: ModelRequest


def find_decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Find the list of decoder layers of a transformers causal language model, or of a `PeftModel` around one.

    It is the module list that has ``num_hidden_layers`` members, each a `GradientCheckpointingLayer` or of a class that
    the model says must not be split.

    Args:
        model: The model.

    Returns:
        Path of the list in the model, and the list.

    Raises:
        ValueError: There is no such list, or more than one; the message names the lists that were found.
    """
    config: Any = model.config
    num_layers = config.get_text_config().num_hidden_layers
    class_names = set(getattr(model, "_no_split_modules", None) or ())
    lists = {
        path: module for path, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module)
    }
    found = {
        path: layers
        for path, layers in lists.items()
        if len(layers) == num_layers
        and all(
            isinstance(layer, GradientCheckpointingLayer) or type(layer).__name__ in class_names for layer in layers
        )
    }
    if len(found) != 1:
        among = found or lists
        listed = "".join(
            f"\n- {path}: {len(layers)} of {', '.join(sorted({type(layer).__name__ for layer in layers}))}"
            for path, layers in among.items()
        )
        raise ValueError(
            f"{type(model).__name__} has {'several lists' if found else 'no list'} of {num_layers} decoder layers "
            f"(expected one module list of num_hidden_layers={num_layers} layers). Module lists found:"
            f"{listed or ' none'}\nOnly causal language models with one stack of decoder layers can be streamed"
        )
    return next(iter(found.items()))


def build_skeleton(
    name_or_path: str | Path,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
    quantization: str | None = None,
    double_quantization: bool = True,
    **kwargs: Any,
) -> Skeleton:
    """Build a causal language model with everything loaded but its decoder layers.

    Args:
        name_or_path: A folder with ``config.json`` and safetensors files, or the id of a model on the hub.
        dtype: As for ``from_pretrained``; None and ``"auto"`` mean the checkpoint's own.
        device: Where everything outside the decoder layers goes. On ``"meta"`` nothing is read.
        trust_remote_code: Whether to run model code that comes with the checkpoint.
        quantization: As in `LemaConfig`.
        double_quantization: As in `LemaConfig`.
        **kwargs: What ``AutoModelForCausalLM.from_pretrained`` takes: ``config``, ``revision``, ``token``,
            ``cache_dir``, ``local_files_only``, ``subfolder``, ``attn_implementation``, ``generation_config``,
            ``key_mapping`` and values of the configuration. ``device_map``, ``quantization_config`` and other ways to
            place or change weights are refused.

    Returns:
        The model and the source of its layers.

    Raises:
        ValueError: An argument that cannot be combined with streaming; a card without 4-bit kernels where layers are
            packed; a checkpoint quantized other than to bitsandbytes' 4 bits; a damaged one, or one that lacks tensors
            of the model (all are named); no list of decoder layers.
        FileNotFoundError: No safetensors file, or shards are missing.
        OSError: As ``from_pretrained`` when a model cannot be found or fetched.
        ImportError: Layers are to be packed and bitsandbytes is not installed.
    """
    request = read_request(str(name_or_path), dtype, trust_remote_code, kwargs)
    config, model_kwargs = load_config(request)
    index = CheckpointIndex.open(checkpoint_folder(request))
    wanted = _resolve_dtype(request, config, index)
    model = model_on_meta(request, config, model_kwargs, wanted)
    layers_path, layers = find_decoder_layers(model)
    quantizer, packing = None, NOTHING_PACKED
    stored_config = config.to_dict().get("quantization_config")
    if quantization is not None or stored_config is not None:
        index, stored = (index, {}) if stored_config is None else split_packed(index)
        quantizer = make_quantizer(wanted, double_quantization, stored_config, torch.device(device))
        packing = _pack_linears(model, layers_path, quantizer, stored, torch.device(device))
    plan = plan_conversion(model, index.tensors, wanted, request.key_mapping)
    if plan.unexpected:
        logger.warning(
            "%d tensors of the checkpoint %s are not used by %s: %s",
            len(plan.unexpected),
            request.name,
            type(model).__name__,
            ", ".join(plan.unexpected),
        )
    source = CheckpointSource(model, layers_path, index, plan, wanted, packing)
    try:
        _set_layer_dtypes(layers, source)
        _refuse_packed_outside(layers_path, plan, packing)
        _load_outside(model, layers_path, index, plan, torch.device(device))
        model.requires_grad_(False)
        model.eval()
        if transformers_at_least("5"):
            model.set_use_kernels(False)
        _load_generation_config(model, request)
        if quantizer is not None:
            mark_as_packed(model, quantizer, wanted)
    except BaseException:
        source.close()
        raise
    return Skeleton(model=model, layers_path=layers_path, source=source, index=index, plan=plan, request=request)


def _pack_linears(
    model: PreTrainedModel, layers_path: str, quantizer: Any, stored: dict[str, StoredMatrix], device: torch.device
) -> Packing:
    """Puts bitsandbytes' linears into a model on meta, and says what their weights are made of."""
    originals = put_in_packed_linears(model, layers_path, quantizer)
    config = quantizer.quantization_config
    return Packing(
        matrices=matrices_of(originals, layers_path, config.bnb_4bit_compute_dtype, config.bnb_4bit_use_double_quant),
        transposed=frozenset() if stored else transposed_weights(originals),
        stored=stored,
        device=device,
    )


def pack_model(
    name_or_path: str | Path,
    output: str | Path | None = None,
    *,
    dtype: torch.dtype | str | None = None,
    quantization: str | None = None,
    double_quantization: bool = True,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> PackIndex:
    """Write a checkpoint's decoder layers into a pack, as `from_pretrained` with the same arguments will read them.

    Args:
        name_or_path: As for `build_skeleton`.
        output: The pack's file, for ``from_pretrained(..., pack=output)``; None to keep it where it is found by itself.
        dtype: As for `build_skeleton`.
        quantization: As in `LemaConfig`.
        double_quantization: As in `LemaConfig`.
        device: Where linears are packed. A GPU and a CPU may differ in the last bit of a scale.
        **kwargs: As for `build_skeleton`.

    Returns:
        The pack.

    Raises:
        OSError: There is too little disk space.
        ValueError: As for `build_skeleton` and `write_pack`.
    """
    how = {"quantization": quantization, "double_quantization": double_quantization}
    arguments: dict[str, Any] = {"dtype": dtype, "device": device} | how | kwargs
    with build_skeleton(name_or_path, **arguments).source as source:
        return cached_pack(source) if output is None else write_pack(source, output)


def _resolve_dtype(request: ModelRequest, config: Any, index: CheckpointIndex) -> torch.dtype:
    """The asked dtype, else the config's, else that of the first floating tensor: ``from_pretrained``'s "auto"."""
    wanted = request.dtype
    if wanted is None or wanted == "auto":
        wanted = config.dtype
    if wanted is None:
        floating = (location.dtype for location in index.tensors.values() if location.dtype.is_floating_point)
        wanted = next(floating, torch.get_default_dtype())
    return parse_dtype(wanted)


def _set_layer_dtypes(layers: nn.ModuleList, source: CheckpointSource) -> None:
    """Give the parameters on meta the dtypes they will have: some modules stay in float32."""
    for layer, layout in zip(layers, source.layouts, strict=True):
        packed = {name for matrix in layout.packed for name in matrix.tensors()}
        for spec in layout.tensors:
            if spec.name in packed:
                continue
            path, _, attribute = spec.name.rpartition(".")
            owner = layer.get_submodule(path)
            if getattr(owner, attribute).dtype != spec.dtype:
                on_meta = torch.empty(spec.shape, dtype=spec.dtype, device="meta")
                owner.register_parameter(attribute, nn.Parameter(on_meta, requires_grad=False))


def _refuse_packed_outside(layers_path: str, plan: ConversionPlan, packing: Packing) -> None:
    outside = [
        group.target
        for group in plan.groups
        if not group.target.startswith(f"{layers_path}.") and any(name in packing.stored for name in group.sources)
    ]
    if outside:
        raise ValueError(
            f"{len(outside)} weights outside the decoder layers are packed to 4 bits in the checkpoint; only those of "
            f"decoder layers can be: {', '.join(outside)}. Use the full-precision checkpoint with "
            'LemaConfig(quantization="nf4")'
        )


def _load_outside(
    model: PreTrainedModel, layers_path: str, index: CheckpointIndex, plan: ConversionPlan, device: torch.device
) -> None:
    """Load every parameter outside the decoder layers and every buffer, tie what is tied, see that nothing lacks."""
    of_layer = re.compile(rf"{re.escape(layers_path)}\.\d+\.")
    layer_parameters = {
        name for name, _ in model.named_parameters(remove_duplicate=False) if of_layer.match(name) is not None
    }
    missing = set(model.state_dict()) - layer_parameters
    found: set[str] = set()
    reader = TensorReader(index)
    read = reader.read_meta if device.type == "meta" else reader.read
    with reader.files, torch.no_grad():
        outside = [group for group in plan.groups if group.target not in layer_parameters]
        for group in tqdm(outside, desc="Loading embedding and head", delay=2, leave=False):
            for name, tensor in convert(group, model, read).items():
                _place(model, name, tensor.to(device))
                found.add(name)
        missing -= found
        if device.type == "meta":
            missing |= _equal_twins(model, found, plan, reader)
    if device.type != "meta":
        for module in model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(device)
    if transformers_at_least("5"):
        model.tie_weights(missing_keys=missing, recompute_mapping=False)
    else:  # may go with support for transformers 4
        model.tie_weights()
    state = model.state_dict(keep_vars=True)
    loaded = {id(state[name]) for name in found if name in state}
    unplaced = {name for name, tensor in state.items() if tensor.is_meta and id(tensor) not in loaded}
    lacking = sorted(unplaced - layer_parameters)
    lacking += sorted(
        name for name, buffer in model.named_buffers() if buffer.is_meta and name not in found and name not in lacking
    )
    if lacking:
        raise ValueError(
            f"the checkpoint in {index.folder} lacks {len(lacking)} tensors of {type(model).__name__}: "
            f"{', '.join(lacking)}. from_pretrained would fill them with random numbers: if that is what you want, do "
            "it with transformers, save the model, and load the saved one"
        )


def _equal_twins(model: PreTrainedModel, found: set[str], plan: ConversionPlan, reader: TensorReader) -> set[str]:
    """Tensors that the checkpoint holds twice: transformers 5 ties them where the values say so, which meta cannot."""
    if not transformers_at_least("5"):
        return set()
    plain = {group.target: group.sources[0] for group in plan.groups if group.converter is None}
    pairs = [(twin, name) for twin, name in model.all_tied_weights_keys.items() if {twin, name} <= found]
    return {
        twin
        for twin, name in pairs
        if twin in plain and name in plain and reader.have_same_bytes(plain[twin], plain[name])
    }


def _place(model: PreTrainedModel, name: str, tensor: torch.Tensor) -> None:
    path, _, attribute = name.rpartition(".")
    owner = model.get_submodule(path)
    found = getattr(owner, attribute)
    if found.shape != tensor.shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)} in the checkpoint, expected {tuple(found.shape)}")
    if attribute in owner._parameters:
        owner.register_parameter(attribute, nn.Parameter(tensor, requires_grad=False))
    else:
        owner._buffers[attribute] = tensor


def _load_generation_config(model: PreTrainedModel, request: ModelRequest) -> None:
    """Load the generation config, and a custom generate function of trusted code, as ``from_pretrained`` does."""
    if not model.can_generate():
        return
    hub: dict[str, Any] = dict.fromkeys(("cache_dir", "token"))
    hub |= {"force_download": False, "proxies": None, "local_files_only": False, "revision": "main", "subfolder": ""}
    hub |= request.hub
    if transformers_at_least("5"):
        generative: Any = model
        generative.adjust_generation_fn(
            request.generation_config, True, None, request.name, **hub, trust_remote_code=request.trust_remote_code
        )
        return
    # May go with support for transformers 4.
    if request.generation_config is not None:
        model.generation_config = GenerationConfig.from_dict(request.generation_config.to_dict())
        return
    try:
        model.generation_config = GenerationConfig.from_pretrained(request.name, **hub)
    except OSError:
        logger.info("%s has no generation config, its model config is used", request.name)
