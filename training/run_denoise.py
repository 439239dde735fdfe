r"""
Train a model that denoises images: an Energy-Based Transformer, or its Diffusion Transformer twin with `--twin`.

    ebt train denoise --output_dir runs/cifar --train_file cifar10.parquet --image_size 32 --patch_size 4 \
        --max_steps 20000 --per_device_train_batch_size 128 --eval_strategy steps --eval_steps 1000
    ebt train denoise --output_dir runs/twin ... --twin

Images come from the Hub (`--dataset_name`), `.parquet` files, `.tar` shards, image files, patterns or folders; with
`--streaming` they are read while training. Every image gets the same noise in every evaluation, and other noise in
every epoch of training.

The same command started again goes on from its last checkpoint. At the end the model is evaluated on the validation
and test data there is (`all_results.json`), and saved with its image processor and model card; the twin as diffusers
saves it.
"""

import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .adapters import MERGED_FOLDER, AdapterArguments, add_adapter, check_adapter_arguments, save_merged
from .data_arguments import check_source_options
from .denoise_data import DataArguments, prepare_images
from .script import (
    Refusal,
    RunArguments,
    check_architecture_options,
    check_counts,
    check_same_model,
    conclude,
    fit,
    given_data_files,
    own_fields,
    parse_command_line,
    parse_overrides,
    plan_phases,
    refusing_bad_values,
    say,
    say_size,
    start_point,
)


if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from torch import nn

    from ..configuration import EBTImageConfig
    from .arguments import EBTImageTrainingArguments
    from .trainer import EBTTrainer

DEFAULT_PRESET = "3xs"  # the smallest that is wider than a patch of the default has numbers
DEFAULT_NOISE_LEVEL = 0.1
TARGET_IMAGES = 256  # from which the energy to stop at is learned
SHAPE = ("image_size", "patch_size", "num_channels")
EBT_ONLY = (
    "image_conditioning",
    "candidate_init",
    "num_landscapes",
    "step_size",
    "learn_step_size",
    "reconstruction_loss",
    "thinking_steps",
)
# config fields that the twin's shape follows from; the others mean nothing to it
TWIN_FIELDS = (*SHAPE, "hidden_size", "num_hidden_layers", "num_attention_heads", "layer_norm_eps")


