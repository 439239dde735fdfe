"""Seconds per generated token of an EBT and of its Transformer++ twin, with and without a cache.

    python benchmarks/generation.py --preset xxs --vocab-size 50277 --contexts 32 256 1024 --threads 2

Both models have random weights and generate greedily, one text at a time, through `generate()`. What is timed is the
steady state: the time between two new tokens, after the prompt has been read. Every configuration takes turns with the
cached twin, and its ratio is the median over the turns. Beside it stands the ratio of what the products of a token
read: weights, and the keys and values of the context, counted, not measured. Rows are written to a file as they are
measured; the same command continues where it was interrupted.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
from common import Results, add_common_options, alternate, command_line, machine_settings, report, synchronize
from floors import MOVE, ebt_decoding, twin_decoding
from transformers import LlamaForCausalLM, PreTrainedModel, StoppingCriteria, StoppingCriteriaList
from transformers.utils.logging import tqdm

from ebt_transformers import EBTConfig, EBTForCausalLM, transformer_pp_config


NAME = "generation"
HEADER = ("context", "cache", "model", "steps", "candidates", "ms per token", "x cached twin", "floor x twin")
AIMS = {(256, 2): 4.5, (256, 8): 14}  # context and steps: at most so many times the cached twin, with one candidate


class _Clock(StoppingCriteria):
    """Notes when each token is there; never stops."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        synchronize(self.device)
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def token_times(model: PreTrainedModel, prompt: torch.Tensor, new_tokens: int, **options: Any) -> list[float]:
    """Seconds from each new token to the next, of `new_tokens` after the first."""
    clock = _Clock(str(prompt.device))
    model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=new_tokens + 1,
        do_sample=False,
        pad_token_id=0,
        stopping_criteria=StoppingCriteriaList([clock]),
        **options,
    )
    return [later - earlier for earlier, later in zip(clock.times, clock.times[1:], strict=False)]


def configurations(options: argparse.Namespace) -> list[dict[str, Any]]:
    """What is to be measured, the small first."""
    found = []
    for context, cache in product(
        sorted(options.contexts), {"on": (True,), "off": (False,)}.get(options.cache, (1, 0))
    ):
        shared = {"context": context, "cache": bool(cache)}
        found.append({**shared, "model": "twin", "steps": 0, "candidates": 0})
        for steps, candidates in product(options.steps, options.candidates):
            found.append({**shared, "model": "ebt", "steps": steps, "candidates": candidates})
    return found


