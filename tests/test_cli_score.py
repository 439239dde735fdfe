"""Laws of `ebt score`: the numbers of the pipeline, as a table and as JSON, of texts given or in files."""

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, LlamaForCausalLM

from ebt_transformers import cli, transformer_pp_config
from ebt_transformers.assets import checkpoint_path
from ebt_transformers.pipelines import EnergyScoringPipeline


TEXTS = ["To be, or not to be", "2 + 2 = 5"]
Score = Callable[..., tuple[int, list[str], str]]


@pytest.fixture(scope="module")
def checkpoint(make_model: Callable, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny random model, saved with the shipped tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoint")
    make_model(vocab_size=1024).save_pretrained(folder)
    AutoTokenizer.from_pretrained(checkpoint_path()).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def scorer(make_model: Callable) -> EnergyScoringPipeline:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint_path())
    return EnergyScoringPipeline(model=make_model(vocab_size=1024), tokenizer=tokenizer, device="cpu")


@pytest.fixture
def score(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> Score:
    """Runs `ebt score` with the model; exit status, lines printed, standard error."""

    def run(*argv: str) -> tuple[int, list[str], str]:
        model = [] if "--model" in argv else ["--model", checkpoint, "--device", "cpu"]
        capsys.readouterr()
        status = cli.main(["score", *argv, *model])
        shown = capsys.readouterr()
        return status, shown.out.splitlines(), shown.err

    return run


def same(found: Any, expected: Any) -> bool:
    """Whether records are equal but for the last digits of their numbers."""
    numbers: list[list[float]] = []
    rest = []
    for record in (found, expected):
        numbers.append([])
        rest.append(json.loads(json.dumps(record), parse_float=lambda digits: numbers[-1].append(float(digits))))
    return rest[0] == rest[1] and numbers[0] == pytest.approx(numbers[1], rel=1e-3, abs=1e-4)


def test_json_has_the_records_of_the_pipeline(score: Score, scorer: EnergyScoringPipeline) -> None:
    status, lines, _ = score(*TEXTS, "--json", "--steps", "3", "--landscape", "0", "--score-by", "likelihood")
    options = {"thinking_steps": 3, "landscape": 0, "score_by": "likelihood"}
    assert status == 0
    assert same([json.loads(line) for line in lines], scorer(TEXTS, output_tokens=False, **options))
    _, (line,), _ = score(*TEXTS, "--json", "--prompt", "ROMEO:\n", "--output-tokens", "--reduction", "sum")
    expected = scorer({"prompt": "ROMEO:\n", "continuations": TEXTS}, reduction="sum")
    assert same(json.loads(line), expected)


def test_the_table_has_the_texts_and_with_a_prompt_the_best_first(score: Score, scorer: EnergyScoringPipeline) -> None:
    _, lines, _ = score(*TEXTS)
    rows = [line for line in lines if line.startswith('| "')]
    assert [json.loads(row.split("|")[1]) for row in rows] == TEXTS
    assert [float(row.split("|")[3]) for row in rows] == pytest.approx(
        [one["score"] for one in scorer(TEXTS)], abs=1e-3
    )
    for score_by in ("energy", "likelihood"):
        _, lines, _ = score(*TEXTS, "--prompt", "a", "--score_by", score_by)
        rows = [line for line in lines if line.startswith('| "')]
        best = scorer({"prompt": "a", "continuations": TEXTS}, score_by=score_by)["best"]
        assert json.loads(rows[0].split("|")[1]) == best and len(rows) == 2


def test_every_token_is_reported_on_request(score: Score) -> None:
    _, lines, _ = score(TEXTS[0], "--output_tokens")
    tokens = [json.loads(line.split("|")[1]) for line in lines if line.startswith('| "')][1:]
    assert "".join(tokens) == TEXTS[0]


def test_files_standard_input_and_lines(
    score: Score, scorer: EnergyScoringPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("To be\n\nNo\n", encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", io.StringIO("Go"))
    _, lines, _ = score("--file", str(tmp_path / "a.txt"), "-", "--json")
    assert [json.loads(line)["text"] for line in lines] == ["To be\n\nNo\n", "Go"]
    _, lines, _ = score("--file", str(tmp_path / "a.txt"), "--lines", "--json")
    expected = scorer(["To be", "No"], output_tokens=False)
    assert same([json.loads(line) for line in lines], expected)


def test_a_shown_text_is_one_short_line(score: Score) -> None:
    _, lines, _ = score("To be\n" * 20, "--max_length", "16")
    (row,) = [line for line in lines if line.startswith('| "')]
    assert json.loads(row.split("|")[1]) == ("To be\n" * 20)[:57] + "..."


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([""], "Text 0 has no token to predict"),
        (["--file", "nowhere.txt"], "There is no file nowhere.txt."),
        (["--file", "blank.txt", "--lines"], "There is no line with text in blank.txt."),
        (["a", "--lines"], "--lines has an effect with --file only."),
        (["a", "--score-by", "luck"], "`score_by` must be one of relative_energy, energy, likelihood, got 'luck'"),
        (["a", "--thinking-steps", "0"], "`thinking_steps` must be"),
        (["a", "--landscap", "0", "--promt", "b"], "Did you mean --prompt?"),
        (["a", "--model", "./nowhere"], "There is no checkpoint folder ./nowhere."),
    ],
)
def test_mistakes_are_one_line(
    score: Score, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argv: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("blank.txt").write_text(" \n")
    status, lines, error = score(*argv)
    assert (status, lines) == (2, [])
    assert message in error and error.count("\n") == 1


def test_a_model_without_energies_is_refused(score: Score, scorer: EnergyScoringPipeline, tmp_path: Path) -> None:
    LlamaForCausalLM(transformer_pp_config(scorer.model.config)).save_pretrained(tmp_path)
    scorer.tokenizer.save_pretrained(tmp_path)
    status, _, error = score("a", "--model", str(tmp_path))
    assert status == 2 and "LlamaForCausalLM gives tokens no energies" in error.splitlines()[-1]


def test_help_lists_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["--help"])
    assert "score texts by energy and likelihood" in capsys.readouterr().out
