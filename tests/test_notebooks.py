"""The notebooks: what a committed one looks like, each run from top to bottom in a copy, and the steps they call."""

from __future__ import annotations

import ast
import base64
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "recipes"))

import badges  # noqa: E402
import card_table  # noqa: E402
import live_plot  # noqa: E402
import notebook_steps  # noqa: E402
import run_notebooks  # noqa: E402
import torch_for_card  # noqa: E402
from default_model import save_random_llama  # noqa: E402

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MAX_BYTES = 500_000
MAX_FUNCTION_LINES = 10
PNG = b"\x89PNG\r\n"


def notebook_named(part: str) -> Path:
    (path,) = [path for path in NOTEBOOKS if part in path.stem]
    return path


def python_of(cell: Any) -> ast.Module:
    assert not any(line.lstrip().startswith(("!", "%")) for line in cell.source.splitlines()), "plain Python only"
    return ast.parse(cell.source)


def code_cells(path: Path) -> list[Any]:
    return [cell for cell in run_notebooks.read(path).cells if cell.cell_type == "code"]


# ---- what a committed notebook looks like ----


def test_there_is_a_notebook_for_each_badge_and_a_small_run_for_each_notebook() -> None:
    names = {path.stem for path in NOTEBOOKS}

    assert names == set(badges.NOTEBOOKS) == set(json.loads(run_notebooks.SMALL.read_text(encoding="utf-8")))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_committed_notebook_was_run_in_order_and_holds_no_error_and_no_path(path: Path) -> None:
    assert path.stat().st_size < MAX_BYTES
    notebook = run_notebooks.read(path)
    cells = code_cells(path)
    outputs = [output for cell in cells for output in cell.outputs]
    texts = "".join(output.get("text", "") for output in outputs)

    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert [output.output_type for output in outputs if output.output_type == "error"] == []
    assert "Traceback" not in texts
    assert run_notebooks.absolute_paths(notebook) == []
    assert pictures_of(notebook), "a plot of the kept run"
    assert "small run on a CPU" in notebook.cells[0].source, "the reader is told what the outputs are of"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_cells_define_no_long_function_and_say_fp16_where_they_say_precision(path: Path) -> None:
    for cell in code_cells(path):
        for node in ast.walk(python_of(cell)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                assert node.end_lineno - node.lineno < MAX_FUNCTION_LINES, f"{node.name} belongs in recipes/"
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "TrainingArguments":
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert (given["bf16"], given["fp16"]) == ("False", "has_gpu")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_doctor_runs_before_anything_is_planned_or_trained(path: Path) -> None:
    sources = [cell.source for cell in code_cells(path)]
    doctor = next(number for number, source in enumerate(sources) if '"doctor"' in source)
    work = [
        n
        for n, source in enumerate(sources)
        if any(w in source for w in ('"plan"', '.py", *options', "from_pretrained"))
    ]

    assert doctor < min(work)
    assert not any("constraints" in source or "DataParallel" in source for source in sources)


def test_the_duel_sees_one_card_and_the_launcher_starts_both() -> None:
    sources = "\n".join(cell.source for cell in code_cells(notebook_named("duel")))

    assert '{"CUDA_VISIBLE_DEVICES": "0"}' in sources
    assert "environment=one_card" in sources
    assert "notebook_launcher" in (ROOT / "recipes/train_ranks.py").read_text(encoding="utf-8")


# ---- run from top to bottom ----


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    folder.mkdir()
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 2}
    save_random_llama(folder, vocab_size=1024, num_key_value_heads=1, **shape)
    return str(folder)


@pytest.fixture
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, one thread, and the checkout on the kernel's path."""
    monkeypatch.setenv("HF_LEMA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path / "run"


def text_of(notebook: Any) -> str:
    return "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))


def pictures_of(notebook: Any) -> list[str]:
    outputs = (output for cell in notebook.cells for output in cell.get("outputs", []))
    return [output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {})]


TINY_PLAN = {"NEEDS_GPU": False, "PLAN_MODEL": "smollm2-135m", "PLAN_OPTIONS": ["--card", "T4", "--ram", "11GiB"]}


