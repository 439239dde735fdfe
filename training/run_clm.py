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

import os
import shlex
import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from .arguments import EBTTrainingArguments
    from .trainer import EBTTrainer

DEFAULT_PRESET = "4xs"
DEFAULT_BLOCK_SIZE = 256  # the paper's context length
DEFAULT_VALIDATION_PERCENT = 5.0
EBT_ONLY = (
    "step_conditioning",
    "num_landscapes",
    "step_size",
    "learn_step_size",
    "candidate_embedding",
    "candidate_anchor",
    "candidate_init",
    "update",
)


@dataclass
class ModelArguments:
    """Which model: a new one by its size, or one to train further."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Train this model further: a folder or a Hub id. Default: a new model."}
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
            "help": "Train the Transformer++ twin instead: a Llama model of the same shape, everything else equal."
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
        default=None, metadata={"help": "Where candidates start in training: normal (random) or zeros."}
    )
    update: str | None = field(
        default=None, metadata={"help": "replace (as the official code) or residual (keeps what earlier steps found)."}
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "Attention: sdpa (default) or eager."})


@dataclass
class DataArguments:
    """Which text, and how it is cut into rows."""

    dataset_name: str | None = field(
        default=None,
        metadata={"help": "A Hub id, a local folder or file, or tiny_shakespeare (embedded; the default)."},
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set."})
    train_file: list[str] | None = field(
        default=None, metadata={"help": "Training file(s): .txt, .jsonl, .json, .csv or .parquet; patterns allowed."}
    )
    validation_file: list[str] | None = field(default=None, metadata={"help": "Validation file(s)."})
    test_file: list[str] | None = field(default=None, metadata={"help": "Test file(s)."})
    streaming: bool = field(default=False, metadata={"help": "Read the data while training, without a copy on disk."})
    shuffle_buffer_size: int = field(
        default=1000, metadata={"help": "With --streaming: documents shuffled at a time; 0 keeps the order."}
    )
    text_column: str | None = field(
        default=None, metadata={"help": "Column with the text. Default: 'text', or the only one."}
    )
    text_unit: str | None = field(
        default=None,
        metadata={
            "help": "What one document of a .txt file is: document (the file; default), paragraph (default with "
            "--no_packing) or line."
        },
    )
    tokenizer_name: str | None = field(
        default=None,
        metadata={
            "help": "Tokenizer: a folder, a Hub id, or tiny_shakespeare (embedded; the default for that text). "
            "Default: that of --model_name_or_path."
        },
    )
    block_size: int | None = field(
        default=None, metadata={"help": f"Tokens per row. Default: {DEFAULT_BLOCK_SIZE}, or what the model takes."}
    )
    packing: bool = field(
        default=True,
        metadata={
            "help": "Join all documents (each ended by eos) and cut them into blocks. --no_packing: the paper's way, "
            "one row per document, its first block_size + 1 tokens, padded; eos is never predicted."
        },
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on the first so many rows."})
    max_eval_samples: int | None = field(
        default=None,
        metadata={
            "help": "Evaluate on the first so many rows. A stream without validation data gives its first so many "
            "documents to validation."
        },
    )
    validation_split_percentage: float | None = field(
        default=None,
        metadata={
            "help": f"Share of the training data held out when there is no validation data. Default: "
            f"{DEFAULT_VALIDATION_PERCENT:g}; 0 for none."
        },
    )
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Processes that tokenize."})


@dataclass
class RunArguments:
    """How the script treats its output folder."""

    overwrite: bool = field(
        default=False,
        metadata={"help": "Start afresh in an output folder with other content; removes the checkpoints in it."},
    )


class _Refusal(SystemExit):
    """An error of the user's input: the message alone, no traceback."""


