"""Adapters (PEFT): what peft knows of our models, the options of the training scripts, and merging."""

from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeGuard

from .script import Refusal, as_flags, given_options


if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch import nn
    from transformers import PreTrainedModel

    from .trainer import EBTTrainer

# a model of peft's own tables with the same names for the same layers, so that every method gets what suits it
NAMED_ALIKE = {"ebt": "llama", "ebt_image": "opt"}
STEP_SIZE = "step_size"
MERGED_FOLDER = "merged"
DEFAULT_RANK = 8
# what makes the weights of one adapter mean something else in another
_SAME_ADAPTER = (
    "base_model_name_or_path",
    "peft_type",
    "r",
    "lora_alpha",
    "target_modules",
    "feedforward_modules",
    "modules_to_save",
)


def register_with_peft(constants: ModuleType | None = None) -> None:
    """
    Tell peft which layers of our models its methods adapt when nobody says so (`target_modules=None`): the query and
    value projections for LoRA and its kin, keys, values and the feed-forward layer for IA3, norms for LN tuning, ...
    Happens by itself as soon as peft is imported after this package; calling it again changes nothing.

    Args:
        constants (module, *optional*): `peft.utils.constants`, imported by default.

    Raises:
        ImportError: if peft is not installed.

    Example:

    ```python
    >>> from peft import LoraConfig, get_peft_model
    >>> from ebt_transformers import EBTConfig, EBTForCausalLM

    >>> model = EBTForCausalLM(EBTConfig.from_preset("4xs", vocab_size=32))
    >>> get_peft_model(model, LoraConfig(modules_to_save=["step_size"])).get_nb_trainable_parameters()[0]
    8193
    ```
    """
    if constants is None:
        from peft.utils import constants  # type: ignore[no-redef]
    tables = [table for name, table in vars(constants).items() if name.startswith("TRANSFORMERS_MODELS_TO_")]
    for table in tables:
        for ours, alike in NAMED_ALIKE.items():
            if alike in table:
                table.setdefault(ours, table[alike])


