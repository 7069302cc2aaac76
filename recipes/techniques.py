"""The techniques of a sentiment duel: what each changes about a plain LoRA training, and why it may not run here.

Knows which library each technique needs. Does not know models, data or processes.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class Technique:
    """One way to train an adapter.

    Attributes:
        contender: How the model is loaded, a name of `model_builds`.
        targets: Linear layers that get an adapter, or ``"all-linear"``.
        attention: Implementation of attention; None for transformers' own choice.
        recompute: Whether a stock model recomputes activations; a streamed one always does.
        loftq: The adapter begins where it makes up for the error of the 4-bit weights.
        summary: In a few words, for the table.
    """

    contender: str
    targets: str | tuple[str, ...] = "all-linear"
    attention: str | None = None
    recompute: bool = True
    loftq: bool = False
    summary: str


_PLAIN = Technique(contender="peft", summary="not quantized, all linears, sdpa, gradient checkpointing")
_QLORA = Technique(contender="qlora", summary="4 bits (NF4, double quantization)")
ABLATION = {
    "peft": _PLAIN,
    "qlora": _QLORA,
    "qlora-loftq": replace(_QLORA, loftq=True, summary="4 bits, LoftQ initialisation"),
    "targets-qvo": replace(_PLAIN, targets=("q_proj", "v_proj", "o_proj"), summary="adapter on q, v, o"),
    "eager": replace(_PLAIN, attention="eager", summary="attention: eager"),
    "flash": replace(_PLAIN, attention="flash_attention_2", summary="attention: flash_attention_2"),
    "no-recompute": replace(_PLAIN, recompute=False, summary="no gradient checkpointing"),
    "lema": replace(_PLAIN, contender="lema", summary="layers streamed"),
    "lema-nf4": replace(_QLORA, contender="lema-nf4", summary="4 bits, layers streamed"),
}
"""One change a row, against the first; those of 4 bits against ``qlora``."""
DUEL = ("qlora", "lema")
SMALL_DUEL = ("peft", "lema")


def reason_not_to_run(technique: Technique, device: str) -> str | None:
    """Why it cannot run on this machine, or None where it can."""
    if technique.attention == "flash_attention_2":
        if device == "cpu":
            return "flash_attention_2 computes on a GPU only"
        if importlib.util.find_spec("flash_attn") is None:
            return "flash_attention_2 needs the package flash-attn, which is not installed"
    if technique.contender in ("qlora", "lema-nf4") and importlib.util.find_spec("bitsandbytes") is None:
        return 'bitsandbytes is not installed: pip install "hf_lema[qlora]"'
    if technique.loftq and device == "cpu":
        return "PEFT's LoftQ initialisation of 4-bit weights computes on a GPU only"
    return None
