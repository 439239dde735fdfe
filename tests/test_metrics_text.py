"""Laws of the metrics of texts and energies: they are what the model computes, whatever the batches and windows."""

import doctest
import inspect
import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from sklearn.metrics import roc_auc_score
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from ebt_transformers import (
    EBTForImageDenoising,
    EBTImageConfig,
    EBTTrainer,
    EBTTrainingArguments,
    transformer_pp_config,
)
from ebt_transformers.assets import checkpoint_path, shakespeare_splits
from ebt_transformers.metrics import metric_path
from ebt_transformers.pipelines import text_energies, text_losses
from ebt_transformers.training.compute_metrics import WITH_ENERGIES, energy_compute_metrics, keep_energies


evaluate = pytest.importorskip("evaluate")
NAMES = ("ebt_perplexity", "ebt_energy_gap", "ebt_energy_auroc")
TEXTS = ["To be, or not to be", "O", "Speak, I charge thee, speak! What art thou that usurp'st this time of night?"]
LONG = shakespeare_splits()["test"][:900]  # more than one context


@pytest.fixture(scope="module")
def shipped():
    """The shipped model in evaluation mode, and its tokenizer."""
    return (
        AutoModelForCausalLM.from_pretrained(checkpoint_path()).eval(),
        AutoTokenizer.from_pretrained(checkpoint_path()),
    )


@pytest.fixture
def load(tmp_path):
    """Loads a metric by its name."""
    return lambda name, **options: evaluate.load(metric_path(name), keep_in_memory=True, **options)


def losses_one_by_one(model, tokenizer, text: str, steps: int) -> torch.Tensor:
    """Losses of the tokens of a text that fits the context, by the plainest way there is."""
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]])
    with torch.no_grad():
        logits = model(ids[:, :-1], thinking_steps=steps).logits
    return -logits[0].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]


# ---- perplexity ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3])
def test_perplexity_is_exp_of_the_mean_loss_of_all_tokens(load, shipped, batch_size):
    model, tokenizer = shipped
    perplexity = load("ebt_perplexity", model=model, tokenizer=tokenizer, batch_size=batch_size)
    found = perplexity.compute(predictions=TEXTS, thinking_steps=[1, 3])
    each = perplexity.compute(predictions=TEXTS, thinking_steps=[1, 3], reduction="none")
    for steps in (1, 3):
        by_text = [losses_one_by_one(model, tokenizer, text, steps) for text in TEXTS]
        losses = torch.cat(by_text)
        assert found["mean_loss"][steps] == pytest.approx(losses.mean().item(), rel=1e-5)
        assert found["perplexity"][steps] == pytest.approx(losses.mean().exp().item(), rel=1e-5)
        np.testing.assert_allclose(each["mean_loss"][steps], [loss.mean() for loss in by_text], rtol=1e-5)
        assert found["tokens"] == len(losses) and each["tokens"] == list(map(len, by_text))
    alone = perplexity.compute(data=TEXTS, thinking_steps=3)
    assert alone["perplexity"] == pytest.approx(found["perplexity"][3], rel=1e-6)
    assert found["perplexity"][1] != pytest.approx(found["perplexity"][3], rel=1e-4)


def test_without_a_number_of_steps_the_model_thinks_as_it_is_set_to(load, shipped):
    model, tokenizer = shipped
    perplexity = load("ebt_perplexity", model=model, tokenizer=tokenizer)
    own = model.config.default_thinking().steps
    assert perplexity.compute(predictions=TEXTS) == perplexity.compute(predictions=TEXTS, thinking_steps=own)


def test_options_of_thinking_arrive(load, shipped):
    model, tokenizer = shipped
    perplexity = load(
        "ebt_perplexity", model=model, tokenizer=tokenizer, thinking_candidates=3, thinking_init="normal"
    )
    found = perplexity.compute(predictions=TEXTS[:1], thinking_steps=[1, 2])["mean_loss"]
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(TEXTS[0])["input_ids"]]])
    for steps, loss in found.items():
        options = {"thinking_steps": steps, "thinking_candidates": 3, "thinking_init": "normal"}
        with torch.no_grad():
            assert loss == pytest.approx(model(ids, labels=ids, **options).loss.item(), rel=1e-5)