@contextmanager
def _refusing_bad_values() -> Iterator[None]:
    """Errors about what the user asked for need no traceback either."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        yield
    except StrictDataclassError as error:  # a config's own check is its cause
        raise _Refusal(f"{error.__cause__ or error}") from error
    except (ValueError, TypeError, FileNotFoundError, ImportError) as error:
        raise _Refusal(f"{error}") from error


# ---- command line ----------------------------------------------------------------------------------------------


def _parse(argv: list[str]) -> tuple[ModelArguments, DataArguments, RunArguments, "EBTTrainingArguments"]:
    """Parses the command line. `--help` answers without importing torch."""
    from transformers.hf_argparser import HfArgumentParser

    own = (ModelArguments, DataArguments, RunArguments)
    look: dict[str, Any] = {"description": __doc__, "formatter_class": RawDescriptionHelpFormatter}
    if "-h" in argv or "--help" in argv:
        parser = HfArgumentParser(own, usage="ebt train clm [options]", **look)
        parser.epilog = (
            "Every option of transformers.TrainingArguments works too (--output_dir, --max_steps, --learning_rate, "
            "--per_device_train_batch_size, --resume_from_checkpoint auto, --bf16, ...), with --recipe, "
            "--step_size_lr_multiplier and --early_stopping_patience. --help_all lists them all."
        )
        parser.parse_args(["--help"])
    from .arguments import EBTTrainingArguments

    parser = HfArgumentParser((*own, EBTTrainingArguments), prog="ebt train clm", **look)
    if "--help_all" in argv:
        parser.parse_args(["--help"])
    with _refusing_bad_values():
        return parser.parse_args_into_dataclasses(argv)


def _say(message: str) -> None:
    """Tells the user, once however many processes there are."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(message, flush=True)


def _given(arguments: Any, names: tuple[str, ...]) -> list[str]:
    """Which of the options differ from their default."""
    defaults = {item.name: item.default if item.default is not MISSING else None for item in fields(arguments)}
    return [name for name in names if getattr(arguments, name) != defaults[name]]


def _flags(names: list[str]) -> str:
    return ", ".join(f"--{name}" for name in names)


def _check_arguments(model: ModelArguments, data: DataArguments, training: "EBTTrainingArguments") -> None:
    """Refuses combinations of which one half would be ignored."""
    if model.model_name_or_path is not None:
        unused = _given(model, ("preset", "twin", "config_overrides", *EBT_ONLY))
        if unused:
            raise _Refusal(
                f"{_flags(unused)} would change the architecture of {model.model_name_or_path}, which is trained "
                "further as it is. Leave them out, or leave --model_name_or_path out for a new model."
            )
    if model.twin:
        unused = _given(model, EBT_ONLY)
        if training.step_size_lr_multiplier is not None:
            unused.append("step_size_lr_multiplier")
        if unused:
            raise _Refusal(
                f"{_flags(unused)} means nothing to the twin, which does not think. Leave out one or the other."
            )
    files = _given(data, ("train_file", "validation_file", "test_file"))
    if data.dataset_name is not None and files:
        raise _Refusal(f"--dataset_name and {_flags(files)} both name the data. Give one of them.")
    if files and data.train_file is None:
        raise _Refusal(f"{_flags(files)} needs --train_file.")
    if data.dataset_config_name is not None and data.dataset_name is None:
        raise _Refusal("--dataset_config_name needs --dataset_name.")
    if data.shuffle_buffer_size < 0:
        raise _Refusal(f"--shuffle_buffer_size must be at least 0, got {data.shuffle_buffer_size}.")
    if not data.streaming and _given(data, ("shuffle_buffer_size",)):
        raise _Refusal("--shuffle_buffer_size needs --streaming; otherwise all rows are shuffled.")
    if data.streaming and data.preprocessing_num_workers is not None:
        raise _Refusal("--preprocessing_num_workers does nothing with --streaming; use --dataloader_num_workers.")
    for name in ("max_train_samples", "max_eval_samples", "preprocessing_num_workers"):
        value = getattr(data, name)
        if value is not None and value < 1:
            raise _Refusal(f"--{name} must be at least 1, got {value}.")
    if data.streaming and training.max_steps <= 0:
        raise _Refusal("A stream has no known end: say how long to train with --max_steps.")


def _start_point(training: "EBTTrainingArguments", overwrite: bool) -> str | None:
    """The checkpoint to go on from; decides what may happen to the output folder."""
    from .trainer import TRAINER_STATE, find_last_checkpoint

    folder = Path(training.output_dir)
    asked = training.resume_from_checkpoint
    if asked and overwrite:
        raise _Refusal("--resume_from_checkpoint and --overwrite contradict each other. Give one of them.")
    if asked and asked != "auto":
        if not (Path(asked) / TRAINER_STATE).is_file():
            raise _Refusal(
                f"--resume_from_checkpoint {asked}: no complete checkpoint (it has no {TRAINER_STATE}). Give a "
                "checkpoint-N folder, or auto."
            )
        _say(f"Going on from {asked}.")
        return asked
    if overwrite:
        if training.process_index == 0:
            _remove_checkpoints(folder)
        return None
    last = find_last_checkpoint(folder)
    if last is not None:
        _say(f"Found {last}: going on from there. (--overwrite starts afresh.)")
        return str(last)
    if folder.is_dir() and any(folder.iterdir()):
        raise _Refusal(
            f"The output folder {folder} has content but no complete checkpoint. Choose another --output_dir, or "
            "--overwrite."
        )
    return None


