"""A base model is told by its files' every byte; a run is not resumed with another one unless that is asked for."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from models import RecordingTrainer, Trajectory, adapt, arguments, assert_same_tensors, build, closing, examples
from test_loading import hub_cache

from hf_lema import LemaConfig, LemaModelWrapper, MemoryTelemetryCallback
from hf_lema.files import base_files
from hf_lema.files.base_files import BaseFiles
from hf_lema.files.checkpoint import CheckpointIndex

pytestmark = pytest.mark.integration

SETTINGS: dict[str, Any] = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    build(num_layers=2).save_pretrained(tmp_path / "model", max_shard_size="60KB")
    return tmp_path / "model"


def files_of(folder: Path) -> BaseFiles:
    return BaseFiles(CheckpointIndex.open(folder))


def first_shard(folder: Path) -> Path:
    return min(folder.glob("*.safetensors"))


def flip_a_byte(path: Path, *, keeps_time: bool = False) -> None:
    """In the middle of the data: size, header and ends stay as they are."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(before.st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    if keeps_time:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


# ---- the identity ----


def test_a_copy_elsewhere_is_the_same_base(model: Path, tmp_path: Path) -> None:
    record = json.loads(json.dumps(files_of(model).record()))
    shutil.copytree(model, tmp_path / "copy")
    assert len(record) > 1
    assert files_of(tmp_path / "copy").differences(record) == []
    assert str(tmp_path) not in json.dumps(record)


@pytest.mark.parametrize("keeps_time", [False, True])
def test_one_changed_byte_is_found_and_its_file_named(model: Path, keeps_time: bool) -> None:
    record = files_of(model).record()
    path = first_shard(model)
    flip_a_byte(path, keeps_time=keeps_time)
    (difference,) = files_of(model).differences(record)
    assert difference.startswith(f"{path.name} has other contents (sha256 ")


def test_a_file_of_many_pieces_is_digested_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "f"
    path.write_bytes(os.urandom(1000))
    read: list[int] = []
    whole = base_files._digest_of(path, 1000, read.append)
    monkeypatch.setattr(base_files, "PIECE_BYTES", 300)
    cut = base_files._digest_of(path, 1000, read.append)
    assert read == [1000, 300, 300, 300, 100]
    content = path.read_bytes()
    path.write_bytes(content[300:600] + content[:300] + content[600:])
    assert len({whole, cut, base_files._digest_of(path, 1000, read.append)}) == 3


