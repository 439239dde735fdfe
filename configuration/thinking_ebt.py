"""How a model thinks at inference: `ThinkingConfig`, a strict description of one energy descent."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any


SELECTIONS = ("min_energy", "max_gap", "max_energy")
INITS = ("mean", "normal")
FLAT_PREFIX = "thinking_"


def _fail(name: str, value: Any, allowed: str, hint: str = "") -> None:
    raise ValueError(f"`{FLAT_PREFIX}{name}` must be {allowed}, got {value!r}.{' ' + hint if hint else ''}")


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class ThinkingConfig:
    r"""
    How long and how a model thinks about each prediction. Every field left at `None` means "what the checkpoint says"
    (the `thinking_*` fields of its config, then the value in brackets below). Unknown fields and values out of range
    raise. In `generate()`, pipelines and `forward()` the same fields can be given flat, with the prefix `thinking_`.

    Args:
        steps (`int`, *optional*, at least 1):
            Gradient steps on the energy for each prediction [N in Alg. 1]. Step `i` moves on landscape `i`; steps
            beyond the number of landscapes repeat the last one. 0 is the start itself, for models that start at a
            prediction of their own (`candidate_init="proposal"`). (`num_landscapes`)
        candidates (`int`, *optional*, at least 1):
            Starts descended side by side; the best by `selection` is kept per position [M in Alg. 2]. (1)
        selection (`str`, *optional*):
            `"min_energy"` keeps the candidate of lowest final energy (self-verification, Alg. 2), `"max_gap"` the one
            whose energy fell most, `"max_energy"` the one of highest final energy (a control). (`"min_energy"`)
        step_size (`float`, *optional*, above 0):
            Replaces the trained step size [alpha].
        step_size_scale (`float` or `list[float]`, *optional*, above 0):
            Multiplies the step size; a list gives one factor per step. (1.0)
        noise_std (`float`, *optional*, at least 0):
            Standard deviation of the Gaussian noise added to the candidate logits before every step [sigma, Eq. 2].
            Drawn for the whole batch: with noise, a row depends on its place in it. (0)
        noise_first_step_only (`bool`, *optional*):
            Adds that noise before the first step only. (`False`)
        accept_only_lower_energy (`bool`, *optional*):
            A step that does not lower a position's energy is not taken there. One more forward per step. (`False`)
        tolerance (`float`, *optional*, at least 0):
            A position stops when its energy changed by at most this much in a step on the same landscape. (never)
        kl_tolerance (`float`, *optional*, at least 0):
            Text: a position stops after a step that changed its distribution by at most this much, KL(new || old) in
            nats, unless the next step is on another landscape; 0 never stops it. Checking costs no forward pass.
            (never)
        target_energy (`float`, *optional*):
            A position (an image) stops as soon as its energy is at most this, before its first step too. Energies are
            on each model's own scale: measure where good predictions end. (never)
        budget (`int`, *optional*, at least 0):
            Text: steps for all tokens of a sequence together, spent from left to right: a token may take as many of
            its `steps` as are left, and one when nothing is. What a token leaves by stopping early is left to later
            ones, so give a stop rule, too. Of several candidates the one that thinks longest counts; rejected steps
            count. In `generate()` the new tokens share it, in `forward()` all positions of a text; 0 means no budget.
            (none)
        prune_keep (`int`, *optional*, at least 1):
            Gives up hopeless candidates: only the so many best of each position by `selection` go on after
            `prune_after` steps. At most `candidates`, which keeps all. (all)
        prune_after (`int`, *optional*, at least 1):
            The steps all candidates take before that; `prune_keep` says how many go on. (1)
        init (`str`, *optional*):
            `"mean"`: candidate 0 starts at the mean of the trained initial distribution (zero logits), so that the
            result is deterministic. `"normal"`: every candidate starts at random logits of the trained spread.
            (`"mean"`)
        seed (`int`, *optional*):
            Seeds random starts and noise, so that a call can be repeated exactly; -1 uses torch's global generator.
            (0)
        landscapes (`list[int]`, *optional*):
            The landscape of every step, written out; replaces `steps`.

    Example:

    ```python
    >>> from ebt_transformers import ThinkingConfig

    >>> ThinkingConfig(steps=8, candidates=4).to_flat_dict()
    {'thinking_steps': 8, 'thinking_candidates': 4}
    ```
    """

    steps: int | None = None
    candidates: int | None = None
    selection: str | None = None
    step_size: float | None = None
    step_size_scale: float | list[float] | None = None
    noise_std: float | None = None
    noise_first_step_only: bool | None = None
    accept_only_lower_energy: bool | None = None
    tolerance: float | None = None
    kl_tolerance: float | None = None
    target_energy: float | None = None
    budget: int | None = None
    prune_keep: int | None = None
    prune_after: int | None = None
    init: str | None = None
    seed: int | None = None
    landscapes: list[int] | None = None

    def __post_init__(self) -> None:
        for name in ("candidates", "prune_keep", "prune_after"):
            value = getattr(self, name)
            if value is not None and (not _is_integer(value) or value < 1):
                _fail(name, value, "an integer of at least 1", "Leave it out for the checkpoint's default.")
        hints = {"steps": "Leave it out for the checkpoint's default.", "budget": "0 means no budget."}
        for name, hint in hints.items():
            value = getattr(self, name)
            if value is not None and (not _is_integer(value) or value < 0):
                _fail(name, value, "an integer of at least 0", hint)
        if self.selection is not None and self.selection not in SELECTIONS:
            _fail("selection", self.selection, f"one of {', '.join(SELECTIONS)}")
        if self.init is not None and self.init not in INITS:
            _fail("init", self.init, f"one of {', '.join(INITS)}")
        if self.step_size is not None and (not _is_number(self.step_size) or self.step_size <= 0):
            _fail("step_size", self.step_size, "a finite number above 0")
        for name in ("noise_std", "tolerance", "kl_tolerance"):
            value = getattr(self, name)
            if value is not None and (not _is_number(value) or value < 0):
                _fail(name, value, "a finite number of at least 0")
        if self.target_energy is not None and not _is_number(self.target_energy):
            _fail("target_energy", self.target_energy, "a finite number")
        for name in ("noise_first_step_only", "accept_only_lower_energy"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, bool):
                _fail(name, value, "True or False")
        if self.seed is not None and (not _is_integer(self.seed) or self.seed < -1):
            _fail("seed", self.seed, "an integer of at least -1")
        self._check_scale_and_landscapes()

    def _check_scale_and_landscapes(self) -> None:
        scale, landscapes = self.step_size_scale, self.landscapes
        scales = scale if isinstance(scale, (list, tuple)) else [] if scale is None else [scale]
        if not all(_is_number(factor) and factor > 0 for factor in scales) or scale == []:
            _fail("step_size_scale", scale, "a finite number above 0, or a list of them, one per step")
        if landscapes is None:
            return
        if not landscapes or not all(_is_integer(index) and index >= 0 for index in landscapes):
            _fail("landscapes", landscapes, "a non-empty list of landscape indices")
        if self.steps is not None and self.steps != len(landscapes):
            _fail("landscapes", landscapes, f"as long as `thinking_steps` ({self.steps})", "Give only one of the two.")

    @classmethod
    def field_names(cls) -> tuple[str, ...]:
        """The names of all fields, in order."""
        return tuple(field.name for field in fields(cls))

    @classmethod
    def from_value(cls, value: "ThinkingConfig | Mapping[str, Any] | None") -> "ThinkingConfig":
        """A `ThinkingConfig` from one, from a mapping of its fields (with or without `thinking_`), or from `None`."""
        if value is None:
            return cls()
        # a class of the same name is the same thing: code loaded from the Hub defines its own copy
        if type(value).__name__ == cls.__name__:
            return cls(**{name: getattr(value, name) for name in cls.field_names()})
        if not isinstance(value, Mapping):
            raise TypeError(
                f"`thinking` must be a ThinkingConfig or a dict of its fields, got {type(value).__name__}."
            )
        values = {str(name).removeprefix(FLAT_PREFIX): item for name, item in value.items()}
        unknown = sorted(set(values) - set(cls.field_names()))
        if unknown:
            raise ValueError(
                f"Unknown thinking option(s) {', '.join(unknown)}. Allowed: {', '.join(cls.field_names())}."
            )
        return cls(**values)

    @classmethod
    def from_call(
        cls, thinking: "ThinkingConfig | Mapping[str, Any] | None", flat: Mapping[str, Any]
    ) -> "ThinkingConfig":
        """What a call says: its flat options, over those of its `thinking`. Flat ones left at `None` say nothing."""
        called = cls.from_value({name: value for name, value in flat.items() if value is not None})
        return called.merged_over(cls.from_value(thinking))

    def merged_over(self, defaults: "ThinkingConfig") -> "ThinkingConfig":
        """This configuration with its unset fields taken from `defaults`."""
        values = {name: value for name, value in asdict(self).items() if value is not None}
        inherited = asdict(defaults)
        # `steps` and `landscapes` say the same thing: the more specific source wins as a whole
        if "steps" in values or "landscapes" in values:
            inherited.update(steps=None, landscapes=None)
        return replace(self, **{**inherited, **values})

    def to_flat_dict(self) -> dict[str, Any]:
        """The set fields under their flat names, as `generate()` and `GenerationConfig` take them."""
        return {FLAT_PREFIX + name: value for name, value in asdict(self).items() if value is not None}


FLAT_THINKING_NAMES = tuple(FLAT_PREFIX + name for name in ThinkingConfig.field_names())

__all__ = ["FLAT_PREFIX", "FLAT_THINKING_NAMES", "ThinkingConfig"]
