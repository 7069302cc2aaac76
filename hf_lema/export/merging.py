"""An adapter merged into its base model, from disk to disk, a few tensors in memory at a time.

Responsibility: `merge_and_save`: what is read, merged and written in which order, under a temporary name until it is
whole. Knows nothing of streaming, devices or training.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_utils import _get_tied_weight_keys
from transformers.utils.logging import tqdm

from hf_lema.export.companion_files import tokenizer_files, write_companions
from hf_lema.files.checkpoint_writer import CheckpointLayout, CheckpointWriter, plan_checkpoint
from hf_lema.files.staging import StagedFolder, refuse_occupied
from hf_lema.model.adapter import AdapterFiles, AdapterOnMeta, find_adapter
from hf_lema.model.conversion import ConversionGroup, convert, revert
from hf_lema.model.layer_tensors import PIECE_BYTES, TensorReader, cast_checked
from hf_lema.model.loading import Skeleton, build_skeleton
from hf_lema.model.row_merge import RowMerger
from hf_lema.units import MIB, format_bytes, parse_bytes

logger = logging.getLogger(__name__)

_SMALL_FILES_BYTES = MIB
"""Room for configuration and the like; tokenizer files are counted."""


@dataclass(frozen=True, kw_only=True)
class MergedCheckpoint:
    """A merged model that was written.

    Attributes:
        folder: Where it is.
        nbytes: Bytes of its weights.
        num_files: How many files these are in.
        num_tensors: How many tensors they hold.
        num_merged_tensors: How many of them the adapter could change; the others are the base's own.
        hub_id: Where it was uploaded to, or None.
    """

    folder: Path
    nbytes: int
    num_files: int
    num_tensors: int
    num_merged_tensors: int
    hub_id: str | None


@dataclass(frozen=True, kw_only=True)
class _Unit:
    """Tensors that are made together.

    Attributes:
        paths: Modules that PEFT merges; none where the base's tensors stay as they are.
        names: Names of the tensors in the merged model.
        outputs: Name in the file -> (shape, dtype).
    """

    paths: tuple[str, ...]
    names: tuple[str, ...]
    outputs: Mapping[str, tuple[Sequence[int], torch.dtype]]


def merge_and_save(
    base: str | Path | None,
    adapter: str | Path,
    output: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    max_shard_size: int | str = "5GB",
    push_to_hub: str | None = None,
    trust_remote_code: bool = False,
    adapter_revision: str | None = None,
    **kwargs: Any,
) -> MergedCheckpoint:
    """Merge a PEFT adapter into its base model and save the result as a checkpoint that stock transformers loads.

    The result is that of ``PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(output)`` on
    the CPU in the same dtype, bit for bit, but neither model is ever in memory: PEFT merges one of its modules at a
    time (one decoder layer at a time where transformers converts weights while it loads, as with fused experts), and
    all other tensors pass through in pieces. The folder appears under its name when it is whole. Errors of the adapter
    come before anything is written.

    Args:
        base: Folder or hub id of the model that the adapter was trained on, in full precision; for an adapter trained
            on a quantized model (QLoRA), the model that was quantized. None takes what the adapter's configuration
            names.
        adapter: Folder or hub id of the adapter, as safetensors.
        output: Folder to write. It must not exist, or be empty.
        dtype: Dtype of the merged model; None means the base's own.
        max_shard_size: Bytes, or text such as ``"5GB"``: where a new file begins.
        push_to_hub: Id of a model repository to upload the finished folder to; it is made if it does not exist.
        trust_remote_code: Whether to run model code that comes with the base.
        adapter_revision: Branch, tag or commit of the adapter on the hub.
        **kwargs: Where on the hub, as for ``from_pretrained``: ``revision`` (of the base; where the base is None, by
            default the one that the adapter's configuration names), ``token``, ``cache_dir``,
            ``local_files_only``; and what `build_skeleton` takes beside them.

    Returns:
        What was written.

    Raises:
        ValueError: The adapter was made for another model, cannot be merged, or gives values that are not finite; the
            base is quantized or damaged, or does not fit the dtype. All tensors concerned are named.
        FileNotFoundError: Files are missing.
        FileExistsError: The output exists and is not empty.
        OSError: Too little disk space (``ENOSPC``), or a file or the hub cannot be reached. Nothing is left of the
            output, except where only the upload failed.
    """
    output = Path(output)
    refuse_occupied(output)
    max_shard_bytes = parse_bytes(max_shard_size)
    hub = {key: kwargs[key] for key in ("token", "cache_dir", "local_files_only") if key in kwargs}
    files = find_adapter(adapter, **hub, **({} if adapter_revision is None else {"revision": adapter_revision}))
    if base is None and files.base_name is None:
        raise ValueError(f"{adapter} does not say which model it was trained on: give the base model")
    if base is None and files.base_revision is not None:
        kwargs.setdefault("revision", files.base_revision)
    api = HfApi(token=kwargs.get("token"))
    if push_to_hub is not None:  # before the work: a wrong name or a missing login shows now
        api.create_repo(push_to_hub, exist_ok=True)
    skeleton = build_skeleton(base or str(files.base_name), dtype, "meta", trust_remote_code, **kwargs)
    skeleton.source.close()
    if getattr(skeleton.model, "hf_quantizer", None) is not None:
        raise ValueError(
            f"{base or files.base_name} is already quantized (bitsandbytes): merging would round the adapter to 4 bits "
            "too. Use the checkpoint that it was made from as the base"
        )
    merge = _Merge(skeleton, files, max_shard_bytes)
    merge.write(output)
    if push_to_hub is not None:
        logger.warning("%s is written, uploading it to %s", output, push_to_hub)
        api.upload_folder(repo_id=push_to_hub, folder_path=output, commit_message="Upload merged model")
    return MergedCheckpoint(
        folder=output,
        nbytes=merge.layout.nbytes,
        num_files=len(merge.layout.headers),
        num_tensors=len(merge.layout.tensors),
        num_merged_tensors=sum(len(unit.outputs) for unit in merge.units if unit.paths),
        hub_id=push_to_hub,
    )


class _Merge:
    """One merge: planned at construction, without reading a weight; then written.

    Attributes:
        units: All tensors, in the order in which they are made.
        layout: Where each of them goes.
    """

    def __init__(self, skeleton: Skeleton, files: AdapterFiles, max_shard_bytes: int) -> None:
        self._request = skeleton.request
        self._files = files
        self._reader = TensorReader(skeleton.index)
        model, plan = skeleton.model, skeleton.plan
        self._groups: dict[str, ConversionGroup] = {}
        for group in plan.groups:
            self._groups |= dict.fromkeys(convert(group, model, self._reader.read_meta), group)
        state = model.state_dict(keep_vars=True)
        stored = {id(tensor): name for name, tensor in state.items() if name in self._groups}
        self._stored_names = {name: stored[id(tensor)] for name, tensor in state.items() if id(tensor) in stored}
        self._computed = {name: tensor for name, tensor in state.items() if name not in self._stored_names}
        # Where transformers joins or splits tensors as it loads, a layer is the smallest part that can be saved alone.
        self._has_whole_layers = plan.has_converters
        num_layers = len(skeleton.source.layouts) if plan.has_converters else 0
        self._adapter = AdapterOnMeta(model, files)
        self._model = self._adapter.merged
        _say_what_is_tied(self._model)
        self._saved_names = _saved_names(self._model)
        self.units = self._plan_units([f"{skeleton.layers_path}.{layer_idx}" for layer_idx in range(num_layers)])
        outputs = {name: spec for unit in self.units for name, spec in unit.outputs.items()}
        self.layout: CheckpointLayout = plan_checkpoint(outputs, max_shard_bytes)

    def _plan_units(self, whole: Sequence[str]) -> list[_Unit]:
        state = self._model.state_dict()
        order = {name: position for position, name in enumerate(state)}
        left = dict.fromkeys(self._saved_names.values())
        units = []
        for paths in self._adapter.units(whole):
            prefixes = tuple(f"{path}." for path in paths)
            names = dict.fromkeys(self._saved_names[name] for name in self._saved_names if name.startswith(prefixes))
            units.append(self._unit(paths, tuple(names), state))
            left = {name: None for name in left if name not in names}
        units += [self._unit((), (name,), state) for name in left]
        units.sort(key=lambda unit: min((order[name] for name in unit.names), default=0))
        expected = revert(self._model, {name: state[name] for name in self._saved_names.values()})
        found = {name: spec for unit in units for name, spec in unit.outputs.items()}
        wrong = sorted(
            name
            for name in expected.keys() | found.keys()
            if name not in expected or found.get(name) != (tuple(expected[name].shape), expected[name].dtype)
        )
        if wrong:
            raise ValueError(
                f"transformers saves {len(wrong)} tensors of {type(self._model).__name__} from several layers at once, "
                f"which cannot be done a part at a time: {', '.join(wrong)}. Merge it with peft in memory"
            )
        return units

    def _unit(self, paths: tuple[str, ...], names: tuple[str, ...], state: Mapping[str, torch.Tensor]) -> _Unit:
        made = revert(self._model, {name: state[name] for name in names})
        outputs = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in made.items()}
        return _Unit(paths=paths, names=names, outputs=outputs)

    def write(self, output: Path) -> None:
        """Read, merge and write everything.

        Raises:
            ValueError: As for `merge_and_save`.
            OSError: As for `merge_and_save`.
        """
        tokenizer = tokenizer_files(self._request.name, self._files.folder, self._request.hub)
        needed_bytes = self.layout.nbytes + sum(path.stat().st_size for path in tokenizer) + _SMALL_FILES_BYTES
        logger.info("Writing %s to %s", format_bytes(self.layout.nbytes), output)
        with self._reader.files, StagedFolder(output, needed_bytes, "the merged model") as folder:
            write_companions(self._model, self._request.name, self._request.hub, tokenizer, folder)
            bar = tqdm(total=self.layout.nbytes, desc="Merging", unit="B", unit_scale=True, delay=2)
            with CheckpointWriter(folder, self.layout) as writer, bar, RowMerger() as rows, torch.no_grad():
                self._write_units(writer, rows, bar)

    def _write_units(self, writer: CheckpointWriter, rows: RowMerger, bar: Any) -> None:
        """Merge unit after unit, while the next one is read and the last one is written."""
        written: Future[None] | None = None
        with ThreadPoolExecutor(1, thread_name_prefix="hf_lema-merge-write") as pool:
            for unit, base in self._read_units():
                if base is None:
                    self._pass_through(unit, writer)
                else:
                    made = self._make(unit, base, rows)
                    del base
                    if written is not None:
                        written.result()
                    written = pool.submit(_write_all, writer, made)
                    del made
                    if self._has_whole_layers:  # or the next layer is read while this one is still in memory
                        written.result()
                bar.update(sum(self.layout.tensors[name].nbytes for name in unit.outputs))
            if written is not None:
                written.result()

    def _read_units(self) -> Iterator[tuple[_Unit, dict[str, torch.Tensor] | None]]:
        """Each unit with its base weights, or None where it passes through; one unit is read ahead.

        Not where units are whole layers: three of them would be in memory at a time.
        """
        with ThreadPoolExecutor(1, thread_name_prefix="hf_lema-merge-read") as pool:
            ahead: Future[dict[str, torch.Tensor] | None] = pool.submit(self._read_unit, self.units[0])
            for unit, following in zip(self.units, [*self.units[1:], None], strict=True):
                base = ahead.result()
                if following is not None and not self._has_whole_layers:
                    ahead = pool.submit(self._read_unit, following)
                yield unit, base
                del base
                if following is not None and self._has_whole_layers:
                    ahead = pool.submit(self._read_unit, following)

    def _read_unit(self, unit: _Unit) -> dict[str, torch.Tensor] | None:
        if self._source_that_passes(unit) is not None:
            return None
        return self._read(self._adapter.base_names(unit.paths) if unit.paths else unit.names)

    def _make(self, unit: _Unit, base: dict[str, torch.Tensor], rows: RowMerger) -> dict[str, torch.Tensor]:
        """The unit's tensors as the file will hold them; takes what it was given."""
        merged = self._adapter.merge(unit.paths, base, rows) if unit.paths else dict(base)
        base.clear()
        made = revert(
            self._model, {self._saved_names[name]: merged[name] for name in merged.keys() & self._saved_names.keys()}
        )
        return {name: cast_checked(name, made[name], self.layout.tensors[name].dtype) for name in unit.outputs}

    def _source_that_passes(self, unit: _Unit) -> str | None:
        """The stored tensor that a unit consists of, if nothing but its name and dtype can change."""
        stored_name = self._stored_names.get(unit.names[0])
        group = self._groups[stored_name] if stored_name is not None else None
        if unit.paths or group is None or group.converter is not None or len(unit.outputs) != 1:
            return None
        ((shape, _),) = unit.outputs.values()
        return group.sources[0] if shape == self._reader.index.tensors[group.sources[0]].shape else None

    def _pass_through(self, unit: _Unit, writer: CheckpointWriter) -> None:
        source = self._source_that_passes(unit)
        assert source is not None
        ((name, (_, dtype)),) = unit.outputs.items()
        offset_bytes = 0
        for piece in self._reader.read_pieces(source, dtype, PIECE_BYTES):
            data = piece.view(torch.uint8).numpy().data
            writer.write_part(name, offset_bytes, data)
            offset_bytes += len(data)

    def _read(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """Base weights, by the names that the checkpoint's conversion gives them."""
        base = {name: self._computed[name] for name in names if name in self._computed}
        groups = {self._stored_names[name] for name in names if name in self._stored_names}
        for group in {self._groups[name].target: self._groups[name] for name in groups}.values():
            made = convert(group, self._model, self._reader.read)
            base |= {name: tensor for name, tensor in made.items() if name in self._stored_names}
        return base


def _write_all(writer: CheckpointWriter, tensors: dict[str, torch.Tensor]) -> None:
    for name in list(tensors):
        writer.write(name, tensors.pop(name))


def _saved_names(model: PreTrainedModel) -> dict[str, str]:
    """For each name of the state dict that a file is to hold, the name under which it holds it.

    Of tied names one is kept, by the rule of ``save_pretrained``: all that the model class lists as twins go, but one.
    """
    twins = [re.compile(pattern) for pattern in _get_tied_weight_keys(model)]
    ignored = set(model._keys_to_ignore_on_save or ())
    shared: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name not in ignored:
            shared.setdefault(id(tensor), []).append(name)
    kept: dict[str, str] = {}
    for names in shared.values():
        listed = [name for name in sorted(names) if any(pattern.search(name) for pattern in twins)]
        dropped = listed[: len(names) - 1]
        remaining = [name for name in names if name not in dropped]
        if len(remaining) > 1:
            raise ValueError(
                f"{type(model).__name__} shares one tensor among {', '.join(names)}, which it does not declare: "
                "save_pretrained refuses that, too"
            )
        kept |= dict.fromkeys(names, remaining[0])
    return kept


def _say_what_is_tied(model: PreTrainedModel) -> None:
    """Where a merge leaves embedding and head different, the configuration must not tie them when it is loaded."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    config: Any = model.config
    if config.tie_word_embeddings and isinstance(head, nn.Module) and head.weight is not embedding.weight:
        config.tie_word_embeddings = False
