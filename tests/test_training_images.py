"""Laws of training on images: batches and interruptions change nothing, the twin denoises, the script does as told."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageToImage, TrainerCallback

from ebt_transformers import EBTForImageDenoising, EBTImageConfig, EBTTrainer
from ebt_transformers.configuration.noise_ebt import noise_scheduler
from ebt_transformers.configuration.twins import dit_twin_config
from ebt_transformers.training import run_clm, run_denoise
from ebt_transformers.training.arguments import EBTImageTrainingArguments
from ebt_transformers.training.dit_twin import DiTTwin, ddim_denoise, load_dit, new_dit
from ebt_transformers.training.ema import EMA_FILE, EMACallback
from ebt_transformers.training.images import (
    DiffusionCollator,
    EpochCallback,
    Images,
    Latents,
    NoisyImageCollator,
    hold_out_images,
    image_array,
    load_image_files,
    load_image_set,
    select_images,
)
from ebt_transformers.training.quality import image_psnr


sys.path.append(str(Path(__file__).parent))  # the helper beside this file, under every import mode of pytest
from interruption import StopAt  # noqa: E402


diffusers = pytest.importorskip("diffusers")

SIDE = 8
SHAPE = {"image_size": SIDE, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
TINY_RUN = "hidden_size=16,num_hidden_layers=1,num_attention_heads=2"


def picture(index: int, side: int = SIDE, mode: str = "RGB") -> Image.Image:
    """A colour gradient of its own for every number."""
    ramp = np.linspace(0, 255, side)
    turned = np.add.outer(ramp * math.cos(index), ramp * math.sin(index))
    pixels = np.stack([turned, turned[::-1], np.full_like(turned, 20.0 * index)], axis=-1) % 256
    return Image.fromarray(pixels.astype(np.uint8)).convert(mode)


def table(count: int, side: int = SIDE) -> datasets.Dataset:
    """Pictures and labels."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    rows = {"image": [picture(i, side) for i in range(count)], "label": list(range(count))}
    return datasets.Dataset.from_dict(rows, features=features)


def toy_images(count: int = 8, training: bool = True, **options: object) -> Images:
    return Images(select_images(table(count)), (SIDE, SIDE), training=training, **options)


def tiny_config(**overrides: object) -> EBTImageConfig:
    return EBTImageConfig(**{**SHAPE, "step_size": 30.0, **overrides})


def tiny_ebt(**overrides: object) -> EBTForImageDenoising:
    """A tiny model a few steps away from its flat start."""
    torch.manual_seed(1)
    model = EBTForImageDenoising(tiny_config(**overrides))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modulation" in name or "energy_head" in name:
                parameter.normal_(std=0.1)
    return model


def tiny_twin() -> DiTTwin:
    torch.manual_seed(1)
    return DiTTwin(new_dit(tiny_config()))


def collator_of(model: torch.nn.Module) -> NoisyImageCollator | DiffusionCollator:
    return DiffusionCollator(100) if isinstance(model, DiTTwin) else NoisyImageCollator(0.1)


def arguments(folder: Path, **values: object) -> EBTImageTrainingArguments:
    defaults = {
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
        "save_strategy": "no",
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "learning_rate": 1e-3,
    }
    return EBTImageTrainingArguments(output_dir=str(folder), **{**defaults, **values})


def trainer_of(model: torch.nn.Module, args: EBTImageTrainingArguments, **options: object) -> EBTTrainer:
    images = options.pop("train_dataset", None) or toy_images()
    callbacks = [EpochCallback(images), *options.pop("callbacks", [])]
    return EBTTrainer(
        model, args, train_dataset=images, data_collator=collator_of(model), callbacks=callbacks, **options
    )


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def largest_difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    return max((first[name] - second[name]).abs().max().item() for name in first)


# ---- data ------------------------------------------------------------------------------------------------------


def test_images_are_scaled_pixels_and_decoded_once_or_each_time_alike():
    kept, anew = toy_images(training=False), toy_images(training=False, memory_budget=0)
    assert kept.in_memory and not anew.in_memory and len(kept) == len(anew) == 8
    expected = torch.from_numpy(np.array(picture(3))).permute(2, 0, 1) / 127.5 - 1
    for images in (kept, anew):
        assert torch.equal(images[3].pixels, expected)


