"""Layouts, files, safetensors headers, the index over them, and packs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from hf_lema.files import file_set, pack
from hf_lema.files.checkpoint import (
    ALIGNMENT,
    CheckpointIndex,
    FileSet,
    LayerLayout,
    ReadSpan,
    make_layout,
    merge_spans,
    read_header,
    read_spans_into,
)
from hf_lema.files.pack import PAGE_BYTES, PackWriter, open_pack

DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
]


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def random_bytes_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    if dtype == torch.bool:
        return torch.rand(shape) < 0.5
    return torch.randint(0, 255, (*shape, dtype.itemsize), dtype=torch.uint8).view(dtype).view(shape)


# ---------------------------------------------------------------------------------------------------------- layouts


def test_every_tensor_and_the_end_of_a_layer_lie_at_multiples_of_the_alignment():
    layout = make_layout(3, {"a": ((3, 5), torch.float16), "b": ((), torch.float32), "c": ((129,), torch.bfloat16)})
    assert [spec.offset_bytes for spec in layout.tensors] == [0, 256, 512]
    assert [spec.nbytes for spec in layout.tensors] == [30, 4, 258]
    assert layout.nbytes == 1024
    assert layout.layer_idx == 3


def test_views_are_the_buffers_own_memory_with_true_shapes_and_dtypes():
    tensors = {str(dtype): random_bytes_tensor((2, 7), dtype) for dtype in DTYPES}
    tensors["scalar"], tensors["empty"] = torch.tensor(1.5), torch.empty(0, 4)
    layout = make_layout(0, {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()})
    buffer = torch.zeros(layout.nbytes + 100, dtype=torch.uint8)
    for name, view in layout.views(buffer).items():
        view.copy_(tensors[name])
    for spec in layout.tensors:
        assert (spec.shape, spec.dtype) == (tuple(tensors[spec.name].shape), tensors[spec.name].dtype)
        stored = buffer[spec.offset_bytes : spec.offset_bytes + spec.nbytes]
        assert bytes_of(stored) == bytes_of(tensors[spec.name])


def test_a_layer_without_tensors_takes_no_bytes():
    layout = make_layout(0, {})
    assert layout.nbytes == 0
    assert layout.views(torch.empty(0, dtype=torch.uint8)) == {}


@pytest.mark.parametrize(
    ("buffer", "message"),
    [
        (torch.zeros(511, dtype=torch.uint8), "511 bytes, the layer needs 512"),
        (torch.zeros(512, dtype=torch.int8), "must be 1-D contiguous torch.uint8"),
        (torch.zeros(2, 512, dtype=torch.uint8), "must be 1-D contiguous torch.uint8"),
        (torch.zeros(1024, dtype=torch.uint8)[::2], "must be 1-D contiguous torch.uint8"),
        (torch.zeros(1024, dtype=torch.uint8)[8:], "starts at byte 8 of its storage"),
    ],
)
def test_a_buffer_that_cannot_hold_the_layer_is_refused(buffer: torch.Tensor, message: str):
    layout = make_layout(0, {"a": ((100,), torch.float32)})
    with pytest.raises(ValueError, match=message):
        layout.views(buffer)


def test_layouts_refuse_negative_numbers_naming_all():
    with pytest.raises(ValueError, match=r"'a': \(-1,\), 'b': \(2, -3\)"):
        make_layout(0, {"a": ((-1,), torch.int8), "b": ((2, -3), torch.int8)})
    with pytest.raises(ValueError, match="layer_idx"):
        make_layout(-1, {})


# ------------------------------------------------------------------------------------------------------------ files


def write_file(path: Path, content: bytes) -> FileSet:
    path.write_bytes(content)
    return FileSet({path: len(content)})


def test_short_reads_of_the_system_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path, content = tmp_path / "f", bytes(range(256)) * 4
    preadv, calls = os.preadv, []

    def three_bytes(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        calls.append(offset)
        return preadv(descriptor, [buffers[0][:3]], offset)

    monkeypatch.setattr(file_set.os, "preadv", three_bytes)
    out = bytearray(100)
    with write_file(path, content) as files:
        files.pread_into(path, 50, memoryview(out))
    assert bytes(out) == content[50:150]
    assert calls == list(range(50, 150, 3))


def test_a_read_beyond_the_end_names_file_place_and_counts(tmp_path: Path):
    path = tmp_path / "f"
    span = ReadSpan(path=path, file_offset_bytes=90, nbytes=20, layer_offset_bytes=256)
    with (
        write_file(path, bytes(100)) as files,
        pytest.raises(ValueError, match=rf"bytes 256 to 276 of the layer: {path} .*wanted 20 .* offset 90, got 10"),
    ):
        read_spans_into(files, [span], torch.zeros(512, dtype=torch.uint8))


@pytest.mark.parametrize("content", [b"", bytes(99), bytes(101)])
def test_a_file_that_changed_its_size_since_it_was_indexed_is_refused(tmp_path: Path, content: bytes):
    files = write_file(tmp_path / "f", bytes(100))
    (tmp_path / "f").write_bytes(content)
    with files, pytest.raises(ValueError, match=rf"has {len(content)} bytes, but had 100 when it was indexed"):
        files.pread_into(tmp_path / "f", 0, memoryview(bytearray(1)))


def test_files_that_are_gone_or_unknown_are_errors(tmp_path: Path):
    with write_file(tmp_path / "f", b"x") as files:
        (tmp_path / "f").unlink()
        with pytest.raises(FileNotFoundError):
            files.pread_into(tmp_path / "f", 0, memoryview(bytearray(1)))
        with pytest.raises(ValueError, match="not one of the 1 files"):
            files.pread_into(tmp_path / "g", 0, memoryview(bytearray(1)))


def open_descriptors(path: Path) -> int:
    links = [Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd")]
    return sum(link.is_symlink() and os.readlink(link) == str(path) for link in links)


def test_descriptors_open_once_and_close_for_good(tmp_path: Path):
    path = tmp_path / "f"
    files = write_file(path, b"hello")
    assert open_descriptors(path) == 0
    for _ in range(2):
        files.pread_into(path, 0, memoryview(bytearray(5)))
    assert open_descriptors(path) == 1
    files.close()
    files.close()
    assert open_descriptors(path) == 0
    with pytest.raises(RuntimeError, match="closed"):
        files.pread_into(path, 0, memoryview(bytearray(5)))


def test_close_during_a_read_lets_it_finish_and_then_closes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path, out = tmp_path / "f", bytearray(5)
    files = write_file(path, b"hello")
    reading, closed, preadv = threading.Event(), threading.Event(), os.preadv

    def gated(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        reading.set()
        assert closed.wait(10)
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(file_set.os, "preadv", gated)
    reader = threading.Thread(target=files.pread_into, args=(path, 0, memoryview(out)))
    reader.start()
    assert reading.wait(10)
    files.close()
    assert open_descriptors(path) == 1
    closed.set()
    reader.join(10)
    assert bytes(out) == b"hello"
    assert open_descriptors(path) == 0


def test_many_threads_read_one_layer_together(tmp_path: Path):
    content = os.urandom(64 * 1000)
    out = torch.zeros(len(content), dtype=torch.uint8)
    path = tmp_path / "f"
    spans = [ReadSpan(path=path, file_offset_bytes=i, nbytes=1000, layer_offset_bytes=i) for i in range(0, 64000, 1000)]
    with write_file(path, content) as files:
        threads = [threading.Thread(target=read_spans_into, args=(files, spans[i::8], out)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert open_descriptors(path) == 1
    assert bytes_of(out) == content


def test_spans_merge_only_where_file_and_layer_both_go_on(tmp_path: Path):
    def span(at: int, nbytes: int, to: int, path: Path = tmp_path / "a") -> ReadSpan:
        return ReadSpan(path=path, file_offset_bytes=at, nbytes=nbytes, layer_offset_bytes=to)

    assert merge_spans([span(110, 20, 10), span(100, 10, 0), span(130, 0, 30)]) == (span(100, 30, 0),)
    for apart in (span(111, 5, 10), span(110, 5, 11), span(110, 5, 10, tmp_path / "b")):
        assert merge_spans([span(100, 10, 0), apart]) == (span(100, 10, 0), apart)


def test_spans_that_leave_the_buffer_or_a_wrong_buffer_are_refused(tmp_path: Path):
    span = ReadSpan(path=tmp_path / "f", file_offset_bytes=0, nbytes=10, layer_offset_bytes=0)
    with write_file(tmp_path / "f", bytes(10)) as files:
        with pytest.raises(ValueError, match="ends at byte 10 of the layer, the buffer has 9"):
            read_spans_into(files, [span], torch.zeros(9, dtype=torch.uint8))
        with pytest.raises(ValueError, match="expected a 1-D contiguous uint8 tensor on the CPU"):
            read_spans_into(files, [span], torch.zeros(9))


# ---------------------------------------------------------------------------------------------------------- headers


def test_a_header_agrees_with_the_reference_reader_on_every_dtype(tmp_path: Path):
    tensors = {f"t.{dtype}": random_bytes_tensor((3, 2), dtype) for dtype in DTYPES}
    tensors |= {"scalar": torch.tensor(2.0), "empty": torch.empty(0, 3), "odd": torch.ones(7, dtype=torch.uint8)}
    path = tmp_path / "model.safetensors"
    save_file(tensors, path, metadata={"format": "pt", "note": "ünïcode"})
    header, raw = read_header(path), path.read_bytes()
    assert header.metadata == {"format": "pt", "note": "ünïcode"}
    assert header.nbytes == len(raw)
    assert header.tensors.keys() == tensors.keys()
    for name, location in header.tensors.items():
        assert (location.shape, location.dtype) == (tuple(tensors[name].shape), tensors[name].dtype)
        assert raw[location.offset_bytes : location.offset_bytes + location.nbytes] == bytes_of(tensors[name])


def raw_file(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(begin: int, end: int, shape: object = None, dtype: object = "U8") -> dict[str, object]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


BAD_FILES: dict[str, tuple[bytes, list[str]]] = {
    "empty": (b"", ["announce a header of 0 bytes, but the file has 0 bytes"]),
    "seven bytes": (bytes(7), ["the file has 7 bytes"]),
    "header longer than the file": (raw_file({})[:-1], ["header of 2 bytes, but the file has 9 bytes"]),
    "absurd header": ((2**63).to_bytes(8, "little") + b"{}", [f"header of {2**63} bytes"]),
    "header over the limit": ((10**8 + 1).to_bytes(8, "little"), ["header at most 100000000"]),
    "no json": (raw_file(b"{]"), ["no JSON text"]),
    "no utf-8": (raw_file(b'{"\xff": 1}'), ["no JSON text"]),
    "too deep": (raw_file(b"[" * 100_000), ["no JSON text"]),
    "a list": (raw_file([]), ["a JSON list, expected an object"]),
    "metadata of numbers": (raw_file({"__metadata__": {"a": 1}}), ["no table of texts"]),
    "same name twice": (raw_file(b'{"a": {}, "a": {}}'), ["names 'a' more than once"]),
    "entry is no object": (raw_file({"a": 1}), ["tensor 'a': its entry is a JSON int"]),
    "unknown dtypes": (
        raw_file({"a": entry(0, 1, dtype="F4"), "b": entry(1, 2, dtype=7)}, bytes(2)),
        ["tensor 'a': unknown dtype 'F4'", "tensor 'b': unknown dtype 7"],
    ),
    "bad shapes": (
        raw_file({"a": entry(0, 1, [-1]), "b": entry(0, 1, [True]), "c": entry(0, 1, "x")}, bytes(1)),
        ["'a': shape [-1]", "'b': shape [True]", "'c': shape 'x'"],
    ),
    "bad offsets": (
        raw_file({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0]}, "b": entry(3, 2, [1])}, bytes(4)),
        ["'a': data_offsets [0], expected [begin, end]", "'b': data_offsets [3, 2] hold -1 bytes"],
    ),
    "wrong size": (raw_file({"a": entry(0, 8, [3], "F32")}, bytes(8)), ["hold 8 bytes, F32 of shape [3] needs 12"]),
    "overlap": (raw_file({"a": entry(0, 8), "b": entry(6, 10)}, bytes(10)), ["'b' overlaps 'a' by 2 bytes"]),
    "hole": (raw_file({"a": entry(0, 4), "b": entry(6, 8)}, bytes(8)), ["a hole of 2 bytes before tensor 'b'"]),
    "cut": (raw_file({"a": entry(0, 8)}, bytes(5)), ["it was cut", "describes"]),
    "out of range": (raw_file({"a": entry(0, 2**60)}, bytes(5)), ["it was cut"]),
    "bytes behind": (raw_file({"a": entry(0, 4)}, bytes(5)), ["its header describes only"]),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_damaged_file_is_refused_with_all_that_is_wrong_in_it(tmp_path: Path, case: str):
    content, messages = BAD_FILES[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=str(path)) as caught:
        read_header(path)
    for message in messages:
        assert message in str(caught.value)


GOOD_FILE = raw_file({"__metadata__": {"k": "v"}, "a": entry(0, 8, [2], "F32"), "b": entry(8, 10)}, bytes(10))


@given(st.lists(st.tuples(st.integers(0, len(GOOD_FILE) - 1), st.integers(0, 255)), min_size=1, max_size=4))
@settings(max_examples=300, deadline=None)
def test_no_damage_gets_past_the_checks_or_raises_anything_but_value_error(
    tmp_path_factory: pytest.TempPathFactory, flips: list[tuple[int, int]]
):
    content = bytearray(GOOD_FILE)
    for position, value in flips:
        content[position] = value
    path = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    path.write_bytes(content)
    try:
        header = read_header(path)
    except ValueError:
        return
    assert sum(location.nbytes for location in header.tensors.values()) == 10
    assert all(location.offset_bytes + location.nbytes <= len(content) for location in header.tensors.values())


# ------------------------------------------------------------------------------------------------------------ index


def save_sharded(folder: Path, shards: dict[str, dict[str, torch.Tensor]]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, tensors in shards.items():
        save_file(tensors, folder / name, metadata={"format": "pt"})
    weight_map = {tensor: name for name, tensors in shards.items() for tensor in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return save_sharded(
        tmp_path / "m",
        {"s1.safetensors": {"a": torch.arange(4.0)}, "s2.safetensors": {"b": torch.ones(3), "c": torch.zeros(2)}},
    )


def test_one_file_and_many_index_to_the_same_tensors(tmp_path: Path, sharded: Path):
    (tmp_path / "one").mkdir()
    tensors = {"a": torch.arange(4.0), "b": torch.ones(3), "c": torch.zeros(2)}
    save_file(tensors, tmp_path / "one" / "model.safetensors", metadata={"format": "pt"})
    for folder in (sharded, tmp_path / "one"):
        index = CheckpointIndex.open(folder)
        assert index.metadata == {"format": "pt"}
        assert index.tensors.keys() == tensors.keys()
        with index.open_files() as files:
            for name, location in index.tensors.items():
                out = bytearray(location.nbytes)
                files.pread_into(location.path, location.offset_bytes, memoryview(out))
                assert bytes(out) == bytes_of(tensors[name])


def test_the_plain_file_is_preferred_to_shards_as_stock_does(sharded: Path):
    save_file({"only": torch.ones(1)}, sharded / "model.safetensors")
    assert list(CheckpointIndex.open(sharded).tensors) == ["only"]


def test_a_single_file_of_any_name_is_found(tmp_path: Path):
    save_file({"x": torch.ones(1)}, tmp_path / "weights.safetensors")
    assert list(CheckpointIndex.open(tmp_path).tensors) == ["x"]


def test_links_that_lead_out_of_the_folder_are_followed_as_in_the_hubs_cache(tmp_path: Path):
    blobs = save_sharded(tmp_path / "blobs", {"s1.safetensors": {"a": torch.ones(2)}})
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(file)
    assert list(CheckpointIndex.open(snapshot).tensors) == ["a"]


def change_index(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


@pytest.mark.parametrize("outside", ["../s1.safetensors", "/etc/passwd", "sub/../../x.safetensors", ""])
def test_an_index_that_names_a_file_outside_its_folder_is_refused(sharded: Path, outside: str):
    change_index(sharded, lambda weight_map: weight_map.update(a=outside, b="../../b"))
    with pytest.raises(ValueError, match="outside its folder") as caught:
        CheckpointIndex.open(sharded)
    assert repr(outside) in str(caught.value)
    assert "'../../b'" in str(caught.value)


def test_all_missing_shards_are_named(sharded: Path):
    change_index(sharded, lambda weight_map: weight_map.update(d="s3.safetensors"))
    (sharded / "s1.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"missing are 2: s1\.safetensors, s3\.safetensors"):
        CheckpointIndex.open(sharded)


def test_all_damaged_shards_are_named(sharded: Path):
    for name in ("s1.safetensors", "s2.safetensors"):
        os.truncate(sharded / name, (sharded / name).stat().st_size - 1)
    with pytest.raises(ValueError, match=r"s1\.safetensors[\s\S]*it was cut[\s\S]*s2\.safetensors[\s\S]*it was cut"):
        CheckpointIndex.open(sharded)


def test_tensors_that_the_index_expects_elsewhere_are_all_named(sharded: Path):
    change_index(sharded, lambda weight_map: weight_map.update(a="s2.safetensors", z="s1.safetensors"))
    with pytest.raises(ValueError, match=r"'a' is not in s2\.safetensors[\s\S]*'z' is not in s1\.safetensors"):
        CheckpointIndex.open(sharded)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path):
    folder = save_sharded(
        tmp_path / "m",
        {"s1.safetensors": {"a": torch.ones(1)}, "s2.safetensors": {"a": torch.ones(1), "b": torch.ones(1)}},
    )
    change_index(folder, lambda weight_map: weight_map.update(x="s1.safetensors"))
    with pytest.raises(ValueError, match="tensor 'a' is in two shards"):
        CheckpointIndex.open(folder)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "[" * 100_000])
def test_a_damaged_index_is_refused(sharded: Path, text: str):
    (sharded / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"index\.json (is no JSON text|has no 'weight_map')"):
        CheckpointIndex.open(sharded)


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("pytorch_model.bin", "hf-lema pack"),
        ("consolidated.00.pth", "save_pretrained"),
        ("model.pt", "save_pretrained"),
    ],
)
def test_pickled_weights_alone_are_never_opened_but_the_remedy_is_named(tmp_path: Path, name: str, remedy: str):
    (tmp_path / name).write_bytes(b"a pickle")
    with pytest.raises(FileNotFoundError, match=rf"only {name}\. Convert it once .*{remedy}"):
        CheckpointIndex.open(tmp_path)


def test_folders_without_a_model_are_refused(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="is no folder"):
        CheckpointIndex.open(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="holds no safetensors file, expected"):
        CheckpointIndex.open(tmp_path)
    save_file({"x": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(FileNotFoundError, match="only an adapter"):
        CheckpointIndex.open(tmp_path)
    save_file({"x": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors, other\.safetensors\) but no"):
        CheckpointIndex.open(tmp_path)


def test_the_identity_changes_with_the_checkpoint_and_only_then(sharded: Path):
    identity = CheckpointIndex.open(sharded).identity()
    assert CheckpointIndex.open(sharded).identity() == identity
    shard = sharded / "s1.safetensors"
    stat = shard.stat()
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x7f")
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert CheckpointIndex.open(sharded).identity() != identity


# ------------------------------------------------------------------------------------------------------------ packs

LAYOUTS = tuple(
    make_layout(i, {"w": ((5, 7 + i), torch.bfloat16), "b": ((3,), torch.float32), "m": ((2,), torch.bool)})
    for i in range(3)
)


def layer_bytes(layout: LayerLayout) -> torch.Tensor:
    return torch.arange(layout.nbytes).add(layout.layer_idx).to(torch.uint8)


def write_whole(path: Path) -> None:
    with PackWriter(path, LAYOUTS, source_identity="abc", dtype=torch.bfloat16) as writer:
        for layout in LAYOUTS:
            writer.write_layer(layout.layer_idx, torch.cat([layer_bytes(layout), torch.zeros(9, dtype=torch.uint8)]))


def test_a_pack_gives_back_layouts_bytes_and_origin(tmp_path: Path):
    path = tmp_path / "new" / "p.lema.safetensors"
    write_whole(path)
    index = open_pack(path)
    assert (index.layouts, index.source_identity, index.dtype) == (LAYOUTS, "abc", "bfloat16")
    assert index.nbytes == path.stat().st_size
    with index.open_files() as files:
        for layout, spans in zip(index.layouts, index.spans, strict=True):
            assert [(span.layer_offset_bytes, span.nbytes) for span in spans] == [(0, layout.nbytes)]
            out = torch.zeros(layout.nbytes, dtype=torch.uint8)
            read_spans_into(files, spans, out)
            assert torch.equal(out, layer_bytes(layout))
    assert sorted(path.parent.iterdir()) == [path]


def test_a_pack_is_a_safetensors_file_whose_data_starts_at_a_page(tmp_path: Path):
    path = tmp_path / "p.lema.safetensors"
    write_whole(path)
    with safe_open(path, framework="pt") as file:
        assert set(file.keys()) == {f"layer.{layout.layer_idx}" for layout in LAYOUTS}
        for layout in LAYOUTS:
            assert torch.equal(file.get_tensor(f"layer.{layout.layer_idx}"), layer_bytes(layout))
    begin = min(location.offset_bytes for location in read_header(path).tensors.values())
    assert begin % PAGE_BYTES == 0
    assert all(span.file_offset_bytes % ALIGNMENT == 0 for spans in open_pack(path).spans for span in spans)


def test_an_error_while_writing_leaves_the_old_pack_and_nothing_else(tmp_path: Path):
    path = tmp_path / "p.lema.safetensors"
    write_whole(path)
    before = path.read_bytes()

    def interrupted() -> None:
        with PackWriter(path, LAYOUTS, source_identity="other", dtype="float16") as writer:
            writer.write_layer(0, layer_bytes(LAYOUTS[0]))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert sorted(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == before


def test_a_pack_that_lacks_layers_is_not_kept(tmp_path: Path):
    writer = PackWriter(tmp_path / "p", LAYOUTS, source_identity="", dtype="")
    with pytest.raises(RuntimeError, match=r"layers \[1, 2\] were not written"), writer:
        writer.write_layer(0, layer_bytes(LAYOUTS[0]))
    assert list(tmp_path.iterdir()) == []


KILLED_WRITER = """
import os, signal, sys, torch
from hf_lema.files.layout import make_layout
from hf_lema.files.pack import PackWriter
layouts = [make_layout(i, {"w": ((64,), torch.float32)}) for i in range(2)]
writer = PackWriter(sys.argv[1], layouts, source_identity="", dtype="")
writer.__enter__()
writer.write_layer(0, torch.zeros(256, dtype=torch.uint8))
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_writer_leaves_no_pack_and_the_next_one_removes_its_rest(tmp_path: Path):
    path = tmp_path / "p.lema.safetensors"
    killed = subprocess.run([sys.executable, "-c", KILLED_WRITER, str(path)], check=False)
    assert killed.returncode == -9
    assert not path.exists()
    assert len(list(tmp_path.iterdir())) == 1
    living = PackWriter(path, LAYOUTS, source_identity="", dtype="")
    living._partial_path = tmp_path / f".{path.name}.living.partial"
    with living:
        write_whole(path)
        assert sorted(tmp_path.iterdir()) == sorted([path, living._partial_path])
        for layout in LAYOUTS:
            living.write_layer(layout.layer_idx, layer_bytes(layout))


