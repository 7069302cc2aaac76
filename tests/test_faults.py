"""Every fault of tests/faults.py happens: an error with its remedy, whole checkpoints, an equal resume, no rest."""

from __future__ import annotations

import contextlib
import errno
import gc
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import leaked_threads
from fault_scene import FAULT_STEP, NUM_STEPS, Scene, load, make_trainer
from faults import (
    ALL,
    ERRORS,
    KEEPING,
    KILLS,
    MERGES,
    MODEL_FILE,
    SURVIVED,
    TORN,
    Fault,
    matches,
    table,
    written_table,
)
from models import Trajectory, adapt, assert_same_run, assert_same_tensors, build, closing
from test_host_store import FakeGpu

from hf_lema import LemaModelWrapper, get_streamer, last_whole_checkpoint, merge_and_save
from hf_lema.files.trainer_checkpoints import damage_of, torn_checkpoints

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "recipes"))

import resumable

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120)]


def cases(faults: list[Fault]) -> Any:
    params = [pytest.param(f, id=f.happens, marks=[pytest.mark.slow] if f.is_slow else []) for f in faults]
    return pytest.mark.parametrize("fault", params)


# ---- a run, and what is left of it ----


def handles() -> dict[str, str]:
    """Open descriptors and what they lead to."""
    found = {}
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # that of the listing itself
            found[number] = os.readlink(f"/proc/self/fd/{number}")
    return found


def collect() -> None:
    """Drops models that nobody has any more: until then their weights, a mapping of the file, hold it open.

    An error that is held by its own frames goes first, with it the autograd graph in them, which the collector cannot
    see into, and only then what that graph held: as many rounds as there is something to free.
    """
    for _ in range(10):
        if gc.collect() == 0:
            return


