"""Laws of the lm-evaluation-harness with our models: `thinking_steps` arrives, and the numbers are our own."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from ebt_transformers import cli
from ebt_transformers.assets import checkpoint_path
from ebt_transformers.pipelines import text_losses


lm_eval = pytest.importorskip("lm_eval")
TaskManager = pytest.importorskip("lm_eval.tasks").TaskManager
BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
STEPS = 3  # not what the checkpoint does by itself
QUESTIONS = [
    {"question": "ROMEO:\nWhat light through yonder", "choices": ["window breaks", "fish"], "answer": 0},
    {"question": "To be, or not to", "choices": ["be", "walk home"], "answer": 0},
]
TEXTS = [{"text": "Speak, I charge thee, speak!"}, {"text": "Good morrow, cousin. " * 70}]  # more than one context
TASKS = {
    "tiny_choice": """
        output_type: multiple_choice
        doc_to_text: question
        doc_to_choice: choices
        doc_to_target: answer
        metric_list: [{metric: acc}]
    """,
    "tiny_text": """
        output_type: loglikelihood_rolling
        doc_to_text: ""
        doc_to_target: "{{text}}"
        metric_list: [{metric: bits_per_byte}]
    """,
    "tiny_writing": """
        output_type: generate_until
        doc_to_text: question
        doc_to_target: "{{choices[0]}}"
        generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 12}
        metric_list: [{metric: exact_match}]
    """,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder of tasks of a few lines, with their data beside them."""
    place = tmp_path_factory.mktemp("tasks")
    for name, rows in (("questions", QUESTIONS), ("texts", TEXTS)):
        (place / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name, body in TASKS.items():
        data = place / ("texts.jsonl" if name == "tiny_text" else "questions.jsonl")
        head = f"task: {name}\ndataset_path: json\ntest_split: test\ndataset_kwargs:\n  data_files: {{test: {data}}}\n"
        lines = [line.removeprefix("        ") for line in body.strip("\n").splitlines()]
        (place / f"{name}.yaml").write_text(head + "\n".join(lines) + "\n")
    return place


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    """Runs tasks in this process, by lm_eval's own model `hf`; returns what it logs about every document."""
    cache = tmp_path_factory.mktemp("datasets")

    def evaluate(task: str, gen_kwargs: dict | None = None, **model_args) -> list[dict]:
        import datasets

        before, datasets.config.HF_DATASETS_CACHE = datasets.config.HF_DATASETS_CACHE, cache
        try:
            tasks = TaskManager(include_path=str(folder), include_defaults=False)
            found = lm_eval.simple_evaluate(
                model="hf",
                model_args={"pretrained": str(checkpoint_path()), **model_args},
                tasks=[task],
                task_manager=tasks,
                device="cpu",
                batch_size=2,
                gen_kwargs=gen_kwargs,
                bootstrap_iters=0,
            )
        finally:
            datasets.config.HF_DATASETS_CACHE = before
        return sorted(found["samples"][task], key=lambda sample: sample["doc_id"])

    return evaluate


@pytest.fixture(scope="module")
def shipped():
    """The shipped model in evaluation mode, and its tokenizer."""
    return (
        AutoModelForCausalLM.from_pretrained(checkpoint_path()).eval(),
        AutoTokenizer.from_pretrained(checkpoint_path()),
    )


def log_likelihood(model, tokenizer, context: str, continuation: str, steps: int) -> float:
    before, after = tokenizer(context)["input_ids"], tokenizer(f"{context} {continuation}")["input_ids"]
    ids = torch.tensor([after])
    with torch.no_grad():
        logits = model(ids[:, :-1], thinking_steps=steps).logits[0].log_softmax(-1)
    return logits.gather(1, ids[0, 1:, None])[len(before) - 1 :].sum().item()


def test_likelihoods_of_choices_are_those_after_so_many_steps(run, shipped):
    found = run("tiny_choice", thinking_steps=STEPS)
    default = run("tiny_choice")
    for row, sample, other in zip(QUESTIONS, found, default, strict=True):
        expected = [log_likelihood(*shipped, row["question"], choice, STEPS) for choice in row["choices"]]
        values = [value for value, _ in sample["filtered_resps"]]
        assert values == pytest.approx(expected, rel=1e-4)
        assert values != pytest.approx([value for value, _ in other["filtered_resps"]], rel=1e-4)


def test_rolling_likelihoods_are_those_of_text_losses(run, shipped):
    texts = [row["text"] for row in TEXTS]
    found = text_losses(*shipped, texts, steps=[1, STEPS])
    assert found.tokens[1] > shipped[0].config.max_position_embeddings
    for steps in (1, STEPS):
        samples = run("tiny_text", thinking_steps=steps)
        values = [-sample["filtered_resps"][0] for sample in samples]
        assert values == pytest.approx(found.losses[steps], rel=1e-5)
    assert found.losses[1] != pytest.approx(found.losses[STEPS], rel=1e-4)


@pytest.mark.parametrize("way", ["model_args", "gen_kwargs"])
def test_generated_text_is_what_generate_writes_with_so_many_steps(run, shipped, tmp_path, way):
    model, tokenizer = shipped
    for part in shipped:
        part.save_pretrained(tmp_path)
    settings = GenerationConfig.from_pretrained(tmp_path)
    settings.max_new_tokens = None  # or it would win over lm_eval's limit (docs/howto/evaluate.md)
    settings.save_pretrained(tmp_path)
    texts = {}
    for steps in (1, 8):
        options = {"thinking_steps": steps} if way == "model_args" else {"gen_kwargs": {"thinking_steps": steps}}
        texts[steps] = [
            sample["filtered_resps"][0] for sample in run("tiny_writing", pretrained=str(tmp_path), **options)
        ]
        for row, text in zip(QUESTIONS, texts[steps], strict=True):
            ids = tokenizer(row["question"], return_tensors="pt")
            written = model.generate(**ids, do_sample=False, max_new_tokens=12, thinking_steps=steps)[0]
            expected = tokenizer.decode(written[ids["input_ids"].shape[1] :], skip_special_tokens=True)
            assert text == expected.split("\n\n")[0]
    assert texts[1] != texts[8]


def test_0_steps_are_the_plain_prediction_of_models_that_have_one(run, shipped, make_model, tmp_path):
    tokenizer = shipped[1]
    model = make_model(candidate_init="proposal", vocab_size=1024, step_size=0.1, eos_token_id=tokenizer.eos_token_id)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path)
    found = {steps: run("tiny_choice", pretrained=str(tmp_path), thinking_steps=steps) for steps in (0, 2)}
    for steps, samples in found.items():
        for row, sample in zip(QUESTIONS, samples, strict=True):
            expected = [log_likelihood(model, tokenizer, row["question"], choice, steps) for choice in row["choices"]]
            assert [value for value, _ in sample["filtered_resps"]] == pytest.approx(expected, rel=1e-4)
    assert found[0][0]["filtered_resps"] != found[2][0]["filtered_resps"]


