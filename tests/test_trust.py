"""What the package trusts: no pickle but on command, a model's code by the user's word only, the revision asked for."""

from __future__ import annotations

import ast
import json
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fuzz_files
import huggingface_hub
import peft
import pytest
import torch
import transformers
from fuzz_files import watching
from models import adapt, build, closing, forward_backward
from safetensors.torch import load_file
from test_import_graph import PACKAGE, ROOMS

from hf_lema import LemaConfig, LemaModelWrapper, cli, merge_and_save
from hf_lema.export.unpickling import convert_pickled
from hf_lema.model.adapter import find_adapter

pytestmark = pytest.mark.integration

# Modules that run code of what they read, or read it with one that does.
PICKLES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "copyreg", "yaml"}
PICKLE_CALLS = {"torch.load", "numpy.load", "pandas.read_pickle", "torch.jit.load", "torch.hub.load", "torch.package"}
UNPICKLING = "export/unpickling"


def tree_of(room: str) -> ast.Module:
    return ast.parse((PACKAGE / f"{room}.py").read_text(encoding="utf-8"))


def calls_of(room: str) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree_of(room)) if isinstance(node, ast.Call))


# ---- pickles ----


@pytest.mark.parametrize("room", ROOMS)
def test_no_room_but_one_knows_pickles(room: str) -> None:
    imported = {
        name.split(".")[0]
        for node in ast.walk(tree_of(room))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names])
    }
    called = {ast.unparse(call.func) for call in calls_of(room)}
    assert imported & PICKLES == ({"pickle"} if room == UNPICKLING else set())
    assert called & PICKLE_CALLS == ({"torch.load"} if room == UNPICKLING else set())
    assert not {"eval", "exec", "__import__", "compile"} & called


def test_the_one_room_opens_them_with_weights_only_and_only_the_command_leads_there() -> None:
    (load,) = [call for call in calls_of(UNPICKLING) if ast.unparse(call.func) == "torch.load"]
    assert {k.arg: ast.unparse(k.value) for k in load.keywords}["weights_only"] == "True"
    users = [room for room in ROOMS if "hf_lema.export.unpickling" in (PACKAGE / f"{room}.py").read_text()]
    assert users == ["cli"]
    body = next(n for n in tree_of("cli").body if isinstance(n, ast.FunctionDef) and n.name == "_run_pack")
    assert "hf_lema.export.unpickling" in ast.unparse(body)


songs: list[str] = []


def sing(song: str) -> None:
    songs.append(song)


