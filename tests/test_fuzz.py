"""The short form of the fuzz of files, and what it stands on: it finds what it must find."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import fuzz_files
import pytest
import torch
from fuzz_files import Outcomes, Target, fuzz, watching
from safetensors.torch import save

from hf_lema.files.checkpoint import CheckpointIndex, read_header
from hf_lema.files.foreign_json import MAX_LISTED, listing, parse_json, shown

pytestmark = pytest.mark.integration
NUM_CASES = {"header": 150, "index": 100, "pack": 100, "four_bit": 60, "adapter": 60, "pickle": 30}


@pytest.fixture(scope="module")
def targets() -> dict[str, Target]:
    return fuzz_files.targets()


@pytest.mark.parametrize("name", NUM_CASES)
def test_each_bad_file_ends_in_an_error_that_names_it_or_in_the_right_answer(
    targets: dict[str, Target], name: str, tmp_path: Path
) -> None:
    outcomes = fuzz(targets[name], NUM_CASES[name], tmp_path / "case")
    assert outcomes.num_cases >= NUM_CASES[name]
    assert outcomes.ends["right answer"] > 0
    assert outcomes.ends["ValueError"] > NUM_CASES[name] / 4


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", NUM_CASES)
def test_forty_times_as_many_bad_files(targets: dict[str, Target], name: str, tmp_path: Path) -> None:
    assert fuzz(targets[name], 40 * NUM_CASES[name], tmp_path / "case", seed=1).num_cases >= 40 * NUM_CASES[name]


# ---- the fuzz notices what must not happen ----


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    fuzz_files.furnish(tmp_path / "model")
    return tmp_path / "model"


def opens_outside(folder: Path) -> None:
    (folder.parent / "secret.safetensors").read_bytes()


def allocates_what_a_header_says(folder: Path) -> None:
    torch.zeros(2**33, dtype=torch.uint8)


def forgets_the_name(folder: Path) -> None:
    raise ValueError("something is wrong")


def raises_what_it_should_not(folder: Path) -> None:
    raise ZeroDivisionError


def shows_what_no_terminal_can(folder: Path) -> None:
    raise ValueError(f"{folder}: \ud800")


def waits_for_ever(folder: Path) -> None:
    (folder / "pipe").read_bytes()  # nobody writes to it


@pytest.mark.parametrize(
    ("use", "error", "message"),
    [
        (opens_outside, AssertionError, "opened outside .*secret"),
        (allocates_what_a_header_says, RuntimeError, "allocate"),
        (forgets_the_name, AssertionError, "names none of"),
        (raises_what_it_should_not, ZeroDivisionError, ""),
        (shows_what_no_terminal_can, UnicodeEncodeError, "surrogates"),
        (waits_for_ever, AssertionError, r"more than 0\.1 s"),
    ],
)
def test_the_fuzz_finds_a_fault(
    folder: Path, use: Callable[[Path], None], error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fuzz_files, "MAX_CASE_S", 0.1 if use is waits_for_ever else 20)
    with fuzz_files.bounded(), pytest.raises(error) as caught:
        Outcomes().attempt(folder, (str(folder),), lambda: use(folder))
    assert re.search(message, str(caught.value))


# ---- single cases that the fuzz found, and those that it cannot make ----


@pytest.mark.timeout(20)
@pytest.mark.parametrize(("name", "kind"), [("pipe", "a pipe"), ("folder", "a folder")])
def test_what_is_no_regular_file_is_refused_without_opening_it(folder: Path, name: str, kind: str) -> None:
    with watching(folder / "nothing"), pytest.raises(ValueError, match=f"{folder / name} is {kind}"):
        read_header(folder / name)
    assert not fuzz_files._trespasses


def test_links_that_lead_nowhere_or_in_a_circle_are_missing_files(folder: Path) -> None:
    for target in ("link.safetensors", "loop.safetensors", "folder", "pipe"):
        (folder / "model.safetensors.index.json").write_text(f'{{"weight_map": {{"a": "{target}"}}}}')
        with pytest.raises(FileNotFoundError, match=target):
            CheckpointIndex.open(folder)


def test_a_link_that_the_folder_holds_is_followed_as_in_the_cache_of_the_hub(folder: Path) -> None:
    """Whoever can make a link in a folder can put the file itself there; an index, which comes from others, cannot."""
    (folder / "model.safetensors").symlink_to(Path("..") / "secret.safetensors")
    assert list(CheckpointIndex.open(folder).tensors) == ["secret"]


@pytest.mark.timeout(20)
def test_a_shape_of_very_many_sizes_costs_no_time(tmp_path: Path) -> None:
    header = {"a": {"dtype": "U8", "shape": [2**62] * 200_000, "data_offsets": [0, 1]}}
    path = tmp_path / "model.safetensors"
    path.write_bytes(fuzz_files.assemble(header, b"x"))
    with pytest.raises(ValueError, match="list of at most 64 sizes") as caught:
        read_header(path)
    assert len(str(caught.value)) < 1000


def test_very_many_problems_make_a_message_that_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(fuzz_files.assemble(dict.fromkeys(map(str, range(20_000)), 1), b""))
    with pytest.raises(ValueError, match=f"and {20_000 - MAX_LISTED} more") as caught:
        read_header(path)
    assert len(str(caught.value)) < 40_000


def test_values_of_strangers_are_shown_short_and_printable() -> None:
    assert shown("\ud800") == "\\ud800"
    assert shown(10**5000) == "a int too long to show"
    assert len(shown("x" * 10**6)) < 110
    assert listing(["a", "b"], "  ") == "\n  - a\n  - b"


def test_json_says_which_names_came_twice_and_how_it_cannot_be_parsed() -> None:
    assert parse_json(b'{"a": {"b": 1, "b": 2}, "c": 3, "c": 4}') == ({"a": {"b": 2}, "c": 4}, ["b", "c"])
    for text in (b"[" * 100_000, b"\xff", b"{", b"9" * 5000, "{}".encode("utf-16")):
        with pytest.raises(ValueError, match=r".+"):
            parse_json(text)


def test_outcomes_count_what_they_saw(tmp_path: Path) -> None:
    outcomes = Outcomes()
    fuzz_files.furnish(tmp_path / "case")
    with fuzz_files.bounded():
        outcomes.attempt(tmp_path / "case", ("x",), lambda: None)
        (tmp_path / "case" / "model.safetensors").write_bytes(save({"a": torch.ones(1)})[:-1])
        use = lambda: read_header(tmp_path / "case" / "model.safetensors")  # noqa: E731
        outcomes.attempt(tmp_path / "case", ("model.safetensors",), use)
    assert outcomes.ends == {"right answer": 1, "ValueError": 1}
    assert os.path.exists(tmp_path / "case" / "pipe")
