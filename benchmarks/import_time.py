"""What importing the package costs beside transformers and torch, and what the first model costs.

    python benchmarks/import_time.py

Every figure is the median over new processes, taken in turn, so that a slow minute of the machine meets all alike.
"""

import argparse
import statistics
import subprocess
import sys
from collections.abc import Sequence

from common import Results, add_common_options, command_line, machine_settings, report
from tqdm import tqdm


NAME = "import_time"
BOTH = "import torch, transformers"
SHAPE = "vocab_size=9, hidden_size=8, intermediate_size=8, num_attention_heads=2, num_hidden_layers=1"
FIRST_MODEL = f"""
from transformers import AutoConfig, AutoModelForCausalLM
AutoModelForCausalLM.from_config(AutoConfig.for_model({{!r}}, {SHAPE}))
"""
WORK = {
    BOTH: BOTH,
    f"{BOTH}, ebt_transformers": f"{BOTH}, ebt_transformers",
    "import ebt_transformers": "import ebt_transformers",
    f"{BOTH}; a first model: Llama": BOTH + FIRST_MODEL.format("llama"),
    f"{BOTH}, ebt_transformers; a first model: EBT": f"{BOTH}, ebt_transformers" + FIRST_MODEL.format("ebt"),
}
TIMED = "import time; start = time.perf_counter()\n{}\nprint(time.perf_counter() - start)"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_options(parser, NAME, text_models=False)
    parser.add_argument("--repeats", type=int, default=9, help="processes for each figure")
    return parser.parse_args(argv)


def seconds(code: str) -> float:
    """How long some code takes in a process of its own, from its first line on."""
    done = subprocess.run([sys.executable, "-c", TIMED.format(code)], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def main(argv: Sequence[str] | None = None) -> str:
    """Measures, prints the table and writes it down."""
    options = parse(argv)
    results = Results(options.results, {**machine_settings(options), "repeats": options.repeats}, fresh=True)
    taken: dict[str, list[float]] = {name: [] for name in WORK}
    for _ in tqdm(range(options.repeats), desc="rounds"):
        for name, code in WORK.items():
            taken[name].append(seconds(code))
    medians = {name: statistics.median(values) for name, values in taken.items()}
    base = medians[BOTH]
    for name, median in medians.items():
        results.append({"work": name, "seconds": median, "ratio": median / base})
    cost = medians[f"{BOTH}, ebt_transformers"] / base - 1
    return report(
        results,
        "What an import costs",
        command_line(NAME, sys.argv[1:] if argv is None else argv),
        ["work", "x torch and transformers"],
        [[name, f"{median / base:.3f}"] for name, median in medians.items()],
        f"Medians of {options.repeats} processes. Importing the package adds {100 * cost:.1f} % to transformers and "
        "torch. Its models are imported when they, or an Auto class, are first used.",
        seed="none",
    )


if __name__ == "__main__":
    main()
