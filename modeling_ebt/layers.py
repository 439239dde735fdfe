"""
The two-stream transformer layer.

Context tokens run an ordinary causal transformer. Candidates run through the same weights, but each attends to the
context up to its own position and to itself, never to another candidate (paper 3.4 and C.3). Shapes: ``B`` rows, ``S``
context tokens, ``N`` candidates, ``D`` width, ``H`` heads, ``C`` key columns.
"""

from collections.abc import Callable

from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaRMSNorm,
    eager_attention_forward,
    repeat_kv,
)

from .configuration_ebt import EBTConfig
from .fused import joint_softmax, normalize, rotate
from .layers_common import EBTModulation, modulate, modulation_parts


def candidate_attention(
    query: Tensor,
    own_key: Tensor,
    own_value: Tensor,
    key: Tensor,
    value: Tensor,
    hidden: Tensor | None,
    scaling: float,
) -> Tensor:
    """
    Attention of candidates over the context and themselves: one softmax over both, no square matrix of candidates.

    Plain matrix products, because it is differentiated twice in training and fused kernels have no second derivative.

    Args:
        query (`Tensor` of shape `(B, H, N, d)`): candidate queries.
        own_key, own_value (`Tensor` of shape `(B, H_kv, N, d)`): every candidate's own key and value.
        key, value (`Tensor` of shape `(B, H_kv, C, d)`): context keys and values.
        hidden (`Tensor` of shape `(B or 1, 1, N, C)`, *optional*): True where a candidate may not look.
        scaling (`float`): 1/sqrt(d).

    Returns:
        Mixed values (B, H, N, d).
    """
    batch, heads, candidates, width = query.shape
    kv_heads = key.shape[1]
    groups = heads // kv_heads
    query = query * scaling
    # heads that share a key are more rows of the same product: nothing is repeated
    scores = query.reshape(batch, kv_heads, groups * candidates, width) @ key.transpose(-1, -2)
    scores = scores.view(batch, heads, candidates, -1).float()
    own_score = (query * repeat_kv(own_key, groups)).sum(-1, keepdim=True).float()
    weights, own_weight = (part.to(query.dtype) for part in joint_softmax(scores, own_score, hidden))
    mixed = weights.reshape(batch, kv_heads, groups * candidates, -1) @ value
    return mixed.view(batch, heads, candidates, width) + own_weight * repeat_kv(own_value, groups)


class EBTAttention(nn.Module):
    """Multi-head attention with rotary positions for both streams, sharing all weights."""

    def __init__(self, config: EBTConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        heads, kv_heads, width = config.num_attention_heads, config.key_value_heads, config.head_width
        self.head_dim = width
        self.num_key_value_groups = heads // kv_heads
        self.scaling = width**-0.5
        self.is_causal = True
        self.q_proj = nn.Linear(config.hidden_size, heads * width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_heads * width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_heads * width, bias=False)
        self.o_proj = nn.Linear(heads * width, config.hidden_size, bias=False)

    def _heads(self, projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def project(
        self, hidden: Tensor, position_embeddings: tuple[Tensor, Tensor], with_query: bool = True
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Query (B, H, S, d), key and value (B, H_kv, S, d), rotated to their positions."""
        key, value = self._heads(self.k_proj(hidden)), self._heads(self.v_proj(hidden))
        cos, sin = (part.unsqueeze(1) for part in position_embeddings)
        key = rotate(key, cos, sin)
        return rotate(self._heads(self.q_proj(hidden)), cos, sin) if with_query else key, key, value

    def attend_context(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Causal attention of the context stream, through the backend chosen with `attn_implementation`."""
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        mixed, weights = attention(self, query, key, value, mask, dropout=0.0, scaling=self.scaling)
        return self.o_proj(mixed.flatten(2)), weights

    def attend_candidates(
        self, query: Tensor, own_key: Tensor, own_value: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None
    ) -> Tensor:
        """Attention of the candidate stream over the context's keys and each candidate's own."""
        mixed = candidate_attention(query, own_key, own_value, key, value, hidden, self.scaling)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class EBTRMSNorm(LlamaRMSNorm):
    """Llama's RMS norm, by a function that is cheaply differentiated twice."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden (..., D) -> (..., D); the norm itself is computed in float32."""
        return self.weight * normalize(hidden.float(), self.variance_epsilon).to(hidden.dtype)


class EBTMLP(nn.Module):
    """Gated feed-forward: down(act(gate(x)) * up(x)), without biases."""

    def __init__(self, config: EBTConfig) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.feed_forward_width
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden (..., D) -> (..., D)."""
        return self.down_proj(self.act_fn(self.gate_proj(hidden)) * self.up_proj(hidden))


class EBTDecoderLayer(nn.Module):
    """A pre-norm transformer layer for both streams, optionally modulated by the step (adaLN)."""

    def __init__(self, config: EBTConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = EBTAttention(config, layer_idx)
        self.mlp = EBTMLP(config)
        self.input_layernorm = EBTRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = EBTRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.modulation = EBTModulation(config.hidden_size, 6) if config.is_modulated else None

    def forward(
        self,
        hidden: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        mask: Tensor | None,
        condition: Tensor | None = None,
        context: tuple[Tensor, Tensor] | None = None,
        extend_cache: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
        keys_only: bool = False,
    ) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None]:
        """
        Args:
            hidden (`Tensor` of shape `(B, S, D)`): context tokens, or candidates (B, N, D) when `context` is given.
            position_embeddings: cosines and sines of the rotary positions of `hidden`.
            mask: for context tokens what each may look at, as their attention takes it; for candidates
                `(B or 1, 1, N, C)`, True where one may not look.
            condition (`Tensor` of shape `(B or 1, D)`, *optional*): embedding of the step, for adaLN.
            context (`tuple` of two `(B, H_kv, C, d)`, *optional*): keys and values candidates attend to.
            extend_cache (`Callable`, *optional*): puts the new keys and values behind the cached ones.
            keys_only (`bool`): stop after the keys and values; nothing reads the rest of the last context layer.

        Returns:
            Hidden states after the layer, keys and values attended to (context) or owned (candidates), and the
            attention weights where the backend gives them.
        """
        modulation = None
        if self.modulation is not None and condition is not None:  # a modulated layer is always given one
            modulation = modulation_parts(self.modulation, condition)
        normed = self.input_layernorm(hidden)
        if modulation is not None:
            normed = modulate(normed, modulation[0], modulation[1])
        query, key, value = self.self_attn.project(normed, position_embeddings, with_query=not keys_only)
        if extend_cache is not None:
            key, value = extend_cache(key, value)
        if keys_only:
            return None, key, value, None
        if context is None:
            attended, weights = self.self_attn.attend_context(query, key, value, mask)
        else:
            attended, weights = self.self_attn.attend_candidates(query, key, value, *context, mask), None
        if modulation is None:
            hidden = hidden + attended
            hidden = hidden + self.mlp(self.post_attention_layernorm(hidden))
        else:
            hidden = hidden + modulation[2] * attended
            normed = modulate(self.post_attention_layernorm(hidden), modulation[3], modulation[4])
            hidden = hidden + modulation[5] * self.mlp(normed)
        return hidden, key, value, weights


__all__ = [
    "EBTMLP",
    "EBTAttention",
    "EBTDecoderLayer",
    "EBTRMSNorm",
    "candidate_attention",
]
