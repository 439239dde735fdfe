"""
Law: with the official weights and the same random numbers, images are denoised as the official code denoises them, and
the Diffusion Transformer it is compared with is the one in diffusers. Tolerances as in `test_parity.py`.
"""

import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForImageToImage

from ebt_transformers import EBTForImageDenoising, EBTImageConfig, EBTImageModel
from ebt_transformers.configuration.noise_ebt import noise_scheduler
from ebt_transformers.modeling_ebt import conversion_ebt as conversion
from ebt_transformers.modeling_ebt import conversion_ebt_image as image_conversion
from ebt_transformers.modeling_ebt.positions import sincos_positions


sys.path.append(str(Path(__file__).parent))  # the helper beside this file, under every import mode of pytest
import parity_cases as parity  # noqa: E402
from parity_cases import Case  # noqa: E402


CASES = parity.cases("img_ebt_")
VARIANTS = [(case, variant) for case in CASES for variant in case.info["grad_variants"]]
ADVANCED = [(case, run) for case in CASES for run in case.info["adv"]]
CONDITIONED = parity.cases("img_bi_ebt_condition")
DIFFUSION = parity.cases("img_dit")
POSITIONS = "transformer.pos_embed"


@pytest.fixture(scope="session", autouse=True)
def report() -> Iterator[None]:
    """Writes the table of errors at the end of the session, when asked to."""
    yield
    parity.write_report()


def model_of(case: Case, **changed: Any) -> EBTForImageDenoising:
    """The converted model; `changed` are official flags that differ from the recorded ones."""
    model = conversion.model_from_official(case.params, {**case.hparams, **changed})
    assert isinstance(model, EBTForImageDenoising)
    return model


# ---- noise -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [*CASES, *DIFFUSION], ids=str)
def test_noisy_images_agree(case: Case) -> None:
    pytest.importorskip("diffusers")
    flags = case.hparams
    scheduler, timestep = noise_scheduler(flags["denoise_images_noise_level"], flags["diffusion_steps"])
    assert scheduler.config.num_train_timesteps == case.info["diffusion_num_timesteps"]
    real, noise = case.io["real_images"], case.io["noise"]
    if case in DIFFUSION:
        case.compare("x_t", scheduler.add_noise(real, noise, case.io["timesteps"]))
        return
    assert timestep == case.info["noising_timestep"]
    noisy = scheduler.add_noise(real, noise, torch.full((len(real),), timestep))
    case.close("noised_images", noisy, case.io["noised_images"], 2e-5)


# ---- evaluation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=str)
def test_energies_of_patches_agree(case: Case) -> None:
    energies = model_of(case).energy(case.io["noised_images"], per_patch=True)
    case.compare("patch_energies_of_noised", energies.detach())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_images_energies_and_their_gradients_agree_after_every_step(case: Case) -> None:
    model, noisy = model_of(case), case.io["noised_images"]
    with torch.no_grad():
        output = model(noisy, output_energies=True, output_trajectory=True)
    steps = case.info["eval_num_steps"]
    assert output.trajectory.shape[1] == output.energies.shape[1] == steps + 1
    for step in range(steps):
        case.compare(f"eval.images.{step}", output.trajectory[:, step + 1])
        case.compare(f"eval.energies.{step}", output.energies[:, step])
        before = noisy if step == 0 else case.io[f"eval.images.{step - 1}"]
        before = before.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(model.energy(before).sum(), before)
        case.compare(f"eval.energy_grad.{step}", gradient)


@pytest.mark.parametrize(("case", "run"), ADVANCED, ids=parity.identifier)
def test_advanced_inference_agrees(case: Case, run: str) -> None:
    recorded = case.info["adv"][run]
    # the official code walks the steps asked for and, as in evaluation, repeats the last
    steps = recorded["infer_ebt_num_steps"] + case.hparams["randomize_mcmc_num_steps"]
    assert steps == recorded["n_energies"]
    with torch.no_grad():
        output = model_of(case)(case.io["noised_images"], thinking_steps=steps, output_energies=True)
    case.compare(f"adv.{run}.final_images", output.reconstruction)
    for step in range(steps):
        case.compare(f"adv.{run}.energies.{step}", output.energies[:, step])


