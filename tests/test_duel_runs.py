"""What the duel runs: contenders and scenarios from files, runs that are kept, repeats, an interruption."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "recipes"))

import compare_peft  # noqa: E402
import contender_spec  # noqa: E402
import default_model  # noqa: E402
import duel_options  # noqa: E402
import duel_runs  # noqa: E402
from contender_process import Outcome  # noqa: E402
from contender_spec import ContenderSpec, load_contender  # noqa: E402

from hf_lema.reporting.contender import ContenderResult  # noqa: E402

ENVIRONMENT = {"torch_version": "2", "gpu_name": None, "git_commit": "a"}


def outcome(name: str, status: str = "ok", step_s: float = 1.0) -> Outcome:
    if status == "ok":
        fields: dict[str, Any] = {"num_steps": 2, "loss": (2.0, 1.0), "step_s": (step_s, step_s)}
        fields["ram_private_above_imports_peak_bytes"] = 1 << 30
    else:
        fields = {"reason": "because"}
    result = ContenderResult(name=name, status=status, **fields)
    details = {"adapter_start_sha256": "s", "adapter_end_sha256": "e"} if status == "ok" else {}
    return Outcome(result=result, details=details, environment=dict(ENVIRONMENT), wall_s=3.0)


# Contenders


def test_every_contender_of_the_project_can_be_read_and_says_what_it_is() -> None:
    names = contender_spec.known_contenders()

    assert set(duel_options.CONTENDERS) <= set(names)
    assert all(load_contender(name).about for name in names)


def test_a_file_holds_only_what_differs_from_the_defaults() -> None:
    defaults = {field.name: field for field in dataclasses.fields(ContenderSpec)}
    for name in contender_spec.known_contenders():
        values = json.loads((contender_spec.FOLDER / f"{name}.json").read_text(encoding="utf-8"))
        for key, value in values.items():
            assert value not in ("", {}, defaults[key].default), f"{name}.json: {key}"


def test_the_first_contenders_are_those_of_before() -> None:
    assert load_contender("lema").for_device("cpu").lema == {"vram_budget": "min", "ram_budget": "min"}
    assert load_contender("lema").for_device("cuda").lema == {"vram_budget": "min"}
    assert load_contender("lema-auto").for_device("cpu").lema == {}
    assert [load_contender(name).build for name in duel_options.CONTENDERS] == ["stock", "4bit", "lema", "lema"]
    assert load_contender("peft-no-gc").training == {"gradient_checkpointing": False}


def test_a_new_contender_is_one_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text('{"build": "lema", "lema": {"vram_budget": "6GiB"}}')
    args = duel_options.parse_arguments(["--contenders", f"peft,{path}", "--device", "cpu"])

    assert [spec.name for spec in args.contenders] == ["peft", "mine"]
    assert args.contenders[1].lema == {"vram_budget": "6GiB"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"colour": 1}', "mine.json sets colour"),
        ('{"build": "magic", "lema": {"x": 1}}', r"build is 'magic'.*lema is set"),
        ('{"training": {"batch_size": 9}}', "training sets batch_size"),
        ('{"arguments": {"learning_rate": 1, "deepspeed": {}}}', "sets learning_rate, which all contenders share"),
        ('{"on_cpu": {"build": {}}}', "on_cpu sets build"),
    ],
)
def test_a_contender_that_would_not_be_fair_or_cannot_be_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_contender(str(path))


def test_what_all_contenders_share_are_arguments_that_the_recipe_sets(tmp_path: Path) -> None:
    import training

    plan = training.TrainingPlan(
        batch_size=1, max_steps=1, seed=0, lora_rank=1, learning_rate=1.0, precision="fp32", device_type="cpu"
    )
    args = training.training_arguments(plan, tmp_path)
    assert [name for name in contender_spec.SAME_FOR_ALL if not hasattr(args, name)] == []


def test_a_package_that_is_missing_is_named_with_the_command_that_installs_it() -> None:
    spec = ContenderSpec(name="x", needs={"pytest": "never", "no-such-package-anywhere": "pip install it"})
    assert spec.missing_packages() == ["no-such-package-anywhere is not installed: pip install it"]


# Scenarios


@pytest.mark.parametrize("name", duel_options.known_scenarios())
def test_every_scenario_of_the_project_can_be_asked_for(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duel_options, "_choose_device", lambda wanted, parser: "cuda")
    args = duel_options.parse_arguments(["--scenario", name])
    values = json.loads((duel_options.SCENARIO_FOLDER / f"{name}.json").read_text(encoding="utf-8"))

    assert values["about"]
    assert (args.batch_size, args.seq_len) == (values["batch_size"], values["seq_len"])


def test_options_go_before_the_scenario_and_the_scenario_before_the_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duel_options, "_choose_device", lambda wanted, parser: "cuda")
    args = duel_options.parse_arguments(["--scenario", "7b-16gib", "--batch-size", "3"])

    assert (args.batch_size, args.seq_len, args.vram_limit) == (3, 512, 16 << 30)
    assert (args.precision, args.lora_rank) == ("fp16", 16)


def test_a_scenario_that_does_not_exist_or_sets_strange_things_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "own.json"
    path.write_text('{"output_dir": "x"}')
    for text, message in (
        ("nope", "no scenario nope; there are 70b-nf4, 7b-16gib"),
        (str(path), "own.json sets output_dir"),
    ):
        with pytest.raises(SystemExit):
            duel_options.parse_arguments(["--scenario", text])
        assert message in capsys.readouterr().err


def test_the_command_of_a_duel_repeats_it_and_tells_no_local_path(tmp_path: Path) -> None:
    options = ["--quick", "--model", str(tmp_path), "--contenders", "peft", "lema", "--device", "cpu", "--seed", "3"]
    command = duel_options.command_of(duel_options.parse_arguments(options))

    assert str(tmp_path.parent) not in command
    words = command.split()
    assert words[:4] == ["python", "recipes/compare_peft.py", "--model", tmp_path.name]
    again = duel_options.parse_arguments(words[2:])
    asked = duel_options.parse_arguments(options)
    for name in ("contenders", "batch_size", "seq_len", "max_steps", "seed", "device", "vram_limit", "precision"):
        assert getattr(again, name) == getattr(asked, name), name


# Runs that are kept


def kept(tmp_path: Path, environment: dict[str, Any] | None = None, **job: Any) -> duel_runs.KeptRuns:
    return duel_runs.KeptRuns(tmp_path, {"batch_size": 2} | job, ENVIRONMENT | (environment or {}))


def run_once(runs: duel_runs.KeptRuns, spec: ContenderSpec, result: Outcome) -> None:
    runs.keep(spec, result, runs.new_folder(spec.name))


def test_a_run_is_found_again_as_it_was(tmp_path: Path) -> None:
    spec = load_contender("lema")
    run_once(kept(tmp_path), spec, outcome("lema", step_s=1.0))
    run_once(kept(tmp_path), spec, outcome("lema", step_s=2.0))

    assert kept(tmp_path).find(spec) == [outcome("lema", step_s=1.0), outcome("lema", step_s=2.0)]
    assert kept(tmp_path).find(load_contender("lema-auto")) == []


@pytest.mark.parametrize(
    "change",
    [
        {"batch_size": 3},
        {"environment": {"torch_version": "3"}},
        {"environment": {"gpu_name": "another card"}},
    ],
)
def test_a_run_of_another_job_version_or_machine_does_not_count(tmp_path: Path, change: dict[str, Any]) -> None:
    run_once(kept(tmp_path), load_contender("lema"), outcome("lema"))
    assert kept(tmp_path, **change).find(load_contender("lema")) == []


def test_a_run_of_other_sources_or_of_a_contender_that_was_changed_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = load_contender("lema")
    run_once(kept(tmp_path), spec, outcome("lema"))

    assert kept(tmp_path).find(dataclasses.replace(spec, lema={"vram_budget": "6GiB"})) == []
    monkeypatch.setattr(duel_runs, "sources_sha256", lambda: "other")
    assert kept(tmp_path).find(spec) == []


def test_out_of_memory_is_kept_a_failure_is_repeated_and_an_interrupted_run_is_none(tmp_path: Path) -> None:
    runs, spec = kept(tmp_path), load_contender("peft")
    run_once(runs, spec, outcome("peft", "failed"))
    runs.new_folder("peft")
    assert runs.find(spec) == []

    run_once(runs, spec, outcome("peft", "out_of_memory"))
    assert [found.result.status for found in runs.find(spec)] == ["out_of_memory"]
    runs.forget("peft")
    assert runs.find(spec) == []


def duel_arguments(tmp_path: Path, *options: str) -> argparse.Namespace:
    names = ["--contenders", "peft,lema", "--device", "cpu", "--output-dir", str(tmp_path)]
    return duel_options.parse_arguments([*names, *options])


def run_duel(
    monkeypatch: pytest.MonkeyPatch, args: argparse.Namespace, interrupted_at: str | None = None
) -> tuple[list[str], list[Outcome]]:
    """Which contenders were started, and the outcomes."""
    started: list[str] = []

    def run(task: dict[str, Any], *rest: Any) -> Outcome:
        assert json.loads(json.dumps(task)) == task, "a task is written to a file"
        started.append(task["name"])
        if task["name"] == interrupted_at:
            raise KeyboardInterrupt
        return outcome(task["name"])

    monkeypatch.setattr(compare_peft, "run_contender", run)
    monkeypatch.setattr(compare_peft, "environment_apart", lambda: ENVIRONMENT)
    source = default_model.ModelSource(name_or_path="m", label="m")
    try:
        return started, compare_peft.run_duel(args, source)
    except KeyboardInterrupt:
        return started, []


def test_an_interrupted_duel_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = duel_arguments(tmp_path)

    assert run_duel(monkeypatch, args, interrupted_at="lema")[0] == ["peft", "lema"]
    started, outcomes = run_duel(monkeypatch, args)
    assert started == ["lema"]
    assert [found.result.name for found in outcomes] == ["peft", "lema"]
    assert run_duel(monkeypatch, args)[0] == []


def test_more_runs_add_what_is_lacking_and_fresh_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_duel(monkeypatch, duel_arguments(tmp_path))
    started, outcomes = run_duel(monkeypatch, duel_arguments(tmp_path, "--runs", "3"))

    assert started == ["peft", "peft", "lema", "lema"]
    assert [found.result.name for found in outcomes] == ["peft"] * 3 + ["lema"] * 3
    assert run_duel(monkeypatch, duel_arguments(tmp_path, "--fresh"))[0] == ["peft", "lema"]
    assert run_duel(monkeypatch, duel_arguments(tmp_path))[0] == []


def test_other_options_do_not_take_over_the_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_duel(monkeypatch, duel_arguments(tmp_path))

    assert run_duel(monkeypatch, duel_arguments(tmp_path, "--batch-size", "4"))[0] == ["peft", "lema"]
    assert run_duel(monkeypatch, duel_arguments(tmp_path))[0] == []


def test_a_contender_without_its_package_is_a_row_that_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rare.json"
    path.write_text('{"needs": {"no-such-package-anywhere": "pip install no-such-package-anywhere"}}')
    args = duel_arguments(tmp_path, "--contenders", f"peft,{path}")
    started, (_, skipped) = run_duel(monkeypatch, args)

    assert started == ["peft"]
    assert skipped.result.status == "skipped"
    assert skipped.result.reason.endswith("is not installed: pip install no-such-package-anywhere")


def test_the_duel_itself_never_initialises_cuda_and_a_shape_is_written_by_a_process_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(default_model.CACHE_VARIABLE, str(tmp_path))
    args = duel_options.parse_arguments(["--model", "shape:tiny", "--device", "cpu"])
    source = compare_peft.resolve_source(args)

    assert source.label == "tiny shape, random weights"
    assert (Path(source.name_or_path) / "config.json").is_file()
    text = (ROOT / "recipes" / "compare_peft.py").read_text(encoding="utf-8")
    assert "environment_record" not in text, "it initialises CUDA: environment_apart"
    assert "import torch" not in text


def test_contenders_that_were_not_treated_alike_are_said_to_be_so() -> None:
    fair = [outcome("peft"), outcome("lema"), outcome("lema"), outcome("qlora", "failed")]
    assert compare_peft.check_same(fair) == [
        "All saw the same batches.",
        "All began with the same adapter, bit for bit.",
        "After the last step the adapters of peft and lema are equal, bit for bit.",
    ]
    changed = dataclasses.replace(fair[1].result, batches_sha256="other", num_trainable=7)
    unfair = dataclasses.replace(fair[1], result=changed, details={**fair[1].details, "adapter_start_sha256": "x"})
    assert sum(sentence.startswith("BEWARE") for sentence in compare_peft.check_same([fair[0], unfair])) == 3


def test_a_shape_that_does_not_exist_is_refused_with_those_that_do() -> None:
    args = duel_options.parse_arguments(["--model", "shape:llama-3", "--device", "cpu"])
    with pytest.raises(ValueError, match=r"no shape llama-3; there are llama-2-7b, .*tiny"):
        compare_peft.resolve_source(args)
