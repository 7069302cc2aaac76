"""Tiny models, data and training runs shared by the tests that compare a streamed model with the resident one.

Nothing here is streamed by itself: a test says in which order PEFT and the wrapper come. Random state is seeded before
each thing that draws, so that two runs differ only in what the test varies.
"""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging import version
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from hf_lema import LemaConfig, LemaModelWrapper, get_streamer
from hf_lema.runtime.slots import SlotState

VOCAB_SIZE = 128
SEQ_LEN = 16
NUM_LAYERS = 4
STOCK, WRAP_THEN_PEFT, PEFT_THEN_WRAP = "stock", "wrap_then_peft", "peft_then_wrap"
ORDERS = (WRAP_THEN_PEFT, PEFT_THEN_WRAP)
CHECKPOINTED = (STOCK, WRAP_THEN_PEFT)
"""Gradient checkpointing is asked for in these runs. A streamed model absorbs it: one order has it, the other not."""
TRANSFORMERS_5 = version.parse(transformers.__version__) >= version.parse("5")
CACHE = "cache" if version.parse(transformers.__version__) >= version.parse("5.24") else "past_key_values"

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

# Configuration class, fields beside the common shape, and what LoRA is put on.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any], Any]] = {
    "llama": ("LlamaConfig", {}, "all-linear"),
    "mistral": ("MistralConfig", {"sliding_window": 8}, "all-linear"),
    "qwen2": ("Qwen2Config", {}, "all-linear"),
    "qwen3": ("Qwen3Config", {"head_dim": 8}, "all-linear"),
    "gemma2": ("Gemma2Config", {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8}, "all-linear"),
    "phi3": ("Phi3Config", {}, "all-linear"),
    "gpt2": (
        "GPT2Config",
        {"n_embd": 32, "n_inner": 64, "n_head": 4, "n_positions": 128, "embd_pdrop": 0.0, "resid_pdrop": 0.1},
        ["c_attn", "c_fc", "c_proj"],
    ),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}, ["q_proj", "v_proj", "o_proj"]),
}


def build(
    architecture: str = "llama",
    *,
    num_layers: int = NUM_LAYERS,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **overrides: Any,
) -> PreTrainedModel:
    """A random model of a few ten kilobytes, in training mode, on the CPU; the same arguments give the same weights."""
    class_name, fields, _ = ARCHITECTURES[architecture]
    shape = {"vocab_size": VOCAB_SIZE, "n_layer": num_layers} if architecture == "gpt2" else dict(_SHAPE)
    shape |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "attn_implementation": "eager"}
    if architecture != "gpt2":
        shape["num_hidden_layers"] = num_layers
    config = getattr(transformers, class_name)(**(shape | fields | overrides))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=config._attn_implementation)
        # Freshly made norms are all ones and biases all zeros: two layers mixed up would not show there.
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype).train()


def lora(architecture: str | None = None, **overrides: Any) -> LoraConfig:
    """LoRA with dropout: on all linears of the architecture, or on half of a Llama's, which is faster."""
    fields: dict[str, Any] = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "task_type": "CAUSAL_LM"}
    fields["target_modules"] = ["q_proj", "v_proj", "up_proj", "down_proj"]
    if architecture is not None:
        fields["target_modules"] = ARCHITECTURES[architecture][2]
    return LoraConfig(**(fields | overrides))


