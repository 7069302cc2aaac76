"""A streamed merge writes what PEFT's own merge in memory writes, bit for bit, or it writes nothing."""

from __future__ import annotations

import copy
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from models import ARCHITECTURES, TRANSFORMERS_5, build
from packaging.version import Version
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    PeftModel,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GenerationConfig, PreTrainedModel

from hf_lema import merge_and_save
from hf_lema.export import merging
from hf_lema.files import staging
from hf_lema.files.checkpoint import CheckpointIndex
from hf_lema.files.checkpoint_writer import CheckpointWriter, plan_checkpoint
from hf_lema.model import row_merge
from hf_lema.model.layer_tensors import PIECE_BYTES
from hf_lema.model.row_merge import RowMerger

pytestmark = pytest.mark.integration

NUM_LAYERS = 2
HALF = ["q_proj", "v_proj", "down_proj"]


def lora(**fields: Any) -> LoraConfig:
    return LoraConfig(**({"r": 4, "lora_alpha": 8, "target_modules": HALF, "task_type": "CAUSAL_LM"} | fields))


def save_base(folder: Path, architecture: str = "llama", dtype: torch.dtype = torch.float32, **fields: Any) -> Path:
    build(architecture, num_layers=NUM_LAYERS, dtype=dtype, **fields).save_pretrained(folder)
    return folder


def save_adapter(folder: Path, base: Path, config: PeftConfig, dtype: torch.dtype | None = None) -> Path:
    """An adapter as training leaves it: every tensor that it trains has moved."""
    torch.manual_seed(1)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype="auto"), copy.deepcopy(config))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    if dtype is not None:
        model.to(dtype)
    model.save_pretrained(folder)
    return folder


def stock_merge(base: Path, adapter: Path, dtype: Any = "auto") -> PreTrainedModel:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=dtype), adapter)
    return model.merge_and_unload()


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


def assert_same_files(found: Path, expected: Path) -> None:
    ours, theirs = tensors_of(found), tensors_of(expected)
    assert sorted(ours) == sorted(theirs)
    assert {name: t.dtype for name, t in ours.items()} == {name: t.dtype for name, t in theirs.items()}
    assert [name for name, tensor in theirs.items() if not torch.equal(ours[name], tensor)] == []


def assert_equal_to_stock(tmp_path: Path, base: Path, adapter: Path, dtype: torch.dtype | None = None) -> Path:
    """Merges both ways, compares the files and what stock loading makes of them; the merged folder."""
    stock = stock_merge(base, adapter, dtype or "auto")
    stock.save_pretrained(tmp_path / "stock")
    merge_and_save(base, adapter, tmp_path / "merged", dtype=dtype)
    assert_same_files(tmp_path / "merged", tmp_path / "stock")
    assert list(tmp_path.glob(".*.partial")) == []
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert loaded.dtype == stock.dtype
    expected = stock.state_dict()
    assert [name for name, t in loaded.state_dict().items() if not torch.equal(t, expected[name])] == []
    return tmp_path / "merged"


# ------------------------------------------------------------------------------------------------------ equal to PEFT

METHODS: dict[str, PeftConfig] = {
    "lora": lora(),
    "rslora": lora(use_rslora=True),
    "dora": lora(use_dora=True),
    "pissa": lora(init_lora_weights="pissa"),
    "olora": lora(init_lora_weights="olora"),
    "modules_to_save": lora(modules_to_save=["norm", "lm_head", "input_layernorm"]),
    "embeddings": lora(target_modules=["q_proj", "embed_tokens", "lm_head"]),
    "saved_embeddings": lora(modules_to_save=["embed_tokens", "lm_head"]),
    "trainable_tokens": lora(trainable_token_indices=[1, 5]),
    "patterns": lora(layers_to_transform=[1], rank_pattern={"q_proj": 2}, alpha_pattern={"layers.1.mlp.down_proj": 3}),
    "parameters": lora(target_modules=["q_proj"], target_parameters=["mlp.down_proj.weight"]),
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "loha": LoHaConfig(r=4, target_modules=HALF),
    "lokr": LoKrConfig(r=4, target_modules=HALF),
    "adalora": AdaLoraConfig(total_step=10, init_r=4, target_modules=HALF),
    "oft": OFTConfig(r=0, oft_block_size=4, target_modules=HALF),
    "vera": VeraConfig(r=4, target_modules=["q_proj"]),
}


