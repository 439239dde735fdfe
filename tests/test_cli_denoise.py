"""Laws of `ebt denoise`: a PNG and a line for each picture, inputs never overwritten, one line for a mistake."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ebt_transformers import EBTForImageDenoising, EBTImageConfig, cli


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model with a flat energy, which returns every picture as it is; saved."""
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    size = {"image_size": 16, "patch_size": 4, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    EBTForImageDenoising(EBTImageConfig(**size)).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """Two pictures in the current folder, by their file names."""
    monkeypatch.chdir(tmp_path)
    draw = np.random.default_rng(0)
    sizes = {"small.png": (16, 16, 3), "large.bmp": (18, 30, 3)}
    found = {name: draw.integers(0, 256, size, dtype=np.uint8) for name, size in sizes.items()}
    for name, picture in found.items():
        Image.fromarray(picture).save(name)
    return found


@pytest.fixture
def denoise(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, list[str], str]]:
    """Runs `ebt denoise` with the model; exit status, lines printed, standard error."""

    def run(*argv: str) -> tuple[int, list[str], str]:
        model = [] if "--model" in argv else ["--model", checkpoint]
        capsys.readouterr()
        status = cli.main(["denoise", *argv, *model])
        shown = capsys.readouterr()
        return status, shown.out.splitlines(), shown.err

    return run


Denoise = Callable[..., tuple[int, list[str], str]]


def opened(path: str | Path) -> np.ndarray:
    return np.array(Image.open(path))


def test_every_picture_gets_a_file_and_a_line(denoise: Denoise, pictures: dict[str, np.ndarray]) -> None:
    status, lines, error = denoise(*pictures, "--output_dir", "out/here", "--batch-size", "2")
    assert (status, error) == (0, "")
    assert lines == ["small.png -> out/here/small.png", "large.bmp -> out/here/large.png"]
    for name, picture in pictures.items():
        assert np.array_equal(opened(Path("out/here") / Path(name).with_suffix(".png")), picture)


def test_energies_and_noise_as_text_and_as_json(denoise: Denoise, pictures: dict[str, np.ndarray]) -> None:
    options = ["--thinking-steps", "3", "--add-noise-level", "0.1", "--output-energies"]
    status, (line,), _ = denoise("small.png", *options)
    assert status == 0 and "(noisy: denoised/small_noisy.png)" in line
    assert line.endswith("energies 0.0000 0.0000 0.0000 0.0000  steps 3")
    assert np.array_equal(opened("denoised/small.png"), opened("denoised/small_noisy.png"))
    noisy = opened("denoised/small_noisy.png")
    assert not np.array_equal(noisy, pictures["small.png"])
    _, lines, _ = denoise(*pictures, *options, "--json", "--noise-seed", "1")
    records = [json.loads(line) for line in lines]
    assert [record["input"] for record in records] == list(pictures)
    assert records[0]["noisy"] == "denoised/small_noisy.png"
    assert [len(record["energies"]) for record in records] == [4, 4] and records[1]["steps_taken"] == 3
    assert not np.array_equal(opened("denoised/small_noisy.png"), noisy)


def test_noise_of_the_picture_and_tiles(denoise: Denoise, pictures: dict[str, np.ndarray]) -> None:
    assert denoise("large.bmp", "--noise-std", "127.5", "--tile-size", "0")[0] == 0
    expected = ((pictures["large.bmp"] / 127.5 - 1) / np.sqrt(2) + 1) * 127.5
    assert np.abs(opened("denoised/large.png") - expected).max() < 0.51
    assert denoise("large.bmp", "--tile-size", "8", "--tile-overlap", "2")[0] == 0
    assert np.array_equal(opened("denoised/large.png"), pictures["large.bmp"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["small.png", "--output_dir", "."], "would overwrite the input small.png"),
        (["small.png", "small.png"], "Two pictures would be written to denoised/small.png"),
        (["nowhere.png"], "There is no image file nowhere.png"),
        (["text.png"], "cannot identify image file"),
        (["small.png", "--model", "./nowhere"], "There is no checkpoint folder ./nowhere."),
        (["small.png", "--thinking-steps", "0"], "`thinking_steps` must be at least 1 for this model"),
        (["small.png", "--thinking-stepps", "2"], "Did you mean --thinking-steps?"),
        (["small.png", "--noise-std", "-1"], "`noise_std` must be"),
        (["small.png", "--noise-std", "9", "--add-noise-level", "0.1"], "Give one of them"),
        (["small.png", "--tile-size", "7"], "multiples of 4"),
        (["small.png", "--batch-size", "0"], "`batch_size` must be an integer of at least 1"),
    ],
)
def test_mistakes_are_one_line(
    denoise: Denoise, pictures: dict[str, np.ndarray], argv: list[str], message: str
) -> None:
    Path("text.png").write_text("no picture")
    status, lines, error = denoise(*argv)
    assert (status, lines) == (2, [])
    assert message in error and error.endswith("\n") and error.count("\n") == 1
    assert np.array_equal(opened("small.png"), pictures["small.png"])


def test_a_model_is_needed_and_must_denoise(
    denoise: Denoise,
    pictures: dict[str, np.ndarray],
    make_model: Callable,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["denoise", "small.png"]) == 2
    assert "--model is missing" in capsys.readouterr().err
    make_model().save_pretrained(tmp_path / "text")
    status, _, error = denoise("small.png", "--model", str(tmp_path / "text"))
    assert status == 2 and "Cannot load" in error and error.count("\n") == 1


def test_help_lists_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["--help"])
    assert "denoise pictures" in capsys.readouterr().out
    with pytest.raises(SystemExit) as leaving:
        cli.main(["denoise", "--help"])
    assert leaving.value.code == 0 and "--noise_std" in capsys.readouterr().out
