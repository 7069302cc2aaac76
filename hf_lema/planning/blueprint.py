"""A model of shapes alone: from a name, a configuration or a built model, with its adapters, and no weights read.

Responsibility: building it on meta as ``from_pretrained`` and PEFT would, and sorting its tensors by what becomes of
them under streaming. Knows no budgets and no rates.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import LlamaConfig, PretrainedConfig, PreTrainedModel

from hf_lema.files.checkpoint import INDEX_NAME, SINGLE_NAME, CheckpointIndex
from hf_lema.files.layout import align_up
from hf_lema.model.loading import find_decoder_layers
from hf_lema.model.locating import load_config, model_on_meta, read_request
from hf_lema.model.placement import streamed_tensors
from hf_lema.planning.meter import allocated_bytes

_LLAMA_2: dict[str, Any] = {"vocab_size": 32000, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-2-7b": _LLAMA_2
    | {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "llama-2-13b": _LLAMA_2
    | {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
    "llama-2-70b": _LLAMA_2
    | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
    | {"num_key_value_heads": 8},
    "llama-3-8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    | {"num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5},
    "smollm2-135m": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
    | {"num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 8192, "tie_word_embeddings": True},
    "tinyllama-1.1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22}
    | {"num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": 32000, "max_position_embeddings": 2048},
}
"""Fields of ``LlamaConfig`` for models that can be planned by name, without a file or a network."""

ABSMAX_WEIGHTS = 64
ABSMAX_GROUP = 256


def nf4_bytes(num_weights: int, is_double: bool) -> int:
    """Bytes of a weight tensor in NF4.

    Half a byte a weight and one scale per 64 weights: float32, or with double quantization one byte, with a float32
    per 256 scales and an offset (QLoRA, arXiv 2305.14314, section 3; bitsandbytes' ``QuantState``).
    """
    num_scales = -(-num_weights // ABSMAX_WEIGHTS)
    packed_bytes = -(-num_weights // 2)
    if not is_double:
        return packed_bytes + 4 * num_scales
    return packed_bytes + num_scales + 4 * -(-num_scales // ABSMAX_GROUP) + 4


@dataclass(frozen=True)
class Blueprint:
    """A model on meta, with adapters; see `draw`.

    Attributes:
        name: For a person.
        lm: The language model.
        dtype: What its weights are in.
    """

    name: str
    lm: PreTrainedModel
    dtype: torch.dtype


@dataclass(frozen=True, kw_only=True)
class TensorBytes:
    """Bytes of a model's tensors by what becomes of them, as a CUDA device's allocator counts them.

    Attributes:
        layer_bytes: Streamed bytes of each decoder layer, by its index; layers without any are left out.
        embedding_bytes: The input embedding.
        head_bytes: The output head; 0 where it is tied to the embedding.
        other_bytes: Frozen tensors and buffers that are always on the device.
        adapter_bytes: Trainable tensors.
        layer_adapter_bytes: Those of them in each decoder layer.
        trainable: (numbers, bytes of a number) of each tensor that trains.
    """

    layer_bytes: dict[int, int]
    embedding_bytes: int
    head_bytes: int
    other_bytes: int
    adapter_bytes: int
    layer_adapter_bytes: tuple[int, ...]
    trainable: tuple[tuple[int, int], ...]


def draw(
    model: str | Path | PretrainedConfig | nn.Module,
    dtype: torch.dtype | str | None = None,
    lora: LoraConfig | int | None = None,
    **kwargs: Any,
) -> Blueprint:
    """Builds a model of shapes alone.

    Args:
        model: A key of `SHAPES`, a folder or hub id, a configuration, or a model, wrapped and with adapters or not
            (whose own dtypes, adapters and flags then count).
        dtype: Of the weights; None for the checkpoint's own, and float16 for a named shape or configuration without.
        lora: Adapter for a model that has none: a configuration, or the rank of one on all linear layers with a
            dropout of 0.1; None for none.
        **kwargs: For a folder or hub id as ``from_pretrained`` takes them.

    Raises:
        ValueError: No model of one stack of decoder layers, or adapters of a kind that is not put into its layers.
        OSError: There is no such model.
    """
    if isinstance(model, nn.Module):
        return _draw_built(model, lora)
    request = read_request(str(model) if isinstance(model, (str, Path)) else "configuration", dtype, False, kwargs)
    config: Any
    model_kwargs: dict[str, Any] = {}
    if isinstance(model, PretrainedConfig):
        config, name = copy.deepcopy(model), type(model).__name__
    elif str(model) in SHAPES:
        config, name = LlamaConfig(**SHAPES[str(model)]), str(model)
    else:
        config, model_kwargs = load_config(request)
        name = Path(str(model)).name if Path(str(model)).is_dir() else str(model)
    wanted = _dtype_of(dtype, config, None if isinstance(model, PretrainedConfig) else Path(str(model)))
    lm = model_on_meta(request, config, model_kwargs, wanted)
    lm.requires_grad_(False)
    if lora is not None:
        _put_on(lm, {"default": _lora_config(lora)})
    return Blueprint(name, lm, wanted)


def _dtype_of(dtype: torch.dtype | str | None, config: Any, folder: Path | None) -> torch.dtype:
    """The asked one, else the configuration's, else that of the first floating tensor in the folder's files."""
    wanted = config.dtype if dtype in (None, "auto") else dtype
    if isinstance(wanted, str):
        wanted = vars(torch)[wanted.removeprefix("torch.")]
    if wanted is None and folder is not None and ((folder / SINGLE_NAME).exists() or (folder / INDEX_NAME).exists()):
        stored = CheckpointIndex.open(folder).tensors.values()
        wanted = next((location.dtype for location in stored if location.dtype.is_floating_point), None)
    return wanted or torch.float16


def _lora_config(lora: LoraConfig | int) -> LoraConfig:
    if isinstance(lora, LoraConfig):
        return lora
    return LoraConfig(r=lora, lora_alpha=2 * lora, lora_dropout=0.1, target_modules="all-linear", task_type="CAUSAL_LM")


def _put_on(lm: PreTrainedModel, configs: dict[str, Any]) -> None:
    """Has PEFT put adapters on a model on meta; how they are initialised makes no difference to their sizes."""
    peft_model: Any = None
    for name, config in configs.items():
        config = copy.deepcopy(config)
        if isinstance(config, LoraConfig):
            config.init_lora_weights = True
        if peft_model is None:
            peft_model = get_peft_model(lm, config, adapter_name=name, low_cpu_mem_usage=True)
        else:
            peft_model.add_adapter(name, config, low_cpu_mem_usage=True)


def _draw_built(model: nn.Module, lora: LoraConfig | int | None) -> Blueprint:
    """The same classes and configurations again on meta, then the built model's dtypes and flags."""
    built: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    # PEFT leaves its configurations on the model that it puts adapters into.
    peft_configs: dict[str, PeftConfig] = built.__dict__.get("peft_config") or {}
    if not isinstance(built, PreTrainedModel):
        raise ValueError(f"expected a transformers model or a PeftModel around one, got {type(built).__name__}")
    runtime = built.__dict__.get("_lema_runtime")  # of a wrapped model, whose class is not the plain one
    plain_class: Any = type(built) if runtime is None else runtime.plain_class
    config = copy.deepcopy(built.config)
    with torch.device("meta"):
        lm = plain_class._from_config(config, dtype=built.dtype)
    lm.requires_grad_(False)
    if peft_configs:
        _put_on(lm, peft_configs)
    elif lora is not None:
        _put_on(lm, {"default": _lora_config(lora)})
    own = dict(built.named_parameters())
    if all(parameter.requires_grad for parameter in own.values()):
        own = {}  # wrapping freezes such a model
    for name, parameter in lm.named_parameters():
        if name in own and own[name].shape == parameter.shape:  # a weight of 4 bits has another one
            on_meta = torch.empty(own[name].shape, dtype=own[name].dtype, device="meta")
            flag = own[name].requires_grad
            if parameter.dtype != on_meta.dtype or parameter.requires_grad != flag:
                parameter.data = on_meta
                parameter.requires_grad_(flag)
    return Blueprint(plain_class.__name__, lm, built.dtype)


def packed_weights(lm: PreTrainedModel) -> list[nn.Parameter]:
    """Weights that 4-bit quantization packs: frozen ones of the linear layers in the decoder layers."""
    weights: list[Any] = [
        module.weight
        for layer in find_decoder_layers(lm)[1]
        for module in layer.modules()
        if isinstance(module, nn.Linear) and not module.weight.requires_grad
    ]
    return weights


def sort_tensors(lm: PreTrainedModel, *, is_packed: bool, is_double: bool = True) -> TensorBytes:
    """Sorts a blueprint's tensors by what becomes of them under streaming.

    Args:
        lm: The model.
        is_packed: Whether linear weights of the decoder layers are in NF4.
        is_double: Whether their scales are quantized too.
    """
    _, layers = find_decoder_layers(lm)
    chosen = streamed_tensors(lm, layers)
    packed = {id(weight) for weight in packed_weights(lm)} if is_packed else set()
    streamed: set[int] = set()
    layer_bytes = {}
    for layer_idx, (layout, places) in chosen.items():
        tensors = [place.owner._parameters[place.attribute] for place in places]
        streamed |= {id(tensor) for tensor in tensors}
        layer_bytes[layer_idx] = layout.nbytes
        if packed:
            layer_bytes[layer_idx] = sum(
                align_up(nf4_bytes(t.numel(), is_double) if id(t) in packed else t.numel() * t.element_size())
                for t in tensors
                if t is not None
            )
    embedding: Any = lm.get_input_embeddings()
    head: Any = lm.get_output_embeddings()
    unstreamed = {id(t): t for t in [*lm.parameters(), *lm.buffers()] if id(t) not in streamed}
    trainable = [t for t in unstreamed.values() if t.requires_grad]
    ends = {id(module.weight): module.weight for module in (embedding, head) if module is not None}
    ends = {key: weight for key, weight in ends.items() if key in unstreamed and not weight.requires_grad}
    frozen = [t for key, t in unstreamed.items() if not t.requires_grad and key not in ends]
    sizes = [allocated(weight) for weight in ends.values()]
    return TensorBytes(
        layer_bytes=layer_bytes,
        embedding_bytes=sizes[0] if sizes else 0,
        head_bytes=sizes[1] if len(sizes) > 1 else 0,
        other_bytes=sum(map(allocated, frozen)),
        adapter_bytes=sum(map(allocated, trainable)),
        layer_adapter_bytes=tuple(_trainable_bytes(layer.parameters()) for layer in layers),
        trainable=tuple((tensor.numel(), tensor.element_size()) for tensor in trainable),
    )


def allocated(tensor: torch.Tensor) -> int:
    """What a tensor takes from a CUDA device's allocator."""
    return allocated_bytes(tensor.numel() * tensor.element_size())


def _trainable_bytes(parameters: Iterable[torch.Tensor]) -> int:
    return sum(allocated(parameter) for parameter in parameters if parameter.requires_grad)
