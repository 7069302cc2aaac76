"""The duel against others: what each is set up as, what it cannot do, several processes, and equal terms for all."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "recipes"))

import compare_peft  # noqa: E402
import contender  # noqa: E402
import contender_process  # noqa: E402
import contender_ranks  # noqa: E402
import contender_result  # noqa: E402
import contender_spec  # noqa: E402
import duel_options  # noqa: E402
import fairness  # noqa: E402
import training  # noqa: E402
from contender_process import Outcome  # noqa: E402
from contender_spec import ContenderSpec, load_contender  # noqa: E402
from sharded_parameters import is_released  # noqa: E402
from torch import nn  # noqa: E402
from training import adapter_sha256  # noqa: E402

from hf_lema.reporting.contender import ContenderResult  # noqa: E402

PEERS = ("fsdp2-offload", "deepspeed-zero3", "trainstream", "trainstream-auto")
GIB = 1 << 30
ADAMW = [{"lr": 1e-3, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0}]


def a_plan(**changed: Any) -> training.TrainingPlan:
    values = {"batch_size": 2, "max_steps": 3, "seed": 0, "lora_rank": 2, "learning_rate": 1e-3}
    return training.TrainingPlan(**({"precision": "fp32", "device_type": "cpu"} | values | changed))


def a_task(name: str, **changed: Any) -> contender.Task:
    values = {"model": "m", "dataset": "random", "seq_len": 16, "batch_size": 2, "max_steps": 3, "num_warmup_steps": 1}
    values |= {"lora_rank": 2, "learning_rate": 1e-3, "seed": 0, "device": "cpu", "vram_limit_bytes": None}
    return contender.Task(name=name, folder="f", **(values | changed))


def a_result(name: str = "peft", **fields: Any) -> ContenderResult:
    values = {"num_steps": 3, "num_warmup_steps": 1, "loss": (3.0, 2.0, 1.0), "step_s": (9.0, 1.0, 1.0)}
    values |= {"batches_sha256": "b", "num_trainable": 7}
    return ContenderResult(name=name, status="ok", **(values | fields))


def an_outcome(name: str = "peft", details: dict[str, Any] | None = None, **fields: Any) -> Outcome:
    shared = {"adapter_start_sha256": "s", "adapter_end_sha256": name, "precision": "fp16", "optimizer": ADAMW}
    result = a_result(name, **fields)
    return Outcome(result=result, details=shared | (details or {}), environment={}, wall_s=1.0)


# ---- what each peer is ----


def test_fsdp_arguments_become_fsdp2_with_the_parameters_on_the_host(tmp_path: Path) -> None:
    spec = load_contender("fsdp2-offload").for_device("cuda")
    plan = a_plan(**spec.training)
    plugin = training.training_arguments(plan, tmp_path, **spec.arguments).fsdp_plugin_args

    assert plugin is not None
    assert {"fsdp_version": 2, "cpu_offload": True, "activation_checkpointing": True}.items() <= plugin.items()
    assert plugin["reshard_after_forward"] is True
    assert not plan.gradient_checkpointing, "twice would recompute twice"


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_loads_its_model_on_the_host_and_says_what_its_reader_must_know(name: str) -> None:
    spec = load_contender(name)

    assert spec.model == {"device_map": None}
    assert spec.caveats
    assert spec.trainer or spec.distributed_type, "its row must not be that of stock PEFT"


def test_what_a_peer_cannot_do_is_a_row_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contender_spec, "_is_installed", lambda name: False)

    assert load_contender("fsdp2-offload").obstacles("cuda", 2) == []
    assert "a GPU" in load_contender("fsdp2-offload").obstacles("cpu", 1)[0]
    assert load_contender("deepspeed-zero3").obstacles("cpu", 2) == [
        "deepspeed is not installed: pip install deepspeed"
    ]
    alone, missing = load_contender("trainstream").obstacles("cuda", 2)
    assert "single process" in alone
    assert missing == 'trainstream is not installed: pip install "trainstream[hf]"'


def test_a_peer_without_fp16_trains_in_bf16_and_its_row_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    task = a_task("trainstream", precision="fp16")
    monkeypatch.setattr(contender, "precision_for", lambda device: "bf16")
    plan, notes = contender.training_plan(task, torch.device("cpu"))

    assert plan.precision == "bf16"
    assert notes == ["It cannot train in fp16 and trained in bf16: its losses are not those of the others."]
    assert contender.training_plan(a_task("trainstream", precision="bf16"), torch.device("cpu"))[1] == []
    monkeypatch.setattr(contender, "precision_for", lambda device: "fp16")
    with pytest.raises(ValueError, match="cannot train in fp16, and this card does not compute bf16"):
        contender.training_plan(task, torch.device("cpu"))


def test_a_row_never_claims_what_accelerate_has_passed_over(tmp_path: Path, tiny_llama: Any) -> None:
    spec = dataclasses.replace(load_contender("fsdp2-offload"), arguments={}, training={})
    task = a_task("fsdp2-offload", spec=dataclasses.asdict(spec))
    args = training.training_arguments(a_plan(), tmp_path)
    model = training.add_adapter(tiny_llama(), a_plan())
    ranks = contender_ranks.Ranks(rank=0, size=1, is_launched=False)
    with pytest.raises(RuntimeError, match="is to train by FSDP, but Accelerate trains by NO"):
        contender.make_trainer(task, ranks, model, [], args, contender.Trainer)


def test_a_streamed_contender_takes_a_budget_after_its_name() -> None:
    spec = load_contender("lema@6.36GiB")

    assert (spec.name, spec.lema["vram_budget"]) == ("lema@6.36GiB", "6.36GiB")
    assert load_contender("lema-nf4@auto").lema == {"vram_budget": "auto", "quantization": "nf4"}
    with pytest.raises(ValueError, match="only a streamed contender has a budget"):
        load_contender("peft@6GiB")
    with pytest.raises(ValueError, match="vram_budget"):
        load_contender("lema@plenty")


@pytest.mark.parametrize(
    ("text", "message"),
    [('{"cannot": {"moon": "fly"}}', "cannot has moon"), ('{"on_cpu": {"cannot": {}}}', "on_cpu sets cannot")],
)
def test_a_peer_that_says_what_is_not_known_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "mine.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_contender(str(tmp_path / "mine.json"))


# ---- equal terms ----


@pytest.mark.parametrize(
    ("fields", "details", "beware"),
    [
        ({"batches_sha256": "other"}, {}, "did not see the same batches"),
        ({"num_trainable": 8}, {}, "did not train the same number of parameters"),
        ({}, {"adapter_start_sha256": "other"}, "did not begin with the same adapter"),
        ({}, {"optimizer": [ADAMW[0] | {"weight_decay": 0.1}]}, "did not have the same optimizer settings"),
        ({}, {"vram_in_use_at_start_bytes": 9 * GIB}, "the card was not idle when lema began, 9.00 GiB were in use"),
        ({}, {"num_load_average_1_min": 1e6}, "the processor was not idle"),
    ],
)
def test_whatever_is_not_equal_between_contenders_is_said(
    fields: dict[str, Any], details: dict[str, Any], beware: str
) -> None:
    assert not any("BEWARE" in sentence for sentence in fairness.check_same([an_outcome(), an_outcome("lema")]))
    sentences = fairness.check_same([an_outcome(), an_outcome("lema", details, **fields)])
    assert [beware in sentence for sentence in sentences if sentence.startswith("BEWARE")] == [True]


def test_one_that_had_to_take_another_precision_is_not_said_to_begin_with_another_adapter() -> None:
    other = an_outcome("trainstream", {"precision": "bf16", "adapter_start_sha256": "rounded"})
    sentences = fairness.check_same([an_outcome(), an_outcome("lema"), other])
    assert "All that trained in one precision began with the same adapter, bit for bit." in sentences


def test_optimizer_settings_are_read_from_the_optimizer_that_trained(tmp_path: Path, tiny_llama: Any) -> None:
    model = training.add_adapter(tiny_llama(), a_plan())
    optimizer = training.stock_trainer(model, a_plan(), [], tmp_path, training.LogCallback())[0].create_optimizer()
    facts = contender_result.optimizer_facts(optimizer)

    assert [(group["lr"], group["weight_decay"]) for group in facts] == [(1e-3, 0.0)]
    optimizer.param_groups[0]["eps"] = 1.0
    assert len(contender_result.optimizer_facts(optimizer)) == len(optimizer.param_groups) > 1


def test_the_hash_of_an_adapter_is_the_same_under_a_wrapper_that_recomputes(tiny_llama: Any) -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = training.add_adapter(tiny_llama(), a_plan())
    before = training.adapter_sha256(model)
    layers = model.get_base_model().model.layers
    layers[0] = checkpoint_wrapper(layers[0])
    assert training.adapter_sha256(model) == before


# ---- several processes ----


def test_the_figures_of_all_processes_are_those_of_the_group() -> None:
    first = a_result(
        tokens_per_s=10.0,
        ram_private_above_imports_peak_bytes=5 * GIB,
        ram_resident_above_imports_peak_bytes=6 * GIB,
        vram_allocated_peak_bytes=3,
        h2d_bytes=(1, 2, 3),
    )
    second = dataclasses.replace(
        first, step_s=(1.0, 2.0, 1.0), tokens_per_s=20 / 3, vram_allocated_peak_bytes=4, batches_sha256="c"
    )
    group = contender_ranks.merge_ranks([first, second], [2 * GIB, 2 * GIB])

    assert group.step_s == (9.0, 2.0, 1.0)
    assert group.tokens_per_s == pytest.approx((20 + 20) / 3)
    assert group.ram_private_above_imports_peak_bytes == 6 * GIB  # 5 + 5, less one of two copies of 4 that are shared
    assert group.ram_resident_above_imports_peak_bytes == 7 * GIB
    assert group.vram_allocated_peak_bytes == 4
    assert group.h2d_bytes == (2, 4, 6)
    assert group.batches_sha256 not in ("b", "c")
    assert group.notes == ()


def test_where_the_kernel_does_not_tell_shares_the_row_says_that_memory_is_counted_twice(tmp_path: Path) -> None:
    assert contender_ranks.repeated_shmem_bytes(tmp_path / "none") is None
    group = contender_ranks.merge_ranks([a_result(), a_result()], [None, None])
    assert "counted once for each" in group.notes[0]


def test_shared_memory_is_counted_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from hf_lema.measuring import telemetry

    held = telemetry.ProcessMemory(rss_bytes=9 << 20, anon_bytes=1 << 20, shmem_bytes=8 << 20, file_bytes=0)
    monkeypatch.setattr(telemetry, "read_process_memory", lambda: held)
    (tmp_path / "smaps_rollup").write_text("00-ff ---p [rollup]\nRss: 9216 kB\nPss_Shmem:       4096 kB\n")
    assert contender_ranks.repeated_shmem_bytes(tmp_path / "smaps_rollup") == 4 << 20


def test_a_process_that_the_launcher_lost_is_a_row_with_its_own_error() -> None:
    launcher = "torch.distributed.elastic.multiprocessing.errors.ChildFailedError:\n"
    log = "[rank1]: Traceback\n[rank1]: ValueError: no such layer\n" + launcher
    assert contender_process.failed_result("x", 1, log, []).reason == "exit code 1: ValueError: no such layer"
    killed = contender_process.failed_result("x", 1, launcher + "  exitcode  : -9 (pid: 17)\n", [])
    assert (killed.status, "killed from outside" in killed.reason) == ("out_of_memory", True)


def test_each_process_gets_a_gpu_and_a_launcher_is_used_only_where_it_is_needed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    alone = {"name": "peft", "device": "cuda", "spec": dataclasses.asdict(load_contender("peft"))}
    launched = alone | {"spec": dataclasses.asdict(load_contender("deepspeed-zero3"))}

    assert contender_process._launcher(alone) == [sys.executable]
    assert contender_process._launcher(alone | {"num_processes": 2})[-1] == "2"
    assert "torch.distributed.run" in contender_process._launcher(launched)
    assert contender_process._environment(alone | {"num_processes": 2})["CUDA_VISIBLE_DEVICES"] == "0,1"
    assert contender_process._environment(alone)["CUDA_VISIBLE_DEVICES"] == "0"
    assert contender_process._environment(launched | {"device": "cpu"})["DS_ACCELERATOR"] == "cpu"
    assert "DS_ACCELERATOR" not in contender_process._environment(launched)


# ---- the time that there is, and the dry run ----


def test_a_duel_that_runs_out_of_time_says_which_runs_are_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 100_000, 61))
    limits: list[float] = []

    def run(task: dict[str, Any], show: Any, limit_s: float) -> Outcome:
        limits.append(limit_s)
        return an_outcome(task["name"])

    monkeypatch.setattr(compare_peft.time, "monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(compare_peft, "run_contender", run)
    monkeypatch.setattr(compare_peft, "environment_apart", lambda: {"torch_version": "2"})
    source = compare_peft.ModelSource(name_or_path="m", label="m")
    options = ["--contenders", "peft,lema,lema-auto", "--device", "cpu", "--output-dir", str(tmp_path)]
    args = duel_options.parse_arguments([*options, "--time-s", "150", "--limit-s", "100"])

    outcomes = compare_peft.run_duel(args, source)
    assert [found.result.status for found in outcomes] == ["ok", "skipped", "skipped"]
    assert outcomes[1].result.reason == compare_peft.OUT_OF_TIME
    assert limits == [89], "what was left of 150 s, not the 100 s of a contender"
    again = compare_peft.run_duel(args, source)
    assert [found.result.status for found in again] == ["ok", "ok", "skipped"]


@pytest.mark.parametrize("options", [["--scenario", "t4-7b"], ["--scenario", "smollm"], ["--model", "some/7b-nf4"], []])
def test_a_dry_run_fetches_nothing_whatever_the_model(options: list[str]) -> None:
    args = duel_options.parse_arguments([*options, "--dry-run", "--device", "cpu"])
    assert (args.model, args.dataset) == ("shape:tiny", "random")


@pytest.mark.parametrize("name", [n for n in duel_options.known_scenarios() if n.startswith(("7b", "70b"))])
def test_a_scenario_leaves_no_contender_out_for_want_of_time_and_can_be_rehearsed_without_a_gpu(name: str) -> None:
    args = duel_options.parse_arguments(["--scenario", name, "--dry-run", "--device", "cpu"])

    assert args.time_s is None
    assert args.limit_s < 300
    assert {"lema", "lema-nf4"} & {spec.name for spec in args.contenders}
    assert args.model in ("shape:tiny", "shape:tiny-nf4")
    assert (args.precision, args.vram_limit) == (None, None)
    assert args.batch_size * args.seq_len <= 32


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(duel_options, "_choose_device", lambda wanted, parser: "cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(SystemExit):
        duel_options.parse_arguments(["--num-processes", "2"])
    assert "--num-processes 2 needs a GPU for each, torch sees 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("device", "options", "message"),
    [
        ("cuda", ["--gpus", "0,0"], "0,0 is no list of cards such as 0,1, each once"),
        ("cuda", ["--gpus", "all"], "all is no list of cards"),
        ("cuda", ["--gpus", "0,1", "--num-processes", "2"], "--gpus gives each contender one GPU"),
        ("cpu", ["--gpus", "0"], "it needs GPUs"),
    ],
)
def test_cards_that_cannot_be_shared_out_are_refused(
    device: str, options: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(duel_options, "_choose_device", lambda wanted, parser: device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(SystemExit):
        duel_options.parse_arguments(options)
    assert message in capsys.readouterr().err


def test_the_command_of_a_duel_on_several_cards_names_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duel_options, "_choose_device", lambda wanted, parser: "cuda")
    args = duel_options.parse_arguments(["--gpus", "2,3"])
    assert args.gpus == ["2", "3"]
    command = duel_options.command_of(args)
    assert command.endswith(" --gpus 2,3")
    assert duel_options.command_of(duel_options.parse_arguments(command.split()[2:])) == command


# ---- end to end ----


def duel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The record and its rows by name, of a dry run in this folder."""
    monkeypatch.setenv("HF_LEMA_CACHE", str(tmp_path / "cache"))
    common = ["--model", "shape:tiny", "--dataset", "random", "--dry-run", "--output-dir", str(tmp_path)]
    assert compare_peft.main([*common, *options]) == 0
    record = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    return record, {row["name"]: row for row in record["contenders"]}


