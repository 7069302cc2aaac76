"""The recompute Function gives what plain autograd gives, bit for bit, and holds weights only during its visits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from fake_store import CPU
from torch import nn

from hf_lema.layer.boundaries import Boundaries
from hf_lema.layer.micro_batch import MicroBatches
from hf_lema.layer.recompute import Recompute, Visit
from hf_lema.layer.replay import ForwardHooks
from hf_lema.layer.token_tiles import TokenTiles
from hf_lema.layer.visit_options import LayerParts, VisitOptions
from hf_lema.runtime.schedule import Direction


class Toy(nn.Module):
    """A frozen projection, an adapter beside it, dropout; what it returns can be chosen."""

    def __init__(self, dtype: torch.dtype = torch.float32, outputs: str = "tensor", dropout: float = 0.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.frozen = nn.Parameter(torch.randn(6, 6, generator=generator, dtype=dtype) / 2, requires_grad=False)
        self.down = nn.Parameter(torch.randn(2, 6, generator=generator, dtype=dtype) / 2)
        self.up = nn.Parameter(torch.randn(6, 2, generator=generator, dtype=dtype) / 2)
        self.aside = nn.Parameter(torch.randn(6, generator=generator, dtype=dtype))
        self.idle = nn.Parameter(torch.randn(6, generator=generator, dtype=dtype))
        self.dropout = nn.Dropout(dropout)
        self.outputs = outputs

    def forward(self, hidden: torch.Tensor, scale: float = 1.0, *, mask: torch.Tensor | None = None) -> Any:
        adapter = nn.functional.linear(nn.functional.linear(self.dropout(hidden), self.down), self.up)
        out = torch.tanh(nn.functional.linear(hidden, self.frozen) + scale * adapter)
        if mask is not None:
            out = out * mask
        side = (hidden * self.aside).sum(-1)
        return {
            "tensor": out,
            "one": (out,),
            "pair": (out, side),
            "gaps": (None, out, None, side, None),
            "integers": (out, side.detach().argsort(), None, side),
            "mask": (out, side.detach() > 0),
            "twice": (out, out),
            "input": (hidden, out),
            "same": hidden,
            "list": [out],
            "dict": (out, {"side": side}),
        }[self.outputs]


class Layer:
    """What `Recompute` sees of a proxied layer: frozen weights are there during a visit, and poison at all other times.

    Attributes:
        visits: (direction, whether a backward was expected) of every visit.
    """

    layer_idx = 5
    is_kept = False  # set by `kept_and_recomputed`
    stays = False

    def __init__(self, toy: Toy, micro_batch_size: int = 0) -> None:
        self.toy = self.layer = toy
        self.parts = LayerParts(list(toy.modules()))
        self.options = VisitOptions(MicroBatches(micro_batch_size), TokenTiles(), Boundaries(CPU, num_layers=1))
        self.visits: list[tuple[Direction, bool]] = []
        self.is_lent = False
        self._at_home = toy.frozen.detach().clone()
        toy.frozen = nn.Parameter(torch.full_like(toy.frozen, torch.nan), requires_grad=False)
        self._lent = nn.Parameter(toy.frozen.detach().clone(), requires_grad=False)

    @contextmanager
    def swapped(self, entries: Sequence[tuple[dict[str, Any], str, Any]], stand_ins: Sequence[Any]) -> Iterator[None]:
        for (registry, name, _), stand_in in zip(entries, stand_ins, strict=True):
            registry[name] = stand_in
        try:
            yield
        finally:
            for registry, name, original in entries:
                registry[name] = original

    @contextmanager
    def weights(self, direction: Direction, *, expect_backward: bool = False) -> Iterator[None]:
        assert not self.is_lent
        self.visits.append((direction, expect_backward))
        at_rest = self.toy._parameters["frozen"]
        self.is_lent = True
        self._lent.data.copy_(self._at_home)  # `.data`: what autograd would refuse must show in the numbers here
        try:
            self.toy._parameters["frozen"] = self._lent
            yield
        finally:
            self.toy._parameters["frozen"] = at_rest
            self._lent.data.fill_(torch.nan)
            self.is_lent = False

    def undo_interrupted_swaps(self) -> None:
        """Nothing is swapped that a block does not put back."""

    def call_plain(self, *args: Any, **kwargs: Any) -> Any:
        assert self.is_lent
        return self.toy.forward(*args, **kwargs)

    def lent(self) -> list[torch.Tensor]:
        assert self.is_lent
        return [self.toy._parameters["frozen"]]  # type: ignore[list-item]

    @contextmanager
    def copied(self) -> Iterator[None]:
        registry = self.toy._parameters
        copy = nn.Parameter(self._at_home.clone(), requires_grad=False)
        with self.swapped([(registry, "frozen", registry["frozen"])], [copy]):
            yield
        copy.data.fill_(torch.nan)

    def trainable(self) -> list[tuple[dict[str, Any], str, torch.Tensor]]:
        return [
            (self.toy._parameters, n, p) for n, p in self.toy._parameters.items() if p is not None and p.requires_grad
        ]

    def __call__(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        trainable = self.trainable()
        slots = [(registry, name) for registry, name, _ in trainable]
        hooks = ForwardHooks.capture(list(self.toy.modules())[1:])
        visit = Visit(self, args, kwargs, slots, hooks, CPU, self.options, hidden.shape[0], self.is_kept)
        return visit.rebuild(Recompute.apply(visit, hidden, *(p for _, _, p in trainable)))


@pytest.fixture(autouse=True, params=[False, True], ids=["recomputed", "kept"])
def kept_and_recomputed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything holds for visits that keep their graph too."""
    monkeypatch.setattr(Layer, "is_kept", request.param)


