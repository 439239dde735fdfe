"""
The tables of official text checkpoints: Energy-Based Transformers, and their Transformer++ twins.

`WEIGHTS` says which tensor becomes which, `FLAGS` and `LIMITS` which hyper-parameter becomes which config field, and
which values there is nothing for here. Sizes: ``V`` vocabulary, ``D`` width, ``d`` width of a head.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from .configuration_ebt import EBTConfig
from .conversion_common_ebt import (
    DESCENT_FLAGS,
    NOISE_STD,
    SHAPE_FLAGS,
    Flag,
    Weight,
    check_comes_back,
    check_limits,
    check_names_and_shapes,
    check_noise_std,
    feed_forward_multiplier,
    feed_forward_width,
    fields_from_flags,
    flags_from_fields,
    keep_flags,
    kept_flags,
    noise_std_to_official,
    refuse,
    schedule_from_official,
    schedule_to_official,
    to_official,
    to_ours,
    value_of,
    warn_of_kept_flags,
)
from .modeling_ebt import EBTForCausalLM


TextConfig: TypeAlias = EBTConfig | LlamaConfig
TextModel: TypeAlias = EBTForCausalLM | LlamaForCausalLM

MODALITY = "NLP"
EBT, TWIN = "ebt", "baseline_transformer"
RMS_NORM_EPS = 1e-5
ROPE_THETA = 10000.0


# ---- weights ---------------------------------------------------------------------------------------------------


def _halves_from_pairs(weight: Tensor, head_dim: int) -> Tensor:
    """Rows of a query or key matrix: rotary pairs side by side (2j, 2j + 1) -> half a head apart (j, j + d/2)."""
    return weight.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def _pairs_from_halves(weight: Tensor, head_dim: int) -> Tensor:
    return weight.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


# name: (official tensor, head width) -> ours, and back
TRANSFORMS: dict[str, tuple[Callable[[Tensor, int], Tensor], Callable[[Tensor, int], Tensor]]] = {
    "same": (lambda tensor, _: tensor, lambda tensor, _: tensor),
    "rotary": (_halves_from_pairs, _pairs_from_halves),
    "transposed": (lambda tensor, _: tensor.t(), lambda tensor, _: tensor.t()),
    "scalar": (lambda tensor, _: tensor.reshape(1), lambda tensor, _: tensor.reshape(())),
}


def _is_modulated(config: TextConfig) -> bool:
    return isinstance(config, EBTConfig) and config.is_modulated


PRESENT: dict[str, Callable[[TextConfig], bool]] = {
    "always": lambda config: True,
    "twin": lambda config: not isinstance(config, EBTConfig),
    "ebt": lambda config: isinstance(config, EBTConfig),
    "own table": lambda config: isinstance(config, EBTConfig) and config.candidate_embedding == "linear",
    "conditioned": lambda config: isinstance(config, EBTConfig) and config.step_conditioning != "none",
    "modulated": _is_modulated,
    "plain head": lambda config: isinstance(config, EBTConfig) and not _is_modulated(config),
}

# official name, our name, transform, models that have it; {i} stands for every layer
WEIGHTS: tuple[tuple[str, str, str, str], ...] = (
    ("alpha", "step_size.value", "scalar", "ebt"),
    ("embeddings.weight", "model.embed_tokens.weight", "same", "always"),
    ("vocab_to_embed.weight", "candidate_embedding.weight", "transposed", "own table"),
    ("output.weight", "lm_head.weight", "same", "twin"),
    ("transformer.time_embeddings.weight", "model.step_embeddings.weight", "same", "conditioned"),
    ("transformer.norm.weight", "model.norm.weight", "same", "always"),
    ("transformer.final_layer.weight", "model.energy_head.weight", "same", "plain head"),
    ("transformer.final_layer.linear.weight", "model.energy_head.weight", "same", "modulated"),
    ("transformer.final_layer.adaLN_modulation.1.weight", "model.final_modulation.weight", "same", "modulated"),
    ("transformer.final_layer.adaLN_modulation.1.bias", "model.final_modulation.bias", "same", "modulated"),
    *(
        (f"transformer.layers.{{i}}.{official}", f"model.layers.{{i}}.{ours}", transform, present)
        for official, ours, transform, present in (
            ("attention.wq.weight", "self_attn.q_proj.weight", "rotary", "always"),
            ("attention.wk.weight", "self_attn.k_proj.weight", "rotary", "always"),
            ("attention.wv.weight", "self_attn.v_proj.weight", "same", "always"),
            ("attention.wo.weight", "self_attn.o_proj.weight", "same", "always"),
            ("feed_forward.w1.weight", "mlp.gate_proj.weight", "same", "always"),
            ("feed_forward.w2.weight", "mlp.down_proj.weight", "same", "always"),
            ("feed_forward.w3.weight", "mlp.up_proj.weight", "same", "always"),
            ("attention_norm.weight", "input_layernorm.weight", "same", "always"),
            ("ffn_norm.weight", "post_attention_layernorm.weight", "same", "always"),
            ("adaLN_modulation.1.weight", "modulation.weight", "same", "modulated"),
            ("adaLN_modulation.1.bias", "modulation.bias", "same", "modulated"),
        )
    ),
)


def weights_of(config: TextConfig) -> list[Weight]:
    """The rows of `WEIGHTS` that this model has, for all its layers."""
    head_dim = config.head_dim
    found = []
    for official, ours, transform, present in WEIGHTS:
        if not PRESENT[present](config):
            continue
        there, back = TRANSFORMS[transform]
        for layer in range(config.num_hidden_layers) if "{i}" in official else (0,):
            found.append(
                Weight(
                    official.format(i=layer),
                    (ours.format(i=layer),),
                    lambda tensor, there=there: (there(tensor, head_dim),),  # type: ignore[misc]
                    lambda tensor, back=back: back(tensor, head_dim),
                )
            )
    return found


# ---- hyper-parameters ------------------------------------------------------------------------------------------

# `ffn_dim_multiplier`, `ebt_act_func` and the number of steps need more than a look-up: see `config_from_official`
TEXT_SHAPE_FLAGS = (*SHAPE_FLAGS, Flag("context_length", "max_position_embeddings"))
FLAGS = (
    *DESCENT_FLAGS,
    Flag(
        "ebt_type",
        "step_conditioning",
        values={"default": "none", "time_embed": "time_embed", "adaln": "adaln", "adaln_zero": "adaln_zero"},
    ),
    Flag("vocab_to_embed_uses_prob_dist", "candidate_embedding", False, {False: "linear", True: "shared"}),
    Flag(
        "denoising_initial_condition", "candidate_init", "random_noise", {"random_noise": "normal", "zeros": "zeros"}
    ),
    Flag("gaussian_random_noise_scaling", "candidate_init_std", 1),
)

# flag: (the values carried, the official default)
LIMITS: dict[str, tuple[tuple[Any, ...], Any]] = {
    "normalize_initial_condition": ((True,), False),
    "normalize_initial_condition_only_first_step": ((False,), False),
    "clamp_futures_grad": ((False,), False),
    "absolute_clamp": ((0.0,), 0.0),
    "sharpen_predicted_distribution": ((0.0,), 0.0),
    "soften_target_prob_dist": ((0.0,), 0.0),
    "contrastive_loss": ((False,), False),
    "reconstruction_coeff": ((1.0,), 1.0),
    "num_modality_processing_mlp_layers": ((1,), 1),
    "learnable_process_memory": ((False,), False),
    "langevin_dynamics_noise_learnable": ((False,), False),
}
# these act in the official `time_embed` model only
TIME_EMBED_LIMITS: dict[str, tuple[tuple[Any, ...], Any]] = {
    "ebt_norm": (("rms",), "rms"),
    "ebt_act_func": (("silu", "gelu", "relu"), "silu"),
}

# predictions used again as starts in training: kept in `config.official_training`
REPLAY_FLAGS: dict[str, Any] = {
    "mcmc_replay_buffer": False,
    "mcmc_replay_buffer_size": 192,
    "mcmc_replay_buffer_sample_bs_percent": 0.5,
}

# config fields without an official flag that do not change what the trained model is
LEFT_OUT = (
    *("pad_token_id", "bos_token_id", "eos_token_id", "use_cache", "initializer_range", "pretraining_tp"),
    *("thinking_candidates", "thinking_tolerance", "thinking_kl_tolerance", "thinking_target_energy"),
    *("thinking_accept_only_lower_energy", "proposal_loss_weight"),  # the latter: a model with a proposal is refused
)


def config_from_official(hparams: Mapping[str, Any], vocab_size: int) -> TextConfig:
    """See [`~conversion_ebt.config_from_official`]."""
    if value_of(hparams, "model_name") not in (EBT, TWIN):
        refuse("model_name", hparams["model_name"], (EBT, TWIN))
    fields = {"vocab_size": vocab_size, "rms_norm_eps": RMS_NORM_EPS, **fields_from_flags(hparams, TEXT_SHAPE_FLAGS)}
    fields["rope_parameters"] = {"rope_type": "default", "rope_theta": ROPE_THETA}
    fields["intermediate_size"] = feed_forward_width(hparams, fields["hidden_size"])
    if hparams["model_name"] == TWIN:
        return LlamaConfig(**fields, tie_word_embeddings=False, bos_token_id=None, eos_token_id=None)

    fields.update(fields_from_flags(hparams, FLAGS))
    check_limits(hparams, LIMITS)
    if fields["step_conditioning"] == "time_embed":
        check_limits(hparams, TIME_EMBED_LIMITS)
        fields["hidden_act"] = value_of(hparams, "ebt_act_func", "silu")
    conditioned = fields["step_conditioning"] != "none"
    config = EBTConfig(**fields, **schedule_from_official(hparams, conditioned))
    keep_flags(config, hparams, conditioned, REPLAY_FLAGS)
    return config


def config_to_official(config: TextConfig) -> dict[str, Any]:
    """See [`~conversion_ebt.config_to_official`]."""
    is_ebt = isinstance(config, EBTConfig)
    hparams: dict[str, Any] = {"modality": MODALITY, "model_name": EBT if is_ebt else TWIN}
    inner = config.intermediate_size or config.hidden_size
    hparams["ffn_dim_multiplier"] = feed_forward_multiplier(config.hidden_size, inner)
    hparams.update(flags_from_fields(config, TEXT_SHAPE_FLAGS))
    if isinstance(config, EBTConfig):
        hparams.update(flags_from_fields(config, FLAGS))
        hparams.update({flag: values[0] for flag, (values, _) in {**LIMITS, **TIME_EMBED_LIMITS}.items()})
        if config.hidden_act in TIME_EMBED_LIMITS["ebt_act_func"][0]:
            hparams["ebt_act_func"] = config.hidden_act
        hparams.update(schedule_to_official(config, config.step_conditioning != "none"))
        hparams.update({**REPLAY_FLAGS, **kept_flags(config)})
    check_comes_back(config, config_from_official(hparams, config.vocab_size), LEFT_OUT)
    return hparams


# ---- models ----------------------------------------------------------------------------------------------------


def model_from_official(
    state_dict: Mapping[str, Tensor], hparams: Mapping[str, Any], eos_token_id: int | None
) -> TextModel:
    """See [`~conversion_ebt.model_from_official`]; the weights are without prefixes."""
    if "embeddings.weight" not in state_dict:
        raise ValueError(f"Not official text weights: `embeddings.weight` is missing among {', '.join(state_dict)}.")
    config = config_from_official(hparams, vocab_size=state_dict["embeddings.weight"].shape[0])
    config.eos_token_id = config.pad_token_id = eos_token_id
    model: TextModel = EBTForCausalLM(config) if isinstance(config, EBTConfig) else LlamaForCausalLM(config)
    table = weights_of(config)
    check_names_and_shapes(
        state_dict, model.state_dict(), table, {NOISE_STD: ()} if isinstance(config, EBTConfig) else {}
    )
    weights = to_ours(state_dict, table)
    if isinstance(config, EBTConfig):
        check_noise_std(state_dict, config)
        if config.candidate_embedding == "shared":
            weights["candidate_embedding.weight"] = weights["model.embed_tokens.weight"]
        warn_of_kept_flags(config)
    model.load_state_dict(weights)
    return model.eval()


def model_to_official(model: TextModel) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """See [`~conversion_ebt.model_to_official`]."""
    hparams = config_to_official(model.config)
    state_dict = to_official(model.state_dict(), weights_of(model.config))
    if isinstance(model.config, EBTConfig):
        state_dict.update(noise_std_to_official(model.config))
    return state_dict, hparams


__all__ = [
    "LIMITS",
    "MODALITY",
    "TIME_EMBED_LIMITS",
    "TextConfig",
    "TextModel",
    "config_from_official",
    "config_to_official",
    "model_from_official",
    "model_to_official",
    "weights_of",
]
