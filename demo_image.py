"""
The demonstration behind `ebt demo --image`: what thinking does to a noisy picture, on the embedded model of images.

Everything printed is measured on the spot, but for one line about CIFAR-10: its images are not shipped, and what the
model and its Diffusion Transformer twin reached on them is read from the checkpoint's `results.json`.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .demo import RESULTS, find_checkpoint, loading, one_thread
from .reporting import of_steps, table


if TYPE_CHECKING:
    from PIL.Image import Image as PILImage
    from torch import Tensor

GRID = "denoising.png"
NUMBERS = "demo_image.json"
LONGEST_SIDE = 256  # larger pictures are shrunk: they take long, and show nothing more
BATCH_SIZE = 16  # tiles


@dataclass
class ImageSample:
    """
    A picture denoised with one number of thinking steps.

    Args:
        steps (`int`): thinking steps.
        psnr (`float`): of the result, in dB.
        energies (`list[float]`): before every step and after the last; the mean over tiles.
        milliseconds (`float`): what denoising the picture took.
    """

    steps: int
    psnr: float
    energies: list[float]
    milliseconds: float


@dataclass
class NoisyPicture:
    """A picture at one noise level: PSNR of the noisy picture, and what thinking made of it."""

    level: float
    noisy_psnr: float
    samples: list[ImageSample] = field(default_factory=list)

    @property
    def best(self) -> ImageSample:
        """The sample nearest to the clean picture."""
        return max(self.samples, key=lambda sample: sample.psnr)


@dataclass
class ImageDemoReport:
    """
    What the demonstration found.

    Args:
        picture (`str`): the file.
        size (`tuple[int, int]`): width and height it was denoised at.
        embedded (`bool`): whether the model is the embedded one.
        trained_steps (`int`): thinking steps of the model's training.
        trained_level (`float`, *optional*): noise level of its training, where the checkpoint's `results.json` has it.
        levels (`list[NoisyPicture]`): one per noise level.
        files (`list[str]`): pictures written.
        seconds (`float`): how long it all took.
    """

    picture: str
    size: tuple[int, int]
    embedded: bool
    trained_steps: int
    trained_level: float | None = None
    levels: list[NoisyPicture] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    seconds: float = 0.0


# ---- reading ---------------------------------------------------------------------------------------------------


def load_denoiser(source: str | Path | None = None, device: str | None = None) -> Any:
    """
    The pipeline `"image-denoising"` of a checkpoint.

    Args:
        source (`str` or `Path`, *optional*): a folder or a Hub id; `None` means the embedded checkpoint.
        device (`str`, *optional*): by default cuda where there is one.

    Raises:
        FileNotFoundError: if there is no such folder, or the embedded checkpoint is not there.
        ValueError: if the checkpoint cannot be read or does not denoise images, with the reason.
    """
    from .assets import image_checkpoint_path

    source = find_checkpoint(source, image_checkpoint_path())
    import torch
    import transformers

    from .pipelines.image_denoising import TASK

    with loading(source):
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        model = transformers.AutoModelForImageToImage.from_pretrained(source)
        return transformers.pipeline(TASK, model=model, image_processor=str(source), device=device)


def read_picture(path: Path) -> "PILImage":
    """
    A picture in RGB, upright, no side longer than `LONGEST_SIDE`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no picture.
        ImportError: without pillow.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no picture {path}.")
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise ImportError("Pictures need the library pillow: pip install 'ebt-transformers[image]'.") from error
    try:
        with Image.open(path) as opened:
            picture = ImageOps.exif_transpose(opened).convert("RGB")
    except Exception as error:  # pillow's decoders raise errors of many kinds
        raise ValueError(f"Cannot read {path} as a picture: {error}") from error
    picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    return picture


def recorded_results(source: str | Path | None) -> dict[str, Any]:
    """A checkpoint's `results.json`; empty where there is none."""
    from .assets import image_checkpoint_path

    path = (image_checkpoint_path() if source is None else Path(source)) / RESULTS
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


# ---- measuring -------------------------------------------------------------------------------------------------


def clean_tensor(denoiser: Any, picture: Any) -> "Tensor":
    """The clean picture `(C, H, W)` on 0..1, in the channels of the model."""
    prepared = denoiser.preprocess(picture)["prepared"]
    height, width = prepared["size"]
    return (prepared["pixel_values"][:, :height, :width] + 1) / 2


