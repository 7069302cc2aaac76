"""The safety nets that every other test relies on can themselves fail."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from conftest import leaked_threads


@pytest.mark.parametrize(
    ("name", "daemon", "is_leak"),
    [
        ("hf_lema-prefetcher", True, True),
        ("hf_lema-reader_0", False, True),
        ("other", False, True),
        ("other", True, False),
    ],
)
def test_thread_left_running_is_a_leak_if_it_is_ours_or_holds_the_process(
    name: str, daemon: bool, is_leak: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("conftest.MAX_THREAD_END_S", 0.05)
    before = set(threading.enumerate())
    ended = threading.Event()
    thread = threading.Thread(target=ended.wait, args=(30.0,), name=name, daemon=daemon)
    thread.start()
    try:
        assert leaked_threads(before) == ([thread] if is_leak else [])
    finally:
        ended.set()
        thread.join(30.0)


def test_thread_that_is_just_ending_is_no_leak() -> None:
    before = set(threading.enumerate())
    ended = threading.Event()
    thread = threading.Thread(target=ended.wait, args=(30.0,), name="hf_lema-prefetcher")
    thread.start()
    threading.Timer(0.05, ended.set).start()

    assert leaked_threads(before) == []


def test_tiny_llama_has_equal_weights_for_equal_seeds_only(tiny_llama: Callable[..., torch.nn.Module]) -> None:
    first, again, other = tiny_llama(seed=3), tiny_llama(seed=3), tiny_llama(seed=4)

    assert len(first.model.layers) == 4
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


def test_tiny_llama_leaves_the_global_random_state_alone(tiny_llama: Callable[..., torch.nn.Module]) -> None:
    before = torch.get_rng_state()
    tiny_llama()

    assert torch.equal(torch.get_rng_state(), before)
