"""On a real GPU: streamed 4-bit layers are stock QLoRA's bit for bit, and cost the device two packed layers."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import (
    adapt,
    assert_moved,
    assert_same_run,
    assert_same_tensors,
    batch,
    build,
    closing,
    forward_backward,
    gradients,
    lora,
    train,
    trainables,
)
from peft import prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from hf_lema import LemaConfig, LemaModelWrapper, get_streamer
from hf_lema.choices import StepChoices

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
SMALL = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4}
LLAMA_2_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
}


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    gc.collect()
    torch.cuda.empty_cache()


def saved(folder: Path, dtype: str, **shape: Any) -> Path:
    build(dtype=DTYPES[dtype], **shape).save_pretrained(folder)
    return folder


def stock(folder: Path, dtype: str) -> Any:
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=DTYPES[dtype],
    )
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=DTYPES[dtype], quantization_config=config, device_map={"": 0}, attn_implementation="eager"
    )


def streamed(folder: Path, dtype: str, tier: str = "ram") -> Any:
    config = LemaConfig(
        quantization="nf4",
        vram_budget="min",
        choices=StepChoices(),  # nothing that changes the order of a sum
        ram_budget="min" if tier == "disk" else "auto",
    )
    return LemaModelWrapper.from_pretrained(
        str(folder), config, dtype=DTYPES[dtype], device="cuda", attn_implementation="eager"
    )


def qlora(model: Any, architecture: str | None = "llama") -> Any:
    return adapt(
        prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False}),
        lora(architecture),
    )


def host_copies(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("tier", ["ram", "disk"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_fifty_steps_are_those_of_stock_qlora(
    dtype: str, tier: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_LEMA_CACHE", str(tmp_path / "cache"))
    folder = saved(tmp_path / "model", dtype, num_layers=6, **SMALL)
    settings: dict[str, Any] = {"max_steps": 50, dtype: True}
    reference = qlora(stock(folder, dtype))
    packed, expected = host_copies(reference), train(reference, tmp_path, **settings)
    with closing(qlora(streamed(folder, dtype, tier))) as model:
        assert_same_tensors(host_copies(model), packed)
        before = trainables(model)
        found = train(model, tmp_path, **settings)
        assert_same_run(found, expected)
        assert_moved(before, found.trainables)
        assert get_streamer(model).host_store.tier == tier
        assert get_streamer(model).num_streamed == 6


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_fifty_steps_of_the_7b_shape_are_those_of_stock_qlora(dtype: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", dtype, num_layers=4, **LLAMA_2_7B)
    settings: dict[str, Any] = {"max_steps": 50, dtype: True}
    expected = train(qlora(stock(folder, dtype)), tmp_path, **settings)
    with closing(qlora(streamed(folder, dtype))) as model:
        assert_same_run(train(model, tmp_path, **settings), expected)


@pytest.mark.parametrize("architecture", ["qwen2", "gemma2", "phi3", "gpt2", "mixtral"])
def test_architectures_are_those_of_stock_qlora(architecture: str, tmp_path: Path) -> None:
    build(architecture, dtype=torch.bfloat16).save_pretrained(tmp_path / "model")
    results = []
    for make in (stock, streamed):
        with closing(adapt(make(tmp_path / "model", "bf16").train(), lora(architecture))) as model:
            results.append((forward_backward(model), gradients(model)))
    assert torch.equal(results[0][0], results[1][0])
    assert_same_tensors(results[1][1], results[0][1])


def test_evaluation_generation_and_merge_are_those_of_stock_qlora(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", "bf16", num_layers=4, **SMALL)
    results = []
    for make in (stock, streamed):
        with closing(qlora(make(folder, "bf16"))) as model:
            train(model, tmp_path, max_steps=3, bf16=True)
            model.eval()
            rows = batch(device="cuda")
            with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):
                tensors = {"plain": model(**rows).logits}
                tensors["tokens"] = model.generate(input_ids=rows["input_ids"], max_new_tokens=6, do_sample=False)
                model.merge_adapter()
                tensors["merged"] = model(**rows).logits
            tensors |= host_copies(model.merge_and_unload())
            results.append({name: tensor.cpu() for name, tensor in tensors.items()})
    assert_same_tensors(results[1], results[0])


def test_device_holds_two_packed_layers_and_what_is_not_streamed(tmp_path: Path) -> None:
    folder = saved(
        tmp_path / "model", "fp16", num_layers=8, **(SMALL | {"hidden_size": 1024, "intermediate_size": 4096})
    )
    before_bytes = torch.cuda.memory_allocated()
    with closing(streamed(folder, "fp16")) as model:
        streamer = get_streamer(model)
        resident_bytes = sum(p.nbytes for p in model.parameters() if p.is_cuda)
        resident_bytes += sum(b.nbytes for b in model.buffers() if b.is_cuda)
        with torch.no_grad():
            model.eval()(**batch(device="cuda"))
        torch.cuda.synchronize()
        gc.collect()
        held_bytes = torch.cuda.memory_allocated() - before_bytes
        full_bytes = 2 * (2 * 1024 * 1024 + 2 * 1024 * 512 + 3 * 1024 * 4096)
        assert streamer.layer_bytes < full_bytes / 3.7
        # Code tables, cuBLAS's workspace and rounding to the allocator's blocks.
        assert held_bytes < resident_bytes + 2 * streamer.layer_bytes + 48 * 2**20
        assert all(p.device.type == "cpu" for p in model.parameters() if type(p).__name__ == "Params4bit")


def test_packing_on_the_device_holds_no_more_than_a_few_matrices(tmp_path: Path) -> None:
    shape = SMALL | {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 16}
    folder = saved(tmp_path / "model", "fp16", num_layers=6, **shape)
    torch.cuda.reset_peak_memory_stats()
    before_bytes = torch.cuda.memory_allocated()
    with closing(streamed(folder, "fp16")) as model:
        resident_bytes = sum(p.nbytes for p in model.parameters() if p.is_cuda)
        peak_bytes = torch.cuda.max_memory_allocated() - before_bytes - resident_bytes
        assert peak_bytes < 2 * get_streamer(model).layer_bytes + 2 * 6 * 2048 * 5632 * 2


def test_a_visit_of_a_packed_layer_never_waits_for_the_device(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", "fp16", num_layers=4, **SMALL)
    with closing(adapt(streamed(folder, "fp16").train(), lora("llama"))) as model:
        forward_backward(model)  # views, tables and streams are made
        lm = model.get_base_model().model
        hidden = torch.randn(2, 16, 256, device="cuda", dtype=torch.float16, requires_grad=True)
        rotary = lm.rotary_emb(hidden, torch.arange(16, device="cuda")[None])
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            output = lm.layers[1](hidden, position_embeddings=rotary, attention_mask=None)
            torch.autograd.grad(output, hidden, torch.ones_like(output))
        finally:
            torch.cuda.set_sync_debug_mode("default")