@pytest.mark.integration
@pytest.mark.timeout(300)
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="a core for each of two contenders")
@pytest.mark.usefixtures("children_find_the_package")
def test_contenders_that_run_at_the_same_time_have_cores_of_their_own_and_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parse = compare_peft.parse_arguments

    def with_cards(argv: list[str] | None) -> Any:  # a processor takes the place of the cards
        args = parse(argv)
        args.gpus = ["0", "1"]
        return args

    monkeypatch.setattr(compare_peft, "parse_arguments", with_cards)
    rare = tmp_path / "rare.json"
    rare.write_text('{"needs": {"no-such-package": "pip install it"}}', encoding="utf-8")
    options = ("--device", "cpu", "--contenders", f"peft,lema,{rare}")
    record, rows = duel(tmp_path, monkeypatch, *options)

    assert [row["status"] for row in record["contenders"]] == ["ok", "ok", "skipped"]
    assert rows["peft"]["loss"] == rows["lema"]["loss"]
    assert record["environment"]["num_cpus_usable"] == len(os.sched_getaffinity(0)) // 2
    assert record["remarks"][-1].startswith("BEWARE: 2 contenders ran at the same time, each alone on a card")
    again, _ = duel(tmp_path, monkeypatch, *options)
    assert again["contenders"][:2] == record["contenders"][:2]
    monkeypatch.setattr(compare_peft, "parse_arguments", parse)
    alone, _ = duel(tmp_path, monkeypatch, *options)
    assert alone["environment"]["num_cpus_usable"] == len(os.sched_getaffinity(0)), "runs beside others do not count"
    assert not any("at the same time" in remark for remark in alone["remarks"])


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("children_find_the_package")
def test_two_processes_of_each_contender_train_alike_and_share_one_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("bitsandbytes")
    names = "peft,qlora,lema,lema-auto"
    record, rows = duel(tmp_path, monkeypatch, "--num-processes", "2", "--device", "cpu", "--contenders", names)

    assert {name: row["status"] for name, row in rows.items()} == dict.fromkeys(names.split(","), "ok")
    assert rows["lema"]["loss"] == rows["lema-auto"]["loss"] == rows["peft"]["loss"]
    assert len({row["batches_sha256"] for row in rows.values()}) == 1
    ends = {name: row["details"]["adapter_end_sha256"] for name, row in rows.items()}
    assert ends["lema"] == ends["lema-auto"] == ends["peft"] != ends["qlora"]
    assert rows["lema-auto"]["details"]["tier"] == "ram"
    for row in rows.values():
        private = row["details"]["rank_ram_private_above_imports_peak_bytes"]
        assert len(private) == 2
        assert max(private) <= row["ram_private_above_imports_peak_bytes"] <= sum(private)
        assert row["tokens_per_s"] > max(row["details"]["rank_tokens_per_s"])
    # The slab lies in both processes and counts once, so the group holds less than its processes do one by one.
    auto = rows["lema-auto"]
    saved = sum(auto["details"]["rank_ram_private_above_imports_peak_bytes"])
    assert saved - auto["ram_private_above_imports_peak_bytes"] >= 0.9 * 6 * auto["details"]["layer_bytes"]
    assert record["settings"]["num_processes"] == 2
    assert "--num-processes 2" in record["command"]
    assert "2 processes" in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("children_find_the_package")
