"""What a card's compute capability decides: the lowest one for each thing that not every card can do.

Responsibility: pairs of integers, compared as tuples, each with its source. Knows no device.
"""

from __future__ import annotations

BF16_CAPABILITY = (8, 0)
"""From here on bf16 is computed and not emulated; ``torch.cuda.is_bf16_supported`` counts emulation too."""

FLASH_CAPABILITY = (8, 0)
"""From here on PyTorch has its flash attention, the only fused kernel that takes grouped queries as they are."""

FOUR_BIT_CAPABILITY = (6, 0)
"""From here on bitsandbytes packs and unpacks 4-bit weights. Source: its installation guide, NF4/FP4 quantization; its
wheels hold no older kernels since 0.48."""
