"""Model cards: what was trained, on what, by which command, how well it does, and what thinking longer does to it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.utils import logging

from . import card_et
from . import card_sections as sections
from .card_facts import (
    CardFacts,
    RunFacts,
    card_metadata,
    hub_ids,
    installed_versions,
    is_image_model,
    number,
    thinks,
)
from .card_measurements import ThinkingMeasurement, measure_thinking, same_random_state, some_rows
from .card_plot import draw_thinking
from .card_thinking import cost, thinking


if TYPE_CHECKING:
    from torch import nn
    from transformers import Trainer

logger = logging.get_logger(__name__)

CARD, PLOT = "README.md", "energy.png"
GIVEN = (  # what `Trainer.create_model_card` takes
    *("language", "license", "tags", "model_name", "finetuned_from", "tasks", "dataset_tags", "dataset"),
    "dataset_args",
)


# ---- from a run to facts ---------------------------------------------------------------------------------------


def trained_model(trainer: "Trainer") -> "nn.Module":
    """The model itself: not what distributes or compiles it, nor what holds its adapters."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    model = getattr(model, "_orig_mod", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def card_facts(trainer: "Trainer", title: str, given: Mapping[str, Any] | None = None) -> CardFacts:
    """
    What a trainer knows about its run.

    Args:
        trainer (`transformers.Trainer`): its log history holds the metrics, its `run_facts`, if any, the rest.
        title (`str`): the model's name, unless `given` has one or it goes to the Hub.
        given (`dict`, *optional*): what `Trainer.create_model_card` was given.

    Returns:
        [`CardFacts`].

    Raises:
        TypeError: for something that `create_model_card` does not take.
    """
    metadata = {name: value for name, value in (given or {}).items() if value is not None}
    unknown = sorted(set(metadata) - set(GIVEN))
    if unknown:
        raise TypeError(f"Unknown argument(s) {', '.join(unknown)} for a model card. Allowed: {', '.join(GIVEN)}.")
    on_hub = getattr(trainer, "hub_model_id", None) or trainer.args.hub_model_id
    title = metadata.get("model_name") or (on_hub.split("/")[-1] if on_hub else title)
    history = trainer.state.log_history
    return CardFacts(
        title=title,
        location=on_hub or title,
        run=getattr(trainer, "run_facts", None) or RunFacts(),
        results=_results(history, trained_model(trainer)),
        history=history,
        training=_training_options(trainer),
        versions=installed_versions(),
        metadata=metadata,
    )


def _results(history: list[dict[str, Any]], model: "nn.Module") -> dict[str, float]:
    if card_et.covers(model):
        return card_et.found_results(history)
    return {name: found for name in sections.RESULTS if (found := _last(history, name)) is not None}


def _last(history: list[dict[str, Any]], name: str) -> Any:
    return next((entry[name] for entry in reversed(history) if name in entry), None)


def _training_options(trainer: "Trainer") -> dict[str, str]:
    args, state, model = trainer.args, trainer.state, trained_model(trainer)
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    rows = "images" if is_image_model(model) else "sequences"
    if card_et.covers(model):
        rows = card_et.rows_of(model)
    options = {"recipe": getattr(args, "recipe", "s1")} if thinks(model) else {}
    options |= {
        "steps": f"{state.global_step} of {state.max_steps}, {batch} {rows} each",
        "optimiser": f"{args.optim.value}, weight decay {args.weight_decay}, "
        f"gradient norm at most {args.max_grad_norm}",
        "learning rate": f"{args.learning_rate} ({args.lr_scheduler_type.value}, warm-up {args.warmup_steps})",
    }
    step_size_rate = getattr(trainer, "step_size_learning_rate", None)
    if thinks(model) and step_size_rate is not None and model.config.learn_step_size:
        options["learning rate of the step size"] = number(step_size_rate())
    precision = args.mixed_precision if args.mixed_precision != "no" else "fp32"
    return {**options, "seed": str(args.seed), "precision": precision}


# ---- from a run to a measurement -------------------------------------------------------------------------------


def card_measurement(trainer: "Trainer") -> ThinkingMeasurement | None:
    """
    What thinking does on a few validation rows of a trainer; no other process takes part.

    Args:
        trainer (`transformers.Trainer`): with an `eval_dataset`.

    Returns:
        [`ThinkingMeasurement`], or `None` where there is nothing to measure: a model that does not think or is spread
        over processes, no validation data. A measurement that fails is logged and gives `None`, too: the weights are
        saved, and a card must not cost the rest of the run.
    """
    model = trained_model(trainer)
    if not thinks(model) or trainer.eval_dataset is None or _is_sharded(trainer, model):
        return None
    try:
        with same_random_state(model.device):  # reading rows may draw, too
            rows = some_rows(trainer.eval_dataset)
            # the collator that the trainer's own loaders use: it drops columns the model does not take
            collate = trainer._get_collator_with_removed_columns(trainer.data_collator)
            return measure_thinking(model, collate(rows)) if rows else None
    except Exception as error:  # whatever users' data, collators and devices may raise
        logger.warning(f"The model card has no measurement of thinking: {type(error).__name__}: {error}")
        return None