def test_images_are_resized_cropped_and_turned_grey():
    wide = picture(1, 20).resize((40, 20))
    assert image_array(wide, 3, (10, 10)).shape == (3, 10, 20)
    assert image_array(wide, 1, (10, 10), resize_to=0).shape == (1, 20, 40)
    assert image_array(wide, 1, (10, 10), resize_to=15).shape == (1, 15, 30)
    assert image_array(wide, 3, (30, 30), resize_to=0).shape == (3, 30, 60)  # enlarged: the crop needs it
    grey = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    coloured = image_array(grey, 3, (8, 8))
    assert (coloured == coloured[:1]).all() and coloured.shape == (3, 8, 8)


def test_training_images_are_mirrored_and_cropped_anywhere_and_evaluation_images_never():
    source = select_images(table(8, side=SIDE + 4))
    options = {"resize_to": 0, "random_crop": True, "horizontal_flip": True}
    images = Images(source, (SIDE, SIDE), training=True, **options)
    seen = set()
    for epoch in range(20):
        images.set_epoch(epoch)
        again = images[2].pixels
        assert torch.equal(again, images[2].pixels)
        seen.add(tuple(again.flatten().tolist()))
    assert len(seen) > 10
    still = Images(source, (SIDE, SIDE), training=False, **options)
    middle = torch.from_numpy(np.array(picture(2, SIDE + 4)))[2:-2, 2:-2].permute(2, 0, 1) / 127.5 - 1
    assert torch.equal(still[2].pixels, middle)


def test_noise_follows_from_seed_epoch_and_image_alone():
    collate = NoisyImageCollator(0.1)
    images = toy_images(seed=5)
    together = collate([images[index] for index in range(4)])
    alone = collate([images[2]])
    assert torch.equal(together["pixel_values"][2:3], alone["pixel_values"])
    images.set_epoch(1)
    assert not torch.equal(collate([images[2]])["pixel_values"], alone["pixel_values"])
    assert not torch.equal(collate([toy_images(seed=6)[2]])["pixel_values"], alone["pixel_values"])
    first, second = toy_images(training=False, seed=5), toy_images(training=False, seed=6)
    second.set_epoch(3)  # evaluations are comparable
    assert torch.equal(collate([first[2]])["pixel_values"], collate([second[2]])["pixel_values"])


@pytest.mark.parametrize("level", [0.1, 0.2])
def test_images_get_the_noise_of_their_level(level):
    images = toy_images(64)
    batch = NoisyImageCollator(level)([images[index] for index in range(64)])
    scheduler, timestep = noise_scheduler(level)
    kept = scheduler.alphas_cumprod[timestep]
    noise = (batch["pixel_values"] - kept.sqrt() * batch["labels"]) / (1 - kept).sqrt()
    assert abs(noise.mean()) < 0.03 and abs(noise.std() - 1) < 0.03


def test_random_levels_stay_between_theirs_and_the_twin_sees_every_timestep():
    images = toy_images(64)
    items = [images[index] for index in range(64)]
    scheduler, _ = noise_scheduler(0.1)  # 1000 steps
    batch = NoisyImageCollator(random_noise_level=(0.05, 0.2))(items)
    low, high = (scheduler.alphas_cumprod[t] for t in (49, 199))
    spread = (batch["pixel_values"] - batch["labels"]).flatten(1).std(1)
    assert spread.min() > 0.8 * (1 - low).sqrt() and spread.max() < 1.5 * (1 - high).sqrt()
    assert spread.max() > 1.5 * spread.min()
    timesteps = DiffusionCollator(3)(items)["timesteps"]
    assert set(timesteps.tolist()) == {0, 1, 2}