# ---- training ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("case", "variant"), VARIANTS, ids=parity.identifier)
def test_training_loss_and_every_parameter_gradient_agree(
    case: Case, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = case.info["grad_variants"][variant]
    model = model_of(case, **recorded["hparams"]).train()
    parity.replay_training(monkeypatch, case, variant)
    real = case.io["real_images"]
    output = model(case.io["noised_images"], labels=real)
    energies = output.mean_energies
    mine = {
        "loss": output.loss.item(),
        "initial_loss": output.step_losses[0].item(),
        "final_step_loss": output.step_losses[-1].item(),
        "l1_loss": (output.reconstruction - real).abs().mean().item(),
        "initial_final_pred_energies_gap": (energies[0] - energies[-1]).item(),
    }
    for name, value in mine.items():
        exact = recorded["log_dict"][name]
        # the gap is a difference of two energies and has their error
        scale = energies.abs().max().item() if name.endswith("gap") else abs(exact)
        case.within(f"loss {name}", abs(value - exact), parity.LOSS_RTOL * scale)
    output.loss.backward()
    parity.check_gradients(case, model, variant)


@pytest.mark.parametrize("case", parity.cases("img_ebt_s2"), ids=str)
def test_training_draws_as_many_steps_as_the_official_flags_allow(case: Case) -> None:
    model = model_of(case).train()
    least, extra = case.hparams["randomize_mcmc_num_steps_min"], case.hparams["randomize_mcmc_num_steps"]
    with torch.no_grad():
        taken = {int(model(case.io["noised_images"]).steps_taken[0]) for _ in range(30)}
    assert taken == set(range(least, extra + 2))


# ---- the transformer alone ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CONDITIONED, ids=str)
def test_the_transformer_agrees_under_a_given_condition(case: Case) -> None:
    flags = case.hparams
    config = EBTImageConfig(
        image_size=flags["input_size"],
        patch_size=flags["patch_size"],
        num_channels=flags["in_channels"],
        hidden_size=flags["hidden_size"],
        intermediate_size=int(flags["hidden_size"] * flags["mlp_ratio"]),
        num_hidden_layers=flags["depth"],
        num_attention_heads=flags["num_heads"],
    )
    official = {f"transformer.{name}": tensor for name, tensor in case.params.items()}
    weights = conversion.tensors_from_official(official, config)
    model = EBTImageModel(config)
    left = model.load_state_dict({name.removeprefix("model."): weights[name] for name in weights}, strict=False)
    assert left.unexpected_keys == [] and left.missing_keys == ["step_embeddings.weight"]
    for training in (False, True):  # both kinds of attention
        model.train(training)
        images = case.io["x"].clone().requires_grad_()
        output = model(images, condition=case.io["y"])
        (gradient,) = torch.autograd.grad(output.energies.mean(-1).sum(), images)
        case.compare("patch_energies", output.energies.detach())
        case.compare("patches_before_final_layer", output.last_hidden_state.detach())
        case.compare("grad_x_of_sum_over_batch_of_mean_over_patches", gradient)


# ---- conversion --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=str)
def test_there_and_back_is_exact_in_weights_and_flags(case: Case) -> None:
    model = model_of(case)
    state_dict, hparams = conversion.model_to_official(model)
    assert set(state_dict) == set(case.params)
    for name, tensor in case.params.items():
        assert torch.equal(state_dict[name], tensor), name
        assert state_dict[name].is_contiguous()
    without_meaning_for_images = {"ebt_type", "clamp_futures_grad_max_change"}
    assert {flag: value for flag, value in case.hparams.items() if flag not in without_meaning_for_images} == {
        flag: hparams[flag] for flag in case.hparams if flag not in without_meaning_for_images
    }
    assert conversion.config_from_official(hparams).to_diff_dict() == model.config.to_diff_dict()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_saved_and_loaded_conversion_is_exact(case: Case, tmp_path: Path) -> None:
    model = model_of(case)
    model.save_pretrained(tmp_path)
    before = conversion.model_to_official(model)
    after = conversion.model_to_official(AutoModelForImageToImage.from_pretrained(tmp_path))
    assert before[1] == after[1]
    assert all(torch.equal(tensor, after[0][name]) for name, tensor in before[0].items())


@pytest.fixture
def official() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and flags of a small official model."""
    case = CASES[0]
    return dict(case.params), dict(case.hparams)


UNSUPPORTED_VALUES = {
    "modality": "VID",
    "model_name": "dit",
    "image_task": "t2i",
    "clamp_futures_grad": True,
    "reconstruction_coeff": 0.25,
    "mcmc_replay_buffer": True,
    "langevin_dynamics_noise_learnable": True,
    "no_langevin_during_eval": False,
    "randomize_mcmc_num_steps_min": 9,
}


@pytest.mark.parametrize(("flag", "value"), UNSUPPORTED_VALUES.items())
def test_unsupported_option_raises_naming_flag_value_and_what_is_allowed(
    flag: str, value: Any, official: tuple[dict[str, Tensor], dict[str, Any]]
) -> None:
    state_dict, hparams = official
    with pytest.raises(ValueError, match=rf"`{flag}={value!r}` is not supported here\. Allowed: .+\."):
        conversion.model_from_official(state_dict, {**hparams, flag: value})


def test_every_limit_is_tried() -> None:
    assert {**image_conversion.LIMITS, **image_conversion.NOISE_LIMITS}.keys() < set(UNSUPPORTED_VALUES)


def test_a_step_size_factor_below_one_and_oblong_images_raise(
    official: tuple[dict[str, Tensor], dict[str, Any]],
) -> None:
    state_dict, hparams = official
    with pytest.raises(ValueError, match=r"`randomize_mcmc_step_size_scale=0\.5` is not supported here: at least 1"):
        conversion.model_from_official(state_dict, {**hparams, "randomize_mcmc_step_size_scale": 0.5})
    with pytest.raises(ValueError, match=r"square images only, got `image_dims=\[16, 32\]`"):
        conversion.model_from_official(state_dict, {**hparams, "image_dims": [16, 32]})


@pytest.mark.parametrize("flag", ["modality", "image_task", "image_dims", "patch_size", "embedding_dim"])
def test_missing_flag_raises_naming_it(flag: str, official: tuple[dict[str, Tensor], dict[str, Any]]) -> None:
    state_dict, hparams = official
    hparams.pop(flag)
    with pytest.raises(ValueError, match=f"lack `{flag}`"):
        conversion.model_from_official(state_dict, hparams)


def test_missing_unexpected_and_misshaped_weights_raise_naming_them(
    official: tuple[dict[str, Tensor], dict[str, Any]],
) -> None:
    state_dict, hparams = official
    del state_dict["transformer.x_embedder.proj.bias"]
    state_dict["transformer.extra.weight"] = torch.zeros(1)
    state_dict["transformer.blocks.0.attn.qkv.weight"] = torch.zeros(96, 31)
    state_dict[POSITIONS] = torch.zeros(1, 9, 32)
    with pytest.raises(ValueError) as raised:
        conversion.model_from_official(state_dict, hparams)
    message = str(raised.value)
    assert "missing: transformer.x_embedder.proj.bias;" in message
    assert "unexpected: transformer.extra.weight;" in message
    assert "transformer.blocks.0.attn.qkv.weight (96, 31), expected (96, 32)" in message
    assert f"{POSITIONS} (1, 9, 32), expected (1, 16, 32)" in message


def test_positions_are_the_official_ones_may_be_missing_and_may_not_be_others(
    official: tuple[dict[str, Tensor], dict[str, Any]],
) -> None:
    state_dict, hparams = official
    positions = state_dict.pop(POSITIONS)
    assert torch.equal(sincos_positions(4, 4, (4, 4), 32), positions[0])
    conversion.model_from_official(state_dict, hparams)
    with pytest.raises(ValueError, match="not the fixed sine-cosine table"):
        conversion.model_from_official({**state_dict, POSITIONS: positions + 0.1}, hparams)


def test_a_noise_level_that_left_its_flag_raises(official: tuple[dict[str, Tensor], dict[str, Any]]) -> None:
    state_dict, hparams = official
    state_dict["langevin_dynamics_noise_std"] = torch.tensor(0.5)
    with pytest.raises(ValueError, match=r"is 0\.5, but the flag `langevin_dynamics_noise` says 0"):
        conversion.model_from_official(state_dict, hparams)


def test_an_end_of_text_is_refused(official: tuple[dict[str, Tensor], dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match="leave out `eos_token_id`, got 0"):
        conversion.model_from_official(*official, eos_token_id=0)


SCHEDULES = {
    # official (mcmc_num_steps, randomize_mcmc_num_steps, _min, _final_landscape): default steps, steps of training
    (1, 0, 0, False): (1, None),
    (3, 0, 0, False): (3, None),
    (1, 2, 2, False): (3, [2, 3]),
    (1, 2, 0, False): (3, [1, 3]),
    (1, 2, 1, True): (3, [1, 3]),
    (3, 2, 2, True): (5, [4, 5]),
    (1, 2, 3, False): (3, None),
    (2, 0, 2, True): (2, None),
    # a draw for each of several landscapes has no field
    (3, 2, 2, False): (5, None),
}


@pytest.mark.parametrize(("flags", "expected"), SCHEDULES.items(), ids=str)
def test_numbers_of_steps_become_fields_and_come_back_exactly(
    flags: tuple[Any, ...], expected: tuple[int, list[int] | None], official: tuple[Any, dict[str, Any]]
) -> None:
    suffixes = (
        "mcmc_num_steps",
        *(f"randomize_mcmc_num_steps{suffix}" for suffix in ("", "_min", "_final_landscape")),
    )
    given = dict(zip(suffixes, flags, strict=True))
    config = conversion.config_from_official({**official[1], **given})
    assert (config.default_thinking().steps, config.random_steps) == expected
    back = conversion.config_to_official(config)
    assert {flag: back[flag] for flag in given} == given


@pytest.mark.parametrize("recipe", ["s1", "s2"])
def test_our_own_models_go_there_and_come_back(recipe: str) -> None:
    config = EBTImageConfig.from_preset(
        "4xs", recipe, image_size=16, patch_size=4, thinking_noise_std=0.1, hidden_size=32, intermediate_size=43
    )
    model = EBTForImageDenoising(config).eval()
    state_dict, hparams = conversion.model_to_official(model)
    again = conversion.model_from_official({f"model.{name}": state_dict[name] for name in state_dict}, hparams)
    assert again.config.to_diff_dict() == config.to_diff_dict()
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(again(images).reconstruction, model(images).reconstruction)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"image_conditioning": "noisy_image"}, "image_conditioning='noisy_image'"),
        ({"candidate_init_std": 0.5}, "candidate_init_std=0.5"),
        ({"reconstruction_loss": "mse"}, "reconstruction_loss='mse'"),
        ({"num_landscapes": 2}, "num_landscapes=2"),
        ({"num_channels": 1}, "num_channels=1"),
        ({"hidden_act": "silu"}, "hidden_act='silu'"),
        ({"layer_norm_eps": 1e-5}, "layer_norm_eps=1e-05"),
        ({"image_size": [16, 32]}, r"image_size=\[16, 32\]"),
        ({"vae_name_or_path": "a/vae"}, "vae_name_or_path='a/vae'"),
        ({"random_steps": [2, 3]}, "thinking_steps=None"),
    ],
)
def test_a_model_the_official_code_cannot_express_raises_naming_the_field(
    overrides: dict[str, Any], named: str
) -> None:
    config = EBTImageConfig.from_preset("4xs", **{"image_size": 16, "patch_size": 4, **overrides})
    with pytest.raises(ValueError, match=f"The official code has nothing for `{named}`"):
        conversion.config_to_official(config)


def test_a_lightning_checkpoint_becomes_a_folder_that_loads(tmp_path: Path, official: tuple[Any, ...]) -> None:
    state_dict, hparams = official
    prefixed = {f"model._orig_mod.{name}": tensor for name, tensor in state_dict.items()}
    torch.save({"state_dict": prefixed, "hyper_parameters": hparams}, tmp_path / "official.ckpt")
    converted = conversion.convert_checkpoint(tmp_path / "official.ckpt", tmp_path / "model")
    loaded = AutoModelForImageToImage.from_pretrained(tmp_path / "model")
    images = CASES[0].io["noised_images"]
    assert torch.equal(loaded(images).reconstruction, converted(images).reconstruction)
    processor = AutoImageProcessor.from_pretrained(tmp_path / "model")
    assert (processor.patch_size, processor.num_channels) == (4, 3)
    with pytest.raises(ValueError, match="An image model has no tokenizer"):
        conversion.convert_checkpoint(tmp_path / "official.ckpt", tmp_path / "other", tokenizer="gpt2")
    assert not (tmp_path / "other").exists()


# ---- the Diffusion Transformer -----------------------------------------------------------------------------------


def diffusers_names(layers: int) -> dict[str, tuple[str, ...]]:
    """Official DiT layer -> the layers of diffusers it is, or is split or copied into."""
    official, blocks = "diffusion_transformer.", "transformer_blocks."
    embedders = [f"{blocks}{layer}.norm1.emb.timestep_embedder." for layer in range(layers)]
    names = {
        f"{official}x_embedder.proj": ("pos_embed.proj",),
        f"{official}t_embedder.mlp.0": tuple(f"{name}linear_1" for name in embedders),
        f"{official}t_embedder.mlp.2": tuple(f"{name}linear_2" for name in embedders),
        f"{official}final_layer.adaLN_modulation.1": ("proj_out_1",),
        f"{official}final_layer.linear": ("proj_out_2",),
    }
    for layer in range(layers):
        there, here = f"{official}blocks.{layer}.", f"{blocks}{layer}."
        names[f"{there}attn.qkv"] = tuple(f"{here}attn1.to_{part}" for part in "qkv")
        names[f"{there}attn.proj"] = (f"{here}attn1.to_out.0",)
        names[f"{there}mlp.fc1"] = (f"{here}ff.net.0.proj",)
        names[f"{there}mlp.fc2"] = (f"{here}ff.net.2",)
        names[f"{there}adaLN_modulation.1"] = (f"{here}norm1.linear",)
    return names


def padded_to(tensor: Tensor, shape: torch.Size) -> Tensor:
    """A tensor with zeros behind it: diffusers fixes the feed-forward width at four times the model's."""
    padded = torch.zeros(shape)
    padded[tuple(slice(size) for size in tensor.shape)] = tensor
    return padded


def dit_from_official(case: Case, labels: Tensor) -> Any:
    """The official DiT as diffusers' model; `labels` (L, D) are added to the time embedding as class embeddings."""
    diffusers = pytest.importorskip("diffusers")
    flags = case.hparams
    heads, width = flags["multiheaded_attention_heads"], flags["embedding_dim"]
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=width // heads,
        in_channels=3,
        out_channels=6,
        num_layers=flags["num_transformer_blocks"],
        sample_size=flags["image_dims"][0],
        patch_size=flags["patch_size"],
        num_embeds_ada_norm=len(labels),
        norm_eps=1e-6,
    )
    # one of its tables for null, which this model has no use for
    table = torch.cat([labels, torch.zeros(1, width)])
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    weights = {name: table for name in shapes if "class_embedder" in name}
    for official, ours in diffusers_names(flags["num_transformer_blocks"]).items():
        for kind in ("weight", "bias"):
            tensor = case.params[f"{official}.{kind}"]
            parts = tensor.chunk(3) if official.endswith("qkv") else [tensor] * len(ours)
            for name, part in zip(ours, parts, strict=True):
                weights[f"{name}.{kind}"] = padded_to(part, shapes[f"{name}.{kind}"])
    model.load_state_dict(weights)
    # its frequencies fall off by 1 / (half - 1) of the way, the official ones by 1 / half; no option says which
    for block in model.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    return model.eval()


