"""Laws of pipeline("energy-scoring"): its numbers are the model's own, alone, in batches and in windows."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase, pipeline
from transformers.pipelines.pt_utils import KeyDataset

from ebt_transformers import EBTForCausalLM, transformer_pp_config
from ebt_transformers.assets import checkpoint_path
from ebt_transformers.pipelines import EnergyScoringPipeline
from ebt_transformers.pipelines.text_windows import encode_continuations, encode_texts


TEXTS = ["To be, or not to be", "ROMEO:\nWhat light through yonder window breaks?", "a"]
CHOICE = {"prompt": "First Citizen:\nWe are", "continuations": [" zebra 42 %%", " all the people", "n't"]}
LONG = " ".join(TEXTS) * 2  # more than the 32 tokens of context of the tiny model
NUMBERS = ("energy", "relative_energy", "nll")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(checkpoint_path())


@pytest.fixture(scope="module")
def model(make_model: Callable) -> EBTForCausalLM:
    return make_model(vocab_size=1024)


@pytest.fixture(scope="module")
def scorer(model: EBTForCausalLM, tokenizer: PreTrainedTokenizerBase) -> EnergyScoringPipeline:
    return pipeline("energy-scoring", model=model, tokenizer=tokenizer, device="cpu")


def numbers(record: dict[str, Any]) -> torch.Tensor:
    """All that the tokens of a record got, (tokens, 3)."""
    return torch.tensor([[token[name] for name in NUMBERS] for token in record["tokens"]])


def test_the_numbers_of_a_token_are_the_model_s_own(scorer: EnergyScoringPipeline) -> None:
    model, tokenizer = scorer.model, scorer.tokenizer
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(TEXTS[0])["input_ids"]]])
    for landscape in (None, 0):
        record = scorer(TEXTS[0], thinking_steps=3, landscape=landscape)
        with torch.no_grad():
            logits = model(ids[:, :-1], thinking_steps=3).logits
            token = model.energy(ids[:, :-1], candidate_ids=ids[:, 1:], landscape=landscape)
            predicted = model.energy(ids[:, :-1], candidate_probs=logits.softmax(-1), landscape=landscape)
        nll = torch.nn.functional.cross_entropy(logits[0], ids[0, 1:], reduction="none")
        expected = torch.stack([token[0], token[0] - predicted[0], nll], 1)
        torch.testing.assert_close(numbers(record), expected, rtol=1e-4, atol=1e-5)
    assert [token["token"] for token in record["tokens"]] == ids[0, 1:].tolist()
    assert "".join(token["text"] for token in record["tokens"]) == record["text"] == TEXTS[0]


def test_the_energy_of_the_prediction_is_that_which_thinking_ends_with(scorer: EnergyScoringPipeline) -> None:
    ids = torch.tensor([[0, *scorer.tokenizer(TEXTS[0])["input_ids"]]])
    with torch.no_grad():
        final = scorer.model(ids[:, :-1], thinking_steps=2, output_energies=True).energies[0, :, -1]
    found = numbers(scorer(TEXTS[0], thinking_steps=2))
    torch.testing.assert_close(found[:, 0] - found[:, 1], final, rtol=1e-4, atol=1e-5)


def test_means_totals_and_the_score_are_those_of_the_tokens(scorer: EnergyScoringPipeline) -> None:
    record = scorer(TEXTS[1])
    assert record["num_tokens"] == len(record["tokens"]) > 1
    for column, name in enumerate(NUMBERS):
        values = numbers(record)[:, column]
        assert record[f"mean_{name}"] == pytest.approx(values.mean().item(), rel=1e-4, abs=1e-5)
        assert record[f"total_{name}"] == pytest.approx(values.sum().item(), rel=1e-4, abs=1e-5)
    for score_by, name in (("energy", "energy"), ("relative_energy", "relative_energy"), ("likelihood", "nll")):
        assert scorer(TEXTS[1], score_by=score_by)["score"] == record[f"mean_{name}"]
        assert scorer(TEXTS[1], score_by=score_by, reduction="sum")["score"] == record[f"total_{name}"]
    assert record["score"] == record["mean_relative_energy"]
    assert "tokens" not in scorer(TEXTS[1], output_tokens=False)


@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_inputs_of_unequal_lengths_give_together_what_each_gives_alone(
    scorer: EnergyScoringPipeline, batch_size: int
) -> None:
    inputs = [*TEXTS, CHOICE, LONG]
    for one, record in zip(inputs, scorer(inputs, batch_size=batch_size), strict=True):
        alone = scorer(one)
        if one is CHOICE:
            assert record["ranking"] == alone["ranking"] and record["best"] == alone["best"]
        pairs = zip(record.get("continuations", [record]), alone.get("continuations", [alone]), strict=True)
        for together, single in pairs:
            assert together["text"] == single["text"]
            torch.testing.assert_close(numbers(together), numbers(single), rtol=1e-4, atol=1e-4)


def test_datasets_and_generators_are_read_one_by_one(scorer: EnergyScoringPipeline) -> None:
    expected = [record["score"] for record in scorer(TEXTS)]
    table = Dataset.from_dict({"text": TEXTS})
    for inputs in (KeyDataset(table, "text"), (text for text in TEXTS), ({"text": text} for text in TEXTS)):
        assert [record["score"] for record in scorer(inputs)] == pytest.approx(expected, rel=1e-4)


# ---- continuations ---------------------------------------------------------------------------------------------


def test_continuations_are_ranked_by_each_score(scorer: EnergyScoringPipeline) -> None:
    for reduction, kind in (("mean", "mean"), ("sum", "total")):
        for score_by, name in (("energy", "energy"), ("relative_energy", "relative_energy"), ("likelihood", "nll")):
            found = scorer(CHOICE, reduction=reduction, score_by=score_by)
            values = [record[f"{kind}_{name}"] for record in found["continuations"]]
            assert [values[number] for number in found["ranking"][score_by]] == sorted(values)
            assert found["best"] == CHOICE["continuations"][values.index(min(values))]
            assert [record["score"] for record in found["continuations"]] == values
    assert [record["text"] for record in found["continuations"]] == CHOICE["continuations"]


def test_a_continuation_has_the_numbers_of_its_tokens_in_the_whole_text(scorer: EnergyScoringPipeline) -> None:
    for record in scorer(CHOICE)["continuations"]:
        whole = scorer(CHOICE["prompt"] + record["text"])
        torch.testing.assert_close(numbers(record), numbers(whole)[-record["num_tokens"] :], rtol=1e-4, atol=1e-5)
        text = "".join(token["text"] for token in record["tokens"])
        assert text.endswith(record["text"]) and (CHOICE["prompt"] + record["text"]).endswith(text)


def test_continuing_nothing_is_a_text(scorer: EnergyScoringPipeline) -> None:
    found = scorer({"prompt": "", "continuations": [TEXTS[0]]})["continuations"][0]
    torch.testing.assert_close(numbers(found), numbers(scorer(TEXTS[0])))


def test_a_token_across_the_border_belongs_to_the_continuation(tokenizer: PreTrainedTokenizerBase) -> None:
    (alone,) = encode_texts(tokenizer, ["the"])
    assert len(alone.ids) == 2  # one token, with the start
    (cut,) = encode_continuations(tokenizer, "th", ["e"])
    assert (cut.ids, cut.first) == (alone.ids, 1)


# ---- long texts ------------------------------------------------------------------------------------------------


def test_every_token_of_a_long_text_is_scored_once_from_a_full_context(scorer: EnergyScoringPipeline) -> None:
    ids = [scorer.tokenizer.bos_token_id, *scorer.tokenizer(LONG)["input_ids"]]
    assert len(ids) > 2 * 16
    record = scorer(LONG, max_length=16)
    assert [token["token"] for token in record["tokens"]] == ids[1:]
    last = torch.tensor([ids[-17:]])
    with torch.no_grad():
        energy = scorer.model.energy(last[:, :-1], candidate_ids=last[:, 1:])[0, -1].item()
    assert record["tokens"][-1]["energy"] == pytest.approx(energy, rel=1e-4)


@pytest.mark.parametrize("length", [8, 12, 16])
def test_a_continuation_sees_at_least_half_a_context_of_a_long_prompt(
    scorer: EnergyScoringPipeline, length: int
) -> None:
    continuation = " ".join(TEXTS[:2])
    (text,) = encode_continuations(scorer.tokenizer, LONG, [continuation])
    record = scorer({"prompt": LONG, "continuations": [continuation]}, max_length=length)["continuations"][0]
    assert [token["token"] for token in record["tokens"]] == text.ids[text.first :]
    end = min(text.first + length // 2, len(text.ids))  # of the window with the first token
    window = torch.tensor([text.ids[end - 1 - length : end]])
    with torch.no_grad():
        energies = scorer.model.energy(window[:, :-1], candidate_ids=window[:, 1:])[0]
    assert record["tokens"][0]["energy"] == pytest.approx(energies[-(end - text.first)].item(), rel=1e-4)


# ---- options and mistakes --------------------------------------------------------------------------------------


def test_thinking_moves_likelihood_and_leaves_the_energy_of_the_token(scorer: EnergyScoringPipeline) -> None:
    few, many = (numbers(scorer(TEXTS[0], thinking_steps=steps)) for steps in (1, 4))
    torch.testing.assert_close(few[:, 0], many[:, 0])
    assert not torch.allclose(few[:, 2], many[:, 2], rtol=1e-3)


def test_options_of_the_construction_hold_until_a_call_has_its_own(
    model: EBTForCausalLM, tokenizer: PreTrainedTokenizerBase, scorer: EnergyScoringPipeline
) -> None:
    set_up = pipeline(
        "energy-scoring", model=model, tokenizer=tokenizer, device="cpu", thinking_steps=4, score_by="likelihood"
    )
    assert set_up(TEXTS[0])["score"] == scorer(TEXTS[0], thinking_steps=4)["mean_nll"]
    assert set_up(TEXTS[0], thinking_steps=1, score_by="energy")["score"] == scorer(TEXTS[0])["mean_energy"]
    assert set_up(TEXTS[0], thinking_steps=1)["score"] == scorer(TEXTS[0], thinking_steps=1)["mean_nll"]


def test_without_a_start_token_the_first_is_not_scored(scorer: EnergyScoringPipeline) -> None:
    with_start, without = scorer(TEXTS[0]), scorer(TEXTS[0], add_start_token=False)
    assert [token["token"] for token in without["tokens"]] == [token["token"] for token in with_start["tokens"]][1:]
    with pytest.raises(ValueError, match=r"no token to predict \(the first is not\): 'a'"):
        scorer("a", add_start_token=False)


@pytest.mark.parametrize(
    ("inputs", "options", "error", "message"),
    [
        ("", {}, ValueError, "Text 0 has no token to predict: ''"),
        ([], {}, ValueError, "the list is empty"),
        (3, {}, TypeError, "An input must be a text, or .* got int"),
        ({"prompt": "a"}, {}, TypeError, "continuations"),
        ({"prompt": "a", "continuations": "b"}, {}, TypeError, "must be a list of texts, got str"),
        ({"prompt": "a", "continuations": [1]}, {}, TypeError, "must be texts, got 1"),
        ({"prompt": "a", "continuations": []}, {}, ValueError, "at least one continuation"),
        ({"prompt": "a", "continuations": [" b", ""]}, {}, ValueError, "Continuation 1 has no token to predict"),
        ("a", {"score_by": "enery"}, ValueError, "`score_by` must be one of relative_energy, energy, likelihood"),
        ("a", {"reduction": "max"}, ValueError, "`reduction` must be one of mean, sum, got 'max'"),
        ("a", {"landscape": 2}, ValueError, "`landscape` must be between 0 and 1, got 2"),
        ("a", {"max_length": 33}, ValueError, "between 1 and the model's context of 32, got 33"),
        ("a", {"batch_size": 0}, ValueError, "`batch_size` must be an integer of at least 1, got 0"),
        ("a", {"thinking_steps": 0}, ValueError, "`thinking_steps` must be"),
        ("a", {"temperature": 1}, ValueError, "Unknown option.* temperature. Allowed: .*landscape"),
    ],
)
def test_mistakes_raise(
    scorer: EnergyScoringPipeline, inputs: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        scorer(inputs, **options)


def test_a_model_without_energies_and_one_without_tokenizer_are_refused(
    model: EBTForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    twin = LlamaForCausalLM(transformer_pp_config(model.config))
    with pytest.raises(TypeError, match=r"LlamaForCausalLM gives tokens no energies.*EBTForCausalLM"):
        pipeline("energy-scoring", model=twin, tokenizer=tokenizer, device="cpu")
    with pytest.raises(ValueError, match="There is no `tokenizer`"):
        EnergyScoringPipeline(model=model, device="cpu")


def test_a_model_in_half_precision_and_training_mode_is_scored(
    make_model: Callable, tokenizer: PreTrainedTokenizerBase, scorer: EnergyScoringPipeline
) -> None:
    half = make_model(vocab_size=1024).to(torch.bfloat16).train()
    found = numbers(pipeline("energy-scoring", model=half, tokenizer=tokenizer, device="cpu")(TEXTS[0]))
    assert not half.training
    torch.testing.assert_close(found[:, 0], numbers(scorer(TEXTS[0]))[:, 0], rtol=0.1, atol=0.1)
    assert bool(found.isfinite().all())


# ---- saved -----------------------------------------------------------------------------------------------------

WITHOUT_THE_PACKAGE = """
import sys
sys.modules["ebt_transformers"] = None
from transformers import pipeline
scorer = pipeline(model=sys.argv[1], device="cpu", trust_remote_code=True)
scorer.save_pretrained(sys.argv[2])
again = pipeline("energy-scoring", model=sys.argv[2], device="cpu", trust_remote_code=True)
for one in (scorer, again):
    print(one("To be", thinking_steps=2)["score"], one.task)
"""


def test_a_saved_pipeline_loads_and_is_saved_without_the_package(
    scorer: EnergyScoringPipeline, tmp_path: Path
) -> None:
    scorer.save_pretrained(tmp_path / "saved")
    assert not hasattr(scorer.model.config, "custom_pipelines")
    expected = scorer("To be", thinking_steps=2)["score"]
    known = {"pipeline_class": EnergyScoringPipeline, "device": "cpu"}  # no code from the folder is run
    here = pipeline("energy-scoring", model=str(tmp_path / "saved"), **known)
    assert here("To be", thinking_steps=2)["score"] == pytest.approx(expected, rel=1e-3)
    folders = {"HF_HOME": str(tmp_path / "home"), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_THE_PACKAGE, str(tmp_path / "saved"), str(tmp_path / "again")],
        env={**os.environ, **folders, "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [task for _, task in lines] == ["energy-scoring"] * 2
    assert [float(score) for score, _ in lines] == pytest.approx([expected] * 2, rel=1e-3)
