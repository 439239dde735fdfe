"""Laws of the Energy Transformer's energies: gradients in closed form, masks, edges, and that the energy falls."""

import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, vmap
from torch.testing import assert_close

from ebt_transformers import EnergyTransformerConfig, EnergyTransformerModel
from ebt_transformers.modeling_ebt.descent import DescentStep, descend
from ebt_transformers.modeling_et.edges import Edges
from ebt_transformers.modeling_et.energies import DensePattern, EnergyLayerNorm, EnergyTransformerBlock
from ebt_transformers.modeling_et.thinking_et import BlockEnergy, TokenSpace


TINY: dict[str, Any] = {
    "hidden_size": 12,
    "num_attention_heads": 3,
    "head_dim": 5,
    "num_memories": 7,
    "thinking_steps": 4,
}
MEMORIES: dict[str, dict[str, Any]] = {
    "relu": {"hopfield": "relu"},
    "power-2": {"hopfield": "power", "hopfield_power": 2},
    "power-3": {"hopfield": "power", "hopfield_power": 3},
    "power-4.5": {"hopfield": "power", "hopfield_power": 4.5},
    "softmax": {"hopfield": "softmax", "hopfield_beta": 0.7},
}
EXACT = {"rtol": 1e-10, "atol": 1e-10}


def build(**overrides: Any) -> EnergyTransformerModel:
    """A tiny random model in double precision and evaluation mode, away from its start."""
    torch.manual_seed(1)
    model = EnergyTransformerModel(EnergyTransformerConfig(**{**TINY, **overrides})).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
        for block in model.stack:
            block.norm.gain.fill_(1.3)
    return model


