"""Laws of benchmarks/thinking.py: it runs from text to tables, resumes, and its numbers are those of its rows."""

import importlib
import json
import math
import random
import re
import statistics
import sys
from pathlib import Path

import pytest
import torch


sys.path.append(str(Path(__file__).parent))  # the helper beside this file, under every import mode of pytest
from interruption import StopAt  # noqa: E402


pytest.importorskip("matplotlib")
pytest.importorskip("pyarrow")

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
SHAPE = "num_hidden_layers=1,hidden_size=16,intermediate_size=16,num_attention_heads=2"
PARTS = tuple(f"thinkers.{name}" for name in ("data", "measures", "plots", "tables"))
MODULES = ("common", "thinking", "thinkers", *PARTS)
SETS = ("wikitext", "brown", "stories", "gsm8k", "squad", "dyck", "math")


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
def data(tmp_path_factory) -> Path:
    """Files as the benchmark expects them, of made-up words."""
    import pyarrow
    from pyarrow import parquet

    folder = tmp_path_factory.mktemp("data")
    draw = random.Random(0)

    def words(count: int) -> str:
        return " ".join("".join(draw.choice("abcdefgh") for _ in range(draw.randint(1, 6))) for _ in range(count))

    def write(name: str, text: str) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)

    for part in ("train", "valid", "test"):
        write(f"text/brown/{part}.txt", "\n\n".join(words(80) for _ in range(5)))
        file = "wiki.train.part.tokens" if part == "train" else f"wiki.{part}.tokens"
        articles = "".join(f" = Title = \n \n {words(60)} \n = = Part = = \n {words(9)} \n" for _ in range(4))
        write(f"text/wikitext103_part/{file}", f" \n{articles}")
    for part, count in (("train", 45), ("valid", 5)):
        write(f"text/tinystories_part/{part}.txt", "\n<|endoftext|>\n".join(words(40) for _ in range(count)))
    rows = [json.dumps({"question": words(9), "answer": words(9)}) for _ in range(9)]
    write("qa/gsm8k/test.jsonl", "\n".join(rows))
    for name in ("dyck_languages", "elementary_math_qa_question_only"):
        examples = [{"input": words(9), "target_scores": {"no": 0, "yes": 1}} for _ in range(9)]
        write(f"qa/bigbench/{name}.json", json.dumps({"examples": examples}))
    write("qa/squad/LICENSE", "")
    rows = [{"context": words(30), "question": words(5), "answers": {"text": [words(2)]}} for _ in range(5)]
    parquet.write_table(pyarrow.Table.from_pylist(rows * 2), folder / "qa/squad/dev_v1.1.parquet")
    return folder


def argv_of(data: Path, tmp_path: Path, *more: str) -> list[str]:
    argv = ["--data", str(data), "--vocab-size", "300", "--config-overrides", SHAPE, "--max-steps", "2", "--threads"]
    argv += ["1", "--batch-size", "2", "--block-size", "16", "--runs", str(tmp_path / "runs"), "--test-tokens", "64"]
    argv += ["--steps", "0", "1", "2", "3", "--candidates", "2", "--candidate-steps", "2", "--repeats", "1"]
    return [*argv, "--results", str(tmp_path / "rows.jsonl"), *more]


