"""
The console script `ebt`: thin sub-commands around the package.

Nothing heavy is imported before a sub-command needs it, so that help answers at once (see `__init__.py`).
"""

import difflib
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__
from .cli_options import (
    ConvertArguments,
    DemoArguments,
    DenoiseArguments,
    GenerateArguments,
    ScoreArguments,
    ThinkingArguments,
)


if TYPE_CHECKING:
    from transformers import PreTrainedModel

USER_ERRORS = (ValueError, TypeError, OSError, ImportError)
USAGE_ERROR = 2
INTERRUPTED = 130
THINKING = "thinking_"
DEFAULT_NEW_TOKENS = 100
LONGEST_SHOWN = 60  # characters of a text in a table
# options of the demonstrations, by what chooses one; without --image and --web it is that of text
DEMO_OPTIONS = {
    "": {"model", "steps", "seed", "output_dir", "prompt", "max_new_tokens", "temperature", "top_k", "blocks"},
    "--image": {"model", "steps", "seed", "output_dir", "levels"},
    "--web": {"model", "image_model", "port", "share"},
}


# ---- parsing ---------------------------------------------------------------------------------------------------


def _nearest(given: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(given, known, n=1)
    return f" Did you mean {close[0]}?" if close else ""


def _parse(command: str, kind: type, argv: list[str], positionals: dict[str, str] | None = None) -> tuple[Any, Any]:
    """Arguments of a sub-command as its dataclass, and a namespace with its positional ones (`name...`: several)."""
    from transformers.hf_argparser import HfArgumentParser

    flags = {f"--{item.name}" for item in fields(kind) if item.type is bool}
    # a flag must not take the word behind it for its value
    argv = [f"{word}=true" if word.replace("-", "_").replace("__", "--", 1) in flags else word for word in argv]
    parser = HfArgumentParser(kind, prog=f"ebt {command}", description=kind.__doc__)
    for name, description in (positionals or {}).items():
        several = name.endswith("...")
        parser.add_argument(name.removesuffix("..."), help=description, nargs="+" if several else None)
    parsed, *rest = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True, look_for_args_file=False)
    unknown = rest.pop()
    if unknown:
        names = [item.name for item in fields(kind)]
        options = [f"--{name}" for name in (*names, *(name.replace("_", "-") for name in names))]
        name = unknown[0].partition("=")[0]
        raise ValueError(f"Unknown argument {name}.{_nearest(name, options)} `ebt {command} --help` lists all.")
    return parsed, rest[0] if rest else None


# ---- sub-commands ----------------------------------------------------------------------------------------------


def _which_demo(given: dict[str, Any]) -> str:
    """Which demonstration was chosen, after a look whether it knows all the options that were given."""
    chosen = [flag for flag in DEMO_OPTIONS if flag and flag.removeprefix("--") in given]
    if len(chosen) > 1:
        raise ValueError(f"{' and '.join(chosen)} are different demonstrations. Give one of them.")
    which = chosen[0] if chosen else ""
    for name in sorted(given.keys() - DEMO_OPTIONS[which] - {which.removeprefix("--")}):
        others = [f"with {flag}" for flag, options in DEMO_OPTIONS.items() if flag and name in options]
        known_to_text = name in DEMO_OPTIONS[""]
        raise ValueError(
            f"--{name} has an effect {f'without {which}' if known_to_text else ' or '.join(others)} only."
        )
    return which


def _demo(argv: list[str]) -> int:
    arguments, _ = _parse("demo", DemoArguments, argv)
    given = {name: value for name, value in vars(arguments).items() if value is not None and value is not False}
    which = _which_demo(given)
    picture, _ = given.pop("image", None), given.pop("web", None)
    if which == "--web":
        from .web.app import launch

        launch(text_model=given.pop("model", None), **given)
    elif which == "--image":
        from .demo_image import run_image_demo

        run_image_demo(picture, **given)
    else:
        from .demo import run_demo

        run_demo(**given)
    return 0


