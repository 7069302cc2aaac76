"""What a recompute leaves out: found where nobody reads it, kept where somebody does; the same numbers in any case."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    PretrainedConfig,
)

from hf_lema import LemaConfig, LemaModelWrapper, StepChoices
from hf_lema.layer.layer_proxy import LayerProxy
from hf_lema.layer.unread_products import MAX_CANDIDATES, UnreadProducts, left_out, matrices_of

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
LLAMA = LlamaConfig(**SMALL, **HEADS)
CPU = torch.device("cpu")
IDS = torch.arange(24).reshape(3, 8) % 60


def adapted(
    config: PretrainedConfig, choices: StepChoices | None = None, *, is_streamed: bool = True, **lora: Any
) -> nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    if is_streamed:
        model = LemaModelWrapper.wrap(model, LemaConfig(choices=choices or StepChoices()))
    torch.manual_seed(1)
    options = {"r": 4, "lora_dropout": 0.1, "target_modules": "all-linear"} | lora
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **options))
    if not is_streamed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    return model.train()


def step(model: nn.Module) -> dict[str, torch.Tensor]:
    """Gradients by the adapter's names."""
    torch.manual_seed(2)
    model.zero_grad()
    model(input_ids=IDS, labels=IDS).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def proxies(model: nn.Module) -> list[Any]:
    return [module._lema for module in model.modules() if isinstance(module, LayerProxy)]


def found_in(model: nn.Module) -> list[set[str]]:
    """Of each layer, the names of what is left out, under whatever conditions."""
    found = []
    for state in proxies(model):
        names = {id(module): name.removesuffix(".base_layer") for name, module in state.layer.named_modules()}
        indices = {index for indices in state.parts.unread.values() for index in indices}
        found.append({names[id(state.parts.matrices[index])] for index in indices})
    return found


