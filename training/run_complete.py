r"""
Train a model that completes images with masked patches: an Energy Transformer, or its masked-autoencoder twin with
`--mae`.

    ebt train complete --output_dir runs/complete --train_file cifar10.parquet --image_size 32 --patch_size 4 \
        --max_steps 20000 --per_device_train_batch_size 64 --eval_strategy steps --eval_steps 1000
    ebt train complete --output_dir runs/mae ... --mae

Images come from the Hub (`--dataset_name`), `.parquet` files, `.tar` shards, image files, patterns or folders; with
`--streaming` they are read while training. Every image has the same mask in every evaluation, and other masks in every
epoch of training.

The same command started again goes on from its last checkpoint. At the end the model is evaluated on the validation
and test data there is (`all_results.json`), and saved with its image processor, its model card and a picture of
completed validation images (`completion.png`).
"""

import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .data_arguments import check_source_options
from .denoise_data import DataArguments, prepare_images
from .script import (
    Refusal,
    RunArguments,
    as_flags,
    check_counts,
    check_same_model,
    conclude,
    fit,
    given_data_files,
    given_options,
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
    from torch import nn

    from ..configuration import EnergyTransformerConfig
    from ..modeling_ebt.image_processing_ebt import EBTImageProcessor
    from .arguments_et import EnergyTransformerTrainingArguments
    from .completion_trainer import CompletionTrainer

MODEL_TYPE = "energy_transformer"
# of a new model; the paper's: 224, 16, 768, 12
DEFAULTS = {"image_size": 64, "patch_size": 8, "hidden_size": 256, "num_attention_heads": 8}
# what learns well in a short training (benchmarks/results/completion.md); the paper has 12 steps of 0.1 from 0.002
START = {"thinking_steps": 2, "step_size": 1.0, "attention_initializer_range": 0.1, "position_init": "sincos"}
NORMALIZATION_NAMES = ("symmetric", "imagenet")  # what `complete_data.py` has; named here so that --help is quick
THINKING = ("thinking_steps", "step_size", "visible_ratio", "completion_loss")  # mean nothing to the twin
FIELDS = (*DEFAULTS, "num_channels", "num_blocks", "mask_ratio", *THINKING)
# config fields that the twin's shape follows from; the others mean nothing to it
TWIN_FIELDS = (*DEFAULTS, "num_channels", "mask_ratio", "head_dim", "num_memories", "num_blocks")
GRAPH_FIELDS = (
    *("num_node_features", "num_edge_features", "num_relations", "position_embedding", "num_positions"),
    *("edge_modulation", "readout_size", "classifier_dropout", "class_weights", "label_smoothing"),
)


@dataclass
class ModelArguments:
    """Which model: a new one by its size, or one to train further."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Train this model further: a folder or a Hub id. Default: a new model."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run the code that comes with --model_name_or_path."}
    )
    mae: bool = field(
        default=False,
        metadata={
            "help": "Train the twin instead: a masked autoencoder (transformers' ViTMAE) with as many parameters as "
            "the Energy Transformer of the same options, everything else equal."
        },
    )
    image_size: int | None = field(
        default=None,
        metadata={"help": f"Height and width of the images in pixels. Default: {DEFAULTS['image_size']}."},
    )
    patch_size: int | None = field(
        default=None,
        metadata={
            "help": f"Side of a patch in pixels. Default: {DEFAULTS['patch_size']}. The width should be at least "
            "num_channels x patch_size^2."
        },
    )
    num_channels: int | None = field(
        default=None, metadata={"help": "3 for colour (default) or 1 for grey; images are converted."}
    )
    hidden_size: int | None = field(
        default=None, metadata={"help": f"Width of a token. Default: {DEFAULTS['hidden_size']} (the paper: 768)."}
    )
    num_attention_heads: int | None = field(
        default=None,
        metadata={"help": f"Attention heads. Default: {DEFAULTS['num_attention_heads']} (the paper: 12)."},
    )
    num_blocks: int | None = field(
        default=None, metadata={"help": "Blocks, descended one after another. Default: 1 (the paper)."}
    )
    thinking_steps: int | None = field(
        default=None,
        metadata={
            "help": f"Thinking steps in training and by default. Default: {START['thinking_steps']} (the paper: 12)."
        },
    )
    step_size: float | None = field(
        default=None, metadata={"help": f"Step size (alpha). Default: {START['step_size']} (the paper: 0.1)."}
    )
    mask_ratio: float | None = field(
        default=None, metadata={"help": "Share of the patches that count in the loss. Default: 0.5 (the paper)."}
    )
    visible_ratio: float | None = field(
        default=None,
        metadata={"help": "Share of those that stay visible in training. Default: 0.1 (the authors' code)."},
    )
    completion_loss: str | None = field(
        default=None, metadata={"help": "mse (default, the paper's text), rmse or diluted_rmse (the authors' code)."}
    )
    config_overrides: str | None = field(
        default=None,
        metadata={
            "help": "Further config fields of a new model, e.g. num_memories=512,self_attention=false. The paper's "
            "start: attention_initializer_range=0.002,position_init=normal (here 0.1 and sincos)."
        },
    )
    normalization: str | None = field(
        default=None,
        metadata={
            "help": "Scale of the pixels of a new model: symmetric (default, -1..1) or imagenet (ImageNet's mean and "
            "standard deviation, the paper). One to train further keeps its own."
        },
    )


@dataclass
class EvaluationArguments:
    """What is evaluated, and with which weights."""

    eval_thinking_steps: list[int] | None = field(
        default=None,
        metadata={"help": "At the end also evaluate with these numbers of thinking steps, e.g. 1 4 12 24."},
    )
    ema_decay: float | None = field(
        default=None,
        metadata={"help": "Evaluate and save a moving average of the weights with this decay, e.g. 0.999."},
    )


def _training_class() -> "type[EnergyTransformerTrainingArguments]":
    from .arguments_et import EnergyTransformerTrainingArguments

    return EnergyTransformerTrainingArguments


def _check_arguments(
    model: ModelArguments,
    data: DataArguments,
    evaluation: EvaluationArguments,
    training: "EnergyTransformerTrainingArguments",
) -> None:
    """Refuses combinations of which one half would be ignored."""
    if model.model_name_or_path is not None:
        unused = given_options(model, ("mae", *FIELDS, "config_overrides", "normalization"))
        if unused:
            raise Refusal(
                f"{as_flags(unused)} would change {model.model_name_or_path}, which is trained further as it is. "
                "Leave them out, or leave --model_name_or_path out for a new model."
            )
    elif model.trust_remote_code:
        raise Refusal("--trust_remote_code has an effect with --model_name_or_path only.")
    if model.mae:
        unused = [*given_options(model, THINKING), *given_options(evaluation, ("eval_thinking_steps",))]
        if unused:
            raise Refusal(f"{as_flags(unused)} means nothing to the twin, which does not think. Leave it out.")
    if model.normalization not in (None, *NORMALIZATION_NAMES):
        raise Refusal(f"--normalization must be one of {', '.join(NORMALIZATION_NAMES)}, got {model.normalization}.")
    steps = evaluation.eval_thinking_steps
    if steps is not None and min(steps, default=0) < 1:
        raise Refusal(f"--eval_thinking_steps must be at least 1 each, got {' '.join(map(str, steps))}.")
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


# ---- model -----------------------------------------------------------------------------------------------------


def _config(model: ModelArguments) -> "EnergyTransformerConfig":
    """Config of the model; of a twin, that of the Energy Transformer whose twin it is."""
    from transformers import AutoConfig

    from ..configuration import EnergyTransformerConfig

    if model.model_name_or_path is not None:
        config = AutoConfig.from_pretrained(model.model_name_or_path, trust_remote_code=model.trust_remote_code)
        if config.model_type != MODEL_TYPE:
            raise Refusal(
                f"{model.model_name_or_path} is a {config.model_type} model, not an Energy Transformer ({MODEL_TYPE})."
            )
        return config
    overrides = parse_overrides(model.config_overrides, EnergyTransformerConfig)
    for_graphs = sorted(set(overrides) & set(GRAPH_FIELDS))
    if for_graphs:
        raise Refusal(f"--config_overrides: {', '.join(for_graphs)} is for graphs. Leave it out.")
    foreign = sorted(set(overrides) - set(TWIN_FIELDS)) if model.mae else []
    if foreign:
        raise Refusal(
            f"--config_overrides: {', '.join(foreign)} means nothing to the twin. Fields: {', '.join(TWIN_FIELDS)}."
        )
    own = own_fields(model, FIELDS, overrides)
    return EnergyTransformerConfig.for_images(**{**DEFAULTS, **START, **own, **overrides})


def _processor(model: ModelArguments, config: "EnergyTransformerConfig") -> "EBTImageProcessor":
    """The image processor: that of a model trained further, where it has one."""
    from ..modeling_ebt.image_processing_ebt import EBTImageProcessor
    from .complete_data import NORMALIZATIONS

    if model.model_name_or_path is not None:
        try:
            return EBTImageProcessor.from_pretrained(model.model_name_or_path)
        except OSError:
            say(f"{model.model_name_or_path} has no image processor: pixels are taken as -1..1.")
    return EBTImageProcessor.from_model_config(config, **NORMALIZATIONS[model.normalization or "symmetric"])


def _build_model(model: ModelArguments, config: "EnergyTransformerConfig") -> "nn.Module":
    import torch
    from transformers import AutoModelForMaskedImageModeling

    if model.mae:
        from .mae_twin import mae_twin

        return mae_twin(config)
    if model.model_name_or_path is not None:
        # full precision weights: mixed precision is the Trainer's --bf16 and --fp16
        return AutoModelForMaskedImageModeling.from_pretrained(
            model.model_name_or_path, dtype=torch.float32, trust_remote_code=model.trust_remote_code
        )
    return AutoModelForMaskedImageModeling.from_config(config, dtype=torch.float32)


# ---- run -------------------------------------------------------------------------------------------------------


def _evaluate(trainer: "CompletionTrainer", images: Any, split: str, steps: list[int] | None) -> None:
    from .completion_report import steps_table

    metrics = trainer.evaluate(images, metric_key_prefix=split)
    name = "Validation" if split == "eval" else "Test"
    say(f"{name}: masked MSE {metrics[f'{split}_masked_mse']:.6g}, PSNR {metrics[f'{split}_masked_psnr']:.3f} dB")
    if steps:
        rows = trainer.evaluate_steps(images, steps)
        shown = steps_table(rows, trainer.accelerator.unwrap_model(trainer.model).config.thinking_steps)
        say(shown)
        trainer.run_facts.notes.append(f"{name} with more and fewer thinking steps:\n\n{shown}")
        for row in rows:
            count = row["thinking_steps"]
            metrics |= {f"{split}_{key}_at_{count}": value for key, value in row.items() if key != "thinking_steps"}
    trainer.log_metrics(split, metrics)
    trainer.save_metrics(split, metrics)


def _draw(trainer: "CompletionTrainer", images: Any) -> None:
    """Completed images beside the model, where there are images and matplotlib."""
    from .completion_report import PICTURE, draw_examples

    if not trainer.is_world_process_zero():
        return
    path = Path(str(trainer.args.output_dir)) / PICTURE
    try:
        draw_examples(trainer.accelerator.unwrap_model(trainer.model), trainer.processing_class, images, path)
    except ImportError as error:
        say(f"No {PICTURE}: {error}")
        return
    trainer.run_facts.notes.append(f"![Validation images, masked and completed]({PICTURE})")
    say(f"Completed validation images: {path}.")


def _run(argv: list[str]) -> None:
    own = (ModelArguments, DataArguments, EvaluationArguments, RunArguments)
    parsed = parse_command_line(
        argv, "complete", __doc__, own, _training_class, training_options="--early_stopping_patience"
    )
    model_args, data_args, evaluation_args, run_args, training_args = parsed
    _check_arguments(model_args, data_args, evaluation_args, training_args)
    from transformers import set_seed

    from .complete_data import MaskCollator, PixelScale
    from .completion_trainer import CompletionTrainer
    from .ema import EMA_FILE, EMACallback
    from .images import EpochCallback
    from .model_card import RunFacts

    checkpoint = start_point(training_args, run_args.overwrite)
    if checkpoint is not None and evaluation_args.ema_decay is None and (Path(checkpoint) / EMA_FILE).is_file():
        raise Refusal(f"{checkpoint} keeps an average of the weights. Go on with its --ema_decay, or --overwrite.")
    train, validate, test, checkpoint = plan_phases(argv, training_args, checkpoint)
    set_seed(training_args.seed)

    with training_args.main_process_first(desc="reading the data"), refusing_bad_values():
        config = _config(model_args)
        processor = _processor(model_args, config)
        images = prepare_images(data_args, config.height_and_width, config.num_channels, None, training_args)
        averages = [] if evaluation_args.ema_decay is None else [EMACallback(evaluation_args.ema_decay)]
        if averages:
            _need_diffusers()
        model = _build_model(model_args, config)
    if training_args.eval_strategy != "no" and "validation" not in images:
        raise Refusal("--eval_strategy needs validation data: --validation_file or --validation_split_percentage.")
    source = data_args.dataset_name or " ".join(data_args.train_file or [])
    with refusing_bad_values():
        trainer = CompletionTrainer(
            model,
            training_args,
            train_dataset=images["train"],
            eval_dataset=images.get("validation"),
            # what turns users' pictures into the model's input, saved beside it
            processing_class=processor,
            data_collator=MaskCollator(
                config, PixelScale(processor.image_mean, processor.image_std), twin=model_args.mae
            ),
            # a stream counts its passes itself
            callbacks=[*([] if data_args.streaming else [EpochCallback(images["train"])]), *averages],
            run_facts=RunFacts(
                data=_describe(source, config),
                dataset=data_args.dataset_name,
                command=shlex.join(["ebt", "train", "complete", *argv]),
                base_model=model_args.model_name_or_path,
                notes=_notes(model_args, evaluation_args, processor),
            ),
        )
    if checkpoint is not None:
        check_same_model(checkpoint, model)
    say_size(model)
    fit(trainer, train, checkpoint, averages)
    for wanted, split, prefix in ((validate, "validation", "eval"), (test, "test", "test")):
        if wanted and split in images:
            _evaluate(trainer, images[split], prefix, evaluation_args.eval_thinking_steps)
    if validate and "validation" in images and not model_args.mae:
        _draw(trainer, images["validation"])
    if train:
        trainer.save_model()
        say(f"Saved to {training_args.output_dir}.")
        if training_args.push_to_hub:
            trainer.push_to_hub()
    conclude(trainer)


def _need_diffusers() -> None:
    try:
        import diffusers  # noqa: F401
    except ImportError as error:
        raise Refusal("--ema_decay needs diffusers: pip install 'ebt-transformers[diffusers]'.") from error


def _describe(source: str, config: "EnergyTransformerConfig") -> str:
    kind = "grey" if config.num_channels == 1 else "colour"
    height, width = config.height_and_width
    return (
        f"{source}, {kind} images of {height} x {width}, {config.mask_ratio:.0%} of their "
        f"{config.num_patches} patches masked"
    )


def _notes(model: ModelArguments, evaluation: EvaluationArguments, processor: "EBTImageProcessor") -> list[str]:
    notes = [f"Pixels from 0 to 1 become (pixel - {processor.image_mean}) / {processor.image_std}."]
    if evaluation.ema_decay is not None:
        notes.append(f"The weights are a moving average over training (decay {evaluation.ema_decay}).")
    if model.mae:
        notes.append(
            "The twin of an Energy Transformer: as many parameters within 3 %, the same patches and masks. All "
            "patches that count in the loss are hidden from it in training, too."
        )
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
