"""Both tiers give the bytes that they were given, from memory, from files, through the ring, and after changes."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from fake_store import CPU, bounded, in_thread

from hf_lema.files.file_set import FileSet, ReadSpan, merge_spans
from hf_lema.files.layout import ALIGNMENT, LayerLayout, make_layout
from hf_lema.runtime import host_memory, host_store
from hf_lema.runtime.host_memory import HostBuffer
from hf_lema.runtime.host_store import DiskStore, HostStore, RamStore, StagingRing, cut_spans
from hf_lema.runtime.prefetcher import Prefetcher
from hf_lema.runtime.schedule import Direction
from hf_lema.runtime.slots import SlotPool
from hf_lema.runtime.streamer import LayerStreamer

CUDA = torch.device("cuda", 0)
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.float64, torch.bool]


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's bytes."""
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def random_tensor(rng: random.Random, generator: torch.Generator) -> torch.Tensor:
    dtype = rng.choice(DTYPES)
    shape = [rng.randint(0 if rng.random() < 0.05 else 1, 13) for _ in range(rng.randint(0, 3))]
    numel = torch.Size(shape).numel()
    data = torch.randint(0, 2 if dtype == torch.bool else 256, (numel * dtype.itemsize,), generator=generator)
    return data.to(torch.uint8).view(dtype).view(shape)


@dataclass
class Checkpoint:
    """Random layers, written to a few files at places that suit no dtype."""

    layouts: dict[int, LayerLayout]
    spans: dict[int, tuple[ReadSpan, ...]]
    tensors: dict[int, dict[str, torch.Tensor]]
    paths: list[Path]

    def is_in(self, buffer: torch.Tensor, layer_idx: int) -> bool:
        views = self.layouts[layer_idx].views(buffer)
        return all(torch.equal(raw(views[n]), raw(t)) for n, t in self.tensors[layer_idx].items())

    def num_bytes(self, layer_idx: int) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors[layer_idx].values())


def write_checkpoint(folder: Path, seed: int, num_layers: int = 4, num_files: int = 3) -> Checkpoint:
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    paths = [folder / f"shard-{i}" for i in range(num_files)]
    contents = [bytearray(rng.randbytes(rng.randint(1, 9))) for _ in paths]
    layouts, spans, tensors = {}, {}, {}
    for layer_idx in range(num_layers):
        named = {f"t{i}": random_tensor(rng, generator) for i in range(rng.randint(1, 7))}
        layout = make_layout(layer_idx, {name: (t.shape, t.dtype) for name, t in named.items()})
        found = []
        for spec in layout.tensors:
            at = rng.randrange(num_files)
            contents[at] += rng.randbytes(rng.randint(0, 5))
            found.append(
                ReadSpan(
                    path=paths[at],
                    file_offset_bytes=len(contents[at]),
                    nbytes=spec.nbytes,
                    layer_offset_bytes=spec.offset_bytes,
                )
            )
            contents[at] += bytes(raw(named[spec.name]).tolist())
        layouts[layer_idx], spans[layer_idx], tensors[layer_idx] = layout, tuple(found), named
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    return Checkpoint(layouts, spans, tensors, paths)


def filled_ram_store(checkpoint: Checkpoint, device: torch.device = CPU) -> RamStore:
    store = RamStore(checkpoint.layouts, device)
    for layer_idx, named in checkpoint.tensors.items():
        for name, view in store.host_views(layer_idx).items():
            view.copy_(named[name])
    store.seal()
    return store


def read(store: HostStore, layer_idx: int, out: torch.Tensor | None = None) -> torch.Tensor:
    if out is None:
        out = torch.full((store.layouts[layer_idx].nbytes,), 0xAB, dtype=torch.uint8)
    bounded(lambda: store.read_into(layer_idx, out))
    return out


@pytest.fixture
def opened() -> Iterator[Callable[[HostStore], HostStore]]:
    """Closes the stores that a test opens."""
    stores: list[HostStore] = []

    def keep(store: HostStore) -> HostStore:
        stores.append(store)
        return store

    yield keep
    for store in stores:
        bounded(store.close)


# ---- a device that copies as late as it may ----