def psnr(picture: "Tensor", clean: "Tensor") -> float:
    """PSNR in dB of a picture `(C, H, W)` on 0..1."""
    from .training.quality import image_psnr

    return image_psnr(2 * picture[None] - 1, 2 * clean[None] - 1).item()


def denoise_picture(
    denoiser: Any, picture: "PILImage", level: float, steps: Sequence[int], seed: int = 0
) -> tuple[NoisyPicture, dict[str, "Tensor"]]:
    """
    Adds noise to a clean picture and denoises it with every number of thinking steps.

    Args:
        denoiser ([`ImageDenoisingPipeline`]): the model.
        picture (`PIL.Image.Image`): the clean picture.
        level (`float`): noise, as a share of the way to pure noise.
        steps (sequence of `int`): numbers of thinking steps.
        seed (`int`, *optional*, defaults to 0): of the noise.

    Returns:
        What was measured, and the pictures `(C, H, W)` on 0..1 by name: `clean`, `noisy` and the numbers of steps.
    """
    clean = clean_tensor(denoiser, picture)
    options = {"add_noise_level": level, "noise_seed": seed, "output_type": "pt", "batch_size": BATCH_SIZE}
    pictures = {"clean": clean}
    found = NoisyPicture(level, 0.0)
    for count in steps:
        result = denoiser(picture, thinking_steps=count, output_energies=True, **options)
        if "noisy" not in pictures:
            pictures["noisy"] = result["noisy_image"]
            found.noisy_psnr = psnr(result["noisy_image"], clean)
        pictures[str(count)] = result["image"]
        started = time.perf_counter()
        denoiser(picture, thinking_steps=count, **options)  # again without energies, which cost a forward pass more
        milliseconds = 1000 * (time.perf_counter() - started)
        found.samples.append(ImageSample(count, psnr(result["image"], clean), result["energies"], milliseconds))
    return found, pictures


# ---- saying ----------------------------------------------------------------------------------------------------


def _about_level(report: ImageDemoReport, noisy: NoisyPicture) -> str:
    best = noisy.best
    text = f"at noise {noisy.level:g}"
    if report.trained_level is not None:
        than = "more than" if noisy.level > report.trained_level else "less than"
        text += " (that of training)" if noisy.level == report.trained_level else f" ({than} in training)"
    text += f" {of_steps(best.steps)} {'was' if best.steps == 1 else 'were'} best"
    trained = next((sample for sample in noisy.samples if sample.steps == report.trained_steps), None)
    if trained is best:
        text += ", as many as in training"
    elif trained is not None:
        text += f", {best.psnr - trained.psnr:.1f} dB better than the {trained.steps} of training"
    return text


def verdict(report: ImageDemoReport) -> str:
    """What the numbers say about thinking longer, in one sentence."""
    text = "; ".join(_about_level(report, noisy) for noisy in report.levels)
    text = text[0].upper() + text[1:]
    # the best and the longest of every level where they are not the same
    pairs = [(noisy.best, noisy.samples[-1]) for noisy in report.levels if noisy.best is not noisy.samples[-1]]
    if pairs:
        losses = " and ".join(f"{best.psnr - last.psnr:.1f}" for best, last in pairs)
        # that it is blur can be seen, and is measured nowhere: of other models nothing of the kind is known
        harm = "blurred the picture" if report.embedded else "led away from the clean picture"
        text += f"; more steps than that {harm} ({of_steps(pairs[0][1].steps)}: {losses} dB worse)"
        if all(last.energies[-1] < best.energies[-1] for best, last in pairs):
            text += ", though the energy went on falling"
    return text + "."


def about_results(results: Mapping[str, Any]) -> str:
    """One line on what is recorded about a model and its twin; empty where nothing is."""
    if not all("psnr" in results.get(kind, {}) for kind in ("ebt", "dit")):
        return ""
    parts = []
    for level, by_steps in results["ebt"]["psnr"].items():
        steps, value = max(by_steps.items(), key=lambda item: item[1])
        runs = [run for protocol in results["dit"]["psnr"][level].values() for run in protocol.items()]
        passes, twin = max(runs, key=lambda run: run[1])
        parts.append(
            f"noise {level}: {value:.2f} dB with {of_steps(int(steps))}, the twin {twin:.2f} dB with {passes} "
            f"pass{'es' if passes != '1' else ''}"
        )
    return f"Recorded on {results['data']}, for this model and its Diffusion Transformer twin: {'; '.join(parts)}."