def test_deepspeed_trains_the_same_batches_with_the_same_optimizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if missing := load_contender("deepspeed-zero3").missing_packages():
        pytest.skip("; ".join(missing))
    _, rows = duel(tmp_path, monkeypatch, "--device", "cpu", "--contenders", "peft,deepspeed-zero3")
    peer, peft = rows["deepspeed-zero3"], rows["peft"]

    assert peer["details"]["distributed_type"] == "DEEPSPEED"
    assert peer["loss"] == pytest.approx(peft["loss"], rel=1e-6)
    assert (peer["batches_sha256"], peer["num_trainable"]) == (peft["batches_sha256"], peft["num_trainable"])
    assert peer["details"]["optimizer"] == peft["details"]["optimizer"]
    assert peer["details"]["adapter_start_sha256"] == peft["details"]["adapter_start_sha256"]
    assert peer["details"]["adapter_end_sha256"] != peft["details"]["adapter_start_sha256"]


@pytest.mark.gpu
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", PEERS)
@pytest.mark.usefixtures("children_find_the_package")
def test_a_peer_trains_on_a_gpu_the_same_batches_as_peft(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if missing := load_contender(name).missing_packages():
        pytest.skip("; ".join(missing))
    options = ["--device", "cuda", "--precision", "fp16", "--contenders", f"peft,{name}"]
    _, rows = duel(tmp_path, monkeypatch, *options)

    assert rows[name]["status"] == "ok", rows[name]["reason"]
    assert rows[name]["batches_sha256"] == rows["peft"]["batches_sha256"]
    assert rows[name]["num_trainable"] == rows["peft"]["num_trainable"]
    assert rows[name]["details"]["optimizer"] == rows["peft"]["details"]["optimizer"]
    assert rows[name]["loss"] == pytest.approx(rows["peft"]["loss"], rel=0.02)


def test_every_contender_of_a_scenario_is_one_of_a_file() -> None:
    for name in duel_options.known_scenarios():
        values = json.loads((duel_options.SCENARIO_FOLDER / f"{name}.json").read_text(encoding="utf-8"))
        assert all(isinstance(load_contender(each), ContenderSpec) for each in values.get("contenders", ()))


def test_an_adapter_that_a_peer_has_on_the_host_is_read_from_its_state_dict() -> None:
    there = nn.Linear(3, 2)
    away = copy.deepcopy(there)
    values = {name: value.clone() for name, value in away.state_dict().items()}
    away.weight.untyped_storage().resize_(0)
    away.register_state_dict_post_hook(lambda module, state, prefix, meta: state.update(values))

    assert [is_released(parameter) for parameter in away.parameters()] == [True, False]
    assert adapter_sha256(away) == adapter_sha256(there)
