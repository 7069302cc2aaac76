"""The second experiment: labels told by likelihood, splits that share no text, rows in their own processes."""

from __future__ import annotations

import csv
import json
import random
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "recipes"))

import contender_process  # noqa: E402
import default_model  # noqa: E402
import finetune_sentiment  # noqa: E402
import sentiment_data  # noqa: E402
import sentiment_row  # noqa: E402
import techniques  # noqa: E402
from label_likelihood import score_labels, tell_labels  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

REVIEWS = ROOT.parent / "shared" / "data" / "reviews_amazon.jsonl"
WORDS = ("negative", "positive")


def write_reviews(path: Path, num_rows: int = 160) -> Path:
    """Made-up reviews whose label hangs on one word."""
    rng = random.Random(0)
    words = (("bad", "awful", "poor"), ("good", "great", "fine"))
    with path.open("w", encoding="utf-8") as file:
        for number in range(num_rows):
            label = rng.randrange(2)
            file.write(json.dumps({"text": f"item {number} is {rng.choice(words[label])}", "label": label}) + "\n")
    return path


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    folder.mkdir()
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    default_model.save_random_llama(folder, vocab_size=1024, num_key_value_heads=1, **shape)
    return folder


@pytest.fixture(scope="module")
def tokenizer(tiny_folder: Path):
    return AutoTokenizer.from_pretrained(tiny_folder)


@pytest.fixture(scope="module")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_reviews(tmp_path_factory.mktemp("data") / "made.jsonl")


# ---- data ----


def test_split_is_four_to_one_the_same_for_a_seed_and_shares_no_text(reviews):
    split = sentiment_data.load_split(str(reviews), seed=0)
    assert (len(split.train), len(split.held_out), split.words, split.label) == (128, 32, WORDS, "made.jsonl")
    assert {text.text for text in split.train} & {text.text for text in split.held_out} == set()
    assert sentiment_data.load_split(str(reviews), seed=0) == split
    assert sentiment_data.load_split(str(reviews), seed=1).train != split.train


def test_a_repeated_text_is_on_one_side_only_and_counted(tmp_path):
    path = tmp_path / "rows.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows([[f"text  {number % 10}", ("neg", "pos")[number % 2]] for number in range(40)])
    split = sentiment_data.load_split(str(path), seed=0)
    assert (len(split.train), len(split.held_out), split.num_repeated, split.words) == (8, 2, 30, WORDS)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"sentence": "a", "label": 0}], "columns label, sentence; expected text and label"),
        ([{"text": f"t{number}", "label": 1} for number in range(9)], "9 texts with the labels positive"),
        ([{"text": "a", "label": 0}, {"text": "b", "label": 1}], "2 texts"),
    ],
)
def test_a_set_that_cannot_be_split_is_refused_with_what_it_has(tmp_path, rows, message):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        sentiment_data.load_split(str(path), seed=0)


def test_a_long_text_loses_its_end_and_never_its_label(tokenizer):
    long = sentiment_data.LabelledText(text=" ".join(f"word{number}" for number in range(200)), word="positive")
    tokens = sentiment_data.tokenize_labelled(long, "positive", tokenizer, 40, pad=False)
    assert 36 <= tokens.num_tokens <= 40
    text = tokenizer.decode(tokens.input_ids)
    assert text.startswith("Review: word0 word1")
    assert text.endswith("\nSentiment: positive" + tokenizer.eos_token)
    trained = [token for token, label in zip(tokens.input_ids, tokens.labels, strict=True) if label != -100]
    assert tokenizer.decode(trained) == " positive" + tokenizer.eos_token
    with pytest.raises(ValueError, match="without its text and the label 'positive' have more than 8 tokens"):
        sentiment_data.tokenize_labelled(long, "positive", tokenizer, 8)


# ---- scores ----