def _is_sharded(trainer: "Trainer", model: "nn.Module") -> bool:
    """Whether one process alone cannot run the model."""
    spread = any(hasattr(parameter, "full_tensor") for parameter in model.parameters())
    return spread or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled


# ---- writing ---------------------------------------------------------------------------------------------------


def write_card(
    folder: str | Path,
    model: "nn.Module",
    facts: CardFacts,
    measured: ThinkingMeasurement | None = None,
    more: Mapping[str, str] | None = None,
    measured_on: str = "validation data",
) -> Path:
    """
    Write a model card, `README.md`, and its picture, `energy.png`, into a folder with a saved model. Without
    matplotlib the picture is left out.

    Args:
        folder (`str` or `Path`): where to write.
        model (`nn.Module`): the model that is saved there.
        facts ([`CardFacts`]): what is known of its training.
        measured ([`ThinkingMeasurement`], *optional*): what thinking does in it.
        more (mapping of heading to markdown, *optional*): further sections, before the limits; one
            called `Licence` replaces the usual one.
        measured_on (`str`, *optional*, defaults to `"validation data"`): the rows of that measurement, in words.

    Returns:
        `Path` of the card.

    Example:

    ```python
    >>> import tempfile
    >>> from ebt_transformers import EBTConfig, EBTForCausalLM
    >>> from ebt_transformers.training.model_card import CardFacts, RunFacts, write_card

    >>> model = EBTForCausalLM(EBTConfig.from_preset("4xs", vocab_size=32))
    >>> facts = CardFacts("tiny", "me/tiny", RunFacts(data="a book", license="apache-2.0"))
    >>> write_card(tempfile.mkdtemp(), model, facts).name
    'README.md'
    ```
    """
    from huggingface_hub import ModelCard

    folder = Path(folder)
    words: Any = card_et if card_et.covers(model) else sections
    text: dict[str, str] = {"Use": words.use(model, facts.location, _carries_code(folder, model))}
    if facts.results or facts.history:
        text["Results"] = words.results(facts, model)
    if thinks(model):
        plot = None if measured is None else _draw(measured, folder / PLOT)
        text["Thinking longer"] = thinking(model, facts.location, measured, plot, measured_on)
        text["What thinking costs"] = cost(model, measured)
    further = dict(more or {})
    licence = facts.metadata.get("license") or facts.run.license
    last = further.pop("Licence", f"The weights are under the licence `{licence}`." if licence else "")
    text |= {
        **further,
        "Limits": words.limits(facts, model),
        "Training": sections.training(facts),
        "Model": words.architecture(model),
        "Versions": sections.versions(facts),
        "Licence": last,
        "Citation": words.citation(facts),
    }
    body = "\n\n".join(f"## {heading}\n\n{content}" for heading, content in text.items() if content)
    metadata = card_et.metadata if words is card_et else card_metadata
    head = metadata(facts, model, "peft" if (folder / "adapter_config.json").is_file() else _library(model))
    card = ModelCard(f"---\n{head.to_yaml()}\n---\n\n# {facts.title}\n\n{words.summary(model)}\n\n{body}\n")
    card.save(folder / CARD)
    return folder / CARD


def _library(model: "nn.Module") -> str:
    """What loads the saved model: a DiT twin is saved as diffusers does."""
    return "diffusers" if hasattr(model, "dit") else "transformers"


def _carries_code(folder: Path, model: "nn.Module") -> bool:
    """Whether a saved model brings its code; of one that is not saved yet, whether it will."""
    config = folder / "config.json"
    if config.is_file():
        return "auto_map" in json.loads(config.read_text(encoding="utf-8"))
    return not (folder / "adapter_config.json").is_file() and getattr(model, "_auto_class", None) is not None


def _draw(measured: ThinkingMeasurement, path: Path) -> str | None:
    try:
        draw_thinking(measured, path)
    except ImportError:
        return None
    return path.name


def write_model_card(trainer: "Trainer", folder: str | Path, **card_data: Any) -> Path:
    """
    Write the card of a trainer's model (see [`write_card`]) into a folder where it is saved.

    Args:
        trainer (`transformers.Trainer`): the trainer; its log history holds the losses, its `run_facts` the rest. On a
            few rows of its `eval_dataset`, if it has one, thinking is measured.
        folder (`str` or `Path`): where to write.
        card_data: what `Trainer.create_model_card` takes; wins over what is written otherwise.

    Returns:
        `Path` of the card.

    Raises:
        TypeError: for something that `create_model_card` does not take.
    """
    facts = card_facts(trainer, Path(folder).resolve().name, card_data)
    return write_card(folder, trained_model(trainer), facts, card_measurement(trainer))


__all__ = [
    "CardFacts",
    "RunFacts",
    "card_facts",
    "card_measurement",
    "hub_ids",
    "is_image_model",
    "write_card",
    "write_model_card",
]
