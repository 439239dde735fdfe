"""Files that ship with the package: Tiny Shakespeare, a picture and three small checkpoints."""

from pathlib import Path


__all__ = [
    "checkpoint_path",
    "completion_checkpoint_path",
    "example_picture_path",
    "image_checkpoint_path",
    "shakespeare_path",
    "shakespeare_splits",
]

_FOLDER = Path(__file__).resolve().parent


def shakespeare_path() -> Path:
    """Return the text file of Tiny Shakespeare (public domain, 1.1 MB, ASCII)."""
    return _FOLDER / "tiny_shakespeare.txt"


def checkpoint_path() -> Path:
    """Return the folder of the embedded checkpoint; ``from_pretrained`` takes it as it is."""
    return _FOLDER / "tiny_ebt"


def image_checkpoint_path() -> Path:
    """Return the folder of the embedded model that denoises images; ``from_pretrained`` takes it as it is."""
    return _FOLDER / "tiny_ebt_image"


def completion_checkpoint_path() -> Path:
    """Return the folder of the embedded Energy Transformer that completes images; ``from_pretrained`` takes it."""
    return _FOLDER / "tiny_et"


def example_picture_path() -> Path:
    """Return a picture to denoise (128 x 128, RGB): a portrait of the astronaut Eileen Collins by NASA, public domain.

    It is the region (96, 0) to (352, 256) of ``skimage.data.astronaut()``, at half its size (Lanczos).
    """
    return _FOLDER / "astronaut.png"


def shakespeare_splits() -> dict[str, str]:
    """Return Tiny Shakespeare as ``train`` (first 90 %), ``validation`` (next 5 %) and ``test`` (last 5 %).

    The shares are counted in characters, each cut moved back to the start of its line. Joined in this order the
    three parts are the whole text.
    """
    text = shakespeare_path().read_bytes().decode("utf-8")  # bytes: no platform may translate the line ends
    first, second = (text.rfind("\n", 0, len(text) * percent // 100) + 1 for percent in (90, 95))
    return {"train": text[:first], "validation": text[first:second], "test": text[second:]}
