"""The demonstration on a picture: its numbers are the model's, and the shipped model is what it says."""

import builtins
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageToImage, pipeline

from ebt_transformers import EBTForImageDenoising, EBTImageConfig, cli, demo_image
from ebt_transformers.assets import (
    checkpoint_path,
    example_picture_path,
    image_checkpoint_path,
    record_image_results,
)
from ebt_transformers.demo_image import (
    ImageDemoReport,
    ImageSample,
    NoisyPicture,
    about_results,
    denoise_picture,
    load_denoiser,
    read_picture,
    run_image_demo,
    verdict,
)
from ebt_transformers.training.quality import image_psnr


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model that changes pictures, saved."""
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    size = {"image_size": 8, "patch_size": 4, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = EBTForImageDenoising(EBTImageConfig(**size, step_size=0.5))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3) if parameter.dim() > 1 else None
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def picture(tmp_path: Path) -> str:
    pixels = np.random.default_rng(0).integers(0, 256, (10, 14, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "little.png")
    return str(tmp_path / "little.png")


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes a library impossible to import."""
    real = builtins.__import__

    def hide(name: str) -> None:
        def importing(wanted: str, *args: Any, **kwargs: Any) -> Any:
            if wanted.split(".")[0] == name:
                raise ImportError(f"No module named {wanted!r}")
            return real(wanted, *args, **kwargs)

        monkeypatch.setattr(builtins, "__import__", importing)

    return hide


def silent(_: str) -> None:
    pass


# ---- the demonstration -----------------------------------------------------------------------------------------


def test_the_report_holds_what_the_model_gives(checkpoint: str, picture: str, tmp_path: Path) -> None:
    said: list[str] = []
    threads = torch.get_num_threads()
    folder = tmp_path / "out"
    options = {"levels": (0.2, 0.1), "steps": (3, 1), "seed": 4, "output_dir": str(folder)}
    report = run_image_demo(picture, checkpoint, say=said.append, **options)
    assert (report.picture, report.size, report.embedded) == ("little.png", (14, 10), False)
    assert [noisy.level for noisy in report.levels] == [0.1, 0.2]

    denoiser = pipeline("image-denoising", model=AutoModelForImageToImage.from_pretrained(checkpoint), device="cpu")
    clean = torch.from_numpy(np.array(Image.open(picture))).permute(2, 0, 1)[None] / 127.5 - 1
    for noisy in report.levels:
        assert [sample.steps for sample in noisy.samples] == [1, 3]
        for sample in noisy.samples:
            how = {"add_noise_level": noisy.level, "noise_seed": 4, "output_energies": True, "output_type": "pt"}
            expected = denoiser(picture, thinking_steps=sample.steps, **how)
            assert sample.energies == pytest.approx(expected["energies"], rel=1e-4, abs=1e-6)
            assert sample.psnr == pytest.approx(image_psnr(2 * expected["image"][None] - 1, clean).item(), abs=1e-3)
            quality = image_psnr(2 * expected["noisy_image"][None] - 1, clean).item()
            assert noisy.noisy_psnr == pytest.approx(quality, abs=1e-3)
            assert sample.milliseconds > 0
        assert noisy.samples[0].psnr != noisy.samples[1].psnr
        assert noisy.best.psnr == max(sample.psnr for sample in noisy.samples)

    shown = "\n".join(said)
    assert verdict(report) in shown and shown.count(" * |") == 2 and "Recorded" not in shown
    assert report.files == [str(folder / "denoising.png")]
    with Image.open(folder / "denoising.png") as grid:
        assert min(grid.size) > 200
    saved = json.loads((folder / "demo_image.json").read_text())
    assert saved["levels"][1]["samples"][1]["psnr"] == report.levels[1].samples[1].psnr
    assert torch.get_num_threads() == threads


def test_without_matplotlib_every_picture_has_a_file(
    checkpoint: str, picture: str, tmp_path: Path, without: Callable[[str], None]
) -> None:
    without("matplotlib")
    said: list[str] = []
    report = run_image_demo(picture, checkpoint, (0.1,), (1, 2), output_dir=str(tmp_path / "out"), say=said.append)
    names = ["clean", "noisy_0.1", "denoised_0.1_1_steps", "denoised_0.1_2_steps"]
    assert [Path(file).stem for file in report.files] == names
    assert all(Image.open(file).size == (14, 10) for file in report.files)
    assert np.array_equal(Image.open(report.files[0]), Image.open(picture))
    assert any("matplotlib" in line for line in said)