def _finished_weights(checkpoint: str, training: "EBTTrainingArguments") -> str | None:
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


def _remove_checkpoints(folder: Path) -> None:
    import shutil

    for checkpoint in sorted(folder.glob("checkpoint-*")):
        if checkpoint.is_dir() and checkpoint.name.removeprefix("checkpoint-").isdigit():
            _say(f"--overwrite: removing {checkpoint}.")
            shutil.rmtree(checkpoint)


# ---- model -----------------------------------------------------------------------------------------------------


def _parse_overrides(text: str | None, config_class: type["PreTrainedConfig"]) -> dict[str, Any]:
    """`a=1,b=gelu` to a dict; every name has to be a field of the config."""
    import json

    known = {item.name for item in fields(config_class)}
    values: dict[str, Any] = {}
    for part in (text or "").split(","):
        name, separator, value = (piece.strip() for piece in part.partition("="))
        if not part.strip():
            continue
        if not separator or name not in known:
            raise _Refusal(
                f"--config_overrides: {part.strip()!r} is no field=value of {config_class.__name__}. Fields: "
                f"{', '.join(sorted(known))}."
            )
        try:
            values[name] = json.loads({"True": "true", "False": "false", "None": "null"}.get(value, value))
        except json.JSONDecodeError:
            values[name] = value
    return values


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
    overrides = _parse_overrides(model.config_overrides, LlamaConfig if model.twin else EBTConfig)
    values: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": max(context, DEFAULT_BLOCK_SIZE),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if model.twin:
        return transformer_pp_config(preset, **{**values, **overrides})
    own = {name: getattr(model, name) for name in EBT_ONLY if getattr(model, name) is not None}
    both = sorted(set(own) & set(overrides))
    if both:
        raise _Refusal(f"{_flags(both)} is also in --config_overrides. Give it once.")
    return EBTConfig.from_preset(preset, recipe=training.recipe, **{**values, **own, **overrides})


def _build_model(model: ModelArguments, config: "PreTrainedConfig | None") -> "PreTrainedModel":
    import torch
    from transformers import AutoModelForCausalLM

    options = {} if model.attn_implementation is None else {"attn_implementation": model.attn_implementation}
    if config is None:
        # full precision weights: mixed precision is the Trainer's --bf16 and --fp16
        return AutoModelForCausalLM.from_pretrained(model.model_name_or_path, dtype=torch.float32, **options)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, **options)


def _load_tokenizer(model: ModelArguments, data: DataArguments) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    from ..assets import checkpoint_path
    from .data import EMBEDDED

    name: str | None = data.tokenizer_name or model.model_name_or_path
    if name is None and data.dataset_name == EMBEDDED:
        name = EMBEDDED
    if name is None:
        raise _Refusal(
            "Say how to cut the text into tokens: --tokenizer_name with a folder or Hub id (the paper: "
            f"EleutherAI/gpt-neox-20b), or {EMBEDDED} for the small embedded one."
        )
    return AutoTokenizer.from_pretrained(str(checkpoint_path()) if name == EMBEDDED else name)


# ---- data ------------------------------------------------------------------------------------------------------


def _load_documents(data: DataArguments) -> dict[str, Any]:
    from .data import EMBEDDED, is_stream, load_files, load_named, split_off_validation

    unit = data.text_unit or ("document" if data.packing else "paragraph")
    if data.train_file is not None:
        named = {"train": data.train_file, "validation": data.validation_file, "test": data.test_file}
        documents = load_files({split: paths for split, paths in named.items() if paths}, data.streaming, unit)
    else:
        documents = load_named(data.dataset_name or EMBEDDED, data.dataset_config_name, data.streaming, unit)
    percent = data.validation_split_percentage
    if "validation" in documents:
        if percent is not None:
            raise _Refusal(
                "--validation_split_percentage has no effect: there is validation data already. Leave it out."
            )
        return documents
    train = documents["train"]
    if is_stream(train):
        if percent:
            raise _Refusal(
                "--validation_split_percentage cannot split a stream. Use --validation_file or --max_eval_samples."
            )
        if data.max_eval_samples is not None:
            _say(f"No validation data: the first {data.max_eval_samples} documents of the stream are held out for it.")
            documents["validation"] = train.take(data.max_eval_samples)
            documents["train"] = train.skip(data.max_eval_samples)
        return documents
    percent = DEFAULT_VALIDATION_PERCENT if percent is None else percent
    if percent != 0:
        _say(f"No validation data: the last {percent:g} % of the training data are held out for it.")
        documents["train"], documents["validation"] = split_off_validation(train, percent, data.text_column)
    return documents


