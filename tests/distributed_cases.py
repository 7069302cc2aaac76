"""Run by a launcher, one process a rank: trains the same things stock and streamed, and saves what came out.

Usage: ``torchrun --nproc_per_node N tests/distributed_cases.py FOLDER CASE...``
"""

from __future__ import annotations

import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from models import (
    PEFT_THEN_WRAP,
    STOCK,
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
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from hf_lema import LemaModelWrapper, get_streamer

RANK = int(os.environ["RANK"])
ORDERS = {"stock": STOCK, "wrap-peft": WRAP_THEN_PEFT, "peft-wrap": PEFT_THEN_WRAP}
SETTINGS: dict[str, Any] = {"max_steps": 4, "gradient_accumulation_steps": 2, "ddp_backend": "gloo", "num_examples": 32}


def model_of(order: str) -> Any:
    model = prepare(ORDERS[order], peft_config=lora(lora_dropout=0.1))
    if order == "stock":
        enable_checkpointing(model)
    return model


def trainer(order: str, folder: Path, **overrides: Any) -> dict[str, Any]:
    """The stock Trainer."""
    with closing(model_of(order)) as model:
        return asdict(train(model, folder, **(SETTINGS | overrides)))


def unused(order: str, folder: Path) -> dict[str, Any]:
    """DDP looks for parameters that took no part."""
    return trainer(order, folder, ddp_find_unused_parameters=True)


def used(order: str, folder: Path) -> dict[str, Any]:
    """DDP expects every parameter to take part."""
    return trainer(order, folder, ddp_find_unused_parameters=False)


def resumed(order: str, folder: Path) -> dict[str, Any]:
    """A run that ends after two steps and is taken up again by new objects."""
    saving = SETTINGS | {"save_strategy": "steps", "save_steps": 2}
    num_examples = saving.pop("num_examples")
    with closing(model_of(order)) as model:
        first = RecordingTrainer(
            model=model, args=arguments(folder, **(saving | {"max_steps": 2})), train_dataset=examples(num_examples)
        )
        first.train()
    with closing(model_of(order)) as model:
        second = RecordingTrainer(model=model, args=arguments(folder, **saving), train_dataset=examples(num_examples))
        second.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
        found = asdict(second.trajectory())
    found["files"] = sorted(path.name for path in (folder / "checkpoint-2").iterdir())
    return found


def accelerate_loop(order: str, folder: Path) -> dict[str, Any]:
    """A bare loop: prepare, accumulate, backward."""
    torch.manual_seed(4)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    with closing(model_of(order)) as model:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        loader = DataLoader(examples(32), batch_size=2)  # type: ignore[arg-type]
        ddp_model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        losses = []
        for rows in loader:
            with accelerator.accumulate(ddp_model):
                loss = ddp_model(**rows).loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.detach())
        return {"losses": torch.stack(losses), "trainables": trainables(model)}


def memory_of(tensor: torch.Tensor) -> tuple[str, int]:
    """(name, inode) of the mapping that a tensor lies in."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(part, 16) for part in line.split()[0].split("-"))
        if begin <= tensor.data_ptr() < end:
            return line.split()[-2 if line.endswith("(deleted)") else -1], int(line.split()[4])
    raise AssertionError("the tensor lies in no mapping")


def loaded(order: str, folder: Path) -> dict[str, Any]:
    """A model from its checkpoint; streamed, all ranks map one copy of the layers."""
    base = folder.with_name("base")
    if RANK == 0 and not base.exists():
        build().save_pretrained(base)
    Accelerator(cpu=True).wait_for_everyone()
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


CASES = {case.__name__: case for case in (unused, used, resumed, accelerate_loop, loaded)}


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    for name in sys.argv[2:]:
        for order in ORDERS:
            found = CASES[name](order, folder / f"{name}-{order}-run")
            torch.save(found, folder / f"{name}-{order}-{RANK}.pt")


if __name__ == "__main__":
    main()
