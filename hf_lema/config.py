"""What a user may choose. Knows no models and no devices: budgets are text or bytes until a device is asked."""

from __future__ import annotations

from dataclasses import dataclass

from hf_lema.choices import StepChoices, StepPlan
from hf_lema.units import parse_bytes


@dataclass(frozen=True, kw_only=True)
class LemaConfig:
    """Choices for one wrapped model.

    Attributes:
        vram_budget: Most device memory that this process may allocate: ``"auto"`` (what is free, less head-room; may
            keep every layer resident, and says so), ``"min"`` (nothing resident but the slots), a text such as
            ``"6GiB"``, or bytes.
        ram_budget: Most host memory for the streamed layers: ``"auto"`` (what is free), ``"min"`` (always the disk
            tier), a text such as ``"2.4GiB"``, or bytes. The layers that do not fit stay in their files, and are
            read at every visit.
        num_slots: Device buffers of one layer each that streamed layers share; at least 2 (one computes while the
            next is filled).
        micro_batch_size: Sequences that a layer computes on at a time during one visit; 0 for the whole batch. The
            layer's activations are then those of so many sequences, and it still crosses the bus once for the whole
            batch. Cutting changes the order in which adapter gradients are summed, and which random numbers dropout
            draws. On a GPU the plan may have the forward, which takes less memory, compute on several parts at once.
        quantization: ``"nf4"`` packs the linears of decoder layers to 4 bits a value with bitsandbytes, those that
            stock QLoRA packs; they compute in the model's dtype. None keeps the weights as they are: 4 bits change the
            numbers, so nothing chooses them by itself. A checkpoint or model that bitsandbytes has packed already is
            streamed as it is, whatever stands here.
        double_quantization: Whether the scales of the 4-bit blocks are packed too (QLoRA's second quantization).
        self_check: Whether the first two training visits of every layer are run a second time with its weights fetched
            plainly, and compared: outputs, gradients, and the base weights before and after.
        choices: How steps are run, for who knows better than the budget: fixed `StepChoices`, or a `MemoryPlan` of
            `plan_memory`, which holds until a batch is larger than it was planned for; decided by the budget if None.

    Raises:
        ValueError: If a budget cannot be read or is not positive, ``num_slots`` is below 2, or the quantization is not
            one of those named.
    """

    vram_budget: str | int = "auto"
    ram_budget: str | int = "auto"
    num_slots: int = 2
    micro_batch_size: int = 0
    quantization: str | None = None
    double_quantization: bool = True
    self_check: bool = False
    choices: StepChoices | StepPlan | None = None

    def __post_init__(self) -> None:
        for name in ("vram_budget", "ram_budget"):
            self._bytes_of(name)
        size = self.micro_batch_size
        if isinstance(size, bool) or not isinstance(size, int) or size < 0:
            raise ValueError(f"micro_batch_size must be a number of sequences, 0 for the whole batch, got {size!r}")
        if self.quantization not in (None, "nf4"):
            raise ValueError(f'quantization must be None or "nf4", got {self.quantization!r}')
        for name in ("double_quantization", "self_check"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        self._check_choices()
        if isinstance(self.num_slots, bool) or not isinstance(self.num_slots, int):
            raise ValueError(f"num_slots must be a whole number, got {self.num_slots!r}")
        if self.num_slots < 2:
            raise ValueError(f"num_slots is {self.num_slots}; streaming needs at least 2 (one computes, one is filled)")

    def _check_choices(self) -> None:
        if self.choices is not None and not isinstance(self.choices, (StepChoices, StepPlan)):
            raise ValueError(f"choices must be StepChoices or a MemoryPlan, got {self.choices!r}")
        if isinstance(self.choices, StepPlan) and self.choices.contender != "lema":
            raise ValueError(
                f"choices is a plan of stock training ({self.choices.contender!r}); plan_memory plans streamed training"
            )

    @property
    def vram_budget_bytes(self) -> int | None:
        """The stated VRAM budget in bytes; None for ``"auto"`` and ``"min"``."""
        return self._bytes_of("vram_budget")

    @property
    def ram_budget_bytes(self) -> int | None:
        """The stated RAM budget in bytes; None for ``"auto"`` and ``"min"``."""
        return self._bytes_of("ram_budget")

    def _bytes_of(self, name: str) -> int | None:
        value = getattr(self, name)
        if value in ("auto", "min"):
            return None
        try:
            num_bytes = parse_bytes(value)
        except ValueError as error:
            raise ValueError(f'{name} must be "auto", "min", a size such as "6GiB", or bytes: {error}') from error
        if num_bytes <= 0:
            raise ValueError(f"{name} must be positive, got {value!r}")
        return num_bytes
