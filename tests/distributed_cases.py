"""Run by a launcher, one process a rank: trains the same things stock and streamed, and saves what came out.

Usage: ``torchrun --nproc_per_node N tests/distributed_cases.py FOLDER CASE...``
"""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from models import (
    PEFT_THEN_WRAP,
    STOCK,
    TRANSFORMERS_5,
    WRAP_THEN_PEFT,
    RecordingTrainer,
    adapt,
    arguments,
    build,
    closing,
    enable_checkpointing,
    examples,
    lora,
    prepare,
    train,
    trainables,
)
from ranks import shared_memory_bytes
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, TrainerCallback

from hf_lema import LemaModelWrapper, get_streamer

RANK = int(os.environ.get("RANK", "0"))
ORDERS = {"stock": STOCK, "wrap-peft": WRAP_THEN_PEFT, "peft-wrap": PEFT_THEN_WRAP}
SETTINGS: dict[str, Any] = {"max_steps": 4, "gradient_accumulation_steps": 2, "ddp_backend": "gloo", "num_examples": 32}


def model_of(order: str) -> Any:
    model = prepare(ORDERS[order], peft_config=lora(lora_dropout=0.1))
    if order == "stock":
        enable_checkpointing(model)
    return model


class Reduces:
    """A communication hook that counts what DDP reduces, and reduces it as ever."""

    def __init__(self) -> None:
        self.num_values: list[int] = []
        self._module: torch.nn.Module | None = None

    def count(self, module: torch.nn.Module) -> None:
        """Counts for this DDP module from now on. Before its first forward."""
        if self._module is None:
            assert isinstance(module, DistributedDataParallel)
            # Without annotations: DDP compares them with its own classes, and here they are text.
            module.register_comm_hook(None, lambda _, bucket: self._reduce(bucket))
            self._module = module

    def _reduce(self, bucket: Any) -> Any:
        self.num_values.append(bucket.buffer().numel())
        return allreduce_hook(None, bucket)


class CountingTrainer(RecordingTrainer):
    """The stock Trainer, which also counts all-reduces."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.reduces = Reduces()

    def training_step(self, model: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.reduces.count(model)
        return super().training_step(model, *args, **kwargs)


def unused(order: str, folder: Path) -> dict[str, Any]:
    """DDP looks for parameters that took no part."""
    with closing(model_of(order)) as model:
        return asdict(train(model, folder, **(SETTINGS | {"ddp_find_unused_parameters": True})))


def used(order: str, folder: Path) -> dict[str, Any]:
    """DDP as docs/scale.md says; what it reduces is counted."""
    settings = SETTINGS | {"ddp_find_unused_parameters": False}
    num_examples = settings.pop("num_examples")
    with closing(model_of(order)) as model:
        trainer = CountingTrainer(model=model, args=arguments(folder, **settings), train_dataset=examples(num_examples))
        if TRANSFORMERS_5:  # Trainer of transformers 4 makes the handler later
            trainer.accelerator.ddp_handler.gradient_as_bucket_view = True
        trainer.train()
        return asdict(trainer.trajectory()) | {"num_values_reduced": trainer.reduces.num_values}


class StepProfile(TrainerCallback):
    """The operators of the third step, from the end of the one before to its own end, in order."""

    def __init__(self) -> None:
        self.operators: list[str] = []
        self._profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 2:
            self._profile.start()
        elif state.global_step == 3:
            self._profile.stop()
            events = sorted(self._profile.events(), key=lambda event: event.time_range.start)
            self.operators = [event.name for event in events]


def counted(order: str, folder: Path) -> dict[str, Any]:
    """What a steady step starts; a step is one batch and is logged."""
    settings = SETTINGS | {"gradient_accumulation_steps": 1}
    num_examples = settings.pop("num_examples")
    if "WORLD_SIZE" not in os.environ:
        settings.pop("ddp_backend")
    profile = StepProfile()
    with closing(model_of(order)) as model:
        trainer = RecordingTrainer(
            model=model,
            args=arguments(folder, **settings),
            train_dataset=examples(num_examples),
            callbacks=[profile],
        )
        trainer.train()
        return asdict(trainer.trajectory()) | {"operators": profile.operators}


def resumed(order: str, folder: Path) -> dict[str, Any]:
    """A run that ends after two steps and is taken up again by new objects."""
    saving = SETTINGS | {"save_strategy": "steps", "save_steps": 2}
    num_examples = saving.pop("num_examples")
    with closing(model_of(order)) as model:
        save, saves = model.save_pretrained, []
        model.save_pretrained = lambda *args, **kwargs: (saves.append(1), save(*args, **kwargs))[1]
        first = RecordingTrainer(
            model=model, args=arguments(folder, **(saving | {"max_steps": 2})), train_dataset=examples(num_examples)
        )
        first.train()
    with closing(model_of(order)) as model:
        second = RecordingTrainer(model=model, args=arguments(folder, **saving), train_dataset=examples(num_examples))
        second.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
        found = asdict(second.trajectory())
    found["files"] = sorted(path.name for path in (folder / "checkpoint-2").iterdir())
    found["num_saves"] = len(saves)
    return found


def resume(order: str, folder: Path, checkpoint: Path, **overrides: Any) -> dict[str, Any]:
    """Two steps more from a checkpoint of another launch, with as many processes as there are now."""
    settings = SETTINGS | overrides
    num_examples = settings.pop("num_examples")
    if "WORLD_SIZE" not in os.environ:
        settings.pop("ddp_backend")
    with closing(model_of(order)) as model:
        trainer = RecordingTrainer(
            model=model, args=arguments(folder, **settings), train_dataset=examples(num_examples)
        )
        trainer.train(resume_from_checkpoint=str(checkpoint))
        return asdict(trainer.trajectory())


def resumed_by_others(order: str, folder: Path) -> dict[str, Any]:
    """The checkpoint of `resumed` in another launch, taken up by more processes."""
    return resume(order, folder, folder.with_name(f"resumed-{order}-run") / "checkpoint-2")


def sft(order: str, folder: Path) -> dict[str, Any]:
    """TRL's trainer."""
    from test_frameworks import sft as train_with_trl

    settings = {"gradient_accumulation_steps": 2, "ddp_backend": "gloo"}
    logs, trained = train_with_trl(ORDERS[order], folder, settings, peft_by_trainer=False)
    return {"logs": logs, "trainables": trained}