# Half precision shows in which order PEFT adds and rounds; the others are tried where its arithmetic differs most.
@pytest.mark.parametrize(
    ("method", "dtype"),
    [(method, torch.bfloat16) for method in METHODS]
    + [(method, dtype) for method in ("lora", "dora", "pissa") for dtype in (torch.float32, torch.float16)],
)
def test_every_method_merges_as_peft_merges_it(tmp_path: Path, method: str, dtype: torch.dtype):
    if method == "vera" and Version(peft.__version__) < Version("0.18"):
        pytest.skip("that version saves the projection under a name that it does not find again")
    base = save_base(tmp_path / "base", dtype=dtype)
    adapter = save_adapter(tmp_path / "adapter", base, METHODS[method])
    merged = assert_equal_to_stock(tmp_path, base, adapter)
    before, after = tensors_of(base), tensors_of(merged)
    assert any(not torch.equal(after[name], tensor) for name, tensor in before.items()), "nothing was merged"


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The first row of every block that was merged, where blocks are as small as they can be."""
    merged: list[int] = []
    monkeypatch.setattr(row_merge, "BLOCK_VALUES", 1)
    take_rows = row_merge._take_rows

    def noted(twin: Any, adapter: str, weight: torch.Tensor, first: torch.Tensor) -> None:
        merged.append(weight.storage_offset() // weight.shape[1])
        take_rows(twin, adapter, weight, first)

    monkeypatch.setattr(row_merge, "_take_rows", noted)
    return merged


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_rows_merged_apart_are_those_that_peft_merges_at_once(tmp_path: Path, blocks: list[int], dtype: torch.dtype):
    base = save_base(tmp_path / "base", dtype=dtype, hidden_size=72, num_attention_heads=6)
    adapter = save_adapter(tmp_path / "adapter", base, lora(target_modules="all-linear", use_rslora=True))
    assert_equal_to_stock(tmp_path, base, adapter)
    assert {0, 16, 32, 48, 64} <= set(blocks), "the last block is not a whole one"


def test_a_shape_whose_blocks_come_out_otherwise_is_merged_whole(
    tmp_path: Path, blocks: list[int], monkeypatch: pytest.MonkeyPatch
):
    base = save_base(tmp_path / "base", dtype=torch.bfloat16)
    adapter = save_adapter(tmp_path / "adapter", base, lora())
    monkeypatch.setattr(row_merge, "_is_block_of", lambda *_: False)
    assert_equal_to_stock(tmp_path, base, adapter)
    assert blocks == []


def test_a_block_that_differs_in_its_last_bit_is_seen(blocks: list[int]):
    model = get_peft_model(build(hidden_size=64), lora(init_lora_weights=False)).requires_grad_(False)
    module: Any = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    whole = module.get_delta_weight("default")
    assert all(row_merge._is_block_of(module, whole, begin) for begin in range(0, 64, 16))
    whole[20, 3] = torch.nextafter(whole[20, 3], torch.tensor(9.0))
    assert [row_merge._is_block_of(module, whole, begin) for begin in range(0, 64, 16)] == [
        True,
        False,
        True,
        True,
    ]
    assert len(blocks) == 8


def test_merging_leaves_torch_the_threads_that_it_had():
    def in_a_new_thread() -> int:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(torch.get_num_threads).result()

    before = torch.get_num_threads(), in_a_new_thread()
    with RowMerger(2):
        assert (torch.get_num_threads(), in_a_new_thread()) == before
    assert (torch.get_num_threads(), in_a_new_thread()) == before


@pytest.mark.parametrize("method", ["lora", "modules_to_save", "embeddings", "saved_embeddings", "trainable_tokens"])
def test_tied_embeddings_are_saved_once_or_untied_as_peft_leaves_them(tmp_path: Path, method: str):
    base = save_base(tmp_path / "base", dtype=torch.bfloat16, tie_word_embeddings=True)
    adapter = save_adapter(tmp_path / "adapter", base, METHODS[method])
    merged = assert_equal_to_stock(tmp_path, base, adapter)
    is_tied = method not in ("modules_to_save", "saved_embeddings")
    assert ("lm_head.weight" in tensors_of(merged)) == (not is_tied)
    assert json.loads((merged / "config.json").read_text())["tie_word_embeddings"] == is_tied


@pytest.mark.parametrize("targets", [["q_proj", "lm_head"], ["q_proj", "embed_tokens"]], ids=["head", "embedding"])
def test_a_change_to_one_of_two_tied_weights_is_a_change_to_both(tmp_path: Path, targets: list[str]):
    base = save_base(tmp_path / "base", tie_word_embeddings=True)
    merged = assert_equal_to_stock(tmp_path, base, save_adapter(tmp_path / "a", base, lora(target_modules=targets)))
    embedding = "model.embed_tokens.weight"
    assert not torch.equal(tensors_of(merged)[embedding], tensors_of(base)[embedding])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_is_saved_as_stock_saves_it(tmp_path: Path, architecture: str):
    base = save_base(tmp_path / "base", architecture, torch.bfloat16)
    config = lora(target_modules=ARCHITECTURES[architecture][2], fan_in_fan_out=architecture == "gpt2")
    assert_equal_to_stock(tmp_path, base, save_adapter(tmp_path / "adapter", base, config))


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_are_merged(tmp_path: Path, bias: str):
    base = save_base(tmp_path / "base", "gpt2")
    config = lora(target_modules=["c_attn"], bias=bias, fan_in_fan_out=True)
    merged = assert_equal_to_stock(tmp_path, base, save_adapter(tmp_path / "adapter", base, config))
    before, after = tensors_of(base), tensors_of(merged)
    is_changed = not torch.equal(before["transformer.ln_f.bias"], after["transformer.ln_f.bias"])
    assert is_changed == (bias == "all")


@pytest.mark.skipif(not TRANSFORMERS_5, reason="experts are separate modules")
def test_adapters_on_fused_experts_are_written_expert_by_expert(tmp_path: Path):
    base = save_base(tmp_path / "base", "mixtral")
    config = lora(target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])
    merged = assert_equal_to_stock(tmp_path, base, save_adapter(tmp_path / "adapter", base, config))
    assert any("experts.3.w2" in name for name in tensors_of(merged))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_another_dtype_is_that_of_a_base_loaded_in_it(tmp_path: Path, dtype: torch.dtype):
    base = save_base(tmp_path / "base")
    adapter = save_adapter(tmp_path / "adapter", base, METHODS["saved_embeddings"])
    merged = assert_equal_to_stock(tmp_path, base, adapter, dtype)
    assert json.loads((merged / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


def test_an_adapter_in_half_precision_is_merged_as_peft_merges_it(tmp_path: Path):
    base = save_base(tmp_path / "base", dtype=torch.bfloat16)
    assert_equal_to_stock(tmp_path, base, save_adapter(tmp_path / "adapter", base, lora(), torch.bfloat16))


def test_an_adapter_trained_on_an_nf4_base_is_merged_into_the_full_precision_one(tmp_path: Path):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    base = save_base(tmp_path / "base", dtype=torch.float32, hidden_size=64)
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    for name in ("q_proj", "v_proj"):
        for layer in model.model.layers:
            old = getattr(layer.self_attn, name)
            new = bitsandbytes.nn.Linear4bit(old.in_features, old.out_features, bias=False, quant_type="nf4")
            new.load_state_dict(old.state_dict())
            setattr(layer.self_attn, name, new.to("cpu"))
    adapted = get_peft_model(model, lora(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    assert_equal_to_stock(tmp_path, base, tmp_path / "adapter")


# --------------------------------------------------------------------------------------------------------- the folder


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base and an adapter that fits it."""
    folder = tmp_path_factory.mktemp("pair")
    base = save_base(folder / "base")
    return base, save_adapter(folder / "adapter", base, lora())


