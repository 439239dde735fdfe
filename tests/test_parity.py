"""
Law: with the official weights and the same starts and random numbers, this package computes what the official code
computes. Every tensor is held to the tolerance stored beside it (30 times the error of the official fp32 run itself).
"""

import contextlib
import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from ebt_transformers import EBTConfig, EBTForCausalLM, ThinkingConfig
from ebt_transformers.modeling_ebt import conversion_ebt as conversion
from ebt_transformers.modeling_ebt import conversion_ebt_text as text_conversion
from ebt_transformers.modeling_ebt import descent
from ebt_transformers.modeling_ebt.conversion_common_ebt import SCHEDULE_FLAGS


sys.path.append(str(Path(__file__).parent))  # the helper beside this file, under every import mode of pytest
import parity_cases as parity  # noqa: E402
from parity_cases import Case  # noqa: E402


CASES = parity.supported_cases()
VARIANTS = [(case, variant) for case in CASES for variant in case.info["grad_variants"]]
# recorded advanced runs whose random numbers were recorded too
ADVANCED = [
    (case, run) for case in CASES for run in case.info.get("adv") or {} if case.hparams["langevin_dynamics_noise"] == 0
]
REPLAYED = parity.cases("opt_s2_replay_buffer")
TWINS = parity.cases("nlp_baseline")
GENERATED = parity.cases("generate_greedy")
CHECKPOINTS = [
    folder / f"{kind}.ckpt"
    for folder in parity.checkpoint_folders()
    for kind in ("ebt", "baseline_transformer")
    if (folder / f"{kind}.ckpt").is_file()
]
SELECTION_MARGIN = 1e-4


@pytest.fixture(scope="session", autouse=True)
def report() -> Iterator[None]:
    """Writes the table of errors at the end of the session, when asked to."""
    yield
    parity.write_report()


@pytest.fixture
def replay(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[Tensor]], None]:
    """Makes the descent draw the given tensors instead of random ones."""

    def set_draws(draws: list[Tensor]) -> None:
        monkeypatch.setattr(descent, "standard_normal", parity.Replay(draws))

    return set_draws


@pytest.fixture
def replay_training(monkeypatch: pytest.MonkeyPatch) -> Callable[[Case, str], None]:
    """Makes everything random in a training step what it was in the recorded one."""
    return lambda case, variant: parity.replay_training(monkeypatch, case, variant)


def check_losses(case: Case, output: Any, recorded: dict[str, Any]) -> None:
    """Loss of the recipe, losses of the first and the last step, and the perplexity."""
    mine = {
        "loss": output.loss.item(),
        "initial_loss": output.step_losses[0].item(),
        "final_step_loss": output.step_losses[-1].item(),
        "perplexity": math.exp(output.step_losses[-1].item()),
    }
    for name, value in mine.items():
        exact = recorded.get("log_dict_fp64", recorded["log_dict"])[name]
        own_error = abs(recorded["log_dict"][name] - exact)
        case.within(f"loss {name}", abs(value - exact), max(parity.LOSS_RTOL * abs(exact), 30 * own_error))


# ---- evaluation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=str)
def test_logits_and_energies_agree_after_every_step(case: Case, replay: Callable) -> None:
    model = case.model()
    landscapes = parity.evaluation_landscapes(model)
    assert len(landscapes) == case.info["eval_num_steps"]
    for steps in range(1, len(landscapes) + 1):
        replay(case.draws("eval", "randn_like"))
        thinking = ThinkingConfig(landscapes=landscapes[:steps])
        with torch.no_grad():
            output = model(
                case.inputs, initial_candidate=case.io["initial_candidate"], thinking=thinking, output_energies=True
            )
        case.compare(f"eval.logits.{steps - 1}", output.logits)
        case.compare(f"eval.energies.{steps - 1}", output.energies[..., steps - 1])
    replay(case.draws("eval", "randn_like"))
    by_default = model(case.inputs, initial_candidate=case.io["initial_candidate"])
    assert torch.equal(by_default.logits, output.logits)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradient_of_the_energy_with_respect_to_the_distribution_agrees(case: Case) -> None:
    model = case.model()
    noises = case.draws("eval", "randn_like")
    state = case.io["initial_candidate"]
    for step, landscape in enumerate(parity.evaluation_landscapes(model)):
        if noises:
            state = state + model.config.thinking_noise_std * noises[step]
        probs = torch.softmax(state, dim=-1).requires_grad_()
        energies = model.energy(case.inputs, candidate_probs=probs, landscape=landscape)
        (gradient,) = torch.autograd.grad(energies.sum(), probs)
        case.compare(f"eval.energies.{step}", energies.detach())
        case.compare(f"eval.energy_grad.{step}", gradient)
        state = case.io[f"eval.logits.{step}"]


