"""The tab "Denoise": adds noise to a picture, and shows every step back."""

from pathlib import Path
from typing import Any

from PIL import Image

from ..assets import example_picture_path
from ..demo_image import LONGEST_SIDE, pixels, read_picture, recorded_results
from ..modeling_ebt.latents import need_diffusers
from ..reporting import of_steps
from .denoising import PictureWalk, learn_target_energy, watch_picture
from .parts import MOST_STEPS, ONE_AT_A_TIME, PRIVATE, about_model, as_message, gr, threads_for
from .plots import draw_denoising_curves


def about_picture(walk: PictureWalk) -> str:
    """One line on a picture: PSNR from noisy over the best to the last, and the energies."""
    best = max(range(len(walk.psnrs)), key=lambda step: walk.psnrs[step])
    return (
        f"Noisy {walk.psnrs[0]:.2f} dB, best {walk.psnrs[best]:.2f} dB after {of_steps(best)}, at the end "
        f"{walk.psnrs[-1]:.2f} dB. Energy {walk.energies[0]:.4f} → {walk.energies[-1]:.4f}, "
        f"{of_steps(walk.steps_taken)} taken."
    )


def captioned_pictures(walk: PictureWalk) -> list[tuple[Image.Image, str]]:
    """Every picture of a walk with its caption."""
    names = ["noisy", *(of_steps(count) for count in range(1, len(walk.pictures)))]
    return [
        (Image.fromarray(pixels(picture)), f"{name}: {quality:.1f} dB")
        for picture, name, quality in zip(walk.pictures, names, walk.psnrs, strict=True)
    ]


def _read(path: Path) -> Image.Image:
    """An uploaded picture. Where the server keeps it is nothing a visitor should read."""
    try:
        return read_picture(path)
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"Cannot read {path.name} as a picture. Upload a PNG, a JPEG or the like.") from error


class DenoiseTab:
    """
    The tab that adds noise to a picture and shows every step back. It keeps nothing between calls.

    Args:
        denoiser ([`ImageDenoisingPipeline`]): the model.
        source (`str`, *optional*): where it comes from; `None` is the embedded one.
    """

    def __init__(self, denoiser: Any, source: str | None = None) -> None:
        need_diffusers("The noise of the tab Denoise")
        self.denoiser, self.source = denoiser, source
        self.trained_level = recorded_results(source).get("trained_noise_level")
        self.target: float | None = None
        if self.trained_level is not None and denoiser.model.config.vae_name_or_path is None:
            with threads_for(denoiser.model):
                self.target = round(learn_target_energy(denoiser, self.trained_level), 4)

    def denoise(
        self, picture: str | None, level: float, steps: int, stops: bool, target: float | None, seed: int
    ) -> tuple[Any, ...]:
        """Pictures, curves and a line about one picture."""
        with as_message(), threads_for(self.denoiser.model):
            if picture is None:
                raise ValueError("There is no picture. Upload one, or take the astronaut.")
            goal = target if stops else None
            if stops and goal is None:
                raise ValueError("There is no target energy. Give a number, or let every step be taken.")
            image = _read(Path(picture))
            walk = watch_picture(self.denoiser, image, float(level), int(steps), goal, int(seed))
        return captioned_pictures(walk), draw_denoising_curves(walk), about_picture(walk)

    def build(self) -> None:
        """Lays out the tab, inside of a `gr.Blocks`."""
        example = str(example_picture_path())
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                picture = gr.Image(
                    example,
                    type="filepath",
                    sources=["upload", "clipboard"],
                    label=f"A clean picture (large ones are shrunk to {LONGEST_SIDE} pixels)",
                    height=230,
                    elem_id="picture",
                )
                # the component's own reading of a broken file ends in a traceback, ours in a message
                setattr(picture, "preprocess", lambda payload: None if payload is None else payload.path)  # noqa: B010
                astronaut = gr.Button("Take the astronaut", size="sm", elem_id="astronaut")
                trained = "" if self.trained_level is None else f" The model was trained with {self.trained_level:g}."
                level = gr.Slider(
                    *(0.02, 0.5, 0.2),
                    step=0.02,
                    label="Noise",
                    info=f"As a share of the way to pure noise.{trained}",
                    elem_id="level",
                )
                steps = gr.Slider(1, MOST_STEPS, 6, step=1, label="Thinking steps", elem_id="image_steps")
                stops = gr.Checkbox(
                    False,
                    label="Stop by the energy",
                    info="Every tile stops thinking once its energy is at most the target.",
                    elem_id="stops",
                )
                target = gr.Number(self.target, label="Target energy", step=0.001, elem_id="target")
                seed = gr.Number(0, minimum=0, precision=0, label="Seed of the noise")
                button = gr.Button("Denoise", variant="primary", elem_id="denoise")
            with gr.Column(scale=2, min_width=420):
                line = gr.Markdown(
                    "Denoise a picture to see it walk down its energy, step by step.", elem_id="picture_line"
                )
                gallery = gr.Gallery(
                    show_label=False,
                    columns=4,
                    height="auto",
                    object_fit="contain",
                    format="png",
                    buttons=["download", "fullscreen"],
                    elem_id="gallery",
                )
                curves = gr.Plot(show_label=False, format="png", elem_id="curves")
        gr.Markdown(about_model(self.denoiser.model, self.source))
        inputs, outputs = [picture, level, steps, stops, target, seed], [gallery, curves, line]
        button.click(self.denoise, inputs, outputs, **ONE_AT_A_TIME)
        astronaut.click(lambda: example, None, picture, **PRIVATE)


__all__ = ["DenoiseTab", "about_picture", "captioned_pictures"]
