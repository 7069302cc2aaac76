"""Random state, autocast settings and forward hooks come back as they were, and leave no trace outside."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from fake_store import CPU
from torch import nn

from hf_lema.layer.replay import AutocastState, ForwardHooks, RandomState


def autocast_now() -> tuple[object, ...]:
    return (
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        torch.is_autocast_cache_enabled(),
    )


# ---- random state ----


def test_a_replay_draws_what_was_drawn_after_the_capture() -> None:
    state = RandomState.capture(CPU)
    first = torch.rand(5), torch.randint(0, 99, (3,))
    torch.rand(17)
    with state.replayed():
        again = torch.rand(5), torch.randint(0, 99, (3,))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_a_replay_can_be_repeated() -> None:
    state = RandomState.capture(CPU)
    draws = []
    for _ in range(3):
        with state.replayed():
            draws.append(torch.rand(4))
    assert torch.equal(draws[0], draws[1])
    assert torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("error", [None, ValueError(), KeyboardInterrupt()], ids=repr)
def test_draws_outside_are_those_that_would_have_come_without_the_replay(error: BaseException | None) -> None:
    state = RandomState.capture(CPU)
    torch.rand(3)
    outside = torch.get_rng_state()
    expected = torch.rand(6)
    torch.set_rng_state(outside)
    with pytest.raises(type(error)) if error else nullcontext(), state.replayed():
        torch.rand(100)
        if error:
            raise error
    assert torch.equal(torch.rand(6), expected)


def test_a_capture_draws_nothing_and_is_not_changed_by_later_draws() -> None:
    before = torch.get_rng_state()
    state = RandomState.capture(CPU)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(10)
    state.restore()
    assert torch.equal(torch.get_rng_state(), before)


def test_replays_can_be_nested() -> None:
    outer = RandomState.capture(CPU)
    a, b = torch.rand(2), torch.rand(2)
    inner = RandomState.capture(CPU)
    c = torch.rand(2)
    with outer.replayed():
        assert torch.equal(torch.rand(2), a)
        with inner.replayed():
            assert torch.equal(torch.rand(2), c)
        assert torch.equal(torch.rand(2), b)


def test_the_state_of_a_gpu_is_captured_from_its_own_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 1)
    states = {device: torch.tensor([1], dtype=torch.uint8)}
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda d: states[d])
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda value, d: states.__setitem__(d, value))
    state = RandomState.capture(device)
    states[device] = torch.tensor([2], dtype=torch.uint8)
    with state.replayed():
        assert states[device].tolist() == [1]
        states[device] = torch.tensor([3], dtype=torch.uint8)
    assert states[device].tolist() == [2]


# ---- autocast ----

SETTINGS = [
    {"enabled": False},
    {"enabled": True, "dtype": torch.bfloat16},
    {"enabled": True, "dtype": torch.float16},
    {"enabled": True, "dtype": torch.bfloat16, "cache_enabled": False},
]


@pytest.mark.parametrize("captured", SETTINGS, ids=str)
@pytest.mark.parametrize("outside", SETTINGS, ids=str)
def test_autocast_inside_is_as_captured_and_outside_as_it_was(
    captured: dict[str, object], outside: dict[str, object]
) -> None:
    with torch.autocast("cpu", **captured):  # type: ignore[arg-type]
        state = AutocastState.capture(CPU)
        expected = autocast_now()
        product = (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
    with torch.autocast("cpu", **outside):  # type: ignore[arg-type]
        before = autocast_now()
        with state.entered():
            assert autocast_now() == expected
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == product
        assert autocast_now() == before


def test_autocast_comes_back_after_an_exception() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        state = AutocastState.capture(CPU)
    before = autocast_now()
    with pytest.raises(ZeroDivisionError), state.entered():
        raise ZeroDivisionError
    assert autocast_now() == before


def test_the_settings_of_a_gpu_are_captured_beside_those_of_the_cpu() -> None:
    types = [device_type for device_type, *_ in AutocastState.capture(torch.device("cuda", 0)).settings]
    assert types == ["cpu", "cuda"]
    assert [device_type for device_type, *_ in AutocastState.capture(CPU).settings] == ["cpu"]


# ---- hooks ----


class Doubled(nn.Module):
    def forward(self, x: torch.Tensor, *, plus: float = 0.0) -> torch.Tensor:
        return 2 * x + plus


def test_hooks_of_the_capture_are_there_again_after_they_were_removed() -> None:
    module, x = Doubled(), torch.ones(1)
    handles = [
        module.register_forward_pre_hook(lambda m, args: (args[0] + 1,)),
        module.register_forward_pre_hook(lambda m, args, kwargs: (args, kwargs | {"plus": 10.0}), with_kwargs=True),
        module.register_forward_hook(lambda m, args, output: output * 100),
        module.register_forward_hook(lambda m, args, kwargs, output: output + kwargs["plus"], with_kwargs=True),
    ]
    expected = module(x)
    hooks = ForwardHooks.capture([module])
    for handle in handles:
        handle.remove()
    assert module(x) == 2
    with hooks.entered():
        assert module(x) == expected == 1410
    assert module(x) == 2


def test_hooks_that_came_after_the_capture_are_outside_only() -> None:
    module, x = Doubled(), torch.ones(1)
    module.register_forward_hook(lambda m, args, output: output + 1)
    hooks = ForwardHooks.capture([module])
    later = module.register_forward_hook(lambda m, args, output: output * 50)
    with hooks.entered():
        assert module(x) == 3
    assert module(x) == 150
    later.remove()
    assert module(x) == 3


def test_hooks_come_back_after_an_exception_and_handles_still_remove_them() -> None:
    module, x = Doubled(), torch.ones(1)
    handle = module.register_forward_hook(lambda m, args, output: output + 1)
    hooks = ForwardHooks.capture([module])
    with pytest.raises(ZeroDivisionError), hooks.entered():
        raise ZeroDivisionError
    assert module(x) == 3
    handle.remove()
    assert module(x) == 2


def test_modules_without_hooks_are_not_held() -> None:
    assert ForwardHooks.capture([Doubled(), nn.Linear(1, 1)]).tables == ()
