"""On a real GPU: equal numbers in fp16 and bf16, no race between copies and kernels, bytes and memory as promised."""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import (
    ORDERS,
    STOCK,
    WRAP_THEN_PEFT,
    Trajectory,
    adapt,
    assert_moved,
    assert_same_run,
    assert_same_tensors,
    batch,
    build,
    closing,
    enable_checkpointing,
    examples,
    forward_backward,
    gradients,
    lora,
    prepare,
    settled_bytes,
    train,
    trainables,
)
from torch import nn

from hf_lema import LemaConfig, LemaModelWrapper, StepChoices, get_streamer
from hf_lema.planning.meter import ByteMeter
from hf_lema.runtime.host_memory import HostBuffer
from hf_lema.runtime.numa import near_current_card, node_of_card
from hf_lema.runtime.segments import hold_free, take_segment

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

MIN = LemaConfig(vram_budget="min", choices=StepChoices())
SHAPE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4}
NUM_LAYERS = 6
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
SLEEP_CYCLES = 4_000_000
"""About 2 ms on an H100: far longer than any kernel of these models, far shorter than a test may take."""


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    # Only warned of: generate counts positions with a cumulative sum that has no deterministic form, but whole numbers.
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    gc.collect()


def big(**overrides: Any) -> Any:
    """A model of a megabyte a layer."""
    return build(**({"num_layers": NUM_LAYERS, "dtype": torch.float16} | SHAPE | overrides))


def on_gpu(order: str, model: Any = None, peft_config: Any = None, config: LemaConfig = MIN) -> Any:
    return prepare(order, big() if model is None else model, peft_config, config=config, device="cuda")


def run(order: str, output_dir: Path, dtype: str = "fp16", config: LemaConfig = MIN, **overrides: Any) -> Trajectory:
    model = on_gpu(order, big(dtype=DTYPES[dtype]), config=config)
    with closing(model):
        return train(model, output_dir, **({dtype: True, "max_steps": 6} | overrides))


# ---- the numbers ----


@pytest.mark.parametrize("dtype", DTYPES)
def test_20_steps_are_equal_to_the_resident_model(dtype: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"dtype": dtype, "max_steps": 20, "gradient_accumulation_steps": 2, "num_examples": 32}
    resident = run(STOCK, tmp_path, gradient_checkpointing=True, **settings)
    assert_same_run(run(STOCK, tmp_path, gradient_checkpointing=True, **settings), resident)
    for order in ORDERS:
        for gradient_checkpointing in (True, False):
            streamed = run(order, tmp_path, gradient_checkpointing=gradient_checkpointing, **settings)
            assert_same_run(streamed, resident)


def test_fp16_run_scales_its_gradients_and_trains(tmp_path: Path) -> None:
    with closing(on_gpu(WRAP_THEN_PEFT)) as model:
        before = trainables(model)
        assert {p.dtype for p in before.values()} == {torch.float32}
        found = train(model, tmp_path, fp16=True, max_steps=20)
        assert_moved(before, found.trainables)


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_checkpointing_and_with_sdpa_the_run_lies_within_the_spread_of_stock(
    dtype: str, tmp_path: Path
) -> None:
    torch.use_deterministic_algorithms(False)

    def losses(order: str) -> torch.Tensor:
        model = on_gpu(order, big(dtype=DTYPES[dtype], attn_implementation="sdpa"))
        with closing(model):
            checkpointing = order == STOCK
            return train(model, tmp_path, max_steps=10, gradient_checkpointing=checkpointing, **{dtype: True}).losses

    stock = torch.stack([losses(STOCK) for _ in range(4)])
    spread = (stock.max(0).values - stock.min(0).values).max()
    off = (losses(WRAP_THEN_PEFT) - stock.mean(0)).abs().max()
    assert off <= 2 * spread + 2e-3


@pytest.mark.parametrize("architecture", ["mistral", "qwen3", "gemma2", "phi3", "gpt2", "mixtral"])
def test_architectures_are_equal(architecture: str, tmp_path: Path) -> None:
    # Mixtral's experts add with atomics in some versions; deterministic algorithms say so by an error, not by numbers.
    runs = []
    for order in (STOCK, *ORDERS):
        model = on_gpu(order, build(architecture, dtype=torch.float16), lora(architecture))
        with closing(model):
            runs.append(train(model, tmp_path, fp16=True, max_steps=4, gradient_checkpointing=order == STOCK))
    for streamed in runs[1:]:
        assert_same_run(streamed, runs[0])