def test_every_source_gives_the_same_images_without_labels(tmp_path):
    table(6).to_parquet(tmp_path / "images.parquet")
    table(6).rename_column("image", "img").save_to_disk(tmp_path / "saved")
    (tmp_path / "folder").mkdir()
    for index in range(6):
        picture(index).save(tmp_path / "folder" / f"{index}.png")
    sources = [
        load_image_files({"train": [str(tmp_path / "images.parquet")]}),
        load_image_files({"train": [str(tmp_path / "folder")]}),
        load_image_files({"train": [str(tmp_path / "folder" / "*.png")]}),
        load_image_set(str(tmp_path / "images.parquet")),
        load_image_set(str(tmp_path / "folder")),
        load_image_set(str(tmp_path / "saved")),
    ]
    for source in sources:
        chosen = select_images(source["train"])
        assert chosen.column_names == ["image"]
        images = Images(chosen, (SIDE, SIDE))
        assert torch.equal(images[4].pixels, toy_images(training=False)[4].pixels)


def test_held_out_images_are_the_same_every_time_and_in_no_training_set():
    train, held = hold_out_images(table(40), 10)
    assert held["label"] == hold_out_images(table(40), 10)[1]["label"]
    assert len(held) == 4 and sorted([*train["label"], *held["label"]]) == list(range(40))
    with pytest.raises(ValueError, match="between 0 and 100, got 100"):
        hold_out_images(table(40), 100)


