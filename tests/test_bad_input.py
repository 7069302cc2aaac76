"""What cannot work is refused by name, what fails surfaces with its cause, and afterwards nothing is lost."""

from __future__ import annotations

import copy
import gc
import json
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
import transformers
from models import (
    CACHE,
    NUM_LAYERS,
    ORDERS,
    PEFT_THEN_WRAP,
    SEQ_LEN,
    STOCK,
    TRANSFORMERS_5,
    WRAP_THEN_PEFT,
    RecordingTrainer,
    adapt,
    arguments,
    assert_same_run,
    assert_same_tensors,
    batch,
    build,
    closing,
    enable_checkpointing,
    examples,
    forward_backward,
    gradients,
    lora,
    prepare,
    train,
)
from peft import PrefixTuningConfig
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer, TrainingArguments

from hf_lema import LemaConfig, LemaModelWrapper, StepChoices, get_streamer
from hf_lema.runtime.schedule import Direction

pytestmark = pytest.mark.integration


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def wrapped(model: Any = None, **kwargs: Any) -> Any:
    return LemaModelWrapper.wrap(build() if model is None else model, LemaConfig(**kwargs), device="cpu")


def assert_works_as_ever(model: nn.Module, order: str = WRAP_THEN_PEFT) -> None:
    """A streamed model made by `prepare` still has the numbers of the resident one."""
    resident = prepare(STOCK)
    enable_checkpointing(resident)
    model.zero_grad()
    assert torch.equal(forward_backward(model), forward_backward(resident))
    assert_same_tensors(gradients(model), gradients(resident))


def assert_plain(model: nn.Module) -> None:
    """Nothing of a wrap is left in the model, and it computes."""
    assert not isinstance(model, LemaModelWrapper)
    assert not [n for n, m in model.named_modules() if {"_lema", "_lema_runtime", "_hf_hook"} & set(m.__dict__)]
    assert_same_tensors(model.state_dict(), build().state_dict())
    with torch.no_grad():
        assert torch.equal(model.eval()(**batch()).logits, build().eval()(**batch()).logits)


# ---- what can be wrapped ----


def test_module_that_is_no_transformers_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected a transformers model.*Linear"):
        LemaModelWrapper.wrap(nn.Linear(2, 2), device="cpu")


def test_model_without_a_decoder_layer_list_is_refused() -> None:
    config = transformers.BartConfig(
        d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=16, decoder_ffn_dim=16, vocab_size=32, max_position_embeddings=32,
    )  # fmt: skip
    with pytest.raises(ValueError, match="decoder layers"):
        LemaModelWrapper.wrap(transformers.BartForConditionalGeneration(config), device="cpu")


def test_model_on_meta_is_refused() -> None:
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(build().config)
    with pytest.raises(ValueError, match=r"meta.*from_pretrained"):
        LemaModelWrapper.wrap(model, device="cpu")


def test_model_spread_by_accelerate_is_refused() -> None:
    model = build()
    model.hf_device_map = {"model.embed_tokens": 0, "model.layers.0": "cpu"}
    with pytest.raises(ValueError, match="accelerate has spread"):
        LemaModelWrapper.wrap(model, device="cpu")


def test_model_of_8_bits_is_refused(tmp_path: Path) -> None:
    build().save_pretrained(tmp_path)
    config = transformers.BitsAndBytesConfig(load_in_8bit=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, device_map="cpu")
    with pytest.raises(ValueError, match="quantized"):
        LemaModelWrapper.wrap(model, device="cpu")


def test_quantized_linears_put_in_by_hand_are_refused() -> None:
    model = build()
    model.requires_grad_(False)
    for layer in model.model.layers:
        linear = bitsandbytes.nn.Linear4bit(32, 64, bias=False, quant_type="nf4")
        linear.load_state_dict(layer.mlp.up_proj.state_dict())
        layer.mlp.up_proj = linear.to("cpu")
        layer.mlp.up_proj.requires_grad_(False)
    with pytest.raises(ValueError, match="quantized"):
        LemaModelWrapper.wrap(model, device="cpu")


