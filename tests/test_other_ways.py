"""What does not combine with streaming says so at once, in a line that names what to use instead."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from models import STOCK, WRAP_THEN_PEFT, arguments, batch, build, closing, forward_backward, prepare
from torch import nn
from transformers import Trainer
from transformers.integrations import deepspeed

from hf_lema import LemaModelWrapper

pytestmark = pytest.mark.integration

FSDP = (r"^FSDP .* cannot be combined. .*torchrun", {"ACCELERATE_USE_FSDP": "true"})
DEEPSPEED = (r"^DeepSpeed .*cannot be combined.*torchrun", {"ACCELERATE_USE_DEEPSPEED": "true"})
TENSOR_PARALLEL = (r"^tensor parallelism .*cannot be combined.*torchrun", {"PARALLELISM_CONFIG_TP_SIZE": "2"})
MEGATRON = (r"^tensor parallelism .*cannot be combined.*torchrun", {"ACCELERATE_USE_MEGATRON_LM": "true"})
COMPILE = (r"^torch.compile of the whole model cannot.*Leave out", {"ACCELERATE_DYNAMO_BACKEND": "inductor"})
WAYS = {"fsdp": FSDP, "deepspeed": DEEPSPEED, "tp": TENSOR_PARALLEL, "megatron": MEGATRON, "compile": COMPILE}


@pytest.fixture(autouse=True)
def fresh_state(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No word of an earlier test's Accelerator, and none left for later ones."""
    for _, environment in WAYS.values():
        for name in environment:
            monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("ACCELERATE_DYNAMO_MODE", raising=False)
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    build().save_pretrained(path)
    return path


def asked_by_launcher(way: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Sets what ``accelerate launch`` would; the message to expect."""
    message, environment = WAYS[way]
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return message


@pytest.mark.parametrize("way", WAYS)
def test_what_the_launcher_asks_for_is_refused_before_anything_is_loaded(
    way: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = asked_by_launcher(way, monkeypatch)
    model = build()
    with pytest.raises(RuntimeError, match=message):
        LemaModelWrapper.wrap(model)
    assert not isinstance(model, LemaModelWrapper), "a refused model is left as it was"
    assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(RuntimeError, match=message):
        LemaModelWrapper.from_pretrained(str(folder))


@pytest.mark.parametrize("way", WAYS)
def test_what_is_asked_for_after_wrapping_is_refused_by_trainer_and_by_accelerate(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(prepare(WRAP_THEN_PEFT)) as model:
        args = arguments(tmp_path)
        accelerator = Accelerator(cpu=True)
        message = asked_by_launcher(way, monkeypatch)
        if way == "compile":
            AcceleratorState().dynamo_plugin.backend = type(AcceleratorState().dynamo_plugin.backend).INDUCTOR
        with pytest.raises(RuntimeError, match=message):
            accelerator.prepare(model)
        if way in ("fsdp", "deepspeed", "megatron"):
            return  # Trainer's own Accelerator would ask for their packages, or for several processes
        with pytest.raises(RuntimeError, match=message):
            Trainer(model=model, args=args)


def test_torch_compile_of_training_arguments_is_refused_when_trainer_is_made(tmp_path: Path) -> None:
    with closing(prepare(WRAP_THEN_PEFT)) as model:
        args = arguments(tmp_path, torch_compile=True)
        with pytest.raises(RuntimeError, match=COMPILE[0]):
            Trainer(model=model, args=args)


def test_a_zero_3_config_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Config:
        """As transformers asks an ``HfDeepSpeedConfig`` (deepspeed itself need not be installed)."""

        def is_zero3(self) -> bool:
            return True

    config, model = Config(), build()
    monkeypatch.setattr(deepspeed, "_hf_deepspeed_config_weak_ref", lambda: config)
    monkeypatch.setattr(deepspeed, "is_deepspeed_available", lambda: True)
    with pytest.raises(RuntimeError, match=DEEPSPEED[0]):
        LemaModelWrapper.from_pretrained(str(folder))
    with pytest.raises(RuntimeError, match=DEEPSPEED[0]):
        LemaModelWrapper.wrap(model)


def test_a_tp_plan_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="tensor parallelism cannot be combined with streaming"):
        LemaModelWrapper.from_pretrained(str(folder), tp_plan="auto")


def test_a_model_that_is_split_already_is_refused() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        model: Any = build()
        projection = model.model.layers[1].mlp.up_proj
        projection.weight = nn.Parameter(distribute_tensor(projection.weight.data, mesh))
        with pytest.raises(RuntimeError, match=TENSOR_PARALLEL[0]):
            LemaModelWrapper.wrap(model)
    finally:
        torch.distributed.destroy_process_group()


def _in_function(model: nn.Module) -> None:
    torch.compile(lambda **rows: model(**rows).loss, backend="eager")(**batch())


def _in_place(model: nn.Module) -> None:
    model.compile(backend="eager")
    model(**batch())


COMPILED: dict[str, Callable[[Any], object]] = {
    "peft model": lambda model: torch.compile(model),
    "lm": lambda model: torch.compile(model.get_base_model()),
    "lm in place": lambda model: model.get_base_model().compile(),
    "peft model in place": _in_place,
    "a function around it": _in_function,
}


@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=[pytest.mark.slow] * (way == "peft model in place")) for way in COMPILED]
)
@pytest.mark.filterwarnings("ignore:Dynamo does not know")
def test_torch_compile_of_the_whole_model_is_refused(way: str) -> None:
    with closing(prepare(WRAP_THEN_PEFT)) as model:
        with pytest.raises(RuntimeError, match=r"torch\.compile of the whole model cannot be combined"):
            COMPILED[way](model)
        model._compiled_call_impl = None
        assert torch.equal(forward_backward(model), forward_backward(prepare(STOCK))), "and works as ever"


def test_an_unwrapped_model_may_be_compiled_again() -> None:
    model = build()
    LemaModelWrapper.unwrap(LemaModelWrapper.wrap(model, device="cpu"))
    assert isinstance(torch.compile(model), nn.Module)