def test_every_token_of_a_long_text_is_predicted_once_from_a_full_window(shipped):
    model, tokenizer = shipped
    ids = [tokenizer.bos_token_id, *tokenizer(LONG, verbose=False)["input_ids"]]
    found = text_losses(model, tokenizer, [LONG, TEXTS[0]], steps=[1], max_length=64)
    assert found.tokens == [len(ids) - 1, len(tokenizer(TEXTS[0])["input_ids"])] and found.tokens[0] > 4 * 64
    total = 0.0
    for begin in range(1, len(ids), 64):
        end = min(begin + 64, len(ids))
        window = torch.tensor([ids[max(0, end - 65) : end]])
        with torch.no_grad():
            logits = model(window[:, :-1], thinking_steps=1).logits[0].log_softmax(-1)
        total -= logits.gather(1, window[0, 1:, None])[begin - end :].sum().item()
    assert found.losses[1][0] == pytest.approx(total, rel=1e-5)
    whole = text_losses(model, tokenizer, [LONG], steps=[1])  # the model's own context, 256 tokens
    assert whole.losses[1][0] < total


def test_without_start_token_the_first_token_is_not_scored(shipped):
    model, tokenizer = shipped
    with_start, without = (
        text_losses(model, tokenizer, TEXTS[:1], [1], add_start_token=flag) for flag in (True, False)
    )
    assert without.tokens[0] == with_start.tokens[0] - 1
    with pytest.raises(ValueError, match="Text 1 has no token to predict.*'O'"):
        text_losses(model, tokenizer, TEXTS, [1], add_start_token=False)


def test_a_model_that_does_not_think_has_one_perplexity(load, shipped):
    twin = LlamaForCausalLM(transformer_pp_config(shipped[0].config)).eval()
    ids = torch.tensor([[0, *shipped[1](TEXTS[2])["input_ids"]]])
    with torch.no_grad():
        expected = twin(ids, labels=ids).loss.item()
    perplexity = load("ebt_perplexity", model=twin, tokenizer=shipped[1])
    assert perplexity.compute(predictions=TEXTS[2:])["mean_loss"] == pytest.approx(expected, rel=1e-5)
    assert list(perplexity.compute(predictions=TEXTS, thinking_steps=[2, 4])["perplexity"]) == [0]


def test_a_model_in_training_stays_in_training_and_a_folder_is_enough(load, shipped):
    model, tokenizer = shipped
    model.train()
    try:
        own = load("ebt_perplexity").compute(predictions=TEXTS, model=model, tokenizer=tokenizer)
        assert model.training
    finally:
        model.eval()
    assert own == load("ebt_perplexity").compute(predictions=TEXTS, model=str(checkpoint_path()))


def test_a_model_with_an_adapter_is_measured_with_it(load, shipped):
    peft = pytest.importorskip("peft")
    plain = AutoModelForCausalLM.from_pretrained(checkpoint_path()).eval()
    adapted = peft.get_peft_model(plain, peft.LoraConfig(init_lora_weights=False, target_modules=["q_proj", "v_proj"]))
    perplexity = load("ebt_perplexity", tokenizer=shipped[1], thinking_steps=[1, 2])
    found, own = (perplexity.compute(predictions=TEXTS, model=model)["mean_loss"] for model in (adapted, shipped[0]))
    with adapted.disable_adapter():
        assert perplexity.compute(predictions=TEXTS, model=adapted)["mean_loss"] == pytest.approx(own)
    assert found[2] != pytest.approx(own[2], rel=1e-3)


def test_text_generation_evaluator(load, shipped, monkeypatch):
    """`evaluate.evaluator` generates with the model's own thinking, and gives our metric what was written."""
    model, tokenizer = shipped
    settings = {"do_sample": False, "max_new_tokens": 4, "thinking_steps": 4, "temperature": None, "top_k": None}
    for name, value in settings.items():
        monkeypatch.setattr(model.generation_config, name, value, raising=False)
    data = Dataset.from_dict({"text": ["ROMEO:", "JULIET:"]})
    perplexity = load("ebt_perplexity", model=model, tokenizer=tokenizer, thinking_steps=[1, 2])
    found = evaluate.evaluator("text-generation").compute(model, tokenizer=tokenizer, data=data, metric=perplexity)
    written = [
        tokenizer.decode(model.generate(**tokenizer(text, return_tensors="pt"))[0], skip_special_tokens=True)
        for text in data["text"]
    ]
    assert found["perplexity"] == pytest.approx(perplexity.compute(predictions=written)["perplexity"])
    assert found["samples_per_second"] > 0