def _rows(
    split: str, source: Any, data: DataArguments, tokenizer: "PreTrainedTokenizerBase", block_size: int, seed: int
) -> Any:
    """One split of documents as rows for the Trainer."""
    from .data import PackedBlocks, PackedStream, TruncatedDocuments, TruncatedStream, is_stream, tokenize

    training = split == "train"
    stream = is_stream(source)
    if stream and training and data.shuffle_buffer_size:
        source = source.shuffle(seed=seed, buffer_size=data.shuffle_buffer_size)
    limit = data.max_train_samples if training else data.max_eval_samples
    tokens: Any = tokenize(
        source,
        tokenizer,
        text_column=data.text_column,
        eos=data.packing,
        max_length=None if data.packing else block_size + 1,
        num_workers=data.preprocessing_num_workers,
    )
    if stream and not data.packing:
        return TruncatedStream(tokens, limit)
    if data.packing:
        options: dict[str, Any] = {
            "keep_remainder": not training,
            "pad_token_id": tokenizer.pad_token_id,
            "max_blocks": limit,
        }
        if stream:
            return PackedStream(tokens, block_size, **options)
        blocks = PackedBlocks(tokens, block_size, **options)
        rest = blocks.dropped_tokens
        lost = f"; the last {rest} tokens fill no block and are left out" if rest else ""
        _say(f"{split}: {blocks.num_tokens:,} tokens, {len(blocks):,} blocks of {block_size}{lost}.")
        return blocks
    documents = TruncatedDocuments(tokens, limit)
    short = documents.dropped_documents
    lost = f"; {short} documents of fewer than 2 tokens predict nothing and are left out" if short else ""
    _say(f"{split}: {len(documents):,} documents, at most {block_size + 1} tokens of each{lost}.")
    return documents


# ---- run -------------------------------------------------------------------------------------------------------


def _block_size(data: DataArguments, maximum: int | None) -> int:
    """The row length; `maximum` is what an existing model takes."""
    extra = 0 if data.packing else 1
    if data.block_size is None:
        return DEFAULT_BLOCK_SIZE if maximum is None else min(DEFAULT_BLOCK_SIZE, maximum - extra)
    if data.block_size < 2:
        raise _Refusal(f"--block_size must be at least 2, got {data.block_size}.")
    if maximum is not None and data.block_size + extra > maximum:
        why = "" if data.packing else " (--no_packing needs one token more than the block)"
        raise _Refusal(
            f"--block_size {data.block_size} is too long: the model takes at most {maximum} tokens "
            f"(max_position_embeddings){why}. Use at most {maximum - extra}."
        )
    return data.block_size


def _wanted(argv: list[str], training: "EBTTrainingArguments") -> tuple[bool, bool, bool]:
    """Train, validate, test: all, unless some of --do_train, --do_eval, --do_predict are given."""
    # --eval_strategy switches do_eval on by itself, so only the command line tells what was asked for
    named = [any(word.split("=")[0] == flag for word in argv) for flag in ("--do_train", "--do_eval", "--do_predict")]
    if not any(named):
        return True, True, True
    return training.do_train, training.do_eval and named[1], training.do_predict


def _evaluate(trainer: "EBTTrainer", rows: Any, split: str) -> None:
    metrics = trainer.evaluate(rows, metric_key_prefix=split)
    trainer.log_metrics(split, metrics)
    trainer.save_metrics(split, metrics)
    name = "Validation" if split == "eval" else "Test"
    loss, value = metrics.get(f"{split}_loss"), metrics.get(f"{split}_perplexity")
    if value is not None:
        _say(f"{name}: loss {loss:.4f}, perplexity {value:.6g}")