def quality_table(levels: Sequence[NoisyPicture]) -> str:
    """PSNR, energies and time of every level and number of steps; `*` marks the best of a level."""
    rows = []
    for noisy in levels:
        rows.append([f"{noisy.level:g}", "noisy", f"{noisy.noisy_psnr:.2f}  ", "", "", ""])
        for sample in noisy.samples:
            mark = "*" if sample is noisy.best else " "
            energies = [f"{energy:.4f}" for energy in (sample.energies[0], sample.energies[-1])]
            cells = [str(sample.steps), f"{sample.psnr:.2f} {mark}", *energies, f"{sample.milliseconds:.0f}"]
            rows.append([f"{noisy.level:g}", *cells])
    return table(["noise", "steps", "PSNR in dB", "energy before", "energy after", "ms"], rows)


def energy_table(levels: Sequence[NoisyPicture]) -> str:
    """The energies of the most steps of every level, step by step: noise levels are the columns."""
    paths = [noisy.samples[-1].energies for noisy in levels]
    rows = [
        [str(count), *(f"{energy:.4f}" for energy in energies)]
        for count, energies in enumerate(zip(*paths, strict=True))
    ]
    return table(["steps taken", *(f"noise {noisy.level:g}" for noisy in levels)], rows)


# ---- drawing ---------------------------------------------------------------------------------------------------


