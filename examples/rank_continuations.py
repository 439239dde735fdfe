"""Which continuation fits best? Two judges of one model: the energy of the tokens, and the prediction it thinks up.

    python examples/rank_continuations.py

The energy scores a candidate at once. The prediction is found by descending that energy, and gives a candidate a
probability. For the shipped model the second is the better judge: it was trained to end its descent well, never to
rank tokens by their energy.
"""

import argparse
from collections.abc import Sequence

import torch
from transformers import AutoTokenizer

from ebt_transformers import EBTForCausalLM
from ebt_transformers.assets import checkpoint_path
from ebt_transformers.reporting import table


PROMPT = "First Citizen:\nWe are"
CONTINUATIONS = (" all the people", " of the king", " zebra 42 %%", " eht lla elpoep")


@torch.no_grad()
def judge(model: EBTForCausalLM, ids: torch.Tensor, first: int, steps: int) -> tuple[float, float]:
    """Mean energy, and mean nats of surprise, of the tokens of (1, S) from position `first` on. Lower fits better."""
    energies = model.energy(ids[:, :-1], candidate_ids=ids[:, 1:])
    log_probs = model(ids[:, :-1], thinking_steps=steps).logits.log_softmax(-1)
    surprise = -log_probs.gather(-1, ids[:, 1:, None]).squeeze(-1)
    return energies[0, first - 1 :].mean().item(), surprise[0, first - 1 :].mean().item()


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--continuations", nargs="+", default=list(CONTINUATIONS))
    parser.add_argument("--steps", type=int, default=2, help="thinking steps of the prediction")
    options = parser.parse_args(argv)
    model = EBTForCausalLM.from_pretrained(checkpoint_path()).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint_path())

    first = len(tokenizer(options.prompt)["input_ids"])
    rows = []
    for text in options.continuations:
        ids = tokenizer(options.prompt + text, return_tensors="pt")["input_ids"]
        energy, surprise = judge(model, ids, first, options.steps)
        rows.append((surprise, [repr(text), f"{energy:.3f}", f"{surprise:.3f}"]))
    print(f"After {options.prompt!r}, by surprise:")
    print(table(["continuation", "mean energy", "nats per token"], [row for _, row in sorted(rows)]))


if __name__ == "__main__":
    main()
