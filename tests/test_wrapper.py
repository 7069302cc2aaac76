"""A wrapped model looks and answers like the plain one, with and without gradients, and can be given back."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import (
    ARCHITECTURES,
    CACHE,
    CHECKPOINTED,
    NUM_LAYERS,
    ORDERS,
    PEFT_THEN_WRAP,
    STOCK,
    WRAP_THEN_PEFT,
    adapt,
    assert_same_run,
    assert_same_tensors,
    batch,
    build,
    closing,
    cut_loss,
    enable_checkpointing,
    forward_backward,
    gradients,
    lora,
    prepare,
    train,
    trainables,
)
from peft import PeftModel, PromptEncoderConfig, PromptTuningConfig
from torch import nn

from hf_lema import LayerStreamer, LemaConfig, LemaModelWrapper, get_streamer

pytestmark = pytest.mark.integration


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def wrapped(model: Any = None, **kwargs: Any) -> Any:
    return LemaModelWrapper.wrap(build() if model is None else model, LemaConfig(**kwargs), device="cpu")


def assert_equal_training(
    use: Callable[[nn.Module], Any], peft_config: Any = None, order: str = WRAP_THEN_PEFT, **settings: Any
) -> None:
    """``use(model)`` returns tensors and leaves gradients; both are those of the resident, checkpointed model."""
    resident = prepare(STOCK, build(**settings), peft_config)
    enable_checkpointing(resident)
    resident.enable_input_require_grads()
    expected = use(resident)
    streamed = prepare(order, build(**settings), peft_config)
    with closing(streamed):
        found = use(streamed)
        assert any(grad is not None and grad.abs().sum() > 0 for grad in gradients(resident).values())
        assert_same_tensors(gradients(streamed), gradients(resident))
        assert_same_tensors(dict(enumerate(found)), dict(enumerate(expected)))


# ---- identity ----


def test_wrap_returns_its_argument_of_the_same_class_name() -> None:
    model = build()
    plain_class = type(model)
    with closing(LemaModelWrapper.wrap(model, device="cpu")) as returned:
        assert returned is model
        assert isinstance(model, LemaModelWrapper)
        assert isinstance(model, plain_class)
        assert type(model).__name__ == plain_class.__name__
        assert type(model).__qualname__ == plain_class.__qualname__
        assert type(model).__module__ == plain_class.__module__


def test_calling_the_class_is_wrapping() -> None:
    model = build()
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    returned = LemaModelWrapper(model, LemaConfig(), device="cpu")
    with closing(returned):
        assert returned is model
        assert isinstance(model, LemaModelWrapper)
        assert_same_tensors(model.state_dict(), expected)
        with torch.no_grad():
            assert torch.equal(model.eval()(**batch()).logits, build().eval()(**batch()).logits)


def test_calling_the_class_on_a_peft_model_is_wrapping() -> None:
    model = adapt(build())
    returned = LemaModelWrapper(model, device="cpu")
    with closing(returned):
        assert returned is model
        assert type(model).__name__ == "PeftModelForCausalLM"
        assert isinstance(model, PeftModel)
        assert isinstance(model.get_base_model(), LemaModelWrapper)


def test_the_class_of_a_wrapped_model_builds_a_plain_model_as_the_class_of_a_plain_one_does() -> None:
    with closing(wrapped()) as model:
        other = type(model)(model.config)
        assert not isinstance(other, LemaModelWrapper)
        assert type(other) is type(build())
        assert {n: p.shape for n, p in other.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_names_counts_state_and_configuration_are_those_of_the_plain_model(architecture: str) -> None:
    plain, model = build(architecture), build(architecture)
    with closing(wrapped(model)):
        assert [n for n, _ in model.named_modules()] == [n for n, _ in plain.named_modules()]
        assert [type(m).__name__ for m in model.modules()] == [type(m).__name__ for m in plain.modules()]
        assert all(isinstance(m, type(p)) for m, p in zip(model.modules(), plain.modules(), strict=True))
        assert [(n, p.shape, p.dtype) for n, p in model.named_parameters()] == [
            (n, p.shape, p.dtype) for n, p in plain.named_parameters()
        ]
        assert [n for n, _ in model.named_buffers()] == [n for n, _ in plain.named_buffers()]
        assert model.num_parameters() == plain.num_parameters()
        assert model.config.architectures == plain.config.architectures
        assert model.get_memory_footprint() == plain.get_memory_footprint()
        assert model.dtype == plain.dtype
        assert_same_tensors(model.state_dict(), plain.state_dict())


@pytest.mark.parametrize("order", ORDERS)
def test_adapter_keys_and_trainable_counts_are_those_of_the_resident_model(order: str) -> None:
    resident = prepare(STOCK)
    with closing(prepare(order)) as model:
        assert [n for n, _ in model.named_parameters()] == [n for n, _ in resident.named_parameters()]
        assert model.get_nb_trainable_parameters() == resident.get_nb_trainable_parameters()
        assert_same_tensors(trainables(model), trainables(resident))
        assert model.peft_config["default"].to_dict() == resident.peft_config["default"].to_dict()


def test_model_whose_parameters_all_train_is_frozen() -> None:
    with closing(wrapped()) as model:
        assert not any(p.requires_grad for p in model.parameters())
        assert get_streamer(model).num_streamed == NUM_LAYERS


def test_mixed_flags_are_kept_and_what_trains_is_resident() -> None:
    model = build()
    model.requires_grad_(False)
    for layer in model.model.layers:
        layer.input_layernorm.weight.requires_grad_(True)
    whole_bytes = sum(p.numel() * p.element_size() for p in model.model.layers[0].parameters())
    norm_bytes = model.model.layers[0].input_layernorm.weight.numel() * 4
    with closing(wrapped(model)):
        assert list(trainables(model)) == [f"model.layers.{i}.input_layernorm.weight" for i in range(NUM_LAYERS)]
        assert get_streamer(model).layer_bytes <= whole_bytes - norm_bytes + 9 * 64  # alignment of nine tensors


def test_get_streamer_finds_the_runtime_through_peft_and_other_modules() -> None:
    model = prepare(PEFT_THEN_WRAP)
    with closing(model):
        streamer = get_streamer(model)
        assert isinstance(streamer, LayerStreamer)
        assert get_streamer(model.get_base_model()) is streamer
        assert get_streamer(nn.Sequential(model)) is streamer


def test_weights_at_rest_are_of_true_shape_and_on_the_host() -> None:
    with closing(wrapped(build(dtype=torch.bfloat16))) as model:
        for _, parameter in model.model.layers.named_parameters():
            assert parameter.device.type == "cpu"
            assert parameter.dtype == torch.bfloat16
            assert not parameter.is_meta


def test_moving_to_the_device_twice_keeps_weights_and_results() -> None:
    with closing(prepare(WRAP_THEN_PEFT)) as model:
        pointers = {n: p.data_ptr() for n, p in model.named_parameters() if ".base_layer" in n}
        model.to("cpu").to(torch.device("cpu")).cpu()
        assert {n: p.data_ptr() for n, p in model.named_parameters() if ".base_layer" in n} == pointers


def test_two_wrapped_models_do_not_disturb_each_other(tmp_path: Path) -> None:
    expected = [train(prepare(STOCK, build(seed=seed)), tmp_path, gradient_checkpointing=True) for seed in (0, 1)]
    first, second = (prepare(WRAP_THEN_PEFT, build(seed=seed)) for seed in (0, 1))
    with closing(first), closing(second):
        assert_same_run(train(first, tmp_path), expected[0])
        assert_same_run(train(second, tmp_path), expected[1])


# ---- giving back ----


@pytest.mark.parametrize("order", ORDERS)
def test_unwrap_gives_the_plain_model_back(order: str, tmp_path: Path) -> None:
    model = prepare(order)
    with closing(model):
        train(model, tmp_path)
        returned = LemaModelWrapper.unwrap(model)
    assert returned is model
    lm = model.get_base_model()
    assert type(lm) is type(build())
    assert not isinstance(lm, LemaModelWrapper)
    assert {type(m) for m in lm.modules() if "hf_lema" in str(type(m).__mro__)} == set()
    assert not [n for n, m in model.named_modules() if "_hf_hook" in m.__dict__ or "_lema" in m.__dict__]

    resident = prepare(STOCK)
    train(resident, tmp_path, gradient_checkpointing=True)
    assert_same_tensors(model.state_dict(), resident.state_dict())
    assert torch.equal(forward_backward(model), forward_backward(resident))
    assert_same_tensors(gradients(model), gradients(resident))


def test_unwrapped_model_owns_its_memory_and_can_be_copied() -> None:
    import copy

    model = wrapped()
    slab = get_streamer(model).host_store.host_views(0)
    pointers = {view.untyped_storage().data_ptr() for view in slab.values()}
    assert {p.untyped_storage().data_ptr() for p in model.model.layers[0].parameters()} == pointers
    LemaModelWrapper.unwrap(model)
    assert not pointers & {p.untyped_storage().data_ptr() for p in model.parameters()}
    del slab
    gc.collect()
    copied = copy.deepcopy(model).half()
    assert next(copied.model.layers.parameters()).dtype == torch.float16
    assert_same_tensors(model.state_dict(), build().state_dict())


def test_unwrap_after_close_works() -> None:
    model = wrapped()
    get_streamer(model).close()
    LemaModelWrapper.unwrap(model)
    assert_same_tensors(model.state_dict(), build().state_dict())


def test_unwrap_after_unfreezing_leaves_nothing_behind(tmp_path: Path) -> None:
    model = wrapped()
    model.model.layers[-1].requires_grad_(True)
    with closing(model):
        train(model, tmp_path, max_steps=1)
        LemaModelWrapper.unwrap(model)
    assert not [n for n, m in model.named_modules() if "_hf_hook" in m.__dict__ or "_lema" in m.__dict__]


def test_model_can_be_wrapped_again_after_unwrap(tmp_path: Path) -> None:
    resident = prepare(STOCK)
    expected = [train(resident, tmp_path, gradient_checkpointing=True) for _ in range(2)]
    model = prepare(WRAP_THEN_PEFT)
    with closing(model):
        assert_same_run(train(model, tmp_path), expected[0])
        LemaModelWrapper.unwrap(model)
    with closing(LemaModelWrapper.wrap(model, device="cpu")):
        assert_same_run(train(model, tmp_path), expected[1])


def test_close_is_idempotent_and_ends_the_threads() -> None:
    before = set(threading.enumerate())
    model = wrapped()
    assert [t.name for t in set(threading.enumerate()) - before] == ["hf_lema-prefetcher"]
    streamer = get_streamer(model)
    streamer.close()
    streamer.close()
    assert set(threading.enumerate()) <= before
    assert_same_tensors(model.state_dict(), build().state_dict())


@pytest.mark.parametrize("used", [False, True])
def test_model_dropped_without_close_gives_its_thread_and_memory_back(used: bool) -> None:
    before = set(threading.enumerate())
    model = prepare(WRAP_THEN_PEFT)
    streamer = weakref.ref(get_streamer(model))
    if used:
        forward_backward(model)
    try:
        del model
        gc.collect()
        for thread in set(threading.enumerate()) - before:
            thread.join(2.0)
        assert set(threading.enumerate()) <= before
        assert streamer() is None or streamer().closed
    finally:
        if streamer() is not None:
            streamer().close()


# ---- hooks ----


def counted(calls: dict[str, int], name: str) -> Callable[..., None]:
    def hook(*args: Any) -> None:
        calls[name] = calls.get(name, 0) + 1

    return hook


@pytest.mark.parametrize("order", ORDERS)
def test_hooks_on_layers_and_parameters_fire_once(order: str) -> None:
    calls: dict[str, int] = {}
    with closing(prepare(order)) as model:
        lm = model.get_base_model()
        for i, layer in enumerate(lm.model.layers):
            layer.register_forward_pre_hook(counted(calls, f"pre {i}"))
            layer.register_forward_hook(counted(calls, f"forward {i}"))
            layer.register_full_backward_pre_hook(counted(calls, f"backward pre {i}"))
            layer.register_full_backward_hook(counted(calls, f"backward {i}"))
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.register_hook(counted(calls, f"tensor {name}"))
                parameter.register_post_accumulate_grad_hook(counted(calls, f"accumulated {name}"))
        forward_backward(model)
    # The first layer's input needs no gradient, so its full backward hook has nothing to report about the input, but
    # it fires.
    assert len(calls) == NUM_LAYERS * 4 + len(trainables(model)) * 2
    assert set(calls.values()) == {1}, {name: count for name, count in calls.items() if count != 1}


def test_gradients_seen_by_layer_hooks_are_those_of_the_resident_model() -> None:
    def use(model: nn.Module) -> list[torch.Tensor]:
        seen: list[torch.Tensor] = []
        for layer in model.get_base_model().model.layers:
            layer.register_full_backward_hook(lambda module, inputs, outputs: seen.append(outputs[0].clone()))
        loss = forward_backward(model)
        assert len(seen) == NUM_LAYERS
        return [loss, *seen]

    assert_equal_training(use)


def test_forward_hook_that_changes_the_output_is_honoured() -> None:
    def use(model: nn.Module) -> list[torch.Tensor]:
        def doubled(module: nn.Module, inputs: Any, output: Any) -> Any:
            return tuple(o * 2 for o in output) if isinstance(output, tuple) else output * 2

        model.get_base_model().model.layers[1].register_forward_hook(doubled)
        return [forward_backward(model)]

    assert_equal_training(use)


def test_gradients_that_a_parameter_hook_changes_stay_changed() -> None:
    def use(model: nn.Module) -> list[torch.Tensor]:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_hook(lambda grad: grad * 3)
        return [forward_backward(model)]

    assert_equal_training(use)


# ---- without gradients ----


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2", "mixtral"])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_generate_with_the_cache_equals_the_plain_model(architecture: str, context: Any) -> None:
    rows = batch(2)
    prompt = {"input_ids": rows["input_ids"][:, :6], "attention_mask": torch.ones(2, 6, dtype=torch.long)}
    plain = build(architecture).eval()
    with closing(wrapped(build(architecture).eval())) as model, context():
        for settings in ({"do_sample": False}, {"do_sample": True}, {"do_sample": False, "num_beams": 2}):
            for use_cache in (True, False):
                kwargs = {"max_new_tokens": 6, "use_cache": use_cache, "pad_token_id": 0, **settings}
                torch.manual_seed(0)
                expected = plain.generate(**prompt, **kwargs)
                torch.manual_seed(0)
                assert torch.equal(model.generate(**prompt, **kwargs), expected)


@pytest.mark.parametrize("order", ORDERS)
def test_generate_between_training_steps_changes_no_number(order: str, tmp_path: Path) -> None:
    prompt = batch(1)["input_ids"][:, :6]
    resident = prepare(STOCK)
    expected = [train(resident, tmp_path, gradient_checkpointing=True)]
    expected_tokens = resident.eval().generate(input_ids=prompt, max_new_tokens=8, do_sample=False)
    expected.append(train(resident.train(), tmp_path, gradient_checkpointing=True))
    with closing(prepare(order)) as model:
        is_checkpointed = order in CHECKPOINTED
        assert_same_run(train(model, tmp_path, gradient_checkpointing=is_checkpointed), expected[0])
        tokens = model.eval().generate(input_ids=prompt, max_new_tokens=8, do_sample=False)
        assert torch.equal(tokens, expected_tokens)
        assert_same_run(train(model.train(), tmp_path, gradient_checkpointing=is_checkpointed), expected[1])


def test_first_use_in_inference_mode_does_not_spoil_training() -> None:
    resident = prepare(STOCK)
    enable_checkpointing(resident)
    expected = forward_backward(resident)
    with closing(prepare(WRAP_THEN_PEFT)) as model:
        get_streamer(model).set_resident([1])
        with torch.inference_mode():
            model(**batch())
        assert torch.equal(forward_backward(model), expected)
        assert_same_tensors(gradients(model), gradients(resident))


def test_cache_filled_by_hand_gives_equal_logits() -> None:
    rows = batch(1)["input_ids"]
    outputs = []
    for model in (build().eval(), wrapped(build().eval())):
        with closing(model), torch.no_grad():
            first = model(rows[:, :5], use_cache=True)
            second = model(rows[:, 5:], use_cache=True, **{CACHE: first[CACHE]})
            outputs.append((first.logits, second.logits, second[CACHE].get_seq_length()))
    assert torch.equal(outputs[1][0], outputs[0][0])
    assert torch.equal(outputs[1][1], outputs[0][1])
    assert outputs[1][2] == outputs[0][2] == 16


# ---- with gradients: everything that a layer hands out or takes in ----


@pytest.mark.parametrize("order", ORDERS)
def test_two_backwards_of_a_retained_graph_are_equal(order: str) -> None:
    def use(model: nn.Module) -> list[torch.Tensor]:
        torch.manual_seed(11)
        loss = model(**batch()).loss
        loss.backward(retain_graph=True)
        loss.backward()
        return [loss.detach()]

    assert_equal_training(use, order=order)


def test_gradients_by_autograd_grad_are_equal() -> None:
    def use(model: nn.Module) -> list[torch.Tensor]:
        torch.manual_seed(11)
        loss = model(**batch()).loss
        wanted = [p for p in model.parameters() if p.requires_grad]
        loss.backward(retain_graph=True)
        return list(torch.autograd.grad(loss, wanted[3:9]))

    assert_equal_training(use)


def test_backward_restricted_to_some_inputs_leaves_the_others_alone() -> None:
    def use(model: nn.Module) -> list[torch.Tensor]:
        torch.manual_seed(11)
        wanted = [p for p in model.parameters() if p.requires_grad]
        model(**batch()).loss.backward(inputs=wanted[-4:])
        return [torch.tensor(0)]

    assert_equal_training(use)


def test_second_derivative_is_refused_and_not_silently_zero() -> None:
    with closing(prepare(WRAP_THEN_PEFT, peft_config=lora(lora_dropout=0.0))) as model:
        wanted = [p for p in model.parameters() if p.requires_grad]
        grads = torch.autograd.grad(model(**batch()).loss, wanted, create_graph=True)
        with pytest.raises(RuntimeError):
            sum(g.square().sum() for g in grads).backward()


def test_two_forwards_then_both_backwards_are_equal() -> None:
    def use(model: nn.Module) -> list[torch.Tensor]:
        torch.manual_seed(11)
        losses = [model(**batch(seed=seed)).loss for seed in (2, 3)]
        losses[0].backward()
        losses[1].backward()
        return [loss.detach() for loss in losses]

    assert_equal_training(use)


def test_sum_of_two_forwards_has_equal_gradients() -> None:
    def use(model: nn.Module) -> list[torch.Tensor]:
        torch.manual_seed(11)
        loss = model(**batch(seed=2)).loss + 0.5 * model(**batch(seed=3)).loss
        loss.backward()
        return [loss.detach()]

    assert_equal_training(use)


@pytest.mark.parametrize("order", ORDERS)
def test_reference_forward_without_the_adapter_then_a_training_forward(order: str) -> None:
    def use(model: nn.Module) -> list[torch.Tensor]:
        torch.manual_seed(11)
        with torch.no_grad(), model.disable_adapter():
            reference = model(**batch()).logits
        policy = model(**batch()).logits
        with torch.no_grad(), model.disable_adapter():
            again = model(**batch()).logits
        loss = (policy - reference).square().mean() + (policy * again).mean()
        loss.backward()
        return [reference, policy.detach(), loss.detach(), again]

    assert_equal_training(use, order=order)


def test_evaluation_between_forward_and_backward_is_harmless() -> None:
    def use(model: nn.Module) -> list[torch.Tensor]:
        torch.manual_seed(11)
        loss = model(**batch()).loss
        with torch.no_grad():
            other = model(**batch(seed=8)).loss
        torch.rand(7)
        loss.backward()
        return [loss.detach(), other, torch.rand(3)]

    assert_equal_training(use)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("with_grad", [True, False])
def test_output_hidden_states_are_equal_and_carry_gradients(architecture: str, with_grad: bool) -> None:
    def use(model: nn.Module) -> list[torch.Tensor]:
        torch.manual_seed(11)
        with torch.set_grad_enabled(with_grad):
            outputs = model(**batch(), output_hidden_states=True)
        assert len(outputs.hidden_states) == NUM_LAYERS + 1
        if with_grad:
            on_states = sum((i + 1) * h.float().square().mean() for i, h in enumerate(outputs.hidden_states))
            (outputs.loss + on_states).backward()
        else:
            forward_backward(model)
        return [outputs.loss.detach(), *(h.detach() for h in outputs.hidden_states)]

    # Three gradients meet at a hidden state (residual, norm, loss). Like reentrant checkpointing, a streamed layer adds
    # its own two first; without checkpointing the sum runs in another order and differs in the last bit.
    resident = prepare(STOCK, build(architecture), lora(architecture))
    enable_checkpointing(resident, use_reentrant=True)
    resident.enable_input_require_grads()
    expected = use(resident)
    with closing(prepare(WRAP_THEN_PEFT, build(architecture), lora(architecture))) as model:
        if list(ARCHITECTURES).index(architecture) % 2:  # absorbed, whether it is asked for or not
            enable_checkpointing(model)
        found = use(model)
        assert_same_tensors(dict(enumerate(found)), dict(enumerate(expected)))
        assert_same_tensors(gradients(model), gradients(resident))


def test_a_loss_on_one_hidden_state_alone_trains_the_layers_below_it_alone() -> None:
    def use(model: nn.Module) -> list[torch.Tensor]:
        torch.manual_seed(11)
        outputs = model(**batch(), output_hidden_states=True)
        outputs.hidden_states[2].square().mean().backward()
        return [outputs.hidden_states[2].detach()]

    resident = prepare(STOCK)
    use(resident)
    with closing(prepare(WRAP_THEN_PEFT)) as model:
        use(model)
        assert_same_tensors(gradients(model), gradients(resident))


@pytest.mark.parametrize("peft_class", [PromptTuningConfig, PromptEncoderConfig])
@pytest.mark.parametrize("order", ORDERS)
def test_prompts_learned_through_frozen_layers_get_equal_gradients(peft_class: Any, order: str) -> None:
    config = (
        peft_class(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=16)
        if (peft_class is PromptEncoderConfig)
        else peft_class(task_type="CAUSAL_LM", num_virtual_tokens=4)
    )

    def use(model: nn.Module) -> list[torch.Tensor]:
        return [forward_backward(model)]

    resident = prepare(STOCK, build(), config)
    expected = use(resident)
    assert all(grad.abs().sum() > 0 for grad in gradients(resident).values())
    with closing(prepare(order, build(), config)) as model:
        assert_same_tensors(dict(enumerate(use(model))), dict(enumerate(expected)))
        assert_same_tensors(gradients(model), gradients(resident))


def test_embeddings_given_by_the_caller_get_their_gradient() -> None:
    def use(model: nn.Module) -> list[torch.Tensor]:
        torch.manual_seed(11)
        rows = batch()
        embeddings = model.get_input_embeddings()(rows.pop("input_ids")).detach().requires_grad_(True)
        model(inputs_embeds=embeddings, **rows).loss.backward()
        return [embeddings.grad]

    assert_equal_training(use)


def test_trainable_embedding_and_head_get_equal_gradients() -> None:
    def use(model: nn.Module) -> list[torch.Tensor]:
        return [forward_backward(model)]

    def freed(order: str) -> Any:
        model = build(tie_word_embeddings=True)
        model.requires_grad_(False)
        if order == WRAP_THEN_PEFT:
            wrapped(model)
        model.get_input_embeddings().requires_grad_(True)
        return model

    resident = freed(STOCK)
    enable_checkpointing(resident)
    expected = use(resident)
    with closing(freed(WRAP_THEN_PEFT)) as model:
        assert_same_tensors(dict(enumerate(use(model))), dict(enumerate(expected)))
        assert_same_tensors(gradients(model), gradients(resident))


def test_use_cache_is_dropped_while_gradients_are_on() -> None:
    def use(model: nn.Module) -> list[torch.Tensor]:
        torch.manual_seed(11)
        loss = model(**batch(), use_cache=True).loss
        loss.backward()
        return [loss.detach()]

    assert_equal_training(use)


def test_a_cache_object_given_while_gradients_are_on_stays_empty() -> None:
    cache = transformers.DynamicCache()
    with closing(prepare(WRAP_THEN_PEFT)) as model:
        loss = model(**batch(), use_cache=True, **{CACHE: cache}).loss
        loss.backward()
        assert cache.get_seq_length() == 0


# ---- autocast ----


def backward_in_autocast(model: nn.Module, num_forwards: int, backward_inside: bool, cache_enabled: bool) -> Any:
    torch.manual_seed(11)
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=cache_enabled):
        loss = sum(model(**batch(seed=2 + i)).loss for i in range(num_forwards))
        if backward_inside:
            loss.backward()
    if not backward_inside:
        loss.backward()
    return loss.detach()


@pytest.mark.parametrize("cache_enabled", [True, False])
@pytest.mark.parametrize("backward_inside", [True, False])
def test_autocast_regions_are_equal(backward_inside: bool, cache_enabled: bool) -> None:
    assert_equal_training(lambda model: [backward_in_autocast(model, 1, backward_inside, cache_enabled)])


@pytest.mark.parametrize("cache_enabled", [True, False])
@pytest.mark.parametrize("backward_inside", [True, False])
def test_two_forwards_in_one_autocast_region_are_equal(backward_inside: bool, cache_enabled: bool) -> None:
    # With autocast's weight cache a resident model casts an adapter once for both forwards and adds their gradients in
    # bf16. A streamed layer casts it in each recompute and adds in fp32: what a resident model does without that cache.
    resident = prepare(STOCK)
    enable_checkpointing(resident)
    expected = backward_in_autocast(resident, 2, backward_inside, cache_enabled=False)
    with closing(prepare(WRAP_THEN_PEFT)) as model:
        assert torch.equal(backward_in_autocast(model, 2, backward_inside, cache_enabled), expected)
        assert_same_tensors(gradients(model), gradients(resident))


def test_evaluation_then_training_in_one_autocast_region_is_equal() -> None:
    def use(model: nn.Module) -> list[torch.Tensor]:
        torch.manual_seed(11)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with torch.no_grad():
                reference = model(**batch()).loss
            loss = model(**batch()).loss
        loss.backward()
        return [reference, loss.detach()]

    assert_equal_training(use)


def test_two_steps_in_one_autocast_region_see_the_new_weights() -> None:
    def use(model: nn.Module) -> list[torch.Tensor]:
        torch.manual_seed(11)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
        losses = []
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
            for _ in range(2):
                optimizer.zero_grad()
                loss = model(**batch()).loss
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
        return losses

    assert_equal_training(use)


def test_backward_under_another_autocast_replays_that_of_the_forward() -> None:
    def use(model: nn.Module) -> list[torch.Tensor]:
        torch.manual_seed(11)
        loss = model(**batch()).loss
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss.backward()
        return [loss.detach()]

    assert_equal_training(use)


@pytest.mark.parametrize("with_grad", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
def test_logits_made_after_the_autocast_region_are_those_of_the_resident_model(autocast: bool, with_grad: bool) -> None:
    logits = []
    for order in (STOCK, WRAP_THEN_PEFT):
        with closing(prepare(order)) as model:
            if order != STOCK:
                cut_loss(model)
            torch.manual_seed(11)
            with torch.set_grad_enabled(with_grad), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                outputs = model(**batch())
            assert outputs.logits.dtype == (torch.bfloat16 if autocast else torch.float32)
            logits.append(outputs.logits.clone().detach())
    assert logits[1].dtype == logits[0].dtype
    assert torch.equal(logits[1], logits[0])


# ---- base weights that change ----


CHANGES: dict[str, Callable[[nn.Parameter], None]] = {
    "in_place": lambda weight: weight.mul_(1.5),
    "data_in_place": lambda weight: weight.data.mul_(1.5),
    "data_replaced": lambda weight: setattr(weight, "data", weight.data * 1.5),
}


# A write through `.data` shows in no version counter and no pointer: it is seen while no slot holds the layer, as on a
# model that has not run yet. `LayerWeights.reconcile` says so.
@pytest.mark.parametrize(
    ("change", "warm"), [(c, w) for c in CHANGES for w in (False, True) if (c, w) != ("data_in_place", True)]
)
def test_a_changed_base_weight_is_seen_by_the_next_step(change: str, warm: bool) -> None:
    def use(model: nn.Module) -> list[torch.Tensor]:
        if warm:
            forward_backward(model)
        with torch.no_grad():
            for layer in model.get_base_model().model.layers:
                CHANGES[change](layer.mlp.down_proj.base_layer.weight)
                CHANGES[change](layer.input_layernorm.weight)
        return [forward_backward(model)]

    assert_equal_training(use)


def test_load_state_dict_into_a_wrapped_model_is_seen_by_the_next_step() -> None:
    rows = batch()
    other = build(seed=7).eval()
    with closing(wrapped(build().eval())) as model, torch.no_grad():
        before = model(**rows).logits
        model.load_state_dict(other.state_dict())
        assert torch.equal(model(**rows).logits, other(**rows).logits)
        assert not torch.equal(model(**rows).logits, before)


def test_base_weight_replaced_by_a_new_parameter_is_seen_or_refused() -> None:
    rows = batch()
    plain = build().eval()
    with closing(wrapped(build().eval())) as model, torch.no_grad():
        model(**rows)
        replaced = nn.Parameter(plain.model.layers[2].mlp.up_proj.weight * 2, requires_grad=False)
        plain.model.layers[2].mlp.up_proj.weight = replaced
        model.model.layers[2].mlp.up_proj.weight = nn.Parameter(replaced.clone(), requires_grad=False)
        assert torch.equal(model(**rows).logits, plain(**rows).logits)


def test_resized_embeddings_are_equal() -> None:
    rows = batch()
    plain = build().eval()
    with closing(wrapped(build().eval())) as model, torch.no_grad():
        for lm in (plain, model):
            torch.manual_seed(0)
            lm.resize_token_embeddings(136, mean_resizing=False)
        assert torch.equal(model(**rows).logits, plain(**rows).logits)


# ---- unfreezing ----


def test_layers_unfrozen_after_the_wrap_keep_their_parameter_objects() -> None:
    with closing(wrapped(build(num_layers=5))) as model:
        objects = [id(p) for p in model.model.layers[-1].parameters()]
        model.model.layers[-1].requires_grad_(True)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        before = trainables(model)
        forward_backward(model)
        optimizer.step()
        assert [id(p) for p in model.model.layers[-1].parameters()] == objects
        assert all(not torch.equal(before[n], p) for n, p in trainables(model).items())
        first = forward_backward(model)
    resident = build(num_layers=5)
    resident.requires_grad_(False)
    resident.model.layers[-1].requires_grad_(True)
    optimizer = torch.optim.SGD([p for p in resident.parameters() if p.requires_grad], lr=0.5)
    forward_backward(resident)
    optimizer.step()
    assert torch.equal(forward_backward(resident), first)
    assert_same_tensors(trainables(model), trainables(resident))


def test_lora_over_an_unfrozen_layer_merges_and_trains_on() -> None:
    def use(model: nn.Module) -> list[torch.Tensor]:
        last = model.get_base_model().model.layers[-1]
        last.mlp.down_proj.base_layer.weight.requires_grad_(True)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        losses = []
        for _ in range(2):
            optimizer.zero_grad()
            losses.append(forward_backward(model))
            optimizer.step()
            model.merge_adapter()
            model.unmerge_adapter()
        optimizer.zero_grad()
        losses.append(forward_backward(model))
        return [*losses, last.mlp.down_proj.base_layer.weight.detach().clone()]

    assert_equal_training(use)


def test_frozen_again_after_training_is_equal() -> None:
    def use(model: nn.Module) -> list[torch.Tensor]:
        losses = [forward_backward(model)]
        for name, parameter in model.named_parameters():
            if ".layers.3." in name or ".layers.1." in name:
                parameter.requires_grad_(False)
                parameter.grad = None
        return [*losses, forward_backward(model)]

    assert_equal_training(use)