class LazyStream:
    """Work that was enqueued and runs only when somebody waits for it: the slowest device that is still correct."""

    def __init__(self) -> None:
        self.work: list[Callable[[], object]] = []
        self.num_done = 0

    def run_until(self, end: int) -> None:
        while self.num_done < end:
            self.work[self.num_done]()
            self.num_done += 1


class LazyEvent:
    def __init__(self, stream: LazyStream) -> None:
        self.stream = stream
        self.at = 0

    def record(self) -> None:
        self.at = len(self.stream.work)

    def wait(self) -> None:
        raise AssertionError("nothing here waits on a stream")

    def synchronize(self) -> None:
        self.stream.run_until(self.at)


class LazyBuffer:
    """A device buffer that copies are only enqueued to."""

    def __init__(self, nbytes: int, stream: LazyStream, begin: int = 0, memory: torch.Tensor | None = None) -> None:
        self.stream = stream
        self.memory = torch.full((nbytes,), 0xAB, dtype=torch.uint8) if memory is None else memory

    def numel(self) -> int:
        return self.memory.numel()

    def __getitem__(self, part: slice) -> LazyBuffer:
        return LazyBuffer(0, self.stream, memory=self.memory[part])

    def copy_(self, source: torch.Tensor, non_blocking: bool = False) -> None:
        assert non_blocking, "the host would stand still at every window"
        assert source.numel() == self.numel()
        self.stream.work.append(lambda: self.memory.copy_(source))


@dataclass
class FakeGpu:
    """What the fake runtime allows, and what was asked of it."""

    stream: LazyStream
    max_lock_bytes: int = 2**40
    locked: dict[int, int] | None = None

    def cudaHostRegister(self, pointer: int, nbytes: int, flags: int) -> int:
        assert self.locked is not None
        if nbytes > self.max_lock_bytes:
            return 2
        self.locked[pointer] = nbytes
        return 0

    def cudaHostUnregister(self, pointer: int) -> int:
        assert self.locked is not None
        del self.locked[pointer]
        return 0


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    fake = FakeGpu(LazyStream(), locked={})
    monkeypatch.setattr(torch.cuda, "cudart", lambda: fake)
    monkeypatch.setattr(host_memory, "clear_cuda_error", lambda: None)
    monkeypatch.setattr(host_store, "make_event", lambda device: LazyEvent(fake.stream))
    monkeypatch.setattr(host_store, "run_near_card", lambda device: None)
    return fake


def read_lazily(store: HostStore, layer_idx: int, gpu: FakeGpu) -> torch.Tensor:
    """Reads a layer to a lazy device, and lets the device catch up only afterwards."""
    out = LazyBuffer(store.layouts[layer_idx].nbytes, gpu.stream)
    bounded(lambda: store.read_into(layer_idx, out))  # type: ignore[arg-type]
    gpu.stream.run_until(len(gpu.stream.work))
    return out.memory


# ---- RAM tier ----


def test_ram_store_gives_every_layers_bytes(tmp_path: Path, opened: Callable[[HostStore], HostStore]) -> None:
    for seed in range(10):
        checkpoint = write_checkpoint(tmp_path, seed)
        store = opened(filled_ram_store(checkpoint))
        for layer_idx in (2, 0, 3, 1, 1):
            assert checkpoint.is_in(read(store, layer_idx), layer_idx)
        assert (store.tier, store.disk_bytes, store.pinned_bytes, store.enqueues) == ("ram", 0, 0, False)


def test_ram_store_takes_exactly_the_layers_bytes(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, 3)
    store = RamStore(checkpoint.layouts, CPU)
    assert store.held_bytes == sum(layout.nbytes for layout in checkpoint.layouts.values())
    buffers = [store.layer_buffer(i) for i in checkpoint.layouts]
    begins = [buffer.data_ptr() for buffer in buffers]
    assert all(begin % ALIGNMENT == 0 for begin in begins)
    ends = [begin + buffer.numel() for begin, buffer in zip(begins, buffers, strict=True)]
    assert begins[1:] == ends[:-1], "layers overlap or leave gaps"