def test_too_little_disk_space_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pack.shutil, "disk_usage", lambda folder: FreeDisk())
    with (
        pytest.raises(OSError, match=r"needs 6\.\d\d KiB, .* has 1000 B left.*HF_LEMA_CACHE"),
        PackWriter(tmp_path / "p", LAYOUTS, source_identity="", dtype=""),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


class FreeDisk:
    free = 1000


def test_layers_out_of_turn_and_wrong_buffers_are_refused(tmp_path: Path):
    writer = PackWriter(tmp_path / "p", LAYOUTS, source_identity="", dtype="")
    with pytest.raises(RuntimeError, match="not open for writing"):
        writer.write_layer(0, layer_bytes(LAYOUTS[0]))
    with pytest.raises(ValueError, match="got layer 1, due was 0"), writer:
        writer.write_layer(1, layer_bytes(LAYOUTS[1]))
    with pytest.raises(ValueError, match="has 10 bytes, the layer"), writer:
        writer.write_layer(0, torch.zeros(10, dtype=torch.uint8))
    with pytest.raises(ValueError, match="expected a 1-D uint8 tensor"), writer:
        writer.write_layer(0, torch.zeros(LAYOUTS[0].nbytes))
    with pytest.raises(ValueError, match="layers appear twice"):
        PackWriter(tmp_path / "p", (LAYOUTS[0], LAYOUTS[0]), source_identity="", dtype="")
    with pytest.raises(ValueError, match="no name in safetensors"):
        PackWriter(tmp_path / "p", (make_layout(0, {"q": ((1,), torch.complex128)}),), source_identity="", dtype="")


def test_foreign_damaged_and_other_version_packs_are_told_apart(tmp_path: Path):
    path = tmp_path / "p.lema.safetensors"
    save_file({"layer.0": torch.ones(1)}, path)
    with pytest.raises(ValueError, match="is no pack: its format is None"):
        open_pack(path)
    write_whole(path)
    good = path.read_bytes()
    path.write_bytes(good.replace(b'"version":"2"', b'"version":"9"'))
    with pytest.raises(ValueError, match="pack of version '9', this release reads version '2'"):
        open_pack(path)
    path.write_bytes(good.replace(b'"abc"', b'"ab "').replace(b'"layouts"', b'"layoutz"'))
    with pytest.raises(ValueError, match="metadata is damaged"):
        open_pack(path)
    path.write_bytes(good.replace(b'\\"w\\",\\"BF16\\",[5,9]', b'\\"w\\",\\"BF16\\",[999]'))
    with pytest.raises(ValueError, match=r"layers do not fit its layouts \(layer\.2: \d+ bytes, expected \d+\)"):
        open_pack(path)
    path.write_bytes(good[:-1])
    with pytest.raises(ValueError, match="it was cut"):
        open_pack(path)
    with pytest.raises(FileNotFoundError):
        open_pack(tmp_path / "nowhere")