@dataclass
class ModelArguments:
    """Which model: a new one by its size, or one to train further."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Train this model further: a folder or a Hub id. Default: a new model."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run the code that comes with --model_name_or_path."}
    )
    preset: str | None = field(
        default=None,
        metadata={
            "help": f"Size of a new model: 4xs, 3xs, xxs, xs, small, medium, large, xl. Default: {DEFAULT_PRESET}; "
            "the paper denoises with large."
        },
    )
    twin: bool = field(
        default=False,
        metadata={
            "help": "Train the Diffusion Transformer twin instead (diffusers): the same shape, everything else equal."
        },
    )
    config_overrides: str | None = field(
        default=None,
        metadata={
            "help": "Further config fields of a new model, e.g. hidden_size=64,num_attention_heads=4. "
            "intermediate_size follows hidden_size unless given."
        },
    )
    image_size: int | None = field(
        default=None,
        metadata={"help": "Height and width of the images in pixels, with a VAE too. Default: 64."},
    )
    patch_size: int | None = field(
        default=None,
        metadata={
            "help": "Side of a patch in pixels (with a VAE: of latents). Default: 8. The width should "
            "be at least num_channels x patch_size^2."
        },
    )
    num_channels: int | None = field(
        default=None, metadata={"help": "3 for colour (default) or 1 for grey; images are converted."}
    )
    image_conditioning: str | None = field(
        default=None, metadata={"help": "What the energy sees beside the candidate: none (the paper) or noisy_image."}
    )
    candidate_init: str | None = field(
        default=None, metadata={"help": "Where the descent starts: image (the noisy one; the paper) or normal."}
    )
    num_landscapes: int | None = field(
        default=None, metadata={"help": "Energy landscapes, and thinking steps in training (the paper: 1)."}
    )
    step_size: float | None = field(
        default=None, metadata={"help": "Initial step size (alpha; the paper: 3000 for 64 patches)."}
    )
    learn_step_size: bool | None = field(
        default=None, metadata={"help": "Whether the step size is trained (recipe s1: yes)."}
    )
    reconstruction_loss: str | None = field(
        default=None, metadata={"help": "smooth_l1 (default, the official code), mse (the paper's text) or l1."}
    )
    thinking_steps: int | None = field(
        default=None, metadata={"help": "Thinking steps in training and by default. Default: num_landscapes."}
    )
    vae_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Work on the latents of this diffusers AutoencoderKL: a folder or a Hub id. Default: pixels."
        },
    )


@dataclass
class NoiseArguments:
    """How much noise."""

    noise_level: float | None = field(
        default=None,
        metadata={
            "help": "Noise as a share of the way to pure noise (the paper trains on 0.1 and tests on 0.2, too). "
            f"Default: {DEFAULT_NOISE_LEVEL}."
        },
    )
    random_noise_level: list[float] | None = field(
        default=None, metadata={"help": "LOW HIGH: draw the level of every image uniformly between these instead."}
    )
    twin_max_timestep: float | None = field(
        default=None,
        metadata={
            "help": "With --twin: the share of the diffusion schedule it is trained on, from the start. Default: the "
            "noise level."
        },
    )
    ema_decay: float | None = field(
        default=None,
        metadata={"help": "Evaluate and save a moving average of the weights with this decay, e.g. 0.999."},
    )


def _training_class() -> "type[EBTImageTrainingArguments]":
    from .arguments import EBTImageTrainingArguments

    return EBTImageTrainingArguments


def _check_arguments(
    model: ModelArguments, data: DataArguments, noise: NoiseArguments, training: "EBTImageTrainingArguments"
) -> None:
    """Refuses combinations of which one half would be ignored."""
    of_new = ("preset", "twin", "config_overrides", *SHAPE, *EBT_ONLY, "vae_name_or_path")
    check_architecture_options(model, training, of_new, EBT_ONLY)
    if model.trust_remote_code and model.model_name_or_path is None:
        raise Refusal("--trust_remote_code has an effect with --model_name_or_path only.")
    if model.twin:
        if noise.random_noise_level is not None:
            raise Refusal(
                "--random_noise_level means nothing to the twin, which is trained on every level up to the highest. "
                "Give the highest as --twin_max_timestep."
            )
    elif noise.twin_max_timestep is not None:
        raise Refusal("--twin_max_timestep has an effect with --twin only.")
    if noise.noise_level is not None and noise.random_noise_level is not None:
        raise Refusal("--noise_level and --random_noise_level contradict each other. Give one of them.")
    if noise.noise_level is not None and noise.twin_max_timestep is not None:
        raise Refusal("--noise_level has no effect on a twin with --twin_max_timestep. Give one of them.")
    for name in ("noise_level", "twin_max_timestep"):
        value = getattr(noise, name)
        if value is not None and not 0 < value <= 1:
            raise Refusal(f"--{name} must be above 0 and at most 1, got {value}.")
    given_data_files(data)
    if data.dataset_name is None and data.train_file is None:
        raise Refusal(
            "Say which images to train on: --train_file with .parquet files, image files, patterns or folders, or "
            "--dataset_name with a Hub id."
        )
    check_source_options(data, training)
    check_counts(data, "max_train_samples", "max_eval_samples")
    if data.resize_to is not None and data.resize_to < 0:
        raise Refusal(f"--resize_to must be at least 0, got {data.resize_to}.")
    if data.image_memory < 0:
        raise Refusal(f"--image_memory must be at least 0, got {data.image_memory}.")
    if model.vae_name_or_path is not None and model.num_channels is not None:
        raise Refusal("--num_channels is decided by the VAE. Leave it out.")


# ---- model -----------------------------------------------------------------------------------------------------


def _load_vae(name: str, training: "EBTImageTrainingArguments") -> "AutoencoderKL":
    from ..modeling_ebt.latents import load_vae

    with refusing_bad_values():
        try:
            vae = load_vae(name)
        except OSError as error:
            raise Refusal(f"--vae_name_or_path {name}: {error}") from error
    return vae.to(training.device).requires_grad_(False)


def _new_config(model: ModelArguments, training: "EBTImageTrainingArguments", vae: Any) -> "EBTImageConfig":
    """Config of a new model; for the twin, of the EBT whose twin it is."""
    from ..configuration import EBTImageConfig
    from ..modeling_ebt.latents import vae_scale_factor

    overrides = parse_overrides(model.config_overrides, EBTImageConfig)
    own = own_fields(model, (*SHAPE, *EBT_ONLY, "vae_name_or_path"), overrides)
    foreign = sorted(set(overrides) - set(TWIN_FIELDS)) if model.twin else []
    if foreign:
        raise Refusal(
            f"--config_overrides: {', '.join(foreign)} means nothing to the twin. Fields: {', '.join(TWIN_FIELDS)}."
        )
    values = {**own, **overrides}
    if "hidden_size" in overrides:
        values.setdefault("intermediate_size", None)
    if vae is not None:
        pixels, shrinkage = values.get("image_size", EBTImageConfig.image_size), vae_scale_factor(vae)
        sides = pixels if isinstance(pixels, list) else [pixels]
        if any(side % shrinkage for side in sides):
            raise Refusal(f"--image_size {pixels} must be a multiple of {shrinkage}, by which the VAE shrinks images.")
        smaller = [side // shrinkage for side in sides]
        values["image_size"] = smaller if isinstance(pixels, list) else smaller[0]
        values["num_channels"] = vae.config.latent_channels
    return EBTImageConfig.from_preset(model.preset or DEFAULT_PRESET, recipe=training.recipe, **values)


def _build_model(model: ModelArguments, config: "EBTImageConfig", max_timestep: int) -> "nn.Module":
    import torch
    from transformers import AutoModelForImageToImage

    if model.model_name_or_path is not None:
        # full precision weights: mixed precision is the Trainer's --bf16 and --fp16
        return AutoModelForImageToImage.from_pretrained(
            model.model_name_or_path, dtype=torch.float32, trust_remote_code=model.trust_remote_code
        )
    if model.twin:
        from .dit_twin import DiTTwin, new_dit

        return DiTTwin(new_dit(config), max_timestep=max_timestep)
    return AutoModelForImageToImage.from_config(config, dtype=torch.float32)


# ---- run -------------------------------------------------------------------------------------------------------


def _evaluate(trainer: "EBTTrainer", images: Any, split: str) -> None:
    metrics = trainer.evaluate(images, metric_key_prefix=split)
    if split == "eval":
        metrics |= _suggest_target(trainer, images)
    trainer.log_metrics(split, metrics)
    trainer.save_metrics(split, metrics)
    name = "Validation" if split == "eval" else "Test"
    psnr = metrics.get(f"{split}_psnr")
    say(f"{name}: loss {metrics[f'{split}_loss']:.6g}" + ("" if psnr is None else f", PSNR {psnr:.3f} dB"))


def _suggest_target(trainer: "EBTTrainer", images: Any) -> dict[str, float]:
    """Finds the energy at which thinking can stop, from validation images with the noise of training, and notes it."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    if not hasattr(model, "suggest_target_energy"):
        return {}
    count = min(len(images), TARGET_IMAGES)
    batch = trainer.data_collator([images[index] for index in range(count)])
    target = model.eval().suggest_target_energy(batch["pixel_values"].to(model.device))
    say(f"Thinking can stop at an energy of {target:.5g} (thinking_target_energy).")
    trainer.run_facts.notes.append(
        f"Thinking can stop at an energy of {target:.5g}, which 90 % of validation images come down to: with "
        f"`thinking_steps=8, thinking_target_energy={target:.5g}` every image takes as many steps as its noise needs."
    )
    return {"eval_target_energy": target}


