"""
The layers of the image transformer: patches, blocks as in a Diffusion Transformer (paper D.3).

Shapes: ``B`` images, ``T`` patches, ``D`` width, ``H`` heads, ``d`` width of a head.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from .configuration_ebt_image import EBTImageConfig
from .layers_common import EBTModulation, modulate, modulation_parts


class EBTImagePatches(nn.Linear):
    """
    Images to patches: a linear map of the pixels of each patch, as [`cut_patches`] gives them (a convolution without
    overlap).

    Args:
        config ([`EBTImageConfig`]): a conditional model reads the channels of the noisy image behind the candidate's.
    """

    def __init__(self, config: EBTImageConfig) -> None:
        images = 2 if config.image_conditioning == "noisy_image" else 1
        super().__init__(images * config.num_channels * config.patch_size**2, config.hidden_size)


def cut_patches(images: Tensor, size: int) -> Tensor:
    """Images (B, C, H, W) -> the pixels of their patches, row by row, (B, T, C * size * size)."""
    batch, channels, height, width = images.shape
    cut = images.reshape(batch, channels, height // size, size, width // size, size)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * size * size)


class EBTImageAttention(nn.Module):
    """Multi-head attention of all patches over all patches."""

    def __init__(self, config: EBTImageConfig) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.o_proj = nn.Linear(width, width)

    def forward(self, hidden: Tensor, with_weights: bool = False) -> tuple[Tensor, Tensor | None]:
        """Hidden (B, T, D) -> (B, T, D), and the weights (B, H, T, T) where they are asked for."""
        query, key, value = (
            projection(hidden).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        # fused kernels have no second derivative, which training needs; evaluation may use them
        if self.config._attn_implementation != "eager" and not self.training and not with_weights:
            return self.o_proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)), None
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
        weights = torch.softmax(scores.float(), dim=-1).to(value.dtype)
        mixed = (weights @ value).transpose(1, 2).flatten(2)
        return self.o_proj(mixed), weights if with_weights else None


class EBTImageMLP(nn.Module):
    """Feed-forward: fc2(act(fc1(x)))."""

    def __init__(self, config: EBTImageConfig) -> None:
        super().__init__()
        inner = config.intermediate_size or config.hidden_size
        self.fc1 = nn.Linear(config.hidden_size, inner)
        self.fc2 = nn.Linear(inner, config.hidden_size)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden (..., D) -> (..., D)."""
        return self.fc2(self.act_fn(self.fc1(hidden)))


class EBTImageLayer(nn.Module):
    """A transformer block whose norms are shifted, scaled and gated by the condition (adaLN-zero, as in DiT)."""

    def __init__(self, config: EBTImageConfig) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.attention = EBTImageAttention(config)
        self.mlp = EBTImageMLP(config)
        self.layernorm_before = nn.LayerNorm(width, eps=eps, elementwise_affine=False)
        self.layernorm_after = nn.LayerNorm(width, eps=eps, elementwise_affine=False)
        self.modulation = EBTModulation(width, 6)

    def forward(self, hidden: Tensor, condition: Tensor, with_weights: bool = False) -> tuple[Tensor, Tensor | None]:
        """
        Args:
            hidden (`Tensor` of shape `(B, T, D)`): patches.
            condition (`Tensor` of shape `(B or 1, D)`): what the norms are modulated by.
            with_weights (`bool`): also give the attention weights.
        """
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = modulation_parts(self.modulation, condition)
        mixed, weights = self.attention(modulate(self.layernorm_before(hidden), shift, scale), with_weights)
        hidden = hidden + gate * mixed
        return hidden + mlp_gate * self.mlp(modulate(self.layernorm_after(hidden), mlp_shift, mlp_scale)), weights


__all__ = [
    "EBTImageAttention",
    "EBTImageLayer",
    "EBTImageMLP",
    "EBTImagePatches",
    "cut_patches",
]