def tensors(output: Any) -> list[torch.Tensor]:
    return [o for o in (output if isinstance(output, tuple) else (output,)) if isinstance(o, torch.Tensor)]


def loss_of(output: Any) -> torch.Tensor:
    """Uses every output that can be used, each with its own weight."""
    terms = [(i + 1) * (o.float() ** 2).sum() for i, o in enumerate(tensors(output)) if o.requires_grad]
    return torch.stack(terms).sum()


def grads_of(toy: Toy, hidden: torch.Tensor) -> dict[str, torch.Tensor | None]:
    return {"hidden": hidden.grad} | {n: p.grad for n, p in toy.named_parameters()}


def same(left: dict[str, torch.Tensor | None], right: dict[str, torch.Tensor | None]) -> bool:
    def equal(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
        return (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))

    return left.keys() == right.keys() and all(equal(left[n], right[n]) for n in left)


def new_hidden(requires_grad: bool = True, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    data = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(8), dtype=dtype)
    return data.requires_grad_(requires_grad)


def both(
    outputs: str = "tensor",
    dropout: float = 0.0,
    requires_grad: bool = True,
    freeze: tuple[str, ...] = (),
    use: Callable[[Any], torch.Tensor] = loss_of,
    autocast: torch.dtype | None = None,
    backward_inside: bool = False,
    **kwargs: Any,
) -> None:
    """Plain autograd and the recompute on equal inputs: loss, outputs, gradients and random state must be equal."""
    results = []
    for streamed in (False, True):
        toy = Toy(outputs=outputs, dropout=dropout)
        for name in freeze:
            getattr(toy, name).requires_grad_(False)
        hidden = new_hidden(requires_grad)
        call = Layer(toy) if streamed else toy
        torch.manual_seed(77)
        with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
            output = call(hidden, **kwargs)
            loss = use(output)
            if backward_inside:
                loss.backward()
        if not backward_inside:
            loss.backward()
        form = [type(o).__name__ for o in output] if isinstance(output, tuple) else type(output).__name__
        dtypes = [(o.dtype, o.requires_grad) for o in tensors(output)]
        values = [o.detach().clone() for o in tensors(output)]
        results.append((form, dtypes, values, loss.detach(), grads_of(toy, hidden), torch.get_rng_state()))
    plain, recomputed = results
    assert plain[:2] == recomputed[:2]
    assert all(torch.equal(a, b) for a, b in zip(plain[2], recomputed[2], strict=True))
    assert torch.equal(plain[3], recomputed[3])
    assert same(plain[4], recomputed[4]), (plain[4], recomputed[4])
    assert torch.equal(plain[5], recomputed[5]), "the random state outside differs"


# ---- equal to plain autograd ----


@pytest.mark.parametrize("outputs", ["tensor", "one", "pair", "gaps", "integers", "mask", "twice", "input"])
def test_every_form_of_output_has_the_values_and_gradients_of_plain_autograd(outputs: str) -> None:
    both(outputs)