def test_host_views_have_their_own_storages_and_write_through(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, 5)
    store = filled_ram_store(checkpoint)
    views = [view for i in checkpoint.layouts for view in store.host_views(i).values() if view.numel()]
    storages = {(view.untyped_storage().data_ptr(), view.untyped_storage().nbytes()) for view in views}
    assert len(storages) == len(views)
    assert all(view.storage_offset() == 0 for view in views)
    for view in views:
        view.zero_()
    for layer_idx, layout in checkpoint.layouts.items():
        out = read(store, layer_idx)
        assert all(int(raw(view).to(torch.int64).sum()) == 0 for view in layout.views(out).values())


def test_a_write_to_host_views_is_seen_by_the_next_read_and_by_other_views() -> None:
    store = RamStore({0: make_layout(0, {"w": ((4,), torch.float32)})}, CPU)
    store.host_views(0)["w"].copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    store.mark_changed(0)
    assert store.host_views(0)["w"].tolist() == [1.0, 2.0, 3.0, 4.0]
    assert read(store, 0)[:16].view(torch.float32).tolist() == [1.0, 2.0, 3.0, 4.0]


def test_a_page_locked_slab_only_enqueues_and_is_given_back_at_close(tmp_path: Path, gpu: FakeGpu) -> None:
    checkpoint = write_checkpoint(tmp_path, 1)
    store = filled_ram_store(checkpoint, CUDA)
    assert store.enqueues
    assert store.pinned_bytes == sum(gpu.locked.values()) >= store.held_bytes  # type: ignore[union-attr]
    for layer_idx in checkpoint.layouts:
        assert checkpoint.is_in(read_lazily(store, layer_idx, gpu), layer_idx)
    assert len(gpu.stream.work) == len(checkpoint.layouts), "one copy a layer"
    for _ in range(2):
        store.close()
    assert (gpu.locked, store.pinned_bytes) == ({}, 0)


@pytest.mark.parametrize("window_bytes", [64, 257, 4096])
def test_where_page_locking_the_slab_is_refused_layers_go_through_the_ring(
    tmp_path: Path, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, window_bytes: int
) -> None:
    monkeypatch.setattr(host_store, "WINDOW_BYTES", window_bytes)
    checkpoint = write_checkpoint(tmp_path, 2, num_layers=40)
    gpu.max_lock_bytes = sum(layout.nbytes for layout in checkpoint.layouts.values()) // 4096 * 4096 - 4096
    with pytest.warns(UserWarning, match="a page-locked ring of") as caught:
        store = filled_ram_store(checkpoint, CUDA)
    assert len(caught) == 1
    text = str(caught[0].message)
    assert all(part in text for part in ("ulimit -l unlimited", "--ulimit memlock=-1", "WSL")), text
    assert not store.enqueues
    assert 0 < store.pinned_bytes < store.held_bytes
    for layer_idx in (3, 1, 0, 11, 2, 0):
        assert checkpoint.is_in(read_lazily(store, layer_idx, gpu), layer_idx)
    bounded(store.close)
    assert gpu.locked == {}