@pytest.fixture
def own_pair(pair: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    """The same, to be damaged."""
    return tuple(Path(shutil.copytree(folder, tmp_path / folder.name)) for folder in pair)


def test_shards_and_their_index_hold_the_same_as_one_file(pair: tuple[Path, Path], tmp_path: Path):
    one = merge_and_save(*pair, tmp_path / "one")
    many = merge_and_save(*pair, tmp_path / "many", max_shard_size="20kB")
    assert one.num_files == 1
    assert many.num_files > 3
    assert_same_files(tmp_path / "many", tmp_path / "one")
    index = CheckpointIndex.open(tmp_path / "many")
    assert len(index.headers) == many.num_files
    assert len(index.tensors) == many.num_tensors == one.num_tensors
    assert sum(path.stat().st_size for path in (tmp_path / "many").glob("model*")) == many.nbytes
    AutoModelForCausalLM.from_pretrained(tmp_path / "many", dtype="auto")


def test_generation_config_and_tokenizer_of_the_base_come_along(own_pair: tuple[Path, Path], tmp_path: Path):
    base, adapter = own_pair
    GenerationConfig(max_new_tokens=7).save_pretrained(base)
    (base / "tokenizer_config.json").write_text('{"of": "base"}')
    (base / "tokenizer.json").write_text("{}")
    merge_and_save(base, adapter, tmp_path / "merged")
    assert GenerationConfig.from_pretrained(tmp_path / "merged").max_new_tokens == 7
    assert (tmp_path / "merged/tokenizer_config.json").read_text() == '{"of": "base"}'
    (adapter / "tokenizer_config.json").write_text('{"of": "adapter"}')
    merge_and_save(base, adapter, tmp_path / "other")
    assert (tmp_path / "other/tokenizer_config.json").read_text() == '{"of": "adapter"}'
    assert not (tmp_path / "other/tokenizer.json").exists(), "two tokenizers mixed"


def test_without_a_base_the_one_that_the_adapter_names_is_taken(pair: tuple[Path, Path], tmp_path: Path):
    merge_and_save(None, pair[1], tmp_path / "merged")
    merge_and_save(*pair, tmp_path / "named")
    assert_same_files(tmp_path / "merged", tmp_path / "named")


def test_an_empty_output_folder_is_taken_and_any_other_refused(pair: tuple[Path, Path], tmp_path: Path):
    (tmp_path / "empty").mkdir()
    merge_and_save(*pair, tmp_path / "empty")
    with pytest.raises(FileExistsError, match="is not empty"):
        merge_and_save(*pair, tmp_path / "empty")
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="is no folder"):
        merge_and_save(*pair, tmp_path / "file")