class Canary:
    """Sings when it is unpickled."""

    def __reduce__(self) -> Any:
        return sing, ("sung",)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model and an adapter, each with pickles beside its safetensors that would run code."""
    build(num_layers=2).save_pretrained(tmp_path / "model")
    adapt(build(num_layers=2)).save_pretrained(tmp_path / "adapter")
    for folder, names in (
        ("model", ("pytorch_model.bin", "model.pt", "training_args.bin")),
        ("adapter", ("adapter_model.bin", "optimizer.pt", "training_args.bin")),
    ):
        for name in names:
            (tmp_path / folder / name).write_bytes(pickle.dumps(Canary()))
    songs.clear()
    return tmp_path / "model"


def test_pickles_beside_a_model_and_an_adapter_are_never_opened(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with watching(tmp_path / "nothing"):  # so that every file counts as outside
        with closing(adapt(LemaModelWrapper.from_pretrained(str(model), device="cpu").train())) as streamed:
            forward_backward(streamed)
        merge_and_save(model, tmp_path / "adapter", tmp_path / "merged")
        for arguments in (["plan", str(model)], ["pack", str(model), str(tmp_path / "x.lema.safetensors")]):
            assert cli.main(arguments) == 0, capsys.readouterr().err
        opened = {Path(path).name for path in fuzz_files._trespasses}
    assert "model.safetensors" in opened
    assert not {name for name in opened if name.endswith((".bin", ".pt"))}
    assert songs == []


def test_a_pickle_that_would_run_code_is_refused_on_command_too(model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="cannot be opened safely"):
        convert_pickled(model, tmp_path / "converted")
    assert songs == []
    assert not (tmp_path / "converted").exists()
    assert pickle.loads(pickle.dumps(Canary())) is None
    assert songs == ["sung"]  # so it would


# ---- code that comes with a model ----


@pytest.mark.parametrize("room", ROOMS)
def test_trust_is_only_passed_on(room: str) -> None:
    """Wherever the package says ``trust_remote_code``, it says False or what its caller said."""
    given = [k.value for call in calls_of(room) for k in call.keywords if k.arg == "trust_remote_code"]
    passed_on = {"trust_remote_code", "request.trust_remote_code", "arguments.trust_remote_code", "False"}
    assert {ast.unparse(value) for value in given} <= passed_on
    for node in ast.walk(tree_of(room)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            arguments = node.args
            names = [a.arg for a in [*arguments.posonlyargs, *arguments.args]]
            defaults = dict(zip(names[::-1], arguments.defaults[::-1], strict=False))
            defaults |= dict(zip([a.arg for a in arguments.kwonlyargs], arguments.kw_defaults, strict=True))
            default = defaults.get("trust_remote_code")
            assert default is None or ast.unparse(default) == "False", node.name


def test_a_config_cannot_ask_for_trust(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    config |= {"auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}, "trust_remote_code": True}
    config["model_type"] = "unheard-of"
    (model / "config.json").write_text(json.dumps(config))
    (model / "evil.py").write_text("raise SystemExit('the code ran')")
    with pytest.raises(ValueError, match="trust_remote_code"):
        LemaModelWrapper.from_pretrained(str(model), device="cpu")


def test_an_adapter_that_names_a_module_to_import_is_refused(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text()) | {"megatron_config": {"tensor_model_parallel_size": 1}}
    path.write_text(json.dumps(config | {"megatron_core": "evil"}))
    with pytest.raises(ValueError, match="Megatron"):
        find_adapter(tmp_path / "adapter")


# ---- revisions ----

OLD, NEW = "a" * 40, "b" * 40


def put_in_cache(cache: Path, repo: str, revisions: dict[str, Path]) -> None:
    """A hub cache with one snapshot a commit; the newest is the main branch, the oldest has the tag v1."""
    folder = cache / f"models--{repo.replace('/', '--')}"
    for commit, files in revisions.items():
        shutil.copytree(files, folder / "snapshots" / commit)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(NEW)
    (folder / "refs" / "v1").write_text(OLD)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Model ``org/tiny`` (2 layers in v1, 3 since) and its adapter ``org/adapter`` in the local cache of the hub."""
    for commit, num_layers in ((OLD, 2), (NEW, 3)):
        model = build(num_layers=num_layers, seed=num_layers)
        model.save_pretrained(tmp_path / commit / "model", max_shard_size="60KB")
        adapt(model, seed=num_layers).save_pretrained(tmp_path / commit / "adapter")
    for name in ("model", "adapter"):
        repo = "org/tiny" if name == "model" else "org/adapter"
        put_in_cache(tmp_path / "hub", repo, {commit: tmp_path / commit / name for commit in (OLD, NEW)})
    for module in (huggingface_hub.constants, transformers.utils.hub):
        for constant in ("HF_HUB_CACHE", "TRANSFORMERS_CACHE"):
            if constant in vars(module):
                monkeypatch.setattr(module, constant, str(tmp_path / "hub"))
    monkeypatch.setenv("HF_LEMA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    return tmp_path


def snapshots_opened(use: Callable[[], object], folder: Path) -> set[str]:
    with watching(folder / "nothing"):
        use()
        opened = list(fuzz_files._trespasses)
    return {path.split("/snapshots/")[1].split("/")[0] for path in opened if "/snapshots/" in path}


@pytest.mark.parametrize(("command", "revision"), [("plan", OLD), ("check", "v1"), ("pack", OLD), ("pack", "v1")])
def test_a_pinned_revision_is_the_only_one_that_is_read(hub: Path, command: str, revision: str) -> None:
    output = [str(hub / "x.lema.safetensors")] if command == "pack" else []
    run = lambda *more: cli.main([command, "org/tiny", *output, *more])  # noqa: E731
    assert snapshots_opened(lambda: run("--revision", revision), hub) == {OLD}
    assert snapshots_opened(lambda: run(), hub) == {NEW}


@pytest.mark.parametrize("ram_budget", ["auto", "min"])
def test_from_pretrained_and_its_generation_settings_are_of_the_revision(hub: Path, ram_budget: str) -> None:
    def load() -> None:
        config = LemaConfig(ram_budget=ram_budget)
        with closing(LemaModelWrapper.from_pretrained("org/tiny", config, device="cpu", revision="v1")) as model:
            assert model.config.num_hidden_layers == 2

    assert snapshots_opened(load, hub) == {OLD}


def test_merge_takes_base_and_adapter_each_of_its_revision(hub: Path) -> None:
    expected = peft.PeftModel.from_pretrained(build(num_layers=2, seed=2), hub / OLD / "adapter").merge_and_unload()

    def merge() -> None:
        arguments = ["merge", "--base", "org/tiny", "--adapter", "org/adapter", "--output", str(hub / "merged")]
        assert cli.main([*arguments, "--revision", "v1", "--adapter-revision", "v1"]) == 0

    assert snapshots_opened(merge, hub) == {OLD}
    for name, tensor in load_file(hub / "merged" / "model.safetensors").items():
        assert torch.equal(tensor, expected.state_dict()[name]), name


def test_without_a_base_the_revision_that_the_adapter_names_is_merged(hub: Path) -> None:
    path = hub / OLD / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text()) | {"base_model_name_or_path": "org/tiny", "revision": OLD}
    path.write_text(json.dumps(config))
    assert snapshots_opened(lambda: merge_and_save(None, path.parent, hub / "merged"), hub) == {OLD}
    with pytest.raises(ValueError, match="does not fit"):
        merge_and_save(None, path.parent, hub / "other", revision=NEW)
