"""What `ByteMeter` counts of operators whose formula PyTorch has changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils import flop_counter

from hf_lema.planning import meter


def _strict(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
    """The rule of PyTorch up to 2.11: as many heads of keys and values as of queries."""
    query, key, value = (tuple(getattr(arg, "shape", arg)) for arg in args[:3])
    assert query[:2] == key[:2] == value[:2], "query/key/value shapes are incompatible"
    return flop_counter.sdpa_flop_count(query, key, value)


def test_attention_of_grouped_heads_counts_as_that_of_all_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    aten = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    monkeypatch.setitem(meter.flop_registry, aten, _strict)
    query, grouped, every = (torch.randn(2, heads, 5, 8) for heads in (6, 2, 6))
    counted = []
    for key in (grouped, every):
        counter = meter.ByteMeter(is_counted=lambda tensor: True)
        with counter.measured() as measures:
            aten(query, key, key)
        counted.append(sum(kernels.num_flops * kernels.count for kernels in measures[0].work))

    assert counted == [flop_counter.sdpa_flop_count((2, 6, 5, 8), (2, 6, 5, 8), (2, 6, 5, 8))] * 2