def _check_generate(arguments: GenerateArguments) -> None:
    if arguments.max_new_tokens is not None and arguments.max_new_tokens < 1:
        raise ValueError(f"--max_new_tokens must be at least 1, got {arguments.max_new_tokens}.")
    if arguments.stream and arguments.json:
        raise ValueError("--stream and --json contradict each other. Give one of them.")
    if not arguments.sample:
        ignored = [name for name in ("temperature", "top_k", "top_p") if getattr(arguments, name) is not None]
        if ignored:
            raise ValueError(f"--{ignored[0]} has an effect with --sample only.")


def _thinking_options(arguments: ThinkingArguments, model: "PreTrainedModel") -> dict[str, Any]:
    options = {name: value for name, value in vars(arguments).items() if name.startswith(THINKING)}
    options = {name: value for name, value in options.items() if value is not None and value is not False}
    if options and not hasattr(model, "energy"):
        raise ValueError(f"{type(model).__name__} does not think: --{next(iter(options))} has no meaning for it.")
    return options


def _generate(argv: list[str]) -> int:
    positional = {"prompt": "The text to continue; - reads it from standard input."}
    arguments, given = _parse("generate", GenerateArguments, argv, positional)
    _check_generate(arguments)
    prompt = sys.stdin.read() if given.prompt == "-" else given.prompt
    import torch
    from transformers import TextStreamer

    from .demo import load_checkpoint
    from .pipelines.text_generation import check_room, generate_with_energies, room_for

    model, tokenizer = load_checkpoint(arguments.model)
    model.to(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    text = prompt or tokenizer.bos_token
    if not text:
        raise ValueError("The prompt is empty and the tokenizer has no bos token to start from. Give some text.")
    encoded = tokenizer(text, return_tensors="pt").to(model.device)
    length = encoded["input_ids"].shape[1]
    wanted = arguments.max_new_tokens or min(DEFAULT_NEW_TOKENS, max(1, room_for(model, length)))
    check_room(model, length, wanted)
    options: dict[str, Any] = {"max_new_tokens": wanted, "do_sample": arguments.sample}
    options |= {name: getattr(arguments, name) for name in ("temperature", "top_k", "top_p")}
    options = {name: value for name, value in options.items() if value is not None}
    options |= _thinking_options(arguments, model)
    if arguments.stream:
        options["streamer"] = TextStreamer(tokenizer, skip_special_tokens=True)
    torch.manual_seed(arguments.seed)
    if arguments.output_energies:
        (result,) = generate_with_energies(model, tokenizer, prompt, **options)
        record, text = result.to_dict(), result.text
    else:
        if tokenizer.pad_token_id is not None:
            options["pad_token_id"] = tokenizer.pad_token_id
        output = model.generate(**encoded, **options)
        text = tokenizer.decode(output[0, length:], skip_special_tokens=True)
        record = {"prompt": prompt, "text": text}
    if arguments.json:
        print(json.dumps(record))
        return 0
    if not arguments.stream:
        print(prompt + text)
    if arguments.output_energies:
        _print_energies(record["tokens"])
    return 0


def _print_energies(tokens: list[dict[str, Any]]) -> None:
    from .reporting import table

    count = max(len(token["energies"]) for token in tokens)
    header = ["token", "steps", "start", *(f"after {step}" for step in range(1, count))]
    rows = [
        [json.dumps(token["text"]), str(token["steps_taken"]), *(f"{energy:.4f}" for energy in token["energies"])]
        for token in tokens
    ]
    print("\n" + table(header, rows))


def _texts_to_score(arguments: ScoreArguments, given: Sequence[str]) -> list[str]:
    if arguments.file is None:
        if arguments.lines:
            raise ValueError("--lines has an effect with --file only.")
        return list(given)
    contents = [sys.stdin.read() if name == "-" else _read(Path(name)) for name in arguments.file]
    if not arguments.lines:
        return contents
    texts = [line for content in contents for line in content.splitlines() if line.strip()]
    if not texts:
        raise ValueError(f"There is no line with text in {', '.join(arguments.file)}.")
    return texts


def _read(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    return path.read_text(encoding="utf-8")


def _score(argv: list[str]) -> int:
    from_files = any(word.partition("=")[0] == "--file" for word in argv)
    positional = {} if from_files else {"text...": "The texts to score."}
    arguments, given = _parse("score", ScoreArguments, argv, positional)
    texts = _texts_to_score(arguments, [] if from_files else given.text)
    import torch

    from .demo import load_checkpoint
    from .pipelines import EnergyScoringPipeline

    model, tokenizer = load_checkpoint(arguments.model)
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    scorer = EnergyScoringPipeline(model=model, tokenizer=tokenizer, device=device)
    options = _thinking_options(arguments, model)
    for name in ("score_by", "reduction", "landscape", "max_length", "batch_size", "output_tokens"):
        options[name] = getattr(arguments, name)
    if arguments.prompt is None:
        records = scorer(texts, **options)
    else:
        found = scorer({"prompt": arguments.prompt, "continuations": texts}, **options)
        records = [found["continuations"][number] for number in found["ranking"][arguments.score_by]]
    if arguments.json:
        for record in records if arguments.prompt is None else [found]:
            print(json.dumps(record))
        return 0
    _print_scores(records, f"{arguments.reduction} of {arguments.score_by} over tokens")
    return 0


def _print_scores(records: list[dict[str, Any]], score: str) -> None:
    from .reporting import table

    names = ("relative_energy", "energy", "nll")
    columns = ["relative energy", "energy", "nats"]
    rows = [
        [_shortened(record["text"]), str(record["num_tokens"])]
        + [f"{record[name]:.4f}" for name in ("score", *(f"mean_{name}" for name in names))]
        for record in records
    ]
    print(f"Score: {score}; the others are means. Lower fits better.\n")
    print(table(["text", "tokens", "score", *columns], rows))
    for record in records:
        if "tokens" in record:
            rows = [
                [json.dumps(token["text"]), *(f"{token[name]:.4f}" for name in names)] for token in record["tokens"]
            ]
            print("\n" + table(["token", *columns], rows))


def _shortened(text: str) -> str:
    """A text as one line of a table."""
    return json.dumps(text if len(text) <= LONGEST_SHOWN else text[: LONGEST_SHOWN - 3] + "...")


def _denoise(argv: list[str]) -> int:
    positional = {"inputs...": "The pictures: files or addresses (https://...)."}
    arguments, given = _parse("denoise", DenoiseArguments, argv, positional)
    if arguments.model is None:
        raise ValueError("--model is missing: give a folder or a Hub id of a model that denoises images.")
    folder = Path(arguments.output_dir)
    targets = _denoised_files(given.inputs, folder, arguments.add_noise_level is not None)
    from .demo_image import load_denoiser

    denoiser = load_denoiser(arguments.model, arguments.device)
    options = _thinking_options(arguments, denoiser.model)
    options |= {name: getattr(arguments, name) for name in ("noise_std", "add_noise_level", "noise_seed")}
    options |= {name: getattr(arguments, name) for name in ("tile_overlap", "output_energies", "batch_size")}
    if arguments.tile_size is not None:
        options["tile_size"] = arguments.tile_size or None
    folder.mkdir(parents=True, exist_ok=True)
    results = denoiser(iter(given.inputs), **options)  # an iterator: every picture is written as soon as it is done
    for source, (target, noisy), result in zip(given.inputs, targets, results, strict=True):
        result["image"].save(target)
        record: dict[str, Any] = {"input": source, "output": str(target)}
        if noisy is not None:
            result["noisy_image"].save(noisy)
            record["noisy"] = str(noisy)
        if arguments.output_energies:
            record |= {"energies": result["energies"], "steps_taken": result["steps_taken"]}
        print(json.dumps(record) if arguments.json else _denoised_line(record), flush=True)
    return 0


def _denoised_files(inputs: Sequence[str], folder: Path, with_noisy: bool) -> list[tuple[Path, Path | None]]:
    """Where each picture goes, and its noisy version; checked before any work is done."""
    from urllib.parse import urlsplit

    sources: dict[Path, str] = {}
    names = []
    for source in inputs:
        if source.startswith(("http://", "https://")):
            names.append(Path(urlsplit(source).path).stem or "image")
            continue
        if not Path(source).is_file():
            raise FileNotFoundError(f"There is no image file {source}.")
        sources[Path(source).resolve()] = source
        names.append(Path(source).stem)
    targets = [(folder / f"{name}.png", folder / f"{name}_noisy.png" if with_noisy else None) for name in names]
    taken: set[Path] = set()
    for target in (path for pair in targets for path in pair if path is not None):
        place = target.resolve()
        if place in sources:
            raise ValueError(f"{target} would overwrite the input {sources[place]}. Choose another --output_dir.")
        if place in taken:
            raise ValueError(f"Two pictures would be written to {target}. Rename one, or denoise them one by one.")
        taken.add(place)
    return targets


def _denoised_line(record: dict[str, Any]) -> str:
    line = f"{record['input']} -> {record['output']}"
    if "noisy" in record:
        line += f" (noisy: {record['noisy']})"
    if "energies" in record:
        energies = " ".join(f"{energy:.4f}" for energy in record["energies"])
        line += f"  energies {energies}  steps {record['steps_taken']}"
    return line


def _train(argv: list[str]) -> int:
    kinds = {
        "clm": "a causal language model, or its Transformer++ twin, on text",
        "denoise": "a model that denoises images, or its Diffusion Transformer twin",
        "complete": "an Energy Transformer that completes images, or its masked autoencoder twin",
        "anomaly": "an Energy Transformer that finds anomalous nodes of a graph",
        "graph": "an Energy Transformer that classifies graphs",
    }
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: ebt train KIND [options]\n")
        print("\n".join(f"  {name:10} {summary}" for name, summary in kinds.items()))
        print("\n`ebt train KIND --help` lists the options.")
        return 0 if argv else USAGE_ERROR
    if argv[0] not in kinds:
        allowed = ", ".join(kinds)
        raise ValueError(f"Unknown kind of training {argv[0]!r}. Allowed: {allowed}.{_nearest(argv[0], list(kinds))}")
    if argv[0] == "denoise":
        from .training.run_denoise import main as run
    elif argv[0] == "complete":
        from .training.run_complete import main as run
    elif argv[0] == "anomaly":
        from .training.run_anomaly import main as run
    elif argv[0] == "graph":
        from .training.run_graph import main as run
    else:
        from .training.run_clm import main as run

    run(argv[1:])
    return 0


def _convert(argv: list[str]) -> int:
    positional = {
        "checkpoint": "Official checkpoint file (.ckpt; of the Energy Transformer .npz).",
        "output": "Folder to write, new or empty.",
    }
    arguments, given = _parse("convert", ConvertArguments, argv, positional)
    if not Path(given.checkpoint).is_file():
        raise FileNotFoundError(f"There is no checkpoint file {given.checkpoint}.")
    from .modeling_ebt.conversion_ebt import convert_checkpoint
    from .modeling_et.conversion_et import convert_energy_transformer, is_archive, is_flax

    if Path(given.checkpoint).suffix == ".npz" or is_archive(given.checkpoint) or is_flax(given.checkpoint):
        if arguments.tokenizer is not None:
            raise ValueError(
                "--tokenizer has an effect on text models only; an Energy Transformer here is for images."
            )
        config = convert_energy_transformer(given.checkpoint, given.output).config
        height, width = config.height_and_width
        print(
            f"Saved to {given.output}: an Energy Transformer for images of {height} x {width} pixels in patches of "
            f"{config.patch_size} (width {config.hidden_size}, {config.num_attention_heads} heads, "
            f"{config.num_memories} memories), and an image processor."
        )
        return 0
    convert_checkpoint(given.checkpoint, given.output, tokenizer=arguments.tokenizer)
    print(f"Saved to {given.output}.")
    return 0


def _benchmark(argv: list[str]) -> int:
    folder = Path(__file__).resolve().parent / "benchmarks"
    scripts = {
        path.stem: path for path in sorted(folder.glob("*.py")) if path.stem not in ("common", "floors", "__init__")
    }
    if not scripts:
        raise FileNotFoundError(
            "The benchmarks are not part of the installed package. Clone the repository and run them from there."
        )
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: ebt benchmark NAME [options]\n\nNames: " + ", ".join(scripts))
        print("\n`ebt benchmark NAME --help` lists the options.")
        return 0 if argv else USAGE_ERROR
    if argv[0] not in scripts:
        raise ValueError(
            f"Unknown benchmark {argv[0]!r}. Allowed: {', '.join(scripts)}.{_nearest(argv[0], [*scripts])}"
        )
    import subprocess

    return subprocess.run([sys.executable, str(scripts[argv[0]]), *argv[1:]]).returncode


def _lm_eval(argv: list[str]) -> int:
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError as error:
        raise ImportError(
            "The lm-evaluation-harness is not installed: `pip install ebt-transformers[lm-eval]`."
        ) from error
    if argv[:1] in (["-h"], ["--help"]):
        argv = ["run", *argv]  # what it does if no other command is named
    before, sys.argv = sys.argv, ["ebt lm_eval", *argv]  # it reads them itself
    try:
        cli_evaluate()
    finally:
        sys.argv = before
    return 0


def _env(argv: list[str]) -> int:
    if argv:
        asks = argv[0] in ("-h", "--help")
        print("usage: ebt env\n\nPrints the versions and devices that a bug report needs.")
        return 0 if asks else USAGE_ERROR
    from .reporting import environment

    facts = environment()
    width = max(map(len, facts))
    print("\n".join(f"{name:{width}}  {value}" for name, value in facts.items()))
    return 0


@dataclass(frozen=True)
class Command:
    """A sub-command: what it is for and what it runs; `own_debug` where `--debug` behind it means something else."""

    summary: str
    run: Callable[[list[str]], int]
    own_debug: bool = False


COMMANDS = {
    "demo": Command("what thinking does, on the embedded model", _demo),
    "generate": Command("continue a text", _generate),
    "score": Command("score texts by energy and likelihood, or rank continuations", _score),
    "denoise": Command("denoise pictures", _denoise),
    "train": Command("train a model (ebt train --help lists the kinds)", _train, own_debug=True),
    "convert": Command("turn an official checkpoint into one that from_pretrained() loads", _convert),
    "benchmark": Command("run a benchmark of this repository", _benchmark, own_debug=True),
    "lm_eval": Command("run the lm-evaluation-harness, which then knows our models", _lm_eval, own_debug=True),
    "env": Command("versions for a bug report", _env),
}


def _usage() -> str:
    lines = "\n".join(f"  {name:10} {command.summary}" for name, command in COMMANDS.items())
    return (
        "usage: ebt [--debug] COMMAND [options]\n\nEnergy-Based Transformers for Hugging Face.\n\ncommands:\n"
        f"{lines}\n\noptions:\n  -h, --help  show this message; `ebt COMMAND --help` shows that of a command\n"
        "  --version   print the version\n  --debug     show the traceback of an error"
    )


def _run(name: str, argv: list[str]) -> int:
    if name in ("", "-h", "--help"):
        print(_usage())
        return 0 if name else USAGE_ERROR
    if name == "--version":
        print(__version__)
        return 0
    if name not in COMMANDS:
        raise ValueError(f"Unknown command {name!r}.{_nearest(name, list(COMMANDS))} `ebt --help` lists all.")
    return COMMANDS[name].run(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """
    Runs the console script.

    Args:
        argv (sequence of `str`, *optional*): arguments without the program's name; `None` takes the process's own.

    Returns:
        The exit status: 0, 2 for an error of the user (one line on standard error), 130 when interrupted.
    """
    rest = list(sys.argv[1:] if argv is None else argv)
    debug = False
    while rest and rest[0] == "--debug":
        debug, rest = True, rest[1:]
    name, rest = (rest[0], rest[1:]) if rest else ("", [])
    if name in COMMANDS and not COMMANDS[name].own_debug and "--debug" in rest:
        debug, rest = True, [word for word in rest if word != "--debug"]
    try:
        status = _run(name, rest)
        sys.stdout.flush()  # here, where a reader who has gone away can still be noticed
        return status
    except KeyboardInterrupt:
        print("\nebt: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except SystemExit as leaving:
        if not isinstance(leaving.code, str):
            raise
        error: BaseException = leaving
    except USER_ERRORS as raised:
        error = raised
    if debug:
        traceback.print_exception(error)
    print(f"ebt {name}: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
    return USAGE_ERROR


if __name__ == "__main__":
    sys.exit(main())
