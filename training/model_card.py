"""Model cards: what was trained, on what, by which command, and how well it does."""

import platform
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from torch import nn
    from transformers import Trainer


@dataclass
class RunFacts:
    """
    What a training script knows and the trainer does not.

    Args:
        data (`str`, *optional*): the training data in words.
        dataset (`str`, *optional*): its name on the Hub, for the metadata.
        command (`str`, *optional*): the command that starts the same training again.
        license (`str`, *optional*): license of the weights.
        base_model (`str`, *optional*): the checkpoint training started from.
        notes (`list[str]`, *optional*): further lines, one per item.
    """

    data: str | None = None
    dataset: str | None = None
    command: str | None = None
    license: str | None = None
    base_model: str | None = None
    notes: list[str] = field(default_factory=list)


TEMPLATE = """---
{{ card_data }}
---

# {{ title }}

{{ summary }}

## Use

```python
{% if image and thinks %}import ebt_transformers  # registers the model type and the pipeline
from transformers import pipeline

denoise = pipeline("image-denoising", model="{{ location }}")
denoise("noisy.png", thinking_steps=3)
{% elif image %}from ebt_transformers.training.dit_twin import ddim_denoise, load_dit

dit, scheduler = load_dit("{{ location }}")
images = ddim_denoise(dit, noisy, scheduler, start_timestep=99, num_steps=100)  # noisy: (B, C, H, W), -1..1
{% else %}{% if thinks %}import ebt_transformers  # registers the model type
{% endif %}from transformers import pipeline

generate = pipeline("text-generation", model="{{ location }}")
print(generate("Once", max_new_tokens=50{{ ", thinking_steps=4" if thinks else "" }}))
{% endif %}```

## Results

| measure | value |
|---|---|
{% for name, value in results %}| {{ name }} | {{ value }} |
{% endfor %}
{{ explanation }}
{% if curve %}
| step | {{ curve_names | join(" | ") }} |
|{{ "---|" * (curve_names | length + 1) }}
{% for row in curve %}| {{ row | join(" | ") }} |
{% endfor %}{% endif %}
## Training

{% for name, value in training %}- **{{ name }}**: {{ value }}
{% endfor %}{% if command %}
```bash
{{ command }}
```
{% endif %}{% for note in notes %}
{{ note }}
{% endfor %}
## Model

{% for name, value in model %}- **{{ name }}**: {{ value }}
{% endfor %}
## Versions

{% for name, value in versions %}- {{ name }} {{ value }}
{% endfor %}"""

_CURVE = (
    *("loss", "initial_loss", "final_loss", "energy_gap", "step_size"),
    *("eval_loss", "eval_perplexity", "eval_psnr"),
)
_CURVE_ROWS = 20
_ARCHITECTURE = (
    "vocab_size",
    "image_size",
    "sample_size",
    "patch_size",
    "num_channels",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_layers",
    "num_attention_heads",
    "attention_head_dim",
    "max_position_embeddings",
    "step_conditioning",
    "num_landscapes",
    "candidate_embedding",
    "update",
    "image_conditioning",
    "candidate_init",
    "reconstruction_loss",
    "vae_name_or_path",
)
_METRICS = {"perplexity": "text-generation", "psnr": "image-to-image"}  # of evaluations, with their tasks


def is_image_model(model: "nn.Module") -> bool:
    """Whether a model takes images and predicts images."""
    return getattr(model, "main_input_name", None) == "pixel_values"


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _last(history: list[dict[str, Any]], name: str) -> Any:
    return next((entry[name] for entry in reversed(history) if name in entry), None)


def _versions() -> list[tuple[str, str]]:
    found = [("Python", platform.python_version())]
    for name in ("ebt-transformers", "torch", "transformers", "diffusers", "accelerate", "datasets"):
        try:
            found.append((name, version(name)))
        except PackageNotFoundError:
            continue
    return found