def _run(argv: list[str]) -> None:
    model_args, data_args, run_args, training_args = _parse(argv)
    from transformers import AutoConfig, set_seed

    from .. import exports  # noqa: F401  registers the models with the Auto classes; the console script has not yet
    from ..configuration import PRESETS
    from .data import EMBEDDED, CausalLMCollator
    from .model_card import RunFacts
    from .trainer import EBTTrainer

    if not _given(data_args, ("dataset_name", "train_file", "validation_file", "test_file")):
        data_args.dataset_name = EMBEDDED
    _check_arguments(model_args, data_args, training_args)
    checkpoint = _start_point(training_args, run_args.overwrite)
    train, validate, test = _wanted(argv, training_args)
    finished = _finished_weights(checkpoint, training_args) if checkpoint else None
    if train and finished:
        _say(f"{checkpoint} has all the steps asked for: nothing to train. (--overwrite starts afresh.)")
        train, checkpoint = False, finished
    if training_args.learning_rate_is_default and model_args.model_name_or_path is None:
        preset = model_args.preset or DEFAULT_PRESET
        if preset not in PRESETS:
            raise _Refusal(f"Unknown preset {preset!r}. Allowed: {', '.join(PRESETS)}.")
        training_args.learning_rate = PRESETS[preset].learning_rate
    set_seed(training_args.seed)

    tokenizer = _load_tokenizer(model_args, data_args)
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise _Refusal("The tokenizer has neither a padding nor an end-of-sequence token. Add one to it.")
    if tokenizer.eos_token_id is None and data_args.packing:
        _say("The tokenizer has no end-of-sequence token: documents are joined without anything between them.")
    if model_args.model_name_or_path is None:
        asked = _parse_max_positions(model_args)
        block_size = _block_size(data_args, asked)
        with _refusing_bad_values():
            config = _new_config(model_args, training_args, tokenizer, block_size + (0 if data_args.packing else 1))
    else:
        config = None
        known = AutoConfig.from_pretrained(model_args.model_name_or_path)
        block_size = _block_size(data_args, getattr(known, "max_position_embeddings", None))

    with training_args.main_process_first(desc="reading the data"), _refusing_bad_values():
        documents = _load_documents(data_args)
        rows = {
            split: _rows(split, source, data_args, tokenizer, block_size, training_args.seed)
            for split, source in documents.items()
        }
    model = _build_model(model_args, config)
    if len(tokenizer) > model.config.vocab_size:
        raise _Refusal(
            f"The tokenizer has {len(tokenizer)} tokens, the model {model.config.vocab_size}. Use the model's own "
            "tokenizer."
        )
    if training_args.eval_strategy != "no" and "validation" not in rows:
        raise _Refusal("--eval_strategy needs validation data: --validation_file or --validation_split_percentage.")
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
            data=_describe(source, data_args, block_size),
            command=shlex.join(["ebt", "train", "clm", *argv]),
            base_model=model_args.model_name_or_path,
        ),
    )
    _say(f"{type(model).__name__}: {sum(p.numel() for p in model.parameters()):,} parameters.")
    if train:
        result = trainer.train(resume_from_checkpoint=checkpoint or False)
        trainer.log_metrics("train", result.metrics)
        trainer.save_metrics("train", result.metrics)
        trainer.save_state()
    elif checkpoint is not None:
        trainer._load_from_checkpoint(checkpoint)
    if validate and "validation" in rows:
        _evaluate(trainer, rows["validation"], "eval")
    if test and "test" in rows:
        _evaluate(trainer, rows["test"], "test")
    if train:
        trainer.save_model()
        _say(f"Saved to {training_args.output_dir}.")
        if training_args.push_to_hub:
            trainer.push_to_hub()
    # several processes: one that ends while threads of its group still run is aborted
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


def _parse_max_positions(model: ModelArguments) -> int | None:
    """What --config_overrides says about the longest context; without it a new model is made to fit the rows."""
    from transformers import LlamaConfig

    from ..configuration import EBTConfig

    overrides = _parse_overrides(model.config_overrides, LlamaConfig if model.twin else EBTConfig)
    return overrides.get("max_position_embeddings")


def _describe(source: str, data: DataArguments, block_size: int) -> str:
    layout = f"packed into blocks of {block_size} tokens"
    if not data.packing:
        layout = f"the first {block_size + 1} tokens of each document"
    return f"{source}, {layout}"


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
