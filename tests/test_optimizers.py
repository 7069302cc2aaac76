"""The planned bytes of optimizer state are those of the real optimizers; streamed models train with all of them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from models import (
    STOCK,
    WRAP_THEN_PEFT,
    assert_moved,
    assert_same_run,
    build,
    closing,
    lora,
    prepare,
    train,
    trainables,
)

from hf_lema.planning.meter import allocated_bytes
from hf_lema.planning.optimizers import OPTIMIZERS, OptimizerBytes, optimizer_bytes

SHAPES = [(16, 4096), (10,), (63, 65), (64, 64), (11008, 16), (400, 300)]


def real_optimizer(optim: str, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    if optim.startswith("adamw_torch"):
        return torch.optim.AdamW(parameters, fused=optim.endswith("fused"))
    bitsandbytes = pytest.importorskip("bitsandbytes")
    kinds = {"adamw_8bit": "AdamW8bit", "paged_adamw_8bit": "PagedAdamW8bit", "paged_adamw_32bit": "PagedAdamW32bit"}
    optimizer: torch.optim.Optimizer = getattr(bitsandbytes.optim, kinds[optim])(parameters)
    return optimizer


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_planned_state_is_what_the_real_optimizer_keeps(optim: str) -> None:
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    optimizer = real_optimizer(optim, parameters)
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Paged optimizers are not supported on CPU")
        optimizer.step()
    paged_bytes, kept = 0, {}
    for parameter, state in optimizer.state.items():
        for name, tensor in state.items():
            if not isinstance(tensor, torch.Tensor) or (name == "step" and optim != "adamw_torch_fused"):
                continue  # on the host
            if optim.startswith("paged") and tensor.shape == parameter.shape and parameter.numel() >= 1e5:
                paged_bytes += tensor.nbytes  # where CUDA pages; on a CPU it does not
            else:
                kept[tensor.data_ptr()] = allocated_bytes(tensor.nbytes)

    planned = optimizer_bytes(optim, [(p.numel(), p.element_size()) for p in parameters])

    assert planned == OptimizerBytes(vram_bytes=sum(kept.values()), paged_bytes=paged_bytes)


def test_70b_adapters_take_what_is_said_of_them() -> None:
    """r=16 on all linears of Llama-2-70B: 0.83 GB in float32, as much gradient, twice that of moments."""
    sides = [(8192, 8192), (8192, 1024), (8192, 1024), (8192, 8192), (8192, 28672), (8192, 28672), (28672, 8192)]
    tensors = [(16 * side, 4) for pair in sides for side in pair] * 80
    fused, packed, paged = (
        optimizer_bytes(name, tensors) for name in ("adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit")
    )

    assert sum(4 * n for n, _ in tensors) == pytest.approx(0.83e9, rel=0.01)
    assert (fused.vram_bytes, fused.paged_bytes) == (pytest.approx(1.66e9, rel=0.01), 0)
    assert packed.vram_bytes == pytest.approx(fused.vram_bytes / 4, rel=0.04)
    assert paged.vram_bytes < 0.05 * fused.vram_bytes
    assert paged.paged_bytes == pytest.approx(fused.vram_bytes / 4, rel=0.04)


def test_an_optimizer_that_is_not_known_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'lion'.*adamw_torch_fused.*paged_adamw_8bit"):
        optimizer_bytes("lion", [(8, 4)])


@pytest.mark.integration
@pytest.mark.parametrize("optim", ["adamw_8bit", "paged_adamw_32bit"])
def test_streamed_model_trains_with_it_as_the_resident_one(optim: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    # Wide enough for the 8-bit codes: a tensor of 4,096 numbers or more.
    shape: dict[str, Any] = {"num_layers": 2, "hidden_size": 64, "intermediate_size": 256}
    adapter = lora(r=16)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Paged optimizers are not supported on CPU")
        stock = prepare(STOCK, build(**shape), adapter)
        before = trainables(stock)
        expected = train(stock, tmp_path, gradient_checkpointing=True, optim=optim)
        with closing(prepare(WRAP_THEN_PEFT, build(**shape), adapter)) as streamed:
            found = train(streamed, tmp_path, optim=optim)
    assert_same_run(found, expected)
    assert_moved(before, found.trainables)
    dtypes = {value.dtype for state in found.optimizer.values() for name, value in state.items() if name == "state1"}
    assert torch.float32 in dtypes
    assert (torch.uint8 in dtypes) == (optim == "adamw_8bit")