def pixels(picture: "Tensor") -> Any:
    """A picture `(C, H, W)` on 0..1 as bytes `(H, W, C)`, or `(H, W)` if grey."""
    pixels = (picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    return pixels[..., 0] if pixels.shape[-1] == 1 else pixels


def draw_denoising(
    levels: Sequence[NoisyPicture], pictures: Sequence[Mapping[str, "Tensor"]], title: str, path: Path
) -> None:
    """
    Draws a row for every noise level: the clean picture, the noisy one, and every number of steps.

    Args:
        levels (sequence of [`NoisyPicture`]): what was measured.
        pictures (sequence of mappings): of every level the pictures by name, as `denoise_picture` returns them.
        title (`str`): over everything.
        path (`Path`): the PNG to write.

    Raises:
        ImportError: without matplotlib.
    """
    from matplotlib.figure import Figure

    names = list(pictures[0])
    height, width = pictures[0]["clean"].shape[-2:]
    cell = 1.75
    size = (cell * len(names), (cell * height / width + 0.3) * len(levels) + 0.5)
    figure = Figure(figsize=size, layout="compressed")  # the layout for pictures, which keep their shape
    figure.suptitle(title, fontsize=12)
    grid = figure.subplots(len(levels), len(names), squeeze=False)
    for row, (noisy, shown) in enumerate(zip(levels, pictures, strict=True)):
        values = {"noisy": noisy.noisy_psnr, **{str(sample.steps): sample.psnr for sample in noisy.samples}}
        for column, name in enumerate(names):
            axes = grid[row, column]
            axes.imshow(pixels(shown[name]), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            if row == 0:
                axes.set_title(of_steps(int(name)) if name.isdigit() else name, fontsize=10)
            if name in values:
                best = name == str(noisy.best.steps)
                text = f"{values[name]:.2f} dB" + (", best" if best else "")
                axes.set_xlabel(text, fontsize=9, labelpad=3, fontweight="bold" if best else "normal")
        grid[row, 0].set_ylabel(f"noise {noisy.level:g}", fontsize=10)
    figure.savefig(path, dpi=150, bbox_inches="tight", pad_inches=0.1)


def _save_single(
    levels: Sequence[NoisyPicture], pictures: Sequence[Mapping[str, "Tensor"]], folder: Path
) -> list[str]:
    """Every picture in a file of its own."""
    from PIL import Image

    files = {}
    for noisy, shown in zip(levels, pictures, strict=True):
        for name, picture in shown.items():
            of_steps = f"_{name}_steps" if name.isdigit() else ""
            label = name if name == "clean" else f"{'denoised' if of_steps else name}_{noisy.level:g}{of_steps}"
            files[str(folder / f"{label}.png")] = picture
    for file, picture in files.items():
        Image.fromarray(pixels(picture)).save(file)
    return list(files)


# ---- the demonstration -----------------------------------------------------------------------------------------


def _check(levels: Sequence[float], steps: Sequence[int]) -> None:
    if not levels or not 0 < levels[0] <= levels[-1] <= 1:
        raise ValueError(f"`levels` must be numbers above 0 and at most 1, got {levels}.")
    if not steps or steps[0] < 1:
        raise ValueError(f"`steps` must be integers of at least 1, got {steps}.")


def run_image_demo(
    picture: str | Path | None = None,
    model: str | None = None,
    levels: Sequence[float] = (0.1, 0.2),
    steps: Sequence[int] = (1, 2, 3, 4, 8),
    seed: int = 0,
    output_dir: str = "ebt_demo",
    say: Callable[[str], None] = print,
) -> ImageDemoReport:
    """
    Adds noise to a picture and denoises it with several numbers of thinking steps.

    Args:
        picture (`str` or `Path`, *optional*): another picture than the embedded one; large ones are shrunk.
        model (`str`, *optional*): another checkpoint than the embedded one.
        levels (sequence of `float`, *optional*): noise levels, as shares of the way to pure noise.
        steps (sequence of `int`, *optional*): the numbers of thinking steps to compare.
        seed (`int`, *optional*, defaults to 0): of the noise.
        output_dir (`str`, *optional*): where the pictures and the numbers go.
        say (`Callable`, *optional*): takes what is to be printed.

    Raises:
        ValueError, FileNotFoundError: for a picture or a checkpoint that cannot be loaded, and for bad options.
        ImportError: without pillow or diffusers.
    """
    from transformers.utils.logging import tqdm

    from .assets import example_picture_path
    from .modeling_ebt.latents import need_diffusers

    levels, steps = sorted(set(levels)), sorted(set(steps))
    _check(levels, steps)
    started = time.perf_counter()
    path = example_picture_path() if picture is None else Path(picture)
    image = read_picture(path)
    need_diffusers("The noise of this demonstration")
    denoiser = load_denoiser(model, device="cpu")
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    config = denoiser.model.config
    results = recorded_results(model)
    report = ImageDemoReport(
        path.name, image.size, model is None, config.default_thinking().steps, results.get("trained_noise_level")
    )
    parameters = sum(parameter.numel() for parameter in denoiser.model.parameters())
    say(
        f"{'The embedded model' if model is None else model}: {parameters / 1e6:.2f} M parameters, "
        f"{config.num_hidden_layers} layers of width {config.hidden_size}, images of "
        f"{' x '.join(map(str, config.height_and_width))}, trained to think {of_steps(report.trained_steps)}"
        + ("." if report.trained_level is None else f" at noise {report.trained_level:g}.")
    )
    say(f"The picture: {path.name}, {image.width} x {image.height}, in overlapping tiles where larger than those.")
    shown = []
    with one_thread():
        for level in tqdm(levels, desc="Denoising", unit="level"):
            found, pictures = denoise_picture(denoiser, image, level, steps, seed)
            report.levels.append(found)
            shown.append(pictures)
    say("\nPSNR to the clean picture (higher is better, * the best), and the mean energy of the tiles:\n")
    say(quality_table(report.levels))
    say(f"\nThe energy on the way, with {of_steps(steps[-1])}:\n")
    say(energy_table(report.levels))
    say("\n" + verdict(report))
    if recorded := about_results(results):
        say("\n" + recorded)

    try:
        draw_denoising(report.levels, shown, f"{path.name}, denoised by descending its energy", folder / GRID)
        report.files = [str(folder / GRID)]
        say(f"\nThe pictures side by side: {folder / GRID}")
    except ImportError:
        report.files = _save_single(report.levels, shown, folder)
        say(
            f"\nThe pictures: {len(report.files)} PNG files in {folder}. "
            "(Side by side they need matplotlib: pip install 'ebt-transformers[plot]'.)"
        )
    report.seconds = time.perf_counter() - started
    numbers = json.dumps({**asdict(report), "model": model or "embedded", "seed": seed}, indent=2)
    (folder / NUMBERS).write_text(numbers + "\n", encoding="utf-8")
    say(f"All numbers: {folder / NUMBERS} ({report.seconds:.0f} s in all)")
    return report


__all__ = [
    "ImageDemoReport",
    "ImageSample",
    "NoisyPicture",
    "denoise_picture",
    "draw_denoising",
    "load_denoiser",
    "pixels",
    "read_picture",
    "run_image_demo",
    "verdict",
]
