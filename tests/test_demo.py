"""The demonstration, and what it is made of: generation with energies, perplexity per number of steps."""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, pipeline

from ebt_transformers import EBTConfig, EBTForCausalLM, ThinkingConfig, transformer_pp_config
from ebt_transformers.assets import checkpoint_path
from ebt_transformers.demo import DemoReport, Sample, run_demo, verdict
from ebt_transformers.pipelines import generate_with_energies, mean_losses_by_steps, perplexity_by_steps
from ebt_transformers.training.data import held_out_blocks


PROMPTS = ["ROMEO:\n", "First Citizen:\nSpeak, speak.", "I"]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(checkpoint_path())


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 48}
    config = EBTConfig(vocab_size=1024, step_size=3.0, pad_token_id=1, eos_token_id=0, **size)
    return EBTForCausalLM(config).eval()


@pytest.fixture(scope="module")
def checkpoint(model, tokenizer, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "results.json").write_text(json.dumps({"twin": {"test_loss": 4.0}}))
    return str(folder)


# ---- generation with energies ----------------------------------------------------------------------------------


def test_energies_are_those_of_generate(model, tokenizer):
    (result,) = generate_with_energies(model, tokenizer, PROMPTS[0], thinking_steps=3, max_new_tokens=5)
    encoded = tokenizer(PROMPTS[0], return_tensors="pt")
    output = model.generate(
        **encoded, thinking_steps=3, max_new_tokens=5, output_energies=True, return_dict_in_generate=True
    )
    new = output.sequences[0, encoded["input_ids"].shape[1] :]
    assert [thought.token for thought in result.tokens] == new.tolist()
    energies = torch.tensor([thought.energies for thought in result.tokens])
    torch.testing.assert_close(energies, output.energies[0, : len(energies)])
    assert [thought.steps_taken for thought in result.tokens] == [3] * len(new)
    assert result.text == tokenizer.decode(new, skip_special_tokens=True)
    assert json.loads(json.dumps(result.to_dict()))["tokens"][0]["token"] == int(new[0])


def test_batch_equals_its_rows(model, tokenizer):
    options = {"max_new_tokens": 6, "thinking": ThinkingConfig(steps=2, candidates=3)}
    together = generate_with_energies(model, tokenizer, PROMPTS, **options)
    for prompt, result in zip(PROMPTS, together, strict=True):
        (alone,) = generate_with_energies(model, tokenizer, prompt, **options)
        assert (alone.prompt, alone.text) == (result.prompt, result.text) == (prompt, result.text)
        for one, other in zip(alone.tokens, result.tokens, strict=True):
            assert one.token == other.token
            assert one.energies == pytest.approx(other.energies, rel=1e-4, abs=1e-5)


def test_rows_end_at_their_end(model, tokenizer):
    (free,) = generate_with_energies(model, tokenizer, PROMPTS[1], max_new_tokens=6)
    end = free.tokens[2].token
    first = [thought.token for thought in free.tokens].index(end)
    results = generate_with_energies(model, tokenizer, PROMPTS, max_new_tokens=6, eos_token_id=end)
    assert [thought.token for thought in results[1].tokens] == [t.token for t in free.tokens[: first + 1]]
    for result in results:
        tokens = [thought.token for thought in result.tokens]
        assert end not in tokens[:-1] and 1 <= len(tokens) <= 6
        assert all(math.isfinite(energy) for thought in result.tokens for energy in thought.energies)


def test_several_continuations_and_beams(model, tokenizer):
    sampled = generate_with_energies(
        model, tokenizer, PROMPTS[:2], do_sample=True, num_return_sequences=2, max_new_tokens=3
    )
    assert [result.prompt for result in sampled] == [PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1]]
    (beam,) = generate_with_energies(model, tokenizer, PROMPTS[0], num_beams=3, max_new_tokens=4)
    assert 1 <= len(beam.tokens) <= 4


def test_generation_mistakes(model, tokenizer):
    with pytest.raises(ValueError, match="at least one"):
        generate_with_energies(model, tokenizer, [])
    with pytest.raises(ValueError, match="at most"):
        generate_with_energies(model, tokenizer, PROMPTS[0], max_new_tokens=100)
    with pytest.raises(ValueError, match="thinking"):
        generate_with_energies(model, tokenizer, PROMPTS[0], thinking={"stepps": 3}, max_new_tokens=2)
    twin = LlamaForCausalLM(transformer_pp_config(model.config))
    with pytest.raises(TypeError, match="no energy-based model"):
        generate_with_energies(twin, tokenizer, PROMPTS[0])
    assert len(generate_with_energies(model, tokenizer, "", max_new_tokens=2)[0].tokens) >= 1


