"""What a checkpoint's folder holds beside the weights: configuration, generation settings, tokenizer, model code.

Responsibility: finding these files and writing or copying them. Knows nothing of weights.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils.hub import cached_file

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "chat_template.json",
)
GENERATION_FILE = "generation_config.json"


def find_files(name: str, file_names: tuple[str, ...], hub: Mapping[str, Any]) -> Iterator[Path]:
    """Those of the files that a folder, or a model on the hub, has.

    Args:
        name: Folder or hub id.
        file_names: What to look for.
        hub: Where on the hub: revision, token, cache and the like.
    """
    folder = Path(name)
    if folder.is_dir():
        folder = folder / str(hub.get("subfolder", ""))
        yield from (folder / file_name for file_name in file_names if (folder / file_name).is_file())
        return
    for file_name in file_names:
        found = cached_file(name, file_name, **hub, _raise_exceptions_for_missing_entries=False)
        if found is not None:
            yield Path(found)


def tokenizer_files(name: str, adapter_folder: Path, hub: Mapping[str, Any]) -> tuple[Path, ...]:
    """The tokenizer's files: the adapter's own where it was saved with one, else the base model's."""
    own = tuple(find_files(str(adapter_folder), TOKENIZER_FILES, {}))
    if any(path.name == "tokenizer_config.json" for path in own):
        return own
    return tuple(find_files(name, TOKENIZER_FILES, hub))


def write_companions(
    model: PreTrainedModel, name: str, hub: Mapping[str, Any], tokenizer: tuple[Path, ...], folder: Path
) -> None:
    """Write everything but the weights into a folder.

    Args:
        model: Its configuration is written. Nothing is read from its weights.
        name: Folder or hub id of the model that it was made from.
        hub: Where on the hub that is.
        tokenizer: Files to copy.
        folder: Where to.
    """
    config: Any = model.config
    config.architectures = [type(model).__name__]
    if model._auto_class is not None:  # code that came with the checkpoint
        custom_object_save(model, folder, config=config)
    config.save_pretrained(folder)
    generation = list(find_files(name, (GENERATION_FILE,), hub))
    # Copied where there is one: some published ones would not pass the checks of `save_pretrained`.
    for path in (*generation, *tokenizer):
        shutil.copyfile(path, folder / path.name)
    if not generation and model.can_generate():
        settings: Any = model.generation_config
        settings.save_pretrained(folder)
