"""Weights cast together are the weights that autocast casts one by one, and their gradients too, bit for bit."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from models import (
    PEFT_THEN_WRAP,
    STOCK,
    assert_same_tensors,
    batch,
    build,
    closing,
    enable_checkpointing,
    gradients,
    lora,
    prepare,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hf_lema.layer.joint_casts import JointCasts, plain_linears, summed

HALF = torch.bfloat16


class Operators(TorchDispatchMode):
    """Counts operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def step(is_streamed: bool, **adapter: Any) -> tuple[torch.Tensor, dict[str, Any], Counter[str]]:
    """A loss and its backward under autocast, base in half precision, adapter in float32."""
    order = PEFT_THEN_WRAP if is_streamed else STOCK
    model = prepare(order, build(dtype=HALF), lora(target_modules="all-linear", **adapter))
    if not is_streamed:
        enable_checkpointing(model)
        model.enable_input_require_grads()
    with closing(model), Operators() as operators:
        torch.manual_seed(11)
        with torch.autocast("cpu", HALF):
            loss = model(**batch()).loss
        loss.backward()
    return loss.detach(), gradients(model), operators.counts


@pytest.mark.integration
@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_step_under_autocast_is_that_of_the_resident_model_with_fewer_casts(dropout: float, use_dora: bool) -> None:
    loss, expected, stock = step(is_streamed=False, lora_dropout=dropout, use_dora=use_dora)
    found_loss, found, streamed = step(is_streamed=True, lora_dropout=dropout, use_dora=use_dora)

    assert torch.equal(found_loss, loss)
    assert_same_tensors(found, expected)
    # 14 weights a layer: cast in the forward and in the recompute, and their gradients cast back.
    num_fewer = stock["aten._to_copy.default"] - streamed["aten._to_copy.default"]
    assert num_fewer >= 4 * 3 * 14
    assert streamed["aten._foreach_copy_.default"] == 4 * 3
    if not dropout and not use_dora:  # 7 inputs: to float32 and back, there and in the gradient
        assert num_fewer >= 4 * (3 * 14 + 3 * 2 * 7)


def test_a_weight_that_is_also_used_by_itself_gets_both_gradients() -> None:
    linear = nn.Linear(3, 2, bias=True)
    hidden = torch.randn(4, 3, generator=torch.Generator().manual_seed(1)).to(HALF)

    def output(module: nn.Linear) -> torch.Tensor:
        with torch.autocast("cpu", HALF):
            return module(hidden).float().sum() + (module.weight**2).sum()

    slots = [(linear._parameters, "weight"), (linear._parameters, "bias")]
    trainables = [linear.weight, linear.bias]
    expected = torch.autograd.grad(output(linear), trainables)
    casts = JointCasts(plain_linears([linear]), slots, trainables, HALF)
    with casts.entered():
        found = torch.autograd.grad(output(linear), [*trainables, *casts.halves])
    assert "forward" not in linear.__dict__
    joined = casts.joined(list(found[:2]), found[2:])
    assert all(torch.equal(a, b) for a, b in zip(joined, expected, strict=True))  # type: ignore[arg-type]


def test_only_float32_weights_of_plain_linears_are_cast_and_only_under_autocast() -> None:
    class Own(nn.Linear):
        pass

    patched = nn.Linear(2, 2)
    patched.forward = lambda hidden: hidden  # type: ignore[method-assign]
    modules = [nn.Linear(2, 2), nn.Linear(2, 2, dtype=HALF), Own(2, 2), nn.Conv1d(2, 2, 1), patched]
    slots = [(module._parameters, "weight") for module in modules]
    weights = [module.weight for module in modules]

    assert len(JointCasts(plain_linears(modules), slots, weights, HALF).halves) == 1
    assert JointCasts(plain_linears(modules), slots, weights, None).halves == []


def test_gradients_of_pieces_are_added_where_there_are_two() -> None:
    one, two = torch.ones(2), torch.full((2,), 2.0)
    total = summed([one, None, one, None], [two, two, None, None])
    assert torch.equal(total[0], one + two)  # type: ignore[arg-type]
    assert total[1:] == [two, one, None]
    assert torch.equal(one, torch.ones(2))  # a gradient may be another one's memory: nothing is added in place
