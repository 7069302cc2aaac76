"""Damaged and hostile files, in any number: each ends in an error that names the file, or in the right answer.

``python tests/fuzz_files.py --cases 100000 --json record.json`` runs all targets in proportion to their speed;
``--engine atheris`` lets libFuzzer choose the bytes of the targets that are one file (pip install atheris). The short
form is in tests/test_fuzz.py.

What every case must keep: no exception but those in `ALLOWED`, and its message names the file and can be printed; no
file is opened outside the folder of the case; the address space may not grow by more than `MAX_GROWTH_BYTES`, whatever
a header says; no case takes longer than `MAX_CASE_S`.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from inspect import isfunction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hypothesis
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize
from safetensors.torch import save

from hf_lema.export.unpickling import convert_pickled
from hf_lema.files.checkpoint import DTYPES, CheckpointIndex, read_header, read_spans_into
from hf_lema.files.pack import PackWriter, layouts_to_json, make_layout, open_pack
from hf_lema.files.safetensors_header import SafetensorsHeader
from hf_lema.model.adapter import AdapterOnMeta, find_adapter
from hf_lema.model.packing import given_pack
from hf_lema.model.row_merge import RowMerger
from hf_lema.runtime.packed_checkpoint import split_packed

ALLOWED = (ValueError, FileNotFoundError, FileExistsError, IsADirectoryError, PermissionError)
MAX_GROWTH_BYTES = 2**30
MAX_CASE_S = 20
MAX_MESSAGE_CHARS = 200_000

# ------------------------------------------------------------------------------------------------ JSON, well or badly


@dataclass(frozen=True)
class Raw:
    """A piece of JSON text, right or not."""

    text: str


@dataclass(frozen=True)
class Pairs:
    """An object whose names may come twice."""

    pairs: tuple[tuple[str, Any], ...]


def dump(value: Any) -> str:
    if isinstance(value, Raw):
        return value.text
    if isinstance(value, dict):
        value = Pairs(tuple(value.items()))
    if isinstance(value, Pairs):
        return "{" + ",".join(f"{json.dumps(name)}:{dump(item)}" for name, item in value.pairs) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(dump, value)) + "]"
    return json.dumps(value)


PATHS = ["../secret.safetensors", "/etc/passwd", "a/../../secret.safetensors", "./x", "", ".", "..", "\0", "x" * 300]
PATHS += ["link.safetensors", "loop.safetensors", "folder", "pipe", "\ud800", "\udcff", "model-1.safetensors"]
NUMBERS = [0, 1, -1, 2, 7, 255, 2**31, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64, 10**30, 10**4000]
absurd = st.one_of(
    st.sampled_from([None, True, False, [], {}, "", "F32", "nf4", *PATHS]),
    st.sampled_from(NUMBERS),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(st.characters(), max_size=5),
    st.lists(st.sampled_from(NUMBERS), max_size=4),
    st.sampled_from([2, 70, 3000]).map(lambda n: [2**62] * n),
    st.sampled_from([900, 100_000]).map(lambda n: Raw("[" * n + "]" * n)),
    st.sampled_from(["NaN", "-Infinity", "1e999", "9" * 5000, "nul", "'a'", '"\\ud800"', '"\udcff"']).map(Raw),
)


def places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


@st.composite
def changed(draw: st.DrawFn, tree: Any, max_changes: int = 3) -> Any:
    """A JSON value with up to so many places changed, taken out, or named twice."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.sampled_from([0, 1, 1, 1, *range(2, max_changes + 1)]))):
        at = draw(st.sampled_from(list(places(tree))))
        if not at:
            continue
        *above, key = at
        holder = tree
        for step in above:
            holder = holder[step]
        what = draw(st.sampled_from(["replace", "replace", "delete", "twice", "rename"]))
        if what == "replace":
            holder[key] = draw(absurd)
        elif what == "delete":
            del holder[key]
        elif isinstance(holder, list):
            holder.append(copy.deepcopy(holder[key]))
        elif what == "rename":
            holder[draw(st.sampled_from([*PATHS, *map(str, holder)]))] = holder.pop(key)
        elif above:
            outer = tree
            for step in above[:-1]:
                outer = outer[step]
            outer[above[-1]] = Pairs((*holder.items(), (key, draw(absurd))))
        else:
            return Pairs((*tree.items(), (key, draw(absurd))))
    return tree


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """The bytes of a file, perhaps cut, flipped, overwritten or longer than they were."""
    how = draw(st.sampled_from(["no"] * 10 + ["flip", "flip", "cut", "empty", "more", "splice"]))
    if how == "flip":
        mutable = bytearray(content)
        for _ in range(draw(st.integers(1, 4)) if content else 0):
            mutable[draw(st.integers(0, len(content) - 1))] = draw(st.integers(0, 255))
        return bytes(mutable)
    if how == "cut":
        return content[: draw(st.integers(0, len(content)))]
    if how == "empty":
        return b""
    if how == "more":
        return content + draw(st.binary(min_size=1, max_size=9))
    if how == "splice":
        at = draw(st.integers(0, len(content)))
        return content[:at] + draw(st.binary(max_size=9)) + content[at + draw(st.integers(0, 9)) :]
    return content


