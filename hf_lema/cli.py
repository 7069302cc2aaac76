"""The command line, ``hf-lema`` or ``python -m hf_lema``: parses, calls one function, prints.

Responsibility: arguments, exit codes, the text and JSON of results. Everything else is imported when a command runs, so
that ``--help`` answers at once.

To add a command: one function that declares its arguments and sets ``run``, and one line in `COMMANDS`.

Exit codes: 0 done, 1 an error that the message explains or a problem that doctor found, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_lema.units import format_bytes

EXIT_CODES = (
    "exit codes: 0 done, 1 an error that the message explains or a problem that doctor found, 2 wrong usage, "
    "130 interrupted"
)
Result = Mapping[str, Any]
"""What a command has to say: ``text`` for a person, ``exit_code`` where it is not 0, the rest for ``--json``."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Arguments without the program's name; None means those of the process.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(
        prog="hf-lema",
        description="Fine-tune models that do not fit on the card: what is done from a shell.",
        epilog=f"examples:\n{_first_examples()}\n\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, (summary, example, declare) in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=summary,
            description=summary,
            epilog=f"examples:\n{example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_argument("--json", action="store_true", help="end the output with the result as one line of JSON")
        declare(command)
    arguments = parser.parse_args(argv)
    # Read by torch when it is imported: large pages for large tensors. Without them a merge takes 1.6 times the
    # processor time (recipes/LOG.md).
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # addressed to programmers
    # On CPUs with AVX512-BF16 bitsandbytes 0.50, which PEFT imports, asks every user to install a kernel for inference.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        result = dict(arguments.run(arguments))
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        print(f"hf-lema: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("hf-lema: interrupted, nothing is left half done", file=sys.stderr)
        return 130
    text, exit_code = result.pop("text"), int(result.pop("exit_code", 0))
    print(text, flush=True)
    if arguments.json:
        print(json.dumps(result), flush=True)
    return exit_code


def _first_examples() -> str:
    """One line of each command, for the help of them all."""
    return "\n".join(example.splitlines()[0] for _, example, _ in COMMANDS.values())


def _declare_merge(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", metavar="MODEL", help="folder or hub id; by default what the adapter names")
    parser.add_argument("--adapter", metavar="ADAPTER", required=True, help="folder or hub id of the adapter")
    parser.add_argument("--output", metavar="FOLDER", required=True, help="folder to write; new or empty")
    parser.add_argument("--dtype", metavar="DTYPE", help="float16, bfloat16 or float32; by default the base's own")
    parser.add_argument("--max-shard-size", metavar="SIZE", default="5GB", help="where a new file begins (%(default)s)")
    parser.add_argument("--push-to-hub", metavar="ID", help="upload the finished folder to this model repository")
    parser.add_argument("--revision", metavar="REVISION", help="branch, tag or commit of the base on the hub")
    parser.add_argument("--adapter-revision", metavar="REVISION", help="the same of the adapter")
    _add_trust(parser)
    parser.set_defaults(run=_run_merge)


def _run_merge(arguments: argparse.Namespace) -> Result:
    from hf_lema.export.merging import merge_and_save

    where = _where(arguments)
    merged = merge_and_save(
        arguments.base,
        arguments.adapter,
        arguments.output,
        dtype=arguments.dtype,
        max_shard_size=arguments.max_shard_size,
        push_to_hub=arguments.push_to_hub,
        trust_remote_code=arguments.trust_remote_code,
        adapter_revision=arguments.adapter_revision,
        **where,
    )
    uploaded = "" if merged.hub_id is None else f", uploaded to {merged.hub_id}"
    text = (
        f"{merged.folder}: {merged.num_tensors} tensors, {merged.num_merged_tensors} of them merged, "
        f"{format_bytes(merged.nbytes)} in {merged.num_files} files{uploaded}"
    )
    return {"text": text, **_as_json(merged)}


def _declare_pack(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder or hub id")
    parser.add_argument("output", metavar="OUT", help="the pack (*.lema.safetensors); for .bin files a folder")
    parser.add_argument("--dtype", metavar="DTYPE", help="float16, bfloat16 or float32; by default the model's own")
    _add_quantization(parser, "pack linears to 4 bits")
    _add_revision(parser)
    _add_trust(parser)
    parser.set_defaults(run=_run_pack)


def _run_pack(arguments: argparse.Namespace) -> Result:
    from hf_lema.export.unpickling import convert_pickled, find_pickled

    where = _where(arguments)
    folder = find_pickled(arguments.model, **where)
    if folder is not None:
        converted = convert_pickled(folder, arguments.output, dtype=arguments.dtype)
        text = f"{converted.folder}: {converted.num_tensors} tensors, {format_bytes(converted.nbytes)}, as safetensors"
        return {"text": text, **_as_json(converted)}
    return _write_pack(arguments, where)


def _write_pack(arguments: argparse.Namespace, where: Mapping[str, str]) -> Result:
    import torch

    from hf_lema.files.pack import PACK_SUFFIX
    from hf_lema.model.loading import pack_model

    path = Path(arguments.output)
    if not path.name.endswith(PACK_SUFFIX):
        raise ValueError(f"{path} is no name for a pack: expected one that ends in {PACK_SUFFIX}")
    pack = pack_model(
        arguments.model,
        path,
        dtype=arguments.dtype,
        quantization=arguments.quantization,
        double_quantization=not arguments.no_double_quantization,
        device="cuda" if arguments.quantization and torch.cuda.is_available() else "cpu",
        trust_remote_code=arguments.trust_remote_code,
        **where,
    )
    text = f"{pack.path}: {len(pack.layouts)} layers, {format_bytes(pack.nbytes)}"
    return {"text": text, "path": str(pack.path), "nbytes": pack.nbytes, "num_layers": len(pack.layouts)}


def _declare_plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder, hub id, or a shape such as llama-2-7b")
    parser.add_argument("--vram", metavar="SIZE", help="the card's memory; by default that of --card")
    parser.add_argument("--ram", metavar="SIZE", help="the machine's free memory; by default this machine's")
    parser.add_argument("--card", metavar="NAME", help="T4, P100, RTX 3090, ...; by default the one here, else a T4")
    parser.add_argument("--batch-size", metavar="N", type=int, default=8, help="sequences a step (%(default)s)")
    parser.add_argument("--seq-len", metavar="N", type=int, default=512, help="tokens a sequence (%(default)s)")
    parser.add_argument("--lora-rank", metavar="R", type=int, default=16, help="on all linears (%(default)s)")
    parser.add_argument("--vram-budget", metavar="BUDGET", default="auto", help='as in LemaConfig; "min" for the floor')
    parser.add_argument("--num-processes", metavar="N", type=int, default=1, help="on each machine, one a card")
    parser.add_argument("--num-hosts", metavar="N", type=int, default=1, help="machines (%(default)s)")
    parser.add_argument(
        "--cards-per-bus", metavar="N", type=int, default=1, help="behind one link to RAM (%(default)s)"
    )
    parser.add_argument(
        "--ram-rate", metavar="GB/S", type=float, help="of RAM, for all cards; by default what they take"
    )
    parser.add_argument("--link-rate", metavar="GB/S", type=float, help="between cards; by default that of the bus")
    parser.add_argument("--network", metavar="GBIT/S", type=float, default=25.0, help="of a machine (%(default)s)")
    parser.add_argument("--dtype", metavar="DTYPE", help="float16, bfloat16 or float32; by default the model's own")
    parser.add_argument("--optim", metavar="NAME", default="adamw_torch_fused", help="as in TrainingArguments")
    _add_quantization(parser, "stream linears in 4 bits")
    _add_revision(parser)
    parser.set_defaults(run=_run_plan)


def _run_plan(arguments: argparse.Namespace) -> Result:
    from hf_lema.config import LemaConfig
    from hf_lema.planning.device_rates import find_rates
    from hf_lema.planning.plan_table import compare_plans, comparison_as_dict, format_comparison
    from hf_lema.planning.step_cost import PlanOptions
    from hf_lema.units import parse_bytes

    comparison = compare_plans(
        arguments.model,
        LemaConfig(vram_budget=arguments.vram_budget),
        batch_size=arguments.batch_size,
        seq_len=arguments.seq_len,
        vram_bytes=None if arguments.vram is None else parse_bytes(arguments.vram),
        ram_bytes=None if arguments.ram is None else parse_bytes(arguments.ram),
        lora=arguments.lora_rank,
        rates=None if arguments.card is None else find_rates(arguments.card),
        options=PlanOptions(
            dtype=arguments.dtype,
            revision=arguments.revision,
            num_processes=arguments.num_processes,
            launch=_launch(arguments),
            optim=arguments.optim,
            quantization=arguments.quantization,
            double_quantization=not arguments.no_double_quantization,
        ),
    )
    return {"text": format_comparison(comparison), **comparison_as_dict(comparison)}


def _launch(arguments: argparse.Namespace) -> Any:
    from hf_lema.planning.data_parallel import Launch

    return Launch(
        num_processes=arguments.num_processes,
        num_hosts=arguments.num_hosts,
        cards_per_bus=arguments.cards_per_bus,
        ram_bytes_per_s=None if arguments.ram_rate is None else 1e9 * arguments.ram_rate,
        link_bytes_per_s=None if arguments.link_rate is None else 1e9 * arguments.link_rate,
        network_bytes_per_s=1e9 * arguments.network / 8,
    )


def _declare_check(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder or hub id")
    parser.add_argument("--dtype", metavar="DTYPE", help="float16, bfloat16 or float32; by default the model's own")
    parser.add_argument(
        "--ram-budget", metavar="BUDGET", default="auto", help='as in LemaConfig; "min" for the disk tier'
    )
    _add_quantization(parser, "stream linears in 4 bits")
    _add_revision(parser)
    _add_trust(parser)
    parser.set_defaults(run=_run_check)


def _run_check(arguments: argparse.Namespace) -> Result:
    from peft import LoraConfig, get_peft_model

    from hf_lema.config import LemaConfig
    from hf_lema.layer.self_check import check_steps
    from hf_lema.wrapper import LemaModelWrapper, find_check, get_streamer

    config = LemaConfig(
        vram_budget="min",
        ram_budget=arguments.ram_budget,
        quantization=arguments.quantization,
        double_quantization=not arguments.no_double_quantization,
        self_check=True,
    )
    model = LemaModelWrapper.from_pretrained(
        arguments.model,
        config,
        arguments.dtype,
        trust_remote_code=arguments.trust_remote_code,
        **_where(arguments),
    )
    vocab_size = model.config.get_text_config().vocab_size
    peft_model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    num_moved = check_steps(peft_model, vocab_size=vocab_size)
    check, streamer = find_check(peft_model), get_streamer(peft_model)
    assert check is not None
    tier, num_layers = streamer.host_store.tier, streamer.num_layers
    streamer.close()
    text = (
        f"{num_layers} layers, {tier} tier: {check.num_visits} visits run twice, {check.num_equal} equal bit for bit, "
        f"the others within {check.max_relative_error:.1e}; the adapters moved, the base did not"
    )
    figures = {"num_visits": check.num_visits, "num_equal": check.num_equal, "num_trainable": num_moved, "tier": tier}
    return {"text": text, **figures, "max_relative_error": check.max_relative_error}


def _declare_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results", metavar="RESULTS", nargs="+", help="results.json of duels, .jsonl of bench_step.py")
    parser.add_argument("--html", metavar="FILE", help="one page that opens without a network")
    parser.add_argument("--markdown", metavar="FILE", help="the same table and verdict as Markdown")
    parser.set_defaults(run=_run_report)


def _run_report(arguments: argparse.Namespace) -> Result:
    from hf_lema.reporting.report_files import make_report

    report = make_report(arguments.results, html=arguments.html, markdown=arguments.markdown)
    return {"text": report.format(), **report.to_dict()}


def _declare_doctor(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--folder", metavar="FOLDER", help="whose disk is timed, by reading a file in it")
    parser.set_defaults(run=_run_doctor)


def _run_doctor(arguments: argparse.Namespace) -> Result:
    from hf_lema.machine.doctor import diagnose, exit_status, findings_as_dict, format_findings

    findings = diagnose(arguments.folder)
    return {"text": format_findings(findings), "exit_code": exit_status(findings), **findings_as_dict(findings)}


def _add_quantization(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--quantization", choices=("nf4",), help=what)
    parser.add_argument("--no-double-quantization", action="store_true", help="keep the scales of 4-bit blocks in fp32")


def _add_revision(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--revision", metavar="REVISION", help="branch, tag or commit on the hub")


def _where(arguments: argparse.Namespace) -> dict[str, Any]:
    return {} if arguments.revision is None else {"revision": arguments.revision}


def _add_trust(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--trust-remote-code", action="store_true", help="run model code that comes with the model")


def _as_json(result: Any) -> dict[str, Any]:
    return {key: str(value) if isinstance(value, Path) else value for key, value in dataclasses.asdict(result).items()}


COMMANDS: dict[str, tuple[str, str, Callable[[argparse.ArgumentParser], None]]] = {
    "plan": (
        "Say where the memory goes and how long a step takes, before anything is loaded: LEMA, stock PEFT and QLoRA.",
        "  hf-lema plan llama-2-7b --card T4 --ram 12.7GiB\n"
        "  hf-lema plan NousResearch/Llama-2-7b-hf --vram 16GiB --ram 29GiB --batch-size 8 --seq-len 512\n"
        "  hf-lema plan llama-2-7b --card T4 --ram 29GiB --num-processes 2",
        _declare_plan,
    ),
    "merge": (
        "Merge an adapter into its base model, a few tensors in memory at a time.",
        "  hf-lema merge --base NousResearch/Llama-2-7b-hf --adapter out/adapter --output out/merged\n"
        "  hf-lema merge --adapter out/adapter --output out/merged --dtype bfloat16 --push-to-hub me/my-model",
        _declare_merge,
    ),
    "pack": (
        "Write a model's decoder layers as a pack, or rewrite a model that is only .bin files as safetensors.",
        "  hf-lema pack mistralai/Mixtral-8x7B-v0.1 mixtral.lema.safetensors --dtype bfloat16\n"
        "  hf-lema pack deepseek-ai/deepseek-llm-7b-base deepseek-7b-safetensors\n"
        "  hf-lema pack NousResearch/Llama-2-7b-hf llama.nf4.lema.safetensors --quantization nf4",
        _declare_pack,
    ),
    "check": (
        "Train a few steps on random tokens and prove that streamed layers give what resident ones give.",
        "  hf-lema check NousResearch/Llama-2-7b-hf --dtype float16\n"
        "  hf-lema check mistralai/Mistral-7B-v0.1 --quantization nf4 --ram-budget min",
        _declare_check,
    ),
    "report": (
        "Show the results of duels and benches: the verdict, the table, and a page to look at.",
        "  hf-lema report duel-output/results.json --html report.html\n"
        "  hf-lema report recipes/results/h100-7b-fp16-c.jsonl --html h100.html --markdown h100.md",
        _declare_report,
    ),
    "doctor": (
        "Say what this machine has, what stands in the way of training on it, and what to do about it.",
        "  hf-lema doctor --folder ~/.cache/huggingface\n  hf-lema doctor --json",
        _declare_doctor,
    ),
}
"""Name -> what it does, examples, and the function that declares its arguments."""