@pytest.mark.parametrize("of_peft_model", [False, True])
def test_second_wrap_is_refused_and_the_first_goes_on(of_peft_model: bool) -> None:
    model = prepare(WRAP_THEN_PEFT)
    with closing(model):
        for again in (LemaModelWrapper.wrap, LemaModelWrapper):
            with pytest.raises(RuntimeError, match=r"wrapped already.*unwrap"):
                again(model if of_peft_model else model.get_base_model())
        assert_works_as_ever(model)


def test_unwrap_and_get_streamer_of_a_plain_model_say_so() -> None:
    for call in (LemaModelWrapper.unwrap, get_streamer):
        with pytest.raises(ValueError, match="not wrapped"):
            call(build())


def test_bf16_on_a_card_without_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla T4")
    model = build(dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"bfloat16.*Tesla T4.*7\.5.*float16.*fp16=True"):
        LemaModelWrapper.wrap(model, device="cuda:0")
    assert not isinstance(model, LemaModelWrapper)


@pytest.mark.parametrize("from_checkpoint", [False, True])
def test_4_bit_layers_on_a_card_without_kernels_for_them_are_refused(
    from_checkpoint: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (5, 2))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "GeForce GTX 980")
    model, config = build(dtype=torch.float16), LemaConfig(quantization="nf4")
    model.save_pretrained(tmp_path)
    wrap, source = (
        (LemaModelWrapper.from_pretrained, str(tmp_path)) if from_checkpoint else (LemaModelWrapper.wrap, model)
    )
    with pytest.raises(ValueError, match=r"GTX 980.*5\.2.*below 6\.0.*leave quantization out"):
        wrap(source, config, device="cuda:0")
    assert not isinstance(model, LemaModelWrapper)


def test_device_that_cannot_compute_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="meta"):
        LemaModelWrapper.wrap(build(), device="meta")


def test_vram_budget_below_the_minimum_says_what_works_and_leaves_the_model_plain() -> None:
    model = build()
    with pytest.raises(ValueError, match=r"vram_budget is .*KiB.*KiB is the least that works"):
        wrapped(model, vram_budget=20_000)
    assert_plain(model)
    with closing(wrapped(model)) as again, torch.no_grad():
        assert torch.equal(again.eval()(**batch()).logits, build().eval()(**batch()).logits)


@pytest.mark.parametrize("ram_budget", ["min", 10_000])
def test_ram_budget_too_small_for_a_model_in_memory_leaves_it_plain(ram_budget: Any) -> None:
    model = build()
    with pytest.raises(ValueError, match=r"ram_budget is .*from_pretrained"):
        wrapped(model, ram_budget=ram_budget)
    assert_plain(model)


# ---- what a wrapped model refuses ----


CASTS: dict[str, Callable[[Any], Any]] = {
    "half": lambda model: model.half(),
    "bfloat16": lambda model: model.bfloat16(),
    "double": lambda model: model.double(),
    "to_dtype": lambda model: model.to(torch.float16),
    "to_device_and_dtype": lambda model: model.to("cpu", torch.bfloat16),
    "type": lambda model: model.type(torch.float16),
}


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("order", ORDERS)
def test_cast_is_refused_and_changes_nothing(order: str, cast: str) -> None:
    with closing(prepare(order)) as model:
        for each in (model, model.get_base_model()):
            with pytest.raises(TypeError, match=r"cannot be cast from torch.float32.*from_pretrained.*unwrap"):
                CASTS[cast](each)
        assert_works_as_ever(model)


def test_cast_to_the_dtype_it_has_is_no_cast() -> None:
    with closing(prepare(WRAP_THEN_PEFT)) as model:
        model.float()
        model.to(torch.float32)
        assert_works_as_ever(model)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": pickle.dumps,
}