def adapt(model: nn.Module, peft_config: PeftConfig | None = None, seed: int = 5, **kwargs: Any) -> PeftModel:
    """Puts an adapter on a model, with seeded weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return get_peft_model(model, peft_config or lora(), **kwargs)


def prepare(
    order: str,
    model: nn.Module | None = None,
    peft_config: PeftConfig | None = None,
    *,
    config: LemaConfig | None = None,
    device: str = "cpu",
) -> PeftModel:
    """A model with an adapter: resident for ``"stock"``, else streamed in the order that the name says."""
    model = build() if model is None else model
    if order == WRAP_THEN_PEFT:
        LemaModelWrapper.wrap(model, config, device=device)
    peft_model = adapt(model, peft_config)
    if order == PEFT_THEN_WRAP:
        LemaModelWrapper.wrap(peft_model, config, device=device)
    return peft_model.to(device)


@contextlib.contextmanager
def closing(model: nn.Module) -> Iterator[nn.Module]:
    """Closes the model's streamer, if it has one, at the end of the block."""
    try:
        yield model
    finally:
        with contextlib.suppress(ValueError):
            get_streamer(model).close()


def examples(num_examples: int = 16, seq_len: int = SEQ_LEN, seed: int = 1) -> list[dict[str, torch.Tensor]]:
    """Random token rows with labels; the first tokens of each row carry no loss."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(num_examples):
        tokens = torch.randint(3, VOCAB_SIZE, (seq_len,), generator=generator)
        labels = tokens.clone()
        labels[: int(torch.randint(0, 4, (1,), generator=generator))] = -100
        rows.append({"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels})
    return rows


def batch(num_rows: int = 2, seq_len: int = SEQ_LEN, seed: int = 2, device: str = "cpu") -> dict[str, torch.Tensor]:
    """One batch; the second row is padded on the right."""
    rows = examples(num_rows, seq_len, seed)
    stacked = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    if num_rows > 1:
        stacked["attention_mask"][1, -3:] = 0
        stacked["input_ids"][1, -3:] = 0
        stacked["labels"][1, -3:] = -100
    return {name: tensor.to(device) for name, tensor in stacked.items()}


def arguments(output_dir: Path, **overrides: Any) -> TrainingArguments:
    """Arguments of a short, silent run that logs every step."""
    fields: dict[str, Any] = {
        "output_dir": str(output_dir),
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
        "seed": 3,
        "dataloader_pin_memory": False,
    }
    if not TRANSFORMERS_5 and "gradient_checkpointing_kwargs" not in overrides:
        # Reentrant by default there: with it a stock PeftModel on a frozen embedding trains nothing.
        fields["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    # A run in bf16 leaves it set (transformers 4.57), and every later run of the process would be in bf16 too.
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)
    return TrainingArguments(**(fields | overrides))


class _Losses(TrainerCallback):
    """Grad norm of every step, unrounded, and the logged loss."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if logs is not None and "loss" in logs:
            self.logs.append({name: logs[name] for name in ("loss", "grad_norm")})


class RecordingTrainer(Trainer):
    """The stock Trainer, which also keeps the loss tensor of every micro-step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.micro_losses: list[torch.Tensor] = []
        self._recorder = _Losses()
        self.add_callback(self._recorder)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self.micro_losses.append(loss.detach().cpu().clone())
        return loss

    def trajectory(self) -> Trajectory:
        """What the run has done so far."""
        return Trajectory(
            losses=torch.stack(self.micro_losses),
            logs=self._recorder.logs,
            trainables=trainables(self.model),
            optimizer={i: _flat(state) for i, state in self.optimizer.state_dict()["state"].items()},
        )


def _flat(state: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter's optimizer state; bitsandbytes saves its 8-bit codes in a dictionary of their own."""
    inner = [name for name, value in state.items() if isinstance(value, Mapping)]
    flat = {name: value for name, value in state.items() if name not in inner}
    return flat | {key: value for name in inner for key, value in state[name].items()}


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """All numbers of a run that streaming must not change."""

    losses: torch.Tensor
    logs: list[dict[str, float]] = field(default_factory=list)
    trainables: dict[str, torch.Tensor]
    optimizer: Mapping[int, Mapping[str, Any]]


def cut_loss(model: nn.Module, chunk_tokens: int = 8) -> None:
    """Has the loss of a wrapped model computed in chunks of a few tokens, as it is with a real vocabulary."""
    lm = model.get_base_model() if isinstance(model, PeftModel) else model
    lm.__dict__["_lema_runtime"].loss.chunk_tokens = chunk_tokens


