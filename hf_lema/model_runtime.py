"""What a wrapped language model owns: its layers, their streamer, and the way in which its steps run.

Responsibility: `ModelRuntime`, and how to find that of a model. Makes no proxy of anything.
"""

from __future__ import annotations

import logging
import os
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_lema.choices import StepChoices, StepPlan
from hf_lema.config import LemaConfig
from hf_lema.files.base_files import BaseFiles
from hf_lema.layer.layer_proxy import ProxyState
from hf_lema.layer.self_check import SelfCheck
from hf_lema.layer.visit_options import VisitOptions
from hf_lema.model.loss import ChunkedLoss
from hf_lema.model.outside import PIECE_BYTES, OutsideWeights
from hf_lema.planning.data_parallel import Launch
from hf_lema.planning.device_rates import rates_of
from hf_lema.planning.planner import best_plan
from hf_lema.planning.rehearsal import UnplannableError
from hf_lema.planning.step_cost import PlanOptions, StepCost
from hf_lema.runtime.host_memory import available_host_bytes
from hf_lema.runtime.residency import BatchShape, Planned, VramBudget
from hf_lema.runtime.streamer import LayerStreamer

logger = logging.getLogger(__name__)


class ModelRuntime:
    """What a wrapped language model owns.

    Args:
        lm: The language model, with its own class still.
        layers: Its proxied layers, in order.
        streamer: Their weights.
        config: The user's choices.
        options: How its layers' visits are run.
    """

    def __init__(
        self,
        lm: PreTrainedModel,
        layers: list[ProxyState],
        streamer: LayerStreamer,
        config: LemaConfig,
        options: VisitOptions,
    ) -> None:
        self.plain_class = type(lm)
        self.layers = layers
        self.streamer = streamer  # owned
        self.config = config
        self.base: BaseFiles | None = None  # of a model that came from files
        self.budget: VramBudget | None = None
        self.options = options
        self.check = SelfCheck() if config.self_check else None
        for state in layers:
            state.check = self.check
        self.outside = OutsideWeights(lm, streamer.device, piece_bytes=PIECE_BYTES)
        self.loss = ChunkedLoss(lm, self.plain_class.forward, self.outside)
        streamer.own(options.boundaries)
        streamer.own(self.outside)
        self._lm = weakref.ref(lm)
        self._is_packed = getattr(lm, "is_loaded_in_4bit", False)
        self._costs: dict[str, Any] = {}  # of the last shape that was planned
        self._lm_buffers_and_parameters: Callable[[], Iterator[torch.Tensor]] = lambda: iter(
            [*lm.parameters(), *lm.buffers()]
        )

    def apply(self, choices: StepChoices) -> None:
        """Runs steps in this way from now on. Only between steps.

        Raises:
            ValueError: A kept or resident layer does not exist.
        """
        unknown = [i for i in choices.kept_layers if i >= len(self.layers)]
        if unknown:
            raise ValueError(f"kept_layers {unknown} do not exist; the model has {len(self.layers)} layers")
        self.options.micro_batches.micro_batch_size = choices.micro_batch_size
        self.options.micro_batches.forward_micro_batch_size = choices.forward_micro_batch_size
        self.options.tiles.tile_tokens = choices.tile_tokens
        self.options.boundaries.in_use = choices.boundaries_in_ram
        if choices.outside_in_ram:
            self.outside.move_to_host()
        else:
            self.outside.move_to_device()
        self.streamer.set_resident(choices.resident_layers)
        self.options.kept.layers = frozenset(choices.kept_layers)

    def apply_given(self, choices: StepChoices) -> None:
        """The same for choices that a user has made.

        Raises:
            ValueError: A layer does not exist, or cannot be run so.
        """
        packed = [i for i in choices.kept_layers if i < len(self.layers) and self.layers[i].is_packed]
        if moving := [i for i in packed if i not in choices.resident_layers]:
            raise ValueError(
                f"kept_layers {moving} are in 4 bits and streamed: bitsandbytes would compute their gradients from "
                "whatever their slots hold by then. Name them in resident_layers too, or do not keep them"
            )
        self.apply(choices)

    @property
    def choices(self) -> StepChoices:
        """How steps run now."""
        return StepChoices(
            micro_batch_size=self.options.micro_batches.micro_batch_size,
            forward_micro_batch_size=self.options.micro_batches.forward_micro_batch_size,
            tile_tokens=self.options.tiles.tile_tokens,
            boundaries_in_ram=self.options.boundaries.in_use,
            outside_in_ram=self.outside.on_host,
            resident_layers=self.streamer.resident_layers,
            kept_layers=tuple(sorted(self.options.kept.layers)),
        )

    def start_budget(self) -> None:
        """Sets the VRAM budget, once everything that is not streamed has been placed."""
        streamed = {id(parameter) for parameter in self.streamed_parameters()}
        other_bytes = sum(
            tensor.numel() * tensor.element_size()
            for tensor in self._lm_buffers_and_parameters()
            if id(tensor) not in streamed
        )
        choices = self.config.choices
        given = self._given(choices) if isinstance(choices, StepPlan) else None
        self.budget = VramBudget(
            self.config, self.streamer, other_bytes, self.outside.nbytes, self._plan, self.apply, given
        )
        if isinstance(choices, StepChoices):
            self.apply_given(choices)
            return
        self.budget.start()
        self.layers[0].on_sweep = self.budget.before_training_step

    def before_forward(self, input_ids: Any = None, **kwargs: Any) -> None:
        """Plans a training step, and makes room for a forward without gradients that is larger than all before.

        A training step is planned here for its embedding and head, and again at its first layer, which knows best.
        """
        tokens = kwargs.get("inputs_embeds") if input_ids is None else input_ids
        if self.budget is None or not isinstance(tokens, torch.Tensor) or tokens.dim() < 2:
            return
        if not torch.is_grad_enabled():
            self.budget.before_evaluation(tokens.shape[0], tokens.shape[1])
        elif self.layers[0].on_sweep is not None:
            self.layers[0].on_sweep(tokens.shape[0], tokens.shape[1])

    def _given(self, plan: StepPlan) -> tuple[BatchShape, Planned]:
        """What somebody has planned for this model."""
        if plan.num_layers != len(self.layers):
            raise ValueError(
                f"choices is a plan for {plan.model}, which has {plan.num_layers} layers; this model has "
                f"{len(self.layers)}. Plan the model that is trained"
            )
        return BatchShape(plan.batch_size, plan.seq_len), Planned(plan.choices, plan.activation_bytes)

    def _plan(self, batch_size: int, seq_len: int, budget_bytes: int | None) -> Planned:
        """How to run within so many bytes of VRAM; whole batches with everything there where that cannot be planned."""
        config = replace(self.config, vram_budget="min" if budget_bytes is None else max(1, budget_bytes))
        num_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        num_hosts = max(1, int(os.environ.get("WORLD_SIZE", "1")) // num_processes)
        options = PlanOptions(
            num_processes=num_processes,
            launch=Launch(num_hosts=num_hosts),
            micro_batch_size=config.micro_batch_size or None,
            quantization="nf4" if self._is_packed else None,
            double_quantization=config.double_quantization,
            # The layers have their RAM already; what is free comes on top of it.
            ram_bytes=available_host_bytes() + self.streamer.host_store.held_bytes,
            file_layers=self.streamer.host_store.file_layers,
        )
        try:
            if self._costs.get("shape") != (batch_size, seq_len):
                self._costs = {"shape": (batch_size, seq_len), "cost": self._cost(batch_size, seq_len, options)}
            plan = best_plan(self._costs["cost"], config, options)
        except (UnplannableError, RuntimeError, NotImplementedError) as error:
            # Any operator may refuse tensors without data; the step itself needs no plan.
            warnings.warn(
                f"steps of {batch_size} x {seq_len} tokens cannot be planned ({error}); they run on the whole batch, "
                "and layers become resident by what is measured",
                stacklevel=2,
            )
            return Planned(StepChoices(micro_batch_size=self.config.micro_batch_size))
        logger.info("planned for %d x %d tokens: %s", batch_size, seq_len, plan)
        return Planned(plan.choices, plan.activation_bytes)

    def _cost(self, batch_size: int, seq_len: int, options: PlanOptions) -> StepCost:
        """What a step takes, counted anew; the step that is about to begin must not notice."""
        lm = self._lm()
        assert lm is not None
        with torch.random.fork_rng(devices=[]):
            return StepCost(lm, batch_size, seq_len, None, rates_of(self.streamer.device), options)

    def streamed_parameters(self) -> list[torch.Tensor]:
        """Every registered tensor that is at rest on the host."""
        return [state.registered(tensor) for state in self.layers for tensor in state.streamed]


def runtime_of(lm: Any) -> ModelRuntime:
    """That of a wrapped language model, not of a module around one."""
    runtime: ModelRuntime = lm.__dict__["_lema_runtime"]
    return runtime
