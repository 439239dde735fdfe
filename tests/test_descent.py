"""Laws of the descent: what it computes, what it reports, how rows stop and how candidates are chosen."""

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from ebt_transformers import EBTForCausalLM, ThinkingConfig
from ebt_transformers.modeling_ebt import DescentStep, StopRules, descend


sys.path.append(str(Path(__file__).parent))  # the helper beside this file, under every import mode of pytest
from points import Points  # noqa: E402


MakeModel = Callable[..., EBTForCausalLM]
CLOSE = {"rtol": 1e-3, "atol": 1e-3}
ONE_LANDSCAPE = {"step_conditioning": "none", "num_landscapes": 1, "thinking_steps": 2}


def tokens(*shape: int, seed: int = 0, vocab: int = 41) -> Tensor:
    """Random token ids."""
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


def starts(*shape: int, seed: int = 0) -> Tensor:
    """Random initial logits."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------- a second implementation, as naive as it can be


def naive_norm(hidden: Tensor, module: torch.nn.Module) -> Tensor:
    """RMS norm, written out."""
    return module.weight * hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + module.variance_epsilon)


def naive_rotate(heads: Tensor) -> Tensor:
    """Rotary positions 0, 1, 2, ... of (H, L, d)."""
    length, width = heads.shape[-2:]
    angles = torch.outer(torch.arange(length), 10000.0 ** (-torch.arange(0, width, 2) / width)).repeat(1, 2)
    turned = torch.cat([-heads[..., width // 2 :], heads[..., : width // 2]], dim=-1)
    return heads * angles.cos() + turned * angles.sin()


def naive_hidden(model: EBTForCausalLM, hidden: Tensor, landscape: int) -> Tensor:
    """Normed last hidden state of a plain causal transformer over embedded tokens (L, D)."""
    body, config = model.model, model.config
    condition, adaptive = None, config.step_conditioning in ("adaln", "adaln_zero")
    if config.step_conditioning == "time_embed":
        hidden = torch.cat([body.step_embeddings.weight[landscape][None], hidden])
    elif adaptive:
        condition = torch.nn.functional.silu(body.step_embeddings.weight[landscape])
    length, groups = len(hidden), config.num_attention_heads // config.num_key_value_heads
    for layer in body.layers:
        shift, scale, gate, shift2, scale2, gate2 = 0, 0, 1, 0, 0, 1
        if adaptive:
            shift, scale, gate, shift2, scale2, gate2 = torch.nn.functional.linear(
                condition, layer.modulation.weight, layer.modulation.bias
            ).chunk(6)
        attention, mlp = layer.self_attn, layer.mlp
        normed = naive_norm(hidden, layer.input_layernorm) * (1 + scale) + shift
        query, key, value = (
            (normed @ projection.weight.T).view(length, -1, config.head_dim).transpose(0, 1)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        key, value = key.repeat_interleave(groups, 0), value.repeat_interleave(groups, 0)
        scores = naive_rotate(query) @ naive_rotate(key).transpose(1, 2) / config.head_dim**0.5
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(future, float("-inf")).softmax(-1)
        mixed = (weights @ value).transpose(0, 1).flatten(1)
        hidden = hidden + gate * (mixed @ attention.o_proj.weight.T)
        normed = naive_norm(hidden, layer.post_attention_layernorm) * (1 + scale2) + shift2
        inner = torch.nn.functional.silu(normed @ mlp.gate_proj.weight.T) * (normed @ mlp.up_proj.weight.T)
        hidden = hidden + gate2 * (inner @ mlp.down_proj.weight.T)
    last = naive_norm(hidden, body.norm)[-1]
    if adaptive:
        head = torch.nn.functional.linear(condition, body.final_modulation.weight, body.final_modulation.bias)
        shift, scale = head.chunk(2)
        last = last * (1 + scale) + shift
    return last


def naive_energy(model: EBTForCausalLM, context: Tensor, candidate: Tensor, landscape: int) -> Tensor:
    """One energy, of context tokens (S,) and one embedded candidate (D,) behind them."""
    embedded = model.model.embed_tokens.weight[context]
    if model.config.candidate_anchor == "token":
        candidate = candidate + embedded[-1]
    return naive_hidden(model, torch.cat([embedded, candidate[None]]), landscape) @ model.model.energy_head.weight[0]


def naive_proposal(model: EBTForCausalLM, ids: Tensor) -> Tensor:
    """What tokens (B, S) predict without a candidate, logits (B, S, V)."""
    embedded = model.model.embed_tokens.weight[ids]
    rows = [torch.stack([naive_hidden(model, row[: s + 1], 0) for s in range(len(row))]) for row in embedded]
    return torch.stack(rows) @ model.candidate_embedding.weight.T


def naive_descent(
    model: EBTForCausalLM, ids: Tensor, state: Tensor, landscapes: list[int], detach: bool, graph_on: str
) -> tuple[list[Tensor], list[Tensor]]:
    """States after and energies before every step, by autograd through softmax and the mixture of embeddings."""
    states, energies = [], []
    for index, landscape in enumerate(landscapes):
        graph = graph_on == "all" or (graph_on == "last" and index == len(landscapes) - 1)
        state = state.detach() if detach else state
        probs = state.softmax(-1)
        seen = probs if graph and probs.requires_grad else probs.detach().requires_grad_()
        mixed = seen @ model.candidate_embedding.weight
        energy = torch.stack(
            [
                torch.stack([naive_energy(model, row[: s + 1], mixed[b, s], landscape) for s in range(len(row))])
                for b, row in enumerate(ids)
            ]
        )
        (gradient,) = torch.autograd.grad(energy.sum(), seen, create_graph=graph)
        state = (probs if model.config.update == "replace" else state) - model.step_size.value * gradient
        states.append(state)
        energies.append(energy)
    return states, energies


@pytest.mark.parametrize("steps", [1, 3])
def test_the_descent_is_autograd_through_one_sequence_per_position(any_model: EBTForCausalLM, steps: int) -> None:
    ids, start = tokens(2, 4), starts(2, 4, 41)
    last = any_model.config.num_landscapes - 1
    states, energies = naive_descent(any_model, ids, start, [min(i, last) for i in range(steps)], True, "none")
    with torch.no_grad():
        output = any_model(input_ids=ids, initial_candidate=start, thinking_steps=steps, output_energies=True)
    assert_close(output.logits, states[-1], **CLOSE)
    assert_close(output.energies[..., :-1], torch.stack(energies, -1).detach(), **CLOSE)


@pytest.mark.parametrize("loss_on_steps", ["all", "last"])
@pytest.mark.parametrize("detach", [True, False])
def test_training_gradients_are_those_of_the_naive_descent(
    any_model: EBTForCausalLM, detach: bool, loss_on_steps: str
) -> None:
    any_model.config.detach_between_steps, any_model.config.loss_on_steps = detach, loss_on_steps
    with torch.no_grad():
        any_model.step_size.value.fill_(0.7)
    naive, ids, start = copy.deepcopy(any_model), tokens(2, 4), starts(2, 4, 41)
    landscapes = [0, any_model.config.num_landscapes - 1]

    proposes = any_model.config.candidate_init == "proposal"
    proposal = naive_proposal(naive, ids) if proposes else None
    given = {} if proposes else {"initial_candidate": start}
    loss = any_model.train()(input_ids=ids, labels=ids, **given).loss
    loss.backward()
    states, _ = naive_descent(naive, ids, start if proposal is None else proposal, landscapes, detach, loss_on_steps)
    losses = [torch.nn.functional.cross_entropy(s[:, :-1].flatten(0, 1), ids[:, 1:].flatten()) for s in states]
    expected = sum(losses) / len(losses) if loss_on_steps == "all" else losses[-1]
    if proposal is not None:
        expected = expected + torch.nn.functional.cross_entropy(proposal[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    expected.backward()

    assert_close(loss, expected, **CLOSE)
    mine = dict(any_model.named_parameters())
    for name, parameter in naive.named_parameters():
        want = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        got = torch.zeros_like(parameter) if mine[name].grad is None else mine[name].grad
        scale = float(want.abs().max()) + 1e-3
        assert_close(got / scale, want / scale, rtol=0, atol=1e-3, msg=lambda text, name=name: f"{name}: {text}")


# ---------------------------------------------------------------------------------- energies reported are the energies


def test_reported_energies_are_those_of_the_states_before_each_step_and_after_the_last(
    any_model: EBTForCausalLM,
) -> None:
    ids, mask = tokens(2, 5), torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    last, start = any_model.config.num_landscapes - 1, starts(2, 5, 41)
    options = {"input_ids": ids, "attention_mask": mask, "initial_candidate": start}
    with torch.no_grad():
        reported = any_model(**options, thinking_steps=4, output_energies=True)
        assert reported.energies.shape == (2, 5, 5)
        states = [start] + [any_model(**options, thinking_steps=steps).logits for steps in (1, 2, 3, 4)]
        for step, state in enumerate(states):
            recomputed = any_model.energy(
                ids, candidate_probs=state.softmax(-1), attention_mask=mask, landscape=min(step, last)
            )
            assert_close(reported.energies[..., step][mask.bool()], recomputed[mask.bool()], **CLOSE)
    assert_close(reported.logits, states[-1], rtol=0, atol=0)


def test_a_default_start_is_the_uniform_distribution_or_the_proposal(any_model: EBTForCausalLM) -> None:
    ids = tokens(2, 4)
    with torch.no_grad():
        output = any_model(input_ids=ids, output_energies=True, output_trajectory=True)
        start = torch.zeros(2, 4, 41)
        if any_model.config.candidate_init == "proposal":
            start = naive_proposal(any_model, ids)
        expected = any_model.energy(ids, candidate_probs=start.softmax(-1), landscape=0)
    assert_close(output.trajectory[:, :, 0], start, **CLOSE)
    assert_close(output.energies[..., 0], expected, **CLOSE)


def test_asking_for_energies_changes_no_result(any_model: EBTForCausalLM) -> None:
    with torch.no_grad():
        quiet = any_model(input_ids=tokens(2, 4)).logits
        assert_close(any_model(input_ids=tokens(2, 4), output_energies=True).logits, quiet, rtol=0, atol=0)


def test_energies_of_tokens_are_those_of_one_hot_distributions(any_model: EBTForCausalLM) -> None:
    ids, candidates = tokens(2, 4), tokens(2, 3, 4, seed=5)
    one_hot = torch.nn.functional.one_hot(candidates, 41).float()
    with torch.no_grad():
        of_ids = any_model.energy(ids, candidate_ids=candidates)
        assert of_ids.shape == (2, 3, 4) and of_ids.dtype == torch.float32
        assert_close(of_ids, any_model.energy(ids, candidate_probs=one_hot), **CLOSE)
        for index in range(3):
            assert_close(of_ids[:, index], any_model.energy(ids, candidate_ids=candidates[:, index]), **CLOSE)


def test_the_gradient_of_energy_in_the_distribution_is_its_slope(any_model: EBTForCausalLM) -> None:
    ids, probs = tokens(1, 4), starts(1, 4, 41).softmax(-1).requires_grad_()
    direction, size = starts(1, 4, 41, seed=7), 1e-3
    any_model.energy(ids, candidate_probs=probs).sum().backward()
    with torch.no_grad():
        ahead, behind = (any_model.energy(ids, candidate_probs=probs + s * direction) for s in (size, -size))
    assert_close((probs.grad * direction).sum(-1), (ahead - behind) / (2 * size), rtol=0.05, atol=0.02)


def test_energy_works_in_inference_mode_and_on_padded_rows(any_model: EBTForCausalLM) -> None:
    ids, candidates = tokens(1, 4), tokens(1, 4, seed=5)
    with torch.inference_mode():
        alone = any_model.energy(ids, candidate_ids=candidates)
        padded = any_model.energy(
            torch.nn.functional.pad(ids, (2, 0)),
            candidate_ids=torch.nn.functional.pad(candidates, (2, 0)),
            attention_mask=torch.tensor([[0, 0, 1, 1, 1, 1]]),
        )
    assert_close(padded[:, 2:], alone, **CLOSE)


# ------------------------------------------------------------------------------------------------------ going downhill


def test_a_small_step_lowers_the_energy(make_model: MakeModel) -> None:
    model = make_model(update="residual", **ONE_LANDSCAPE)
    options = {"initial_candidate": starts(2, 5, 41), "thinking_steps": 8, "thinking_step_size": 0.01}
    with torch.no_grad():
        energies = model(input_ids=tokens(2, 5), output_energies=True, **options).energies
    assert (energies.diff(dim=-1) < 0).all()


@pytest.mark.parametrize("step_size", [0.5, 50.0])
def test_accepting_only_lower_energy_never_raises_it(any_model: EBTForCausalLM, step_size: float) -> None:
    ids, last = tokens(2, 5), any_model.config.num_landscapes - 1
    options = {"thinking_landscapes": [last] * 5, "thinking_step_size": step_size, "output_energies": True}
    with torch.no_grad():
        free = any_model(input_ids=ids, **options)
        careful = any_model(input_ids=ids, thinking_accept_only_lower_energy=True, **options)
        recomputed = any_model.energy(ids, candidate_probs=careful.logits.softmax(-1))
    assert (careful.energies.diff(dim=-1) <= 0).all()
    assert_close(careful.energies[..., -1], recomputed, **CLOSE)
    accepted = (careful.energies.diff(dim=-1) < 0).sum(-1)
    assert torch.equal(careful.steps_taken, accepted)
    assert (free.steps_taken == 5).all()


# ------------------------------------------------------------------------------------------------------------ stopping


def test_tolerance_0_stops_only_where_the_energy_stands_still(any_model: EBTForCausalLM) -> None:
    with torch.no_grad():
        free = any_model(input_ids=tokens(2, 4), thinking_steps=4, output_energies=True)
        bound = any_model(input_ids=tokens(2, 4), thinking_steps=4, thinking_tolerance=0, output_energies=True)
    went_on = bound.steps_taken == 4
    assert went_on.any()
    assert_close(bound.logits[went_on], free.logits[went_on], rtol=0, atol=0)
    assert_close(bound.energies, free.energies, **CLOSE)


def test_a_huge_tolerance_stops_after_the_first_step_on_a_repeated_landscape(any_model: EBTForCausalLM) -> None:
    ids, landscapes = tokens(2, 4), any_model.config.num_landscapes
    with torch.no_grad():
        stopped = any_model(input_ids=ids, thinking_steps=6, thinking_tolerance=1e9, output_energies=True)
        expected = any_model(input_ids=ids, thinking_steps=landscapes, output_energies=True)
    assert_close(stopped.logits, expected.logits, rtol=0, atol=0)
    assert (stopped.steps_taken == landscapes).all()
    assert stopped.energies.shape[-1] == 7
    # the energies go on repeating that of the state the row stopped at
    assert_close(stopped.energies[..., :landscapes], expected.energies[..., :landscapes], rtol=0, atol=0)
    assert_close(
        stopped.energies[..., landscapes:], expected.energies[..., -1:].expand(-1, -1, 7 - landscapes), **CLOSE
    )


def test_a_row_that_stopped_keeps_its_state_whatever_the_others_do(any_model: EBTForCausalLM) -> None:
    ids = tokens(6, 5)
    options = {"thinking_steps": 6, "thinking_step_size": 0.05, "output_energies": True}
    with torch.no_grad():
        changes = any_model(input_ids=ids, **options).energies.diff(dim=-1).abs()
        tolerance = float(changes[..., any_model.config.num_landscapes :].median())
        batch = any_model(input_ids=ids, thinking_tolerance=tolerance, **options)
        assert batch.steps_taken.float().std() > 0, "the tolerance must separate the rows"
        for index, row in enumerate(ids):
            alone = any_model(input_ids=row[None], thinking_tolerance=tolerance, **options)
            same = alone.steps_taken[0] == batch.steps_taken[index]
            assert same.float().mean() > 0.7  # rounding may move a row across the threshold
            assert_close(batch.logits[index][same], alone.logits[0][same], **CLOSE)
        for steps in range(1, 7):
            taken = batch.steps_taken == steps
            fixed = any_model(input_ids=ids, **{**options, "thinking_steps": steps})
            assert_close(batch.logits[taken], fixed.logits[taken], rtol=0, atol=1e-5)


def test_a_row_stops_at_the_first_state_with_the_target_energy(any_model: EBTForCausalLM) -> None:
    ids = tokens(6, 5)
    options = {"thinking_steps": 6, "thinking_step_size": 0.05, "output_energies": True}
    with torch.no_grad():
        free = any_model(input_ids=ids, **options).energies
        target = float(free[..., :-1].median())
        batch = any_model(input_ids=ids, thinking_target_energy=target, **options)
        # the energies before each of the six steps: the first one low enough stops the row
        low = free[..., :-1] <= target
        expected = torch.where(low.any(-1), low.int().argmax(-1), 6)
        assert torch.equal(batch.steps_taken, expected)
        assert len(expected.unique()) > 1, "the target must separate the rows"
        for steps in range(1, 7):
            taken = batch.steps_taken == steps
            fixed = any_model(input_ids=ids, **{**options, "thinking_steps": steps})
            assert_close(batch.logits[taken], fixed.logits[taken], rtol=0, atol=1e-5)
        untouched = any_model(input_ids=ids, thinking_target_energy=1e9, output_trajectory=True, **options)
    assert (untouched.steps_taken == 0).all()
    assert torch.equal(untouched.logits, untouched.trajectory[:, :, 0])
    # the last one is judged on the last landscape
    assert_close(untouched.energies[..., :-1], free[..., :1].expand(-1, -1, 6), **CLOSE)


# ---------------------------------------------------------------------------------------------------------- candidates


@pytest.mark.parametrize("selection", ["min_energy", "max_energy", "max_gap"])
def test_the_candidate_chosen_is_the_best_of_its_own_descents(any_model: EBTForCausalLM, selection: str) -> None:
    ids, start = tokens(2, 4), starts(2, 3, 4, 41)
    with torch.no_grad():
        chosen = any_model(
            input_ids=ids, initial_candidate=start, thinking={"selection": selection}, output_energies=True
        )
        alone = [
            any_model(input_ids=ids, initial_candidate=start[:, index], output_energies=True) for index in range(3)
        ]
    energies = torch.stack([output.energies for output in alone])
    final, gap = energies[..., -1], energies[..., 0] - energies[..., -1]
    best = {"min_energy": final.argmin(0), "max_energy": final.argmax(0), "max_gap": gap.argmax(0)}[selection]
    rows, columns = torch.arange(2)[:, None], torch.arange(4)[None]
    assert_close(chosen.energies, energies[best, rows, columns], **CLOSE)
    assert_close(chosen.logits, torch.stack([output.logits for output in alone])[best, rows, columns], **CLOSE)


def test_candidate_0_of_several_is_the_only_candidate_of_one(any_model: EBTForCausalLM) -> None:
    options = {"input_ids": tokens(2, 4), "thinking_step_size": 0.5}
    with torch.no_grad():
        single = any_model(**options).logits
        ends = [
            any_model(**options, thinking_candidates=2, thinking_selection=selection).logits
            for selection in ("min_energy", "max_energy")
        ]
    same = torch.stack([torch.isclose(end, single, **CLOSE).all(-1) for end in ends])
    assert same.any(0).all()  # one of the two ends is that of the single candidate, at every position
    assert not same.all()


def test_more_candidates_end_no_higher(any_model: EBTForCausalLM) -> None:
    with torch.no_grad():
        ends = [
            any_model(input_ids=tokens(2, 4), thinking_candidates=count, output_energies=True).energies[..., -1]
            for count in (1, 2, 5)
        ]
    assert (ends[1] <= ends[0] + 1e-3).all()
    assert (ends[2] <= ends[0] + 1e-3).all()


RANDOM_OPTIONS: list[dict[str, Any]] = [
    {"init": "normal"},
    {"candidates": 3, "selection": "max_gap"},
    {"noise_std": 0.5},
    {"init": "normal", "candidates": 2, "noise_std": 0.1, "noise_first_step_only": True},
]


@pytest.mark.parametrize("options", RANDOM_OPTIONS)
def test_a_seed_repeats_a_call_and_leaves_torch_s_generator_alone(
    make_model: MakeModel, options: dict[str, Any]
) -> None:
    model, ids = make_model(), tokens(2, 4)

    def think(seed: int) -> Tensor:
        with torch.no_grad():
            return model(input_ids=ids, thinking=ThinkingConfig(seed=seed, **options)).logits

    before = torch.get_rng_state()
    first = think(3)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(99)
    assert torch.equal(think(3), first)
    assert not torch.equal(think(4), first)


@pytest.mark.parametrize("options", RANDOM_OPTIONS)
def test_seed_minus_1_draws_from_torch_s_generator(make_model: MakeModel, options: dict[str, Any]) -> None:
    model, ids = make_model(), tokens(2, 4)

    def think(seed: int) -> Tensor:
        torch.manual_seed(seed)
        with torch.no_grad():
            return model(input_ids=ids, thinking=ThinkingConfig(seed=-1, **options)).logits

    first = think(5)
    assert torch.equal(think(5), first)
    assert not torch.equal(think(6), first)


def test_without_noise_or_random_starts_no_seed_matters(any_model: EBTForCausalLM) -> None:
    with torch.no_grad():
        first, second = (any_model(input_ids=tokens(2, 4), thinking_seed=seed).logits for seed in (0, 7))
    assert torch.equal(first, second)


def test_a_random_start_does_not_depend_on_the_batch(any_model: EBTForCausalLM) -> None:
    ids = tokens(3, 4)
    with torch.no_grad():
        batch = any_model(input_ids=ids, thinking_init="normal").logits
        for index, row in enumerate(ids):
            assert_close(batch[index], any_model(input_ids=row[None], thinking_init="normal").logits[0], **CLOSE)


def test_noise_on_the_first_step_only_is_a_noisy_start(make_model: MakeModel) -> None:
    model, ids = make_model(), tokens(2, 4)
    options = {"thinking_noise_std": 0.5, "thinking_noise_first_step_only": True, "thinking_steps": 1}
    with torch.no_grad():
        one = model(input_ids=ids, **options).logits
        two = model(input_ids=ids, **{**options, "thinking_steps": 2}).logits
        continued = model(input_ids=ids, initial_candidate=one, thinking_landscapes=[1]).logits
    assert_close(two, continued, **CLOSE)


# ----------------------------------------------------------------------------------------------------------- schedules


def test_thinking_goes_on_where_it_left_off(any_model: EBTForCausalLM) -> None:
    ids, last = tokens(2, 4), any_model.config.num_landscapes - 1
    with torch.no_grad():
        first = any_model(input_ids=ids, thinking_steps=2).logits
        rest = any_model(input_ids=ids, initial_candidate=first, thinking_landscapes=[last, last]).logits
        assert_close(rest, any_model(input_ids=ids, thinking_steps=4).logits, **CLOSE)


def test_steps_beyond_the_landscapes_repeat_the_last(make_model: MakeModel) -> None:
    model, ids = make_model(num_landscapes=2), tokens(2, 4)
    with torch.no_grad():
        long = model(input_ids=ids, thinking_steps=4).logits
        assert torch.equal(model(input_ids=ids, thinking_landscapes=[0, 1, 1, 1]).logits, long)


def test_scaling_the_step_size_is_another_step_size(any_model: EBTForCausalLM) -> None:
    ids, own = tokens(2, 4), any_model.step_size.value.item()
    with torch.no_grad():
        doubled = any_model(input_ids=ids, thinking_step_size=2 * own).logits
        assert_close(any_model(input_ids=ids, thinking_step_size_scale=2.0).logits, doubled, **CLOSE)
        assert_close(any_model(input_ids=ids, thinking_step_size_scale=[2.0, 2.0]).logits, doubled, **CLOSE)
        assert_close(any_model(input_ids=ids, thinking_step_size=own).logits, any_model(input_ids=ids).logits, **CLOSE)
        any_model.step_size.value.fill_(2 * own)
        assert_close(any_model(input_ids=ids).logits, doubled, **CLOSE)


def test_one_scale_per_step_scales_that_step(make_model: MakeModel) -> None:
    model, ids = make_model(), tokens(2, 4)
    with torch.no_grad():
        first = model(input_ids=ids, thinking_landscapes=[0], thinking_step_size_scale=0.5).logits
        expected = model(
            input_ids=ids, initial_candidate=first, thinking_landscapes=[1], thinking_step_size_scale=[3.0]
        ).logits
        assert_close(model(input_ids=ids, thinking_step_size_scale=[0.5, 3.0]).logits, expected, **CLOSE)


def test_a_learned_step_size_never_falls_below_its_floor(make_model: MakeModel) -> None:
    model, ids = make_model(), tokens(2, 4)
    with torch.no_grad():
        model.step_size.value.fill_(-3.0)
        below = model(input_ids=ids).logits
        assert torch.equal(model(input_ids=ids, thinking_step_size=1e-4).logits, below)


@pytest.mark.parametrize("form", ["flat", "dict", "config", "flat over config", "model config"])
def test_every_way_to_ask_for_thinking_is_the_same(make_model: MakeModel, form: str) -> None:
    model, ids = make_model(), tokens(2, 4)
    with torch.no_grad():
        expected = model(input_ids=ids, thinking_steps=3, thinking_step_size=1.5).logits
        if form == "model config":
            model.config.thinking_steps = 3
            got = model(input_ids=ids, thinking_step_size=1.5)
        else:
            got = model(
                input_ids=ids,
                **{
                    "flat": {"thinking_steps": 3, "thinking_step_size": 1.5, "thinking": None},
                    "dict": {"thinking": {"thinking_steps": 3, "step_size": 1.5}},
                    "config": {"thinking": ThinkingConfig(steps=3, step_size=1.5)},
                    "flat over config": {"thinking": ThinkingConfig(steps=7, step_size=1.5), "thinking_steps": 3},
                }[form],
            )
    assert torch.equal(got.logits, expected)


def test_training_thinks_as_the_config_says(make_model: MakeModel) -> None:
    model = make_model(candidate_init="zeros", thinking_steps=3).train()
    output = model(input_ids=tokens(2, 4), labels=tokens(2, 4))
    assert output.step_losses.shape == (3,)
    again = model(input_ids=tokens(2, 4), labels=tokens(2, 4))
    assert torch.equal(output.loss, again.loss)  # zeros leave nothing to chance
    noisy = make_model(candidate_init="zeros", thinking_noise_std=1.0).train()
    assert not torch.equal(*(noisy(input_ids=tokens(2, 4), labels=tokens(2, 4)).loss for _ in range(2)))


# ------------------------------------------------------------------------------ the pure function, away from any model


def bowl(point: Tensor, landscape: int) -> Tensor:
    """Energy of points (rows, width): half the squared distance from the landscape's number, per row."""
    return 0.5 * (point - landscape).pow(2).sum(-1)


