"""What a model card says about thinking: how to think longer, whether it pays in this model, and what it costs."""

from typing import TYPE_CHECKING

from ..reporting import of_steps, table
from .card_facts import is_image_model, number, predicts_at_start, python_block
from .card_measurements import ThinkingMeasurement, compared_steps, thinking_passes


if TYPE_CHECKING:
    from transformers import PreTrainedModel

# less than this on so few rows is no difference worth a word
UNITS = {"text": ("nats", 0.005), "pixels": ("dB", 0.05), "latents": ("of the loss", 0.0)}


def thinking(
    model: "PreTrainedModel", location: str, measured: ThinkingMeasurement | None, plot: str | None, data: str
) -> str:
    """
    How to think longer, and whether it pays in this very model.

    Args:
        model (`PreTrainedModel`): the model.
        location (`str`): what `from_pretrained` takes.
        measured ([`ThinkingMeasurement`], *optional*): what to report.
        plot (`str`, *optional*): the name of its picture.
        data (`str`): what it was measured on, in words.
    """
    code = _think_about_images(location)
    if not is_image_model(model):
        code = _think_about_text(location, measured, predicts_at_start(model))
    if measured is None:
        return f"{python_block(code)}\n\nWhether more steps pay was not measured for this card."
    rows = f"{measured.rows} images" if measured.kind != "text" else f"{measured.positions} tokens"
    about = f"Measured on {rows} of the {data} when this card was written: a hint of what to expect, no benchmark."
    parts = [python_block(code), about, _by_steps(measured), verdict(measured)]
    if plot is not None:
        parts.append(f"![Mean energy and {quality_name(measured)} at every thinking step]({plot})")
    if measured.start_loss is not None:
        parts.append(
            "With 0 steps the model is an ordinary language model: what its context predicts, and no thinking."
        )
    if measured.landscapes > 1:
        first = "0" if measured.landscapes == 2 else f"0 to {measured.landscapes - 2}"
        parts.append(f"Energies at {first} steps are of other landscapes than the later ones, and do not compare.")
    return "\n\n".join(parts)


def _think_about_text(location: str, measured: ThinkingMeasurement | None, predicts_at_start: bool) -> str:
    target = "" if measured is None else f"{measured.energies[measured.steps[-1]]:.3g}"
    stop = (
        "\n# a token stops at an energy, here the mean of validation tokens at rest"
        f"\nmodel.generate(**inputs, thinking_steps=8, thinking_target_energy={target})"
        if target
        else ""
    )
    if predicts_at_start:
        stop += "\nmodel.generate(**inputs, thinking_steps=0)  # none at all: an ordinary language model"
    return f"""
import ebt_transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

generate = pipeline("text-generation", model="{location}")
generate("Once", max_new_tokens=20, thinking_steps=8)

model = AutoModelForCausalLM.from_pretrained("{location}")
inputs = AutoTokenizer.from_pretrained("{location}")("Once", return_tensors="pt")
model.generation_config.max_new_tokens = 20
model.generate(**inputs, thinking_steps=8)  # more steps for every token
model.generate(**inputs, thinking_candidates=4)  # four starts a token, the lowest energy wins
model.generate(**inputs, thinking_steps=16, thinking_tolerance=1e-3)  # a token stops when its energy does{stop}"""


def _think_about_images(location: str) -> str:
    return f"""
import ebt_transformers
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageToImage, pipeline

denoise = pipeline("image-denoising", model="{location}")
denoise("noisy.png", thinking_steps=8)

model = AutoModelForImageToImage.from_pretrained("{location}")
processor = AutoImageProcessor.from_pretrained("{location}")
noisy = processor(Image.open("noisy.png"), return_tensors="pt")["pixel_values"]
model(noisy, thinking_steps=8).reconstruction  # more steps for every image
model(noisy, thinking_candidates=4, thinking_noise_std=0.05)  # four descents with noise, the lowest energy wins
target = model.suggest_target_energy(noisy)  # better: of a hundred images with the noise of training
model(noisy, thinking_steps=8, thinking_target_energy=target).steps_taken  # an image stops at that energy"""


def quality_name(measured: ThinkingMeasurement) -> str:
    """What is compared."""
    return "loss" if measured.psnr is None else "PSNR"


