"""
Checkpoints of the official Energy-Based Transformers code, both ways.

Two tables say everything: `WEIGHTS` (which tensor becomes which) and `FLAGS` with `LIMITS` (which hyper-parameter
becomes which config field, and which values there is nothing for here). The rest of the file reads them. Sizes: ``V``
vocabulary, ``D`` width, ``d`` width of a head.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedConfig
from transformers.utils import logging

from .configuration_ebt import EBTConfig
from .modeling_ebt import EBTForCausalLM


logger = logging.get_logger(__name__)

Config: TypeAlias = EBTConfig | LlamaConfig
Model: TypeAlias = EBTForCausalLM | LlamaForCausalLM

PREFIXES = ("model.", "_orig_mod.")  # Lightning's, and the one torch.compile adds
RMS_NORM_EPS = 1e-5
ROPE_THETA = 10000.0
NOISE_STD = "langevin_dynamics_noise_std"  # a tensor there, a number in the config here


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


def _is_modulated(config: Config) -> bool:
    return isinstance(config, EBTConfig) and config.is_modulated


PRESENT: dict[str, Callable[[Config], bool]] = {
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


def _rows(config: Config) -> Iterator[tuple[str, str, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]]:
    """The rows of `WEIGHTS` this model has: official name, our name, transform to ours, and back."""
    head_dim = config.head_dim
    for official, ours, transform, present in WEIGHTS:
        if not PRESENT[present](config):
            continue
        there, back = TRANSFORMS[transform]
        for layer in range(config.num_hidden_layers) if "{i}" in official else (0,):
            yield (
                official.format(i=layer),
                ours.format(i=layer),
                lambda tensor, there=there: there(tensor, head_dim),  # type: ignore[misc]
                lambda tensor, back=back: back(tensor, head_dim),  # type: ignore[misc]
            )


def tensors_from_official(tensors: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """
    Weights, gradients or anything else keyed and shaped like the official parameters, in our names and layout.

    Args:
        tensors (`Mapping[str, Tensor]`): by official name; names may be missing, others are left out.
        config ([`EBTConfig`] or `LlamaConfig`): of the model.

    Returns:
        `dict[str, Tensor]` of contiguous copies.
    """
    rows = _rows(config)
    return {
        ours: there(tensors[official]).detach().clone(memory_format=torch.contiguous_format)
        for official, ours, there, _ in rows
        if official in tensors
    }


def tensors_to_official(tensors: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """
    The inverse of [`tensors_from_official`].

    Args:
        tensors (`Mapping[str, Tensor]`): by our name; names may be missing, others are left out.
        config ([`EBTConfig`] or `LlamaConfig`): of the model.

    Returns:
        `dict[str, Tensor]` of contiguous copies.
    """
    return {
        official: back(tensors[ours]).detach().clone(memory_format=torch.contiguous_format)
        for official, ours, _, back in _rows(config)
        if ours in tensors
    }


def _check_names_and_shapes(state_dict: Mapping[str, Tensor], model: Model) -> None:
    ours = model.state_dict()
    expected = {official: back(ours[name]).shape for official, name, _, back in _rows(model.config)}
    optional = {NOISE_STD} if isinstance(model.config, EBTConfig) else set()
    problems = {
        "missing": sorted(set(expected) - set(state_dict)),
        "unexpected": sorted(set(state_dict) - set(expected) - optional),
        "of another shape": [
            f"{name} {tuple(state_dict[name].shape)}, expected {tuple(shape)}"
            for name, shape in expected.items()
            if name in state_dict and state_dict[name].shape != shape
        ],
    }
    if any(problems.values()):
        found = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in problems.items() if names)
        raise ValueError(f"The weights do not fit the model that the hyper-parameters describe: {found}.")


def _without_prefixes(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    def strip(name: str) -> str:
        while name.startswith(PREFIXES):
            name = name.split(".", 1)[1]
        return name

    return {strip(name): tensor for name, tensor in state_dict.items()}


# ---- hyper-parameters ------------------------------------------------------------------------------------------

_REQUIRED = object()


@dataclass(frozen=True)
class Flag:
    """
    An official flag and the config field it becomes.

    Args:
        flag (`str`): official name.
        field (`str`): of [`EBTConfig`].
        default: what the official code takes when the flag is absent; without one it has to be there.
        values (`dict`, *optional*): official value -> ours; `None` means the same value.
    """

    flag: str
    field: str
    default: Any = _REQUIRED
    values: Mapping[Any, Any] | None = None


CARRIED_MODALITY = "NLP"
EBT, TWIN = "ebt", "baseline_transformer"

SHAPE_FLAGS = (
    Flag("embedding_dim", "hidden_size"),
    Flag("num_transformer_blocks", "num_hidden_layers"),
    Flag("multiheaded_attention_heads", "num_attention_heads"),
    Flag("context_length", "max_position_embeddings"),
)
# `ffn_dim_multiplier`, `mcmc_num_steps` and `ebt_act_func` need more than a look-up: see `_official_config`
FLAGS = (
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
    Flag("mcmc_step_size", "step_size"),
    Flag("mcmc_step_size_learnable", "learn_step_size", False, {False: False, True: True}),
    Flag("no_mcmc_detach", "detach_between_steps", False, {False: True, True: False}),
    Flag("truncate_mcmc", "loss_on_steps", False, {False: "all", True: "last"}),
    Flag("langevin_dynamics_noise", "thinking_noise_std", 0.0),
)

# flag: (the values carried, the official default, the ebt_type it acts on or None for all)
LIMITS: dict[str, tuple[tuple[Any, ...], Any, str | None]] = {
    "normalize_initial_condition": ((True,), False, None),
    "normalize_initial_condition_only_first_step": ((False,), False, None),
    "clamp_futures_grad": ((False,), False, None),
    "absolute_clamp": ((0.0,), 0.0, None),
    "sharpen_predicted_distribution": ((0.0,), 0.0, None),
    "soften_target_prob_dist": ((0.0,), 0.0, None),
    "contrastive_loss": ((False,), False, None),
    "reconstruction_coeff": ((1.0,), 1.0, None),
    "num_modality_processing_mlp_layers": ((1,), 1, None),
    "learnable_process_memory": ((False,), False, None),
    "langevin_dynamics_noise_learnable": ((False,), False, None),
    "ebt_norm": (("rms",), "rms", "time_embed"),
    "ebt_act_func": (("silu", "gelu", "relu"), "silu", "time_embed"),
}

# how training varies the descent: kept in `config.official_training`, so that nothing is lost on the way back
TRAINING_FLAGS: dict[str, Any] = {
    "randomize_mcmc_step_size_scale": 1,
    "randomize_mcmc_num_steps": 0,
    "randomize_mcmc_num_steps_min": 0,
    "randomize_mcmc_num_steps_final_landscape": False,
    "mcmc_replay_buffer": False,
    "mcmc_replay_buffer_size": 192,
    "mcmc_replay_buffer_sample_bs_percent": 0.5,
}

# config fields without an official flag that do not change what the trained model is
NOT_IN_A_CHECKPOINT = (
    *("pad_token_id", "bos_token_id", "eos_token_id", "use_cache", "initializer_range", "pretraining_tp"),
    *("thinking_candidates", "thinking_tolerance", "thinking_accept_only_lower_energy"),
)


def _refuse(flag: str, value: Any, allowed: Any) -> None:
    allowed = ", ".join(repr(item) for item in allowed)
    raise ValueError(f"The official option `{flag}={value!r}` is not supported here. Allowed: {allowed}.")


def _refuse_field(name: str, value: Any, allowed: str) -> None:
    raise ValueError(f"The official code has nothing for `{name}={value!r}`; it must be {allowed}.")


def _value(hparams: Mapping[str, Any], flag: str, default: Any = _REQUIRED) -> Any:
    value = hparams.get(flag, default)
    if value is _REQUIRED:
        raise ValueError(f"The official hyper-parameters lack `{flag}`; it is needed to know the model.")
    return value


def _fields(hparams: Mapping[str, Any], flags: tuple[Flag, ...]) -> dict[str, Any]:
    fields = {}
    for row in flags:
        value = _value(hparams, row.flag, row.default)
        if row.values is not None and value not in row.values:
            _refuse(row.flag, value, row.values)
        fields[row.field] = value if row.values is None else row.values[value]
    return fields


def config_from_official(hparams: Mapping[str, Any], vocab_size: int) -> Config:
    """
    The config of the model that official hyper-parameters describe.

    Args:
        hparams (`Mapping[str, Any]`): the flat dictionary of flags a checkpoint holds as `hyper_parameters`. Flags
            without influence on the model are ignored.
        vocab_size (`int`): V; the official code does not record it.

    Returns:
        [`EBTConfig`], or `LlamaConfig` for `model_name="baseline_transformer"` (Transformer++).

    Raises:
        ValueError: for an option that is not supported, naming the flag, its value and what is allowed, and for a
            missing flag.
    """
    for flag, allowed in (("modality", (CARRIED_MODALITY,)), ("model_name", (EBT, TWIN))):
        if _value(hparams, flag) not in allowed:
            _refuse(flag, hparams[flag], allowed)
    fields = {"vocab_size": vocab_size, "rms_norm_eps": RMS_NORM_EPS, **_fields(hparams, SHAPE_FLAGS)}
    fields["rope_parameters"] = {"rope_type": "default", "rope_theta": ROPE_THETA}
    multiplier = _value(hparams, "ffn_dim_multiplier", None)
    fields["intermediate_size"] = int(fields["hidden_size"] * (1 if multiplier is None else multiplier))
    if hparams["model_name"] == TWIN:
        return LlamaConfig(**fields, tie_word_embeddings=False, bos_token_id=None, eos_token_id=None)

    fields.update(_fields(hparams, FLAGS))
    conditioned = fields["step_conditioning"] != "none"
    for flag, (values, default, only_for) in LIMITS.items():
        value = _value(hparams, flag, default)
        if value not in values and only_for in (None, fields["step_conditioning"]):
            _refuse(flag, value, values)
    if fields["step_conditioning"] == "time_embed":
        fields["hidden_act"] = _value(hparams, "ebt_act_func", "silu")
    training = {flag: _value(hparams, flag, neutral) for flag, neutral in TRAINING_FLAGS.items()}
    steps = _value(hparams, "mcmc_num_steps")
    fields["num_landscapes"] = steps if conditioned else 1
    # the official evaluation repeats the last landscape once more for every step training may add at random
    total = steps + training["randomize_mcmc_num_steps"]
    fields["thinking_steps"] = None if total == fields["num_landscapes"] else total
    kept = {flag: value for flag, value in training.items() if value != TRAINING_FLAGS[flag]}
    return EBTConfig(**fields, **({"official_training": kept} if kept else {}))


def _multiplier(width: int, hidden: int) -> float | None:
    """The shortest decimal `m` with `int(width * m) == hidden`, which undoes any multiplier a person would write."""
    if width == hidden:
        return None
    candidates = (round(hidden / width, digits) for digits in range(17))
    return next((value for value in candidates if int(width * value) == hidden), (hidden + 0.5) / width)


def config_to_official(config: Config) -> dict[str, Any]:
    """
    The official hyper-parameters of a model. Thinking defaults other than steps and noise are flags of the official
    inference script, not of a checkpoint, and are left out.

    Args:
        config ([`EBTConfig`] or `LlamaConfig`): of the model.

    Raises:
        ValueError: for a field the official code has nothing for, naming it.
    """
    is_ebt = isinstance(config, EBTConfig)
    hparams: dict[str, Any] = {"modality": CARRIED_MODALITY, "model_name": EBT if is_ebt else TWIN}
    hparams["ffn_dim_multiplier"] = _multiplier(config.hidden_size, config.intermediate_size or config.hidden_size)
    for row in (*SHAPE_FLAGS, *(FLAGS if is_ebt else ())):
        value = getattr(config, row.field)
        if row.values is not None:
            back = {ours: official for official, ours in row.values.items()}
            if value not in back:
                _refuse_field(row.field, value, f"one of {', '.join(map(repr, back))}")
            value = back[value]
        hparams[row.flag] = value
    if is_ebt:
        hparams.update({flag: values[0] for flag, (values, _, _) in LIMITS.items()})
        if config.hidden_act in LIMITS["ebt_act_func"][0]:
            hparams["ebt_act_func"] = config.hidden_act
        training = {**TRAINING_FLAGS, **getattr(config, "official_training", {})}
        steps = config.default_thinking().steps or 1  # it always says
        if config.step_conditioning == "none":
            hparams["mcmc_num_steps"] = steps - training["randomize_mcmc_num_steps"]
        else:
            hparams["mcmc_num_steps"] = config.num_landscapes
            training["randomize_mcmc_num_steps"] = max(steps - config.num_landscapes, 0)
        hparams.update(training)

    # what does not come back the same has no place in the flags
    again = config_from_official(hparams, vocab_size=config.vocab_size)
    general = {item.name for item in fields(PreTrainedConfig)}
    for name in (item.name for item in fields(config) if item.name not in general):
        ours, theirs = getattr(config, name), getattr(again, name)
        if name == "thinking_steps":
            ours, theirs = config.default_thinking().steps, again.default_thinking().steps
        if ours != theirs and name not in NOT_IN_A_CHECKPOINT:
            _refuse_field(name, ours, repr(theirs))
    return hparams


# ---- models ----------------------------------------------------------------------------------------------------


def model_from_official(
    state_dict: Mapping[str, Tensor], hparams: Mapping[str, Any], *, eos_token_id: int | None = None
) -> Model:
    """
    A model from official weights.

    Args:
        state_dict (`Mapping[str, Tensor]`): official weights by name; the prefixes `model.` and `_orig_mod.` are
            taken off. V is the number of rows of `embeddings.weight` (V, D).
        hparams (`Mapping[str, Any]`): official flags by name.
        eos_token_id (`int`, *optional*): end of text. The official code takes it from the tokenizer, and pads with it
            too.

    Returns:
        [`EBTForCausalLM`], or `LlamaForCausalLM` for the Transformer++ baseline, in evaluation mode.

    Raises:
        ValueError: for weights that are missing, unexpected or of another shape, naming them, and for an official
            option that is not supported, naming the flag, its value and what is allowed.
    """
    state_dict = _without_prefixes(state_dict)
    if "embeddings.weight" not in state_dict:
        raise ValueError(f"Not official text weights: `embeddings.weight` is missing among {', '.join(state_dict)}.")
    config = config_from_official(hparams, vocab_size=state_dict["embeddings.weight"].shape[0])
    config.eos_token_id = config.pad_token_id = eos_token_id
    model: Model = EBTForCausalLM(config) if isinstance(config, EBTConfig) else LlamaForCausalLM(config)
    _check_names_and_shapes(state_dict, model)
    weights = tensors_from_official(state_dict, config)
    if isinstance(config, EBTConfig):
        std = state_dict.get(NOISE_STD)
        if std is not None and std.item() != torch.tensor(float(config.thinking_noise_std), dtype=std.dtype).item():
            raise ValueError(
                f"`{NOISE_STD}` is {std.item():g}, but the flag `langevin_dynamics_noise` says "
                f"{config.thinking_noise_std}. A learned noise level is not supported; set the flag to the weight."
            )
        if config.candidate_embedding == "shared":
            weights["candidate_embedding.weight"] = weights["model.embed_tokens.weight"]
        if hasattr(config, "official_training"):
            logger.warning(
                f"Kept for the way back, without effect on evaluation: {config.official_training}. These flags vary "
                "the descent during training."
            )
    model.load_state_dict(weights)
    return model.eval()


def model_to_official(model: Model) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """
    Official weights and flags of a model: the inverse of [`model_from_official`].

    Args:
        model ([`EBTForCausalLM`] or `LlamaForCausalLM`): a text model.

    Returns:
        The official `state_dict` (copies, without prefix) and the official flags that describe the model.

    Raises:
        TypeError: for another kind of model.
        ValueError: for a model the official code cannot express, naming the config field.
    """
    if not isinstance(model, (EBTForCausalLM, LlamaForCausalLM)):
        raise TypeError(f"Expected an EBTForCausalLM or a LlamaForCausalLM, got {type(model).__name__}.")
    hparams = config_to_official(model.config)
    state_dict = tensors_to_official(model.state_dict(), model.config)
    if isinstance(model, EBTForCausalLM):
        state_dict[NOISE_STD] = torch.tensor(float(model.config.thinking_noise_std))
    return state_dict, hparams


# ---- files -----------------------------------------------------------------------------------------------------


def load_official_checkpoint(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """
    Reads a checkpoint that the official trainer (Lightning) wrote, without running any code it may contain.

    Args:
        path (`str` or `PathLike`): the `.ckpt` file.

    Returns:
        Weights by official name without prefixes, and the flat dictionary of official flags.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it cannot be read, or is no Lightning checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no checkpoint file {path}.")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, OSError, EOFError, ValueError, LookupError, AttributeError) as error:
        reason = str(error).strip().splitlines()
        raise ValueError(
            f"{path} cannot be read as a checkpoint: it is damaged, incomplete, or holds more than tensors and plain "
            f"values ({type(error).__name__}: {reason[0] if reason else 'no further information'})."
        ) from error
    for key in ("state_dict", "hyper_parameters"):
        found = checkpoint.get(key) if isinstance(checkpoint, dict) else None
        if not isinstance(found, Mapping) or not found:
            keys = ", ".join(map(str, checkpoint)) if isinstance(checkpoint, dict) else type(checkpoint).__name__
            raise ValueError(f"{path} is no checkpoint of the official trainer: it has no `{key}`. It holds: {keys}.")
    return _without_prefixes(checkpoint["state_dict"]), dict(checkpoint["hyper_parameters"])


