"""Laws of benchmarks/optimisations.py: switched off is really off, computes the same, and is undone afterwards."""

import argparse
import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode


FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
MODULES = ("common", "floors", "generation", "training_step", "optimisations")
SIZE = ["--preset", "4xs", "--vocab-size", "64", "--context", "8"]
TINY = [*SIZE, "--batch-size", "2", "--repeats", "1", "--threads", "1"]
VOCAB = 64
TRAINING = ["chunks", "chunks-256", "chunks-1024", "closed-form", "noise"]
DECODING = ["bags", "table-first", "start", "cache"]


@pytest.fixture
def optimisations(monkeypatch):
    """The benchmark, imported as running it would."""
    monkeypatch.syspath_prepend(str(FOLDER))
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    threads = torch.get_num_threads()
    yield importlib.import_module("optimisations")
    torch.set_num_threads(threads)
    for name in MODULES:
        sys.modules.pop(name, None)


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def spied(monkeypatch, place: object, name: str) -> list[tuple[tuple, dict]]:
    """Arguments of every call of a function, which goes on doing its work."""
    calls: list[tuple[tuple, dict]] = []
    own = getattr(place, name)
    monkeypatch.setattr(place, name, lambda *args, **options: calls.append((args, options)) or own(*args, **options))
    return calls


# ---- the command -----------------------------------------------------------------------------------------------


