"""Laws of the image model: batches, sizes, precisions, saving and loading change nothing; energies are energies."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoConfig, AutoModel, AutoModelForImageToImage

from ebt_transformers import EBTForImageDenoising, EBTImageConfig, EBTImageModel
from ebt_transformers.modeling_ebt.positions import sincos_positions


TINY: dict[str, Any] = {
    "image_size": 8,
    "patch_size": 4,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "step_size": 2.0,
    "thinking_steps": 3,
}
CONDITIONAL: dict[str, Any] = {"image_conditioning": "noisy_image"}
VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {},
    "two-landscapes": {"num_landscapes": 2, "candidate_init_std": 0.3},
    "conditional": CONDITIONAL,
    "conditional-from-noise": {**CONDITIONAL, "candidate_init": "normal", "num_landscapes": 2},
    "oblong-grey": {"image_size": [8, 12], "num_channels": 1},
}
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
MakeModel = Callable[..., EBTForImageDenoising]


def build_model(**overrides: Any) -> EBTForImageDenoising:
    """A tiny random model in evaluation mode, away from its flat start."""
    torch.manual_seed(1)
    model = EBTForImageDenoising(EBTImageConfig(**{**TINY, **overrides})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modulation" in name or "energy_head" in name or name.endswith("bias"):
                parameter.normal_(std=0.3)
    return model


@pytest.fixture(params=list(VARIANTS))
def any_model(request: pytest.FixtureRequest) -> EBTForImageDenoising:
    """One tiny model of every variant."""
    return build_model(**VARIANTS[request.param])


def images(model: EBTForImageDenoising, batch: int = 2, size: tuple[int, int] | None = None, seed: int = 0) -> Tensor:
    """Random images that fit the model."""
    height, width = size or model.config.height_and_width
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, model.config.num_channels, height, width, generator=generator)


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    """Gradients of all parameters that have one."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def train_once(model: EBTForImageDenoising, noisy: Tensor, clean: Tensor, **kwargs: Any) -> tuple[Tensor, dict]:
    """Loss and gradients of one training step from a fixed random state."""
    model.train().zero_grad()
    torch.manual_seed(3)
    loss = model(noisy, labels=clean, **kwargs).loss
    loss.backward()
    return loss.detach(), gradients(model)


def context_of(model: EBTForImageDenoising, noisy: Tensor) -> Tensor | None:
    """The noisy images, for a model that looks at them."""
    return noisy if model.config.image_conditioning == "noisy_image" else None


# ------------------------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"thinking_steps": 6, "thinking_tolerance": 0.05},
        {"thinking_steps": 6, "thinking_target_energy": -0.05},
        {"thinking_step_size": 200.0, "thinking_accept_only_lower_energy": True},
    ],
    ids=["plain", "tolerance", "target", "acceptance"],
)
def test_a_batch_equals_its_rows_alone(any_model: EBTForImageDenoising, options: dict[str, Any]) -> None:
    noisy = images(any_model, 4)
    with torch.no_grad():
        whole = any_model(noisy, output_energies=True, **options)
        rows = [any_model(row[None], output_energies=True, **options) for row in noisy]
    assert_close(whole.reconstruction, torch.cat([row.reconstruction for row in rows]), **CLOSE)
    assert_close(whole.energies, torch.cat([row.energies for row in rows]), **CLOSE)
    assert torch.equal(whole.steps_taken, torch.cat([row.steps_taken for row in rows]))


@pytest.mark.parametrize("variant", ["two-landscapes", "conditional-from-noise"])
def test_a_batch_equals_its_rows_alone_with_several_candidates(variant: str) -> None:
    model = build_model(**VARIANTS[variant])
    noisy = images(model, 3)
    with torch.no_grad():
        whole = model(noisy, thinking_candidates=3).reconstruction
        rows = [model(row[None], thinking_candidates=3).reconstruction for row in noisy]
    assert_close(whole, torch.cat(rows), **CLOSE)


def test_a_tolerance_stops_images_one_by_one() -> None:
    model = build_model()
    noisy = images(model, 6)
    with torch.no_grad():
        gaps = model(noisy, thinking_steps=2, output_energies=True).energies.diff(dim=1)[:, 0].abs()
        tolerance = float(gaps.sort().values[2:4].mean())
        stopped = model(noisy, thinking_steps=20, thinking_tolerance=tolerance).steps_taken
    assert (stopped[gaps <= tolerance] == 1).all() and (stopped[gaps > tolerance] > 1).all()


