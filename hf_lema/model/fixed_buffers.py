"""Buffers of a model that nothing ever writes to, such as the frequencies of rotary embeddings.

Responsibility: telling them from others. Knows nothing of layers, stores or process groups.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

_FIXED_ROPE_TYPES = frozenset({"default", "linear", "yarn", "llama3", "proportional"})
"""Those of ``ROPE_INIT_FUNCTIONS`` whose frequencies do not follow the length of the batch, as those of "dynamic" and
"longrope" do (``dynamic_rope_update`` in transformers' ``modeling_rope_utils``)."""


def fixed_buffers(model: nn.Module) -> Iterator[str]:
    """Names of the buffers that transformers makes from the configuration and leaves as they are.

    Only those count that no checkpoint holds (what a training changes has to be saved), of classes in transformers
    itself, and none of a rotary embedding whose type is not known to be fixed. Where all processes have built the same
    model, they hold the same numbers for as long as they live.

    Args:
        model: Any model.
    """
    for path, module in model.named_modules():
        names = module._non_persistent_buffers_set
        if not names or not type(module).__module__.startswith("transformers.models."):
            continue
        rope = module.__dict__.get("rope_type", "default")
        types = rope.values() if isinstance(rope, dict) else [rope]  # by the type of the layer
        if _FIXED_ROPE_TYPES.issuperset(types):
            yield from (f"{path}.{name}" if path else name for name in sorted(names))
