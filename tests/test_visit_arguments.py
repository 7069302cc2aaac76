"""The arguments of a layer in a training visit; what whole models do with them is in test_wrapper.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from hf_lema.layer.visit_arguments import VisitArguments, held_by_containers, tensors_in


class Named(nn.Module):
    def forward(self, hidden: Any, mask: Any = None, past_key_values: Any = None, **kwargs: Any) -> Any: ...


class Unnamed(nn.Module):
    def forward(self, *args: Any, **kwargs: Any) -> Any: ...


def test_positional_arguments_get_the_names_of_the_forward_and_the_rest_have_none() -> None:
    arguments = VisitArguments(0, Named, None)
    assert arguments.num_named == 2
    assert arguments.named((1, 2, 3)) == [("mask", 1), ("past_key_values", 2), ("*args", 3)]

    assert VisitArguments(0, Unnamed, None).num_named == 0
    assert VisitArguments(0, Unnamed, None).named((1, 2)) == [("*args", 1), ("*args", 2)]


def test_an_empty_cache_is_dropped_and_one_with_tokens_refused() -> None:
    arguments, cache = VisitArguments(1, Named, None), DynamicCache()
    assert arguments.without_cache((5, cache), {"use_cache": True, "scale": 2}) == (
        (5, None),
        {"use_cache": False, "scale": 2},
    )

    for layer_idx in range(2):
        cache.update(torch.ones(1, 1, 2, 4), torch.ones(1, 1, 2, 4), layer_idx)
    with pytest.raises(ValueError, match="layer 1: past_key_values already holds tokens"):
        arguments.without_cache((5, cache), {})


def test_tensors_that_a_layer_puts_into_an_argument_are_found_in_containers_alone() -> None:
    shared: dict[str, Any] = {"count": torch.ones(1, dtype=torch.int64)}
    named = {"shared": shared, "hidden": torch.ones(1)}
    before = held_by_containers(named)
    arguments = VisitArguments(3, Named, None)
    arguments.refuse_written(before, held_by_containers(named))

    shared["more"] = [torch.ones(2)]
    assert [t.numel() for t in tensors_in(named)] == [1, 2, 1]
    with pytest.raises(ValueError, match=r"layer 3 \(Named\) writes tensors into its arguments \['shared'\]"):
        arguments.refuse_written(before, held_by_containers(named))


def test_an_argument_that_needs_a_gradient_is_refused_by_name() -> None:
    arguments = VisitArguments(2, Named, None)
    arguments.refuse_lost_gradients((torch.ones(1),), {})
    with pytest.raises(ValueError, match=r"layer 2: the arguments \['mask'\] need a gradient"):
        arguments.refuse_lost_gradients((torch.ones(1, requires_grad=True),), {})