# ------------------------------------------------------------------------------------------------------------ energies


def test_reported_energies_are_those_of_the_trajectory(any_model: EBTForImageDenoising) -> None:
    noisy = images(any_model)
    with torch.no_grad():
        output = any_model(noisy, output_energies=True, output_trajectory=True, thinking_steps=4)
        last = any_model.config.num_landscapes - 1
        for index in range(5):
            energy = any_model.energy(
                output.trajectory[:, index], context_of(any_model, noisy), landscape=min(index, last)
            )
            assert_close(output.energies[:, index], energy, **CLOSE)
    assert torch.equal(output.trajectory[:, -1], output.reconstruction)
    assert_close(output.energies[:, -1], any_model.energy(output.reconstruction, context_of(any_model, noisy)))


def test_the_trajectory_is_that_of_fewer_steps(any_model: EBTForImageDenoising) -> None:
    noisy = images(any_model)
    with torch.no_grad():
        trajectory = any_model(noisy, output_trajectory=True, thinking_steps=3).trajectory
        for steps in (1, 2, 3):
            assert_close(trajectory[:, steps], any_model(noisy, thinking_steps=steps).reconstruction)
    start = noisy if any_model.config.candidate_init == "image" else torch.zeros_like(noisy)
    assert torch.equal(trajectory[:, 0], start)


def test_a_small_step_lowers_the_energy(any_model: EBTForImageDenoising) -> None:
    last = any_model.config.num_landscapes - 1
    output = any_model(
        images(any_model), output_energies=True, thinking_landscapes=[last] * 5, thinking_step_size_scale=0.1
    )
    assert (output.energies.diff(dim=1) < 0).all()


def test_acceptance_never_raises_the_energy() -> None:
    model = build_model(**CONDITIONAL)
    noisy = images(model, 32)
    options = {"thinking_step_size": 40.0, "thinking_steps": 8, "output_energies": True}
    free = model(noisy, **options)
    assert (free.energies.diff(dim=1) > 0).any()
    kept = model(noisy, thinking_accept_only_lower_energy=True, **options)
    assert (kept.energies.diff(dim=1) <= 0).all()
    assert (kept.steps_taken < 8).any()


def test_the_energy_of_an_image_is_the_mean_of_its_patches(any_model: EBTForImageDenoising) -> None:
    noisy = images(any_model)
    patches = any_model.energy(noisy, context_of(any_model, noisy), per_patch=True)
    rows, columns = any_model.config.grid
    assert patches.shape == (2, rows * columns)
    assert_close(any_model.energy(noisy, context_of(any_model, noisy)), patches.mean(-1))


@pytest.mark.parametrize("size", [(8, 8), (4, 4), (8, 20), (16, 4)], ids=str)
def test_a_patch_moves_by_its_own_slope_however_many_patches_there_are(size: tuple[int, int]) -> None:
    model = build_model()
    noisy = images(model, size=size).requires_grad_()
    patches = model.energy(noisy, per_patch=True)
    (slope,) = torch.autograd.grad(patches.sum(), noisy)
    # the step size belongs to the mean over the 4 patches of training
    expected = noisy - model.step_size().detach() / 4 * slope
    with torch.no_grad():
        assert_close(model(noisy.detach(), thinking_steps=1).reconstruction, expected.detach(), **CLOSE)


def test_positions_of_another_size_cover_the_span_of_training() -> None:
    made_for = sincos_positions(2, 2, (2, 2), 16).view(2, 2, 16)
    finer = sincos_positions(4, 4, (2, 2), 16).view(4, 4, 16)
    assert_close(finer[::2, ::2], made_for)
    oblong = sincos_positions(2, 6, (2, 6), 16).view(2, 6, 16)
    assert_close(oblong[:, :2], made_for)


def test_positions_first_asked_for_on_another_device_or_in_inference_mode_stay_usable() -> None:
    with torch.device("meta"), torch.inference_mode():
        table = sincos_positions(3, 7, (3, 7), 32)
    assert table.device.type == "cpu" and not table.is_inference()
    assert table.flatten().isfinite().all()


@pytest.mark.parametrize("options", [{}, {"thinking_landscapes": [1, 1, 1]}], ids=str)
def test_landscapes_differ_in_their_condition_alone(options: dict[str, Any]) -> None:
    model = build_model(num_landscapes=2)
    noisy = images(model)
    with torch.no_grad():
        assert not torch.allclose(model.energy(noisy, landscape=0), model.energy(noisy, landscape=1))
        different = model(noisy, **options).reconstruction
        assert not torch.allclose(different, model(noisy, thinking_landscapes=[0, 0, 0]).reconstruction)
        model.model.step_embeddings.weight[1] = model.model.step_embeddings.weight[0]
        same = model(noisy, **options).reconstruction
        assert_close(same, model(noisy, thinking_landscapes=[0, 0, 0]).reconstruction)


