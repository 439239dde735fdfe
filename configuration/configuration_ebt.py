"""`EBTConfig`: what an Energy-Based Transformer for text is."""

from dataclasses import replace
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.modeling_rope_utils import RopeParameters

from .base_ebt import EBTBaseConfig
from .presets_ebt import preset_fields, recipe_fields
from .thinking_ebt import ThinkingConfig


STEP_CONDITIONINGS = ("none", "time_embed", "adaln", "adaln_zero")
CANDIDATE_EMBEDDINGS = ("linear", "shared")
CANDIDATE_ANCHORS = ("none", "token")
CANDIDATE_INITS = ("normal", "zeros", "proposal")
UPDATES = ("replace", "residual")
SECOND_ORDERS = ("double_backward", "forward_over_reverse", "central_difference")


@strict
class EBTConfig(EBTBaseConfig):
    r"""
    Configuration of [`EBTModel`] and [`EBTForCausalLM`], the Energy-Based Transformer for text (arXiv 2507.02092).
    The defaults are the paper's smallest published size (xxs) with its System 1 recipe.

    Args:
        vocab_size (`int`, *optional*, defaults to 50277):
            Size of the vocabulary, and of a candidate distribution [V].
        hidden_size (`int`, *optional*, defaults to 384): Width of the transformer [D].
        intermediate_size (`int`, *optional*):
            Width of the feed-forward layers; `None` means `hidden_size`, as in the paper.
        num_hidden_layers (`int`, *optional*, defaults to 6): Number of layers.
        num_attention_heads (`int`, *optional*, defaults to 6): Number of query heads.
        num_key_value_heads (`int`, *optional*): Number of key/value heads; `None` means `num_attention_heads`.
        head_dim (`int`, *optional*): Width of a head; `None` means `hidden_size // num_attention_heads`.
        hidden_act (`str`, *optional*, defaults to `"silu"`): Activation of the gated feed-forward layers. Anything not
            twice differentiable everywhere (relu) trains, but its energy has no curvature.
        max_position_embeddings (`int`, *optional*, defaults to 256): Longest context in tokens; longer input raises.
        rope_parameters (`dict`, *optional*): Rotary embedding parameters as in every transformers model.
        rms_norm_eps (`float`, *optional*, defaults to 1e-5): Epsilon of the RMS norms.
        initializer_range (`float`, *optional*, defaults to 1.0):
            Standard deviation of the token and step embeddings at initialisation. Matrices are Xavier-normal.
        step_conditioning (`str`, *optional*, defaults to `"time_embed"`):
            How the energy knows which landscape it is: `"none"` (one landscape for all steps), `"time_embed"` (a
            learned token in front of the context), `"adaln"` or `"adaln_zero"` (modulated norms, the latter starting
            at zero).
        num_landscapes (`int`, *optional*, defaults to 2):
            Number of energy landscapes; step `i` moves on landscape `min(i, num_landscapes - 1)`. Must be 1 for
            `"none"`.
        candidate_embedding (`str`, *optional*, defaults to `"linear"`):
            `"linear"`: candidates have an embedding table of their own. `"shared"`: they use the token embedding (the
            same as `tie_word_embeddings=True`).
        candidate_anchor (`str`, *optional*, defaults to `"none"`):
            What else enters the candidate stream at a candidate's position. `"none"`: nothing, the candidate finds the
            context by attention alone (the paper). `"token"`: the embedding of the context token there is added, as in
            an ordinary transformer; not in the paper, and learns much faster (`docs/results/anchor.md`).
        candidate_init (`str`, *optional*, defaults to `"normal"`):
            Start of a candidate in training: `"normal"` random logits, or `"zeros"`; evaluation then starts at zero
            logits. `"proposal"`: candidates start at what the context stream itself predicts, in evaluation too (its
            last hidden states times the candidate table; no further parameters). Not in the paper: the model is then
            its own Transformer++ twin at `thinking_steps=0`, and thinking refines that (`docs/results/thinking.md`).
        candidate_init_std (`float`, *optional*, defaults to 1.0):
            Spread of the `"normal"` start, and of the starts of several candidates in evaluation.
        proposal_loss_weight (`float`, *optional*, defaults to 1.0):
            With `"proposal"`: weight of the proposal's own cross-entropy, added to the objective in training.
        step_size (`float`, *optional*, defaults to 500.0): Initial step size [alpha]; published values are 5 to 500.
        learn_step_size (`bool`, *optional*, defaults to `True`): Whether the step size is trained.
        update (`str`, *optional*, defaults to `"replace"`):
            `"replace"`: new logits = distribution - step size x gradient (the official code). `"residual"`: new logits
            = logits - step size x gradient (entropic mirror descent; keeps what earlier steps found).
        detach_between_steps (`bool`, *optional*, defaults to `True`): Whether a step's gradient stops at its start.
        loss_on_steps (`str`, *optional*, defaults to `"all"`):
            Training objective: `"all"` averages the cross-entropy of every step (recipe s1), `"last"` scores the last
            step only, and only that step is differentiated (recipe s2).
        random_step_size (`float`, *optional*, defaults to 1.0):
            In training the step size of each position is drawn uniformly between `step_size / random_step_size` and
            `step_size * random_step_size` (the paper: 2 in recipe s2).
        random_steps (`list[int]`, *optional*):
            `[fewest, most]` steps, drawn for each batch in training (the paper: `[2, 3]` in recipe s2). `None`: always
            the default number.
        second_order (`str`, *optional*, defaults to `"double_backward"`):
            How training differentiates a step, which is a gradient itself. `"double_backward"`: exactly, through the
            graph of the gradient. `"forward_over_reverse"`: exactly, by a directional derivative in forward mode.
            `"central_difference"`: from the energies at two points near the candidate, with a relative error of
            1e-4 to 1e-3 in float32; the model is only differentiated once. What each costs: `docs/performance.md`.
        training_chunk_size (`int`, *optional*):
            Candidates that a training step takes at a time; more cost more memory, fewer more time. `None`: 512 on a
            CPU, 8192 elsewhere. 0 takes all at once and leaves their gradients to autograd: several times the memory,
            and a loss that can be differentiated twice and whose logits carry gradient. Training does so by itself
            where steps are not detached, for losses of your own, and where weights are spread over devices.
        thinking_steps (`int`, *optional*): Default number of steps; `None` means `num_landscapes`.
        thinking_candidates (`int`, *optional*, defaults to 1): Default number of candidates in evaluation.
        thinking_noise_std (`float`, *optional*, defaults to 0.0): Default noise on the logits, in training too.
        thinking_tolerance (`float`, *optional*): Default energy tolerance of the stop rule in evaluation.
        thinking_kl_tolerance (`float`, *optional*): Default tolerance for the change of a distribution in evaluation.
        thinking_target_energy (`float`, *optional*): Default energy at which evaluation stops.
        thinking_accept_only_lower_energy (`bool`, *optional*, defaults to `False`): Default acceptance in evaluation.
        use_cache (`bool`, *optional*, defaults to `True`): Whether `generate()` caches the context.
        tie_word_embeddings (`bool`, *optional*): Set from `candidate_embedding`.
        pad_token_id (`int`, *optional*), bos_token_id (`int`, *optional*), eos_token_id (`int` or `list`, *optional*):
            Special tokens.

    Example:

    ```python
    >>> from ebt_transformers import EBTConfig, EBTForCausalLM

    >>> config = EBTConfig.from_preset("4xs", recipe="s1", vocab_size=256)
    >>> model = EBTForCausalLM(config)
    >>> config.num_landscapes
    2
    ```
    """

    model_type = "ebt"
    _auto_class = "AutoConfig"  # a saved model carries its code
    keys_to_ignore_at_inference = [
        "past_key_values",
        "energies",
        "steps_taken",
        "steps_spent",
        "step_losses",
        "proposal_loss",
        "mean_energies",
        "hidden_states",
        "attentions",
        "trajectory",
    ]

    vocab_size: int = 50277
    hidden_size: int = 384
    intermediate_size: int | None = None
    num_hidden_layers: int = 6
    num_attention_heads: int = 6
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 256
    rope_parameters: RopeParameters | dict | None = None
    rms_norm_eps: float = 1e-5
    initializer_range: float | int = 1.0
    step_conditioning: str = "time_embed"
    num_landscapes: int = 2
    candidate_embedding: str = "linear"
    candidate_anchor: str = "none"
    candidate_init: str = "normal"
    candidate_init_std: float | int = 1.0
    proposal_loss_weight: float | int = 1.0
    thinking_kl_tolerance: float | int | None = None
    step_size: float | int = 500.0
    update: str = "replace"
    second_order: str = "double_backward"
    training_chunk_size: int | None = None
    use_cache: bool = True
    tie_word_embeddings: bool | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.intermediate_size is None:
            self.intermediate_size = self.hidden_size
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None and self.num_attention_heads > 0 and self.hidden_size % self.num_attention_heads == 0:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.tie_word_embeddings is None:
            self.tie_word_embeddings = self.candidate_embedding == "shared"
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Cross-field checks, run when the config is made and when it is saved."""
        self.check_at_least_one("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
        self.check_at_least_one("num_key_value_heads", "intermediate_size", "max_position_embeddings")
        self.check_choice("step_conditioning", STEP_CONDITIONINGS)
        self.check_choice("candidate_embedding", CANDIDATE_EMBEDDINGS)
        self.check_choice("candidate_anchor", CANDIDATE_ANCHORS)
        self.check_choice("candidate_init", CANDIDATE_INITS)
        self.check_choice("update", UPDATES)
        self.check_choice("second_order", SECOND_ORDERS)
        if self.training_chunk_size is not None and self.training_chunk_size < 0:
            raise ValueError(
                f"`training_chunk_size` must be a number of candidates, 0 (all at once) or None, got "
                f"{self.training_chunk_size}."
            )
        self.check_finite("candidate_init_std")
        self.check_finite("proposal_loss_weight")
        if self.head_dim is None:
            raise ValueError(
                f"`hidden_size` ({self.hidden_size}) must be a multiple of `num_attention_heads` "
                f"({self.num_attention_heads}), unless `head_dim` is given."
            )
        if self.head_width < 2 or self.head_width % 2:
            raise ValueError(
                f"The head width must be even and at least 2 for rotary positions, got {self.head_width} "
                f"(`hidden_size` {self.hidden_size} / `num_attention_heads` {self.num_attention_heads})."
            )
        if self.num_attention_heads % self.key_value_heads:
            raise ValueError(
                f"`num_attention_heads` ({self.num_attention_heads}) must be a multiple of `num_key_value_heads` "
                f"({self.key_value_heads})."
            )
        if self.step_conditioning == "none" and self.num_landscapes != 1:
            raise ValueError(
                f"`step_conditioning='none'` has one landscape, got `num_landscapes={self.num_landscapes}`. Set it to "
                "1 and give the number of steps as `thinking_steps`."
            )
        if self.tie_word_embeddings != (self.candidate_embedding == "shared"):
            raise ValueError(
                f"`tie_word_embeddings={self.tie_word_embeddings}` contradicts `candidate_embedding="
                f"{self.candidate_embedding!r}`: tied means shared. Set only `candidate_embedding`."
            )

    @property
    def starts_at_random(self) -> bool:
        """Whether training starts the descent at a random place."""
        return self.candidate_init == "normal"

    @property
    def starts_at_prediction(self) -> bool:
        """Whether the descent starts at a prediction of its own, so that no thinking at all predicts something."""
        return self.candidate_init == "proposal"

    def default_thinking(self) -> ThinkingConfig:
        """The thinking a call gets when it says nothing."""
        return replace(super().default_thinking(), kl_tolerance=self.thinking_kl_tolerance)

    @property
    def is_modulated(self) -> bool:
        """Whether the step modulates the norms (adaLN)."""
        return self.step_conditioning in ("adaln", "adaln_zero")

    @property
    def feed_forward_width(self) -> int:
        """Width of the feed-forward layers, known even where `intermediate_size` was left out."""
        return self.hidden_size if self.intermediate_size is None else self.intermediate_size

    @property
    def key_value_heads(self) -> int:
        """Number of key/value heads, known even where `num_key_value_heads` was left out."""
        return self.num_attention_heads if self.num_key_value_heads is None else self.num_key_value_heads

    @property
    def head_width(self) -> int:
        """Width of a head [d], known even where `head_dim` was left out."""
        return self.hidden_size // self.num_attention_heads if self.head_dim is None else self.head_dim

    @classmethod
    def from_preset(cls, name: str, recipe: str = "s1", **overrides: Any) -> "EBTConfig":
        """
        A config of one of the paper's sizes and training recipes.

        Args:
            name (`str`): `"4xs"`, `"3xs"`, `"xxs"`, `"xs"`, `"small"`, `"medium"`, `"large"` or `"xl"` (Table D.1).
            recipe (`str`, *optional*, defaults to `"s1"`): `"s1"` or `"s2"` (paper C.2), or `"proposal"` (not in the
                paper: thinking starts at what the context stream predicts).
            overrides: any other field of the config, which wins.

        Raises:
            ValueError: for an unknown preset or recipe.

        Example:

        ```python
        >>> from ebt_transformers import EBTConfig

        >>> EBTConfig.from_preset("xxs", recipe="s2").loss_on_steps
        'last'
        ```
        """
        return cls.for_recipe(recipe, **{**preset_fields(name), **overrides})

    @classmethod
    def for_recipe(cls, recipe: str, **overrides: Any) -> "EBTConfig":
        """
        A config of one of the training recipes, and any architecture.

        Args:
            recipe (`str`): `"s1"`, `"s2"` or `"proposal"`, as in [`from_preset`].
            overrides: any other field of the config, which wins.

        Raises:
            ValueError: for an unknown recipe.
        """
        values = {**recipe_fields(recipe), **overrides}
        if values["step_conditioning"] == "none" and "num_landscapes" not in overrides:
            # without conditioning there is one landscape; the recipe's count becomes the number of steps on it
            values.setdefault("thinking_steps", values["num_landscapes"])
            values["num_landscapes"] = 1
        return cls(**values)


__all__ = ["EBTConfig"]
