"""What self-verification costs: several candidates against one, with and without pruning the hopeless ones early.

    python benchmarks/self_verification.py --preset xxs --vocab-size 50277 --context 256 --threads 2

The model has random weights and generates greedily, one text at a time, through `generate()` with its cache. What is
timed is the steady state: the time between two new tokens, after the prompt has been read. Every configuration takes
turns with a single candidate of as many steps, and its ratio is the median over the turns. Rows are written to a file
as they are measured; the same command continues where it was interrupted.
"""

import argparse
import sys
from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
from common import Results, add_common_options, alternate, command_line, machine_settings, report
from generation import token_times
from transformers.utils.logging import tqdm

from ebt_transformers import EBTConfig, EBTForCausalLM


NAME = "self_verification"
HEADER = ("steps", "candidates", "kept after step 1", "ms per token", "x one candidate")
AIM = 3.0  # 8 candidates should cost less than this many times one


def configurations(options: argparse.Namespace) -> list[dict[str, int]]:
    """What is to be measured; `keep` of all candidates is no pruning."""
    found = []
    for steps, candidates in product(sorted(options.steps), sorted(options.candidates)):
        kept = [keep for keep in sorted(options.keep) if keep < candidates and steps > 1]
        found += [{"steps": steps, "candidates": candidates, "keep": keep} for keep in (candidates, *kept)]
    return found


def measure(model: EBTForCausalLM, key: dict[str, int], options: argparse.Namespace) -> dict[str, Any]:
    """One row: this configuration against a single candidate."""
    generator = torch.Generator().manual_seed(options.seed)
    prompt = torch.randint(0, options.vocab_size, (1, options.context), generator=generator).to(options.device)
    several = {"thinking_candidates": key["candidates"]}
    if key["keep"] < key["candidates"]:
        several["thinking_prune_keep"] = key["keep"]

    def own() -> list[float]:
        return token_times(model, prompt, options.new_tokens, thinking_steps=key["steps"], **several)

    def single() -> list[float]:
        return token_times(model, prompt, options.new_tokens, thinking_steps=key["steps"])

    seconds, one, ratio = alternate(own, single, options.repeats)
    return {**key, "seconds_per_token": seconds, "single_seconds_per_token": one, "ratio": ratio}


def notes(results: Results, keys: Sequence[dict[str, int]]) -> str:
    """The number to watch: what 8 candidates cost."""
    lines = ["All candidates of a token share its cached context. A pruned run looks at all of them once more."]
    for row in (results.find(**key) for key in keys):
        if row is not None and row["candidates"] == 8 and row["keep"] == 8:
            lines.append(f"At {row['steps']} steps 8 candidates cost {row['ratio']:.2f} times one (aim: {AIM:g}).")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> str:
    """Runs the benchmark and returns its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_options(parser, NAME)
    parser.add_argument("--context", type=int, default=256, help="prompt length in tokens")
    parser.add_argument("--steps", type=int, nargs="+", default=[2, 4, 8], help="numbers of thinking steps")
    parser.add_argument("--candidates", type=int, nargs="+", default=[2, 4, 8], help="numbers of candidates")
    parser.add_argument("--keep", type=int, nargs="+", default=[2], help="how many go on after the first step")
    parser.add_argument("--new-tokens", type=int, default=8, help="tokens timed in a turn")
    parser.add_argument("--repeats", type=int, default=3, help="turns")
    argv = list(sys.argv[1:] if argv is None else argv)
    options = parser.parse_args(argv)

    longest = options.context + options.new_tokens + 1
    settings = {name: getattr(options, name) for name in ("context", "new_tokens", "repeats")}
    settings = {**machine_settings(options), **settings, "max_position_embeddings": longest}
    results = Results(options.results, settings, options.fresh)
    keys = configurations(options)
    missing = [key for key in keys if results.find(**key) is None]
    if missing:
        torch.manual_seed(options.seed)
        size = {"vocab_size": options.vocab_size, "max_position_embeddings": longest}
        model = EBTForCausalLM(EBTConfig.from_preset(options.preset, **size)).to(options.device).eval()
        for key in tqdm(missing, desc=f"{len(keys) - len(missing)} rows found, measuring", unit="row"):
            results.append(measure(model, key, options))

    rows = []
    for key in keys:
        row = results.find(**key)
        kept = "all" if key["keep"] == key["candidates"] else str(key["keep"])
        time = f"{1000 * row['seconds_per_token']:.2f}"
        rows.append([str(key["steps"]), str(key["candidates"]), kept, time, f"{row['ratio']:.2f}"])
    title = f"Self-verification, preset {options.preset}, vocabulary {options.vocab_size}, context {options.context}"
    return report(results, title, command_line(NAME, argv), HEADER, rows, notes(results, keys))


if __name__ == "__main__":
    main()
