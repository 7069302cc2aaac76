"""The frozen list of what a user may rely on. A change here is a change for users: it belongs in CHANGELOG.md too."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.resources
import inspect
import pickle

import pytest

import hf_lema

PUBLIC_NAMES = {
    "LayerStreamer",
    "LemaConfig",
    "LemaModelWrapper",
    "MemoryPlan",
    "MemoryTelemetryCallback",
    "StepChoices",
    "StreamerStats",
    "get_streamer",
    "last_whole_checkpoint",
    "merge_and_save",
    "plan_memory",
}

CONFIG_FIELDS = {
    "vram_budget": "auto",
    "ram_budget": "auto",
    "num_slots": 2,
    "micro_batch_size": 0,
    "self_check": False,
    "choices": None,
}
CONFIG_FIELDS |= {"quantization": None, "double_quantization": True}

STATS_FIELDS = ("num_hits", "num_demand_loads", "wait_s", "disk_bytes", "h2d_bytes")

MERGE_PARAMETERS = (
    "base",
    "adapter",
    "output",
    "dtype",
    "max_shard_size",
    "push_to_hub",
    "trust_remote_code",
    "adapter_revision",
    "kwargs",
)

WRAPPER_PARAMETERS = {
    "wrap": ("model", "config", "device"),
    "unwrap": ("model",),
    "from_pretrained": ("name_or_path", "config", "dtype", "device", "pack", "kwargs"),
}


def test_public_names_are_exactly_these() -> None:
    assert set(hf_lema.__all__) == PUBLIC_NAMES
    assert len(hf_lema.__all__) == len(PUBLIC_NAMES)


@pytest.mark.parametrize("name", sorted(PUBLIC_NAMES))
def test_public_name_can_be_reached_and_explains_itself(name: str) -> None:
    value = getattr(hf_lema, name)

    assert value.__module__.startswith("hf_lema.")
    assert inspect.getdoc(value)


def test_unknown_name_is_an_attribute_error_that_names_it() -> None:
    with pytest.raises(AttributeError, match="LemaModelWraper"):
        hf_lema.LemaModelWraper  # noqa: B018


def test_version_is_that_of_the_installed_package() -> None:
    assert hf_lema.__version__ == importlib.metadata.version("hf_lema")


def test_config_fields_and_defaults_are_exactly_these() -> None:
    fields = {field.name: field.default for field in dataclasses.fields(hf_lema.LemaConfig)}

    assert fields == CONFIG_FIELDS


def test_config_takes_keywords_only_and_cannot_be_changed() -> None:
    with pytest.raises(TypeError, match="positional"):
        hf_lema.LemaConfig("6GiB")
    with pytest.raises(dataclasses.FrozenInstanceError):
        hf_lema.LemaConfig().num_slots = 3


def test_config_is_a_value_that_can_be_compared_hashed_and_pickled() -> None:
    config = hf_lema.LemaConfig(vram_budget="6GiB", num_slots=3)

    assert pickle.loads(pickle.dumps(config)) == config
    assert len({config, dataclasses.replace(config)}) == 1


@pytest.mark.parametrize("method", sorted(WRAPPER_PARAMETERS))
def test_wrapper_methods_take_exactly_these_arguments(method: str) -> None:
    signature = inspect.signature(getattr(hf_lema.LemaModelWrapper, method))

    assert tuple(signature.parameters) == WRAPPER_PARAMETERS[method]


def test_merge_takes_exactly_these_arguments() -> None:
    assert tuple(inspect.signature(hf_lema.merge_and_save).parameters) == MERGE_PARAMETERS


def test_stats_fields_are_exactly_these() -> None:
    assert tuple(field.name for field in dataclasses.fields(hf_lema.StreamerStats)) == STATS_FIELDS


def test_package_declares_that_it_is_typed() -> None:
    assert importlib.resources.files("hf_lema").joinpath("py.typed").is_file()