def test_upload_follows_the_write_and_a_bad_id_precedes_it(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    calls: list[Any] = []

    class Hub:
        def __init__(self, token: str | None) -> None:
            calls.append(("token", token))

        def create_repo(self, repo_id: str, exist_ok: bool) -> None:
            calls.append(("create", repo_id, exist_ok, (tmp_path / "merged").exists()))
            if repo_id == "taken":
                raise OSError("no rights")

        def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> None:
            calls.append(("upload", repo_id, sorted(path.name for path in folder_path.iterdir())))

    monkeypatch.setattr(merging, "HfApi", Hub)
    result = merge_and_save(*pair, tmp_path / "merged", push_to_hub="me/merged", token="secret")
    assert result.hub_id == "me/merged"
    assert calls[:2] == [("token", "secret"), ("create", "me/merged", True, False)]
    assert calls[2][:2] == ("upload", "me/merged")
    assert {"config.json", "generation_config.json", "model.safetensors"} == set(calls[2][2])
    with pytest.raises(OSError, match="no rights"):
        merge_and_save(*pair, tmp_path / "other", push_to_hub="taken")
    assert not (tmp_path / "other").exists()


# ------------------------------------------------------------------------------------------------------------ refused


def change_adapter(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    tensors = change(load_file(folder / "adapter_model.safetensors"))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def assert_refused(base: Path, adapter: Path, output: Path, error: type[Exception], *texts: str) -> None:
    before = sorted(output.parent.iterdir())
    with pytest.raises(error) as caught:
        merge_and_save(base, adapter, output)
    assert [text for text in texts if text not in str(caught.value)] == [], str(caught.value)
    assert sorted(output.parent.iterdir()) == before, "something is left"


def test_an_adapter_of_another_shape_is_refused_with_every_tensor(pair: tuple[Path, Path], tmp_path: Path):
    other = save_base(tmp_path / "other", hidden_size=64, num_attention_heads=8)
    names = [f"layers.{idx}.{name}.lora_A" for idx in range(2) for name in ("self_attn.q_proj", "mlp.down_proj")][::2]
    texts = ["has shape (4, 32), the model expects (4, 64)", *names]
    assert_refused(other, pair[1], tmp_path / "merged", ValueError, *texts)


def test_missing_and_foreign_tensors_are_all_named(own_pair: tuple[Path, Path], tmp_path: Path):
    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        lost = [name for name in tensors if "layers.0" in name and "lora_B" in name and "q_proj" in name]
        lost += [name for name in tensors if "layers.1" in name and "lora_A" in name and "v_proj" in name]
        extra = {f"base_model.model.model.layers.7.self_attn.q_proj.lora_{x}.weight": torch.ones(4, 4) for x in "AB"}
        return {name: tensor for name, tensor in tensors.items() if name not in lost} | extra

    change_adapter(own_pair[1], change)
    texts = ["layers.0.self_attn.q_proj.lora_B", "layers.1.self_attn.v_proj.lora_A", "missing from the adapter"]
    texts += ["layers.7.self_attn.q_proj.lora_A", "layers.7.self_attn.q_proj.lora_B", "is not in the model"]
    assert_refused(*own_pair, tmp_path / "merged", ValueError, *texts)


def test_values_that_are_not_finite_are_refused_by_name(own_pair: tuple[Path, Path], tmp_path: Path):
    def spoil(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        next(t for name, t in tensors.items() if "layers.1" in name and "q_proj.lora_B" in name)[0, 0] = float("nan")
        return tensors

    change_adapter(own_pair[1], spoil)
    assert_refused(*own_pair, tmp_path / "merged", ValueError, "not finite in 1 tensors", "layers.1.self_attn.q_proj")


def test_a_sum_that_overflows_is_refused_and_leaves_nothing(own_pair: tuple[Path, Path], tmp_path: Path):
    change_adapter(own_pair[1], lambda tensors: {n: t * (1e4 if "down_proj" in n else 1) for n, t in tensors.items()})
    with pytest.raises(ValueError, match=r"layers\.\d\.mlp\.down_proj\.weight[\s\S]*float16"):
        merge_and_save(*own_pair, tmp_path / "merged", dtype=torch.float16)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_an_adapter_without_its_files_or_only_pickled_is_refused(own_pair: tuple[Path, Path], tmp_path: Path):
    base, adapter = own_pair
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    assert_refused(base, adapter, tmp_path / "m", FileNotFoundError, "only adapter_model.bin", "can run code")
    (adapter / "adapter_model.bin").unlink()
    assert_refused(base, adapter, tmp_path / "m", FileNotFoundError, "holds no adapter_model.safetensors")
    (adapter / "adapter_config.json").unlink()
    assert_refused(base, adapter, tmp_path / "m", FileNotFoundError, "holds no adapter_config.json")


def test_cut_files_are_refused(own_pair: tuple[Path, Path], tmp_path: Path):
    base, adapter = own_pair
    weights = adapter / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-4])
    assert_refused(base, adapter, tmp_path / "merged", ValueError, "it was cut", "adapter_model.safetensors")
    weights.write_bytes(whole)
    os.truncate(base / "model.safetensors", 3000)
    assert_refused(base, adapter, tmp_path / "merged", ValueError, "model.safetensors", "cut")


def test_a_quantized_base_is_refused_with_the_remedy(own_pair: tuple[Path, Path], tmp_path: Path):
    packed = AutoModelForCausalLM.from_pretrained(
        own_pair[0], quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    )
    packed.save_pretrained(tmp_path / "packed")
    texts = ["already quantized (bitsandbytes)", "Use the checkpoint that it was made from"]
    assert_refused(tmp_path / "packed", own_pair[1], tmp_path / "merged", ValueError, *texts)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"init_lora_weights": "pissa_niter_4"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "corda"}, "path_initial_model_for_weight_conversion"),
        ({"layer_replication": [[0, 2]]}, "repeats layers"),
    ],
)
def test_adapters_that_cannot_be_merged_exactly_are_refused(
    own_pair: tuple[Path, Path], tmp_path: Path, values: dict[str, Any], text: str
):
    path = own_pair[1] / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    assert_refused(*own_pair, tmp_path / "merged", ValueError, text)


