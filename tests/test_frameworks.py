"""What people drive models with besides the bare Trainer: TRL, accelerate loops, data workers, DDP's reducer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from models import (
    CHECKPOINTED,
    NUM_LAYERS,
    ORDERS,
    PEFT_THEN_WRAP,
    STOCK,
    VOCAB_SIZE,
    WRAP_THEN_PEFT,
    adapt,
    assert_moved,
    assert_same_run,
    assert_same_tensors,
    batch,
    build,
    closing,
    cut_loss,
    enable_checkpointing,
    examples,
    forward_backward,
    gradients,
    lora,
    prepare,
    train,
    trainables,
)
from peft import PromptTuningConfig
from torch import nn
from torch.utils.data import DataLoader

from hf_lema import LemaModelWrapper, StepChoices, get_streamer
from hf_lema.wrapper import apply_choices

pytestmark = pytest.mark.integration


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps its state for the process; a test begins and ends without one."""

    def reset() -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        PartialState._reset_state()

    reset()
    yield
    reset()


# ---- a bare accelerate loop ----


def accelerate_loop(order: str, precision: str, prepared_before_wrap: bool = False) -> list[torch.Tensor]:
    accelerator = Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=2)
    model = prepare(STOCK if prepared_before_wrap else order)
    if order in CHECKPOINTED:
        enable_checkpointing(model)
    if prepared_before_wrap:
        LemaModelWrapper.wrap(model, device="cpu")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 4)
    loader = DataLoader(examples(12), batch_size=2)
    torch.manual_seed(4)
    prepared, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    seen = []
    with closing(model):
        prepared.train()
        for rows in loader:
            with accelerator.accumulate(prepared):
                loss = prepared(**rows).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    seen.append(torch.as_tensor(accelerator.clip_grad_norm_(prepared.parameters(), 0.5)))
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            seen.append(loss.detach())
        if order != STOCK:
            assert get_streamer(accelerator.unwrap_model(prepared)).num_streamed == NUM_LAYERS
        return [*seen, *trainables(model).values(), *accelerator.get_state_dict(prepared).values()]


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("order", ORDERS)
def test_accelerate_loop_with_accumulation_is_equal(order: str, precision: str, fresh_accelerate: None) -> None:
    expected = accelerate_loop(STOCK, precision)
    AcceleratorState._reset_state(reset_partial_state=True)
    found = accelerate_loop(order, precision)
    assert_same_tensors(dict(enumerate(found)), dict(enumerate(expected)))