@pytest.mark.parametrize(("case", "run"), ADVANCED, ids=parity.identifier)
def test_advanced_inference_agrees(case: Case, run: str, replay: Callable) -> None:
    recorded = case.info["adv"][run]
    model, inputs = case.model(), case.inputs
    flags = parity.AdvancedRun.from_flags(case.hparams, recorded["hparams"])
    start = case.io[recorded["candidates"]]
    replay(case.draws(f"adv.{run}", "randn_like"))
    with torch.no_grad():
        logits, energies = flags(model, inputs.repeat_interleave(flags.candidates, 0), start)
    assert len(energies) == recorded["n_energies"]
    for step, energy in enumerate(energies):
        case.compare(f"adv.{run}.energies.{step}", energy)
    if flags.candidates == 1:
        case.compare(f"adv.{run}.final_logits", logits)
        return

    # all candidates of a row in one call, and the choice among them
    candidates = (-1, flags.candidates)
    with torch.no_grad():
        thinking = {**flags.thinking(0, len(flags.landscapes)), "selection": flags.selection}
        chosen = model(inputs, initial_candidate=start.unflatten(0, candidates), thinking=thinking).logits
    index = (logits.unflatten(0, candidates) - chosen[:, None]).abs().amax(-1).argmin(1)
    clear = case.io[f"adv.{run}.selected_margin"] >= SELECTION_MARGIN * recorded["energy_absmax"]
    assert torch.equal(index[clear], case.io[f"adv.{run}.selected_index"][clear])
    name = f"adv.{run}.final_logits"
    case.close(name, chosen[clear], case.io[name][clear], case.info["suggested_rtol_of_max"][name])


@pytest.mark.parametrize("case", [case for case in CASES if "adv.default.state.1" in case.io], ids=str)
def test_states_of_the_default_advanced_inference_agree(case: Case) -> None:
    if case.hparams["langevin_dynamics_noise"] != 0:
        pytest.skip("its noise was not recorded")
    model = case.model()
    flags = parity.AdvancedRun.from_flags(case.hparams, {})
    for step in range(1, case.info["adv"]["default"]["n_states"] + 1):
        thinking = ThinkingConfig(landscapes=flags.landscapes[:step])
        output = model(case.inputs, initial_candidate=case.io["initial_candidate"], thinking=thinking)
        case.compare(f"adv.default.state.{step}", output.logits)


# ---- training ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("case", "variant"), VARIANTS, ids=parity.identifier)
def test_training_loss_and_every_parameter_gradient_agree(case: Case, variant: str, replay_training: Callable) -> None:
    recorded = case.info["grad_variants"][variant]
    model = case.model(**recorded["hparams"]).train()
    replay_training(case, variant)
    # where each landscape is walked a random number of times, that number has to be said
    said = None if model.config.random_steps is not None else parity.training_landscapes(case, variant)
    output = model(
        case.inputs,
        initial_candidate=case.io["initial_candidate"],
        labels=case.targets,
        shift_labels=case.targets,
        thinking=None if said is None else {"landscapes": said},
    )
    check_losses(case, output, recorded)
    output.loss.backward()
    parity.check_gradients(case, model, variant)


