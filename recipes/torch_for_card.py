"""Whether the installed torch has kernels for the card, and where it has none, the pinned build that has.

    python recipes/torch_for_card.py              says what it finds; 1 where the card has no kernels
    python recipes/torch_for_card.py --install    installs the pinned build there

Meant for Kaggle's P100 (compute capability 6.0): the torch of its image has no kernels for it since 2026, every
operation fails with "no kernel image is available" (Kaggle/docker-python#1546, Kaggle/kaggle-cli#1151). Knows torch and
pip; needs no installed hf_lema.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

PINNED = "torch==2.13.0"
INDEX = "https://download.pytorch.org/whl/cu126"
PINNED_ARCHS = ("sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90")
"""PyTorch's builds for CUDA 12.6 are the only ones with kernels for Maxwell, Pascal and Volta since release 2.8
(pytorch/pytorch#157517; the support matrix in its RELEASE.md, as of pytorch/pytorch#182849). 2.14 is announced as the
last release with such a build (pytorch/pytorch#190355, #190385); 2.13 is the one that this project is tested with."""
BUILT_AGAINST_TORCH = ("torchvision", "torchaudio", "xformers")
"""Compiled for another torch they raise when transformers imports them ("operator torchvision::nms does not exist",
pytorch/pytorch#157648). Nothing here needs them."""


@dataclass(frozen=True, kw_only=True)
class TorchForCard:
    """What was found.

    Attributes:
        torch_version: With its build.
        card: Its name, or None.
        capability: Compute capability of the card, or None.
        arch_list: What torch has kernels for.
        is_usable: Whether torch can compute on the card, or there is none.
    """

    torch_version: str
    card: str | None
    capability: tuple[int, int] | None
    arch_list: tuple[str, ...]
    is_usable: bool

    @property
    def text(self) -> str:
        """One sentence."""
        if self.card is None or self.capability is None:
            return f"torch {self.torch_version} sees no GPU here."
        arch = "sm_" + "".join(map(str, self.capability))
        if self.is_usable:
            return f"torch {self.torch_version} has kernels for the {self.card} ({arch})."
        return (
            f"torch {self.torch_version} has no kernels for the {self.card} ({arch}), only {', '.join(self.arch_list)}."
        )


def find_out() -> TorchForCard:
    """Asks torch; touches the card's name and no more."""
    import torch

    if not torch.cuda.is_available():
        return TorchForCard(torch_version=torch.__version__, card=None, capability=None, arch_list=(), is_usable=True)
    return judge(
        torch.__version__,
        torch.cuda.get_device_name(0),
        torch.cuda.get_device_capability(0),
        tuple(torch.cuda.get_arch_list()),
    )


def judge(torch_version: str, card: str, capability: tuple[int, int], arch_list: Sequence[str]) -> TorchForCard:
    """What these answers mean.

    Args:
        torch_version: With its build.
        card: The card's name.
        capability: Its compute capability.
        arch_list: As ``torch.cuda.get_arch_list()`` gives it.
    """
    return TorchForCard(
        torch_version=torch_version,
        card=card,
        capability=capability,
        arch_list=tuple(arch_list),
        is_usable=_has_kernels(arch_list, capability),
    )


def commands_to_install(capability: tuple[int, int]) -> list[list[str]]:
    """Commands that leave a torch with kernels for the card and nothing that was compiled for another torch.

    Raises:
        ValueError: The pinned build has no kernels for the card either.
    """
    if not _has_kernels(PINNED_ARCHS, capability):
        raise ValueError(
            f"{PINNED} for CUDA 12.6 has no kernels for compute capability {capability[0]}.{capability[1]} either, "
            f"only {', '.join(PINNED_ARCHS)}: this card needs another build, see pytorch.org/get-started"
        )
    pip = [sys.executable, "-m", "pip"]
    quiet = ["--quiet", "--disable-pip-version-check"]
    return [
        [*pip, "install", *quiet, f"{PINNED}+cu126", "--extra-index-url", INDEX],
        [*pip, "uninstall", "--yes", "--quiet", *BUILT_AGAINST_TORCH],
    ]


def _has_kernels(arch_list: Sequence[str], capability: tuple[int, int]) -> bool:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    try:
        from hf_lema.machine.machine_facts import has_kernels
    finally:
        del sys.path[0]
    return has_kernels(arch_list, capability)


def main(argv: list[str] | None = None) -> int:
    """Says what is there and installs what is lacking; 0 where torch can compute on the card."""
    parser = argparse.ArgumentParser(description="find out whether torch has kernels for the card")
    parser.add_argument("--install", action="store_true", help="install a torch that has them, where this one has not")
    args = parser.parse_args(argv)
    found = find_out()
    print(found.text, flush=True)
    if found.is_usable:
        return 0
    assert found.capability is not None
    if not args.install:
        return 1
    print(f"Installing {PINNED} for CUDA 12.6, which has (2 to 3 GB, once a session).", flush=True)
    for command in commands_to_install(found.capability):
        subprocess.run(command, check=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