def test_grey_and_large_pictures(tmp_path: Path) -> None:
    size = {"image_size": 8, "patch_size": 4, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    EBTForImageDenoising(EBTImageConfig(**size, num_channels=1)).save_pretrained(tmp_path / "grey")
    Image.new("RGBA", (600, 3), (9, 9, 9, 255)).save(tmp_path / "wide.png")
    assert read_picture(tmp_path / "wide.png").size == (256, 1)
    report = run_image_demo(
        tmp_path / "wide.png", str(tmp_path / "grey"), (0.1,), (1,), output_dir=str(tmp_path), say=silent
    )
    # a flat energy: the picture comes back as it was
    assert report.levels[0].samples[0].psnr == pytest.approx(report.levels[0].noisy_psnr)


def noisy(level: float, by_steps: dict[int, float], last_energy: float = -1.0) -> NoisyPicture:
    samples = [ImageSample(steps, value, [0.0, -0.5], 1.0) for steps, value in by_steps.items()]
    samples[-1].energies[-1] = last_energy
    return NoisyPicture(level, 10.0, samples)


@pytest.mark.parametrize(
    "levels, expected",
    [
        (
            [noisy(0.1, {1: 20.0, 3: 19.0}), noisy(0.2, {1: 15.0, 2: 16.5, 3: 16.0})],
            "At noise 0.1 (that of training) 1 step was best, as many as in training; at noise 0.2 (more than in "
            "training) 2 steps were best, 1.5 dB better than the 1 of training; more steps than that blurred the "
            "picture (3 steps: 1.0 and 0.5 dB worse), though the energy went on falling.",
        ),
        (
            [noisy(0.05, {1: 20.0, 2: 19.0}, 1.0)],
            "At noise 0.05 (less than in training) 1 step was best, as many as in training; more steps than that "
            "blurred the picture (2 steps: 1.0 dB worse).",
        ),
        ([noisy(0.2, {2: 15.0, 4: 16.0})], "At noise 0.2 (more than in training) 4 steps were best."),
    ],
)
def test_verdict_says_what_the_numbers_say(levels: list[NoisyPicture], expected: str) -> None:
    assert verdict(ImageDemoReport("x.png", (8, 8), True, 1, 0.1, levels)) == expected


# ---- mistakes --------------------------------------------------------------------------------------------------


def test_mistakes_give_one_clear_line(
    checkpoint: str, picture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.png").write_text("no picture")
    for argv, part in [
        (["--image", "missing.png"], "There is no picture missing.png"),
        (["--image", "text.png"], "Cannot read text.png as a picture"),
        (["--image", "--prompt", "x"], "--prompt has an effect without --image only"),
        (["--image", picture, "--top-k", "50"], "--top_k has an effect without --image only"),
        (["--levels", "0.1"], "--levels has an effect with --image only"),
        (["--image", "--lvels", "0.1"], "Did you mean --levels?"),
        (["--image", "--levels", "1.5"], "`levels` must be"),
        (["--image", "--steps", "0"], "`steps` must be"),
        (["--image", "--model", "./missing"], "There is no checkpoint folder ./missing"),
        (["--image", "--model", str(checkpoint_path())], "EBTConfig"),
        (["--model", checkpoint], "Cannot load"),
    ]:
        assert cli.main(["demo", *argv]) == 2
        error = capsys.readouterr().err
        assert part in error and error.count("\n") == 1 and error.startswith("ebt demo: "), argv
    assert not Path("ebt_demo").exists()


def test_the_missing_library_is_named(picture: str, tmp_path: Path, without: Callable[[str], None]) -> None:
    without("diffusers")
    with pytest.raises(ImportError, match=r"ebt-transformers\[diffusers\]"):
        run_image_demo(picture, output_dir=str(tmp_path), say=silent)
    without("PIL")
    with pytest.raises(ImportError, match=r"ebt-transformers\[image\]"):
        run_image_demo(picture, output_dir=str(tmp_path), say=silent)


def test_the_command_line_hands_everything_on(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, dict[str, Any]]] = []
    monkeypatch.setattr(demo_image, "run_image_demo", lambda picture, **options: calls.append((picture, options)))
    assert cli.main(["demo", "--image"]) == 0
    assert calls.pop() == (str(example_picture_path()), {})
    options = ["--steps", "2", "4", "--levels", "0.3", "--model", "m", "--seed", "5", "--output-dir", "o"]
    assert cli.main(["demo", "--image", "p.png", *options]) == 0
    given = {"steps": [2, 4], "levels": [0.3], "model": "m", "seed": 5, "output_dir": "o"}
    assert calls.pop() == ("p.png", given)


# ---- the shipped model -----------------------------------------------------------------------------------------


def recorded() -> dict[str, Any]:
    return json.loads((image_checkpoint_path() / "results.json").read_text(encoding="utf-8"))


def test_the_shipped_model_is_small_and_carries_no_code() -> None:
    files = {path.name: path for path in image_checkpoint_path().iterdir()}
    assert sorted(files) == [
        "README.md",
        "config.json",
        "energy.png",
        "model.safetensors",
        "preprocessor_config.json",
        "results.json",
    ]
    assert sum(path.stat().st_size for path in files.values()) <= 10_000_000
    assert not any("auto_map" in json.loads(files[name].read_text()) for name in files if name.endswith(".json"))
    assert example_picture_path().stat().st_size < 50_000
    with Image.open(example_picture_path()) as shipped:
        assert (shipped.size, shipped.mode) == ((128, 128), "RGB")


def test_more_steps_pay_off_where_there_is_more_noise_than_in_training() -> None:
    denoiser = load_denoiser(device="cpu")
    assert denoiser.model.config.default_thinking().steps == 1
    assert sum(parameter.numel() for parameter in denoiser.model.parameters()) == recorded()["ebt"]["parameters"]
    found = {}
    for level in (0.1, 0.2):
        found[level], _ = denoise_picture(denoiser, read_picture(example_picture_path()), level, (1, 3))
        for sample in found[level].samples:
            assert sample.energies == sorted(sample.energies, reverse=True)
    (one, three), (one_at_more, three_at_more) = (
        [sample.psnr for sample in found[level].samples] for level in (0.1, 0.2)
    )
    assert one > three + 2 and one > found[0.1].noisy_psnr + 9
    assert three_at_more > one_at_more + 2


def test_the_recorded_results_of_the_shipped_model_are_its_results(repository_root: Path) -> None:
    """On a sample: the whole takes minutes. `python -m ebt_transformers.assets.record_image_results` records anew."""
    data = repository_root.parent / "shared" / "data" / "images" / "cifar10" / "test_lossless.parquet"
    if not data.is_file():
        pytest.skip("the CIFAR-10 test images are not part of the package")
    sample = recorded()["sample"]
    measured = record_image_results.sample_psnr(str(data))
    for level, by_steps in sample["psnr"].items():
        assert measured[level] == pytest.approx(by_steps, abs=0.02)
        for steps, value in by_steps.items():  # the sample is one of the images of the whole
            assert value == pytest.approx(recorded()["ebt"]["psnr"][level][steps], abs=2)


def test_the_card_says_what_is_recorded() -> None:
    card = (image_checkpoint_path() / "README.md").read_text(encoding="utf-8")
    assert record_image_results.card_table(recorded()) in card
    line = about_results(recorded())
    for level, by_steps in recorded()["ebt"]["psnr"].items():
        assert f"noise {level}: {max(by_steps.values()):.2f} dB" in line
    assert about_results({"ebt": {"test_loss": 1.0}}) == ""


def test_results_are_brought_up_to_date_from_rows_of_the_benchmark(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")  # without it a card has no picture
    folder = tmp_path / "model"
    shutil.copytree(image_checkpoint_path(), folder)
    card = (folder / "README.md").read_text(encoding="utf-8")
    record_image_results.main(["--folder", str(folder)])
    assert (folder / "README.md").read_text(encoding="utf-8") == card
    rows = [
        {"kind": "quality", "method": method, "checkpoint": method, "level": level, "protocol": protocol}
        | {"passes": passes, "seed": seed, "psnr": passes + seed, "settings": {"data": "d"}}
        for method, protocol in (("ours", ""), ("theirs", "paper"), ("theirs", "fair"))
        for level in (0.1, 0.2)
        for passes in (1, 10, 2)
        for seed in (0, 1)
    ]
    lines = [json.dumps(row) for row in [{"kind": "round"}, *rows, {**rows[0], "psnr": 3.0}]]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    of_rows = ["--rows", str(tmp_path / "rows.jsonl"), "--ebt", "ours", "--dit", "theirs", "--about", "2 images"]
    record_image_results.main(["--folder", str(folder), *of_rows])
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    # the newest row counts: (3 + 2) / 2
    assert results["ebt"]["psnr"] == {"0.1": {"1": 2.5, "2": 2.5, "10": 10.5}, "0.2": {"1": 1.5, "2": 2.5, "10": 10.5}}
    assert list(results["dit"]["psnr"]["0.2"]) == ["fair", "paper"] and results["sample"] == recorded()["sample"]
    assert "PSNR on 2 images." in (folder / "README.md").read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="one checkpoint"):
        record_image_results.results_of(rows, "nobody")
    with pytest.raises(SystemExit):
        record_image_results.main(["--folder", str(folder), "--ebt", "ours"])
