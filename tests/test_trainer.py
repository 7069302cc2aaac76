"""The stock Trainer with stock PEFT: a streamed run has the numbers of the resident run with gradient checkpointing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import (
    CHECKPOINTED,
    NUM_LAYERS,
    ORDERS,
    PEFT_THEN_WRAP,
    SEQ_LEN,
    STOCK,
    VOCAB_SIZE,
    WRAP_THEN_PEFT,
    RecordingTrainer,
    arguments,
    assert_moved,
    assert_same_run,
    assert_same_tensors,
    batch,
    build,
    closing,
    cut_loss,
    examples,
    lora,
    prepare,
    settled_bytes,
    train,
    trainables,
)
from peft import PeftModel
from safetensors.torch import load_file
from transformers import Trainer

from hf_lema import LemaConfig, LemaModelWrapper, get_streamer

pytestmark = pytest.mark.integration


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def run(
    order: str,
    output_dir: Path,
    *,
    dtype: torch.dtype = torch.float32,
    peft_config: Any = None,
    num_layers: int = NUM_LAYERS,
    **overrides: Any,
) -> Any:
    model = prepare(order, build(dtype=dtype, num_layers=num_layers), peft_config)
    with closing(model):
        return train(model, output_dir, **overrides)


# ---- the numbers of a run ----


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "dtype",
    [pytest.param(torch.float32, id="fp32"), pytest.param(torch.bfloat16, id="bf16", marks=pytest.mark.slow)],
)
def test_200_steps_with_dropout_and_accumulation_are_equal(dtype: torch.dtype, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "dtype": dtype,
        "num_layers": 3,
        "peft_config": lora(target_modules=["q_proj", "v_proj", "down_proj"]),
        "max_steps": 200,
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": True,
        "logging_steps": 20,
        "num_examples": 64,
    }
    resident = run(STOCK, tmp_path, **settings)
    streamed = run(WRAP_THEN_PEFT, tmp_path, **settings)
    assert len(resident.losses) == 400
    assert resident.losses[-40:].mean() < resident.losses[:40].mean() - 0.02
    assert_same_run(streamed, resident)


PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16_autocast": {"bf16": True},
    "bf16_base": {"dtype": torch.bfloat16},
    "bf16_base_and_autocast": {"dtype": torch.bfloat16, "bf16": True},
}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_streamed_run_equals_resident_run(precision: str, tmp_path: Path) -> None:
    settings = {"gradient_accumulation_steps": 2, "max_steps": 4, "max_grad_norm": 0.3, **PRECISIONS[precision]}
    resident = run(STOCK, tmp_path, gradient_checkpointing=True, **settings)
    for order in ORDERS:
        for gradient_checkpointing in (True, False):
            streamed = run(order, tmp_path, gradient_checkpointing=gradient_checkpointing, **settings)
            assert_same_run(streamed, resident)


def test_streamed_run_is_bf16_autocast_indeed(tmp_path: Path) -> None:
    fp32, bf16 = (run(WRAP_THEN_PEFT, tmp_path, bf16=flag) for flag in (False, True))
    assert not torch.equal(fp32.losses, bf16.losses)


def test_adapters_train(tmp_path: Path) -> None:
    model = prepare(PEFT_THEN_WRAP)
    with closing(model):
        before = trainables(model)
        train(model, tmp_path, max_steps=2)
        assert_moved(before, trainables(model))


def test_base_weights_are_those_of_the_start_after_training(tmp_path: Path) -> None:
    expected = build().state_dict()
    model = build()
    with closing(model):
        LemaModelWrapper.wrap(model, device="cpu")
        peft_model = prepare(STOCK, model)
        train(peft_model, tmp_path)
        found = {
            name.replace(".base_layer", ""): tensor
            for name, tensor in model.state_dict().items()
            if ".lora_" not in name
        }
        assert_same_tensors(found, expected)


def test_padding_and_rows_of_different_length_are_equal(tmp_path: Path) -> None:
    def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        lengths = [int(row["input_ids"][0]) % 7 + 6 for row in rows]
        made = {name: torch.zeros(len(rows), max(lengths), dtype=torch.long) for name in rows[0]}
        made["labels"][:] = -100
        for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            for name in made:
                made[name][i, :length] = row[name][:length]
        return made

    runs = []
    for order in (STOCK, *ORDERS):
        model = prepare(order)
        with closing(model):
            args = arguments(tmp_path, max_steps=5, gradient_checkpointing=order == STOCK)
            trainer = RecordingTrainer(model=model, args=args, train_dataset=examples(), data_collator=collate)
            trainer.train()
            runs.append(trainer.trajectory())
    for streamed in runs[1:]:
        assert_same_run(streamed, runs[0])


# ---- gradient checkpointing is absorbed ----


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_bytes_moved_are_those_that_the_schedule_predicts(
    order: str, gradient_checkpointing: bool, tmp_path: Path
) -> None:
    model = prepare(order, build(num_layers=5))
    with closing(model):
        train(model, tmp_path, max_steps=1, gradient_checkpointing=gradient_checkpointing)
        streamer = get_streamer(model)
        begin = settled_bytes(model)
        train(model, tmp_path, max_steps=3, gradient_checkpointing=gradient_checkpointing)
        moved = settled_bytes(model) - begin
    assert streamer.transfers_per_step() == 2 * 5 - 2 * 2
    assert moved == 3 * streamer.transfers_per_step() * streamer.layer_bytes


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_turned_on_before_the_wrap_is_absorbed(use_reentrant: bool, tmp_path: Path) -> None:
    model = build(num_layers=5)
    peft_model = prepare(STOCK, model)
    model._set_gradient_checkpointing(
        True,
        gradient_checkpointing_func=lambda *args: torch.utils.checkpoint.checkpoint(*args, use_reentrant=use_reentrant),
    )
    with closing(LemaModelWrapper.wrap(peft_model, device="cpu")):
        train(peft_model, tmp_path, max_steps=1)
        streamer = get_streamer(peft_model)
        begin = settled_bytes(peft_model)
        found = train(peft_model, tmp_path, max_steps=2)
        moved = settled_bytes(peft_model) - begin
    assert moved == 2 * streamer.transfers_per_step() * streamer.layer_bytes

    resident = prepare(STOCK, build(num_layers=5))
    train(resident, tmp_path, max_steps=1, gradient_checkpointing=True)
    assert_same_run(found, train(resident, tmp_path, max_steps=2, gradient_checkpointing=True))


def test_reentrant_checkpointing_asked_of_the_trainer_is_absorbed(tmp_path: Path) -> None:
    settings = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    assert_same_run(run(WRAP_THEN_PEFT, tmp_path, **settings), run(STOCK, tmp_path, gradient_checkpointing=True))


def test_no_step_loads_on_demand_once_the_sweep_repeats(tmp_path: Path) -> None:
    model = prepare(WRAP_THEN_PEFT)
    with closing(model):
        train(model, tmp_path, max_steps=1)
        before = get_streamer(model).stats()
        train(model, tmp_path, max_steps=6, gradient_accumulation_steps=2)
        after = get_streamer(model).stats()
    assert after.num_demand_loads == before.num_demand_loads
    assert after.num_hits - before.num_hits == 6 * 2 * 2 * NUM_LAYERS


# ---- evaluation, prediction, saving, resuming ----


def evaluated(order: str, output_dir: Path) -> tuple[Any, list[dict[str, float]], Any]:
    model = prepare(order)
    with closing(model):
        args = arguments(
            output_dir,
            max_steps=4,
            eval_strategy="steps",
            eval_steps=2,
            gradient_checkpointing=order in CHECKPOINTED,
            prediction_loss_only=False,
        )
        trainer = RecordingTrainer(model=model, args=args, train_dataset=examples(), eval_dataset=examples(6, seed=9))
        trainer.train()
        evaluations = [
            {name: value for name, value in log.items() if name == "eval_loss"}
            for log in [*trainer.state.log_history, trainer.evaluate()]
        ]
        prediction = trainer.predict(examples(4, seed=10))
        return trainer.trajectory(), evaluations, prediction


def test_evaluate_and_predict_are_equal_and_do_not_disturb_training(tmp_path: Path) -> None:
    resident, resident_evals, resident_prediction = evaluated(STOCK, tmp_path)
    assert sum("eval_loss" in log for log in resident_evals) == 3
    for order in ORDERS:
        streamed, evals, prediction = evaluated(order, tmp_path)
        assert_same_run(streamed, resident)
        assert evals == resident_evals
        logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
        expected = resident_prediction.predictions
        expected = expected[0] if isinstance(expected, tuple) else expected
        assert (logits == expected).all()
        assert prediction.metrics["test_loss"] == resident_prediction.metrics["test_loss"]


@pytest.mark.parametrize("bf16", [False, True])
def test_predictions_of_a_chunked_loss_are_those_of_the_resident_model(bf16: bool, tmp_path: Path) -> None:
    results = []
    for order in (STOCK, WRAP_THEN_PEFT):
        with closing(prepare(order)) as model:
            if order != STOCK:
                cut_loss(model)
            args = arguments(tmp_path, bf16=bf16, gradient_accumulation_steps=2, gradient_checkpointing=order == STOCK)
            trainer = RecordingTrainer(model=model, args=args, train_dataset=examples())
            prediction = trainer.predict(examples(4, seed=10))
            trainer.train()
            results.append((prediction, trainer.trajectory()))
    logits = [p.predictions[0] if isinstance(p.predictions, tuple) else p.predictions for p, _ in results]
    assert logits[1].dtype == logits[0].dtype
    assert (logits[1] == logits[0]).all()
    losses = [p.metrics["test_loss"] for p, _ in results]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    torch.testing.assert_close(results[1][1].losses, results[0][1].losses, rtol=1e-4, atol=0.0)


def _metrics(prediction: Any) -> dict[str, float]:
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    return {"sum": float(logits.sum(dtype="float64")), "size": float(logits.size)}


def _best_tokens(logits: Any, labels: torch.Tensor) -> torch.Tensor:
    best: torch.Tensor = (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)
    assert best.shape == labels.shape
    return best


METRICS: dict[str, dict[str, Any]] = {
    "logits": {"compute_metrics": _metrics},
    "best tokens": {"compute_metrics": _metrics, "preprocess_logits_for_metrics": _best_tokens},
}


@pytest.mark.parametrize("hooks", METRICS)
def test_metrics_get_their_logits_although_the_loss_is_chunked(hooks: str, tmp_path: Path) -> None:
    found = []
    for order in (STOCK, WRAP_THEN_PEFT):
        with closing(prepare(order)) as model:
            if order != STOCK:
                cut_loss(model)
            trainer = Trainer(model=model, args=arguments(tmp_path), eval_dataset=examples(4, seed=9), **METRICS[hooks])
            found.append(trainer.evaluate())
    expected, chunked = found
    assert expected["eval_size"] == 4 * SEQ_LEN * (VOCAB_SIZE if hooks == "logits" else 1)
    assert chunked["eval_sum"] == expected["eval_sum"]
    assert chunked["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-6)


def test_evaluation_without_metrics_makes_no_full_logits(tmp_path: Path) -> None:
    with closing(prepare(WRAP_THEN_PEFT)) as model:
        cut_loss(model)
        num_rows: list[int] = []
        model.get_base_model().lm_head.register_forward_hook(
            lambda _module, args, _output: num_rows.append(args[0].shape[:-1].numel())
        )
        Trainer(model=model, args=arguments(tmp_path), eval_dataset=examples(4, seed=9)).evaluate()
    assert len(num_rows) > 2 * 2 * SEQ_LEN // 8
    # What the check of the model's loss looks at, once, is no more than the first row.
    assert max(num_rows[3:]) == 8


class _OwnLoss(RecordingTrainer):
    """A user's loss that looks at the logits beside the model's own loss."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        outputs = model(**inputs)
        logits = outputs.logits if hasattr(outputs, "logits") else outputs[1]
        loss = outputs.loss + 0.1 * logits.float().logsumexp(-1).pow(2).mean()
        return (loss, outputs) if return_outputs else loss