def test_data_that_cannot_work_is_refused_in_words(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    for paths, message in (
        (["nowhere.parquet"], "'nowhere.parquet' does not exist"),
        ([str(tmp_path)], "holds no image"),
        ([str(tmp_path / "notes.txt")], "must be image files .*.parquet or .tar files"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            load_image_files({"train": paths})
    with pytest.raises(ValueError, match="no column 'picture'. Columns: image, label"):
        select_images(table(2), "picture")
    with pytest.raises(ValueError, match="'label' holds no images"):
        select_images(table(2), "label")
    with pytest.raises(ValueError, match="Name the column"):
        select_images(datasets.Dataset.from_dict({"a": [1], "b": [2]}))
    with pytest.raises(ValueError, match="1 .grey. or 3 .RGB., got 4"):
        Images(select_images(table(2)), (SIDE, SIDE), num_channels=4)
    with pytest.raises(ValueError, match="lowest and the highest.*got 0.3 0.1"):
        NoisyImageCollator(random_noise_level=(0.3, 0.1))
    with pytest.raises(ValueError, match="`ema_decay` must be between 0 and 1, got 1"):
        EMACallback(1.0)


def tiny_vae() -> torch.nn.Module:
    torch.manual_seed(3)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 16), layers_per_block=1, latent_channels=4, norm_num_groups=4, **blocks
    )
    return vae.eval().requires_grad_(False)


def test_latents_are_the_scaled_means_kept_or_computed_anew():
    vae = tiny_vae()
    images = toy_images(horizontal_flip=True)
    kept, anew = Latents(images, vae), Latents(images, vae, memory_budget=0)
    assert kept.in_memory and not anew.in_memory
    for index in range(8):
        expected = vae.encode(images[index].pixels[None]).latent_dist.mean[0] * vae.config.scaling_factor
        for latents in (kept, anew):
            torch.testing.assert_close(latents[index].pixels, expected, rtol=1e-4, atol=1e-5)
            assert latents[index].key == images[index].key
    assert len({images.flips(index) for index in range(8)}) == 2


# ---- training --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [tiny_ebt, tiny_twin])
def test_one_batch_of_eight_equals_eight_of_one(tmp_path, kind):
    results = []
    for batch, accumulation in ((8, 1), (1, 8)):
        model = kind()
        args = arguments(
            tmp_path, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, optim="sgd"
        )
        trainer = trainer_of(model, args)
        trainer.train()
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        results.append((weights(model), logs))
    assert largest_difference(results[0][0], results[1][0]) < 1e-5
    for first, second in zip(results[0][1], results[1][1], strict=True):
        for name in {"loss", "initial_loss", "final_loss", "energy_gap"} & set(first):
            assert second[name] == pytest.approx(first[name], rel=1e-4, abs=1e-7), name


def test_logged_numbers_are_those_of_the_batch(tmp_path):
    model = tiny_ebt(num_landscapes=2)
    images = toy_images(horizontal_flip=True)
    batch = NoisyImageCollator(0.1)([images[index] for index in range(8)])
    expected = model.train()(**batch)
    trainer = trainer_of(model, arguments(tmp_path, max_steps=1, per_device_train_batch_size=8), train_dataset=images)
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["initial_loss"] == pytest.approx(expected.step_losses[0].item(), rel=1e-4)
    assert log["final_loss"] == pytest.approx(expected.step_losses[-1].item(), rel=1e-4)
    assert log["loss"] == pytest.approx(expected.loss.item(), rel=1e-4)
    gap = (expected.mean_energies[0] - expected.mean_energies[-1]).item()
    assert log["energy_gap"] == pytest.approx(gap, rel=1e-3, abs=1e-7)
    assert log["step_size"] == pytest.approx(model.step_size.value.item())


@pytest.mark.parametrize("batch", [3, 7])
def test_evaluation_is_a_mean_over_images_however_the_batches_fall(tmp_path, batch):
    model, images = tiny_ebt(), toy_images(7, training=False)
    metrics = trainer_of(model, arguments(tmp_path, per_device_eval_batch_size=batch), eval_dataset=images).evaluate()
    inputs = NoisyImageCollator(0.1)([images[index] for index in range(7)])
    output = model.eval()(**inputs)
    pixels = [((x + 1) * 127.5).clamp(0, 255) for x in (output.reconstruction, inputs["labels"])]
    errors = (pixels[0] - pixels[1]).square().mean((1, 2, 3))
    assert metrics["eval_loss"] == pytest.approx(output.loss.item(), rel=1e-5)
    assert metrics["eval_psnr"] == pytest.approx((10 * (255**2 / errors).log10()).mean().item(), rel=1e-5)
    assert "eval_perplexity" not in metrics
    assert image_psnr(inputs["labels"], inputs["labels"]).min() > 100


@pytest.mark.parametrize("kind", [tiny_ebt, tiny_twin])
def test_training_lowers_the_loss(tmp_path, kind):
    model = kind()
    values = {"max_steps": 150, "learning_rate": 1e-2, "per_device_train_batch_size": 8, "logging_steps": 150}
    trainer = trainer_of(model, arguments(tmp_path, **values), eval_dataset=toy_images(8, training=False))
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.9 * before


@pytest.mark.parametrize("kind", [lambda: tiny_ebt(candidate_init_std=0.1), tiny_twin])
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path, kind):
    told = []

    class Told(Images):
        def set_epoch(self, epoch: int) -> None:
            super().set_epoch(epoch)
            told.append(epoch)

    def make(folder: str, callbacks: list[TrainerCallback]) -> EBTTrainer:
        told.clear()
        args = arguments(tmp_path / folder, max_steps=7, save_strategy="steps", save_steps=1, save_total_limit=2)
        images = Told(select_images(table(10)), (SIDE, SIDE), training=True, horizontal_flip=True)
        return trainer_of(kind(), args, train_dataset=images, callbacks=[*callbacks, EMACallback(0.9)])

    whole = make("whole", [])
    whole.train()
    assert told == sorted(told) and set(told) == {0, 1, 2}
    make("parts", [StopAt(4)]).train()
    resumed = make("parts", [])
    resumed.train(resume_from_checkpoint="auto")
    assert resumed.state.global_step == 7
    assert told == sorted(told) and set(told) == {1, 2}
    assert largest_difference(weights(whole.model), weights(resumed.model)) == 0
    ends = [[e["loss"] for e in t.state.log_history if "loss" in e] for t in (whole, resumed)]
    assert ends[0] == ends[1]