def test_the_image_task_is_unknown_to_the_evaluator():
    """evaluate has a fixed list of tasks; ours is not on it (docs/howto/evaluate.md says what to do instead)."""
    with pytest.raises(KeyError, match="image-denoising"):
        evaluate.evaluator("image-denoising")


PERPLEXITY_MISTAKES = {
    "no texts": ({"predictions": []}, "at least one text"),
    "one text": ({"predictions": "To be"}, "list of at least one text"),
    "no strings": ({"predictions": [3]}, "texts, got 3"),
    "both names": ({"predictions": TEXTS, "data": TEXTS}, "one of them"),
    "no steps": ({"predictions": TEXTS, "thinking_steps": []}, "at least 1, got"),
    "zero steps": ({"predictions": TEXTS, "thinking_steps": [0, 1]}, r"\[0, 1\]"),
    "unknown": ({"predictions": TEXTS, "batchsize": 3}, "batchsize.*batch_size"),
    "unknown thinking": ({"predictions": TEXTS, "thinking_stepps": 3}, "stepps"),
    "batches": ({"predictions": TEXTS, "batch_size": 0}, "at least 1, got 0"),
    "too long": ({"predictions": TEXTS, "max_length": 257}, "between 1 and.*256, got 257"),
    "reduction": ({"predictions": TEXTS, "reduction": "sum"}, "'sum'"),
    "no model": ({"predictions": TEXTS, "model": None}, "no `model`"),
    "no tokenizer": ({"predictions": TEXTS, "tokenizer": None}, "needs its `tokenizer`"),
}


@pytest.mark.parametrize("mistake", list(PERPLEXITY_MISTAKES))
def test_mistakes_about_perplexity_are_named(load, shipped, mistake):
    options, message = PERPLEXITY_MISTAKES[mistake]
    perplexity = load("ebt_perplexity", model=shipped[0], tokenizer=shipped[1])
    with pytest.raises(ValueError, match=message):
        perplexity.compute(**options)


# ---- energies --------------------------------------------------------------------------------------------------


def test_energies_of_texts_are_those_of_the_model(shipped):
    model, tokenizer = shipped
    found = text_energies(model, tokenizer, [*TEXTS, LONG], batch_size=3, thinking={"steps": 3})
    for text, energies in zip(TEXTS, found, strict=False):
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]])
        with torch.no_grad():
            expected = model(ids[:, :-1], thinking_steps=3, output_energies=True).energies[0]
        np.testing.assert_allclose(energies, expected, rtol=1e-4, atol=1e-4)
    assert found[-1].shape == (len(tokenizer(LONG, verbose=False)["input_ids"]), 4)
    first = torch.tensor([[tokenizer.bos_token_id, *tokenizer(LONG, verbose=False)["input_ids"][:255]]])
    with torch.no_grad():
        expected = model(first, thinking_steps=3, output_energies=True).energies[0]
    np.testing.assert_allclose(found[-1][:256], expected, rtol=1e-4, atol=1e-4)  # windows are in their order


def test_energy_gap_is_the_mean_over_positions(load):
    random = np.random.default_rng(0)
    energies = [random.normal(size=shape) for shape in ((5, 4), (2, 4), (3,))]
    flat = [np.atleast_2d(array) for array in energies]
    first, last = (np.concatenate([array[:, step] for array in flat]) for step in (0, -1))
    gap = load("ebt_energy_gap")
    found = gap.compute(predictions=energies)
    assert found["energy_gap"] == pytest.approx(first.mean() - last.mean())
    assert (found["initial_energy"], found["final_energy"]) == pytest.approx((first.mean(), last.mean()))
    each = gap.compute(predictions=energies, reduction="none")["energy_gap"]
    np.testing.assert_allclose(each, [(array[:, 0] - array[:, -1]).mean() for array in flat])
    for array in energies:
        gap.add(prediction=torch.from_numpy(array))
    assert gap.compute() == found


def test_energy_gap_of_texts(load, shipped):
    model, tokenizer = shipped
    gap = load("ebt_energy_gap", model=model, tokenizer=tokenizer)
    options = {"thinking_landscapes": [0, 0, 0]}
    energies = text_energies(model, tokenizer, TEXTS, thinking=options)
    assert gap.compute(predictions=TEXTS, **options) == pytest.approx(gap.compute(predictions=energies), rel=1e-5)
    assert gap.compute(predictions=TEXTS, **options)["energy_gap"] > 0  # a descent


