"""What a model card says about a training run, as plain data: it can be kept as JSON and written out again."""

import math
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard


if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData
    from torch import nn
    from transformers import PreTrainedModel

TASKS = {"perplexity": "text-generation", "psnr": "image-to-image"}  # what an evaluation's metric belongs to
SPLITS = {"eval": "validation", "test": "test"}
PACKAGE = "ebt-transformers"
LIBRARIES = ("torch", "transformers", "diffusers", "accelerate", "datasets", "peft")


@dataclass
class RunFacts:
    """
    What a training script knows and the trainer does not.

    Args:
        data (`str`, *optional*): the training data in words.
        dataset (`str`, *optional*): its name on the Hub, for the metadata.
        command (`str`, *optional*): the command that starts the same training again.
        license (`str`, *optional*): licence of the weights, as the Hub names it (`"apache-2.0"`).
        base_model (`str`, *optional*): the checkpoint training started from.
        notes (`list[str]`, *optional*): further lines, one per item.
        limits (`list[str]`, *optional*): what the model should not be used for, one per item.
    """

    data: str | None = None
    dataset: str | None = None
    command: str | None = None
    license: str | None = None
    base_model: str | None = None
    notes: list[str] = field(default_factory=list)
    limits: list[str] = field(default_factory=list)


@dataclass
class CardFacts:
    """
    Everything a card says that neither the model nor a measurement tells.

    Args:
        title (`str`): the model's name.
        location (`str`): what `from_pretrained` takes in the card's examples: a Hub id, or the folder's name.
        run ([`RunFacts`]): what the training script knows.
        results (`dict[str, float]`, *optional*): last values of the metrics, named as in the logs (`eval_loss`).
        history (`list[dict]`, *optional*): the trainer's log, rows with a `step`.
        training (`dict[str, str]`, *optional*): options of the training, in the order they are shown.
        versions (`dict[str, str]`, *optional*): of Python and the libraries.
        metadata (`dict`, *optional*): what `Trainer.create_model_card` was given; wins over everything else.

    Example:

    ```python
    >>> from ebt_transformers.training.card_facts import CardFacts, RunFacts

    >>> facts = CardFacts("tiny", "me/tiny", RunFacts(data="a book"), results={"eval_loss": 3.5})
    >>> CardFacts.from_dict(facts.to_dict()) == facts
    True
    ```
    """

    title: str
    location: str
    run: RunFacts = field(default_factory=RunFacts)
    results: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    training: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "CardFacts":
        """What [`to_dict`] gave."""
        return cls(**{**values, "run": RunFacts(**values.get("run", {}))})


def is_image_model(model: "nn.Module") -> bool:
    """Whether a model takes images and predicts images."""
    return getattr(model, "main_input_name", None) == "pixel_values"


def thinks(model: "nn.Module") -> "TypeGuard[PreTrainedModel]":
    """Whether a model predicts by descending an energy."""
    return hasattr(getattr(model, "config", None), "num_landscapes")


def predicts_at_start(model: "nn.Module") -> bool:
    """Whether a model's thinking starts at a prediction, so that 0 steps are an ordinary language model."""
    return getattr(getattr(model, "config", None), "starts_at_prediction", False)


def installed_versions() -> dict[str, str]:
    """Python and the libraries that take part in a training, those that are installed."""
    from .. import __version__

    found = {"Python": platform.python_version(), PACKAGE: __version__}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def number(value: Any) -> str:
    """A cell of a table: four digits of a float."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def python_block(code: str) -> str:
    """A block of Python in markdown."""
    return f"```python\n{code.strip()}\n```"


def _listed(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])


def hub_ids(names: str | list[str] | None) -> list[str]:
    """Those that can be names on the Hub: a card with a path among them is refused there."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    found = []
    for name in _listed(names):
        try:
            validate_repo_id(name)
        except HFValidationError:
            continue
        if not Path(name).exists():
            found.append(name)
    return found


def _eval_results(facts: CardFacts, image: bool) -> "list[EvalResult]":
    """The metrics of validation and test, as the Hub lists them."""
    from huggingface_hub import EvalResult

    given, run = facts.metadata, facts.run
    named = _listed(given.get("dataset")) or [run.dataset or run.data or "not recorded"]
    ids = hub_ids(given.get("dataset_tags")) or hub_ids(run.dataset)
    found = []
    for name, value in facts.results.items():
        prefix, _, metric = name.partition("_")
        if prefix in SPLITS and metric in TASKS and math.isfinite(value):
            result = EvalResult(
                task_type=TASKS[metric],
                dataset_type=ids[0] if ids else ("images" if image else "text"),
                dataset_name=", ".join(named),
                dataset_config=", ".join(_listed(given.get("dataset_args"))) or None,
                dataset_split=SPLITS[prefix],
                metric_type=metric,
                metric_name=f"{SPLITS[prefix]} {metric}",
                metric_value=float(value),
            )
            found.append(result)
    return found


def card_metadata(facts: CardFacts, model: "nn.Module", library: str = "transformers") -> "ModelCardData":
    """
    The head of a card, which the Hub reads.

    Args:
        facts ([`CardFacts`]): the run.
        model (`nn.Module`): tells the task.
        library (`str`, *optional*, defaults to `"transformers"`): what loads the saved model.
    """
    from huggingface_hub import ModelCardData

    given, run = facts.metadata, facts.run
    image = is_image_model(model)
    tasks = _listed(given.get("tasks")) or ["image-to-image" if image else "text-generation"]
    tags = [*_listed(given.get("tags")), *tasks[1:], *(getattr(model, "model_tags", None) or [])]
    bases = hub_ids(given.get("finetuned_from") or run.base_model)
    return ModelCardData(
        model_name=facts.title,
        library_name=library,
        pipeline_tag=tasks[0],
        language=given.get("language"),
        license=given.get("license") or run.license,
        base_model=bases[0] if bases else None,
        datasets=hub_ids(given.get("dataset_tags") or run.dataset) or None,
        tags=list(dict.fromkeys(tags)) or None,
        eval_results=_eval_results(facts, image) or None,
    )


__all__ = [
    "PACKAGE",
    "CardFacts",
    "RunFacts",
    "card_metadata",
    "hub_ids",
    "installed_versions",
    "is_image_model",
    "number",
    "predicts_at_start",
    "python_block",
    "thinks",
]