def assert_same(gradients: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> None:
    assert gradients.keys() == others.keys()
    assert [name for name, gradient in gradients.items() if not torch.equal(gradient, others[name])] == []


class CountProducts(TorchDispatchMode):
    """Counts products by the shapes of both factors and the strides of the second, a weight or its transpose."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: Counter[tuple[tuple[int, ...], ...]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **kwargs or {})
        if func is torch.ops.aten.mm.default:
            self.shapes[tuple(args[0].shape), tuple(args[1].shape), tuple(args[1].stride())] += 1
        return output


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LLAMA, {"mlp.down_proj"}),
        (GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64), {"mlp.c_proj"}),
        # Attention and feed-forward part are both added to the layer's input.
        (GPTNeoXConfig(**SMALL, num_attention_heads=4), {"attention.dense", "mlp.dense_4h_to_h"}),
        (Gemma2Config(**SMALL, **HEADS, head_dim=8), set()),  # a norm reads what the last projection gives
        (MixtralConfig(**SMALL, **HEADS, num_local_experts=2), set()),  # and so does the factor of an expert
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, PretrainedConfig) else "",
)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_what_is_only_added_is_left_out_and_the_gradients_are_the_stock_ones(
    config: PretrainedConfig, expected: set[str], dropout: float
) -> None:
    chosen = {"gpt2": ["c_attn", "c_proj", "c_fc"], "mixtral": ["q_proj", "v_proj"]}.get(config.model_type)
    targets = {} if chosen is None else {"target_modules": chosen}
    stock = adapted(config, is_streamed=False, lora_dropout=dropout, **targets)
    model = adapted(config, lora_dropout=dropout, **targets)
    for _ in range(3):
        assert_same(step(model), step(stock))
    assert found_in(model) == [expected, expected]


def test_it_is_really_not_computed_from_the_second_step_on() -> None:
    model = adapted(LLAMA, lora_dropout=0.0)
    tokens, wide = IDS.numel(), SMALL["intermediate_size"]
    counts = []
    for _ in range(3):
        with CountProducts() as products:
            step(model)
        counts.append(products.shapes[(tokens, wide), (wide, SMALL["hidden_size"]), (1, wide)])
    # Forward of two layers. Recomputes with it: at the upper layer a real one before the trials and one after them, and
    # those of six other matrices; at the other layer a real one. What is found is then tried without it.
    assert counts == [2 + 2 + 6 + 1, 2, 2]


@pytest.mark.parametrize(
    "choices",
    [
        StepChoices(micro_batch_size=1, forward_micro_batch_size=2),
        StepChoices(tile_tokens=6),
        StepChoices(kept_layers=(1,)),
    ],
)
def test_pieces_tiles_and_kept_layers_leave_it_out_too(choices: StepChoices, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(LLAMA, choices)
    steps = [step(model) for _ in range(3)]
    assert {"mlp.down_proj"} in found_in(model)
    monkeypatch.setattr(UnreadProducts, "may_be_left_out", staticmethod(lambda device: False))
    assert_same(steps[2], step(model))
    assert_same(steps[0], steps[2])


def test_under_autocast_and_in_float32_it_is_proven_each_for_itself() -> None:
    model = adapted(LLAMA)
    step(model)
    with torch.autocast("cpu", torch.bfloat16):
        halves = [step(model) for _ in range(2)]
    assert_same(*halves)
    assert [len(state.parts.unread) for state in proxies(model)] == [2, 2]


def test_an_adapter_that_reads_the_product_is_seen_when_it_comes() -> None:
    model, stock = adapted(LLAMA), adapted(LLAMA, is_streamed=False)
    for each in (model, stock):
        step(each)
        torch.manual_seed(3)
        each.add_adapter("dora", LoraConfig(r=4, use_dora=True, target_modules=["down_proj"], task_type="CAUSAL_LM"))
        each.set_adapter("dora")
    for _ in range(2):
        assert_same(step(model), step(stock))
    assert found_in(model) == [set(), set()]
    for each in (model, stock):
        each.set_adapter("default")
    for _ in range(2):
        assert_same(step(model), step(stock))
    assert found_in(model) == [{"mlp.down_proj"}] * 2


def test_hooks_see_the_real_values() -> None:
    model = adapted(LLAMA)
    step(model)
    seen: list[torch.Tensor] = []
    part = proxies(model)[0].layer.mlp
    handle = part.register_forward_hook(lambda module, args, output: seen.append(output.detach().clone()))
    step(model)
    handle.remove()
    forward, recomputed = seen
    assert torch.equal(forward, recomputed)


def test_global_hooks_and_anomaly_detection_turn_it_off() -> None:
    assert not UnreadProducts.may_be_left_out(torch.device("cuda", 0)), "not measured there yet"
    assert UnreadProducts.may_be_left_out(CPU)
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert not UnreadProducts.may_be_left_out(CPU)
    handle.remove()
    model = adapted(LLAMA)
    step(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # it is slow
        with torch.autograd.detect_anomaly():
            assert not UnreadProducts.may_be_left_out(CPU)
            step(model)


class _Kept(torch.autograd.Function):
    """Reads in its backward what it holds as an attribute, past whatever autograd knows."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
        ctx.value = value
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return grads[0] * ctx.value.tanh()


def test_what_a_function_holds_as_an_attribute_is_read() -> None:
    def patched(model: nn.Module) -> nn.Module:
        for module in [m for name, m in model.named_modules() if name.endswith("mlp")]:
            module.forward = lambda x, plain=module.forward: _Kept.apply(plain(x))
        return model

    model, stock = patched(adapted(LLAMA)), patched(adapted(LLAMA, is_streamed=False))
    for _ in range(2):
        assert_same(step(model), step(stock))
    assert found_in(model) == [set(), set()]


@pytest.mark.parametrize("factor", [torch.inf, 0.0])
def test_gradients_that_say_nothing_decide_nothing(factor: float) -> None:
    model = adapted(LLAMA)
    model(input_ids=IDS, labels=IDS).loss.mul(factor).backward()
    assert [state.parts.unread for state in proxies(model)] == [{}, {}]
    step(model)
    assert found_in(model) == [{"mlp.down_proj"}] * 2


def test_a_value_that_only_a_mask_reads_is_read() -> None:
    """Of OPT's first projection nothing is saved but what is above 0, where no adapter takes it in."""
    config = OPTConfig(
        hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64, word_embed_proj_dim=32,
        max_position_embeddings=64, dropout=0.0, attention_dropout=0.0, layerdrop=0.0,
    )  # fmt: skip
    options = {"target_modules": ["q_proj", "v_proj"]}
    model, stock = adapted(config, **options), adapted(config, is_streamed=False, **options)
    for _ in range(3):
        assert_same(step(model), step(stock))
    assert found_in(model) == [{"fc2"}] * 2


def test_layers_of_too_many_matrices_are_not_tried() -> None:
    layers = [nn.Linear(2, 2) for _ in range(MAX_CANDIDATES + 1)]
    runs: list[None] = []

    def gradients() -> list[torch.Tensor | None]:
        runs.append(None)
        return [torch.ones(2), None]

    unread = UnreadProducts()
    assert unread.find("wide", layers, gradients)[0] == ()
    assert len(runs) == 2, "the real gradients, and again because they were not held"
    assert unread.find("narrow", layers[:2], gradients)[0] == (0, 1)
    assert len(runs) == 2 + 2 + 3


def test_a_layer_unlike_those_before_it_is_tried_anew() -> None:
    layers = [nn.Linear(2, 2), nn.Linear(2, 2)]
    read = {layers[0]}

    def gradients() -> list[torch.Tensor | None]:
        return [torch.full((3,), 2.0 if any("forward" in layer.__dict__ for layer in read) else 1.0)]

    unread = UnreadProducts()
    assert unread.find("kind", layers, gradients)[0] == (1,)
    read.add(layers[1])
    found, grads = unread.find("kind", layers, gradients)
    assert found == ()
    assert torch.equal(grads[0], torch.ones(3))


def test_embeddings_and_modules_with_more_than_a_matrix_are_not_among_the_candidates() -> None:
    alone, biased = nn.Linear(2, 2, bias=False), nn.Linear(2, 2)
    others = [nn.Embedding(2, 2), nn.LayerNorm(2), nn.Conv1d(2, 2, 2), nn.Sequential(alone), nn.Module()]
    assert matrices_of([alone, *others, biased]) == [alone, biased]


@pytest.mark.parametrize("bias", [False, True])
def test_the_graph_of_a_product_that_is_left_out_is_the_real_one(bias: bool) -> None:
    linear = nn.Linear(3, 5, bias=bias).requires_grad_(False)
    hidden = torch.randn(2, 4, 3, requires_grad=True)
    plain = linear(hidden)
    with left_out([linear]):
        without = linear(hidden)
    assert "forward" not in linear.__dict__
    assert without.isnan().all()
    assert (without.shape, without.stride(), without.dtype) == (plain.shape, plain.stride(), plain.dtype)
    gradient = torch.randn_like(plain)
    (expected,) = torch.autograd.grad(plain, hidden, gradient)
    assert torch.equal(torch.autograd.grad(without, hidden, gradient)[0], expected)


@contextmanager
def _interrupted(module: nn.Module) -> Iterator[None]:
    plain = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    module.forward = forward
    try:
        yield
    finally:
        module.forward = plain


def test_an_interrupt_in_a_recompute_leaves_every_product_to_be_computed() -> None:
    model = adapted(LLAMA)
    expected = [step(model) for _ in range(2)][1]
    state = proxies(model)[0]
    down = state.layer.mlp.down_proj
    torch.manual_seed(2)
    model.zero_grad()
    loss = model(input_ids=IDS, labels=IDS).loss
    with _interrupted(down), pytest.raises(KeyboardInterrupt):
        loss.backward()
    assert "forward" not in down.base_layer.__dict__
    with torch.no_grad():
        assert model(input_ids=IDS).logits.isfinite().all()
    del down.__dict__["forward"]
    assert_same(step(model), expected)


def test_layers_in_4_bits_leave_it_out_too() -> None:
    pytest.importorskip("bitsandbytes")
    config = LlamaConfig(**(SMALL | {"hidden_size": 64, "intermediate_size": 128}), **HEADS)
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(config)
    model = LemaModelWrapper.wrap(plain, LemaConfig(quantization="nf4"))
    torch.manual_seed(1)
    lora = LoraConfig(
        r=4, lora_dropout=0.1, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"
    )
    model = get_peft_model(model, lora).train()
    before, _, after = [step(model) for _ in range(3)]
    assert_same(before, after)
    assert found_in(model) == [{"mlp.down_proj"}] * 2
