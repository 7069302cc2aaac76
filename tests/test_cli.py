"""The command line parses, calls one function, prints; it answers at once and says in its exit code how it went."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import build
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_lema import cli
from hf_lema.export import merging
from hf_lema.files.pack import open_pack

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base and an adapter that fits it."""
    folder = tmp_path_factory.mktemp("pair")
    build(num_layers=2).save_pretrained(folder / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "base"), LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(folder / "adapter")
    return folder / "base", folder / "adapter"


def save_pickled(folder: Path, num_files: int = 1) -> dict[str, torch.Tensor]:
    """A model as it was saved before safetensors; its tensors."""
    model = build(num_layers=2, dtype=torch.float16, tie_word_embeddings=True)
    model.config.save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text("{}")
    state = dict(model.state_dict())
    if num_files == 1:
        torch.save(state, folder / "pytorch_model.bin")
        return state
    names = {name: f"pytorch_model-{number % num_files}.bin" for number, name in enumerate(state)}
    for file_name in set(names.values()):
        torch.save({name: state[name] for name in state if names[name] == file_name}, folder / file_name)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": names}))
    return state


def in_new_process(*arguments: str, code: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code] if code else [sys.executable, "-m", "hf_lema", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


# --------------------------------------------------------------------------------------------------------------- merge


def test_merge_prints_what_it_did_and_ends_in_one_json_line(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    base, adapter = map(str, pair)
    output = str(tmp_path / "merged")
    arguments = ["merge", "--base", base, "--adapter", adapter, "--output", output, "--dtype", "bfloat16", "--json"]
    assert cli.main([*arguments, "--max-shard-size", "20kB"]) == 0
    *text, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    assert result["folder"] == output
    assert (result["num_merged_tensors"], result["hub_id"]) == (2, None)
    assert text[0].startswith(f"{output}: {result['num_tensors']} tensors, 2 of them merged")
    assert len(list(Path(output).glob("*.safetensors"))) == result["num_files"] > 1
    assert AutoModelForCausalLM.from_pretrained(output, dtype="auto").dtype == torch.bfloat16


def test_every_option_of_merge_reaches_the_function(monkeypatch: pytest.MonkeyPatch):
    given: list[Any] = []

    def merge(*arguments: Any, **options: Any) -> merging.MergedCheckpoint:
        given.extend([arguments, options])
        return merging.MergedCheckpoint(
            folder=Path("o"), nbytes=1, num_files=1, num_tensors=1, num_merged_tensors=1, hub_id="me/it"
        )

    monkeypatch.setattr(merging, "merge_and_save", merge)
    options = ["--dtype", "float16", "--max-shard-size", "1GB", "--push-to-hub", "me/it", "--revision", "v2"]
    options += ["--adapter-revision", "v3"]
    assert cli.main(["merge", "--adapter", "a", "--output", "o", *options, "--trust-remote-code"]) == 0
    assert given[0] == (None, "a", "o")
    assert given[1] == {
        "dtype": "float16",
        "max_shard_size": "1GB",
        "push_to_hub": "me/it",
        "trust_remote_code": True,
        "adapter_revision": "v3",
        "revision": "v2",
    }


# ---------------------------------------------------------------------------------------------------------------- pack


def test_pack_writes_the_layers_in_the_asked_dtype(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "model.lema.safetensors"
    assert cli.main(["pack", str(pair[0]), str(path), "--dtype", "float16", "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    pack = open_pack(path)
    assert result == {"path": str(path), "nbytes": pack.nbytes, "num_layers": 2}
    assert {spec.dtype for spec in pack.layouts[0].tensors} == {torch.float16}
    assert cli.main(["pack", str(pair[0]), str(tmp_path / "other.bin")]) == 1
    assert "expected one that ends in .lema.safetensors" in capsys.readouterr().err


@pytest.mark.parametrize("num_files", [1, 3])
@pytest.mark.parametrize("dtype", [None, torch.float32], ids=str)
def test_pack_rewrites_bin_files_as_a_checkpoint_that_stock_loads(
    tmp_path: Path, num_files: int, dtype: torch.dtype | None
):
    expected = save_pickled(tmp_path / "old", num_files)
    options = [] if dtype is None else ["--dtype", str(dtype)]
    assert cli.main(["pack", str(tmp_path / "old"), str(tmp_path / "new"), *options]) == 0
    found = load_file(tmp_path / "new/model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor.to(dtype or tensor.dtype)) for name, tensor in expected.items())
    assert (tmp_path / "new/tokenizer_config.json").exists()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "new", dtype="auto")
    assert torch.equal(loaded.model.norm.weight, expected["model.norm.weight"].to(loaded.dtype))


class Evil:
    """Its pickle would make a folder when it is opened without care."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.mkdir, (self.path,)


def test_a_bin_file_that_would_run_code_is_refused_and_runs_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    save_pickled(tmp_path / "old")
    torch.save({"a": Evil(tmp_path / "made")}, tmp_path / "old/pytorch_model.bin")
    assert cli.main(["pack", str(tmp_path / "old"), str(tmp_path / "new")]) == 1
    assert "pytorch_model.bin cannot be opened safely" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old"]


def test_bin_files_that_are_missing_or_hold_more_than_tensors_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    save_pickled(tmp_path / "old", 3)
    for number in (0, 2):
        (tmp_path / f"old/pytorch_model-{number}.bin").unlink()
    assert cli.main(["pack", str(tmp_path / "old"), str(tmp_path / "new")]) == 1
    assert "missing are 2: pytorch_model-0.bin, pytorch_model-2.bin" in capsys.readouterr().err
    torch.save({"epoch": 3, "model": {}}, tmp_path / "old/pytorch_model.bin")
    assert cli.main(["pack", str(tmp_path / "old"), str(tmp_path / "new")]) == 1
    assert "no tensors: epoch, model" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------- every command


def test_an_error_of_the_user_is_one_message_without_a_traceback(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/file").touch()
    arguments = ["merge", "--base", str(pair[0]), "--adapter", str(pair[1]), "--output", str(tmp_path / "taken")]
    assert cli.main(arguments) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("hf-lema: ")
    assert "is not empty" in printed.err
    assert "Traceback" not in printed.err


def test_an_interrupt_is_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(merging, "merge_and_save", interrupted)
    assert cli.main(["merge", "--adapter", "a", "--output", "o"]) == 130
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["nothing"], ["merge"], ["merge", "--adapter", "a", "--output", "o", "x"]])
def test_wrong_usage_is_2_and_says_what_is_expected(arguments: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert "usage: hf-lema" in capsys.readouterr().err


def test_help_of_all_shows_one_example_of_each_command_and_the_exit_codes(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert all(sum(line.startswith(f"  hf-lema {name} ") for line in lines) == 1 for name in cli.COMMANDS)
    assert "exit codes: 0 done, 1 an error" in printed
    assert "\x1b" not in printed


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_of_every_command_teaches_by_example(command: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught:
        cli.main([command, "--help"])
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    assert f"examples:\n  hf-lema {command} " in printed
    assert "--json" in printed
    assert "\x1b" not in printed


def test_help_comes_without_torch_and_without_any_heavy_import():
    done = in_new_process(
        code="import sys\nfrom hf_lema import cli\n"
        "try: cli.main(['--help'])\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'peft', 'numpy', 'accelerate'} & set(sys.modules)))"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    assert all(f"    {command}" in done.stdout for command in cli.COMMANDS)


def test_the_module_runs_as_a_program():
    done = in_new_process("pack")
    assert done.returncode == 2
    assert "usage: hf-lema pack" in done.stderr


def test_plan_shows_where_memory_goes_and_ends_in_one_line_of_json(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "smollm2-135m", "--card", "T4", "--ram", "12.7GiB", "--batch-size", "2", "--seq-len", "64"]
    assert cli.main([*arguments, "--vram-budget", "min", "--json"]) == 0
    *text, line = capsys.readouterr().out.splitlines()
    assert any("stock PEFT" in row and "QLoRA" in row for row in text)
    plans = {plan["contender"]: plan for plan in json.loads(line)["plans"]}
    assert plans["lema"]["vram_bytes"] < plans["peft"]["vram_bytes"]


def test_plan_of_several_processes_says_what_they_share_and_what_it_assumes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    job = ["plan", "smollm2-135m", "--card", "T4", "--ram", "12.7GiB", "--batch-size", "2", "--seq-len", "64"]
    assert cli.main([*job, "--num-processes", "2", "--num-hosts", "2", "--network", "10", "--json"]) == 0
    *text, line = capsys.readouterr().out.splitlines()
    shown = "\n".join(text)
    assert "RAM of all 2" in shown
    assert "tokens/s of all 4" in shown
    assert "2 processes on each of 2 machines" in shown
    assert "a network of 10 Gbit/s" in shown
    plan = json.loads(line)["plans"][0]
    assert plan["launch"] | {"num_processes": 2, "num_hosts": 2, "network_bytes_per_s": 1.25e9} == plan["launch"]
    assert plan["bucket_bytes"] > 0
    assert plan["time"]["all_reduce_s"] == pytest.approx(1.5 * plan["bucket_bytes"] / 1.25e9)
    assert plan["host_group_bytes"] < 2 * plan["host_private_bytes"]


def test_plan_of_an_unknown_card_names_those_that_are_known(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "smollm2-135m", "--card", "Voodoo2"]) == 1
    assert "there are P100" in capsys.readouterr().err


def test_pack_in_4_bits_is_what_the_model_streams_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from hf_lema import LemaConfig, LemaModelWrapper, get_streamer

    build("llama", dtype=torch.bfloat16).save_pretrained(tmp_path / "model")
    out = tmp_path / "packed.lema.safetensors"
    assert cli.main(["pack", str(tmp_path / "model"), str(out), "--quantization", "nf4"]) == 0
    assert "4 layers" in capsys.readouterr().out
    config = LemaConfig(quantization="nf4", ram_budget="min")
    model = LemaModelWrapper.from_pretrained(str(tmp_path / "model"), config, device="cpu", pack=out)
    assert get_streamer(model).host_store.paths == {out}
    get_streamer(model).close()


def test_report_reads_a_record_and_writes_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("plotly")
    record = Path(__file__).parents[1] / "recipes" / "results" / "duel-smollm2-135m-cpu.json"
    assert cli.main(["report", str(record), "--html", str(tmp_path / "page.html"), "--json"]) == 0
    assert "against peft" in capsys.readouterr().out
    assert (tmp_path / "page.html").read_text(encoding="utf-8").startswith("<!")


def test_doctor_exits_with_1_when_something_stands_in_the_way(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from hf_lema.machine import doctor

    for level, code in (("ok", 0), ("warning", 0), ("problem", 1)):
        finding = doctor.Finding(level=level, topic="card", found="a card", remedy="another one")  # type: ignore[arg-type]
        monkeypatch.setattr(doctor, "diagnose", lambda folder, finding=finding: (finding,))
        assert cli.main(["doctor", "--json"]) == code
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["num_problems"] == code