def _by_steps(measured: ThinkingMeasurement) -> str:
    """Quality and energy of the compared numbers of steps, with the start."""
    column = {"text": "loss in nats", "pixels": "PSNR in dB", "latents": "loss"}[measured.kind]
    digits = 4 if measured.psnr is None else 2
    rows = []
    for steps in sorted({0, *measured.steps}):
        notes = ["start"] if steps == 0 else []
        notes += ["default"] if steps == measured.default_steps else []
        name = f"{steps} ({', '.join(notes)})" if notes else str(steps)
        value = f"{measured.value(steps):.{digits}f}" if steps >= measured.curve[0] else ""
        rows.append([name, value, number(measured.energies[steps])])
    return table(["thinking steps", column, "mean energy"], rows)


def verdict(measured: ThinkingMeasurement) -> str:
    """Whether thinking pays, where it can be left out, and whether more or less than by default does, in words."""
    unit, least = UNITS[measured.kind]
    default = measured.default_steps
    if default not in measured.steps:
        default = next(steps for steps in measured.steps if steps > 0)
    flops = dict(zip(measured.steps, measured.flops, strict=True))
    gains = {steps: measured.quality(steps) - measured.quality(default) for steps in measured.steps}

    def compared(steps: int, against: int = default) -> str:
        gain, factor = gains[steps] - gains[against], flops[steps] / flops[against]
        better = "better" if gain > 0 else "worse"
        words = f"{number(abs(gain))} {unit} {better} than {against}"
        return f"{of_steps(steps)}: {words}, for {factor:.2g} times the operations"

    best, longest = measured.best_steps, measured.steps[-1]
    text = ""
    if measured.steps[0] == 0 < default:
        against_none = compared(default, 0)
        if gains[0] < -least:
            text = f"Thinking pays here ({against_none}). "
        elif gains[0] > least:
            text = f"Thinking does not pay here ({against_none}). "
        else:
            text = f"Thinking makes no difference worth its cost here ({against_none}). "
    longer = max((steps for steps in measured.steps if steps >= default), key=lambda steps: gains[steps])
    if gains[longer] > least:
        text += f"Thinking longer than by default pays here ({compared(longer)})."
    elif longest == default:
        text += "Nothing longer than the default was measured."
    elif gains[longest] < -least:
        text += f"Thinking longer than by default does not pay here ({compared(longest)})."
    else:
        text += f"Thinking longer than by default makes no difference worth its cost here ({compared(longest)})."
    if 0 < best < default and gains[best] > least:
        text += f" Thinking less does pay ({compared(best)})."
    return text


def cost(model: "PreTrainedModel", measured: ThinkingMeasurement | None) -> str:
    """Passes of the transformer for one prediction, and counted operations where there was something to count on."""
    steps = compared_steps(model) if measured is None else measured.steps
    header = ["thinking steps", "forward passes", "backward passes"]
    rows = [[str(count), *map(str, thinking_passes(model, count))] for count in steps]
    if measured is not None:
        header.append("FLOPs of one plain forward")
        rows = [[*row, f"{factor:.1f}x"] for row, factor in zip(rows, measured.flops, strict=True)]
    text = f"For one prediction, with one candidate:\n\n{table(header, rows)}\n\n"
    if is_image_model(model):
        text += "A step is a forward and a backward pass of all patches; candidates multiply everything."
    else:
        text += (
            "The context is read once per energy landscape, and in `generate` comes from the cache for all tokens but "
            "the last; every step is a forward and a backward pass of the candidates alone. More candidates multiply "
            "the steps, not the context."
        )
    if predicts_at_start(model):
        text += " 0 steps read the context once and look at no candidate: the cost of an ordinary language model."
    if measured is not None:
        unit = "patches" if is_image_model(model) else "tokens"
        text += (
            f" Operations are counted by PyTorch's formulas on {measured.counted_on} {unit}, against one "
            f"forward pass of the same transformer{'' if is_image_model(model) else ' and an output layer'}: what a "
            "model of this size costs that does not think. Time also depends on the machine."
        )
    return text


__all__ = ["cost", "quality_name", "thinking", "verdict"]