def tokens_of(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def random_edges(tokens: int, count: int, seed: int = 0) -> Tensor:
    """Edges between random tokens; none touches the last token."""
    return torch.randint(0, tokens - 1, (2, count), generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------- who attends to whom, in all its forms


@dataclass
class Attending:
    """
    Inputs of one kind.

    Args:
        tokens: `(B, N, D)` or `(N, D)`.
        options: of the model.
        inputs: of its forward pass.
        pairs: for each relation what the inputs mean: (sample, head, query, key, factor).
    """

    tokens: Tensor
    options: dict[str, Any]
    inputs: dict[str, Any]
    pairs: list[list[tuple[int, int, int, int, float]]]


def dense_case(allowed: Tensor, options: dict[str, Any], weights: Tensor | None = None, **inputs: Any) -> Attending:
    """A case of `(B, H, N, N)` pairs (query, key)."""
    factors = torch.ones(allowed.shape, dtype=torch.float64) if weights is None else weights.expand(allowed.shape)
    pairs = [(*where, float(factors[tuple(where)])) for where in allowed.nonzero().tolist()]
    if weights is not None:
        inputs["attention_weights"] = weights
    return Attending(tokens_of(allowed.shape[0], allowed.shape[2], TINY["hidden_size"]), options, inputs, [pairs])


def edge_case(edges: Tensor, options: dict[str, Any], tokens: int = 6, **inputs: Any) -> Attending:
    """A case of edges, by relation."""
    heads, loops = TINY["num_attention_heads"], options.get("self_attention", False)
    factors = inputs.get("edge_weights", torch.ones(edges.shape[1], heads, dtype=torch.float64))
    kinds = inputs.get("edge_type", torch.zeros(edges.shape[1], dtype=torch.long))
    pairs: list[list[tuple[int, int, int, int, float]]] = [[] for _ in range(options.get("num_relations", 1))]
    for index, (key, query) in enumerate(edges.T.tolist()):
        if loops or key != query:
            pairs[kinds[index]] += [(0, head, query, key, float(factors[index, head])) for head in range(heads)]
    return Attending(tokens_of(tokens, TINY["hidden_size"]), options, {"edge_index": edges, **inputs}, pairs)


def attending(name: str) -> Attending:
    """The case of a name."""
    rows, heads, count = 2, TINY["num_attention_heads"], 6
    loops = {"self_attention": True}
    everything = torch.ones(rows, heads, count, count, dtype=torch.bool)
    others = everything & ~torch.eye(count, dtype=torch.bool)
    real = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 1, 0, 1, 1, 1]], dtype=torch.bool)
    generator = torch.Generator().manual_seed(5)
    mask = torch.rand(rows, count, count, generator=generator) < 0.5
    mask[0, 2] = False  # a query without any key
    per_head = torch.rand(rows, heads, count, count, generator=generator) < 0.4
    per_head[1, 1, 3] = False
    weights = torch.randn(rows, heads, count, count, dtype=torch.float64, generator=generator)
    edges = random_edges(count, 17, seed=2)  # with duplicates, loops and an isolated token
    factors = torch.randn(17, heads, dtype=torch.float64, generator=generator)
    kinds = torch.randint(0, 2, (17,), generator=generator)
    padding = real[:, None, :, None] & real[:, None, None, :]
    cases = {
        "all": lambda: dense_case(everything, loops),
        "others": lambda: dense_case(others, {}),
        "one-token": lambda: dense_case(others[:, :, :1, :1], {}),
        "padding": lambda: dense_case(others & padding, {}, attention_mask=real),
        "padding-and-self": lambda: dense_case(everything & padding, loops, attention_mask=real.long()),
        "mask": lambda: dense_case(others & mask[:, None], {}, attention_mask=mask),
        "mask-and-self": lambda: dense_case(everything & mask[:, None], loops, attention_mask=mask),
        "mask-by-head": lambda: dense_case(others & per_head, {}, attention_mask=per_head),
        "nothing": lambda: dense_case(everything & False, {}, attention_mask=mask & False),
        "weights": lambda: dense_case(others, {}, weights),
        "weights-and-mask": lambda: dense_case(others & mask[:, None], {}, weights[:, :1], attention_mask=mask),
        "edges": lambda: edge_case(edges, {}),
        "edges-and-self": lambda: edge_case(edges, loops),
        "no-edges": lambda: edge_case(edges[:, :0], {}),
        "weighted-edges": lambda: edge_case(edges, {}, edge_weights=factors),
        "relations": lambda: edge_case(edges, {"num_relations": 2}, edge_type=kinds, edge_weights=factors),
        "empty-relation": lambda: edge_case(edges, {"num_relations": 3}, edge_type=kinds),
    }
    return cases[name]()


CASES = (
    *("all", "others", "one-token", "padding", "padding-and-self", "mask", "mask-and-self", "mask-by-head", "nothing"),
    *("weights", "weights-and-mask", "edges", "edges-and-self", "no-edges", "weighted-edges", "relations"),
    "empty-relation",
)


def energy_by_hand(model: EnergyTransformerModel, normed: Tensor, case: Attending) -> Tensor:
    """Equations 3 to 5, written out pair by pair; `normed` (B, N, D)."""
    config, (block,) = model.config, model.stack
    real = case.inputs.get("attention_mask")
    energy = normed.new_zeros(())
    for attention, pairs in zip(block.attention, case.pairs, strict=True):
        keys = torch.einsum("bnd,hyd->bhny", normed, attention.key)
        queries = torch.einsum("bnd,hyd->bhny", normed, attention.query)
        seen: dict[tuple[int, int, int], list[Tensor]] = {}
        for row, head, query, key, factor in pairs:
            logit = config.attention_beta * factor * (keys[row, head, key] @ queries[row, head, query])
            seen.setdefault((row, head, query), []).append(logit)
        for logits in seen.values():
            energy = energy - torch.stack(logits).logsumexp(0) / config.attention_beta
    overlaps = normed @ block.memory.patterns.T
    if real is not None and real.dim() == 2:
        overlaps = overlaps[real.bool()]
    if config.hopfield == "softmax":
        return energy - (config.hopfield_beta * overlaps).logsumexp(-1).sum() / config.hopfield_beta
    power = 2 if config.hopfield == "relu" else config.hopfield_power
    return energy - (overlaps.clamp(min=0) ** power).sum() / power