@pytest.mark.parametrize("dropout", [0.1, 0.5])
def test_dropout_draws_the_same_in_the_recompute_and_the_random_state_goes_on_as_without_it(dropout: float) -> None:
    both(dropout=dropout)
    both("pair", dropout=dropout)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backward_inside", [False, True])
def test_the_recompute_runs_in_the_autocast_of_the_forward(dtype: torch.dtype, backward_inside: bool) -> None:
    both(autocast=dtype, dropout=0.1, backward_inside=backward_inside)


def test_the_recompute_does_not_take_on_the_autocast_of_the_backward() -> None:
    results = []
    for streamed in (False, True):
        toy, hidden = Toy(), new_hidden()
        loss = (Layer(toy) if streamed else toy)(hidden).sum()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss.backward()
        results.append(grads_of(toy, hidden))
    assert same(*results)


def test_a_trainable_that_is_used_beside_the_layer_under_autocast_keeps_its_gradient_there() -> None:
    # Autocast keeps one cast of a parameter for the whole region; a cast made without a graph would serve here, too.
    results = []
    for streamed in (False, True):
        toy, hidden = Toy(), new_hidden()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = (Layer(toy) if streamed else toy)(hidden)
            beside = nn.functional.linear(new_hidden(requires_grad=False), toy.down)
        (loss_of(output) + (beside.float() ** 2).sum()).backward()
        results.append(grads_of(toy, hidden))
    assert results[1]["down"] is not None
    # The sum of two gradients of two casts is rounded otherwise than the gradient of one cast that is used twice.
    torch.testing.assert_close(results[1]["down"], results[0]["down"], rtol=0.02, atol=0.02)
    assert all(same({n: results[0][n]}, {n: results[1][n]}) for n in ("up", "hidden"))


def test_hidden_states_that_need_no_gradient_get_none() -> None:
    both(requires_grad=False)
    both("pair", requires_grad=False, dropout=0.1)


def test_a_layer_without_trainables_passes_the_gradient_on() -> None:
    both(freeze=("down", "up", "aside", "idle"))


def test_arguments_reach_the_layer_in_both_visits() -> None:
    both(scale=0.25, mask=torch.rand(2, 4, 6, generator=torch.Generator().manual_seed(1)))


def test_a_trainable_that_the_layer_does_not_use_gets_no_gradient() -> None:
    toy = Toy()
    Layer(toy)(new_hidden()).sum().backward()
    assert toy.idle.grad is None
    assert toy.aside.grad is not None or toy.outputs == "tensor"


@pytest.mark.parametrize(("outputs", "used"), [("pair", 0), ("pair", 1), ("gaps", 3), ("integers", 3), ("input", 1)])
def test_an_output_that_the_loss_does_not_use_gives_no_gradient_not_zeros(outputs: str, used: int) -> None:
    both(outputs, use=lambda output: (output[used] ** 2).sum())


def test_an_infinite_derivative_of_an_unused_output_does_no_harm() -> None:
    class Root(Toy):
        def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            out = super().forward(hidden)
            return out, (hidden - hidden.detach() + 0 * out).abs().sqrt()

    hidden = new_hidden()
    Layer(Root())(hidden)[0].sum().backward()
    assert torch.isfinite(hidden.grad).all()  # type: ignore[arg-type]


def test_a_layer_that_returns_its_input_passes_the_gradient_on() -> None:
    toy = Toy(outputs="same")
    hidden = new_hidden()
    (3 * Layer(toy)(hidden)).sum().backward()
    assert torch.equal(hidden.grad, torch.full_like(hidden, 3.0))  # type: ignore[arg-type]


def test_gradients_accumulate_over_several_visits_of_a_layer() -> None:
    results = []
    for streamed in (False, True):
        toy, hidden = Toy(dropout=0.2), new_hidden()
        call = Layer(toy) if streamed else toy
        torch.manual_seed(5)
        for _ in range(3):
            loss_of(call(call(hidden))).backward()
        results.append(grads_of(toy, hidden))
    assert same(*results)