def _save(trainer: "EBTTrainer") -> None:
    """Saves the model: an EBT as transformers does, a twin as diffusers does."""
    from .dit_twin import DiTTwin
    from .model_card import write_model_card

    model = trainer.accelerator.unwrap_model(trainer.model)
    if not isinstance(model, DiTTwin):
        trainer.save_model()
    elif trainer.is_world_process_zero():
        model.save_pretrained(str(trainer.args.output_dir))
        write_model_card(trainer, str(trainer.args.output_dir))


def _run(argv: list[str]) -> None:
    own = (ModelArguments, AdapterArguments, DataArguments, NoiseArguments, RunArguments)
    parsed = parse_command_line(argv, "denoise", __doc__, own, _training_class)
    model_args, adapter_args, data_args, noise_args, run_args, training_args = parsed
    _check_arguments(model_args, data_args, noise_args, training_args)
    try:
        import diffusers  # noqa: F401
    except ImportError as error:
        raise Refusal(
            "Training on noisy images needs diffusers: pip install 'ebt-transformers[train,image,diffusers]'."
        ) from error
    from transformers import AutoConfig, set_seed

    from ..modeling_ebt.image_processing_ebt import EBTImageProcessor
    from ..modeling_ebt.latents import vae_scale_factor
    from .ema import EMA_FILE, EMACallback
    from .images import DiffusionCollator, EpochCallback, NoisyImageCollator, share_timesteps
    from .model_card import RunFacts
    from .trainer import EBTTrainer

    check_adapter_arguments(adapter_args, model_args, training_args)
    checkpoint = start_point(training_args, run_args.overwrite, adapter=adapter_args.peft is not None)
    if checkpoint is not None and noise_args.ema_decay is None and (Path(checkpoint) / EMA_FILE).is_file():
        raise Refusal(f"{checkpoint} keeps an average of the weights. Go on with its --ema_decay, or --overwrite.")
    train, validate, test, checkpoint = plan_phases(argv, training_args, checkpoint)
    if model_args.twin and training_args.weight_decay_is_default:
        training_args.weight_decay = 0.0
    set_seed(training_args.seed)

    if model_args.model_name_or_path is None:
        vae = model_args.vae_name_or_path and _load_vae(model_args.vae_name_or_path, training_args)
        with refusing_bad_values():
            config = _new_config(model_args, training_args, vae)
    else:
        config = AutoConfig.from_pretrained(
            model_args.model_name_or_path, trust_remote_code=model_args.trust_remote_code
        )
        if config.model_type != "ebt_image":
            raise Refusal(f"{model_args.model_name_or_path} is a {config.model_type} model, not one for images.")
        vae = config.vae_name_or_path and _load_vae(config.vae_name_or_path, training_args)
    vae = vae or None
    height, width = (side * vae_scale_factor(vae) for side in config.height_and_width)
    size = (height, width)
    channels = config.num_channels if vae is None else vae.config.in_channels

    level = DEFAULT_NOISE_LEVEL if noise_args.noise_level is None else noise_args.noise_level
    share = noise_args.twin_max_timestep or level
    max_timestep = max(1, share_timesteps(share))
    with training_args.main_process_first(desc="reading the data"), refusing_bad_values():
        images = prepare_images(data_args, size, channels, vae, training_args)
        collator = (
            DiffusionCollator(max_timestep)
            if model_args.twin
            else NoisyImageCollator(level, noise_args.random_noise_level)
        )
        averages = [] if noise_args.ema_decay is None else [EMACallback(noise_args.ema_decay)]
        model = _build_model(model_args, config, max_timestep)
        if adapter_args.peft is not None:
            model = add_adapter(model, adapter_args)
    if training_args.eval_strategy != "no" and "validation" not in images:
        raise Refusal("--eval_strategy needs validation data: --validation_file or --validation_split_percentage.")
    source = data_args.dataset_name or " ".join(data_args.train_file or [])
    with refusing_bad_values():
        trainer = EBTTrainer(
            model,
            training_args,
            train_dataset=images["train"],
            eval_dataset=images.get("validation"),
            # what turns users' pictures into the model's input, saved beside it
            processing_class=None
            if model_args.twin
            else EBTImageProcessor.from_model_config(config, vae_scale_factor(vae)),
            data_collator=collator,
            # a stream counts its passes itself
            callbacks=[*([] if data_args.streaming else [EpochCallback(images["train"])]), *averages],
            run_facts=RunFacts(
                data=_describe(source, size, channels, level, noise_args, max_timestep if model_args.twin else None),
                dataset=data_args.dataset_name,
                command=shlex.join(["ebt", "train", "denoise", *argv]),
                base_model=model_args.model_name_or_path,
                notes=_notes(model_args, noise_args),
            ),
        )
    if checkpoint is not None:
        check_same_model(checkpoint, model)
    say_size(model)
    fit(trainer, train, checkpoint, averages)
    if validate and "validation" in images:
        _evaluate(trainer, images["validation"], "eval")
    if test and "test" in images:
        _evaluate(trainer, images["test"], "test")
    if train:
        _save(trainer)
        say(f"Saved to {training_args.output_dir}.")
        if training_args.push_to_hub:
            trainer.push_to_hub()
    if adapter_args.peft_merge:
        save_merged(trainer, Path(training_args.output_dir) / MERGED_FOLDER)
    conclude(trainer)


