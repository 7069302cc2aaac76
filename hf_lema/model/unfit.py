"""Models that cannot be streamed, refused before anything is done to them.

Responsibility: quantized or unloaded weights, layers that are proxies already, bfloat16 without hardware for it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_lema.capability import BF16_CAPABILITY
from hf_lema.layer.layer_proxy import LayerProxy
from hf_lema.model.placement import is_packed


def refuse_unfit(lm: PreTrainedModel) -> None:
    """Refuses a model in memory whose weights cannot be taken over.

    Raises:
        RuntimeError: Some of its layers are wrapped.
        ValueError: It is quantized in another way than bitsandbytes' 4 bits, spread over devices, or has no data.
    """
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


def refuse_bf16_without_hardware(lm: PreTrainedModel, device: torch.device) -> None:
    """Refuses bfloat16 on a card that only emulates it.

    Raises:
        ValueError: It does.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device) >= BF16_CAPABILITY:
        return
    if any(parameter.dtype == torch.bfloat16 for parameter in lm.parameters()):
        major, minor = torch.cuda.get_device_capability(device)
        raise ValueError(
            f"the model is in bfloat16, which {torch.cuda.get_device_name(device)} (compute capability "
            f"{major}.{minor}) only emulates; load it with dtype=torch.float16 and train with fp16=True"
        )
