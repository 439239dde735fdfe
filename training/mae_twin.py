"""
The masked autoencoder an Energy Transformer for images is compared with: the same images, patches, masks and number of
parameters. It is transformers' `ViTMAEForPreTraining`.

Shapes: ``B`` images, ``C`` channels, ``H x W`` pixels, ``N`` patches.
"""

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..configuration import EnergyTransformerConfig


if TYPE_CHECKING:
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

TOLERANCE = 0.03  # share by which the numbers of parameters may differ
FEED_FORWARD = 4  # width of the feed-forward layers over that of the tokens, as in every ViT
TOKEN_STD = 0.02  # of the CLS and the mask token at the start, as in the MAE paper's code


def mae_twin_config(
    config: EnergyTransformerConfig, encoder_layers: int = 3, decoder_layers: int = 1, **overrides: Any
) -> "ViTMAEConfig":
    """
    The masked autoencoder with as many trained parameters as an Energy Transformer has for the same images. Depth and
    heads are given; the width of the tokens follows, the same in encoder and decoder, and the feed-forward layers
    make up for what is left. Its position embeddings are fixed and do not count.

    Args:
        config ([`EnergyTransformerConfig`]): gives images, patches, masked share and the number of parameters.
        encoder_layers, decoder_layers (`int`, *optional*, default to 3 and 1): depth.
        overrides: any other field of `ViTMAEConfig`, which wins. Widths are not among them.

    Returns:
        `transformers.ViTMAEConfig`.

    Raises:
        ValueError: for images that are not square, which it cannot take, overrides of widths, no layers, and sizes
            for which no width gives the number of parameters within 3 %.

    Example:

    ```python
    >>> from ebt_transformers import EnergyTransformerConfig
    >>> from ebt_transformers.training.mae_twin import mae_twin_config

    >>> config = EnergyTransformerConfig.for_images(
    ...     hidden_size=128, num_attention_heads=4, image_size=32, patch_size=4
    ... )
    >>> twin = mae_twin_config(config)
    >>> twin.hidden_size, twin.decoder_hidden_size, twin.num_hidden_layers, twin.decoder_num_hidden_layers
    (48, 48, 3, 1)
    ```
    """
    # not at the top: only who asks for the twin waits for ViTMAE to be imported
    from transformers import ViTMAEConfig

    height, width = config.height_and_width
    if height != width:
        raise ValueError(f"The MAE twin takes square images only, got `image_size` {height} x {width}.")
    widths = [name for name in overrides if name.endswith(("hidden_size", "intermediate_size"))]
    if widths:
        raise ValueError(f"{', '.join(widths)} follows from the number of parameters. Leave it out.")
    if encoder_layers < 1 or decoder_layers < 1:
        raise ValueError(
            f"`encoder_layers` and `decoder_layers` must be at least 1, got {encoder_layers} and {decoder_layers}."
        )
    heads = overrides.get("num_attention_heads", config.num_attention_heads)
    wanted, layers = count_parameters(config), encoder_layers + decoder_layers
    numbers = config.num_channels * config.patch_size**2
    masked = max(1, round(config.mask_ratio * config.num_patches))
    # of sine and cosine embeddings in two directions, and of heads
    unit = math.lcm(4, heads, overrides.get("decoder_num_attention_heads", heads))

    def feed_forward(size: int) -> int:
        """The width that makes up for the rest."""
        base = _count(size, 0, layers, numbers)
        return round((wanted - base) / (_count(size, 1, layers, numbers) - base))

    sizes = range(unit, max(unit, config.hidden_size) + 1, unit)
    size = min(sizes, key=lambda size: abs(feed_forward(size) / size - FEED_FORWARD))
    inner = feed_forward(size)
    if inner < 1 or abs(_count(size, inner, layers, numbers) / wanted - 1) > TOLERANCE:
        raise ValueError(
            f"No width in multiples of {unit} gives {layers} layers about {wanted:,} parameters. Use fewer layers or "
            "heads, or a larger Energy Transformer."
        )
    values: dict[str, Any] = {
        "hidden_size": size,
        "decoder_hidden_size": size,
        "intermediate_size": inner,
        "decoder_intermediate_size": inner,
        "num_hidden_layers": encoder_layers,
        "decoder_num_hidden_layers": decoder_layers,
        "num_attention_heads": heads,
        "decoder_num_attention_heads": heads,
        "image_size": height,
        "patch_size": config.patch_size,
        "num_channels": config.num_channels,
        # it cuts `patches * (1 - mask_ratio)` down to a whole number: half a patch away from any error of rounding
        "mask_ratio": (masked - 0.5) / config.num_patches,
    }
    return ViTMAEConfig(**{**values, **overrides})