@pytest.mark.parametrize("method", ["dora", "pissa", "modules_to_save"])
def test_peft_methods_are_equal(method: str, tmp_path: Path) -> None:
    fields = {
        "dora": {"use_dora": True},
        "pissa": {"init_lora_weights": "pissa"},
        "modules_to_save": {"modules_to_save": ["lm_head", "input_layernorm"]},
    }[method]
    if method == "pissa":
        # The decomposition runs where the weight rests, and differs between CPU and GPU: both are made on the CPU.
        makers = [lambda: adapt(big(), lora(**fields)) for _ in range(2)]
        resident = makers[0]().to("cuda")
        streamed = LemaModelWrapper.wrap(makers[1](), MIN, device="cuda").to("cuda")
    else:
        # The saved modules train in the model's dtype; GradScaler refuses fp16, so they are in bf16.
        dtype = torch.bfloat16 if method == "modules_to_save" else torch.float16
        resident = on_gpu(STOCK, big(dtype=dtype), lora(**fields))
        streamed = on_gpu(WRAP_THEN_PEFT, big(dtype=dtype), lora(**fields))
    precision = {"bf16" if method == "modules_to_save" else "fp16": True}
    with closing(streamed):
        expected = train(resident, tmp_path, **precision, gradient_checkpointing=True)
        assert_same_run(train(streamed, tmp_path, **precision), expected)


def test_generate_and_evaluation_between_steps_are_equal(tmp_path: Path) -> None:
    results = []
    for order in (STOCK, WRAP_THEN_PEFT):
        model = on_gpu(order)
        with closing(model):
            first = train(model, tmp_path, fp16=True, gradient_checkpointing=order == STOCK)
            prompt = batch(1, device="cuda")["input_ids"][:, :6]
            tokens = model.eval().generate(input_ids=prompt, max_new_tokens=8, do_sample=False)
            with torch.no_grad():
                logits = model(**batch(device="cuda")).logits
            second = train(model.train(), tmp_path, fp16=True, gradient_checkpointing=order == STOCK)
            results.append((first, tokens, logits, second))
    assert_same_run(results[1][0], results[0][0])
    assert torch.equal(results[1][1], results[0][1])
    assert torch.equal(results[1][2], results[0][2])
    assert_same_run(results[1][3], results[0][3])


def test_merge_between_steps_and_at_the_end_is_equal(tmp_path: Path) -> None:
    results = []
    for order in (STOCK, WRAP_THEN_PEFT):
        model = on_gpu(order)
        with closing(model):
            train(model, tmp_path, fp16=True, gradient_checkpointing=order == STOCK)
            model.merge_adapter()
            with torch.no_grad():
                merged = model.eval()(**batch(device="cuda")).logits
            model.unmerge_adapter()
            second = train(model.train(), tmp_path, fp16=True, gradient_checkpointing=order == STOCK)
            if order != STOCK:
                layer = model.get_base_model().model.layers[0]
                assert layer.self_attn.q_proj.base_layer.weight.device.type == "cpu"
            base = model.merge_and_unload()
            results.append((merged, second, {n: t.cpu().clone() for n, t in base.state_dict().items()}))
    assert torch.equal(results[1][0], results[0][0])
    assert_same_run(results[1][1], results[0][1])
    assert_same_tensors(results[1][2], results[0][2])


