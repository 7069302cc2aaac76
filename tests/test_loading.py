"""A model built around its checkpoint is the one that stock loading gives; bad checkpoints are refused."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import ARCHITECTURES, build
from packaging.version import Version
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from hf_lema.files.checkpoint import read_spans_into
from hf_lema.files.pack import open_pack
from hf_lema.model import packing
from hf_lema.model.loading import Skeleton, build_skeleton, cached_pack, find_decoder_layers, pack_folder, write_pack

pytestmark = pytest.mark.integration

HAS_FUSED_EXPERTS = Version(transformers.__version__) >= Version("5")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def save(model: PreTrainedModel, folder: Path, **kwargs: Any) -> Path:
    model.save_pretrained(folder, **kwargs)
    return folder


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Path of a saved tiny model; each is saved once."""
    saved: dict[tuple[str, torch.dtype, bool], Path] = {}

    def get(architecture: str = "llama", dtype: torch.dtype = torch.float32, sharded: bool = False) -> Path:
        key = (architecture, dtype, sharded)
        if key not in saved:
            size = {"max_shard_size": "10KB"} if sharded else {}
            folder = tmp_path_factory.mktemp(architecture) / "model"
            saved[key] = save(build(architecture, num_layers=3, dtype=dtype), folder, **size)
        return saved[key]

    return get


@pytest.fixture
def own_checkpoint(checkpoints: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(checkpoints(sharded=True), tmp_path / "own"))


@pytest.fixture(autouse=True)
def pack_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_LEMA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "packs"


def filled_layers(skeleton: Skeleton) -> Iterator[dict[str, torch.Tensor]]:
    for layout in skeleton.source.layouts:
        buffer = torch.full((layout.nbytes,), 255, dtype=torch.uint8)
        skeleton.source.write_layer(layout.layer_idx, buffer)
        yield layout.views(buffer)


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert {n: t.dtype for n, t in found.items()} == {n: t.dtype for n, t in expected.items()}
    assert [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)] == []


def assert_equal_to_stock(skeleton: Skeleton, stock: PreTrainedModel) -> None:
    path, layers = find_decoder_layers(stock)
    assert skeleton.layers_path == path
    for found, layer in zip(filled_layers(skeleton), layers, strict=True):
        assert_equal(found, dict(layer.named_parameters()))
    of_layers = {f"{path}.{name}" for name, _ in layers.named_parameters()}
    found_state, stock_state = skeleton.model.state_dict(), stock.state_dict()
    assert list(found_state) == list(stock_state)
    assert {name for name, tensor in found_state.items() if tensor.is_meta} == of_layers
    assert {n: (t.shape, t.dtype) for n, t in found_state.items()} == {
        n: (t.shape, t.dtype) for n, t in stock_state.items()
    }
    outside = stock_state.keys() - of_layers
    assert_equal({name: found_state[name] for name in outside}, {name: stock_state[name] for name in outside})
    assert_equal(dict(skeleton.model.named_buffers()), dict(stock.named_buffers()))


# --------------------------------------------------------------------------------------------------- equal to stock


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sharded", [False, True], ids=["one_file", "shards"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_skeleton_and_layers_are_the_stock_model(
    checkpoints: Callable[..., Path], architecture: str, sharded: bool, dtype: torch.dtype
):
    folder = checkpoints(architecture, sharded=sharded)
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    skeleton = build_skeleton(folder, dtype)
    with skeleton.source as source:
        assert_equal_to_stock(skeleton, stock)
        fused = architecture == "mixtral" and HAS_FUSED_EXPERTS
        assert source.needs_conversion == (fused or dtype != torch.float32)
        assert ("stored as torch.float32" in source.reason) == (dtype != torch.float32)
        assert ("from others" in source.reason) == fused


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2", "mixtral"])
def test_the_model_around_the_layers_is_as_stock_leaves_it(checkpoints: Callable[..., Path], architecture: str):
    folder = checkpoints(architecture)
    GenerationConfig(max_new_tokens=7, temperature=0.5, do_sample=True).save_pretrained(folder)
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    random_state = torch.get_rng_state()
    skeleton = build_skeleton(folder)
    skeleton.source.close()
    model = skeleton.model
    assert torch.equal(torch.get_rng_state(), random_state)
    assert type(model) is type(stock)
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.generation_config.to_dict() == stock.generation_config.to_dict()
    assert model.config.to_dict() == stock.config.to_dict()
    assert model.name_or_path == stock.name_or_path == str(folder)
    assert vars(model).keys() == vars(stock).keys()
    if HAS_FUSED_EXPERTS:  # what save_pretrained reverts
        assert [str(step) for step in model._weight_conversions] == [str(step) for step in stock._weight_conversions]


