"""Every way to run a step gives the numbers of the others: bit for bit where no sum changes its order."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import (
    ARCHITECTURES,
    NUM_LAYERS,
    ORDERS,
    STOCK,
    TRANSFORMERS_5,
    assert_same_run,
    assert_same_tensors,
    batch,
    build,
    closing,
    enable_checkpointing,
    forward_backward,
    gradients,
    lora,
    prepare,
    train,
)

from hf_lema import LemaConfig, MemoryPlan, StepChoices, plan_memory
from hf_lema.model.stores import RAM_HEAD_ROOM_BYTES
from hf_lema.planning.device_rates import DATA_SHEETS
from hf_lema.planning.step_cost import PlanOptions
from hf_lema.planning.stock_plan import plan_stock
from hf_lema.runtime.residency import Planned
from hf_lema.wrapper import apply_choices, find_choices, find_streamer

pytestmark = pytest.mark.integration


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_boundaries_in_ram_change_no_bit(architecture: str) -> None:
    results = []
    for order in (STOCK, *ORDERS):
        model = prepare(order, build(architecture), lora(architecture))
        with closing(model):
            if order == STOCK:
                enable_checkpointing(model)
            else:
                apply_choices(model, StepChoices(boundaries_in_ram=True))
            results.append((forward_backward(model), gradients(model)))
    for loss, grads in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert_same_tensors(grads, results[0][1])


def test_training_with_boundaries_in_ram_is_equal_step_by_step(tmp_path: Path) -> None:
    expected = train(prepare(STOCK), tmp_path / "stock", max_steps=8, gradient_accumulation_steps=2)
    model = prepare(ORDERS[0])
    with closing(model):
        apply_choices(model, StepChoices(boundaries_in_ram=True, resident_layers=(1,)))
        found = train(model, tmp_path / "streamed", max_steps=8, gradient_accumulation_steps=2)
    assert_same_run(found, expected)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_saving_at_once_differs_by_rounding_alone(architecture: str) -> None:
    rows = batch(5)
    fields = {"attn_pdrop": 0.0, "resid_pdrop": 0.0} if architecture == "gpt2" else {}
    # Before transformers 5 Mixtral's experts also return what their router decided, and do not run in tiles.
    tile_tokens = 10 if TRANSFORMERS_5 or architecture != "mixtral" else 0
    saving = StepChoices(
        micro_batch_size=2, tile_tokens=tile_tokens, boundaries_in_ram=True, outside_in_ram=True, resident_layers=(2,)
    )
    results = []
    for choices in (StepChoices(), saving):
        base = build(architecture, dtype=torch.float64, **fields)
        if architecture == "mixtral":
            base.config._experts_implementation = "eager"  # the grouped kernel knows no float64
        model = prepare(ORDERS[0], base, lora(architecture, lora_dropout=0.0))
        with closing(model), warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            model.double()
            apply_choices(model, choices)
            results.append((forward_backward(model, rows), gradients(model)))
            with torch.no_grad():
                results[-1] += (model.eval()(**rows).loss,)
    torch.testing.assert_close(results[1][0].double(), results[0][0].double(), rtol=1e-6, atol=0.0)
    torch.testing.assert_close(results[1][2].double(), results[0][2].double(), rtol=1e-6, atol=0.0)
    for name, expected in results[0][1].items():
        # transformers computes the loss in float32, our pieces in the model's float64.
        torch.testing.assert_close(results[1][1][name], expected, rtol=1e-4, atol=1e-7, msg=name)


def test_tiles_run_the_token_wise_part_and_nothing_else() -> None:
    model = prepare(ORDERS[0], build("llama"), lora("llama", lora_dropout=0.0))
    seen: dict[str, set[int]] = {"mlp": set(), "self_attn": set()}
    layer = model.get_base_model().model.layers[1]
    layer.mlp.down_proj.register_forward_hook(lambda _m, args, _o: seen["mlp"].add(args[0].shape[1]))
    layer.self_attn.o_proj.register_forward_hook(lambda _m, args, _o: seen["self_attn"].add(args[0].shape[1]))
    with closing(model):
        rows = batch(2)
        apply_choices(model, StepChoices(tile_tokens=12))
        forward_backward(model, rows)
        seq_len = rows["input_ids"].shape[1]
        seen["mlp"].discard(seq_len // 2)  # the check: halves of the first tokens
        assert seen["self_attn"] == {seq_len}
        assert max(seen["mlp"] - {seq_len}) == 6
        assert "forward" not in layer.mlp.__dict__


def test_dropout_draws_the_same_in_the_forward_and_in_the_recompute_of_a_tile() -> None:
    def grads(tile_tokens: int) -> dict[str, torch.Tensor]:
        # Dropout on the base of the adapter: a mask that differs between forward and recompute shows in the gradient.
        model = prepare(ORDERS[0], build("llama", num_layers=1), lora("llama", lora_dropout=0.5))
        with closing(model):
            apply_choices(model, StepChoices(tile_tokens=tile_tokens))
            losses = []
            for shift in (0.0, 1e-3):
                parameter = next(p for n, p in model.named_parameters() if "mlp.down_proj.lora_B" in n)
                with torch.no_grad():
                    parameter.add_(shift * torch.ones_like(parameter))
                torch.manual_seed(11)
                losses.append(forward_backward(model, batch(2)).double())
            slope = (losses[1] - losses[0]) / 1e-3
            mean = (gradients(model)[next(n for n in gradients(model) if "mlp.down_proj.lora_B" in n)] / 2).sum()
            return {"slope": slope, "mean": mean.double()}

    cut = grads(8)
    torch.testing.assert_close(cut["slope"], cut["mean"], rtol=5e-2, atol=1e-3)


def test_tiles_that_change_between_forward_and_backward_do_not_change_the_recompute() -> None:
    grads = []
    for is_changed in (False, True):
        model = prepare(ORDERS[0], build("llama"), lora("llama", lora_dropout=0.5))
        with closing(model):
            apply_choices(model, StepChoices(tile_tokens=8))
            torch.manual_seed(11)
            loss = model(**batch(2)).loss
            if is_changed:
                apply_choices(model, StepChoices())
            loss.backward()
            grads.append(gradients(model))
    assert_same_tensors(grads[1], grads[0])


def test_a_layer_without_a_token_wise_part_says_so() -> None:
    from hf_lema.layer.token_tiles import TokenTiles

    class Mixing(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
            self.part.forward = lambda x: x.cumsum(1)  # type: ignore[method-assign]

        def forward(self, hidden: torch.Tensor) -> Any:
            return self.part(hidden)

    tiles, layer, hidden = TokenTiles(), Mixing(), torch.randn(2, 8, 4)
    tiles.tile_tokens = 4
    with pytest.warns(UserWarning, match="Mixing has no part"), tiles.entered(layer, hidden, tiles.tile_tokens):
        assert torch.equal(layer(hidden), hidden.cumsum(1))


def test_losses_of_batches_of_several_lengths_are_in_flight_with_boundaries_in_ram() -> None:
    # As with preference pairs. The shorter one needs a second buffer, in which the next long one finds places.
    results = []
    for order in (STOCK, ORDERS[0]):
        config = LemaConfig(choices=StepChoices(boundaries_in_ram=True))
        with closing(prepare(order, config=config)) as model:
            torch.manual_seed(1)
            held = model(**batch(3, 16, seed=1)).loss
            model(**batch(1, 8, seed=2)).loss.backward()
            (held + model(**batch(3, 16, seed=3)).loss).backward()
            results.append(gradients(model))
    assert_same_tensors(results[1], results[0])


def test_close_gives_back_what_the_choices_took() -> None:
    model = prepare(ORDERS[0])
    choices = StepChoices(boundaries_in_ram=True, outside_in_ram=True)
    apply_choices(model, choices)
    forward_backward(model)
    assert find_choices(model) == choices
    streamer = find_streamer(model)
    assert streamer is not None
    runtime = model.get_base_model().__dict__["_lema_runtime"]
    assert runtime.outside.on_host
    streamer.close()
    assert not runtime.outside.on_host
    assert runtime.options.boundaries.device_bytes == 0


def test_a_plan_of_plan_memory_is_taken_as_it_is(tmp_path: Path) -> None:
    options = PlanOptions(boundaries="ram", embedding_and_head="ram", micro_batch_size=1, num_resident=2)
    config = LemaConfig(vram_budget="1GiB")
    plan = plan_memory(build(), config, batch_size=2, seq_len=16, lora=4, rates=DATA_SHEETS["T4"], options=options)
    assert isinstance(plan, MemoryPlan)
    model = prepare(ORDERS[0], config=LemaConfig(vram_budget="1GiB", choices=plan))
    with closing(model):
        assert find_choices(model) == plan.choices
        assert plan.choices.micro_batch_size == 1
        assert len(plan.resident_layers) == 2
        train(model, tmp_path, max_steps=2)
    stock = plan_stock(build(), batch_size=2, seq_len=16, lora=4)
    with pytest.raises(ValueError, match="a plan of stock training"):
        LemaConfig(choices=stock)
    with pytest.raises(ValueError, match="has 4 layers; this model has 3"):
        prepare(ORDERS[0], build(num_layers=3), config=LemaConfig(choices=plan))


def test_the_budget_hears_of_forwards_without_gradients_by_their_shape() -> None:
    with closing(prepare(ORDERS[0])) as model:
        heard: list[tuple[int, int]] = []
        runtime = model.get_base_model().__dict__["_lema_runtime"]
        runtime.budget.before_evaluation = lambda *shape: heard.append(shape)
        rows = batch(3)
        forward_backward(model, rows)
        with torch.no_grad():
            model(**rows)
            model.get_base_model()(rows["input_ids"][:2])
            model(inputs_embeds=model.get_input_embeddings()(rows["input_ids"][:1, :5]))
    assert heard == [(3, rows["input_ids"].shape[1]), (2, rows["input_ids"].shape[1]), (1, 5)]


def test_a_first_training_step_is_planned_before_its_embedding_and_again_where_a_layer_knows_better() -> None:
    with closing(prepare(ORDERS[0])) as model:
        heard: list[Any] = []
        runtime = model.get_base_model().__dict__["_lema_runtime"]
        runtime.layers[0].on_sweep = lambda *shape: heard.append(shape)
        embedding = model.get_input_embeddings()
        hook = embedding.register_forward_hook(lambda *_: heard.append("embedding"))
        rows = batch(3)
        shape = tuple(rows["input_ids"].shape)
        forward_backward(model, rows)
        hook.remove()
    assert heard == [shape, "embedding", shape]


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_a_wrapped_model_plans_its_own_steps_and_draws_no_random_number(
    quantization: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_lema.model_runtime.rates_of", lambda device: DATA_SHEETS["T4"])
    base = build("llama", dtype=torch.float16)
    with closing(prepare(ORDERS[0], base, config=LemaConfig(quantization=quantization))) as model:
        runtime = model.get_base_model().__dict__["_lema_runtime"]
        before = torch.get_rng_state()
        least = runtime._plan(4, 16, None).choices
        assert least.outside_in_ram
        assert not least.resident_layers
        runtime.config = replace(runtime.config, micro_batch_size=3)  # what a user states is no choice any more
        assert {runtime._plan(4, 16, budget).choices.micro_batch_size for budget in (None, 2**30)} == {3}
        runtime.config = replace(runtime.config, micro_batch_size=0)
        every = tuple(range(NUM_LAYERS))
        kept = () if quantization else every  # layers in 4 bits recompute
        assert runtime._plan(4, 16, 2**30).choices == StepChoices(resident_layers=every, kept_layers=kept)
        with pytest.raises(ValueError, match="least that works"):
            runtime._plan(4, 16, 2**20)
        assert torch.equal(torch.get_rng_state(), before)
        # The RAM that the layers hold is theirs: a machine that has little left beside them is no reason to refuse.
        monkeypatch.setattr("hf_lema.model_runtime.available_host_bytes", lambda: RAM_HEAD_ROOM_BYTES)
        assert runtime._plan(4, 16, 2**30).choices.resident_layers == tuple(range(NUM_LAYERS))


def test_a_model_that_cannot_be_planned_says_so_and_runs_on_the_whole_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_lema.model_runtime.rates_of", lambda device: DATA_SHEETS["T4"])
    base = build("mixtral", dtype=torch.float16, num_layers=1)
    base.config._experts_implementation = "eager"  # which experts compute depends on values
    with closing(prepare(ORDERS[0], base, lora("mixtral"))) as model:
        with pytest.warns(UserWarning, match="cannot be planned"):
            planned = model.get_base_model().__dict__["_lema_runtime"]._plan(2, 8, None)
        assert planned == Planned(StepChoices())
