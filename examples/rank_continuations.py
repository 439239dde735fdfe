"""Which continuation fits best? Three judges of one model, and where they disagree.

    python examples/rank_continuations.py

The plain energy of tokens is a poor judge: it has no common zero from one position to the next. The energy of a token
less that of the model's own prediction at its place is a good one, and so is the likelihood after thinking.
"""

import argparse
from collections.abc import Sequence

from transformers import pipeline

import ebt_transformers  # noqa: F401  registers the pipeline
from ebt_transformers.assets import checkpoint_path
from ebt_transformers.reporting import table


PROMPT = "First Citizen:\nWe are"
CONTINUATIONS = (" all the people", " of the king", " zebra 42 %%", " eht lla elpoep")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--continuations", nargs="+", default=list(CONTINUATIONS))
    options = parser.parse_args(argv)

    scorer = pipeline("energy-scoring", model=str(checkpoint_path()))
    result = scorer({"prompt": options.prompt, "continuations": options.continuations}, thinking_steps=2)
    rows = [
        [repr(one["text"]), *(f"{one[f'mean_{score}']:.3f}" for score in ("energy", "relative_energy", "nll"))]
        for one in result["continuations"]
    ]
    print(f"After {options.prompt!r}, means over the tokens (lower fits better):")
    print(table(["continuation", "energy", "relative energy", "nats"], rows))
    for score, ranking in result["ranking"].items():
        print(f"Best by {score}: {options.continuations[ranking[0]]!r}")


if __name__ == "__main__":
    main()
