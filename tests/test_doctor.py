"""The doctor: each machine that users come with, by its answers; and this machine, asked in earnest."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement

from hf_lema.machine.doctor import Finding, diagnose, exit_status, findings_as_dict, format_findings
from hf_lema.machine.machine_facts import Card, MachineFacts, PackageFact, has_kernels, package_fact, probe_machine
from hf_lema.machine.machine_rates import DiskRead, LockTry, read_rate
from hf_lema.units import GIB, KIB, MIB

CUDA_126 = ("sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90")
CUDA_128 = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120")
H100 = Card(name="H100", capability=(9, 0), total_bytes=80 * GIB, free_bytes=79 * GIB, is_bf16_claimed=True)
P100 = Card(name="Tesla P100", capability=(6, 0), total_bytes=16 * GIB, free_bytes=16 * GIB, is_bf16_claimed=True)
T4 = Card(name="Tesla T4", capability=(7, 5), total_bytes=15 * GIB, free_bytes=15 * GIB, is_bf16_claimed=True)


def package(name: str, installed: str | None = "9.9", fits: bool = True) -> PackageFact:
    return PackageFact(name=name, requirement=f"{name}>=1", installed=installed, fits=fits)


def machine(**answers: Any) -> MachineFacts:
    """A good machine with an H100, and what differs from it."""
    good: dict[str, Any] = {
        "packages": (package("torch"), package("transformers")),
        "extras": {"qlora": (package("bitsandbytes"),), "report": (package("plotly"),)},
        "torch_version": "2.11.0+cu128",
        "arch_list": CUDA_128,
        "num_gpus": 1,
        "has_nvidia_device": True,
        "card": H100,
        "memlock_limit_bytes": None,
        "page_lock_try": LockTry(num_bytes=256 * MIB, is_allowed=True),
        "bus_bytes_per_s": 55e9,
        "disk": None,
        "ram_available_bytes": 100 * GIB,
        "ram_limit_bytes": 128 * GIB,
        "ram_total_bytes": 128 * GIB,
        "shm_bytes": 64 * GIB,
    }
    return MachineFacts(**(good | answers))


NO_GPU: dict[str, Any] = {
    "arch_list": (),
    "num_gpus": 0,
    "has_nvidia_device": False,
    "card": None,
    "page_lock_try": None,
    "bus_bytes_per_s": None,
    "memlock_limit_bytes": 8 * MIB,
}


def complaints(facts: MachineFacts) -> dict[str, Finding]:
    return {finding.topic: finding for finding in diagnose(facts=facts) if finding.level != "ok"}


def test_a_good_machine_gets_no_complaint_and_each_topic_is_told() -> None:
    findings = diagnose(facts=machine())

    assert complaints(machine()) == {}
    assert exit_status(findings) == 0
    assert format_findings(findings).endswith("\n\nnothing to complain of")
    topics = [finding.topic for finding in findings]
    assert topics[-7:] == ["GPU", "kernels", "bf16", "page-lock", "bus", "RAM", "shm"]


def test_without_a_gpu_training_is_said_to_run_on_the_cpu_and_that_is_no_problem() -> None:
    facts = machine(**NO_GPU)

    assert list(complaints(facts)) == ["GPU"]
    assert "runs on the CPU" in complaints(facts)["GPU"].found
    assert exit_status(diagnose(facts=facts)) == 0
    assert "bus" not in [finding.topic for finding in diagnose(facts=facts)]


def test_a_gpu_that_torch_does_not_see_is_a_problem() -> None:
    facts = machine(**(NO_GPU | {"has_nvidia_device": True, "torch_version": "2.13.0+cpu"}))

    assert complaints(facts)["GPU"].level == "problem"
    assert "torch 2.13.0+cpu sees none" in complaints(facts)["GPU"].found
    assert exit_status(diagnose(facts=facts)) == 1


def test_a_p100_without_kernels_in_torch_is_a_problem_with_the_build_that_has_them() -> None:
    found = complaints(machine(card=P100))

    assert found["kernels"].level == "problem"
    assert "none for sm_60; it has sm_75" in found["kernels"].found
    assert "CUDA 12.6" in found["kernels"].remedy
    assert found["bf16"].level == "warning"
    assert exit_status(diagnose(facts=machine(card=P100))) == 1
    assert "kernels" not in complaints(machine(card=P100, arch_list=CUDA_126))


def test_a_t4_that_emulates_bf16_is_told_to_use_fp16() -> None:
    found = complaints(machine(card=T4))

    assert list(found) == ["bf16"]
    assert found["bf16"].level == "warning"
    assert "torch emulates it" in found["bf16"].found
    assert "fp16=True" in found["bf16"].remedy


def test_a_card_older_than_bitsandbytes_4_bit_kernels_is_told_so() -> None:
    gtx_980 = dataclasses.replace(P100, name="GeForce GTX 980", capability=(5, 2))
    found = complaints(machine(card=gtx_980, arch_list=CUDA_126))

    assert list(found) == ["bf16", "4 bits"]
    assert "below capability 6.0; this card has 5.2" in found["4 bits"].found
    assert "4 bits" not in complaints(machine(card=P100))


def test_wsl_with_a_lock_limit_of_64_kib_is_warned_where_cuda_refuses_and_not_where_it_locks() -> None:
    refused = LockTry(num_bytes=256 * MIB, is_allowed=False)
    found = complaints(machine(memlock_limit_bytes=64 * KIB, page_lock_try=refused, bus_bytes_per_s=None))
    assert list(found) == ["page-lock"]
    assert "could not lock 256.00 MiB (a limit of 64.00 KiB)" in found["page-lock"].found
    assert "ulimit -l unlimited" in found["page-lock"].remedy
    assert ".wslconfig" in found["page-lock"].remedy

    assert complaints(machine(memlock_limit_bytes=64 * KIB)) == {}


def test_a_control_group_of_colab_is_what_counts_as_ram() -> None:
    facts = machine(ram_available_bytes=int(11.2 * GIB), ram_limit_bytes=int(12.7 * GIB), ram_total_bytes=64 * GIB)
    (finding,) = [finding for finding in diagnose(facts=facts) if finding.topic == "RAM"]

    assert finding.level == "ok"
    assert "11.20 GiB free of 12.70 GiB that this control group may have (64.00 GiB in the machine)" in finding.found
    assert "will be read from disk" in finding.found
    assert complaints(machine(ram_available_bytes=2 * GIB))["RAM"].level == "warning"


def test_a_package_that_is_missing_or_too_old_is_a_problem_and_one_of_an_extra_a_warning() -> None:
    packages = (package("torch", "2.1", fits=False), package("peft", None, fits=False))
    facts = machine(packages=packages, extras={"qlora": (package("bitsandbytes", None, fits=False),)})
    found = complaints(facts)

    assert found["torch"].found == "2.1; hf_lema asks for torch>=1"
    assert found["peft"].found.startswith("not installed")
    assert found["peft"].remedy == 'pip install "peft>=1"'
    assert (found["torch"].level, found["peft"].level, found["[qlora]"].level) == ("problem", "problem", "warning")
    assert 'pip install "hf_lema[qlora]"' in found["[qlora]"].remedy


@pytest.mark.parametrize(
    ("answers", "topic", "words"),
    [
        ({"num_gpus": 2}, "GPUs", "CUDA_VISIBLE_DEVICES=0"),
        ({"bus_bytes_per_s": 3e9}, "bus", "slot of full width"),
        ({"shm_bytes": 64 * MIB}, "shm", "--shm-size"),
        (
            {"disk": DiskRead(file_name="m", num_bytes=GIB, bytes_per_s=1e8, resident_fraction=0.0)},
            "disk",
            "local SSD",
        ),
    ],
)
def test_what_makes_training_slow_is_a_warning_with_a_remedy(answers: dict[str, Any], topic: str, words: str) -> None:
    found = complaints(machine(**answers))

    assert list(found) == [topic]
    assert found[topic].level == "warning"
    assert words in found[topic].remedy


def test_a_rate_from_the_page_cache_is_called_that() -> None:
    disk = DiskRead(file_name="model.safetensors", num_bytes=GIB, bytes_per_s=9e9, resident_fraction=1.0)
    (finding,) = [finding for finding in diagnose(facts=machine(disk=disk)) if finding.topic == "disk"]

    assert "100 % of it from the page cache" in finding.found


def test_findings_are_counted_below_the_text_and_in_json() -> None:
    findings = diagnose(facts=machine(card=P100))
    text = format_findings(findings)

    assert text.endswith("\n\n1 problem, 1 warning")
    assert "PROBLEM  kernels" in text
    as_dict = json.loads(json.dumps(findings_as_dict(findings)))
    assert (as_dict["num_problems"], as_dict["num_warnings"]) == (1, 1)
    assert as_dict["findings"][0] == {"level": "ok", "topic": "torch", "found": "9.9", "remedy": ""}


@pytest.mark.parametrize(
    ("arch_list", "capability", "is_supported"),
    [
        (("sm_80",), (8, 6), True),  # binary code runs on a later minor of its major
        (("sm_86",), (8, 0), False),
        (("sm_80",), (9, 0), False),
        (("compute_80",), (9, 0), True),  # PTX runs on anything later
        (("compute_90",), (8, 9), False),
        (("sm_90a",), (9, 0), True),
        (("sm_100a",), (10, 3), False),  # code with a letter runs on its own card alone
        (("sm_120",), (12, 0), True),
        ((), (8, 0), False),
    ],
)
def test_kernels_are_there_by_the_rules_of_cuda(
    arch_list: tuple[str, ...], capability: tuple[int, int], is_supported: bool
) -> None:
    assert has_kernels(arch_list, capability) is is_supported


def test_a_requirement_is_met_by_a_version_in_range_and_by_a_later_build_from_source(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: "2.5.0.dev0")
    assert package_fact(Requirement("torch>=2.4")).fits
    assert not package_fact(Requirement("torch>=2.5")).fits
    monkeypatch.undo()
    missing = package_fact(Requirement("no-such-package-anywhere>=1"))
    assert (missing.installed, missing.fits) == (None, False)


def test_reading_a_file_gives_a_rate_and_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "small.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(bytes(20 * MIB))
    read = read_rate(tmp_path)

    assert (read.file_name, read.num_bytes) == ("model.safetensors", 20 * MIB)
    assert read.bytes_per_s > 0
    assert read.resident_fraction == 1.0, "just written, so in the page cache"
    assert {path.name for path in tmp_path.iterdir()} == {"small.json", "model.safetensors"}


def test_a_folder_without_a_file_to_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no file below .* has 16 MiB"):
        read_rate(tmp_path)
    with pytest.raises(ValueError, match="is no folder"):
        read_rate(tmp_path / "nowhere")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the answers of a machine without a GPU")
def test_this_machine_can_be_asked() -> None:
    facts = probe_machine()

    assert {"torch", "transformers", "peft"} <= {fact.name for fact in facts.packages}
    assert all(fact.fits for fact in facts.packages)
    assert list(facts.extras) == ["qlora", "report", "demo"]
    assert "bitsandbytes" in [fact.name for fact in facts.extras["qlora"]]
    assert (facts.card, facts.page_lock_try, facts.bus_bytes_per_s) == (None, None, None)
    assert 0 < facts.ram_available_bytes <= facts.ram_limit_bytes <= facts.ram_total_bytes
    assert diagnose(facts=dataclasses.replace(facts))


@pytest.mark.gpu
def test_this_gpu_is_asked_tried_and_left_as_it_was() -> None:
    before_bytes = torch.cuda.memory_allocated()
    facts = probe_machine()

    assert facts.card is not None
    assert facts.card.capability == torch.cuda.get_device_capability(0)
    assert has_kernels(facts.arch_list, facts.card.capability)
    assert facts.page_lock_try is not None
    if facts.page_lock_try.is_allowed:
        assert facts.bus_bytes_per_s is not None
        assert facts.bus_bytes_per_s > 1e9
    assert torch.cuda.memory_allocated() == before_bytes