def to_bytes(tree: Any) -> bytes:
    return dump(tree).encode("utf-8", "surrogateescape")


def assemble(header: Any, data: bytes) -> bytes:
    text = to_bytes(header)
    return len(text).to_bytes(8, "little") + text + data


def taken_apart(content: bytes) -> tuple[dict[str, Any], bytes]:
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


@st.composite
def safetensors_file(draw: st.DrawFn, content: bytes) -> bytes:
    """A safetensors file whose header, lengths or data may be anything."""
    header, data = taken_apart(content)
    made = assemble(draw(changed(header)), data)
    if draw(st.integers(0, 9)) == 0:
        made = draw(st.sampled_from(NUMBERS).filter(lambda n: 0 <= n < 2**64)).to_bytes(8, "little") + made[8:]
    return draw(damaged(made))


# ------------------------------------------------------------------------------------------------------ what is watched

_watched: list[Path] = []
_trespasses: list[str] = []
_LIBRARIES = (sys.prefix, sys.base_prefix, "/usr/lib", "/proc/self", "/sys/", "/dev/null")
_SOURCES = str(Path(__file__).resolve().parents[1])


def _on_open(event: str, arguments: tuple[Any, ...]) -> None:
    if event != "open" or not _watched or not isinstance(arguments[0], (str, bytes)):
        return
    path = os.path.abspath(os.fsdecode(arguments[0]))
    own = _watched[0]
    in_code = path.startswith((*_LIBRARIES, _SOURCES)) and path.endswith((".py", ".pyc", ".so", ".json", ".jinja"))
    if not in_code and not Path(path).is_relative_to(own) and not path.startswith(("/proc/", "/sys/", "/dev/null")):
        _trespasses.append(path)


@contextmanager
def watching(folder: Path) -> Iterator[None]:
    """Notes every file that is opened outside a folder. Links inside it are the folder's own."""
    if not _on_open.__dict__:
        sys.addaudithook(_on_open)
        _on_open.__dict__["is_installed"] = True
    _watched[:] = [folder]
    _trespasses.clear()
    try:
        yield
    finally:
        _watched.clear()


