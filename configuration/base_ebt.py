"""`EBTBaseConfig`: how a model descends its energy, whatever it thinks about."""

import math
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .thinking_ebt import FLAT_PREFIX, ThinkingConfig


LOSS_ON_STEPS = ("all", "last")


@strict
class EBTBaseConfig(PreTrainedConfig):
    r"""
    The fields that text and image models share: step size, landscapes, objective and the defaults of thinking.

    Args:
        num_landscapes (`int`, *optional*, defaults to 1):
            Number of energy landscapes [one per step index]; step `i` moves on landscape `min(i, num_landscapes - 1)`.
        step_size (`float`, *optional*, defaults to 1.0): Initial step size [alpha].
        learn_step_size (`bool`, *optional*, defaults to `True`): Whether the step size is trained.
        detach_between_steps (`bool`, *optional*, defaults to `True`): Whether a step's gradient stops at its start.
        loss_on_steps (`str`, *optional*, defaults to `"all"`):
            Training objective: `"all"` averages the loss of every step (recipe s1), `"last"` scores the last step
            only, and only that step is differentiated (recipe s2).
        random_step_size (`float`, *optional*, defaults to 1.0):
            In training, each candidate's step size is drawn uniformly between `step_size / random_step_size` and
            `step_size * random_step_size`.
        random_steps (`list[int]`, *optional*): `[fewest, most]` steps, drawn for each batch in training.
        thinking_steps (`int`, *optional*): Default number of steps; `None` means `num_landscapes`.
        thinking_candidates (`int`, *optional*, defaults to 1): Default number of candidates in evaluation.
        thinking_noise_std (`float`, *optional*, defaults to 0.0): Default noise before every step, in training too.
        thinking_tolerance (`float`, *optional*): Default energy tolerance of the stop rule in evaluation.
        thinking_target_energy (`float`, *optional*): Default energy at which evaluation stops.
        thinking_accept_only_lower_energy (`bool`, *optional*, defaults to `False`): Default acceptance in evaluation.
    """

    num_landscapes: int = 1
    step_size: float | int = 1.0
    learn_step_size: bool = True
    detach_between_steps: bool = True
    loss_on_steps: str = "all"
    random_step_size: float | int = 1.0
    random_steps: list[int] | None = None
    thinking_steps: int | None = None
    thinking_candidates: int = 1
    thinking_noise_std: float | int = 0.0
    thinking_tolerance: float | int | None = None
    thinking_target_energy: float | int | None = None
    thinking_accept_only_lower_energy: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        unknown = sorted(name for name in kwargs if name.startswith(FLAT_PREFIX))
        if unknown:
            allowed = sorted(name for name in self.__dataclass_fields__ if name.startswith(FLAT_PREFIX))
            raise ValueError(f"Unknown thinking option(s) {', '.join(unknown)}. Allowed: {', '.join(allowed)}.")
        super().__post_init__(**kwargs)

    def validate_descent(self) -> None:
        """Checks the fields of this class, when the config is made and when it is saved."""
        self.check_at_least_one("num_landscapes")
        self.check_choice("loss_on_steps", LOSS_ON_STEPS)
        self.check_finite("step_size", above_zero=True)
        self.check_finite("thinking_noise_std")
        if not 1 <= self.random_step_size < math.inf:
            raise ValueError(f"`random_step_size` must be finite and at least 1, got {self.random_step_size}.")
        steps = self.random_steps
        if steps is not None and (len(steps) != 2 or not 1 <= steps[0] <= steps[1]):
            raise ValueError(f"`random_steps` must be the fewest and the most steps, such as [2, 3], got {steps}.")
        self.default_thinking()  # raises for bad thinking defaults
        if self.thinking_steps == 0 and not self.starts_at_prediction:
            raise ValueError(
                "`thinking_steps` must be at least 1, got 0: without a step this model predicts nothing. Only a model "
                "with `candidate_init='proposal'` does."
            )

    def check_at_least_one(self, *names: str) -> None:
        """Raises for a count below 1."""
        for name in names:
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")

    def check_choice(self, name: str, allowed: tuple[str, ...]) -> None:
        """Raises for a word that is not one of the allowed ones."""
        if getattr(self, name) not in allowed:
            raise ValueError(f"`{name}` must be one of {', '.join(allowed)}, got {getattr(self, name)!r}.")

    def check_finite(self, name: str, above_zero: bool = False) -> None:
        """Raises for a number that is infinite, NaN, below zero, or zero where it has to be above."""
        value = getattr(self, name)
        if not math.isfinite(value) or value < 0 or (value == 0 and above_zero):
            raise ValueError(f"`{name}` must be finite and {'above' if above_zero else 'at least'} 0, got {value}.")

    @property
    def starts_at_random(self) -> bool:
        """Whether training starts the descent at a random place."""
        return False

    @property
    def starts_at_prediction(self) -> bool:
        """Whether the descent starts at a prediction of its own, so that no thinking at all predicts something."""
        return False

    @property
    def thinking_without_meaning(self) -> dict[str, str]:
        """Thinking options that models of this kind cannot follow, and why."""
        return {}

    @property
    def evaluation_noise_std(self) -> float:
        """The noise of evaluation when a call says nothing."""
        return float(self.thinking_noise_std)

    def default_thinking(self) -> ThinkingConfig:
        """The thinking a call gets when it says nothing."""
        return ThinkingConfig(
            steps=self.num_landscapes if self.thinking_steps is None else self.thinking_steps,
            candidates=self.thinking_candidates,
            selection="min_energy",
            step_size_scale=1.0,
            noise_std=self.evaluation_noise_std,
            noise_first_step_only=False,
            accept_only_lower_energy=self.thinking_accept_only_lower_energy,
            tolerance=self.thinking_tolerance,
            target_energy=self.thinking_target_energy,
            init="mean",
            seed=0,
        )


__all__ = ["EBTBaseConfig"]