def cells_of(text: str, title: str, label: str) -> list[str]:
    """The cells of the first line for `label` in the part of a report that begins with `title`."""
    part = text[text.index(title) :]
    line = next(line for line in part.splitlines() if re.match(rf"\| {re.escape(label)} +\|", line))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_runs_resumes_and_says_what_its_rows_say(script, data, tmp_path, monkeypatch):
    thinking = script("thinking")
    argv = argv_of(data, tmp_path, "--variants", "s2", "twin", "twin-flops", "--compute-of", "s2", "--seeds", "0", "1")
    text = thinking.main(argv)
    path = tmp_path / "rows.jsonl"
    assert path.with_suffix(".md").read_text() == text
    for part in ("machine", "seed: 0, 1", "python benchmarks/thinking.py --data", "`--recipe s2", "rows.png"):
        assert part in text
    for name in ("rows.png", "rows_difficulty.png"):
        assert (tmp_path / name).stat().st_size > 10_000 and f"({name})" in text

    rows = [json.loads(line) for line in path.read_text().splitlines()]
    losses = {
        (row["name"], row["seed"], row["set"], row["candidates"], row["noise"]): row["losses"]
        for row in rows
        if row["kind"] == "losses"
    }
    # a twin has one prediction; s2 has one and two candidates, without noise and with that of its training
    models = [("twin", 1), ("twin-flops of s2", 1), ("s2", 4)]
    assert len(losses) == 2 * (len(SETS) + 1) * sum(ways for _, ways in models)
    assert all(row["tokens"] == 60 for row in rows if row["kind"] == "losses" and row["set"] != "validation")

    def perplexities(name, steps, sets, candidates=1, noise=0.0):
        every = [[losses[name, seed, one, candidates, noise][steps] for one in sets] for seed in (0, 1)]
        return [math.exp(statistics.fmean(values)) for values in every]

    inside, outside = SETS[:3], SETS[3:]
    for title, sets in (("# Thinking longer", inside), ("out of distribution\n\n|", outside)):
        assert float(cells_of(text, title, "twin")[1]) == pytest.approx(
            statistics.fmean(perplexities("twin", "0", sets)), rel=0.006, abs=0.006
        )
        for label, noise in (("s2", 0.0), ("s2, noise 3", 3.0)):
            cells = cells_of(text, title, label)
            each = {count: perplexities("s2", str(count), sets, noise=noise) for count in (1, 2, 3)}
            assert cells[1] == ""  # it has no prediction without a step
            assert [float(cell) for cell in cells[2:5]] == pytest.approx(
                [statistics.fmean(values) for values in each.values()], rel=0.006, abs=0.006
            )
            assert cells[5] == ("yes" if statistics.fmean(each[3]) < statistics.fmean(each[2]) else "no")
            tuned = [statistics.fmean(perplexities("s2", str(n), ["validation"], noise=noise)) for n in (2, 3)]
            best = 2 if tuned[0] <= tuned[1] else 3
            assert cells[6] == f"{best} (from 2)"
            for cell, last in ((cells[7], best), (cells[8], 3)):
                changes = [100 * (after / before - 1) for before, after in zip(each[2], each[last], strict=True)]
                assert [float(value) for value in cell.split(",")] == pytest.approx(changes, rel=0.006, abs=0.006)
    one, two = (statistics.fmean(perplexities("s2", "2", inside, count)) for count in (1, 2))
    assert [float(cell) for cell in cells_of(text, "## Self-verification", "s2")[3:5]] == pytest.approx(
        [one, two], rel=0.006, abs=0.006
    )

    (update,) = [row for row in rows if row["kind"] == "update" and row["name"] == "s2"]
    (longer, _) = [row for row in rows if row["kind"] == "model" and row["name"] == "twin-flops of s2"]
    assert longer["updates"] == round(2 * update["flops_ratio"]) > 4
    # two or three steps, and a batch half as large again
    assert update["flops_ratio"] > 1.5 * 2
    cost = {row["steps"]: row for row in rows if row["kind"] == "cost" and row["candidates"] == 1}
    assert [(cost[n]["contexts"], cost[n]["forwards"], cost[n]["backwards"]) for n in (1, 3)] == [(1, 1, 1), (1, 3, 3)]
    assert cost[3]["flops_ratio"] > cost[1]["flops_ratio"] > 1

    grouped = [row for row in rows if row["kind"] == "difficulty"]
    assert [row["seed"] for row in grouped] == [0, 1]
    for row in grouped:
        assert row["twin_losses"] == sorted(row["twin_losses"])
        # groups of one size: their mean is that of all tokens
        for found, name, steps in ((row["twin_losses"], "twin", "0"), (row["losses"]["3"], "s2", "3")):
            every = statistics.fmean(losses[name, row["seed"], one, 1, 0.0][steps] for one in inside)
            assert statistics.fmean(found) == pytest.approx(every, rel=1e-5)

    monkeypatch.setattr(thinking, "draw_steps", lambda *args: None)
    monkeypatch.setattr(thinking, "draw_difficulty", lambda *args: True)
    monkeypatch.setattr(thinking, "run_clm", lambda argv: pytest.fail("trained again"))
    measures = script("thinkers.measures")
    monkeypatch.setattr(measures, "prediction_cost", lambda *args: pytest.fail("measured again"))
    lines = len(rows)
    assert thinking.main(argv) == text
    assert len(path.read_text().splitlines()) == lines


def test_given_checkpoints_are_measured_and_not_trained(script, data, tmp_path, monkeypatch):
    thinking = script("thinking")
    thinking.main(argv_of(data, tmp_path, "--variants", "twin", "proposal", "--seeds", "0"))
    monkeypatch.setattr(thinking, "run_clm", lambda argv: pytest.fail("trained"))
    runs = tmp_path.glob("runs/*/*-2-0/config.json")
    folders = {path.parent.name.partition("-")[0]: path.parent for path in runs}
    given = ["--checkpoints", f"ours={folders['proposal']}", f"plain={folders['twin']}"]
    text = thinking.main([*argv_of(data, tmp_path), *given])
    cells = cells_of(text, "# Thinking longer", "ours")
    assert float(cells[1]) > 1 and "(from 0)" in cells[6]  # it predicts without a step
    assert "## By difficulty" in text
    assert "## At equal data" not in text
    with pytest.raises(FileNotFoundError, match="nowhere"):
        thinking.main([*argv_of(data, tmp_path), "--checkpoints", "nowhere"])


