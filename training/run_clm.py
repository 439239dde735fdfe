r"""
Train a language model on text: an Energy-Based Transformer, or its ordinary twin with `--twin`.

    ebt train clm --output_dir runs/shakespeare --preset 4xs --max_steps 2000 --eval_strategy steps --eval_steps 200

Without a data set it trains on the embedded Tiny Shakespeare. Other text:

    ebt train clm --output_dir runs/mine --train_file book.txt --tokenizer_name EleutherAI/gpt-neox-20b
    ebt train clm --output_dir runs/web --dataset_name some/hub-dataset --streaming --max_eval_samples 500 \
        --max_steps 10000 --tokenizer_name EleutherAI/gpt-neox-20b

The same command started again goes on from its last checkpoint. At the end the model is evaluated on the validation
and test data there is (`all_results.json`), and saved with tokenizer, generation config and model card.
"""

import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .adapters import MERGED_FOLDER, AdapterArguments, add_adapter, check_adapter_arguments, save_merged
from .clm_data import DEFAULT_BLOCK_SIZE, DataArguments, describe_text, load_documents, text_rows
from .data_arguments import check_source_options
from .script import (
    Refusal,
    RunArguments,
    as_flags,
    check_architecture_options,
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
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from .arguments import EBTTrainingArguments
    from .trainer import EBTTrainer

DEFAULT_PRESET = "4xs"
EBT_ONLY = (
    "step_conditioning",
    "num_landscapes",
    "step_size",
    "learn_step_size",
    "candidate_embedding",
    "candidate_anchor",
    "candidate_init",
    "proposal_loss_weight",
    "update",
    "random_step_size",
    "random_steps",
    "thinking_noise_std",
    "thinking_steps",
)


@dataclass
class ModelArguments:
    """Which model: a new one by its size, or one to train further."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Train this model further: a folder or a Hub id. Default: a new model. A Llama learns to "
            "think with --recipe proposal."
        },
    )
    preset: str | None = field(
        default=None,
        metadata={
            "help": f"Size of a new model: 4xs, 3xs, xxs, xs, small, medium, large, xl. Default: {DEFAULT_PRESET}."
        },
    )
    twin: bool = field(
        default=False,
        metadata={
            "help": "Train the Transformer++ twin instead: a Llama model, everything else equal (shape, start, data)."
        },
    )
    twin_init: str | None = field(
        default=None,
        metadata={
            "help": "Where the twin's weights start: ebt, as those of an EBT (the official code; default), or llama, "
            "N(0, 0.02) as in transformers."
        },
    )
    config_overrides: str | None = field(
        default=None,
        metadata={
            "help": "Further config fields of a new model, e.g. hidden_size=64,num_attention_heads=4,hidden_act=gelu."
        },
    )
    step_conditioning: str | None = field(
        default=None, metadata={"help": "How the energy knows the step: none, time_embed, adaln, adaln_zero."}
    )
    num_landscapes: int | None = field(
        default=None, metadata={"help": "Energy landscapes, and thinking steps in training (recipe s1: 2)."}
    )
    step_size: float | None = field(
        default=None, metadata={"help": "Initial step size (alpha; the paper: 5 to 500, recipe s1: 500)."}
    )
    learn_step_size: bool | None = field(
        default=None, metadata={"help": "Whether the step size is trained (recipe s1: yes)."}
    )
    candidate_embedding: str | None = field(
        default=None, metadata={"help": "Embedding of candidates: linear (a table of their own) or shared."}
    )
    candidate_anchor: str | None = field(
        default=None, metadata={"help": "Added to candidates: none (the paper) or token (the last context token)."}
    )
    candidate_init: str | None = field(
        default=None,
        metadata={"help": "Where candidates start: normal (random), zeros, or proposal (the context's prediction)."},
    )
    proposal_loss_weight: float | None = field(
        default=None, metadata={"help": "Weight of the loss of --candidate_init proposal itself. Default: 1."}
    )
    update: str | None = field(
        default=None, metadata={"help": "replace (as the official code) or residual (keeps what earlier steps found)."}
    )
    random_step_size: float | None = field(
        default=None,
        metadata={"help": "Draw every position's step size between alpha / this and alpha x this (recipe s2: 2)."},
    )
    random_steps: list[int] | None = field(
        default=None, metadata={"help": "FEWEST MOST: draw the thinking steps of every batch (recipe s2: 2 3)."}
    )
    thinking_noise_std: float | None = field(
        default=None,
        metadata={"help": "Noise on the logits before every step, in training and by default (recipe s2: 3)."},
    )
    thinking_steps: int | None = field(
        default=None,
        metadata={"help": "Thinking steps by default, in training too unless drawn. Default: num_landscapes (s2: 3)."},
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run the code that comes with --model_name_or_path or --tokenizer_name."}
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "Attention: sdpa (default) or eager."})


# ---- command line ----------------------------------------------------------------------------------------------


def _training_class() -> "type[EBTTrainingArguments]":
    from .arguments import EBTTrainingArguments

    return EBTTrainingArguments


def _check_arguments(model: ModelArguments, data: DataArguments, training: "EBTTrainingArguments") -> None:
    """Refuses combinations of which one half would be ignored."""
    check_architecture_options(model, training, ("preset", "twin", "config_overrides", *EBT_ONLY), EBT_ONLY)
    if model.twin_init is not None and not model.twin:
        raise Refusal("--twin_init has an effect with --twin only.")
    if model.twin_init not in (None, "ebt", "llama"):
        raise Refusal(f"--twin_init must be ebt or llama, got {model.twin_init}.")
    if model.trust_remote_code and model.model_name_or_path is None and data.tokenizer_name is None:
        raise Refusal("--trust_remote_code has an effect with --model_name_or_path or --tokenizer_name only.")
    files = given_data_files(data)
    if files and data.train_file is None:
        raise Refusal(f"{as_flags(files)} needs --train_file.")
    check_source_options(data, training)
    if data.streaming and data.preprocessing_num_workers is not None:
        raise Refusal("--preprocessing_num_workers does nothing with --streaming; use --dataloader_num_workers.")
    check_counts(data, "max_train_samples", "max_eval_samples", "preprocessing_num_workers")


# ---- model -----------------------------------------------------------------------------------------------------


def _new_config(
    model: ModelArguments,
    training: "EBTTrainingArguments",
    tokenizer: "PreTrainedTokenizerBase",
    context: int,
) -> "PreTrainedConfig":
    """Config of a new model for this tokenizer and context length."""
    from transformers import LlamaConfig

    from ..configuration import EBTConfig, transformer_pp_config

    preset = model.preset or DEFAULT_PRESET
    overrides = parse_overrides(model.config_overrides, LlamaConfig if model.twin else EBTConfig)
    values: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": max(context, DEFAULT_BLOCK_SIZE),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if model.twin:
        return transformer_pp_config(preset, **{**values, **overrides})
    own = own_fields(model, EBT_ONLY, overrides)
    return EBTConfig.from_preset(preset, recipe=training.recipe, **{**values, **own, **overrides})


def _build_model(model: ModelArguments, config: "PreTrainedConfig | None", recipe: str) -> "PreTrainedModel":
    import torch
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    from ..modeling_ebt.upcycling_ebt import OF_THE_RECIPE, ebt_from_llama
    from .llama_twin import initialize_as_ebt

    options: dict[str, Any] = {}
    if model.attn_implementation is not None:
        options["attn_implementation"] = model.attn_implementation
    if config is None:
        options["trust_remote_code"] = model.trust_remote_code
        # full precision weights: mixed precision is the Trainer's --bf16 and --fp16
        loaded = AutoModelForCausalLM.from_pretrained(model.model_name_or_path, dtype=torch.float32, **options)
        if recipe == OF_THE_RECIPE and isinstance(loaded, LlamaForCausalLM):
            with refusing_bad_values():
                return ebt_from_llama(loaded)
        return loaded
    built = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **options)
    if model.twin and model.twin_init != "llama":
        initialize_as_ebt(built)
    return built


def _load_tokenizer(model: ModelArguments, data: DataArguments) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    from ..assets import checkpoint_path
    from .data import EMBEDDED

    name: str | None = data.tokenizer_name or model.model_name_or_path
    if name is None and data.dataset_name == EMBEDDED:
        name = EMBEDDED
    if name is None:
        raise Refusal(
            "Say how to cut the text into tokens: --tokenizer_name with a folder or Hub id (the paper: "
            f"EleutherAI/gpt-neox-20b), or {EMBEDDED} for the small embedded one."
        )
    if name == EMBEDDED:
        return AutoTokenizer.from_pretrained(str(checkpoint_path()))
    return AutoTokenizer.from_pretrained(name, trust_remote_code=model.trust_remote_code)


# ---- run -------------------------------------------------------------------------------------------------------


def _block_size(data: DataArguments, maximum: int | None) -> int:
    """The row length; `maximum` is what an existing model takes."""
    extra = 0 if data.packing else 1
    if data.block_size is None:
        return DEFAULT_BLOCK_SIZE if maximum is None else min(DEFAULT_BLOCK_SIZE, maximum - extra)
    if data.block_size < 2:
        raise Refusal(f"--block_size must be at least 2, got {data.block_size}.")
    if maximum is not None and data.block_size + extra > maximum:
        why = "" if data.packing else " (--no_packing needs one token more than the block)"
        raise Refusal(
            f"--block_size {data.block_size} is too long: the model takes at most {maximum} tokens "
            f"(max_position_embeddings){why}. Use at most {maximum - extra}."
        )
    return data.block_size


def _evaluate(trainer: "EBTTrainer", rows: Any, split: str) -> None:
    metrics = trainer.evaluate(rows, metric_key_prefix=split)
    trainer.log_metrics(split, metrics)
    trainer.save_metrics(split, metrics)
    name = "Validation" if split == "eval" else "Test"
    loss, value = metrics.get(f"{split}_loss"), metrics.get(f"{split}_perplexity")
    if value is not None:
        say(f"{name}: loss {loss:.4f}, perplexity {value:.6g}")


def _run(argv: list[str]) -> None:
    own = (ModelArguments, AdapterArguments, DataArguments, RunArguments)
    parsed = parse_command_line(argv, "clm", __doc__, own, _training_class)
    model_args, adapter_args, data_args, run_args, training_args = parsed
    from transformers import AutoConfig, set_seed

    from ..configuration import PRESETS
    from .data import EMBEDDED, CausalLMCollator
    from .model_card import RunFacts
    from .trainer import EBTTrainer

    if not given_options(data_args, ("dataset_name", "train_file", "validation_file", "test_file")):
        data_args.dataset_name = EMBEDDED
    _check_arguments(model_args, data_args, training_args)
    check_adapter_arguments(adapter_args, model_args, training_args)
    checkpoint = start_point(training_args, run_args.overwrite, adapter=adapter_args.peft is not None)
    train, validate, test, checkpoint = plan_phases(argv, training_args, checkpoint)
    if training_args.learning_rate_is_default and model_args.model_name_or_path is None:
        preset = model_args.preset or DEFAULT_PRESET
        if preset not in PRESETS:
            raise Refusal(f"Unknown preset {preset!r}. Allowed: {', '.join(PRESETS)}.")
        training_args.learning_rate = PRESETS[preset].learning_rate
    set_seed(training_args.seed)

    tokenizer = _load_tokenizer(model_args, data_args)
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise Refusal("The tokenizer has neither a padding nor an end-of-sequence token. Add one to it.")
    if tokenizer.eos_token_id is None and data_args.packing:
        say("The tokenizer has no end-of-sequence token: documents are joined without anything between them.")
    if model_args.model_name_or_path is None:
        asked = _parse_max_positions(model_args)
        block_size = _block_size(data_args, asked)
        with refusing_bad_values():
            config = _new_config(model_args, training_args, tokenizer, block_size + (0 if data_args.packing else 1))
    else:
        config = None
        known = AutoConfig.from_pretrained(
            model_args.model_name_or_path, trust_remote_code=model_args.trust_remote_code
        )
        block_size = _block_size(data_args, getattr(known, "max_position_embeddings", None))

    with training_args.main_process_first(desc="reading the data"), refusing_bad_values():
        documents = load_documents(data_args)
        rows = {
            split: text_rows(split, source, data_args, tokenizer, block_size, training_args.seed)
            for split, source in documents.items()
        }
    model = _build_model(model_args, config, training_args.recipe)
    if len(tokenizer) > model.config.vocab_size:
        raise Refusal(
            f"The tokenizer has {len(tokenizer)} tokens, the model {model.config.vocab_size}. Use the model's own "
            "tokenizer."
        )
    if adapter_args.peft is not None:
        with refusing_bad_values():
            model = add_adapter(model, adapter_args, task_type="CAUSAL_LM")
    if training_args.eval_strategy != "no" and "validation" not in rows:
        raise Refusal("--eval_strategy needs validation data: --validation_file or --validation_split_percentage.")
    streams_padded = data_args.streaming and not data_args.packing  # rows of several processes need one length
    source = data_args.dataset_name or " ".join(data_args.train_file or [])
    trainer = EBTTrainer(
        model,
        training_args,
        train_dataset=rows["train"],
        eval_dataset=rows.get("validation"),
        processing_class=tokenizer,
        data_collator=CausalLMCollator(tokenizer.pad_token_id, block_size + 1 if streams_padded else None),
        run_facts=RunFacts(
            data=describe_text(source, data_args, block_size),
            dataset=None if source == EMBEDDED else data_args.dataset_name,
            command=shlex.join(["ebt", "train", "clm", *argv]),
            base_model=model_args.model_name_or_path,
        ),
    )
    if checkpoint is not None:
        check_same_model(checkpoint, model)
    say_size(model)
    fit(trainer, train, checkpoint)
    if validate and "validation" in rows:
        _evaluate(trainer, rows["validation"], "eval")
    if test and "test" in rows:
        _evaluate(trainer, rows["test"], "test")
    if train:
        trainer.save_model()
        say(f"Saved to {training_args.output_dir}.")
        if training_args.push_to_hub:
            trainer.push_to_hub()
    if adapter_args.peft_merge:
        save_merged(trainer, Path(training_args.output_dir) / MERGED_FOLDER)
    conclude(trainer)


def _parse_max_positions(model: ModelArguments) -> int | None:
    """What --config_overrides says about the longest context; without it a new model is made to fit the rows."""
    from transformers import LlamaConfig

    from ..configuration import EBTConfig

    overrides = parse_overrides(model.config_overrides, LlamaConfig if model.twin else EBTConfig)
    return overrides.get("max_position_embeddings")


def main(argv: list[str] | None = None) -> None:
    """
    Run the script.

    Args:
        argv (`list[str]`, *optional*): command line without the program's name; `None` takes the process's own.

    Raises:
        SystemExit: after `--help`, and with a message for options that contradict each other.
        FileNotFoundError, ValueError: for data or options that do not work, saying which are allowed.
    """
    _run(sys.argv[1:] if argv is None else list(argv))


if __name__ == "__main__":
    main()
