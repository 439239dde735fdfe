"""What a user calls: text with its thinking, and how thinking pays on held-out text."""

from .perplexity import mean_losses_by_steps, perplexity_by_steps
from .text_generation import ThoughtfulGeneration, TokenThought, generate_with_energies


__all__ = [
    "ThoughtfulGeneration",
    "TokenThought",
    "generate_with_energies",
    "mean_losses_by_steps",
    "perplexity_by_steps",
]