@pytest.mark.timeout(600)
def test_quickstart_runs_from_top_to_bottom(tiny_folder: str, quick: Path) -> None:
    values = {"MODEL": tiny_folder, "VRAM_BUDGET": "min", "RAM_BUDGET": "min", "BATCH_SIZE": 2, "SEQ_LEN": 128}
    values |= {"MAX_STEPS": 3, "NUM_EXAMPLES": 20}
    notebook = run_notebooks.execute(notebook_named("quickstart"), values | TINY_PLAN, quick, limit_s=300)
    text = text_of(notebook)

    assert text.index("training runs on the CPU") < text.index("VRAM allocated")
    assert "QLoRA" in text
    assert "of which from disk" in text
    images = pictures_of(notebook)
    assert len(images) == 1, "one picture, drawn anew"
    assert base64.b64decode(images[0]).startswith(PNG)
    folder = quick / "notebooks"
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    assert (folder / "merged" / "model.safetensors").is_file()
    assert len(live_plot.read_curves(folder / "telemetry.jsonl").losses) == 3


RECIPE = ["--small", "--batch-size", "2", "--num-held-out", "2", "--save-every", "4", "--seq-len", "160"]


@pytest.mark.timeout(600)
def test_finetune_runs_from_top_to_bottom(tiny_folder: str, quick: Path) -> None:
    values = TINY_PLAN | {"MODEL": tiny_folder, "RECIPE_OPTIONS": [*RECIPE, "--num-examples", "12"]}
    notebook = run_notebooks.execute(notebook_named("finetune"), values, quick, limit_s=300)
    text = text_of(notebook)

    assert text.index("sees no GPU here") < text.index("hf_lema is installed") < text.index("runs on the CPU")
    assert "steps in 1 sessions" in text
    assert len(pictures_of(notebook)) >= 2, "the live plot and the recipe's own"
    assert (quick / "notebooks/reply-output/merged/model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_finetune_goes_on_in_a_new_session_from_what_the_last_one_left(tiny_folder: str, quick: Path) -> None:
    options, earlier = [*RECIPE, "--num-examples", "400"], quick.with_name("earlier")
    command = [sys.executable, str(ROOT / "recipes/finetune_reply.py"), "--model", tiny_folder, *options]
    process = subprocess.Popen([*command, "--output-dir", str(earlier)], stdout=subprocess.PIPE, text=True)
    wait_for(lambda: any(earlier.glob("checkpoints/checkpoint-*/trainer_state.json")), process)
    process.terminate()  # as notebook_steps does when the session's hours are over
    assert "To go on, bit for bit" in process.communicate(timeout=300)[0]

    values = {"MODEL": tiny_folder, "RECIPE_OPTIONS": options, "PREVIOUS_OUTPUT": str(earlier)}
    notebook = run_notebooks.execute(notebook_named("finetune"), TINY_PLAN | values, quick, limit_s=600)
    results = json.loads((quick / "notebooks/reply-output/results.json").read_text(encoding="utf-8"))
    assert f"Took over the run in {earlier}." in text_of(notebook)
    assert f"{len(results['loss'])} steps in 2 sessions" in text_of(notebook)
    assert len(results["loss"]) == int(results["table"]["steps"])


def wait_for(is_there: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    end_s = time.monotonic() + 300
    while not is_there():
        assert process.poll() is None, "it ended before"
        assert time.monotonic() < end_s
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_duel_runs_from_top_to_bottom_and_two_processes_train_one_adapter(tiny_folder: str, quick: Path) -> None:
    duel_options = ["--max-steps", "3", "--seq-len", "128"]
    ranks = {"batch_size": 2, "max_steps": 2, "seq_len": 128, "num_examples": 40}
    values = {"NEEDS_GPU": False, "MODEL": tiny_folder, "CONTENDERS": "peft,qlora,lema", "DUEL_OPTIONS": duel_options}
    values |= {"NUM_PROCESSES": 2, "RANK_SETTINGS": ranks}
    notebook = run_notebooks.execute(notebook_named("duel"), values, quick, limit_s=600)

    assert "All saw the same batches." in text_of(notebook)
    assert "rank 1 (DistributedDataParallel)" in text_of(notebook)
    folder = quick / "notebooks"
    assert {row["status"] for row in json.loads((folder / "duel-output/results.json").read_text())["contenders"]} == {
        "ok"
    }
    losses = [json.loads((folder / f"ranks-output/rank-{rank}.json").read_text())["loss"] for rank in range(2)]
    assert len(losses[0]) == 2
    assert (folder / "ranks-output" / "adapter" / "adapter_model.safetensors").is_file()


# ---- parameters ----


def test_a_parameter_that_the_cell_does_not_set_is_refused_and_counts_stay_in_order() -> None:
    notebook = run_notebooks.read(notebook_named("quickstart"))
    with pytest.raises(ValueError, match=r"sets no STEPS; it sets .*MAX_STEPS"):
        run_notebooks.set_parameters(notebook, {"STEPS": 3})
    num_cells = len(notebook.cells)
    run_notebooks.set_parameters(notebook, {"MAX_STEPS": 3, "MODEL": "a"})
    assert len(notebook.cells) == num_cells
    names: dict[str, Any] = {}
    exec(run_notebooks.parameters_cell(notebook).source, names)
    assert (names["MAX_STEPS"], names["MODEL"], names["BATCH_SIZE"]) == (3, "a", 8)


def test_an_absolute_path_in_an_output_is_found_and_an_address_is_none() -> None:
    notebook = run_notebooks.read(notebook_named("duel"))
    code = next(cell for cell in notebook.cells if cell.cell_type == "code")
    code.outputs = [
        {"output_type": "stream", "name": "stdout", "text": "see https://a.org/home/x and ~/.cache/hf_lema\n"}
    ]
    assert run_notebooks.absolute_paths(notebook) == []
    code.outputs[0]["text"] = "kept in /home/me/out\n"
    assert run_notebooks.absolute_paths(notebook) == ["/home/me/out"]


# ---- a torch that runs on the card ----


@pytest.mark.parametrize(
    ("arch_list", "capability", "is_usable"),
    [
        (("sm_70", "sm_75", "sm_80", "sm_90", "sm_100", "sm_120"), (6, 0), False),  # Kaggle's image on a P100
        (torch_for_card.PINNED_ARCHS, (6, 0), True),
        (("sm_75", "sm_80", "sm_90"), (7, 5), True),  # on a T4
        (("sm_75", "sm_80", "sm_90", "compute_90"), (12, 0), True),
    ],
)
def test_a_card_without_kernels_is_told_apart(
    arch_list: tuple[str, ...], capability: tuple[int, int], is_usable: bool
) -> None:
    found = torch_for_card.judge("2.11.0+cu128", "card", capability, arch_list)

    assert found.is_usable is is_usable
    assert f"sm_{capability[0]}{capability[1]}" in found.text
    assert ("no kernels" in found.text) is not is_usable


def test_what_is_installed_is_pinned_for_a_p100_and_refused_for_a_card_that_it_does_not_help() -> None:
    install, uninstall = torch_for_card.commands_to_install((6, 0))

    assert install[-3:] == ["torch==2.13.0+cu126", "--extra-index-url", "https://download.pytorch.org/whl/cu126"]
    assert f"\n{torch_for_card.PINNED}\n" in (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert "torchvision" in uninstall
    with pytest.raises(ValueError, match=r"compute capability 12\.0 either"):
        torch_for_card.commands_to_install((12, 0))


def fake_versions(monkeypatch: pytest.MonkeyPatch, *versions: str) -> None:
    answers = iter(versions)
    monkeypatch.setattr(notebook_steps.importlib.metadata, "version", lambda name: next(answers))
    monkeypatch.setattr(notebook_steps, "run", lambda *arguments: 0)


def test_a_restart_is_asked_for_where_this_session_has_loaded_the_other_torch(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch  # noqa: F401 - what the session has loaded

    fake_versions(monkeypatch, "2.11.0", "2.13.0+cu126")
    with pytest.raises(SystemExit, match=r"torch 2\.13\.0\+cu126 is installed: restart the session and run all"):
        notebook_steps.ensure_kernels()
    fake_versions(monkeypatch, "2.11.0", "2.13.0+cu126")
    monkeypatch.delitem(sys.modules, "torch")
    notebook_steps.ensure_kernels()
    assert "Restart the session if anything before this cell has imported torch" in capsys.readouterr().out


def test_a_torch_that_has_the_kernels_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_versions(monkeypatch, "2.11.0", "2.11.0")
    notebook_steps.ensure_kernels()
    assert capsys.readouterr().out == ""


def test_installing_the_package_keeps_the_torch_that_is_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    commands: list[list[str]] = []
    constraints: list[str] = []

    def install(command: list[str], check: bool) -> None:
        commands.append(command)
        constraints.append(Path(command[command.index("--constraint") + 1]).read_text(encoding="utf-8"))

    monkeypatch.setattr(notebook_steps, "CHECKOUT", tmp_path)  # so that hf_lema comes from elsewhere
    monkeypatch.setattr(notebook_steps.subprocess, "run", install)
    monkeypatch.setattr(notebook_steps.importlib.metadata, "version", lambda name: "2.11.0+cu128")
    notebook_steps.set_up("qlora", "report")

    assert commands[0][-1] == f"{tmp_path}[qlora,report]"
    assert constraints == ["torch==2.11.0+cu128\n"]


# ---- steps ----


def recipe(folder: Path, text: str) -> list[str]:
    path = folder / "recipe.py"
    path.write_text(text, encoding="utf-8")
    return [sys.executable, "-u", str(path)]


def test_a_commands_lines_come_one_by_one_and_its_error_ends_the_notebook(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines: list[str] = []
    command = recipe(tmp_path, "import os, sys\nprint('a')\nprint(os.environ['X'], file=sys.stderr)\nsys.exit(3)\n")
    with pytest.raises(notebook_steps.StepFailed, match=r"recipe\.py ended with status 3"):
        notebook_steps.run_command(command, environment={"X": "b"}, on_line=lambda: lines.append("line"))
    assert sorted(capsys.readouterr().out.split()) == ["a", "b"]
    assert lines == ["line", "line"]
    assert notebook_steps.run_command(command, environment={"X": "b"}, allowed=(0, 3)) == 3


def test_a_session_that_ends_stops_the_recipe_which_keeps_what_it_has(tmp_path: Path) -> None:
    text = (
        "import signal, sys\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(130))\nprint('ready')\nsignal.pause()\n"
    )
    command = recipe(tmp_path, text)

    assert notebook_steps.run_command(command, limit_s=1.0, allowed=(0, 130)) == 130


def test_a_run_goes_on_from_its_own_folder_or_from_that_of_an_earlier_session(tmp_path: Path) -> None:
    output, earlier = tmp_path / "out", tmp_path / "earlier"
    assert notebook_steps.options_to_go_on(str(output)) == []
    with pytest.raises(ValueError, match=r"earlier holds no settings\.json"):
        notebook_steps.options_to_go_on(str(output), str(earlier))
    checkpoint = earlier / "checkpoints" / "checkpoint-5"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text('{"global_step": 5}')
    (earlier / "settings.json").write_text("{}")

    assert notebook_steps.options_to_go_on(str(output), str(earlier)) == ["--resume"]
    assert notebook_steps.options_to_go_on(str(output)) == ["--resume"]
    assert not notebook_steps.is_finished(str(output))


def test_a_run_that_died_before_its_first_whole_checkpoint_begins_anew(tmp_path: Path) -> None:
    (tmp_path / "out" / "checkpoints" / "checkpoint-5").mkdir(parents=True)
    (tmp_path / "out" / "settings.json").write_text("{}")

    assert notebook_steps.options_to_go_on(str(tmp_path / "out")) == []
    assert not (tmp_path / "out").exists()


def test_a_session_without_a_gpu_is_told_where_to_switch_one_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notebook_steps.Path, "exists", lambda path: False)
    with pytest.raises(SystemExit, match="needs a GPU and this session has none: Runtime > T4, then run all"):
        notebook_steps.require_gpu("Runtime > T4")
    notebook_steps.require_gpu("Runtime > T4", needed=False)


def telemetry_line(kind: str, step: int, **fields: Any) -> str:
    return json.dumps({"kind": kind, "num_steps_done": step} | fields) + "\n"


def test_the_live_plot_draws_what_is_written_so_far_and_counts_a_repeated_step_once(tmp_path: Path) -> None:
    path = tmp_path / "telemetry.jsonl"
    shown: list[bytes] = []
    plot = live_plot.LivePlot(path, interval_s=0.0, show=shown.append)
    plot.update()
    assert shown == [], "nothing to draw yet"
    ram = "ram_private_above_baseline_peak_bytes"
    lines = [
        telemetry_line("step", step, vram_allocated_peak_bytes=vram, **{ram: 2**30})
        for step, vram in ((1, 5), (2, 9), (2, 6))
    ]
    lines += [telemetry_line("log", 2, loss_unitless=0.5), '{"kind": "st']
    path.write_text("".join(lines), encoding="utf-8")
    plot.update()

    curves = live_plot.read_curves(path)
    assert (curves.steps, curves.vram_bytes, curves.losses) == ([1, 2], [5, 6], [0.5])
    assert len(shown) == 1
    assert shown[0].startswith(PNG)
    assert len(shown[0]) < 50_000
    no_gpu = live_plot.draw(live_plot.Curves(steps=[1], ram_bytes=[1], loss_steps=[1], losses=[1.0]))
    assert [text.get_text() for text in no_gpu.axes[0].texts] == ["not measured here"]


def test_more_processes_than_cards_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import torch
    import train_ranks

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="2 processes need as many GPUs, and this session has 1"):
        train_ranks.launch(2, "model", str(tmp_path), {})


# ---- README ----


def test_addresses_in_readme_and_notebooks_are_those_of_setup_cfg() -> None:
    assert badges.main(["--check"]) == 0


def test_an_address_becomes_a_badge_for_each_notebook_and_the_place_to_clone_from() -> None:
    text = badges.badges("https://github.com/someone/hf_lema")
    assert text.count("[![Open in") == len(badges.NOTEBOOKS)
    colab, kaggle, _ = text.splitlines()
    assert "colab.research.google.com/github/someone/hf_lema/blob/main/notebooks/quickstart_colab_t4.ipynb" in colab
    assert "kaggle.com/kernels/welcome?src=https://github.com/someone/hf_lema/blob/main/notebooks/finetune" in kaggle
    assert "[![" not in badges.badges("")
    notebook = notebook_named("duel").read_text(encoding="utf-8")
    changed = badges.with_repository(notebook, "https://github.com/someone/hf_lema")
    cell = run_notebooks.parameters_cell(run_notebooks.nbformat.reads(changed, as_version=4))
    assert cell.source.startswith('REPOSITORY = "https://github.com/someone/hf_lema"')
    with pytest.raises(ValueError, match="expected one line REPOSITORY"):
        badges.with_repository("{}", "")


def test_readmes_table_of_cards_is_that_of_its_record() -> None:
    table = card_table.render(json.loads(card_table.RECORD.read_text(encoding="utf-8")))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")

    assert card_table.with_table(readme, table) == readme
    assert table.count("| planned |") == len(card_table.MACHINES) * len(card_table.MODELS)
    assert table.count("measured") == len(card_table.MEASURED)


def record_row(machine: str, model: str) -> dict[str, Any]:
    rows = json.loads(card_table.RECORD.read_text(encoding="utf-8"))["planned"]
    (row,) = [row for row in rows if row["machine"] == machine and row["model"] == model]
    return row


ROWS = [(*machine, model) for machine in card_table.MACHINES for model in card_table.MODELS]


@pytest.mark.parametrize(
    ("machine", "card", "ram", "model"), [ROWS[0], *(pytest.param(*row, marks=pytest.mark.slow) for row in ROWS[1:])]
)
def test_the_record_of_the_table_is_what_the_planner_says_today(machine: str, card: str, ram: str, model: str) -> None:
    planned = card_table._as_json(card_table.plan_row(card, ram, model))

    assert record_row(machine, model)["cells"] == planned


def test_the_runner_says_which_notebook_it_ran(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr(run_notebooks, "execute", lambda path, values, folder: ran.append((path.stem, values)))
    assert run_notebooks.main(["finetune"]) == 0
    assert [name for name, _ in ran] == ["finetune_kaggle_p100"]
    assert ran[0][1]["NEEDS_GPU"] is False
    assert "finetune_kaggle_p100.ipynb: 0 s" in capsys.readouterr().out