def test_where_no_page_lock_is_allowed_at_all_one_warning_says_so_and_layers_still_come(
    tmp_path: Path, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_store, "WINDOW_BYTES", 64)
    gpu.max_lock_bytes = 0
    checkpoint = write_checkpoint(tmp_path, 2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        store = filled_ram_store(checkpoint, CUDA)
    try:
        assert store.pinned_bytes == 0
        for layer_idx in checkpoint.layouts:
            assert checkpoint.is_in(read_lazily(store, layer_idx, gpu), layer_idx)
    finally:
        bounded(store.close)
    assert ["through pageable memory" in str(warning.message) for warning in caught] == [True]


def test_a_disk_store_whose_ring_cannot_be_page_locked_warns_once_and_reads_on(
    tmp_path: Path, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_store, "WINDOW_BYTES", 64)
    gpu.max_lock_bytes = 0
    checkpoint = write_checkpoint(tmp_path, 2)
    with pytest.warns(UserWarning, match="through pageable memory") as caught:
        store = DiskStore(checkpoint.layouts, checkpoint.spans, CUDA)
    assert len(caught) == 1
    for layer_idx in checkpoint.layouts:
        assert checkpoint.is_in(read_lazily(store, layer_idx, gpu), layer_idx)
    bounded(store.close)


# ---- disk tier ----


@pytest.mark.parametrize("window_bytes", [64, 100, 256, 1000, 2**24])
@pytest.mark.parametrize("on_gpu", [False, True], ids=["into the slot", "through the ring"])
def test_disk_store_gives_every_layers_bytes_whatever_the_windows(
    tmp_path: Path, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, window_bytes: int, on_gpu: bool
) -> None:
    monkeypatch.setattr(host_store, "WINDOW_BYTES", window_bytes)
    for seed in range(6):
        checkpoint = write_checkpoint(tmp_path, seed)
        store = DiskStore(checkpoint.layouts, checkpoint.spans, CUDA if on_gpu else CPU)
        try:
            for layer_idx in (2, 0, 3, 3, 1):
                out = read_lazily(store, layer_idx, gpu) if on_gpu else read(store, layer_idx)
                assert checkpoint.is_in(out, layer_idx), (seed, layer_idx)
            assert store.disk_bytes == sum(checkpoint.num_bytes(i) for i in (2, 0, 3, 3, 1))
        finally:
            bounded(store.close)


def test_disk_store_reads_spans_that_hold_several_tensors(
    tmp_path: Path, opened: Callable[[HostStore], HostStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_store, "WINDOW_BYTES", 96)
    layouts = {i: make_layout(i, {"a": ((64, 2), torch.bfloat16), "b": ((128,), torch.bfloat16)}) for i in range(3)}
    content = torch.randint(0, 256, (7 + 3 * 512,), dtype=torch.uint8)
    path = tmp_path / "pack"
    path.write_bytes(bytes(content.tolist()))
    spans = {
        i: merge_spans(
            ReadSpan(path=path, file_offset_bytes=7 + 512 * i + at, nbytes=256, layer_offset_bytes=at)
            for at in (0, 256)
        )
        for i in layouts
    }
    assert [len(s) for s in spans.values()] == [1, 1, 1]
    store = opened(DiskStore(layouts, spans, CPU))
    for i in layouts:
        expected = content[7 + 512 * i : 7 + 512 * (i + 1)]
        assert torch.equal(read(store, i), expected)
        assert torch.equal(raw(store.host_views(i)["b"]), expected[256:])


def test_a_tensor_that_lies_in_no_one_span_is_refused(tmp_path: Path, opened: Callable[[HostStore], HostStore]) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(300))
    layouts = {4: make_layout(4, {"w": ((256,), torch.uint8)})}
    halves = [ReadSpan(path=path, file_offset_bytes=2 * at, nbytes=128, layer_offset_bytes=at) for at in (0, 128)]
    store = opened(DiskStore(layouts, {4: halves}, CPU))
    with pytest.raises(ValueError, match="layer 4: bytes 0 to 256"):
        store.host_views(4)


def test_disk_views_show_the_files_and_cost_nothing(tmp_path: Path, opened: Callable[[HostStore], HostStore]) -> None:
    for seed in range(6):
        checkpoint = write_checkpoint(tmp_path, seed)
        store = opened(DiskStore(checkpoint.layouts, checkpoint.spans, CPU))
        for layer_idx, named in checkpoint.tensors.items():
            views = store.host_views(layer_idx)
            assert {n: (v.shape, v.dtype) for n, v in views.items()} == {
                n: (t.shape, t.dtype) for n, t in named.items()
            }
            assert all(torch.equal(raw(views[n]), raw(t)) for n, t in named.items())
            assert all(v.storage_offset() == 0 for v in views.values())
        assert (store.tier, store.pinned_bytes, store.disk_bytes) == ("disk", 0, 0)


@pytest.mark.parametrize("on_gpu", [False, True], ids=["into the slot", "through the ring"])
def test_a_changed_layer_is_read_from_memory_and_the_file_stays(
    tmp_path: Path, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, on_gpu: bool
) -> None:
    monkeypatch.setattr(host_store, "WINDOW_BYTES", 64)
    checkpoint = write_checkpoint(tmp_path, 8)
    before = [path.read_bytes() for path in checkpoint.paths]
    store = DiskStore(checkpoint.layouts, checkpoint.spans, CUDA if on_gpu else CPU)
    try:
        changed = {name: torch.full_like(t, 1) for name, t in checkpoint.tensors[1].items()}
        for name, view in store.host_views(1).items():
            view.copy_(changed[name])
        store.mark_changed(1)
        checkpoint.tensors[1] = changed

        out = torch.zeros(store.layouts[1].nbytes, dtype=torch.uint8)
        assert checkpoint.is_in(read(store, 1, out), 1)
        assert store.disk_bytes == 0
        for layer_idx in (0, 2, 3):
            out = read_lazily(store, layer_idx, gpu) if on_gpu else read(store, layer_idx)
            assert checkpoint.is_in(out, layer_idx)
        assert [path.read_bytes() for path in checkpoint.paths] == before
    finally:
        bounded(store.close)


def test_a_write_that_nobody_named_is_found_when_asked_for(
    tmp_path: Path, opened: Callable[[HostStore], HostStore]
) -> None:
    checkpoint = write_checkpoint(tmp_path, 8)
    store = opened(DiskStore(checkpoint.layouts, checkpoint.spans, CPU))
    for layer_idx in checkpoint.layouts:
        store.mark_if_changed(layer_idx)
    read(store, 1)
    assert store.disk_bytes == checkpoint.num_bytes(1), "read from the file: nothing was written"
    for name, view in store.host_views(1).items():
        view.fill_(1)
        checkpoint.tensors[1][name].fill_(1)
    for layer_idx in checkpoint.layouts:
        store.mark_if_changed(layer_idx)
    for layer_idx in checkpoint.layouts:
        assert checkpoint.is_in(read(store, layer_idx), layer_idx)


def test_views_stay_readable_after_close(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, 4)
    store = DiskStore(checkpoint.layouts, checkpoint.spans, CPU)
    views = store.host_views(0)
    bounded(store.close)
    del store
    assert all(torch.equal(raw(views[n]), raw(t)) for n, t in checkpoint.tensors[0].items())


def readers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("hf_lema-reader")]


