"""Embedding and head in host memory: the same numbers, one tensor for tied weights, everything back where it was."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_loss import MODELS, build, inputs

from hf_lema.model.loss import ChunkedLoss
from hf_lema.model.outside import OutsideWeights

pytestmark = pytest.mark.integration
CPU = torch.device("cpu")
ROW_BYTES = 32 * 8  # hidden size in float64


def on_host(model: Any, num_rows: int = 50) -> OutsideWeights:
    outside = OutsideWeights(model, CPU, piece_bytes=num_rows * ROW_BYTES)
    outside.move_to_host()
    assert outside.on_host
    return outside


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def freeze_outside(model: Any) -> None:
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        module.requires_grad_(False)


@pytest.mark.parametrize("num_items", [None, 7, torch.tensor(29)])
@pytest.mark.parametrize("num_rows", [131, 50, 1])
@pytest.mark.parametrize("name", MODELS)
def test_a_head_in_pieces_gives_the_loss_and_the_gradients_of_the_whole_one(
    name: str, num_rows: int, num_items: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Stock's loss is computed in float32 whatever the model; both in float64, the formulas themselves are compared.
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self.double())
    expected_model = build(name)
    freeze_outside(expected_model)
    expected_loss = expected_model(**inputs(num_items)).loss
    expected = gradients(expected_model, expected_loss)
    model = build(name)
    freeze_outside(model)
    loss = ChunkedLoss(model, type(model).forward, on_host(model, num_rows), max_chunk_bytes=14 * 64 * num_rows)
    found_loss = loss.forward(**inputs(num_items)).loss
    found = gradients(model, found_loss)
    assert torch.isclose(found_loss, expected_loss, rtol=1e-12)
    assert found.keys() == expected.keys()
    assert found
    for key, gradient in expected.items():
        assert (found[key] - gradient).norm() <= 1e-10 * gradient.norm(), key


def test_a_head_in_pieces_is_computed_in_the_backward_under_the_autocast_of_its_forward() -> None:
    grads = []
    for is_inside in (True, False):
        model = build("llama", torch.float32)
        freeze_outside(model)
        loss = ChunkedLoss(model, type(model).forward, on_host(model))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = loss.forward(**inputs()).loss
            if is_inside:
                grads.append(gradients(model, output))
        if not is_inside:
            grads.append(gradients(model, output))
    inside, outside = grads
    # Under autocast the head's weight of float32 is rounded to bfloat16: without it the sums would differ.
    last = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(inside[last], outside[last])


def test_the_norm_before_a_head_in_pieces_runs_in_tiles_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    freeze_outside(model)
    norm = model.base_model.norm.requires_grad_(False)
    sizes: list[int] = []
    plain = type(norm).forward

    def counting(module: Any, hidden: torch.Tensor) -> torch.Tensor:
        if module is norm:
            sizes.append(hidden.shape[:-1].numel())
        result: torch.Tensor = plain(module, hidden)
        return result

    monkeypatch.setattr(type(norm), "forward", counting)
    outside = on_host(model)
    whole, tiled = (ChunkedLoss(model, type(model).forward, outside) for _ in range(2))
    tiled._tile_tokens = 15
    found = []
    for loss in (whole, tiled):
        loss.forward(**inputs())  # the first time it looks at a few tokens whole
        sizes.clear()
        found.append(gradients(model, loss.forward(**inputs()).loss))
        model.zero_grad()
        num_tokens = inputs()["labels"].numel()
        assert max(sizes) == (num_tokens if loss is whole else 15)
        assert sum(sizes) >= num_tokens
    assert found[0].keys() == found[1].keys()
    assert all((found[0][key] - found[1][key]).norm() <= 1e-10 * found[0][key].norm() for key in found[0])


@pytest.mark.parametrize("name", MODELS)
def test_logits_generation_and_evaluation_are_those_of_the_whole_head(name: str) -> None:
    model = build(name).eval()
    with torch.no_grad():
        plain = model(**inputs())
        tokens = model.generate(input_ids=inputs()["input_ids"], max_new_tokens=4, do_sample=False)
    freeze_outside(model)
    outside = on_host(model)
    loss = ChunkedLoss(model, type(model).forward, outside)
    with torch.no_grad():
        output = loss.forward(**inputs())
        assert torch.allclose(output.loss.float(), plain.loss, rtol=1e-6)
        assert output.logits.shape == plain.logits.shape
        assert torch.allclose(torch.Tensor.clone(output.logits), plain.logits, rtol=1e-12, atol=1e-12)
        assert torch.equal(model.generate(input_ids=inputs()["input_ids"], max_new_tokens=4, do_sample=False), tokens)


def test_logits_with_a_gradient_come_from_the_whole_head() -> None:
    model, plain = build("llama"), build("llama")
    freeze_outside(model)
    freeze_outside(plain)
    on_host(model)
    ids = {"input_ids": inputs()["input_ids"]}
    found, expected = (gradients(m, m(**ids).logits.pow(2).sum()) for m in (model, plain))
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_tied_weights_stay_one_tensor_and_all_come_back() -> None:
    model = build("tied")
    freeze_outside(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    outside = on_host(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert outside.nbytes == 131 * 256
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    outside.move_to_device()
    assert not outside.on_host
    assert "forward" not in model.lm_head.__dict__
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_weights_that_train_stay_on_the_device() -> None:
    model = build("llama")
    model.model.embed_tokens.requires_grad_(False)
    pointer = model.lm_head.weight.data_ptr()
    outside = on_host(model)
    assert model.lm_head.weight.data_ptr() == pointer
    assert not outside.head_is_lent
    assert outside.nbytes == 131 * 256


def test_a_head_that_is_unfrozen_after_it_was_moved_comes_back_and_trains() -> None:
    model, plain = build("llama"), build("llama")
    freeze_outside(model)
    freeze_outside(plain)
    outside = on_host(model)
    for m in (model, plain):
        m.lm_head.requires_grad_(True)
    found = gradients(model, ChunkedLoss(model, type(model).forward, outside).forward(**inputs()).loss)
    expected = gradients(plain, plain(**inputs()).loss)
    assert not outside.on_host
    assert torch.equal(found["lm_head.weight"], expected["lm_head.weight"])


def test_an_adapter_on_the_head_trains_while_its_base_is_on_the_host() -> None:
    def trained(is_moved: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model = build("llama")
        torch.manual_seed(5)
        config = LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
        peft = get_peft_model(model, config)
        outside = OutsideWeights(model, CPU, piece_bytes=50 * ROW_BYTES)
        loss = ChunkedLoss(model, type(model).forward, outside, max_chunk_bytes=1)
        if is_moved:
            outside.move_to_host()
            assert outside.head_is_lent
        # Twice the tokens of the smallest part: the loss is cut.
        output = loss.forward(input_ids=inputs()["input_ids"].repeat(2, 1), labels=inputs()["labels"].repeat(2, 1)).loss
        return output.detach(), gradients(peft, output)

    expected_loss, expected = trained(False)
    found_loss, found = trained(True)
    assert torch.equal(found_loss, expected_loss)
    assert any("lm_head" in key for key in expected)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_head_that_peft_copies_to_train_it_trains_while_its_base_is_on_the_host() -> None:
    def trained(is_moved: bool) -> dict[str, torch.Tensor]:
        model = build("llama")
        freeze_outside(model)
        if is_moved:
            on_host(model)
        torch.manual_seed(5)
        peft = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
        return gradients(peft, peft(**inputs()).loss)

    expected, found = trained(False), trained(True)
    assert any("lm_head" in key for key in expected)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_loss_whose_head_moved_back_before_its_backward_has_its_gradient() -> None:
    grads = []
    for is_moved in (False, True):
        model = build("llama")
        freeze_outside(model)
        outside = on_host(model)
        output = ChunkedLoss(model, type(model).forward, outside).forward(**inputs()).loss
        if is_moved:
            outside.move_to_device()
        grads.append(gradients(model, output))
        assert ("forward" in model.lm_head.__dict__) is not is_moved
    assert all(torch.equal(grads[1][key], grads[0][key]) for key in grads[0])


def test_an_error_in_the_loss_leaves_the_whole_head_registered() -> None:
    model = build("llama")
    freeze_outside(model)
    outside = on_host(model)
    whole = model.lm_head.weight

    def fail() -> None:
        with closing(outside.head_pieces()) as pieces:
            for begin, end in pieces:
                assert model.lm_head.weight.shape == (end - begin, 32)
                raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fail()
    assert model.lm_head.weight is whole
    assert outside.head_is_lent


def test_close_leaves_the_weights_readable() -> None:
    model = build("llama")
    freeze_outside(model)
    before = model.lm_head.weight.detach().clone()
    outside = on_host(model)
    outside.close()
    outside.close()
    assert torch.equal(model.lm_head.weight, before)
    assert outside.pinned_bytes == 0