def test_runs_and_resumes(optimisations, tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    asked = []

    def megabytes(off, options):
        asked.append(off)
        return 123.0 if off == "everything" else 456.0

    monkeypatch.setattr(optimisations, "memory_in_subprocess", megabytes)
    monkeypatch.setattr(optimisations, "NEW_TOKENS", 2)
    argv = [*TINY, "--results", str(path)]
    text = optimisations.main([*argv, "--only", "training"])
    rows = rows_of(path)
    assert [row["off"] for row in rows] == TRAINING
    # what all have in common is measured once
    assert asked == ["everything", *TRAINING]
    assert all(row["seconds_with"] > 0 and row["seconds_without"] > 0 and row["ratio"] > 0 for row in rows)
    assert {(row["megabytes_with"], row["megabytes_without"]) for row in rows} == {(123.0, 456.0)}
    assert "## Training step" in text and "## Decoding" not in text

    text = optimisations.main(argv)
    rows = rows_of(path)
    assert [(row["off"], row["steps"]) for row in rows[5:]] == [(name, steps) for name in DECODING for steps in (2, 8)]
    assert "## Training step" in text and "## Decoding" in text and "optimisations.py --preset 4xs" in text
    # the last row of each table
    for name, row in (("noise drawn side by side", rows[4]), ("the context once per text (cache)", rows[-1])):
        cells = [
            cell.strip()
            for cell in [line for line in text.splitlines() if line.startswith(f"| {name}")][-1].split("|")
        ]
        seconds = [row["seconds_with"], row["seconds_without"]]
        if row["part"] == "training":
            shown = [*(f"{each:.3f}" for each in seconds), f"{row['ratio']:.2f}", "123", "456"]
        else:
            shown = ["8", *(f"{1000 * each:.2f}" for each in seconds), f"{row['ratio']:.2f}"]
        assert cells[3:-1] == shown

    for name in ("measure_training", "measure_decoding"):
        monkeypatch.setattr(optimisations, name, lambda *args: pytest.fail("measured again"))
    assert optimisations.main(argv) == text
    assert "Training step" not in optimisations.main([*argv, "--only", "decoding"])


def test_ratio_is_how_many_times_as_long_it_takes_without(optimisations, make_model):
    model = make_model()
    seen = []

    def work():
        seen.append(model.config.training_chunk_size)
        return [3.0] if model.config.training_chunk_size == 0 else [2.0]

    found = optimisations.in_turns(work, optimisations.TRAINING["chunks"], model, 1)
    assert found == {"seconds_with": 2.0, "seconds_without": 3.0, "ratio": 1.5}
    assert seen == [0, None, 0, None]


def test_says_which_rows_compare_the_same_work(optimisations):
    def same(*argv):
        return optimisations.no_difference(optimisations.parse([*SIZE, *argv]))

    chunks = ["default chunks (chunks of 256)", "default chunks (chunks of 1024)"]
    assert same("--batch-size", "2") == [*chunks, "noise drawn side by side (by one thread)"]
    # chunks of 256 differ from those of 512 where there are more than 256 candidates
    assert same("--batch-size", "64") == [chunks[1], "noise drawn side by side (by one thread)"]
    assert same("--batch-size", "128", "--vocab-size", "50277") == []
    assert same("--batch-size", "128", "--only", "decoding") == []
    # other devices have larger chunks, and no row for what only a CPU does
    assert same("--batch-size", "128", "--device", "cuda") == [chunks[1]]


def test_other_devices_have_no_rows_of_a_cpu(optimisations):
    keys = optimisations.keys_of(optimisations.parse([*TINY, "--device", "cuda"]))
    assert [key["off"] for key in keys] == [*TRAINING[:4], "start", "start", "cache", "cache"]


@pytest.mark.parametrize("option", ["--context", "--batch-size", "--repeats"])
def test_says_what_it_does_not_take(optimisations, capsys, option):
    with pytest.raises(SystemExit):
        optimisations.main([option, "0"])
    assert f"{option} must be at least 1, got 0" in capsys.readouterr().err


def test_memory_is_that_of_the_model_without_it(optimisations, monkeypatch, subprocess_env):
    """A model of 16 M parameters with its gradients needs at least 128 MB."""
    monkeypatch.setenv("PYTHONPATH", subprocess_env["PYTHONPATH"])
    argv = ["--preset", "4xs", "--vocab-size", "50000", "--context", "4", "--batch-size", "3", "--threads", "1"]
    options = optimisations.parse([*argv, "--seed", "5"])
    assert 100 < optimisations.memory_in_subprocess("everything", options) < 400

    # what the other process is told, and what it trains
    told, sizes = [], []
    peak, build = optimisations.peak_memory, optimisations.build
    monkeypatch.setattr(optimisations, "peak_memory", lambda options: told.append(options) or peak(options))

    def built(*args):
        model = build(*args)
        model.register_forward_pre_hook(
            lambda model, args, options: sizes.append(
                (tuple(options["input_ids"].shape), model.config.training_chunk_size)
            ),
            with_kwargs=True,
        )
        return model

    def run(command, **options):
        optimisations.main(command[2:])
        return argparse.Namespace(returncode=0, stdout="1.0")

    monkeypatch.setattr(optimisations, "build", built)
    monkeypatch.setattr(optimisations.subprocess, "run", run)
    small = optimisations.parse([*argv, "--seed", "5", "--vocab-size", "64"])
    for off in ("everything", "chunks", "chunks-256"):
        optimisations.memory_in_subprocess(off, small)
    assert [vars(each) | {"memory_of": None} for each in told] == [vars(small)] * 3
    assert sizes == [((3, 4), chunk) for chunk in (None, 0, 256) for _ in range(2)]

    monkeypatch.setattr(
        optimisations.subprocess, "run", lambda *args, **options: argparse.Namespace(returncode=1, stderr="no room")
    )
    with pytest.raises(RuntimeError, match="Measuring the memory of noise failed:\nno room"):
        optimisations.memory_in_subprocess("noise", small)


# ---- training --------------------------------------------------------------------------------------------------


@pytest.fixture
def lesson(optimisations):
    """The model that training measures, and a function that trains it and returns loss and gradients."""
    key = optimisations.training_key(optimisations.parse(TINY))
    model = optimisations.build("ebt", key, optimisations.parse(TINY))
    ids = torch.randint(0, VOCAB, (2, 8))

    def train() -> tuple[torch.Tensor, list[torch.Tensor]]:
        torch.manual_seed(1)
        model.zero_grad()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        return loss.detach(), [each.grad.clone() for each in model.parameters() if each.grad is not None]

    return model, train


def same_lesson(first, second) -> None:
    torch.testing.assert_close(first[0], second[0], rtol=1e-5, atol=1e-6)
    assert len(first[1]) == len(second[1]) > 10
    for one, other in zip(first[1], second[1], strict=True):
        # random weights and a step size of hundreds: numbers are in the thousands, and so is rounding
        assert (one - other).norm() <= 1e-3 * other.norm()


@pytest.mark.parametrize("name, chunks", [("chunks", []), ("chunks-256", [256]), ("chunks-1024", [1024])])
def test_training_takes_other_chunks(optimisations, lesson, monkeypatch, name, chunks):
    model, train = lesson
    calls = spied(monkeypatch, optimisations.modeling_ebt, "learn")
    usual = train()
    assert [options["chunk_size"] for _, options in calls] == [512]
    calls.clear()
    with optimisations.TRAINING[name].off(model):
        changed = train()
    assert [options["chunk_size"] for _, options in calls] == chunks
    same_lesson(changed, usual)
    calls.clear()
    train()
    assert [options["chunk_size"] for _, options in calls] == [512]


def test_training_without_closed_forms(optimisations, lesson, monkeypatch):
    model, train = lesson
    calls = [
        spied(monkeypatch, getattr(optimisations.fused, f"_{name}"), "apply")
        for name in ("JointSoftmax", "Rotation", "Normalize")
    ]
    usual = train()
    counts = [len(each) for each in calls]
    assert all(counts)
    with optimisations.TRAINING["closed-form"].off(model):
        changed = train()
    assert [len(each) for each in calls] == counts
    same_lesson(changed, usual)
    train()
    assert [len(each) for each in calls] == [2 * count for count in counts]


def test_noise_of_one_thread_is_that_of_torch(optimisations, lesson, monkeypatch):
    model, train = lesson
    descent = optimisations.descent
    monkeypatch.setattr(descent, "NOISE_BLOCK", 100)  # the step draws 2 x 8 x 64 numbers
    pools = spied(monkeypatch, descent, "ThreadPoolExecutor")
    usual, _ = train()
    assert len(pools) == 1
    shape, where = (2, 8, VOCAB), (None, torch.device("cpu"), torch.float32)
    with optimisations.TRAINING["noise"].off(model):
        changed, _ = train()
        torch.manual_seed(1)
        drawn = descent.standard_normal(shape, *where)
    assert len(pools) == 1
    torch.manual_seed(1)
    torch.testing.assert_close(drawn, torch.empty(shape).normal_(), rtol=0, atol=0)
    assert changed != usual  # other numbers of the same distribution
    assert descent.NOISE_BLOCK == 100

    # where both draw the same, the lessons are equal
    monkeypatch.setattr(descent, "NOISE_BLOCK", 10**6)
    usual = train()
    with optimisations.TRAINING["noise"].off(model):
        same_lesson(train(), usual)


# ---- decoding --------------------------------------------------------------------------------------------------


class Products(TorchDispatchMode):
    """Counts the ways in which few rows (up to 3) meet the table."""

    def __init__(self, vocab: int, width: int) -> None:
        super().__init__()
        self.table, self.counts = (vocab, width), {"bags": 0, "mixed": 0, "table first": 0, "rows first": 0}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._overloadpacket.__name__
        shapes = [tuple(each.shape) for each in args if isinstance(each, torch.Tensor)]
        if "embedding_bag" in name:
            self.counts["bags"] += 1
        elif name in ("mm", "addmm", "addmv", "mv"):
            first, second = shapes[-2:]
            vocab, width = self.table
            few = first[0] <= 3
            self.counts["mixed"] += few and first[-1] == vocab and second == self.table
            self.counts["table first"] += first == self.table
            self.counts["rows first"] += few and second == (width, vocab)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def writer(optimisations):
    """A random model, and a function that decodes: tokens, what they took, and lengths of what the context encoded."""
    from ebt_transformers import EBTForCausalLM

    config = optimisations.EBTConfig(
        vocab_size=41,
        hidden_size=24,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_landscapes=2,
    )
    model = EBTForCausalLM(config).eval()
    with torch.no_grad():
        model.model.energy_head.weight.normal_()
    prompt = torch.randint(0, 41, (1, 5))
    encode, lengths = model.model._encode_context, []
    model.model._encode_context = lambda **said: lengths.append(said["input_ids"].shape[1]) or encode(**said)

    def write(steps: int) -> tuple[list[int], dict[str, int], list[int]]:
        lengths.clear()
        with Products(41, 24) as products:
            tokens = model.generate(prompt, max_new_tokens=4, do_sample=False, pad_token_id=0, thinking_steps=steps)
        return tokens[0].tolist(), products.counts, list(lengths)

    return model, write


@pytest.mark.parametrize("steps", [2, 8])
@pytest.mark.parametrize("name", DECODING)
def test_decoding_without(optimisations, writer, name, steps):
    model, write = writer
    usual = tokens, counts, lengths = write(steps)
    # four tokens, of which the first step embeds nothing; and the start, once
    assert counts == {"bags": 4 * (steps - 1) + 1, "mixed": 0, "table first": 4 * steps, "rows first": 0}
    assert lengths == [5, 1, 1, 1]
    with optimisations.DECODING[name].off(model):
        without = write(steps)
    assert without[0] == tokens
    expected = {
        "bags": ({"bags": 0, "mixed": counts["bags"]}, lengths),
        "table-first": ({"table first": 0, "rows first": 4 * steps}, lengths),
        "start": ({"bags": 4 * steps + 1}, lengths),
        "cache": ({}, [5, 6, 7, 8]),
    }[name]
    assert without[1] == {**counts, **expected[0]}
    assert without[2] == expected[1]
    assert write(steps) == usual
