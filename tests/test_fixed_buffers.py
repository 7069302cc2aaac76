"""Which buffers DDP need not send before every forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import WRAP_THEN_PEFT, build, closing, prepare
from torch import nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from hf_lema.model.fixed_buffers import fixed_buffers


def names_of(model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_buffers()}


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "mixtral", "phi3"])
def test_all_buffers_of_common_models_are_fixed(architecture: str) -> None:
    model = build(architecture)
    assert set(fixed_buffers(model)) == names_of(model)
    assert names_of(model)


@pytest.mark.parametrize("scaling", [None, {"rope_type": "linear", "factor": 2.0}])
def test_fixed_buffers_have_the_same_numbers_after_a_longer_batch(scaling: dict[str, Any] | None) -> None:
    model = build() if scaling is None else build(rope_scaling=scaling)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model(input_ids=torch.zeros(1, 200, dtype=torch.long))
    assert set(fixed_buffers(model)) == set(before)
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name])


def test_frequencies_that_follow_the_length_of_the_batch_stay_with_ddp() -> None:
    model = build(rope_scaling={"rope_type": "dynamic", "factor": 2.0})
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model(input_ids=torch.zeros(1, 200, dtype=torch.long))
    assert any(not torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert not set(fixed_buffers(model))


def test_types_by_layer_count_one_by_one() -> None:
    shape = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    config = Gemma3TextConfig(**shape, num_attention_heads=4, num_key_value_heads=2)
    model = Gemma3ForCausalLM(config)
    fixed = set(fixed_buffers(model))
    assert fixed == names_of(model)
    rotary: Any = model.model.rotary_emb
    if not isinstance(rotary.rope_type, dict):
        pytest.skip("this version has one module for each type")
    rotary.rope_type["full_attention"] = "dynamic"
    assert fixed - set(fixed_buffers(model)) == {name for name in fixed if "rotary" in name}


def test_what_a_checkpoint_holds_and_what_others_have_registered_stays_with_ddp() -> None:
    with closing(prepare(WRAP_THEN_PEFT)) as model:
        base: Any = model.get_base_model()
        before = set(model._ddp_params_and_buffers_to_ignore)
        base.model.register_buffer("statistics", torch.zeros(2))
        base.model.layers[0].mlp.act_fn = nn.BatchNorm1d(2)
        base.model.layers[1].mlp.act_fn.register_buffer("foreign", torch.zeros(1))
        assert set(model._ddp_params_and_buffers_to_ignore) == before
        left = names_of(model) - before
        assert {name.rsplit(".", 1)[1] for name in left} == {
            *("statistics", "running_mean", "running_var", "num_batches_tracked", "foreign")
        }
