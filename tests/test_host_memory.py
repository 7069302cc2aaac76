"""Exact size, sharing with forked children, page-locking and its refusal, and how much memory is left."""

from __future__ import annotations

import gc
import mmap
import os
import warnings
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from hf_lema.runtime import host_memory
from hf_lema.runtime.host_memory import (
    HostBuffer,
    available_host_bytes,
    clear_cuda_error,
    has_private_pages,
    map_private,
    tensor_over,
)

PAGE = mmap.PAGESIZE
MIB = 2**20


def memfd_mappings() -> list[int]:
    """Sizes of the package's shared mappings in this process, from /proc."""
    sizes = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if "memfd:hf_lema" in line:
            begin, end = line.split()[0].split("-")
            sizes.append(int(end, 16) - int(begin, 16))
    return sorted(sizes)


def status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(field)


def outcome_in_child(check: object) -> bool:
    """Whether a call gives True in a forked child; nothing but its answer leaves the child."""
    child = os.fork()
    if child == 0:
        answer = 1
        try:
            answer = 0 if check() else 2  # type: ignore[operator]
        finally:
            os._exit(answer)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


class FakeCudart:
    """Stands in for the CUDA runtime: allows or refuses page-locks, and keeps the books."""

    def __init__(self, result: int = 0) -> None:
        self.result = result
        self.registered: list[tuple[int, int]] = []
        self.unregistered: list[int] = []

    def cudaHostRegister(self, pointer: int, nbytes: int, flags: int) -> int:
        assert flags == 0
        if self.result == 0:
            self.registered.append((pointer, nbytes))
        return self.result

    def cudaHostUnregister(self, pointer: int) -> int:
        self.unregistered.append(pointer)
        return 0


@pytest.fixture
def cudart(monkeypatch: pytest.MonkeyPatch) -> FakeCudart:
    fake = FakeCudart()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: fake)
    return fake


# ---- the mapping ----