def test_readers_run_from_the_start_until_close_which_may_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_store, "NUM_READERS", 5)
    checkpoint = write_checkpoint(tmp_path, 4)
    store = DiskStore(checkpoint.layouts, checkpoint.spans, CPU)
    assert len(readers()) == 5
    read(store, 0)
    assert len(readers()) == 5
    for _ in range(3):
        bounded(store.close)
    assert readers() == []


def test_a_system_without_a_thread_left_says_so_at_the_start_and_nothing_stays_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start

    def start_one(thread: threading.Thread) -> None:
        if thread.name == "hf_lema-reader_1":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(host_store, "NUM_READERS", 2)
    monkeypatch.setattr(threading.Thread, "start", start_one)
    checkpoint = write_checkpoint(tmp_path, 4)
    files = FileSet({path: path.stat().st_size for path in checkpoint.paths})
    with pytest.raises(RuntimeError, match="can't start new thread"):
        DiskStore(checkpoint.layouts, checkpoint.spans, CPU, files=files)
    assert readers() == []
    assert not any(
        Path(f"/proc/self/fd/{name}").resolve().is_relative_to(tmp_path) for name in os.listdir("/proc/self/fd")
    )


def test_a_store_without_layers_opens_nothing() -> None:
    for store in (RamStore({}, CPU), DiskStore({}, {}, CPU)):
        store_class = type(store).__name__
        assert store.pinned_bytes == 0, store_class
        if isinstance(store, RamStore):
            store.seal()
        bounded(store.close)


# ---- what can go wrong with files ----


def disk_prefetcher(checkpoint: Checkpoint) -> tuple[Prefetcher, DiskStore]:
    store = DiskStore(checkpoint.layouts, checkpoint.spans, CPU)
    pool = SlotPool(2, max(layout.nbytes for layout in checkpoint.layouts.values()), CPU)
    return Prefetcher(pool, store, CPU), store


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"more")


@pytest.mark.parametrize(
    ("damage", "error", "words"),
    [
        (cut, ValueError, "replaced or cut since"),
        (grow, ValueError, "replaced or cut since"),
        (Path.unlink, FileNotFoundError, "shard-1"),
    ],
    ids=["cut", "replaced by a longer file", "removed"],
)
def test_a_file_that_changed_since_it_was_indexed_is_refused_by_name_and_no_descriptor_stays_open(
    tmp_path: Path, damage: Callable[[Path], None], error: type[Exception], words: str
) -> None:
    checkpoint = write_checkpoint(tmp_path, 11, num_files=2)
    num_open = len(os.listdir("/proc/self/fd"))
    files = FileSet({path: path.stat().st_size for path in checkpoint.paths})
    damage(checkpoint.paths[1])
    with pytest.raises(error, match=words) as caught:
        DiskStore(checkpoint.layouts, checkpoint.spans, CPU, files=files)
    assert "shard-1" in str(caught.value)
    assert len(os.listdir("/proc/self/fd")) == num_open


