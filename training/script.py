"""What the training scripts share: their command line, their refusals, and how they treat the output folder."""

import os
import re
from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig

    from .arguments import EBTTrainingArguments
    from .ema import EMACallback
    from .trainer import EBTTrainer


ADAPTER_CONFIG = "adapter_config.json"
EBT_TRAINING_OPTIONS = "--recipe, --replay_buffer_size, --step_size_lr_multiplier and --early_stopping_patience"


@dataclass
class RunArguments:
    """How the script treats its output folder."""

    overwrite: bool = field(
        default=False,
        metadata={"help": "Start afresh in an output folder with other content; removes the checkpoints in it."},
    )


class Refusal(SystemExit):
    """An error of the user's input: the message alone, no traceback."""


@contextmanager
def refusing_bad_values() -> Iterator[None]:
    """Errors about what the user asked for need no traceback either."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        yield
    except StrictDataclassError as error:  # a config's own check is its cause
        raise Refusal(f"{error.__cause__ or error}") from error
    except (ValueError, TypeError, FileNotFoundError, ImportError) as error:
        raise Refusal(f"{error}") from error


# ---- command line ----------------------------------------------------------------------------------------------


def parse_command_line(
    argv: list[str],
    kind: str,
    description: str | None,
    own: tuple[type, ...],
    training_class: "Callable[[], type[EBTTrainingArguments]]",
    training_options: str = EBT_TRAINING_OPTIONS,
) -> tuple[Any, ...]:
    """
    Parses the command line of a training script. `--help` answers without importing torch.

    Args:
        argv (`list[str]`): the command line without the program's name.
        kind (`str`): the script's name behind `ebt train`.
        description (`str`, *optional*): what `--help` says first.
        own (`tuple[type]`): dataclasses with the script's own options.
        training_class (`Callable`): imports and returns the class of the trainer's options.
        training_options (`str`, *optional*): those that this class adds to the parent's, for `--help`.

    Returns:
        One object for each of `own`, and the training arguments.

    Raises:
        SystemExit: after `--help`, and with a message for bad values.
    """
    from transformers.hf_argparser import HfArgumentParser

    look: dict[str, Any] = {"description": description, "formatter_class": RawDescriptionHelpFormatter}
    if "-h" in argv or "--help" in argv:
        parser = HfArgumentParser(own, usage=f"ebt train {kind} [options]", **look)
        parser.epilog = (
            "Every option of transformers.TrainingArguments works too (--output_dir, --max_steps, --learning_rate, "
            f"--per_device_train_batch_size, --resume_from_checkpoint auto, --bf16, ...), with {training_options}. "
            "--help_all lists them all."
        )
        parser.parse_args(["--help"])
    parser = HfArgumentParser((*own, training_class()), prog=f"ebt train {kind}", **look)
    if "--help_all" in argv:
        parser.parse_args(["--help"])
    with refusing_bad_values():
        return parser.parse_args_into_dataclasses(argv)


def say(message: str) -> None:
    """Tells the user, once however many processes there are."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(message, flush=True)


def say_size(model: "nn.Module") -> None:
    """Tells what is trained, and how much of it where that is a part only."""
    from .adapters import is_adapted

    sizes = [parameter.numel() for parameter in model.parameters()]
    if not is_adapted(model):
        say(f"{type(model).__name__}: {sum(sizes):,} parameters.")
        return
    trained, everything = model.get_nb_trainable_parameters()
    kind = model.peft_config[model.active_adapter].peft_type.value
    say(
        f"{type(model.get_base_model()).__name__} with {kind}: {everything:,} parameters, {trained:,} of them trained "
        f"({trained / everything:.2%})."
    )


def given_options(arguments: Any, names: tuple[str, ...]) -> list[str]:
    """Which of the options differ from their default."""
    defaults = {item.name: item.default if item.default is not MISSING else None for item in fields(arguments)}
    return [name for name in names if getattr(arguments, name) != defaults[name]]


def as_flags(names: list[str]) -> str:
    return ", ".join(f"--{name}" for name in names)


def check_architecture_options(
    model: Any, training: "EBTTrainingArguments", of_new: tuple[str, ...], of_ebt: tuple[str, ...]
) -> None:
    """
    Refuses options of the architecture that would be ignored: of a model trained further, and of an EBT for its twin.

    Args:
        model: the options, with `model_name_or_path` and `twin`.
        training ([`EBTTrainingArguments`]): the options of training.
        of_new (`tuple[str, ...]`): names of those that describe a new model.
        of_ebt (`tuple[str, ...]`): of these, names of those that mean nothing to the twin.
    """
    if model.model_name_or_path is not None:
        _check_no_adapter(model.model_name_or_path)
        unused = given_options(model, of_new)
        if unused:
            raise Refusal(
                f"{as_flags(unused)} would change the architecture of {model.model_name_or_path}, which is trained "
                "further as it is. Leave them out, or leave --model_name_or_path out for a new model."
            )
    if model.twin:
        unused = given_options(model, of_ebt)
        if training.step_size_lr_multiplier is not None:
            unused.append("step_size_lr_multiplier")
        if training.recipe != "s1":
            unused.append("recipe")
        elif training.replay_buffer_size:
            unused.append("replay_buffer_size")
        if unused:
            raise Refusal(
                f"{as_flags(unused)} means nothing to the twin, which does not think. Leave out one or the other."
            )