@contextmanager
def bounded() -> Iterator[None]:
    """Bounds the growth of the address space, and the time of a case."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    size_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size_bytes + MAX_GROWTH_BYTES, hard))

    def too_long(*_: Any) -> None:
        raise AssertionError(f"a case took more than {MAX_CASE_S} s")

    before = signal.signal(signal.SIGALRM, too_long)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))


@dataclass
class Outcomes:
    """How many cases ended how."""

    ends: Counter[str] = field(default_factory=Counter)
    slowest_s: float = 0.0
    longest_message_chars: int = 0

    def attempt(self, folder: Path, names: tuple[str, ...], use: Callable[[], object]) -> None:
        """Runs one case.

        Args:
            folder: All that it may open.
            names: One of them is in every message: names of what was given.
            use: Reads the files; asserts that what it gets is right.
        """
        start_s = time.perf_counter()
        signal.setitimer(signal.ITIMER_REAL, MAX_CASE_S)
        message = ""
        try:
            with watching(folder):
                use()
            self.ends["right answer"] += 1
        except ALLOWED as error:
            self.ends[type(error).__name__] += 1
            message = str(error)
            if not any(name in message for name in names):
                raise AssertionError(f"names none of {names}: {message[:500]}") from error
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        message.encode()
        assert len(message) <= MAX_MESSAGE_CHARS, f"a message of {len(message)} characters"
        self.longest_message_chars = max(self.longest_message_chars, len(message))
        assert not _trespasses, f"opened outside {folder}: {_trespasses}"
        self.slowest_s = max(self.slowest_s, time.perf_counter() - start_s)

    @property
    def num_cases(self) -> int:
        return sum(self.ends.values())


# ------------------------------------------------------------------------------------------------------------- targets

Case = dict[str, bytes]
"""Name of a file -> what it holds."""


def write(folder: Path, files: Case) -> None:
    """Puts a case into its folder, which also holds a link, a loop of links, a folder and a pipe."""
    for path in folder.iterdir():
        if path.name not in _FURNITURE:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    for name, content in files.items():
        (folder / name).write_bytes(content)


_FURNITURE = ("link.safetensors", "loop.safetensors", "folder", "pipe")


def furnish(folder: Path) -> None:
    folder.mkdir()
    (folder.parent / "secret.safetensors").write_bytes(save({"secret": torch.ones(3)}))
    (folder / "link.safetensors").symlink_to(folder / "nowhere")
    (folder / "loop.safetensors").symlink_to(folder / "loop.safetensors")
    (folder / "folder").mkdir()
    os.mkfifo(folder / "pipe")


TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).view(2, 3),
    "b": torch.tensor([1, 2, 255], dtype=torch.uint8),
    "c": torch.tensor(1.5, dtype=torch.bfloat16),
    "d": torch.empty(0, 4, dtype=torch.int64),
}
ONE_FILE = save(TENSORS, metadata={"format": "pt"})


def check_header(header: SafetensorsHeader, content: bytes) -> None:
    """The reference implementation's answer is the right one; where it refuses, the rules of the format decide."""
    covered = sorted((at.offset_bytes, at.offset_bytes + at.nbytes) for at in header.tensors.values())
    end = 8 + int.from_bytes(content[:8], "little")
    for begin, tensor_end in covered:
        assert begin == end
        end = tensor_end
    assert end == len(content) == header.nbytes
    try:
        expected = dict(deserialize(content))
    except SafetensorError:
        return
    assert header.tensors.keys() == expected.keys()
    for name, location in header.tensors.items():
        assert list(location.shape) == expected[name]["shape"]
        assert DTYPES[expected[name]["dtype"]] == location.dtype
        data = content[location.offset_bytes : location.offset_bytes + location.nbytes]
        assert data == bytes(expected[name]["data"])


@st.composite
def header_cases(draw: st.DrawFn) -> Case:
    return {"model.safetensors": draw(safetensors_file(ONE_FILE))}


def use_header(folder: Path, files: Case) -> None:
    check_header(read_header(folder / "model.safetensors"), files["model.safetensors"])


SHARDS = {
    "model-1.safetensors": save({name: TENSORS[name] for name in "ab"}),
    "model-2.safetensors": save({name: TENSORS[name] for name in "cd"}),
}
INDEX = {"metadata": {"total_size": 29}, "weight_map": dict(zip("abcd", sorted(SHARDS) * 2, strict=True))}
INDEX["weight_map"] = {name: shard for shard in SHARDS for name in taken_apart(SHARDS[shard])[0]}
INDEX_NAME = "model.safetensors.index.json"


@st.composite
def index_cases(draw: st.DrawFn) -> Case:
    files = {INDEX_NAME: draw(damaged(to_bytes(draw(changed(INDEX, 2)))))}
    for name, content in SHARDS.items():
        if draw(st.integers(0, 9)):
            files[name] = draw(safetensors_file(content)) if draw(st.integers(0, 3)) == 0 else content
    if draw(st.integers(0, 9)) == 0:
        del files[INDEX_NAME]
    return files


def use_index(folder: Path, files: Case) -> None:
    index = CheckpointIndex.open(folder)
    assert len(index.identity()) == 64
    json.loads(index.fingerprint())
    for header in index.headers:
        check_header(header, files[header.path.name])
    with index.open_files() as opened:
        for location in index.tensors.values():
            found = bytearray(location.nbytes)
            opened.pread_into(location.path, location.offset_bytes, memoryview(found))
            begin = location.offset_bytes
            assert bytes(found) == files[location.path.name][begin : begin + location.nbytes]


def packed_matrix(name: str = "w", shape: tuple[int, int] = (8, 16), is_nested: bool = True) -> Any:
    from hf_lema.files.layout import PackedMatrix

    return PackedMatrix(name=name, shape=shape, dtype=torch.float32, is_nested=is_nested)


