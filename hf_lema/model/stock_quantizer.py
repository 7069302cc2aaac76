"""transformers' own 4-bit quantizer: which linears it packs, and what a packed model says of itself.

Responsibility: asking transformers for bitsandbytes' modules in place of linears, exactly those that
``from_pretrained(quantization_config=BitsAndBytesConfig(load_in_4bit=True))`` would put in, and keeping those of the
decoder layers; the marks that PEFT and Trainer look for. Packs nothing itself. Knows nothing of files or streaming.

Note [what a packed model reports]: it is a stock 4-bit model in every mark: ``is_loaded_in_4bit`` and
``quantization_method`` (PEFT puts its 4-bit LoRA layers on it, ``prepare_model_for_kbit_training`` prepares it, Trainer
does not put it under DataParallel), ``hf_quantizer`` and ``is_quantized`` (Trainer asks for an adapter before training,
``half()`` and casts are refused), ``config.quantization_config`` (``save_pretrained`` writes a 4-bit checkpoint that
stock transformers loads). Streamed weights stay where they are under ``to(device)``, as on any wrapped model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AutoHfQuantizer, AutoQuantizationConfig

from hf_lema.capability import FOUR_BIT_CAPABILITY
from hf_lema.files.layout import PackedMatrix
from hf_lema.model.conversion import transformers_at_least


def is_packed_config(stored: Any) -> bool:
    """Whether the ``quantization_config`` of a checkpoint is that of bitsandbytes with 4 bits."""
    values = stored if isinstance(stored, dict) else stored.to_dict()
    return values.get("quant_method") == "bitsandbytes" and bool(values.get("load_in_4bit"))


def make_quantizer(
    dtype: torch.dtype, double_quantization: bool, stored: Any = None, device: torch.device | None = None
) -> Any:
    """The quantizer of transformers for NF4, or for a checkpoint that is packed already.

    Args:
        dtype: The model's dtype: linears compute in it.
        double_quantization: Whether the absmax values are packed too.
        stored: The checkpoint's ``quantization_config``, if it has one; it then decides what is packed.
        device: Where layers are packed and unpacked, if that is known yet.

    Raises:
        ValueError: The device is a card that bitsandbytes has no kernels for.
        ImportError: bitsandbytes is not installed, or has no backend here.
    """
    if device is not None and device.type == "cuda":
        _refuse_without_kernels(device)
    if stored is None:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=double_quantization,
        )
    else:
        config = AutoQuantizationConfig.from_dict(stored if isinstance(stored, dict) else stored.to_dict())
    config.bnb_4bit_compute_dtype = dtype
    config.bnb_4bit_quant_storage = torch.uint8
    quantizer: Any = AutoHfQuantizer.from_config(config, pre_quantized=stored is not None)
    quantizer.validate_environment(device_map=None)
    return quantizer


def _refuse_without_kernels(device: torch.device) -> None:
    capability = torch.cuda.get_device_capability(device)
    if capability < FOUR_BIT_CAPABILITY:
        own, needed = (".".join(map(str, pair)) for pair in (capability, FOUR_BIT_CAPABILITY))
        raise ValueError(
            f"{torch.cuda.get_device_name(device)} has compute capability {own}, and bitsandbytes has no 4-bit kernels "
            f"below {needed}: leave quantization out and load the full-precision checkpoint with dtype=torch.float16"
        )


def put_in_packed_linears(model: PreTrainedModel, layers_path: str, quantizer: Any) -> dict[str, nn.Module]:
    """Puts a ``Linear4bit`` without values in place of every linear of the decoder layers that stock would pack.

    Biases are those of the linears. Linears outside the decoder layers stay as they are.

    Args:
        model: Full-precision or on meta.
        layers_path: Path of its list of decoder layers.
        quantizer: As given by `make_quantizer`.

    Returns:
        Path -> the linear that was there.
    """
    before = dict(model.named_modules())
    # By name in transformers 4, as an attribute of the model in 5.
    kept = model._keep_in_fp32_modules
    quantizer.preprocess_model(model=model, device_map=None, keep_in_fp32_modules=kept)
    replaced: dict[str, nn.Module] = {}
    for path, module in list(model.named_modules()):
        original = before.get(path)
        if module is original or original is None or not isinstance(original, (nn.Linear, Conv1D)):
            continue
        if not path.startswith(f"{layers_path}."):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, original)
            continue
        replaced[path] = original
        module.train(original.training)
        module._parameters["bias"] = original._parameters["bias"]
        dtype = torch.uint8 if quantizer.pre_quantized else original.weight.dtype
        module.weight.data = torch.empty(module.weight.shape, dtype=dtype, device="meta")
        module.weight.requires_grad_(False)
    return replaced


def matrices_of(
    originals: dict[str, nn.Module], layers_path: str, dtype: torch.dtype, double_quantization: bool
) -> dict[str, PackedMatrix]:
    """What the weights of replaced linears become: full name of the weight in the model -> matrix."""
    found = {}
    for path, original in originals.items():
        weight: Any = original.weight
        rows, columns = weight.shape
        name = path.removeprefix(f"{layers_path}.").partition(".")[2]
        found[f"{path}.weight"] = PackedMatrix(
            name=f"{name}.weight",
            shape=(columns, rows) if isinstance(original, Conv1D) else (rows, columns),
            dtype=dtype,
            is_nested=double_quantization,
        )
    return found


def transposed_weights(originals: dict[str, nn.Module]) -> frozenset[str]:
    """Full names of the weights that were registered transposed: those of GPT-2's ``Conv1D``."""
    return frozenset(f"{path}.weight" for path, original in originals.items() if isinstance(original, Conv1D))


def mark_as_packed(model: PreTrainedModel, quantizer: Any, dtype: torch.dtype) -> None:
    """Has the model report what it is; see Note [what a packed model reports]."""
    marked: Any = model
    marked.hf_quantizer = quantizer
    if not transformers_at_least("5"):  # read by its ``dequantize``; may go with support for transformers 4
        marked.config._pre_quantization_dtype = dtype
    quantizer.postprocess_model(model, config=model.config)
