"""JSON lines of ``bench_step.py`` and ``bench_group.py`` as results of contenders, grouped to duels.

Responsibility: these forms of file. A line is one contender on a random model of a named shape, or a line with several
of such: one process alone, and each of several. Lines that share shape, batch and machine stood side by side.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from hf_lema.reporting.contender import ContenderResult
from hf_lema.reporting.repeats import merge_runs

# Options that say how a contender was set up; the others say what the job was.
_SET_UP = ("contender", "vram_budget", "ram_budget", "num_slots", "micro_batch_size", "tier", "cold", "choices")
# These say how long it was looked at, or where its files lay.
_NOT_THE_JOB = ("steps", "warmup", "output", "commit", "checkpoint_dir", "host_counters")
_NAMED = {
    "tier": "{}",
    "choices": "{}",
    "vram_budget": "{}",
    "ram_budget": "RAM {}",
    "num_slots": "{} slots",
    "micro_batch_size": "micro-batch {}",
}
# Whether boundary activations are, and whether embedding and head are.
_OFF_THE_CARD = {
    (False, False): "layers off",
    (True, False): "boundaries off",
    (False, True): "embedding and head off",
    (True, True): "all off",
}
_LAYERS = {"resident_layers": "resident", "kept_layers": "kept"}
STREAMED = "lema"
"""A streamed contender has a name that begins so; it is set up in more ways than one."""
_LINE_KEYS = ("options", "step_s", "loss", "environment")


def read_bench_lines(text: str) -> list[dict[str, Any]]:
    """The fields of a `DuelRecord`, but for its title, for each job in the text of a file.

    Raises:
        ValueError: A line is not of this form; all such lines are numbered.
    """
    jobs: dict[str, list[dict[str, Any]]] = {}
    faults = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            faults.append(f"line {number} is no JSON")
            continue
        for part in [row["alone"], *row["ranks"]] if isinstance(row, dict) and "ranks" in row else [row]:
            missing = [key for key in _LINE_KEYS if not isinstance(part, dict) or key not in part]
            if missing:
                faults.append(f"line {number} has no {', '.join(missing)}")
                break
            job = _job(part["options"])
            machine = {name: value for name, value in part["environment"].items() if name != "time_utc"}
            jobs.setdefault(json.dumps([job, machine], sort_keys=True), []).append(part)
    if faults:
        raise ValueError(f"no lines of bench_step.py: {'; '.join(faults)}")
    return [_duel_fields(rows) for rows in jobs.values()]


def way_to_run(options: Mapping[str, Any]) -> str | None:
    """The way to run that the options ask for instead of a budget, in a few words; None where a plan decides.

    "all off" keeps boundary activations, embedding and head off the card, "layers off" nothing but the layers.
    """
    if options.get("choices") is None:
        return None
    choices = json.loads(options["choices"])
    size, at_once = choices.get("micro_batch_size", 0), choices.get("forward_micro_batch_size", 0)
    parts = [f"micro-batches of {size}" if size else "whole batches"]
    parts += [f"forward of {at_once}"] if at_once else []
    parts += [f"tiles of {choices['tile_tokens']}"] if choices.get("tile_tokens") else []
    off = (bool(choices.get("boundaries_in_ram")), bool(choices.get("outside_in_ram")))
    parts.append(_OFF_THE_CARD[off])
    parts += [f"{len(choices[name])} {word}" for name, word in _LAYERS.items() if choices.get(name)]
    return ", ".join(parts)


def _job(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in _SET_UP + _NOT_THE_JOB}


def _duel_fields(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    job = _job(rows[0]["options"])
    shape = f"{job['shape']} shape" + (f", {job['num_layers']} layers" if job.get("num_layers") else "")
    settings = {"model": f"{shape} (random weights)", "precision": job["dtype"]} | job
    settings["vram_limit_bytes"] = job.get("vram_limit")
    varied = _varied([row["options"] for row in rows])
    return {
        "settings": settings,
        "environment": rows[0]["environment"],
        "results": merge_runs([_result(row, varied) for row in rows]),
        "commands": tuple(dict.fromkeys(_command(row["options"]) for row in rows)),
    }


def _varied(options: Sequence[Mapping[str, Any]]) -> dict[str, set[str]]:
    """What differs between the rows of a streamed contender."""
    return {
        contender: {
            name for name in _NAMED if len({str(row.get(name)) for row in options if row["contender"] == contender}) > 1
        }
        for contender in {row["contender"] for row in options}
        if contender.startswith(STREAMED)
    }


def _name(options: Mapping[str, Any], varied: Mapping[str, set[str]]) -> str:
    contender = str(options["contender"])
    if contender not in varied:
        return contender
    way = way_to_run(options)
    said = dict(options) | {"choices": way} | ({} if way is None else {"vram_budget": None})
    parts = [text.format(said[name]) for name, text in _NAMED.items() if name in varied[contender] and said.get(name)]
    parts += ["cold"] if options.get("cold") else []
    return " ".join([contender, *parts])


def _result(row: Mapping[str, Any], varied: Mapping[str, set[str]]) -> ContenderResult:
    options, step_s = row["options"], row["step_s"]
    timed_s = sum(step_s[options["warmup"] :])
    num_tokens = options["batch_size"] * options["seq_len"] * (len(step_s) - options["warmup"])
    num_processes = row.get("num_processes", 1)
    which = f" process {row['rank'] + 1} of {num_processes}" if num_processes > 1 else ""
    return ContenderResult(
        name=_name(options, varied) + which,
        status="ok",
        num_steps=len(step_s),
        num_warmup_steps=options["warmup"],
        loss=[float(loss) for loss in row["loss"]],
        step_s=step_s,
        tokens_per_s=num_tokens / timed_s if timed_s > 0 else None,
        vram_allocated_peak_bytes=row.get("vram_allocated_peak_bytes"),
        vram_reserved_peak_bytes=row.get("vram_reserved_peak_bytes"),
        vram_process_peak_bytes=row.get("vram_process_peak_bytes"),
        ram_private_above_imports_peak_bytes=row.get("ram_private_above_baseline_peak_bytes"),
        ram_file_peak_bytes=row.get("ram_file_peak_bytes"),
        h2d_bytes=row.get("h2d_bytes", ()),
        disk_bytes=row.get("disk_bytes", ()),
        wait_s=sum(row["wait_s"]) if row.get("wait_s") else None,
        batches_sha256=row.get("batches_sha256"),
        num_trainable=row.get("num_trainable"),
    )


def _command(options: Mapping[str, Any]) -> str:
    words = ["python", "recipes/bench_step.py"]
    for name, value in options.items():
        if name in ("output", "checkpoint_dir"):
            continue
        flag = "--" + name.replace("_", "-")
        if value is True:
            words.append(flag)
        elif value not in (None, False):
            words += [flag, str(value)]
    return shlex.join(words)
