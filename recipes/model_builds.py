"""How each contender gets its model: stock, 4-bit, or streamed, as its file in contenders/ says.

Knows transformers, peft, bitsandbytes (imported when needed) and hf_lema. Does not know how they are trained.
"""

from __future__ import annotations

from typing import Any

import torch
from contender_spec import ContenderSpec, known_contenders, load_contender
from peft import prepare_model_for_kbit_training
from torch import nn
from training import DTYPES, TrainingPlan, add_adapter
from transformers import AutoModelForCausalLM

from hf_lema import LemaConfig, LemaModelWrapper

LEMA_CONTENDERS = tuple(name for name in known_contenders() if load_contender(name).build == "lema")
"""Contenders whose model is streamed."""


def build_model(
    contender: str | ContenderSpec,
    name_or_path: str,
    plan: TrainingPlan,
    device: torch.device,
    config: LemaConfig | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Loads the model as this contender does and puts the adapter on it.

    Args:
        contender: Its spec, or the name of its file in ``contenders/``.
        name_or_path: Folder or hub id.
        plan: Precision, adapter and seed.
        device: Where it trains.
        config: Budgets of a streamed model; by default those of the contender.
        **kwargs: Passed on to ``from_pretrained``, such as ``attn_implementation``.

    Raises:
        ValueError: An unknown contender.
    """
    spec = load_contender(contender) if isinstance(contender, str) else contender
    spec = spec.for_device(device.type)
    dtype = DTYPES[plan.precision]
    kwargs = {**spec.model, **kwargs}
    if spec.build == "stock":
        if device.type == "cuda":
            kwargs = {"device_map": {"": device}} | kwargs  # straight to the card, not by way of RAM
        model = AutoModelForCausalLM.from_pretrained(name_or_path, dtype=dtype, **kwargs)
    elif spec.build == "4bit":
        model = _load_4bit(name_or_path, dtype, device, plan, **kwargs)
    else:
        config = LemaConfig(**spec.lema) if config is None else config
        model = LemaModelWrapper.from_pretrained(name_or_path, config=config, dtype=dtype, device=device, **kwargs)
    return add_adapter(model, plan)


def _load_4bit(name_or_path: str, dtype: torch.dtype, device: torch.device, plan: TrainingPlan, **kwargs: Any) -> Any:
    """NF4 with double quantization, prepared for training as PEFT does it."""
    from bitsandbytes.nn import Linear4bit
    from transformers import BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    model = AutoModelForCausalLM.from_pretrained(
        name_or_path, dtype=dtype, quantization_config=quantization, device_map={"": device}, **kwargs
    )
    # On CPUs with AVX512-BF16, bitsandbytes 0.50 repacks the 4-bit weights at the first forward in eval mode, and later
    # training forwards then go through a kernel that autograd does not see: gradients were wrong by 100 %. Without the
    # flag the layer keeps its portable layout. Versions before 0.50 have no such flag and do not look at it.
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
    options: dict[str, Any] = {"use_gradient_checkpointing": plan.gradient_checkpointing}
    if plan.gradient_checkpointing:
        options["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    return prepare_model_for_kbit_training(model, **options)