def settled_bytes(model: nn.Module) -> int:
    """Bytes moved once the prefetcher has nothing left to fill: the slots hold what the next sweep needs first."""
    prefetcher: Any = get_streamer(model)._prefetcher
    with prefetcher._changed:
        while any(prefetcher._pool.find(i) is None for i in prefetcher._wanted) or any(
            slot.state is SlotState.FILLING for slot in prefetcher._pool.slots
        ):
            assert prefetcher._changed.wait(10.0), "the prefetcher does not settle"
    return get_streamer(model).stats().h2d_bytes


def trainables(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the parameters that need a gradient, in order."""
    return {n: p.detach().cpu().clone() for n, p in model.named_parameters() if p.requires_grad}


def gradients(model: nn.Module) -> dict[str, torch.Tensor | None]:
    """Copies of the gradients of the parameters that need one; None where there is none."""
    return {
        n: None if p.grad is None else p.grad.detach().cpu().clone()
        for n, p in model.named_parameters()
        if p.requires_grad
    }


def train(model: nn.Module, output_dir: Path, *, num_examples: int = 16, **overrides: Any) -> Trajectory:
    """A run of the stock Trainer."""
    trainer = RecordingTrainer(
        model=model, args=arguments(output_dir, **overrides), train_dataset=examples(num_examples)
    )
    trainer.train()
    return trainer.trajectory()


def assert_same_tensors(found: Mapping[Any, Any], expected: Mapping[Any, Any]) -> None:
    """Same names in the same order, `torch.equal` values, same dtypes; every name that differs is shown."""
    assert list(found) == list(expected)
    different = [
        name
        for name, tensor in expected.items()
        if (found[name] is None) != (tensor is None)
        or (tensor is not None and (found[name].dtype != tensor.dtype or not torch.equal(found[name], tensor)))
    ]
    assert not different, f"{len(different)} of {len(expected)} tensors differ: {different[:10]}"


def assert_same_run(found: Trajectory, expected: Trajectory) -> None:
    """Bit for bit: micro-step losses, logged loss and grad norm, trained tensors, optimizer state."""
    assert torch.isfinite(expected.losses).all()
    assert torch.equal(found.losses, expected.losses), (found.losses, expected.losses)
    # As text: the grad norm of a step that a GradScaler skips may be NaN, which is not equal to itself.
    assert [repr(log) for log in found.logs] == [repr(log) for log in expected.logs]
    assert_same_tensors(found.trainables, expected.trainables)
    assert list(found.optimizer) == list(expected.optimizer)
    for index, state in expected.optimizer.items():
        assert list(found.optimizer[index]) == list(state)
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(found.optimizer[index][name]), torch.as_tensor(value)), (index, name)


def assert_moved(before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]) -> None:
    """Every trained tensor has changed: a run that trains nothing is equal to another one that trains nothing."""
    same = [name for name, tensor in before.items() if torch.equal(tensor, after[name])]
    assert not same, f"did not train: {same}"


def forward_backward(model: nn.Module, rows: dict[str, Any] | None = None, seed: int = 11) -> torch.Tensor:
    """One seeded loss and its backward; the loss."""
    torch.manual_seed(seed)
    loss = model(**(rows or batch(device=str(next(model.parameters()).device)))).loss
    loss.backward()
    return loss.detach().cpu()


def enable_checkpointing(model: nn.Module, use_reentrant: bool = False) -> None:
    """Gradient checkpointing under the name that the installed transformers does not warn about."""
    if version.parse(transformers.__version__) >= version.parse("5.23"):
        model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})


# Trainer collects garbage at the end of every run: 0.3 s to walk what the imports left, and half of a tiny run's time.
gc.collect()
gc.freeze()
