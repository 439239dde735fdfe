"""Continue a prompt with more and more thinking, and watch the energy.

python examples/think_longer.py --prompt "ROMEO:"
"""

import argparse
from collections.abc import Sequence

from transformers import AutoModelForCausalLM, AutoTokenizer

from ebt_transformers import generate_with_energies
from ebt_transformers.assets import checkpoint_path


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(checkpoint_path()), help="a folder or a Hub id")
    parser.add_argument("--prompt", default="ROMEO:\n")
    parser.add_argument("--max_new_tokens", type=int, default=40)
    options = parser.parse_args(argv)

    model = AutoModelForCausalLM.from_pretrained(options.model).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    ways = [{"thinking_steps": 1}, {"thinking_steps": 2}, {"thinking_steps": 8}]
    ways.append({"thinking_steps": 2, "thinking_candidates": 4})  # four starts, the lowest energy wins
    for way in ways:
        (result,) = generate_with_energies(
            model, tokenizer, options.prompt, do_sample=False, max_new_tokens=options.max_new_tokens, **way
        )
        before = sum(token.energies[0] for token in result.tokens) / len(result.tokens)
        after = sum(token.energies[-1] for token in result.tokens) / len(result.tokens)
        print(f"\n{way}: mean energy {before:.3f} -> {after:.3f}\n{options.prompt}{result.text}")


if __name__ == "__main__":
    main()
