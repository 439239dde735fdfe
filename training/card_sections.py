"""The text of a model card, section by section, as markdown."""

from typing import TYPE_CHECKING, Any

from ..reporting import table
from .card_facts import PACKAGE, CardFacts, is_image_model, number, predicts_at_start, python_block, thinks


if TYPE_CHECKING:
    from torch import nn

CURVE = (
    *("loss", "proposal_loss", "initial_loss", "final_loss", "energy_gap", "step_size"),
    *("eval_loss", "eval_perplexity", "eval_psnr"),
)
CURVE_ROWS = 20
RESULTS = {
    "train_loss": "training loss, mean over the run",
    "proposal_loss": "training loss before the first thinking step, at the end",
    "initial_loss": "training loss after the first thinking step, at the end",
    "final_loss": "training loss after the last thinking step, at the end",
    "eval_loss": "validation loss",
    "eval_perplexity": "validation perplexity",
    "eval_psnr": "validation PSNR in dB",
    "test_loss": "test loss",
    "test_perplexity": "test perplexity",
    "test_psnr": "test PSNR in dB",
}
ARCHITECTURE = (
    *("vocab_size", "image_size", "sample_size", "patch_size", "num_channels", "hidden_size", "intermediate_size"),
    *("num_hidden_layers", "num_layers", "num_attention_heads", "attention_head_dim", "max_position_embeddings"),
    *("step_conditioning", "num_landscapes", "candidate_embedding", "candidate_anchor", "update"),
    *("image_conditioning", "candidate_init", "reconstruction_loss", "vae_name_or_path"),
)
PROPOSAL = ("proposal_loss_weight",)  # what means something for models that start at a prediction only
DISTANCES = {"smooth_l1": "smooth L1 distance", "mse": "squared error", "l1": "absolute error"}
ENERGY_LIMIT = "Energies are on this model's own scale, never to be compared between models."
PAPER = """@article{gladstone2025ebt,
  title   = {Energy-Based Transformers are Scalable Learners and Thinkers},
  author  = {Gladstone, Alexi and Nanduru, Ganesh and Islam, Md Mofijul and Han, Peixuan and Ha, Hyeonjeong and
             Chadha, Aman and Du, Yilun and Ji, Heng and Li, Jundong and Iqbal, Tariq},
  journal = {arXiv preprint arXiv:2507.02092},
  year    = {2025}
}"""
SOFTWARE = """@software{ebt_transformers,
  title   = {ebt-transformers: Energy-Based Transformers for Hugging Face},
  author  = {{The ebt-transformers authors}},
  version = {VERSION},
  license = {Apache-2.0}
}"""


def bullets(items: dict[str, Any]) -> str:
    """Names and values as a list in markdown."""
    return "\n".join(f"- **{name}**: {value}" for name, value in items.items())


# ---- what it is, and how to use it -----------------------------------------------------------------------------


def summary(model: "nn.Module") -> str:
    """What kind of model it is."""
    kind = type(model).__name__
    if not thinks(model):
        if is_image_model(model):
            return (
                "A Diffusion Transformer trained to predict noise, the twin an Energy-Based Transformer is compared "
                "with ([arXiv 2507.02092](https://arxiv.org/abs/2507.02092))."
            )
        return f"A language model (`{kind}`) trained with the ebt-transformers training script."
    does = "every continuation an energy and predicts by lowering it"
    if is_image_model(model):
        does = "every image an energy and denoises by lowering it"
    text = (
        f"An Energy-Based Transformer (`{kind}`, [arXiv 2507.02092](https://arxiv.org/abs/2507.02092)): it gives "
        f"{does}, one gradient step per thinking step."
    )
    if predicts_at_start(model):
        text += " It starts at what its context predicts; with 0 thinking steps it is an ordinary language model."
    return text


def use(model: "nn.Module", location: str, carries_code: bool) -> str:
    """
    How to load it: with the package, and without.

    Args:
        model (`nn.Module`): the model.
        location (`str`): what `from_pretrained` takes.
        carries_code (`bool`): whether the saved model holds the code it needs.
    """
    if not thinks(model):
        return python_block(_use_twin(is_image_model(model), location))
    if is_image_model(model):
        code = f"""
import ebt_transformers  # registers the models and the pipeline
from transformers import pipeline

denoise = pipeline("image-denoising", model="{location}")
denoise("noisy.png", thinking_steps=3)["image"].save("denoised.png")"""
    else:
        code = f"""
import ebt_transformers  # registers the models
from transformers import pipeline

generate = pipeline("text-generation", model="{location}")
print(generate("Once", max_new_tokens=50, thinking_steps=4)[0]["generated_text"])"""
    if not carries_code:
        return f"{python_block(code)}\n\nThe package brings the code: none travels with these weights."
    auto = "AutoModelForImageToImage" if is_image_model(model) else "AutoModelForCausalLM"
    remote = f"""
from transformers import {auto}

model = {auto}.from_pretrained("{location}", trust_remote_code=True)"""
    without = "Without the package, by the code that travels with the weights:"
    return "\n\n".join([python_block(code), without, python_block(remote)])


