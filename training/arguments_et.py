"""`EnergyTransformerTrainingArguments`: the Trainer's options with the defaults of the Energy Transformer's paper."""

from dataclasses import dataclass, field
from typing import ClassVar

from transformers import TrainingArguments

from .arguments import EBTTrainingArguments


IMAGE_LEARNING_RATE = 5e-4
GRAPH_LEARNING_RATE = 1e-3


@dataclass
class EnergyTransformerTrainingArguments(TrainingArguments):
    r"""
    `transformers.TrainingArguments` for Energy Transformers, as the paper trains them on images. These defaults
    differ from the parent's:

    | option | default here |
    |---|---|
    | `learning_rate` | `None`: 5e-4, the paper's for images |
    | `lr_scheduler_type` | `"cosine"` |
    | `warmup_steps` | 0.02, a share of all steps (the paper: 2 of 100 epochs) |
    | `adam_beta2` | 0.99 |
    | `weight_decay` | 0.05 |
    | `num_train_epochs` | 100 |
    | `logging_steps` | 50 |
    | `remove_unused_columns` | `False`: which columns of a row matter is the collator's business |

    The parent's clipping of the gradient's norm at 1.0 is the paper's already.

    Args:
        early_stopping_patience (`int`, *optional*, at least 1):
            Stop after so many evaluations without a better `metric_for_best_model`, and go back to the best
            checkpoint. Needs `eval_strategy`; switches `load_best_model_at_end` on.
        early_stopping_threshold (`float`, *optional*, defaults to 0.0):
            How much better the metric has to be to count. Needs `early_stopping_patience`.

    Raises:
        ValueError: for a value out of range or a combination that would be ignored; for `label_smoothing_factor`,
        which
            would replace the model's own loss with one without class weights (`label_smoothing` of its config
            smooths).

    Example:

    ```python
    >>> from ebt_transformers import EnergyTransformerTrainingArguments

    >>> args = EnergyTransformerTrainingArguments(output_dir="runs/completion")
    >>> args.learning_rate, args.adam_beta2, args.weight_decay
    (0.0005, 0.99, 0.05)
    ```
    """

    default_learning_rate: ClassVar[float] = IMAGE_LEARNING_RATE

    # redeclared parent options: other defaults, same meaning
    learning_rate: float | None = field(
        default=None, metadata={"help": "Base learning rate. Default: the paper's, 5e-4 for images, 1e-3 for graphs."}
    )
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule of the learning rate."})
    warmup_steps: float = field(
        default=0.02, metadata={"help": "Linear warm-up: a number of steps, or below 1 a share of all steps."}
    )
    adam_beta2: float = field(default=0.99, metadata={"help": "AdamW's second beta."})
    weight_decay: float = field(
        default=0.05, metadata={"help": "AdamW weight decay of matrices; norms and biases have none."}
    )
    num_train_epochs: float = field(default=100.0, metadata={"help": "Passes over the training data."})
    logging_steps: float = field(
        default=50, metadata={"help": "Log every so many steps, or below 1 a share of all steps."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Take columns away that are no inputs of the model before the collator."}
    )

    early_stopping_patience: int | None = field(
        default=None,
        metadata={"help": "Stop after so many evaluations without improvement and keep the best checkpoint."},
    )
    early_stopping_threshold: float = field(
        default=0.0, metadata={"help": "How much better the metric has to be to count as improvement."}
    )

    def __post_init__(self) -> None:
        if self.learning_rate is None:
            self.learning_rate = self.default_learning_rate
        if self.label_smoothing_factor != 0:
            raise ValueError(
                f"`label_smoothing_factor={self.label_smoothing_factor}` would replace the model's loss. Set "
                "`label_smoothing` in the model's config."
            )
        EBTTrainingArguments._prepare_early_stopping(self)
        super().__post_init__()


@dataclass
class GraphTrainingArguments(EnergyTransformerTrainingArguments):
    r"""
    [`EnergyTransformerTrainingArguments`] for classifying graphs. They are evaluated after every epoch, and the
    weights of the best one are kept:

    | option | default here |
    |---|---|
    | `learning_rate` | `None`: 1e-3, the paper's |
    | `warmup_steps` | 0.1 (the paper: 50 of 300 epochs) |
    | `per_device_train_batch_size`, `per_device_eval_batch_size` | 32, 128 (the paper: 64) |
    | `eval_strategy` | `"epoch"` |
    | `save_strategy`, `save_steps` | those of evaluation |
    | `load_best_model_at_end` | `None`: yes, if it is evaluated |
    | `metric_for_best_model` | `None`: `"accuracy"` |
    | `save_total_limit` | 2: the last checkpoint and the best |
    | `dataloader_pin_memory` | `False`: the tensors are small |

    Raises:
        ValueError: as [`EnergyTransformerTrainingArguments`].

    Example:

    ```python
    >>> from ebt_transformers.training.arguments_et import GraphTrainingArguments

    >>> GraphTrainingArguments(output_dir="runs/graphs").metric_for_best_model
    'accuracy'
    ```
    """

    default_learning_rate: ClassVar[float] = GRAPH_LEARNING_RATE
    default_metric: ClassVar[str] = "accuracy"

    warmup_steps: float = field(
        default=0.1, metadata={"help": "Linear warm-up: a number of steps, or below 1 a share of all steps."}
    )
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Graphs of a training step."})
    per_device_eval_batch_size: int = field(default=128, metadata={"help": "Graphs of an evaluation step."})
    eval_strategy: str = field(default="epoch", metadata={"help": "When to evaluate: no, steps or epoch."})
    save_strategy: str | None = field(
        default=None, metadata={"help": "When to save: no, steps, epoch or best. Default: when it is evaluated."}
    )
    load_best_model_at_end: bool | None = field(
        default=None, metadata={"help": "End with the best weights. Default: if it is evaluated in training."}
    )
    metric_for_best_model: str | None = field(
        default=None, metadata={"help": "What the best is measured by. Default: accuracy; of anomalies macro_f1."}
    )
    save_total_limit: int | None = field(
        default=2, metadata={"help": "Checkpoints to keep: by default the last one and the best."}
    )
    dataloader_pin_memory: bool = field(default=False, metadata={"help": "Keep batches in pinned memory."})

    def __post_init__(self) -> None:
        evaluates = getattr(self.eval_strategy, "value", self.eval_strategy)
        if self.save_strategy is None:
            self.save_strategy = evaluates if evaluates != "no" else "epoch"
            if evaluates == "steps":
                self.save_steps = self.eval_steps or self.logging_steps
        if self.load_best_model_at_end is None:
            self.load_best_model_at_end = evaluates != "no"
        if self.metric_for_best_model is None and (self.load_best_model_at_end or self.early_stopping_patience):
            self.metric_for_best_model = self.default_metric
        super().__post_init__()


@dataclass
class AnomalyTrainingArguments(GraphTrainingArguments):
    r"""
    [`GraphTrainingArguments`] for finding anomalous nodes of one graph, all of which is one step:

    | option | default here |
    |---|---|
    | `weight_decay` | 0 |
    | `adam_beta2` | 0.999 |
    | `warmup_steps` | 0 |
    | `logging_steps` | 10 |
    | `metric_for_best_model` | `None`: `"macro_f1"` |

    Raises:
        ValueError: as [`EnergyTransformerTrainingArguments`]; for batches of more than the one graph.

    Example:

    ```python
    >>> from ebt_transformers.training.arguments_et import AnomalyTrainingArguments

    >>> AnomalyTrainingArguments(output_dir="runs/anomaly").weight_decay
    0.0
    ```
    """

    default_metric: ClassVar[str] = "macro_f1"

    weight_decay: float = field(default=0.0, metadata={"help": "AdamW weight decay of matrices."})
    adam_beta2: float = field(default=0.999, metadata={"help": "AdamW's second beta."})
    warmup_steps: float = field(
        default=0, metadata={"help": "Linear warm-up: a number of steps, or below 1 a share of all steps."}
    )
    logging_steps: float = field(
        default=10, metadata={"help": "Log every so many steps, or below 1 a share of all steps."}
    )
    per_device_train_batch_size: int = field(default=1, metadata={"help": "1: a step sees the whole graph."})
    per_device_eval_batch_size: int = field(default=1, metadata={"help": "1: a step sees the whole graph."})

    def __post_init__(self) -> None:
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            if getattr(self, name) != 1:
                raise ValueError(
                    f"`{name}={getattr(self, name)}` has no meaning: every step sees the whole graph. Leave it out."
                )
        super().__post_init__()


__all__ = ["AnomalyTrainingArguments", "EnergyTransformerTrainingArguments", "GraphTrainingArguments"]
