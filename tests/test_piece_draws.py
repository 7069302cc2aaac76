"""A forward on several pieces at once draws for each of them what its recompute draws again, or is cut after all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fake_store import CPU
from models import PEFT_THEN_WRAP, STOCK, batch, build, closing, forward_backward, gradients, lora, prepare
from torch import nn

from hf_lema.choices import StepChoices
from hf_lema.layer.micro_batch import Piece
from hf_lema.layer.piece_draws import DrawsElsewhereError, PieceDraws, active_dropouts
from hf_lema.wrapper import apply_choices

PIECES = [Piece(0, 2), Piece(2, 4), Piece(4, 5)]


def rows_of(model: nn.Module) -> list[int]:
    """Sequences that the second layer's feed-forward part is called with from now on."""
    rows: list[int] = []
    mlp = model.get_submodule("base_model.model.model.layers.1.mlp")
    mlp.register_forward_hook(lambda _m, args, _o: rows.append(args[0].shape[0]))
    return rows


def run(choices: StepChoices | None, dropout: float = 0.0, **overrides: Any) -> tuple[Any, Any, list[int]]:
    """Loss, gradients, and the rows of the second layer's calls; resident where there are no choices."""
    model = prepare(
        STOCK if choices is None else PEFT_THEN_WRAP,
        build(**overrides),
        lora(lora_dropout=dropout, init_lora_weights=False),
    )
    with closing(model):
        if choices is not None:
            apply_choices(model, choices)
            forward_backward(model, batch(5))  # a class is judged at its first visit
            model.zero_grad()
        rows = rows_of(model)
        return forward_backward(model, batch(5)), gradients(model), rows


@pytest.mark.integration
@pytest.mark.parametrize(("forward_size", "expected"), [(5, [5]), (4, [4, 1]), (3, [2, 2, 1]), (0, [2, 2, 1])])
def test_only_the_backward_is_cut_where_the_forward_has_room(forward_size: int, expected: list[int]) -> None:
    loss, whole, _ = run(StepChoices(), dtype=torch.float64)
    choices = StepChoices(micro_batch_size=2, forward_micro_batch_size=forward_size)
    cut_loss, cut, rows = run(choices, dtype=torch.float64)

    assert rows == [*expected, 2, 2, 1]
    assert torch.isclose(cut_loss, loss, rtol=1e-6)
    for name, gradient in whole.items():  # the bound of every cut visit: fp32 sums in another order
        assert (cut[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


@pytest.mark.integration
@pytest.mark.parametrize("forward_size", [5, 4])
def test_gradients_are_those_of_the_masks_that_the_forward_drew(forward_size: int) -> None:
    masks: dict[str, torch.Tensor] = {}
    results = []
    for is_streamed in (True, False):
        model = prepare(
            PEFT_THEN_WRAP if is_streamed else STOCK,
            build(dtype=torch.float64),
            lora(lora_dropout=0.3, init_lora_weights=False),
        )
        with closing(model):
            if is_streamed:
                apply_choices(model, StepChoices(micro_batch_size=2, forward_micro_batch_size=forward_size))
            for name, module in model.named_modules():
                if type(module) is nn.Dropout and is_streamed:
                    module.register_forward_hook(recorder(masks, name))
                elif type(module) is nn.Dropout:
                    module.forward = masks[name].mul  # type: ignore[method-assign]
            results.append((forward_backward(model, batch(5)), gradients(model)))
    (loss, found), (plain_loss, expected) = results
    assert all(0.6 < float((mask != 0).double().mean()) < 0.8 for mask in masks.values())
    assert torch.isclose(loss, plain_loss, rtol=1e-6)
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def recorder(masks: dict[str, torch.Tensor], name: str) -> Any:
    """A hook that keeps what dropout multiplied with in the forward; the recompute comes later."""

    def note(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        if module.training and not output.requires_grad and len(masks.get(name, ())) < 5:
            mask = torch.where(output == 0, 0.0, 1 / 0.7).to(output.dtype)
            assert torch.allclose(args[0] * mask, output)
            masks[name] = torch.cat([masks[name], mask]) if name in masks else mask

    return note


@pytest.mark.integration
def test_a_layer_that_drops_inside_a_function_is_cut_in_the_forward_too() -> None:
    results = [
        run(StepChoices(micro_batch_size=2, forward_micro_batch_size=size), 0.3, attention_dropout=0.2)
        for size in (0, 5)
    ]
    (loss, expected, rows), (found_loss, found, found_rows) = results
    assert rows == found_rows == [2, 2, 1, 2, 2, 1]
    assert torch.equal(loss, found_loss)
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


def test_masks_come_again_for_each_piece_in_any_order() -> None:
    layer = nn.Sequential(nn.Dropout(0.5), nn.Dropout(0.25)).train()
    draws = PieceDraws(CPU, active_dropouts(layer))
    hidden = torch.ones(5, 3, 7)
    with draws.drawing(PIECES):
        whole = layer(hidden)
    for piece in reversed(PIECES):
        part = hidden[piece.begin : piece.end].clone().requires_grad_()
        with draws.replaying(piece, layer_idx=0):
            output = layer(part)
        (gradient,) = torch.autograd.grad(output, part, torch.ones_like(output))
        assert torch.equal(output, whole[piece.begin : piece.end])
        assert torch.equal(gradient, output)  # of ones, what dropout multiplies with is what it gives


def test_dropout_that_does_not_draw_is_left_alone() -> None:
    off, evaluated = nn.Dropout(0.0).train(), nn.Dropout(0.5).eval()
    assert active_dropouts([off, evaluated]) == ()


@pytest.mark.parametrize("shape", [(10, 7), (4, 3, 7)])
def test_what_does_not_begin_with_the_batch_is_not_drawn_in_pieces(shape: tuple[int, ...]) -> None:
    dropout = nn.Dropout(0.5).train()
    with pytest.raises(DrawsElsewhereError), PieceDraws(CPU, [dropout]).drawing(PIECES):
        dropout(torch.ones(shape))
    assert "forward" not in dropout.__dict__


@pytest.mark.parametrize("when", ["before", "after"])
def test_numbers_drawn_by_anything_else_are_noticed(when: str) -> None:
    dropout = nn.Dropout(0.5).train()

    def compute() -> None:
        if when == "before":
            torch.rand(1)
        dropout(torch.ones(5, 3, 7))
        if when == "after":
            torch.rand(1)

    with pytest.raises(DrawsElsewhereError), PieceDraws(CPU, [dropout]).drawing(PIECES):
        compute()


@pytest.mark.parametrize(("num_calls", "shape"), [(2, (2, 3, 7)), (0, (2, 3, 7)), (1, (2, 4, 7))])
def test_a_recompute_that_drops_something_else_is_refused(num_calls: int, shape: tuple[int, ...]) -> None:
    dropout = nn.Dropout(0.5).train()
    draws = PieceDraws(CPU, [dropout])
    with draws.drawing(PIECES):
        dropout(torch.ones(5, 3, 7))

    def recompute() -> None:
        with draws.replaying(PIECES[0], layer_idx=3):
            for _ in range(num_calls):
                dropout(torch.ones(shape))

    with pytest.raises(RuntimeError, match="layer 3"):
        recompute()