DISTRIBUTED = """
import importlib.util, pathlib, sys
sys.path.insert(0, {tests!r})
import conftest, torch
spec = importlib.util.spec_from_file_location("laws", {file!r})
laws = importlib.util.module_from_spec(spec)
spec.loader.exec_module(laws)
processes = int(sys.argv[1])
found = {{}}
for kind in (laws.tiny_ebt, laws.tiny_twin):
    args = laws.arguments(pathlib.Path({folder!r}), per_device_train_batch_size=4 // processes, max_steps=5,
                          per_device_eval_batch_size=2, ddp_find_unused_parameters=False, optim="sgd")
    images = laws.toy_images(8, horizontal_flip=True)
    trainer = laws.trainer_of(kind(), args, train_dataset=images, eval_dataset=laws.toy_images(7, training=False))
    trainer.train()
    metrics = {{name: value for name, value in trainer.evaluate().items() if name in ("eval_loss", "eval_psnr")}}
    found[kind.__name__] = {{"weights": laws.weights(trainer.model), "metrics": metrics, "epoch": images.epoch}}
if trainer.is_world_process_zero():
    torch.save(found, sys.argv[2])
# or a process may end while threads of its group still run, which aborts it
trainer.accelerator.wait_for_everyone()
trainer.accelerator.end_training()
"""


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    script = tmp_path / "train.py"
    folder = str(tmp_path / "out")
    script.write_text(DISTRIBUTED.format(tests=str(Path(__file__).parent), file=__file__, folder=folder))
    results = []
    for processes in (1, 2):
        path = tmp_path / f"result{processes}.pt"
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), str(script)]
        subprocess.run([sys.executable, *launch, str(processes), str(path)], check=True, timeout=300)
        results.append(torch.load(path))
    for kind, one in results[0].items():
        two = results[1][kind]
        assert largest_difference(one["weights"], two["weights"]) < 1e-5
        assert two["metrics"] == pytest.approx(one["metrics"], rel=1e-5)  # 7 images: the repeated one is not counted
        assert one["epoch"] == two["epoch"] == 2


def test_the_average_is_evaluated_saved_and_given_to_the_model(tmp_path):
    model = tiny_ebt()
    steps: list[dict[str, torch.Tensor]] = [weights(model)]
    seen: list[float] = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            steps.append(weights(model))

        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            seen.append(metrics["eval_loss"])
            if len(seen) == 1:  # while training, the trained weights are back
                assert largest_difference(weights(model), steps[-1]) == 0

    args = arguments(tmp_path, save_strategy="steps", save_steps=3, eval_strategy="steps", eval_steps=3)
    options = {"callbacks": [Watch(), EMACallback(0.15)], "eval_dataset": toy_images(4, training=False)}
    trainer = trainer_of(model, args, **options)
    trainer.train()
    expected = steps[1]  # the average starts at the first step's weights
    for index, decay in ((2, 0.15), (3, 0.15)):
        expected = {name: decay * expected[name] + (1 - decay) * value for name, value in steps[index].items()}
    torch.testing.assert_close(weights(model), expected, rtol=1e-5, atol=1e-6)
    assert seen == [pytest.approx(trainer.evaluate()["eval_loss"])] * 2
    checkpoint = tmp_path / "checkpoint-3"
    assert (checkpoint / EMA_FILE).is_file()
    raw = EBTForImageDenoising.from_pretrained(checkpoint)
    assert largest_difference(weights(raw), steps[3]) == 0
    EMACallback(0.15).load(raw, checkpoint, into_model=True)
    assert largest_difference(weights(raw), weights(model)) == 0
    with pytest.raises(ValueError, match="holds no average of the weights"):
        EMACallback(0.15).load(raw, tmp_path)