# ---- tiers ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tier", ["ram", "disk"])
def test_loaded_model_is_equal_on_both_tiers(tier: str, dtype: str, tmp_path: Path) -> None:
    big(dtype=DTYPES[dtype]).save_pretrained(tmp_path / "saved")
    plain = type(big()).from_pretrained(tmp_path / "saved", dtype=DTYPES[dtype], attn_implementation="eager")
    resident = adapt(plain.to("cuda"))
    expected = train(resident, tmp_path, max_steps=6, gradient_checkpointing=True, **{dtype: True})
    model = LemaModelWrapper.from_pretrained(
        str(tmp_path / "saved"),
        LemaConfig(vram_budget="min", choices=StepChoices(), ram_budget="min" if tier == "disk" else "auto"),
        dtype=DTYPES[dtype],
        device="cuda",
        attn_implementation="eager",
    )
    with closing(adapt(model)) as streamed:
        streamer = get_streamer(streamed)
        assert streamer.host_store.tier == tier
        assert_same_run(train(streamed, tmp_path, max_steps=6, **{dtype: True}), expected)
        assert (streamer.stats().disk_bytes > 0) == (tier == "disk")
        assert streamer.host_store.pinned_bytes > 0
    assert streamer.host_store.pinned_bytes == 0


@pytest.mark.parametrize("refused", ["the slab", "everything"])
def test_refused_page_lock_warns_once_and_changes_no_number(
    refused: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(STOCK, tmp_path, gradient_checkpointing=True)
    cudart = torch.cuda.cudart()
    calls = []

    def register(pointer: int, nbytes: int, flags: int) -> Any:
        calls.append(nbytes)
        refuse = refused == "everything" or len(calls) == 1
        # Flags that do not exist: CUDA itself refuses, and reports it once more at the next launch.
        return cudart.cudaHostRegister(pointer, nbytes, 0xFFFF if refuse else flags)

    monkeypatch.setattr(
        torch.cuda,
        "cudart",
        lambda: SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=cudart.cudaHostUnregister),
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = on_gpu(WRAP_THEN_PEFT)
    with closing(model):
        said = [w for w in caught if "page-locking" in str(w.message)]
        assert len(said) == 1 if refused == "the slab" else 1 <= len(said) <= 2  # the ring is refused as well
        assert_same_run(train(model, tmp_path, fp16=True, max_steps=6), expected)
        pinned = get_streamer(model).host_store.pinned_bytes
        assert (pinned > 0) == (refused == "the slab")


# ---- bytes and memory ----


@pytest.mark.parametrize("num_slots", [2, 3])
@pytest.mark.parametrize("tier", ["ram", "disk"])
def test_bytes_moved_are_those_that_the_schedule_predicts(tier: str, num_slots: int, tmp_path: Path) -> None:
    big(num_layers=8).save_pretrained(tmp_path / "saved")
    config = LemaConfig(
        vram_budget="min", choices=StepChoices(), num_slots=num_slots, ram_budget="min" if tier == "disk" else "auto"
    )
    model = LemaModelWrapper.from_pretrained(
        str(tmp_path / "saved"), config, dtype=torch.float16, device="cuda", attn_implementation="eager"
    )
    with closing(adapt(model)) as streamed:
        streamer = get_streamer(streamed)
        assert streamer.transfers_per_step() == 2 * 8 - 2 * num_slots
        train(streamed, tmp_path, fp16=True, max_steps=1)
        begin = settled_bytes(streamed)
        train(streamed, tmp_path, fp16=True, max_steps=3, gradient_accumulation_steps=2)
        moved = settled_bytes(streamed) - begin
        assert moved == 3 * 2 * streamer.transfers_per_step() * streamer.layer_bytes
        demands = streamer.stats().num_demand_loads
        train(streamed, tmp_path, fp16=True, max_steps=3)
        assert streamer.stats().num_demand_loads == demands


def allocated_bytes() -> int:
    """Device memory in use, without what cuBLAS keeps for itself."""
    gc.collect()
    torch.cuda.synchronize()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()


def test_device_holds_what_is_not_streamed_and_the_slots_and_gives_it_all_back(tmp_path: Path) -> None:
    before = allocated_bytes()
    model = big(num_layers=12)
    state = model.state_dict()
    other_bytes = sum(t.numel() * t.element_size() for n, t in state.items() if ".layers." not in n)
    del state
    LemaModelWrapper.wrap(model, MIN, device="cuda")
    streamer = get_streamer(model)
    slots_bytes = streamer.num_slots * streamer.layer_bytes
    assert slots_bytes <= allocated_bytes() - before <= other_bytes + slots_bytes + 2**17
    peft_model = adapt(model)
    train(peft_model, tmp_path, fp16=True)
    with_slots = allocated_bytes()
    streamer.close()
    assert with_slots - allocated_bytes() >= slots_bytes
    del model, peft_model, streamer
    assert allocated_bytes() - before <= 2**20


def test_peak_is_below_that_of_the_resident_model_by_the_layers_that_are_not_there(tmp_path: Path) -> None:
    shape = {"num_layers": 12, "hidden_size": 1024, "intermediate_size": 2048}
    peaks = {}
    for order in (STOCK, WRAP_THEN_PEFT):
        gc.collect()
        torch.cuda.empty_cache()
        base = torch.cuda.memory_allocated()
        model = on_gpu(order, big(**shape))
        with closing(model):
            torch.cuda.reset_peak_memory_stats()
            train(model, tmp_path, fp16=True, gradient_checkpointing=order == STOCK)
            peaks[order] = torch.cuda.max_memory_allocated() - base
            if order != STOCK:
                streamer = get_streamer(model)
                saved_bytes = (12 - streamer.num_slots) * streamer.layer_bytes
        del model
    assert peaks[STOCK] - peaks[WRAP_THEN_PEFT] >= 0.95 * saved_bytes


def test_kept_layers_change_no_number_take_the_memory_of_their_graphs_and_start_fewer_kernels(tmp_path: Path) -> None:
    shape = {"hidden_size": 1024, "intermediate_size": 2752, "num_attention_heads": 8, "num_key_value_heads": 8}
    rows = batch(4, 64, device="cuda")

    def forward(model: Any) -> torch.Tensor:
        torch.manual_seed(3)
        with torch.autocast("cuda", dtype=torch.float16):
            return model(**rows).loss

    def held_bytes(model: Any) -> int:
        """What a forward leaves on the device for its backward."""
        forward(model).backward()  # of a kept layer, the first visit is compared with a recompute
        model.zero_grad()
        before = torch.cuda.memory_allocated()
        loss = forward(model)
        held = torch.cuda.memory_allocated() - before
        loss.backward()
        model.zero_grad()
        return held

    def num_kernels(model: Any) -> tuple[int, int]:
        meter = ByteMeter(lambda _: False)
        with meter.measured() as forwards:
            loss = forward(model)
        with meter.measured() as backwards:
            loss.backward()
        model.zero_grad()
        counts = [sum(kernel.count for kernel in part[0].work) for part in (forwards, backwards)]
        return counts[0], counts[1]

    with closing(on_gpu(STOCK, big(**shape))) as stock:
        whole_bytes = held_bytes(stock)
    runs, held, kernels = {}, {}, {}
    for num_kept in (0, 2, NUM_LAYERS):
        config = LemaConfig(choices=StepChoices(kept_layers=tuple(range(NUM_LAYERS))[NUM_LAYERS - num_kept :]))
        with closing(on_gpu(WRAP_THEN_PEFT, big(**shape), config=config)) as model, warnings.catch_warnings():
            warnings.filterwarnings("error", message=".* is recomputed instead of kept")
            held[num_kept] = held_bytes(model)
            kernels[num_kept] = num_kernels(model)
        with closing(on_gpu(WRAP_THEN_PEFT, big(**shape), config=config)) as model:
            runs[num_kept] = train(model, tmp_path, fp16=True, max_steps=8, gradient_accumulation_steps=2)
    assert_same_run(runs[2], runs[0])
    assert_same_run(runs[NUM_LAYERS], runs[0])
    graph_bytes = (held[NUM_LAYERS] - held[0]) / NUM_LAYERS
    assert graph_bytes > 10 * rows["input_ids"].numel() * 1024 * 2  # far more than the hidden states
    # The first layer's graph is smaller: nothing leads to its input.
    assert 2 * graph_bytes <= held[2] - held[0] <= 2.3 * graph_bytes
    assert 0.8 * whole_bytes <= held[NUM_LAYERS] <= 1.1 * whole_bytes
    assert abs(kernels[2][0] - kernels[0][0]) <= 4
    saved = kernels[0][1] - kernels[2][1]
    assert saved >= 2 * 0.8 * kernels[0][0] / (NUM_LAYERS + 1)


def test_what_is_held_is_given_to_nobody_else() -> None:
    device, mib = torch.device("cuda", torch.cuda.current_device()), 2**20
    allocated_bytes()
    torch.cuda.empty_cache()
    take_segment(64 * mib, device)
    reserved_bytes = torch.cuda.memory_reserved(device)
    held = hold_free(16 * mib, device)
    assert 64 * mib in [tensor.nbytes for tensor in held]
    assert torch.cuda.memory_reserved(device) == reserved_bytes
    other = torch.empty(16 * mib, dtype=torch.uint8, device=device)
    assert torch.cuda.memory_reserved(device) == reserved_bytes + other.nbytes
    del held
    again = torch.empty(48 * mib, dtype=torch.uint8, device=device)
    assert torch.cuda.memory_reserved(device) == reserved_bytes + other.nbytes
    del again


@pytest.mark.parametrize("budget", ["auto", "five layers"])
def test_budget_makes_layers_resident_and_changes_no_number(budget: str, tmp_path: Path) -> None:
    shape = {"num_layers": 12, "hidden_size": 1024, "intermediate_size": 2048}
    settings: dict[str, Any] = {"fp16": True, "max_steps": 8, "num_examples": 32}
    expected = train(on_gpu(STOCK, big(**shape)), tmp_path, gradient_checkpointing=True, **settings)
    allocated_bytes()
    torch.cuda.reset_peak_memory_stats()
    with closing(on_gpu(WRAP_THEN_PEFT, big(**shape))) as least:
        assert_same_run(train(least, tmp_path, **settings), expected)
        assert get_streamer(least).num_resident == 0
        room_bytes = torch.cuda.max_memory_reserved() + 5 * get_streamer(least).layer_bytes + 2**22
    del least
    allocated_bytes()
    config = LemaConfig(vram_budget="auto" if budget == "auto" else room_bytes)
    with closing(on_gpu(WRAP_THEN_PEFT, big(**shape), config=config)) as model:
        torch.cuda.reset_peak_memory_stats()
        assert_same_run(train(model, tmp_path, **settings), expected)
        streamer = get_streamer(model)
        if budget == "auto":
            assert streamer.num_streamed == 0
        else:
            assert 0 < streamer.num_resident < 12
            assert torch.cuda.max_memory_allocated() <= room_bytes
        # A longer batch than ever: layers go back, and the numbers stay right.
        long = batch(8, 64, device="cuda")
        again = adapt(big(**shape)).to("cuda").eval()
        again.load_state_dict(model.state_dict())
        with torch.autocast("cuda", dtype=torch.float16):
            assert torch.equal(model.eval()(**long).loss, again(**long).loss)


def test_streamed_weights_rest_on_the_host_and_everything_else_is_on_the_device() -> None:
    with closing(on_gpu(WRAP_THEN_PEFT)) as model:
        model.to("cuda").cuda()
        for name, parameter in model.named_parameters():
            streamed = ".layers." in name and ".lora_" not in name
            assert parameter.device.type == ("cpu" if streamed else "cuda"), name
        assert all(buffer.device.type == "cuda" for buffer in model.buffers())


def test_adapter_added_after_the_optimizer_of_another_trains_on_the_device() -> None:
    model = big()
    with closing(LemaModelWrapper.wrap(model, MIN, device="cuda")):
        peft_model = adapt(model)  # on the host, beside its base; nobody calls .to("cuda")
        optimizer = torch.optim.AdamW([p for p in peft_model.parameters() if p.requires_grad], lr=1e-2)
        before = trainables(peft_model)
        for step in range(2):
            with torch.autocast("cuda", dtype=torch.float16):
                loss = peft_model(**batch(seed=step, device="cuda")).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert all(p.device.type == "cuda" for p in peft_model.parameters() if p.requires_grad)
        assert_moved(before, trainables(peft_model))


# ---- races between the copy stream and the compute stream ----


def stretch_copies(model: nn.Module, before: int, after: int) -> None:
    """Poisons a slot when its fill begins, and makes the copy late at both ends: whoever reads too early reads NaN."""
    store = get_streamer(model).host_store
    read_into = store.read_into

    def late(layer_idx: int, out: torch.Tensor) -> None:
        out.fill_(255)
        torch.cuda._sleep(before)
        read_into(layer_idx, out)
        torch.cuda._sleep(after)

    store.read_into = late


def stretch_compute(model: nn.Module) -> None:
    """Makes each layer's kernels late, so that a slot is still being read when the host has long left the visit."""

    def hook(*args: Any) -> None:
        torch.cuda._sleep(SLEEP_CYCLES)

    for layer in model.get_base_model().model.layers:
        layer.mlp.gate_proj.register_forward_pre_hook(hook)


def three_steps(model: nn.Module) -> list[torch.Tensor]:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for step in range(3):
        optimizer.zero_grad()
        torch.manual_seed(step)
        with torch.autocast("cuda", dtype=torch.float16):
            loss = model(**batch(seed=step, device="cuda")).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        with torch.no_grad(), torch.autocast("cuda", dtype=torch.float16):
            losses.append(model(**batch(seed=9, device="cuda")).loss)
    return [*losses, *trainables(model).values()]


@pytest.fixture(scope="module")
def quiet_steps() -> list[torch.Tensor]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    resident = on_gpu(STOCK)
    enable_checkpointing(resident)
    return three_steps(resident)


STRETCHES: dict[str, Any] = {
    "copies_late": lambda model: stretch_copies(model, SLEEP_CYCLES, 0),
    "events_late": lambda model: stretch_copies(model, 0, SLEEP_CYCLES),
    "kernels_late": lambda model: (stretch_copies(model, 0, 0), stretch_compute(model)),
    "both_late": lambda model: (stretch_copies(model, SLEEP_CYCLES // 3, 0), stretch_compute(model)),
}


@pytest.mark.parametrize("stretch", STRETCHES)
@pytest.mark.parametrize("pinned", [True, False])
def test_no_kernel_reads_a_slot_before_it_is_full_or_after_it_is_given_back(
    stretch: str, pinned: bool, quiet_steps: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not pinned:
        monkeypatch.setattr("hf_lema.runtime.host_memory.HostBuffer.page_lock", lambda self: False)
    with closing(on_gpu(WRAP_THEN_PEFT)) as model:
        STRETCHES[stretch](model)
        assert_same_tensors(dict(enumerate(three_steps(model))), dict(enumerate(quiet_steps)))


@pytest.mark.parametrize("ignored", ["ready_event", "released_event"])
def test_the_races_above_would_be_seen_without_the_events(ignored: str, quiet_steps: list[torch.Tensor]) -> None:
    with closing(on_gpu(WRAP_THEN_PEFT)) as model:
        STRETCHES["copies_late" if ignored == "ready_event" else "kernels_late"](model)
        for slot in get_streamer(model)._prefetcher._pool.slots:
            setattr(slot, ignored, SimpleNamespace(record=lambda: None, wait=lambda: None, synchronize=lambda: None))
        found = three_steps(model)
        torch.cuda.synchronize()
        assert not torch.equal(found[0], quiet_steps[0])


def test_races_on_the_disk_tier(tmp_path: Path) -> None:
    big().save_pretrained(tmp_path)
    plain = adapt(type(big()).from_pretrained(tmp_path, dtype=torch.float16, attn_implementation="eager").to("cuda"))
    enable_checkpointing(plain)
    expected = three_steps(plain.train())
    model = LemaModelWrapper.from_pretrained(
        str(tmp_path),
        LemaConfig(vram_budget="min", choices=StepChoices(), ram_budget="min"),
        dtype=torch.float16,
        device="cuda",
        attn_implementation="eager",
    )
    with closing(adapt(model)) as streamed:
        STRETCHES["both_late"](streamed)
        assert_same_tensors(dict(enumerate(three_steps(streamed.train()))), dict(enumerate(expected)))


def test_weights_changed_between_steps_are_seen_though_copies_are_late() -> None:
    def use(model: nn.Module) -> list[torch.Tensor]:
        seen = [forward_backward(model)]
        with torch.no_grad():
            for layer in model.get_base_model().model.layers:
                layer.mlp.down_proj.base_layer.weight.mul_(1.5)
        return [*seen, forward_backward(model)]

    resident = on_gpu(STOCK, big(dtype=torch.float32))
    enable_checkpointing(resident)
    expected = use(resident)
    with closing(on_gpu(WRAP_THEN_PEFT, big(dtype=torch.float32))) as model:
        STRETCHES["copies_late"](model)
        assert_same_tensors(dict(enumerate(use(model))), dict(enumerate(expected)))
        assert_same_tensors(gradients(model), gradients(resident))


def test_training_on_a_stream_of_the_users_own_is_equal(quiet_steps: list[torch.Tensor]) -> None:
    with closing(on_gpu(WRAP_THEN_PEFT)) as model:
        STRETCHES["both_late"](model)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            found = three_steps(model)
        stream.synchronize()
        assert_same_tensors(dict(enumerate(found)), dict(enumerate(quiet_steps)))


def test_moving_between_streams_from_step_to_step_is_equal() -> None:
    resident = on_gpu(STOCK, big(dtype=torch.float32))
    enable_checkpointing(resident)
    with closing(on_gpu(WRAP_THEN_PEFT, big(dtype=torch.float32))) as model:
        STRETCHES["kernels_late"](model)
        for step in range(4):
            stream = torch.cuda.Stream() if step % 2 else torch.cuda.current_stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                found = forward_backward(model, seed=step)
            torch.cuda.current_stream().wait_stream(stream)
            assert torch.equal(found, forward_backward(resident, seed=step))
        assert_same_tensors(gradients(model), gradients(resident))


def test_an_error_in_a_backward_leaves_training_right() -> None:
    resident = on_gpu(STOCK, big(dtype=torch.float32))
    enable_checkpointing(resident)
    expected = forward_backward(resident)
    with closing(on_gpu(WRAP_THEN_PEFT, big(dtype=torch.float32))) as model:
        calls = [0]

        def hook(*args: Any) -> None:
            calls[0] += 1
            if calls[0] == 2:
                raise ZeroDivisionError("stopped")

        handle = model.get_base_model().model.layers[3].mlp.act_fn.register_forward_hook(hook)
        with pytest.raises(ZeroDivisionError):
            forward_backward(model)
        handle.remove()
        model.zero_grad()
        assert torch.equal(forward_backward(model), expected)
        assert_same_tensors(gradients(model), gradients(resident))


def test_close_while_copies_run_waits_for_them() -> None:
    model = on_gpu(WRAP_THEN_PEFT)
    stretch_copies(model, 20 * SLEEP_CYCLES, 0)
    loss = forward_backward(model)
    get_streamer(model).close()
    torch.cuda.synchronize()
    assert torch.isfinite(loss)
    # The memory of the slots is free now: writing over it must not meet a late copy.
    rows = torch.full((2**22,), 7, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    assert bool((rows == 7).all())


def test_data_workers_beside_a_gpu_model(tmp_path: Path) -> None:
    expected = run(STOCK, tmp_path, gradient_checkpointing=True, dataloader_num_workers=2)
    assert_same_run(run(WRAP_THEN_PEFT, tmp_path, dataloader_num_workers=2), expected)
    assert len(examples(4)) == 4


# ---- one copy for several processes ----


def test_a_shared_copy_is_read_by_the_card_after_the_kernel_stopped_writes_to_it() -> None:
    num_bytes = 64 * 2**20 + 3
    first = HostBuffer(num_bytes, is_shared=True)
    first.tensor.copy_(torch.arange(num_bytes) % 251)
    second = HostBuffer(num_bytes, of=first.take_descriptor())
    assert second.page_lock()
    second.make_read_only()
    on_card = torch.empty(num_bytes, dtype=torch.uint8, device="cuda")
    for _ in range(3):
        on_card.zero_()
        on_card.copy_(second.tensor, non_blocking=True)
        assert torch.equal(on_card.cpu(), first.tensor)
    second.close()
    first.close()


def test_the_node_of_a_card_is_known_or_said_not_to_be() -> None:
    node = node_of_card(torch.device("cuda", 0))
    assert node is None or node >= 0
    before = os.sched_getaffinity(0)
    with near_current_card():
        assert os.sched_getaffinity(0) <= before
    assert os.sched_getaffinity(0) == before