def test_files_that_were_not_touched_are_not_read_again(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = files_of(model).record()
    monkeypatch.setattr(base_files, "_digest_of", None)
    assert files_of(model).differences(record) == []


def test_sizes_and_files_that_come_and_go_are_all_named(model: Path) -> None:
    files = files_of(model)
    record = files.record()
    gone, longer, *_ = record
    found = files.differences([gone | {"name": "x"}, longer | {"nbytes": 1}, *record[2:]])
    assert found == [
        "x was one of its files and is not any more",
        f"{gone['name']} was not one of its files",
        f"{longer['name']} has {longer['nbytes']} bytes, had 1",
    ]


@pytest.mark.parametrize("is_gone", [False, True])
def test_a_file_that_changes_during_the_run_has_no_identity_and_is_refused_later(model: Path, is_gone: bool) -> None:
    files = files_of(model)
    path = first_shard(model)
    content = path.read_bytes()
    path.unlink() if is_gone else flip_a_byte(path)
    record = files.record()
    assert files.unidentified == [path.name]
    path.write_bytes(content)
    (difference,) = files_of(model).differences(record)
    assert difference == f"{path.name} was changed or removed while the run that saved the checkpoint went on"


# ---- Trainer ----


def load(name: Path | str, ram_budget: str = "auto", **where: Any) -> Any:
    config = LemaConfig(ram_budget=ram_budget)
    return adapt(LemaModelWrapper.from_pretrained(str(name), config, device="cpu", **where).train())


def run(
    model: Any, folder: Path, callback: MemoryTelemetryCallback | None, resume: Path | None = None, **settings: Any
) -> Trajectory:
    with closing(model):
        trainer = RecordingTrainer(
            model=model,
            args=arguments(folder, **(SETTINGS | settings)),
            train_dataset=examples(),
            callbacks=[] if callback is None else [callback],
        )
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        return trainer.trajectory()


def quiet(**options: Any) -> MemoryTelemetryCallback:
    return MemoryTelemetryCallback(console=False, **options)


@pytest.mark.parametrize("ram_budget", ["auto", "min"])
def test_a_changed_base_is_refused_before_the_first_step_and_an_unchanged_one_goes_on(
    model: Path, ram_budget: str, tmp_path: Path
) -> None:
    straight = run(load(model, ram_budget), tmp_path / "out", quiet())
    checkpoint = tmp_path / "out" / "checkpoint-2"
    resumed = run(load(model, ram_budget), tmp_path / "again", quiet(), checkpoint)
    assert torch.equal(resumed.losses, straight.losses[2:])
    assert_same_tensors(resumed.trainables, straight.trainables)

    copy = shutil.copytree(model, tmp_path / "copy")  # another path, other times
    assert torch.equal(run(load(copy), tmp_path / "copied", quiet(), checkpoint).losses, straight.losses[2:])

    path = first_shard(model)
    flip_a_byte(path)
    changed = load(model, ram_budget)
    with pytest.raises(ValueError, match=rf"not the one .*\n- {path.name} has other contents .*\n.*allow_changed_base"):
        run(changed, tmp_path / "refused", quiet(), checkpoint)
    assert not (tmp_path / "refused" / "checkpoint-4").exists()


def test_a_changed_base_is_taken_where_the_user_says_so(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(load(model), tmp_path / "out", quiet())
    flip_a_byte(first_shard(model))
    checkpoint = tmp_path / "out" / "checkpoint-2"
    with caplog.at_level(logging.WARNING, "hf_lema"):
        resumed = run(load(model), tmp_path / "again", quiet(allow_changed_base=True), checkpoint)
    assert len(resumed.losses) == 2
    assert "has other contents" in caplog.text
    # From here on the checkpoints are of the changed base.
    run(load(model), tmp_path / "third", quiet(), tmp_path / "again" / "checkpoint-4", max_steps=6)


def test_a_changed_blob_of_the_hub_is_refused(model: Path, tmp_path: Path) -> None:
    where = {"cache_dir": hub_cache(tmp_path / "hub", model), "revision": "v1", "subfolder": "sub"}
    where["local_files_only"] = True
    run(load("org/tiny", **where), tmp_path / "out", quiet())
    checkpoint = tmp_path / "out" / "checkpoint-2"
    assert len(run(load("org/tiny", **where), tmp_path / "again", quiet(), checkpoint).losses) == 2
    link = first_shard(next((tmp_path / "hub").glob("*/snapshots/*/sub")))
    flip_a_byte(link.resolve())
    with pytest.raises(ValueError, match=f"{link.name} has other contents"):
        run(load("org/tiny", **where), tmp_path / "refused", quiet(), checkpoint)


def test_checkpoints_with_and_without_a_record_resume_with_and_without_the_callback(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    straight = run(load(model), tmp_path / "with", quiet())
    run(load(model), tmp_path / "without", None)
    for begun in ("with", "without"):
        for callback in (quiet(), None):
            folder = tmp_path / f"{begun}-{callback is None}"
            resumed = run(load(model), folder, callback, tmp_path / begun / "checkpoint-2")
            assert torch.equal(resumed.losses, straight.losses[2:])
            state = json.loads((folder / "checkpoint-4" / "trainer_state.json").read_text())
            stored = state["stateful_callbacks"].get("MemoryTelemetryCallback", {})
            assert ("base_files" in stored.get("attributes", {})) == (callback is not None or begun == "with")
    in_memory = adapt(LemaModelWrapper.wrap(build(num_layers=2), device="cpu"))
    with caplog.at_level(logging.WARNING, "hf_lema"):
        run(in_memory, tmp_path / "in_memory", quiet(), tmp_path / "with" / "checkpoint-2")
    assert "whether it is the same cannot be told" in caplog.text


def test_a_base_that_is_removed_while_it_trains_from_ram_warns_and_saves(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept = shutil.copytree(model, tmp_path / "kept")
    loaded = load(model)
    shutil.rmtree(model)
    with caplog.at_level(logging.WARNING, "hf_lema"):
        run(loaded, tmp_path / "out", quiet())
    assert "changed or removed since the base model was loaded" in caplog.text
    with pytest.raises(ValueError, match="was changed or removed while the run"):
        run(load(kept), tmp_path / "again", quiet(), tmp_path / "out" / "checkpoint-2")


def test_a_restored_callback_is_as_it_was(model: Path, tmp_path: Path) -> None:
    run(load(model), tmp_path / "out", quiet(warn_fraction=0.7, path=tmp_path / "lines.jsonl"))
    checkpoint = tmp_path / "out" / "checkpoint-2"
    before = len((tmp_path / "lines.jsonl").read_text().splitlines())
    run(load(model), tmp_path / "again", quiet(), checkpoint, restore_callback_states_from_checkpoint=True)
    assert len((tmp_path / "lines.jsonl").read_text().splitlines()) > before
    flip_a_byte(first_shard(model))
    with pytest.raises(ValueError, match="has other contents"):
        run(load(model), tmp_path / "no", quiet(), checkpoint, restore_callback_states_from_checkpoint=True)