def _check_no_adapter(name: str) -> None:
    """Refuses an adapter as the model to start from: transformers would load it as a part of the model."""
    from transformers.utils import find_adapter_config_file

    with suppress(OSError):  # no such repository, or no network: what loads the model says so
        if find_adapter_config_file(name) is not None:
            raise Refusal(
                f"--model_name_or_path {name} is an adapter. To train it further start the command it was made with; "
                "to build on it give the merged model (--peft_merge)."
            )


def given_data_files(data: Any) -> list[str]:
    """Which of the options with files are given; refuses them beside `--dataset_name`."""
    files = given_options(data, ("train_file", "validation_file", "test_file"))
    if data.dataset_name is not None and files:
        raise Refusal(f"--dataset_name and {as_flags(files)} both name the data. Give one of them.")
    return files


def check_counts(data: Any, *names: str) -> None:
    """Refuses counts below 1."""
    for name in names:
        value = getattr(data, name)
        if value is not None and value < 1:
            raise Refusal(f"--{name} must be at least 1, got {value}.")


def wanted_phases(argv: list[str], training: "EBTTrainingArguments") -> tuple[bool, bool, bool]:
    """Train, validate, test: all, unless some of --do_train, --do_eval, --do_predict are given."""
    # --eval_strategy switches do_eval on by itself, so only the command line tells what was asked for
    named = [any(word.split("=")[0] == flag for word in argv) for flag in ("--do_train", "--do_eval", "--do_predict")]
    if not any(named):
        return True, True, True
    return training.do_train, training.do_eval and named[1], training.do_predict


# ---- output folder ---------------------------------------------------------------------------------------------


def start_point(training: "EBTTrainingArguments", overwrite: bool, adapter: bool = False) -> str | None:
    """The checkpoint to go on from; decides what may happen to the output folder (`adapter`: one will be saved)."""
    from .trainer import TRAINER_STATE, find_last_checkpoint

    folder = Path(training.output_dir)
    _check_kind_of_weights(folder, adapter)
    asked = training.resume_from_checkpoint
    if asked and overwrite:
        raise Refusal("--resume_from_checkpoint and --overwrite contradict each other. Give one of them.")
    if asked and asked != "auto":
        if not (Path(asked) / TRAINER_STATE).is_file():
            raise Refusal(
                f"--resume_from_checkpoint {asked}: no complete checkpoint (it has no {TRAINER_STATE}). Give a "
                "checkpoint-N folder, or auto."
            )
        say(f"Going on from {asked}.")
        return asked
    if overwrite:
        if training.process_index == 0:
            _remove_checkpoints(folder)
        return None
    last = find_last_checkpoint(folder)
    if last is not None:
        say(f"Found {last}: going on from there. (--overwrite starts afresh.)")
        return str(last)
    if folder.is_dir() and any(folder.iterdir()):
        raise Refusal(
            f"The output folder {folder} has content but no complete checkpoint. Choose another --output_dir, or "
            "--overwrite."
        )
    return None


def finished_weights(checkpoint: str, training: "EBTTrainingArguments") -> str | None:
    """The weights of a run that has nothing left to train, best or last as asked; None if there is more to do."""
    import json

    from .trainer import TRAINER_STATE

    state = json.loads((Path(checkpoint) / TRAINER_STATE).read_text(encoding="utf-8"))
    if training.max_steps > 0:
        finished = state["global_step"] >= training.max_steps
    else:
        finished = (
            state["global_step"] >= state["max_steps"] and state["num_train_epochs"] >= training.num_train_epochs
        )
    if not finished:
        return None
    best = state.get("best_model_checkpoint")
    return best if training.load_best_model_at_end and best and Path(best).is_dir() else checkpoint


def _check_kind_of_weights(folder: str | Path, adapter: bool) -> None:
    """Refuses a folder with an adapter for a full model, and the other way round: loading would mix the two."""
    kinds = {False: "a full model", True: "an adapter"}
    found = {False: any(Path(folder).glob("model*.safetensors*")), True: (Path(folder) / ADAPTER_CONFIG).is_file()}
    if found[not adapter]:
        raise Refusal(
            f"{folder} holds {kinds[not adapter]}, and {kinds[adapter]} is asked for (--peft). Start the command it "
            "was made with, or choose another --output_dir."
        )