def convert_checkpoint(
    path: str | os.PathLike[str], out_dir: str | os.PathLike[str], *, tokenizer: str | None = None
) -> Model:
    """
    Turns an official checkpoint into a folder that `from_pretrained` loads. The folder appears when everything is
    written, or not at all.

    Args:
        path (`str` or `PathLike`): the official `.ckpt` file.
        out_dir (`str` or `PathLike`): folder to write; it must be new or empty.
        tokenizer (`str`, *optional*): Hub id or folder of the tokenizer to put beside the model. By default the one
            the checkpoint names, where it can be loaded; else the folder has no tokenizer, and a warning says so.

    Returns:
        The model, in evaluation mode.

    Raises:
        FileNotFoundError, ValueError: see [`load_official_checkpoint`] and [`model_from_official`].
        FileExistsError: if the folder has something in it already.
        OSError: if writing fails, or the given tokenizer cannot be loaded.
    """
    out_dir = Path(out_dir)
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise FileExistsError(f"{out_dir} exists already and is not empty. Give a new folder.")
    state_dict, hparams = load_official_checkpoint(path)
    loaded = None
    name = tokenizer or hparams.get("tokenizer")
    # the flags are judged first: a refusal should not wait for a download
    model = model_from_official(state_dict, hparams)
    try:
        loaded = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # the Hub client has many ways to fail
        if tokenizer is not None:
            raise OSError(f"The tokenizer {tokenizer!r} cannot be loaded: {error}") from error
        logger.warning(
            f"The tokenizer {name!r} that the checkpoint names cannot be loaded here: the model is saved without one, "
            "and without an end-of-text token. Convert again with `tokenizer` set, or save one beside it."
        )
    if loaded is not None:
        if len(loaded) > model.config.vocab_size:
            raise ValueError(
                f"The tokenizer {name!r} has {len(loaded)} tokens, the model {model.config.vocab_size}. It is not the "
                "tokenizer the model was trained with."
            )
        for config in (model.config, model.generation_config):
            config.eos_token_id = config.pad_token_id = loaded.eos_token_id
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}-", dir=out_dir.parent))
    try:
        model.save_pretrained(partial)
        if loaded is not None:
            loaded.save_pretrained(partial)
        partial.chmod(0o755)
        partial.replace(out_dir)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return model


__all__ = [
    "config_from_official",
    "config_to_official",
    "convert_checkpoint",
    "load_official_checkpoint",
    "model_from_official",
    "model_to_official",
    "tensors_from_official",
    "tensors_to_official",
]
