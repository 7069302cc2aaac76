"""Visits cut along the batch: the same numbers up to the order of sums, and nothing cut that may not be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaForCausalLM

from hf_lema import LemaConfig, LemaModelWrapper, get_streamer
from hf_lema.layer.micro_batch import MicroBatches, Piece

pytestmark = pytest.mark.integration


def batch(lengths: tuple[int, ...] = (16, 9, 16, 3, 12)) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(1, 128, (len(lengths), 16), generator=generator)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        mask[row, :length] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def gradients(tiny_llama: Any, micro_batch_size: int) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
    model: LlamaForCausalLM = tiny_llama(dtype=torch.float64, attn_implementation="eager")
    LemaModelWrapper.wrap(model, LemaConfig(micro_batch_size=micro_batch_size), device="cpu")
    torch.manual_seed(3)
    peft = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    peft.train()
    rows: list[int] = []
    model.model.layers[1].mlp.register_forward_hook(lambda _m, args, _o: rows.append(args[0].shape[0]))
    inputs = batch()
    # Trainer hands its token count down to the layers; a scalar must not keep the batch whole.
    loss = peft(**inputs, num_items_in_batch=(inputs["labels"][:, 1:] != -100).sum()).loss
    loss.backward()
    assert max(rows) == min(micro_batch_size or 5, 5)
    streamer = get_streamer(peft)
    streamer.close()
    grads = {n: p.grad.double() for n, p in peft.named_parameters() if p.grad is not None}
    return loss.detach(), grads, streamer.stats().num_hits + streamer.stats().num_demand_loads


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3, 5, 8])
def test_cut_visits_give_the_gradients_of_the_whole_batch(tiny_llama: Any, micro_batch_size: int) -> None:
    loss, whole, num_visits = gradients(tiny_llama, 0)
    cut_loss, cut, num_cut_visits = gradients(tiny_llama, micro_batch_size)
    assert torch.isclose(cut_loss, loss, rtol=1e-6)
    assert cut.keys() == whole.keys()
    assert whole
    for name, expected in whole.items():
        # Adapters are fp32: the bound is that of a sum of fp32 gradients in another order.
        assert (cut[name] - expected).norm() <= 1e-5 * expected.norm(), name
    assert num_cut_visits == num_visits  # a layer crosses the bus once, however many pieces pass through it


def test_one_large_batch_in_pieces_is_accumulation_with_an_eighth_of_the_bytes(tiny_llama: Any) -> None:
    def adapters(micro: int, num_batches: int) -> tuple[dict[str, torch.Tensor], int]:
        model = tiny_llama(dtype=torch.float64, attn_implementation="eager")
        LemaModelWrapper.wrap(model, LemaConfig(micro_batch_size=micro), device="cpu")
        torch.manual_seed(3)
        peft = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).train()
        inputs = batch((16, 9, 16, 3, 12, 7, 16, 5))
        num_items = (inputs["labels"][:, 1:] != -100).sum()
        for part in range(num_batches):
            rows = slice(part * 8 // num_batches, (part + 1) * 8 // num_batches)
            peft(**{k: v[rows] for k, v in inputs.items()}, num_items_in_batch=num_items).loss.backward()
        streamer = get_streamer(peft)
        streamer.close()
        visits = streamer.stats().num_hits + streamer.stats().num_demand_loads
        return {n: p.grad for n, p in peft.named_parameters() if p.grad is not None}, visits

    large, num_large = adapters(1, 1)
    accumulated, num_accumulated = adapters(0, 8)
    assert num_accumulated == 8 * num_large
    for name, expected in accumulated.items():
        assert (large[name] - expected).norm() <= 1e-5 * expected.norm(), name


def test_only_arguments_with_a_batch_dimension_are_cut() -> None:
    mask, shared, flat = torch.zeros(4, 1, 3, 3), torch.zeros(1, 3), torch.zeros(4)
    named = {
        "attention_mask": mask,
        "position_ids": shared,
        "cache_position": flat,
        "position_embeddings": (mask, shared),
    }
    cut = Piece(1, 3).cut_named(named, 4)
    assert cut["attention_mask"].shape[0] == 2
    assert cut["position_embeddings"][0].shape[0] == 2
    assert cut["position_ids"] is shared
    assert cut["cache_position"] is flat
    assert cut["position_embeddings"][1] is shared


def test_an_unknown_tensor_argument_keeps_the_batch_whole() -> None:
    pieces = MicroBatches(1).pieces(nn.Identity(), torch.zeros(4, 3, 2), {"alibi": torch.zeros(4, 1)}, _run)
    assert pieces == [Piece(0, 4)]


@pytest.mark.parametrize(
    "named",
    [
        {"position_ids": torch.zeros(3, 3, 5)},  # three axes of positions, and three sequences
        {"attention_mask": torch.zeros(2, 1, 5, 5)},
        {"position_embeddings": (torch.zeros(3, 5, 2), torch.zeros(4, 5, 2))},
    ],
)
def test_an_argument_whose_first_dimension_is_not_the_batch_keeps_it_whole(named: dict[str, Any]) -> None:
    assert MicroBatches(1).pieces(nn.Identity(), torch.zeros(3, 5, 2), named, _run) == [Piece(0, 3)]


def test_a_layer_that_mixes_its_batch_is_found_and_kept_whole() -> None:
    layer = nn.Identity()
    hidden = torch.arange(24.0).reshape(4, 3, 2)
    cut = MicroBatches(2)
    with pytest.warns(UserWarning, match="not cut into micro-batches"):
        assert cut.pieces(layer, hidden, {}, lambda h, _: h - h.mean(0)) == [Piece(0, 4)]
    assert cut.pieces(layer, hidden, {}, _run) == [Piece(0, 4)]  # judged once per class


def test_a_layer_with_an_output_that_has_no_batch_is_kept_whole() -> None:
    class Losing(nn.Identity):
        pass

    hidden = torch.arange(24.0).reshape(4, 3, 2)
    for extra in (hidden.sum(), hidden.sum()[None], hidden[0]):
        cut = MicroBatches(2)
        with pytest.warns(UserWarning, match="not cut into micro-batches"):
            assert cut.pieces(Losing(), hidden, {}, lambda h, _, extra=extra: (h, extra)) == [Piece(0, 4)]


def test_pieces_cover_the_batch() -> None:
    hidden = torch.ones(5, 100, 2)
    assert MicroBatches(2).pieces(nn.Identity(), hidden, {}, _run) == [Piece(0, 2), Piece(2, 4), Piece(4, 5)]
    assert MicroBatches(0).pieces(nn.Identity(), hidden, {}, _run) == [Piece(0, 5)]


def test_the_check_leaves_dropout_as_it_was() -> None:
    layer = nn.Sequential(nn.Dropout(0.5), nn.Linear(2, 2)).train()
    layer[0].training = False
    MicroBatches(1).pieces(layer, torch.ones(4, 3, 2), {}, lambda h, _: layer(h))
    assert layer.training
    assert not layer[0].training
    assert layer[1].training


def _run(hidden: torch.Tensor, _: object) -> torch.Tensor:
    return hidden