def test_recipe_s2_trains_with_random_steps_and_step_sizes(tmp_path):
    torch.manual_seed(1)
    config = EBTImageConfig.from_preset("4xs", "s2", **{**SHAPE, "intermediate_size": 16, "step_size": 30.0})
    assert (config.detach_between_steps, config.loss_on_steps, config.random_steps) == (False, "last", [2, 3])
    model = EBTForImageDenoising(config)
    before = weights(model)
    trainer = trainer_of(model, arguments(tmp_path, recipe="s2", max_steps=4))
    trainer.train()
    changed = [name for name, value in weights(model).items() if not torch.equal(value, before[name])]
    assert len(changed) > 5 and model.step_size.value.item() == 30
    assert all(math.isfinite(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)
    for recipe, objective in (("s1", "last"), ("s2", "all")):
        with pytest.raises(ValueError, match=f"Recipe {recipe} scores .*loss_on_steps='{objective}'"):
            trainer_of(tiny_ebt(loss_on_steps=objective), arguments(tmp_path, recipe=recipe))
    with pytest.raises(ValueError, match="one of s1, s2, got 's3'"):
        arguments(tmp_path, recipe="s3")


# ---- the twin --------------------------------------------------------------------------------------------------


def test_the_twin_has_the_shape_of_its_ebt():
    config = tiny_config(patch_size=2, num_channels=1)
    dit = new_dit(config)
    assert len(dit.transformer_blocks) == 1 and dit.inner_dim == 16
    images, timesteps = torch.randn(2, 1, SIDE, SIDE), torch.tensor([0, 99])
    output = DiTTwin(dit)(images, timesteps=timesteps)
    assert output.noise.shape == images.shape and not output.noise.any()  # starts at zero
    assert output.loss.item() == pytest.approx(1, abs=0.5)
    assert dit_twin_config(config, num_layers=3)["num_layers"] == 3
    with pytest.raises(ValueError, match="square images only, got `image_size` 8 x 16"):
        dit_twin_config(tiny_config(image_size=[8, 16]))
    with pytest.raises(ValueError, match="between 1 and 1000, got 0"):
        DiTTwin(dit, max_timestep=0)


def oracle(clean: torch.Tensor, scheduler: diffusers.DDPMScheduler) -> Callable[..., SimpleNamespace]:
    """A DiT that knows the image: it returns the noise that is really there."""

    def predict(noisy, timestep, class_labels):
        assert not class_labels.any() and len(set(timestep.tolist())) == 1
        calls.append(int(timestep[0]))
        kept = scheduler.alphas_cumprod[timestep][:, None, None, None]
        return SimpleNamespace(sample=(noisy - kept.sqrt() * clean) / (1 - kept).sqrt())

    calls: list[int] = []
    predict.calls = calls
    return predict


@pytest.mark.parametrize(
    ("start", "steps", "visited"),
    [(99, 100, list(range(99, -1, -1))), (99, 1, [99]), (99, 4, [99, 74, 49, 24]), (199, 2, [199, 99]), (0, 1, [0])],
)
@pytest.mark.parametrize("clip", [True, False])
def test_ddim_recovers_an_image_from_the_true_noise_in_any_number_of_steps(start, steps, visited, clip):
    scheduler, _ = noise_scheduler(0.1)
    clean = torch.rand(2, 3, SIDE, SIDE) * 2 - 1
    noisy = scheduler.add_noise(clean, torch.randn_like(clean), torch.full((2,), start))
    knows = oracle(clean, scheduler)
    found = ddim_denoise(knows, noisy, scheduler, start, steps, clip_sample=clip)
    assert knows.calls == visited
    torch.testing.assert_close(found, clean, rtol=0, atol=1e-3)


def test_ddim_takes_the_same_steps_as_the_whole_schedule_of_diffusers():
    """One step per timestep: what DDIMScheduler itself does on the last part of its 1000 steps."""
    scheduler, _ = noise_scheduler(0.1)
    torch.manual_seed(0)
    noisy, direction = torch.randn(2, 1, 3, SIDE, SIDE).unbind()

    def model(images, timestep, class_labels):
        return SimpleNamespace(sample=torch.tanh(images + direction * timestep[0] / 1000))

    found = ddim_denoise(model, noisy, scheduler, 49, 50)
    walk = diffusers.DDIMScheduler(beta_start=1e-4, beta_end=2e-2, clip_sample=True, num_train_timesteps=1000)
    walk.set_timesteps(1000)
    images = noisy
    for step in range(49, -1, -1):
        predicted = model(images, torch.tensor([step]), None).sample
        images = walk.step(predicted, step, images, use_clipped_model_output=True).prev_sample
    torch.testing.assert_close(found, images, rtol=1e-4, atol=1e-4)
    for start, steps, message in (
        (1000, 1, "between 0 and 999, got 1000"),
        (9, 11, "start_timestep . 1 = 10, got 11"),
    ):
        with pytest.raises(ValueError, match=message):
            ddim_denoise(model, noisy, scheduler, start, steps)


# ---- ebt train denoise -----------------------------------------------------------------------------------------


@pytest.fixture
def command(tmp_path):
    """Runs the script on a few pictures with a tiny model; options given twice count the second time."""
    table(24).to_parquet(tmp_path / "images.parquet")
    common = "--use_cpu --disable_tqdm true --report_to none --logging_steps 1 --max_steps 2"
    shape = f"--image_size {SIDE} --patch_size 4"

    def run(options: str, model: str = TINY_RUN, out: str = "out", shape: str = shape, data: bool = True) -> Path:
        argv = [*common.split(), *shape.split(), "--output_dir", str(tmp_path / out), *options.split()]
        argv += ["--train_file", str(tmp_path / "images.parquet")] if data else []
        argv += ["--config_overrides", model] if model else []
        run_denoise.main(argv)
        return tmp_path / out

    return run


def test_the_script_trains_evaluates_saves_and_goes_on(command, capsys):
    options = "--step_size 30 --image_conditioning noisy_image --ema_decay 0.9"
    out = command(f"{options} --max_steps 3")
    results = json.loads((out / "all_results.json").read_text())
    shown = capsys.readouterr().out
    evaluated = json.loads((out / "eval_results.json").read_text())
    assert {"eval_loss", "eval_psnr", "eval_target_energy"} <= set(evaluated) <= set(results)
    assert f"PSNR {results['eval_psnr']:.3f} dB" in shown and "train: 23 images, 8 x 8, decoded in memory" in shown
    model = AutoModelForImageToImage.from_pretrained(out)
    assert isinstance(model, EBTForImageDenoising) and model.config.step_size == 30
    assert (model.config.hidden_size, model.config.intermediate_size) == (16, 16)
    assert model.config.image_conditioning == "noisy_image"
    assert AutoImageProcessor.from_pretrained(out).patch_size == 4
    card = (out / "README.md").read_text()
    for part in ("ebt train denoise", "validation PSNR in dB", "pipeline_tag: image-to-image", "image-denoising"):
        assert part in card
    assert "moving average" in card and "perplexity" not in card and "bound method" not in card
    command(f"{options} --max_steps 3")  # nothing to train, the same numbers: those of the average
    assert "nothing to train" in capsys.readouterr().out
    again = json.loads((out / "all_results.json").read_text())
    assert again["eval_loss"] == pytest.approx(results["eval_loss"], rel=1e-6)
    command(f"{options} --max_steps 4")
    assert json.loads((out / "trainer_state.json").read_text())["global_step"] == 4
    with pytest.raises(SystemExit, match="keeps an average of the weights"):
        command("--step_size 30 --max_steps 5")


def test_the_twin_trains_by_the_same_script(command, capsys):
    out = command("--twin")
    dit, scheduler = load_dit(out)
    assert isinstance(dit, diffusers.DiTTransformer2DModel) and dit.inner_dim == 16 and not dit.training
    assert scheduler.config.num_train_timesteps == 1000
    noisy = torch.randn(2, 3, SIDE, SIDE)
    assert ddim_denoise(dit, noisy, scheduler, 99, 3).shape == noisy.shape
    results = json.loads((out / "all_results.json").read_text())
    assert math.isfinite(results["eval_loss"])
    card = (out / "README.md").read_text()
    assert "timesteps 0 to 99 of 1000" in card and "load_dit" in card and "weight decay 0.0" in card
    assert "library_name: diffusers" in card and "thinking" not in card.lower()
    with pytest.raises(SystemExit, match="checkpoint-2 holds another model"):
        command("--max_steps 3")
    command("--twin --max_steps 3 --twin_max_timestep 0.2")
    assert "timesteps 0 to 199 of 1000" in (out / "README.md").read_text()


def test_grey_images_test_data_random_levels_and_s2(command, tmp_path):
    out = command(
        f"--num_channels 1 --recipe s2 --random_noise_level 0.02 0.2 --validation_split_percentage 0 "
        f"--test_file {tmp_path / 'images.parquet'} --max_train_samples 9 --no_horizontal_flip --image_memory 0"
    )
    model = AutoModelForImageToImage.from_pretrained(out)
    assert model.config.num_channels == 1 and model.config.loss_on_steps == "last"
    results = json.loads((out / "all_results.json").read_text())
    assert math.isfinite(results["test_psnr"]) and "eval_psnr" not in results
    second = command(f"--model_name_or_path {out} --recipe s2 --max_steps 1", "", "second", "")
    assert AutoModelForImageToImage.from_pretrained(second).config.num_channels == 1


def test_a_vae_is_trained_on_and_remembered(command, tmp_path):
    tiny_vae().save_pretrained(tmp_path / "vae")
    out = command(f"--vae_name_or_path {tmp_path / 'vae'} --image_size 16 --max_steps 1")
    config = AutoModelForImageToImage.from_pretrained(out).config
    assert (config.image_size, config.num_channels) == (8, 4)
    assert config.vae_name_or_path == str(tmp_path / "vae")
    results = json.loads((out / "all_results.json").read_text())
    assert math.isfinite(results["eval_loss"]) and "eval_psnr" not in results


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--noise_level 0.1 --random_noise_level 0.1 0.2", "contradict"),
        ("--noise_level 2", "above 0 and at most 1, got 2"),
        ("--random_noise_level 0.1", "lowest and the highest.*got 0.1"),
        ("--twin --random_noise_level 0.1 0.2", "means nothing to the twin.*--twin_max_timestep"),
        ("--twin --num_landscapes 3", "--num_landscapes means nothing to the twin"),
        ("--twin --recipe s2", "--recipe means nothing to the twin"),
        ("--twin_max_timestep 0.2", "with --twin only"),
        ("--twin --twin_max_timestep 0.2 --noise_level 0.1", "no effect on a twin"),
        ("--dataset_name x", "both name the data"),
        ("--image_column picture", "no column 'picture'. Columns: image, label"),
        ("--patch_size 3", "must be a positive multiple of `patch_size` .3."),
        ("--num_channels 2", "must be 1 .grey. or 3 .RGB., got 2"),
        ("--image_conditioning sometimes", "must be one of none, noisy_image"),
        ("--candidate_init normal", "image_conditioning='noisy_image'"),
        ("--step_size_lr_multiplier 2 --learn_step_size false", "learns no step size"),
        ("--ema_decay 1.5", "between 0 and 1, got 1.5"),
        ("--model_name_or_path x --patch_size 2", "would change the architecture"),
        ("--validation_split_percentage 0 --eval_strategy steps", "needs validation data"),
        ("--max_eval_samples 0", "at least 1, got 0"),
        ("--preset gigantic", "Allowed: 4xs, 3xs"),
    ],
)
def test_the_script_refuses_in_words(command, options, message):
    with pytest.raises(SystemExit, match=message):
        command(options)


@pytest.mark.parametrize(
    ("options", "model", "message"),
    [
        ("", TINY_RUN + ",hiden_size=8", "'hiden_size=8' is no field=value of EBTImageConfig"),
        ("", TINY_RUN + ",image_size=8", "--image_size is also in --config_overrides"),
        ("--twin", TINY_RUN + ",step_size=8", "step_size means nothing to the twin. Fields: image_size"),
    ],
)
def test_the_script_refuses_impossible_models(command, options, model, message):
    with pytest.raises(SystemExit, match=message):
        command(options, model)


def test_missing_data_is_refused_in_words(command, capsys):
    with pytest.raises(SystemExit, match="Say which images to train on: --train_file"):
        command("", data=False)
    with pytest.raises(SystemExit, match="'nowhere' does not exist or holds no image"):
        command("--train_file nowhere", data=False)
    with pytest.raises(SystemExit) as ended:
        command("--help")
    assert ended.value.code == 0 and "--random_noise_level" in capsys.readouterr().out


def test_a_list_among_the_overrides_is_one_value():
    fields = run_clm.parse_overrides("random_steps=[2,3],hidden_size=8", EBTImageConfig)
    assert fields == {"random_steps": [2, 3], "hidden_size": 8}