@pytest.mark.parametrize("case", REPLAYED, ids=str)
def test_training_on_replayed_predictions_agrees(case: Case) -> None:
    model = case.model().train()
    replayed = case.info["call2_sampled_buffer_indices"]
    start = case.io["initial_candidate_call2"].clone()
    start[-len(replayed) :] = case.io["buffer_after_call1.predicted_logits"][replayed]
    tokens = torch.cat([case.io["input_ids_call2"], case.io["buffer_after_call1.token_ids"][replayed]])
    labels = parity.as_labels(tokens[:, 1:])
    assert torch.equal(tokens[:, :-1], case.io["call2.forward_input_ids"])
    output = model(tokens[:, :-1], initial_candidate=start, labels=labels, shift_labels=labels)
    check_losses(case, output, case.info["grad_variants"]["default"])
    output.loss.backward()
    parity.check_gradients(case, model, "default")
    case.close("call2.logits.1", output.logits.detach(), case.io["call2.logits.1"], parity.LOSS_RTOL)


@pytest.mark.parametrize("case", TWINS, ids=str)
def test_transformer_pp_logits_loss_and_gradients_agree(case: Case) -> None:
    model = case.model()
    assert isinstance(model, LlamaForCausalLM)
    output = model(case.inputs, labels=case.targets, shift_labels=case.targets)
    case.compare("eval.logits", output.logits.detach())
    recorded = case.info["grad_variants"]["default"]
    exact = recorded["log_dict"]["loss"]
    case.within("loss", abs(output.loss.item() - exact), parity.LOSS_RTOL * exact)
    output.loss.backward()
    parity.check_gradients(case, model, "default")


# ---- generation and checkpoints ----------------------------------------------------------------------------------

# The tokens recorded for the EBT do not follow from the weights stored beside them and a zero candidate; why is not
# known. A separate port of the official time_embed forward, which reproduces the recorded logits of
# nlp_time_embed_linear_n2_a500 and of checkpoint/ebt.ckpt, gives from these weights the tokens this package gives.
NOT_FROM_THESE_WEIGHTS = pytest.mark.xfail(
    strict=True, reason="the recorded tokens do not follow from the stored weights and a zero candidate"
)
GENERATED_ROWS = [
    pytest.param(case, kind, mode, row, marks=NOT_FROM_THESE_WEIGHTS if kind == "ebt" else ())
    for case in GENERATED
    for kind, modes in case.info["generated"].items()
    for mode in modes
    for row in range(len(case.info["prompt_lengths"]))
]


@pytest.mark.parametrize(("case", "kind", "mode", "row"), GENERATED_ROWS, ids=parity.identifier)
def test_greedy_generation_gives_the_official_tokens(case: Case, kind: str, mode: str, row: int) -> None:
    weights = load_file(case.folder / f"params.{kind}.safetensors")
    hparams = case.hparams[kind]
    model = conversion.model_from_official(weights, hparams, eos_token_id=parity.PAD)
    prompt = case.io["prompt_ids"][row : row + 1, : case.info["prompt_lengths"][row]]
    options: dict[str, Any] = {}
    if mode == "advanced_infer_ebt_num_steps_2":
        flags = parity.AdvancedRun.from_flags(hparams, {"infer_ebt_num_steps": 2})
        options["thinking"] = flags.thinking(0, len(flags.landscapes))
    tokens = model.generate(prompt, do_sample=False, max_new_tokens=case.info["infer_max_gen_len"], **options)
    generated = [token for token in tokens[0, prompt.shape[1] :].tolist() if token != parity.PAD]
    assert generated == case.info["generated"][kind][mode][row]