def check_same_model(checkpoint: str, model: "nn.Module") -> None:
    """Refuses a checkpoint with the weights of another model, which the Trainer would load in parts or not at all."""
    from safetensors import safe_open

    from .adapters import check_same_adapter, is_adapted

    adapter = is_adapted(model)
    _check_kind_of_weights(checkpoint, adapter)
    if adapter:
        check_same_adapter(checkpoint, model)
        return
    path = Path(checkpoint) / "model.safetensors"
    if not path.is_file():  # in several parts, or of another kind
        return
    own = {name: list(value.shape) for name, value in model.state_dict().items()}
    with safe_open(path, framework="pt") as file:
        saved = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118  no dict
    other = [name for name, shape in saved.items() if own.get(name) != list(shape)]
    if other:
        raise Refusal(
            f"{checkpoint} holds another model than the options ask for ({other[0]} {saved[other[0]]}, "
            f"{own.get(other[0], 'which it does not have')} here). Start the same command again, choose another "
            "--output_dir, or --overwrite."
        )


def _remove_checkpoints(folder: Path) -> None:
    import shutil

    for checkpoint in sorted(folder.glob("checkpoint-*")):
        if checkpoint.is_dir() and checkpoint.name.removeprefix("checkpoint-").isdigit():
            say(f"--overwrite: removing {checkpoint}.")
            shutil.rmtree(checkpoint)


# ---- run -------------------------------------------------------------------------------------------------------


def plan_phases(
    argv: list[str], training: "EBTTrainingArguments", checkpoint: str | None
) -> tuple[bool, bool, bool, str | None]:
    """
    What a run does: train, validate, test. Where everything is trained already, it only loads.

    Args:
        argv (`list[str]`): the command line, which says what is wanted.
        training ([`EBTTrainingArguments`]): the options of training.
        checkpoint (`str`, *optional*): what [`start_point`] found to go on from.

    Returns:
        Whether to train, to validate and to test, and the checkpoint to go on from, or to load.
    """
    train, validate, test = wanted_phases(argv, training)
    finished = finished_weights(checkpoint, training) if checkpoint else None
    if train and finished:
        say(f"{checkpoint} has all the steps asked for: nothing to train. (--overwrite starts afresh.)")
        train, checkpoint = False, finished
    return train, validate, test, checkpoint


def fit(trainer: "EBTTrainer", train: bool, checkpoint: str | None, averages: "Sequence[EMACallback]" = ()) -> None:
    """
    Trains, or loads the weights of a run that has nothing left to train.

    Args:
        trainer ([`EBTTrainer`]): with model and data.
        train (`bool`): whether to train.
        checkpoint (`str`, *optional*): a checkpoint folder to go on from, or to load.
        averages (sequence of [`EMACallback`]): moving averages of the weights, which then are the model's weights.
    """
    if train:
        result = trainer.train(resume_from_checkpoint=checkpoint or False)
        trainer.log_metrics("train", result.metrics)
        trainer.save_metrics("train", result.metrics)
        trainer.save_state()
    elif checkpoint is not None:
        trainer._load_from_checkpoint(checkpoint)
        for callback in averages:
            with refusing_bad_values():
                callback.load(trainer.accelerator.unwrap_model(trainer.model), checkpoint, into_model=True)


def conclude(trainer: "EBTTrainer") -> None:
    """Ends a run; of several processes, one that ends while threads of its group still run would be aborted."""
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


# ---- model -----------------------------------------------------------------------------------------------------


def parse_overrides(text: str | None, config_class: type["PreTrainedConfig"]) -> dict[str, Any]:
    """`a=1,b=gelu` to a dict; every name has to be a field of the config."""
    import json

    known = {item.name for item in fields(config_class)}
    values: dict[str, Any] = {}
    for part in re.split(r",(?![^\[]*\])", text or ""):  # commas inside a list belong to it
        name, separator, value = (piece.strip() for piece in part.partition("="))
        if not part.strip():
            continue
        if not separator or name not in known:
            raise Refusal(
                f"--config_overrides: {part.strip()!r} is no field=value of {config_class.__name__}. Fields: "
                f"{', '.join(sorted(known))}."
            )
        try:
            values[name] = json.loads({"True": "true", "False": "false", "None": "null"}.get(value, value))
        except json.JSONDecodeError:
            values[name] = value
    return values


def own_fields(model: Any, names: tuple[str, ...], overrides: dict[str, Any]) -> dict[str, Any]:
    """Config fields that have options of their own and were given; refuses those that are overridden as well."""
    own = {name: getattr(model, name) for name in names if getattr(model, name) is not None}
    both = sorted(set(own) & set(overrides))
    if both:
        raise Refusal(f"{as_flags(both)} is also in --config_overrides. Give it once.")
    return own


__all__ = [
    "Refusal",
    "RunArguments",
    "as_flags",
    "check_architecture_options",
    "check_counts",
    "check_same_model",
    "conclude",
    "finished_weights",
    "fit",
    "given_data_files",
    "given_options",
    "own_fields",
    "parse_command_line",
    "parse_overrides",
    "plan_phases",
    "refusing_bad_values",
    "say",
    "say_size",
    "start_point",
    "wanted_phases",
]
