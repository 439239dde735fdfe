"""`EBTImageConfig`: what an Energy-Based Transformer for images is."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.utils import TRANSFORMERS_DYNAMIC_MODULE_NAME, logging

from .base_ebt import EBTBaseConfig
from .presets_ebt import image_recipe_fields, preset_fields


logger = logging.get_logger(__name__)

IMAGE_CONDITIONINGS = ("none", "noisy_image")
IMAGE_CANDIDATE_INITS = ("image", "normal")
RECONSTRUCTION_LOSSES = ("smooth_l1", "mse", "l1")


@strict
class EBTImageConfig(EBTBaseConfig):
    r"""
    Configuration of [`EBTImageModel`] and [`EBTForImageDenoising`], the Energy-Based Transformer for images (arXiv
    2507.02092, sections 4.3 and D.3). The defaults are the paper's 64 patches at its smallest published size.

    Args:
        image_size (`int` or `list[int]`, *optional*, defaults to 64):
            Height and width in pixels (of latents, with a VAE) that positions and step size were made for. Any size
            divisible by `patch_size` can be denoised: positions are interpolated and the step size follows the number
            of patches.
        patch_size (`int`, *optional*, defaults to 8):
            Side of a patch in pixels. A patch should have no more numbers (`num_channels * patch_size ** 2`) than
            `hidden_size`: the energy's gradient cannot leave what the patch embedding keeps of a patch, so noise
            beyond that stays. A smaller width warns.
        num_channels (`int`, *optional*, defaults to 3): Channels of an image, or of its latents.
        hidden_size (`int`, *optional*, defaults to 384): Width of the transformer [D], a multiple of 4.
        intermediate_size (`int`, *optional*): Width of the feed-forward layers; `None` means `hidden_size`.
        num_hidden_layers (`int`, *optional*, defaults to 6): Number of layers.
        num_attention_heads (`int`, *optional*, defaults to 6): Number of attention heads.
        hidden_act (`str`, *optional*, defaults to `"gelu_pytorch_tanh"`):
            Activation of the feed-forward layers; has to be twice differentiable to learn well.
        layer_norm_eps (`float`, *optional*, defaults to 1e-6): Epsilon of the layer norms, which have no weights.
        initializer_range (`float`, *optional*, defaults to 1.0):
            Standard deviation of the learned condition vectors at initialisation.
        image_conditioning (`str`, *optional*, defaults to `"none"`):
            What the energy sees beside the candidate. `"none"`: nothing, the energy judges the candidate alone (the
            paper; the noisy image is only where the descent starts). `"noisy_image"`: the noisy image, patch by patch,
            so that the energy can ask how well the candidate explains it; not in the paper.
        candidate_init (`str`, *optional*, defaults to `"image"`):
            Where the descent starts: at the noisy `"image"` itself, or around zero (`"normal"`, needs
            `image_conditioning="noisy_image"`).
        candidate_init_std (`float`, *optional*):
            Spread of the Gaussian noise added to the start in training, and to further candidates in evaluation.
            `None` means 0 for `"image"` and 1 for `"normal"`.
        reconstruction_loss (`str`, *optional*, defaults to `"smooth_l1"`):
            Distance of the denoised image to the clean one: `"smooth_l1"` (the official code), `"mse"` (the paper's
            text) or `"l1"`; the mean over pixels.
        vae_name_or_path (`str`, *optional*):
            A diffusers `AutoencoderKL`, by folder or Hub id: the model works on its latents, and pipelines and
            training encode and decode with it. `None`: pixels.
        num_landscapes (`int`, *optional*, defaults to 1):
            Number of energy landscapes, one learned condition vector each; step `i` moves on landscape
            `min(i, num_landscapes - 1)`. The paper has one.
        step_size (`float`, *optional*, defaults to 3000.0):
            Initial step size [alpha] at `image_size`. The energy is a mean over patches, so useful values grow with
            their number: the published 3000 belongs to 64 patches.
        learn_step_size (`bool`, *optional*, defaults to `True`): Whether the step size is trained.
        detach_between_steps (`bool`, *optional*, defaults to `True`): Whether a step's gradient stops at its start.
        loss_on_steps (`str`, *optional*, defaults to `"all"`):
            Training objective: `"all"` averages the loss of every step (recipe s1), `"last"` scores the last step
            only, and only that step is differentiated (recipe s2).
        random_step_size (`float`, *optional*, defaults to 1.0):
            In training the step size of each image is drawn uniformly between `step_size / random_step_size` and
            `step_size * random_step_size` (the paper: 2 in recipe s2).
        random_steps (`list[int]`, *optional*):
            `[fewest, most]` steps, drawn for each batch in training (the paper: `[2, 3]` in recipe s2). `None`: always
            the default number.
        thinking_steps (`int`, *optional*): Default number of steps; `None` means `num_landscapes`.
        thinking_candidates (`int`, *optional*, defaults to 1): Default number of candidates in evaluation.
        thinking_noise_std (`float`, *optional*, defaults to 0.0): Noise before every step in training; evaluation adds
            noise only when a call asks for it.
        thinking_tolerance (`float`, *optional*): Default energy tolerance of the stop rule in evaluation.
        thinking_target_energy (`float`, *optional*): Default energy at which evaluation stops.
        thinking_accept_only_lower_energy (`bool`, *optional*, defaults to `False`): Default acceptance in evaluation.

    Example:

    ```python
    >>> from ebt_transformers import EBTForImageDenoising, EBTImageConfig

    >>> config = EBTImageConfig.from_preset("4xs", image_size=32, patch_size=4)
    >>> model = EBTForImageDenoising(config)
    >>> config.grid
    (8, 8)
    ```
    """

    model_type = "ebt_image"
    _auto_class = "AutoConfig"  # a saved model carries its code
    keys_to_ignore_at_inference = [
        "energies",
        "steps_taken",
        "step_losses",
        "mean_energies",
        "trajectory",
        "hidden_states",
        "attentions",
    ]

    image_size: int | list[int] = 64
    patch_size: int = 8
    num_channels: int = 3
    hidden_size: int = 384
    intermediate_size: int | None = None
    num_hidden_layers: int = 6
    num_attention_heads: int = 6
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6
    initializer_range: float | int = 1.0
    image_conditioning: str = "none"
    candidate_init: str = "image"
    candidate_init_std: float | int | None = None
    reconstruction_loss: str = "smooth_l1"
    vae_name_or_path: str | None = None
    step_size: float | int = 3000.0

    def __post_init__(self, **kwargs: Any) -> None:
        if not type(self).__module__.startswith(TRANSFORMERS_DYNAMIC_MODULE_NAME):
            kwargs.pop("custom_pipelines", None)  # a checkpoint's pipeline is for those who lack the package with ours
        if self.intermediate_size is None:
            self.intermediate_size = self.hidden_size
        if self.candidate_init_std is None:
            self.candidate_init_std = 1.0 if self.candidate_init == "normal" else 0.0
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Cross-field checks, run when the config is made and when it is saved."""
        self.check_at_least_one("patch_size", "num_channels", "hidden_size", "num_hidden_layers")
        self.check_at_least_one("num_attention_heads", "intermediate_size")
        self.check_choice("image_conditioning", IMAGE_CONDITIONINGS)
        self.check_choice("candidate_init", IMAGE_CANDIDATE_INITS)
        self.check_choice("reconstruction_loss", RECONSTRUCTION_LOSSES)
        self.check_finite("candidate_init_std")
        size = self.image_size
        if isinstance(size, list) and len(size) != 2:
            raise ValueError(f"`image_size` must be one number, or height and width, got {size}.")
        if any(side < 1 or side % self.patch_size for side in self.height_and_width):
            raise ValueError(f"`image_size` ({size}) must be a positive multiple of `patch_size` ({self.patch_size}).")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"`hidden_size` ({self.hidden_size}) must be a multiple of `num_attention_heads` "
                f"({self.num_attention_heads})."
            )
        if self.hidden_size % 4:
            raise ValueError(f"`hidden_size` must be a multiple of 4 for 2-D positions, got {self.hidden_size}.")
        numbers = self.num_channels * self.patch_size**2
        if self.hidden_size < numbers:
            logger.warning_once(
                f"`hidden_size` ({self.hidden_size}) is below the {numbers} numbers of a patch (`num_channels` x "
                "`patch_size` ** 2): the energy's gradient cannot remove all noise. Use smaller patches or a larger "
                "width."
            )
        if self.candidate_init == "normal" and self.image_conditioning == "none":
            raise ValueError(
                "`candidate_init='normal'` starts from nothing, so the energy has to see the noisy image: set "
                "`image_conditioning='noisy_image'`."
            )

    @property
    def height_and_width(self) -> tuple[int, int]:
        """`image_size` as two numbers."""
        size = self.image_size
        return (size, size) if isinstance(size, int) else (size[0], size[1])

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches at `image_size`."""
        height, width = self.height_and_width
        return height // self.patch_size, width // self.patch_size

    @property
    def start_spread(self) -> float:
        """Standard deviation of the noise on the start, known even where `candidate_init_std` was left out."""
        return float(self.candidate_init_std or 0.0)

    @property
    def starts_at_random(self) -> bool:
        """Whether training starts the descent at a random place."""
        return self.start_spread > 0

    @property
    def thinking_without_meaning(self) -> dict[str, str]:
        """Thinking options that models of this kind cannot follow, and why."""
        return {
            "kl_tolerance": "a picture is no distribution. Use `thinking_tolerance` or `thinking_target_energy`.",
            "budget": "a picture is a single prediction. Use `thinking_steps`.",
        }

    @property
    def evaluation_noise_std(self) -> float:
        """Images are denoised without noise unless a call asks for it (the official `no_langevin_during_eval`)."""
        return 0.0

    @classmethod
    def from_preset(cls, name: str, recipe: str = "s1", **overrides: Any) -> "EBTImageConfig":
        """
        A config of one of the paper's sizes and training recipes. The paper denoises with `"large"`.

        Args:
            name (`str`): `"4xs"`, `"3xs"`, `"xxs"`, `"xs"`, `"small"`, `"medium"`, `"large"` or `"xl"` (Table D.1).
            recipe (`str`, *optional*, defaults to `"s1"`): `"s1"` or `"s2"` (paper C.2).
            overrides: any other field of the config, which wins.

        Raises:
            ValueError: for an unknown preset or recipe.
        """
        return cls(**{**preset_fields(name), **image_recipe_fields(recipe), **overrides})


__all__ = ["EBTImageConfig"]
