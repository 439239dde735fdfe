"""What a user calls: text with its thinking, how thinking pays on held-out text, and denoised pictures."""

from .energy_scoring import EnergyScoringPipeline
from .image_denoising import ImageDenoisingPipeline
from .perplexity import mean_losses_by_steps, perplexity_by_steps
from .text_generation import ThoughtfulGeneration, TokenThought, generate_with_energies
from .text_scores import TextLosses, TokenScores, text_energies, text_losses, token_scores


__all__ = [
    "EnergyScoringPipeline",
    "ImageDenoisingPipeline",
    "TextLosses",
    "ThoughtfulGeneration",
    "TokenScores",
    "TokenThought",
    "generate_with_energies",
    "mean_losses_by_steps",
    "perplexity_by_steps",
    "text_energies",
    "text_losses",
    "token_scores",
]