def patterns_of(model: EnergyTransformerModel, case: Attending) -> list[Any]:
    """What the model makes of the inputs."""
    if "edge_index" not in case.inputs:
        mask, weights = (case.inputs.get(name) for name in ("attention_mask", "attention_weights"))
        return [model._dense_pattern(case.tokens, mask, weights)]
    edges, weights, kinds = (case.inputs.get(name) for name in ("edge_index", "edge_weights", "edge_type"))
    return model._edge_patterns(len(case.tokens), edges, weights, kinds)


# ---------------------------------------------------------------------------------------------- energies and gradients


@pytest.mark.parametrize("memory", list(MEMORIES))
@pytest.mark.parametrize("name", CASES)
def test_energy_is_that_of_the_paper_and_its_gradient_that_of_autograd(name: str, memory: str) -> None:
    case = attending(name)
    model = build(**MEMORIES[memory], **case.options)
    normed = case.tokens.clone().requires_grad_()
    (block,) = model.stack
    energy, gradient = block(normed, patterns_of(model, case))
    (slope,) = torch.autograd.grad(energy.sum(), normed, retain_graph=True)
    assert_close(gradient, slope, **EXACT)

    batch = normed if normed.dim() == 3 else normed[None]
    by_hand = energy_by_hand(model, batch, case)
    assert_close(energy.sum(), by_hand, **EXACT)
    assert_close(gradient, torch.autograd.grad(by_hand, normed)[0], **EXACT)
    without = block(normed, patterns_of(model, case), with_gradient=False)
    assert torch.equal(without[0], energy) and without[1] is None


@pytest.mark.parametrize("name", ["mask", "mask-and-self", "mask-by-head", "weights-and-mask"])
def test_edges_are_dense_attention_with_the_same_mask(name: str) -> None:
    case = attending(name)
    if name == "mask-by-head":  # edges know no heads: one of them for all
        allowed = case.inputs["attention_mask"][:, :1].expand(-1, 3, -1, -1)
        case = dense_case(allowed & ~torch.eye(6, dtype=torch.bool), {}, attention_mask=allowed)
    model = build(**case.options)
    pairs = sorted({(row, query, key) for row, _, query, key, _ in case.pairs[0]})
    factors = {(row, query, key, head): factor for row, head, query, key, factor in case.pairs[0]}
    count = case.tokens.shape[1]
    edges = torch.tensor([[row * count + key, row * count + query] for row, query, key in pairs]).T
    weights = torch.tensor([[factors[(*pair, head)] for head in range(3)] for pair in pairs], dtype=torch.float64)
    rows = torch.arange(2).repeat_interleave(count)
    options = {"output_energies": True, "output_trajectory": True}
    dense = model(case.tokens, **case.inputs, **options)
    sparse = model(case.tokens.flatten(0, 1), edge_index=edges, edge_weights=weights, graph_index=rows, **options)
    assert_close(sparse.last_hidden_state, dense.last_hidden_state.flatten(0, 1), **EXACT)
    assert_close(sparse.energies, dense.energies, **EXACT)
    assert_close(sparse.trajectory, dense.trajectory.transpose(0, 1).flatten(1, 2), **EXACT)


def test_the_order_of_edges_means_nothing() -> None:
    case = attending("relations")
    model, order = build(**case.options), torch.randperm(17)
    shuffled = {
        **{"edge_index": case.inputs["edge_index"][:, order], "edge_type": case.inputs["edge_type"][order]},
        "edge_weights": case.inputs["edge_weights"][order],
    }
    assert_close(
        model(case.tokens, **shuffled).last_hidden_state, model(case.tokens, **case.inputs).last_hidden_state, **EXACT
    )


