"""Every architecture trains streamed as it does resident, with no code of its own: wrapped, and loaded."""

from __future__ import annotations

import functools
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from models import (
    ARCHITECTURES,
    NUM_LAYERS,
    ORDERS,
    STOCK,
    TRANSFORMERS_5,
    Trajectory,
    adapt,
    assert_same_run,
    assert_same_tensors,
    batch,
    build,
    closing,
    enable_checkpointing,
    forward_backward,
    gradients,
    lora,
    prepare,
    train,
)
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

from hf_lema import LemaConfig, LemaModelWrapper, get_streamer

pytestmark = pytest.mark.integration

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TIERS = {"ram": LemaConfig(), "disk": LemaConfig(ram_budget="min")}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@functools.cache
def resident_run(architecture: str, precision: str, loaded: bool = False) -> Trajectory:
    """A loaded bf16 model has its rotary frequencies in fp32, a cast one in bf16: each is compared with its like."""
    model = build(architecture, dtype=DTYPES[precision])
    with tempfile.TemporaryDirectory() as folder:
        if loaded:
            model.save_pretrained(folder)
            model = type(model).from_pretrained(folder, dtype="auto", attn_implementation="eager")
        return train(prepare(STOCK, model, lora(architecture)), Path(folder), gradient_checkpointing=True)


def load(folder: Path, config: LemaConfig, dtype: torch.dtype | None = None, **kwargs: Any) -> Any:
    return LemaModelWrapper.from_pretrained(
        str(folder), config, dtype=dtype, device="cpu", attn_implementation="eager", **kwargs
    )


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_wrapped_model_trains_as_the_resident_one(
    architecture: str, order: str, precision: str, tmp_path: Path
) -> None:
    model = prepare(order, build(architecture, dtype=DTYPES[precision]), lora(architecture))
    with closing(model):
        found = train(model, tmp_path, gradient_checkpointing=order == ORDERS[0])
        assert get_streamer(model).num_streamed == NUM_LAYERS
        assert get_streamer(model).stats().h2d_bytes > 0
    assert_same_run(found, resident_run(architecture, precision))


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loaded_model_trains_as_the_resident_one(architecture: str, precision: str, tier: str, tmp_path: Path) -> None:
    build(architecture, dtype=DTYPES[precision]).save_pretrained(tmp_path / "saved")
    model = load(tmp_path / "saved", TIERS[tier])
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert isinstance(model, LemaModelWrapper)
    assert_same_tensors(model.state_dict(), build(architecture, dtype=DTYPES[precision]).state_dict())
    model = adapt(model, lora(architecture))
    with closing(model):
        assert get_streamer(model).host_store.tier == tier
        found = train(model, tmp_path, gradient_checkpointing=tier == "disk")
        assert get_streamer(model).num_streamed == NUM_LAYERS
        assert (get_streamer(model).stats().disk_bytes > 0) == (tier == "disk")
    assert_same_run(found, resident_run(architecture, precision, loaded=True))


