"""The warning of a card that is nearly full.

Responsibility: `FullCardWarning`: what is held against which limit, and saying so once.
"""

from __future__ import annotations

import logging

from hf_lema.measuring.records import PeakMemory
from hf_lema.measuring.vram_meter import VramMeter
from hf_lema.units import format_bytes

logger = logging.getLogger(__name__)

# Armed again once use has fallen this far below the threshold, so that a run that rests on it warns once.
_REARM_MARGIN = 0.02


class FullCardWarning:
    """Logs a warning each time that the use of VRAM crosses a share of the card.

    Args:
        fraction: The share, above 0 and at most 1.
        vram_limit_bytes: A card size to measure against where that is smaller than the real one.

    Attributes:
        fraction: As given.
        vram_limit_bytes: As given.

    Raises:
        ValueError: Such a share cannot be.
    """

    def __init__(self, fraction: float, vram_limit_bytes: int | None) -> None:
        if not 0 < fraction <= 1:
            raise ValueError(f"warn_fraction is a share of the card above 0 and at most 1, got {fraction}")
        self.fraction = fraction
        self.vram_limit_bytes = vram_limit_bytes
        self._is_above = False

    def arm(self) -> None:
        """Another training begins."""
        self._is_above = False

    def look(self, memory: PeakMemory, meter: VramMeter) -> None:
        """Logs if these peaks are the first above the threshold.

        Args:
            memory: Peaks since the last look.
            meter: Of the card.
        """
        if memory.vram_process_peak_bytes is None or memory.vram_reserved_peak_bytes is None:
            return
        card_bytes = meter.total_bytes
        if self.vram_limit_bytes is not None:
            card_bytes = min(card_bytes, self.vram_limit_bytes)
        # The process's use is held against the card, the allocator's against the fraction that it may reserve.
        used_bytes, limit_bytes = max(
            (memory.vram_process_peak_bytes, card_bytes),
            (memory.vram_reserved_peak_bytes, min(card_bytes, meter.allocator_limit_bytes())),
            key=lambda use: use[0] / use[1],
        )
        fraction = used_bytes / limit_bytes
        if fraction >= self.fraction and not self._is_above:
            self._is_above = True
            logger.warning(
                "VRAM in use is %s of %s (%.0f %%), above the threshold of %.0f %%: the next allocation may fail. "
                "A smaller batch or sequence, or a lower vram_budget for a streamed model, takes less.",
                *(format_bytes(used_bytes), format_bytes(limit_bytes), 100 * fraction, 100 * self.fraction),
            )
        elif fraction < self.fraction - _REARM_MARGIN:
            self._is_above = False