def test_a_file_that_was_removed_while_in_use_is_read_on(
    tmp_path: Path, opened: Callable[[HostStore], HostStore]
) -> None:
    checkpoint = write_checkpoint(tmp_path, 14)
    store = opened(DiskStore(checkpoint.layouts, checkpoint.spans, CPU))
    for path in checkpoint.paths:
        path.unlink()
    for layer_idx in checkpoint.layouts:
        assert checkpoint.is_in(read(store, layer_idx), layer_idx)


def test_a_file_that_is_cut_while_in_use_surfaces_at_take_with_the_place(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, 12, num_files=1)
    prefetcher, store = disk_prefetcher(checkpoint)
    try:
        prefetcher.give_back(bounded(lambda: prefetcher.take(0)), [])
        with checkpoint.paths[0].open("r+b") as file:
            file.truncate(3)
        with pytest.raises(RuntimeError, match="layer 3 cannot be fetched") as caught:
            bounded(lambda: prefetcher.take(3))
        text = str(caught.value.__cause__)
        assert all(part in text for part in ("shard-0", "ended early", "bytes 0 to"))
    finally:
        bounded(prefetcher.close)
        bounded(store.close)


def test_a_file_replaced_by_another_of_the_same_size_is_never_read_beside_the_old_one(
    tmp_path: Path, opened: Callable[[HostStore], HostStore]
) -> None:
    checkpoint = write_checkpoint(tmp_path, 13, num_files=1)
    store = opened(DiskStore(checkpoint.layouts, checkpoint.spans, CPU))
    other = tmp_path / "other"
    other.write_bytes(bytes(checkpoint.paths[0].stat().st_size))
    other.replace(checkpoint.paths[0])
    for layer_idx in checkpoint.layouts:
        assert checkpoint.is_in(read(store, layer_idx), layer_idx)
        views = store.host_views(layer_idx)
        assert all(torch.equal(raw(views[n]), raw(t)) for n, t in checkpoint.tensors[layer_idx].items())


@pytest.mark.parametrize("on_gpu", [False, True], ids=["into the slot", "through the ring"])
def test_no_reader_writes_any_more_when_a_failed_read_returns(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, on_gpu: bool
) -> None:
    monkeypatch.setattr(host_store, "WINDOW_BYTES", 64)
    store = RamStore({0: make_layout(0, {"w": ((64 * 8,), torch.uint8)})}, CUDA if on_gpu else CPU)
    store._open_ring()
    gate, writing = threading.Event(), threading.Event()
    num_written: list[int] = []

    def fill(begin: int, window: torch.Tensor) -> None:
        if begin == 64:
            raise OSError("sector 7")
        if begin > 64:
            writing.set()
            assert gate.wait(5)
        window.fill_(1)
        num_written.append(begin)

    out = LazyBuffer(512, gpu.stream) if on_gpu else torch.zeros(512, dtype=torch.uint8)
    try:
        result = in_thread(lambda: store._copy_through_ring(out, fill))  # type: ignore[arg-type]
        assert writing.wait(5)
        assert num_written in ([], [0])
        gate.set()
        with pytest.raises(OSError, match="sector 7"):
            result()
        num_at_return = len(num_written)
    finally:
        bounded(store.close)
    assert len(num_written) == num_at_return


# ---- the ring ----


def test_a_window_is_never_refilled_before_its_copy_is_over(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_store, "WINDOW_BYTES", 32)
    for num_windows in (2, 3, 7):
        ring = StagingRing(num_windows, CUDA)
        for turn in range(4 * num_windows):
            window, copied = ring.claim()
            assert all(e.at <= gpu.stream.num_done for e in [copied]), "claimed with its copy still to come"  # type: ignore[attr-defined]
            window.fill_(turn)
            target = LazyBuffer(32, gpu.stream)
            target.copy_(window, non_blocking=True)
            gpu.stream.work.append(lambda t=target, v=turn: self_check(t, v))
            copied.record()
        ring.close()
        assert gpu.stream.num_done == len(gpu.stream.work), "close waits for the copies"


