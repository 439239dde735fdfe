"""Laws of 0 thinking steps wherever a user meets them: models that start at a prediction have it, others refuse it."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoTokenizer, PreTrainedTokenizerBase, pipeline

from ebt_transformers import EBTForCausalLM, ThinkingConfig, cli
from ebt_transformers.assets import checkpoint_path
from ebt_transformers.demo import run_demo
from ebt_transformers.pipelines import (
    generate_with_energies,
    mean_losses_by_steps,
    perplexity_by_steps,
    text_energies,
    text_losses,
    token_scores,
)
from ebt_transformers.pipelines.text_windows import encode_continuations
from ebt_transformers.training.card_measurements import (
    ThinkingMeasurement,
    measure_thinking,
    relative_flops,
    thinking_passes,
)
from ebt_transformers.training.card_sections import results
from ebt_transformers.training.card_thinking import verdict
from ebt_transformers.training.model_card import CardFacts, write_card


PROMPT = "ROMEO:\n"
TEXTS = ["To be, or not to be", "Speak, I charge thee, speak!"]
PLAIN = {"step_conditioning": "none", "num_landscapes": 1, "thinking_steps": 2, "update": "residual"}
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def tokens(*shape: int) -> Tensor:
    """Random token ids, always the same."""
    return torch.randint(1024, shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(checkpoint_path())


@pytest.fixture(scope="module", params=["one landscape", "two landscapes"])
def model(request: pytest.FixtureRequest, make_model: Callable[..., EBTForCausalLM]) -> EBTForCausalLM:
    """A model that starts at a prediction."""
    options = PLAIN if request.param == "one landscape" else {"update": "residual"}
    # a gentle step: random weights are steep, and a steep walk makes much of how numbers were rounded
    options = {**options, "step_size": 0.1, "vocab_size": 1024, "pad_token_id": 1, "eos_token_id": 0}
    return make_model(candidate_init="proposal", **options)


@pytest.fixture(scope="module")
def other(make_model: Callable[..., EBTForCausalLM]) -> EBTForCausalLM:
    """A model that does not."""
    return make_model(vocab_size=1024)


@pytest.fixture(scope="module")
def folder(model: EBTForCausalLM, tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> str:
    place = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return str(place)


# ---- losses by steps ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "thinking",
    [{}, {"candidates": 3}, {"init": "normal"}, {"budget": 10}, {"tolerance": 1e-3}],
    ids=["plain", "candidates", "random start", "budget", "tolerance"],
)
def test_losses_of_any_number_of_steps_are_those_of_the_call(model: EBTForCausalLM, thinking: dict[str, Any]) -> None:
    blocks = tokens(3, 9)
    found = mean_losses_by_steps(model, blocks, (3, 0, 2), progress_bar=False, thinking=thinking)
    assert list(found) == [0, 2, 3]
    for steps, loss in found.items():
        with torch.no_grad():
            expected = model(blocks, labels=blocks, use_cache=False, thinking=thinking, thinking_steps=steps).loss
        assert loss == pytest.approx(expected.item(), rel=1e-5)


def test_0_steps_are_the_first_that_are_compared(model: EBTForCausalLM, other: EBTForCausalLM, tokenizer: Any) -> None:
    blocks = tokens(2, 6)
    assert list(perplexity_by_steps(model, blocks, progress_bar=False)) == [0, 1, 2, 4, 8]
    assert list(perplexity_by_steps(model, blocks, [0], progress_bar=False)) == [0]
    assert list(text_losses(model, tokenizer, TEXTS).losses) == [0, 1, 2, 4, 8]
    assert list(perplexity_by_steps(other, blocks, progress_bar=False)) == [1, 2, 4, 8]
    assert list(text_losses(other, tokenizer, TEXTS).losses) == [1, 2, 4, 8]
    for refused, steps in ((other, [0, 1]), (model, [-1]), (model, [])):
        least = "at least 1" if refused is other else "at least 0"
        with pytest.raises(ValueError, match=f"`steps` must be integers of {least}"):
            perplexity_by_steps(refused, blocks, steps, progress_bar=False)


def test_texts_have_losses_energies_and_scores_without_thinking(model: EBTForCausalLM, tokenizer: Any) -> None:
    losses = text_losses(model, tokenizer, TEXTS, steps=[0, 2])
    alone = text_losses(model, tokenizer, TEXTS, steps=[0])
    energies = text_energies(model, tokenizer, TEXTS, thinking={"steps": 0})
    for text, loss, only, count, energy in zip(
        TEXTS, losses.losses[0], alone.losses[0], losses.tokens, energies, strict=True
    ):
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]])
        with torch.no_grad():
            output = model(ids, thinking_steps=0, output_energies=True)
        expected = -output.logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None]).sum().item()
        assert loss == pytest.approx(expected, rel=1e-4) and only == pytest.approx(loss, rel=1e-5)
        assert energy.shape == (count, 1)
        assert_close(torch.from_numpy(energy), output.energies[0, :-1], **CLOSE)
    (scores,) = token_scores(
        model, encode_continuations(tokenizer, "To be, or", [" not to be"]), thinking={"steps": 0}
    )
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer("To be, or not to be")["input_ids"]]])
    with torch.no_grad():
        logits = model(ids, thinking_steps=0).logits[0, :-1]
    by_token = -logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    assert_close(torch.from_numpy(scores.losses), by_token[-len(scores.ids) :], **CLOSE)


# ---- calls -------------------------------------------------------------------------------------------------------


def test_pipelines_and_generation_take_0_steps(model: EBTForCausalLM, tokenizer: Any) -> None:
    options = {"max_new_tokens": 5, "do_sample": False, "thinking_steps": 0}
    encoded = tokenizer(PROMPT, return_tensors="pt")
    ids = encoded["input_ids"]
    for _ in range(5):  # by hand: the likeliest token of the plain prediction
        with torch.no_grad():
            ids = torch.cat([ids, model(ids, thinking_steps=0).logits[:, -1:].argmax(-1)], 1)
        if ids[0, -1] == model.config.eos_token_id:
            break
    assert torch.equal(model.generate(**encoded, **options), ids)
    (result,) = generate_with_energies(model, tokenizer, PROMPT, **options)
    assert [token.token for token in result.tokens] == ids[0, encoded["input_ids"].shape[1] :].tolist()
    assert all(len(token.energies) == 1 and token.steps_taken == 0 for token in result.tokens)
    writer = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    (answer,) = writer(PROMPT, return_full_text=False, **options)
    assert answer["generated_text"] == result.text
    scorer = pipeline("energy-scoring", model=model, tokenizer=tokenizer, device="cpu", thinking_steps=0)
    found = scorer(TEXTS[0])
    expected = text_losses(model, tokenizer, TEXTS[:1], steps=[0])
    assert found["total_nll"] == pytest.approx(expected.losses[0][0], rel=1e-4)


def test_a_generation_config_may_say_0(model: EBTForCausalLM) -> None:
    prompt, options = tokens(2, 4), {"max_new_tokens": 4, "do_sample": False}
    expected = model.generate(prompt, thinking_steps=0, **options)
    model.generation_config.thinking_steps = 0
    try:
        assert torch.equal(model.generate(prompt, **options), expected)
    finally:
        del model.generation_config.thinking_steps


def test_0_steps_use_up_nothing_of_a_budget(model: EBTForCausalLM) -> None:
    ids = tokens(2, 5)
    with torch.no_grad():
        plain = model(ids, thinking_steps=0)
        output = model(ids, thinking_steps=0, thinking_budget=3, steps_spent=torch.tensor([1, 2]))
    assert torch.equal(output.logits, plain.logits)
    assert output.steps_spent.tolist() == [[1] * 5, [2] * 5]
    options = {"max_new_tokens": 3, "do_sample": False, "thinking_steps": 0}
    assert torch.equal(model.generate(ids, thinking_budget=2, **options), model.generate(ids, **options))


def test_pruning_without_a_step_is_refused(model: EBTForCausalLM) -> None:
    options = {"thinking_steps": 0, "thinking_candidates": 4}
    for call in (model, model.generate):
        with pytest.raises(ValueError, match=r"prune_after.*below the number of steps \(0\).*nothing would be pruned"):
            call(tokens(1, 4), thinking_prune_keep=2, **options)
        with pytest.raises(ValueError, match="prune_after.*means nothing without"):
            call(tokens(1, 4), thinking_prune_after=1, **options)


# ---- commands ----------------------------------------------------------------------------------------------------


def test_the_commands_take_0_steps(
    folder: str, model: EBTForCausalLM, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["generate", PROMPT, "--model", folder, "--max_new_tokens", "4", "--thinking_steps", "0"]
    assert cli.main([*argv, "--device", "cpu", "--json", "--output_energies"]) == 0
    shown = json.loads(capsys.readouterr().out)
    (expected,) = generate_with_energies(model, tokenizer, PROMPT, thinking_steps=0, max_new_tokens=4)
    assert shown["text"] == expected.text and all(len(token["energies"]) == 1 for token in shown["tokens"])
    assert cli.main([*argv, "--device", "cpu", "--output_energies"]) == 0
    assert "start" in capsys.readouterr().out
    assert cli.main(["score", TEXTS[0], "--model", folder, "--device", "cpu", "--steps", "0", "--json"]) == 0
    found = text_losses(model, tokenizer, TEXTS[:1], steps=[0])
    assert json.loads(capsys.readouterr().out)["total_nll"] == pytest.approx(found.losses[0][0], rel=1e-4)


@pytest.mark.parametrize("steps", [None, (0,)])
def test_the_demonstration_begins_with_0_steps(folder: str, tmp_path: Path, steps: tuple[int, ...] | None) -> None:
    said: list[str] = []
    options = {"max_new_tokens": 4, "blocks": 2, "output_dir": str(tmp_path), "say": said.append}
    report = run_demo(folder, steps=steps, **options)
    counts = [0, 1, 2, 4, 8] if steps is None else [0]
    assert [sample.steps for sample in report.samples] == list(report.perplexities) == counts
    assert [len(sample.mean_energies) for sample in report.samples] == [count + 1 for count in counts]
    assert all(map(math.isfinite, report.perplexities.values())) and report.picture is not None
    shown = "\n".join(said)
    assert "--- 0 thinking steps ---" in shown and "as an ordinary language model" in shown


def test_the_demonstration_of_another_model_refuses_0_steps(
    other: EBTForCausalLM, tokenizer: Any, tmp_path: Path
) -> None:
    other.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"at least 1 for this model, got \[0, 2\]"):
        run_demo(str(tmp_path), steps=(2, 0), say=lambda _: None)


# ---- cards -------------------------------------------------------------------------------------------------------


def measured_on(model: EBTForCausalLM) -> ThinkingMeasurement:
    ids = tokens(4, 9)
    return measure_thinking(model, {"input_ids": ids, "labels": ids})


def test_a_card_measures_the_start(model: EBTForCausalLM, other: EBTForCausalLM) -> None:
    found, ids = measured_on(model), tokens(4, 9)
    assert found.steps == [0, 1, 2, 4, 8] and len(found.losses) == 8 and len(found.energies) == 9
    for steps in found.steps:
        with torch.no_grad():
            output = model(ids, labels=ids, thinking_steps=steps)
        assert found.value(steps) == pytest.approx(output.loss.item(), rel=1e-5)
    plain = measured_on(other)
    assert plain.steps == [1, 2, 4, 8] and plain.start_loss is None


def test_0_steps_cost_one_pass_of_the_context(model: EBTForCausalLM) -> None:
    assert thinking_passes(model, 0) == (1, 0)
    passes: list[bool] = []
    handle = model.model.register_forward_pre_hook(
        lambda module, arguments, options: passes.append("candidate_embeds" in options), with_kwargs=True
    )
    model(tokens(1, 5), thinking_steps=0)
    handle.remove()
    assert passes == [False]
    (factor, once), _ = relative_flops(model, {"input_ids": tokens(1, 8)}, [0, 1])
    assert factor == pytest.approx(1) and once > 2


def test_a_card_says_what_0_steps_do(model: EBTForCausalLM, other: EBTForCausalLM, tmp_path: Path) -> None:
    found = measured_on(model)
    history = [{"step": 1, "loss": 3.5, "proposal_loss": 2.25}]
    facts = CardFacts("tiny", "me/tiny", results={"proposal_loss": 2.25}, history=history)
    card = write_card(tmp_path, model, facts, found).read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in card.splitlines() if line.startswith("| 0")]
    assert rows[0][:2] == ["0 (start)", f"{found.start_loss:.4f}"]
    assert rows[1] == ["0", "1", "0", "1.0x"]
    for said in (
        "thinking_steps=0)  # none at all",
        "the cost of an ordinary language model",
        "With 0 steps there is no thinking",
        "with 0 thinking steps it is an ordinary language model",
        "| training loss before the first thinking step, at the end |  2.25 |",
        "**proposal_loss_weight**: 1.0",
        "better than 0, for" if found.value(2) < found.start_loss else "worse than 0, for",
    ):
        assert said in card
    assert "proposal_loss" in results(facts, model)
    assert "ordinary language model" in write_card(tmp_path, model, facts).read_text(encoding="utf-8")
    card = write_card(tmp_path, other, CardFacts("tiny", "me/tiny"), measured_on(other)).read_text(encoding="utf-8")
    assert "ordinary" not in card and "proposal_loss_weight" not in card and "thinking_steps=0" not in card


@pytest.mark.parametrize("default", [0, 2, 32])
def test_the_picture_of_a_card_begins_at_the_start(
    make_model: Callable[..., EBTForCausalLM], tmp_path: Path, default: int
) -> None:
    pytest.importorskip("matplotlib")
    from ebt_transformers.training.card_plot import draw_thinking

    options = {**PLAIN, "thinking_steps": default}
    found = measured_on(make_model(candidate_init="proposal", vocab_size=1024, **options))
    assert found.curve == (0, [found.start_loss, *found.losses])
    draw_thinking(found, tmp_path / "energy.png")
    assert (tmp_path / "energy.png").read_bytes().startswith(b"\x89PNG")
    assert verdict(found)


MEASURED = ThinkingMeasurement(
    kind="text",
    rows=2,
    positions=510,
    default_steps=2,
    landscapes=1,
    steps=[0, 1, 2, 4, 8],
    losses=[3.0] * 8,
    energies=[0.0] * 9,
    psnr=None,
    flops=[1.0, 4.0, 7.0, 13.0, 25.0],
    counted_on=64,
    start_loss=3.0,
)


@pytest.mark.parametrize(
    ("start", "default", "losses", "said"),
    [
        (
            3.2,
            2,
            [3.0] * 8,
            "Thinking pays here (2 steps: 0.2 nats better than 0, for 7 times the operations). Thinking l",
        ),
        (
            2.8,
            2,
            [3.0] * 8,
            "Thinking does not pay here (2 steps: 0.2 nats worse than 0, for 7 times the operations).",
        ),
        (2.999, 2, [3.0] * 8, "Thinking makes no difference worth its cost here (2 steps: 0.001 nats worse than 0"),
        (3.2, 0, [3.0] * 8, "Thinking longer than by default pays here (1 step: 0.2 nats better than 0, for 4 times"),
        (3.2, 2, [2.9] + [3.0] * 7, "Thinking less does pay (1 step: 0.1 nats better than 2, for 0.57 times"),
    ],
)
def test_the_verdict_compares_with_0_steps(start: float, default: int, losses: list[float], said: str) -> None:
    assert said in verdict(replace(MEASURED, start_loss=start, default_steps=default, losses=losses))


# ---- the web -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "thinking",
    [
        ThinkingConfig(steps=0),
        ThinkingConfig(steps=0, candidates=3),
        ThinkingConfig(steps=3, candidates=3),
        ThinkingConfig(steps=2, init="normal"),
    ],
    ids=["none", "none of several", "three of several", "random start"],
)
def test_a_watched_token_starts_at_its_prediction(
    model: EBTForCausalLM, tokenizer: Any, thinking: ThinkingConfig
) -> None:
    pytest.importorskip("gradio", reason="gradio is not installed")
    from ebt_transformers.web.plots import draw_distributions, draw_energies_of_candidates
    from ebt_transformers.web.text import watch_text, watch_token
    from ebt_transformers.web.text_tab import about_token, token_rows

    text = watch_text(model, tokenizer, PROMPT, thinking, max_new_tokens=3)
    first, steps = text.first_on_last_landscape, thinking.steps
    for index, token in enumerate(text.tokens):
        walk = watch_token(model, text, index)
        context = torch.tensor([text.prompt_ids + [one.token for one in text.tokens[:index]]])
        with torch.no_grad():
            output = model(context, thinking=thinking, logits_to_keep=1, output_trajectory=True)
        assert walk.energies.shape == (thinking.candidates or 1, steps + 1)
        assert_close(walk.energies[walk.chosen], torch.tensor(token.energies), **CLOSE)
        assert_close(walk.distributions, output.trajectory[0, -1].softmax(-1), **CLOSE)
        (axes,) = draw_distributions(walk, token.token, lambda one: tokenizer.decode([one])).axes
        assert len(axes.patches) == 8 * (steps + 1)
        assert draw_energies_of_candidates(walk, first).axes
        line = about_token(text, index, first)
        assert ("→" in line) == (steps > 0) and f"{token.steps_taken} step" in line
    assert len(token_rows(text.tokens, first)) == len(text.tokens)


def test_the_slider_begins_at_0_for_models_that_have_it(
    model: EBTForCausalLM, other: EBTForCausalLM, tokenizer: Any
) -> None:
    gr = pytest.importorskip("gradio", reason="gradio is not installed")
    from ebt_transformers.web.text_tab import TextTab

    for shown, fewest in ((model, 0), (other, 1)):
        tab = TextTab(shown, tokenizer)
        with gr.Blocks() as page:
            tab.build()
        (slider,) = [block for block in page.blocks.values() if getattr(block, "elem_id", None) == "steps"]
        assert (slider.minimum, slider.maximum, slider.value) == (fewest, 16, 4)
        assert ("ordinary" in (slider.info or "")) == (fewest == 0)
    *_, last = TextTab(model, tokenizer).generate(PROMPT, 0, 1, 0.0, 1.0, 3, 0.0, 0)
    assert all(len(token.energies) == 1 for token in last[0].tokens) and last[-1] is not None