def test_scores_of_two_labels_are_of_the_positive_one():
    true = ["positive"] * 4 + ["negative"] * 6
    told = ["positive"] * 3 + ["negative"] + ["positive"] * 2 + ["negative"] * 4
    score = score_labels(told, true, WORDS)
    assert (score.accuracy, score.precision, score.recall, score.f1) == (0.7, 0.6, 0.75, pytest.approx(2 / 3))


def test_scores_of_three_labels_are_means_and_nothing_told_is_nothing_right():
    score = score_labels(["a", "a", "b"], ["a", "b", "c"], ("a", "b", "c"))
    assert (score.accuracy, score.precision, score.recall) == (
        pytest.approx(1 / 3),
        pytest.approx(1 / 6),
        pytest.approx(1 / 3),
    )
    assert score.f1 == pytest.approx(2 / 9)
    assert score_labels(["negative"], ["positive"], WORDS).f1 == 0
    with pytest.raises(ValueError, match="1 told labels for 2 texts"):
        score_labels(["a"], ["a", "b"], WORDS)


def sum_by_hand(model, tokenizer, text: str, word: str) -> float:
    prompt = tokenizer(f"Review: {text}\nSentiment:")["input_ids"]
    label = tokenizer(f"Review: {text}\nSentiment: {word}")["input_ids"][len(prompt) :]
    assert len(label) > 1, "a word of several tokens, whose sum is to be taken"
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + label])).logits[0].log_softmax(-1)
    return sum(logits[len(prompt) - 1 + place, token].item() for place, token in enumerate(label))


@pytest.mark.integration
def test_told_label_is_the_one_whose_tokens_have_the_largest_sum(tiny_folder, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(tiny_folder).train()
    words = ("negative", "positive", "abominable")
    texts = [sentiment_data.LabelledText(text=f"it {'very ' * number}works", word="") for number in range(6)]
    told = tell_labels(model, tokenizer, texts, words, seq_len=64, batch_size=4)
    model.eval()
    sums = [[sum_by_hand(model, tokenizer, text.text, word) for word in words] for text in texts]
    assert told == [words[row.index(max(row))] for row in sums]
    model.train()
    assert told == tell_labels(model, tokenizer, texts, words, seq_len=64, batch_size=1)
    assert model.training


# ---- options, techniques and refusals ----


def test_defaults_are_those_of_the_second_experiment():
    args = finetune_sentiment.parse_arguments([])
    assert (args.batch_size, args.accumulation, args.seq_len, args.max_steps) == (4, 16, 512, 50)
    assert (args.lora_rank, args.weight_decay, args.max_grad_norm) == (16, 0.01, 0.3)
    assert (args.dataset, args.techniques) == ("stanfordnlp/imdb", ["qlora", "lema"])
    assert finetune_sentiment.parse_arguments(["--ablate"]).techniques == list(techniques.ABLATION)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--small"], "--small needs --dataset FILE"),
        (["--ablate", "--techniques", "peft"], "leave out --techniques"),
        (["--techniques", "magic"], "magic"),
    ],
)
def test_options_that_cannot_be_used_are_refused_with_the_reason(options, message, capsys):
    with pytest.raises(SystemExit):
        finetune_sentiment.parse_arguments(options)
    assert message in capsys.readouterr().err


def test_each_technique_is_one_change_and_what_cannot_run_says_why(monkeypatch):
    plain = vars(techniques.ABLATION["peft"])
    for name, technique in techniques.ABLATION.items():
        changed = {field for field, value in vars(technique).items() if plain[field] != value} - {"summary"}
        assert len(changed) == {"peft": 0, "qlora-loftq": 2}.get(name, 1), name
    reasons = {name: techniques.reason_not_to_run(each, "cpu") for name, each in techniques.ABLATION.items()}
    assert "GPU only" in reasons["flash"]
    assert "GPU only" in reasons["qlora-loftq"]
    assert reasons["peft"] is reasons["lema"] is None
    monkeypatch.setattr(techniques.importlib.util, "find_spec", lambda name: None)
    assert "flash-attn" in techniques.reason_not_to_run(techniques.ABLATION["flash"], "cuda")
    assert "bitsandbytes" in techniques.reason_not_to_run(techniques.ABLATION["qlora"], "cuda")