@pytest.mark.parametrize("architecture", ["gpt2", "gemma2"])
def test_tied_embeddings_are_one_tensor(checkpoints: Callable[..., Path], architecture: str):
    skeleton = build_skeleton(checkpoints(architecture), torch.bfloat16)
    skeleton.source.close()
    embedding = skeleton.model.get_input_embeddings().weight
    assert skeleton.model.get_output_embeddings().weight is embedding
    assert not embedding.is_meta


@pytest.mark.parametrize("head", ["equal", "different"])
def test_a_tied_model_whose_file_holds_the_head_too_is_loaded_as_stock_does(own_file: Callable[[str], Path], head: str):
    folder = own_file("gemma2")

    def add_head(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + (head == "different")}

    rewrite(folder, add_head)
    skeleton = build_skeleton(folder)
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    with skeleton.source:
        assert_equal_to_stock(skeleton, stock)
    tied = [model.lm_head.weight is model.get_input_embeddings().weight for model in (skeleton.model, stock)]
    assert tied[0] == tied[1]


def test_untied_embeddings_are_two_tensors(checkpoints: Callable[..., Path]):
    skeleton = build_skeleton(checkpoints("llama"))
    skeleton.source.close()
    assert not torch.equal(skeleton.model.lm_head.weight, skeleton.model.model.embed_tokens.weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_modules_that_a_class_keeps_in_float32_stay_so(
    checkpoints: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
):
    monkeypatch.setattr(transformers.LlamaForCausalLM, "_keep_in_fp32_modules", ["down_proj"])
    monkeypatch.setattr(transformers.LlamaForCausalLM, "_keep_in_fp32_modules_strict", ["input_layernorm", "norm"])
    folder = checkpoints("llama")
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    assert stock.model.layers[0].input_layernorm.weight.dtype == torch.float32
    assert stock.model.layers[0].mlp.down_proj.weight.dtype == (torch.float32 if dtype == torch.float16 else dtype)
    assert stock.model.layers[0].mlp.up_proj.weight.dtype == dtype
    skeleton = build_skeleton(folder, dtype)
    with skeleton.source:
        assert_equal_to_stock(skeleton, stock)


def test_buffers_of_layers_that_files_hold_are_loaded(tmp_path: Path):
    config = AutoConfig.for_model(
        "deepseek_v3",
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        moe_intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_nope_head_dim=4,
        qk_rope_head_dim=4,
        v_head_dim=4,
        pad_token_id=0,
    )
    model = AutoModelForCausalLM.from_config(config)
    model.model.layers[1].mlp.gate.e_score_correction_bias.normal_()
    save(model, tmp_path)
    skeleton = build_skeleton(tmp_path, torch.float16)
    assert skeleton.model.model.layers[1].mlp.gate.e_score_correction_bias.any()
    with skeleton.source:
        assert_equal_to_stock(skeleton, AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float16))


def test_buffers_that_no_file_holds_are_computed_as_stock_computes_them(tmp_path: Path):
    config = AutoConfig.for_model("gptj", vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=16, rotary_dim=4)
    save(AutoModelForCausalLM.from_config(config), tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float16)
    skeleton = build_skeleton(tmp_path, torch.float16)
    with skeleton.source:
        assert_equal_to_stock(skeleton, stock)


