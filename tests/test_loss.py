"""The chunked loss against the stock one: values, gradients, logits that come into being when they are looked at."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    PreTrainedModel,
)

from hf_lema.model.loss import ChunkedLoss, DeferredLogits
from hf_lema.model.outside import OutsideWeights

pytestmark = pytest.mark.integration

SIZES: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attn_implementation": "eager",
}
MODELS = {
    "llama": LlamaConfig(**SIZES),
    "tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "soft-capped": Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=5.0),
    "divided": GraniteConfig(**SIZES, logits_scaling=3.0),
    "multiplied": CohereConfig(**SIZES, logit_scale=0.3),
    "gpt2": GPT2Config(
        vocab_size=131, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=1, eos_token_id=2,
    ),
}  # fmt: skip


def build(name: str, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(MODELS[name]).to(dtype).train()


def inputs(num_items: Any = None) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 131, (3, 17), generator=generator)
    labels = ids.clone()
    labels[0, :5], labels[2, 9:] = -100, -100
    return {"input_ids": ids, "labels": labels, **({} if num_items is None else {"num_items_in_batch": num_items})}


def chunked(model: PreTrainedModel, chunk_tokens: int = 10) -> ChunkedLoss:
    loss = ChunkedLoss(model, type(model).forward)
    loss.chunk_tokens = chunk_tokens
    return loss


def gradients(model: PreTrainedModel, output: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    output.loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("num_items", [None, 77, torch.tensor(77)], ids=["mean", "count", "count-tensor"])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_gradients_are_those_of_the_stock_loss_in_fp64(name: str, num_items: Any) -> None:
    model = build(name)
    stock_output = model(**inputs(num_items))
    stock = gradients(model, stock_output)
    output = chunked(model).forward(**inputs(num_items))
    ours = gradients(model, output)
    assert ours.keys() == stock.keys()
    for key, expected in stock.items():
        assert (ours[key] - expected).norm() <= 1e-10 * expected.norm(), key
    assert torch.isclose(output.loss, stock_output.loss, rtol=1e-6)  # transformers computes the loss itself in fp32


def test_a_chunk_is_never_divided_by_its_own_count_of_tokens() -> None:
    model = build("llama")
    kwargs = inputs()
    kwargs["labels"][0] = -100  # a chunk with no label at all would be NaN, and the others too heavy
    assert torch.isclose(chunked(model, 17).forward(**kwargs).loss, model(**kwargs).loss, rtol=1e-6)


def test_a_batch_no_larger_than_a_chunk_takes_the_stock_path_bit_for_bit() -> None:
    model = build("llama", torch.float32)
    output = chunked(model, 51).forward(**inputs())
    assert not isinstance(output.logits, DeferredLogits)
    assert torch.equal(output.loss, model(**inputs()).loss)


def test_full_logits_are_not_made_in_training() -> None:
    model = build("llama")
    rows: list[int] = []
    model.lm_head.register_forward_hook(lambda _m, args, _o: rows.append(args[0].shape[:-1].numel()))
    output = chunked(model).forward(**inputs())
    output.loss.backward()
    assert max(rows) < inputs()["labels"].numel()


def test_logits_have_their_shape_and_type_before_they_are_made_and_are_right_after() -> None:
    model = build("soft-capped")
    output, stock = chunked(model).forward(**inputs()), model(**inputs())
    assert isinstance(output.logits, DeferredLogits)
    assert (output.logits.shape, output.logits.dtype, output.logits.device) == (
        stock.logits.shape, stock.logits.dtype, stock.logits.device,
    )  # fmt: skip
    assert output.logits._made is None
    assert torch.equal(output.logits.argmax(-1), stock.logits.argmax(-1))
    assert output.logits._made is not None
    upcast = chunked(model).forward(**inputs()).logits.float()
    assert isinstance(upcast, DeferredLogits)
    assert torch.equal(upcast + 0, stock.logits.float())


def test_logits_made_late_carry_their_gradient() -> None:
    model = build("llama")
    output = chunked(model).forward(**inputs())
    model.zero_grad()
    output.logits.pow(2).mean().backward()
    ours = model.lm_head.weight.grad.clone()
    model.zero_grad()
    model(**inputs()).logits.pow(2).mean().backward()
    assert torch.allclose(ours, model.lm_head.weight.grad, rtol=1e-12)


def test_the_output_keeps_the_order_of_its_fields() -> None:
    model = build("llama")
    output, stock = chunked(model).forward(**inputs()), model(**inputs())
    assert list(output.keys()) == list(stock.keys())
    assert torch.isclose(output[0], stock[0], rtol=1e-6)


def test_without_gradients_the_loss_is_the_same() -> None:
    model = build("llama").eval()
    with torch.no_grad():
        assert torch.isclose(chunked(model).forward(**inputs()).loss, model(**inputs()).loss, rtol=1e-6)


def test_positional_inputs_are_understood() -> None:
    model = build("llama")
    kwargs = inputs()
    output = chunked(model).forward(kwargs["input_ids"], labels=kwargs["labels"])
    assert torch.isclose(output.loss, model(**kwargs).loss, rtol=1e-6)


def test_a_model_with_another_loss_keeps_its_own_forward_and_says_so() -> None:
    model = build("llama")
    stock_loss = model.loss_function
    model.loss_function = lambda **kwargs: 3 * stock_loss(**{**kwargs, "shift_labels": None})
    loss = chunked(model)
    with pytest.warns(UserWarning, match="plain causal-LM loss"):
        output = loss.forward(**inputs())
    assert torch.equal(output.loss, model(**inputs()).loss)
    assert not isinstance(loss.forward(**inputs()).logits, DeferredLogits)


def test_a_frozen_head_gives_the_hidden_states_their_gradient() -> None:
    model = build("llama")
    model.lm_head.requires_grad_(False)
    stock = gradients(model, model(**inputs()))
    ours = gradients(model, chunked(model).forward(**inputs()))
    assert "lm_head.weight" not in ours
    assert all(torch.allclose(ours[key], stock[key], rtol=1e-10) for key in stock)


def test_logits_asked_for_by_their_places_take_the_stock_path() -> None:
    model = build("llama", torch.float32)
    keep = {"logits_to_keep": torch.tensor([3, 7, 16])}
    inputs_ = inputs() | keep
    inputs_["labels"] = inputs_["labels"][:, :3]  # as many as there are logits
    output = chunked(model, 2).forward(**inputs_)
    assert torch.equal(output.logits, model(**inputs_).logits)
    assert torch.equal(output.loss, model(**inputs_).loss)


@pytest.mark.parametrize("place", ["device", "host"])
@pytest.mark.parametrize("name", ["llama", "soft-capped", "divided"])
def test_fp16_under_a_gradient_scaler_is_within_the_tolerance_of_the_dtype(name: str, place: str) -> None:
    """The frozen model is in fp16, an adapter in fp32 trains under autocast; a CPU stands in for the card."""

    def scaled(how: str) -> tuple[torch.Tensor, dict[str, torch.Tensor], float]:
        model = build(name, torch.float16)
        torch.manual_seed(5)
        peft = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
        forward = type(model).forward
        if how == "host":
            outside = OutsideWeights(model, torch.device("cpu"), piece_bytes=50 * 32 * 2)
            outside.move_to_host()
            loss_ = ChunkedLoss(model, forward, outside, max_chunk_bytes=14 * 64 * 131)
        else:
            loss_ = chunked(model, 10 if how == "device" else 1000)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
        trained = [p for p in peft.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=1e-3)
        with torch.autocast("cpu", dtype=torch.float16):
            loss = loss_.forward(**inputs(77)).loss
        assert (loss.dtype, torch.isfinite(loss)) == (torch.float32, True)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        found = {n: p.grad.clone() for n, p in peft.named_parameters() if p.grad is not None}
        scaler.step(optimizer)
        scaler.update()
        return loss.detach(), found, scaler.get_scale()

    stock_loss, stock, _ = scaled("stock")
    loss, ours, scale = scaled(place)
    assert scale == 2.0**16, "no gradient was infinite"
    torch.testing.assert_close(loss, stock_loss, rtol=2e-3, atol=0.0)
    assert ours.keys() == stock.keys()
    for key, expected in stock.items():
        assert ours[key].abs().max() > 0
        assert (ours[key] - expected).norm() <= 1e-2 * expected.norm(), key
