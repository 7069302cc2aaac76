"""Attributes swapped for a block: put back at its end, and after an interrupt that cut the end off."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_lema.layer.replay import Surroundings
from hf_lema.layer.swaps import changed, mark, undo_to


class Interrupted(dict[str, Any]):
    """A dictionary in which the next change is where Ctrl-C comes."""

    is_armed = False

    def __setitem__(self, key: str, value: Any) -> None:
        if self.is_armed:
            self.is_armed = False
            raise KeyboardInterrupt
        super().__setitem__(key, value)


def test_entries_are_changed_inside_the_block_and_put_back_after_it() -> None:
    first, second = {"a": 1}, {"b": 2}
    with changed([(first, "a", 10), (second, "new", 20)]):
        assert (first, second) == ({"a": 10}, {"b": 2, "new": 20})
        with changed([(first, "a", 100)]):
            assert first == {"a": 100}
        assert first == {"a": 10}
    assert (first, second) == ({"a": 1}, {"b": 2})


def test_what_an_interrupt_in_the_clean_up_left_is_put_back_by_whoever_is_outside() -> None:
    inner, outer = Interrupted(a=1, b=2), {"c": 3}
    begin = mark()
    with pytest.raises(KeyboardInterrupt), changed([(outer, "c", 30)]), changed([(inner, "a", 10), (inner, "b", 20)]):
        inner.is_armed = True
    assert (dict(inner), outer) == ({"a": 1, "b": 2}, {"c": 3}), "the block around it has a clean-up too"
    assert mark() == begin

    with pytest.raises(KeyboardInterrupt), changed([(inner, "a", 10)]):
        inner.is_armed = True
    assert inner["a"] == 10, "nothing was around it"
    undo_to(begin)
    assert (inner["a"], mark()) == (1, begin)


def test_an_interrupt_while_entries_are_changed_puts_back_those_that_were() -> None:
    inner = Interrupted(a=1, b=2)
    with pytest.raises(KeyboardInterrupt), changed(_armed_before_b(inner)):
        pass
    assert inner == {"a": 1, "b": 2}


def _armed_before_b(target: Interrupted) -> Any:
    yield target, "a", 10
    target.is_armed = True
    yield target, "b", 20


def test_gradients_and_autocast_that_stayed_half_entered_are_put_back() -> None:
    surroundings = Surroundings(torch.device("cpu"))
    torch.set_grad_enabled(False)
    torch.autocast_increment_nesting()
    torch.set_autocast_enabled("cpu", True)
    torch.set_autocast_cache_enabled(False)
    surroundings.put_back()

    assert torch.is_grad_enabled()
    assert not torch.is_autocast_enabled("cpu")
    assert torch.is_autocast_cache_enabled()
    torch.autocast_increment_nesting()
    assert torch.autocast_decrement_nesting() == 0
