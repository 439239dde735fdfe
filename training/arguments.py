"""`EBTTrainingArguments`: the Trainer's options with the paper's defaults, and what only energy-based models need."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from transformers import TrainingArguments


AVAILABLE_RECIPES = ("s1", "s2", "proposal")
AVAILABLE_IMAGE_RECIPES = ("s1", "s2")
REPLAY_BUFFER_SIZE = 192  # the paper's in recipe s2: what fits on a GPU of 40 GB
REPLAY_BUFFER_SHARE = 0.5
REPLAY_BUFFER_MEMORY = 10.0  # GiB; the paper's buffer takes 9.2
DEFAULT_LEARNING_RATE = 1.2e-3  # the paper's smallest published size, xxs
IMAGE_LEARNING_RATE = 1e-4  # the paper's for images, whatever the size
MINIMUM_LEARNING_RATE_SHARE = 0.1  # cosine down to a tenth


def _check_device(name: str) -> None:
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"`replay_buffer_device={name!r}` cannot be used here: {str(error).splitlines()[0]} Give a device of "
            "torch, such as cpu or cuda:0."
        ) from error


@dataclass
class EBTTrainingArguments(TrainingArguments):
    r"""
    `transformers.TrainingArguments` for [`EBTTrainer`]. Every option of the parent works as documented there. These
    defaults differ, and follow the paper (Tables D.2 to D.4):

    | option | default here |
    |---|---|
    | `learning_rate` | `None`: 1.2e-3, or what the preset was published with in `ebt train clm --preset` |
    | `lr_scheduler_type` | `"cosine_with_min_lr"`, down to a tenth (`min_lr_rate` 0.1 in `lr_scheduler_kwargs`) |
    | `warmup_steps` | 0.1, a share of all steps (the paper: 10k of 105k steps) |
    | `weight_decay` | 0.01 |
    | `logging_steps` | 50 |
    | `seed` | 33 |

    The parent's AdamW betas (0.9, 0.999) and gradient clipping at 1.0 are the paper's already. The paper decays every
    parameter but the step size; here norms and biases are not decayed either, as everywhere in transformers.

    Args:
        recipe (`str`, *optional*, defaults to `"s1"`):
            How thinking is trained. `"s1"` scores the prediction after every step. `"s2"` scores the last one, and
            starts some rows where an earlier descent of theirs ended; noise, random step sizes and random numbers of
            steps belong to the model's config (`EBTConfig.from_preset(..., recipe="s2")`). `"proposal"` (text; not in
            the paper) scores every step and the start, which the context stream predicts.
        replay_buffer_size (`int`, *optional*):
            Rows that each process keeps with the logits their descent ended at, to start from there again; 0 keeps
            none. `None` is the paper's: 192 in recipe s2 of text, 0 otherwise. Text only.
        replay_buffer_share (`float`, *optional*, defaults to 0.5):
            Rows replayed for each new row of an update, above 0 and at most 1: they come on top, so 0.5 makes a batch
            half as large again.
        replay_buffer_memory (`float`, *optional*, defaults to 10.0):
            GiB the buffer may take in each process. A row is `T` positions of `V` logits in float32: 192 rows of 256
            tokens over a vocabulary of 50,277 take 9.2 GiB, in every checkpoint too. A run that would need more is
            refused at its first batch, with the size that fits.
        replay_buffer_device (`str`, *optional*):
            Where the buffer is kept, such as `"cpu"`. `None`: where the model is trained.
        step_size_lr_multiplier (`float`, *optional*, above 0):
            Learning rate of a learned step size, as a multiple of `learning_rate`; without weight decay. `None` is the
            paper's rule, 3 times the step size in the model's config. Raises in the trainer if nothing there learns a
            step size.
        early_stopping_patience (`int`, *optional*, at least 1):
            Stop after so many evaluations without a better `metric_for_best_model` (the evaluation loss unless told),
            and go back to the best checkpoint. Needs `eval_strategy`; switches `load_best_model_at_end` on and saves
            whenever it evaluates, unless told otherwise.
        early_stopping_threshold (`float`, *optional*, defaults to 0.0):
            How much better the metric has to be to count. Needs `early_stopping_patience`.

    Raises:
        ValueError: for a value out of range or a combination that would be ignored.

    Example:

    ```python
    >>> from ebt_transformers import EBTTrainingArguments

    >>> args = EBTTrainingArguments(output_dir="runs/first", max_steps=100)
    >>> args.learning_rate, args.weight_decay
    (0.0012, 0.01)
    ```
    """

    default_learning_rate: ClassVar[float] = DEFAULT_LEARNING_RATE
    can_replay: ClassVar[bool] = True
    recipes: ClassVar[tuple[str, ...]] = AVAILABLE_RECIPES

    # redeclared parent options: other defaults, same meaning
    learning_rate: float | None = field(
        default=None,
        metadata={"help": "Base learning rate. Default: what the preset was published with, else 1.2e-3."},
    )
    lr_scheduler_type: str = field(
        default="cosine_with_min_lr",
        metadata={"help": "Schedule of the learning rate. cosine_with_min_lr ends at a tenth of the base rate."},
    )
    warmup_steps: float = field(
        default=0.1, metadata={"help": "Linear warm-up: a number of steps, or below 1 a share of all steps."}
    )
    weight_decay: float = field(
        default=0.01, metadata={"help": "AdamW weight decay of matrices and embeddings; norms and biases have none."}
    )
    logging_steps: float = field(
        default=50, metadata={"help": "Log every so many steps, or below 1 a share of all steps."}
    )
    seed: int = field(default=33, metadata={"help": "Random seed set at the beginning of training."})

    recipe: str = field(
        default="s1",
        metadata={
            "help": "How thinking is trained: s1 scores every step, s2 the last, from noisy and replayed starts, "
            "proposal (not the paper's) also the start, which the context predicts."
        },
    )
    replay_buffer_size: int | None = field(
        default=None,
        metadata={
            "help": "Rows kept to start from where they ended. Default: 192 in recipe s2 of text, else 0 (none)."
        },
    )
    replay_buffer_share: float = field(
        default=REPLAY_BUFFER_SHARE, metadata={"help": "Replayed rows for each new row, on top of the batch."}
    )
    replay_buffer_memory: float = field(
        default=REPLAY_BUFFER_MEMORY,
        metadata={"help": "GiB the replay buffer may take in each process; a run that needs more is refused."},
    )
    replay_buffer_device: str | None = field(
        default=None, metadata={"help": "Where the replay buffer is kept, e.g. cpu. Default: where the model is."}
    )
    step_size_lr_multiplier: float | None = field(
        default=None,
        metadata={
            "help": "Learning rate of the step size as a multiple of the base rate. Default: 3 x the step size of the "
            "model's config, as in the paper."
        },
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={"help": "Stop after so many evaluations without improvement and keep the best checkpoint."},
    )
    early_stopping_threshold: float = field(
        default=0.0, metadata={"help": "How much better the metric has to be to count as improvement."}
    )

    def __post_init__(self) -> None:
        self.learning_rate_is_default = self.learning_rate is None
        if self.learning_rate is None:
            self.learning_rate = self.default_learning_rate
        self._check_recipe()
        self._prepare_replay()
        if self.step_size_lr_multiplier is not None and not self.step_size_lr_multiplier > 0:
            raise ValueError(
                f"`step_size_lr_multiplier` must be above 0, got {self.step_size_lr_multiplier}. To keep the step "
                "size fixed, set `learn_step_size=False` in the model's config."
            )
        self._prepare_early_stopping()
        super().__post_init__()
        if self.lr_scheduler_type == "cosine_with_min_lr":
            # after the parent, which turns a JSON string from the command line into a dict
            options = dict(vars(self)["lr_scheduler_kwargs"] or {})
            if not {"min_lr", "min_lr_rate"} & set(options):
                options["min_lr_rate"] = MINIMUM_LEARNING_RATE_SHARE
            self.lr_scheduler_kwargs = options

    def _check_recipe(self) -> None:
        if self.recipe not in self.recipes:
            raise ValueError(f"`recipe` must be one of {', '.join(self.recipes)}, got {self.recipe!r}.")

    def _prepare_replay(self) -> None:
        if self.replay_buffer_size is None:
            self.replay_buffer_size = REPLAY_BUFFER_SIZE if self.recipe == "s2" and self.can_replay else 0
        if self.replay_buffer_size < 0:
            raise ValueError(f"`replay_buffer_size` must be at least 0 (none), got {self.replay_buffer_size}.")
        if self.replay_buffer_size == 0:
            self._refuse_unused_replay_options()
        elif not self.can_replay:
            raise ValueError(
                f"`replay_buffer_size={self.replay_buffer_size}` is for text: the descent of an image starts at the "
                "noisy image. Leave it out."
            )
        if not 0 < self.replay_buffer_share <= 1:
            raise ValueError(f"`replay_buffer_share` must be above 0 and at most 1, got {self.replay_buffer_share}.")
        if not self.replay_buffer_memory > 0:
            raise ValueError(f"`replay_buffer_memory` must be above 0 GiB, got {self.replay_buffer_memory}.")
        if self.replay_buffer_device is not None:
            _check_device(self.replay_buffer_device)

    def _refuse_unused_replay_options(self) -> None:
        for name in ("replay_buffer_share", "replay_buffer_memory", "replay_buffer_device"):
            if getattr(self, name) != EBTTrainingArguments.__dataclass_fields__[name].default:
                raise ValueError(
                    f"`{name}={getattr(self, name)}` has no effect without a replay buffer. Set `replay_buffer_size`, "
                    "or leave it out."
                )

    def _prepare_early_stopping(self) -> None:
        if self.early_stopping_patience is None:
            if self.early_stopping_threshold != 0.0:
                raise ValueError(
                    f"`early_stopping_threshold={self.early_stopping_threshold}` has no effect without "
                    "`early_stopping_patience`. Set both or neither."
                )
            return
        if self.early_stopping_patience < 1 or self.early_stopping_threshold < 0:
            raise ValueError(
                "`early_stopping_patience` must be at least 1 and `early_stopping_threshold` at least 0, got "
                f"{self.early_stopping_patience} and {self.early_stopping_threshold}."
            )
        evaluates = getattr(self.eval_strategy, "value", self.eval_strategy)
        if evaluates == "no":
            raise ValueError(
                "`early_stopping_patience` needs evaluations during training. Add `eval_strategy` steps (with "
                "`eval_steps`) or epoch."
            )
        defaults = TrainingArguments.__dataclass_fields__
        given = vars(self)
        saves = getattr(given["save_strategy"], "value", given["save_strategy"])
        if saves == "steps" and given["save_steps"] == defaults["save_steps"].default:
            self.save_strategy = evaluates
            if evaluates == "steps":
                self.save_steps = self.eval_steps or self.logging_steps
        self.load_best_model_at_end = True
        # without the counter of failed evaluations a resumed run would stop later than an uninterrupted one
        self.restore_callback_states_from_checkpoint = True


@dataclass
class EBTImageTrainingArguments(EBTTrainingArguments):
    r"""
    [`EBTTrainingArguments`] for images: the learning rate is 1e-4 whatever the size (paper D.3), and recipe s2 has no
    replay buffer (nor has the official code for images).

    Args:
        learning_rate (`float`, *optional*): base learning rate; 1e-4 by default.
        recipe (`str`, *optional*, defaults to `"s1"`): `"s1"` scores the image after every step, `"s2"`
            after the last.

    Raises:
        ValueError: as [`EBTTrainingArguments`].

    Example:

    ```python
    >>> from ebt_transformers.training.arguments import EBTImageTrainingArguments

    >>> EBTImageTrainingArguments(output_dir="runs/images", recipe="s2").learning_rate
    0.0001
    ```
    """

    default_learning_rate: ClassVar[float] = IMAGE_LEARNING_RATE
    can_replay: ClassVar[bool] = False
    recipes: ClassVar[tuple[str, ...]] = AVAILABLE_IMAGE_RECIPES

    learning_rate: float | None = field(
        default=None, metadata={"help": "Base learning rate. Default: 1e-4, the paper's for images."}
    )
    weight_decay: float | None = field(  # type: ignore[assignment]
        default=None,
        metadata={"help": "AdamW weight decay of matrices and embeddings. Default: 0.01; 0 with --twin (the paper)."},
    )
    recipe: str = field(
        default="s1",
        metadata={"help": "How thinking is trained: s1 scores every step, s2 the last (random steps and step sizes)."},
    )

    def __post_init__(self) -> None:
        self.weight_decay_is_default = self.weight_decay is None
        if self.weight_decay is None:
            self.weight_decay = 0.01
        super().__post_init__()


__all__ = ["AVAILABLE_RECIPES", "DEFAULT_LEARNING_RATE", "EBTImageTrainingArguments", "EBTTrainingArguments"]
