"""Checkpoints and packs whose layers are 4-bit already: read as they are, or refused with what is wrong."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import adapt, assert_same_run, assert_same_tensors, batch, build, closing, train
from safetensors.torch import load_file, save_file
from test_quantization import NF4, NF4_ON_DISK, copies, qlora, stock, streamed, wrapped
from transformers import AutoModelForCausalLM

from hf_lema import LemaConfig, LemaModelWrapper, get_streamer
from hf_lema.files.pack import PACK_SUFFIX, PackWriter, open_pack
from hf_lema.model.loading import build_skeleton, pack_model
from hf_lema.model.packing import write_pack
from hf_lema.runtime import quantization

pytestmark = pytest.mark.integration

AS_IT_IS = LemaConfig()
AS_IT_IS_ON_DISK = LemaConfig(ram_budget="min")
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(autouse=True)
def pack_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_LEMA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "packs"


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in full precision."""
    folder = tmp_path_factory.mktemp("full") / "model"
    build(num_layers=3).save_pretrained(folder)
    return folder


def save_packed(folder: Path, out: Path, **kwargs: Any) -> Path:
    stock(folder, **kwargs).save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def packed(full: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as stock saves it in 4 bits."""
    return save_packed(full, tmp_path_factory.mktemp("packed") / "model")


@pytest.fixture
def own(packed: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(packed, tmp_path / "own"))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def nothing_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packing a weight is an error from here on."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a weight was packed")

    monkeypatch.setattr(quantization.functional, "quantize_4bit", refuse)


# ---------------------------------------------------------------------------------------- a stock 4-bit checkpoint


@pytest.mark.parametrize("config", [AS_IT_IS, AS_IT_IS_ON_DISK, NF4], ids=["ram", "disk", "asked_for_nf4"])
def test_packed_checkpoint_is_read_as_it_is_and_trains_as_on_stock(
    packed: Path, tmp_path: Path, config: LemaConfig, request: pytest.FixtureRequest
) -> None:
    reference = stock(packed)
    expected, state = train(qlora(reference), tmp_path), copies(stock(packed))
    request.getfixturevalue("nothing_is_packed")
    model = streamed(packed, config)
    assert_same_tensors(model.state_dict(), state)
    with closing(qlora(model)) as peft_model:
        assert_same_run(train(peft_model, tmp_path), expected)


@pytest.mark.parametrize(
    "fields",
    [{"bnb_4bit_use_double_quant": False}, {"bnb_4bit_quant_type": "fp4"}, {"dtype": torch.bfloat16}],
    ids=["not_nested", "fp4", "bfloat16"],
)
def test_every_kind_of_packed_checkpoint_is_taken_over(
    full: Path, tmp_path: Path, fields: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    dtype = fields.get("dtype", torch.float32)
    folder = save_packed(full, tmp_path / "packed", **fields)
    with torch.no_grad():
        expected = stock(folder, dtype).eval()(**batch()).logits
    request.getfixturevalue("nothing_is_packed")
    with closing(streamed(folder, AS_IT_IS, dtype)) as model, torch.no_grad():
        assert_same_tensors(model.state_dict(), stock(folder, dtype).state_dict())
        assert torch.equal(model.eval()(**batch()).logits, expected)


def test_packed_gpt2_is_not_transposed_a_second_time(tmp_path: Path) -> None:
    build("gpt2", num_layers=2).save_pretrained(tmp_path / "full")
    folder = save_packed(tmp_path / "full", tmp_path / "packed")
    with closing(streamed(folder, AS_IT_IS)) as model:
        assert_same_tensors(model.state_dict(), stock(folder).state_dict())


@pytest.mark.parametrize("make", [streamed, wrapped])
def test_saved_streamed_model_is_a_stock_packed_checkpoint(
    full: Path, packed: Path, tmp_path: Path, make: Callable[..., Any]
) -> None:
    with closing(make(full)) as model:
        model.save_pretrained(tmp_path / "saved")
    assert_same_tensors(load_file(tmp_path / "saved/model.safetensors"), load_file(packed / "model.safetensors"))
    assert_same_tensors(copies(stock(tmp_path / "saved")), copies(stock(packed)))


def test_unwrapped_model_is_the_stock_one(full: Path, tmp_path: Path) -> None:
    expected = train(qlora(stock(full)), tmp_path)
    for make in (streamed, wrapped):
        model = LemaModelWrapper.unwrap(make(full))
        assert_same_tensors(copies(model), copies(stock(full)))
        assert model.is_loaded_in_4bit
        assert_same_run(train(qlora(model), tmp_path), expected)


DAMAGE: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "statistics_missing": (lambda t: t.pop(f"{Q_PROJ}.absmax"), rf"{Q_PROJ}: the checkpoint lacks {Q_PROJ}.absmax"),
    "table_missing": (lambda t: t.pop(f"{Q_PROJ}.nested_quant_map"), "lacks .*nested_quant_map"),
    "bytes_missing": (lambda t: t.update({Q_PROJ: t[Q_PROJ][:-1]}), "has 511 bytes, expected 512"),
    "another_table": (lambda t: t[f"{Q_PROJ}.quant_map"].add_(1), "another code table"),
    "state_damaged": (
        lambda t: t[f"{Q_PROJ}.quant_state.bitsandbytes__nf4"].fill_(0),
        "quantization state is damaged",
    ),
    "state_missing": (lambda t: t.pop(f"{Q_PROJ}.quant_state.bitsandbytes__nf4"), rf"{Q_PROJ} is not packed|has shape"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_packed_checkpoint_is_refused_by_name(own: Path, damage: str) -> None:
    change, message = DAMAGE[damage]
    rewrite(own, change)
    with pytest.raises(ValueError, match=message):
        streamed(own, AS_IT_IS)


def test_linear_that_should_be_packed_and_is_not_is_refused(own: Path, full: Path) -> None:
    whole = load_file(full / "model.safetensors")[Q_PROJ]

    def put_whole(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(Q_PROJ)]:
            del tensors[name]
        tensors[Q_PROJ] = whole

    rewrite(own, put_whole)
    with pytest.raises(ValueError, match=rf"{Q_PROJ} is not packed to 4 bits"):
        streamed(own, AS_IT_IS)


def test_linear_that_the_checkpoint_says_is_left_whole_is_left_whole(own: Path, full: Path) -> None:
    whole = load_file(full / "model.safetensors")[Q_PROJ]

    def put_whole(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(Q_PROJ)]:
            del tensors[name]
        tensors[Q_PROJ] = whole

    rewrite(own, put_whole)
    config = json.loads((own / "config.json").read_text())
    config["quantization_config"]["llm_int8_skip_modules"] = ["lm_head", Q_PROJ.removesuffix(".weight")]
    (own / "config.json").write_text(json.dumps(config))
    with closing(streamed(own, AS_IT_IS)) as model:
        assert_same_tensors(model.state_dict(), stock(own).state_dict())
        assert type(model.model.layers[1].self_attn.q_proj).__name__ == "Linear"


# ------------------------------------------------------------------------------------------------------------ packs


def test_pack_is_written_once_and_serves_both_tiers(
    full: Path, pack_cache: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    expected = train(qlora(stock(full)), tmp_path)
    state = copies(stock(full))
    pack = pack_model(full, quantization="nf4", device="cpu")
    assert pack.path.parent == pack_cache
    request.getfixturevalue("nothing_is_packed")
    for config in (NF4, NF4_ON_DISK):
        model = streamed(full, config)
        assert_same_tensors(model.state_dict(), state)
        with closing(qlora(model)) as peft_model:
            assert_same_run(train(peft_model, tmp_path), expected)
    assert pack_model(full, quantization="nf4", device="cpu") == pack


def test_given_pack_is_used_in_both_tiers_also_for_a_copy_of_the_checkpoint(
    full: Path, pack_cache: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    state = copies(stock(full))
    out = tmp_path / f"given{PACK_SUFFIX}"
    pack = pack_model(full, out, quantization="nf4", device="cpu")
    assert pack.path == out
    assert "bitsandbytes" in pack.made_with
    copy = shutil.copytree(full, tmp_path / "copy")
    request.getfixturevalue("nothing_is_packed")
    for config in (NF4, NF4_ON_DISK):
        with closing(streamed(copy, config, pack=out)) as model:
            assert_same_tensors(model.state_dict(), state)
            model.eval()(**batch())
            assert get_streamer(model).stats().disk_bytes > 0 or config is NF4
    assert not pack_cache.exists()


def test_full_precision_pack_is_used_where_it_is_given(full: Path, tmp_path: Path) -> None:
    out = tmp_path / f"given{PACK_SUFFIX}"
    pack_model(full, out, dtype=torch.bfloat16, device="cpu")
    with closing(streamed(full, AS_IT_IS_ON_DISK, torch.bfloat16, pack=out)) as model:
        model.eval()(**batch())
        assert get_streamer(model).stats().disk_bytes > 0


def test_foreign_pack_is_refused_with_what_differs(full: Path, tmp_path: Path) -> None:
    out = tmp_path / f"given{PACK_SUFFIX}"
    pack_model(full, out, quantization="nf4", device="cpu")
    with pytest.raises(ValueError, match=r"nf4 with double quantization of .*asks for 3 layers of torch.f"):
        streamed(full, AS_IT_IS, pack=out)
    single = LemaConfig(quantization="nf4", double_quantization=False)
    with pytest.raises(ValueError, match=r"nf4 with double quantization of .* asks for 3 layers of nf4 of"):
        streamed(full, single, pack=out)
    with pytest.raises(ValueError, match=r"of torch.float32 in .* of torch.bfloat16 in"):
        streamed(full, NF4, torch.bfloat16, pack=out)
    build(num_layers=3, seed=1).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"other files: model\.safetensors"):
        streamed(tmp_path / "other", NF4, pack=out)
    with pytest.raises(FileNotFoundError):
        streamed(full, NF4, pack=tmp_path / "none")
    with pytest.raises(ValueError, match="is no pack"):
        streamed(full, NF4, pack=full / "model.safetensors")


def test_damaged_pack_is_refused(full: Path, tmp_path: Path) -> None:
    out = tmp_path / f"given{PACK_SUFFIX}"
    pack_model(full, out, quantization="nf4", device="cpu")
    os.truncate(out, out.stat().st_size - 1)
    with pytest.raises(ValueError, match="it was cut"):
        streamed(full, NF4, pack=out)


def test_pack_says_what_its_layers_are(full: Path, tmp_path: Path) -> None:
    with build_skeleton(full, device="cpu", quantization="nf4").source as source:
        pack = write_pack(source, tmp_path / f"p{PACK_SUFFIX}")
        assert pack.layouts == source.layouts
        assert [m.shape for m in pack.layouts[0].packed if m.name == "mlp.up_proj.weight"] == [(64, 32)]
        assert [file[:2] for file in json.loads(pack.source_files)] == [
            ["model.safetensors", (full / "model.safetensors").stat().st_size]
        ]


def test_pack_whose_packed_parts_do_not_fit_is_damaged(full: Path, tmp_path: Path) -> None:
    out = tmp_path / f"p{PACK_SUFFIX}"
    with build_skeleton(full, device="cpu", quantization="nf4").source as source:
        write_pack(source, out)
    out.write_bytes(out.read_bytes().replace(b"[64,32],true", b"[64,16],true"))
    with pytest.raises(ValueError, match=r"metadata is damaged.*packed matrices lack parts"):
        open_pack(out)


def test_pack_of_the_version_before_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_lema.files.pack.PACK_VERSION", "1")
    with PackWriter(tmp_path / "p", (), source_identity="", dtype=""):
        pass
    monkeypatch.undo()
    with pytest.raises(ValueError, match="version '1', this release reads version '2'"):
        open_pack(tmp_path / "p")


# ------------------------------------------------------------------------------------------------- wrapping, refusals


@pytest.mark.parametrize("config", [NF4, NF4_ON_DISK], ids=["ram", "disk"])
def test_value_that_does_not_fit_the_dtype_is_refused_by_name_and_leaves_nothing_behind(
    full: Path, tmp_path: Path, pack_cache: Path, config: LemaConfig
) -> None:
    folder = Path(shutil.copytree(full, tmp_path / "own"))
    rewrite(folder, lambda tensors: tensors[Q_PROJ].view(-1)[5:6].fill_(-1e6))
    with pytest.raises(ValueError, match=rf"'{Q_PROJ}' holds 1 values that do not fit torch.float16: up to 1e\+06"):
        streamed(folder, config, torch.float16)
    assert not list(pack_cache.glob("*.safetensors"))


def test_full_precision_model_with_an_adapter_is_not_packed(full: Path) -> None:
    model = adapt(AutoModelForCausalLM.from_pretrained(full))
    with pytest.raises(ValueError, match="wrap the base model with quantization='nf4' first, then get_peft_model"):
        LemaModelWrapper.wrap(model, NF4, device="cpu")


def test_model_that_was_repacked_for_cpu_inference_is_refused(full: Path) -> None:
    model = stock(full)
    model.model.layers[1].mlp.up_proj.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match=r"mlp\.up_proj\.weight was repacked .* load the model again"):
        LemaModelWrapper.wrap(model, device="cpu")


# -------------------------------------------------------------------------------------------------------------- RAM

MEASURE_RAM = """
import re, sys, threading, torch
from hf_lema import LemaConfig, LemaModelWrapper, get_streamer
import hf_lema.runtime.quantization
def private_bytes():
    status = open("/proc/self/status").read()
    return 1024 * sum(int(re.search(rf"{key}:\\s+(\\d+)", status)[1]) for key in ("RssAnon", "RssShmem"))
def load(folder, tier):
    config = LemaConfig(quantization="nf4", ram_budget=tier)
    return LemaModelWrapper.from_pretrained(folder, config, dtype=torch.float16, device="cpu")
warm_up, folder = sys.argv[1:]
for tier in ("auto", "min"):
    get_streamer(load(warm_up, tier)).close()
    before, peaks, done = private_bytes(), [0], threading.Event()
    def sample():
        while not done.wait(0.001):
            peaks.append(private_bytes())
    sampler = threading.Thread(target=sample)
    sampler.start()
    model = load(folder, tier)
    done.set()
    sampler.join()
    outside = [p for n, p in model.named_parameters() if ".layers." not in n]
    outside_bytes = sum(p.numel() * p.element_size() for p in outside)
    streamer = get_streamer(model)
    kept_bytes = streamer.num_slots * streamer.layer_bytes + outside_bytes
    kept_bytes += streamer.streamed_bytes if tier == "auto" else streamer.layer_bytes  # the writer's buffer
    print(max(peaks) - before, kept_bytes)
    streamer.close()
    del model, streamer
"""


@pytest.mark.slow
def test_packing_while_loading_holds_the_packed_model_and_two_layers(tmp_path: Path) -> None:
    wide = {"hidden_size": 512, "intermediate_size": 1536, "vocab_size": 64, "num_key_value_heads": 4}
    for num_layers in (1, 8):
        build(num_layers=num_layers, **wide).save_pretrained(tmp_path / str(num_layers))
    layer_bytes = 2 * (4 * 512 * 512 + 3 * 512 * 1536)  # in float16; the files hold float32
    done = subprocess.run(
        [sys.executable, "-c", MEASURE_RAM, str(tmp_path / "1"), str(tmp_path / "8")],
        # What is freed goes back to the system at once: else the allocator's own reserve is measured.
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    measured = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert len(measured) == 2
    for peak_bytes, kept_bytes in measured:
        assert peak_bytes < kept_bytes + 2 * layer_bytes, f"{(peak_bytes - kept_bytes) / layer_bytes:.2f} layers"
        assert 8 * layer_bytes > 3 * (kept_bytes + 2 * layer_bytes) / 2, "the model is too shallow to show anything"