@pytest.mark.parametrize("count", [0, 1, 9, 40])
def test_sparse_products_have_right_gradients(count: int) -> None:
    edges = Edges.sort(*random_edges(6, count, seed=count), 6)
    left, right = (tokens_of(6, 3, seed=seed).requires_grad_() for seed in (1, 2))
    values = tokens_of(count, seed=3).requires_grad_()
    dense = torch.zeros(6, 6, dtype=torch.float64).index_put((edges.rows, edges.columns), values, accumulate=True)
    assert_close(edges.scores(left, right), (left[edges.rows] * right[edges.columns]).sum(-1), **EXACT)
    assert_close(edges.gather(values, right), dense @ right, **EXACT)
    assert_close(edges.scatter(values, left), dense.T @ left, **EXACT)
    for function, inputs in (
        (edges.scores, (left, right)),
        (edges.gather, (values, right)),
        (edges.scatter, (values, left)),
    ):
        assert gradcheck(function, inputs)
        assert gradgradcheck(function, inputs)


def test_steps_can_be_differentiated_along_edges() -> None:
    case = attending("weighted-edges")
    model = build(thinking_steps=2, **case.options)
    weights = case.inputs["edge_weights"].requires_grad_()

    def walk(tokens: Tensor, weights: Tensor) -> Tensor:
        return model(tokens, edge_index=case.inputs["edge_index"], edge_weights=weights).last_hidden_state

    assert gradcheck(walk, (case.tokens.requires_grad_(), weights))


# ---------------------------------------------------------------------------------------------------------- layer norm


def random_norm(gain: float) -> EnergyLayerNorm:
    norm = EnergyLayerNorm(EnergyTransformerConfig(**TINY)).double()
    with torch.no_grad():
        norm.gain.fill_(gain)
        norm.bias.normal_()
    return norm


@pytest.mark.parametrize("gain", [0.0, 0.7, 2.0, -1.3])
def test_the_layer_norm_is_the_gradient_of_its_lagrangian(gain: float) -> None:
    norm, hidden = random_norm(gain), (3 * tokens_of(2, 5, 12) + 1).requires_grad_()
    (slope,) = torch.autograd.grad(norm.lagrangian(hidden).sum(), hidden)
    assert norm.lagrangian(hidden).shape == (2, 5)
    assert_close(norm(hidden), slope, **EXACT)


@pytest.mark.parametrize("gain", [0.0, 0.7, 2.0, -1.3])
def test_the_layer_norm_s_jacobian_is_symmetric_and_semi_definite_for_a_gain_of_at_least_zero(gain: float) -> None:
    norm = random_norm(gain)
    for hidden in (tokens_of(12), 20 * tokens_of(12, seed=1), 1e-3 * tokens_of(12, seed=2), torch.ones(12).double()):
        jacobian = torch.autograd.functional.jacobian(norm, hidden)
        assert_close(jacobian, jacobian.T, rtol=1e-9, atol=1e-9)
        values = torch.linalg.eigvalsh(jacobian)
        assert (values.min() >= -1e-9) == (gain >= 0)


# ---------------------------------------------------------------------------------------------------- the energy falls


class Walk(nn.Module):
    """50 steps as a function of weights, start and step size, so that many can be taken at once."""

    steps = 50

    def __init__(self, block: EnergyTransformerBlock, pattern: DensePattern) -> None:
        super().__init__()
        self.block, self.pattern = block, pattern

    def forward(self, state: Tensor, step_size: Tensor) -> Tensor:
        """Energies before every step and after the last, (B, 1, steps + 1)."""
        result = descend(
            BlockEnergy(self.block, [self.pattern]),
            TokenSpace(self.block.norm, 0.0, None),
            state,
            [DescentStep(0, step_size)] * self.steps,
            detach_between_steps=False,
            final_energy=True,
        )
        return torch.stack(result.energies, dim=-1)


def spread(count: int, low: float, high: float) -> Tensor:
    """Random numbers, evenly on a logarithmic scale."""
    return torch.empty(count, dtype=torch.float64).uniform_(math.log(low), math.log(high)).exp()