def is_adapted(model: "nn.Module") -> "TypeGuard[PeftModel]":
    """Whether a model is a `PeftModel`."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def check_adapters(model: "nn.Module") -> None:
    """
    Refuses adapters of a table that candidates share with tokens (`candidate_embedding="shared"`) unless it stays one
    table: an adapter of one of its two uses would leave the other behind, and peft merges adapters of both twice.

    Args:
        model (`nn.Module`): any model; all but a `PeftModel` of an [`EBTForCausalLM`] are left alone.

    Raises:
        ValueError: naming the layer, and what to do instead.
    """
    if not is_adapted(model) or not getattr(model.config, "tie_word_embeddings", False):
        return
    base = model.get_base_model()
    if not hasattr(base, "candidate_embedding"):
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    uses = {"embed_tokens": base.get_input_embeddings(), "candidate_embedding": base.get_output_embeddings()}
    adapted = [name for name, layer in uses.items() if type(layer).__module__.partition(".")[0] == "peft"]
    if len(adapted) == 1 or any(isinstance(layer, BaseTunerLayer) for layer in uses.values()):
        raise ValueError(
            f"The adapter changes {adapted[0]}, one of the two uses of a table that tokens and candidates share "
            "(`candidate_embedding='shared'`). Leave it out of `target_modules`; to train the table itself, take "
            "`modules_to_save=['embed_tokens']` with `ensure_weight_tying=True`, or `trainable_token_indices`."
        )


# ---- the training scripts --------------------------------------------------------------------------------------


@dataclass
class AdapterArguments:
    """Whether to train an adapter instead of all weights, and which."""

    peft: str | None = field(
        default=None,
        metadata={
            "help": "Train an adapter of --model_name_or_path and leave its own weights alone: lora (low-rank "
            "additions to its matrices) or ia3 (one factor for each activation, far fewer parameters)."
        },
    )
    lora_r: int | None = field(default=None, metadata={"help": f"Rank, with --peft lora. Default: {DEFAULT_RANK}."})
    lora_alpha: float | None = field(
        default=None, metadata={"help": "What is added counts alpha / rank, with --peft lora. Default: 2 x rank."}
    )
    lora_dropout: float | None = field(
        default=None,
        metadata={"help": "Share of its input dropped in training, with --peft lora. Default: 0."},
    )
    peft_target_modules: list[str] | None = field(
        default=None,
        metadata={
            "help": "Names of the layers to adapt, or all-linear. Default: lora q_proj v_proj; ia3 keys, values and "
            "feed-forward."
        },
    )
    peft_train_step_size: bool = field(
        default=False, metadata={"help": "Train the step size as well; it is saved with the adapter."}
    )
    peft_merge: bool = field(
        default=False,
        metadata={"help": f"At the end also write a full model, the adapter merged, to OUTPUT_DIR/{MERGED_FOLDER}."},
    )


LORA_ONLY = ("lora_r", "lora_alpha", "lora_dropout")
KINDS = ("lora", "ia3")


def check_adapter_arguments(arguments: AdapterArguments, model: Any, training: Any) -> None:
    """
    Refuses options that would be ignored, values out of range, and an adapter of nothing.

    Args:
        arguments ([`AdapterArguments`]): the options of the adapter.
        model: the options of the model, with `model_name_or_path`.
        training ([`EBTTrainingArguments`]): the options of training.

    Raises:
        SystemExit: with a message.
    """
    if arguments.peft is None:
        unused = given_options(arguments, (*LORA_ONLY, "peft_target_modules", "peft_train_step_size", "peft_merge"))
        if unused:
            raise Refusal(f"{as_flags(unused)} has an effect with --peft only.")
        return
    if arguments.peft not in KINDS:
        raise Refusal(f"Unknown --peft {arguments.peft!r}. Allowed: {', '.join(KINDS)}.")
    if model.model_name_or_path is None:
        raise Refusal(
            "--peft adapts a trained model, and a new one has nothing to adapt. Give --model_name_or_path with a "
            "folder or a Hub id."
        )
    if _same_folder(model.model_name_or_path, training.output_dir):
        raise Refusal(f"--output_dir {training.output_dir} is the folder of the model itself. Choose another.")
    unused = given_options(arguments, LORA_ONLY) if arguments.peft != "lora" else []
    if unused:
        raise Refusal(f"{as_flags(unused)} has an effect with --peft lora only.")
    if training.step_size_lr_multiplier is not None and not arguments.peft_train_step_size:
        raise Refusal("--step_size_lr_multiplier needs --peft_train_step_size: an adapter alone leaves the step size.")
    if arguments.lora_r is not None and arguments.lora_r < 1:
        raise Refusal(f"--lora_r must be at least 1, got {arguments.lora_r}.")
    if arguments.lora_alpha is not None and arguments.lora_alpha <= 0:
        raise Refusal(f"--lora_alpha must be above 0, got {arguments.lora_alpha:g}.")
    if arguments.lora_dropout is not None and not 0 <= arguments.lora_dropout < 1:
        raise Refusal(f"--lora_dropout must be at least 0 and below 1, got {arguments.lora_dropout:g}.")


def _same_folder(name: str, folder: str) -> bool:
    return Path(name).is_dir() and Path(name).resolve() == Path(folder).resolve()


def add_adapter(model: "PreTrainedModel", arguments: AdapterArguments, task_type: str | None = None) -> "PeftModel":
    """
    A model with a new adapter, the only part of it that learns.

    Args:
        model (`PreTrainedModel`): the trained model.
        arguments ([`AdapterArguments`]): which adapter; `peft` is set.
        task_type (`str`, *optional*): peft's name of the task, `"CAUSAL_LM"` for text.

    Returns:
        `PeftModel`.

    Raises:
        ImportError: if peft is not installed.
        ValueError: if the model has no layer of a given name, no step size to train, or one table for two uses.
    """
    try:
        from peft import get_peft_model
    except ImportError as error:
        raise ImportError("--peft needs the library peft: pip install 'ebt-transformers[peft]'.") from error
    register_with_peft()
    if arguments.peft_train_step_size and not hasattr(model, STEP_SIZE):
        raise ValueError(f"{type(model).__name__} has no step size. Leave --peft_train_step_size out.")
    config = _config(model, arguments)
    config.task_type = task_type
    adapted = get_peft_model(model, config)
    check_adapters(adapted)
    return adapted


def _config(model: "PreTrainedModel", arguments: AdapterArguments) -> "PeftConfig":
    from peft import IA3Config, LoraConfig
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING

    targets = _targets(model, arguments.peft_target_modules)
    values: dict[str, Any] = {"target_modules": targets}
    if arguments.peft_train_step_size:
        values["modules_to_save"] = [STEP_SIZE]
    if arguments.peft == "lora":
        rank = arguments.lora_r or DEFAULT_RANK
        alpha = 2 * rank if arguments.lora_alpha is None else arguments.lora_alpha
        return LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=arguments.lora_dropout or 0.0, **values)
    known = TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING.get(model.config.model_type, [])
    if targets is not None:  # of these layers IA3 scales what comes in, of the others what comes out
        values["feedforward_modules"] = [name for name in known if targets == "all-linear" or name in targets]
    return IA3Config(**values)


def _targets(model: "PreTrainedModel", names: list[str] | None) -> list[str] | str | None:
    """The layers asked for; peft would pass over those that are not there as long as it finds one."""
    if names is None or names == ["all-linear"]:
        return None if names is None else names[0]
    from torch import nn

    layers = [path for path, layer in model.named_modules() if isinstance(layer, (nn.Linear, nn.Embedding))]
    unknown = [name for name in names if not any(f".{path}".endswith(f".{name}") for path in layers)]
    if unknown:
        allowed = sorted({path.rpartition(".")[2] for path in layers})
        raise ValueError(
            f"--peft_target_modules: {type(model).__name__} has no layer {unknown[0]!r}. Allowed: all-linear, or some "
            f"of {', '.join(allowed)}."
        )
    return names


def check_same_adapter(checkpoint: str, model: "PeftModel") -> None:
    """
    Refuses a checkpoint whose adapter is another one than the model's: its weights would not fit, or mean something
    else.

    Args:
        checkpoint (`str`): folder with a saved adapter.
        model (`PeftModel`): what the options ask for.

    Raises:
        SystemExit: with a message.
    """
    from peft import PeftConfig

    saved, own = PeftConfig.from_pretrained(checkpoint), model.peft_config[model.active_adapter]
    for name in _SAME_ADAPTER:
        before, now = (_comparable(getattr(config, name, None)) for config in (saved, own))
        if before != now:
            raise Refusal(
                f"{checkpoint} holds another adapter than the options ask for ({name} is {before} there and {now} "
                "here). Start the same command again, choose another --output_dir, or --overwrite."
            )


def _comparable(value: Any) -> Any:
    """Without what makes no difference: the order of names, and how the path of a folder is written."""
    if isinstance(value, str) and Path(value).is_dir():
        return str(Path(value).resolve())
    return sorted(value) if isinstance(value, (set, list, tuple)) else value


def merge_adapter(model: "PeftModel") -> "PreTrainedModel":
    """
    The full model with the adapter merged into its weights, in place of `model.merge_and_unload()`, which for all
    methods but LoRA cannot put back a step size that was trained beside the adapter (it expects a `weight` of every
    module in `modules_to_save`; peft 0.21).

    Args:
        model (`PeftModel`): with the adapter; not to be used any more.

    Returns:
        `PreTrainedModel`, without anything of peft's.

    Example:

    ```python
    >>> from ebt_transformers import EBTConfig, EBTForCausalLM
    >>> from ebt_transformers.training.adapters import merge_adapter
    >>> from peft import IA3Config, get_peft_model

    >>> model = EBTForCausalLM(EBTConfig.from_preset("4xs", vocab_size=32))
    >>> type(merge_adapter(get_peft_model(model, IA3Config(modules_to_save=["step_size"])))).__name__
    'EBTForCausalLM'
    ```
    """
    from peft.utils import ModulesToSaveWrapper

    base = model.get_base_model()
    step_size = getattr(base, STEP_SIZE, None)
    if isinstance(step_size, ModulesToSaveWrapper):
        setattr(base, STEP_SIZE, step_size.modules_to_save[step_size.active_adapter])
    return model.merge_and_unload()


def save_merged(trainer: "EBTTrainer", folder: str | Path) -> None:
    """
    Merge the adapter of a trained model into its weights and save the full model, with tokenizer or image processor
    and model card. From then on the trainer's model is the full one.

    Args:
        trainer ([`EBTTrainer`]): its model is a `PeftModel`.
        folder (`str` or `Path`): where to.

    Raises:
        ValueError: if the trainer's model has no adapter.
    """
    from .model_card import write_model_card

    model = trainer.accelerator.unwrap_model(trainer.model)
    if not is_adapted(model):
        raise ValueError(f"{type(model).__name__} has no adapter to merge.")
    trainer.model = merge_adapter(model)
    trainer.save_model(str(folder), _internal_call=True)  # a call of the user's would push it in the adapter's place
    if trainer.is_world_process_zero():
        write_model_card(trainer, folder)


__all__ = [
    "AdapterArguments",
    "add_adapter",
    "check_adapter_arguments",
    "check_adapters",
    "check_same_adapter",
    "is_adapted",
    "merge_adapter",
    "register_with_peft",
    "save_merged",
]