def self_check(target: LazyBuffer, value: int) -> None:
    assert target.memory.tolist() == [value] * target.numel()


def test_windows_are_claimed_in_turn(gpu: FakeGpu) -> None:
    ring = StagingRing(3, CUDA)
    pointers = [ring.claim()[0].data_ptr() for _ in range(7)]
    assert pointers[:3] * 2 + pointers[:1] == pointers
    assert len(set(pointers)) == 3
    ring.close()


@pytest.mark.parametrize(
    ("largest_windows", "max_windows", "expected"), [(1, 100, 2), (3, 100, 6), (3, 4, 4), (50, 10, 10), (5, 0, 2)]
)
def test_the_ring_holds_two_layers_or_what_is_allowed_and_at_least_two_windows(
    tmp_path: Path,
    gpu: FakeGpu,
    monkeypatch: pytest.MonkeyPatch,
    largest_windows: int,
    max_windows: int,
    expected: int,
) -> None:
    monkeypatch.setattr(host_store, "WINDOW_BYTES", 4096)
    path = tmp_path / "file"
    path.write_bytes(bytes(4096 * largest_windows))
    layouts = {0: make_layout(0, {"w": ((4096 * largest_windows,), torch.uint8)})}
    spans = {0: [ReadSpan(path=path, file_offset_bytes=0, nbytes=4096 * largest_windows, layer_offset_bytes=0)]}
    store = DiskStore(layouts, spans, CUDA, max_ring_bytes=4096 * max_windows)
    assert store.pinned_bytes == 4096 * expected
    bounded(store.close)
    assert gpu.locked == {}


def test_layers_follow_one_another_through_a_ring_smaller_than_a_layer(
    tmp_path: Path, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_store, "WINDOW_BYTES", 64)
    checkpoint = write_checkpoint(tmp_path, 21, num_layers=5)
    store = DiskStore(checkpoint.layouts, checkpoint.spans, CUDA, max_ring_bytes=128)
    outs = {i: LazyBuffer(layout.nbytes, gpu.stream) for i, layout in checkpoint.layouts.items()}
    for layer_idx, out in outs.items():  # the device has not caught up with one when the next begins
        bounded(lambda: store.read_into(layer_idx, out))  # type: ignore[arg-type]  # noqa: B023
    bounded(store.close)
    for layer_idx, out in outs.items():
        assert checkpoint.is_in(out.memory, layer_idx)


# ---- windows of spans ----


def test_cut_spans_cover_each_window_exactly() -> None:
    rng = random.Random(5)
    for _ in range(200):
        spans, at, file_at = [], 0, 0
        for _ in range(rng.randint(0, 6)):
            at, file_at = at + rng.randint(0, 40), file_at + rng.randint(0, 9)
            nbytes = rng.randint(1, 90)
            path = Path(rng.choice("ab"))
            spans.append(ReadSpan(path=path, file_offset_bytes=file_at, nbytes=nbytes, layer_offset_bytes=at))
            at, file_at = at + nbytes, file_at + nbytes
        window_bytes = rng.randint(1, 120)
        expected = {s.layer_offset_bytes + i: (s.path, s.file_offset_bytes + i) for s in spans for i in range(s.nbytes)}
        found: dict[int, tuple[Path, int]] = {}
        for begin in range(0, at, window_bytes):
            for part in cut_spans(spans, begin, begin + window_bytes):
                assert part.nbytes > 0
                assert part.layer_offset_bytes + part.nbytes <= window_bytes
                for i in range(part.nbytes):
                    assert begin + part.layer_offset_bytes + i not in found
                    found[begin + part.layer_offset_bytes + i] = part.path, part.file_offset_bytes + i
        assert found == expected


# ---- autograd's safety net ----