@pytest.mark.parametrize("steps_per_landscape", [1, 2])
@pytest.mark.parametrize("case", parity.cases("nlp_time_embed", "nlp_adaln", "opt_act_gelu", "opt_batch1"), ids=str)
def test_greedy_generation_is_the_official_loop_over_whole_forwards(case: Case, steps_per_landscape: int) -> None:
    model = case.model(denoising_initial_condition="zeros")
    options: dict[str, Any] = {}
    if steps_per_landscape > 1:
        flags = parity.AdvancedRun.from_flags(case.hparams, {"infer_ebt_num_steps": steps_per_landscape})
        options["thinking"] = flags.thinking(0, len(flags.landscapes))
    tokens = prompt = case.inputs[:1, :3]
    with torch.no_grad():
        for _ in range(5):
            start = torch.zeros(*tokens.shape, case.info["vocab_size"])
            logits = model(tokens, initial_candidate=start, use_cache=False, **options).logits
            tokens = torch.cat([tokens, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    generated = model.generate(prompt, do_sample=False, max_new_tokens=5, eos_token_id=None, **options)
    assert torch.equal(generated, tokens)


@pytest.mark.parametrize("path", CHECKPOINTS, ids=lambda path: f"{path.parts[-3]}-{path.stem}")
def test_a_lightning_checkpoint_gives_the_recorded_outputs_and_validation_loss(path: Path) -> None:
    expected = load_file(path.with_suffix(".expected.safetensors"))
    info = json.loads(path.with_suffix(".expected.json").read_text(encoding="utf-8"))
    state_dict, hparams = conversion.load_official_checkpoint(path)
    assert {f"model.{name}" for name in state_dict} == set(info["state_dict_keys"])
    model = conversion.model_from_official(state_dict, hparams)
    inputs, labels = expected["input_ids"][:, :-1], parity.as_labels(expected["input_ids"][:, 1:])
    if isinstance(model, LlamaForCausalLM):
        output = model(inputs, labels=labels, shift_labels=labels)
        torch.testing.assert_close(output.logits, expected["eval.logits"], rtol=1e-4, atol=1e-4)
        assert output.loss.item() == pytest.approx(info["valid_log_dict"]["loss"], rel=parity.LOSS_RTOL)
        return
    options = {"initial_candidate": expected["initial_candidate"], "labels": labels, "shift_labels": labels}
    output = model(inputs, output_energies=True, **options)
    torch.testing.assert_close(output.logits, expected["adv.default.final_logits"], rtol=1e-4, atol=1e-4)
    for step in range(2):
        torch.testing.assert_close(output.energies[..., step], expected[f"eval.energies.{step}"], rtol=1e-4, atol=1e-5)
    # the official validation loss is the training objective; ours in evaluation is that of the last step
    assert output.loss.item() == pytest.approx(info["valid_log_dict"]["final_step_loss"], rel=parity.LOSS_RTOL)
    assert output.step_losses.mean().item() == pytest.approx(info["valid_log_dict"]["loss"], rel=parity.LOSS_RTOL)


# ---- conversion --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [*CASES, *TWINS, *REPLAYED], ids=str)
def test_there_and_back_is_exact_in_weights_and_flags(case: Case) -> None:
    state_dict, hparams = conversion.model_to_official(case.model())
    assert set(state_dict) == set(case.params)
    for name, tensor in case.params.items():
        assert torch.equal(state_dict[name], tensor), name
        assert state_dict[name].is_contiguous()
    assert {flag: case.hparams[flag] for flag in hparams if flag in case.hparams} == {
        flag: value for flag, value in hparams.items() if flag in case.hparams
    }
    again = conversion.config_from_official(hparams, vocab_size=case.info["vocab_size"])
    assert (
        again.to_diff_dict() == conversion.config_from_official(case.hparams, case.info["vocab_size"]).to_diff_dict()
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_saved_and_loaded_conversion_is_exact(case: Case, tmp_path: Path) -> None:
    model = case.model()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, EBTForCausalLM)
    before, after = conversion.model_to_official(model), conversion.model_to_official(loaded)
    assert before[1] == after[1]
    assert all(torch.equal(tensor, after[0][name]) for name, tensor in before[0].items())


@pytest.mark.parametrize("case", parity.cases(*parity.UNSUPPORTED), ids=str)
def test_recorded_unsupported_option_raises_naming_it(case: Case) -> None:
    flag = parity.UNSUPPORTED[case.folder.name]
    with pytest.raises(ValueError, match=rf"`{flag}={case.hparams[flag]!r}` is not supported here\. Allowed: "):
        case.model()


@pytest.fixture
def official() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and flags of a small official model."""
    case = parity.cases("opt_act_gelu")[0]
    return dict(case.params), dict(case.hparams)


UNSUPPORTED_VALUES = {
    "modality": "VID",
    "model_name": "dit",
    "ebt_type": "moe",
    "ebt_norm": "dyt",
    "ebt_act_func": "elu",
    "denoising_initial_condition": "most_recent_embedding",
    "normalize_initial_condition": False,
    "normalize_initial_condition_only_first_step": True,
    "clamp_futures_grad": True,
    "absolute_clamp": 0.7,
    "sharpen_predicted_distribution": 0.5,
    "soften_target_prob_dist": 0.3,
    "contrastive_loss": True,
    "reconstruction_coeff": 0.25,
    "num_modality_processing_mlp_layers": 3,
    "learnable_process_memory": True,
    "langevin_dynamics_noise_learnable": True,
}


@pytest.mark.parametrize(("flag", "value"), UNSUPPORTED_VALUES.items())
def test_unsupported_option_raises_naming_flag_value_and_what_is_allowed(
    flag: str, value: Any, official: tuple[dict[str, Tensor], dict[str, Any]]
) -> None:
    state_dict, hparams = official
    with pytest.raises(ValueError, match=rf"`{flag}={value!r}` is not supported here\. Allowed: .+\."):
        conversion.model_from_official(state_dict, {**hparams, flag: value})


def test_every_limit_is_tried() -> None:
    limits = {**text_conversion.LIMITS, **text_conversion.TIME_EMBED_LIMITS}
    assert set(limits) < set(UNSUPPORTED_VALUES)


@pytest.mark.parametrize("flag", ["modality", "embedding_dim", "context_length", "ebt_type", "mcmc_num_steps"])
def test_missing_flag_raises_naming_it(flag: str, official: tuple[dict[str, Tensor], dict[str, Any]]) -> None:
    state_dict, hparams = official
    hparams.pop(flag)
    with pytest.raises(ValueError, match=f"lack `{flag}`"):
        conversion.model_from_official(state_dict, hparams)


def test_options_without_effect_on_the_model_are_not_judged(
    official: tuple[dict[str, Tensor], dict[str, Any]],
) -> None:
    state_dict, hparams = official
    del state_dict["transformer.time_embeddings.weight"]
    # norm and activation act in time_embed only; the other types always have rms norms and silu
    hparams.update(ebt_type="default", ebt_norm="layer", ebt_act_func="elu", wandb_project="EBT")
    assert conversion.model_from_official(state_dict, hparams).config.hidden_act == "silu"


def test_missing_unexpected_and_misshaped_weights_raise_naming_them(
    official: tuple[dict[str, Tensor], dict[str, Any]],
) -> None:
    state_dict, hparams = official
    del state_dict["transformer.norm.weight"]
    state_dict["transformer.extra.weight"] = torch.zeros(1)
    state_dict["transformer.layers.0.attention.wq.weight"] = torch.zeros(16, 15)
    with pytest.raises(ValueError) as raised:
        conversion.model_from_official(state_dict, hparams)
    message = str(raised.value)
    assert "missing: transformer.norm.weight;" in message
    assert "unexpected: transformer.extra.weight;" in message
    assert "of another shape: transformer.layers.0.attention.wq.weight (16, 15), expected (16, 16)." in message


def test_weights_without_embeddings_raise(official: tuple[dict[str, Tensor], dict[str, Any]]) -> None:
    state_dict, hparams = official
    del state_dict["embeddings.weight"]
    with pytest.raises(ValueError, match=r"`embeddings\.weight` is missing"):
        conversion.model_from_official(state_dict, hparams)


def test_a_noise_level_that_left_its_flag_raises(official: tuple[dict[str, Tensor], dict[str, Any]]) -> None:
    state_dict, hparams = official
    state_dict["langevin_dynamics_noise_std"] = torch.tensor(0.5)
    with pytest.raises(ValueError, match=r"is 0\.5, but the flag `langevin_dynamics_noise` says 0"):
        conversion.model_from_official(state_dict, hparams)


@pytest.mark.parametrize("prefix", ["model.", "model._orig_mod.", "_orig_mod.model."])
def test_prefixes_of_lightning_and_torch_compile_are_taken_off(
    prefix: str, official: tuple[dict[str, Tensor], dict[str, Any]]
) -> None:
    state_dict, hparams = official
    prefixed = {prefix + name: tensor for name, tensor in state_dict.items()}
    back, _ = conversion.model_to_official(conversion.model_from_official(prefixed, hparams))
    assert set(back) == set(state_dict)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"update": "residual"}, "update='residual'"),
        ({"candidate_anchor": "token"}, "candidate_anchor='token'"),
        ({"candidate_init": "proposal", "update": "residual", "thinking_steps": 0}, "candidate_init='proposal'"),
        ({"num_key_value_heads": 2}, "num_key_value_heads=2"),
        ({"rms_norm_eps": 1e-6}, "rms_norm_eps=1e-06"),
        ({"hidden_act": "tanh"}, "hidden_act='tanh'"),
        ({"step_conditioning": "adaln", "hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"thinking_steps": 1}, "thinking_steps=1"),
    ],
)
def test_a_model_the_official_code_cannot_express_raises_naming_the_field(
    overrides: dict[str, Any], named: str, make_model: Callable
) -> None:
    model = make_model(**{"num_key_value_heads": 4, **overrides})
    with pytest.raises(ValueError, match=f"The official code has nothing for `{named}`"):
        conversion.model_to_official(model)


STEPS = [
    # our fields, and the official (mcmc_num_steps, randomize_mcmc_num_steps, _min, _final_landscape)
    ({"num_landscapes": 2}, (2, 0, 0, False)),
    ({"num_landscapes": 2, "thinking_steps": 4}, (2, 2, 3, True)),
    ({"num_landscapes": 2, "thinking_steps": 4, "random_steps": [3, 4]}, (2, 2, 2, True)),
    ({"num_landscapes": 2, "thinking_steps": 4, "random_steps": [4, 4]}, (2, 2, 3, True)),
    ({"num_landscapes": 1, "thinking_steps": 3, "random_steps": [1, 3]}, (1, 2, 0, False)),
    ({"num_landscapes": 1, "thinking_steps": 3, "random_steps": [2, 3], "random_step_size": 2.0}, (1, 2, 2, False)),
    ({"num_landscapes": 1, "thinking_steps": 3, "step_conditioning": "none"}, (3, 0, 0, False)),
    (
        {"num_landscapes": 1, "thinking_steps": 3, "step_conditioning": "none", "random_steps": [2, 3]},
        (1, 2, 2, False),
    ),
]


@pytest.mark.parametrize(("ours", "theirs"), STEPS, ids=str)
def test_numbers_of_steps_go_there_and_come_back(ours: dict[str, Any], theirs: tuple[Any, ...]) -> None:
    config = EBTConfig(vocab_size=29, **ours)
    hparams = conversion.config_to_official(config)
    assert tuple(hparams[flag] for flag in ("mcmc_num_steps", *SCHEDULE_FLAGS)) == theirs
    again = conversion.config_from_official(hparams, vocab_size=29)
    assert again.default_thinking() == config.default_thinking()
    assert (again.random_steps or [again.default_thinking().steps] * 2) == (
        config.random_steps or [config.default_thinking().steps] * 2
    )
    assert again.random_step_size == config.random_step_size
    assert not hasattr(again, "official_training")


@pytest.mark.parametrize(
    "unexpressed",
    [{"randomize_mcmc_num_steps": 2}, {"mcmc_replay_buffer": True, "mcmc_replay_buffer_size": 6}],
    ids=str,
)
def test_training_flags_without_a_field_are_kept_and_said(
    unexpressed: dict[str, Any], official: tuple[dict[str, Tensor], dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    state_dict, hparams = official
    with _propagated():
        model = conversion.model_from_official(state_dict, {**hparams, **unexpressed})
        assert model.config.official_training == unexpressed and str(unexpressed) in caplog.text
        assert conversion.model_to_official(model)[1].items() >= unexpressed.items()
        caplog.clear()
        expressed = {"randomize_mcmc_num_steps": 2, "randomize_mcmc_num_steps_final_landscape": True}
        conversion.model_from_official(state_dict, {**hparams, **expressed, "randomize_mcmc_step_size_scale": 2})
        assert caplog.text == ""


@contextlib.contextmanager
def _propagated() -> Iterator[None]:
    """Lets pytest see what transformers' logger writes."""
    from transformers.utils import logging

    logging.enable_propagation()
    try:
        yield
    finally:
        logging.disable_propagation()


def test_another_kind_of_model_raises() -> None:
    with pytest.raises(TypeError, match="got Linear"):
        conversion.model_to_official(torch.nn.Linear(1, 1))


@pytest.mark.parametrize("hidden", [32, 41, 42, 43, 48, 85, 86, 128])
def test_width_of_the_feed_forward_layers_survives_there_and_back(hidden: int, make_model: Callable) -> None:
    model = make_model(num_key_value_heads=4, intermediate_size=hidden)
    state_dict, hparams = conversion.model_to_official(model)
    assert conversion.model_from_official(state_dict, hparams).config.intermediate_size == hidden


# ---- files -------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint as the official trainer writes it."""
    return Path(shutil.copy(CHECKPOINTS[0], tmp_path / "official.ckpt"))


def test_a_converted_folder_loads_like_any_other(checkpoint: Path, tmp_path: Path) -> None:
    converted = conversion.convert_checkpoint(checkpoint, tmp_path / "new" / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "new" / "model")
    tokens = torch.tensor([[5, 6, 7]])
    assert torch.equal(loaded(tokens).logits, converted(tokens).logits)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["model"]


def test_a_given_tokenizer_comes_along_and_ends_the_text(checkpoint: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    words = {f"w{index}": index for index in range(97)}
    backend = Tokenizer(models.WordLevel(words, unk_token="w1"))
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="w0").save_pretrained(tmp_path / "tokenizer")
    conversion.convert_checkpoint(checkpoint, tmp_path / "model", tokenizer=str(tmp_path / "tokenizer"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert (loaded.config.eos_token_id, loaded.generation_config.eos_token_id) == (0, 0)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "model")) == 97


def test_a_tokenizer_that_is_not_there_raises_and_leaves_nothing(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="cannot be loaded"):
        conversion.convert_checkpoint(checkpoint, tmp_path / "model", tokenizer=str(tmp_path / "nowhere"))
    assert not (tmp_path / "model").exists()


def test_an_existing_folder_is_not_overwritten(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("precious")
    with pytest.raises(FileExistsError, match="not empty"):
        conversion.convert_checkpoint(checkpoint, tmp_path / "model")
    assert (tmp_path / "model" / "config.json").read_text() == "precious"


def test_a_full_disk_leaves_no_half_written_folder(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: Any, folder: Path, **kwargs: Any) -> None:
        (Path(folder) / "config.json").write_text("{}")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(EBTForCausalLM, "save_pretrained", fails)
    with pytest.raises(OSError, match="No space left"):
        conversion.convert_checkpoint(checkpoint, tmp_path / "out" / "model")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("share", [0.0, 0.1, 0.9, 0.999])
def test_a_truncated_file_raises_saying_so(share: float, checkpoint: Path) -> None:
    content = checkpoint.read_bytes()
    checkpoint.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ValueError, match="damaged, incomplete"):
        conversion.load_official_checkpoint(checkpoint)


def test_a_file_that_is_no_checkpoint_raises_saying_so(tmp_path: Path) -> None:
    path = tmp_path / "text.ckpt"
    path.write_text("not a checkpoint, but text")
    with pytest.raises(ValueError, match="damaged, incomplete"):
        conversion.load_official_checkpoint(path)
    with pytest.raises(FileNotFoundError, match="There is no checkpoint file"):
        conversion.load_official_checkpoint(tmp_path / "nowhere.ckpt")


@pytest.mark.parametrize(
    ("content", "lacks"),
    [
        ({"epoch": 1}, "state_dict"),
        ({"state_dict": {"a": torch.zeros(1)}}, "hyper_parameters"),
        ([1, 2], "state_dict"),
    ],
)
def test_a_checkpoint_of_something_else_raises_naming_what_it_lacks(content: Any, lacks: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=f"has no `{lacks}`"):
        conversion.load_official_checkpoint(tmp_path / "other.ckpt")


class _Trap:
    def __reduce__(self) -> Any:
        return (print, ("this must not run",))


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": _Trap(), "hyper_parameters": {}}, tmp_path / "trap.ckpt")
    with pytest.raises(ValueError, match="more than tensors and plain values"):
        conversion.load_official_checkpoint(tmp_path / "trap.ckpt")
    assert "must not run" not in capsys.readouterr().out


def test_every_official_flag_has_its_line_in_the_migration_guide(repository_root: Path) -> None:
    _, hparams = conversion.load_official_checkpoint(CHECKPOINTS[0])
    guide = (repository_root / "MIGRATION.md").read_text(encoding="utf-8")
    assert [flag for flag in hparams if f"`{flag}`" not in guide] == []
