"""
The energies an Energy Transformer descends, each with its gradient in closed form (arXiv 2302.07253).

Shapes: ``N`` tokens, ``D`` width, ``H`` heads, ``Y`` width of a head, ``K`` memories, ``E`` edges. Dense tokens are
``(B, N, D)``, those of a graph ``(N, D)``. `g` are the normalised tokens; gradients are those in `g`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .configuration_energy_transformer import EnergyTransformerConfig
from .edges import Edges


class EnergyLayerNorm(nn.Module):
    r"""
    Layer norm that is the gradient of a Lagrangian (eq. 1-2): a scalar gain [gamma] and a bias [delta] of width D.

    Its Jacobian is symmetric, and positive semi-definite for a gain of at least 0: then a step against the energy's
    gradient in `g`, applied to `x`, lowers the energy (eq. 7).

    Args:
        config ([`EnergyTransformerConfig`]): width and epsilon.
    """

    def __init__(self, config: EnergyTransformerConfig) -> None:
        super().__init__()
        self.eps = config.layer_norm_eps
        self.gain = nn.Parameter(torch.ones(1))  # an axis, because sharded training takes no scalar parameters
        self.bias = nn.Parameter(torch.zeros(config.hidden_size))

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalised tokens, (..., D) as given."""
        centred = hidden - hidden.mean(-1, keepdim=True)
        scale = (centred.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        return self.gain * (centred * scale) + self.bias

    def lagrangian(self, hidden: Tensor) -> Tensor:
        """The function of every token, (..., D) -> (...), whose gradient `forward` is."""
        deviation = (hidden.var(-1, correction=0) + self.eps).sqrt()
        return hidden.shape[-1] * self.gain[0] * deviation + (hidden * self.bias).sum(-1)


@dataclass(frozen=True)
class DensePattern:
    """
    Who attends to whom among all pairs.

    Args:
        allowed (`torch.BoolTensor` broadcastable to `(B, H, N queries, N keys)`, *optional*): the pairs that count;
            None for all.
        weights (`torch.FloatTensor` broadcastable to the same, *optional*): factors on the logits.
        tokens (`torch.BoolTensor` of shape `(B, N)`, *optional*): False for padding, which has no energy.
    """

    allowed: Tensor | None = None
    weights: Tensor | None = None
    tokens: Tensor | None = None


@dataclass(frozen=True)
class EdgePattern:
    """
    Who attends to whom along the edges of a graph; memory and time grow with their number.

    Heads are tokens of their own here: token `n` of head `h` is number `h N + n`.

    Args:
        edges ([`Edges`]): between `H N` tokens, from query (row) to key (column).
        weights (`torch.FloatTensor` of shape `(H E,)`, *optional*): factors on the logits, in the order of `edges`.
    """

    edges: Edges
    weights: Tensor | None = None

    @classmethod
    def of(
        cls, keys: Tensor, queries: Tensor, tokens: int, heads: int, weights: Tensor | None = None
    ) -> "EdgePattern":
        """
        The pattern of edges given in any order.

        Args:
            keys, queries (`torch.LongTensor` of shape `(E,)`): which token is attended to, and by which.
            tokens, heads (`int`): how many there are [N, H].
            weights (`torch.FloatTensor` of shape `(E, H)`, *optional*): factors on the logits.
        """
        shift = tokens * torch.arange(heads, device=keys.device)[:, None]
        edges = Edges.sort((queries + shift).flatten(), (keys + shift).flatten(), heads * tokens)
        return cls(edges, None if weights is None else weights.T.flatten()[edges.order])


Pattern = DensePattern | EdgePattern


class EnergyAttention(nn.Module):
    r"""
    Attention as an energy (eq. 3-4), without values: `-(1/beta) sum_h sum_C log sum_B exp(beta K_B . Q_C)`. Its
    gradient has two terms, one for a token as the query, one for it as the key. A query without any key has energy 0.

    Args:
        config ([`EnergyTransformerConfig`]): sizes and temperature.
    """

    def __init__(self, config: EnergyTransformerConfig) -> None:
        super().__init__()
        assert config.head_dim is not None and config.attention_beta is not None  # the config fills them in
        shape = (config.num_attention_heads, config.head_dim, config.hidden_size)
        self.key = nn.Parameter(torch.empty(shape))
        self.query = nn.Parameter(torch.empty(shape))
        self.beta = float(config.attention_beta)

    def forward(self, normed: Tensor, pattern: Pattern, with_gradient: bool = True) -> tuple[Tensor, Tensor | None]:
        """
        Args:
            normed (`torch.FloatTensor` of shape `(B, N, D)` or `(N, D)`): normalised tokens [g].
            pattern ([`DensePattern`] or [`EdgePattern`]): who attends to whom; dense for `(B, N, D)`.
            with_gradient (`bool`): compute the gradient, too.

        Returns:
            Energy of every token as a query, `(B, N)` or `(N,)` in float32, and the gradient of their sum, shaped as
            `normed`, or None.
        """
        normed = normed.to(self.key.dtype)
        if isinstance(pattern, EdgePattern):
            energy, mixed = self._along_edges(normed, pattern, with_gradient)
        else:
            energy, mixed = self._dense(normed, pattern, with_gradient)
        if mixed is None:
            return energy, None
        as_query, as_key = mixed
        falling = torch.einsum("...nhy,hyd->...nd", as_query, self.query)
        falling = falling + torch.einsum("...nhy,hyd->...nd", as_key, self.key)
        return energy, -falling

    def _dense(
        self, normed: Tensor, pattern: DensePattern, with_gradient: bool
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        keys = torch.einsum("bnd,hyd->bhny", normed, self.key)
        queries = torch.einsum("bnd,hyd->bhny", normed, self.query)
        logits = self.beta * precise(queries @ keys.transpose(-1, -2))
        if pattern.weights is not None:
            logits = logits * pattern.weights
        if pattern.allowed is not None:
            logits = logits.masked_fill(~pattern.allowed, -torch.inf)
        largest = logits.detach().amax(-1, keepdim=True).clamp(min=torch.finfo(logits.dtype).min)
        shares = (logits - largest).exp()
        total = shares.sum(-1, keepdim=True)
        energy = self._energy(largest, total)[..., 0].sum(1)
        if not with_gradient:
            return energy, None
        shares = shares / _never_zero(total)
        if pattern.weights is not None:
            shares = shares * pattern.weights
        shares = shares.to(keys.dtype)
        return energy, ((shares @ keys).transpose(1, 2), (shares.transpose(-1, -2) @ queries).transpose(1, 2))

    def _along_edges(
        self, normed: Tensor, pattern: EdgePattern, with_gradient: bool
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        edges, heads, width = pattern.edges, len(self.key), self.key.shape[1]
        # sparse products know no half precision
        keys = precise(torch.einsum("nd,hyd->hny", normed, self.key)).reshape(-1, width)
        queries = precise(torch.einsum("nd,hyd->hny", normed, self.query)).reshape(-1, width)
        logits = self.beta * edges.scores(queries, keys)
        if pattern.weights is not None:
            logits = logits * pattern.weights
        largest = logits.new_full((len(keys),), torch.finfo(logits.dtype).min)
        largest = largest.scatter_reduce(0, edges.rows, logits.detach(), "amax")
        shares = (logits - largest[edges.rows]).exp()
        total = torch.zeros_like(largest).index_add(0, edges.rows, shares)
        energy = self._energy(largest, total).view(heads, -1).sum(0)
        if not with_gradient:
            return energy, None
        shares = shares / _never_zero(total)[edges.rows]
        if pattern.weights is not None:
            shares = shares * pattern.weights
        mixed = (edges.gather(shares, keys), edges.scatter(shares, queries))
        as_query, as_key = (each.view(heads, -1, width).transpose(0, 1).to(normed.dtype) for each in mixed)
        return energy, (as_query, as_key)

    def _energy(self, largest: Tensor, total: Tensor) -> Tensor:
        """`-logsumexp / beta`, or 0 where there is nothing to sum."""
        energy = -(largest + _never_zero(total).log()) / self.beta
        return torch.where(total > 0, energy, torch.zeros_like(energy))


def precise(numbers: Tensor) -> Tensor:
    """
    Numbers in single precision, or in double if they are. Energies are sums of many: in half precision their changes
    would be lost.
    """
    return numbers.to(torch.promote_types(numbers.dtype, torch.float32))


def _never_zero(total: Tensor) -> Tensor:
    """Sums of exponentials that hold at least a 1, or nothing at all: then 1 as well."""
    return torch.where(total > 0, total, torch.ones_like(total))


class HopfieldMemory(nn.Module):
    r"""
    Memory as an energy (eq. 5, 9): how little every token resembles the stored patterns, `-sum_mu G(xi_mu . g)`.

    Args:
        config ([`EnergyTransformerConfig`]): sizes, and which `G`.
    """

    def __init__(self, config: EnergyTransformerConfig) -> None:
        super().__init__()
        assert config.num_memories is not None and config.hopfield_beta is not None  # the config fills them in
        self.patterns = nn.Parameter(torch.empty(config.num_memories, config.hidden_size))
        self.kind = config.hopfield
        self.power = 2.0 if config.hopfield == "relu" else float(config.hopfield_power)
        self.beta = float(config.hopfield_beta)

    def forward(self, normed: Tensor, with_gradient: bool = True) -> tuple[Tensor, Tensor | None]:
        """
        Args:
            normed (`torch.FloatTensor` of shape `(..., N, D)`): normalised tokens [g].
            with_gradient (`bool`): compute the gradient, too.

        Returns:
            Energy of every token, `(..., N)` in float32, and the gradient, shaped as `normed`, or None.
        """
        overlaps = precise(normed.to(self.patterns.dtype) @ self.patterns.T)
        if self.kind == "softmax":
            energy = -(self.beta * overlaps).logsumexp(-1) / self.beta
            recalled = (self.beta * overlaps).softmax(-1) if with_gradient else None
        else:
            positive = overlaps.relu()
            energy = -positive.pow(self.power).sum(-1) / self.power
            recalled = positive.pow(self.power - 1) if with_gradient else None
        if recalled is None:
            return energy, None
        return energy, -(recalled.to(self.patterns.dtype) @ self.patterns)


class EnergyTransformerBlock(nn.Module):
    r"""
    One energy: that of the attention (for graphs, one attention for each relation) and that of the memory, both of the
    same normalised tokens.

    Args:
        config ([`EnergyTransformerConfig`]): the architecture.
    """

    def __init__(self, config: EnergyTransformerConfig) -> None:
        super().__init__()
        self.norm = EnergyLayerNorm(config)
        self.attention = nn.ModuleList([EnergyAttention(config) for _ in range(config.num_relations)])
        self.memory = HopfieldMemory(config)

    def forward(
        self, normed: Tensor, patterns: Sequence[Pattern], with_gradient: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """
        Args:
            normed (`torch.FloatTensor` of shape `(B, N, D)` or `(N, D)`): normalised tokens [g].
            patterns (sequence of [`DensePattern`] or [`EdgePattern`]): for each relation who attends to whom.
            with_gradient (`bool`): compute the gradient, too.

        Returns:
            Energy of every token, `(B, N)` or `(N,)` in float32; its sum is the energy. And the gradient of that sum,
            shaped as `normed`, or None.
        """
        energy, gradient = self.memory(normed, with_gradient)
        tokens = patterns[0].tokens if isinstance(patterns[0], DensePattern) else None
        if tokens is not None:
            energy = torch.where(tokens, energy, torch.zeros_like(energy))
            gradient = None if gradient is None else gradient * tokens[..., None]
        for attention, pattern in zip(self.attention, patterns, strict=True):
            more_energy, more_gradient = attention(normed, pattern, with_gradient)
            energy = energy + more_energy
            gradient = None if gradient is None else gradient + more_gradient
        return energy, gradient


__all__ = [
    "DensePattern",
    "EdgePattern",
    "EnergyAttention",
    "EnergyLayerNorm",
    "EnergyTransformerBlock",
    "HopfieldMemory",
    "Pattern",
    "precise",
]