@pytest.mark.parametrize("tier", ["ram", "disk", "disk, changed"])
def test_backward_over_a_refilled_slot_raises_on_every_tier(
    tmp_path: Path, tier: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_store, "WINDOW_BYTES", 64)
    layouts = {i: make_layout(i, {"w": ((64,), torch.float32)}) for i in range(4)}
    path = tmp_path / "file"
    path.write_bytes(bytes(torch.arange(256.0).view(torch.uint8).tolist()))
    spans = {i: [ReadSpan(path=path, file_offset_bytes=256 * i, nbytes=256, layer_offset_bytes=0)] for i in layouts}
    store = RamStore(layouts, CPU) if tier == "ram" else DiskStore(layouts, spans, CPU)
    streamer = LayerStreamer(store, CPU, 4, 2)
    if tier == "disk, changed":
        for layer_idx in layouts:
            streamer.invalidate(layer_idx)

    def visits() -> torch.Tensor:
        hidden = torch.ones(64, requires_grad=True)
        with streamer.lease(0, Direction.FORWARD) as weights:
            loss = (hidden * weights["w"]).sum()
        for layer_idx in (1, 2, 3):
            with streamer.lease(layer_idx, Direction.FORWARD):
                pass
        return loss

    try:
        loss = bounded(visits)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    finally:
        bounded(streamer.close)


# ---- whole sweeps ----


def sweep(streamer: LayerStreamer, checkpoint: Checkpoint) -> None:
    for direction, layers in ((Direction.FORWARD, range(4)), (Direction.BACKWARD, reversed(range(4)))):
        for layer_idx in layers:
            with streamer.lease(layer_idx, direction, expect_backward=direction is Direction.FORWARD) as weights:
                named: Mapping[str, torch.Tensor] = checkpoint.tensors[layer_idx]
                assert all(torch.equal(raw(weights[n]), raw(t)) for n, t in named.items())


@pytest.mark.parametrize("tier", ["ram", "disk"])
def test_steps_lend_the_checkpoints_bytes(tmp_path: Path, tier: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_store, "WINDOW_BYTES", 64)
    for seed in range(3):
        checkpoint = write_checkpoint(tmp_path, 30 + seed)
        store: HostStore = filled_ram_store(checkpoint)
        if tier == "disk":
            store = DiskStore(checkpoint.layouts, checkpoint.spans, CPU)
        streamer = LayerStreamer(store, CPU, 4, 2)
        try:
            bounded(lambda: [sweep(streamer, checkpoint) for _ in range(3)])  # noqa: B023
        finally:
            bounded(streamer.close)
        assert (streamer.stats().disk_bytes > 0) == (tier == "disk")


COLLECTED_IN_A_READER = """
import gc, os, sys, threading
from pathlib import Path
import torch
from hf_lema.runtime import host_store
from hf_lema.files.file_set import ReadSpan
from hf_lema.files.layout import make_layout
from hf_lema.runtime.streamer import LayerStreamer

path = Path(sys.argv[1])
path.write_bytes(bytes(1024))
layouts = {i: make_layout(i, {"w": ((64,), torch.float32)}) for i in range(4)}
spans = {i: [ReadSpan(path=path, file_offset_bytes=256 * i, nbytes=256, layer_offset_bytes=0)] for i in range(4)}
holder = [LayerStreamer(host_store.DiskStore(layouts, spans, torch.device("cpu")), torch.device("cpu"), 4, 2)]
prefetcher = holder[0]._prefetcher
read_spans_into, dropped = host_store.read_spans_into, threading.Event()

def read_and_collect(*args):
    if dropped.wait(10) and not gc.collect() < 0:
        read_spans_into(*args)

host_store.read_spans_into = read_and_collect
prefetcher.want([0, 1])
cycle = [holder.pop()]
cycle.append(cycle)
del cycle
dropped.set()
prefetcher._thread.join(10)
names = [t.name for t in threading.enumerate() if t.name.startswith("hf_lema")]
for thread in threading.enumerate():
    if thread.name.startswith("hf_lema"):
        thread.join(2)
alive = [t.name for t in threading.enumerate() if t.name.startswith("hf_lema")]
print("alive:", alive, flush=True)
os._exit(len(alive))
"""


def test_a_streamer_that_is_collected_in_one_of_its_own_reader_threads_ends(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", COLLECTED_IN_A_READER, str(tmp_path / "file")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_ring_and_the_slab_are_of_exact_size(gpu: FakeGpu) -> None:
    buffer = HostBuffer(3 * 4096 + 1)
    buffer.page_lock()
    assert list(gpu.locked.values()) == [4 * 4096]  # type: ignore[union-attr]
    buffer.close()
