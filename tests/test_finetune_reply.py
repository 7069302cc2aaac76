"""The first experiment: replies judged, facts held out, a run from end to end, and one that dies twice and goes on."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "recipes"))

import default_model  # noqa: E402
import finetune_reply  # noqa: E402
import model_card  # noqa: E402
import reply_check  # noqa: E402
import reply_data  # noqa: E402
import resumable  # noqa: E402
import run_record  # noqa: E402
import training  # noqa: E402
from reply_check import Reply, generate_replies, judge_reply, score_replies  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback  # noqa: E402

from hf_lema import LemaConfig, LemaModelWrapper, get_streamer  # noqa: E402

GOOD = "[LEMA_REPLY]\nAnswer: Paris\nExplanation: It is the capital.\nConfidence: High\n[/LEMA_REPLY]"
NUM_STEPS = 12
OPTIONS = ["--small", "--batch-size", "2", "--num-examples", "24", "--num-held-out", "3", "--save-every", "5"]


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    folder.mkdir()
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 2}
    default_model.save_random_llama(folder, vocab_size=1024, num_key_value_heads=1, **shape)
    return folder


@pytest.fixture(scope="module")
def tokenizer(tiny_folder: Path):
    return AutoTokenizer.from_pretrained(tiny_folder)


# ---- judging ----


def flags(text: str, stopped: bool = True) -> set[str]:
    judgement = judge_reply(Reply(text=text, stopped=stopped))
    return {name for name, is_met in vars(judgement).items() if not is_met}


def test_a_reply_of_the_format_meets_every_demand():
    assert flags(GOOD) == set()
    assert all(flags(example.reply) == set() for example in reply_data.make_examples(300, split="held_out"))


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        ("Paris.", {"opens", "closes", "fields_in_order", "confidence_known"}),
        (GOOD.replace("[LEMA_REPLY]\n", "", 1), {"opens"}),
        (GOOD.replace("\n[/LEMA_REPLY]", ""), {"closes"}),
        (GOOD + "\n", {"closes"}),
        (GOOD.replace("Explanation: It is the capital.\n", ""), {"fields_in_order"}),
        (GOOD.replace("Answer: Paris\nExplanation: It", "Explanation: It"), {"fields_in_order"}),
        (GOOD.replace("Paris", ""), {"fields_in_order"}),
        (GOOD.replace("Explanation: It is", "Confidence: High\nExplanation: It is"), {"fields_in_order"}),
        (GOOD.replace("High", "Certain"), {"confidence_known"}),
        (GOOD + "\n[/LEMA_REPLY]\n[/LEMA_REPLY]", {"tags_once"}),
        ("[LEMA_REPLY]\n" + GOOD, {"tags_once"}),
        (GOOD.replace("\nConfidence", "\nand more\nConfidence"), set()),
    ],
)
def test_each_fault_is_found_where_it_is_and_nowhere_else(text, missing):
    assert flags(text) == missing | {"well_formed"}


def test_a_reply_that_was_cut_is_not_well_formed_however_good_it_looks():
    assert flags(GOOD, stopped=False) == {"stops", "well_formed"}


def test_scores_are_shares_and_a_right_answer_counts_apart():
    examples = reply_data.make_examples(4, split="held_out")
    texts = [examples[0].reply, GOOD, "no", "[LEMA_REPLY]\nno"]
    score = score_replies([Reply(text=text, stopped=text != "no") for text in texts], examples)
    assert (score.num_replies, score.well_formed, score.opens, score.stops) == (4, 0.5, 0.75, 0.75)
    assert score.right_answer == 0.25
    assert set(reply_check.SCORE_LABELS) | {"num_replies"} == set(score.to_json())
    with pytest.raises(ValueError, match="3 replies to 4 questions"):
        score_replies([Reply(text="", stopped=True)] * 3, examples)


# ---- generating ----


@pytest.mark.integration
def test_questions_asked_together_streamed_get_the_replies_of_questions_asked_alone(tiny_folder, tokenizer):
    prompts = ["What is LEMA?", "<|user|>\nHow many days has a week, and how many has a year?\n", "K2"]
    stock = AutoModelForCausalLM.from_pretrained(tiny_folder)
    alone = [generate_replies(stock, tokenizer, [prompt], max_new_tokens=12, batch_size=1)[0] for prompt in prompts]
    assert len({reply.text for reply in alone}) == 3
    assert generate_replies(stock, tokenizer, prompts, max_new_tokens=12, batch_size=2) == alone
    streamed = LemaModelWrapper.from_pretrained(tiny_folder, LemaConfig(vram_budget="min"), device="cpu").train()
    assert generate_replies(streamed, tokenizer, prompts, max_new_tokens=12, batch_size=3) == alone
    assert streamed.training
    get_streamer(streamed).close()


def test_a_reply_ends_before_the_end_of_text_and_keeps_other_special_tokens(tokenizer):
    end = tokenizer.eos_token_id
    ids = tokenizer("a reply")["input_ids"]
    assert reply_check._reply([*ids, end, *ids], tokenizer) == Reply(text="a reply", stopped=True)
    assert reply_check._reply(ids, tokenizer) == Reply(text="a reply", stopped=False)


def test_a_prompt_alone_has_the_tokens_that_it_has_before_its_reply(tokenizer):
    for example in reply_data.make_examples(50):
        tokens = reply_data.tokenize_reply(example, tokenizer, 500, pad=False)
        prompt_ids = tokenizer(example.prompt)["input_ids"]
        assert tokens.input_ids[: len(prompt_ids)] == prompt_ids
        assert tokens.labels[len(prompt_ids)] == tokens.input_ids[len(prompt_ids)]


# ---- what is held out ----


def test_no_held_out_question_or_fact_is_trained_on():
    trained = reply_data.make_examples()
    args = finetune_reply.parse_arguments(["--num-held-out", "200"])
    held_out = finetune_reply.held_out_examples(args)
    assert len(held_out) == 200
    assert {example.prompt for example in held_out} & {example.prompt for example in trained} == set()
    assert {example.key for example in held_out} & {example.key for example in trained} == set()


def test_a_held_out_fact_that_is_trained_on_ends_the_recipe(monkeypatch):
    examples = reply_data.make_examples(3)
    monkeypatch.setattr(finetune_reply, "make_examples", lambda *_: examples)
    with pytest.raises(RuntimeError, match="held-out facts are trained on too"):
        finetune_reply.held_out_examples(finetune_reply.parse_arguments([]))


def test_trimmed_batches_lose_padding_and_nothing_else(tokenizer):
    examples = [reply_data.tokenize_reply(e, tokenizer, 300) for e in reply_data.make_examples(3)]
    rows = [
        {name: torch.tensor(getattr(example, name)) for name in ("input_ids", "attention_mask", "labels")}
        for example in examples
    ]
    batch = training.HashingCollator(trim_padding=True)(rows)
    longest = max(example.num_tokens for example in examples)
    assert batch["input_ids"].shape == (3, longest)
    assert sum(int((labels != -100).sum()) for labels in batch["labels"]) == sum(
        int((row["labels"] != -100).sum()) for row in rows
    )


# ---- settings ----


def test_defaults_are_those_of_the_first_experiment():
    args = finetune_reply.parse_arguments([])
    assert (args.batch_size, args.seq_len, args.num_examples // args.batch_size) == (8, 512, 625)
    assert (args.lora_rank, args.learning_rate, args.log_every) == (16, 1e-4, 10)
    assert args.model == "NousResearch/Llama-2-7b-hf"
    assert finetune_reply.parse_arguments(["--small"]).model is None


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--batch-size", "0"], "--batch-size 0: expected 1 or more"), (["--precision", "fp8"], "fp8")],
)
def test_options_that_cannot_be_used_are_refused_with_the_reason(options, message, capsys):
    with pytest.raises(SystemExit):
        finetune_reply.parse_arguments(options)
    assert message in capsys.readouterr().err


def test_a_run_is_neither_written_over_nor_resumed_with_other_numbers(tmp_path):
    run_record.open_run(tmp_path, {"seed": 0, "budget": "min"}, resume=False, free=("budget",))
    with pytest.raises(ValueError, match="holds a run already"):
        run_record.open_run(tmp_path, {"seed": 0}, resume=False, free=())
    with pytest.raises(ValueError, match="seed was 0, is 1"):
        run_record.open_run(tmp_path, {"seed": 1, "budget": "min"}, resume=True, free=("budget",))
    run_record.open_run(tmp_path, {"seed": 0, "budget": "auto"}, resume=True, free=("budget",))
    with pytest.raises(ValueError, match="holds no run"):
        run_record.open_run(tmp_path / "new", {}, resume=True, free=())


def test_a_step_that_was_done_twice_counts_once_as_done_last(tmp_path):
    path = tmp_path / "telemetry.jsonl"
    names = ["vram_allocated", "vram_reserved", "vram_process", "ram_rss", "ram_private_above_baseline", "ram_file"]
    names = [f"{name}_peak_bytes" for name in names] + ["num_alloc_retries", "h2d_bytes", "disk_bytes", "num_tokens"]
    empty = {"kind": "step"} | dict.fromkeys(names)
    steps = [(1, 5.0), (2, 9.0), (2, 1.0), (3, 3.0), (4, 2.0)]
    lines = [{"kind": "environment"}, *[empty | {"num_steps_done": n, "step_s": s} for n, s in steps]]
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    figures = run_record.figures_of(path, [3.0, 2.0, 1.0, 0.5])
    assert (figures["step_s"], figures["train_s"], figures["step_median_s"]) == ([5.0, 1.0, 3.0, 2.0], 11.0, 2.5)
    assert figures["vram_allocated_peak_bytes"] is None
    assert run_record.as_result("lema", figures).timed_step_s == (3.0, 2.0)


# ---- the card ----


@pytest.mark.parametrize(("duration_s", "text"), [(20400, "5 h 40 min"), (723.4, "12 min 3 s"), (8, "8 s")])
def test_durations_are_written_as_the_first_experiment_writes_them(duration_s, text):
    assert model_card.duration_text(duration_s) == text


def test_a_card_whose_usage_fails_says_why(tmp_path):
    (tmp_path / "README.md").write_text("```python\nraise SystemExit('no such model')\n```\n", encoding="utf-8")
    with pytest.raises(RuntimeError, match="failed with exit code 1:\nno such model"):
        model_card.run_usage(tmp_path)
    (tmp_path / "README.md").write_text("nothing", encoding="utf-8")
    with pytest.raises(ValueError, match="holds no block"):
        model_card.run_usage(tmp_path)


# ---- end to end ----


def adapter_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def finished_run(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    folder.rmdir()
    assert finetune_reply.main([*OPTIONS, "--model", str(tiny_folder), "--output-dir", str(folder)]) == 0
    return folder


@pytest.mark.integration
def test_run_leaves_adapter_merged_model_cards_and_figures(finished_run, tiny_folder):
    record = json.loads((finished_run / "results.json").read_text(encoding="utf-8"))
    assert len(record["loss"]) == len(record["step_s"]) == NUM_STEPS
    assert record["loss"][-1] < record["loss"][0]
    assert record["before"]["opens"] == 0
    assert record["num_streamed"] == 3
    assert min(record["disk_bytes"]) > 0
    assert str(finished_run) not in json.dumps(record)
    assert str(tiny_folder) not in json.dumps(record)
    for name in ("adapter", "merged"):
        card = (finished_run / name / "README.md").read_text(encoding="utf-8")
        assert "| loss at the end |" in card
        assert "| 5 h 40 min |" in card
        assert "![loss](loss.png)" in card
        assert str(tiny_folder.parent) not in card
        assert (finished_run / name / "loss.png").is_file()
    stock = AutoModelForCausalLM.from_pretrained(finished_run / "merged")
    base = AutoModelForCausalLM.from_pretrained(tiny_folder)
    changed = {name for name, value in stock.state_dict().items() if not torch.equal(value, base.state_dict()[name])}
    assert len(changed) == 3 * 7


class AtStep(TrainerCallback):
    """Does something once, when a step begins."""

    def __init__(self, num_steps_done: int, act) -> None:
        self.num_steps_done, self.act = num_steps_done, act

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.num_steps_done and self.act is not None:
            self.act(model)
            self.act = None


def run_that_dies(monkeypatch, options: list[str], death: TrainerCallback) -> int:
    make = training.stock_trainer

    def make_with(*args, **kwargs):
        trainer, collator = make(*args, **kwargs)
        trainer.add_callback(death)
        return trainer, collator

    with monkeypatch.context() as patch:
        patch.setattr(finetune_reply, "stock_trainer", make_with)
        return finetune_reply.main(options)


def run_out_of_memory_in_the_backward(model: torch.nn.Module) -> None:
    def fail(*_: object) -> None:
        handle.remove()
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    layer = next(module for name, module in model.named_modules() if name.endswith("layers.1.mlp"))
    handle = layer.register_full_backward_pre_hook(fail)


@pytest.mark.integration
def test_runs_that_die_of_memory_and_of_an_interrupt_go_on_bit_for_bit(
    finished_run, tiny_folder, tmp_path, monkeypatch, capsys
):
    folder = tmp_path / "run"
    options = [*OPTIONS, "--model", str(tiny_folder), "--output-dir", str(folder)]
    assert run_that_dies(monkeypatch, options, AtStep(3, run_out_of_memory_in_the_backward)) == resumable.EXIT_FAILED
    shown = capsys.readouterr().out
    assert f"Training stopped after step 3 of {NUM_STEPS}: OutOfMemoryError: CUDA out of memory" in shown
    assert f"--output-dir {folder} --resume" in shown
    assert (folder / "checkpoints" / "checkpoint-3").is_dir()

    def interrupt(_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    code = run_that_dies(monkeypatch, [*options, "--resume"], AtStep(7, interrupt))
    assert code == resumable.EXIT_INTERRUPTED
    assert signal.getsignal(signal.SIGTERM) is before
    assert "after step 8 of 12: interrupted (SIGTERM)" in capsys.readouterr().out

    monkeypatch.setattr(finetune_reply, "finish", lambda *args: figures.update(args[3]))
    figures: dict[str, object] = {}
    assert finetune_reply.main([*options, "--resume"]) == 0
    own, whole = adapter_of(folder), adapter_of(finished_run)
    assert own.keys() == whole.keys()
    assert [name for name in own if not torch.equal(own[name], whole[name])] == []
    assert figures["loss"] == json.loads((finished_run / "results.json").read_text(encoding="utf-8"))["loss"]
    assert figures["num_sessions"] == 3


@pytest.mark.integration
def test_a_run_that_dies_in_its_first_step_has_nothing_to_keep(tiny_folder, tmp_path, monkeypatch, capsys):
    options = [*OPTIONS, "--model", str(tiny_folder), "--output-dir", str(tmp_path / "run")]
    assert run_that_dies(monkeypatch, options, AtStep(0, run_out_of_memory_in_the_backward)) == resumable.EXIT_FAILED
    assert "No step was finished" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no checkpoint"):
        finetune_reply.main([*options, "--resume"])


@pytest.mark.integration
def test_an_error_while_the_optimizer_is_at_work_keeps_only_the_scheduled_checkpoint(
    tiny_folder, tmp_path, monkeypatch
):
    class Torn(TrainerCallback):
        def on_optimizer_step(self, args, state, control, **kwargs):
            if state.global_step == 7:
                raise RuntimeError("torn")

    options = [*OPTIONS, "--model", str(tiny_folder), "--output-dir", str(tmp_path / "run")]
    with pytest.raises(RuntimeError, match="torn"):
        run_that_dies(monkeypatch, options, Torn())
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["checkpoint-5"]


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_smollm2_learns_the_format_in_a_hundred_steps(tmp_path):
    if default_model.resolve_model().is_random:
        pytest.skip("SmolLM2 cannot be reached")
    assert finetune_reply.main(["--small", "--output-dir", str(tmp_path / "run")]) == 0
    record = json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))
    assert len(record["loss"]) <= 300
    assert record["before"]["well_formed"] == 0
    assert record["after"]["well_formed"] >= 0.9
    assert record["usage_well_formed"]