@pytest.mark.parametrize("outputs", ["tensor", "pair", "gaps"])
def test_numerical_gradients_agree_in_float64(outputs: str) -> None:
    toy = Toy(torch.float64, outputs)
    layer = Layer(toy)
    names = [name for _, name, _ in layer.trainable()]

    def call(hidden: torch.Tensor, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        slots = [(toy._parameters, name) for name in names]
        hooks = ForwardHooks.capture([])
        visit = Visit(layer, (), {}, slots, hooks, CPU, layer.options, hidden.shape[0], layer.is_kept)  # type: ignore[arg-type]
        return tuple(tensors(visit.rebuild(Recompute.apply(visit, hidden, *values))))

    hidden = new_hidden(dtype=torch.float64)[:1, :2].detach().requires_grad_()
    values = [toy._parameters[name].detach().clone().requires_grad_() for name in names]  # type: ignore[union-attr]
    assert torch.autograd.gradcheck(call, (hidden, *values), fast_mode=False)


# ---- micro-batches ----


@pytest.mark.parametrize("outputs", ["tensor", "one", "pair", "gaps", "integers"])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 3, 5])
def test_pieces_of_a_batch_give_what_they_give_one_after_another(outputs: str, micro_batch_size: int) -> None:
    results = []
    for streamed in (False, True):
        toy = Toy(outputs=outputs, dropout=0.3)
        hidden = torch.randn(5, 4, 6, generator=torch.Generator().manual_seed(8), requires_grad=True)
        torch.manual_seed(11)
        if streamed:
            output = Layer(toy, micro_batch_size)(hidden)
        else:
            parts = [toy(part) for part in hidden.split(micro_batch_size)]
            output = parts[0]
            if isinstance(output, tuple):
                output = tuple(None if o[0] is None else torch.cat(o) for o in zip(*parts, strict=True))
            else:
                output = torch.cat(parts)
        loss_of(output).backward()
        results.append(([o.detach() for o in tensors(output)], grads_of(toy, hidden), torch.get_rng_state()))
    plain, cut = results
    assert all(torch.equal(a, b) for a, b in zip(plain[0], cut[0], strict=True))
    assert torch.equal(plain[1]["hidden"], cut[1]["hidden"])  # type: ignore[arg-type]
    for name, gradient in plain[1].items():  # the pieces' gradients are summed in another order
        if gradient is None:
            assert cut[1][name] is None
        else:
            torch.testing.assert_close(cut[1][name], gradient)
    assert torch.equal(plain[2], cut[2])


def test_a_cut_visit_leases_its_layer_no_more_often() -> None:
    layer = Layer(Toy(), micro_batch_size=1)
    loss_of(layer(new_hidden())).backward()
    assert layer.visits == [(Direction.FORWARD, True), (Direction.BACKWARD, False)]


def test_a_cut_visit_gives_no_gradient_where_none_is_due() -> None:
    toy = Toy(outputs="pair")
    hidden = new_hidden(requires_grad=False)
    (Layer(toy, micro_batch_size=1)(hidden)[0] ** 2).sum().backward()
    assert hidden.grad is None
    assert toy.aside.grad is None
    assert toy.up.grad is not None


# ---- graphs ----


def test_a_kept_graph_can_be_differentiated_twice() -> None:
    toy, hidden = Toy(dropout=0.3), new_hidden()
    loss = loss_of(Layer(toy)(hidden))
    loss.backward(retain_graph=True)
    once = {n: None if g is None else g.clone() for n, g in grads_of(toy, hidden).items()}
    loss.backward()
    twice = grads_of(toy, hidden)
    assert all(g is None or torch.equal(twice[n], 2 * g) for n, g in once.items())  # type: ignore[arg-type]


