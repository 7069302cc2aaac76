"""Boundary activations leave and return unchanged, and their places are free again when autograd lets go of them."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

from hf_lema.layer.boundaries import Boundaries

CPU = torch.device("cpu")


def activation(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def places(boundaries: Boundaries) -> int:
    """Free places in all buffers."""
    return sum(len(slab.free) for slab in boundaries._slabs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_kept_tensors_come_back_in_reverse_order_bit_for_bit(dtype: torch.dtype) -> None:
    boundaries = Boundaries(CPU, num_layers=5)
    tensors = [activation(i, 2, 3, 8, dtype=dtype) for i in range(5)]
    kept = [boundaries.keep(t.clone()) for t in tensors]
    for tensor, host in zip(reversed(tensors), reversed(kept), strict=True):
        assert torch.equal(boundaries.bring(host), tensor)
    assert boundaries.d2h_bytes == boundaries.h2d_bytes == sum(t.nbytes for t in tensors)


def test_they_may_be_asked_for_in_any_order_and_twice() -> None:
    boundaries = Boundaries(CPU, num_layers=4)
    kept = [boundaries.keep(activation(i, 3, 4)) for i in range(4)]
    for i in (3, 0, 2, 2, 1, 3):
        assert torch.equal(boundaries.bring(kept[i]), activation(i, 3, 4))


def test_a_place_is_used_again_once_its_tensor_is_gone_and_never_gives_the_old_one() -> None:
    boundaries = Boundaries(CPU, num_layers=2)
    first = [boundaries.keep(activation(i, 4)) for i in range(2)]
    boundaries.bring(first[1])  # fetches the other one ahead
    assert places(boundaries) == 0
    del first
    assert places(boundaries) == 2
    second = [boundaries.keep(activation(10 + i, 4)) for i in range(2)]
    for i in (0, 1):
        assert torch.equal(boundaries.bring(second[i]), activation(10 + i, 4))
    assert len(boundaries._slabs) == 1


def test_more_tensors_than_layers_get_a_second_buffer_that_is_kept() -> None:
    boundaries = Boundaries(CPU, num_layers=2)
    for _ in range(3):
        kept = [boundaries.keep(activation(i, 4)) for i in range(3)]
        assert [torch.equal(boundaries.bring(k), activation(i, 4)) for i, k in enumerate(kept)] == [True] * 3
        assert len(boundaries._slabs) == 2
        del kept


def test_a_longer_batch_gets_a_larger_buffer_and_the_old_one_goes() -> None:
    boundaries = Boundaries(CPU, num_layers=2)
    short = boundaries.keep(activation(0, 4))
    long = boundaries.keep(activation(1, 5000))
    assert torch.equal(boundaries.bring(long), activation(1, 5000))
    assert torch.equal(boundaries.bring(short), activation(0, 4))
    assert len(boundaries._retired) == 1
    del short, long
    again = boundaries.keep(activation(2, 5000))
    assert not boundaries._retired
    assert torch.equal(boundaries.bring(again), activation(2, 5000))
    assert boundaries.device_bytes == 2 * 20480  # two buffers of 5,000 floats, in whole pages


def test_a_longer_batch_after_a_shorter_one_that_needed_a_second_buffer_keeps_to_its_place() -> None:
    boundaries = Boundaries(CPU, num_layers=2)
    long = [boundaries.keep(activation(i, 5000)) for i in range(2)]
    short = [boundaries.keep(activation(10 + i, 4)) for i in range(2)]
    del short
    again = [boundaries.keep(activation(20 + i, 5000)) for i in range(2)]
    for i in (1, 0):
        assert torch.equal(boundaries.bring(again[i]), activation(20 + i, 5000))
        assert torch.equal(boundaries.bring(long[i]), activation(i, 5000))
    assert len(boundaries._slabs) == 2


def test_writing_to_a_tensor_that_is_leaving_is_an_error() -> None:
    boundaries = Boundaries(CPU, num_layers=2)
    hidden = activation(0, 4)
    boundaries.keep(hidden)
    hidden.add_(1)
    with pytest.raises(RuntimeError, match="written to in place"):
        boundaries.keep(activation(1, 4))


def test_autograd_refuses_a_brought_tensor_whose_buffer_was_filled_again() -> None:
    boundaries = Boundaries(CPU, num_layers=3)
    kept = [boundaries.keep(activation(i, 4)) for i in range(3)]
    brought = boundaries.bring(kept[2]).detach().requires_grad_(True)
    loss = (brought * brought).sum()
    boundaries.bring(kept[1])
    boundaries.bring(kept[0])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


class Save(torch.autograd.Function):
    """Saves what `keep` returned, as the recompute Function does."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, boundaries: Boundaries) -> torch.Tensor:
        ctx.boundaries = boundaries
        ctx.save_for_backward(boundaries.keep(x))
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (host,) = ctx.saved_tensors
        return 2 * ctx.boundaries.bring(host) * grad, None


def test_autograd_frees_the_places_after_a_backward_although_the_loss_lives() -> None:
    boundaries = Boundaries(CPU, num_layers=3)
    x = activation(0, 4).requires_grad_(True)
    y = x
    for _ in range(3):
        y = Save.apply(y, boundaries)
    loss = y.sum()
    assert places(boundaries) == 0
    loss.backward()
    assert places(boundaries) == 3
    assert torch.allclose(x.grad, 8 * activation(0, 4) ** 7)  # type: ignore[arg-type]


def test_a_graph_that_is_kept_keeps_them_and_a_dropped_one_frees_them() -> None:
    boundaries = Boundaries(CPU, num_layers=1)
    x = activation(0, 4).requires_grad_(True)
    loss = Save.apply(x, boundaries).sum()
    loss.backward(retain_graph=True)
    assert places(boundaries) == 0
    loss.backward()
    assert torch.equal(x.grad, 4 * activation(0, 4))  # type: ignore[arg-type]
    assert places(boundaries) == 1
    loss = Save.apply(x, boundaries).sum()
    assert places(boundaries) == 0
    del loss
    gc.collect()
    assert places(boundaries) == 1


def test_close_gives_everything_back_and_may_be_called_again() -> None:
    boundaries = Boundaries(CPU, num_layers=2)
    kept = boundaries.keep(activation(0, 4))
    boundaries.bring(kept)
    boundaries.close()
    boundaries.close()
    assert boundaries.pinned_bytes == boundaries.device_bytes == 0
    assert torch.equal(kept, activation(0, 4))  # memory lives as long as its tensors
