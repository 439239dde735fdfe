"""`EnergyTransformerConfig`: what an Energy Transformer for images or graphs is."""

import math
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.utils import TRANSFORMERS_DYNAMIC_MODULE_NAME


HOPFIELD_KINDS = ("relu", "power", "softmax")
COMPLETION_LOSSES = ("mse", "rmse", "diluted_rmse")
POSITION_INITS = ("normal", "sincos")
POSITION_KINDS = ("none", "laplacian", "learned")
EDGE_MODULATIONS = ("none", "pairwise")


@strict
class EnergyTransformerConfig(PreTrainedConfig):
    r"""
    Configuration of [`EnergyTransformerModel`] and its heads: the Energy Transformer (arXiv 2302.07253), whose block
    is the gradient of one energy. The defaults are the paper's model for images of 224 x 224 pixels.

    Args:
        hidden_size (`int`, *optional*, defaults to 768): Width of a token [D].
        num_attention_heads (`int`, *optional*, defaults to 12): Heads of the energy attention [H].
        head_dim (`int`, *optional*): Width of a head [Y]; `None` means `hidden_size / num_attention_heads`.
        num_memories (`int`, *optional*): Patterns the Hopfield module keeps [K]; `None` means `4 * hidden_size`.
        hopfield (`str`, *optional*, defaults to `"relu"`):
            Energy of a token's overlaps `z` with the patterns: `"relu"` (`-relu(z)^2 / 2`, the paper), `"power"`
            (`-relu(z)^n / n`) or `"softmax"` (`-logsumexp(b z) / b`, a modern Hopfield network).
        hopfield_power (`float`, *optional*, defaults to 3.0): [n] of `"power"`, at least 2.
        hopfield_beta (`float`, *optional*): [b] of `"softmax"`; `None` means `sqrt(num_memories)`.
        attention_beta (`float`, *optional*): Inverse temperature of the attention; `None` means `1 / sqrt(head_dim)`.
        self_attention (`bool`, *optional*, defaults to `False`):
            Whether a token attends to itself. The paper excludes it; the authors' image weights were trained with it.
        num_blocks (`int`, *optional*, defaults to 1): Blocks with weights of their own, descended one after another.
        thinking_steps (`int`, *optional*, defaults to 12): Steps down the energy of each block [T].
        step_size (`float`, *optional*, defaults to 0.1):
            [alpha = dt / tau]. The energy is certain to fall for small values only.
        noise_std (`float`, *optional*, defaults to 0.0):
            Every step adds Gaussian noise of `sqrt(step_size) * noise_std` in training (the paper's graphs: 0.02).
        layer_norm_eps (`float`, *optional*, defaults to 1e-5): Epsilon of the energy layer norm.
        initializer_range (`float`, *optional*, defaults to 0.02): Spread of memories and linear maps at the start.
        attention_initializer_range (`float`, *optional*):
            Spread of the attention's matrices, of mask and CLS token and of positions at the start; `None` means
            `initializer_range`. The authors' image model has 0.002, as [`EnergyTransformerConfig.for_images`].
        image_size (`int` or `list[int]`, *optional*, defaults to 224): Images: height and width in pixels.
        patch_size (`int`, *optional*, defaults to 16): Images: side of a patch in pixels.
        num_channels (`int`, *optional*, defaults to 3): Images: channels.
        mask_ratio (`float`, *optional*, defaults to 0.5): Images: share of the patches that count in the loss.
        visible_ratio (`float`, *optional*, defaults to 0.1):
            Images: share of those that stay visible in training; the others are replaced by the mask token.
        completion_loss (`str`, *optional*, defaults to `"mse"`):
            Images: over the patches that count, `"mse"` or its root `"rmse"`; `"diluted_rmse"` divides by all patches
            (the authors' code).
        position_init (`str`, *optional*, defaults to `"normal"`):
            Images: how the learned positions start. `"normal"`: at random, as the authors' do. `"sincos"`: as sines
            and cosines of row and column, so that neighbours are alike from the start; learns faster.
        num_node_features (`int`, *optional*): Graphs: numbers that describe a node; heads for graphs need it.
        num_edge_features (`int`, *optional*, defaults to 0): Graphs: numbers that describe an edge.
        num_relations (`int`, *optional*, defaults to 1):
            Graphs: kinds of edges that each have an attention of their own. 1 merges all edges.
        position_embedding (`str`, *optional*, defaults to `"none"`):
            Graphs: `"laplacian"` (a linear map of the graph Laplacian's eigenvectors), `"learned"` (a vector for each
            node of the one graph it is trained on) or `"none"`.
        num_positions (`int`, *optional*): Graphs: eigenvectors of `"laplacian"` (`None` means 15, the paper), or
            nodes of `"learned"`.
        edge_modulation (`str`, *optional*, defaults to `"none"`):
            Graphs: `"pairwise"` multiplies the attention of an edge by a learned function of the edge's features and
            its two nodes; `"none"` does not.
        readout_size (`int`, *optional*): Graphs: width of the classifier's hidden layer; `None` means `hidden_size`,
            0 none.
        classifier_dropout (`float`, *optional*, defaults to 0.0): Graphs: dropout before the classifier.
        class_weights (`list[float]`, *optional*): Graphs: weight of each class in the loss.
        label_smoothing (`float`, *optional*, defaults to 0.0): Graphs: label smoothing of the loss.

    Example:

    ```python
    >>> from ebt_transformers import EnergyTransformerConfig, EnergyTransformerForImageCompletion

    >>> config = EnergyTransformerConfig(hidden_size=64, num_attention_heads=4, image_size=32, patch_size=4)
    >>> config.head_dim, config.num_memories, config.grid
    (16, 256, (8, 8))
    ```
    """

    model_type = "energy_transformer"
    _auto_class = "AutoConfig"  # a saved model carries its code
    keys_to_ignore_at_inference = ["energies", "steps_taken", "trajectory", "last_hidden_state"]

    hidden_size: int = 768
    num_attention_heads: int = 12
    head_dim: int | None = None
    num_memories: int | None = None
    hopfield: str = "relu"
    hopfield_power: float | int = 3.0
    hopfield_beta: float | int | None = None
    attention_beta: float | int | None = None
    self_attention: bool = False
    num_blocks: int = 1
    thinking_steps: int = 12
    step_size: float | int = 0.1
    noise_std: float | int = 0.0
    layer_norm_eps: float = 1e-5
    initializer_range: float | int = 0.02
    attention_initializer_range: float | int | None = None
    image_size: int | list[int] = 224
    patch_size: int = 16
    num_channels: int = 3
    mask_ratio: float | int = 0.5
    visible_ratio: float | int = 0.1
    completion_loss: str = "mse"
    position_init: str = "normal"
    num_node_features: int | None = None
    num_edge_features: int = 0
    num_relations: int = 1
    position_embedding: str = "none"
    num_positions: int | None = None
    edge_modulation: str = "none"
    readout_size: int | None = None
    classifier_dropout: float | int = 0.0
    class_weights: list[float] | None = None
    label_smoothing: float | int = 0.0

    def __post_init__(self, **kwargs: Any) -> None:
        if not type(self).__module__.startswith(TRANSFORMERS_DYNAMIC_MODULE_NAME):
            kwargs.pop("custom_pipelines", None)  # a checkpoint's pipeline is for those who lack the package with ours
        if self.head_dim is None and self.num_attention_heads > 0:
            self.head_dim = max(1, self.hidden_size // self.num_attention_heads)
        if self.num_memories is None:
            self.num_memories = 4 * self.hidden_size
        if self.attention_beta is None and self.head_dim:
            self.attention_beta = 1.0 / math.sqrt(self.head_dim)
        if self.hopfield_beta is None and self.num_memories > 0:
            self.hopfield_beta = math.sqrt(self.num_memories)
        if self.attention_initializer_range is None:
            self.attention_initializer_range = self.initializer_range
        if self.num_positions is None and self.position_embedding == "laplacian":
            self.num_positions = 15
        if self.readout_size is None:
            self.readout_size = self.hidden_size
        super().__post_init__(**kwargs)

    @classmethod
    def for_images(cls, **overrides: Any) -> "EnergyTransformerConfig":
        """
        The authors' setting for image completion: self-attention on, and a start from small attention matrices.

        Args:
            overrides: fields of the config that differ.

        Returns:
            [`EnergyTransformerConfig`].
        """
        return cls(**{"self_attention": True, "attention_initializer_range": 0.002, **overrides})

    def validate_architecture(self) -> None:
        """Cross-field checks, run when the config is made and when it is saved."""
        for name in ("hidden_size", "num_attention_heads", "head_dim", "num_memories", "num_blocks", "thinking_steps"):
            self._check_at_least(name, 1)
        for name in ("patch_size", "num_channels", "num_relations"):
            self._check_at_least(name, 1)
        for name in ("num_edge_features", "readout_size"):
            self._check_at_least(name, 0)
        if self.num_node_features is not None:
            self._check_at_least("num_node_features", 1)
        for name in ("step_size", "attention_beta", "hopfield_beta", "layer_norm_eps"):
            value = getattr(self, name)
            if not math.isfinite(value) or value <= 0:
                raise ValueError(f"`{name}` must be finite and above 0, got {value}.")
        for name in ("noise_std", "initializer_range", "attention_initializer_range"):
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0:
                raise ValueError(f"`{name}` must be finite and at least 0, got {value}.")
        if not 2 <= self.hopfield_power < math.inf:
            raise ValueError(f"`hopfield_power` must be finite and at least 2, got {self.hopfield_power}.")
        self._check_choice("hopfield", HOPFIELD_KINDS)
        self._check_images()
        self._check_graphs()

    def _check_images(self) -> None:
        self._check_choice("completion_loss", COMPLETION_LOSSES)
        self._check_choice("position_init", POSITION_INITS)
        if self.position_init == "sincos" and self.hidden_size % 4:
            raise ValueError(
                f"`position_init='sincos'` needs a `hidden_size` that is a multiple of 4, got {self.hidden_size}."
            )
        size = self.image_size
        if isinstance(size, list) and len(size) != 2:
            raise ValueError(f"`image_size` must be one number, or height and width, got {size}.")
        if any(side < 1 or side % self.patch_size for side in self.height_and_width):
            raise ValueError(f"`image_size` ({size}) must be a positive multiple of `patch_size` ({self.patch_size}).")
        if not 0 < self.mask_ratio <= 1:
            raise ValueError(f"`mask_ratio` must be above 0 and at most 1, got {self.mask_ratio}.")
        if not 0 <= self.visible_ratio < 1:
            raise ValueError(f"`visible_ratio` must be at least 0 and below 1, got {self.visible_ratio}.")

    def _check_graphs(self) -> None:
        self._check_choice("position_embedding", POSITION_KINDS)
        self._check_choice("edge_modulation", EDGE_MODULATIONS)
        if self.num_positions is not None:
            self._check_at_least("num_positions", 1)
        if self.position_embedding == "learned" and self.num_positions is None:
            raise ValueError("`position_embedding='learned'` needs `num_positions`, the number of nodes.")
        if self.position_embedding == "none" and self.num_positions is not None:
            raise ValueError(
                f"`num_positions={self.num_positions}` means nothing with `position_embedding='none'`. Leave it out, "
                "or set `position_embedding='laplacian'`."
            )
        if self.edge_modulation == "none" and self.num_edge_features:
            raise ValueError(
                f"`num_edge_features={self.num_edge_features}` means nothing with `edge_modulation='none'`. Leave it "
                "out, or set `edge_modulation='pairwise'`."
            )
        if not 0 <= self.classifier_dropout < 1:
            raise ValueError(f"`classifier_dropout` must be at least 0 and below 1, got {self.classifier_dropout}.")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"`label_smoothing` must be at least 0 and below 1, got {self.label_smoothing}.")
        weights = self.class_weights
        if weights is not None and any(not math.isfinite(weight) or weight < 0 for weight in weights):
            raise ValueError(f"`class_weights` must be finite and at least 0, got {weights}.")

    def _check_at_least(self, name: str, least: int) -> None:
        if getattr(self, name) < least:
            raise ValueError(f"`{name}` must be at least {least}, got {getattr(self, name)}.")

    def _check_choice(self, name: str, allowed: tuple[str, ...]) -> None:
        if getattr(self, name) not in allowed:
            raise ValueError(f"`{name}` must be one of {', '.join(allowed)}, got {getattr(self, name)!r}.")

    @property
    def height_and_width(self) -> tuple[int, int]:
        """Height and width of an image in pixels."""
        size = self.image_size
        return (size[0], size[1]) if isinstance(size, list) else (size, size)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches of an image."""
        height, width = self.height_and_width
        return height // self.patch_size, width // self.patch_size

    @property
    def num_patches(self) -> int:
        """Patches of an image."""
        return self.grid[0] * self.grid[1]


__all__ = ["EnergyTransformerConfig"]