def test_a_prompt_is_no_change_of_weights(pair: tuple[Path, Path], tmp_path: Path):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    adapter = save_adapter(tmp_path / "prompt", pair[0], config)
    assert_refused(pair[0], adapter, tmp_path / "merged", ValueError, "changes the input, not the weights")


# ------------------------------------------------------------------------------------------------ full disks and kills


def test_a_full_disk_is_an_error_before_anything_is_written(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    assert_refused(*pair, tmp_path / "merged", OSError, "the merged model needs", "1000 B left")


@pytest.mark.parametrize("num_good", [1, 5])
def test_a_disk_that_becomes_full_on_the_way_leaves_nothing(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_good: int
):
    calls = []

    def full(descriptor: int, data: memoryview, offset: int) -> int:
        calls.append(offset)
        if len(calls) > num_good:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data, offset)

    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="became full at byte") as caught:
        merge_and_save(*pair, tmp_path / "merged")
    assert caught.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_leaves_nothing(pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupted(*_: Any) -> None:
        assert list(tmp_path.glob(".merged.*.partial/model.safetensors"))
        raise KeyboardInterrupt

    monkeypatch.setattr(CheckpointWriter, "write_part", interrupted)
    with pytest.raises(KeyboardInterrupt):
        merge_and_save(*pair, tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


KILLED = """
import sys, threading
from hf_lema import merge_and_save
from hf_lema.files.checkpoint_writer import CheckpointWriter
write_part = CheckpointWriter.write_part
num_written = 0
def stop_at_the_tenth(*arguments):
    global num_written
    num_written += 1
    if num_written == 10:
        print("waiting", flush=True)
        threading.Event().wait(60)
    write_part(*arguments)
CheckpointWriter.write_part = stop_at_the_tenth
merge_and_save(*sys.argv[1:])
"""


def test_a_killed_merge_leaves_no_model_and_can_be_run_again(pair: tuple[Path, Path], tmp_path: Path):
    output = tmp_path / "merged"
    command = [sys.executable, "-c", KILLED, *map(str, pair), str(output)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "waiting\n"
        assert not output.exists()
        (partial,) = tmp_path.glob(".merged.*.partial")
        merge_and_save(*pair, tmp_path / "merged-2")
        assert partial.exists(), "the folder of a living writer was taken away"
    finally:
        child.send_signal(signal.SIGKILL)
        child.communicate()
    assert partial.exists()
    merge_and_save(*pair, output)
    assert_same_files(output, tmp_path / "merged-2")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged", "merged-2"]


# ----------------------------------------------------------------------------------------------------------- the writer


def test_tensors_of_several_dtypes_lie_aligned_and_are_read_back(tmp_path: Path):
    tensors = {
        "a": torch.randn(3).to(torch.bfloat16),
        "b": torch.randn(2, 5),
        "c": torch.tensor(True),
        "d": torch.randn(7, dtype=torch.float64),
        "e": torch.empty(0, 4),
    }
    layout = plan_checkpoint({name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}, 10**6)
    with CheckpointWriter(tmp_path, layout) as writer:
        for name in reversed(tensors):
            writer.write(name, tensors[name])
    found = load_file(tmp_path / "model.safetensors")
    assert {name: (t.dtype, t.tolist()) for name, t in found.items()} == {
        name: (t.dtype, t.tolist()) for name, t in tensors.items()
    }
    assert all(location.offset_bytes % location.dtype.itemsize == 0 for location in layout.tensors.values())
    CheckpointIndex.open(tmp_path)


def test_a_checkpoint_that_was_not_finished_is_an_error(tmp_path: Path):
    layout = plan_checkpoint({"a": ((2,), torch.float32), "b": ((2,), torch.float32)}, 10**6)
    writer = CheckpointWriter(tmp_path, layout)
    with pytest.raises(RuntimeError, match=r"1 tensors of .* were not written: b"), writer:
        writer.write("a", torch.ones(2))
    with pytest.raises(ValueError, match=r"a is torch\.float32 of shape \(3,\), laid out was"):
        writer.write("a", torch.ones(3))


# ------------------------------------------------------------------------------------------------------------------ RAM

MEASURE_RAM = """
import re, sys, threading
from hf_lema import merge_and_save
def private_bytes():
    status = open("/proc/self/status").read()
    return 1024 * sum(int(re.search(rf"{key}:\\s+(\\d+)", status)[1]) for key in ("RssAnon", "RssShmem"))
for folder in sys.argv[1:]:
    base_bytes, peaks, done = private_bytes(), [0], threading.Event()
    def sample():
        while not done.wait(0.0005):
            peaks.append(private_bytes())
    sampler = threading.Thread(target=sample)
    sampler.start()
    merge_and_save(folder, folder + "/adapter", folder + "/merged")
    done.set()
    sampler.join()
    print(max(peaks) - base_bytes)
"""


def test_private_ram_is_bounded_by_two_layers_whatever_the_depth_and_the_vocabulary(tmp_path: Path):
    wide = {"hidden_size": 512, "intermediate_size": 1024, "num_local_experts": 2}
    cases = [("llama", 2, 64), ("llama", 10, 64), ("llama", 2, 40000), ("mixtral", 10, 64)]
    folders, layer_bytes = [], []
    for architecture, num_layers, vocab_size in [cases[0], *cases]:  # the first one warms up
        model = build(architecture, num_layers=num_layers, vocab_size=vocab_size, **wide)
        layer_bytes.append(sum(parameter.nbytes for parameter in model.model.layers[0].parameters()))
        folders.append(tmp_path / str(len(folders)))
        model.save_pretrained(folders[-1])
        targets = ["q_proj", "k_proj", "v_proj", "o_proj"] + ["up_proj", "down_proj"] * (architecture == "llama")
        get_peft_model(model, lora(target_modules=targets)).save_pretrained(folders[-1] / "adapter")
    done = subprocess.run(
        [sys.executable, "-c", MEASURE_RAM, *map(str, folders)],
        # What is freed goes back to the system at once: else the allocator's own reserve is measured.
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    measured_bytes = list(map(int, done.stdout.split()))
    for case, peak_bytes, one_layer_bytes in list(zip([cases[0], *cases], measured_bytes, layer_bytes, strict=True))[
        1:
    ]:
        # 80 MB of embedding and as much of head pass through in pieces.
        bound_bytes = 2 * one_layer_bytes if case[2] == 64 else max(2 * one_layer_bytes, 3 * PIECE_BYTES)
        assert one_layer_bytes > 2**23
        assert peak_bytes < bound_bytes, f"{case}: {peak_bytes / one_layer_bytes:.2f} layers"
