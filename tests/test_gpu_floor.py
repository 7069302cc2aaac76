"""On a real GPU: what leaves device memory to save it comes back unchanged, and in time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from models import (
    STOCK,
    WRAP_THEN_PEFT,
    assert_same_tensors,
    build,
    closing,
    forward_backward,
    gradients,
    lora,
    prepare,
)

from hf_lema import LemaConfig, get_streamer
from hf_lema.choices import StepChoices
from hf_lema.layer.boundaries import Boundaries
from hf_lema.runtime.host_memory import HostBuffer, device_view, tensor_over
from hf_lema.wrapper import apply_choices

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

CUDA = torch.device("cuda")
SHAPE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4}
SLEEP_CYCLES = 4_000_000


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def activation(seed: int, num: int = 1 << 20) -> torch.Tensor:
    return torch.randn(num, generator=torch.Generator(CUDA).manual_seed(seed), device=CUDA, dtype=torch.float16)


@pytest.mark.parametrize("slow", ["nothing", "the way out", "the way back", "computing"])
def test_kept_tensors_come_back_although_their_memory_was_used_again(slow: str) -> None:
    boundaries = Boundaries(CUDA, num_layers=6)
    kept = []
    for i in range(6):
        if slow == "the way out":
            with boundaries._outward.use():
                torch.cuda._sleep(SLEEP_CYCLES)
        hidden = activation(i)
        if slow == "computing":
            torch.cuda._sleep(SLEEP_CYCLES)
        kept.append(boundaries.keep(hidden))
        del hidden
        if i:
            # The memory of the tensor before the last is free by now, and taken again at once.
            torch.full((1 << 20,), torch.nan, device=CUDA, dtype=torch.float16)
    for i in reversed(range(6)):
        if slow == "the way back":
            with boundaries._homeward.use():
                torch.cuda._sleep(SLEEP_CYCLES)
        brought = boundaries.bring(kept[i])
        if slow == "computing":
            torch.cuda._sleep(SLEEP_CYCLES)
        assert torch.equal(brought.clone(), activation(i))
    assert boundaries.pinned_bytes == 6 * 2 * (1 << 20)
    boundaries.close()
    assert boundaries.pinned_bytes == 0


def test_the_way_out_and_the_way_back_run_beside_computing() -> None:
    """A step that keeps and brings takes no longer than the longer of copies and kernels, with some room."""
    boundaries = Boundaries(CUDA, num_layers=8)
    hidden = [activation(i, 1 << 25) for i in range(2)]  # 64 MiB: about 1.3 ms of bus

    def run(is_moved: bool) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        begin.record()
        kept = []
        for i in range(8):
            if is_moved:
                kept.append(boundaries.keep(hidden[i % 2]))
            torch.cuda._sleep(SLEEP_CYCLES * 2)
        for host in reversed(kept or [None] * 8):
            if is_moved:
                boundaries.bring(host)
            torch.cuda._sleep(SLEEP_CYCLES * 2)
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end)

    run(True)
    assert run(True) < 1.15 * run(False)
    boundaries.close()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_mapped_weight_gathers_and_multiplies_as_one_on_the_device(dtype: torch.dtype) -> None:
    weight = torch.randn(1000, 64, dtype=dtype)
    buffer = HostBuffer(weight.nbytes)
    view = tensor_over(buffer.memory, 0, (1000, 64), dtype)
    view.copy_(weight)
    assert buffer.page_lock()
    before = torch.cuda.memory_allocated()
    mapped = device_view(view, CUDA)
    assert torch.cuda.memory_allocated() == before
    assert mapped.device.type == "cuda"
    ids = torch.randint(0, 1000, (8, 16), device=CUDA)
    on_device = weight.to(CUDA)
    assert torch.equal(torch.nn.functional.embedding(ids, mapped), torch.nn.functional.embedding(ids, on_device))
    assert torch.equal(mapped.cpu(), weight)
    hidden = torch.randn(8, 64, device=CUDA, dtype=dtype)
    assert torch.equal(torch.nn.functional.linear(hidden, mapped), torch.nn.functional.linear(hidden, on_device))
    torch.cuda.synchronize()
    del mapped
    buffer.close()


def model(order: str, dtype: torch.dtype = torch.float16, **overrides: Any) -> Any:
    base = build(num_layers=6, dtype=dtype, **(SHAPE | overrides))
    config = LemaConfig(vram_budget="min", choices=StepChoices())
    return prepare(order, base, lora("llama", lora_dropout=0.0), config=config, device="cuda")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_boundaries_in_ram_are_equal_to_the_resident_model(dtype: torch.dtype) -> None:
    results = []
    for order in (STOCK, WRAP_THEN_PEFT):
        with closing(model(order, dtype)) as peft:
            if order != STOCK:
                apply_choices(peft, StepChoices(boundaries_in_ram=True))
            for _ in range(3):
                peft.zero_grad()
                loss = forward_backward(peft)
            results.append(({"loss": loss}, gradients(peft)))
    assert_same_tensors(results[1][0], results[0][0])
    assert_same_tensors(results[1][1], results[0][1])


@pytest.mark.parametrize("tied", [True, False])
def test_every_saving_at_once_differs_by_rounding_alone(tied: bool) -> None:
    saving = StepChoices(micro_batch_size=1, tile_tokens=8, boundaries_in_ram=True, outside_in_ram=True)
    results = []
    for choices in (StepChoices(), saving):
        with closing(model(WRAP_THEN_PEFT, torch.float32, tie_word_embeddings=tied)) as peft:
            apply_choices(peft, choices)
            loss = forward_backward(peft)
            results.append((loss, gradients(peft)))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-5, atol=0.0)
    for name, expected in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], expected, rtol=1e-3, atol=1e-6, msg=name)


def test_savings_take_their_memory_off_the_device_and_give_it_back() -> None:
    with closing(model(WRAP_THEN_PEFT, vocab_size=20_000)) as peft:
        apply_choices(peft, StepChoices())
        forward_backward(peft)
        peft.zero_grad()
        before = torch.cuda.memory_allocated()
        apply_choices(peft, StepChoices(outside_in_ram=True))
        weight_bytes = 20_000 * 256 * 2
        assert torch.cuda.memory_allocated() <= before - 2 * weight_bytes
        forward_backward(peft)
        apply_choices(peft, StepChoices())
        peft.zero_grad()
        assert torch.cuda.memory_allocated() <= before + (1 << 16)
        assert get_streamer(peft).stats().h2d_bytes > 0