@pytest.mark.parametrize(("start", "steps"), [("normal", [1, 2, 4]), ("proposal", [0, 1, 2, 4]), ("proposal", [0])])
def test_one_descent_gives_the_losses_of_all_steps(script, make_model, start, steps):
    measures = script("thinkers.measures")
    model = make_model(thinking_noise_std=1.0, candidate_init=start).eval()
    ids = torch.randint(0, model.config.vocab_size, (3, 7))
    for noise in (0.0, 1.0):
        thinking = {"thinking_candidates": 1, "thinking_noise_std": noise}
        found = measures.batch_losses(model, ids, steps, **thinking)
        assert list(found) == steps
        for count, losses in found.items():
            alone = model(ids, labels=ids, thinking_steps=count, loss_reduction="none", **thinking).loss
            torch.testing.assert_close(losses, alone[:, :-1])
            mean = model(ids, labels=ids, thinking_steps=count, **thinking).loss
            torch.testing.assert_close(losses.mean(), mean)
    several = {"thinking_candidates": 3, "thinking_noise_std": 0.0}
    found = measures.batch_losses(model, ids, [1, 2], **several)
    mean = model(ids, labels=ids, thinking_steps=2, **several).loss
    torch.testing.assert_close(found[2].mean(), mean)


def test_fewest_steps_are_those_of_training(script, make_model):
    measures = script("thinkers.measures")
    assert measures.fewest_steps(make_model().config) == make_model().config.num_landscapes
    assert measures.fewest_steps(make_model(random_steps=[2, 3], thinking_steps=3).config) == 2
    config = make_model().config
    assert not measures.starts_with_prediction(config)
    config.candidate_init = "proposal"
    assert measures.starts_with_prediction(config) and measures.fewest_steps(config) == 0


def test_bad_options_and_missing_files_are_refused(script, data, tmp_path, capsys):
    thinking, texts = script("thinking"), script("thinkers.data")
    with pytest.raises(SystemExit):
        thinking.main(argv_of(data, tmp_path, "--variants", "sideways"))
    assert "sideways" in capsys.readouterr().err
    with pytest.raises(ValueError, match="twin-flops shall equal 's1'.*--compute-of"):
        thinking.main(argv_of(data, tmp_path, "--variants", "twin", "twin-flops"))
    with pytest.raises(FileNotFoundError, match=r"nowhere/text/brown/train\.txt.*README"):
        thinking.main(argv_of(tmp_path / "nowhere", tmp_path, "--variants", "twin"))
    tokenizer = texts.build_tokenizer("ab ab\n", 259)
    with pytest.raises(ValueError, match="tiny has .* too few for a block of 64"):
        texts.blocks_of(["ab"], tokenizer, 64, 128, "tiny")


def test_a_run_of_other_options_is_not_taken_for_this_one(script, data, tmp_path, monkeypatch):
    thinking = script("thinking")
    options = thinking.parse(argv_of(data, tmp_path, "--variants", "twin"))
    prepared = script("thinkers.data").prepare_texts(data, tmp_path, ["brown"], 300)
    run = thinking.Run("twin", "twin")
    thinking.train(run, 0, 2, options, prepared)
    monkeypatch.setitem(thinking.VARIANTS, "twin", ["--twin", "--learning_rate", "1e-3"])
    with pytest.raises(ValueError, match="other options.*--runs"):
        thinking.train(run, 0, 2, options, prepared)


@pytest.mark.parametrize("stop", [4, 8], ids=["while training", "while evaluating"])
def test_an_interrupted_run_goes_on(script, data, tmp_path, monkeypatch, stop):
    from ebt_transformers.training.trainer import EBTTrainer

    thinking = script("thinking")
    prepared = script("thinkers.data").prepare_texts(data, tmp_path, ["brown"], 300)
    run = thinking.Run("twin", "twin")
    options = thinking.parse(argv_of(data, tmp_path, "--runs", str(tmp_path / "whole")))
    whole, loss = thinking.train(run, 0, 8, options, prepared)

    options.runs = tmp_path / "stopped"
    make = EBTTrainer.__init__
    with monkeypatch.context() as patch:
        stopping = {"callbacks": [StopAt(stop)]}
        patch.setattr(EBTTrainer, "__init__", lambda self, *args, **kwargs: make(self, *args, **kwargs, **stopping))
        patch.setattr(EBTTrainer, "evaluate", lambda *args, **kwargs: sys.exit("killed"))
        with pytest.raises(SystemExit, match="killed"):
            thinking.train(run, 0, 8, options, prepared)
    resumed, same = thinking.train(run, 0, 8, options, prepared)
    assert same == pytest.approx(loss)
    assert (resumed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_groups_are_of_one_size_the_easiest_first(script):
    measures = script("thinkers.measures")
    difficulty = torch.tensor([5.0, 1.0, 4.0, 2.0, 3.0, 0.0])
    losses = torch.tensor([50.0, 10.0, 40.0, 20.0, 30.0, 0.0])
    assert measures.group_means(losses, difficulty, 3) == [5.0, 25.0, 45.0]