def test_a_given_condition_replaces_that_of_the_landscape() -> None:
    model = build_model(num_landscapes=2).model
    pictures = torch.randn(3, 3, 8, 8)
    rows = model.step_embeddings.weight[[1, 0, 1]]
    output = model(pictures, condition=rows).energies
    for row, landscape in enumerate([1, 0, 1]):
        assert_close(output[row], model(pictures[row : row + 1], landscape=landscape).energies[0], **CLOSE)


# --------------------------------------------------------------------------------------------------------- conditional


@pytest.mark.parametrize("init", ["image", "normal"])
def test_a_conditional_model_looks_at_the_noisy_image(init: str) -> None:
    model = build_model(**CONDITIONAL, candidate_init=init)
    one, other = images(model, 1), images(model, 1, seed=1)
    judged = images(model, 1, seed=2)
    with torch.no_grad():
        assert not torch.allclose(model.energy(judged, one), model.energy(judged, other))
        start = {"initial_candidate": judged}
        results = [model(noisy, **start).reconstruction for noisy in (one, other)]
        assert not torch.allclose(*results)
        if init == "normal":  # also where it starts from nothing
            assert not torch.allclose(model(one).reconstruction, model(other).reconstruction)


def test_an_unconditional_model_judges_the_candidate_alone() -> None:
    model = build_model()
    start = images(model, 1, seed=2)
    with torch.no_grad():
        results = [
            model(images(model, 1, seed=seed), initial_candidate=start, output_energies=True) for seed in (0, 1)
        ]
    assert torch.equal(results[0].reconstruction, results[1].reconstruction)
    assert torch.equal(results[0].energies, results[1].energies)


# ---------------------------------------------------------------------------------------------------------- candidates


@pytest.mark.parametrize(("selection", "best"), [("min_energy", "amin"), ("max_energy", "amax")])
def test_the_best_candidate_is_kept(any_model: EBTForImageDenoising, selection: str, best: str) -> None:
    noisy = images(any_model, 3)
    starts = torch.stack([images(any_model, 3, seed=seed) for seed in range(1, 5)], dim=1)
    with torch.no_grad():
        alone = [any_model(noisy, initial_candidate=starts[:, index], output_energies=True) for index in range(4)]
        together = any_model(
            noisy, initial_candidate=starts, thinking_selection=selection, output_energies=True, output_trajectory=True
        )
    final = torch.stack([output.energies[:, -1] for output in alone], dim=1)
    assert_close(together.energies[:, -1], getattr(final, best)(1), **CLOSE)
    chosen = final.argmin(1) if best == "amin" else final.argmax(1)
    for row, index in enumerate(chosen.tolist()):
        assert_close(together.reconstruction[row], alone[index].reconstruction[row], **CLOSE)
        assert torch.equal(together.trajectory[row, 0], starts[row, index])


def test_noise_makes_candidates_differ_and_the_seed_repeats_them() -> None:
    model = build_model()
    options = {"thinking_candidates": 4, "thinking_noise_std": 0.3, "output_energies": True}
    noisy = images(model)
    best = model(noisy, **options)
    worst = model(noisy, thinking_selection="max_energy", **options)
    assert (best.energies[:, -1] < worst.energies[:, -1]).all()
    assert torch.equal(best.reconstruction, model(noisy, **options).reconstruction)
    assert not torch.equal(best.reconstruction, model(noisy, thinking_seed=1, **options).reconstruction)


def test_candidates_that_would_be_the_same_raise() -> None:
    model = build_model()
    with pytest.raises(ValueError, match=r"(?s)All 2 candidates.*same.*thinking_noise_std"):
        model(images(model), thinking_candidates=2)


def test_the_first_of_several_candidates_starts_where_one_alone_does() -> None:
    model = build_model(candidate_init_std=0.3)
    noisy = images(model)
    several = model._initial_state(noisy, _resolved(model, candidates=3), None)
    assert torch.equal(several[:, 0], noisy)
    assert not torch.equal(several[:, 1], noisy)
    assert_close(several[0, 1] - noisy[0], several[1, 1] - noisy[1])  # shared by the rows