def dit_of(case: Case) -> tuple[Any, Callable[[Tensor, Tensor], Tensor]]:
    """diffusers' model and the same as a function of noisy images and timesteps, without condition."""
    model = dit_from_official(case, torch.zeros(1, case.hparams["embedding_dim"]))
    null = torch.zeros(len(case.io["x_t"]), dtype=torch.long)
    return model, lambda images, steps: model(images, timestep=steps, class_labels=null).sample


@pytest.mark.parametrize("case", DIFFUSION, ids=str)
def test_the_diffusion_transformer_of_diffusers_agrees(case: Case) -> None:
    _, predict = dit_of(case)
    case.compare("model_output", predict(case.io["x_t"], case.io["timesteps"]).detach())
    conditioned = dit_from_official(case, case.io["condition_y"])
    output = conditioned(case.io["x_t"], timestep=case.io["timesteps"], class_labels=torch.arange(2)).sample
    case.compare("model_output_with_y", output.detach())


@pytest.mark.parametrize("case", DIFFUSION, ids=str)
def test_as_it_comes_the_diffusion_transformer_of_diffusers_has_other_time_frequencies(case: Case) -> None:
    model, predict = dit_of(case)
    for block in model.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 1
    output = predict(case.io["x_t"], case.io["timesteps"]).detach()
    late = case.io["timesteps"] > 0  # at time 0 all frequencies are the same
    off = (output - case.io["model_output"]).abs().flatten(1).amax(1) / case.io["model_output"].abs().max()
    assert (off[late] > 1e-4).all() and (off[~late] < 1e-6).all()


