"""A run that is resumed goes on with the base model that it began with, or is refused.

Responsibility: what a checkpoint of Trainer keeps of the base model's files, inside ``trainer_state.json``, and
comparing that with the files at hand. Knows nothing of how files are told apart.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from torch import nn

from hf_lema.files.base_files import BaseFiles
from hf_lema.wrapper import find_base

logger = logging.getLogger(__name__)

KEY = "base_files"
"""Under which the record lies among a callback's attributes."""


class BaseGuard:
    """The identity of the base in one training.

    Args:
        is_override: Whether a run may go on with a base that has changed.
    """

    def __init__(self, is_override: bool = False) -> None:
        self.is_override = is_override
        self._base: BaseFiles | None = None

    def begin(self, model: nn.Module, stored: Mapping[str, Any]) -> None:
        """Sees, before the first step, that the base is the one that the checkpoint was trained on.

        Args:
            model: What is trained.
            stored: What the checkpoint keeps of a callback; empty where training begins anew.

        Raises:
            ValueError: It is another one; every file that differs is named.
        """
        self._base = find_base(model)
        recorded = dict(stored.get("attributes", {})).get(KEY)
        if not recorded:
            return
        if self._base is None:
            logger.warning(
                "The checkpoint says which files its base model came from, but this model was not loaded by "
                "LemaModelWrapper.from_pretrained: whether it is the same cannot be told"
            )
            return
        differences = self._base.differences(recorded)
        if not differences:
            return
        listed = "".join(f"\n- {difference}" for difference in differences)
        message = f"the base model is not the one that this checkpoint was trained on:{listed}\n"
        if not self.is_override:
            raise ValueError(
                f"{message}An adapter fits only the base that it was trained on. Load the original files (for a model "
                "on the hub: its revision), begin anew without resume_from_checkpoint, or, to go on with the changed "
                "base all the same, pass MemoryTelemetryCallback(allow_changed_base=True)"
            )
        logger.warning("%sThe run goes on with it, as allow_changed_base asks", message)

    def end(self) -> None:
        """Forgets the base: it is that of one training."""
        self._base = None

    def attributes(self) -> dict[str, Any]:
        """What a checkpoint is to keep; empty outside training, and where the base came from no files."""
        if self._base is None:
            return {}
        record = self._base.record()
        if self._base.unidentified:
            logger.warning(
                "%s: changed or removed since the base model was loaded from it. The run goes on with what was loaded; "
                "to resume from its checkpoints will be refused",
                ", ".join(self._base.unidentified),
            )
        return {KEY: record}
