"""Whatever is done to a streamed model, in any order: losses and gradients are the resident model's, bit for bit.

Hypothesis draws the orders: several losses in flight, of batches of unlike size, while choices change; evaluations,
updates, adapters merged, disabled and set, base weights written to.
"""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from models import NUM_LAYERS, STOCK, WRAP_THEN_PEFT, assert_same_tensors, batch, gradients, prepare

from hf_lema import LemaConfig, StepChoices, get_streamer
from hf_lema.wrapper import apply_choices

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore:Adapter cannot be set")]

LAYERS = st.sets(st.sampled_from(range(NUM_LAYERS))).map(lambda layers: tuple(sorted(layers)))
CHOICES = st.builds(StepChoices, kept_layers=LAYERS, resident_layers=LAYERS, boundaries_in_ram=st.booleans())


class TwinMachine(RuleBasedStateMachine):
    """A resident and a streamed model to which the same is done."""

    @initialize(choices=CHOICES, num_slots=st.integers(2, 4))
    def start(self, choices: StepChoices, num_slots: int) -> None:
        config = LemaConfig(choices=choices, num_slots=num_slots)
        self.models: list[Any] = [prepare(order, config=config) for order in (STOCK, WRAP_THEN_PEFT)]
        with torch.no_grad():  # an adapter that begins as nothing would hide that it is merged
            for model in self.models:
                for name, parameter in model.named_parameters():
                    if "lora_" in name:
                        parameter.add_(0.1)
        self.optimizers = [
            torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1) for model in self.models
        ]
        self.in_flight: list[list[torch.Tensor]] = []
        self.is_merged = False
        self.seed = 0

    def losses(self, num_rows: int, seq_len: int) -> list[torch.Tensor]:
        self.seed += 1
        found = []
        for model in self.models:
            torch.manual_seed(self.seed)
            found.append(model(**batch(num_rows, seq_len, seed=self.seed)).loss)
        assert torch.equal(*found)
        return found

    @precondition(lambda self: not self.is_merged)
    @rule(num_rows=st.integers(1, 3), seq_len=st.sampled_from([4, 8, 16]))
    def forward(self, num_rows: int, seq_len: int) -> None:
        self.in_flight.append(self.losses(num_rows, seq_len))

    @precondition(lambda self: self.in_flight)
    @rule(data=st.data(), again=st.booleans())
    def backward(self, data: st.DataObject, again: bool) -> None:
        losses = self.in_flight.pop(data.draw(st.integers(0, len(self.in_flight) - 1)))
        for loss in losses:
            loss.backward(retain_graph=again)
        if again:
            self.in_flight.append(losses)
        assert_same_tensors(gradients(self.models[1]), gradients(self.models[0]))

    @precondition(lambda self: self.in_flight)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        self.in_flight.pop(data.draw(st.integers(0, len(self.in_flight) - 1)))

    @rule(choices=CHOICES)
    def choose(self, choices: StepChoices) -> None:
        apply_choices(self.models[1], choices)

    @rule(num_rows=st.integers(1, 3))
    def evaluate(self, num_rows: int) -> None:
        for model in self.models:
            model.eval()
        with torch.no_grad():
            self.losses(num_rows, 8)
        for model in self.models:
            model.train()

    # What follows changes what a loss in flight was computed with, which stock refuses.

    @precondition(lambda self: not self.in_flight and not self.is_merged)
    @rule()
    def update(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()

    @precondition(lambda self: not self.in_flight)
    @rule()
    def merge_or_unmerge(self) -> None:
        for model in self.models:
            (model.unmerge_adapter if self.is_merged else model.merge_adapter)()
        self.is_merged = not self.is_merged

    @precondition(lambda self: not self.in_flight)
    @rule()
    def disable(self) -> None:
        with torch.no_grad(), self.models[0].disable_adapter(), self.models[1].disable_adapter():
            self.losses(1, 8)
        self.is_merged = False  # PEFT has unmerged in the forward

    @precondition(lambda self: not self.in_flight)
    @rule()
    def set_adapter(self) -> None:
        for model in self.models:
            model.set_adapter("default")
        self.is_merged = False

    @precondition(lambda self: not self.in_flight)
    @rule(layer_idx=st.integers(0, NUM_LAYERS - 1), factor=st.sampled_from([0.5, 1.25]))
    def write(self, layer_idx: int, factor: float) -> None:
        for model in self.models:
            with torch.no_grad():
                model.get_base_model().model.layers[layer_idx].mlp.gate_proj.weight.mul_(factor)

    def teardown(self) -> None:
        if hasattr(self, "models"):
            get_streamer(self.models[1]).close()


def run(num_examples: int, num_steps: int) -> None:
    run_state_machine_as_test(
        TwinMachine,
        settings=settings(
            max_examples=num_examples,
            stateful_step_count=num_steps,
            deadline=None,
            phases=[Phase.generate],  # a shorter example takes minutes to find
            suppress_health_check=list(HealthCheck),
            print_blob=True,
        ),
    )


def test_any_order_of_steps_choices_and_merges_gives_the_resident_model_s_numbers() -> None:
    run(num_examples=50, num_steps=30)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_five_hundred_random_orders_give_the_resident_model_s_numbers() -> None:
    run(num_examples=500, num_steps=40)
