"""
What converting official text and image checkpoints shares.

A kind of model is a table of weights ([`Weight`]), a table of flags ([`Flag`]) and limits, the flags of which only
some values are carried. This file reads such tables.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.utils import logging

from .base_ebt import EBTBaseConfig


logger = logging.get_logger(__name__)

PREFIXES = ("model.", "_orig_mod.")  # Lightning's, and the one torch.compile adds
NOISE_STD = "langevin_dynamics_noise_std"  # a tensor there, a number in the config here
REQUIRED = object()  # the default of a flag that has none


# ---- weights ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Weight:
    """
    An official tensor and what it becomes.

    Args:
        official (`str`): its official name.
        ours (`tuple[str, ...]`): our name, or names where one fused tensor becomes several.
        split (`Callable`): official tensor -> a tuple of ours.
        join (`Callable`): ours, as arguments -> the official tensor.
    """

    official: str
    ours: tuple[str, ...]
    split: Callable[[Tensor], tuple[Tensor, ...]]
    join: Callable[..., Tensor]


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def to_ours(tensors: Mapping[str, Tensor], weights: Iterable[Weight]) -> dict[str, Tensor]:
    """Contiguous copies by our names of what is there by official names."""
    return {
        name: _copy(part)
        for weight in weights
        if weight.official in tensors
        for name, part in zip(weight.ours, weight.split(tensors[weight.official]), strict=True)
    }


def to_official(tensors: Mapping[str, Tensor], weights: Iterable[Weight]) -> dict[str, Tensor]:
    """Contiguous copies by official names of what is there, whole, by our names."""
    return {
        weight.official: _copy(weight.join(*(tensors[name] for name in weight.ours)))
        for weight in weights
        if all(name in tensors for name in weight.ours)
    }


def check_names_and_shapes(
    state_dict: Mapping[str, Tensor],
    ours: Mapping[str, Tensor],
    weights: Iterable[Weight],
    optional: Mapping[str, tuple[int, ...]],
) -> None:
    """
    Raises for official weights that are missing, unexpected or of another shape, naming all of them.

    Args:
        state_dict (`Mapping[str, Tensor]`): official weights, without prefixes.
        ours (`Mapping[str, Tensor]`): the weights of the model they are for.
        weights (`Iterable[Weight]`): its table.
        optional (`Mapping[str, tuple[int, ...]]`): names that may be there besides, and their shapes.
    """
    expected = {weight.official: weight.join(*(ours[name] for name in weight.ours)).shape for weight in weights}
    shapes = {**expected, **optional}
    problems = {
        "missing": sorted(set(expected) - set(state_dict)),
        "unexpected": sorted(set(state_dict) - set(shapes)),
        "of another shape": [
            f"{name} {tuple(state_dict[name].shape)}, expected {tuple(shape)}"
            for name, shape in shapes.items()
            if name in state_dict and state_dict[name].shape != shape
        ],
    }
    if any(problems.values()):
        found = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in problems.items() if names)
        raise ValueError(f"The weights do not fit the model that the hyper-parameters describe: {found}.")


def check_noise_std(state_dict: Mapping[str, Tensor], config: EBTBaseConfig) -> None:
    """Raises where the noise level among the weights is not the one of the flag, as after learning it."""
    std = state_dict.get(NOISE_STD)
    if std is not None and std.item() != torch.tensor(float(config.thinking_noise_std), dtype=std.dtype).item():
        raise ValueError(
            f"`{NOISE_STD}` is {std.item():g}, but the flag `langevin_dynamics_noise` says "
            f"{config.thinking_noise_std}. A learned noise level is not supported; set the flag to the weight."
        )


def noise_std_to_official(config: EBTBaseConfig) -> dict[str, Tensor]:
    """The noise level as the weight it is there."""
    return {NOISE_STD: torch.tensor(float(config.thinking_noise_std))}


def without_prefixes(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights without what Lightning and `torch.compile` put in front of their names."""

    def strip(name: str) -> str:
        while name.startswith(PREFIXES):
            name = name.split(".", 1)[1]
        return name

    return {strip(name): tensor for name, tensor in state_dict.items()}


# ---- hyper-parameters ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Flag:
    """
    An official flag and the config field it becomes.

    Args:
        flag (`str`): official name.
        field (`str`): of the config.
        default: what the official code takes when the flag is absent; without one it has to be there.
        values (`dict`, *optional*): official value -> ours; `None` means the same value.
    """

    flag: str
    field: str
    default: Any = REQUIRED
    values: Mapping[Any, Any] | None = None