MATRIX = packed_matrix()
PLAIN_LAYOUTS = [make_layout(i, {"w": ((3, 5), torch.float16), "b": ((5,), torch.float32)}) for i in range(2)]
NF4_LAYOUTS = [make_layout(i, {"n": ((5,), torch.float32)} | MATRIX.tensors(), [MATRIX]) for i in range(2)]


def pack_bytes(layouts: list[Any]) -> bytes:
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "x.lema.safetensors"
        files = json.dumps([["model.safetensors", 10, "0" * 64, "0" * 64]])
        with PackWriter(path, layouts, source_identity="i", dtype=torch.float16, source_files=files) as writer:
            for layout in layouts:
                writer.write_layer(layout.layer_idx, torch.arange(layout.nbytes).to(torch.uint8))
        return path.read_bytes()


PACKS = {"plain": (PLAIN_LAYOUTS, pack_bytes(PLAIN_LAYOUTS)), "nf4": (NF4_LAYOUTS, pack_bytes(NF4_LAYOUTS))}


@st.composite
def pack_cases(draw: st.DrawFn) -> Case:
    layouts, content = PACKS[draw(st.sampled_from(sorted(PACKS)))]
    header, data = taken_apart(content)
    metadata = header["__metadata__"]
    if draw(st.booleans()):
        metadata["layouts"] = dump(draw(changed(json.loads(layouts_to_json(layouts)))))
    if draw(st.integers(0, 4)) == 0:
        metadata["source_files"] = dump(draw(changed(json.loads(metadata["source_files"]))))
    if draw(st.integers(0, 4)) == 0:
        metadata["version"] = draw(st.sampled_from(["1", "3", "", "2.0"]))
    metadata = {name: text.encode("utf-8", "replace").decode() for name, text in metadata.items()}
    made = assemble(header | {"__metadata__": metadata}, data)
    return {"x.lema.safetensors": draw(safetensors_file(made) if draw(st.booleans()) else damaged(made))}


def use_pack(folder: Path, files: Case) -> None:
    (content,) = files.values()
    pack = open_pack(folder / "x.lema.safetensors")
    assert sum(layout.nbytes for layout in pack.layouts) <= len(content)
    with pack.open_files() as opened:
        for layout, spans in zip(pack.layouts, pack.spans, strict=True):
            buffer = torch.zeros(layout.nbytes, dtype=torch.uint8)
            read_spans_into(opened, spans, buffer)
            views = layout.views(buffer)
            assert {name for matrix in layout.packed for name in matrix.tensors()} <= views.keys()
            begin = spans[0].file_offset_bytes
            assert buffer.numpy().tobytes() == content[begin : begin + layout.nbytes]
    for layouts, _ in PACKS.values():
        source: Any = SimpleNamespace(layouts=tuple(layouts), fingerprint=lambda: json.dumps([["other", 1, "", ""]]))
        refusal = ""
        try:
            given_pack(pack.path, source)
        except ValueError as error:
            refusal = str(error)
        assert str(pack.path) in refusal, "a pack of other files was taken"


