"""From a checkpoint's tensors to the model's: names, dtypes, and the tensors that transformers joins or splits.

Responsibility: saying which stored tensors become which of the model's, by the rules of the installed transformers, and
running its conversions on a few tensors at a time. Knows nothing of files, layouts or devices.

The rules are transformers' own. From 5.0 on: `core_model_loading.rename_source_key` and the transforms of
`conversion_mapping.get_model_conversion_mapping`, applied as `convert_and_load_state_dict_in_model` applies them, but
without a model that is filled on the way. In 4.x there are renames only: `PreTrainedModel._get_key_renaming_mapping`.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import transformers
from packaging.version import Version
from transformers import PreTrainedModel

from hf_lema.files.checkpoint import TensorLocation

if TYPE_CHECKING:
    from transformers.core_model_loading import WeightConverter

ReadTensor = Callable[[str, torch.dtype], torch.Tensor]
"""Name in the checkpoint and wanted dtype -> the tensor, cast."""


def transformers_at_least(version: str) -> bool:
    """Whether the installed transformers is of this version or a later one."""
    return Version(transformers.__version__) >= Version(version)


@dataclass(frozen=True, kw_only=True)
class ConversionGroup:
    """Stored tensors that become one tensor of the model, or several, without help of any other.

    Attributes:
        sources: Names in the checkpoint, in the order in which transformers takes them.
        target: Name in the model; the first of them where there are several.
        cast_to: What every source is cast to before anything else.
        converter: The conversion; None where one tensor only gets another name.
        patterns: For each source, which of the converter's patterns it matched.
    """

    sources: tuple[str, ...]
    target: str
    cast_to: torch.dtype
    converter: WeightConverter | None = None
    patterns: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ConversionPlan:
    """How every tensor of a checkpoint is used.

    Attributes:
        groups: They share no tensor.
        unexpected: Names in the checkpoint that the model has no use for and that transformers would warn of.
    """

    groups: tuple[ConversionGroup, ...]
    unexpected: tuple[str, ...]

    @property
    def has_converters(self) -> bool:
        """Whether transformers does more than to rename."""
        return any(group.converter is not None for group in self.groups)


def plan_conversion(
    model: PreTrainedModel,
    stored: Mapping[str, TensorLocation],
    dtype: torch.dtype,
    key_mapping: Mapping[str, str] | None = None,
) -> ConversionPlan:
    """Decide which stored tensors become which of the model's.

    Args:
        model: Any device, meta included: names, shapes and dtypes matter. Under transformers 5 it gets the list of
            used conversions, which `save_pretrained` reverts.
        stored: The checkpoint's tensors.
        dtype: The dtype the model is loaded in; modules that a model class keeps in float32 stay so.
        key_mapping: Patterns of stored names -> replacements, as for ``from_pretrained``.
    """
    if transformers_at_least("5"):
        groups, unused = _plan_v5(model, stored, dtype, key_mapping)
    else:  # may go with support for transformers 4
        groups, unused = _plan_v4(model, stored, dtype, key_mapping)
    return ConversionPlan(groups=groups, unexpected=_worth_a_warning(model, unused))


def convert(group: ConversionGroup, model: PreTrainedModel, read: ReadTensor) -> dict[str, torch.Tensor]:
    """Make the model's tensors of one group.

    Args:
        group: What to make.
        model: As given to `plan_conversion`, with the parameters' shapes as they were then.
        read: Gives the sources. With meta tensors the result has true names, shapes and dtypes, and costs nothing.

    Returns:
        Full name in the model -> tensor.
    """
    if group.converter is None:
        return {group.target: read(group.sources[0], group.cast_to)}
    converter = copy.deepcopy(group.converter)
    for source, pattern in zip(group.sources, group.patterns, strict=True):
        deferred: Any = functools.partial(read, source, group.cast_to)
        converter.add_tensor(group.target, source, pattern, deferred)
    made: Any = converter.convert(group.target, model=model, config=model.config)
    return {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in made.items()}


def revert(model: PreTrainedModel, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Undo the conversions of a model's tensors, as ``save_pretrained`` does.

    Args:
        model: Of the class that the tensors are of, with the list of used conversions that `plan_conversion` left.
        tensors: Name in the model -> tensor; meta tensors give true names, shapes and dtypes, and cost nothing.

    Returns:
        Name in the file -> tensor, which may be a view of a given one.
    """
    if transformers_at_least("5"):
        from transformers.core_model_loading import revert_weight_conversion

        return dict(revert_weight_conversion(model, dict(tensors)))
    fixed: Any = model._fix_state_dict_keys_on_save  # may go with support for transformers 4
    return dict(fixed(dict(tensors)))