@contextlib.contextmanager
def nothing_left(page_locks: FakeGpu, folder: Path) -> Iterator[None]:
    """No thread, no page-lock, no open file and no half-written file is left by the block."""
    collect()
    threads, files = set(threading.enumerate()), handles()
    yield
    collect()
    assert leaked_threads(threads) == []
    assert page_locks.locked == {}
    assert handles() == files
    assert [path for path in folder.rglob("*") if "partial" in path.name or path.name.startswith(".tmp")] == []


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    build().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def whole_run(saved_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Trajectory:
    """The run that nothing happens to."""
    torch.set_num_threads(1)
    with closing(load(saved_model)) as model:
        trainer = make_trainer(model, tmp_path_factory.mktemp("whole"))
        trainer.train()
        return trainer.trajectory()


@pytest.fixture
def model_folder(saved_model: Path, tmp_path: Path) -> Path:
    """A copy that a fault may damage."""
    return Path(shutil.copytree(saved_model, tmp_path / "model"))


@pytest.fixture
def play(
    page_locks: FakeGpu, model_folder: Path, tmp_path: Path, whole_run: Trajectory
) -> Callable[[Fault, Callable[[Scene], Any]], Any]:
    """Puts a fault into a run, and sees that nothing is left when it is over."""

    def played(fault: Fault, run: Callable[[Scene], Any]) -> Any:
        with closing(load(model_folder)) as model:
            scene = Scene(
                make_trainer(model, tmp_path / "out"), model_folder / MODEL_FILE, page_locks, pytest.MonkeyPatch()
            )
            fault.inject(scene)
            with scene.played():
                result = run(scene)
            assert fault.max_lock_bytes == 0 or get_streamer(model).pinned_bytes > 0
        return result

    def body(fault: Fault, run: Callable[[Scene], Any]) -> Any:
        page_locks.max_lock_bytes = fault.max_lock_bytes
        with nothing_left(page_locks, tmp_path / "out"):
            return played(fault, run)

    return body


def assert_resume_is_equal(fault: Fault, model_folder: Path, saved_model: Path, out: Path, whole: Trajectory) -> None:
    """From the last whole checkpoint, with the files as they were, the run ends as the one that nothing happened to."""
    shutil.copy(saved_model / MODEL_FILE, model_folder / MODEL_FILE)
    for link in out.rglob("*"):
        if link.is_symlink():
            link.unlink()  # the disk has room again
    last = last_whole_checkpoint(out)
    assert last == str(out / f"checkpoint-{fault.last_step}")
    with closing(load(model_folder)) as model:
        trainer = make_trainer(model, out)
        trainer.train(resume_from_checkpoint=last)
        found = trainer.trajectory()
    assert torch.equal(found.losses, whole.losses[fault.last_step :])
    assert found.logs == whole.logs[fault.last_step :]
    assert_same_tensors(found.trainables, whole.trainables)
    for index, state in whole.optimizer.items():
        assert_same_tensors(found.optimizer[index], state)
    assert torn_checkpoints(out) == []
    assert last_whole_checkpoint(out) == str(out / f"checkpoint-{NUM_STEPS}")


def text_of(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


# ---- the stock Trainer ----


@cases(ERRORS)
def test_error_says_what_to_do_and_the_resume_is_equal(
    fault: Fault, play: Any, model_folder: Path, saved_model: Path, tmp_path: Path, whole_run: Trajectory
) -> None:
    def run(scene: Scene) -> str:
        with pytest.raises(BaseException) as caught:  # noqa: PT011  its text is compared below
            scene.trainer.train()
        return text_of(caught.value)

    seen = play(fault, run)
    assert matches(fault.sees, seen), seen
    torn = torn_checkpoints(tmp_path / "out")
    assert (fault.remains == TORN) == bool(torn)
    assert_resume_is_equal(fault, model_folder, saved_model, tmp_path / "out", whole_run)


@cases(SURVIVED)
def test_run_goes_on_bit_for_bit(fault: Fault, play: Any, whole_run: Trajectory) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")

        def run(scene: Scene) -> Trajectory:
            scene.trainer.train()
            return scene.trainer.trajectory()

        assert fault.remains == ALL
        assert_same_run(play(fault, run), whole_run)
    said = [f"{w.category.__name__}: {w.message}" for w in caught if "page-locking" in str(w.message)]
    assert sum(matches(fault.sees, text) for text in said) == (not fault.sees.startswith("("))
    assert len(said) == len(set(said)), "said twice"


@cases(KILLS)
def test_killed_run_is_resumed_from_its_last_whole_checkpoint(
    fault: Fault, page_locks: FakeGpu, model_folder: Path, saved_model: Path, tmp_path: Path, whole_run: Trajectory
) -> None:
    def child() -> None:
        scene = Scene(
            make_trainer(load(model_folder), tmp_path / "out"),
            model_folder / MODEL_FILE,
            page_locks,
            pytest.MonkeyPatch(),
        )
        fault.inject(scene)
        with scene.played():
            scene.trainer.train()

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(60.0)
    assert process.exitcode == -getattr(signal, fault.happens.split()[0])
    assert (fault.remains == TORN) == bool(torn_checkpoints(tmp_path / "out"))
    assert_resume_is_equal(fault, model_folder, saved_model, tmp_path / "out", whole_run)


# ---- the recipes ----


@cases(KEEPING)
def test_recipe_keeps_what_was_trained(
    fault: Fault,
    play: Any,
    model_folder: Path,
    saved_model: Path,
    tmp_path: Path,
    whole_run: Trajectory,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stop = play(fault, lambda scene: resumable.train_or_keep(scene.trainer, resume=False))
    shown = capsys.readouterr().out
    seen = shown.splitlines() if stop.error is None else [text_of(stop.error)]
    assert any(matches(fault.sees, line) for line in seen), seen
    assert stop.checkpoint == tmp_path / "out" / f"checkpoint-{fault.last_step}"
    assert torn_checkpoints(tmp_path / "out") == []
    assert (stop.save_error is not None) == ("disk" in fault.happens)
    assert_resume_is_equal(fault, model_folder, saved_model, tmp_path / "out", whole_run)


@pytest.mark.slow
def test_disk_that_is_really_full_during_a_checkpoint(
    play: Any, model_folder: Path, saved_model: Path, tmp_path: Path, whole_run: Trajectory
) -> None:
    """A mounted file system of a few pages: the adapter's file, whose writer is another, meets it too."""
    out = tmp_path / "out"
    out.mkdir()
    if os.getuid() or os.system(f"mount -t tmpfs -o size=200k tmpfs {out} 2>/dev/null"):
        pytest.skip("needs the right to mount a file system")
    try:
        stop = play(KEEPING[-1], lambda scene: resumable.train_or_keep(scene.trainer, resume=False))
        assert stop.save_error is not None
        assert torn_checkpoints(out) == []
        os.system(f"mount -o remount,size=10m {out}")
        assert stop.checkpoint is not None
        assert stop.checkpoint == Path(str(last_whole_checkpoint(out)))
    finally:
        os.system(f"umount {out}")


# ---- merging ----


@cases(MERGES)
def test_merge_onto_a_full_disk_leaves_nothing(
    fault: Fault, page_locks: FakeGpu, saved_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapt(build()).save_pretrained(tmp_path / "adapter")
    target = tmp_path / "models" / "merged"
    pwrite, calls = os.pwrite, []

    def full(descriptor: int, data: memoryview, offset: int) -> int:
        calls.append(offset)
        if len(calls) > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(descriptor, data, offset)

    with nothing_left(page_locks, tmp_path):
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", full)
            with pytest.raises(OSError) as caught:  # noqa: PT011  its text is compared below
                merge_and_save(saved_model, tmp_path / "adapter", target)
        assert matches(fault.sees, text_of(caught.value)), text_of(caught.value)
        assert list(target.parent.iterdir()) == []
        merge_and_save(saved_model, tmp_path / "adapter", target)
    assert (target / MODEL_FILE).is_file()


# ---- which checkpoint is whole ----


def test_a_checkpoint_is_whole_until_any_of_its_files_is_cut(saved_model: Path, tmp_path: Path) -> None:
    with closing(load(saved_model)) as model:
        trainer = make_trainer(model, tmp_path)
        trainer.args.max_steps = 2
        trainer.train()
    whole = tmp_path / "checkpoint-2"
    assert damage_of(whole) is None
    assert last_whole_checkpoint(tmp_path) == str(whole)
    read_again = [p for p in whole.iterdir() if p.suffix in (".safetensors", ".pt", ".pth") or "state.json" in p.name]
    assert len(read_again) >= 5
    for path in read_again:
        content = path.read_bytes()
        for num_bytes in {0, 1, len(content) // 2, len(content) - 2}:
            path.write_bytes(content[:num_bytes])
            assert damage_of(whole) is not None, (path.name, num_bytes)
            assert last_whole_checkpoint(tmp_path) is None
        path.write_bytes(content)
    (whole / "checkpoint-is-incomplete.txt").touch()
    assert "did not come to an end" in str(damage_of(whole))
    (whole / "checkpoint-is-incomplete.txt").unlink()
    whole.rename(tmp_path / "checkpoint-30")
    assert "is not of step 30" in str(damage_of(tmp_path / "checkpoint-30"))
    (tmp_path / "checkpoint-30" / "trainer_state.json").unlink()
    assert "written last, is missing" in str(damage_of(tmp_path / "checkpoint-30"))
    assert [path.name for path in torn_checkpoints(tmp_path)] == ["checkpoint-30"]
    assert last_whole_checkpoint(tmp_path / "nowhere") is None


# ---- the table ----


def test_table_of_faults_is_that_of_the_document() -> None:
    assert written_table() == table(), "python tests/faults.py writes it anew"


def test_every_fault_of_the_table_has_a_name_of_its_own() -> None:
    names = [fault.happens for fault in (*SURVIVED, *ERRORS, *KILLS, *KEEPING, *MERGES)]
    assert len(names) == len(set(names))
    assert FAULT_STEP < NUM_STEPS


# ---- after a file was cut ----


@pytest.mark.parametrize("use", ["unwrap", "merge"])
def test_weights_of_a_cut_file_are_refused_and_do_not_end_the_process(use: str, model_folder: Path) -> None:
    """To touch a page of a mapping that its file has no more is SIGBUS."""
    with closing(load(model_folder)) as model:
        os.truncate(model_folder / MODEL_FILE, 4096)
        for _ in range(2):
            with pytest.raises(
                ValueError, match=r"model\.safetensors has 4096 bytes left of \d+.*load the model again"
            ):
                LemaModelWrapper.unwrap(model) if use == "unwrap" else model.merge_adapter()
            get_streamer(model).close()
        model.save_pretrained(model_folder / "adapter")
        assert (model_folder / "adapter" / "adapter_model.safetensors").is_file()