@pytest.mark.parametrize("case", DIFFUSION, ids=str)
def test_the_tables_of_the_noise_schedule_agree(case: Case) -> None:
    pytest.importorskip("diffusers")
    flags = case.hparams
    scheduler, _ = noise_scheduler(flags["denoise_images_noise_level"], flags["diffusion_steps"])
    tables = load_file(case.folder / "schedule_f64.safetensors")
    for name, mine in (("betas", scheduler.betas), ("alphas_cumprod", scheduler.alphas_cumprod)):
        torch.testing.assert_close(mine.double(), tables[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("case", DIFFUSION, ids=str)
def test_mean_and_variance_of_one_diffusion_step_agree(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("diffusers")
    from diffusers import DDPMScheduler
    from diffusers.schedulers import scheduling_ddpm

    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda shape, **_: torch.zeros(shape))
    flags = case.hparams
    schedule, _ = noise_scheduler(flags["denoise_images_noise_level"], flags["diffusion_steps"])
    scheduler = DDPMScheduler.from_config(schedule.config, variance_type="learned_range", clip_sample=True)
    for row, timestep in enumerate(case.io["timesteps"].tolist()):
        output, noisy = case.io["model_output"][row : row + 1], case.io["x_t"][row : row + 1]
        step = scheduler.step(output, timestep, noisy)
        rtol = case.info["suggested_rtol_of_max"]
        for name, mine in (("mean", step.prev_sample), ("pred_xstart", step.pred_original_sample)):
            name = f"p_mean_variance.{name}"
            case.close(name, mine, case.io[name][row : row + 1], rtol[name])
        if timestep == 0:
            continue  # the official code gives the last step the variance of the one before, diffusers (almost) none
        log_variance = scheduler._get_variance(timestep, predicted_variance=output[:, 3:])
        name = "p_mean_variance.log_variance"
        case.close(name, log_variance, case.io[name][row : row + 1], rtol[name])


@pytest.mark.parametrize("case", DIFFUSION, ids=str)
def test_ddim_sampling_agrees(case: Case) -> None:
    pytest.importorskip("diffusers")
    from diffusers import DDIMScheduler

    flags = case.hparams
    schedule, last = noise_scheduler(flags["denoise_images_noise_level"], flags["diffusion_steps"])
    scheduler = DDIMScheduler.from_config(schedule.config, clip_sample=True)
    scheduler.set_timesteps(schedule.config.num_train_timesteps)
    _, predict = dit_of(case)
    images = case.io["ddim.start"]
    for taken, timestep in enumerate(range(last, -1, -1), start=1):
        with torch.no_grad():
            noise = predict(images, torch.full((len(images),), timestep))[:, :3]
        # the official code takes the noise from the clipped image
        images = scheduler.step(noise, timestep, images, eta=0.0, use_clipped_model_output=True).prev_sample
        if f"ddim.sample_after_{taken}_steps" in case.io:
            case.compare(f"ddim.sample_after_{taken}_steps", images)
    assert taken == case.info["ddim_steps"]


def variational_bound(case: Case, output: Tensor) -> Tensor:
    """
    What the official training adds to the squared error so that the variance is learned (Nichol and Dhariwal 2021), in
    bits, (B,); diffusers has no such loss.
    """
    tables = {
        name: table.float()[case.io["timesteps"], None, None, None]
        for name, table in load_file(case.folder / "schedule_f64.safetensors").items()
    }
    real, noisy = case.io["real_images"], case.io["x_t"]
    kept = tables["alphas_cumprod"]
    noise, variance = output.detach()[:, :3], output[:, 3:]  # the bound teaches the variance alone
    share = (variance + 1) / 2
    log_variance = share * tables["betas"].log() + (1 - share) * tables["posterior_log_variance_clipped"]

    def mean_of(clean: Tensor) -> Tensor:
        return tables["posterior_mean_coef1"] * clean + tables["posterior_mean_coef2"] * noisy

    predicted = mean_of((noisy - (1 - kept).sqrt() * noise) / kept.sqrt())
    exact_log_variance = tables["posterior_log_variance_clipped"]
    distance = (mean_of(real) - predicted) ** 2 * torch.exp(-log_variance)
    ratio = torch.exp(exact_log_variance - log_variance)
    divergence = 0.5 * (log_variance - exact_log_variance + ratio + distance - 1)

    def below(value: Tensor) -> Tensor:
        scaled = (value - predicted) * torch.exp(-0.5 * log_variance)
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (scaled + 0.044715 * scaled**3)))

    # the last step is scored by the likelihood of the pixel's own 1/255 wide bin
    upper, lower = below(real + 1 / 255), below(real - 1 / 255)
    inside = torch.where(real < -0.999, upper, torch.where(real > 0.999, 1 - lower, upper - lower))
    likelihood = -inside.clamp(min=1e-12).log()
    first = (case.io["timesteps"] == 0)[:, None, None, None]
    return torch.where(first, likelihood, divergence).mean((1, 2, 3)) / math.log(2)


