"""Denoise a picture step by step, and let its energy say when to stop.

python examples/denoise_picture.py --picture photo.png
"""

import argparse
from collections.abc import Sequence

from PIL import Image
from transformers import pipeline

import ebt_transformers  # noqa: F401  registers the pipeline
from ebt_transformers.assets import example_picture_path, image_checkpoint_path


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--picture", default=str(example_picture_path()), help="a clean picture; noise is added")
    parser.add_argument("--noise_level", type=float, default=0.2, help="share of the way to pure noise")
    parser.add_argument("--output", default="denoised.png")
    options = parser.parse_args(argv)

    denoiser = pipeline("image-denoising", model=str(image_checkpoint_path()))
    pictures = []
    for steps in (1, 2, 3, 4):
        result = denoiser(
            options.picture, add_noise_level=options.noise_level, thinking_steps=steps, output_energies=True
        )
        pictures = pictures or [result["noisy_image"]]
        pictures.append(result["image"])
        print(f"{steps} steps: energy {' -> '.join(f'{energy:.2f}' for energy in result['energies'])}")
    strip = Image.new("RGB", (sum(picture.width for picture in pictures), pictures[0].height))
    for number, picture in enumerate(pictures):
        strip.paste(picture, (number * picture.width, 0))
    strip.save(options.output)
    print(f"The noisy picture, then 1 to 4 steps: {options.output}")


if __name__ == "__main__":
    main()