def _resolved(model: EBTForImageDenoising, **thinking: Any) -> Any:
    from ebt_transformers.modeling_ebt.thinking import resolve_thinking

    return resolve_thinking(model.config, thinking, {}, model.training)


# ----------------------------------------------------------------------------------------------------------- precision


def test_eager_attention_equals_sdpa(any_model: EBTForImageDenoising) -> None:
    noisy = images(any_model)
    eager = copy.deepcopy(any_model)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        assert_close(eager(noisy).reconstruction, any_model(noisy).reconstruction, **CLOSE)
    loss, expected = train_once(any_model, noisy, torch.zeros_like(noisy))
    eager_loss, got = train_once(eager, noisy, torch.zeros_like(noisy))
    assert_close(eager_loss, loss)
    assert_close(got, expected, **CLOSE)


def test_inference_mode_no_grad_and_grad_agree(any_model: EBTForImageDenoising) -> None:
    noisy = images(any_model)
    free = any_model(noisy, output_energies=True, output_trajectory=True)
    with torch.no_grad():
        quiet = any_model(noisy, output_energies=True)
    with torch.inference_mode():
        inference = any_model(noisy + 0, output_energies=True)
        assert any_model.energy(noisy + 0, context_of(any_model, noisy)).shape == (2,)
    for other in (quiet, inference):
        assert torch.equal(other.reconstruction, free.reconstruction)
        assert torch.equal(other.energies, free.energies)
    assert not free.energies.requires_grad and not free.trajectory.requires_grad and not quiet.loss


def test_training_mode_without_gradients_gives_a_loss_and_no_graph(any_model: EBTForImageDenoising) -> None:
    noisy = images(any_model)
    with torch.no_grad():
        output = any_model.train()(noisy, labels=torch.zeros_like(noisy))
    assert output.loss.isfinite() and not output.loss.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_keep_images_and_energies_in_float32(
    any_model: EBTForImageDenoising, dtype: torch.dtype
) -> None:
    noisy = images(any_model)
    with torch.no_grad():
        expected = any_model(noisy, output_energies=True)
        for given in (noisy, noisy.to(dtype)):
            output = any_model.to(dtype)(given, labels=given, output_energies=True)
            assert output.reconstruction.dtype == output.energies.dtype == output.loss.dtype == torch.float32
            assert_close(output.energies[:, 0], expected.energies[:, 0], rtol=0.1, atol=0.1)
            energy = any_model.energy(given, context_of(any_model, given))
            assert energy.dtype == torch.float32


