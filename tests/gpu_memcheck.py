"""A training run of a few steps, small enough for compute-sanitizer: every tier, slots reused, both ways of boundaries.

    compute-sanitizer --tool memcheck --error-exitcode 1 python tests/gpu_memcheck.py
    python tests/gpu_memcheck.py --device cpu      # the script itself, without a GPU

The exit status is that of the checker; the script's own is 1 where a loss is not that of the resident model.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from models import adapt, batch, build, closing, enable_checkpointing, forward_backward

from hf_lema import LemaConfig, LemaModelWrapper, StepChoices, get_streamer

NUM_STEPS = 2
WAYS = {
    "ram": (LemaConfig(vram_budget="min", choices=StepChoices()), True),
    "disk": (LemaConfig(vram_budget="min", ram_budget="min", choices=StepChoices(boundaries_in_ram=True)), True),
    "cut": (
        LemaConfig(
            vram_budget="min",
            num_slots=3,
            choices=StepChoices(micro_batch_size=1, tile_tokens=8, boundaries_in_ram=True, outside_in_ram=True),
        ),
        False,
    ),
    "nf4": (LemaConfig(vram_budget="min", quantization="nf4", choices=StepChoices()), False),
}
"""Name -> configuration, and whether the numbers are those of the resident model to the bit."""


def losses_of(model: torch.nn.Module, device: str) -> list[torch.Tensor]:
    """Of training steps, each followed by an evaluation."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for step in range(NUM_STEPS):
        losses.append(forward_backward(model, batch(2, seed=step, device=device), seed=step))
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            losses.append(model(**batch(2, seed=9, device=device)).loss.cpu())
    return losses


def main(argv: Sequence[str] | None = None) -> int:
    """Runs every way; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    device = parser.parse_args(argv).device
    torch.use_deterministic_algorithms(True, warn_only=True)
    wrong = []
    with tempfile.TemporaryDirectory() as folder:
        build().save_pretrained(folder)
        resident = adapt(type(build()).from_pretrained(Path(folder), attn_implementation="eager")).to(device).train()
        enable_checkpointing(resident)
        expected = losses_of(resident, device)
        for name, (config, is_exact) in WAYS.items():
            model = LemaModelWrapper.from_pretrained(folder, config, device=device, attn_implementation="eager")
            with closing(adapt(model).to(device).train()) as adapted:
                losses = losses_of(adapted, device)
                num_bytes = get_streamer(adapted).stats().h2d_bytes
            is_right = num_bytes > 0 and all(map(torch.isfinite, losses))
            if is_exact:
                is_right = is_right and all(map(torch.equal, losses, expected))
            print(f"{name}: {num_bytes} bytes moved, losses {[round(float(loss), 4) for loss in losses]}")
            wrong += [] if is_right else [name]
    for name in wrong:
        print(f"WRONG: {name}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
