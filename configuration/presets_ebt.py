"""The paper's model sizes (arXiv 2507.02092, Table D.1 and p. 34; 4xs and 3xs from the official code) and recipes."""

from copy import deepcopy
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Preset:
    """One model size: layers, width, heads, and the learning rate the paper trains it with."""

    num_hidden_layers: int
    hidden_size: int
    num_attention_heads: int
    learning_rate: float

    def architecture(self) -> dict[str, int]:
        """Config fields of this size. The feed-forward width equals the model width (paper p. 34)."""
        return {
            "num_hidden_layers": self.num_hidden_layers,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.hidden_size,
            "num_attention_heads": self.num_attention_heads,
        }


PRESETS: dict[str, Preset] = {
    "4xs": Preset(2, 128, 2, 2.4e-3),
    "3xs": Preset(4, 256, 4, 1.8e-3),
    "xxs": Preset(6, 384, 6, 1.2e-3),
    "xs": Preset(12, 384, 6, 9e-4),
    "small": Preset(12, 768, 12, 6e-4),
    "medium": Preset(24, 1024, 16, 3e-4),
    "large": Preset(24, 1536, 16, 2.5e-4),
    "xl": Preset(24, 2048, 32, 2e-4),
}

# s1 learns fast and stably: one landscape per step, every step scored. s2 is trained to think: one landscape walked
# many times with noise, a random number of steps of random sizes, only the last scored (paper C.2, D.5, appendix I).
RECIPES: dict[str, dict[str, Any]] = {
    "s1": {
        "step_conditioning": "time_embed",
        "num_landscapes": 2,
        "step_size": 500.0,
        "learn_step_size": True,
        "detach_between_steps": True,
        "loss_on_steps": "all",
    },
    "s2": {
        "step_conditioning": "time_embed",
        "num_landscapes": 1,
        "step_size": 5.0,
        "learn_step_size": False,
        "detach_between_steps": False,
        "loss_on_steps": "last",
        "random_step_size": 2.0,
        "random_steps": [2, 3],
        "thinking_noise_std": 3.0,
        "thinking_steps": 3,
    },
    # not in the paper: the context stream predicts by itself, and a few steps on one landscape refine that
    "proposal": {
        "candidate_init": "proposal",
        "candidate_init_std": 0.1,  # further candidates start near the proposal, or they would lose it
        "update": "residual",
        "step_conditioning": "none",
        "num_landscapes": 1,
        "step_size": 1.0,
        "learn_step_size": True,
        "detach_between_steps": True,
        "loss_on_steps": "all",
        "random_steps": [1, 4],
        "thinking_steps": 2,
    },
}

# s1 and s2 for images: one landscape, one step in training, no noise (paper D.3 and the official job scripts)
IMAGE_RECIPES: dict[str, dict[str, Any]] = {
    "s1": {
        "num_landscapes": 1,
        "step_size": 3000.0,
        "learn_step_size": True,
        "detach_between_steps": True,
        "loss_on_steps": "all",
    },
    "s2": {
        "num_landscapes": 1,
        "step_size": 3000.0,
        "learn_step_size": False,
        "detach_between_steps": False,
        "loss_on_steps": "last",
        "random_step_size": 2.0,
        "random_steps": [2, 3],
        "thinking_steps": 3,
    },
}


def preset_fields(name: str) -> dict[str, int]:
    """
    Architecture fields of a preset.

    Args:
        name (`str`): one of `PRESETS`.

    Raises:
        ValueError: for an unknown name, listing the known ones.
    """
    if name not in PRESETS:
        raise ValueError(f"Unknown preset {name!r}. Allowed: {', '.join(PRESETS)}.")
    return PRESETS[name].architecture()


def _recipe(recipes: dict[str, dict[str, Any]], name: str) -> dict[str, Any]:
    if name not in recipes:
        raise ValueError(f"Unknown recipe {name!r}. Allowed: {', '.join(recipes)}.")
    return deepcopy(recipes[name])


def recipe_fields(name: str) -> dict[str, Any]:
    """
    Config fields of a training recipe for text.

    Args:
        name (`str`): `"s1"`, `"s2"` or `"proposal"`.

    Raises:
        ValueError: for an unknown name, listing the known ones.
    """
    return _recipe(RECIPES, name)


def image_recipe_fields(name: str) -> dict[str, Any]:
    """
    Config fields of a training recipe for images.

    Args:
        name (`str`): `"s1"` or `"s2"`.

    Raises:
        ValueError: for an unknown name, listing the known ones.
    """
    return _recipe(IMAGE_RECIPES, name)


__all__ = ["IMAGE_RECIPES", "PRESETS", "RECIPES", "Preset", "image_recipe_fields", "preset_fields", "recipe_fields"]