def test_bfloat16_autocast_works_in_evaluation_and_training(any_model: EBTForImageDenoising) -> None:
    noisy = images(any_model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.no_grad():
            output = any_model(noisy, output_energies=True)
        assert output.reconstruction.dtype == output.energies.dtype == torch.float32
        loss, grads = train_once(any_model, noisy, torch.zeros_like(noisy))
    assert loss.dtype == torch.float32
    assert all(torch.isfinite(grad).all() and grad.dtype == torch.float32 for grad in grads.values())


# ------------------------------------------------------------------------------------------------------------ training

S2 = {"loss_on_steps": "last", "detach_between_steps": False}


@pytest.mark.parametrize("recipe", [{}, S2], ids=["s1", "s2"])
def test_every_trainable_parameter_gets_a_gradient_in_one_step(
    any_model: EBTForImageDenoising, recipe: dict[str, Any]
) -> None:
    any_model.config.update(recipe)
    noisy = images(any_model)
    _, grads = train_once(any_model, noisy, torch.zeros_like(noisy))
    assert set(grads) == {name for name, parameter in any_model.named_parameters() if parameter.requires_grad}
    # a bias of the keys changes all scores of a query alike, which softmax does not see
    moved = {name for name, grad in grads.items() if grad.abs().max() > 1e-7}
    assert set(grads) - moved <= {f"model.layers.{layer}.attention.k_proj.bias" for layer in range(2)}


def test_a_new_model_starts_flat_so_that_only_the_energy_head_can_move_first() -> None:
    model = EBTForImageDenoising(EBTImageConfig(**TINY))
    noisy = images(model)
    assert torch.equal(model.eval()(noisy).reconstruction, noisy)
    _, grads = train_once(model, noisy, torch.zeros_like(noisy))
    moved = {name for name, grad in grads.items() if grad.abs().sum() > 0}
    assert moved == {"model.energy_head.weight"}


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("loss", ["smooth_l1", "mse", "l1"])
def test_the_gradient_is_the_slope_of_the_training_loss(loss: str, steps: int) -> None:
    # double precision but for the images themselves; without detaching, or the objective is not what is differentiated
    model = build_model(thinking_steps=steps, detach_between_steps=False, reconstruction_loss=loss).double().train()
    noisy = images(model)
    clean = noisy * 0.5
    _, grads = train_once(model, noisy, clean)
    resolved = {name for name, grad in grads.items() if grad.norm() > 1e-3}  # in float32 images
    assert {"model.patches.weight", "model.energy_head.weight", "model.layers.0.attention.q_proj.weight"} <= resolved
    for name, parameter in model.named_parameters():
        if name not in resolved:
            continue
        slope = float(grads[name].norm())
        direction, values = grads[name] / slope, []
        for sign in (1, -1):
            with torch.no_grad():
                parameter += sign * 1e-2 * direction
                values.append(float(model(noisy, labels=clean).loss))
                parameter -= sign * 1e-2 * direction
        assert (values[0] - values[1]) / 2e-2 == pytest.approx(slope, rel=2e-2), name


def test_a_batch_of_eight_equals_eight_accumulated_batches_of_one(any_model: EBTForImageDenoising) -> None:
    any_model.config.candidate_init_std = 0.0
    noisy, clean = images(any_model, 8), images(any_model, 8, seed=1)
    whole, expected = train_once(any_model, noisy, clean)
    any_model.zero_grad()
    total = torch.zeros(())
    for row in range(8):
        part = slice(row, row + 1)
        loss = any_model(noisy[part], labels=clean[part], num_items_in_batch=torch.tensor(clean.numel())).loss
        loss.backward()
        total += loss.detach()
    assert_close(total, whole)
    assert_close(gradients(any_model), expected, **CLOSE)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")  # its new name is newer than 5.10
@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("recipe", [{}, S2], ids=["s1", "s2"])
def test_gradient_checkpointing_changes_no_loss_and_no_gradient(
    any_model: EBTForImageDenoising, recipe: dict[str, Any], reentrant: bool | None
) -> None:
    any_model.config.update({**recipe, "random_step_size": 2.0, "thinking_noise_std": 0.1})
    noisy = images(any_model)
    loss, expected = train_once(any_model, noisy, noisy * 0.5)
    any_model.gradient_checkpointing_enable(None if reentrant is None else {"use_reentrant": reentrant})
    again, got = train_once(any_model, noisy, noisy * 0.5)
    assert_close(again, loss)
    assert_close(got, expected, **CLOSE)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")  # its new name is newer than 5.10
def test_the_transformer_alone_recomputes_its_layers_to_the_same_gradients() -> None:
    model = build_model().model.train()
    noisy = torch.randn(2, 3, 8, 8)
    model(noisy).energies.square().sum().backward()
    expected = gradients(model)
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(noisy).energies.square().sum().backward()
    assert_close(gradients(model), expected)
    assert model.get_input_embeddings() is model.patches


@pytest.mark.parametrize("loss_on_steps", ["all", "last"])
def test_the_training_loss_is_the_recipe_over_the_step_losses(loss_on_steps: str) -> None:
    model = build_model(loss_on_steps=loss_on_steps).train()
    noisy = images(model)
    output = model(noisy, labels=noisy * 0.5)
    expected = output.step_losses.mean() if loss_on_steps == "all" else output.step_losses[-1]
    assert_close(output.loss.detach(), expected)
    assert output.step_losses.shape == output.mean_energies.shape == (3,)


@pytest.mark.parametrize(
    ("kind", "distance"),
    [
        ("smooth_l1", torch.nn.functional.smooth_l1_loss),
        ("mse", torch.nn.functional.mse_loss),
        ("l1", torch.nn.functional.l1_loss),
    ],
)
def test_the_evaluation_loss_is_the_distance_of_the_final_images(kind: str, distance: Callable) -> None:
    model = build_model(reconstruction_loss=kind, candidate_init_std=0.3)
    noisy = images(model)
    for candidates in (1, 3):
        output = model(noisy, labels=noisy * 0.5, thinking_candidates=candidates)
        assert_close(output.loss, distance(output.reconstruction, noisy * 0.5))


def test_random_steps_act_in_training_only() -> None:
    model = build_model(random_steps=[2, 4])
    noisy = images(model)
    assert {int(model(noisy).steps_taken[0]) for _ in range(10)} == {3}
    assert {int(model.train()(noisy).steps_taken[0]) for _ in range(30)} == {2, 3, 4}
    assert int(model(noisy, thinking_steps=1).steps_taken[0]) == 1  # a call has the last word


def test_a_random_step_size_acts_in_training_only_and_on_every_image_by_itself() -> None:
    model = build_model(random_step_size=2.0, thinking_steps=1)
    noisy = images(model, 1).expand(400, -1, -1, -1)
    with torch.no_grad():
        exact = model(noisy).reconstruction
        assert_close(exact, exact[:1].expand_as(exact))
        assert_close(exact, build_model(thinking_steps=1)(noisy).reconstruction)
        moved = (model.train()(noisy).reconstruction - noisy).flatten(1)
    factors = moved.norm(dim=1) / (exact - noisy).flatten(1).norm(dim=1)
    assert 0.5 <= factors.min() < 0.52 and 1.97 < factors.max() <= 2.0
    assert float(factors.mean()) == pytest.approx(1.25, abs=0.08)  # uniform between a half and two


def test_noise_in_training_is_not_noise_in_evaluation() -> None:
    model = build_model(thinking_noise_std=0.5)
    noisy = images(model)
    with torch.no_grad():
        assert torch.equal(model(noisy).reconstruction, build_model()(noisy).reconstruction)
        model.train()
        assert not torch.equal(model(noisy).reconstruction, model(noisy).reconstruction)


def test_a_fixed_step_size_gets_no_gradient() -> None:
    model = build_model(learn_step_size=False)
    noisy = images(model)
    _, grads = train_once(model, noisy, noisy * 0.5)
    assert "step_size.value" not in grads


# ----------------------------------------------------------------------------------------------------- saving, loading

STATE_DICT_KEYS = [
    *(f"model.final_modulation.{kind}" for kind in ("bias", "weight")),
    "model.energy_head.weight",
    *(
        f"model.layers.0.{name}.{kind}"
        for name in (
            *("attention.k_proj", "attention.o_proj", "attention.q_proj", "attention.v_proj"),
            *("mlp.fc1", "mlp.fc2", "modulation"),
        )
        for kind in ("bias", "weight")
    ),
    *(f"model.patches.{kind}" for kind in ("bias", "weight")),
    "model.step_embeddings.weight",
    "step_size.value",
]


def test_state_dict_keys() -> None:
    """A renamed parameter would orphan every saved checkpoint."""
    for variant in VARIANTS.values():
        assert sorted(build_model(**variant, num_hidden_layers=1).state_dict()) == sorted(STATE_DICT_KEYS)


def test_saving_and_loading_is_exact(any_model: EBTForImageDenoising, tmp_path: Path) -> None:
    noisy = images(any_model)
    with torch.no_grad():
        any_model.step_size.value.fill_(2.25)
    any_model.save_pretrained(tmp_path)
    loaded, info = EBTForImageDenoising.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert not loaded.training
    before, after = any_model.state_dict(), loaded.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert loaded.config.to_diff_dict() == any_model.config.to_diff_dict() | {
        "architectures": ["EBTForImageDenoising"]
    }
    with torch.no_grad():
        # close, not equal: weights mapped from a file are aligned differently, which picks other matrix kernels
        assert_close(loaded(noisy).reconstruction, any_model(noisy).reconstruction, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_survives_saving_and_keeps_the_step_size_exact(dtype: torch.dtype, tmp_path: Path) -> None:
    model = build_model(step_size=3001.3)
    model.save_pretrained(tmp_path / "full")
    half = EBTForImageDenoising.from_pretrained(tmp_path / "full", dtype=dtype)
    assert half.dtype == dtype
    assert torch.equal(half.step_size.value, model.step_size.value)
    half.save_pretrained(tmp_path / "half")
    again = EBTForImageDenoising.from_pretrained(tmp_path / "half", dtype="auto")
    assert again.dtype == dtype
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in half.state_dict().items())


def test_the_auto_classes_load_a_saved_model(any_model: EBTForImageDenoising, tmp_path: Path) -> None:
    any_model.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is EBTImageConfig
    noisy = images(any_model)
    with torch.no_grad():
        loaded = AutoModelForImageToImage.from_pretrained(tmp_path)
        assert type(loaded) is EBTForImageDenoising
        assert_close(loaded(noisy).reconstruction, any_model(noisy).reconstruction, **CLOSE)
        base = AutoModel.from_pretrained(tmp_path)
        assert type(base) is EBTImageModel
        energies = base(noisy, noisy_pixel_values=context_of(any_model, noisy)).energies
        assert_close(energies, any_model.model(noisy, noisy_pixel_values=context_of(any_model, noisy)).energies)


def test_weights_left_out_of_a_checkpoint_start_as_in_a_new_model(tmp_path: Path) -> None:
    build_model().save_pretrained(tmp_path)
    grown = EBTForImageDenoising.from_pretrained(tmp_path, num_hidden_layers=3)
    fresh = grown.model.layers[2]
    assert fresh.modulation.weight.abs().sum() == 0 and fresh.modulation.bias.abs().sum() == 0
    assert fresh.mlp.fc1.weight.std() > 0 and fresh.mlp.fc1.bias.abs().sum() == 0


# ------------------------------------------------------------------------------------------------------------- outputs


def test_a_tuple_holds_what_the_output_object_holds() -> None:
    model = build_model()
    noisy = images(model)
    output = model(noisy, labels=noisy, output_energies=True)
    values = model(noisy, labels=noisy, output_energies=True, return_dict=False)
    assert len(values) == len(output.to_tuple())
    assert all(torch.equal(value, other) for value, other in zip(values, output.to_tuple(), strict=True))


def test_energies_and_trajectory_are_absent_unless_asked_for() -> None:
    model = build_model()
    output = model(images(model))
    assert output.energies is None and output.trajectory is None and output.loss is None


def test_hidden_states_and_attentions_are_those_of_every_layer(any_model: EBTForImageDenoising) -> None:
    noisy = images(any_model)
    rows, columns = any_model.config.grid
    context = context_of(any_model, noisy)
    output = any_model.model(noisy, context, output_hidden_states=True, output_attentions=True)
    assert [state.shape for state in output.hidden_states] == [(2, rows * columns, 16)] * 3
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state)
    assert [weights.shape for weights in output.attentions] == [(2, 4, rows * columns, rows * columns)] * 2
    assert_close(output.attentions[0].sum(-1), torch.ones(2, 4, rows * columns))
    plain = any_model.model(noisy, context)
    assert plain.hidden_states is None and plain.attentions is None
    assert_close(plain.energies, output.energies, **CLOSE)


