"""What is changed while adapters are merged, or between a forward and its backward: stock's numbers, or an error."""

from __future__ import annotations

import tempfile
from typing import Any

import pytest
import torch
from models import (
    NUM_LAYERS,
    STOCK,
    WRAP_THEN_PEFT,
    adapt,
    assert_same_tensors,
    batch,
    build,
    closing,
    enable_checkpointing,
    gradients,
    lora,
    prepare,
)

from hf_lema import LemaConfig, LemaModelWrapper, StepChoices

pytestmark = pytest.mark.integration

ALL = tuple(range(NUM_LAYERS))
WAYS = {
    "2 slots": LemaConfig(choices=StepChoices()),
    "4 slots": LemaConfig(choices=StepChoices(), num_slots=4),
    "disk": LemaConfig(choices=StepChoices(), ram_budget="min"),
    "kept": LemaConfig(choices=StepChoices(kept_layers=ALL)),
    "resident": LemaConfig(choices=StepChoices(resident_layers=ALL)),
    "nf4": LemaConfig(choices=StepChoices(), quantization="nf4"),
}


def loss_of(model: Any, seed: int = 2) -> torch.Tensor:
    torch.manual_seed(seed)
    loss: torch.Tensor = model(**batch(seed=seed)).loss
    return loss


def trained(order: str, config: LemaConfig | None = None) -> Any:
    """A model whose adapter does something, and whose layers have been visited."""
    if config is not None and config.ram_budget == "min" and order != STOCK:
        with tempfile.TemporaryDirectory() as folder:
            build().save_pretrained(folder)
            model = LemaModelWrapper.from_pretrained(
                folder, config, dtype=torch.float32, device="cpu", attn_implementation="eager"
            )
            return set_up(adapt(model).train())
    return set_up(prepare(order, config=config))


def set_up(model: Any) -> Any:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1)
    loss_of(model).backward()
    model.zero_grad()
    return model


def disabled_while_merged(model: Any) -> dict[str, torch.Tensor]:
    model.merge_adapter()
    with model.disable_adapter():
        found = {"disabled": loss_of(model)}  # PEFT unmerges in the forward
    found["enabled"] = loss_of(model)
    model.merge_adapter()
    found["merged again"] = loss_of(model)
    return found


def set_while_merged(model: Any) -> dict[str, torch.Tensor]:
    model.merge_adapter()
    found = {"merged": loss_of(model)}
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        model.set_adapter("default")
    found["set"] = loss_of(model)
    return found


@pytest.mark.parametrize("change", [disabled_while_merged, set_while_merged])
@pytest.mark.parametrize("way", [way for way in WAYS if way != "nf4"])
def test_adapters_that_are_disabled_or_set_while_merged(way: str, change: Any) -> None:
    found = []
    for order in (STOCK, WRAP_THEN_PEFT):
        with closing(trained(order, WAYS[way])) as model, torch.no_grad():
            found.append(change(model))
    assert_same_tensors(found[1], found[0])


@pytest.mark.filterwarnings("ignore:Merge lora module to 4-bit")
def test_adapters_in_4_bits_that_are_disabled_while_merged_apply_once_when_they_are_enabled() -> None:
    with closing(trained(WRAP_THEN_PEFT, WAYS["nf4"])) as model, torch.no_grad():
        before = loss_of(model)
        found = disabled_while_merged(model)
    # Merging to 4 bits rounds; an adapter that is applied twice is far off.
    twice = abs(found["enabled"] - found["disabled"]) - abs(before - found["disabled"])
    assert abs(twice) < 0.5 * abs(before - found["disabled"])


def to_eval(model: Any) -> None:
    model.eval()


def merge(model: Any) -> None:
    model.merge_adapter()


def activate_both(model: Any) -> None:
    model.base_model.set_adapter(["default", "other"])


def disable(model: Any) -> None:
    model.base_model.disable_adapter_layers()


def changed_before_the_backward(order: str, change: Any, config: LemaConfig | None = None) -> dict[str, Any]:
    with closing(trained(order, config)) as model:
        with torch.random.fork_rng():
            torch.manual_seed(7)
            model.add_adapter("other", lora(init_lora_weights=False))
        loss = loss_of(model)
        change(model)
        loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if ".default." in name}


def test_a_backward_in_evaluation_mode_draws_what_the_forward_drew() -> None:
    assert_same_tensors(
        changed_before_the_backward(WRAP_THEN_PEFT, to_eval), changed_before_the_backward(STOCK, to_eval)
    )


@pytest.mark.parametrize("change", [merge, activate_both, disable])
def test_other_adapters_in_the_backward_are_refused(change: Any) -> None:
    with pytest.raises(RuntimeError, match=r"layer 3: adapters were merged, .* between the forward and its backward"):
        changed_before_the_backward(WRAP_THEN_PEFT, change)


def test_a_base_weight_that_was_written_to_after_a_kept_forward_is_recomputed_with() -> None:
    found = []
    for order, kept in ((STOCK, ()), (WRAP_THEN_PEFT, ()), (WRAP_THEN_PEFT, ALL)):
        with closing(trained(order, LemaConfig(choices=StepChoices(kept_layers=kept)))) as model:
            if order == STOCK:
                enable_checkpointing(model)
            loss = loss_of(model)
            with torch.no_grad():
                model.get_base_model().model.layers[1].mlp.gate_proj.weight.mul_(1.5)
            loss.backward()
            found.append(gradients(model))
    assert_same_tensors(found[1], found[0])
    assert_same_tensors(found[2], found[0])