def test_descent_of_a_bowl_shrinks_by_one_factor_a_step() -> None:
    start = torch.tensor([[4.0, 2.0], [1.0, -1.0]])
    result = descend(bowl, Points(), start, [DescentStep(0, 0.25)] * 3, final_energy=True)
    assert_close(result.state, start * 0.75**3)
    expected = [bowl(start * 0.75**step, 0) for step in range(4)]
    assert_close(result.energies, expected)
    assert result.steps_taken.tolist() == [3, 3]


def test_every_step_moves_on_its_own_landscape() -> None:
    result = descend(bowl, Points(), torch.zeros(1, 2), [DescentStep(1, 1.0), DescentStep(5, 1.0)])
    assert_close(result.state, torch.full((1, 2), 5.0))


def test_the_step_size_may_learn_through_the_descent() -> None:
    size = torch.tensor(0.25, requires_grad=True)
    result = descend(bowl, Points(), torch.ones(1, 1), [DescentStep(0, size)] * 2, detach_between_steps=False)
    (gradient,) = torch.autograd.grad(result.state.sum(), size)
    # without a graph of the energy its gradient is a constant: x2 = x1 - a g(x1), and dx/da = -g(x0) - g(x1)
    assert_close(gradient, torch.tensor(-1.0 - 0.75))
    result = descend(
        bowl, Points(), torch.ones(1, 1), [DescentStep(0, size)] * 2, detach_between_steps=False, graph_on_steps="all"
    )
    (gradient,) = torch.autograd.grad(result.state.sum(), size)
    assert_close(gradient, torch.tensor(-2 * 0.75))  # x2 = (1 - a)^2