# ----------------------------------------------------------------------------------------------------------- bad input


def pictures(*shape: int) -> Tensor:
    """Images of this shape."""
    return torch.zeros(shape)


GOOD = pictures(1, 3, 8, 8)
BAD_INPUTS: dict[str, tuple[dict[str, Any], str]] = {
    "one image": ({"pixel_values": pictures(3, 8, 8)}, r"\(3, 8, 8\).*first dimension of 1"),
    "empty batch": ({"pixel_values": pictures(0, 3, 8, 8)}, r"non-empty.*\(0, 3, 8, 8\)"),
    "empty image": ({"pixel_values": pictures(1, 3, 0, 8)}, r"non-empty.*\(1, 3, 0, 8\)"),
    "channels": ({"pixel_values": pictures(1, 1, 8, 8)}, r"3 channel.*got 1"),
    "channels last": ({"pixel_values": pictures(1, 8, 8, 3)}, r"3 channel.*got 8"),
    "sides": ({"pixel_values": pictures(1, 3, 8, 10)}, "multiples of the patch size 4, got 8 x 10"),
    "uint8": ({"pixel_values": torch.zeros(1, 3, 8, 8, dtype=torch.uint8)}, "floating point.*uint8.*-1..1"),
    "0 to 255": ({"pixel_values": GOOD + 255}, "values up to 255.*scaled to -1..1"),
    "not a number": ({"pixel_values": GOOD + float("nan")}, "not finite"),
    "infinite": ({"pixel_values": GOOD - float("inf")}, "not finite"),
    "labels of another shape": ({"labels": pictures(1, 3, 8, 4)}, r"labels.*\(1, 3, 8, 8\).*\(1, 3, 8, 4\)"),
    "labels of another batch": ({"labels": pictures(2, 3, 8, 8)}, r"labels.*\(1, 3, 8, 8\).*\(2, 3, 8, 8\)"),
    "labels from 0 to 255": ({"labels": GOOD + 255}, "values up to 255.*scaled to -1..1"),
    "labels not finite": ({"labels": GOOD + float("nan")}, "not finite"),
    "initial candidate": ({"initial_candidate": pictures(1, 3, 4, 8)}, r"\(1, 1, 3, 8, 8\).*\(1, 3, 4, 8\)"),
    "initial candidates": (
        {"initial_candidate": pictures(1, 2, 3, 8, 8), "thinking_candidates": 3},
        r"\(1, 3, 3, 8, 8\).*\(1, 2, 3, 8, 8\)",
    ),
    "steps 0": ({"thinking_steps": 0}, "thinking_steps.*at least 1.*got 0"),
    "negative noise": ({"thinking_noise_std": -0.5}, "thinking_noise_std.*-0.5"),
    "unknown option": ({"thinking_stepz": 3}, "stepz.*Allowed.*steps"),
    "unknown field": ({"thinking": {"stepz": 3}}, "stepz.*Allowed.*steps"),
    "landscape": ({"thinking_landscapes": [0, 1]}, r"between 0 and 0.*\[0, 1\]"),
    "scales": ({"thinking_step_size_scale": [1.0, 1.0]}, "3 steps.*2 numbers"),
}