def _curve(history: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    by_step: dict[int, dict[str, Any]] = {}
    for entry in history:
        values = {name: entry[name] for name in _CURVE if name in entry}
        if values:
            by_step.setdefault(entry["step"], {}).update(values)
    names = [name for name in _CURVE if any(name in values for values in by_step.values())]
    steps = sorted(by_step)
    stride = max(1, -(-len(steps) // _CURVE_ROWS))
    shown = [step for position, step in enumerate(reversed(steps)) if position % stride == 0][::-1]
    return names, [[str(step), *(_number(by_step[step].get(name, "")) for name in names)] for step in shown]


def _training_facts(trainer: "Trainer", facts: RunFacts, thinks: bool, unit: str) -> list[tuple[str, Any]]:
    args, state = trainer.args, trainer.state
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    rows: list[tuple[str, Any]] = [("data", facts.data or "not recorded")]
    if thinks:
        rows.append(("recipe", getattr(args, "recipe", "s1")))
    rows += [
        ("steps", f"{state.global_step} of {state.max_steps}, {batch} {unit} each"),
        (
            "optimiser",
            f"{args.optim.value}, weight decay {args.weight_decay}, gradient norm at most {args.max_grad_norm}",
        ),
        ("learning rate", f"{args.learning_rate} ({args.lr_scheduler_type.value}, warm-up {args.warmup_steps})"),
    ]
    learns = getattr(trainer, "step_size_learning_rate", None)
    if thinks and learns is not None and getattr(trainer.model.config, "learn_step_size", False):
        rows.append(("learning rate of the step size", _number(learns())))
    rows += [("seed", args.seed), ("precision", args.mixed_precision if args.mixed_precision != "no" else "fp32")]
    return rows


def _described(config: Any, model: "nn.Module", name: str) -> Any:
    """A field of a model's config; of what it wraps, for a twin that has none."""
    if config is None:
        config = getattr(getattr(model, "dit", None), "config", None)
    value = getattr(config, name, None)
    return None if callable(value) else value


def _explanation(thinks: bool, image: bool, config: Any) -> str:
    """What the numbers of a card mean."""
    if not image:
        after = ", of the prediction after the last thinking step" if thinks else ""
        return f"The loss is the mean cross-entropy per token in nats{after};\nperplexity is its exponential."
    if not thinks:
        return "The loss is the mean squared error of the predicted noise."
    kind = {"smooth_l1": "smooth L1 distance", "mse": "squared error", "l1": "absolute error"}[
        config.reconstruction_loss
    ]
    of_what = "latents" if config.vae_name_or_path else "pixels (-1..1)"
    return (
        f"The loss is the mean {kind} of {of_what} after the last thinking step. PSNR is the mean over images, on\n"
        "pixels clamped to 0..255. Every image has the same noise in every evaluation."
    )


def write_model_card(trainer: "Trainer", folder: str | Path, **card_data: Any) -> Path:
    """
    Write `README.md` into a folder with a saved model.

    Args:
        trainer (`transformers.Trainer`): the trainer; its log history holds the losses, its `run_facts` the rest.
        folder (`str` or `Path`): where to write.
        card_data: what `Trainer.create_model_card` takes; wins over what is written otherwise.

    Returns:
        `Path` of the file.
    """
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    facts: RunFacts = getattr(trainer, "run_facts", None) or RunFacts()
    given = {name: value for name, value in card_data.items() if value is not None}
    config = getattr(trainer.model, "config", None)
    thinks = hasattr(config, "num_landscapes")
    model = trainer.accelerator.unwrap_model(trainer.model)
    image = is_image_model(model)
    task = "image-to-image" if image else "text-generation"
    history = trainer.state.log_history
    title = given.get("model_name") or Path(folder).resolve().name
    results: list[tuple[str, Any]] = []
    evaluated: list[EvalResult] = []
    labels = {
        "train_loss": "training loss, mean over the run",
        "initial_loss": "training loss after the first thinking step, at the end",
        "final_loss": "training loss after the last thinking step, at the end",
        "eval_loss": "validation loss",
        "eval_perplexity": "validation perplexity",
        "eval_psnr": "validation PSNR in dB",
        "test_loss": "test loss",
        "test_perplexity": "test perplexity",
        "test_psnr": "test PSNR in dB",
    }
    dataset = given.get("dataset") or facts.dataset or facts.data or "not recorded"
    for name, label in labels.items():
        value = _last(history, name)
        if value is None:
            continue
        results.append((label, _number(value)))
        prefix, metric = name.split("_", 1)
        if metric in _METRICS:
            split = "validation" if prefix == "eval" else "test"
            evaluated.append(
                EvalResult(
                    task_type=_METRICS[metric],
                    dataset_type=str(facts.dataset or ("images" if image else "text")),
                    dataset_name=str(dataset),
                    dataset_split=split,
                    metric_type=metric,
                    metric_name=f"{split} {metric}",
                    metric_value=float(value),
                )
            )
    names, rows = _curve(history)
    tags = [given["tags"]] if isinstance(given.get("tags"), str) else list(given.get("tags", []))
    tags += [tag for tag in (["energy-based-model", "ebt"] if thinks else []) if tag not in tags]
    on_hub = given.get("dataset_tags") or facts.dataset
    data = ModelCardData(
        model_name=title,
        library_name="transformers",
        pipeline_tag=given.get("tasks") if isinstance(given.get("tasks"), str) else task,
        language=given.get("language"),
        license=given.get("license") or facts.license,
        base_model=given.get("finetuned_from") or facts.base_model,
        datasets=[on_hub] if isinstance(on_hub, str) else on_hub,
        tags=tags or None,
        eval_results=evaluated or None,
        ignore_metadata_errors=True,
    )
    kind = type(model).__name__
    explanation = _explanation(thinks, image, config)
    if thinks and image:
        summary = (
            f"An Energy-Based Transformer (`{kind}`, arXiv 2507.02092): it gives every image an energy and denoises "
            "by lowering it, one gradient step per thinking step."
        )
    elif image:
        summary = (
            "A Diffusion Transformer trained to predict noise, the twin an Energy-Based Transformer is compared with "
            "(arXiv 2507.02092)."
        )
    elif thinks:
        summary = (
            f"An Energy-Based Transformer (`{kind}`, arXiv 2507.02092): it gives every continuation an energy and "
            "predicts by lowering it, one gradient step per thinking step."
        )
    else:
        summary = f"A language model (`{kind}`) trained with the ebt-transformers training script."
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    card = ModelCard.from_template(
        data,
        template_str=TEMPLATE,
        title=title,
        summary=summary,
        location=title,
        thinks=thinks,
        image=image,
        explanation=explanation,
        results=results,
        curve_names=names,
        curve=rows,
        training=_training_facts(trainer, facts, thinks, "images" if image else "sequences"),
        command=facts.command,
        notes=facts.notes,
        model=[
            ("parameters", f"{parameters:,}"),
            *((name, value) for name in _ARCHITECTURE if (value := _described(config, model, name)) is not None),
        ],
        versions=_versions(),
    )
    path = Path(folder) / "README.md"
    card.save(path)
    return path


__all__ = ["RunFacts", "is_image_model", "write_model_card"]
