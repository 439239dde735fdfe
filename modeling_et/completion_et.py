"""
The Energy Transformer that completes images: masked patches are found by descending the energy (arXiv 2302.07253).

Shapes: ``B`` images, ``C`` channels, ``H x W`` pixels, ``N`` patches, ``D`` width.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import initialization as init
from transformers.utils import can_return_tuple

from .checks import check_image_values, check_images
from .configuration_energy_transformer import EnergyTransformerConfig
from .energies import precise
from .outputs_et import EnergyTransformerCompletionOutput
from .positions import sincos_positions
from .thinking_ebt import ThinkingConfig
from .transformer_et import EnergyTransformerModel, EnergyTransformerPreTrainedModel


class EnergyTransformerForImageCompletion(EnergyTransformerPreTrainedModel):
    r"""
    Energy Transformer for images with masked patches. Every patch is a token; a masked one starts as the learned mask
    token, and all of them descend the energy together. The tokens are then normalised once more and decoded.

    Args:
        config ([`EnergyTransformerConfig`]): the architecture.

    Example:

    ```python
    >>> import torch
    >>> from ebt_transformers import EnergyTransformerConfig, EnergyTransformerForImageCompletion

    >>> config = EnergyTransformerConfig.for_images(
    ...     hidden_size=32, num_attention_heads=4, image_size=16, patch_size=4
    ... )
    >>> model = EnergyTransformerForImageCompletion(config).eval()
    >>> masked = torch.arange(16).expand(2, 16) < 8
    >>> output = model(torch.zeros(2, 3, 16, 16), bool_masked_pos=masked, output_energies=True)
    >>> output.reconstruction.shape, output.energies.shape
    (torch.Size([2, 3, 16, 16]), torch.Size([2, 1, 13]))
    ```
    """

    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _auto_class = "AutoModelForMaskedImageModeling"  # a saved model carries its code

    def __init__(self, config: EnergyTransformerConfig) -> None:
        super().__init__(config)
        numbers = config.num_channels * config.patch_size**2
        self.patches = nn.Linear(numbers, config.hidden_size)
        self.mask_token = nn.Parameter(torch.empty(config.hidden_size))
        self.cls_token = nn.Parameter(torch.empty(config.hidden_size))
        self.positions = nn.Parameter(torch.empty(1 + config.num_patches, config.hidden_size))
        self.model = EnergyTransformerModel(config)
        self.decoder = nn.Linear(config.hidden_size, numbers)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:
            spread = self.config.attention_initializer_range or 0.0
            for token in (self.mask_token, self.cls_token, self.positions):
                init.normal_(token, mean=0.0, std=spread)
            if self.config.position_init == "sincos":
                rows, columns = self.config.grid
                waves = sincos_positions(rows, columns, (rows, columns), self.config.hidden_size)
                # as large as random ones would be: the mean square of waves is a half
                waves = (2**0.5 * spread * waves).to(self.positions)
                init.copy_(self.positions, torch.cat([self.positions[:1], waves]))

    def get_input_embeddings(self) -> nn.Module:
        """The map from the pixels of a patch to its token."""
        return self.patches

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        bool_masked_pos: Tensor | None = None,
        scored_pos: Tensor | None = None,
        thinking: ThinkingConfig | dict[str, Any] | None = None,
        output_energies: bool | None = None,
        output_trajectory: bool | None = None,
        **kwargs: Any,
    ) -> EnergyTransformerCompletionOutput:
        """
        Args:
            pixel_values (`torch.FloatTensor` of shape `(B, C, H, W)`): whole images, normalised as in training. `H`
                and `W` are those of `config.image_size`.
            bool_masked_pos (`torch.BoolTensor` of shape `(B, N)`, *optional*): True for the patches to find: the model
                sees the mask token instead. Row by row, from the top left. None masks nothing, and gives no loss.
            scored_pos (`torch.BoolTensor` of shape `(B, N)`, *optional*): the patches that count in the loss; by
                default those masked. Training counts some visible ones as well (`config.visible_ratio`).
            thinking ([`ThinkingConfig`] or `dict`, *optional*): how to think; see [`EnergyTransformerModel.forward`].
                Its fields can also be given flat, as `thinking_steps=20`.
            output_energies (`bool`, *optional*): return `energies`.
            output_trajectory (`bool`, *optional*): return `trajectory`.

        Returns:
            [`EnergyTransformerCompletionOutput`].

        Raises:
            ValueError: for images of another size, values that are not finite or not scaled, masks of another shape,
                masks that mask or count nothing at all, and as [`EnergyTransformerModel.forward`].
        """
        self._check(pixel_values, bool_masked_pos, scored_pos)
        pixels = cut_patches(pixel_values, self.config.patch_size)
        tokens = self.patches(pixels.to(self.patches.weight.dtype))
        if bool_masked_pos is not None:
            tokens = torch.where(bool_masked_pos.bool()[..., None], self.mask_token.to(tokens.dtype), tokens)
        tokens = torch.cat([self.cls_token.to(tokens.dtype).expand(len(tokens), 1, -1), tokens], dim=1)
        walked = self.model(
            inputs_embeds=tokens + self.positions,
            thinking=thinking,
            output_energies=output_energies,
            output_trajectory=output_trajectory,
            **kwargs,
        )
        decoded = self._decode(walked.last_hidden_state)
        loss = None
        if bool_masked_pos is not None:
            loss = self._loss(decoded, pixels, bool_masked_pos if scored_pos is None else scored_pos)
        trajectory = None
        if output_trajectory:
            trajectory = self._join(self._decode(walked.trajectory).flatten(0, 1)).unflatten(0, (len(tokens), -1))
        return EnergyTransformerCompletionOutput(
            loss=loss,
            reconstruction=self._join(decoded),
            energies=walked.energies,
            steps_taken=walked.steps_taken,
            trajectory=trajectory,
        )

    def draw_masks(self, count: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """
        Random masks as in training: `config.mask_ratio` of the patches count in the loss, of which
        `config.visible_ratio` stay visible.

        Args:
            count (`int`): how many [B].
            generator (`torch.Generator`, *optional*): source of the randomness.

        Returns:
            `bool_masked_pos` and `scored_pos`, `torch.BoolTensor` of shape `(B, N)` each.
        """
        return draw_masks(self.config, count, generator)

    def _check(self, images: Tensor, masked: Tensor | None, scored: Tensor | None) -> None:
        config = self.config
        check_images(images, config.num_channels, config.patch_size)
        check_image_values(images)
        if tuple(images.shape[-2:]) != config.height_and_width:
            raise ValueError(
                f"The model completes images of {config.height_and_width[0]} x {config.height_and_width[1]} pixels "
                f"(its positions are learned), got {images.shape[-2]} x {images.shape[-1]}. The image processor "
                "resizes."
            )
        for name, mask in (("bool_masked_pos", masked), ("scored_pos", scored)):
            if mask is not None and tuple(mask.shape) != (len(images), config.num_patches):
                raise ValueError(
                    f"`{name}` must have shape ({len(images)}, {config.num_patches}): images, patches; got "
                    f"{tuple(mask.shape)}."
                )
        if scored is not None and masked is None:
            raise ValueError("`scored_pos` needs `bool_masked_pos`: without masked patches there is no loss.")
        counted = masked if scored is None else scored
        if counted is not None and not bool(counted.any()):
            raise ValueError("No patch counts in the loss: mask at least one, or leave `bool_masked_pos` out.")

    def _decode(self, tokens: Tensor) -> Tensor:
        """Tokens (..., 1 + N, D) to the pixels of patches (..., N, C * P * P)."""
        normed = self.model.norm(tokens[..., 1:, :])
        return precise(self.decoder(normed.to(self.decoder.weight.dtype)))

    def _join(self, patches: Tensor) -> Tensor:
        """Pixels of patches (B, N, C * P * P) as images (B, C, H, W)."""
        size = self.config.patch_size
        return functional.fold(patches.transpose(1, 2), self.config.height_and_width, kernel_size=size, stride=size)

    def _loss(self, decoded: Tensor, pixels: Tensor, scored: Tensor) -> Tensor:
        errors = (decoded - pixels.to(decoded.dtype)).square().mean(-1) * scored
        if self.config.completion_loss == "diluted_rmse":
            return errors.mean().sqrt()
        mean = errors.sum() / scored.sum()
        return mean if self.config.completion_loss == "mse" else mean.sqrt()


def cut_patches(images: Tensor, size: int) -> Tensor:
    """Images (B, C, H, W) -> the pixels of their patches, row by row, channel by channel, (B, N, C * size * size)."""
    return functional.unfold(images, kernel_size=size, stride=size).transpose(1, 2)


def draw_masks(
    config: EnergyTransformerConfig, count: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """
    Random masks for training, as [`EnergyTransformerForImageCompletion.draw_masks`] draws them.

    Args:
        config ([`EnergyTransformerConfig`]): says how many patches there are, and how many count and stay visible.
        count (`int`): how many masks [B].
        generator (`torch.Generator`, *optional*): source of the randomness.

    Returns:
        `bool_masked_pos` and `scored_pos`, `torch.BoolTensor` of shape `(B, N)` each; at least one patch of each image
        is masked.
    """
    patches = config.num_patches
    scored = max(1, round(config.mask_ratio * patches))
    masked = max(1, scored - round(config.visible_ratio * scored))
    places = torch.rand(count, patches, generator=generator).argsort(dim=1).argsort(dim=1)
    return places < masked, places < scored


__all__ = ["EnergyTransformerForImageCompletion", "cut_patches", "draw_masks"]