SHAPE_FLAGS = (
    Flag("embedding_dim", "hidden_size"),
    Flag("num_transformer_blocks", "num_hidden_layers"),
    Flag("multiheaded_attention_heads", "num_attention_heads"),
)
DESCENT_FLAGS = (
    Flag("mcmc_step_size", "step_size"),
    Flag("mcmc_step_size_learnable", "learn_step_size", False, {False: False, True: True}),
    Flag("no_mcmc_detach", "detach_between_steps", False, {False: True, True: False}),
    Flag("truncate_mcmc", "loss_on_steps", False, {False: "all", True: "last"}),
    Flag("langevin_dynamics_noise", "thinking_noise_std", 0.0),
    Flag("randomize_mcmc_step_size_scale", "random_step_size", 1),
)
# how many steps training takes on each landscape; together with `mcmc_num_steps`, see `schedule_from_official`
SCHEDULE_FLAGS: dict[str, Any] = {
    "randomize_mcmc_num_steps": 0,
    "randomize_mcmc_num_steps_min": 0,
    "randomize_mcmc_num_steps_final_landscape": False,
}


def refuse(flag: str, value: Any, allowed: Iterable[Any]) -> None:
    """Raises for an official option that is not carried."""
    listed = ", ".join(repr(item) for item in allowed)
    raise ValueError(f"The official option `{flag}={value!r}` is not supported here. Allowed: {listed}.")


def refuse_field(name: str, value: Any, allowed: str) -> None:
    """Raises for a config field the official code has nothing for."""
    raise ValueError(f"The official code has nothing for `{name}={value!r}`; it must be {allowed}.")


def value_of(hparams: Mapping[str, Any], flag: str, default: Any = REQUIRED) -> Any:
    """The value of a flag; raises where it is absent and has no default."""
    value = hparams.get(flag, default)
    if value is REQUIRED:
        raise ValueError(f"The official hyper-parameters lack `{flag}`; it is needed to know the model.")
    return value


def fields_from_flags(hparams: Mapping[str, Any], flags: Iterable[Flag]) -> dict[str, Any]:
    """Config fields by name."""
    values = {}
    for row in flags:
        value = value_of(hparams, row.flag, row.default)
        if row.values is not None and value not in row.values:
            refuse(row.flag, value, row.values)
        if row.field == "random_step_size" and not value >= 1:
            raise ValueError(f"The official option `{row.flag}={value!r}` is not supported here: at least 1 is.")
        values[row.field] = value if row.values is None else row.values[value]
    return values


def flags_from_fields(config: PreTrainedConfig, flags: Iterable[Flag]) -> dict[str, Any]:
    """The inverse of [`fields_from_flags`]."""
    hparams = {}
    for row in flags:
        value = getattr(config, row.field)
        if row.values is not None:
            back = {ours: official for official, ours in row.values.items()}
            if value not in back:
                refuse_field(row.field, value, f"one of {', '.join(map(repr, back))}")
            value = back[value]
        hparams[row.flag] = value
    return hparams


def check_limits(hparams: Mapping[str, Any], limits: Mapping[str, tuple[tuple[Any, ...], Any]]) -> None:
    """Raises for values that are not carried; `limits` are flag -> (the values carried, the official default)."""
    for flag, (values, default) in limits.items():
        value = value_of(hparams, flag, default)
        if value not in values:
            refuse(flag, value, values)


def feed_forward_width(hparams: Mapping[str, Any], width: int) -> int:
    """`intermediate_size`."""
    multiplier = value_of(hparams, "ffn_dim_multiplier", None)
    return int(width * (1 if multiplier is None else multiplier))


def feed_forward_multiplier(width: int, hidden: int) -> float | None:
    """The shortest decimal `m` with `int(width * m) == hidden`, which undoes any multiplier a person would write."""
    if width == hidden:
        return None
    candidates = (round(hidden / width, digits) for digits in range(17))
    return next((value for value in candidates if int(width * value) == hidden), (hidden + 0.5) / width)


# ---- steps -----------------------------------------------------------------------------------------------------


def schedule_from_official(hparams: Mapping[str, Any], conditioned: bool) -> dict[str, Any]:
    """
    The config fields that say how many steps are taken.

    With r = `randomize_mcmc_num_steps` above 0 training walks a landscape between `randomize_mcmc_num_steps_min` (0
    means 1) and r + 1 times; the last one only with `randomize_mcmc_num_steps_final_landscape`, else each with a draw
    of its own, which has no field here. Evaluation walks the last one r + 1 times, the others once.

    Args:
        hparams (`Mapping[str, Any]`): official flags.
        conditioned (`bool`): whether the model knows the landscape; without, all steps are on the same one.

    Returns:
        `num_landscapes`, `thinking_steps` and `random_steps`.
    """
    landscapes = value_of(hparams, "mcmc_num_steps")
    extra, least, final_only = (value_of(hparams, flag, neutral) for flag, neutral in SCHEDULE_FLAGS.items())
    if extra > 0 and least > extra + 1:
        refuse("randomize_mcmc_num_steps_min", least, range(extra + 2))
    total, known = landscapes + extra, landscapes if conditioned else 1
    drawn = None
    if extra > 0 and (final_only or landscapes == 1):
        fewest = landscapes - 1 + max(least, 1)
        drawn = None if fewest == total else [fewest, total]
    return {
        "num_landscapes": known,
        "thinking_steps": None if total == known else total,
        "random_steps": drawn,
    }