def _plan_v5(
    model: PreTrainedModel,
    stored: Mapping[str, TensorLocation],
    dtype: torch.dtype,
    key_mapping: Mapping[str, str] | None,
) -> tuple[tuple[ConversionGroup, ...], dict[str, str]]:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    mapping = get_model_conversion_mapping(model, None if key_mapping is None else dict(key_mapping))
    renamings = [transform for transform in mapping if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in mapping if isinstance(transform, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    expected = model.state_dict()
    prefix = model.base_model_prefix

    members: dict[str, list[tuple[str, str | None]]] = {}
    unused: dict[str, str] = {}
    for name in sorted(stored, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, expected)
        if target not in expected and name in expected:
            target, pattern = rename_source_key(name, [], [], prefix, expected)
        # Of two stored tensors with the same name in the model, the first counts, unless a converter collects them.
        is_second = target in members and (pattern is None or members[target][0][1] is None)
        if target not in expected or is_second:
            unused[name] = target
        else:
            members.setdefault(target, []).append((name, pattern))
    # What stock loading leaves on the model, for `save_pretrained` to revert.
    used = mapping
    if transformers_at_least("5.6"):  # below, stock keeps them all; may go with support for it
        used = [transform for transform in mapping if transform.was_used()]
    model._weight_conversions = used  # type: ignore[assignment]

    kept = {
        re.compile(part.replace("*", ".*")): kept_dtype for part, kept_dtype in model._get_dtype_plan(dtype).items()
    }
    groups = []
    for target, found in members.items():
        patterns = tuple(pattern for _, pattern in found if pattern is not None)
        kept_dtypes = [kept_dtype for part, kept_dtype in kept.items() if part.search(target)]
        groups.append(
            ConversionGroup(
                sources=tuple(name for name, _ in found),
                target=target,
                cast_to=kept_dtypes[0] if kept_dtypes else expected[target].dtype,
                converter=by_pattern[patterns[0]] if patterns else None,
                patterns=patterns,
            )
        )
    return tuple(groups), unused


def _plan_v4(
    model: PreTrainedModel,
    stored: Mapping[str, TensorLocation],
    dtype: torch.dtype,
    key_mapping: Mapping[str, str] | None,
) -> tuple[tuple[ConversionGroup, ...], dict[str, str]]:
    prefix = model.base_model_prefix
    stored_with_prefix = bool(prefix) and any(name.startswith(prefix) for name in stored)
    expects_prefix = bool(prefix) and prefix in dict(model.named_children())
    rename: Any = model._get_key_renaming_mapping
    renames: Any = model._checkpoint_conversion_mapping
    targets: dict[str, str] = rename(
        list(stored),
        key_mapping if key_mapping is not None else renames or None,
        loading_base_model_from_task_state_dict=stored_with_prefix and not expects_prefix,
        loading_task_model_from_base_state_dict=expects_prefix and not stored_with_prefix,
    )
    kept = list(model._keep_in_fp32_modules_strict or []) if dtype in (torch.float16, torch.bfloat16) else []
    if dtype == torch.float16:
        kept += model._keep_in_fp32_modules or []
    kept_pattern = re.compile("|".join(rf"((^|\.){module}($|\.))" for module in kept)) if kept else None

    expected = model.state_dict()
    unused = {name: target for name in stored if (target := targets.get(name, name)) not in expected}
    groups = []
    for name, target in targets.items():
        if target not in expected:
            continue
        cast_to = stored[name].dtype
        if cast_to.is_floating_point and cast_to != torch.float8_e4m3fn:
            is_kept = kept_pattern is not None and kept_pattern.search(target) is not None
            cast_to = torch.float32 if is_kept else expected[target].dtype
        groups.append(ConversionGroup(sources=(name,), target=target, cast_to=cast_to))
    return tuple(groups), unused


def _worth_a_warning(model: PreTrainedModel, unused: Mapping[str, str]) -> tuple[str, ...]:
    """Leave out what stock loading leaves out: the class's own exceptions and buffers that moved or are computed.

    Args:
        model: The model.
        unused: Name in the checkpoint -> the name that the model would know it by.
    """
    buffers = {name for name, _ in model.named_buffers()}
    silent = [*(model._keys_to_ignore_on_load_unexpected or [])]
    silent += [
        rf"(^|\.){re.escape(name)}$"
        for name in ("rotary_emb.inv_freq", "position_ids")
        if any(buffer.endswith(name) for buffer in buffers)
    ]
    return tuple(
        name
        for name, target in unused.items()
        if target not in buffers and not any(re.search(pattern, target) for pattern in silent)
    )
