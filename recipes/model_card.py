"""The card that lies beside an adapter and a merged model: what it is, what was measured, how it is used.

The usage on a card is a program: it is cut out of the written card and run against the folder, by stock transformers in
a process of its own. Knows Markdown and the figures that it is given. Does not know how they were measured.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from reply_check import SCORE_LABELS, ReplyScore
from reply_data import ReplyExample

from hf_lema.reporting.report import CURVE_RULE
from hf_lema.units import format_bytes

CARD_NAME = "README.md"
USAGE_LIMIT_S = 3600
MAX_ERROR_LINES = 15

# What the first experiment reports of itself (Tesla P100 16 GB): the anchor of the table.
FIRST_EXPERIMENT = {
    "base model": "Llama-2-7B",
    "hardware": "Tesla P100 16 GB",
    "precision": "fp16",
    "adapter": "LoRA r=16 alpha=32",
    "batch": "8 x 512 tokens",
    "steps": "625",
    "VRAM peak (tensors)": "6.36 GB",
    "RAM peak": "2.40 GB, elsewhere 2.52 GB",
    "step": "32.23 s",
    "training": "5 h 40 min",
    "loss at step 10": "2.17",
    "loss at step 100": "0.068",
    "loss at the end": "0.041",
}

USAGE = '''\
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder, or where you have put it
device = "cuda" if torch.cuda.is_available() else "cpu"
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").to(device)

prompt = """<|system|>
You are a precise assistant trained using LEMA.

<|user|>
{question}

<|assistant|>
"""
inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(device)
output = model.generate(**inputs, max_new_tokens=100, do_sample=False)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
'''


@dataclass(frozen=True, kw_only=True)
class CardFigures:
    """Everything that a card states.

    Attributes:
        base_label: What the base model is, for a person.
        base_id: Its hub id; None where it is a folder.
        table: This run's figures under the names of `FIRST_EXPERIMENT`, and more; values are text.
        before: Scores of the replies before the training.
        after: And after it.
        curve: The reading of the loss, in one line.
        question: The held-out question of the usage and of the samples.
        reply_before: What the base answered to it.
        reply_after: What the trained model answers.
        limits: Sentences on what the model cannot do.
        versions: Of the packages, by name.
    """

    base_label: str
    base_id: str | None
    table: Mapping[str, str]
    before: ReplyScore
    after: ReplyScore
    curve: str
    question: str
    reply_before: str
    reply_after: str
    limits: Sequence[str]
    versions: Mapping[str, str]


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]], num_words: int = 1) -> str:
    """A table in Markdown; the first ``num_words`` columns are words, the others are figures."""
    lines = [head, [":--" if idx < num_words else "--:" for idx in range(len(head))], *rows]
    cells = [[" ".join(str(cell).split()).replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def aligned_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same for a terminal."""
    widths = [max(len(line[idx]) for line in [head, *rows]) for idx in range(len(head))]
    lines = [
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]).rstrip()
        for line in [head, *rows]
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def score_rows(before: ReplyScore, after: ReplyScore) -> list[tuple[str, str, str]]:
    """One line a demand: its name, the share before and the share after."""
    shares = [field.name for field in fields(ReplyScore) if field.name in SCORE_LABELS]
    return [
        (SCORE_LABELS[name], f"{100 * getattr(before, name):.0f} %", f"{100 * getattr(after, name):.0f} %")
        for name in shares
    ]


