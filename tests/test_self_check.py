"""The self-check passes where streaming is right, changes no number, and raises where a layer gets the wrong bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import (
    ORDERS,
    STOCK,
    assert_same_tensors,
    build,
    closing,
    enable_checkpointing,
    forward_backward,
    gradients,
    lora,
    prepare,
)

from hf_lema import LemaConfig, cli, get_streamer
from hf_lema.layer.self_check import NUM_CHECKED_VISITS, SelfCheck, check_steps
from hf_lema.wrapper import find_check

pytestmark = pytest.mark.integration


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
def test_checked_steps_are_equal_and_give_the_numbers_of_unchecked_ones(architecture: str) -> None:
    with closing(prepare(STOCK, build(architecture), lora(architecture))) as stock:
        enable_checkpointing(stock)
        loss, expected = forward_backward(stock), gradients(stock)
    config = LemaConfig(self_check=True)
    with closing(prepare(ORDERS[0], build(architecture), lora(architecture), config=config)) as model:
        assert torch.equal(forward_backward(model), loss)
        assert_same_tensors(gradients(model), expected)
        for _ in range(3):
            forward_backward(model)
        check = find_check(model)
        assert check is not None
        num_layers = get_streamer(model).num_layers
        assert check.num_visits == check.num_equal == 2 * NUM_CHECKED_VISITS * num_layers


def test_packed_layers_are_checked_too() -> None:
    config = LemaConfig(self_check=True, quantization="nf4")
    with closing(prepare(ORDERS[0], build("llama"), config=config)) as model:
        forward_backward(model)
        check = find_check(model)
        assert check is not None
        assert check.num_equal == check.num_visits > 0


def test_a_slot_with_another_layers_bytes_is_found_and_named() -> None:
    with closing(prepare(ORDERS[0], build("llama"), config=LemaConfig(self_check=True))) as model:
        store: Any = get_streamer(model).host_store
        read = store.read_into
        store.read_into = lambda layer_idx, out: read(1 if layer_idx == 2 else layer_idx, out)
        with pytest.raises(RuntimeError, match="layer 2: the output of the streamed layer is off"):
            forward_backward(model)


def test_base_weights_that_change_in_place_are_found() -> None:
    check = SelfCheck()
    weight = torch.ones(4, 4)
    check.watch_base(0, [weight])
    check.watch_base(0, [weight])
    weight[1, 1] = 2
    with pytest.raises(RuntimeError, match="layer 0: the base weights changed"):
        check.watch_base(0, [weight])


def test_results_within_rounding_pass_and_are_counted_apart() -> None:
    check = SelfCheck()
    result = torch.randn(100)
    check.compare("x", [result, None], [result * (1 + 1e-4), None])
    assert (check.num_visits, check.num_equal) == (1, 0)
    assert 5e-5 < check.max_relative_error < 2e-4
    for wrong in (result * 1.1, result * torch.nan):
        with pytest.raises(RuntimeError, match="off by"):
            check.compare("x", [result], [wrong])


def test_adapters_that_do_not_move_are_an_error() -> None:
    with closing(prepare(ORDERS[0], build("llama"), config=LemaConfig(self_check=True))) as model:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora" in name:
                    parameter.zero_()  # with both halves at zero no gradient reaches either
        with pytest.raises(RuntimeError, match="moved none"):
            check_steps(model, vocab_size=100)


def test_check_from_the_command_line_says_what_was_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    build("llama").save_pretrained(tmp_path)
    assert cli.main(["check", str(tmp_path), "--ram-budget", "min", "--json"]) == 0
    *text, line = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    assert "4 layers, disk tier" in text[-1]
    assert found["num_equal"] == found["num_visits"] == 16
