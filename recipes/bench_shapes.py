"""Named model shapes and their random checkpoints, written tensor by tensor so that none needs to fit in memory.

Knows transformers' Llama configuration and safetensors. Does not know training.
"""

from __future__ import annotations

import fcntl
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from training import DTYPES
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from hf_lema.planning.blueprint import SHAPES as PLANNED_SHAPES
from hf_lema.planning.blueprint import nf4_bytes, packed_weights

MAX_SHARD_BYTES = 2 * 10**9
INITIAL_STD = 0.02
FREE_DISK_MARGIN_BYTES = 10**9
NF4 = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
}
SHAPES: dict[str, dict[str, Any]] = PLANNED_SHAPES | {
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "max_position_embeddings": 512,
    },
}


def shape_config(shape: str, num_layers: int | None) -> LlamaConfig:
    """The configuration of a named shape, with fewer or more layers where asked."""
    fields = SHAPES[shape] | ({} if num_layers is None else {"num_hidden_layers": num_layers})
    return LlamaConfig(**({"rms_norm_eps": 1e-5} | fields))


def meta_model(config: LlamaConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model's skeleton: modules and parameters without data."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def ensure_checkpoint(
    shape: str,
    num_layers: int | None,
    precision: str,
    folder: Path,
    device: torch.device,
    seed: int = 0,
    is_packed: bool = False,
) -> Path:
    """The folder of the shape's random checkpoint, written first where it is not there.

    Weights are normal with standard deviation 0.02, norms are one. They are drawn on the device.

    Args:
        shape: A key of ``SHAPES``.
        num_layers: Other than the shape's own, or None.
        precision: A key of ``training.DTYPES``.
        folder: Parent of the checkpoint's folder.
        device: Where the numbers are drawn.
        seed: Of the numbers.
        is_packed: Whether the linears of the decoder layers are packed to NF4 as they are drawn, on the device, in the
            format of a stock 4-bit checkpoint: for a model whose 16-bit files the disk does not hold.

    Raises:
        ValueError: The disk has too little room.
    """
    depth = "" if num_layers is None else f"-{num_layers}-layers"
    target = folder / f"{shape}{depth}-{precision}{'-nf4' if is_packed else ''}"
    if target.is_dir():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f".{target.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of several runs at once one writes and the others wait
        if not target.is_dir():
            _write_checkpoint(target, shape_config(shape, num_layers), precision, device, seed, is_packed)
    return target


def _write_checkpoint(
    target: Path, config: LlamaConfig, precision: str, device: torch.device, seed: int, is_packed: bool
) -> None:
    folder, dtype = target.parent, DTYPES[precision]
    model = meta_model(config, dtype).requires_grad_(False)
    packed = {id(weight) for weight in packed_weights(model)} if is_packed else set()
    needed_bytes = sum(
        nf4_bytes(p.numel(), True) if id(p) in packed else p.numel() * dtype.itemsize for p in model.parameters()
    )
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes + FREE_DISK_MARGIN_BYTES:
        raise ValueError(f"{target.name} takes {needed_bytes} bytes on disk, but {free_bytes} are free there")
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=folder))
    try:
        _write_shards(model, temporary, dtype, device, seed, packed)
        if is_packed:
            model.config.quantization_config = {**NF4, "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch.")}
        model.config.save_pretrained(temporary)
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _packed(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """A weight in NF4 with double quantization, as bitsandbytes saves it."""
    from bitsandbytes.functional import quantize_4bit

    data, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    parts = {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}
    return {part: tensor.to("cpu") for part, tensor in ({name: data} | parts).items()}


def _write_shards(
    model: PreTrainedModel, folder: Path, dtype: torch.dtype, device: torch.device, seed: int, packed: set[int]
) -> None:
    generator = torch.Generator(device).manual_seed(seed)
    weight_map: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    shard_bytes = total_bytes = 0

    def close_shard() -> None:
        nonlocal shard, shard_bytes
        name = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, name))
        shard, shard_bytes = {}, 0

    for name, parameter in model.named_parameters():
        value = torch.ones(parameter.shape, dtype=dtype)
        if parameter.dim() > 1:
            value = torch.empty(parameter.shape, dtype=dtype, device=device)
            value = value.normal_(0.0, INITIAL_STD, generator=generator)
        tensors = _packed(name, value) if id(parameter) in packed else {name: value.to("cpu")}
        nbytes = sum(tensor.nbytes for tensor in tensors.values())
        if shard and shard_bytes + nbytes > MAX_SHARD_BYTES:
            close_shard()
        shard |= tensors
        shard_bytes += nbytes
        total_bytes += nbytes
    close_shard()
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")


def checkpoint_files(folder: Path) -> list[Path]:
    """The shards of a checkpoint, in order."""
    return sorted(folder.glob("*.safetensors"))