def test_accelerate_saves_and_loads_the_state_of_a_streamed_run(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    with closing(prepare(WRAP_THEN_PEFT)) as model:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        prepared, optimizer = accelerator.prepare(model, optimizer)
        accelerator.backward(prepared(**batch()).loss)
        optimizer.step()
        before = trainables(model)
        accelerator.save_state(str(tmp_path))
        accelerator.backward(prepared(**batch()).loss)
        optimizer.step()
        assert_moved(before, trainables(model))
        accelerator.load_state(str(tmp_path))
        assert_same_tensors(trainables(model), before)


# ---- a bare torch loop ----


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("order", ORDERS)
def test_bare_loop_with_accumulation_is_equal(order: str, set_to_none: bool) -> None:
    def use(model: nn.Module) -> list[torch.Tensor]:
        torch.manual_seed(4)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses = []
        for step in range(3):
            for micro in range(2):
                loss = model(**batch(seed=2 * step + micro)).loss / 2
                loss.backward()
                losses.append(loss.detach())
            optimizer.step()
            optimizer.zero_grad(set_to_none=set_to_none)
        return [*losses, *trainables(model).values()]

    resident = prepare(STOCK)
    enable_checkpointing(resident)
    expected = use(resident)
    with closing(prepare(order)) as model:
        assert_same_tensors(dict(enumerate(use(model))), dict(enumerate(expected)))


def test_optimizer_made_before_the_wrap_trains_the_same_parameters() -> None:
    model = adapt(build())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    with closing(LemaModelWrapper.wrap(model, device="cpu")):
        before = trainables(model)
        model(**batch()).loss.backward()
        optimizer.step()
        after = trainables(model)
        assert_moved({n: t for n, t in before.items() if "lora_B" in n}, after)


def test_training_in_another_thread_is_equal() -> None:
    import threading

    resident, model = prepare(STOCK), prepare(WRAP_THEN_PEFT)
    enable_checkpointing(resident)
    with closing(model):
        for each in (resident, model):

            def step(each: Any = each) -> None:
                torch.manual_seed(4)
                each(**batch()).loss.backward()

            thread = threading.Thread(target=step)
            thread.start()
            thread.join(60.0)
        assert_same_tensors(gradients(model), gradients(resident))


# ---- data workers ----


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("order", ORDERS)
def test_two_data_workers_change_no_number_and_leave_the_runtime_alone(
    order: str, persistent: bool, tmp_path: Path
) -> None:
    settings = {"max_steps": 10, "dataloader_num_workers": 2, "dataloader_persistent_workers": persistent}
    expected = train(prepare(STOCK), tmp_path, gradient_checkpointing=True, **settings)
    settings["gradient_checkpointing"] = order in CHECKPOINTED
    with closing(prepare(order)) as model:  # 16 examples: the workers end and begin again within the run
        assert_same_run(train(model, tmp_path, **settings), expected)
        assert not get_streamer(model).closed
        # The workers, which inherited the model, have ended: nothing of it was closed by them.
        assert torch.equal(forward_backward(model), forward_backward(model))


@pytest.mark.parametrize("neftune_noise_alpha", [5.0])
def test_noise_on_embeddings_is_equal(neftune_noise_alpha: float, tmp_path: Path) -> None:
    settings = {"neftune_noise_alpha": neftune_noise_alpha, "label_smoothing_factor": 0.1}
    expected = train(prepare(STOCK), tmp_path, gradient_checkpointing=True, **settings)
    with closing(prepare(WRAP_THEN_PEFT)) as model:
        assert_same_run(train(model, tmp_path, **settings), expected)


# ---- DDP's reducer, in one process ----


@pytest.fixture
def process_group() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("find_unused_parameters", [True, False])
@pytest.mark.parametrize("order", ORDERS)
def test_ddp_reduces_every_gradient_once(order: str, find_unused_parameters: bool, process_group: None) -> None:
    def use(model: nn.Module) -> list[torch.Tensor]:
        parallel = nn.parallel.DistributedDataParallel(model, find_unused_parameters=find_unused_parameters)
        calls: dict[str, int] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(
                    lambda _, name=name: calls.__setitem__(name, calls.get(name, 0) + 1)
                )
        losses = []
        torch.manual_seed(4)
        for step in range(2):
            model.zero_grad()
            loss = parallel(**batch(seed=step)).loss
            loss.backward()
            losses.append(loss.detach())
        assert set(calls.values()) == {2}
        return losses

    resident = prepare(STOCK)
    expected = use(resident)
    with closing(prepare(order)) as model:
        assert_same_tensors(dict(enumerate(use(model))), dict(enumerate(expected)))
        assert_same_tensors(gradients(model), gradients(resident))
        ignored = set(model._ddp_params_and_buffers_to_ignore)
        streamed = {n for n, p in model.named_parameters() if ".layers." in n and not p.requires_grad}
        assert streamed <= ignored
        assert not ignored & set(trainables(model))


def test_ddp_leaves_streamed_layers_under_trained_prompts_alone(process_group: None) -> None:
    def use(model: nn.Module) -> torch.Tensor:
        parallel = nn.parallel.DistributedDataParallel(model)
        assert parallel.will_sync_module_buffers() is (model is resident)
        loss: torch.Tensor = parallel(**batch()).loss
        loss.backward()
        return loss.detach()

    prompts = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    resident = prepare(STOCK, peft_config=prompts)
    expected = use(resident)
    for order in ORDERS:
        with closing(prepare(order, peft_config=prompts)) as model:
            assert torch.equal(use(model), expected)
            assert_same_tensors(gradients(model), gradients(resident))
            streamed = {n for n, p in model.named_parameters() if ".layers." in n and not p.requires_grad}
            assert streamed
            assert streamed <= set(model._ddp_params_and_buffers_to_ignore)


# ---- TRL ----


def tokenizer() -> Any:
    """One word a token: enough for a trainer that wants a tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(4, VOCAB_SIZE))]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def text(seed: int, num_words: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    return " ".join(f"w{int(i)}" for i in torch.randint(4, VOCAB_SIZE, (num_words,), generator=generator))


def trl_fields(tmp_path: Path, **overrides: Any) -> dict[str, Any]:
    return {
        "output_dir": str(tmp_path),
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "dataloader_pin_memory": False,
        "max_length": 32,
    } | overrides


def logged(trainer: Any) -> list[dict[str, float]]:
    return [
        {
            k: v
            for k, v in log.items()
            if k in ("loss", "grad_norm", "mean_token_accuracy", "entropy", "rewards/margins")
        }
        for log in trainer.state.log_history
        if "loss" in log
    ]


SFT_SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "bf16": {"bf16": True},
    "packed": {"packing": True, "packing_strategy": "wrapped"},
    "accumulated": {"gradient_accumulation_steps": 2},
    "not checkpointed": {"gradient_checkpointing": False},
}


def sft(
    order: str,
    output_dir: Path,
    settings: dict[str, Any],
    peft_by_trainer: bool,
    cut: bool = False,
    choices: StepChoices | None = None,
) -> tuple[Any, Any]:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": [text(i, 8 + i % 9) for i in range(12)]})
    model: Any = build()
    if peft_by_trainer:
        if order != STOCK:
            LemaModelWrapper.wrap(model, device="cpu")
    else:
        model = prepare(order, model)
    if cut:
        cut_loss(model)
    if choices is not None:
        apply_choices(model, choices)
    with closing(model):
        torch.manual_seed(5)
        trainer = trl.SFTTrainer(
            model=model,
            args=trl.SFTConfig(
                **trl_fields(output_dir, **({"gradient_checkpointing": order in CHECKPOINTED} | settings))
            ),
            train_dataset=rows,
            eval_dataset=rows.select(range(4)),
            processing_class=tokenizer(),
            peft_config=lora() if peft_by_trainer else None,
        )
        trainer.train()
        evaluated = trainer.evaluate()["eval_loss"]
        if order != STOCK:
            assert get_streamer(trainer.model).num_streamed == NUM_LAYERS
        trainer.save_model(str(output_dir / "saved"))
        return [*logged(trainer), {"eval_loss": evaluated}], trainables(trainer.model)


@pytest.mark.parametrize("settings", SFT_SETTINGS)
def test_sft_trainer_of_a_wrapped_model_is_equal(settings: str, tmp_path: Path) -> None:
    expected = sft(STOCK, tmp_path / STOCK, SFT_SETTINGS[settings], peft_by_trainer=True)
    found = sft(WRAP_THEN_PEFT, tmp_path / WRAP_THEN_PEFT, SFT_SETTINGS[settings], peft_by_trainer=True)
    assert len(expected[0]) == 4
    assert found[0] == expected[0]
    assert_same_tensors(found[1], expected[1])


def test_sft_trainer_with_a_chunked_loss_differs_by_rounding_alone(tmp_path: Path) -> None:
    expected, _ = sft(STOCK, tmp_path / STOCK, {}, peft_by_trainer=False)
    found, _ = sft(WRAP_THEN_PEFT, tmp_path / WRAP_THEN_PEFT, {}, peft_by_trainer=False, cut=True)
    assert len(found) == len(expected)
    for log, like in zip(found, expected, strict=True):
        assert log == pytest.approx(like, rel=1e-4)


def test_sft_trainer_whose_head_lies_in_host_memory_differs_by_rounding_alone(tmp_path: Path) -> None:
    """TRL's fused head reads the head's weight itself; where TRL has none, the loss comes from pieces of the head."""
    expected, _ = sft(STOCK, tmp_path / STOCK, {}, peft_by_trainer=False)
    choices = StepChoices(boundaries_in_ram=True, outside_in_ram=True)
    found, _ = sft(WRAP_THEN_PEFT, tmp_path / WRAP_THEN_PEFT, {}, peft_by_trainer=False, choices=choices)
    assert len(found) == len(expected)
    for log, like in zip(found, expected, strict=True):
        assert log == pytest.approx(like, rel=1e-4)


@pytest.mark.parametrize("order", ORDERS)
def test_sft_trainer_of_a_peft_model_is_equal(order: str, tmp_path: Path) -> None:
    expected = sft(STOCK, tmp_path / STOCK, {}, peft_by_trainer=False)
    found = sft(order, tmp_path / order, {}, peft_by_trainer=False)
    assert found[0] == expected[0]
    assert_same_tensors(found[1], expected[1])


def test_dpo_trainer_with_the_adapter_off_as_its_reference_is_equal(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict(
        {
            "prompt": [text(i, 5) for i in range(8)],
            "chosen": [" " + text(50 + i, 6) for i in range(8)],
            "rejected": [" " + text(90 + i, 4) for i in range(8)],
        }
    )
    results = []
    for order in (STOCK, WRAP_THEN_PEFT, PEFT_THEN_WRAP):
        model = prepare(order)
        with closing(model):
            trainer = trl.DPOTrainer(
                model=model,
                args=trl.DPOConfig(**trl_fields(tmp_path, gradient_checkpointing=order in CHECKPOINTED)),
                train_dataset=rows,
                processing_class=tokenizer(),
            )
            trainer.train()
            results.append((logged(trainer), trainables(model)))
    for found in results[1:]:
        assert found[0] == results[0][0]
        assert_same_tensors(found[1], results[0][1])
