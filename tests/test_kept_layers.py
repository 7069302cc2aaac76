"""Layers that keep their activations give the numbers of the recompute and of the resident model, and keep no slot."""

from __future__ import annotations

import functools
import gc
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from models import (
    NUM_LAYERS,
    ORDERS,
    STOCK,
    WRAP_THEN_PEFT,
    adapt,
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
from torch import nn
from torch.utils.checkpoint import checkpoint

from hf_lema import LemaConfig, LemaModelWrapper, StepChoices, get_streamer
from hf_lema.layer.kept_graph import KeptGraph, KeptLayers, LentMemory
from hf_lema.planning.meter import ByteMeter
from hf_lema.wrapper import apply_choices, find_check, find_choices

pytestmark = pytest.mark.integration

ALL = tuple(range(NUM_LAYERS))
LAST = (NUM_LAYERS - 1,)
KEPT = {"all": ALL, "last": LAST, "last two": ALL[-2:], "in the middle": (1,)}


@pytest.fixture(autouse=True)
def no_warning() -> Iterator[None]:
    """A layer that goes back to recomputing says so: here none may."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="layer .* is recomputed instead of kept")
        yield


def keeping(*layers: int, **others: Any) -> StepChoices:
    return StepChoices(kept_layers=layers, **others)


@contextmanager
def poisoned(model: nn.Module) -> Iterator[None]:
    """What a visit is lent is not-a-number from the visit's end on, and fetched anew for the next one."""
    prefetcher: Any = get_streamer(model)._prefetcher
    give_back = prefetcher.give_back

    def poison(slot: Any, wanted: Any) -> None:
        layer_idx = slot.layer_idx
        slot.buffer.data.fill_(255)
        give_back(slot, ())
        prefetcher.invalidate(layer_idx)

    prefetcher.give_back = poison
    yield
    prefetcher.give_back = give_back


def steps(
    model: nn.Module,
    num_steps: int = 3,
    rows: dict[str, Any] | None = None,
    autocast: bool = False,
    micro_steps: int = 1,
) -> dict[str, Any]:
    """Losses and gradients of some optimizer steps, and the adapter after them."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    found: dict[str, Any] = {}
    torch.manual_seed(11)
    for step in range(num_steps):
        for micro in range(micro_steps):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = model(**batch(3, seed=step + micro)).loss
            loss.backward()
            found[f"loss {step} {micro}"] = loss.detach()
        found |= {f"{name} {step}": gradient.clone() for name, gradient in gradients(model).items()}
        optimizer.step()
        optimizer.zero_grad()
    return found | {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def num_kernels(model: nn.Module) -> tuple[int, int]:
    """Operators, views and allocations left out, of one forward and of its backward."""
    meter = ByteMeter(lambda _: False)
    with meter.measured() as forwards:
        loss = model(**batch()).loss
    with meter.measured() as backwards:
        loss.backward()
    forward, backward = (sum(kernel.count for kernel in part[0].work) for part in (forwards, backwards))
    return forward, backward


# ---- the numbers ----


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16 autocast"])
@pytest.mark.parametrize("kept", KEPT)
def test_kept_layers_are_equal_to_the_resident_model_and_to_the_recompute(kept: str, autocast: bool) -> None:
    dtype = torch.bfloat16 if autocast else torch.float32
    results = []
    for order, layers in ((STOCK, ()), (WRAP_THEN_PEFT, ()), (WRAP_THEN_PEFT, KEPT[kept])):
        config = LemaConfig(choices=keeping(*layers), num_slots=2)
        with closing(prepare(order, build(dtype=dtype), lora("llama"), config=config)) as model:
            results.append(steps(model, autocast=autocast, micro_steps=2))
    assert_same_tensors(results[1], results[0])
    assert_same_tensors(results[2], results[0])


@pytest.mark.parametrize("architecture", ["gpt2", "gemma2", "mixtral"])
def test_other_architectures_are_equal(architecture: str) -> None:
    results = []
    for order in (STOCK, ORDERS[1]):
        config = LemaConfig(choices=keeping(*ALL))
        with closing(prepare(order, build(architecture), lora(architecture), config=config)) as model:
            if order == STOCK:
                enable_checkpointing(model)
            results.append(steps(model, 2))
    assert_same_tensors(results[1], results[0])


@pytest.mark.parametrize("others", [{}, {"boundaries_in_ram": True}, {"forward_micro_batch_size": 2}], ids=str)
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16 autocast"])
def test_cut_visits_that_keep_their_graphs_are_equal_to_cut_recomputes(autocast: bool, others: dict[str, Any]) -> None:
    dtype = torch.bfloat16 if autocast else torch.float32
    results = []
    for choices in (StepChoices(micro_batch_size=1), keeping(1, 3, micro_batch_size=1, **others)):
        # Dropout of several pieces at once is drawn in another order.
        peft_config = lora("llama", lora_dropout=0.0 if "forward_micro_batch_size" in others else 0.1)
        config = LemaConfig(choices=choices, num_slots=2)
        with closing(prepare(WRAP_THEN_PEFT, build(dtype=dtype), peft_config, config=config)) as model:
            results.append(steps(model, autocast=autocast))
    if others.get("forward_micro_batch_size"):
        for name, expected in results[0].items():
            torch.testing.assert_close(results[1][name], expected, rtol=2e-2, atol=1e-2, msg=name)
    else:
        assert_same_tensors(results[1], results[0])


@pytest.mark.parametrize("tier", ["ram", "disk"])
def test_slots_are_overwritten_between_forward_and_backward_on_both_tiers(tier: str, tmp_path: Path) -> None:
    build(num_layers=6).save_pretrained(tmp_path)
    results = []
    for layers in ((), (0, 2, 5)):
        config = LemaConfig(ram_budget="auto" if tier == "ram" else "min", num_slots=2, choices=keeping(*layers))
        model = LemaModelWrapper.from_pretrained(tmp_path, config, dtype=torch.float32, device="cpu")
        with closing(adapt(model)) as peft_model:
            results.append(steps(peft_model.train()))
    assert_same_tensors(results[1], results[0])


def test_nothing_that_a_kept_graph_needs_lies_in_a_slot() -> None:
    with closing(prepare(STOCK, peft_config=lora("llama"))) as model:
        expected = steps(model)
    config = LemaConfig(choices=keeping(*ALL))
    with closing(prepare(WRAP_THEN_PEFT, peft_config=lora("llama"), config=config)) as model, poisoned(model):
        assert_same_tensors(steps(model), expected)


class Memory(bytearray):
    """Memory whose end can be observed."""


def test_a_graph_that_lives_holds_no_slot() -> None:
    with closing(prepare(WRAP_THEN_PEFT, peft_config=lora("llama"))) as model:
        apply_choices(model, keeping(*ALL))
        streamer, memories = get_streamer(model), []
        for slot in streamer._prefetcher._pool.slots:  # type: ignore[union-attr]
            memory = Memory(slot.buffer.numel())
            slot.buffer = torch.frombuffer(memory, dtype=torch.uint8)
            memories.append(weakref.ref(memory))
            del memory
        del slot
        forward_backward(model)  # the first visits run on copies
        loss = model(**batch()).loss
        assert all(memory() is not None for memory in memories)
        assert len(graphs()) == 2 * NUM_LAYERS
        streamer.close()
        assert [memory() for memory in memories] == [None] * len(memories)
        assert loss.requires_grad


@pytest.mark.parametrize("resident", [(1,), (2, 3), ALL])
def test_resident_layers_may_be_kept(resident: tuple[int, ...]) -> None:
    results = []
    for order, choices in ((STOCK, None), (WRAP_THEN_PEFT, keeping(1, 2, resident_layers=resident))):
        with closing(prepare(order, config=LemaConfig(choices=choices))) as model:
            results.append(steps(model))
    assert_same_tensors(results[1], results[0])


def test_choices_may_change_between_steps() -> None:
    results = []
    for order in (STOCK, WRAP_THEN_PEFT):
        with closing(prepare(order)) as model:
            found: dict[str, Any] = {}
            for i, layers in enumerate([(3,), (), (0, 3), ALL]):
                if order != STOCK:
                    apply_choices(model, keeping(*layers, resident_layers=(2,) if i % 2 else ()))
                    assert find_choices(model).kept_layers == layers
                found |= {f"{name} of {i}": tensor for name, tensor in steps(model, 1).items()}
            results.append(found)
    assert_same_tensors(results[1], results[0])


def test_a_second_backward_through_kept_layers_recomputes_and_is_equal() -> None:
    results = []
    for order in (STOCK, WRAP_THEN_PEFT):
        with closing(prepare(order, config=LemaConfig(choices=keeping(1, 3)))) as model:
            torch.manual_seed(3)
            loss = model(**batch()).loss
            for retain_graph in (True, True, False):
                loss.backward(retain_graph=retain_graph)
            results.append(gradients(model))
    assert_same_tensors(results[1], results[0])


def test_trainer_with_accumulation_is_equal_step_by_step(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_steps": 6, "gradient_accumulation_steps": 2}
    expected = train(prepare(STOCK), tmp_path / "stock", **settings)
    with closing(prepare(WRAP_THEN_PEFT, config=LemaConfig(choices=keeping(2, 3)))) as model:
        assert_same_run(train(model, tmp_path / "kept", **settings), expected)


def test_evaluation_between_forward_and_backward_does_no_harm() -> None:
    results = []
    for order in (STOCK, WRAP_THEN_PEFT):
        with closing(prepare(order, config=LemaConfig(choices=keeping(*ALL)))) as model:
            torch.manual_seed(3)
            loss = model(**batch()).loss
            with torch.no_grad():
                other = model(**batch(seed=4)).loss
            loss.backward()
            results.append(gradients(model) | {"loss": loss.detach(), "other": other})
    assert_same_tensors(results[1], results[0])


def test_self_check_counts_kept_visits_and_unwrap_gives_the_model_back() -> None:
    config = LemaConfig(self_check=True, choices=keeping(1, 3))
    with closing(prepare(WRAP_THEN_PEFT, config=config)) as model:
        for _ in range(3):
            forward_backward(model)
        check = find_check(model)
        assert check is not None
        assert check.num_visits == check.num_equal == 4 * NUM_LAYERS
        model.zero_grad()
        LemaModelWrapper.unwrap(model)
        with closing(prepare(STOCK)) as stock:
            assert torch.equal(forward_backward(model), forward_backward(stock))
            assert_same_tensors(gradients(model), gradients(stock))


@pytest.mark.parametrize(("dropout", "micro_batch_size"), [(0.1, 0), (0.0, 0), (0.1, 1)])
def test_a_checkpoint_inside_a_kept_layer_finds_what_it_found_in_the_forward(
    dropout: float, micro_batch_size: int
) -> None:
    # Whether an adapter's inputs are cast depends on its dropout and on the pieces.
    results = []
    for layers in ((), ALL):
        config = LemaConfig(choices=keeping(*layers, micro_batch_size=micro_batch_size))
        adapter = lora("llama", lora_dropout=dropout)
        with closing(prepare(WRAP_THEN_PEFT, build(dtype=torch.bfloat16), adapter, config=config)) as model:
            for layer in model.get_base_model().model.layers:
                layer.mlp.forward = functools.partial(checkpoint, layer.mlp.forward, use_reentrant=False)
            results.append(steps(model, autocast=True))
    assert_same_tensors(results[1], results[0])


# ---- that it is done ----


def test_a_kept_layer_starts_no_kernel_twice() -> None:
    with closing(prepare(WRAP_THEN_PEFT, peft_config=lora("llama"))) as model:
        forward_backward(model)
        recomputed = num_kernels(model)
        apply_choices(model, keeping(*LAST))
        forward_backward(model)  # the first kept visit is compared with a recompute
        kept = num_kernels(model)
    saved = recomputed[1] - kept[1]
    num_in_forward = recomputed[0] // (NUM_LAYERS + 1)
    assert abs(recomputed[0] - kept[0]) <= 2
    assert saved >= 0.8 * num_in_forward


def test_kept_layers_are_checked_once_and_recomputed_in_tiles() -> None:
    calls: list[int] = []
    with closing(prepare(WRAP_THEN_PEFT, config=LemaConfig(choices=keeping(1, 2)))) as model:
        layers = model.get_base_model().model.layers
        for i in ALL:
            layers[i].mlp.act_fn.register_forward_hook(lambda *_, i=i: calls.append(i))
        forward_backward(model)
        assert sorted(calls) == [0, 0, 1, 1, 2, 2, 3, 3]
        calls.clear()
        forward_backward(model)
        assert sorted(calls) == [0, 0, 1, 2, 3, 3]
        calls.clear()
        apply_choices(model, keeping(1, 2, tile_tokens=16))
        forward_backward(model)
        assert calls.count(1) == calls.count(3) > 2


def test_boundaries_of_kept_layers_stay_on_the_device() -> None:
    sent = []
    for layers in ((), (2, 3)):
        with closing(prepare(WRAP_THEN_PEFT)) as model:
            apply_choices(model, keeping(*layers, boundaries_in_ram=True))
            forward_backward(model)
            sent.append(model.get_base_model().model.layers[0]._lema._options.boundaries.d2h_bytes)
    assert sent[1] * 2 == sent[0] > 0


# ---- what cannot be kept ----


class _HeldLinear(torch.autograd.Function):
    """Holds its weight as an attribute, as bitsandbytes does."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.weight = weight
        return hidden @ weight.t()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient @ ctx.weight, None


class HeldLinear(nn.Module):
    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return _HeldLinear.apply(hidden, self.weight)


def holding() -> Any:
    model = build()
    for layer in model.model.layers[2:]:
        layer.mlp.gate_proj = HeldLinear(layer.mlp.gate_proj.weight)
    return model


@pytest.mark.parametrize("num_slots", [2, 4])
def test_a_function_that_holds_a_weight_is_found_whatever_the_slot_holds_and_its_layer_recomputed(
    num_slots: int,
) -> None:
    with closing(prepare(STOCK, holding())) as model:
        expected = steps(model)
    config = LemaConfig(choices=keeping(1, 2, 3), num_slots=num_slots)
    with closing(prepare(WRAP_THEN_PEFT, holding(), config=config)) as model:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            assert_same_tensors(steps(model), expected)
        messages = [str(w.message) for w in said if "instead of kept" in str(w.message)]
        assert len(messages) == 1
        assert messages[0].startswith("layer 3 gives other gradients from its kept activations")
        kept: KeptLayers = model.get_base_model().model.layers[0]._lema._options.kept
        assert [kept.wants(i) for i in ALL] == [False, True, False, False]


class HoldingAdapter(nn.Module):
    """Computes with the weight of the linear that is inside of another module."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return _HeldLinear.apply(hidden, self.inner.weight)


def test_modules_that_come_into_a_kept_layer_later_are_proven_anew() -> None:
    # Without the proof the numbers may come out right: the weights may be in the same slot again when they are read.
    def some_steps(model: Any) -> list[dict[str, torch.Tensor]]:
        found = [steps(model)]
        for layer in model.get_base_model().model.layers:
            layer.mlp.gate_proj = HoldingAdapter(layer.mlp.gate_proj)
        return [*found, steps(model)]

    with closing(prepare(STOCK)) as model:
        expected = some_steps(model)
    with closing(prepare(WRAP_THEN_PEFT, config=LemaConfig(choices=keeping(*ALL)))) as model, poisoned(model):
        kept: KeptLayers = model.get_base_model().model.layers[0]._lema._options.kept
        with pytest.warns(UserWarning, match="gives other gradients from its kept activations"):
            found = some_steps(model)
        for ours, stock in zip(found, expected, strict=True):
            assert_same_tensors(ours, stock)
        assert not any(kept.wants(i) for i in ALL)


def test_a_layer_is_proven_with_each_adapter_once_and_again_with_other_weights() -> None:
    with closing(prepare(WRAP_THEN_PEFT, config=LemaConfig(choices=keeping(*ALL)))) as model:

        def num_proven_in_a_step() -> int:
            loss = model(**batch()).loss
            made = [graph for graph in graphs() if isinstance(graph, KeptGraph)]
            assert len(made) == NUM_LAYERS
            loss.backward()
            return sum(graph.is_proven for graph in made)

        model.add_adapter("other", model.peft_config["default"])
        assert [num_proven_in_a_step() for _ in range(2)] == [0, NUM_LAYERS]
        model.set_adapter("other")
        assert [num_proven_in_a_step() for _ in range(2)] == [0, NUM_LAYERS]
        model.set_adapter("default")
        assert num_proven_in_a_step() == NUM_LAYERS, "adapters in turn are not proven again and again"
        with torch.no_grad():
            model.get_base_model().model.layers[1].mlp.gate_proj.weight.mul_(1)
        assert [num_proven_in_a_step() for _ in range(2)] == [NUM_LAYERS - 1, NUM_LAYERS]


def test_a_visit_from_before_a_change_proves_nothing_of_what_computes_after_it() -> None:
    with closing(prepare(WRAP_THEN_PEFT, config=LemaConfig(choices=keeping(*ALL)))) as model:
        layer = model.get_base_model().model.layers[1]
        before = model(**batch()).loss
        gate = layer.mlp.gate_proj
        layer.mlp.gate_proj = nn.Sequential(gate)  # the same numbers from other modules
        after = model(**batch()).loss
        before.backward()
        kept: KeptLayers = layer._lema._options.kept
        assert [len(kept.proofs(i)) for i in ALL] == [1, 0, 1, 1]
        after.backward()
        assert [len(kept.proofs(i)) for i in ALL] == [1, 1, 1, 1]


def test_a_visit_from_before_a_change_refuses_nothing_of_what_computes_after_it() -> None:
    with closing(prepare(WRAP_THEN_PEFT, config=LemaConfig(choices=keeping(*ALL)))) as model:
        layer = model.get_base_model().model.layers[1]
        kept: KeptLayers = layer._lema._options.kept
        before = model(**batch()).loss
        layer.mlp.gate_proj = nn.Sequential(layer.mlp.gate_proj, nn.Tanh())  # other numbers in the recompute
        model(**batch())
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            before.backward()
        assert all(kept.wants(i) for i in ALL)


@pytest.mark.parametrize("how", ["forward", "hook", "class"])
def test_what_modules_compute_may_be_replaced_after_the_proof(how: str) -> None:
    class Held(nn.Linear):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return _HeldLinear.apply(hidden, self.weight)  # type: ignore[no-any-return]

    results = []
    for order in (STOCK, WRAP_THEN_PEFT):
        with closing(prepare(order, config=LemaConfig(choices=keeping(*ALL), num_slots=3))) as model:
            forward_backward(model)
            model.zero_grad()
            for layer in model.get_base_model().model.layers:
                gate = layer.mlp.gate_proj
                if how == "forward":
                    gate.forward = functools.partial(Held.forward, gate)
                elif how == "hook":
                    gate.register_forward_hook(lambda module, args, _: _HeldLinear.apply(args[0], module.weight))
                else:
                    gate.__class__ = Held
            torch.manual_seed(3)
            loss = model(**batch(seed=1)).loss + model(**batch(seed=2)).loss
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                loss.backward()
            assert any("gives other gradients" in str(w.message) for w in said) == (order == WRAP_THEN_PEFT)
            results.append(gradients(model))
    assert_same_tensors(results[1], results[0])


def test_sparse_tensors_that_a_graph_saves_are_kept() -> None:
    results = []
    for order in (STOCK, WRAP_THEN_PEFT):
        shira = peft.ShiraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "o_proj"])
        with closing(prepare(order, peft_config=shira, config=LemaConfig(choices=keeping(*ALL)))) as model:
            results.append(steps(model))
    assert_same_tensors(results[1], results[0])


def test_a_visit_whose_gradients_are_not_finite_proves_and_refuses_nothing() -> None:
    with closing(prepare(WRAP_THEN_PEFT, config=LemaConfig(choices=keeping(*ALL)))) as model:
        kept: KeptLayers = model.get_base_model().model.layers[0]._lema._options.kept
        (model(**batch()).loss * torch.inf).backward()
        assert [len(kept.proofs(i)) for i in ALL] == [0, 0, 0, 0]
        assert all(kept.wants(i) for i in ALL)


def test_a_resident_layer_with_such_a_function_is_kept() -> None:
    with closing(prepare(STOCK, holding())) as model:
        expected = steps(model)
    with closing(
        prepare(WRAP_THEN_PEFT, holding(), config=LemaConfig(choices=StepChoices(resident_layers=ALL)))
    ) as model:
        found = steps(model)
        assert_same_tensors(found, expected)
        apply_choices(model, keeping(*ALL, resident_layers=ALL))
        recomputed = num_kernels(model)[1]
        apply_choices(model, StepChoices(resident_layers=ALL))
        assert recomputed < num_kernels(model)[1]


def test_a_layer_that_becomes_resident_in_a_kept_visit_is_lent_its_own_memory() -> None:
    # What a Function holds as an attribute is not looked up again: it must not lie in the slot of the next layer.
    with closing(prepare(STOCK, holding())) as model:
        expected = steps(model)
    config = LemaConfig(choices=keeping(*ALL, resident_layers=ALL))
    with closing(prepare(WRAP_THEN_PEFT, holding(), config=config)) as model, poisoned(model):
        assert_same_tensors(steps(model), expected)
        kept: KeptLayers = model.get_base_model().model.layers[0]._lema._options.kept
        assert all(kept.wants(i) for i in ALL)


def test_layers_in_4_bits_are_refused_unless_they_are_resident() -> None:
    with closing(prepare(WRAP_THEN_PEFT, config=LemaConfig(quantization="nf4"))) as model:
        with pytest.raises(ValueError, match=r"kept_layers \[2\] are in 4 bits and streamed.*resident_layers"):
            apply_choices(model, keeping(2, 3, resident_layers=(3,)))
        expected = steps(model)
    with closing(prepare(WRAP_THEN_PEFT, config=LemaConfig(quantization="nf4"))) as model:
        apply_choices(model, keeping(1, 3, resident_layers=(1, 3)))
        with poisoned(model):
            assert_same_tensors(steps(model), expected)
        kept = num_kernels(model)[1]
        apply_choices(model, StepChoices(resident_layers=(1, 3)))
        assert kept < num_kernels(model)[1]


def test_unknown_layers_are_refused() -> None:
    for wrong in ((-1,), (True,), (1, 1), ("1",)):
        with pytest.raises(ValueError, match="kept_layers must be indices of layers, each once"):
            StepChoices(kept_layers=wrong)  # type: ignore[arg-type]
    assert StepChoices(kept_layers=[1, 2]).kept_layers == (1, 2)  # type: ignore[arg-type]
    with closing(prepare(WRAP_THEN_PEFT)) as model, pytest.raises(ValueError, match=r"\[4\] do not exist.* 4 layers"):
        apply_choices(model, keeping(3, NUM_LAYERS))


def test_gradients_that_are_not_finite_prove_nothing() -> None:
    kept = KeptLayers([0])
    good, bad = torch.ones(3), torch.full((3,), torch.nan)
    assert not kept.agree(0, [bad, None], [bad, None])
    assert kept.wants(0)
    with pytest.warns(UserWarning, match="recomputed instead of kept"):
        assert not kept.agree(0, [bad, None], [good, None])
    assert not kept.wants(0)
    assert KeptLayers([0]).agree(0, [good, None], [good, None])


# ---- what is left behind ----


def graphs() -> list[KeptGraph]:
    return [o for o in gc.get_objects() if isinstance(o, (KeptGraph, LentMemory))]


def test_a_graph_is_freed_without_the_collector_when_the_backward_is_done_or_never_comes() -> None:
    with closing(prepare(WRAP_THEN_PEFT, config=LemaConfig(choices=keeping(*ALL)))) as model:
        forward_backward(model)
        gc.collect()
        gc.disable()
        try:
            loss = model(**batch()).loss
            assert len(graphs()) == 2 * NUM_LAYERS
            del loss
            assert graphs() == []
            loss = model(**batch()).loss
            loss.backward(retain_graph=True)
            assert graphs() == []
        finally:
            gc.enable()


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
@pytest.mark.parametrize("num_call", [1, 2])
def test_an_exception_in_a_kept_layer_leaves_nothing_behind(num_call: int, error: type[BaseException]) -> None:
    with closing(prepare(STOCK)) as stock:
        expected = forward_backward(stock)
    with closing(prepare(WRAP_THEN_PEFT, config=LemaConfig(choices=keeping(*ALL)))) as model:
        calls = [0]

        def stop(*_: Any) -> None:
            calls[0] += 1
            if calls[0] == num_call:  # the second is the recompute that the first kept visit is compared with
                raise error("stopped")

        handle = model.get_base_model().model.layers[2].mlp.act_fn.register_forward_hook(stop)
        with pytest.raises(error, match="stopped"):
            forward_backward(model)
        handle.remove()
        gc.collect()
        assert graphs() == []
        for _ in range(2):
            model.zero_grad()
            assert torch.equal(forward_backward(model), expected)
            assert_same_tensors(gradients(model), gradients(stock))


@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_that_an_interrupt_in_their_clean_up_leaves_in_force_are_taken_away(
    when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hooks, saved = torch.autograd.graph.saved_tensors_hooks, []
    leave = hooks.__exit__

    def interrupted(self: Any, *args: object) -> None:
        monkeypatch.undo()  # one interrupt comes once
        if when == "after":
            leave(self, *args)
        raise KeyboardInterrupt

    def is_seen() -> bool:
        before = len(saved)
        torch.ones(1, requires_grad=True).exp()
        return len(saved) == before + 1

    def save(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(None)
        return tensor.detach()

    with closing(prepare(WRAP_THEN_PEFT, config=LemaConfig(choices=keeping(*ALL)))) as model:
        with hooks(save, lambda tensor: tensor):
            monkeypatch.setattr(hooks, "__exit__", interrupted)
            with pytest.raises(KeyboardInterrupt):
                forward_backward(model)
            assert is_seen(), "the hooks of the visit are still there, or those around it are gone"
        assert not is_seen()
        with closing(prepare(STOCK)) as stock:
            assert torch.equal(forward_backward(model), forward_backward(stock))
            assert_same_tensors(gradients(model), gradients(stock))


def test_activations_that_were_written_to_are_recomputed() -> None:
    with closing(prepare(WRAP_THEN_PEFT, config=LemaConfig(choices=keeping(*ALL)))) as model:
        expected = forward_backward(model)
        grads = gradients(model)
        model.zero_grad()
        held: list[torch.Tensor] = []
        layer = model.get_base_model().model.layers[1]
        handle = layer.mlp.act_fn.register_forward_hook(lambda _m, _a, output: held.append(output.detach()))
        torch.manual_seed(11)
        loss = model(**batch()).loss
        handle.remove()
        held[0].add_(1.0)
        with pytest.warns(UserWarning, match="layer 1 has kept activations that were written to in place"):
            loss.backward()
        assert torch.equal(loss, expected)
        assert_same_tensors(gradients(model), grads)