@pytest.mark.parametrize("way", COPIES)
def test_copies_and_pickles_are_refused_with_the_remedy(way: str) -> None:
    with closing(prepare(WRAP_THEN_PEFT)) as model:
        lm = model.get_base_model()
        for part in (lm, lm.model.layers[0]) if way == "copy" else (model, lm, lm.model, lm.model.layers[0]):
            with pytest.raises(TypeError, match=r"cannot be copied or pickled.*save_pretrained.*unwrap"):
                COPIES[way](part)
        assert_works_as_ever(model)


def test_torch_save_of_a_wrapped_model_is_refused_but_not_of_its_state(tmp_path: Path) -> None:
    with closing(wrapped()) as model:
        with pytest.raises(TypeError, match="cannot be copied or pickled"):
            torch.save(model, tmp_path / "model.pt")
        torch.save(model.state_dict(), tmp_path / "state.pt")
        assert_same_tensors(torch.load(tmp_path / "state.pt"), build().state_dict())


@pytest.mark.parametrize("of_peft_model", [False, True])
def test_data_parallel_is_refused_with_the_line_that_helps(
    of_peft_model: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two visible devices, as DataParallel sees them, on a machine without any. Streamed weights rest on the host, which
    # is not the first device, just as here.
    model = prepare(WRAP_THEN_PEFT)
    with closing(model):
        parallel = nn.DataParallel(model if of_peft_model else model.get_base_model())
        parallel.device_ids, parallel.dim = [0, 1], 0
        parallel.output_device, parallel.src_device_obj = 0, torch.device("cpu")
        monkeypatch.setattr(
            sys.modules["torch.nn.parallel.replicate"],  # the package names the function so, not the module
            "_broadcast_coalesced_reshape",
            lambda tensors, devices, detach=False: [list(tensors) for _ in devices],
        )
        monkeypatch.setattr(parallel, "scatter", lambda inputs, kwargs, ids: ([inputs] * 2, [kwargs] * 2))
        with pytest.raises(RuntimeError, match=r"DataParallel.*CUDA_VISIBLE_DEVICES=0.*(torchrun|accelerate launch)"):
            parallel(**batch())
        assert_works_as_ever(model)


def test_trainer_on_two_visible_gpus_without_a_launcher_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = prepare(WRAP_THEN_PEFT)
    with closing(model):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        with pytest.raises(RuntimeError, match=r"CUDA_VISIBLE_DEVICES=0"):
            Trainer(model=model, args=TrainingArguments("unused", use_cpu=True, report_to=[]))


def test_data_parallel_over_one_device_is_no_data_parallel() -> None:
    model = prepare(WRAP_THEN_PEFT)
    with closing(model):
        assert torch.equal(forward_backward(nn.DataParallel(model)), forward_backward(prepare(STOCK)))


# ---- outputs and arguments that would lose their gradient ----


@pytest.mark.parametrize("by", ["argument", "config"])
def test_router_logits_with_gradients_are_refused_by_name(by: str) -> None:
    model = prepare(WRAP_THEN_PEFT, build("mixtral", output_router_logits=by == "config"), lora("mixtral"))
    with closing(model), pytest.raises(ValueError, match="router_logits"):
        model(**batch(), **({"output_router_logits": True} if by == "argument" else {}))


@pytest.mark.parametrize("by", ["argument", "config"])
def test_attentions_with_gradients_are_refused_by_name(by: str) -> None:
    model = prepare(WRAP_THEN_PEFT, build(output_attentions=by == "config"))
    with closing(model), pytest.raises(ValueError, match="attentions"):
        model(**batch(), **({"output_attentions": True} if by == "argument" else {}))


def test_router_logits_and_attentions_without_gradients_are_those_of_the_plain_model() -> None:
    rows = batch()
    flags = {"output_router_logits": True, "output_attentions": True, "output_hidden_states": True}
    plain = build("mixtral").eval()
    with closing(wrapped(build("mixtral").eval())) as model, torch.no_grad():
        expected, found = (lm(**rows, **flags) for lm in (plain, model))
    assert torch.equal(found.loss, expected.loss)
    assert torch.equal(found.aux_loss, expected.aux_loss)
    for name in ("router_logits", "attentions", "hidden_states"):
        assert len(found[name]) == len(expected[name]) > 0
        assert all(torch.equal(f, e) for f, e in zip(found[name], expected[name], strict=True))


def test_training_goes_on_after_a_refused_output() -> None:
    with closing(prepare(WRAP_THEN_PEFT)) as model:
        with pytest.raises(ValueError, match="attentions"):
            model(**batch(), output_attentions=True)
        assert_works_as_ever(model)


def test_an_argument_that_needs_a_gradient_is_refused_by_name() -> None:
    mask = torch.zeros(2, 1, 16, 16, requires_grad=True)
    rows = batch()
    rows.pop("attention_mask")
    with closing(prepare(WRAP_THEN_PEFT)) as model:
        with pytest.raises(ValueError, match=r"attention_mask.*need a gradient"):
            model(**rows, attention_mask=mask + 0)
        assert_works_as_ever(model)


@pytest.mark.skipif(not TRANSFORMERS_5, reason="Gemma 4 came with transformers 5")
@pytest.mark.parametrize("use_cache", [True, False])
def test_keys_and_values_shared_through_an_argument_are_refused_and_not_silently_detached(use_cache: bool) -> None:
    config = transformers.Gemma4TextConfig(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, global_head_dim=8, max_position_embeddings=128, sliding_window=8,
        num_kv_shared_layers=2, vocab_size_per_layer_input=128, hidden_size_per_layer_input=8, pad_token_id=0,
        layer_types=["sliding_attention", "full_attention"] * 3,
    )  # fmt: skip
    peft_config = lora(target_modules=["q_proj", "k_proj", "v_proj"], lora_dropout=0.0)
    model = prepare(WRAP_THEN_PEFT, transformers.Gemma4ForCausalLM(config), peft_config)
    with closing(model), pytest.raises(ValueError, match=r"layer \d+.*shared_kv_states"):
        forward_backward(model, {**batch(), "use_cache": use_cache})


def test_a_prefix_in_the_cache_with_gradients_is_refused_by_name() -> None:
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with closing(prepare(PEFT_THEN_WRAP, build(), config)) as model, pytest.raises(ValueError, match=CACHE):
        model(**batch())


def test_a_filled_cache_with_gradients_is_refused_and_left_alone() -> None:
    with closing(prepare(WRAP_THEN_PEFT)) as model:
        tokens = batch(1)["input_ids"]
        with torch.no_grad():
            cache = model(tokens[:, :4], use_cache=True)[CACHE]
        with pytest.raises(ValueError, match=f"{CACHE} already holds tokens.*no_grad"):
            model(tokens[:, 4:], **{CACHE: cache})
        assert cache.get_seq_length() == 4


def test_unfreezing_after_training_began_is_refused_by_name(tmp_path: Path) -> None:
    with closing(prepare(WRAP_THEN_PEFT)) as model:
        train(model, tmp_path, max_steps=1)
        model.get_base_model().model.layers[2].requires_grad_(True)
        with pytest.raises(RuntimeError, match=r"layer 2.*unfrozen after training began"):
            model(**batch())


# ---- checkpoints ----


def saved(folder: Path, **kwargs: Any) -> Path:
    build().save_pretrained(folder, **kwargs)
    return folder


def load(folder: Path, **kwargs: Any) -> Any:
    return LemaModelWrapper.from_pretrained(str(folder), device="cpu", **kwargs)


@pytest.mark.parametrize("tier", ["ram", "disk"])
def test_folder_with_only_pickled_weights_is_refused(tier: str, tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(build().state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises((ValueError, FileNotFoundError), match=r"no safetensors.*pytorch_model\.bin"):
        load(tmp_path, config=LemaConfig(ram_budget="min" if tier == "disk" else "auto"))


def test_missing_shard_is_named(tmp_path: Path) -> None:
    saved(tmp_path, max_shard_size="50KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    shards[1].unlink()
    with pytest.raises((ValueError, FileNotFoundError), match=shards[1].name):
        load(tmp_path)


def test_truncated_shard_is_named(tmp_path: Path) -> None:
    saved(tmp_path, max_shard_size="50KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ValueError, match=shard.name):
        load(tmp_path)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd"])
def test_index_that_names_a_file_outside_its_folder_is_refused(name: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", max_shard_size="50KB")
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = name
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"outside|\.\./|/etc/passwd"):
        load(folder)


def test_quantization_and_device_map_are_refused_by_name(tmp_path: Path) -> None:
    saved(tmp_path)
    for name, value in (("device_map", "auto"), ("load_in_4bit", True)):
        with pytest.raises(ValueError, match=name):
            load(tmp_path, **{name: value})


def test_vram_budget_below_the_minimum_is_refused_when_loading(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="least that works"):
        load(saved(tmp_path), config=LemaConfig(vram_budget=20_000))


def test_file_cut_short_while_training_from_disk_surfaces_with_its_cause(tmp_path: Path) -> None:
    model = adapt(load(saved(tmp_path), config=LemaConfig(ram_budget="min")).train())
    with closing(model):
        assert get_streamer(model).host_store.tier == "disk"
        forward_backward(model)
        path = tmp_path / "model.safetensors"
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size // 4)
        with pytest.raises(RuntimeError, match="prefetch thread failed") as caught:
            forward_backward(model)
        assert "model.safetensors" in str(caught.value.__cause__)


def test_file_written_to_in_place_while_training_from_disk_is_never_trained_on(tmp_path: Path) -> None:
    model = adapt(load(saved(tmp_path), config=LemaConfig(ram_budget="min")).train())
    with closing(model):
        forward_backward(model)
        path = tmp_path / "model.safetensors"
        with path.open("r+b") as file:
            file.seek(-8, 2)
            file.write(b"\0" * 8)
        with pytest.raises(RuntimeError, match="prefetch thread failed") as caught:
            forward_backward(model)
        assert "written to while it was in use" in str(caught.value.__cause__)


def test_saving_into_the_folder_that_is_streamed_is_refused_and_elsewhere_works(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    (tmp_path / "link").symlink_to(folder)
    before = (folder / "model.safetensors").read_bytes()
    model = load(folder, config=LemaConfig(ram_budget="min"))
    with closing(model):
        for target in (folder, tmp_path / "link", str(folder)):
            with pytest.raises(ValueError, match="overwrite the files in use"):
                model.save_pretrained(target)
        model.save_pretrained(tmp_path / "copy")
    assert (folder / "model.safetensors").read_bytes() == before
    assert_same_tensors(load_file(tmp_path / "copy" / "model.safetensors"), load_file(folder / "model.safetensors"))


# ---- after the end ----


@pytest.mark.parametrize("use", ["forward", "generate", "train"])
def test_use_after_close_is_refused(use: str, tmp_path: Path) -> None:
    model = prepare(WRAP_THEN_PEFT)
    get_streamer(model).close()
    calls: dict[str, Callable[[], Any]] = {
        "forward": lambda: model(**batch()),
        "generate": lambda: model.generate(input_ids=batch()["input_ids"], max_new_tokens=2),
        "train": lambda: train(model, tmp_path),
    }
    with pytest.raises(RuntimeError, match=r"after close\(\)"):
        calls[use]()


def test_close_between_forward_and_backward_is_refused() -> None:
    model = prepare(WRAP_THEN_PEFT)
    loss = model(**batch()).loss
    get_streamer(model).close()
    with pytest.raises(RuntimeError, match=r"after close\(\)"):
        loss.backward()


def test_slot_overwritten_while_autograd_needs_it_is_an_error_and_not_a_wrong_number() -> None:
    with closing(wrapped(build(), num_slots=2)) as model:
        streamer = get_streamer(model)
        row = torch.ones(1, 32, requires_grad=True)
        with streamer.lease(0, Direction.FORWARD) as lent:
            kept = nn.functional.linear(row, lent["self_attn.q_proj.weight"]).sum()
        for layer_idx in range(1, NUM_LAYERS):
            with streamer.lease(layer_idx, Direction.FORWARD):
                pass
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            kept.backward()


@pytest.mark.timeout(30)
def test_layers_nested_deeper_than_there_are_slots_are_refused_and_do_not_hang() -> None:
    with closing(wrapped(build(), num_slots=2)) as model:
        streamer = get_streamer(model)
        with streamer.lease(0, Direction.FORWARD):
            pass
        with (
            streamer.lease(1, Direction.FORWARD),
            streamer.lease(0, Direction.FORWARD),
            pytest.raises(RuntimeError, match="slots are leased"),
            streamer.lease(2, Direction.FORWARD),
        ):
            pass
        with torch.no_grad():
            assert torch.equal(model.eval()(**batch()).logits, build().eval()(**batch()).logits)


# ---- the prefetch thread fails ----


class Broken(OSError):
    """What a disk might say."""


def break_read(model: nn.Module, after: int) -> None:
    """Makes the store fail at the read that follows ``after`` more good ones."""
    store = get_streamer(model).host_store
    read_into, left = store.read_into, [after]

    def failing(layer_idx: int, out: torch.Tensor) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise Broken(f"no more bytes for layer {layer_idx}")
        read_into(layer_idx, out)

    store.read_into = failing


@pytest.mark.timeout(60)
@pytest.mark.parametrize("after", [0, 1, 2, 3, 5])
@pytest.mark.parametrize("tier", ["ram", "disk"])
def test_failure_of_the_prefetch_thread_surfaces_with_its_cause_and_leaves_no_thread(
    tier: str, after: int, tmp_path: Path
) -> None:
    before = set(threading.enumerate())
    model = load(saved(tmp_path), config=LemaConfig(ram_budget="min" if tier == "disk" else "auto"))
    model = adapt(model.train())
    with closing(model):
        break_read(model, after)
        for _ in range(2):  # the second use says it again
            with pytest.raises(RuntimeError, match=r"prefetch thread failed; layer \d") as caught:
                [forward_backward(model) for _ in range(3)]
            assert isinstance(caught.value.__cause__, Broken)
        left = [t for t in set(threading.enumerate()) - before if "prefetcher" in t.name]
        for thread in left:
            thread.join(5.0)
        assert not [t for t in left if t.is_alive()]
        get_streamer(model).close()
        assert set(threading.enumerate()) <= before
        LemaModelWrapper.unwrap(model)
        assert torch.equal(forward_backward(model), forward_backward(adapt(build())))


@pytest.mark.timeout(60)
def test_failure_of_the_prefetch_thread_ends_a_trainer_run(tmp_path: Path) -> None:
    with closing(prepare(WRAP_THEN_PEFT)) as model:
        break_read(model, 9)
        with pytest.raises(RuntimeError, match="prefetch thread failed") as caught:
            train(model, tmp_path, max_steps=9)
        assert isinstance(caught.value.__cause__, Broken)


# ---- errors and Ctrl-C inside a step ----


@contextmanager
def raising(model: nn.Module, layer_idx: int, num_call: int, error: type[BaseException]) -> Iterator[None]:
    """Raises in the middle of a layer's forward at its ``num_call``-th run (the second is the recompute)."""
    calls = [0]

    def hook(*args: Any) -> None:
        calls[0] += 1
        if calls[0] == num_call:
            raise error("stopped")

    handle = model.get_base_model().model.layers[layer_idx].mlp.act_fn.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
@pytest.mark.parametrize("num_call", [pytest.param(1, id="forward"), pytest.param(2, id="backward")])
@pytest.mark.parametrize("layer_idx", [0, 2, NUM_LAYERS - 1])
@pytest.mark.parametrize("order", ORDERS)
def test_training_goes_on_right_after_an_interrupt_inside_a_layer(
    order: str, layer_idx: int, num_call: int, error: type[BaseException]
) -> None:
    with closing(prepare(order)) as model:
        rest = {n: p.data_ptr() for n, p in model.named_parameters()}
        with raising(model, layer_idx, num_call, error), pytest.raises(error, match="stopped"):
            forward_backward(model)
        assert {n: p.data_ptr() for n, p in model.named_parameters()} == rest
        for _ in range(2):
            assert_works_as_ever(model)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("num_call", [1, 3, NUM_LAYERS + 2])
def test_training_goes_on_right_after_an_interrupt_while_a_layer_is_taken(
    when: str, num_call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(prepare(WRAP_THEN_PEFT)) as model:
        prefetcher = get_streamer(model)._prefetcher
        take, calls = prefetcher.take, [0]

        def interrupted(layer_idx: int) -> Any:
            calls[0] += 1
            if calls[0] == num_call and when == "before":
                raise KeyboardInterrupt
            slot = take(layer_idx)
            if calls[0] == num_call:
                raise KeyboardInterrupt
            return slot

        monkeypatch.setattr(prefetcher, "take", interrupted)
        with pytest.raises(KeyboardInterrupt):
            forward_backward(model)
        for _ in range(2):
            assert_works_as_ever(model)


class Interrupting(dict[str, Any]):
    """A register of parameters whose ``num_write``-th write is cut off by Ctrl-C."""

    num_write = 0

    def __setitem__(self, name: str, value: Any) -> None:
        self.num_write -= 1
        if self.num_write == 0:
            raise KeyboardInterrupt
        super().__setitem__(name, value)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("num_write", [1, 2, 3, 4])
@pytest.mark.parametrize("path", ["mlp.down_proj.lora_A.default", "mlp.down_proj.base_layer", "input_layernorm"])
@pytest.mark.parametrize("kept_layers", [(), (1,)], ids=["recomputed", "kept"])
def test_training_goes_on_right_after_an_interrupt_while_parameters_are_swapped(
    kept_layers: tuple[int, ...], path: str, num_write: int
) -> None:
    model = adapt(build())
    owner = model.get_base_model().model.layers[1].get_submodule(path)
    register = Interrupting(owner._parameters)
    owner.__dict__["_parameters"] = register
    config = LemaConfig(choices=StepChoices(kept_layers=kept_layers))
    with closing(LemaModelWrapper.wrap(model, config, device="cpu")):
        names = [n for n, p in model.named_parameters() if p.requires_grad]
        register.num_write = num_write  # registered, given back, registered and given back again in the recompute
        with pytest.raises(KeyboardInterrupt):
            forward_backward(model)
        for _ in range(2):
            assert_works_as_ever(model)
        assert [n for n, p in model.named_parameters() if p.requires_grad] == names
        assert all(isinstance(p, nn.Parameter) for _, p in model.named_parameters())


@pytest.fixture
def in_the_foreground() -> Iterator[None]:
    """The signals of a foreground process: one in the background ignores SIGINT, and so do all that it starts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.timeout(60)
@pytest.mark.usefixtures("in_the_foreground")
def test_training_goes_on_right_after_an_interrupt_while_waiting_for_a_layer() -> None:
    with closing(prepare(WRAP_THEN_PEFT)) as model:
        store = get_streamer(model).host_store
        read_into, gate = store.read_into, threading.Event()
        entered, interrupted = threading.Event(), threading.Event()

        def gated(layer_idx: int, out: torch.Tensor) -> None:
            entered.set()
            gate.wait(20.0)
            read_into(layer_idx, out)

        store.read_into = gated

        def interrupt() -> None:
            entered.wait(20.0)
            main = threading.main_thread().ident
            while sys._current_frames()[main].f_code is not threading.Condition.wait.__code__:
                time.sleep(0.01)  # on a busy machine it may be elsewhere for long, even where an exception is ignored
            time.sleep(0.3)
            # The interpreter delivers no signal that comes just before a thread begins to wait; then there is another.
            for _ in range(3):
                signal.pthread_kill(main, signal.SIGINT)
                if interrupted.wait(5.0):
                    break

        thread = threading.Thread(target=interrupt, daemon=True)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            forward_backward(model)
        interrupted.set()
        thread.join(20.0)
        gate.set()
        for _ in range(2):
            assert_works_as_ever(model)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("kept_layers", [(), (1, 3)], ids=["recomputed", "kept"])
def test_training_goes_on_right_after_interrupts_at_any_moment(kept_layers: tuple[int, ...]) -> None:
    resident = prepare(STOCK)
    enable_checkpointing(resident)
    rows = batch()
    # A mask that is made already: transformers 4 makes one under torch.vmap, which an interrupt leaves half entered.
    visible = torch.ones(SEQ_LEN, SEQ_LEN, dtype=torch.bool).tril() & rows["attention_mask"][:, None, None, :].bool()
    rows["attention_mask"] = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    expected = forward_backward(resident, rows)
    num_interrupts = 0

    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    config = LemaConfig(choices=StepChoices(kept_layers=kept_layers))
    with closing(prepare(WRAP_THEN_PEFT, config=config)) as model:
        gc.collect()  # what other tests left: an interrupt while a weak reference to it is removed is only printed
        old = signal.signal(signal.SIGALRM, interrupt)
        try:
            for i in range(25):
                try:
                    signal.setitimer(signal.ITIMER_REAL, 0.0005 + 0.0017 * i)
                    for _ in range(20):
                        forward_backward(model, rows)
                except KeyboardInterrupt:
                    num_interrupts += 1
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0.0)
                # What torch's own contexts are left in between visits is torch's; later tests must not see it.
                torch.set_grad_enabled(True)
                torch.autocast_increment_nesting()
                while torch.autocast_decrement_nesting():
                    pass
                model.zero_grad()
                assert torch.equal(forward_backward(model, rows), expected)
                assert_same_tensors(gradients(model), gradients(resident))
        finally:
            signal.signal(signal.SIGALRM, old)
    assert num_interrupts >= 20


@pytest.mark.timeout(60)
def test_close_after_an_interrupt_ends_the_threads() -> None:
    before = set(threading.enumerate())
    model = prepare(WRAP_THEN_PEFT)
    with raising(model, 1, 2, KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        forward_backward(model)
    get_streamer(model).close()
    assert set(threading.enumerate()) <= before
    assert_same_tensors(LemaModelWrapper.unwrap(model).state_dict(), prepare(STOCK).state_dict())


def test_interrupted_trainer_run_can_be_run_again(tmp_path: Path) -> None:
    resident = prepare(STOCK)
    expected = train(resident, tmp_path, gradient_checkpointing=True)
    with closing(prepare(WRAP_THEN_PEFT)) as model:
        with raising(model, 2, 1, KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
            RecordingTrainer(model=model, args=arguments(tmp_path), train_dataset=examples()).train()
        model.zero_grad()
        assert_same_run(train(model, tmp_path), expected)


def test_error_while_loading_leaves_no_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_lema.model.loading import CheckpointSource

    def failing(self: Any, layer_idx: int, buffer: torch.Tensor) -> None:
        if layer_idx == 2:
            raise Broken("bad sector")

    monkeypatch.setattr(CheckpointSource, "write_layer", failing)
    before = set(threading.enumerate())
    with pytest.raises(Broken, match="bad sector"):
        load(saved(tmp_path))
    assert set(threading.enumerate()) <= before


@pytest.mark.timeout(60)
def test_a_wrapped_model_in_a_forked_child_says_so_and_its_close_touches_nothing() -> None:
    import multiprocessing

    def child(queue: Any) -> None:
        try:
            with torch.no_grad():
                model(**batch())
        except RuntimeError as error:
            queue.put(str(error))
        get_streamer(model).close()

    with closing(prepare(WRAP_THEN_PEFT)) as model:
        context = multiprocessing.get_context("fork")
        queue = context.SimpleQueue()
        process = context.Process(target=child, args=(queue,))
        process.start()
        process.join(30.0)
        assert process.exitcode == 0
        assert "forked child" in queue.get()
        assert_works_as_ever(model)