COMMON: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "head_dim": 8,
    "sliding_window": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "attn_implementation": "eager",
}
EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
RECURRENT: dict[str, dict[str, Any]] = {
    "jamba": EXPERTS | {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False, "mamba_d_state": 8},
    "qwen3_next": EXPERTS
    | {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
    "recurrent_gemma": {"lru_width": 32, "attention_window_size": 8},
}
OTHERS: dict[str, dict[str, Any]] = {
    "cohere2": {},
    "gemma3_text": {},
    "glm4": {},
    "gpt_neox": {},
    "gpt_oss": EXPERTS,
    "granite": {},
    "lfm2": {},
    "nemotron": {},
    "olmo2": {},
    "olmoe": EXPERTS,
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "phi": {},
    "qwen2_moe": EXPERTS,
    "qwen3_moe": EXPERTS,
    "smollm3": {},
    "stablelm": {},
    "starcoder2": {},
}


@pytest.mark.skipif(not TRANSFORMERS_5, reason="configurations differ before transformers 5")
@pytest.mark.parametrize("model_type", [*RECURRENT, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_more_architectures_need_no_code_of_their_own(model_type: str) -> None:
    config_class = type(AutoConfig.for_model(model_type))
    known = set(config_class().to_dict()) | {"attn_implementation", "num_hidden_layers", "num_attention_heads"}
    fields = {name: value for name, value in (COMMON | (RECURRENT | OTHERS)[model_type]).items() if name in known}
    results = []
    for order in (STOCK, *ORDERS):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            base = AutoModelForCausalLM.from_config(config_class(**fields)).train()
        with closing(prepare(order, base, lora(target_modules="all-linear", lora_dropout=0.0))) as model:
            if order == STOCK and base.supports_gradient_checkpointing:
                enable_checkpointing(
                    model
                )  # what equality is promised with; OPT without it differs from itself with it
            loss = forward_backward(model)
            with torch.no_grad():
                logits = model.eval()(**batch()).logits
            results.append(({"loss": loss, "logits": logits}, gradients(model)))
    for outputs, grads in results[1:]:
        assert_same_tensors(outputs, results[0][0])
        assert_same_tensors(grads, results[0][1])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_visits_cut_into_micro_batches_differ_by_rounding_alone(architecture: str) -> None:
    rows = batch(5)
    fields = {"attn_pdrop": 0.0, "resid_pdrop": 0.0} if architecture == "gpt2" else {}
    results = []
    for micro_batch_size in (0, 2):
        base = build(architecture, dtype=torch.float64, **fields)
        if architecture == "mixtral":
            base.config._experts_implementation = "eager"  # the grouped kernel knows no float64
        peft_config = lora(architecture, lora_dropout=0.0)
        model = prepare(ORDERS[0], base, peft_config, config=LemaConfig(micro_batch_size=micro_batch_size))
        with closing(model), warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            model.double()
            results.append((forward_backward(model, rows), gradients(model)))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-12, atol=0.0)
    for name, expected in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], expected, rtol=1e-7, atol=1e-12, msg=name)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loaded_sharded_model_in_another_dtype_answers_as_the_plain_one(
    architecture: str, tier: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    build(architecture).save_pretrained(tmp_path / "saved", max_shard_size="60KB")
    plain = type(build(architecture)).from_pretrained(
        tmp_path / "saved", dtype=torch.bfloat16, attn_implementation="eager"
    )
    rows = batch()
    with closing(load(tmp_path / "saved", TIERS[tier], dtype=torch.bfloat16)) as model, torch.no_grad():
        assert model.dtype == plain.dtype == torch.bfloat16
        assert_same_tensors(model.state_dict(), plain.state_dict())
        assert torch.equal(model(**rows).logits, plain(**rows).logits)
        settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
        prompt = rows["input_ids"][:1, :6]
        assert torch.equal(model.generate(input_ids=prompt, **settings), plain.generate(input_ids=prompt, **settings))


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
def test_adapter_trained_on_a_loaded_model_answers_alike_on_a_plain_one_and_merges(
    architecture: str, tier: str, tmp_path: Path
) -> None:
    build(architecture).save_pretrained(tmp_path / "saved")
    model = adapt(load(tmp_path / "saved", TIERS[tier]), lora(architecture))
    with closing(model), torch.no_grad():
        with torch.enable_grad():
            train(model, tmp_path)
        model.save_pretrained(tmp_path / "adapter")
        expected = model.eval()(**batch()).logits
        plain = PeftModel.from_pretrained(build(architecture), tmp_path / "adapter").eval()
        assert torch.equal(plain(**batch()).logits, expected)
        merged, plain_merged = model.merge_and_unload(), plain.merge_and_unload()
        assert_same_tensors(merged.state_dict(), plain_merged.state_dict())
        assert torch.equal(merged(**batch()).logits, plain_merged(**batch()).logits)
    before = build(architecture).state_dict()
    again = type(build(architecture)).from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert_same_tensors(again.state_dict(), before)  # the checkpoint's files are as they were


@pytest.mark.parametrize("method", ["pissa", "olora"])
@pytest.mark.parametrize("tier", TIERS)
def test_initialisation_that_changes_base_weights_is_kept_on_both_tiers(method: str, tier: str, tmp_path: Path) -> None:
    build().save_pretrained(tmp_path / "saved")
    resident = prepare(STOCK, build(), lora(init_lora_weights=method))
    expected = train(resident, tmp_path, gradient_checkpointing=True)
    model = adapt(load(tmp_path / "saved", TIERS[tier]), lora(init_lora_weights=method))
    with closing(model):
        assert_same_run(train(model, tmp_path), expected)
        assert_same_tensors(model.state_dict(), resident.state_dict())


@pytest.mark.parametrize("tier", TIERS)
def test_last_layers_unfrozen_after_loading_train_as_in_the_resident_model(tier: str, tmp_path: Path) -> None:
    build(num_layers=5).save_pretrained(tmp_path / "saved")

    def unfrozen(model: Any) -> Any:
        model.requires_grad_(False)
        model.model.layers[-2:].requires_grad_(True)
        return model

    resident = unfrozen(build(num_layers=5))
    expected = train(resident, tmp_path)
    with closing(unfrozen(load(tmp_path / "saved", TIERS[tier]))) as model:
        assert_same_run(train(model, tmp_path), expected)
        Path(tmp_path / "out").mkdir()
        model.save_pretrained(tmp_path / "out")
    assert_same_tensors(type(resident).from_pretrained(tmp_path / "out").state_dict(), resident.state_dict())


def test_tied_embeddings_stay_tied_and_are_saved_once(tmp_path: Path) -> None:
    from safetensors import safe_open

    build(tie_word_embeddings=True).save_pretrained(tmp_path / "saved")
    with closing(load(tmp_path / "saved", LemaConfig())) as model:
        assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
        model.save_pretrained(tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118 - not a mapping