def test_a_model_of_bin_files_alone_is_skipped_with_the_command_that_converts_it(tmp_path, capsys):
    folder = tmp_path / "old-model"
    folder.mkdir()
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    args = finetune_sentiment.parse_arguments(["--output-dir", str(tmp_path / "out"), "--techniques", "peft", "lema"])
    outcomes = finetune_sentiment.run_rows(args, [default_model.resolve_model(str(folder))])
    assert [outcome.result.status for outcome in outcomes] == ["skipped", "skipped"]
    assert f"hf-lema pack {folder} old-model-safetensors" in outcomes[0].result.reason
    assert "hf-lema pack" in capsys.readouterr().out
    (folder / "model.safetensors").write_bytes(b"")
    assert finetune_sentiment.refuse_pickled(str(folder)) is None


# ---- rows ----


def task(tiny_folder: Path, reviews: Path, folder: Path, **fields: object) -> sentiment_row.RowTask:
    options = ["--small", "--dataset", str(reviews), "--seq-len", "40", "--max-steps", "12", "--num-held-out", "16"]
    args = finetune_sentiment.parse_arguments([*options, "--batch-size", "4", "--learning-rate", "5e-3"])
    folder.mkdir(parents=True, exist_ok=True)
    source = default_model.resolve_model(str(tiny_folder))
    values = finetune_sentiment.task_of(args, source, "lema", "lema", folder) | {"save_every": 5}
    return sentiment_row.RowTask(**(values | fields))


@pytest.mark.integration
def test_a_row_that_was_interrupted_goes_on_bit_for_bit(tiny_folder, reviews, tmp_path, monkeypatch):
    adapters = {}
    train = sentiment_row.train_or_keep

    def keep_adapter(trainer, *, resume):
        stop = train(trainer, resume=resume)
        trainer.model.save_pretrained(tmp_path / "adapter")
        adapters[len(adapters)] = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
        return stop

    monkeypatch.setattr(sentiment_row, "train_or_keep", keep_adapter)
    whole = sentiment_row.run(task(tiny_folder, reviews, tmp_path / "whole", accumulation=2))
    assert whole["result"]["loss"][-1] < whole["result"]["loss"][0]
    assert whole["details"]["num_trained"] == 12 * 4 * 2
    assert whole["details"]["head_room_bytes"] > 0

    compute, num_calls = sentiment_row.LogCallback.on_log, 0

    def interrupt_at_step_seven(self, args, state, control, logs=None, **kwargs):
        nonlocal num_calls
        num_calls += 1
        if num_calls == 7:
            raise KeyboardInterrupt
        compute(self, args, state, control, logs=logs, **kwargs)

    cut = task(tiny_folder, reviews, tmp_path / "cut", accumulation=2)
    with monkeypatch.context() as patch:
        patch.setattr(sentiment_row.LogCallback, "on_log", interrupt_at_step_seven)
        with pytest.raises(KeyboardInterrupt):
            sentiment_row.run(cut)
    assert (tmp_path / "cut" / "checkpoints" / "checkpoint-7").is_dir()
    resumed = sentiment_row.run(task(tiny_folder, reviews, tmp_path / "cut", accumulation=2, resume=True))
    assert [name for name in adapters[0] if not torch.equal(adapters[0][name], adapters[2][name])] == []
    assert resumed["result"]["loss"] == whole["result"]["loss"]
    assert resumed["details"]["after"] == whole["details"]["after"]
    assert resumed["result"]["notes"] == ["Trained in 2 sessions."]


