"""
The image transformer: candidates in, an energy for every patch out.

Shapes: ``B`` images, ``C`` channels, ``H x W`` pixels, ``T`` patches, ``D`` width.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.utils import can_return_tuple

from .checks import check_images
from .configuration_ebt_image import EBTImageConfig
from .layers_common import EBTEnergyHead, EBTModulation, EBTStepSize, head_energies, modulate, modulation_parts
from .layers_image import EBTImageLayer, EBTImagePatches, cut_patches
from .outputs import EBTImageModelOutput
from .positions import sincos_positions
from .pretrained import EBTBasePreTrainedModel


class EBTImagePreTrainedModel(EBTBasePreTrainedModel):
    """Loading, saving and initialisation shared by the image models."""

    config: EBTImageConfig
    config_class = EBTImageConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _no_split_modules = ["EBTImageLayer"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, (EBTModulation, EBTEnergyHead)):
            # every block starts as the identity and the energy flat (adaLN-zero)
            for parameter in module.parameters():
                init.zeros_(parameter)
        elif isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
        elif isinstance(module, EBTStepSize):
            init.constant_(module.value, float(self.config.step_size))


class EBTImageModel(EBTImagePreTrainedModel):
    r"""
    The image transformer: an image in, an energy for each of its patches out (lower fits better).

    Args:
        config ([`EBTImageConfig`]): the architecture.

    Example:

    ```python
    >>> import torch
    >>> from ebt_transformers import EBTImageConfig, EBTImageModel

    >>> model = EBTImageModel(EBTImageConfig.from_preset("4xs", image_size=32, patch_size=4)).eval()
    >>> model(torch.zeros(2, 3, 32, 32)).energies.shape
    torch.Size([2, 64])
    ```
    """

    _auto_class = "AutoModel"  # a saved model carries its code

    def __init__(self, config: EBTImageConfig) -> None:
        super().__init__(config)
        self.patches = EBTImagePatches(config)
        # the condition of every landscape; the paper has one
        self.step_embeddings = nn.Embedding(config.num_landscapes, config.hidden_size)
        self.layers = nn.ModuleList([EBTImageLayer(config) for _ in range(config.num_hidden_layers)])
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, elementwise_affine=False)
        self.final_modulation = EBTModulation(config.hidden_size, 2)
        self.energy_head = EBTEnergyHead(config.hidden_size)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The map from the pixels of a patch to its first hidden state."""
        return self.patches

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        noisy_pixel_values: Tensor | None = None,
        landscape: int = 0,
        condition: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> EBTImageModelOutput:
        """
        Args:
            pixel_values (`torch.FloatTensor` of shape `(B, C, H, W)`): images (or latents) to judge.
            noisy_pixel_values (`torch.FloatTensor` of shape `(B, C, H, W)`, *optional*): the noisy images they are
                candidates for; needed by, and only by, models with `image_conditioning="noisy_image"`.
            landscape (`int`, *optional*, defaults to 0): the energy landscape to judge on.
            condition (`torch.FloatTensor` of shape `(B or 1, D)`, *optional*): modulates the norms instead of the
                landscape's learned vector.
            output_hidden_states, output_attentions (`bool`, *optional*): return those of every layer.

        Returns:
            [`EBTImageModelOutput`].

        Raises:
            ValueError: for images of the wrong shape, a missing or superfluous noisy image, or a landscape the model
                does not have.
        """
        config = self.config
        check_images(pixel_values, config.num_channels, config.patch_size)
        if (noisy_pixel_values is not None) != (config.image_conditioning == "noisy_image"):
            raise ValueError(
                f"`noisy_pixel_values` {'is missing' if noisy_pixel_values is None else 'was given'}, but the model "
                f"has `image_conditioning={config.image_conditioning!r}`."
            )
        if noisy_pixel_values is not None:
            if noisy_pixel_values.shape != pixel_values.shape:
                raise ValueError(
                    f"`noisy_pixel_values` must have the shape of `pixel_values`, {tuple(pixel_values.shape)}, got "
                    f"{tuple(noisy_pixel_values.shape)}."
                )
            pixel_values = torch.cat([pixel_values, noisy_pixel_values.to(pixel_values.dtype)], dim=1)
        if not 0 <= landscape < config.num_landscapes:
            raise ValueError(f"`landscape` must be between 0 and {config.num_landscapes - 1}, got {landscape}.")
        if condition is None:
            condition = self.step_embeddings(torch.arange(landscape, landscape + 1, device=pixel_values.device))
        with_hidden = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        with_weights = bool(config.output_attentions if output_attentions is None else output_attentions)

        rows, columns = (side // config.patch_size for side in pixel_values.shape[-2:])
        hidden = self.patches(cut_patches(pixel_values, config.patch_size))
        positions = sincos_positions(rows, columns, config.grid, config.hidden_size)
        hidden = hidden + positions.to(device=hidden.device, dtype=hidden.dtype)
        all_hidden, all_weights = [hidden], []
        # a descent asks for the gradient in the image; it recomputes whole steps, not layers
        recompute = self.gradient_checkpointing and self.training and not pixel_values.requires_grad
        for layer in self.layers:
            call: Callable = (
                functools.partial(self._gradient_checkpointing_func, layer.__call__) if recompute else layer
            )
            hidden, weights = call(hidden, condition, with_weights)
            all_hidden.append(hidden)
            all_weights.append(weights)
        normed = modulate(self.norm(hidden), *modulation_parts(self.final_modulation, condition))
        return EBTImageModelOutput(
            last_hidden_state=hidden,
            energies=head_energies(self.energy_head, normed),
            hidden_states=tuple(all_hidden) if with_hidden else None,
            attentions=tuple(all_weights) if with_weights else None,
        )


__all__ = ["EBTImageModel", "EBTImagePreTrainedModel"]