def packed_checkpoint() -> dict[str, torch.Tensor]:
    """One weight as bitsandbytes saves it, and one that is not packed."""
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(torch.randn(8, 16), compress_statistics=True, quant_type="nf4")
    parts = {f"w.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
    return {"w": packed, "norm": torch.ones(5)} | {name: tensor.contiguous() for name, tensor in parts.items()}


STATE_NAME = "w.quant_state.bitsandbytes__nf4"


@st.composite
def four_bit_cases(draw: st.DrawFn, tensors: dict[str, torch.Tensor]) -> Case:
    tensors = dict(tensors)
    state = json.loads(bytes(tensors[STATE_NAME].numpy()))
    if draw(st.integers(0, 4)):
        text = draw(damaged(to_bytes(draw(changed(state)))))
        tensors[STATE_NAME] = torch.frombuffer(bytearray(text or b" "), dtype=torch.uint8)
    if draw(st.integers(0, 3)) == 0:
        name = draw(st.sampled_from(sorted(tensors)))
        change = draw(st.sampled_from(["drop", "other", "short"]))
        other = {"other": torch.ones(3), "short": tensors[name].reshape(-1)[:-1].clone()}
        tensors = {n: other.get(change, t) if n == name else t for n, t in tensors.items()}
        tensors = {n: t for n, t in tensors.items() if n != name or change != "drop"}
    content = save(tensors)
    return {"model.safetensors": draw(safetensors_file(content)) if draw(st.integers(0, 4)) == 0 else content}


def use_four_bit(folder: Path, files: Case) -> None:
    index, found = split_packed(CheckpointIndex.open(folder))
    with index.open_files() as opened:
        for stored in found.values():
            parts = {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in stored.matrix.tensors().items()}
            stored.read_into(opened, stored.matrix, parts)
            if stored.matrix.is_nested:
                assert torch.isfinite(parts[stored.matrix.nested_offset])


class AdapterTarget:
    """Adapters of several methods on a tiny model on meta, merged unit by unit."""

    def __init__(self) -> None:
        from models import build
        from peft import IA3Config, LoHaConfig, LoraConfig, PeftModel, VeraConfig, get_peft_model

        torch.manual_seed(0)
        plain = build(num_layers=1)
        self.base = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
        self.meta = copy.deepcopy(plain).to("meta").eval()
        lora = {"r": 2, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
        self.adapters: list[Case] = []
        self.merged: list[dict[str, torch.Tensor]] = []  # what PEFT makes of each
        for config in (
            LoraConfig(**lora),
            LoraConfig(**lora, use_dora=True, modules_to_save=["lm_head"]),
            LoraConfig(**lora, init_lora_weights="pissa"),
            VeraConfig(r=2, target_modules=["q_proj"]),
            IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
            LoHaConfig(r=2, target_modules=["q_proj"]),
        ):
            model = get_peft_model(copy.deepcopy(plain), config)
            with tempfile.TemporaryDirectory() as scratch:
                model.save_pretrained(scratch)
                names = ("adapter_config.json", "adapter_model.safetensors")
                self.adapters.append({name: (Path(scratch) / name).read_bytes() for name in names})
                loaded: Any = PeftModel.from_pretrained(copy.deepcopy(plain), scratch)
            self.merged.append(loaded.merge_and_unload().state_dict())

    def cases(self) -> st.SearchStrategy[Case]:
        return st.sampled_from(self.adapters).flatmap(self._changed)

    @staticmethod
    @st.composite
    def _changed(draw: st.DrawFn, files: Case) -> Case:
        config = json.loads(files["adapter_config.json"])
        content = files["adapter_model.safetensors"]
        what = draw(st.sampled_from(["config", "config", "config", "weights", "values", "both", "nothing"]))
        if what in ("config", "both"):
            text = draw(damaged(to_bytes(draw(changed(config, 2)))))
            files = files | {"adapter_config.json": text}
        if what in ("weights", "both"):
            files = files | {"adapter_model.safetensors": draw(safetensors_file(content))}
        if what == "values":
            header, data = taken_apart(content)
            values = torch.frombuffer(bytearray(data), dtype=torch.float32)
            values[draw(st.integers(0, len(values) - 1))] = draw(st.floats(width=32))
            files = files | {"adapter_model.safetensors": assemble(header, values.numpy().tobytes())}
        return files

    def use(self, folder: Path, files: Case) -> None:
        expected = self.merged[self.adapters.index(files)] if files in self.adapters else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT's, about entries that it does not know
            found = find_adapter(folder)
            adapter = AdapterOnMeta(copy.deepcopy(self.meta), found)
            with RowMerger(1) as rows:
                for paths in adapter.units():
                    base = {name: self.base[name].clone() for name in adapter.base_names(paths)}
                    for name, tensor in adapter.merge(paths, base, rows).items():
                        assert tensor.shape == self.base[name].shape, name
                        assert torch.isfinite(tensor).all(), name
                        assert expected is None or torch.equal(tensor, expected[name]), name


@st.composite
def pickle_cases(draw: st.DrawFn, content: bytes) -> Case:
    files = {"config.json": b"{}"}
    if draw(st.booleans()):
        return files | {"pytorch_model.bin": draw(damaged(content))}
    index = {"weight_map": {"a": "pytorch_model-1.bin", "b": "pytorch_model-1.bin"}}
    index_text = draw(damaged(to_bytes(draw(changed(index)))))
    return files | {"pytorch_model.bin.index.json": index_text, "pytorch_model-1.bin": content}


def use_pickle(folder: Path, files: Case) -> None:
    try:
        convert_pickled(folder, folder / "out")
    except BaseException:
        assert not (folder / "out").exists()
        raise
    read_header(folder / "out" / "model.safetensors")
    shutil.rmtree(folder / "out")


@dataclass(frozen=True)
class Target:
    """One way in: its cases, what is done with them, and its share of a run."""

    cases: st.SearchStrategy[Case]
    use: Callable[[Path, Case], None]
    share: float


def targets() -> dict[str, Target]:
    import io

    pickled = io.BytesIO()
    torch.save({"a": torch.ones(3), "b": torch.zeros(2, 2)}, pickled)
    torch.manual_seed(0)
    adapter = AdapterTarget()
    return {
        "header": Target(header_cases(), use_header, 0.35),
        "index": Target(index_cases(), use_index, 0.25),
        "pack": Target(pack_cases(), use_pack, 0.25),
        "four_bit": Target(four_bit_cases(packed_checkpoint()), use_four_bit, 0.08),
        "adapter": Target(adapter.cases(), adapter.use, 0.05),
        "pickle": Target(pickle_cases(pickled.getvalue()), use_pickle, 0.02),
    }


def fuzz(target: Target, num_cases: int, folder: Path, seed: int = 0) -> Outcomes:
    """Runs so many cases of a target, or as many as there are.

    Raises:
        AssertionError: A case ended otherwise than it may; hypothesis shows the smallest one that it found.
    """
    outcomes = Outcomes()
    furnish(folder)

    @hypothesis.seed(seed)
    @settings(
        max_examples=num_cases,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
    )
    @given(target.cases)
    def run(files: Case) -> None:
        write(folder, files)
        names = (str(folder), *files)
        outcomes.attempt(folder, names, lambda: target.use(folder, files))

    with bounded():
        run()
    return outcomes


def fuzz_with_atheris(name: str, num_cases: int, folder: Path) -> None:
    """Has libFuzzer choose the bytes of the one file; ends the process."""
    import atheris  # not among the project's own requirements

    target, outcomes = targets()[name], Outcomes()
    file_name, content = {
        "header": ("model.safetensors", ONE_FILE),
        "pack": ("x.lema.safetensors", PACKS["nf4"][1]),
    }[name]
    furnish(folder)
    corpus = folder.parent / "corpus"
    corpus.mkdir()
    (corpus / "seed").write_bytes(content)

    def run(data: bytes) -> None:
        write(folder, {file_name: data})
        outcomes.attempt(folder, (str(folder),), lambda: target.use(folder, {file_name: data}))
        if outcomes.num_cases == num_cases:
            print(json.dumps({"engine": "atheris", "target": name, **as_record(outcomes)}), flush=True)

    modules = [module for name, module in sys.modules.items() if name.startswith(("hf_lema.files.", "json."))]
    for function in {function for module in modules for function in vars(module).values() if isfunction(function)}:
        atheris.instrument_func(function)
    atheris.Setup([sys.argv[0], f"-runs={num_cases}", f"-max_len={2 * len(content)}", str(corpus)], run)
    atheris.Fuzz()


def as_record(outcomes: Outcomes) -> dict[str, Any]:
    return {
        "num_cases": outcomes.num_cases,
        "ends": dict(sorted(outcomes.ends.items())),
        "slowest_case_s": round(outcomes.slowest_s, 3),
        "longest_message_chars": outcomes.longest_message_chars,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", choices=("header", "index", "pack", "four_bit", "adapter", "pickle"))
    parser.add_argument("--engine", choices=("hypothesis", "atheris"), default="hypothesis")
    parser.add_argument("--json", type=Path, help="append the record as one line")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="hf_lema-fuzz-") as scratch:
        if arguments.engine == "atheris":
            fuzz_with_atheris(arguments.target or "header", arguments.cases, Path(scratch) / "case")
        from hf_lema.environment import environment_record

        chosen = {name: t for name, t in targets().items() if arguments.target in (None, name)}
        total = sum(target.share for target in chosen.values())
        found, start_s = {}, time.perf_counter()
        for number, (name, target) in zip(itertools.count(arguments.seed), chosen.items()):
            begin_s = time.perf_counter()
            outcomes = fuzz(target, round(arguments.cases * target.share / total), Path(scratch) / name, number)
            found[name] = as_record(outcomes) | {"elapsed_s": round(time.perf_counter() - begin_s, 1)}
            print(name, json.dumps(found[name]), flush=True)
        record = {
            "command": " ".join(sys.argv),
            "num_cases": sum(result["num_cases"] for result in found.values()),
            "elapsed_s": round(time.perf_counter() - start_s, 1),
            "max_growth_bytes": MAX_GROWTH_BYTES,
            "targets": found,
            "environment": environment_record(),
        }
        if arguments.json is not None:
            with arguments.json.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        print(f"{record['num_cases']} cases in {record['elapsed_s']} s")


if __name__ == "__main__":
    main()