@pytest.mark.integration
def test_duel_from_end_to_end_tells_scores_memory_and_what_could_not_run(
    tiny_folder, reviews, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    folder = tmp_path / "out"
    options = ["--small", "--models", str(tiny_folder), "--dataset", str(reviews), "--techniques", "peft", "flash"]
    options += ["--seq-len", "40", "--max-steps", "12", "--num-held-out", "16", "--output-dir", str(folder)]
    assert finetune_sentiment.main(options) == 0
    record = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    trained, skipped = record["rows"]
    assert (trained["status"], skipped["status"]) == ("ok", "skipped")
    assert trained["details"]["after"]["num_texts"] == 16
    assert len(trained["loss"]) == 12
    assert str(tmp_path) not in json.dumps(record["settings"])
    page = (folder / "report.md").read_text(encoding="utf-8")
    assert "| row | before | accuracy | precision | recall | F1 | head-room GiB |" in page
    assert "flash_attention_2 computes on a GPU only" in page
    assert {"loss.png", "ram.png", "step_time.png"} <= {path.name for path in folder.iterdir()}
    assert "peft: not quantized" in capsys.readouterr().out

    monkeypatch.setattr(finetune_sentiment, "run_contender", None)  # a finished row is read, not run again
    assert finetune_sentiment.main([*options, "--resume"]) == 0
    assert json.loads((folder / "results.json").read_text(encoding="utf-8"))["rows"][0]["loss"] == trained["loss"]


def test_an_interrupted_duel_says_how_to_go_on(reviews, tmp_path, monkeypatch, capsys):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(finetune_sentiment, "run_rows", interrupt)
    options = ["--small", "--models", str(tmp_path), "--dataset", str(reviews), "--output-dir", str(tmp_path / "out")]
    assert finetune_sentiment.main(options) == 130
    assert f"--output-dir {tmp_path / 'out'} --resume" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["ok", "out_of_memory"])
def test_line_of_a_row_has_a_cell_a_column(kind):
    details = {"before": {"accuracy": 0.5}, "num_alloc_retries": 3, "head_room_bytes": 1 << 30}
    details["after"] = {"accuracy": 0.91, "precision": 0.9, "recall": 0.95, "f1": 0.924}
    sizes = {"vram_allocated_peak_bytes": 1 << 30, "vram_reserved_peak_bytes": 3 << 29}
    fields = {"num_steps": 1, **sizes} if kind == "ok" else {"reason": "CUDA out of memory"}
    result = finetune_sentiment.ContenderResult(name="qlora", status=kind, **fields)
    outcome = contender_process.Outcome(result=result, details=details, environment={}, wall_s=0.0)
    expected = {
        "ok": ("qlora", "50.0 %", "91.0 %", "0.900", "0.950", "0.924", "0.50", "3", "1.00"),
        "out_of_memory": ("qlora", "out of memory", *["-"] * 7),
    }
    assert finetune_sentiment.score_row(outcome) == expected[kind]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not REVIEWS.is_file(), reason="the real reviews are not beside this checkout")
def test_smollm2_learns_the_sentiment_of_real_reviews(tmp_path, monkeypatch):
    if default_model.resolve_model().is_random:
        pytest.skip("SmolLM2 cannot be reached")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    options = ["--small", "--dataset", str(REVIEWS), "--techniques", "lema", "--output-dir", str(tmp_path / "out")]
    assert finetune_sentiment.main(options) == 0
    (row,) = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))["rows"]
    assert row["details"]["after"]["accuracy"] > 0.75
    assert row["details"]["after"]["f1"] > row["details"]["before"]["f1"]


@pytest.mark.skipif(not REVIEWS.is_file(), reason="the real reviews are not beside this checkout")
def test_real_reviews_are_read_and_split():
    split = sentiment_data.load_split(str(REVIEWS), seed=0)
    assert (len(split.train) + len(split.held_out), split.words) == (3600, WORDS)