def test_transformers_own_pipeline_thinks(checkpoint, model, tokenizer):
    """Nothing of ours is needed for the usual pipeline: it hands the thinking options to generate()."""
    generator = pipeline("text-generation", model=checkpoint)
    loaded = AutoModelForCausalLM.from_pretrained(checkpoint)
    prompt = PROMPTS[1]
    texts = {}
    for steps in (1, 8):
        options = {"thinking_steps": steps, "max_new_tokens": 12, "do_sample": False}
        (answer,) = generator(prompt, return_full_text=False, **options)
        encoded = tokenizer(prompt, return_tensors="pt")
        output = loaded.generate(**encoded, **options)
        texts[steps] = tokenizer.decode(output[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True)
        assert answer["generated_text"].strip() == texts[steps].strip()
    configured = pipeline("text-generation", model=checkpoint, thinking_steps=8, max_new_tokens=12, do_sample=False)
    (answer,) = configured(prompt, return_full_text=False)
    assert answer["generated_text"].strip() == texts[8].strip()
    with pytest.raises(ValueError, match="thinking_steps"):
        generator(prompt, thinking_steps=0, max_new_tokens=2)


# ---- perplexity ------------------------------------------------------------------------------------------------


def test_perplexity_by_steps_is_the_models_loss(model):
    blocks = torch.randint(0, 1024, (5, 16))
    found = perplexity_by_steps(model, blocks, (3, 1), batch_size=2, progress_bar=False)
    assert list(found) == [1, 3]
    for steps, value in found.items():
        with torch.no_grad():
            loss = model(blocks, labels=blocks, thinking_steps=steps).loss.item()
        assert math.log(value) == pytest.approx(loss, rel=1e-5)
    several = mean_losses_by_steps(model, blocks, (2,), progress_bar=False, thinking={"candidates": 3})
    with torch.no_grad():
        expected = model(blocks, labels=blocks, thinking_steps=2, thinking_candidates=3).loss.item()
    assert several[2] == pytest.approx(expected, rel=1e-4)


def test_perplexity_weighs_tokens(model, tokenizer):
    """Blocks of different lengths count by their tokens; the padding of a last block does not."""
    rows = [torch.randint(2, 1024, (length,)) for length in (16, 16, 5)]
    found = mean_losses_by_steps(model, rows, (2,), progress_bar=False)[2]
    losses = [mean_losses_by_steps(model, [row], (2,), progress_bar=False)[2] for row in rows]
    assert found == pytest.approx(sum(w * loss for w, loss in zip((15, 15, 4), losses, strict=True)) / 34, rel=1e-5)
    padded = {"input_ids": torch.cat([rows[2], torch.ones(11).long()])}
    padded["labels"] = torch.cat([rows[2], torch.full((11,), -100)])
    assert mean_losses_by_steps(model, [padded], (2,), progress_bar=False)[2] == pytest.approx(losses[2], rel=1e-5)


def test_perplexity_of_the_twin(model):
    twin = LlamaForCausalLM(transformer_pp_config(model.config)).train()
    blocks = torch.randint(0, 1024, (3, 16))
    found = perplexity_by_steps(twin, blocks, progress_bar=False)
    assert list(found) == [0] and twin.training
    with torch.no_grad():
        assert math.log(found[0]) == pytest.approx(twin(blocks, labels=blocks).loss.item(), rel=1e-5)


@pytest.mark.parametrize(
    "blocks, options",
    [
        ([], {}),
        ([torch.zeros(1).long()], {}),
        (torch.zeros(2, 4).long(), {"steps": (0,)}),
        (torch.zeros(2, 4).long(), {"thinking": {"steps": 2}}),
        (torch.zeros(2, 4).long(), {"batch_size": 0}),
    ],
)
def test_perplexity_mistakes(model, blocks, options):
    with pytest.raises(ValueError):
        perplexity_by_steps(model, blocks, progress_bar=False, **options)


# ---- demonstration ---------------------------------------------------------------------------------------------


def test_demo_end_to_end(checkpoint, tmp_path):
    said: list[str] = []
    threads = torch.get_num_threads()
    folder = tmp_path / "out"
    report = run_demo(checkpoint, steps=(1, 3), max_new_tokens=6, blocks=3, output_dir=str(folder), say=said.append)
    shown = "\n".join(said)
    assert [len(sample.mean_energies) for sample in report.samples] == [2, 4]
    assert list(report.perplexities) == [1, 3] and report.blocks == 3
    assert report.twin_perplexity == pytest.approx(math.exp(4.0))
    assert verdict(report) in shown and "recorded" in shown and "tokens/s" in shown
    assert (folder / "energy_by_steps.png").read_bytes().startswith(b"\x89PNG")
    saved = json.loads((folder / "demo.json").read_text())
    assert saved["perplexities"]["3"] == report.perplexities[3]
    assert torch.get_num_threads() == threads


def test_demo_repeats_its_text(checkpoint, tmp_path):
    texts = [
        run_demo(checkpoint, steps=(2,), max_new_tokens=6, blocks=1, output_dir=str(tmp_path), say=lambda _: None)
        .samples[0]
        .text
        for _ in range(2)
    ]
    assert texts[0] == texts[1]


def test_held_out_blocks_are_the_test_split(tokenizer):
    from ebt_transformers.assets import shakespeare_splits

    blocks = held_out_blocks(tokenizer, 256)
    ids = torch.cat([block["input_ids"][block["labels"] != -100] for block in blocks])
    assert tokenizer.decode(ids, skip_special_tokens=True) == shakespeare_splits()["test"]


@pytest.mark.parametrize(
    "perplexities, expected",
    [
        ({1: 10.0, 2: 9.0, 4: 8.0}, "Thinking longer helped all the way."),
        ({1: 8.0, 2: 9.0}, "Thinking longer did not help this model."),
        ({1: 10.0, 2: 8.0, 4: 9.0}, "Thinking longer helped up to 2 steps and hurt beyond."),
        ({2: 8.0}, "2 steps predicted best: perplexity 8.00. That is 20.0 % lower than the 10.00 recorded"),
    ],
)
def test_verdict_says_what_the_numbers_say(perplexities, expected):
    samples = [Sample(steps, "", 1.0, [0.0, 0.0]) for steps in perplexities]
    assert expected in verdict(DemoReport("x", samples, perplexities, 3, 5, twin_perplexity=10.0))


def test_demo_mistakes(checkpoint, tmp_path):
    for options in ({"steps": (0,)}, {"max_new_tokens": 0}, {"max_new_tokens": 1000}, {"blocks": -1}):
        with pytest.raises(ValueError):
            run_demo(checkpoint, output_dir=str(tmp_path), say=lambda _: None, **options)