@pytest.mark.parametrize("nbytes", [1, PAGE - 1, PAGE, PAGE + 1, 3 * MIB + 17, 5 * MIB])
def test_a_buffer_maps_its_size_in_whole_pages_and_no_more(nbytes: int) -> None:
    before = memfd_mappings()
    buffer = HostBuffer(nbytes)
    added = memfd_mappings()
    for size in before:
        added.remove(size)
    assert added == [-(-nbytes // PAGE) * PAGE]
    assert buffer.tensor.numel() == buffer.nbytes == nbytes
    assert buffer.tensor.dtype == torch.uint8
    assert buffer.tensor.data_ptr() % PAGE == 0


def test_a_buffer_of_nothing_is_allowed() -> None:
    buffer = HostBuffer(0)
    assert buffer.tensor.numel() == 0
    buffer.close()


def test_a_new_buffer_is_zero_filled_and_writable_to_its_last_byte() -> None:
    buffer = HostBuffer(2 * PAGE + 5)
    assert int(buffer.tensor.sum()) == 0
    buffer.tensor.fill_(7)
    assert buffer.tensor[-1] == 7
    assert buffer.memory[2 * PAGE + 4] == 7


def test_filled_memory_is_shared_not_anonymous() -> None:
    buffer = HostBuffer(32 * MIB)
    shared, anonymous = status_bytes("RssShmem"), status_bytes("RssAnon")
    buffer.tensor.fill_(1)
    assert status_bytes("RssShmem") - shared >= 32 * MIB
    assert status_bytes("RssAnon") - anonymous < 4 * MIB


def test_descriptors_go_back_with_the_memory() -> None:
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        HostBuffer(PAGE).close()
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_memory_lives_as_long_as_a_tensor_over_it_and_then_goes_back() -> None:
    gc.collect()
    before = memfd_mappings()
    buffer = HostBuffer(3 * PAGE)
    view = tensor_over(buffer.memory, PAGE, (16,), torch.float32)
    view.fill_(2.5)
    buffer.close()
    del buffer
    gc.collect()
    assert torch.equal(view, torch.full((16,), 2.5))
    assert len(memfd_mappings()) == len(before) + 1
    del view
    gc.collect()
    assert memfd_mappings() == before


def test_a_forked_child_sees_what_the_parent_writes_and_the_parent_what_the_child_writes() -> None:
    buffer = HostBuffer(2 * PAGE)
    buffer.tensor.fill_(5)

    def in_child() -> bool:
        seen = int(buffer.tensor[PAGE]) == 5
        buffer.tensor[PAGE] = 9
        return seen

    assert outcome_in_child(in_child)
    assert buffer.tensor[PAGE] == 9


def test_a_forked_child_does_not_duplicate_the_memory_it_writes_to() -> None:
    buffer = HostBuffer(32 * MIB)
    buffer.tensor.fill_(1)

    def in_child() -> bool:
        before = status_bytes("RssAnon")
        buffer.tensor.fill_(2)
        return status_bytes("RssAnon") - before < 4 * MIB

    assert outcome_in_child(in_child)


# ---- page-locking ----


def test_page_lock_registers_the_whole_mapping_once(cudart: FakeCudart) -> None:
    buffer = HostBuffer(PAGE + 1)
    assert buffer.pinned_bytes == 0
    assert buffer.page_lock()
    assert cudart.registered == [(buffer.tensor.data_ptr(), 2 * PAGE)]
    assert buffer.pinned_bytes == 2 * PAGE


def test_close_takes_the_page_lock_away_once(cudart: FakeCudart) -> None:
    buffer = HostBuffer(PAGE)
    buffer.page_lock()
    for _ in range(3):
        buffer.close()
    assert cudart.unregistered == [buffer.tensor.data_ptr()]
    assert buffer.pinned_bytes == 0
    buffer.tensor.fill_(3)  # the memory itself stays


def test_close_of_a_buffer_that_was_never_locked_asks_nothing_of_cuda(cudart: FakeCudart) -> None:
    HostBuffer(PAGE).close()
    assert cudart.unregistered == []


def test_close_in_a_forked_child_leaves_the_parents_page_lock_alone(cudart: FakeCudart) -> None:
    buffer = HostBuffer(PAGE)
    buffer.page_lock()

    def in_child() -> bool:
        buffer.close()
        return cudart.unregistered == []

    assert outcome_in_child(in_child)
    assert buffer.pinned_bytes == PAGE
    buffer.close()
    assert cudart.unregistered == [buffer.tensor.data_ptr()]


def test_a_refused_page_lock_is_cleared_and_leaves_the_memory_usable(
    cudart: FakeCudart, monkeypatch: pytest.MonkeyPatch
) -> None:
    cudart.result = 2
    cleared: list[bool] = []
    monkeypatch.setattr(host_memory, "clear_cuda_error", lambda: cleared.append(True))
    buffer = HostBuffer(3 * MIB)
    buffer.tensor.fill_(4)
    assert not buffer.page_lock()
    assert cleared == [True], "the error would come back at the next kernel"
    assert buffer.pinned_bytes == 0
    assert int(buffer.tensor.min()) == 4
    buffer.close()
    assert cudart.unregistered == []


@pytest.mark.parametrize("num_reported", [0, 1])
def test_a_cuda_error_is_cleared_by_a_kernel_that_may_fail_once(
    monkeypatch: pytest.MonkeyPatch, num_reported: int
) -> None:
    runs: list[int] = []

    def zeros(*size: int, device: str) -> object:
        runs.append(1)
        if len(runs) <= num_reported:
            raise RuntimeError("CUDA error: out of memory")
        return SimpleNamespace(add_=lambda value: None)

    monkeypatch.setattr(torch, "zeros", zeros)
    clear_cuda_error()
    assert len(runs) == num_reported + 1


def test_an_error_that_does_not_go_away_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def zeros(*size: int, device: str) -> object:
        raise RuntimeError("CUDA error: device lost")

    monkeypatch.setattr(torch, "zeros", zeros)
    with pytest.raises(RuntimeError, match="device lost"):
        clear_cuda_error()


# ---- views and files ----

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool]
DTYPES += [torch.float8_e4m3fn]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset_bytes", [0, 1, 3, 8, 251])
def test_a_view_has_true_shape_dtype_bytes_and_a_storage_of_its_own(dtype: torch.dtype, offset_bytes: int) -> None:
    memory = memoryview(bytearray(i % 2 if dtype == torch.bool else i % 249 for i in range(1024)))
    view = tensor_over(memory, offset_bytes, (3, 5), dtype)
    assert (tuple(view.shape), view.dtype, view.storage_offset()) == ((3, 5), dtype, 0)
    raw = torch.tensor(list(memory[offset_bytes : offset_bytes + 15 * dtype.itemsize]), dtype=torch.uint8)
    assert torch.equal(view.flatten().view(torch.uint8), raw)
    other = tensor_over(memory, offset_bytes + 512, (3, 5), dtype)
    assert view.untyped_storage().data_ptr() != other.untyped_storage().data_ptr()


def test_a_view_writes_through() -> None:
    memory = memoryview(bytearray(64))
    tensor_over(memory, 5, (2,), torch.float32).fill_(1.0)
    assert bytes(memory[5:13]) == bytes.fromhex("0000803f") * 2
    assert not any(memory[:5])
    assert not any(memory[13:])


@pytest.mark.parametrize("shape", [(0,), (4, 0), (0, 3, 2)])
def test_a_view_of_nothing_has_the_shape(shape: tuple[int, ...]) -> None:
    view = tensor_over(memoryview(bytearray(8)), 8, shape, torch.float16)
    assert (tuple(view.shape), view.dtype) == (shape, torch.float16)


def test_a_view_of_a_scalar_has_one_element() -> None:
    memory = memoryview(bytearray(torch.tensor([11], dtype=torch.int64).numpy().tobytes()))
    assert tensor_over(memory, 0, (), torch.int64) == 11


def test_a_view_beyond_the_mapping_is_refused() -> None:
    with pytest.raises(ValueError, match="buffer"):
        tensor_over(memoryview(bytearray(16)), 8, (4,), torch.float32)


def mapped(path: Path) -> memoryview:
    with path.open("rb") as file:
        return map_private(file.fileno())


def test_writes_to_a_private_mapping_never_reach_the_file(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes(range(256)) * 64)
    memory = mapped(path)
    view = tensor_over(memory, 3, (8,), torch.uint8)
    assert view.tolist() == list(range(3, 11))
    view.fill_(99)
    assert tensor_over(memory, 3, (8,), torch.uint8).tolist() == [99] * 8
    assert path.read_bytes() == bytes(range(256)) * 64


def test_a_private_mapping_reserves_no_memory_and_takes_what_is_written(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(2**40)  # 1 TiB, a hole: far more than any machine that runs this has
    before = status_bytes("RssAnon")
    memory = mapped(path)
    tensor_over(memory, 2**39, (1024,), torch.uint8).fill_(1)
    assert status_bytes("RssAnon") - before < MIB


def test_private_pages_are_seen_once_something_was_written(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(bytes(4 * PAGE))
    memories = {name: mapped(tmp_path / name) for name in ("a", "b")}
    views = {name: tensor_over(memory, PAGE + 8, (4,), torch.float32) for name, memory in memories.items()}
    assert all(float(view.sum()) == 0.0 for view in views.values())
    assert not any(has_private_pages(view) for view in views.values()), "a read makes no private page"
    views["a"].fill_(1.0)
    assert has_private_pages(views["a"])
    assert not has_private_pages(views["b"])


def test_private_pages_are_seen_while_a_forked_child_shares_them(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes(4 * PAGE))
    memory = mapped(path)
    view = tensor_over(memory, 0, (4,), torch.float32)
    view.fill_(1.0)
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:  # a data worker: alive until the parent has looked
        try:
            os.close(writes)
            os.read(reads, 1)
        finally:
            os._exit(0)
    os.close(reads)
    try:
        assert has_private_pages(view)
    finally:
        os.close(writes)
        os.waitpid(child, 0)


# ---- how much is left ----


@pytest.fixture
def fake_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where /proc and /sys are looked for, on a machine with 64 GiB available."""
    monkeypatch.setattr(host_memory, "_ROOT", tmp_path)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=64 * 2**30))
    return tmp_path


def in_groups(root: Path, *lines: str) -> None:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text("".join(f"{line}\n" for line in lines))


def write_cgroup(root: Path, files: dict[str, object]) -> None:
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")


def test_without_a_cgroup_the_machines_available_memory_counts(fake_root: Path) -> None:
    assert available_host_bytes() == 64 * 2**30


def test_a_cgroup_2_limit_counts_with_its_page_cache_as_free(fake_root: Path) -> None:
    stat = "anon 700\ninactive_file 100\nactive_file 50\nshmem 3"
    write_cgroup(fake_root, {"memory.max": 10_000, "memory.current": 1_000, "memory.stat": stat})
    assert available_host_bytes() == 10_000 - (1_000 - 150)


def test_a_cgroup_2_without_a_limit_does_not_count(fake_root: Path) -> None:
    write_cgroup(fake_root, {"memory.max": "max", "memory.current": 1_000, "memory.stat": "anon 1"})
    assert available_host_bytes() == 64 * 2**30


def test_a_cgroup_1_limit_counts(fake_root: Path) -> None:
    write_cgroup(
        fake_root,
        {
            "memory/memory.limit_in_bytes": 20_000,
            "memory/memory.usage_in_bytes": 6_000,
            "memory/memory.stat": "cache 9\ninactive_file 4\ntotal_inactive_file 400\ntotal_active_file 100",
        },
    )
    assert available_host_bytes() == 20_000 - 5_500


def test_the_unlimited_value_of_cgroup_1_leaves_the_machines_memory(fake_root: Path) -> None:
    write_cgroup(
        fake_root,
        {
            "memory/memory.limit_in_bytes": 9223372036854771712,
            "memory/memory.usage_in_bytes": 6_000,
            "memory/memory.stat": "cache 0",
        },
    )
    assert available_host_bytes() == 64 * 2**30


def test_a_limit_of_the_group_that_the_process_is_in_counts_below_the_root(fake_root: Path) -> None:
    in_groups(fake_root, "0::/slurm/job_7")
    write_cgroup(
        fake_root,
        {
            "slurm/memory.max": 9_000,
            "slurm/memory.current": 500,
            "slurm/memory.stat": "inactive_file 0",
            "slurm/job_7/memory.max": "max",
            "slurm/job_7/memory.current": 400,
            "slurm/job_7/memory.stat": "inactive_file 0",
        },
    )
    assert available_host_bytes() == 8_500


def test_the_tightest_of_nested_groups_counts(fake_root: Path) -> None:
    in_groups(fake_root, "12:cpu,cpuacct:/user", "5:memory:/a/b", "0::/elsewhere")
    for group, limit, usage in (("memory/", 50_000, 10), ("memory/a/", 7_000, 1_000), ("memory/a/b/", 40_000, 900)):
        write_cgroup(
            fake_root,
            {
                f"{group}memory.limit_in_bytes": limit,
                f"{group}memory.usage_in_bytes": usage,
                f"{group}memory.stat": "total_inactive_file 5",
            },
        )
    assert available_host_bytes() == 7_000 - (1_000 - 5)


def test_a_group_that_is_not_mounted_here_does_not_count(fake_root: Path) -> None:
    in_groups(fake_root, "0::/../host/kubepods/pod", "1:name=systemd:/")
    assert available_host_bytes() == 64 * 2**30


def test_a_cgroup_above_its_limit_leaves_nothing_rather_than_less(fake_root: Path) -> None:
    write_cgroup(fake_root, {"memory.max": 1_000, "memory.current": 5_000, "memory.stat": "inactive_file 0"})
    assert available_host_bytes() == 0


def test_a_limit_of_the_address_space_counts(fake_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (fake_root / "proc/self").mkdir(parents=True)
    (fake_root / "proc/self/statm").write_text("1000 10 1 1 0 1 0\n")
    (fake_root / "proc/self/cgroup").write_text("")
    monkeypatch.setattr(host_memory.resource, "getrlimit", lambda kind: (5_000 * PAGE, 9_000 * PAGE))
    assert available_host_bytes() == 4_000 * PAGE


def test_what_is_left_on_this_machine_is_plausible() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert 0 < available_host_bytes() <= psutil.virtual_memory().total
