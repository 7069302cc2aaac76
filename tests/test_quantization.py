"""Layers packed to 4 bits are stock QLoRA's, bit for bit, wherever they lie, and are packed once and never again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from models import (
    ARCHITECTURES,
    NUM_LAYERS,
    RecordingTrainer,
    adapt,
    arguments,
    assert_moved,
    assert_same_run,
    assert_same_tensors,
    batch,
    build,
    closing,
    examples,
    forward_backward,
    gradients,
    lora,
    train,
    trainables,
)
from peft import PeftModel, prepare_model_for_kbit_training
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from hf_lema import LemaConfig, LemaModelWrapper, get_streamer
from hf_lema.choices import StepChoices
from hf_lema.files.layout import PackedMatrix, make_layout, packed_linear_bytes
from hf_lema.runtime import quantization
from hf_lema.runtime.slots import Slot, SlotState

pytestmark = pytest.mark.integration

CPU = torch.device("cpu")
NF4 = LemaConfig(quantization="nf4")
NF4_ON_DISK = LemaConfig(quantization="nf4", ram_budget="min")
TIERS = {"ram": NF4, "disk": NF4_ON_DISK}


@pytest.fixture(autouse=True)
def pack_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_LEMA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "packs"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Path of a saved tiny model in full precision; each is saved once."""
    saved: dict[tuple[str, torch.dtype], Path] = {}

    def get(architecture: str = "llama", dtype: torch.dtype = torch.float32) -> Path:
        if (architecture, dtype) not in saved:
            folder = tmp_path_factory.mktemp(architecture) / "model"
            build(architecture, dtype=dtype).save_pretrained(folder)
            saved[architecture, dtype] = folder
        return saved[architecture, dtype]

    return get


def stock(folder: Path, dtype: torch.dtype = torch.float32, **overrides: Any) -> PreTrainedModel:
    """The model as stock QLoRA loads it, on the CPU."""
    fields: dict[str, Any] = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=dtype, **(fields | overrides))
    is_packed = "quantization_config" in json.loads((folder / "config.json").read_text())
    kwargs = {} if is_packed else {"quantization_config": config}
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, device_map={"": "cpu"}, attn_implementation="eager", **kwargs
    )
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            # Or bitsandbytes repacks it at its first evaluation on a CPU with AVX512-BF16, and training is wrong then.
            module.support_avx512bf16_for_cpu = False
    return model


def streamed(folder: Path, config: LemaConfig = NF4, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Any:
    return LemaModelWrapper.from_pretrained(
        str(folder), config, dtype=dtype, device="cpu", attn_implementation="eager", **kwargs
    )


def wrapped(folder: Path, config: LemaConfig = NF4, dtype: torch.dtype = torch.float32) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    return LemaModelWrapper.wrap(model, config, device="cpu")


def prepared(model: PreTrainedModel) -> PreTrainedModel:
    return prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})


def qlora(model: PreTrainedModel, architecture: str | None = None, **overrides: Any) -> PeftModel:
    """Prepared and with an adapter, as users of QLoRA do it."""
    return adapt(prepared(model), lora(architecture, **overrides))


def copies(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of everything that the model would save."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.fixture
def nothing_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packing a weight is an error from here on."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a weight was packed")

    monkeypatch.setattr(quantization.functional, "quantize_4bit", refuse)


# ------------------------------------------------------------------------------------------------------ one matrix


def matrix(shape: tuple[int, int], **fields: Any) -> PackedMatrix:
    return PackedMatrix(**({"name": "weight", "shape": shape, "dtype": torch.float32, "is_nested": True} | fields))


