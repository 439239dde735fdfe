"""Laws of benchmarks/completion.py: it runs from images to tables, resumes, and its numbers are those of its rows."""

import importlib
import json
import math
import statistics
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch


pytest.importorskip("matplotlib")
pytest.importorskip("pyarrow")
pytest.importorskip("skimage")

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
PARTS = tuple(f"completers.{name}" for name in ("data", "fillings", "training", "measures", "figures", "tables"))
MODULES = ("common", "completion", "completers", *PARTS, "denoisers", "denoisers.pictures")
CONFIG = ("hidden_size=16", "num_attention_heads=2", "image_size=16", "patch_size=4", "thinking_steps=2")


@pytest.fixture
def script(monkeypatch):
    """Imports a benchmark as running it would."""
    monkeypatch.syspath_prepend(str(FOLDER))
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    threads = torch.get_num_threads()
    yield importlib.import_module
    torch.set_num_threads(threads)
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, Path]:
    """Smooth images of 16 x 16 pixels, to learn from and to judge on."""
    from PIL import Image

    places, draw = {}, np.random.default_rng(0)
    for part, count in (("train", 12), ("test", 6)):
        places[part] = tmp_path_factory.mktemp(part)
        for number in range(count):
            small = Image.fromarray(draw.integers(0, 256, (4, 4, 3), dtype=np.uint8))
            small.resize((16, 16), Image.Resampling.BICUBIC).save(places[part] / f"{number}.png")
    return places


def argv_of(data: dict[str, Path], tmp_path: Path, *more: str) -> list[str]:
    argv = ["--data", str(data["train"]), "--test-data", str(data["test"]), "--config", *CONFIG, "--threads", "1"]
    argv += ["--updates", "3", "--trial-updates", "2", "--batch-size", "2", "--seeds", "0", "1", "--depths", "1,1"]
    argv += ["--step-sizes", "0.1", "--learning-rates", "1e-3", "3e-3", "--validation-images", "4", "--rounds", "1"]
    argv += ["--most-steps", "4", "--tolerances", "10", "--grid-images", "2", "--runs", str(tmp_path / "runs")]
    return [*argv, "--results", str(tmp_path / "rows.jsonl"), *more]


