"""What a user calls: text with its thinking, how it pays on held-out text, denoised and completed pictures."""

from .completion_plots import plot_completion
from .energy_scoring import EnergyScoringPipeline
from .image_completion import ImageCompletionPipeline
from .image_denoising import ImageDenoisingPipeline
from .perplexity import mean_losses_by_steps, perplexity_by_steps
from .text_generation import ThoughtfulGeneration, TokenThought, generate_with_energies
from .text_scores import TextLosses, TokenScores, text_energies, text_losses, token_scores


__all__ = [
    "EnergyScoringPipeline",
    "ImageCompletionPipeline",
    "ImageDenoisingPipeline",
    "TextLosses",
    "ThoughtfulGeneration",
    "TokenScores",
    "TokenThought",
    "generate_with_energies",
    "mean_losses_by_steps",
    "perplexity_by_steps",
    "plot_completion",
    "text_energies",
    "text_losses",
    "token_scores",
]