def _describe(
    source: str, size: tuple[int, int], channels: int, level: float, noise: NoiseArguments, max_timestep: int | None
) -> str:
    kind = "grey" if channels == 1 else "colour"
    if max_timestep is not None:
        amount = f"diffusion timesteps 0 to {max_timestep - 1} of 1000"
    elif noise.random_noise_level is not None:
        amount = f"noise levels {' to '.join(map(str, noise.random_noise_level))}"
    else:
        amount = f"noise level {level}"
    return f"{source}, {kind} images of {size[0]} x {size[1]}, {amount}"


def _notes(model: ModelArguments, noise: NoiseArguments) -> list[str]:
    notes = []
    if noise.ema_decay is not None:
        notes.append(f"The weights are a moving average over training (decay {noise.ema_decay}).")
    if model.twin:
        notes.append("Its feed-forward layers are 4 times its width, as diffusers fixes them.")
    return notes


def main(argv: list[str] | None = None) -> None:
    """
    Run the script.

    Args:
        argv (`list[str]`, *optional*): command line without the program's name; `None` takes the process's own.

    Raises:
        SystemExit: after `--help`, and with a message for options that contradict each other or do not work.
    """
    _run(sys.argv[1:] if argv is None else list(argv))


if __name__ == "__main__":
    main()