def cells_of(text: str, label: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.startswith(f"| {label} "))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_runs_resumes_and_says_what_its_rows_say(script, data, tmp_path, monkeypatch):
    completion, training = script("completion"), script("completers.training")
    monkeypatch.setattr(training, "TIMED_UPDATES", 1)
    more = ("--no-variants", "--also-steps", "1")
    text = completion.main(argv_of(data, tmp_path, *more))
    path = tmp_path / "rows.jsonl"
    assert path.with_suffix(".md").read_text() == text
    for name in ("rows.png", "rows_steps.png", "rows_thinking.png"):
        assert (tmp_path / name).stat().st_size > 5_000 and f"({name})" in text
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    runs = [row for row in rows if row["kind"] == "run"]
    assert [(row["name"], row["seed"]) for row in runs] == [
        *((name, seed) for seed in (0, 1) for name in ("et", "mae", "mae-time")),
        ("et-1", 0),
    ]
    (update,) = [row for row in rows if row["kind"] == "update"]
    longer = max(1, round(3 * update["ratio"]))
    assert {row["name"]: row["updates"] for row in runs} == {"et": 3, "mae": 3, "mae-time": longer, "et-1": 3}

    for name, title in (("et", "Energy Transformer"), ("mae", "MAE, equal updates")):
        errors = [row["mse"] for row in runs if row["name"] == name]
        cells = cells_of(text, title)
        assert float(cells[5]) == pytest.approx(statistics.fmean(errors), abs=6e-5)
        assert float(cells[6]) == pytest.approx(max(errors) - min(errors), abs=6e-5)
        assert int(cells[1].replace(",", "")) == runs[0]["parameters"] or name == "mae"
    assert len({row["parameters"] // 1000 for row in runs}) == 1  # within 3 % at this size

    # what was trained is what was picked
    for model in ("et", "mae"):
        tries = [row for row in rows if row["kind"] == "trial" and row["recipe"]["model"] == model]
        assert len(tries) == 2
        best = min(tries, key=lambda row: row["mse"])
        assert all(row["recipe"] == best["recipe"] for row in runs if row["name"] in (model, f"{model}-time"))
    assert runs[-1]["recipe"]["fields"] == {"step_size": 0.2, "thinking_steps": 1}  # as far in one step as in two

    # one descent gives the errors of all numbers of steps
    steps = [row for row in rows if row["kind"] == "steps"]
    for row, run in zip(steps, (row for row in runs if row["name"].startswith("et")), strict=True):
        assert len(row["mse"]) == len(row["energy"]) == 5
        trained = 1 if row["name"] == "et-1" else 2
        assert row["mse"][trained] == pytest.approx(run["mse"], rel=1e-4)
    first, *_ = [row for row in rows if row["kind"] == "tolerance"]
    assert first["steps"] < 4  # a tolerance this wide stops at once

    for name in ("draw_rows", "draw_steps", "draw_thinking"):
        monkeypatch.setattr(completion, name, lambda *args: None)
    monkeypatch.setattr(completion, "train", lambda *args: pytest.fail("trained again"))
    assert completion.main(argv_of(data, tmp_path, *more)) == text
    assert len(path.read_text().splitlines()) == len(rows)


def test_fillings_do_what_they_say(script):
    fillings = script("completers.fillings")
    # a plane, which linear and smoother interpolation complete wherever visible pixels surround the hidden ones
    rows, columns = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    images = torch.stack([rows / 20 - 0.4, columns / 20 - 0.4, (rows + columns) / 40 - 0.4])[None]
    mask = torch.zeros(1, 16, dtype=torch.bool)
    mask[0, [5, 10]] = True
    hidden = fillings.pixel_mask(mask, (16, 16), 4)
    assert hidden[0, 0, 4:8, 4:8].all() and hidden.sum() == 32
    methods = fillings.Fillings(torch.full((3, 16, 16), 0.25), 4).methods
    found = {name: fillings.judge(method(images, mask), images, hidden) for name, method in methods.items()}
    assert found["linear"].mse < 1e-10
    assert found["biharmonic"].mse < 1e-6 < found["nearest"].mse < found["visible mean"].mse
    assert found["training mean"].mse == pytest.approx(
        float((images - 0.25)[hidden.expand_as(images)].square().mean())
    )
    visible = images[0, 0][~hidden[0, 0]].mean()
    torch.testing.assert_close(methods["visible mean"](images, mask)[0, 0], visible.expand(16, 16))
    # nothing hidden is looked at
    for name, method in methods.items():
        spoilt = torch.where(hidden, torch.full_like(images, 9.0), images)
        torch.testing.assert_close(method(spoilt, mask)[:, :, ~hidden[0, 0]].isfinite().all(), torch.tensor(True))
        torch.testing.assert_close(
            torch.where(hidden, method(spoilt, mask), 0.0), torch.where(hidden, method(images, mask), 0.0), msg=name
        )


def test_judging(script):
    fillings = script("completers.fillings")
    images = torch.rand(3, 2, 8, 8) * 2 - 1
    hidden = torch.zeros(3, 1, 8, 8, dtype=torch.bool)
    hidden[:, :, :4] = True
    shifted = images.clone()
    shifted[:, :, :4] += 0.1
    inside = shifted.clamp(-1, 1)
    quality = fillings.judge(shifted, images, hidden)
    assert quality.mse == pytest.approx(float((inside - images)[:, :, :4].square().mean()), rel=1e-5)
    exact = images * 0.5
    quality = fillings.judge(torch.where(hidden, exact + 0.2, -9.0), exact, hidden)  # what is visible does not count
    assert quality.mse == pytest.approx(0.04, rel=1e-5)
    assert quality.psnr == pytest.approx(20.0, abs=1e-4)
    means = exact[:, :, :4].mean((0, 2, 3))[None, :, None, None].expand(exact.shape)
    assert fillings.judge(means, exact, hidden).share == pytest.approx(1.0)
    assert torch.equal(fillings.merge(exact, shifted, hidden)[:, :, 4:], exact[:, :, 4:])


def test_both_models_see_the_same_images_and_masks(script, tmp_path):
    training = script("completers.training")
    config = training.EnergyTransformerConfig.for_images(
        hidden_size=16, num_attention_heads=2, image_size=16, patch_size=4, thinking_steps=1, visible_ratio=0.0
    )
    pixels = torch.randint(0, 256, (9, 3, 16, 16), dtype=torch.uint8)
    batches = {}
    for name, depth in (("et", {}), ("mae", {"encoder_layers": 1})):
        recipe = training.Recipe(name, 1e-3, depth)
        model = recipe.make(config, 0)
        trainer = training.make_trainer(recipe, model, pixels, 3, 4, 7, tmp_path)
        batches[name] = list(trainer.get_train_dataloader())
        assert len(batches[name]) == 3
    for ours, theirs in zip(batches["et"], batches["mae"], strict=True):
        torch.testing.assert_close(ours["pixel_values"], theirs["pixel_values"])
        assert torch.equal(ours["bool_masked_pos"], theirs["noise"].bool())
        assert ours["pixel_values"].abs().max() <= 1
    first, second, _ = (each["bool_masked_pos"] for each in batches["et"])
    assert not torch.equal(first, second)


def test_settings_are_picked_and_variants_change_one_option(script):
    completion, training = script("completion"), script("completers.training")
    recipes = [training.Recipe("et", rate) for rate in (1.0, 2.0, 3.0)]
    assert completion.best_of("et", recipes, [None, 0.5, 0.7]) is recipes[1]
    with pytest.raises(ValueError, match="Every try of 'et' ran away"):
        completion.best_of("et", recipes, [None] * 3)
    config = training.EnergyTransformerConfig.for_images(
        hidden_size=64, num_attention_heads=4, image_size=16, patch_size=4
    )
    best = training.Recipe("et", 1e-3, {"step_size": 0.3})
    variants = completion.variants_of(best, config)
    assert "visible_ratio=0" in variants and "visible_ratio=0.1" not in variants
    assert "self_attention=False" in variants and "completion_loss='mse'" not in variants
    for recipe in variants.values():
        assert asdict(recipe)["fields"]["step_size"] in (0.3, 0.15, 0.1)
    assert variants["random positions"] == training.Recipe("et", 1e-3, {"step_size": 0.3}, "random")
    sine, random = (training.Recipe("et", 1e-3, {}, start).make(config, 0).positions for start in ("sine", "random"))
    assert torch.equal(sine[0], random[0])
    assert float(sine[1:].detach().square().mean()) == pytest.approx(0.002**2, rel=1e-4)
    nearest = torch.cdist(sine[1:], sine[1:])[5].argsort()[1:5]
    assert sorted(nearest.tolist()) == [1, 4, 6, 9]  # on a grid of 4 x 4
    wider = training.config_with(config, hidden_size=128)
    assert (wider.head_dim, wider.num_memories, wider.self_attention) == (32, 512, True)
    assert math.isclose(wider.attention_beta, 32**-0.5)


def test_bad_options_are_refused(script, data, tmp_path):
    completion = script("completion")
    with pytest.raises(ValueError, match="NAME=VALUE.*'sideways=1'"):
        completion.main([*argv_of(data, tmp_path), "--config", "sideways=1"])
    with pytest.raises(ValueError, match="must be 1, got 2"):
        completion.main([*argv_of(data, tmp_path), "--config", "num_blocks=2"])
    with pytest.raises(ValueError, match="2 tries and its twin 1"):
        completion.main([*argv_of(data, tmp_path), "--mae-learning-rates", "1e-3"])
    with pytest.raises(ValueError, match="Of the 12 images"):
        completion.main([*argv_of(data, tmp_path), "--validation-images", "12"])
