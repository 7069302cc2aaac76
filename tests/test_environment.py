"""The record of where a figure was measured."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_lema import environment
from hf_lema.units import GIB, MIB

UNIT = re.compile(r"^num_|_(bytes|gib|s|unitless)$")


def test_the_environment_names_what_a_reader_needs() -> None:
    record = environment.environment_record()
    assert record["torch_version"] == torch.__version__
    assert record["python_version"] == sys.version.split()[0]
    for name in ("transformers_version", "peft_version", "accelerate_version", "platform", "cpu_model"):
        assert record[name]
    assert record["num_cpus"] >= record["num_cpus_usable"] >= 1  # type: ignore[operator]
    assert record["ram_limit_bytes"] > GIB  # type: ignore[operator]
    assert "bitsandbytes_version" in record
    numbers = [key for key, value in record.items() if isinstance(value, int) and not isinstance(value, bool)]
    assert [key for key in numbers if not UNIT.search(key)] == []
    json.dumps(record)


def test_the_environment_names_no_host_user_or_path() -> None:
    text = json.dumps(environment.environment_record())
    assert os.uname().nodename not in text or len(os.uname().nodename) < 4
    assert str(Path.home()) not in text
    assert str(Path(environment.__file__).parent) not in text


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=n", "-c", "user.email=e"]
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True)


def test_the_commit_is_named_and_a_change_makes_it_dirty(tmp_path: Path) -> None:
    package = tmp_path / "hf_lema"
    package.mkdir()
    unknown = {"git_commit": None, "git_dirty": None}
    assert environment._git_record(package) == unknown  # no checkout
    git(tmp_path, "init")
    assert environment._git_record(package) == unknown  # no commit
    (package / "units.py").write_text("GIB = 2**30\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "first")
    clean = environment._git_record(package)
    assert re.fullmatch("[0-9a-f]{40}", str(clean["git_commit"]))
    assert clean["git_dirty"] is False
    results = tmp_path / "recipes" / "results"
    results.mkdir(parents=True)
    (results / "duel.json").write_text("{}")
    assert environment._git_record(package) == clean  # a result is no change of the code
    (package / "units.py").write_text("GIB = 10**9\n")
    assert environment._git_record(package) == clean | {"git_dirty": True}


def test_another_projects_checkout_around_the_package_is_not_its_commit(tmp_path: Path) -> None:
    package = tmp_path / "site-packages" / "hf_lema"
    package.mkdir(parents=True)
    git(tmp_path, "init")
    git(tmp_path, "commit", "--allow-empty", "-m", "theirs")
    assert environment._git_record(package) == {"git_commit": None, "git_dirty": None}


def test_a_machine_without_git_has_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment._git(tmp_path, "status") is None


def test_ram_is_the_control_groups_where_that_is_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit, unlimited = tmp_path / "limit", tmp_path / "max"
    limit.write_text(f"{100 * MIB}\n")
    unlimited.write_text("max\n")
    monkeypatch.setattr(environment, "_CGROUP_LIMITS", (tmp_path / "absent", unlimited))
    assert environment.ram_limit_bytes() > GIB
    monkeypatch.setattr(environment, "_CGROUP_LIMITS", (unlimited, limit))
    assert environment.ram_limit_bytes() == 100 * MIB


def test_the_driver_version_is_read_from_the_kernel_modules_line(tmp_path: Path) -> None:
    line = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.159.04  Thu Jan  1 00:00:00 UTC 2026\nGCC version: 12\n"
    (tmp_path / "version").write_text(line)
    assert environment._driver_version(tmp_path / "version") == "580.159.04"
    assert environment._driver_version(tmp_path / "absent") is None


def test_a_processor_without_a_model_name_is_still_named(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\nmodel name\t: other\n")
    assert environment._cpu_model(tmp_path / "cpuinfo") == "Some CPU @ 2 GHz"
    assert environment._cpu_model(tmp_path / "absent")
