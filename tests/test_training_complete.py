"""Laws of training to complete images: masks follow from the image, numbers are exact, the script does as told."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForMaskedImageModeling, ViTMAEForPreTraining

from ebt_transformers import EnergyTransformerConfig, EnergyTransformerForImageCompletion
from ebt_transformers.training import run_complete
from ebt_transformers.training.arguments_et import EnergyTransformerTrainingArguments
from ebt_transformers.training.complete_data import NORMALIZATIONS, MaskCollator, PixelScale
from ebt_transformers.training.completion_trainer import CompletionTrainer
from ebt_transformers.training.images import EpochCallback, Images, select_images
from ebt_transformers.training.mae_twin import mae_twin
from ebt_transformers.training.quality import image_psnr


SIDE = 8
SHAPE: dict[str, Any] = {"image_size": SIDE, "patch_size": 2, "hidden_size": 16, "num_attention_heads": 2}
TINY_RUN = f"--image_size {SIDE} --patch_size 2 --hidden_size 16 --num_attention_heads 2 --thinking_steps 3"


def table(count: int) -> datasets.Dataset:
    """Pictures: a colour gradient of its own for every number."""
    ramp = np.linspace(0, 255, SIDE)
    pictures = []
    for index in range(count):
        turned = np.add.outer(ramp * np.cos(index), ramp * np.sin(index))
        pixels = np.stack([turned, turned[::-1], np.full_like(turned, 9.0 * index)], axis=-1) % 256
        pictures.append(Image.fromarray(pixels.astype(np.uint8)))
    features = datasets.Features({"image": datasets.Image()})
    return datasets.Dataset.from_dict({"image": pictures}, features=features)


def toy_images(count: int = 8, training: bool = True, **options: Any) -> Images:
    return Images(select_images(table(count)), (SIDE, SIDE), training=training, **options)


def tiny_config(**overrides: Any) -> EnergyTransformerConfig:
    return EnergyTransformerConfig.for_images(**{**SHAPE, "thinking_steps": 3, **overrides})


def tiny_model(**overrides: Any) -> EnergyTransformerForImageCompletion:
    torch.manual_seed(1)
    spread = {"initializer_range": 0.2, "attention_initializer_range": 0.2}
    return EnergyTransformerForImageCompletion(tiny_config(**{**spread, **overrides}))


def tiny_mae() -> ViTMAEForPreTraining:
    torch.manual_seed(1)
    return mae_twin(tiny_config(hidden_size=32), 1, 1)


def trainer_of(model: torch.nn.Module, folder: Path, scale: PixelScale | None = None, **values: Any) -> Any:
    """A trainer with a few images; `images`, `evaluated` and options of training as keywords."""
    images, evaluated = values.pop("images", None) or toy_images(), values.pop("evaluated", None)
    twin = isinstance(model, ViTMAEForPreTraining)
    config = tiny_config(hidden_size=32) if twin else model.config
    defaults = {"max_steps": 3, "per_device_train_batch_size": 4, "logging_steps": 1, "save_strategy": "no"}
    quiet = {"use_cpu": True, "disable_tqdm": True, "report_to": "none"}
    return CompletionTrainer(
        model,
        EnergyTransformerTrainingArguments(str(folder), **{**quiet, **defaults, **values}),
        train_dataset=images,
        eval_dataset=evaluated,
        data_collator=MaskCollator(config, scale, twin),
        callbacks=[EpochCallback(images)],
    )


def largest_difference(first: torch.nn.Module, second: torch.nn.Module) -> float:
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    return max((one - other).abs().max().item() for one, other in pairs)


# ---- batches ---------------------------------------------------------------------------------------------------


def test_masks_follow_from_seed_epoch_and_image_alone() -> None:
    images, collator = toy_images(6, seed=3), MaskCollator(tiny_config(mask_ratio=0.5, visible_ratio=0.25))
    whole = collator([images[index] for index in range(6)])
    assert list(whole) == ["pixel_values", "bool_masked_pos", "scored_pos"]
    assert whole["bool_masked_pos"].sum(1).eq(6).all() and whole["scored_pos"].sum(1).eq(8).all()
    assert (whole["scored_pos"] | ~whole["bool_masked_pos"]).all()  # what is masked counts
    assert len({tuple(mask.tolist()) for mask in whole["scored_pos"]}) == 6
    for index in (4, 1):
        assert torch.equal(collator([images[index]])["bool_masked_pos"][0], whole["bool_masked_pos"][index])
    images.set_epoch(1)
    assert not torch.equal(collator([images[0]])["scored_pos"][0], whole["scored_pos"][0])
    evaluated = [toy_images(6, training=False, seed=seed) for seed in (3, 4)]
    evaluated[0].set_epoch(5)
    masks = [collator([each[index] for index in range(6)])["scored_pos"] for each in evaluated]
    assert torch.equal(*masks)


def test_the_twin_gets_the_same_masks() -> None:
    images, config = toy_images(6), tiny_config(hidden_size=32)
    items = [images[index] for index in range(6)]
    batch, expected = MaskCollator(config, twin=True)(items), MaskCollator(config)(items)
    assert list(batch) == ["pixel_values", "noise"]
    with torch.no_grad():
        assert torch.equal(tiny_mae()(**batch).mask.bool(), expected["scored_pos"])


def test_scales_go_there_and_back() -> None:
    images = toy_images(2)
    pixels = torch.stack([images[0].pixels, images[1].pixels])
    for name in NORMALIZATIONS:
        scale = PixelScale(**NORMALIZATIONS[name])
        torch.testing.assert_close(scale.to_bytes(scale.from_symmetric(pixels)), (pixels + 1) * 127.5)
    collated = MaskCollator(tiny_config(), PixelScale(**NORMALIZATIONS["imagenet"]))([images[0], images[1]])
    expected = ((pixels[:, 0] + 1) / 2 - 0.485) / 0.229
    torch.testing.assert_close(collated["pixel_values"][:, 0], expected)
    assert torch.equal(MaskCollator(tiny_config())([images[0]])["pixel_values"][0], images[0].pixels)


# ---- training --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [tiny_model, tiny_mae])
def test_one_batch_of_eight_equals_eight_of_one(tmp_path: Path, kind: Callable) -> None:
    models, losses = [], []
    for batch, accumulation in ((8, 1), (1, 8)):
        values = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation, "optim": "sgd"}
        trainer = trainer_of(kind(), tmp_path, **values)
        trainer.train()
        models.append(trainer.model)
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert largest_difference(*models) < 1e-5
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("kind", [tiny_model, tiny_mae])
def test_training_lowers_the_loss(tmp_path: Path, kind: Callable) -> None:
    values = {"max_steps": 100, "learning_rate": 1e-2, "per_device_train_batch_size": 8, "logging_steps": 100}
    trainer = trainer_of(kind(), tmp_path, evaluated=toy_images(8, training=False), **values)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.8 * before


@pytest.mark.parametrize("batch", [3, 7])
@pytest.mark.parametrize("loss", ["mse", "rmse", "diluted_rmse"])
def test_evaluation_hides_what_counts_and_is_a_mean_over_images(tmp_path: Path, batch: int, loss: str) -> None:
    model, images = tiny_model(completion_loss=loss), toy_images(7, training=False)
    metrics = trainer_of(model, tmp_path, evaluated=images, per_device_eval_batch_size=batch).evaluate()
    inputs = MaskCollator(model.config)([images[index] for index in range(7)])
    pixels, scored = inputs["pixel_values"], inputs["scored_pos"]
    with torch.no_grad():
        output = model.eval()(pixels, bool_masked_pos=scored, output_energies=True)
    assert metrics["eval_loss"] == pytest.approx(output.loss.item(), rel=1e-5)
    hidden = torch.from_numpy(np.kron(scored.view(7, 4, 4), np.ones((1, 2, 2)))).bool()[:, None].expand_as(pixels)
    wrong = (output.reconstruction - pixels)[hidden]
    assert metrics["eval_masked_mse"] == pytest.approx(wrong.square().mean().item(), rel=1e-5)
    # images of masked pixels alone
    found, clean = (values[hidden].view(7, 1, 1, -1) for values in (output.reconstruction, pixels))
    assert metrics["eval_masked_psnr"] == pytest.approx(image_psnr(found, clean).mean().item(), rel=1e-5)
    gap = (output.energies[..., 0] - output.energies[..., -1]).sum(1).mean().item()
    assert metrics["eval_energy_gap"] == pytest.approx(gap, rel=1e-4)


def test_evaluation_with_several_numbers_of_steps(tmp_path: Path) -> None:
    images = toy_images(5, training=False)
    trainer = trainer_of(tiny_model(), tmp_path, evaluated=images)
    rows = trainer.evaluate_steps(images, [1, 3, 6])
    assert [row["thinking_steps"] for row in rows] == [1, 3, 6] and trainer.state.log_history == []
    assert rows[0]["energy_gap"] < rows[1]["energy_gap"] < rows[2]["energy_gap"]
    assert len({row["masked_mse"] for row in rows}) == 3
    metrics = trainer.evaluate()  # thinks as long as the config says again
    assert metrics["eval_masked_mse"] == rows[1]["masked_mse"]


def test_the_twin_is_evaluated_on_the_same_patches(tmp_path: Path) -> None:
    model, images = tiny_mae(), toy_images(5, training=False)
    metrics = trainer_of(model, tmp_path, evaluated=images, per_device_eval_batch_size=2).evaluate()
    batch = MaskCollator(tiny_config(hidden_size=32), twin=True)([images[index] for index in range(5)])
    with torch.no_grad():
        expected = model.eval()(**batch).loss.item()
    assert metrics["eval_masked_mse"] == pytest.approx(expected, rel=1e-5)
    assert metrics["eval_loss"] == metrics["eval_masked_mse"] and "eval_energy_gap" not in metrics


# ---- ebt train complete ----------------------------------------------------------------------------------------


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., Path]:
    """Runs the script on a few pictures with a tiny model; options given twice count the second time."""
    table(24).to_parquet(tmp_path / "images.parquet")
    common = "--use_cpu --disable_tqdm true --report_to none --logging_steps 1 --max_steps 2"

    def run(options: str = "", out: str = "out", model: str = TINY_RUN, data: bool = True) -> Path:
        argv = [*common.split(), *model.split(), "--output_dir", str(tmp_path / out), *options.split()]
        argv += ["--train_file", str(tmp_path / "images.parquet")] if data else []
        run_complete.main(argv)
        return tmp_path / out

    return run


def test_the_script_trains_evaluates_saves_and_goes_on(
    command: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    options = "--ema_decay 0.9 --eval_thinking_steps 1 3 --config_overrides num_memories=24"
    out = command(f"{options} --max_steps 3")
    results, shown = json.loads((out / "all_results.json").read_text()), capsys.readouterr().out
    evaluated = json.loads((out / "eval_results.json").read_text())
    assert {"eval_loss", "eval_masked_mse", "eval_masked_psnr", "eval_energy_gap"} <= set(evaluated) <= set(results)
    assert f"PSNR {results['eval_masked_psnr']:.3f} dB" in shown and "| 3 (trained)" in shown
    assert results["eval_masked_mse_at_3"] == results["eval_masked_mse"] != results["eval_masked_mse_at_1"]
    assert (out / "completion.png").stat().st_size > 1000
    model = AutoModelForMaskedImageModeling.from_pretrained(out)
    assert isinstance(model, EnergyTransformerForImageCompletion)
    assert (model.config.num_memories, model.config.thinking_steps, model.config.self_attention) == (24, 3, True)
    processor = AutoImageProcessor.from_pretrained(out)
    assert processor.patch_size == 2 and processor.image_mean == 0.5
    card = (out / "README.md").read_text()
    for part in ("ebt train complete", "moving average", "50% of their 16 patches masked", "energy-transformer"):
        assert part in card
    command(f"{options} --max_steps 3")  # nothing to train, the same numbers: those of the average
    assert "nothing to train" in capsys.readouterr().out
    again = json.loads((out / "all_results.json").read_text())
    assert again["eval_loss"] == pytest.approx(results["eval_loss"], rel=1e-6)
    command(f"{options} --max_steps 4")
    assert json.loads((out / "trainer_state.json").read_text())["global_step"] == 4
    with pytest.raises(SystemExit, match="keeps an average of the weights"):
        command("--max_steps 5")
    with pytest.raises(SystemExit, match="holds another model"):
        command("--ema_decay 0.9 --max_steps 5")


def test_interrupted_and_resumed_equals_uninterrupted(command: Callable[..., Path]) -> None:
    # a constant rate: a schedule would depend on the number of steps asked for
    options = "--lr_scheduler_type constant --save_steps 3 --per_device_train_batch_size 5"
    whole = command(f"{options} --max_steps 7", "whole")  # more than one epoch
    command(f"{options} --max_steps 3", "parts")
    parts = command(f"{options} --max_steps 7", "parts")
    models = [AutoModelForMaskedImageModeling.from_pretrained(folder) for folder in (whole, parts)]
    assert largest_difference(*models) == 0
    results = [json.loads((folder / "eval_results.json").read_text()) for folder in (whole, parts)]
    assert results[0]["eval_loss"] == results[1]["eval_loss"]


def test_the_twin_trains_by_the_same_script(command: Callable[..., Path]) -> None:
    out = command("--mae --hidden_size 32 --max_steps 1", model=TINY_RUN.replace("--thinking_steps 3", ""))
    assert isinstance(ViTMAEForPreTraining.from_pretrained(out), ViTMAEForPreTraining)
    results = json.loads((out / "all_results.json").read_text())
    assert results["eval_loss"] == results["eval_masked_mse"] and not (out / "completion.png").exists()
    card = (out / "README.md").read_text()
    assert "ViTMAEForPreTraining" in card and "Diffusion" not in card and "ebt train complete" in card


def test_grey_images_test_data_other_scales_and_training_further(command: Callable[..., Path], tmp_path: Path) -> None:
    options = (
        f"--num_channels 1 --validation_split_percentage 0 --test_file {tmp_path / 'images.parquet'} "
        "--max_train_samples 9 --no_horizontal_flip --image_memory 0 --completion_loss rmse"
    )
    out = command(options)
    model = AutoModelForMaskedImageModeling.from_pretrained(out)
    assert model.config.num_channels == 1 and model.config.completion_loss == "rmse"
    results = json.loads((out / "all_results.json").read_text())
    assert results["test_loss"] == pytest.approx(results["test_masked_mse"] ** 0.5)
    assert "eval_loss" not in results and not (out / "completion.png").exists()
    first = command("--normalization imagenet", "first")
    further = command(f"--model_name_or_path {first} --max_steps 1", "further", "")
    mean = AutoImageProcessor.from_pretrained(further).image_mean
    assert list(mean) == NORMALIZATIONS["imagenet"]["image_mean"]
    streamed = command("--streaming --max_eval_samples 5", "streamed")
    assert json.loads((streamed / "eval_results.json").read_text())["eval_loss"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--hiden_size 8", "hiden_size"),
        ("--config_overrides hiden_size=8", "'hiden_size=8' is no field=value of EnergyTransformerConfig"),
        ("--config_overrides hidden_size=8", "--hidden_size is also in --config_overrides"),
        ("--config_overrides num_positions=3", "num_positions is for graphs"),
        ("--mae", "--thinking_steps means nothing to the twin"),
        ("--model_name_or_path x", "--image_size, .* would change x"),
        ("--trust_remote_code", "with --model_name_or_path only"),
        ("--normalization both", "must be one of symmetric, imagenet, got both"),
        ("--eval_thinking_steps 2 0", "at least 1 each, got 2 0"),
        ("--patch_size 3", "must be a positive multiple of `patch_size` .3."),
        ("--mask_ratio 0", "`mask_ratio` must be above 0 and at most 1, got 0"),
        ("--completion_loss l1", "must be one of mse, rmse, diluted_rmse"),
        ("--num_channels 2", "must be 1 .grey. or 3 .RGB., got 2"),
        ("--ema_decay 1.5", "between 0 and 1, got 1.5"),
        ("--dataset_name x", "both name the data"),
        ("--image_column picture", "no column 'picture'"),
        ("--validation_split_percentage 0 --eval_strategy steps", "needs validation data"),
        ("--max_eval_samples 0", "at least 1, got 0"),
    ],
)
def test_the_script_refuses_in_words(command: Callable[..., Path], options: str, message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        command(options)


def test_missing_data_is_refused_in_words_and_help_is_there(
    command: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="Say which images to train on: --train_file"):
        command(data=False)
    with pytest.raises(SystemExit, match="'nowhere' does not exist or holds no image"):
        command("--train_file nowhere", data=False)
    with pytest.raises(SystemExit) as ended:
        command("--help")
    assert ended.value.code == 0 and "--eval_thinking_steps" in capsys.readouterr().out