@pytest.mark.parametrize("case", list(BAD_INPUTS))
def test_bad_input_raises_a_value_error_that_names_it(case: str) -> None:
    inputs, message = BAD_INPUTS[case]
    with torch.no_grad(), pytest.raises(ValueError, match=rf"(?s){message}"):
        build_model()(**{"pixel_values": GOOD, **inputs})


BAD_ENERGY: dict[str, tuple[dict[str, Any], str]] = {
    "channels": ({"pixel_values": pictures(1, 4, 8, 8)}, "3 channel.*got 4"),
    "0 to 255": ({"pixel_values": GOOD + 255}, "values up to 255"),
    "landscape": ({"pixel_values": GOOD, "landscape": 1}, "between 0 and 0, got 1"),
    "negative landscape": ({"pixel_values": GOOD, "landscape": -1}, "between 0 and 0, got -1"),
    "superfluous": ({"pixel_values": GOOD, "noisy_pixel_values": GOOD}, "was given.*image_conditioning='none'"),
}


@pytest.mark.parametrize("case", list(BAD_ENERGY))
def test_bad_input_of_energy_raises_a_value_error_that_names_it(case: str) -> None:
    inputs, message = BAD_ENERGY[case]
    with pytest.raises(ValueError, match=rf"(?s){message}"):
        build_model().energy(**inputs)