@pytest.mark.parametrize("dtype", [None, "auto", "bfloat16", "torch.bfloat16", torch.bfloat16])
def test_every_way_to_say_a_dtype_gives_it(checkpoints: Callable[..., Path], dtype: torch.dtype | str | None):
    skeleton = build_skeleton(checkpoints(dtype=torch.bfloat16), dtype)
    skeleton.source.close()
    assert {parameter.dtype for parameter in skeleton.model.parameters()} == {torch.bfloat16}
    assert skeleton.model.config.dtype == torch.bfloat16
    assert not skeleton.source.needs_conversion


def test_without_a_dtype_in_the_config_the_files_decide(own_checkpoint: Path):
    config = json.loads((own_checkpoint / "config.json").read_text())
    del config["dtype"]
    (own_checkpoint / "config.json").write_text(json.dumps(config))
    skeleton = build_skeleton(own_checkpoint)
    skeleton.source.close()
    assert skeleton.model.dtype == torch.float32


@pytest.mark.parametrize("dtype", ["float99", "int8", torch.int8, torch.float8_e4m3fn])
def test_what_is_no_dtype_for_weights_is_refused(checkpoints: Callable[..., Path], dtype: torch.dtype | str):
    with pytest.raises(ValueError, match="dtype"):
        build_skeleton(checkpoints(), dtype)


