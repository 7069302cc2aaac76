"""PEFT's features on a streamed model: same weights, losses and gradients as on the resident one, in both orders."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from models import (
    CHECKPOINTED,
    NUM_LAYERS,
    ORDERS,
    PEFT_THEN_WRAP,
    STOCK,
    TRANSFORMERS_5,
    WRAP_THEN_PEFT,
    Trajectory,
    adapt,
    assert_moved,
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
    trainables,
)
from packaging import version
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    OFTConfig,
    PeftModel,
    VeraConfig,
    get_peft_model,
    prepare_model_for_kbit_training,
)
from safetensors.torch import load_file
from torch import nn

from hf_lema import LemaConfig, LemaModelWrapper, get_streamer

pytestmark = pytest.mark.integration


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


METHODS: dict[str, Callable[[], Any]] = {
    "lora": lora,
    "rslora": lambda: lora(use_rslora=True),
    "dora": lambda: lora(use_dora=True),
    "pissa": lambda: lora(init_lora_weights="pissa"),
    "pissa_fast": lambda: lora(init_lora_weights="pissa_niter_4"),
    "olora": lambda: lora(init_lora_weights="olora"),
    "modules_to_save": lambda: lora(modules_to_save=["lm_head", "embed_tokens"]),
    "norms_to_save": lambda: lora(modules_to_save=["input_layernorm", "norm"]),
    "mlp_to_save": lambda: lora(target_modules=["q_proj", "v_proj"], modules_to_save=["mlp"]),
    "layers_to_transform": lambda: lora(target_modules=["q_proj", "up_proj"], layers_to_transform=[1, 3]),
    "lora_bias": lambda: lora(lora_bias=True),
    "bias_all": lambda: lora(bias="all"),
    "rank_pattern": lambda: lora(rank_pattern={"q_proj": 2, "layers.2.mlp.up_proj": 6}),
    "embedding": lambda: lora(target_modules=["embed_tokens", "q_proj", "lm_head"]),
    "token_indices": lambda: lora(trainable_token_indices=[3, 5, 9]),
    "layer_replication": lambda: lora(target_modules=["q_proj", "up_proj"], layer_replication=[[0, 3], [1, 4]]),
    "ia3": lambda: IA3Config(
        task_type="CAUSAL_LM", target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "loha": lambda: LoHaConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "down_proj"]),
    "vera": lambda: VeraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "o_proj"], d_initial=1.0),
    "oft": lambda: OFTConfig(task_type="CAUSAL_LM", oft_block_size=8, target_modules=["q_proj", "o_proj"]),
}
ONLY_BEFORE_THE_WRAP = ("layer_replication",)
"""Changes the number of decoder layers, which no wrapped model can follow."""


def model_for(method: str) -> nn.Module:
    return build(attention_bias=True) if method == "bias_all" else build()


@dataclass(frozen=True)
class Resident:
    """What a method does to the resident model in three steps."""

    initial: dict[str, torch.Tensor]
    run: Trajectory
    state: dict[str, torch.Tensor]
    adapter: dict[str, torch.Tensor]


def saved_adapter(model: Any, folder: Path) -> dict[str, torch.Tensor]:
    model.save_pretrained(folder)
    return load_file(folder / "adapter_model.safetensors")


@functools.cache
def resident_model(method: str) -> Resident:
    model = prepare(STOCK, model_for(method), METHODS[method]())
    initial = trainables(model)
    with tempfile.TemporaryDirectory() as folder:
        run = train(model, Path(folder), gradient_checkpointing=True)
        return Resident(initial, run, model.state_dict(), saved_adapter(model, Path(folder)))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("order", ORDERS)
def test_method_trains_and_is_saved_as_on_the_resident_model(order: str, method: str, tmp_path: Path) -> None:
    if order == WRAP_THEN_PEFT and method in ONLY_BEFORE_THE_WRAP:
        pytest.skip("has to come before the wrap; see the test of its error")
    expected = resident_model(method)
    with closing(prepare(order, model_for(method), METHODS[method]())) as model:
        assert_same_tensors(trainables(model), expected.initial)
        found = train(model, tmp_path, gradient_checkpointing=order in CHECKPOINTED)
        assert_same_run(found, expected.run)
        assert any(not torch.equal(expected.initial[n], t) for n, t in found.trainables.items())
        assert_same_tensors(model.state_dict(), expected.state)
        assert_same_tensors(saved_adapter(model, tmp_path), expected.adapter)
        if method == "layer_replication":  # layers 1 and 2 stand twice and share their weights: they stay resident
            assert get_streamer(model).num_layers == 6
            assert get_streamer(model).num_streamed == 2
        else:
            assert get_streamer(model).num_streamed == NUM_LAYERS


@pytest.mark.parametrize("method", ["pissa", "olora"])
def test_base_weights_that_an_adapter_changes_are_seen_if_it_is_initialised_after_use(method: str) -> None:
    losses = []
    for order in (STOCK, WRAP_THEN_PEFT):
        model = build()
        if order == WRAP_THEN_PEFT:
            LemaModelWrapper.wrap(model, device="cpu")
        with closing(model):
            with torch.no_grad():
                model(**batch())  # leaves the first layers in the slots
            losses.append(forward_backward(adapt(model, METHODS[method]())))
    assert torch.equal(losses[0], losses[1])


def test_layer_replication_after_the_wrap_is_refused() -> None:
    model = build()
    with closing(LemaModelWrapper.wrap(model, device="cpu")), pytest.raises((RuntimeError, TypeError, ValueError)):
        adapt(model, METHODS["layer_replication"]())


@functools.cache
def resident_half_precision_run(method: str, dtype: torch.dtype) -> Trajectory:
    model = prepare(STOCK, build(dtype=dtype), METHODS[method]())
    assert {p.dtype for p in trainables(model).values()} == {torch.float32}
    with tempfile.TemporaryDirectory() as folder:
        return train(model, Path(folder), gradient_checkpointing=True, bf16=True)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("method", "dtype"),
    [
        ("lora", torch.bfloat16),
        ("lora", torch.float16),
        ("dora", torch.bfloat16),
        ("dora", torch.float16),
        ("pissa", torch.bfloat16),
    ],
)
def test_half_precision_base_with_autocast_is_equal(
    order: str, method: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    with closing(prepare(order, build(dtype=dtype), METHODS[method]())) as model:
        assert_same_run(train(model, tmp_path, bf16=True), resident_half_precision_run(method, dtype))


@pytest.mark.parametrize("order", ORDERS)
def test_adapters_without_autocast_dtype_are_equal(order: str, tmp_path: Path) -> None:
    def made(wrap: str) -> Any:
        model = build(dtype=torch.bfloat16)
        if wrap == WRAP_THEN_PEFT:
            LemaModelWrapper.wrap(model, device="cpu")
        model = adapt(model, autocast_adapter_dtype=False)
        if wrap == PEFT_THEN_WRAP:
            LemaModelWrapper.wrap(model, device="cpu")
        return model

    resident = made(STOCK)
    assert {p.dtype for p in trainables(resident).values()} == {torch.bfloat16}
    expected = train(resident, tmp_path, gradient_checkpointing=True)
    with closing(made(order)) as model:
        assert_same_run(train(model, tmp_path), expected)


# ---- several adapters ----


def with_two_adapters(order: str) -> Any:
    model = prepare(order)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(6)
        model.add_adapter("second", lora(r=2, target_modules=["q_proj", "down_proj"]))
    return model


@pytest.mark.parametrize("order", ORDERS)
def test_switching_between_two_adapters_is_equal(order: str, tmp_path: Path) -> None:
    resident, model = with_two_adapters(STOCK), with_two_adapters(order)
    with closing(model):
        for name in ("default", "second", "default"):
            for each in (resident, model):
                each.set_adapter(name)
            before = trainables(model)
            found = train(model, tmp_path, max_steps=2, gradient_checkpointing=order in CHECKPOINTED)
            assert_same_run(found, train(resident, tmp_path, max_steps=2, gradient_checkpointing=True))
            assert_moved({n: t for n, t in before.items() if "lora_B" in n}, found.trainables)
        assert_same_tensors(model.state_dict(), resident.state_dict())
        assert get_streamer(model).num_streamed == NUM_LAYERS


@pytest.mark.parametrize("order", ORDERS)
def test_adapter_added_and_one_deleted_after_training_is_equal(order: str, tmp_path: Path) -> None:
    resident, model = prepare(STOCK), prepare(order)
    with closing(model):
        for each in (resident, model):
            train(each, tmp_path, max_steps=1, gradient_checkpointing=each is resident)
            torch.manual_seed(6)
            each.add_adapter("second", lora(r=2, target_modules=["k_proj", "down_proj"]))
            each.set_adapter("second")
            each.delete_adapter("default")
        found = train(model, tmp_path, max_steps=2)
        assert_same_run(found, train(resident, tmp_path, max_steps=2, gradient_checkpointing=True))
        assert_same_tensors(model.state_dict(), resident.state_dict())


@pytest.mark.parametrize("order", ORDERS)
def test_two_active_adapters_weighted_combination_and_deletion_are_equal(order: str, tmp_path: Path) -> None:
    resident, model = with_two_adapters(STOCK), with_two_adapters(order)
    with closing(model):
        for each in (resident, model):
            each.base_model.set_adapter(["default", "second"])
        assert torch.equal(forward_backward(model), forward_backward(resident))
        assert_same_tensors(gradients(model), gradients(resident))
        for each in (resident, model):
            each.set_adapter("default")
            each.zero_grad()
            each.add_weighted_adapter(["default", "second"], [0.7, 0.3], "mixed", combination_type="cat")
            each.set_adapter("mixed")
            each.delete_adapter("second")
        assert torch.equal(forward_backward(model), forward_backward(resident))
        assert_same_tensors(gradients(model), gradients(resident))


def test_inactive_adapters_are_never_streamed() -> None:
    resident = with_two_adapters(STOCK)
    plain_bytes = sum(p.numel() * p.element_size() for p in build().model.layers[0].parameters())
    LemaModelWrapper.wrap(resident, device="cpu")
    with closing(resident):
        assert get_streamer(resident).layer_bytes <= plain_bytes + 9 * 64


def test_rows_with_different_adapters_in_one_batch_are_equal() -> None:
    resident, model = with_two_adapters(STOCK).eval(), with_two_adapters(WRAP_THEN_PEFT).eval()
    rows = batch(3)
    names = ["default", "__base__", "second"]
    with closing(model):
        for each in (resident, model):
            for n, p in each.named_parameters():
                if "lora_B" in n:
                    torch.nn.init.constant_(p, 0.05)
        with torch.no_grad():
            expected = resident(**rows, adapter_names=names).logits
            assert torch.equal(model(**rows, adapter_names=names).logits, expected)


@pytest.mark.skipif(version.parse(peft.__version__) < version.parse("0.18"), reason="aLoRA came with peft 0.18")
@pytest.mark.parametrize("order", ORDERS)
def test_activated_lora_gets_the_gradients_of_its_forward(order: str) -> None:
    # PEFT hands the offsets to its layers by hooks that it removes when the forward ends, before the recompute.
    config = lora(alora_invocation_tokens=[5, 6], target_modules=["q_proj", "k_proj", "v_proj"])
    rows = batch(2)
    rows["input_ids"][:, 8:10] = torch.tensor([5, 6])

    def use(model: nn.Module) -> torch.Tensor:
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.constant_(parameter, 0.05)
        return forward_backward(model, rows)

    resident = prepare(STOCK, build(), config)
    expected = use(resident)
    with closing(prepare(order, build(), config)) as model:
        assert torch.equal(use(model), expected)
        assert_same_tensors(gradients(model), gradients(resident))


# ---- merging ----


def two_rounds(model: nn.Module, tmp_path: Path, safe_merge: bool, **settings: Any) -> list[torch.Tensor]:
    """Trains, merges, looks, unmerges, and trains again."""
    seen = [train(model, tmp_path, max_steps=2, **settings).losses]
    model.merge_adapter(safe_merge=safe_merge)
    with torch.no_grad():
        seen.append(model.eval()(**batch()).logits)
        seen.append(model.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight.clone())
    model.unmerge_adapter()
    with torch.no_grad():
        seen.append(model(**batch()).logits)
    seen.append(train(model.train(), tmp_path, max_steps=2, **settings).losses)
    seen += model.state_dict().values()
    return seen


@functools.cache
def resident_two_rounds(method: str, safe_merge: bool) -> list[torch.Tensor]:
    model = prepare(STOCK, build(), METHODS[method]())
    with tempfile.TemporaryDirectory() as folder:
        return two_rounds(model, Path(folder), safe_merge, gradient_checkpointing=True)


@pytest.mark.parametrize("safe_merge", [False, True])
@pytest.mark.parametrize("method", ["lora", "dora", "pissa"])
@pytest.mark.parametrize("order", ORDERS)
def test_merging_between_steps_is_equal(order: str, method: str, safe_merge: bool, tmp_path: Path) -> None:
    expected = resident_two_rounds(method, safe_merge)
    with closing(prepare(order, build(), METHODS[method]())) as model:
        found = two_rounds(model, tmp_path, safe_merge, gradient_checkpointing=order in CHECKPOINTED)
    # Taking an adapter out again rounds, in the resident model too: both must round alike.
    assert_same_tensors(dict(enumerate(found)), dict(enumerate(expected)))
    assert not torch.equal(found[1], found[3]) or method == "lora"


def test_merge_keeps_no_second_copy_of_the_weights() -> None:
    with closing(prepare(WRAP_THEN_PEFT)) as model:
        forward_backward(model)
        model.merge_adapter()
        model.unmerge_adapter()
        hooks = [hook for module in model.modules() if (hook := module.__dict__.get("_hf_hook")) is not None]
        assert hooks
        assert not any(hook.weights_map for hook in hooks)


@pytest.mark.parametrize("order", ORDERS)
def test_merge_and_unload_gives_the_logits_of_the_resident_model_and_streams_on(order: str, tmp_path: Path) -> None:
    resident = prepare(STOCK)
    train(resident, tmp_path, gradient_checkpointing=True)
    with closing(prepare(order)) as model:
        train(model, tmp_path, gradient_checkpointing=order in CHECKPOINTED)
        merged, expected = model.merge_and_unload(), resident.merge_and_unload()
        assert isinstance(merged, LemaModelWrapper)
        assert_same_tensors(merged.state_dict(), expected.state_dict())
        with torch.no_grad():
            assert torch.equal(merged.eval()(**batch()).logits, expected.eval()(**batch()).logits)
        merged.save_pretrained(tmp_path / "merged")
        plain = type(build()).from_pretrained(tmp_path / "merged", attn_implementation="eager").eval()
        with torch.no_grad():
            assert torch.equal(plain(**batch()).logits, expected(**batch()).logits)
        # A new adapter on the merged base trains as it does on the resident one.
        again, resident_again = adapt(merged.train(), seed=8), adapt(expected.train(), seed=8)
        assert_same_run(
            train(again, tmp_path, max_steps=2),
            train(resident_again, tmp_path, max_steps=2, gradient_checkpointing=True),
        )


def test_unload_gives_the_base_model_back(tmp_path: Path) -> None:
    with closing(prepare(WRAP_THEN_PEFT)) as model:
        train(model, tmp_path)
        base = model.unload()
        assert_same_tensors(base.state_dict(), build().state_dict())
        with torch.no_grad():
            assert torch.equal(base.eval()(**batch()).logits, build().eval()(**batch()).logits)


def test_merged_adapter_trains_nothing_and_says_so_as_stock_does() -> None:
    resident = prepare(STOCK, peft_config=lora(modules_to_save=["lm_head"]))
    with closing(prepare(WRAP_THEN_PEFT, peft_config=lora(modules_to_save=["lm_head"]))) as model:
        for each in (resident, model):
            each.merge_adapter()
        assert torch.equal(forward_backward(model), forward_backward(resident))
        assert_same_tensors(gradients(model), gradients(resident))


# ---- experts ----


@pytest.mark.skipif(not TRANSFORMERS_5, reason="experts are separate linears before transformers 5")
@pytest.mark.parametrize("order", ORDERS)
def test_lora_on_fused_expert_parameters_is_equal(order: str, tmp_path: Path) -> None:
    config = lora(
        lora_dropout=0.0,
        target_modules=["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    resident = prepare(STOCK, build("mixtral"), config)
    assert any("experts" in name for name in trainables(resident))
    expected = train(resident, tmp_path, gradient_checkpointing=True)
    with closing(prepare(order, build("mixtral"), config)) as model:
        found = train(model, tmp_path)
        assert_same_run(found, expected)


@pytest.mark.skipif(not TRANSFORMERS_5, reason="experts are separate linears before transformers 5")
def test_adalora_updates_its_ranks_as_on_the_resident_model() -> None:
    config = AdaLoraConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], init_r=4, target_r=2, tinit=1, tfinal=1, deltaT=1,
        total_step=4,
    )  # fmt: skip

    def use(model: nn.Module) -> list[torch.Tensor]:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        losses = []
        for step in range(4):
            losses.append(forward_backward(model, seed=step))
            optimizer.step()
            model.base_model.update_and_allocate(step)
            optimizer.zero_grad()
        return [*losses, *trainables(model).values()]

    resident = prepare(STOCK, build(), config)
    enable_checkpointing(resident)
    expected = use(resident)
    with closing(prepare(WRAP_THEN_PEFT, build(), config)) as model:
        assert_same_tensors(dict(enumerate(use(model))), dict(enumerate(expected)))


# ---- saving and loading ----


@pytest.mark.parametrize("order", ORDERS)
def test_pissa_adapter_converted_to_lora_is_equal(order: str, tmp_path: Path) -> None:
    for each in (STOCK, order):
        with closing(prepare(each, build(), METHODS["pissa"]())) as model:
            model.peft_config["default"].init_lora_weights = True
            model.save_pretrained(tmp_path / each / "initial")
            model.peft_config["default"].init_lora_weights = "pissa"
            train(model, tmp_path, max_steps=2, gradient_checkpointing=each == STOCK)
            model.save_pretrained(
                tmp_path / each / "final", path_initial_model_for_weight_conversion=str(tmp_path / each / "initial")
            )
    name = "adapter_model.safetensors"
    assert_same_tensors(load_file(tmp_path / order / "final" / name), load_file(tmp_path / STOCK / "final" / name))


def test_adapter_loaded_beside_another_is_equal(tmp_path: Path) -> None:
    prepare(STOCK, build(), lora(r=2)).save_pretrained(tmp_path)
    resident, model = prepare(STOCK), prepare(WRAP_THEN_PEFT)
    with closing(model):
        for each in (resident, model):
            each.load_adapter(str(tmp_path), adapter_name="loaded", is_trainable=True)
            each.set_adapter("loaded")
        assert torch.equal(forward_backward(model), forward_backward(resident))
        assert_same_tensors(gradients(model), gradients(resident))


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_adapter_made_on_meta_and_filled_later_is_equal(low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    trained = prepare(STOCK)
    forward_backward(trained)
    torch.optim.SGD([p for p in trained.parameters() if p.requires_grad], lr=1.0).step()
    trained.save_pretrained(tmp_path)
    results = []
    for wrap in (False, True):
        base = build()
        if wrap:
            LemaModelWrapper.wrap(base, device="cpu")
        model = PeftModel.from_pretrained(base, tmp_path, is_trainable=True, low_cpu_mem_usage=low_cpu_mem_usage)
        with closing(model):
            results.append((forward_backward(model), gradients(model)))
    assert torch.equal(results[1][0], results[0][0])
    assert_same_tensors(results[1][1], results[0][1])


def test_adapter_by_transformers_own_integration_is_equal(tmp_path: Path) -> None:
    losses = []
    for order in (STOCK, WRAP_THEN_PEFT):
        model = build()
        if order == WRAP_THEN_PEFT:
            LemaModelWrapper.wrap(model, device="cpu")
        with closing(model):
            torch.manual_seed(5)
            model.add_adapter(lora())
            losses.append((forward_backward(model), gradients(model)))
    assert torch.equal(losses[0][0], losses[1][0])
    assert_same_tensors(losses[1][1], losses[0][1])


# ---- prepare_model_for_kbit_training ----


@pytest.mark.parametrize("when", ["before_the_wrap", "after_the_wrap"])
@pytest.mark.parametrize("use_gradient_checkpointing", [True, False])
def test_prepared_fp32_model_trains_as_the_resident_one(
    use_gradient_checkpointing: bool, when: str, tmp_path: Path
) -> None:
    resident = adapt(prepare_model_for_kbit_training(build(), use_gradient_checkpointing=True))
    expected = train(resident, tmp_path)
    model = build()
    if when == "after_the_wrap":
        LemaModelWrapper.wrap(model, device="cpu")
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=use_gradient_checkpointing)
    if when == "before_the_wrap":
        LemaModelWrapper.wrap(model, device="cpu")
    with closing(adapt(model)) as model:
        assert_same_run(train(model, tmp_path), expected)
        assert get_streamer(model).num_streamed == NUM_LAYERS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_prepared_half_precision_model_is_upcast_before_the_wrap_as_stock_does(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    resident = adapt(prepare_model_for_kbit_training(build(dtype=dtype)))
    assert {p.dtype for p in resident.parameters()} == {torch.float32}
    expected = train(resident, tmp_path)
    model = prepare_model_for_kbit_training(build(dtype=dtype))
    LemaModelWrapper.wrap(model, device="cpu")
    with closing(adapt(model)) as model:
        assert_same_run(train(model, tmp_path), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_upcast_of_a_wrapped_half_precision_model_is_refused_by_name(dtype: torch.dtype) -> None:
    model = build(dtype=dtype)
    with closing(LemaModelWrapper.wrap(model, device="cpu")):
        prepared = prepare_model_for_kbit_training(model)
        with pytest.raises(ValueError, match=r"layer 0.*another dtype.*torch.float32.*dtype=torch.float32"):
            adapt(prepared)(**batch())


def test_base_model_of_a_peft_model_stays_one_through_the_wrap() -> None:
    model = adapt(build())
    with closing(LemaModelWrapper.wrap(model, LemaConfig(vram_budget="min"), device="cpu")):
        assert isinstance(model, PeftModel)
        assert model.get_base_model() is model.base_model.model
        assert get_peft_model is peft.get_peft_model