def random_walks(largest_step: float = 0.1, gain: float = 1.0) -> Iterator[tuple[str, Tensor]]:
    """1,000 walks, 25 of one shape at a time: how they are made, and their energies (25, 51)."""
    torch.manual_seed(0)
    sizes = ((8, 2, 4, 8, 2), (16, 1, 3, 40, 5), (5, 3, 8, 16, 9), (24, 4, 6, 24, 7))
    together = 25
    for memory in MEMORIES.values():
        for loops in (True, False):
            for index, (width, heads, head_dim, memories, count) in enumerate(sizes):
                config = EnergyTransformerConfig(
                    hidden_size=width,
                    num_attention_heads=heads,
                    head_dim=head_dim,
                    num_memories=memories,
                    attention_beta=(None, 0.3, 2.0, None)[index],
                    **memory,
                )
                allowed = None if loops else ~torch.eye(count, dtype=torch.bool)[None, None]
                if index == 3:  # and some of them with a random mask
                    mask = torch.rand(1, heads, count, count) < 0.5
                    allowed = mask if allowed is None else mask & allowed
                walk = Walk(EnergyTransformerBlock(config).double(), DensePattern(allowed))
                weights = {}
                for name, parameter in walk.named_parameters():
                    numbers = torch.randn(together, *parameter.shape, dtype=torch.float64)
                    if name.endswith("gain"):
                        numbers = 2 * gain * torch.rand(together, 1, dtype=torch.float64)
                    else:
                        numbers *= spread(together, 0.01, 1.0).view(-1, *[1] * parameter.dim())
                    weights[name] = numbers
                start = torch.randn(together, 1, 1, count, width, dtype=torch.float64)
                start = start * spread(together, 0.1, 10.0).view(-1, 1, 1, 1, 1)
                sizes_of_steps = spread(together, largest_step / 100, largest_step)
                energies = vmap(lambda weights, start, size, walk=walk: functional_call(walk, weights, (start, size)))(
                    weights, start, sizes_of_steps
                )
                yield f"{memory} {config.hidden_size} {loops}", energies[:, 0, 0]


def rises(energies: Tensor) -> Tensor:
    """The largest rise of every walk, relative to the energy."""
    return (energies.diff(dim=1) / (1 + energies[:, :-1].abs())).amax(1)


def test_the_energy_never_rises_in_a_thousand_random_configurations() -> None:
    worst, walks, falls = ("", -math.inf), 0, 0
    for name, energies in random_walks():
        assert energies.isfinite().all(), name
        worst = max(worst, (name, float(rises(energies).max())), key=lambda pair: pair[1])
        walks += len(energies)
        falls += int((energies[:, -1] < energies[:, 0] - 1e-6).sum())
    assert walks == 1000 and falls > 900  # they do move
    assert worst[1] <= 1e-12, f"the energy rose by {worst[1]:g} in {worst[0]}"


def test_the_energy_rises_with_a_negative_gain() -> None:
    risen = torch.cat([rises(energies) for _, energies in random_walks(gain=-1.0)])
    assert (risen > 1e-8).double().mean() > 0.9


def contrary(**overrides: Any) -> EnergyTransformerModel:
    """A model whose tokens look for what they are not: its queries are its keys turned round."""
    model = build(num_attention_heads=1, head_dim=4, **overrides)
    with torch.no_grad():
        (block,) = model.stack
        block.attention[0].query.copy_(-block.attention[0].key)
        block.memory.patterns.zero_()
        block.norm.bias.zero_()
    return model


def test_the_energy_rises_with_steps_that_are_far_too_large_and_falls_with_small_ones() -> None:
    tokens = tokens_of(64, 3, 12)
    with torch.no_grad():
        large, small = (
            contrary()(tokens, thinking_steps=40, thinking_step_size=size, output_energies=True).energies[:, 0]
            for size in (10.0, 1e-3)
        )
    assert (rises(large) > 1e-3).double().mean() > 0.25
    assert (small.diff(dim=-1) < 0).all()


# ------------------------------------------------------------------------------------------------------------ dynamics


