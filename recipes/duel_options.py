"""The options of the duel: defaults, scenarios from files, what is asked for on the command line, in this order.

Knows the command line. Does not know how a duel is run.
"""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path
from typing import Any

from contender_spec import ContenderSpec, known_contenders, load_contender
from random_data import RANDOM

from hf_lema.units import parse_bytes

CONTENDERS = ("peft", "qlora", "lema", "lema-auto")
"""Who takes part when nobody is named; the files in contenders/ hold more."""
PRECISIONS = ("fp32", "fp16", "bf16")
"""The keys of ``training.DTYPES``, which takes seconds to import."""
QUICK = {"batch_size": 1, "max_steps": 4}
SCENARIO_FOLDER = Path(__file__).with_name("scenarios")
SCENARIO_KEYS = (
    "model",
    "dataset",
    "contenders",
    "batch_size",
    "seq_len",
    "max_steps",
    "lora_rank",
    "learning_rate",
    "vram_limit",
    "precision",
    "seed",
    "gradient_accumulation_steps",
    "num_processes",
    "limit_s",
    "time_s",
)
DRY_RUN = {"batch_size": 1, "seq_len": 32, "max_steps": 3, "lora_rank": 2}
DRY_SHAPE = "tiny"


def make_parser() -> argparse.ArgumentParser:
    """The parser, without a scenario's values."""
    parser = argparse.ArgumentParser(
        description="train one adapter with stock PEFT, QLoRA and LEMA, and compare",
        epilog=f"scenarios: {', '.join(known_scenarios())}. Runs that are done are kept in --output-dir and not "
        "repeated: the same command goes on where it was interrupted, and --runs 3 adds what is lacking to three.",
    )
    parser.add_argument("--scenario", type=_scenario, metavar="NAME", help="a file in scenarios/, or one of your own")
    parser.add_argument(
        "--model", help="hub id, folder, or shape:llama-2-7b for random weights; by default SmolLM2-135M-Instruct"
    )
    parser.add_argument("--dataset", help="hub id, .jsonl, .csv, or random; by default 5,000 [LEMA_REPLY] examples")
    names = ", ".join(known_contenders())
    parser.add_argument(
        "--contenders", nargs="+", type=_specs, help=f"{names}, lema@6GiB for a VRAM budget, or a .json of your own"
    )
    parser.add_argument("--batch-size", type=_positive, default=2)
    parser.add_argument("--seq-len", type=_positive, default=96, help="tokens an example")
    parser.add_argument("--max-steps", type=_positive, default=12)
    parser.add_argument("--lora-rank", type=_positive, default=16, help="alpha is twice the rank")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--vram-limit", type=_byte_size, help="hold every contender to a smaller card, such as 16GiB")
    parser.add_argument("--precision", choices=PRECISIONS, help="by default what the device computes best")
    parser.add_argument(
        "--gradient-accumulation-steps", type=_positive, default=1, metavar="N", help="batches an optimizer step"
    )
    parser.add_argument(
        "--num-processes", type=_positive, default=1, metavar="N", help="of each contender, by torchrun, a GPU each"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--gpus",
        type=_cards,
        metavar="0,1",
        help="values of CUDA_VISIBLE_DEVICES; contenders run at the same time, each alone on one with cores of its own",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--runs", type=_positive, default=1, help="runs of each contender, those that are kept included"
    )
    parser.add_argument("--fresh", action="store_true", help="repeat runs that are done")
    parser.add_argument("--output-dir", type=Path, default=Path("duel-output"))
    parser.add_argument("--quick", action="store_true", help="a smoke run: one example a step, four steps")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help=f"the same job on a {DRY_SHAPE} random model and random tokens, without a GPU's limit and precision",
    )
    parser.add_argument("--limit-s", type=_positive, default=6 * 3600, help="a contender that takes longer is stopped")
    parser.add_argument("--time-s", type=_positive, help="end after so long; the same command goes on where it ended")
    return parser


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the options.

    Raises:
        SystemExit: An option cannot be used; the message says why.
    """
    parser = make_parser()
    first, _ = parser.parse_known_args(argv)
    if first.scenario is not None:
        parser.set_defaults(**first.scenario)
    if first.quick:
        parser.set_defaults(**QUICK)
    args = parser.parse_args(argv)
    if args.contenders is None:
        args.contenders = [[load_contender(name) for name in CONTENDERS]]
    args.contenders = list({spec.name: spec for specs in args.contenders for spec in specs}.values())
    args.device = _choose_device(args.device, parser)
    if args.dry_run:
        _make_dry(args)
    _check_processes(args, parser)
    if args.device == "cpu" and (args.vram_limit is not None or args.precision == "fp16"):
        what = "--vram-limit" if args.vram_limit is not None else "fp16 training"
        parser.error(f"{what} needs a GPU; this duel runs on the CPU")
    return args


def _make_dry(args: argparse.Namespace) -> None:
    """The same kind of job in the least size; contenders and number of processes stay."""
    for name, value in DRY_RUN.items():
        setattr(args, name, min(value, getattr(args, name)))
    is_packed = args.model is not None and args.model.startswith("shape:") and args.model.endswith("-nf4")
    args.model, args.dataset = f"shape:{DRY_SHAPE}" + ("-nf4" if is_packed else ""), RANDOM
    args.vram_limit = None
    if args.device == "cpu":
        args.precision = None


def _check_processes(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    import torch

    if args.device == "cuda" and args.num_processes > max(torch.cuda.device_count(), 1):
        num_gpus = torch.cuda.device_count()
        parser.error(f"--num-processes {args.num_processes} needs a GPU for each, torch sees {num_gpus}")
    if args.gpus is not None and (args.device != "cuda" or args.num_processes > 1):
        parser.error("--gpus gives each contender one GPU: it needs GPUs, and --num-processes 1")


def known_scenarios() -> tuple[str, ...]:
    """The names of all files in ``scenarios/``."""
    return tuple(sorted(path.stem for path in SCENARIO_FOLDER.glob("*.json")))


def _scenario(text: str) -> dict[str, Any]:
    """The values of a scenario, by the names of the options."""
    path = Path(text) if text.endswith(".json") else SCENARIO_FOLDER / f"{text}.json"
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"no scenario {text}; there are {', '.join(known_scenarios())}")
    values = json.loads(path.read_text(encoding="utf-8"))
    values.pop("about", None)
    if unknown := sorted(set(values) - set(SCENARIO_KEYS)):
        raise argparse.ArgumentTypeError(
            f"{path.name} sets {', '.join(unknown)}; a scenario has {', '.join(SCENARIO_KEYS)}"
        )
    if "vram_limit" in values:
        values["vram_limit"] = _byte_size(values["vram_limit"])
    if "contenders" in values:
        values["contenders"] = [_specs(name) for name in values["contenders"]]
    return values


def _specs(text: str) -> list[ContenderSpec]:
    try:
        return [load_contender(name) for name in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    return value


def _cards(text: str) -> list[str]:
    cards = text.split(",")
    if len(set(cards)) < len(cards) or not all(card.isdecimal() for card in cards):
        raise argparse.ArgumentTypeError(f"{text} is no list of cards such as 0,1, each once")
    return cards


def _byte_size(text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _choose_device(wanted: str, parser: argparse.ArgumentParser) -> str:
    import torch

    has_gpu = torch.cuda.is_available()
    if wanted == "cuda" and not has_gpu:
        parser.error("--device cuda: torch sees no GPU here")
    return wanted if wanted != "auto" else ("cuda" if has_gpu else "cpu")


def command_of(args: argparse.Namespace) -> str:
    """A shell line that repeats the duel: every value stated, so that a changed scenario or default does no harm.

    Of a local model or data set only the name is told, as in all records.
    """
    words = ["python", "recipes/compare_peft.py"]
    for name in ("model", "dataset"):
        if (value := getattr(args, name)) is not None:
            words += [f"--{name}", Path(value).name if Path(value).exists() else value]
    words += ["--contenders", ",".join(spec.name for spec in args.contenders)]
    rest = ("batch_size", "seq_len", "max_steps", "lora_rank", "learning_rate", "vram_limit", "precision", "device")
    for name in (*rest, "seed", "runs"):
        if (value := getattr(args, name)) is not None:
            words += [f"--{name.replace('_', '-')}", str(value)]
    for name in ("gradient_accumulation_steps", "num_processes"):
        if (value := getattr(args, name)) != 1:
            words += [f"--{name.replace('_', '-')}", str(value)]
    if args.gpus is not None:
        words += ["--gpus", ",".join(args.gpus)]
    return shlex.join(words)