def test_a_conditional_energy_needs_the_noisy_image_in_the_same_shape() -> None:
    model = build_model(**CONDITIONAL)
    with pytest.raises(ValueError, match="`noisy_pixel_values` is missing.*'noisy_image'"):
        model.energy(GOOD)
    with pytest.raises(ValueError, match=r"\(1, 3, 8, 8\).*\(2, 3, 8, 8\)"):
        model.energy(GOOD, pictures(2, 3, 8, 8))


def test_broken_weights_raise_instead_of_answering() -> None:
    model = build_model()
    with torch.no_grad():
        model.model.layers[0].mlp.fc1.weight[0, 0] = float("nan")
        with pytest.raises(ValueError, match="not finite"):
            model(GOOD)


@pytest.mark.parametrize(
    "options",
    [
        {"thinking_candidates": 2},
        {"thinking_tolerance": 0.1},
        {"thinking_target_energy": 0.0},
        {"thinking_accept_only_lower_energy": True},
    ],
)
def test_evaluation_only_thinking_raises_in_training(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        build_model().train()(GOOD, **options)


def test_the_suggested_target_energy_stops_its_share_of_the_images() -> None:
    model = build_model()
    noisy = images(model, 40)
    reached = model.suggest_target_energy(noisy, share=0.75, thinking_steps=2)
    with torch.no_grad():
        ends = model(noisy, thinking_steps=2, output_energies=True).energies[:, -1]
        taken = model(noisy, thinking_steps=3, thinking_target_energy=reached).steps_taken
    assert (ends <= reached).float().mean() == pytest.approx(0.75, abs=0.03)
    assert (taken[ends <= reached] <= 2).all()
    with pytest.raises(ValueError, match="share.*got 0"):
        model.suggest_target_energy(noisy, share=0)


def test_a_tuple_holds_what_the_output_holds() -> None:
    model = build_model()
    noisy = images(model, 2)
    with torch.no_grad():
        named = model(noisy, labels=noisy, output_energies=True)
        plain = model(noisy, labels=noisy, output_energies=True, return_dict=False)
    assert len(plain) == len(named.to_tuple())
    for ours, theirs in zip(plain, named.to_tuple(), strict=True):
        assert_close(ours, theirs, rtol=0, atol=0)


def test_an_argument_without_use_raises() -> None:
    model = build_model()
    with pytest.raises(TypeError, match="output_energie.*output_energies"):
        model(images(model, 1), output_energie=True)