def schedule_to_official(config: EBTBaseConfig, conditioned: bool) -> dict[str, Any]:
    """The inverse of [`schedule_from_official`]: `mcmc_num_steps` and `SCHEDULE_FLAGS`."""
    kept = {flag: value for flag, value in kept_flags(config).items() if flag in SCHEDULE_FLAGS}
    steps = config.default_thinking().steps or 1  # it always says
    flags = {**SCHEDULE_FLAGS, **kept}
    if kept:
        landscapes = config.num_landscapes if conditioned else steps - flags["randomize_mcmc_num_steps"]
        return {"mcmc_num_steps": landscapes, **flags}
    drawn = config.random_steps
    landscapes = config.num_landscapes if conditioned or drawn is not None else steps
    fewest, most = (steps, steps) if drawn is None else drawn
    if most > landscapes:
        least = fewest - (landscapes - 1)
        names = (
            "randomize_mcmc_num_steps",
            "randomize_mcmc_num_steps_min",
            "randomize_mcmc_num_steps_final_landscape",
        )
        flags.update(zip(names, (most - landscapes, least if least > 1 else 0, landscapes > 1), strict=True))
    return {"mcmc_num_steps": landscapes, **flags}


def kept_flags(config: PreTrainedConfig) -> dict[str, Any]:
    """Official flags without a field here, which the config carries along."""
    return dict(getattr(config, "official_training", {}))


def keep_flags(
    config: EBTBaseConfig, hparams: Mapping[str, Any], conditioned: bool, others: Mapping[str, Any]
) -> None:
    """
    Puts flags that would not come back from the fields into `config.official_training`, so that nothing is lost.

    Args:
        config ([`EBTBaseConfig`]): made from the flags.
        hparams (`Mapping[str, Any]`): the flags.
        conditioned (`bool`): as for [`schedule_from_official`].
        others (`Mapping[str, Any]`): further flags to keep, and the values they need not be kept for.
    """
    given = {flag: value_of(hparams, flag, neutral) for flag, neutral in SCHEDULE_FLAGS.items()}
    given["mcmc_num_steps"] = value_of(hparams, "mcmc_num_steps")
    neutral = {**others, **(SCHEDULE_FLAGS if given != schedule_to_official(config, conditioned) else {})}
    kept = {flag: hparams[flag] for flag, value in neutral.items() if flag in hparams and hparams[flag] != value}
    if kept:
        config.official_training = kept


def warn_of_kept_flags(config: EBTBaseConfig, harmless: Iterable[str] = ()) -> None:
    """Says which official training flags our training will not follow; `harmless` ones only describe the data."""
    expressed = set(SCHEDULE_FLAGS) if config.random_steps is not None else set()
    ignored = {
        flag: value for flag, value in kept_flags(config).items() if flag not in expressed and flag not in harmless
    }
    if ignored:
        logger.warning(
            f"Kept for the way back, without effect on evaluation: {ignored}. These flags vary the descent during "
            "training in a way there are no config fields for."
        )


def check_comes_back(config: EBTBaseConfig, again: EBTBaseConfig, left_out: Iterable[str]) -> None:
    """
    Raises for a field that the official flags cannot hold.

    Args:
        config ([`EBTBaseConfig`]): of the model.
        again ([`EBTBaseConfig`]): what comes back from its official flags.
        left_out (`Iterable[str]`): fields that do not change what the trained model is.
    """
    general = {item.name for item in fields(PreTrainedConfig)}
    for name in (item.name for item in fields(config) if item.name not in general):
        ours, theirs = getattr(config, name), getattr(again, name)
        if name == "thinking_steps":
            ours, theirs = config.default_thinking().steps, again.default_thinking().steps
        if name == "random_steps" and ours == [config.default_thinking().steps] * 2:
            ours = None  # always the default number: the same thing
        if ours != theirs and name not in left_out:
            refuse_field(name, getattr(config, name), repr(getattr(again, name)))


__all__ = [
    "DESCENT_FLAGS",
    "NOISE_STD",
    "REQUIRED",
    "SCHEDULE_FLAGS",
    "SHAPE_FLAGS",
    "Flag",
    "Weight",
    "check_comes_back",
    "check_limits",
    "check_names_and_shapes",
    "check_noise_std",
    "feed_forward_multiplier",
    "feed_forward_width",
    "fields_from_flags",
    "flags_from_fields",
    "keep_flags",
    "kept_flags",
    "noise_std_to_official",
    "refuse",
    "refuse_field",
    "schedule_from_official",
    "schedule_to_official",
    "to_official",
    "to_ours",
    "value_of",
    "warn_of_kept_flags",
    "without_prefixes",
]
