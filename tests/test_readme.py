"""What the README says can be done: its example runs, its commands exist, its tree is the tree."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from test_import_graph import DOORWAY, ORDER

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")

# What the example needs to run without a hub and without a GPU. Each stands in it exactly once.
ON_A_TINY_MODEL = {
    '"NousResearch/Llama-2-7b-hf"': '"model"',
    'vram_budget="6GiB"': 'vram_budget="min"',
    "dtype=torch.float16": "dtype=torch.float32",
    "fp16=True": "use_cpu=True",
    "max_steps=50": "max_steps=3",
}


def code_blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def save_tiny_model(folder: Path, tiny_llama: Callable[..., object]) -> None:
    """A tiny Llama with a tokenizer of single characters."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = "abcdefghijklmnopqrstuvwxyz0123456789QA:?. "
    vocabulary = {character: index for index, character in enumerate(["<unk>", "<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)
    tiny_llama().save_pretrained(folder)


@pytest.mark.integration
def test_example_runs_as_it_stands_and_leaves_an_adapter(tmp_path: Path, tiny_llama: Callable[..., object]) -> None:
    save_tiny_model(tmp_path / "model", tiny_llama)
    (example,) = code_blocks("python")
    for there, here in ON_A_TINY_MODEL.items():
        assert example.count(there) == 1, there
        example = example.replace(there, here)

    done = subprocess.run(
        [sys.executable, "-c", example], cwd=tmp_path, capture_output=True, text=True, timeout=150, check=False
    )

    assert done.returncode == 0, done.stderr
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_every_make_target_that_is_named_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    phony = set(re.search(r"^\.PHONY: (.*)$", makefile, flags=re.MULTILINE)[1].split())
    commands = [*code_blocks("bash"), *re.findall(r"`([^`\n]+)`", README)]
    named = set(re.findall(r"\bmake ([a-z-]+)\b", "\n".join(commands)))

    assert {"duel", "test"} <= named
    assert named - phony == set()


def files_in_tree() -> list[str]:
    """Path of every entry of the tree, in its order; every entry must have its comment."""
    (tree,) = code_blocks("text")
    folder, named = "", []
    for line in tree.splitlines():
        entry, comment = re.fullmatch(r"( *\S+)\s{2,}(.+)", line).groups()
        assert comment
        nested = entry.startswith(" ")
        folder = folder if nested else entry
        named.append(folder * nested + entry.strip())
    return named


def test_tree_names_no_entry_that_is_not_there_and_none_twice() -> None:
    named = files_in_tree()

    assert len(named) == len(set(named))
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_tree_lists_the_package_in_the_order_of_its_imports() -> None:
    entries = [f"{room.split('/')[0]}/" if "/" in room else f"{room}.py" for room in (DOORWAY, *ORDER)]

    named = [name.removeprefix("hf_lema/") for name in files_in_tree() if name.startswith("hf_lema/")]
    assert named[1:] == list(dict.fromkeys(entries))


def test_folders_of_the_package_import_one_way() -> None:
    folders = [room.split("/")[0] for room in ORDER if "/" in room]

    assert len([folder for folder, _ in itertools.groupby(folders)]) == len(set(folders))
