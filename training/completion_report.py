"""What `ebt train complete` leaves for a reader: pictures of completed validation images, and a table of steps."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..reporting import table
from .complete_data import mask_generator


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..modeling_ebt.image_processing_ebt import EBTImageProcessor

PICTURE = "completion.png"
EXAMPLES = 4


def draw_examples(
    model: "PreTrainedModel",
    processor: "EBTImageProcessor",
    images: Any,
    path: Path,
    count: int = EXAMPLES,
) -> Path:
    """
    Draws completed images, spread over a data set, each with the mask it is evaluated with.

    Args:
        model ([`EnergyTransformerForImageCompletion`]): completes them; in evaluation mode afterwards.
        processor ([`EBTImageProcessor`]): of the model.
        images ([`Images`]): the images.
        path (`Path`): the picture to write.
        count (`int`, *optional*, defaults to 4): how many images.

    Returns:
        `Path` of the picture.

    Raises:
        ImportError: without matplotlib.
    """
    from ..modeling_et.completion_et import draw_masks
    from ..pipelines import ImageCompletionPipeline, plot_completion

    completer = ImageCompletionPipeline(model=model, image_processor=processor, device=model.device)
    taken = min(count, len(images))
    items = [images[number * len(images) // taken] for number in range(taken)]
    pictures = [((item.pixels + 1) / 2).clamp(0, 1) for item in items]
    masks = [draw_masks(model.config, 1, mask_generator(item.key))[1][0] for item in items]
    found = completer(pictures, mask=masks, batch_size=taken, output_energies=True, output_trajectory=True)
    plot_completion(found, path)
    return path


def steps_table(rows: Sequence[Mapping[str, float]], trained: int) -> str:
    """
    Quality by thinking steps, as a table for the terminal.

    Args:
        rows (sequence of `dict`): of [`CompletionTrainer.evaluate_steps`].
        trained (`int`): the steps of training; its row is marked.
    """
    cells = [
        [
            f"{row['thinking_steps']}{' (trained)' if row['thinking_steps'] == trained else ''}",
            f"{row['masked_mse']:.5f}",
            f"{row['masked_psnr']:.3f}",
            f"{row['energy_gap']:.5g}",
        ]
        for row in rows
    ]
    return table(["thinking steps", "masked MSE", "masked PSNR (dB)", "energy gap"], cells)


__all__ = ["EXAMPLES", "PICTURE", "draw_examples", "steps_table"]