def step_by_hand(model: EnergyTransformerModel, tokens: Tensor, allowed: Tensor) -> Tensor:
    """One step of equation 6 with the gradients of equations 4 and 5 in their explicit form."""
    (block,) = model.stack
    key, query, patterns = block.attention[0].key, block.attention[0].query, block.memory.patterns
    centred = tokens - tokens.mean(-1, keepdim=True)
    deviation = (centred.pow(2).mean(-1, keepdim=True) + model.config.layer_norm_eps).sqrt()
    normed = block.norm.gain * centred / deviation + block.norm.bias
    keys = torch.einsum("hyd,bnd->bhny", key, normed)
    queries = torch.einsum("hyd,bnd->bhny", query, normed)
    logits = torch.einsum("bhky,bhqy->bhkq", keys, queries) * model.config.attention_beta
    logits = logits.masked_fill(~allowed.transpose(-1, -2), -torch.inf)
    shares = logits.softmax(dim=-2)
    down = torch.einsum("bhkq,hyd,bhky->bqd", shares, query, keys)
    down = down + torch.einsum("bhkq,hyd,bhqy->bkd", shares, key, queries)
    down = down + torch.einsum("md,bnm->bnd", patterns, torch.einsum("md,bnd->bnm", patterns, normed).relu())
    return tokens + model.config.step_size * down


@pytest.mark.parametrize("loops", [True, False])
def test_a_step_is_that_of_the_paper(loops: bool) -> None:
    model, tokens = build(self_attention=loops), tokens_of(3, 6, 12)
    allowed = torch.ones(6, 6, dtype=torch.bool) if loops else ~torch.eye(6, dtype=torch.bool)
    found = model(tokens, thinking_steps=1).last_hidden_state
    assert_close(found, step_by_hand(model, tokens, allowed), **EXACT)
    assert_close(model(tokens, thinking_steps=2).last_hidden_state, step_by_hand(model, found, allowed), **EXACT)


def test_blocks_follow_one_another() -> None:
    model, tokens = build(num_blocks=3), tokens_of(2, 6, 12)
    output = model(tokens, output_energies=True, output_trajectory=True)
    assert output.energies.shape == (2, 3, 5) and output.trajectory.shape == (2, 13, 6, 12)
    assert output.steps_taken.tolist() == [[4, 4, 4]] * 2
    for block in model.stack:
        energy = BlockEnergy(block, [model._dense_pattern(tokens, None, None)])
        space = TokenSpace(block.norm, 0.0, None)
        tokens = descend(energy, space, tokens[:, None], [DescentStep(0, 0.1)] * 4).state[:, 0]
    assert_close(output.last_hidden_state, tokens, **EXACT)


@pytest.mark.parametrize("name", ["others", "mask-by-head", "weights", "edges", "relations"])
def test_half_the_steps_twice_are_all_of_them(name: str) -> None:
    case = attending(name)
    model = build(thinking_steps=12, **case.options)
    options = {**case.inputs, "output_trajectory": True, "output_energies": True}
    whole = model(case.tokens, **options)
    first = model(case.tokens, thinking_steps=6, **options)
    second = model(first.last_hidden_state, thinking_steps=6, **options)
    axis = 1 if case.tokens.dim() == 3 else 0
    middle = whole.trajectory.select(axis, 6)
    assert_close(first.last_hidden_state, middle, **EXACT)
    assert_close(second.last_hidden_state, whole.last_hidden_state, **EXACT)
    assert torch.equal(whole.trajectory.select(axis, 0), case.tokens)
    assert torch.equal(whole.trajectory.select(axis, 12), whole.last_hidden_state)
    assert_close(torch.cat([first.energies, second.energies[..., 1:]], dim=-1), whole.energies, **EXACT)


