"""Laws of adaptive thinking: who stops when, what a budget leaves to whom, and who is given up."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from ebt_transformers import EBTConfig, EBTForCausalLM, EBTForImageDenoising, EBTImageConfig, ThinkingConfig
from ebt_transformers.cli import main
from ebt_transformers.modeling_ebt import DescentStep, StopRules, descend
from ebt_transformers.modeling_ebt.budget import StepBudget
from ebt_transformers.modeling_ebt.candidates import kl_divergence
from ebt_transformers.modeling_ebt.stopping import Narrowing


sys.path.append(str(Path(__file__).parent))  # the helper beside this file, under every import mode of pytest
from points import Points  # noqa: E402


MakeModel = Callable[..., EBTForCausalLM]
CLOSE = {"rtol": 1e-3, "atol": 1e-3}
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
TRACED: dict[str, Any] = {"output_energies": True, "return_dict_in_generate": True}
# distributions of this one change ever less from step to step, and at different speeds
SLOW: dict[str, Any] = {"update": "residual", "step_conditioning": "none", "num_landscapes": 1, "step_size": 0.03}


def tokens(*shape: int, seed: int = 0) -> Tensor:
    """Random token ids."""
    return torch.randint(1, 41, shape, generator=torch.Generator().manual_seed(seed))


def divergences(model: EBTForCausalLM, ids: Tensor, steps: int) -> Tensor:
    """KL(new || old) of every step, (B, T, steps), the long way round."""
    with torch.no_grad():
        path = model(ids, thinking_steps=steps, output_trajectory=True).trajectory.double().log_softmax(-1)
    return (path[:, :, 1:].exp() * (path[:, :, 1:] - path[:, :, :-1])).sum(-1)


def image_model(**overrides: Any) -> EBTForImageDenoising:
    """A tiny denoiser."""
    torch.manual_seed(1)
    sizes = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = EBTForImageDenoising(EBTImageConfig(**{**sizes, "num_channels": 1, **overrides})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modulation" in name or "energy_head" in name:  # zero at first: a flat energy
                parameter.normal_(std=0.3)
    return model


# ----------------------------------------------------------------------------------- stopping by a stable distribution


def test_kl_divergence_is_that_of_torch_s_distributions() -> None:
    new, old = 5 * torch.randn(2, 3, 41), 5 * torch.randn(2, 3, 41)
    first, second = (torch.distributions.Categorical(logits=logits) for logits in (new, old))
    assert_close(kl_divergence(new, old), torch.distributions.kl_divergence(first, second))
    assert (kl_divergence(new, new) == 0).all()


def test_a_position_stops_after_the_first_step_that_changes_little(make_model: MakeModel) -> None:
    model, ids, steps = make_model(**SLOW), tokens(3, 5), 8
    changes = divergences(model, ids, steps)
    tolerance = 1.01 * float(changes.median())  # not that of anyone
    small = changes[..., :-1] <= tolerance  # after the last step there is nothing left to stop
    expected = torch.where(small.any(-1), small.int().argmax(-1) + 1, steps)
    with torch.no_grad():
        free = model(ids, thinking_steps=steps, output_trajectory=True, output_energies=True)
        bound = model(ids, thinking_steps=steps, thinking_kl_tolerance=tolerance, output_energies=True)
    assert torch.equal(bound.steps_taken, expected)
    assert len(expected.unique()) > 2, "the tolerance must separate the positions"
    index = expected[..., None, None].expand(-1, -1, 1, free.logits.shape[-1])
    assert_close(bound.logits, free.trajectory.gather(2, index).squeeze(2), **CLOSE)
    # its energies are those of the free descent until it stops, and then that of the state it keeps
    after = torch.arange(steps + 1).expand_as(free.energies)
    assert_close(bound.energies, free.energies.gather(-1, after.minimum(expected[..., None])), **CLOSE)


def test_a_stable_distribution_saves_the_forward_passes_of_all_further_steps(make_model: MakeModel) -> None:
    model, ids = make_model(**SLOW), tokens(1, 4)
    calls: list[int] = []
    score = model.model._score_candidates
    model.model._score_candidates = lambda *args: calls.append(1) or score(*args)
    with torch.no_grad():
        assert (model(ids, thinking_steps=8, thinking_kl_tolerance=1e9).steps_taken == 1).all()
    assert len(calls) == 1


def test_a_kl_tolerance_waits_for_the_landscape_to_repeat(make_model: MakeModel) -> None:
    model = make_model(num_landscapes=3)
    with torch.no_grad():
        taken = model(tokens(1, 4), thinking_steps=6, thinking_kl_tolerance=1e9).steps_taken
    assert (taken == 3).all()


def test_a_kl_tolerance_of_0_is_none(any_model: EBTForCausalLM) -> None:
    ids = tokens(2, 4)
    any_model.config.thinking_kl_tolerance = 1e9
    with torch.no_grad():
        off = any_model(ids, thinking_steps=5, thinking_kl_tolerance=0)
        stopped = any_model(ids, thinking_steps=5)
        any_model.config.thinking_kl_tolerance = None
        free = any_model(ids, thinking_steps=5)
    assert torch.equal(off.logits, free.logits) and torch.equal(off.steps_taken, free.steps_taken)
    assert (stopped.steps_taken < 5).all()


STOPS: dict[str, dict[str, Any]] = {
    "kl": {"thinking_kl_tolerance": 3e-3},
    "kl of several": {"thinking_kl_tolerance": 3e-3, "thinking_candidates": 3},
    "energy": {"thinking_tolerance": 0.1},
    "kl, rejecting": {"thinking_kl_tolerance": 3e-3, "thinking_accept_only_lower_energy": True},
    "pruned": {"thinking_candidates": 5, "thinking_prune_keep": 2, "thinking_kl_tolerance": 3e-3},
    "pruned late": {"thinking_candidates": 4, "thinking_prune_keep": 1, "thinking_prune_after": 5},
    "pruned by gap": {"thinking_candidates": 4, "thinking_prune_keep": 2, "thinking_selection": "max_gap"},
    "budget": {"thinking_budget": 16, "thinking_kl_tolerance": 3e-3},
    "budget of several": {"thinking_budget": 12, "thinking_candidates": 3, "thinking_kl_tolerance": 3e-3},
}


@pytest.mark.parametrize("rules", list(STOPS))
@pytest.mark.parametrize("update", ["residual", "replace"])
def test_no_row_feels_the_others(make_model: MakeModel, rules: str, update: str) -> None:
    model = make_model(**{**SLOW, "update": update})
    ids, mask = tokens(4, 7), torch.ones(4, 7).long()
    mask[1, :3] = mask[3, :5] = 0  # left padding
    options = {"thinking_steps": 8, "output_energies": True, **STOPS[rules]}
    with torch.no_grad():
        batch = model(ids, attention_mask=mask, **options)
        for index, first in enumerate((0, 3, 0, 5)):
            alone = model(ids[index : index + 1, first:], **options)
            assert_close(batch.logits[index, first:], alone.logits[0], **CLOSE)
            assert_close(batch.energies[index, first:], alone.energies[0], **CLOSE)
            assert torch.equal(batch.steps_taken[index, first:], alone.steps_taken[0])


@pytest.mark.parametrize("rules", list(STOPS))
def test_generation_is_that_of_each_row_alone_without_a_cache(make_model: MakeModel, rules: str) -> None:
    model, ids = make_model(**SLOW), tokens(3, 4)
    options = {**GREEDY, **TRACED, "thinking_steps": 8, **STOPS[rules]}
    batch = model.generate(ids, **options)
    for index, row in enumerate(ids):
        alone = model.generate(row[None], **options, use_cache=False)
        assert torch.equal(batch.sequences[index], alone.sequences[0])
        assert torch.equal(batch.steps_taken[index], alone.steps_taken[0])
        assert_close(batch.energies[index], alone.energies[0], **CLOSE)


def test_stopped_candidates_are_not_computed(make_model: MakeModel) -> None:
    model, ids = make_model(**SLOW), tokens(4, 7)
    sizes: list[int] = []
    score = model.model._score_candidates
    model.model._score_candidates = lambda embeds, *rest: sizes.append(embeds[..., 0].numel()) or score(embeds, *rest)
    tolerance = 1.01 * float(divergences(model, ids, 6)[..., 0].median())
    sizes.clear()
    with torch.no_grad():
        taken = model(ids, thinking_steps=6, thinking_kl_tolerance=tolerance).steps_taken
    going = [int((taken > index).sum()) for index in range(6)]
    assert sizes[0] == 28
    assert sizes[-1] < 28
    assert all(count <= size for count, size in zip(going, sizes, strict=False))
    sizes.clear()
    with torch.no_grad():
        model(ids[:1], thinking_steps=3, thinking_candidates=8, thinking_prune_keep=2)
    assert sizes == [8 * 7, 8 * 7, 2 * 7, 2 * 7, 2 * 7]  # a step, a look at all, two steps, the energies of the end


def test_the_winner_s_trajectory_is_whole_when_others_are_left_out(make_model: MakeModel) -> None:
    model, ids = make_model(**SLOW), tokens(4, 7)
    rules = {"thinking_steps": 6, "thinking_kl_tolerance": 3e-3, "output_energies": True}
    with torch.no_grad():
        watched = model(ids, **rules, output_trajectory=True, labels=ids)
        unwatched = model(ids, **rules)
    assert_close(watched.trajectory[:, :, -1], unwatched.logits)
    stands = watched.trajectory[:, :, 1:] == watched.trajectory[:, :, :-1]
    assert torch.equal((~stands.all(-1)).sum(-1), unwatched.steps_taken)
    assert watched.step_losses.shape == (6,)


# -------------------------------------------------------------------------------------------------------------- budget


def test_a_budget_is_spent_from_left_to_right(make_model: MakeModel) -> None:
    model, ids = make_model(**SLOW), tokens(2, 6)
    with torch.no_grad():
        output = model(ids, thinking_steps=4, thinking_budget=10)
    assert output.steps_taken.tolist() == [[4, 4, 2, 1, 1, 1]] * 2
    assert output.steps_spent.tolist() == [[4, 8, 10, 11, 12, 13]] * 2


def test_what_a_token_leaves_is_left_to_later_ones(make_model: MakeModel) -> None:
    model, ids = make_model(**SLOW), tokens(3, 8)
    rules = {"thinking_steps": 8, "thinking_kl_tolerance": 1.01 * float(divergences(model, ids, 8)[..., 2].median())}
    with torch.no_grad():
        free, bound = model(ids, **rules), model(ids, **rules, thinking_budget=24)
    for row in range(3):
        wanted, taken, spent = (
            found[row].tolist() for found in (free.steps_taken, bound.steps_taken, bound.steps_spent)
        )
        left = 24
        for index, steps in enumerate(wanted):
            assert taken[index] == min(steps, max(1, left))
            left -= taken[index]
            assert spent[index] == 24 - left
    assert not torch.equal(free.steps_taken, bound.steps_taken)
    assert len(bound.steps_taken[:, :3].unique()) > 1


@pytest.mark.parametrize("several", [{}, {"thinking_candidates": 3}, {"num_beams": 3, "num_return_sequences": 2}])
@pytest.mark.parametrize("use_cache", [True, False])
def test_generating_with_a_budget_is_reading_with_it(
    make_model: MakeModel, several: dict[str, Any], use_cache: bool
) -> None:
    """New tokens spend in generate() what their positions spend in forward(), along every beam."""
    model, ids = make_model(**SLOW), tokens(2, 4)
    rules = {"thinking_steps": 6, "thinking_kl_tolerance": 3e-3, "thinking_budget": 14}
    output = model.generate(ids, **GREEDY, **TRACED, **rules, **several, use_cache=use_cache)
    rules |= {name: value for name, value in several.items() if name.startswith("thinking")}
    positions = torch.arange(3, 9)
    with torch.no_grad():
        read = model(output.sequences[:, :-1], **rules, logits_to_keep=positions)
        free = model(output.sequences[:, :-1], **{**rules, "thinking_budget": 0}, logits_to_keep=positions)
    assert torch.equal(output.steps_taken, read.steps_taken)
    assert not torch.equal(read.steps_taken, free.steps_taken), "the budget must bind"


def test_a_text_goes_on_with_what_an_earlier_call_spent(make_model: MakeModel) -> None:
    model, ids = make_model(**SLOW), tokens(2, 6)
    rules = {"thinking_steps": 4, "thinking_budget": 13}
    with torch.no_grad():
        whole = model(ids, **rules)
        first = model(ids[:, :3], **rules, use_cache=True)
        rest = model(ids[:, 3:], **rules, past_key_values=first.past_key_values, steps_spent=first.steps_spent[:, -1])
    assert_close(torch.cat([first.logits, rest.logits], 1), whole.logits, **CLOSE)
    assert torch.equal(torch.cat([first.steps_spent, rest.steps_spent], 1), whole.steps_spent)


def test_packed_texts_have_a_budget_each(make_model: MakeModel) -> None:
    model, ids = make_model(**SLOW), tokens(1, 6)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]])
    with torch.no_grad():
        taken = model(ids, position_ids=positions, thinking_steps=3, thinking_budget=4).steps_taken
    assert taken.tolist() == [[3, 1, 1, 3, 1, 1]]


def test_a_noisy_budget_counts_the_noise_it_walks_with(make_model: MakeModel) -> None:
    model, ids = make_model(**SLOW), tokens(2, 6)
    rules = {"thinking_noise_std": 0.1, "thinking_kl_tolerance": 2e-2, "thinking_steps": 6, "thinking_seed": -1}
    with torch.no_grad():
        output = model(ids, **rules, thinking_budget=15)
    assert torch.equal(output.steps_spent, output.steps_taken.cumsum(1))
    assert (output.steps_spent[:, -1] <= 15 + 5).all()


def test_a_share_is_never_below_one_step() -> None:
    budget = StepBudget.of_call(3, torch.tensor([0, 100]), 2, torch.arange(4)[None])
    limits, spent = budget.share(torch.tensor([[2, 2, 2, 0], [2, 2, 2, 0]]))
    assert limits.tolist() == [[3, 1, 1, 1], [1, 1, 1, 1]]
    assert spent.tolist() == [[2, 3, 4, 4], [101, 102, 103, 103]]


# ------------------------------------------------------------------------------------------------------------- pruning


def test_keeping_all_candidates_is_not_pruning(any_model: EBTForCausalLM) -> None:
    options = {"thinking_steps": 3, "thinking_candidates": 3, "output_energies": True}
    with torch.no_grad():
        pruned = any_model(tokens(2, 4), **options, thinking_prune_keep=3, thinking_prune_after=2)
        free = any_model(tokens(2, 4), **options)
    assert torch.equal(pruned.logits, free.logits) and torch.equal(pruned.energies, free.energies)


@pytest.mark.parametrize("selection", ["min_energy", "max_gap", "max_energy"])
@pytest.mark.parametrize("after", [1, 3])
def test_the_winner_is_the_best_of_those_kept_in_a_run_without_pruning(
    any_model: EBTForCausalLM, selection: str, after: int
) -> None:
    ids, starts = tokens(2, 4), torch.randn(2, 5, 4, 41)
    options = {"thinking_steps": 4, "output_energies": True, "thinking_step_size": 0.3}
    with torch.no_grad():
        pruned = any_model(
            ids,
            initial_candidate=starts,
            thinking_candidates=5,
            thinking_selection=selection,
            thinking_prune_keep=2,
            thinking_prune_after=after,
            **options,
        )
        alone = [any_model(ids, initial_candidate=starts[:, index], **options) for index in range(5)]
    energies = torch.stack([output.energies for output in alone], 1)  # (B, M, T, K + 1)
    now, end = (
        {
            "min_energy": energies[..., step],
            "max_energy": -energies[..., step],
            "max_gap": energies[..., step] - energies[..., 0],
        }[selection]
        for step in (after, 4)
    )
    kept = now.argsort(1)[:, :2]
    winner = kept.gather(1, end.gather(1, kept).argmin(1, keepdim=True))
    logits = torch.stack([output.logits for output in alone], 1)
    expected = logits.gather(1, winner[..., None].expand(-1, -1, -1, 41)).squeeze(1)
    assert_close(pruned.logits, expected, **CLOSE)
    assert (pruned.steps_taken == 4).all()


def test_pruned_images_end_as_the_best_of_those_kept() -> None:
    model = image_model(candidate_init_std=0.5, step_size=1.0)
    noisy = torch.randn(3, 1, 8, 8)
    starts = noisy[:, None] + 0.5 * torch.randn(3, 4, 1, 8, 8)
    with torch.no_grad():
        pruned = model(noisy, initial_candidate=starts, thinking_candidates=4, thinking_steps=3, thinking_prune_keep=2)
        alone = [
            model(noisy, initial_candidate=starts[:, index], thinking_steps=3, output_energies=True)
            for index in range(4)
        ]
    energies = torch.stack([output.energies for output in alone], 1)
    for image in range(3):
        kept = energies[image, :, 1].argsort()[:2]
        winner = int(kept[energies[image, kept, -1].argmin()])
        assert_close(pruned.reconstruction[image], alone[winner].reconstruction[image], **CLOSE)


@pytest.mark.parametrize("conditioning", ["none", "noisy_image"])
def test_images_that_stopped_are_not_computed(conditioning: str) -> None:
    model, noisy = image_model(image_conditioning=conditioning, step_size=1.0), torch.randn(8, 1, 8, 8)
    with torch.no_grad():
        target = float(model(noisy, thinking_steps=1, output_energies=True).energies[:, 0].sort().values[3:5].mean())
        rows: list[int] = []
        hook = model.model.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
        output = model(noisy, thinking_steps=3, thinking_target_energy=target, output_energies=True)
        hook.remove()
        for index in range(8):
            one = noisy[index : index + 1]
            alone = model(one, thinking_steps=3, thinking_target_energy=target, output_energies=True)
            assert_close(output.reconstruction[index], alone.reconstruction[0], **CLOSE)
            assert_close(output.energies[index], alone.energies[0], **CLOSE)
    assert rows[0] == 8 and rows[1] <= 4
    assert (output.steps_taken == 0).sum() >= 4 and (output.steps_taken > 0).any()


# ----------------------------------------------------------------------------------------------- the descent by itself


def test_a_descent_that_leaves_candidates_out_is_the_same_descent() -> None:
    centres, start = torch.randn(5, 6, 3), torch.randn(5, 6, 3)

    def energy_of(centre: Tensor) -> Callable[[Tensor, int], Tensor]:
        return lambda point, landscape: 0.5 * (point - centre).pow(2).sum(-1)

    limits = torch.randint(1, 7, (5, 6))
    limits[2] = 1
    schedule, seen = [DescentStep(0, 0.25)] * 6, []
    plain = descend(energy_of(centres), Points(), start, schedule, stop=StopRules(step_limits=limits))

    def narrow(index: tuple[Tensor, Tensor]) -> Callable[[Tensor, int], Tensor]:
        seen.append(index[1].numel())
        return energy_of(centres[index])

    unchanged = start.clone()
    rules = StopRules(step_limits=limits)
    result = descend(
        energy_of(centres), Points(), start, schedule, stop=rules, narrow=Narrowing(narrow), final_energy=True
    )
    assert torch.equal(start, unchanged)
    assert_close(result.state, plain.state)
    assert torch.equal(result.steps_taken, limits)
    assert seen and sorted(seen, reverse=True) == seen
    assert_close(result.state, centres + (start - centres) * 0.75 ** limits[..., None])
    assert_close(result.energies[-1], energy_of(centres)(result.state, 0))


# -------------------------------------------------------------------------------------------------------------- errors


BAD: list[tuple[dict[str, Any], str]] = [
    ({"kl_tolerance": -1e-3}, "thinking_kl_tolerance.*at least 0.*-0.001"),
    ({"kl_tolerance": float("nan")}, "thinking_kl_tolerance.*finite.*nan"),
    ({"budget": -1}, "thinking_budget.*integer of at least 0.*-1"),
    ({"budget": 2.5}, "thinking_budget.*integer.*2.5"),
    ({"prune_keep": 0}, "thinking_prune_keep.*at least 1.*0"),
    ({"prune_after": 0}, "thinking_prune_after.*at least 1.*0"),
]


@pytest.mark.parametrize(("values", "message"), BAD, ids=[str(values) for values, _ in BAD])
def test_bad_values_name_what_is_allowed(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ThinkingConfig(**values)


MEANINGLESS: list[tuple[dict[str, Any], str]] = [
    ({"thinking_prune_after": 1}, "thinking_prune_after.*thinking_prune_keep"),
    ({"thinking_prune_keep": 3, "thinking_candidates": 2}, r"at most the number of candidates \(2\), got 3"),
    ({"thinking_prune_keep": 2}, r"at most the number of candidates \(1\), got 2"),
    (
        {"thinking_prune_keep": 1, "thinking_candidates": 2, "thinking_prune_after": 2, "thinking_steps": 2},
        r"below the number of steps \(2\), got 2",
    ),
    ({"steps_spent": torch.zeros(1).long()}, "thinking_budget"),
    ({"steps_spent": torch.zeros(2).long(), "thinking_budget": 3}, r"shape \(1,\).*\(2,\)"),
]


@pytest.mark.parametrize(("options", "message"), MEANINGLESS, ids=[str(list(options)) for options, _ in MEANINGLESS])
def test_options_that_mean_nothing_together_raise(
    make_model: MakeModel, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_model()(tokens(1, 4), **options)


@pytest.mark.parametrize(
    "options",
    [{"thinking_kl_tolerance": 0.1}, {"thinking_budget": 5}, {"thinking_prune_keep": 1, "thinking_candidates": 2}],
)
def test_adaptive_thinking_is_for_evaluation(make_model: MakeModel, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        make_model().train()(tokens(1, 4), **options)


def test_a_default_tolerance_leaves_training_alone(make_model: MakeModel) -> None:
    model = make_model(thinking_kl_tolerance=1e9, thinking_steps=4).train()
    assert model(tokens(1, 4), labels=tokens(1, 4)).step_losses.shape == (4,)


@pytest.mark.parametrize("name", ["kl_tolerance", "budget"])
def test_a_picture_has_neither_distribution_nor_budget(name: str) -> None:
    with pytest.raises(ValueError, match=f"thinking_{name}.*means nothing.*picture"):
        image_model()(torch.randn(1, 1, 8, 8), **{f"thinking_{name}": 1})
    with pytest.raises(ValueError, match=f"Unknown thinking option.*thinking_{name}.*Allowed"):
        EBTImageConfig(**{f"thinking_{name}": 1})


def test_a_config_keeps_its_kl_tolerance(tmp_path: Any) -> None:
    EBTConfig(thinking_kl_tolerance=0.5).save_pretrained(tmp_path)
    assert EBTConfig.from_pretrained(tmp_path).thinking_kl_tolerance == 0.5
    with pytest.raises(Exception, match="thinking_kl_tolerance.*-1"):
        EBTConfig(thinking_kl_tolerance=-1)


def test_assisted_decoding_has_no_budget(make_model: MakeModel) -> None:
    model = make_model()
    with pytest.raises(ValueError, match="thinking_budget.*assisted"):
        model.generate(tokens(1, 4), **GREEDY, thinking_budget=9, prompt_lookup_num_tokens=2)
    model.generation_config.thinking_budget = 9
    with pytest.raises(ValueError, match="thinking_budget.*assisted"):
        model.generate(tokens(1, 4), **GREEDY, assistant_model=make_model())


def test_the_command_line_takes_every_adaptive_option(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", "ROMEO:", "--max-new-tokens", "4", "--output-energies", "--json", "--thinking-steps", "4"]
    words += ["--thinking-budget", "6", "--thinking-candidates", "3", "--thinking-prune-keep", "1"]
    assert main([*words, "--thinking-prune-after", "2", "--thinking-kl-tolerance", "0"]) == 0
    taken = [token["steps_taken"] for token in json.loads(capsys.readouterr().out)["tokens"]]
    assert taken == [4, 2, 1, 1]