# ------------------------------------------------------------------------------------------------ names and versions


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    tensors = change(load_file(folder / "model.safetensors"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def own_file(checkpoints: Callable[..., Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda architecture: Path(shutil.copytree(checkpoints(architecture), tmp_path / architecture))


def test_a_checkpoint_of_the_base_model_gets_its_prefix(
    own_file: Callable[[str], Path], caplog: pytest.LogCaptureFixture
):
    folder = own_file("gpt2")
    masks = {f"h.{layer_idx}.attn.bias": torch.ones(1, 1, 2, 2) for layer_idx in range(3)}  # as the first ones have
    rewrite(folder, lambda tensors: {name.removeprefix("transformer."): t for name, t in tensors.items()} | masks)
    assert "h.0.attn.c_attn.weight" in load_file(folder / "model.safetensors")
    skeleton = build_skeleton(folder)
    with skeleton.source as source:
        assert source.spans is not None
        assert_equal_to_stock(skeleton, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    assert "not used" not in caplog.text


def test_key_mapping_renames_as_in_stock(own_file: Callable[[str], Path]):
    folder = own_file("llama")
    rewrite(folder, lambda tensors: {name.replace("self_attn", "attention"): t for name, t in tensors.items()})
    key_mapping = {r"attention\.": "self_attn."}
    skeleton = build_skeleton(folder, key_mapping=key_mapping)
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, key_mapping=key_mapping)
    with skeleton.source as source:
        assert source.spans is not None
        assert_equal_to_stock(skeleton, stock)


def test_unused_tensors_are_warned_of_but_buffers_that_moved_are_not(
    own_file: Callable[[str], Path], caplog: pytest.LogCaptureFixture
):
    folder = own_file("llama")
    extra = {
        "model.layers.0.extra.weight": torch.ones(1),
        "other": torch.ones(1),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
    }
    rewrite(folder, lambda tensors: tensors | extra)
    with caplog.at_level(logging.WARNING, logger="hf_lema"):
        skeleton = build_skeleton(folder)
    skeleton.source.close()
    assert "2 tensors of the checkpoint" in caplog.text
    assert "model.layers.0.extra.weight, other" in caplog.text
    assert "inv_freq" not in caplog.text


def test_a_clean_checkpoint_gives_no_warning(checkpoints: Callable[..., Path], caplog: pytest.LogCaptureFixture):
    for architecture in ARCHITECTURES:
        build_skeleton(checkpoints(architecture)).source.close()
    assert caplog.text == ""


def test_every_missing_or_misshapen_layer_tensor_is_named(own_file: Callable[[str], Path]):
    folder = own_file("llama")
    lost = {"model.layers.0.mlp.up_proj.weight", "model.layers.2.input_layernorm.weight"}
    wrong = {"model.layers.1.self_attn.q_proj.weight": torch.ones(3, 5)}
    rewrite(folder, lambda tensors: {n: t for n, t in tensors.items() if n not in lost} | wrong)
    with pytest.raises(ValueError, match="does not fit the model's 3 decoder layers") as caught:
        build_skeleton(folder)
    for name in lost:
        assert f"{name} is missing" in str(caught.value)
    assert "q_proj.weight has shape (3, 5) in the checkpoint, expected (32, 32)" in str(caught.value)


@pytest.mark.skipif(not HAS_FUSED_EXPERTS, reason="experts are stored as they are registered")
def test_a_missing_expert_is_an_error(own_file: Callable[[str], Path]):
    folder = own_file("mixtral")
    rewrite(
        folder, lambda tensors: {n: t for n, t in tensors.items() if "layers.1.block_sparse_moe.experts.2" not in n}
    )
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts\.gate_up_proj has shape \(3, "):
        build_skeleton(folder)


def test_every_missing_tensor_outside_the_layers_is_named(own_file: Callable[[str], Path]):
    folder = own_file("llama")
    lost = {"lm_head.weight", "model.norm.weight"}
    rewrite(folder, lambda tensors: {name: t for name, t in tensors.items() if name not in lost})
    with pytest.raises(ValueError, match=r"lacks 2 tensors of LlamaForCausalLM: lm_head\.weight, model\.norm\.weight"):
        build_skeleton(folder)


# ------------------------------------------------------------------------------------------------------- conversion


@pytest.mark.parametrize("where", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_a_value_that_does_not_fit_the_dtype_is_an_error_that_names_the_tensor(
    own_file: Callable[[str], Path], where: str
):
    folder = own_file("llama")

    def enlarge(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors[where].view(-1)[3] = -70000.0
        return tensors

    def load() -> None:
        skeleton = build_skeleton(folder, torch.float16)
        with skeleton.source:
            list(filled_layers(skeleton))

    rewrite(folder, enlarge)
    with pytest.raises(ValueError, match=rf"'{where}' holds 1 values that do not fit torch.float16: up to 70000"):
        load()


def test_infinities_and_nans_of_the_file_are_kept(own_file: Callable[[str], Path]):
    folder = own_file("llama")
    values = torch.tensor([float("inf"), float("-inf"), float("nan"), 65504.0])

    def put(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors["model.layers.0.input_layernorm.weight"][:4] = values
        return tensors

    rewrite(folder, put)
    skeleton = build_skeleton(folder, torch.float16)
    with skeleton.source:
        found = next(filled_layers(skeleton))["input_layernorm.weight"][:4]
    assert torch.equal(found.nan_to_num(7), values.half().nan_to_num(7))


def test_layers_are_read_in_place_when_nothing_changes(checkpoints: Callable[..., Path]):
    for architecture in ARCHITECTURES:
        skeleton = build_skeleton(checkpoints(architecture, torch.bfloat16))
        with skeleton.source as source:
            if architecture == "mixtral" and HAS_FUSED_EXPERTS:
                assert source.spans is None
                continue
            assert source.spans is not None, architecture
            assert source.reason == ""
            for layout, spans, expected in zip(source.layouts, source.spans, filled_layers(skeleton), strict=True):
                buffer = torch.zeros(layout.nbytes, dtype=torch.uint8)
                with source.open_files() as files:
                    read_spans_into(files, spans, buffer)
                assert_equal(layout.views(buffer), expected)


def test_a_file_replaced_after_indexing_is_found(own_checkpoint: Path):
    skeleton = build_skeleton(own_checkpoint)
    for shard in own_checkpoint.glob("*.safetensors"):
        os.truncate(shard, shard.stat().st_size + 8)
    with skeleton.source, pytest.raises(ValueError, match="it was replaced or cut since"):
        list(filled_layers(skeleton))


def test_a_closed_source_reads_no_more(checkpoints: Callable[..., Path]):
    skeleton = build_skeleton(checkpoints())
    skeleton.source.close()
    skeleton.source.close()
    with pytest.raises(RuntimeError, match="closed"):
        list(filled_layers(skeleton))


# ------------------------------------------------------------------------------------------------------------ packs


@pytest.mark.parametrize(("architecture", "dtype"), [("llama", torch.float16), ("mixtral", torch.bfloat16)])
def test_a_pack_holds_what_the_source_writes(
    checkpoints: Callable[..., Path], tmp_path: Path, architecture: str, dtype: torch.dtype
):
    skeleton = build_skeleton(checkpoints(architecture, sharded=True), dtype)
    with skeleton.source as source:
        pack = write_pack(source, tmp_path / "p.lema.safetensors")
        assert (pack.layouts, pack.source_identity) == (source.layouts, source.identity)
        with pack.open_files() as files:
            for layout, spans, expected in zip(pack.layouts, pack.spans, filled_layers(skeleton), strict=True):
                buffer = torch.zeros(layout.nbytes, dtype=torch.uint8)
                read_spans_into(files, spans, buffer)
                assert_equal(layout.views(buffer), expected)


def test_a_pack_is_made_once_and_found_again(
    checkpoints: Callable[..., Path], pack_cache: Path, caplog: pytest.LogCaptureFixture
):
    folder, packs = checkpoints(), []
    for _ in range(2):
        with build_skeleton(folder, torch.float16).source as source:
            packs.append(cached_pack(source))
    assert packs[0] == packs[1]
    assert packs[0].path.parent == pack_cache == pack_folder()
    assert packs[0].path.name.endswith("-float16.lema.safetensors")
    assert caplog.text.count("Writing the decoder layers to") == 1
    assert "needed" in caplog.text
    assert "of disk space available (27 tensors are stored as torch.float32, wanted is torch.float16)" in caplog.text


def test_another_dtype_or_a_changed_checkpoint_gets_a_pack_of_its_own(own_checkpoint: Path):
    paths = []
    for dtype in (torch.float16, torch.bfloat16, torch.float16):
        with build_skeleton(own_checkpoint, dtype).source as source:
            paths.append(cached_pack(source).path)
        for shard in own_checkpoint.glob("*.safetensors"):
            os.utime(shard, ns=(0, shard.stat().st_mtime_ns + 1))
    assert len(set(paths)) == 3


def test_an_error_while_packing_leaves_no_pack(own_file: Callable[[str], Path], pack_cache: Path):
    folder = own_file("llama")

    def enlarge(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors["model.layers.2.mlp.up_proj.weight"][0, 0] = 1e30
        return tensors

    rewrite(folder, enlarge)
    with build_skeleton(folder, torch.float16).source as source, pytest.raises(ValueError, match="do not fit"):
        cached_pack(source)
    assert list(pack_cache.glob("*.safetensors")) == list(pack_cache.glob(".*.partial")) == []


def test_a_pack_of_the_same_name_but_another_source_is_written_anew(checkpoints: Callable[..., Path]):
    with build_skeleton(checkpoints(), torch.float16).source as source:
        pack = cached_pack(source)
        with packing.PackWriter(pack.path, source.layouts, source_identity="other", dtype="float16") as writer:
            for layout in source.layouts:
                writer.write_layer(layout.layer_idx, torch.zeros(layout.nbytes, dtype=torch.uint8))
        assert open_pack(pack.path).source_identity == "other"
        assert cached_pack(source) == pack
        assert open_pack(pack.path) == pack


# -------------------------------------------------------------------------------------------- hub, code, bad requests


def hub_cache(folder: Path, model: Path) -> Path:
    """A local hub cache as huggingface_hub lays it out: a snapshot of links to blobs."""
    repo, commit = folder / "models--org--tiny", "a" * 40
    snapshot = repo / "snapshots" / commit / "sub"
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    (repo / "refs").mkdir()
    (repo / "refs" / "v1").write_text(commit)
    for number, file in enumerate(sorted(model.iterdir())):
        shutil.copy(file, repo / "blobs" / str(number))
        (snapshot / file.name).symlink_to(Path("../../../blobs") / str(number))
    return folder


@pytest.mark.parametrize("sharded", [False, True])
def test_a_hub_id_is_found_with_revision_cache_and_subfolder(
    checkpoints: Callable[..., Path], tmp_path: Path, sharded: bool
):
    where = {"cache_dir": hub_cache(tmp_path, checkpoints(sharded=sharded)), "revision": "v1", "subfolder": "sub"}
    skeleton = build_skeleton("org/tiny", local_files_only=True, **where)
    stock = AutoModelForCausalLM.from_pretrained("org/tiny", dtype="auto", local_files_only=True, **where)
    with skeleton.source:
        assert_equal_to_stock(skeleton, stock)
    assert skeleton.model.name_or_path == stock.name_or_path == "org/tiny"
    assert skeleton.model.config.to_dict() == stock.config.to_dict()
    with pytest.raises(OSError, match="couldn't find them in the cached files"):
        build_skeleton("org/tiny", local_files_only=True, **(where | {"revision": "v2"}))


def test_a_hub_model_with_pickled_weights_only_is_refused(checkpoints: Callable[..., Path], tmp_path: Path):
    model = tmp_path / "m"
    model.mkdir()
    shutil.copy(checkpoints() / "config.json", model)
    (model / "pytorch_model.bin").write_bytes(b"a pickle")
    cache = hub_cache(tmp_path / "hub", model)
    with pytest.raises(
        FileNotFoundError, match=r"org/tiny has neither model\.safetensors nor .*hf-lema pack org/tiny FOLDER"
    ):
        build_skeleton("org/tiny", cache_dir=cache, revision="v1", subfolder="sub", local_files_only=True)


def test_config_values_and_attention_go_where_stock_puts_them(checkpoints: Callable[..., Path]):
    folder = checkpoints()
    kwargs = {"attn_implementation": "sdpa", "attention_dropout": 0.25, "use_cache": False}
    skeleton = build_skeleton(folder, **kwargs)
    skeleton.source.close()
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **kwargs)
    assert skeleton.model.config.to_dict() == stock.config.to_dict()
    assert skeleton.model.config._attn_implementation == stock.config._attn_implementation == "sdpa"
    config = AutoConfig.from_pretrained(folder, rms_norm_eps=0.5)
    skeleton = build_skeleton(folder, config=config, generation_config=GenerationConfig(max_new_tokens=3))
    skeleton.source.close()
    assert skeleton.model.config.rms_norm_eps == 0.5
    assert skeleton.model.config is not config
    assert skeleton.model.generation_config.max_new_tokens == 3


REMOTE_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
class OddConfig(LlamaConfig):
    model_type = "odd_llama"
class OddForCausalLM(LlamaForCausalLM):
    config_class = OddConfig
"""


def test_code_of_the_checkpoint_runs_only_where_it_is_trusted(
    own_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    (own_checkpoint / "odd.py").write_text(REMOTE_CODE)
    config = json.loads((own_checkpoint / "config.json").read_text())
    config |= {
        "model_type": "odd_llama",
        "auto_map": {"AutoConfig": "odd.OddConfig", "AutoModelForCausalLM": "odd.OddForCausalLM"},
    }
    (own_checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="trust_remote_code"):
        build_skeleton(own_checkpoint)
    skeleton = build_skeleton(own_checkpoint, trust_remote_code=True)
    assert type(skeleton.model).__name__ == "OddForCausalLM"
    stock = AutoModelForCausalLM.from_pretrained(own_checkpoint, dtype="auto", trust_remote_code=True)
    with skeleton.source:
        assert_equal_to_stock(skeleton, stock)


def test_arguments_that_streaming_cannot_take_are_all_named(checkpoints: Callable[..., Path]):
    with pytest.raises(ValueError, match=r"device_map='auto'.*\n.*load_in_4bit=True.*\n.*use_safetensors=False"):
        build_skeleton(checkpoints(), device_map="auto", load_in_4bit=True, use_safetensors=False, gguf_file=None)


def change_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def test_a_quantized_checkpoint_is_refused(own_checkpoint: Path):
    change_config(own_checkpoint, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ValueError, match=r"already quantized \(gptq\)"):
        build_skeleton(own_checkpoint)


def test_an_adapter_is_refused_with_the_way_to_load_it(own_checkpoint: Path):
    (own_checkpoint / "adapter_config.json").write_text('{"base_model_name_or_path": "x"}')
    with pytest.raises(ValueError, match=r"holds a PEFT adapter.*PeftModel\.from_pretrained"):
        build_skeleton(own_checkpoint)


def test_a_config_that_names_its_weights_file_is_refused(own_checkpoint: Path):
    change_config(own_checkpoint, transformers_weights="other.safetensors")
    with pytest.raises(ValueError, match=r"names its weights file \('other\.safetensors'\)"):
        build_skeleton(own_checkpoint)


def test_damaged_checkpoints_are_refused_before_a_model_is_built(own_checkpoint: Path):
    shard = sorted(own_checkpoint.glob("*.safetensors"))[0]
    os.truncate(shard, shard.stat().st_size - 1)
    with pytest.raises(ValueError, match="it was cut"):
        build_skeleton(own_checkpoint)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"missing are 1: {shard.name}"):
        build_skeleton(own_checkpoint)


# --------------------------------------------------------------------------------------------------- decoder layers


class Other(nn.Module):
    _no_split_modules = ["Linear"]

    def __init__(self, **lists: nn.ModuleList) -> None:
        super().__init__()
        self.config = AutoConfig.for_model("gpt2", n_layer=2)
        for name, layers in lists.items():
            self.add_module(name, layers)


def linears(num: int) -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(1, 1) for _ in range(num))


def test_decoder_layers_are_found_under_peft_and_by_what_must_not_be_split():
    from peft import LoraConfig, get_peft_model

    model = build("llama", num_layers=3)
    peft_model = get_peft_model(model, LoraConfig(target_modules="all-linear"))
    assert find_decoder_layers(peft_model) == ("base_model.model.model.layers", model.model.layers)
    other = Other(heads=linears(3), h=linears(2), norms=nn.ModuleList([nn.LayerNorm(1), nn.LayerNorm(1)]))
    assert find_decoder_layers(other) == ("h", other.h)


def test_a_model_without_one_list_of_decoder_layers_is_refused_with_what_was_found():
    with pytest.raises(ValueError, match=r"no list of 2 decoder layers[\s\S]*- heads: 3 of Linear"):
        find_decoder_layers(Other(heads=linears(3)))
    with pytest.raises(ValueError, match=r"several lists of 2 decoder layers[\s\S]*- a: 2 of Linear\n- b: 2 of Linear"):
        find_decoder_layers(Other(a=linears(2), b=linears(2), c=linears(3)))
    with pytest.raises(ValueError, match="Module lists found: none"):
        find_decoder_layers(Other())


# ------------------------------------------------------------------------------------------------------------- RAM

MEASURE_RAM = """
import re, sys, threading, torch
from hf_lema.model.loading import build_skeleton, write_pack
def private_bytes():
    status = open("/proc/self/status").read()
    return 1024 * sum(int(re.search(rf"{key}:\\s+(\\d+)", status)[1]) for key in ("RssAnon", "RssShmem"))
for folder in sys.argv[1:]:
    peaks, done = [0], threading.Event()
    def sample():
        while not done.wait(0.0005):
            peaks.append(private_bytes())
    sampler = threading.Thread(target=sample)
    sampler.start()
    with build_skeleton(folder, torch.bfloat16).source as source:
        write_pack(source, folder + "/p.lema.safetensors")
    done.set()
    sampler.join()
    print(max(peaks), source.layouts[0].nbytes)
"""


def test_loading_and_packing_hold_no_more_of_a_deep_model_than_of_a_shallow_one(tmp_path: Path):
    wide = {"hidden_size": 512, "intermediate_size": 512, "num_local_experts": 2, "vocab_size": 64}
    folders = [
        save(build(architecture, num_layers=num_layers, **wide), tmp_path / f"{architecture}-{num_layers}")
        for architecture in ("llama", "mixtral")
        for num_layers in (2, 14)
    ]
    warm_up = folders[0]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE_RAM, *map(str, [warm_up, *folders])],
        # What is freed goes back to the system at once, whichever thread had it: else the reserve of the allocator, up
        # to four layers here, is measured.
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    measured = [tuple(map(int, line.split())) for line in done.stdout.splitlines()[1:]]
    for (shallow_bytes, layer_bytes), (deep_bytes, _) in (measured[:2], measured[2:]):
        assert layer_bytes > 2**21
        assert deep_bytes - shallow_bytes < 3 * layer_bytes, f"{(deep_bytes - shallow_bytes) / layer_bytes:.1f} layers"