def measure(models: dict[str, PreTrainedModel], key: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """One row: this configuration against the cached twin."""
    generator = torch.Generator().manual_seed(options.seed)
    prompt = torch.randint(0, options.vocab_size, (1, key["context"]), generator=generator).to(options.device)
    thinking = {}
    if key["model"] == "ebt":
        thinking = {"thinking_steps": key["steps"], "thinking_candidates": key["candidates"]}

    def own() -> list[float]:
        return token_times(models[key["model"]], prompt, options.new_tokens, use_cache=key["cache"], **thinking)

    def reference() -> list[float]:
        return token_times(models["twin"], prompt, options.new_tokens, use_cache=True)

    seconds, twin, ratio = alternate(own, reference, options.repeats)
    return {**key, "seconds_per_token": seconds, "twin_seconds_per_token": twin, "ratio": ratio}


def layer_cache_bytes(config: EBTConfig, context: int, bytes_per_value: int = 4) -> int:
    """
    Bytes of the cached keys and values of one layer, on one landscape of an EBT: `2 A_kv C`, the same in the twin.

    Args:
        config ([`EBTConfig`]): gives the width A_kv of all key/value heads together.
        context (`int`): tokens C that are cached. The learned token that tells the landscape is not one of them.
        bytes_per_value (`int`, *optional*, defaults to 4): float32.
    """
    return bytes_per_value * 2 * config.key_value_heads * config.head_width * context


def ebt_cache_reads(config: EBTConfig, steps: int, final_energy: bool = False) -> int:
    """
    How often the EBT reads the keys and values of a layer for a token, summed over layers: `R (L - 1) + 2 K L`.

    The context stream reads those of all R landscapes that the steps walk on once, except in the last of L layers,
    where it only makes new ones (unless the descent starts at its proposal). Each of K steps reads those of one
    landscape forwards and backwards, and the energy after the last step once more. Candidates share them.

    Args:
        config ([`EBTConfig`]): the EBT's.
        steps (`int`): K.
        final_energy (`bool`, *optional*, defaults to `False`): as in [`ebt_decoding`].
    """
    layers = config.num_hidden_layers
    looking = layers if config.starts_at_prediction else layers - 1
    landscapes = max(1, min(steps, config.num_landscapes))
    return landscapes * looking + (MOVE * steps + final_energy) * layers


def floor_ratio(config: EBTConfig, context: int, steps: int, candidates: int = 1) -> float:
    """
    Bytes of weights, keys and values that the products of a token read in the EBT, over those in its cached twin.

    A ratio of bytes, and one of times only as far as both models do nothing but read from memory.

    Args:
        config ([`EBTConfig`]): the EBT's; its twin reads keys and values of every layer once.
        context (`int`): tokens that are cached: those of the prompt; the few generated ones are left out.
        steps (`int`): thinking steps.
        candidates (`int`, *optional*, defaults to 1): several need the energy after the last step, to choose by.
    """
    layer, final = layer_cache_bytes(config, context), candidates > 1
    ebt = ebt_decoding(config, steps, final) + layer * ebt_cache_reads(config, steps, final)
    return ebt / (twin_decoding(config) + layer * config.num_hidden_layers)


def notes(results: Results, keys: Sequence[dict[str, Any]]) -> str:
    """The numbers to watch: the price of thinking, and how it grows with the context where the twin's grows, too."""
    lines = [
        "A step is one forward and one backward pass of one token; candidates are descended side by side.",
        "The floor is counted: the bytes of weights, keys and values that the products of a token read, over those of "
        "the cached twin. Times can have a lower ratio where the twin spends part of its own on other things.",
    ]
    seconds = {
        (row["context"], row["steps"]): row
        for row in (results.find(**key) for key in keys)
        if row is not None and row["model"] == "ebt" and row["cache"] and row["candidates"] == 1
    }
    for (context, steps), aim in AIMS.items():
        if (context, steps) in seconds:
            ratio = seconds[context, steps]["ratio"]
            lines.append(
                f"At context {context}, {steps} steps cost {ratio:.2f} times the cached twin (aim: at most {aim:g})."
            )
    for steps in sorted({steps for _, steps in seconds}):
        contexts = sorted(context for context, count in seconds if count == steps)
        if len(contexts) > 1:
            low, high = contexts[0], contexts[-1]
            # the twin that took turns with these very rows: the machine's speed may differ between rows
            own, twin = (
                seconds[high, steps][name] / seconds[low, steps][name]
                for name in ("seconds_per_token", "twin_seconds_per_token")
            )
            thinking = "1 step" if steps == 1 else f"{steps} steps"
            lines.append(
                f"From context {low} to {high} the twin's time per token grows {twin:.2f}-fold, that of {thinking} "
                f"{own:.2f}-fold: {own / twin:.2f} of it."
            )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> str:
    """Runs the benchmark and returns its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_options(parser, NAME)
    parser.add_argument("--contexts", type=int, nargs="+", default=[32, 256, 1024], help="prompt lengths in tokens")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4, 8], help="numbers of thinking steps")
    parser.add_argument("--candidates", type=int, nargs="+", default=[1, 4], help="numbers of candidates")
    parser.add_argument("--cache", choices=("on", "off", "both"), default="both")
    parser.add_argument("--new-tokens", type=int, default=8, help="tokens timed in a turn")
    parser.add_argument("--repeats", type=int, default=3, help="turns")
    argv = list(sys.argv[1:] if argv is None else argv)
    options = parser.parse_args(argv)

    longest = max(options.contexts) + options.new_tokens + 1
    settings = {**machine_settings(options), "new_tokens": options.new_tokens, "repeats": options.repeats}
    results = Results(options.results, {**settings, "max_position_embeddings": longest}, options.fresh)
    size = {"vocab_size": options.vocab_size, "max_position_embeddings": longest}
    config = EBTConfig.from_preset(options.preset, **size)
    keys = configurations(options)
    missing = [key for key in keys if results.find(**key) is None]
    if missing:
        torch.manual_seed(options.seed)
        models = {"ebt": EBTForCausalLM(config), "twin": LlamaForCausalLM(transformer_pp_config(config))}
        models = {name: model.to(options.device).eval() for name, model in models.items()}
        for key in tqdm(missing, desc=f"{len(keys) - len(missing)} rows found, measuring", unit="row"):
            results.append(measure(models, key, options))

    rows = []
    for key in keys:
        row = results.find(**key)
        thinking = [str(row["steps"]), str(row["candidates"])] if row["model"] == "ebt" else ["", ""]
        name = "EBT" if row["model"] == "ebt" else "Transformer++"
        cache = "on" if row["cache"] else "off"
        milliseconds = f"{1000 * row['seconds_per_token']:.2f}"
        floor = ""  # without a cache the work is computing the context again, not reading
        if row["cache"]:
            ebt = row["model"] == "ebt"
            least = floor_ratio(config, row["context"], row["steps"], row["candidates"]) if ebt else 1.0
            floor = f"{least:.2f}"
        rows.append([str(row["context"]), cache, name, *thinking, milliseconds, f"{row['ratio']:.2f}", floor])
    title = f"Time per generated token, preset {options.preset}, vocabulary {options.vocab_size}"
    return report(results, title, command_line(NAME, argv), HEADER, rows, notes(results, keys))


if __name__ == "__main__":
    main()