@pytest.mark.parametrize("case", DIFFUSION, ids=str)
def test_training_loss_and_gradients_of_the_diffusion_transformer_agree(case: Case) -> None:
    model, predict = dit_of(case)
    output = predict(case.io["x_t"], case.io["timesteps"])
    squared = ((output[:, :3] - case.io["noise"]) ** 2).mean((1, 2, 3))
    bound = variational_bound(case, output)
    case.compare("training.mse", squared.detach())
    case.compare("training.vb", bound.detach())
    case.compare("training.loss", (squared + bound).detach())
    (squared + bound).mean().backward()

    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    recorded = case.info["grad_variants"]["default"]
    reference = load_file(case.folder / "grads.default.safetensors")
    compared = set()
    for official, ours in diffusers_names(case.hparams["num_transformer_blocks"]).items():
        for kind in ("weight", "bias"):
            name = f"{official}.{kind}"
            parts = [gradients[f"{part}.{kind}"] for part in ours]
            # copies of one official parameter share its gradient
            mine = torch.cat(parts) if official.endswith("qkv") else torch.stack(parts).sum(0)
            mine = mine[tuple(slice(size) for size in reference[name].shape)]
            case.close(f"gradient {name}", mine, reference[name], recorded["suggested_rtol_of_max"])
            compared.add(name)
    assert compared == set(reference)