def empty_parts(wanted: PackedMatrix) -> dict[str, torch.Tensor]:
    return {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in wanted.tensors().items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("is_nested", [True, False])
@pytest.mark.parametrize("shape", [(64, 96), (7, 33), (1, 1), (300, 130)])
def test_a_matrix_packed_in_pieces_is_the_one_that_bitsandbytes_packs_at_once(
    shape: tuple[int, int], is_nested: bool, quant_type: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(quantization.PIECE_VALUES, "cpu", 64 * 3)
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    wanted = matrix(shape, is_nested=is_nested, quant_type=quant_type, dtype=dtype)
    parts = empty_parts(wanted)
    quantization.quantize(wanted, values, parts, CPU)

    packed, state = quantization.functional.quantize_4bit(
        values, compress_statistics=is_nested, quant_type=quant_type, blocksize=64
    )
    expected = {"weight": packed, "weight.absmax": state.absmax}
    if is_nested:
        expected |= {"weight.nested_absmax": state.state2.absmax, "weight.nested_offset": state.offset}
    assert_same_tensors(parts, expected)
    if shape != (64, 96):
        return  # bitsandbytes compiles its kernel for odd shapes on a CPU, for a minute
    unpacked = quantization.functional.dequantize_4bit(parts["weight"], quantization.state_over(wanted, parts))
    assert torch.equal(unpacked, quantization.functional.dequantize_4bit(packed, state))
    assert unpacked.dtype == dtype


def test_bytes_of_a_packed_linear_are_those_that_its_layer_has_for_it() -> None:
    for is_nested in (True, False):
        wanted = matrix((4096, 11008), is_nested=is_nested)
        layout = make_layout(0, wanted.tensors(), [wanted])
        assert packed_linear_bytes(4096, 11008, double_quantization=is_nested) == layout.nbytes
    assert packed_linear_bytes(4096, 11008) / (4096 * 11008 * 2) < 1 / 3.8


def test_a_layout_whose_packed_matrix_lacks_a_part_is_refused() -> None:
    wanted = matrix((64, 64))
    parts = wanted.tensors()
    del parts[wanted.nested_offset]
    with pytest.raises(ValueError, match=r"layer 3.*weight\.nested_offset is None"):
        make_layout(3, parts, [wanted])


@pytest.mark.usefixtures("nothing_is_packed")
@pytest.mark.parametrize("move", [lambda p: p.to("cpu"), lambda p: p.cpu(), lambda p: p.to(CPU, non_blocking=True)])
def test_no_move_packs_a_packed_parameter_again(move: Callable[[Any], Any]) -> None:
    wanted = matrix((64, 64))
    parts = {name: torch.ones(shape, dtype=dtype) for name, (shape, dtype) in wanted.tensors().items()}
    moved = move(quantization.parameter_over(wanted, parts))
    assert torch.equal(moved.data, parts["weight"])
    assert moved.quant_state.absmax.data_ptr() == parts["weight.absmax"].data_ptr()


def slot_with(wanted: PackedMatrix, seed: int) -> tuple[Slot, Any]:
    layout = make_layout(0, wanted.tensors(), [wanted])
    slot = Slot(0, torch.zeros(layout.nbytes, dtype=torch.uint8))
    fill(slot, layout, wanted, seed)
    return slot, layout


def fill(slot: Slot, layout: Any, wanted: PackedMatrix, seed: int) -> torch.Tensor:
    slot.begin_fill(seed)
    values = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(seed))
    quantization.quantize(wanted, values, layout.views(slot.buffer), CPU)
    slot.move_to(SlotState.READY, seed)
    return values


def packed_product(weight: Any, hidden: torch.Tensor) -> torch.Tensor:
    product: torch.Tensor = bitsandbytes.matmul_4bit(hidden, weight, quant_state=weight.quant_state)
    return product


def test_one_parameter_per_slot_shows_whichever_layer_is_in_it() -> None:
    wanted = matrix((48, 64))
    slot, layout = slot_with(wanted, seed=1)
    weight = slot.parameters(layout)["weight"]
    hidden = torch.randn(3, 64)
    for seed in (2, 3):
        values = fill(slot, layout, wanted, seed)
        assert slot.parameters(layout)["weight"] is weight
        packed, state = quantization.functional.quantize_4bit(values, compress_statistics=True, quant_type="nf4")
        expected = hidden @ quantization.functional.dequantize_4bit(packed, state).T
        assert torch.equal(packed_product(weight, hidden), expected)


def test_a_graph_that_outlives_its_visit_raises_instead_of_using_the_next_layer() -> None:
    wanted = matrix((48, 64))
    slot, layout = slot_with(wanted, seed=1)
    hidden = torch.randn(3, 64, requires_grad=True)
    kept = packed_product(slot.parameters(layout)["weight"], hidden)
    inside = torch.autograd.grad(kept.sum(), hidden, retain_graph=True)[0]
    assert inside.abs().sum() > 0
    fill(slot, layout, wanted, seed=2)
    slot.parameters(layout)  # the next visit does not make the old one valid
    with pytest.raises(RuntimeError, match=r"weight: .*filled anew \(fill 2, expected 1\)"):
        torch.autograd.grad(kept.sum(), hidden)


def test_layouts_of_the_same_bytes_but_other_shapes_have_parameters_of_their_own() -> None:
    wide, tall = matrix((32, 64)), matrix((64, 32))
    slot, layout = slot_with(wide, seed=1)
    other = make_layout(1, tall.tensors(), [tall])
    assert layout.tensors == other.tensors
    assert slot.parameters(layout)["weight"].quant_state.shape == (32, 64)
    assert slot.parameters(other)["weight"].quant_state.shape == (64, 32)


# ------------------------------------------------------------------------------------------- what stock packs, and how


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_tensor_is_that_of_stock_quantization(checkpoints: Callable[..., Path], architecture: str) -> None:
    folder = checkpoints(architecture)
    reference = stock(folder)
    expected = copies(reference)
    kinds = {name: type(module).__name__ for name, module in reference.named_modules()}
    assert "Linear4bit" in kinds.values()
    for make in (streamed, lambda f: streamed(f, NF4_ON_DISK), wrapped):
        with closing(make(folder)) as model:
            assert {name: type(module).__name__ for name, module in model.named_modules()} == kinds
            assert_same_tensors(model.state_dict(), expected)
            assert model.num_parameters() == reference.num_parameters()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("double", [True, False])
def test_cast_and_double_quantization_are_those_of_stock(
    checkpoints: Callable[..., Path], dtype: torch.dtype, double: bool
) -> None:
    folder = checkpoints("qwen2")
    expected = copies(stock(folder, dtype, bnb_4bit_use_double_quant=double))
    for tier in ("auto", "min"):
        config = LemaConfig(quantization="nf4", double_quantization=double, ram_budget=tier)
        with closing(streamed(folder, config, dtype)) as model:
            assert_same_tensors(model.state_dict(), expected)


def test_packed_model_reports_what_a_stock_one_reports(checkpoints: Callable[..., Path]) -> None:
    reference = stock(checkpoints())
    with closing(streamed(checkpoints())) as model:
        assert model.is_loaded_in_4bit
        assert model.is_quantized
        assert model.quantization_method == reference.quantization_method
        assert model.hf_quantizer.is_trainable
        assert model.config.to_dict() == reference.config.to_dict()
        linear = model.model.layers[0].self_attn.q_proj
        assert linear.compute_dtype == torch.float32
        for cast in (lambda: model.half(), lambda: model.to(torch.float16)):
            with pytest.raises(ValueError, match=r"not supported|cannot cast"):
                cast()
        with pytest.raises(RuntimeError, match="unwrap"):
            model.dequantize()


def test_vectors_of_a_packed_model_stay_on_the_device_and_the_rest_is_streamed(
    checkpoints: Callable[..., Path],
) -> None:
    for make in (streamed, wrapped):
        with closing(make(checkpoints("qwen2"))) as model:
            names = {name for name, _ in model.named_parameters()}
            ignored = {name for name in model._ddp_params_and_buffers_to_ignore if name in names}
            of_layers = {name for name in names if ".layers." in name}
            vectors = {name for name in of_layers if "norm" in name or name.endswith("bias")}
            assert ignored == of_layers - vectors
            assert vectors


# -------------------------------------------------------------------------------------------------------- training


@pytest.fixture(scope="module")
def fifty_stock_steps(checkpoints: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    return train(qlora(stock(checkpoints())), tmp_path_factory.mktemp("stock"), max_steps=50)


SLOW = pytest.mark.slow  # the same in three steps is above and below


@pytest.mark.parametrize("how", ["ram", pytest.param("disk", marks=SLOW), pytest.param("wrap", marks=SLOW)])
def test_fifty_steps_are_those_of_stock_qlora(
    checkpoints: Callable[..., Path], fifty_stock_steps: Any, tmp_path: Path, how: str
) -> None:
    model = wrapped(checkpoints()) if how == "wrap" else streamed(checkpoints(), TIERS[how])
    packed = copies(model)
    with closing(qlora(model)) as peft_model:
        before = trainables(peft_model)
        found = train(peft_model, tmp_path, max_steps=50)
        assert_same_run(found, fifty_stock_steps)
        assert_moved(before, found.trainables)
        streamer = get_streamer(peft_model)
        assert (streamer.num_streamed, streamer.host_store.tier) == (NUM_LAYERS, "disk" if how == "disk" else "ram")
        adapters = LemaModelWrapper.unwrap(peft_model).unload()
        assert_same_tensors(copies(adapters), packed)


@pytest.mark.parametrize("architecture", sorted(set(ARCHITECTURES) - {"llama"}))
def test_three_steps_of_every_architecture_are_those_of_stock_qlora(
    checkpoints: Callable[..., Path], tmp_path: Path, architecture: str
) -> None:
    folder = checkpoints(architecture)
    expected = train(qlora(stock(folder), architecture), tmp_path)
    with closing(qlora(streamed(folder), architecture)) as model:
        assert_same_run(train(model, tmp_path), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_half_precision_steps_are_those_of_stock_qlora(
    checkpoints: Callable[..., Path], tmp_path: Path, dtype: torch.dtype, architecture: str
) -> None:
    folder = checkpoints(architecture, dtype)
    reference = qlora(stock(folder, dtype), architecture)
    assert {p.dtype for n, p in reference.named_parameters() if "norm" in n} == {torch.float32}
    expected = train(reference, tmp_path)
    with closing(qlora(streamed(folder, dtype=dtype), architecture)) as model:
        assert_same_run(train(model, tmp_path), expected)


def test_unprepared_half_precision_model_is_the_unprepared_stock_one(checkpoints: Callable[..., Path]) -> None:
    folder = checkpoints("qwen2", torch.bfloat16)
    results = []
    for model in (stock(folder, torch.bfloat16), streamed(folder, dtype=torch.bfloat16)):
        with closing(adapt(model.train(), lora("qwen2"))) as peft_model:
            results.append((forward_backward(peft_model), gradients(peft_model)))
    assert torch.equal(results[0][0], results[1][0])
    assert_same_tensors(results[1][1], results[0][1])


def test_stock_qlora_model_with_its_adapter_is_wrapped_as_it_is(
    checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    expected = train(qlora(stock(checkpoints())), tmp_path)
    model = qlora(stock(checkpoints()))
    packed = copies(model)
    with closing(LemaModelWrapper.wrap(model, device="cpu")):
        assert_same_tensors(model.state_dict(), packed)
        assert_same_run(train(model, tmp_path), expected)


def test_evaluation_and_generation_between_steps_are_those_of_stock(checkpoints: Callable[..., Path]) -> None:
    results = []
    for model in (stock(checkpoints()), streamed(checkpoints())):
        with closing(qlora(model, lora_dropout=0.0)) as peft_model:
            rows = batch()
            found = [forward_backward(peft_model)]
            peft_model.eval()
            with torch.no_grad():
                found += [peft_model(**rows).logits]
            found += [peft_model.generate(input_ids=rows["input_ids"][:1], max_new_tokens=6, do_sample=False)]
            peft_model.train()
            found += [forward_backward(peft_model)]
            results.append((found, gradients(peft_model)))
    for expected, found in zip(results[0][0], results[1][0], strict=True):
        assert torch.equal(found, expected)
    assert_same_tensors(results[1][1], results[0][1])


def test_adapter_of_a_streamed_run_serves_stock_qlora_and_the_full_precision_model(
    checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    folder = checkpoints()
    with closing(qlora(streamed(folder))) as model:
        train(model, tmp_path)
        model.save_pretrained(tmp_path / "adapter")
        with torch.no_grad():
            expected = model.eval()(**batch()).logits
    on_stock = PeftModel.from_pretrained(stock(folder), tmp_path / "adapter").eval()
    on_full = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(on_stock(**batch()).logits, expected)
        assert torch.allclose(on_full(**batch()).logits, expected, atol=0.2)
    names = set(load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    assert {f"base_model.model.{name}" for name in names if "lora" not in name} == set()
    with closing(PeftModel.from_pretrained(streamed(folder), tmp_path / "adapter")) as again, torch.no_grad():
        assert torch.equal(again.eval()(**batch()).logits, expected)


@pytest.mark.parametrize("tier", TIERS)
def test_merges_are_those_of_stock_qlora(checkpoints: Callable[..., Path], tier: str) -> None:
    states = []
    for model in (stock(checkpoints()), streamed(checkpoints(), TIERS[tier])):
        with closing(adapt(model, lora("llama", init_lora_weights=False))) as peft_model:
            found = [copies(peft_model)]
            for step in (peft_model.merge_adapter, peft_model.unmerge_adapter):
                step()
                with torch.no_grad():
                    logits = peft_model.eval()(**batch()).logits
                found.append({**copies(peft_model), "logits": logits})
            merged = peft_model.merge_and_unload()
            found.append(copies(merged))
            states.append(found)
    for expected, found in zip(*states, strict=True):
        assert_same_tensors(found, expected)
    before, after = states[1][0], states[1][-1]
    path = "model.layers.0.self_attn.q_proj"
    assert not torch.equal(after[f"{path}.weight"], before[f"base_model.model.{path}.base_layer.weight"])


def test_an_adapter_that_rewrites_its_base_does_so_as_on_stock(checkpoints: Callable[..., Path]) -> None:
    results = []
    for model in (stock(checkpoints()), streamed(checkpoints())):
        with closing(qlora(model, init_lora_weights="olora")) as peft_model:
            results.append((forward_backward(peft_model), gradients(peft_model), copies(peft_model)))
    assert torch.equal(results[0][0], results[1][0])
    assert_same_tensors(results[1][1], results[0][1])
    # Stock keeps the float32 of the rewritten weight as the type that unpacking gives; the values are the same.
    assert_same_tensors(results[1][2], results[0][2])


def test_dora_on_packed_layers_is_that_of_stock(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    expected = train(qlora(stock(checkpoints()), use_dora=True), tmp_path)
    with closing(qlora(streamed(checkpoints()), use_dora=True)) as model:
        assert_same_run(train(model, tmp_path), expected)


@pytest.mark.parametrize("tier", TIERS)
def test_visits_moves_and_saves_never_pack_again(
    checkpoints: Callable[..., Path], tmp_path: Path, tier: str, request: pytest.FixtureRequest
) -> None:
    model = streamed(checkpoints(), TIERS[tier])
    packed = copies(model)
    request.getfixturevalue("nothing_is_packed")
    with closing(qlora(model)) as peft_model:
        forward_backward(peft_model)
        peft_model.to("cpu")
        peft_model.save_pretrained(tmp_path / "adapter")
        model.save_pretrained(tmp_path / "model")
        assert_same_tensors(copies(LemaModelWrapper.unwrap(peft_model).unload()), packed)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_fifty_steps_of_a_real_model_are_those_of_stock_qlora(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_LEMA_CACHE")  # where the recipes keep it
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "recipes"))
    from default_model import resolve_model

    source = resolve_model()
    if source.is_random:
        pytest.skip("SmolLM2-135M cannot be reached from here")
    folder = Path(source.name_or_path)
    monkeypatch.setenv("HF_LEMA_CACHE", str(tmp_path / "cache"))
    settings = {"max_steps": 50, "per_device_train_batch_size": 1}
    expected = train(qlora(stock(folder), r=8), tmp_path, **settings)
    with closing(qlora(streamed(folder, NF4_ON_DISK), r=8)) as model:
        assert_same_run(train(model, tmp_path, **settings), expected)
        assert get_streamer(model).num_streamed == 30


@pytest.mark.parametrize("choices", [{"boundaries_in_ram": True}, {"resident_layers": (1,)}])
def test_ways_to_run_a_step_that_change_no_sum_are_equal_on_packed_layers(
    checkpoints: Callable[..., Path], tmp_path: Path, choices: dict[str, Any]
) -> None:
    expected = train(qlora(stock(checkpoints())), tmp_path)
    config = LemaConfig(quantization="nf4", choices=StepChoices(**choices))
    with closing(qlora(streamed(checkpoints(), config))) as model:
        assert_same_run(train(model, tmp_path), expected)


def test_tiles_micro_batches_and_a_head_in_pieces_differ_by_rounding_only(checkpoints: Callable[..., Path]) -> None:
    results = []
    for choices in (StepChoices(), StepChoices(tile_tokens=8, micro_batch_size=1, outside_in_ram=True)):
        config = LemaConfig(quantization="nf4", choices=choices)
        with closing(qlora(streamed(checkpoints(), config), lora_dropout=0.0)) as model:
            results.append((forward_backward(model), gradients(model)))
    assert torch.allclose(results[0][0], results[1][0], rtol=1e-5)
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("optim", ["adamw_bnb_8bit", "paged_adamw_8bit"])
def test_8_bit_optimizers_keep_a_quarter_of_the_state_and_train_as_on_stock(optim: str, tmp_path: Path) -> None:
    build(num_layers=3, hidden_size=128, intermediate_size=256).save_pretrained(tmp_path / "model")
    runs = []
    for model in (stock(tmp_path / "model"), streamed(tmp_path / "model")):
        with closing(qlora(model, r=32)) as peft_model:
            trainer = RecordingTrainer(
                model=peft_model, args=arguments(tmp_path, optim=optim), train_dataset=examples()
            )
            trainer.train()
            runs.append((torch.stack(trainer.micro_losses), trainables(peft_model)))
            states = [(p, trainer.optimizer.optimizer.state[p]) for p in peft_model.parameters() if p.requires_grad]
    assert torch.equal(runs[0][0], runs[1][0])
    assert_same_tensors(runs[1][1], runs[0][1])
    large = [(p, state) for p, state in states if p.numel() >= 4096]
    assert len(large) >= len(states) / 2
    for parameter, state in large:
        own = {name: value for name, value in state.items() if torch.is_tensor(value) and "qmap" not in name}
        # A byte for each of two moments, and a float32 for each block of 256 values.
        expected = 2 * parameter.numel() + 2 * 4 * -(-parameter.numel() // 256)
        assert sum(value.nbytes for value in own.values()) == expected