def figure_rows(table: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """This run beside the first experiment; a line for each name that either of them knows."""
    names = list(dict.fromkeys([*FIRST_EXPERIMENT, *table]))
    return [(name, table.get(name, "-"), FIRST_EXPERIMENT.get(name, "-")) for name in names]


def write_card(folder: Path, figures: CardFigures, pictures: Sequence[Path], *, is_merged: bool) -> Path:
    """Writes the card and copies its pictures beside it; returns the card's path."""
    for picture in pictures:
        shutil.copyfile(picture, folder / picture.name)
    path = folder / CARD_NAME
    path.write_text("\n\n".join(_sections(figures, pictures, is_merged)) + "\n", encoding="utf-8")
    return path


def _sections(figures: CardFigures, pictures: Sequence[Path], is_merged: bool) -> list[str]:
    head = ["library_name: transformers" if is_merged else "library_name: peft", "pipeline_tag: text-generation"]
    if figures.base_id is not None:
        head.insert(0, f"base_model: {figures.base_id}")
    what = "merged into its base model, an ordinary checkpoint" if is_merged else "an ordinary PEFT adapter"
    usage = USAGE.format(question=figures.question)
    where = (
        "Stock transformers, nothing else:"
        if is_merged
        else "Load the base model, then `PeftModel.from_pretrained(model, folder)`. The merged model is used like this:"
    )
    return [
        "---\n" + "\n".join(head) + "\n---",
        f"# {figures.base_label}, taught the [LEMA_REPLY] format",
        f"A LoRA adapter that was trained with hf_lema, the layers of the base streamed; here it is {what}. The model "
        "answers a question in a fixed form: an answer, an explanation and a confidence between two tags.",
        "## Usage",
        where,
        f"```python\n{usage}```",
        "## What was learnt",
        f"Replies to {figures.after.num_replies} held-out questions, no fact of which was trained on; greedy.",
        markdown_table(["share of the replies", "before", "after"], score_rows(figures.before, figures.after)),
        f"One of them: *{figures.question}*",
        f"Before:\n\n{_quoted(figures.reply_before)}",
        f"After:\n\n{_quoted(figures.reply_after)}",
        "## What it took",
        markdown_table(["", "this run", "first experiment"], figure_rows(figures.table)),
        "The right column is what the experiment that this recipe repeats reports of itself. Of this run, a MiB "
        "is 2**20 bytes, a GiB 2**30; RAM is private RAM above what the imports took.",
        "## The curve",
        f"{figures.curve[0].upper()}{figures.curve[1:]}.",
        *(f"![{picture.stem.replace('_', ' ')}]({picture.name})" for picture in pictures),
        CURVE_RULE,
        "## Limits",
        "\n".join(f"- {limit}" for limit in figures.limits),
        "## Made with",
        ", ".join(f"{name} {version}" for name, version in figures.versions.items()) + ".",
    ]


def _quoted(text: str) -> str:
    """A block that nothing in the text can end: each line is indented."""
    return "\n".join(f"    {line}" for line in text.splitlines())


def table_of_run(
    settings: Mapping[str, Any], environment: Mapping[str, Any], figures: Mapping[str, Any], base_label: str
) -> dict[str, str]:
    """The run's figures as text, under the names of `FIRST_EXPERIMENT`."""
    losses = figures["loss"]
    hardware = environment["gpu_name"] or f"{environment['num_cpus_usable']} cores of {environment['cpu_model']}"
    table = {
        "base model": base_label,
        "hardware": hardware,
        "precision": settings["precision"],
        "adapter": f"LoRA r={settings['lora_rank']} alpha={2 * settings['lora_rank']}",
        "batch": f"{settings['batch_size']} x {settings['seq_len']} tokens"
        + (" at most" if settings["trim_padding"] else ""),
        "steps": str(len(losses)),
        "VRAM peak (tensors)": _size(figures["vram_allocated_peak_bytes"]),
        "VRAM peak (reserved)": _size(figures["vram_reserved_peak_bytes"]),
        "RAM peak": _size(figures["ram_private_above_imports_peak_bytes"]),
        "step": f"{figures['step_median_s']:.2f} s (median)",
        "training": duration_text(figures["train_s"]),
        "loss at the end": f"{losses[-1]:.3f}",
        "merging": duration_text(figures["merge_s"]),
    }
    table |= {f"loss at step {step}": f"{losses[step - 1]:.3f}" for step in (10, 100) if len(losses) >= step}
    return {name: text for name, text in table.items() if text != "-"}


def question_of(example: ReplyExample) -> str:
    """The question in a prompt."""
    return example.prompt.split("<|user|>\n")[1].split("\n")[0]


def limits_of(after: ReplyScore, *, is_random: bool) -> list[str]:
    """What a user of the model must know."""
    limits = [
        "It learnt a form, not facts: of the held-out questions it answered "
        f"{100 * after.right_answer:.0f} % with the answer of the fact, letter by letter. Do not trust an answer.",
        "The confidence is part of the form; how often it is right was not measured.",
        "English, one question and one reply; longer talks were not trained.",
        "The license and the limits of the base model hold.",
    ]
    if is_random:
        limits.insert(0, "The base has random weights: this is a test of the recipe and no use as a model.")
    return limits


def duration_text(duration_s: float) -> str:
    """Such as ``5 h 40 min``, ``12 min 3 s`` or ``8 s``."""
    minutes, seconds = divmod(round(duration_s), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def _size(num_bytes: int | None) -> str:
    return "-" if num_bytes is None else format_bytes(num_bytes)


def usage_of(card: Path) -> str:
    """The program in the card's first Python block.

    Raises:
        ValueError: The card has none.
    """
    match = re.search(r"^```python\n(.*?)^```$", card.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    if match is None:
        raise ValueError(f"{card} holds no block that begins with ```python")
    return match[1]


def run_usage(folder: Path) -> str:
    """Runs the usage of the folder's card there, in a process of its own; returns what it printed.

    Raises:
        RuntimeError: The program failed; its last lines are in the message.
    """
    done = subprocess.run(
        [sys.executable, "-c", usage_of(folder / CARD_NAME)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=USAGE_LIMIT_S,
        check=False,
    )
    if done.returncode != 0:
        lines = "\n".join(done.stderr.strip().splitlines()[-MAX_ERROR_LINES:])
        raise RuntimeError(f"the usage on {folder / CARD_NAME} failed with exit code {done.returncode}:\n{lines}")
    return done.stdout.rstrip("\n")