def _loss_of_logits(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    """For Trainer's ``compute_loss_func``."""
    loss = torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
    return loss if num_items_in_batch is None else loss / 2


OWN_LOSSES: dict[str, tuple[type[RecordingTrainer], dict[str, Any], dict[str, Any]]] = {
    "compute_loss": (_OwnLoss, {}, {}),
    "compute_loss_func": (RecordingTrainer, {"compute_loss_func": _loss_of_logits}, {}),
    "label smoothing": (RecordingTrainer, {}, {"label_smoothing_factor": 0.1}),
}


@pytest.mark.parametrize("how", OWN_LOSSES)
def test_a_loss_that_wants_logits_gets_them_and_trains_as_on_the_resident_model(how: str, tmp_path: Path) -> None:
    trainer_class, hooks, settings = OWN_LOSSES[how]
    runs = []
    for order in (STOCK, WRAP_THEN_PEFT):
        with closing(prepare(order)) as model:
            if order != STOCK:
                cut_loss(model)
            args = arguments(tmp_path, gradient_accumulation_steps=2, gradient_checkpointing=order == STOCK, **settings)
            trainer = trainer_class(model=model, args=args, train_dataset=examples(), **hooks)
            trainer.train()
            runs.append(trainer.trajectory())
    if how == "compute_loss":  # its first part is still the chunked loss
        torch.testing.assert_close(runs[1].losses, runs[0].losses, rtol=1e-4, atol=0.0)
    else:
        assert_same_run(runs[1], runs[0])


def test_a_batch_of_32_in_micro_batches_is_accumulation_with_an_eighth_of_the_bytes(tmp_path: Path) -> None:
    """32 sequences a step, ``micro_batch_size=4``, against 4 x 8 accumulated; each batch padded to its own longest."""

    def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        lengths = [3 + int(row["input_ids"][0]) % (SEQ_LEN - 3) for row in rows]
        made = {name: torch.zeros(len(rows), max(lengths), dtype=torch.long) for name in rows[0]}
        made["labels"][:] = -100
        for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            for name in made:
                made[name][i, :length] = row[name][:length]
        widths.append(max(lengths))
        return made

    def run(batch_size: int, accumulation: int, micro_batch_size: int) -> tuple[Any, int]:
        model = prepare(
            WRAP_THEN_PEFT,
            peft_config=lora(lora_dropout=0.0),
            config=LemaConfig(micro_batch_size=micro_batch_size),
        )
        with closing(model):
            settings = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation}
            trainers = [
                RecordingTrainer(
                    model=model,
                    args=arguments(tmp_path, max_steps=2, learning_rate=1e-3, **settings),
                    train_dataset=examples(64),
                    data_collator=collate,
                )
                for _ in range(2)
            ]
            trainers[0].train()
            before = settled_bytes(model)
            trainers[1].train()
            return trainers[0].trajectory(), settled_bytes(model) - before

    widths: list[int] = []
    large, num_large_bytes = run(32, 1, 4)
    assert len(set(widths)) == 1, "a batch of 32 is as long as the longest of all"
    widths.clear()
    accumulated, num_accumulated_bytes = run(4, 8, 0)
    assert len(set(widths)) > 2, "micro-batches of different length"
    assert num_accumulated_bytes == 8 * num_large_bytes > 0
    # What Trainer logs is the loss of the whole batch over its number of labels, in both.
    for found, expected in zip(large.logs, accumulated.logs, strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
    begin = trainables(prepare(STOCK, peft_config=lora(lora_dropout=0.0)))
    for name, expected in accumulated.trainables.items():
        # AdamW divides by the size of the gradient: a bound on the whole update, not on every number.
        assert (large.trainables[name] - expected).norm() <= 1e-3 * (expected - begin[name]).norm(), name


@pytest.mark.parametrize("order", ORDERS)
def test_resumed_run_equals_the_uninterrupted_one(order: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "max_steps": 6,
        "gradient_accumulation_steps": 2,
        "save_strategy": "steps",
        "save_steps": 3,
        "gradient_checkpointing": order in CHECKPOINTED,
    }
    straight = run(order, tmp_path / "straight", **settings)
    resident = run(STOCK, tmp_path / "stock", **(settings | {"gradient_checkpointing": True}))
    assert_same_run(straight, resident)

    model = prepare(order)
    with closing(model):
        trainer = RecordingTrainer(
            model=model, args=arguments(tmp_path / "resumed", **settings), train_dataset=examples()
        )
        trainer.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-3"))
        resumed = trainer.trajectory()
    assert len(resumed.losses) == 6
    assert torch.equal(resumed.losses, straight.losses[6:])
    assert resumed.logs == straight.logs[3:]
    assert_same_tensors(resumed.trainables, straight.trainables)
    for index, state in straight.optimizer.items():
        assert_same_tensors(resumed.optimizer[index], state)


def test_checkpoint_of_a_resident_run_resumes_streamed_and_the_other_way_round(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    ends = {order: run(order, tmp_path / order, **settings) for order in (STOCK, WRAP_THEN_PEFT)}
    for begun, finished in ((STOCK, WRAP_THEN_PEFT), (WRAP_THEN_PEFT, STOCK)):
        model = prepare(finished)
        with closing(model):
            trainer = RecordingTrainer(
                model=model, args=arguments(tmp_path / "resumed", **settings), train_dataset=examples()
            )
            trainer.train(resume_from_checkpoint=str(tmp_path / begun / "checkpoint-2"))
            assert_same_tensors(trainer.trajectory().trainables, ends[STOCK].trainables)


def test_checkpoint_folder_has_the_files_of_a_resident_run(tmp_path: Path) -> None:
    for order in (STOCK, WRAP_THEN_PEFT, PEFT_THEN_WRAP):
        run(order, tmp_path / order, max_steps=2, save_strategy="steps", save_steps=2)
    folders = [tmp_path / order / "checkpoint-2" for order in (STOCK, WRAP_THEN_PEFT, PEFT_THEN_WRAP)]
    assert len({tuple(sorted(path.name for path in folder.iterdir())) for folder in folders}) == 1
    expected = load_file(folders[0] / "adapter_model.safetensors")
    for folder in folders[1:]:
        assert_same_tensors(load_file(folder / "adapter_model.safetensors"), expected)
        assert json.loads((folder / "adapter_config.json").read_text()) == json.loads(
            (folders[0] / "adapter_config.json").read_text()
        )


def best(order: str, output_dir: Path) -> tuple[dict[str, torch.Tensor], float, str]:
    model = prepare(order)
    with closing(model):
        args = arguments(
            output_dir,
            max_steps=6,
            gradient_checkpointing=order in CHECKPOINTED,
            learning_rate=0.3,  # overshoots: the last step is not the best
            eval_strategy="steps",
            eval_steps=1,
            save_strategy="steps",
            save_steps=1,
            load_best_model_at_end=True,
            metric_for_best_model="eval_loss",
            greater_is_better=False,
        )
        trainer = Trainer(model=model, args=args, train_dataset=examples(), eval_dataset=examples(4, seed=9))
        trainer.train()
        return trainables(model), trainer.evaluate()["eval_loss"], Path(trainer.state.best_model_checkpoint).name


def test_load_best_model_at_end_gives_the_best_adapter(tmp_path: Path) -> None:
    expected = best(STOCK, tmp_path / STOCK)
    assert expected[2] != "checkpoint-6"
    for order in ORDERS:
        found = best(order, tmp_path / order)
        assert_same_tensors(found[0], expected[0])
        assert found[1:] == expected[1:]


@pytest.mark.parametrize("order", ORDERS)
def test_saved_adapter_loads_in_stock_peft_on_a_plain_model(order: str, tmp_path: Path) -> None:
    model = prepare(order)
    with closing(model):
        args = arguments(tmp_path / "run", gradient_checkpointing=order in CHECKPOINTED)
        trainer = Trainer(model=model, args=args, train_dataset=examples())
        trainer.train()
        trainer.save_model(str(tmp_path / "by_trainer"))
        model.save_pretrained(tmp_path / "by_peft")
        model.eval()
        with torch.no_grad():
            expected = model(**batch()).logits
    for folder in ("by_trainer", "by_peft"):
        plain = PeftModel.from_pretrained(build(), tmp_path / folder).eval()
        with torch.no_grad():
            assert torch.equal(plain(**batch()).logits, expected)


@pytest.mark.parametrize("order", ORDERS)
def test_adapter_of_a_resident_model_loads_on_a_streamed_one_and_trains_on(order: str, tmp_path: Path) -> None:
    resident = prepare(STOCK)
    train(resident, tmp_path)
    resident.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = resident.eval()(**batch()).logits

    base = build()
    if order == WRAP_THEN_PEFT:
        LemaModelWrapper.wrap(base, device="cpu")
    model = PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
    if order == PEFT_THEN_WRAP:
        LemaModelWrapper.wrap(model, device="cpu")
    with closing(model):
        with torch.no_grad():
            assert torch.equal(model.eval()(**batch()).logits, expected)
        continued = train(model.train(), tmp_path, gradient_checkpointing=order in CHECKPOINTED)
    plain = PeftModel.from_pretrained(build(), tmp_path / "adapter", is_trainable=True)
    assert_same_run(continued, train(plain, tmp_path, gradient_checkpointing=True))


def test_whole_model_saved_while_streamed_loads_as_a_plain_one(tmp_path: Path) -> None:
    model = build()
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with closing(LemaModelWrapper.wrap(model, device="cpu")):
        Trainer(model=model, args=arguments(tmp_path / "run")).save_model(str(tmp_path / "by_trainer"))
        model.save_pretrained(tmp_path / "by_model")
    for folder in ("by_trainer", "by_model"):
        loaded = type(build()).from_pretrained(tmp_path / folder, dtype=torch.float32)
        assert loaded.config.architectures == ["LlamaForCausalLM"]
        assert_same_tensors(loaded.state_dict(), expected)


# ---- base weights that train ----


def unfrozen(model: Any, num_layers: int) -> Any:
    model.requires_grad_(False)
    for layer in model.model.layers[-num_layers:]:
        layer.requires_grad_(True)
    return model


@pytest.mark.parametrize("when", ["before_the_wrap", "after_the_wrap"])
def test_unfrozen_last_layers_train_and_the_backward_stops_below_them(when: str, tmp_path: Path) -> None:
    model = build(num_layers=6)
    if when == "before_the_wrap":
        unfrozen(model, 2)
    LemaModelWrapper.wrap(model, device="cpu")
    if when == "after_the_wrap":
        unfrozen(model, 2)
    with closing(model):
        before = trainables(model)
        assert len(before) == 2 * 9
        streamer = get_streamer(model)
        streamed = train(model, tmp_path, max_steps=4)
        assert_moved(before, streamed.trainables)
        if when == "before_the_wrap":
            assert streamer.num_streamed == 4
            assert streamer.num_resident == 2
            # The backward reaches no streamed layer: only the forward moves them.
            begin = settled_bytes(model)
            train(model, tmp_path, max_steps=2)
            assert settled_bytes(model) - begin <= 2 * 4 * streamer.layer_bytes

    resident = unfrozen(build(num_layers=6), 2)
    resident.enable_input_require_grads()  # what makes stock gradient checkpointing train frozen embeddings' successors
    expected = train(resident, tmp_path, max_steps=4, gradient_checkpointing=True)
    assert_same_run(streamed, expected)


def test_run_of_unfrozen_layers_resumes_and_loads_its_best_model(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "load_best_model_at_end": True,
        "learning_rate": 0.1,
    }
    ends = []
    for wrap in (False, True):
        for resume in (False, True):
            model = unfrozen(build(), 2)
            if wrap:
                LemaModelWrapper.wrap(model, device="cpu")
            folder = tmp_path / f"{wrap}"
            with closing(model):
                trainer = RecordingTrainer(
                    model=model,
                    args=arguments(folder, **settings),
                    train_dataset=examples(),
                    eval_dataset=examples(4, seed=9),
                )
                trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2") if resume else None)
                ends.append(({n: t.clone() for n, t in model.state_dict().items()}, trainer.evaluate()["eval_loss"]))
    for state, loss in ends[1:]:
        assert_same_tensors(state, ends[0][0])
        assert loss == ends[0][1]


def test_layer_visits_stop_below_the_lowest_trainable_layer(tmp_path: Path) -> None:
    peft_config = lora(target_modules=["q_proj", "down_proj"], layers_to_transform=[3, 5], layers_pattern="layers")
    model = prepare(WRAP_THEN_PEFT, build(num_layers=6), peft_config)
    with closing(model):
        streamer = get_streamer(model)
        visited: list[tuple[int, str]] = []
        lease = streamer.lease

        def recorded(layer_idx: int, direction: Any, **kwargs: Any) -> Any:
            visited.append((layer_idx, direction.value))
            return lease(layer_idx, direction, **kwargs)

        streamer.lease = recorded
        found = train(model, tmp_path, max_steps=1)
        assert visited == [(i, "forward") for i in range(6)] + [(i, "backward") for i in (5, 4, 3)]
        begin = settled_bytes(model)
        train(model, tmp_path, max_steps=3)
        moved = settled_bytes(model) - begin
        assert moved == 3 * streamer.transfers_per_step(lowest=3) * streamer.layer_bytes
    resident = prepare(STOCK, build(num_layers=6), peft_config)
    assert_same_run(found, train(resident, tmp_path, max_steps=1, gradient_checkpointing=True))


def test_a_few_resident_layers_change_no_number(tmp_path: Path) -> None:
    expected = run(STOCK, tmp_path, gradient_checkpointing=True)
    model = prepare(WRAP_THEN_PEFT)
    with closing(model):
        streamer = get_streamer(model)
        streamer.set_resident([1, 3])
        found = train(model, tmp_path)
        assert streamer.num_resident == 2
        begin = settled_bytes(model)
        streamer.set_resident([0, 1, 2, 3])
        train(model, tmp_path, max_steps=1)
        train(model, tmp_path, max_steps=1)
        assert settled_bytes(model) - begin <= NUM_LAYERS * streamer.layer_bytes
    assert_same_run(found, expected)


@pytest.mark.parametrize("num_slots", [2, 3, NUM_LAYERS, NUM_LAYERS + 3])
def test_number_of_slots_changes_no_number(num_slots: int, tmp_path: Path) -> None:
    expected = run(STOCK, tmp_path, gradient_checkpointing=True)
    model = prepare(WRAP_THEN_PEFT, config=LemaConfig(num_slots=num_slots))
    with closing(model):
        assert_same_run(train(model, tmp_path), expected)
        begin = settled_bytes(model)
        train(model, tmp_path, max_steps=1)
        assert (settled_bytes(model) == begin) == (num_slots >= NUM_LAYERS)
