"""`CompletionTrainer`: training and honest evaluation of models that find masked patches."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.trainer_utils import EvalLoopOutput

from .complete_data import PixelScale
from .trainer import EBTTrainer


MASK_NAMES = ("bool_masked_pos", "noise")  # of an Energy Transformer, and of its MAE twin
LARGEST_ERROR = 1e-10  # squared, below which images count as equal


class CompletionTrainer(EBTTrainer):
    r"""
    [`EBTTrainer`] for [`EnergyTransformerForImageCompletion`] and its MAE twin, with batches of [`MaskCollator`].

    In evaluation all patches that count in the loss are hidden (in training some of them stay visible), so the numbers
    are about patches nobody has seen. They are exact means over images, whatever the batches and processes:

    - `eval_loss`: the model's loss; `eval_masked_mse`: mean squared error of masked patches on the model's scale;
    - `eval_masked_psnr`: PSNR of masked patches in dB, on pixels clamped to 0..255;
    - `eval_energy_gap`: how far the energy fell, over all blocks. Not of the twin.

    Args:
        args, kwargs: as for [`EBTTrainer`]. `processing_class`, an [`EBTImageProcessor`], tells the scale of pixels;
            without one they are -1..1.

    Attributes:
        thinking_steps (`int`, *optional*): steps in evaluation; `None`, the default, is what the model's config says.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.thinking_steps: int | None = None
        self._sums: Tensor | None = None
        # no input of the models is called labels, and without some the Trainer computes no loss in evaluation
        if self.args.label_names is None:
            self.label_names = ["pixel_values"]

    @property
    def scale(self) -> PixelScale:
        """The scale of pixels."""
        processor = self.processing_class
        return PixelScale() if processor is None else PixelScale(processor.image_mean, processor.image_std)

    def evaluate_steps(self, images: Any, steps: Sequence[int]) -> list[dict[str, float]]:
        """
        Evaluates with several numbers of thinking steps; nothing of it is logged.

        Args:
            images: as for `evaluate`.
            steps (sequence of `int`): numbers of thinking steps.

        Returns:
            `list[dict[str, float]]`: `thinking_steps`, `masked_mse`, `masked_psnr` and `energy_gap` for each.
        """
        rows: list[dict[str, float]] = []
        before = self.thinking_steps
        try:
            for count in steps:
                self.thinking_steps = count
                loader = self.get_eval_dataloader(images)
                metrics = self.evaluation_loop(loader, f"{count} steps", prediction_loss_only=True).metrics
                names = ("masked_mse", "masked_psnr", "energy_gap")
                # what shows progress ends its bar; nothing is logged
                self.callback_handler.on_predict(self.args, self.state, self.control, metrics)
                rows.append({"thinking_steps": count, **{name: metrics[f"eval_{name}"] for name in names}})
        finally:
            self.thinking_steps = before
        return rows

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The model's loss, as in the parent; in evaluation notes how near the masked patches came."""
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if not model.training:
            self._note(inputs, outputs)
        return (loss, outputs) if return_outputs else loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> Any:
        """One evaluation batch, as in the parent, with all patches hidden that count."""
        if "scored_pos" in inputs:
            inputs = {**inputs, "bool_masked_pos": inputs["scored_pos"], "output_energies": True}
            if self.thinking_steps is not None:
                inputs["thinking_steps"] = self.thinking_steps
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """The parent's loop, with the metrics above."""
        self._sums = None
        output = super().evaluation_loop(*args, **kwargs)
        if self._sums is None:
            return output
        images, mse, diluted, psnr, gap = self.accelerator.reduce(self._sums, reduction="sum").tolist()
        self._sums = None
        prefix = kwargs.get("metric_key_prefix", "eval")
        config = self.accelerator.unwrap_model(self.model).config
        losses = {"rmse": (mse / images) ** 0.5, "diluted_rmse": (diluted / images) ** 0.5}
        output.metrics[f"{prefix}_loss"] = losses.get(getattr(config, "completion_loss", "mse"), mse / images)
        output.metrics[f"{prefix}_masked_mse"] = mse / images
        output.metrics[f"{prefix}_masked_psnr"] = psnr / images
        if hasattr(config, "thinking_steps"):
            output.metrics[f"{prefix}_energy_gap"] = gap / images
        return output

    def _note(self, inputs: dict[str, Any], outputs: Any) -> None:
        """Adds the images of an evaluation batch to the sums."""
        pixels = inputs["pixel_values"]
        mask = next(inputs[name] for name in MASK_NAMES if name in inputs) > 0
        own = self._own_rows(len(pixels))  # the others only make the batches of several processes even
        errors = self._errors(outputs, pixels, mask)[:own].sum(0)
        exact = errors.to(torch.float32 if errors.device.type == "mps" else torch.float64)
        self._sums = exact if self._sums is None else self._sums + exact

    def _errors(self, outputs: Any, pixels: Tensor, mask: Tensor) -> Tensor:
        """For each image 1, MSE of its masked patches, the same over all patches, PSNR and energy gap: (B, 5)."""
        model = self.accelerator.unwrap_model(self.model)
        found = outputs["reconstruction"] if "reconstruction" in outputs else model.unpatchify(outputs["logits"])
        size = model.config.patch_size
        hidden = mask.view(-1, 1, pixels.shape[-2] // size, pixels.shape[-1] // size)
        hidden = hidden.repeat_interleave(size, -2).repeat_interleave(size, -1).expand_as(pixels)
        squares = (found.float() - pixels.float()).square() * hidden
        count = hidden.flatten(1).sum(1)
        scale = self.scale
        distance = (scale.to_bytes(found) - scale.to_bytes(pixels)).square() * hidden
        peak = 255.0**2 / (distance.flatten(1).sum(1) / count).clamp(min=LARGEST_ERROR)
        energies = outputs.get("energies")
        gap = torch.zeros_like(peak) if energies is None else (energies[..., 0] - energies[..., -1]).sum(-1)
        total = squares.flatten(1).sum(1)
        return torch.stack(
            [torch.ones_like(total), total / count, squares.flatten(1).mean(1), 10 * torch.log10(peak), gap], dim=1
        )


__all__ = ["CompletionTrainer"]