def test_rows_stop_one_by_one_and_repeat_the_energy_they_stopped_at() -> None:
    start = torch.tensor([[0.1], [8.0]])
    rules = StopRules(tolerance=0.1)
    result = descend(bowl, Points(), start, [DescentStep(0, 0.5)] * 6, stop=rules, final_energy=True)
    assert result.steps_taken.tolist()[0] == 1
    assert result.steps_taken[1] > 2
    assert_close(result.state[0], start[0] / 2)
    rest = torch.stack(result.energies)[1:, 0]
    assert_close(rest, bowl(start[:1] / 2, 0).expand(6))
    assert_close(result.energies[-1], bowl(result.state, 0))


def test_a_descent_where_all_rows_stopped_computes_no_more() -> None:
    calls = []

    def counted(point: Tensor, landscape: int) -> Tensor:
        calls.append(landscape)
        return bowl(point, landscape)

    seen = []
    result = descend(
        counted,
        Points(),
        torch.tensor([[0.1]]),
        [DescentStep(0, 0.5)] * 50,
        stop=StopRules(tolerance=10.0),
        on_step=lambda index, state, energy: seen.append(index),
    )
    assert len(calls) == 2
    assert len(result.energies) == 50
    assert seen == list(range(50))


def test_noise_and_acceptance_report_the_energy_of_the_state_returned() -> None:
    generator = torch.Generator().manual_seed(0)
    schedule = [DescentStep(0, 1.9, noise_std=1.0), DescentStep(0, 2.5, noise_std=1.0)]
    options: dict[str, Any] = {"accept_only_lower_energy": True, "final_energy": True, "generator": generator}
    result = descend(bowl, Points(), torch.randn(20, 3), schedule, **options)
    assert (result.steps_taken == 1).all()  # the second step overshoots
    assert_close(result.energies[-1], bowl(result.state, 0))


@pytest.mark.parametrize(
    ("options", "message"), [({"schedule": []}, "empty schedule"), ({"graph_on_steps": "some"}, "'some'")]
)
def test_a_descent_that_makes_no_sense_raises(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        descend(bowl, Points(), torch.zeros(1, 1), **{"schedule": [DescentStep(0, 1.0)], **options})