def nf4(order: str, folder: Path) -> dict[str, Any]:
    """Layers in 4 bits, from one packed copy."""
    from test_quantization import stock, streamed

    base = checkpoint_in(folder.parent)
    if order == "peft-wrap":
        return {}  # a model that was packed by hand has its own copy
    lm = stock(base) if order == "stock" else streamed(base)
    peft = adapt(lm, lora(lora_dropout=0.1))
    found: dict[str, Any] = {}
    if order == "stock":
        enable_checkpointing(peft)
    else:
        found["memory"] = memory_of(lm.model.layers[2].mlp.up_proj.base_layer.weight)
    with closing(peft):
        return found | asdict(train(peft, folder, **SETTINGS))


def accelerate_loop_unused(order: str, folder: Path) -> dict[str, Any]:
    """A bare loop in which DDP looks for parameters that took no part."""
    return accelerate_loop(order, folder, find_unused_parameters=True)


def accelerate_loop(order: str, folder: Path, find_unused_parameters: bool = False) -> dict[str, Any]:
    """A bare loop: prepare, accumulate, backward."""
    torch.manual_seed(4)
    how = DistributedDataParallelKwargs(find_unused_parameters=find_unused_parameters)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, kwargs_handlers=[how])
    reduces = Reduces()
    with closing(model_of(order)) as model:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        loader = DataLoader(examples(32), batch_size=2)  # type: ignore[arg-type]
        ddp_model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        reduces.count(ddp_model)
        losses = []
        for rows in loader:
            with accelerator.accumulate(ddp_model):
                loss = ddp_model(**rows).loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.detach())
        found = {"losses": torch.stack(losses), "trainables": trainables(model)}
        return found | {"num_values_reduced": reduces.num_values}


def memory_of(tensor: torch.Tensor) -> tuple[str, int]:
    """(name, inode) of the mapping that a tensor lies in."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(part, 16) for part in line.split()[0].split("-"))
        if begin <= tensor.data_ptr() < end:
            return line.split()[-2 if line.endswith("(deleted)") else -1], int(line.split()[4])
    raise AssertionError("the tensor lies in no mapping")


def checkpoint_in(folder: Path) -> Path:
    """The base model's checkpoint, written by one process."""
    base = folder / "base"
    if RANK == 0 and not base.exists():
        build().save_pretrained(base)
    Accelerator(cpu=True).wait_for_everyone()
    return base


def loaded(order: str, folder: Path) -> dict[str, Any]:
    """A model from its checkpoint; streamed, all ranks map one copy of the layers."""
    base = checkpoint_in(folder.parent)
    found: dict[str, Any] = {}
    if order == "stock":
        model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
        peft = adapt(model, lora(lora_dropout=0.1))
        enable_checkpointing(peft)
    else:
        model = LemaModelWrapper.from_pretrained(str(base), device="cpu", attn_implementation="eager")
        peft = adapt(model, lora(lora_dropout=0.1))
        found["memory"] = memory_of(model.model.layers[2].mlp.up_proj.base_layer.weight)
        if order == "peft-wrap":  # the second model of the launch; a merge into what others read is refused
            try:
                peft.merge_adapter()
            except RuntimeError as error:
                found["refused"] = str(error)
            peft = None
            get_streamer(model).close()
            return found
    with closing(peft):
        return found | asdict(train(peft, folder, **SETTINGS))


def killed(order: str, folder: Path) -> dict[str, Any]:
    """The last process dies in its third step; without a launcher nobody tells the others."""
    base = checkpoint_in(folder.parent)
    peft = adapt(LemaModelWrapper.from_pretrained(str(base), device="cpu", attn_implementation="eager"))
    with closing(peft):
        trainer = DyingTrainer(model=peft, args=arguments(folder, **DYING), train_dataset=examples(32))
        try:
            trainer.train()
        except RuntimeError as error:
            memory = shared_memory_bytes()
            return {"error": str(error), "num_losses": len(trainer.micro_losses), "memory": memory}
    return {"error": None}


class DyingTrainer(RecordingTrainer):
    """Its last process is killed in the third step."""

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if len(self.micro_losses) == 2 and int(os.environ["WORLD_SIZE"]) == RANK + 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().training_step(*args, **kwargs)


DYING = {"max_steps": 6, "ddp_backend": "gloo"}

CASES = {
    case.__name__: case
    for case in (
        *(unused, used, counted, resumed, resumed_by_others, sft, nf4),
        *(accelerate_loop, accelerate_loop_unused, loaded, killed),
    )
}


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    for name in sys.argv[2:]:
        for order in ["wrap-peft"] if name == "killed" else ORDERS:
            found = CASES[name](order, folder / f"{name}-{order}-run")
            torch.save(found, folder / f"{name}-{order}-{RANK}.pt")


if __name__ == "__main__":
    main()
