"""PEFT's merge of a LoRA linear, some rows at a time, by several threads.

Responsibility: which modules can be merged so, whether the result is the same on this machine, the threads. The
arithmetic is PEFT's own, on a module of fewer rows. Knows nothing of files or of where weights come from.

PEFT merges a weight in half precision by way of four tensors of its size in float32: the product, the scaled product,
a copy of the weight, the sum. Each is new memory. Those of a few rows stay in the processor's cache, and the allocator
has memory for them (recipes/LOG.md).
"""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora.layer import Linear
from torch import nn

if TYPE_CHECKING:
    from typing_extensions import Self

BLOCK_VALUES = 2**18
"""Values merged at a time by a thread, about: 1 MiB of each tensor in float32."""
MAX_THREADS = 8
"""More would merge faster than any disk reads and writes: one merges some 2 GB of half precision a second."""
_ROWS = 16
"""Blocks are of whole multiples: the kernels of matrix products take rows by such numbers, and may sum the rest in
another way (with MKL on AVX2, blocks of 23 rows differed)."""


class RowMerger:
    """Threads that merge LoRA linears; a context manager.

    Every operation of the merge is made value by value but one, the product of the adapter's two matrices, and how a
    library sums there may depend on how many rows it is given. So for each shape it is looked at once: where a block's
    update is not that of all rows, bit for bit, PEFT merges modules of that shape whole.

    Args:
        num_threads: How many; torch's own number, at most `MAX_THREADS`, if None.
    """

    def __init__(self, num_threads: int | None = None) -> None:
        self._num_threads = num_threads or min(MAX_THREADS, torch.get_num_threads())
        self._pool = ThreadPoolExecutor(self._num_threads, thread_name_prefix="hf_lema-merge")
        self._is_same: dict[tuple[object, ...], bool] = {}

    def __enter__(self) -> Self:
        """Start the threads. Each computes alone: a block is too small to be shared out among torch's own."""
        torch_threads = torch.get_num_threads()
        begun = threading.Barrier(self._num_threads + 1)

        def begin() -> None:
            torch.set_num_threads(1)
            begun.wait()

        for _ in range(self._num_threads):
            self._pool.submit(begin)
        begun.wait()
        torch.set_num_threads(torch_threads)  # what threads that torch sees for the first time take over
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End the threads."""
        self._pool.shutdown()

    def prepare(self, holder: nn.Module) -> None:
        """Have the modules that can be merged by rows do so when PEFT asks them to merge.

        Args:
            holder: Filled modules, each of which is merged once.
        """
        for module in holder.modules():
            if _can_merge_by_rows(module) and self._gives_the_same(module):
                twins = [_twin(module) for _ in range(self._num_threads)]
                # An attribute of the object goes before the method of its class.
                module.merge = partial(self._merge, module, twins)  # type: ignore[assignment]

    def _merge(self, module: Any, twins: list[Any], **_: Any) -> None:
        """In place of the module's own method; there is no safe merge here, and one adapter."""
        try:
            list(self._pool.map(partial(_merge_share, module, twins), range(len(twins))))
        finally:
            del module.merge  # the twins hold the weight, and the module stays in the model
        module.merged_adapters = list(module.active_adapters)

    @torch.no_grad()
    def _gives_the_same(self, module: Any) -> bool:
        """Whether the update of a block of rows is that of all rows."""
        (adapter,) = module.active_adapters
        first, second = module.lora_B[adapter].weight, module.lora_A[adapter].weight
        key = (first.shape, second.shape, first.dtype, second.dtype)
        if key not in self._is_same:
            whole = module.get_delta_weight(adapter)
            begins = range(0, len(whole), _num_rows(whole))
            self._is_same[key] = all(self._pool.map(partial(_is_block_of, module, whole), begins))
        return self._is_same[key]


def _can_merge_by_rows(module: nn.Module) -> bool:
    """Whether it is a plain LoRA on a plain linear, its output features in rows, of more than one block."""
    if type(module) is not Linear or type(module.get_base_layer()) is not nn.Linear:
        return False
    is_plain = not module.lora_variant and not any(module.lora_bias.values()) and not module.fan_in_fan_out
    weight: Any = module.get_base_layer().weight
    return is_plain and len(module.active_adapters) == 1 and _num_rows(weight) < len(weight)


def _num_rows(weight: torch.Tensor) -> int:
    """Rows of a block."""
    return max(1, BLOCK_VALUES // weight.shape[1] // _ROWS) * _ROWS


def _twin(module: nn.Module) -> Any:
    """Modules of their own over the same parameters."""
    return copy.deepcopy(module, {id(parameter): parameter for parameter in module.parameters()})


def _take_rows(twin: Any, adapter: str, weight: torch.Tensor, first: torch.Tensor) -> None:
    twin.get_base_layer().weight = nn.Parameter(weight, requires_grad=False)
    twin.lora_B[adapter].weight = nn.Parameter(first, requires_grad=False)


def _merge_share(module: Any, twins: list[Any], number: int) -> None:
    """Merges every ``len(twins)``-th block with a twin, in place."""
    (adapter,) = module.active_adapters
    weight, first = module.get_base_layer().weight.data, module.lora_B[adapter].weight.data
    twin, num_rows = twins[number], _num_rows(weight)
    with torch.no_grad():
        for begin in range(number * num_rows, len(weight), len(twins) * num_rows):
            _take_rows(twin, adapter, weight[begin : begin + num_rows], first[begin : begin + num_rows])
            twin.merge()
            twin.merged_adapters.clear()


def _is_block_of(module: Any, whole: torch.Tensor, begin: int) -> bool:
    (adapter,) = module.active_adapters
    twin, end = _twin(module), begin + _num_rows(whole)
    with torch.no_grad():
        _take_rows(twin, adapter, whole[begin:end], module.lora_B[adapter].weight.data[begin:end])
        return torch.equal(twin.get_delta_weight(adapter), whole[begin:end])
