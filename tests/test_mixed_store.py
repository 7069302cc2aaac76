"""Some layers in RAM and the others in their files: the same bytes, the same training, within the stated budget."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
import torch
from models import (
    NUM_LAYERS,
    STOCK,
    adapt,
    assert_same_run,
    assert_same_tensors,
    build,
    closing,
    lora,
    prepare,
    train,
)
from test_host_store import Checkpoint, write_checkpoint

from hf_lema import LemaConfig, LemaModelWrapper, get_streamer
from hf_lema.model.loading import build_skeleton
from hf_lema.model.stores import StoreMaker, slab_of
from hf_lema.runtime.host_store import DiskStore, RamStore, ring_bytes
from hf_lema.runtime.local_ranks import Offer
from hf_lema.runtime.mixed_store import MixedStore, layers_in_ram

CPU = torch.device("cpu")


def mixed_store(saved: Checkpoint, in_ram: tuple[int, ...]) -> MixedStore:
    ram = RamStore({i: saved.layouts[i] for i in in_ram}, CPU)
    for layer_idx in in_ram:
        for name, view in ram.host_views(layer_idx).items():
            view.copy_(saved.tensors[layer_idx][name])
    ram.seal()
    left = {i: layout for i, layout in saved.layouts.items() if i not in in_ram}
    return MixedStore(ram, DiskStore(left, saved.spans, CPU))


def test_every_layer_is_read_from_where_it_is(tmp_path: Path) -> None:
    saved = write_checkpoint(tmp_path, seed=3, num_layers=5)
    store = mixed_store(saved, in_ram=(3, 0, 4))

    assert (store.tier, tuple(store.layouts), store.file_layers) == ("mixed", (0, 1, 2, 3, 4), (1, 2))
    assert store.held_bytes == sum(saved.layouts[i].nbytes for i in (0, 3, 4))
    for layer_idx, layout in saved.layouts.items():
        out = torch.zeros(layout.nbytes, dtype=torch.uint8)
        before_bytes = store.disk_bytes
        store.read_into(layer_idx, out)
        assert saved.is_in(out, layer_idx)
        assert store.disk_bytes - before_bytes == (saved.num_bytes(layer_idx) if layer_idx in (1, 2) else 0)
    store.close()
    store.close()


@pytest.mark.parametrize("layer_idx", [0, 1], ids=["in RAM", "in a file"])
def test_what_is_written_to_a_weight_at_rest_is_read_from_then_on(layer_idx: int, tmp_path: Path) -> None:
    saved = write_checkpoint(tmp_path, seed=5, num_layers=2)
    store = mixed_store(saved, in_ram=(0,))
    name, view = max(store.host_views(layer_idx).items(), key=lambda item: item[1].nbytes)
    view.zero_()
    store.mark_changed(layer_idx)
    out = torch.ones(saved.layouts[layer_idx].nbytes, dtype=torch.uint8)
    store.read_into(layer_idx, out)

    assert not saved.layouts[layer_idx].views(out)[name].any()
    store.close()


def test_as_many_layers_as_fit_are_in_ram_and_those_in_files_lie_apart() -> None:
    layer_bytes = dict.fromkeys(range(40), 10)

    assert layers_in_ram(layer_bytes, 400) == tuple(range(40))
    assert layers_in_ram(layer_bytes, 9) == ()
    assert layers_in_ram({}, 9) == ()
    left = [i for i in range(40) if i not in layers_in_ram(layer_bytes, 369)]
    assert left == [5, 15, 25, 35]


def test_layers_in_ram_never_take_more_than_the_budget() -> None:
    rng = random.Random(1)
    for _ in range(300):
        layer_bytes = {i: rng.randint(1, 30) for i in range(rng.randint(1, 12))}
        budget_bytes = rng.randint(0, 200)
        kept = layers_in_ram(layer_bytes, budget_bytes)
        assert sum(layer_bytes[i] for i in kept) <= budget_bytes
        assert len(kept) == len(layer_bytes) or sum(layer_bytes.values()) > budget_bytes
        assert kept == layers_in_ram(layer_bytes, sum(layer_bytes[i] for i in kept)), "another rank finds the same"


@pytest.mark.parametrize("budget", [0, 10**6, 10**10])
def test_ring_holds_two_windows_at_least_and_two_layers_at_most(budget: int) -> None:
    layer_bytes = 400 * 2**20
    assert 64 * 2**20 <= ring_bytes(layer_bytes, budget) <= 2 * (layer_bytes + 32 * 2**20)


# Models


@pytest.mark.integration
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_model_trains_from_both_as_the_resident_one(architecture: str, tmp_path: Path) -> None:
    build(architecture).save_pretrained(tmp_path / "saved")
    layer_bytes = 4 * sum(p.numel() for name, p in build(architecture).named_parameters() if ".0." in name)
    config = LemaConfig(ram_budget=int(layer_bytes * (NUM_LAYERS - 0.5)))
    model = LemaModelWrapper.from_pretrained(str(tmp_path / "saved"), config, device="cpu", attn_implementation="eager")
    assert_same_tensors(model.state_dict(), build(architecture).state_dict())
    with closing(adapt(model, lora(architecture))) as streamed:
        streamer = get_streamer(streamed)
        found = train(streamed, tmp_path)
        store, stats = streamer.host_store, streamer.stats()
        assert store.tier == "mixed"
        assert 0 < len(store.file_layers) < NUM_LAYERS
        assert 0 < stats.disk_bytes < stats.h2d_bytes
    resident = type(build(architecture)).from_pretrained(tmp_path / "saved", attn_implementation="eager")
    assert_same_run(found, train(prepare(STOCK, resident, lora(architecture)), tmp_path, gradient_checkpointing=True))


@pytest.mark.integration
def test_another_process_maps_what_the_first_has_filled_and_reads_the_rest_itself(tmp_path: Path) -> None:
    build().save_pretrained(tmp_path)
    skeleton = build_skeleton(str(tmp_path), None, CPU)
    layouts = {layout.layer_idx: layout for layout in skeleton.source.layouts}
    config = LemaConfig(ram_budget=sum(layout.nbytes for layout in layouts.values()) - 1)
    with skeleton.source:
        maker = StoreMaker(layouts, config, CPU, skeleton.source)
        first = maker.make(is_shared=True)
        slab = slab_of(first)
        assert slab is not None
        second = maker.accept(Offer(tier=first.tier, descriptor=slab.take_descriptor()))
    assert first.file_layers == second.file_layers == (NUM_LAYERS // 2,)
    kept = next(iter(slab.layouts))
    name, view = next(iter(first.host_views(kept).items()))
    view.add_(1.0)
    assert torch.equal(second.host_views(kept)[name], view), "one memory"
    for layer_idx, layout in layouts.items():
        buffers = [torch.zeros(layout.nbytes, dtype=torch.uint8) for _ in range(2)]
        for store, buffer in zip((first, second), buffers, strict=True):
            store.read_into(layer_idx, buffer)
        assert torch.equal(*buffers)
    open_before = len(os.listdir("/proc/self/fd"))
    first.close()
    second.close()
    assert len(os.listdir("/proc/self/fd")) < open_before
