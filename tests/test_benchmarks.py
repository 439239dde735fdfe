"""Laws of the benchmarks: they run, they say what they ran on, and an interrupted one goes on where it was."""

import argparse
import json
import sys
from pathlib import Path

import pytest
import torch


FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
TINY = ["--preset", "4xs", "--vocab-size", "64", "--threads", "1"]


@pytest.fixture
def script(monkeypatch):
    """Imports a benchmark as running it would."""
    monkeypatch.syspath_prepend(str(FOLDER))
    for name in ("common", "generation", "training_step"):
        monkeypatch.delitem(sys.modules, name, raising=False)

    def load(name: str):
        return __import__(name)

    threads = torch.get_num_threads()
    yield load
    torch.set_num_threads(threads)
    for name in ("common", "generation", "training_step"):
        sys.modules.pop(name, None)


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_generation_runs_and_resumes(script, tmp_path, monkeypatch):
    generation = script("generation")
    path = tmp_path / "generation.jsonl"
    argv = [*TINY, "--contexts", "4", "8", "--steps", "1", "2", "--candidates", "1", "2", "--new-tokens", "2"]
    argv += ["--repeats", "1", "--results", str(path)]
    text = generation.main([*argv, "--cache", "on"])
    rows = rows_of(path)
    assert len(rows) == 2 * (1 + 4)
    assert all(row["seconds_per_token"] > 0 and row["ratio"] > 0 for row in rows)
    assert path.with_suffix(".md").read_text() == text
    for part in ("machine", "versions", "python benchmarks/generation.py --preset 4xs", "seed: 0", "x cached twin"):
        assert part in text
    assert "From context 4 to 8" in text

    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:7]) + "\n" + lines[7][:20])  # killed while writing
    measured = []
    measure = generation.measure
    monkeypatch.setattr(generation, "measure", lambda *args: measured.append(args) or measure(*args))
    generation.main([*argv, "--cache", "on"])
    assert len(measured) == 3
    generation.main(argv)  # the uncached half is missing
    assert len(measured) == 3 + 10
    generation.main(argv)
    assert len(measured) == 3 + 10
    generation.main([*argv, "--cache", "on", "--seed", "1"])  # other settings, other rows
    assert len(measured) == 3 + 20


def test_uncached_generation_is_uncached(script, make_model):
    generation = script("generation")
    model = make_model()
    seen = []
    encode = model.model._encode_context
    model.model._encode_context = lambda **options: seen.append(options["input_ids"].shape[1]) or encode(**options)
    for cache, lengths in ((True, [4, 1, 1]), (False, [4, 5, 6])):
        seen.clear()
        assert len(generation.token_times(model, torch.ones(1, 4).long(), 2, use_cache=cache)) == 2
        assert seen == lengths


def test_training_step_runs_and_resumes(script, tmp_path, monkeypatch):
    training_step = script("training_step")
    path = tmp_path / "training.jsonl"
    monkeypatch.setattr(training_step, "memory_in_subprocess", lambda name, *args: {"ebt": 30.0, "twin": 10.0}[name])
    argv = [*TINY, "--batch-sizes", "1", "2", "--contexts", "8", "--repeats", "1", "--results", str(path)]
    text = training_step.main(argv)
    assert len(rows_of(path)) == 2 and "3.00" in text and "memory x twin" in text
    monkeypatch.setattr(training_step, "measure", lambda *args: pytest.fail("measured again"))
    assert training_step.main(argv) == text


def test_memory_is_that_of_the_model(script, monkeypatch, subprocess_env):
    """A model of 16 M parameters with its gradients needs at least 128 MB."""
    training_step = script("training_step")
    monkeypatch.setenv("PYTHONPATH", subprocess_env["PYTHONPATH"])
    options = argparse.Namespace(preset="4xs", vocab_size=50000, threads=1, device="cpu", seed=0, steps=2)
    used = training_step.memory_in_subprocess("twin", options, 1, 4)
    assert 100 < used < 400


def test_alternate_takes_turns(script):
    common = script("common")
    order: list[str] = []
    first, second, ratio = common.alternate(
        lambda: order.append("a") or [2.0, 4.0, 6.0], lambda: order.append("b") or [2.0], repeats=2
    )
    assert order == ["a", "b"] * 3
    assert (first, second, ratio) == (4.0, 2.0, 2.0)