def count_parameters(config: EnergyTransformerConfig) -> int:
    """Trained parameters of an [`EnergyTransformerForImageCompletion`] of this config."""
    from ..modeling_et import EnergyTransformerForImageCompletion

    with torch.device("meta"):
        return sum(parameter.numel() for parameter in EnergyTransformerForImageCompletion(config).parameters())


def _count(size: int, inner: int, layers: int, numbers: int) -> int:
    """Trained parameters of a twin of one width: in all layers, and in what surrounds them."""
    attention = 4 * size * size + 4 * size
    feed_forward = 2 * size * inner + size + inner
    norms = 4 * size
    patches = (numbers + 1) * size + (size + 1) * numbers
    joint = (size + 1) * size  # from the encoder to the decoder
    return layers * (attention + feed_forward + norms) + patches + joint + 2 * size + 4 * size


def new_mae(config: "ViTMAEConfig") -> "ViTMAEForPreTraining":
    """
    A new masked autoencoder that starts as in the MAE paper's code: fixed sine and cosine positions, matrices
    Xavier-uniform, no biases. transformers (5.23) would leave all positions at zero, for ever, as they are not
    trained: then nothing tells one masked patch from another.

    Args:
        config (`transformers.ViTMAEConfig`): of [`mae_twin_config`], or another with equal widths.

    Raises:
        ValueError: for a decoder of another width than the encoder.
    """
    from transformers import ViTMAEForPreTraining

    if config.hidden_size != config.decoder_hidden_size:
        raise ValueError(
            "Encoder and decoder must have the same width, got `hidden_size` "
            f"{config.hidden_size} and `decoder_hidden_size` {config.decoder_hidden_size}."
        )
    mae = ViTMAEForPreTraining(config)
    embeddings, decoder = mae.vit.embeddings, mae.decoder
    with torch.no_grad():
        # it alone sets them again when asked to
        decoder.initialize_weights(embeddings.patch_embeddings.num_patches)
        embeddings.position_embeddings.copy_(decoder.decoder_pos_embed)
        for module in mae.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(module.weight.flatten(1))  # a view, of kernels too
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(embeddings.cls_token, std=TOKEN_STD)
        nn.init.normal_(decoder.mask_token, std=TOKEN_STD)
    return mae


def mae_twin(
    config: EnergyTransformerConfig, encoder_layers: int = 3, decoder_layers: int = 1, **overrides: Any
) -> "ViTMAEForPreTraining":
    """
    A new masked autoencoder with as many trained parameters (within 3 %) as an Energy Transformer; see [`new_mae`].

    Args:
        config, encoder_layers, decoder_layers, overrides: as in [`mae_twin_config`].

    Raises:
        ValueError: as [`mae_twin_config`].
    """
    return new_mae(mae_twin_config(config, encoder_layers, decoder_layers, **overrides))


def noise_of(mask: Tensor) -> Tensor:
    """
    What makes a masked autoencoder mask the patches of a mask, given to it as `noise`.

    Args:
        mask (`torch.BoolTensor` of shape `(B, N)`): True for masked patches, as many in every row as the model masks.

    Returns:
        `torch.FloatTensor` of shape `(B, N)`: the patches with the smallest numbers are those that it sees.
    """
    return mask.float()


@torch.no_grad()
def complete_images(mae: "ViTMAEForPreTraining", pixel_values: Tensor, mask: Tensor) -> Tensor:
    """
    Images as a masked autoencoder decodes them, all patches of them.

    Args:
        mae (`transformers.ViTMAEForPreTraining`): the model.
        pixel_values (`torch.FloatTensor` of shape `(B, C, H, W)`): whole images, normalised as in training.
        mask (`torch.BoolTensor` of shape `(B, N)`): True for the patches it does not see.

    Returns:
        `torch.FloatTensor` of shape `(B, C, H, W)`.

    Raises:
        ValueError: for masks that mask more or fewer patches than the model was made for.
    """
    patches = mask.shape[1]
    masked = patches - int(patches * (1 - mae.config.mask_ratio))
    if not bool((mask.sum(1) == masked).all()):
        raise ValueError(
            f"The model masks {masked} of {patches} patches of every image, got masks of "
            f"{', '.join(map(str, mask.sum(1).unique().tolist()))}."
        )
    output = mae(pixel_values, noise=noise_of(mask))
    if not torch.equal(output.mask.bool(), mask):  # ties of `noise` that are sorted differently would do it
        raise ValueError("The model masked other patches than those of `mask`.")
    return mae.unpatchify(output.logits).float()


__all__ = ["complete_images", "count_parameters", "mae_twin", "mae_twin_config", "new_mae", "noise_of"]