def test_energy_auroc_is_scikit_learns(load):
    random = np.random.default_rng(0)
    labels, energies = random.integers(0, 2, 50), random.normal(size=50).round(1)  # with ties
    auroc = load("ebt_energy_auroc")
    found = auroc.compute(predictions=energies, references=labels)["energy_auroc"]
    assert found == roc_auc_score(labels, energies)
    higher = energies + 10 * labels
    assert auroc.compute(predictions=higher, references=labels) == {"energy_auroc": 1.0}
    assert auroc.compute(predictions=-higher, references=labels) == {"energy_auroc": 0.0}
    for energy, label in zip(energies, labels, strict=True):
        auroc.add(prediction=energy, reference=label)
    assert auroc.compute()["energy_auroc"] == found


def test_text_of_random_tokens_has_higher_energy_than_shakespeare(load, shipped):
    """The recipe of docs/howto/evaluate.md."""
    model, tokenizer = shipped
    ids = torch.tensor(tokenizer(LONG, verbose=False)["input_ids"][:320]).view(10, 32)
    mixed = ids.flatten()[torch.randperm(320)].view(10, 32)
    with torch.no_grad():
        energies = [model.energy(rows[:, :-1], candidate_ids=rows[:, 1:]).mean(1) for rows in (ids, mixed)]
    found = load("ebt_energy_auroc").compute(predictions=torch.cat(energies), references=[0] * 10 + [1] * 10)
    assert found["energy_auroc"] > 0.75  # guessing: 0.5


ENERGY_MISTAKES = {
    "none": ("ebt_energy_gap", {"predictions": []}, "at least one"),
    "one energy": ("ebt_energy_gap", {"predictions": [[1.0]]}, r"at least 2.*\(1,\)"),
    "not finite": ("ebt_energy_gap", {"predictions": [[1.0, math.nan]]}, "finite"),
    "no model": ("ebt_energy_gap", {"predictions": ["To be"]}, "no `model`"),
    "both": ("ebt_energy_gap", {"predictions": ["To be", [1.0, 2.0]]}, "give either"),
    "of texts": ("ebt_energy_gap", {"predictions": [[1.0, 2.0]], "thinking_steps": 2}, "thinking_steps.*for texts"),
    "unknown": ("ebt_energy_gap", {"predictions": [[1.0, 2.0]], "batchsize": 2}, "batchsize.*batch_size"),
    "reduction": ("ebt_energy_gap", {"predictions": [[1.0, 2.0]], "reduction": "sum"}, "'sum'"),
    "counts": ("ebt_energy_auroc", {"predictions": [1.0, 2.0], "references": [1]}, "2 predictions and 1 ref"),
    "labels": ("ebt_energy_auroc", {"predictions": [1.0, 2.0], "references": [1, 2]}, "got 2"),
    "one kind": ("ebt_energy_auroc", {"predictions": [1.0, 2.0], "references": [0, 0]}, "All 2 examples are in"),
    "infinite": ("ebt_energy_auroc", {"predictions": [1.0, math.inf], "references": [0, 1]}, "finite"),
    "matrix": ("ebt_energy_auroc", {"predictions": [[1.0], [2.0]], "references": [0, 1]}, r"\(2, 1\)"),
}


@pytest.mark.parametrize("mistake", list(ENERGY_MISTAKES))
def test_mistakes_about_energies_are_named(load, mistake):
    name, options, message = ENERGY_MISTAKES[mistake]
    with pytest.raises(ValueError, match=message):
        load(name).compute(**options)


def test_a_model_without_energies_has_no_gap(load, shipped):
    twin = LlamaForCausalLM(transformer_pp_config(shipped[0].config))
    with pytest.raises(TypeError, match="LlamaForCausalLM has no energies"):
        load("ebt_energy_gap").compute(predictions=TEXTS, model=twin, tokenizer=shipped[1])


# ---- with a trainer --------------------------------------------------------------------------------------------