def test_the_context_is_the_models_own(run):
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=str(checkpoint_path()), device="cpu", thinking_steps=STEPS, thinking_candidates=2)
    assert model.max_length == 256
    assert (model.model.config.thinking_steps, model.model.config.thinking_candidates) == (STEPS, 2)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("thinking_step", 4, "thinking_step'"),
        ("thinking_steps", "four", "thinking_steps.*'four'"),
        ("thinking_steps", 0, "`thinking_steps` must be at least 1 for this model, got 0"),
        ("thinking_tolerance", -1, "`thinking_tolerance` must be a finite number of at least 0, got -1"),
    ],
)
def test_options_that_are_unknown_or_out_of_range_raise(run, option, value, message):
    with pytest.raises((TypeError, ValueError, StrictDataclassError), match=message):
        run("tiny_choice", **{option: value})


# ---- a checkpoint that carries its code, by the command line -----------------------------------------------------


@pytest.mark.slow
def test_the_command_line_runs_a_checkpoint_that_carries_its_code(folder, shipped, tmp_path):
    for part in shipped:
        part.save_pretrained(tmp_path / "model")
    outputs = []
    for steps in (1, STEPS):
        command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--tasks", "tiny_choice", "--device", "cpu"]
        command += ["--include_path", str(folder), "--output_path", str(tmp_path / str(steps)), "--log_samples"]
        arguments = f"pretrained={tmp_path / 'model'},trust_remote_code=True,thinking_steps={steps}"
        done = subprocess.run([*command, "--model_args", arguments], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        (logged,) = (tmp_path / str(steps)).rglob("samples_tiny_choice*.jsonl")
        rows = sorted(map(json.loads, logged.read_text().splitlines()), key=lambda row: row["doc_id"])
        outputs.append([float(value) for value, _ in rows[0]["filtered_resps"]])
        expected = [
            log_likelihood(*shipped, QUESTIONS[0]["question"], choice, steps) for choice in QUESTIONS[0]["choices"]
        ]
        assert outputs[-1] == pytest.approx(expected, rel=1e-4)
    assert outputs[0] != pytest.approx(outputs[1], rel=1e-4)


# ---- the benchmark ---------------------------------------------------------------------------------------------


@pytest.fixture
def harness(monkeypatch):
    """The benchmark, imported as running it would."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    own = ("harness", "common")
    for name in own:
        monkeypatch.delitem(sys.modules, name, raising=False)
    threads = torch.get_num_threads()
    yield importlib.import_module("harness")
    torch.set_num_threads(threads)
    for name in own:
        sys.modules.pop(name, None)


@pytest.fixture
def data(tmp_path) -> Path:
    """A data folder of the layout of the real one."""
    scores = [
        {"target_scores": {"4": 1, "5": 0}, "input": "2 + 2"},
        {"target_scores": {"1": 0, "7": 1}, "input": "3 + 4"},
    ]
    for name in ("elementary_math_qa_question_only", "dyck_languages"):
        path = tmp_path / "data" / "bigbench" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"task_prefix": "Solve:", "example_input_prefix": "\nQ: ", "examples": scores}))
    (tmp_path / "data" / "lambada").mkdir()
    lines = [{"text": "He looked at the dark\u2028 sea"}, {"text": "She said nothing at all"}]
    (tmp_path / "data" / "lambada" / "lambada_test.jsonl").write_text(
        "\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n", encoding="utf-8"
    )
    return tmp_path / "data"


def test_benchmark_runs_resumes_and_compares(harness, data, tmp_path, monkeypatch):
    path = tmp_path / "lm_eval.jsonl"
    argv = ["--twin", str(checkpoint_path()), "--data", str(data), "--threads", "1", "--results", str(path)]
    argv += ["--limit", "2", "ebt_dyck_languages=1", "--steps", "1", "2"]
    text = harness.main([*argv, "--tasks", "ebt_lambada", "ebt_dyck_languages"])
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["column"] for row in rows] == ["1 step"] * 2 + ["2 steps"] * 2 + ["twin"] * 2
    for row in rows:
        count = 1 if row["task"] == "ebt_dyck_languages" else 2
        assert len(row["values"]) == 2 and all(len(values) == count for values in row["values"].values())
    for part in ("lm_eval 0", "python benchmarks/harness.py --twin", "Less twin", "Less 1 step", "± "):
        assert part in text
    measured = []
    monkeypatch.setattr(harness, "measure_task", lambda *args: measured.append(args))
    assert harness.main([*argv, "--tasks", "ebt_lambada", "ebt_dyck_languages"]) == text and not measured


def test_benchmark_reports_what_lm_eval_reports(harness, data, tmp_path):
    tasks = TaskManager(include_path=str(harness.TASKS), include_defaults=False, metadata={"data": str(data)})
    model = harness.HFLM(pretrained=str(checkpoint_path()), device="cpu", thinking_steps=1)
    for task, title, name in (
        ("ebt_lambada_text", "bits per byte", "bits_per_byte"),
        ("ebt_lambada", "accuracy", "acc"),
    ):
        found = harness.measure_task(model, task, None, tasks)
        (measure,) = (one for one in harness.MEASURES if (one.task, one.title) == (task, title))
        mean, _ = harness.weighted_mean(found["values"][title])
        assert mean * measure.unit == pytest.approx(found["harness"][name], rel=1e-4)


def test_standard_errors_are_those_of_a_mean_and_of_paired_differences(harness):
    random = torch.Generator().manual_seed(0)
    first, second = (torch.rand(50, generator=random, dtype=torch.float64) for _ in range(2))
    mean, error = harness.weighted_mean([(value, 1.0) for value in first.tolist()])
    assert (mean, error) == pytest.approx((first.mean().item(), first.std().item() / 50**0.5))
    shifted = [(value + 0.5, 1.0) for value in first.tolist()]
    assert harness.difference(shifted, [(value, 1.0) for value in first.tolist()]) == pytest.approx((0.5, 0.0))
    doubled = [(2 * value, 2.0) for value in first.tolist()]  # weights of a ratio
    assert harness.weighted_mean(doubled) == pytest.approx((mean, error))


def test_temperature_divides_the_logits(harness):
    options = harness.parse(["--temperatures", "1", "2"])
    plain, tempered = (harness.load(checkpoint_path(), value, options, thinking_steps=1) for value in (1.0, 2.0))
    ids = torch.tensor([[0, 5, 9]])
    torch.testing.assert_close(tempered._model_call(ids) * 2, plain._model_call(ids))
    with pytest.raises(SystemExit):
        harness.parse(["--temperatures", "0"])


def test_what_is_compared_has_the_same_temperature(harness):
    columns = ["1 step", "1 step, T=2", "2 steps", "2 steps, T=2", "twin"]
    assert harness.partners(columns, "twin") == {"1 step": "twin", "2 steps": "twin"}
    assert harness.partners(columns, "1 step") == {
        "2 steps": "1 step",
        "2 steps, T=2": "1 step, T=2",
        "twin": "1 step",
    }


def test_limits(harness):
    limits = ["100", "ebt_lambada=7"]
    assert harness.limit_of("ebt_lambada", limits) == 7 and harness.limit_of("ebt_shakespeare", limits) == 100
    assert harness.limit_of("ebt_lambada", []) is None
    for bad, message in (
        (["ebt_lambda=3"], "Unknown task 'ebt_lambda'"),
        (["many"], "got 'many'"),
        (["0"], "got '0'"),
    ):
        with pytest.raises(ValueError, match=message):
            harness.limit_of("ebt_lambada", bad)


def test_missing_data_says_where_to_put_it(harness, tmp_path, monkeypatch):
    sys.path.insert(0, str(harness.TASKS))
    try:
        utils = importlib.import_module("utils")
        with pytest.raises(FileNotFoundError, match="nowhere.*EBT_DATA"):
            utils.lambada(data=str(tmp_path / "nowhere"))
        monkeypatch.setenv("EBT_DATA", str(tmp_path / "elsewhere"))
        with pytest.raises(FileNotFoundError, match="elsewhere"):
            utils.elementary_math()
    finally:
        sys.path.remove(str(harness.TASKS))
        sys.modules.pop("utils", None)


# ---- `ebt lm_eval` ---------------------------------------------------------------------------------------------


@pytest.mark.slow  # lm_eval reads thousands of tasks first
def test_ebt_lm_eval_is_lm_evals_own_command_line(folder, tmp_path, capsys):
    arguments = f"pretrained={checkpoint_path()},thinking_steps={STEPS}"
    before = list(sys.argv)
    status = cli.main(
        ["lm_eval", "--model", "hf", "--model_args", arguments, "--tasks", "tiny_choice", "--device", "cpu"]
        + ["--include_path", str(folder), "--output_path", str(tmp_path)]
    )
    assert status == 0 and sys.argv == before
    (written,) = tmp_path.rglob("results_*.json")
    assert json.loads(written.read_text())["config"]["model_args"]["thinking_steps"] == STEPS
    assert "tiny_choice" in capsys.readouterr().out


def test_ebt_lm_eval_without_lm_eval_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", None)
    assert cli.main(["lm_eval", "--help"]) == cli.USAGE_ERROR
    assert "pip install ebt-transformers[lm-eval]" in capsys.readouterr().err


def test_a_generation_config_comes_before_model_args(run, tmp_path, shipped):
    """What the documentation warns of."""
    for part in shipped:
        part.save_pretrained(tmp_path)
    settings = GenerationConfig.from_pretrained(tmp_path)
    settings.max_new_tokens, settings.thinking_steps = None, 8
    settings.save_pretrained(tmp_path)
    texts = {
        steps: [sample["filtered_resps"][0] for sample in run("tiny_writing", pretrained=str(tmp_path), **options)]
        for steps, options in ((8, {"thinking_steps": 1}), (1, {"gen_kwargs": {"thinking_steps": 1}}))
    }
    assert texts[1] != texts[8]