def test_padding_does_not_move_and_changes_nothing() -> None:
    case = attending("padding")
    model, real = build(thinking_steps=8), case.inputs["attention_mask"]
    output = model(case.tokens, attention_mask=real, output_energies=True)
    assert torch.equal(output.last_hidden_state[~real], case.tokens[~real])
    other = torch.where(real[..., None], case.tokens, 100 * tokens_of(*case.tokens.shape, seed=9))
    again = model(other, attention_mask=real, output_energies=True)
    assert torch.equal(again.last_hidden_state[real], output.last_hidden_state[real])
    assert torch.equal(again.energies, output.energies)
    for row in range(2):
        alone = model(case.tokens[row][real[row]][None], output_energies=True)
        assert_close(output.last_hidden_state[row][real[row]], alone.last_hidden_state[0], **EXACT)
        assert_close(output.energies[row], alone.energies[0], **EXACT)


@pytest.mark.parametrize("name", ["mask", "mask-by-head"])
def test_what_is_masked_is_not_seen(name: str) -> None:
    case = attending(name)
    model, mask = build(), case.inputs["attention_mask"].clone()
    row, query, key = 0, 4, 1
    mask[row, ..., key] = False  # nobody looks at it, and it looks at nobody
    mask[row, ..., key, :] = False
    other = case.tokens.clone()
    other[row, key] = 3 * tokens_of(12, seed=9)
    first, second = (model(tokens, attention_mask=mask).last_hidden_state for tokens in (case.tokens, other))
    rest = [index for index in range(6) if index != key]
    assert torch.equal(first[row, rest], second[row, rest]) and torch.equal(first[1], second[1])
    assert not torch.equal(first[row, key], second[row, key])
    mask[row, ..., query, key] = True
    first, second = (model(tokens, attention_mask=mask).last_hidden_state for tokens in (case.tokens, other))
    assert not torch.equal(first[row, query], second[row, query])


@pytest.mark.parametrize(
    "options",
    [{}, {"thinking_tolerance": 0.5}, {"thinking_target_energy": -30.0}, {"thinking_accept_only_lower_energy": True}],
    ids=["plain", "tolerance", "target", "acceptance"],
)
@pytest.mark.parametrize("name", ["others", "padding", "mask", "weights"])
def test_a_batch_equals_its_rows_alone(name: str, options: dict[str, Any]) -> None:
    case = attending(name)
    model = build(thinking_steps=12, num_blocks=2, **case.options)
    whole = model(case.tokens, output_energies=True, **case.inputs, **options)
    for row in range(2):
        own = {key: value[row : row + 1] for key, value in case.inputs.items()}
        alone = model(case.tokens[row : row + 1], output_energies=True, **own, **options)
        assert_close(whole.last_hidden_state[row], alone.last_hidden_state[0], **EXACT)
        assert_close(whole.energies[row], alone.energies[0], **EXACT)
        assert torch.equal(whole.steps_taken[row], alone.steps_taken[0])


def test_a_tolerance_stops_samples_one_by_one() -> None:
    model, tokens = build(), tokens_of(8, 6, 12)
    gaps = model(tokens, thinking_steps=2, output_energies=True).energies[:, 0].diff(dim=1)[:, 0].abs()
    tolerance = float(gaps.sort().values[3:5].mean())
    free = model(tokens, thinking_steps=30)
    stopped = model(tokens, thinking_steps=30, thinking_tolerance=tolerance)
    early = gaps <= tolerance
    assert (stopped.steps_taken[early] == 1).all() and (stopped.steps_taken[~early] > 1).all()
    never = stopped.steps_taken[:, 0] == 30
    assert torch.equal(stopped.last_hidden_state[never], free.last_hidden_state[never])
    one = model(tokens, thinking_steps=1).last_hidden_state
    assert torch.equal(stopped.last_hidden_state[early], one[early])


def test_acceptance_never_raises_the_energy() -> None:
    model, tokens = contrary(step_size=10.0, thinking_steps=10), tokens_of(32, 3, 12)
    free = model(tokens, output_energies=True).energies
    kept = model(tokens, output_energies=True, thinking_accept_only_lower_energy=True)
    assert (free.diff(dim=-1) > 0).any()
    assert (kept.energies.diff(dim=-1) <= 0).all()
    assert (kept.steps_taken < 10).any()


