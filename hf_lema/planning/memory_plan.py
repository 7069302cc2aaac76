"""A plan as a value: where memory goes in a training run, what was decided, and how long a step takes at least.

Responsibility: the named figures and what follows from them. Knows not how they were found, nor how they are shown.

Note [phases]: the parts of a step are not alive together. In the backward of a layer its boundary activations and those
of the layers below are, and the gradients of the layers above; so the peak of a step is the largest of its phases, and
which one that is depends on the shape.

Note [bound]: the time is that of `DeviceRates`: in the forward and in the backward the longer of computing and moving,
then the loss and the optimizer. Nothing in it waits, so a real step takes longer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hf_lema.choices import StepChoices
from hf_lema.planning.data_parallel import Launch

Place = Literal["vram", "ram"]


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A moment of the step at which memory may peak; see Note [phases].

    Attributes:
        name: Such as ``"backward of layer 31"``.
        boundary_bytes: Layer inputs that wait for the backward, or the ring that they pass through.
        kept_bytes: Activations that layers keep from forward to backward instead of recomputing them.
        gradient_bytes: Gradients of trainable tensors that are there already.
        activation_bytes: What the part under way needs: a micro-batch's recompute, or the loss of a part of the tokens.
    """

    name: str
    boundary_bytes: int
    kept_bytes: int
    gradient_bytes: int
    activation_bytes: int

    @property
    def nbytes(self) -> int:
        """Bytes of the phase beyond what is always there."""
        return self.boundary_bytes + self.kept_bytes + self.gradient_bytes + self.activation_bytes


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Lower bound of a step's seconds; see Note [bound].

    Attributes:
        forward_compute_s: Computing the layers' forward.
        forward_moving_s: What the bus, or the disk, takes meanwhile.
        backward_compute_s: Computing their backward, and again the forward of those that recompute.
        backward_moving_s: What the bus, or the disk, takes meanwhile.
        ends_s: Embedding, head and loss, both ways.
        update_s: The optimizer.
        all_reduce_s: Summing gradients over all processes.
    """

    forward_compute_s: float
    forward_moving_s: float
    backward_compute_s: float
    backward_moving_s: float
    ends_s: float
    update_s: float
    all_reduce_s: float = 0.0

    @property
    def forward_s(self) -> float:
        """The layers' forward."""
        return max(self.forward_compute_s, self.forward_moving_s)

    @property
    def backward_s(self) -> float:
        """The layers' backward."""
        return max(self.backward_compute_s, self.backward_moving_s)

    @property
    def step_s(self) -> float:
        """Seconds of a whole step."""
        return self.forward_s + self.backward_s + self.ends_s + self.update_s + self.all_reduce_s

    @property
    def computing_s(self) -> float:
        """Seconds of a step for which all layers are there."""
        return self.forward_compute_s + self.backward_compute_s + self.ends_s + self.update_s + self.all_reduce_s

    @property
    def is_bound_by_compute(self) -> bool:
        """Whether neither the forward nor the backward waits for bytes."""
        return self.forward_moving_s <= self.forward_compute_s and self.backward_moving_s <= self.backward_compute_s


