"""One training by several processes, one device each, started from a notebook by Accelerate's launcher.

    launch(2, "NousResearch/Llama-2-7b-hf", "ranks-output", {"batch_size": 1, "max_steps": 8})

Every process streams the whole model through its own card; the layers in RAM are there once for all of them. Trainer
wraps the model in DistributedDataParallel, because a launcher says how many processes there are; without one, two
visible cards would mean DataParallel, which hf_lema refuses. Knows Accelerate's launcher and the stock Trainer.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

FIELDS = ("step_s", "vram_allocated_peak_bytes", "ram_private_above_baseline_peak_bytes", "num_tokens")


def launch(num_processes: int, model: str, output_dir: str, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Trains on ``num_processes`` devices and gives what each process measured, by rank.

    The processes are forked: the notebook must not have used CUDA, nor imported bitsandbytes, before.

    Args:
        num_processes: One for each device; on a machine without a GPU they compute on the CPU.
        model: Folder or hub id.
        output_dir: For telemetry and the adapter.
        settings: ``batch_size`` of one process, ``max_steps``, ``seq_len``, ``lora_rank``, ``num_examples``,
            ``vram_budget``, ``ram_budget``; what is left out has the value of `train`.

    Raises:
        ValueError: There are fewer GPUs than processes, and at least one.
    """
    import torch
    from accelerate import notebook_launcher

    num_gpus = torch.cuda.device_count()  # by NVML where it can: CUDA is not initialized
    if 0 < num_gpus < num_processes:
        raise ValueError(f"{num_processes} processes need as many GPUs, and this session has {num_gpus}")
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    notebook_launcher(train, (model, output_dir, settings), num_processes=num_processes, use_port=_free_port())
    texts = [(Path(output_dir) / f"rank-{rank}.json").read_text(encoding="utf-8") for rank in range(num_processes)]
    return [json.loads(text) for text in texts]


def train(model_name: str, output_dir: str, settings: dict[str, Any]) -> None:
    """What each process does: stock arguments, a streamed model, the stock Trainer; writes its figures.

    Args:
        model_name: Folder or hub id.
        output_dir: As in `launch`.
        settings: As in `launch`.
    """
    # Imported here, in the processes: what a notebook has imported before a fork must not have touched the device.
    import torch
    from duel_data import prepare_data
    from model_builds import build_model
    from training import LogCallback, TrainingPlan, stock_trainer
    from transformers import AutoTokenizer

    from hf_lema import LemaConfig, MemoryTelemetryCallback, get_streamer

    rank, has_gpu = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.is_available()
    device = torch.device("cuda", rank) if has_gpu else torch.device("cpu")
    if has_gpu:
        torch.cuda.set_device(device)
    plan = TrainingPlan(
        batch_size=settings.get("batch_size", 1),
        max_steps=settings.get("max_steps", 8),
        seed=0,
        lora_rank=settings.get("lora_rank", 16),
        learning_rate=1e-4,
        precision="fp16" if has_gpu else "fp32",  # never bf16: these cards emulate it and report it as supported
        device_type=device.type,
    )
    config = LemaConfig(vram_budget=settings.get("vram_budget", "auto"), ram_budget=settings.get("ram_budget", "auto"))
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    data = prepare_data(None, tokenizer, settings.get("seq_len", 512), plan.seed, settings.get("num_examples", 500))
    model = build_model("lema", model_name, plan, device, config)
    log = LogCallback()
    trainer, _ = stock_trainer(model, plan, data.dataset, Path(output_dir) / "checkpoints", log)
    telemetry = MemoryTelemetryCallback.attach(trainer, console=False)
    trainer.train()
    if rank == 0:
        model.save_pretrained(Path(output_dir) / "adapter")
    steps = [{name: getattr(record, name) for name in FIELDS} for record in telemetry.records]
    figures = {"rank": rank, "parallel": type(trainer.model_wrapped).__name__, "loss": log.losses, "steps": steps}
    (Path(output_dir) / f"rank-{rank}.json").write_text(json.dumps(figures) + "\n", encoding="utf-8")
    get_streamer(model).close()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _free_port() -> str:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