def test_step_sizes_of_a_call() -> None:
    model, tokens = build(), tokens_of(2, 6, 12)
    smaller = model(tokens, thinking_step_size=0.05).last_hidden_state
    assert_close(smaller, model(tokens, thinking_step_size_scale=0.5).last_hidden_state, **EXACT)
    assert_close(smaller, model(tokens, thinking={"step_size": 0.05}).last_hidden_state, **EXACT)
    paced = model(tokens, thinking_step_size_scale=[1.0, 1.0, 0.0001, 0.0001]).last_hidden_state
    assert_close(paced, model(tokens, thinking_steps=2).last_hidden_state, rtol=1e-3, atol=1e-3)


# --------------------------------------------------------------------------------------------------------------- noise


def test_noise_of_the_config_is_for_training_alone() -> None:
    model, tokens = build(noise_std=0.3), tokens_of(2, 6, 12)
    first, second = (model(tokens).last_hidden_state for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(first, build().eval()(tokens).last_hidden_state)
    model.train()
    first, second = (model(tokens).last_hidden_state for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    first = model(tokens).last_hidden_state
    torch.manual_seed(3)
    assert torch.equal(first, model(tokens).last_hidden_state)


@pytest.mark.parametrize("training", [True, False])
def test_noise_of_a_call_is_seeded(training: bool) -> None:
    model, tokens = build().train(training), tokens_of(2, 6, 12)
    noisy = {"thinking_noise_std": 0.3}
    first = model(tokens, thinking_seed=0, **noisy).last_hidden_state
    assert torch.equal(first, model(tokens, thinking_seed=0, **noisy).last_hidden_state)
    assert torch.equal(first, model(tokens, **noisy).last_hidden_state) != training
    assert not torch.equal(first, model(tokens, thinking_seed=1, **noisy).last_hidden_state)
    globally = [model(tokens, thinking_seed=-1, **noisy).last_hidden_state for _ in range(2)]
    assert not torch.equal(*globally)


def test_noise_has_the_spread_of_the_paper() -> None:
    model = build(step_size=0.25, thinking_steps=4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    tokens = tokens_of(50, 20, 12)
    moved = model(tokens, thinking_noise_std=0.02).last_hidden_state - tokens
    assert_close(moved.std(), torch.tensor(0.02 * math.sqrt(0.25 * 4)).double(), rtol=0.03, atol=0)


# -------------------------------------------------------------------------------------------------------- large graphs


def saved_for_backward(edges: int) -> int:
    """Bytes that a step of training along edges keeps for its backward pass."""
    sizes: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.layout == torch.strided:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    model = build(thinking_steps=1).float()
    count = edges // 10
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = model(torch.randn(count, 12), edge_index=random_edges(count, edges))
    output.last_hidden_state.sum().backward()
    return sum(sizes.values())


def test_memory_grows_with_the_edges() -> None:
    one, two, four = (saved_for_backward(edges) for edges in (2000, 4000, 8000))
    assert two < 2.1 * one and four < 2.1 * two


LARGE = """
import resource, torch
from ebt_transformers import EnergyTransformerConfig, EnergyTransformerForNodeClassification
torch.set_num_threads(1)
config = EnergyTransformerConfig(hidden_size=32, num_attention_heads=2, num_node_features=10, thinking_steps=2)
model = EnergyTransformerForNodeClassification(config).train()
edges, nodes = 500_000, 50_000
labels = torch.randint(0, 2, (nodes,))
model(torch.randn(nodes, 10), torch.randint(0, nodes, (2, edges)), labels=labels).loss.backward()
assert all(p.grad is not None for p in model.parameters())
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_half_a_million_edges_train_in_two_gigabytes(subprocess_env: dict[str, str]) -> None:
    done = subprocess.run([sys.executable, "-c", LARGE], env=subprocess_env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    unit = 1 if sys.platform == "darwin" else 1024  # what `ru_maxrss` counts in
    assert int(done.stdout) * unit < 2 * 1024**3