@dataclass(frozen=True, kw_only=True)
class HostBytes:
    """Host memory of one process.

    Attributes:
        slab_bytes: Streamed layers in RAM, one copy for all processes of a machine.
        page_locked_bytes: All that is page-locked: slab, ring, boundary activations, head.
        file_backed_bytes: Streamed layers that stay in their files.
        ring_bytes: Windows between files and the device.
        boundary_bytes: Boundary activations.
        embedding_bytes: Embedding and head.
        optimizer_bytes: State of a paged optimizer; it is on the card instead while there is room.
    """

    slab_bytes: int
    page_locked_bytes: int
    file_backed_bytes: int
    ring_bytes: int
    boundary_bytes: int
    embedding_bytes: int
    optimizer_bytes: int

    @property
    def private_bytes(self) -> int:
        """What is taken of RAM: everything but files."""
        return self.group_bytes(1)

    def group_bytes(self, num_processes: int) -> int:
        """What several processes of a machine take together: one copy of the layers, the rest for each."""
        own_bytes = self.ring_bytes + self.boundary_bytes + self.embedding_bytes + self.optimizer_bytes
        return self.slab_bytes + num_processes * own_bytes


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """What a run will take, and what was decided.

    Bytes of tensors are those that a CUDA device's allocator counts, 512 at a time.

    Attributes:
        contender: ``"lema"``, ``"peft"`` or ``"qlora"``.
        model: Name of the model.
        batch_size: Sequences of a step.
        seq_len: Tokens of each.
        micro_batch_size: Sequences that a layer computes on at a time.
        forward_micro_batch_size: The same in the forward, which keeps no graph.
        tile_tokens: Tokens on which the token-wise part of a layer computes at a time; 0 for all.
        resident_layers: Layers that stay in VRAM.
        kept_layers: Layers whose activations stay in VRAM from forward to backward.
        recomputed_layers: Layers whose forward is computed again in the backward; the frozen ones below all adapters
            are neither.
        num_layers: Layers of the model.
        tier: Where streamed layers rest: ``"ram"``, ``"disk"``, ``"mixed"`` for some in each, or ``"vram"`` where
            none is streamed.
        boundaries: Where boundary activations wait.
        embedding_and_head: Where these are.
        slots_bytes: Device buffers that streamed layers share.
        resident_bytes: Layers that stay in VRAM.
        embedding_bytes: The input embedding, where it is in VRAM.
        head_bytes: The output head, where it is in VRAM and not tied to the embedding.
        other_bytes: Norms, buffers and what else is never streamed.
        adapter_bytes: Trainable tensors.
        optimizer_bytes: State of the optimizer.
        bucket_bytes: Of DDP: its copy of the gradients.
        workspace_bytes: Of cuBLAS.
        phases: Moments at which the step may peak.
        context_bytes: CUDA context and libraries, beside the allocator, not in `vram_bytes`.
        host: Host memory.
        h2d_bytes: Bytes that a step moves to the device.
        time: Lower bound of the step's time.
        launch: The processes; bytes and seconds are those of each.
    """

    contender: str
    model: str
    batch_size: int
    seq_len: int
    micro_batch_size: int
    forward_micro_batch_size: int
    tile_tokens: int
    resident_layers: tuple[int, ...]
    kept_layers: tuple[int, ...]
    recomputed_layers: tuple[int, ...]
    num_layers: int
    tier: str
    boundaries: Place
    embedding_and_head: Place
    slots_bytes: int
    resident_bytes: int
    embedding_bytes: int
    head_bytes: int
    other_bytes: int
    adapter_bytes: int
    optimizer_bytes: int
    bucket_bytes: int
    workspace_bytes: int
    phases: tuple[Phase, ...]
    context_bytes: int
    host: HostBytes
    h2d_bytes: int
    time: StepTime
    launch: Launch

    @property
    def tokens_per_s(self) -> float:
        """Tokens of all processes a second, at most."""
        return self.launch.world_size * self.batch_size * self.seq_len / self.time.step_s

    @property
    def host_group_bytes(self) -> int:
        """RAM that the processes of a machine take together."""
        return self.host.group_bytes(self.launch.num_processes)

    @property
    def choices(self) -> StepChoices:
        """What the plan decides."""
        return StepChoices(
            micro_batch_size=self.micro_batch_size if self.micro_batch_size < self.batch_size else 0,
            forward_micro_batch_size=0
            if self.forward_micro_batch_size == self.micro_batch_size
            else self.forward_micro_batch_size,
            tile_tokens=self.tile_tokens,
            boundaries_in_ram=self.boundaries == "ram",
            outside_in_ram=self.embedding_and_head == "ram",
            resident_layers=self.resident_layers,
            kept_layers=self.kept_layers,
        )

    @property
    def always_bytes(self) -> int:
        """Bytes that are there through the whole step."""
        weights = self.slots_bytes + self.resident_bytes + self.embedding_bytes + self.head_bytes + self.other_bytes
        return weights + self.adapter_bytes + self.optimizer_bytes + self.bucket_bytes + self.workspace_bytes

    @property
    def peak(self) -> Phase:
        """The phase that takes most."""
        return max(self.phases, key=lambda phase: phase.nbytes)

    @property
    def activation_bytes(self) -> int:
        """The most that a part under way needs, beside what waits for the backward."""
        return max(phase.activation_bytes for phase in self.phases)

    @property
    def vram_bytes(self) -> int:
        """Peak of what the allocator hands out (``torch.cuda.max_memory_allocated``)."""
        return self.always_bytes + self.peak.nbytes