def _use_twin(image: bool, location: str) -> str:
    if image:
        return f"""
from ebt_transformers.training.dit_twin import ddim_denoise, load_dit

dit, scheduler = load_dit("{location}")
images = ddim_denoise(dit, noisy, scheduler, start_timestep=99, num_steps=100)  # noisy: (B, C, H, W), -1..1"""
    return f"""
from transformers import pipeline

generate = pipeline("text-generation", model="{location}")
print(generate("Once", max_new_tokens=50)[0]["generated_text"])"""


# ---- how well it does ------------------------------------------------------------------------------------------


def results(facts: CardFacts, model: "nn.Module") -> str:
    """The metrics, what they mean, and the training curve."""
    rows = [[label, number(facts.results[name])] for name, label in RESULTS.items() if name in facts.results]
    parts = [table(["measure", "value"], rows)] if rows else []
    parts += [_explanation(model), curve(facts.history)]
    return "\n\n".join(part for part in parts if part)


def _explanation(model: "nn.Module") -> str:
    """What the numbers mean."""
    if not is_image_model(model):
        after = ", of the prediction after the last thinking step" if thinks(model) else ""
        return f"The loss is the mean cross-entropy per token in nats{after}; perplexity is its exponential."
    if not thinks(model):
        return "The loss is the mean squared error of the predicted noise."
    of_what = "latents" if model.config.vae_name_or_path else "pixels (-1..1)"
    return (
        f"The loss is the mean {DISTANCES[model.config.reconstruction_loss]} of {of_what} after the last thinking "
        "step. PSNR is the mean over images, on pixels clamped to 0..255. Every image has the same noise in every "
        "evaluation."
    )


def curve(history: list[dict[str, Any]], columns: tuple[str, ...] = CURVE) -> str:
    """The log as a table of at most 20 rows, the last one always among them, with those of the columns it has."""
    by_step: dict[int, dict[str, Any]] = {}
    for entry in history:
        values = {name: entry[name] for name in columns if name in entry}
        if values:
            by_step.setdefault(entry["step"], {}).update(values)
    if not by_step:
        return ""
    names = [name for name in columns if any(name in values for values in by_step.values())]
    steps = sorted(by_step)
    stride = -(-len(steps) // CURVE_ROWS)
    rows = [[str(step), *(number(by_step[step].get(name, "")) for name in names)] for step in steps[::-stride][::-1]]
    return table(["step", *names], rows)


# ---- what to know ----------------------------------------------------------------------------------------------


def limits(facts: CardFacts, model: "nn.Module") -> str:
    """What the model cannot do, or nobody has looked at."""
    items = list(facts.run.limits)
    items.append("One training run. Nobody has examined its data, or what it says or shows, for bias or harm.")
    longest = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if isinstance(longest, int) and not is_image_model(model):
        items.append(f"It takes at most {longest} tokens; generated text ends there.")
    if thinks(model):
        needs = (
            "Thinking takes gradients at inference: no flash attention for the candidates, and no export to runtimes "
            "without automatic differentiation."
        )
        if predicts_at_start(model):
            needs += " With 0 steps there is no thinking: the model is an ordinary language model, and needs none."
        items.append(needs)
        within = "" if is_image_model(model) else " Compare them between candidates for one position only."
        items.append(f"{ENERGY_LIMIT}{within}")
        if is_image_model(model) and not facts.run.limits:
            items.append("Noise of another kind or strength than in training was not tried for this card.")
    return "\n".join(f"- {item}" for item in items)


def training(facts: CardFacts) -> str:
    """Data, options and command of the run."""
    parts = [bullets({"data": facts.run.data or "not recorded", **_base(facts), **facts.training})]
    if facts.run.command:
        parts.append(f"```bash\n{facts.run.command}\n```")
    return "\n\n".join([*parts, *facts.run.notes])


def _base(facts: CardFacts) -> dict[str, str]:
    base = facts.metadata.get("finetuned_from") or facts.run.base_model
    return {"started from": base} if base else {}


def architecture(model: "nn.Module") -> str:
    """Size and shape."""
    total = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    items: dict[str, Any] = {"parameters": f"{total:,}"}
    if trained < total:
        items["trained parameters"] = f"{trained:,}"
    config = getattr(model, "config", None) or getattr(getattr(model, "dit", None), "config", None)
    names = ARCHITECTURE + (PROPOSAL if predicts_at_start(model) else ())
    values = ((name, getattr(config, name, None)) for name in names)
    items.update((name, value) for name, value in values if value is not None and not callable(value))
    return bullets(items)


def versions(facts: CardFacts) -> str:
    """Of Python and the libraries."""
    return "\n".join(f"- {name} {value}" for name, value in facts.versions.items())


def citation(facts: CardFacts) -> str:
    """BibTeX of the paper and of this software."""
    software = SOFTWARE.replace("VERSION", facts.versions.get(PACKAGE, "unknown"))
    return f"```bibtex\n{PAPER}\n\n{software}\n```"


__all__ = [
    "architecture",
    "bullets",
    "citation",
    "curve",
    "limits",
    "results",
    "summary",
    "training",
    "use",
    "versions",
]