@pytest.fixture
def make_trainer(make_model, tmp_path):
    """A trainer whose evaluation data has rows of two lengths, padded."""
    rows = [{"input_ids": list(range(1, 9)), "labels": list(range(1, 9))} for _ in range(3)]
    rows += [{"input_ids": [3, 4, 5, 6, 0, 0], "labels": [3, 4, 5, 6, -100, -100]}]

    def make(**options):
        arguments = EBTTrainingArguments(
            str(tmp_path),
            per_device_eval_batch_size=1,
            report_to="none",
            use_cpu=True,
            max_steps=1,
            eval_strategy="steps",
        )
        return EBTTrainer(make_model(), arguments, train_dataset=rows[:3], eval_dataset=rows, **options)

    return make


def test_trainer_reports_the_gap_of_the_labelled_positions(make_trainer):
    trainer = make_trainer(compute_metrics=energy_compute_metrics, preprocess_logits_for_metrics=keep_energies)
    found = trainer.evaluate(ignore_keys=WITH_ENERGIES)
    model = trainer.model.eval()
    energies = []
    for ids in (trainer.eval_dataset[0]["input_ids"], [3, 4, 5, 6]):
        with torch.no_grad():
            energies.append(model(torch.tensor([ids]), output_energies=True).energies[0, :-1])
    positions = torch.cat([energies[0]] * 3 + [energies[1]])
    assert found["eval_initial_energy"] == pytest.approx(positions[:, 0].mean().item(), rel=1e-4)
    assert found["eval_energy_gap"] == pytest.approx((positions[:, 0] - positions[:, -1]).mean().item(), rel=1e-3)
    assert found["eval_loss"] == pytest.approx(make_trainer().evaluate()["eval_loss"])


def test_trainer_reports_the_gap_while_training(make_trainer):
    trainer = make_trainer(compute_metrics=energy_compute_metrics, preprocess_logits_for_metrics=keep_energies)
    trainer.train(ignore_keys_for_eval=WITH_ENERGIES)
    assert any("eval_energy_gap" in entry for entry in trainer.state.log_history)


def test_trainer_reports_the_gap_of_images(tmp_path):
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = EBTForImageDenoising(EBTImageConfig(image_size=8, patch_size=4, step_size=10.0, **size)).eval()
    rows = [{"pixel_values": torch.randn(3, 8, 8), "labels": torch.rand(3, 8, 8)} for _ in range(3)]
    trainer = EBTTrainer(
        model,
        EBTTrainingArguments(str(tmp_path), per_device_eval_batch_size=2, report_to="none", use_cpu=True),
        eval_dataset=rows,
        compute_metrics=energy_compute_metrics,
        preprocess_logits_for_metrics=keep_energies,
    )
    found = trainer.evaluate(ignore_keys=WITH_ENERGIES)
    with torch.no_grad():
        energies = model(torch.stack([row["pixel_values"] for row in rows]), output_energies=True).energies
    assert found["eval_initial_energy"] == pytest.approx(energies[:, 0].mean().item(), rel=1e-4)
    assert found["eval_final_energy"] == pytest.approx(energies[:, -1].mean().item(), rel=1e-4)


def test_without_asking_there_are_no_energies_and_logits_are_as_before(make_trainer):
    seen = []
    trainer = make_trainer(compute_metrics=lambda prediction: seen.append(prediction.predictions.shape) or {})
    trainer.evaluate()
    assert seen == [(4, 8, 41)]
    trainer = make_trainer(compute_metrics=energy_compute_metrics, preprocess_logits_for_metrics=keep_energies)
    with pytest.raises(ValueError, match="ignore_keys=WITH_ENERGIES"):
        trainer.evaluate()
    trainer = make_trainer(compute_metrics=energy_compute_metrics)
    with pytest.raises(ValueError, match="preprocess_logits_for_metrics=keep_energies"):
        trainer.evaluate(ignore_keys=WITH_ENERGIES)


# ---- what they say of themselves -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_they_are_documented_and_their_examples_run(load, name):
    info = load(name).info
    assert all(len(text.strip()) > 50 for text in (info.description, info.citation, info.inputs_description))
    assert "predictions" in inspect.getdoc(type(load(name))._compute) or "predictions" in info.inputs_description
    lines = "\n".join("" if line.startswith("```") else line for line in info.inputs_description.splitlines())
    examples = doctest.DocTestParser().get_doctest(lines, {}, name, None, None)
    assert examples.examples and doctest.DocTestRunner().run(examples).failed == 0