def test_a_graph_that_was_not_kept_refuses_a_second_backward() -> None:
    loss = loss_of(Layer(Toy())(new_hidden()))
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_a_second_derivative_is_refused_rather_than_wrong() -> None:
    hidden = new_hidden()
    (grad,) = torch.autograd.grad(loss_of(Layer(Toy())(hidden)), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        (grad.norm() + hidden.norm()).backward()


def test_a_trainable_that_changed_between_forward_and_backward_is_refused() -> None:
    toy = Toy()
    loss = loss_of(Layer(toy)(new_hidden()))
    with torch.no_grad():
        toy.up.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_layer_that_writes_to_its_hidden_states_is_refused_rather_than_wrong() -> None:
    class InPlace(Toy):
        def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            hidden.mul_(2.0)
            return super().forward(hidden)

    hidden = new_hidden()
    with pytest.raises(RuntimeError, match=r"in-?place"):
        loss_of(Layer(InPlace())(hidden * 1.0)).backward()


def test_a_partial_gradient_can_be_asked_for() -> None:
    toy, hidden = Toy(), new_hidden()
    plain, plain_hidden = Toy(), new_hidden()
    (found,) = torch.autograd.grad(loss_of(Layer(toy)(hidden)), toy.up)
    (expected,) = torch.autograd.grad(loss_of(plain(plain_hidden)), plain.up)
    assert torch.equal(found, expected)
    assert toy.down.grad is None


# ---- visits ----


def test_weights_are_lent_once_in_the_forward_and_once_in_the_backward() -> None:
    layer = Layer(Toy())
    loss = loss_of(layer(new_hidden()))
    assert layer.visits == [(Direction.FORWARD, True)]
    assert not layer.is_lent
    loss.backward()
    assert layer.visits == [(Direction.FORWARD, True), (Direction.BACKWARD, False)]
    assert not layer.is_lent


def test_the_forward_keeps_no_activation_but_the_hidden_states() -> None:
    packed: list[torch.Tensor] = []
    toy, hidden = Toy(), new_hidden()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        Layer(toy)(hidden)
    expected = {t.data_ptr() for t in (hidden, *(p for p in toy.parameters() if p.requires_grad))}
    assert {t.data_ptr() for t in packed} == expected


def test_nothing_is_held_once_the_graph_is_gone() -> None:
    import weakref

    layer = Layer(Toy())
    mask = torch.ones(2, 4, 6)
    alive = weakref.ref(mask)
    loss = loss_of(layer(new_hidden(), mask=mask))
    del mask
    assert alive() is not None
    loss.backward()
    del loss
    assert alive() is None


def test_hooks_of_a_trainable_fire_once_with_the_whole_gradient() -> None:
    toy = Toy()
    seen: list[torch.Tensor] = []
    done: list[bool] = []
    toy.up.register_hook(lambda grad: seen.append(grad.clone()))
    toy.up.register_post_accumulate_grad_hook(lambda parameter: done.append(True))
    loss_of(Layer(toy)(new_hidden())).backward()
    assert done == [True]
    assert len(seen) == 1
    assert torch.equal(seen[0], toy.up.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("when", ["forward", "backward"])
def test_an_exception_in_the_layer_leaves_its_own_parameters_registered(when: str) -> None:
    class Breaks(Toy):
        num_calls = 0

        def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self.num_calls += 1
            if self.num_calls == ("forward", "backward").index(when) + 1:  # a first kept visit is recomputed too
                raise KeyboardInterrupt
            return super().forward(hidden)

    toy = Breaks()
    before = dict(toy._parameters)
    layer = Layer(toy)
    before["frozen"] = toy._parameters["frozen"]
    with pytest.raises(KeyboardInterrupt):
        layer(new_hidden()).sum().backward()
    assert toy._parameters.keys() == before.keys()
    assert all(toy._parameters[name] is parameter for name, parameter in before.items())
    assert not layer.is_lent


def test_parameters_are_the_registered_objects_again_after_each_visit() -> None:
    toy = Toy()
    layer = Layer(toy)
    before = dict(toy._parameters)
    loss = layer(new_hidden()).sum()
    assert all(toy._parameters[name] is parameter for name, parameter in before.items())
    loss.backward()
    assert all(toy._parameters[name] is parameter for name, parameter in before.items())
    assert list(toy._parameters) == list(before), "the order of parameters changed"


def test_hooks_that_lived_as_long_as_the_forward_are_there_in_the_recompute() -> None:
    results = []
    for streamed in (False, True):
        toy, hidden = Toy(), new_hidden()
        call = Layer(toy) if streamed else toy
        handle = toy.dropout.register_forward_pre_hook(lambda module, args: (args[0] * 3.0,))
        output = call(hidden)
        handle.remove()
        loss_of(output).backward()
        results.append(grads_of(toy, hidden))
    assert same(*results)


@pytest.mark.parametrize(("outputs", "words"), [("list", "'list'"), ("dict", "'dict'")])
def test_outputs_that_would_lose_their_gradient_are_refused_by_type(outputs: str, words: str) -> None:
    with pytest.raises(ValueError, match=f"layer 5: outputs of type .*{words}"):
        Layer(Toy(outputs=outputs))(new_hidden())
