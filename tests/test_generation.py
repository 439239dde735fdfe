"""Laws of `generate()`: every decoding mode of transformers, with thinking and its energies."""

import copy
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MaxTimeCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from ebt_transformers import EBTForCausalLM, EBTGenerateOutput, ThinkingConfig
from ebt_transformers.modeling_ebt import EBTGenerateBeamOutput


MakeModel = Callable[..., EBTForCausalLM]
CLOSE = {"rtol": 1e-3, "atol": 1e-3}
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 0}
WITH_ENERGIES: dict[str, Any] = {"return_dict_in_generate": True, "output_energies": True}


def tokens(*shape: int, seed: int = 0, vocab: int = 41) -> Tensor:
    """Random token ids."""
    return torch.randint(1, vocab, shape, generator=torch.Generator().manual_seed(seed))


def left_padded(rows: list[Tensor]) -> dict[str, Tensor]:
    """Rows of unequal length as one batch, padded on the left."""
    width = max(len(row) for row in rows)
    ids = torch.stack([torch.nn.functional.pad(row, (width - len(row), 0)) for row in rows])
    mask = torch.stack([torch.nn.functional.pad(torch.ones_like(row), (width - len(row), 0)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


class Spy:
    """Records the thinking every forward of a model got."""

    def __init__(self, model: EBTForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps: list[int] = []
        think = model._think

        def recorded(state: Tensor, context: Any, schedule: list[Any], *args: Any) -> Any:
            self.steps.append(len(schedule))
            return think(state, context, schedule, *args)

        monkeypatch.setattr(model, "_think", recorded)


# ------------------------------------------------------------------------------------------------------ decoding modes


@pytest.mark.parametrize("cache", ["dynamic", "static", "none"])
@pytest.mark.parametrize("candidates", [1, 2])
def test_greedy_decoding_is_the_argmax_of_forward_again_and_again(
    any_model: EBTForCausalLM, cache: str, candidates: int
) -> None:
    ids = tokens(2, 4)
    expected = ids
    with torch.no_grad():
        for _ in range(6):
            logits = any_model(input_ids=expected, use_cache=False, thinking_candidates=candidates).logits
            expected = torch.cat([expected, logits[:, -1:].argmax(-1)], dim=1)
    options = {"none": {"use_cache": False}, "dynamic": {}, "static": {"cache_implementation": "static"}}[cache]
    got = any_model.generate(ids, thinking_candidates=candidates, **GREEDY, **options)
    assert torch.equal(got, expected)


@pytest.mark.parametrize(
    "mode",
    [
        {},
        {"num_beams": 3},
        {"thinking_candidates": 2},
        {"num_beams": 2, "num_return_sequences": 2, "length_penalty": 0.5},
        {"use_cache": False},
        {"cache_implementation": "static"},
    ],
)
def test_a_left_padded_batch_generates_what_its_rows_generate_alone(
    any_model: EBTForCausalLM, mode: dict[str, Any]
) -> None:
    rows = [tokens(length, seed=length) for length in (3, 6, 5)]
    options = {**GREEDY, **mode}
    returned = mode.get("num_return_sequences", 1)
    batch = any_model.generate(**left_padded(rows), **options)[:, 6:]
    alone = [any_model.generate(row[None], **options)[:, len(row) :] for row in rows]
    assert torch.equal(batch, torch.cat(alone))
    assert batch.shape == (3 * returned, 6)


def test_sampling_repeats_under_a_seed_and_varies_without(any_model: EBTForCausalLM) -> None:
    ids, options = tokens(2, 4), {**GREEDY, "do_sample": True, "top_k": 0, "temperature": 50.0}
    torch.manual_seed(5)
    first = any_model.generate(ids, **options)
    second = any_model.generate(ids, **options)
    torch.manual_seed(5)
    assert torch.equal(any_model.generate(ids, **options), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("mode", [{"do_sample": True}, {"num_beams": 3}, {"num_beams": 3, "do_sample": True}])
def test_several_sequences_are_returned_for_each_prompt(make_model: MakeModel, mode: dict[str, Any]) -> None:
    ids = tokens(2, 4)
    got = make_model().generate(ids, **{**GREEDY, **mode}, num_return_sequences=3)
    assert got.shape == (6, 10)
    assert torch.equal(got[:, :4], ids.repeat_interleave(3, 0))


def test_beam_search_finds_no_worse_than_greedy(make_model: MakeModel) -> None:
    model, ids = make_model(step_size=0.3), tokens(3, 4)

    def log_likelihood(sequences: Tensor) -> Tensor:
        with torch.no_grad():
            scores = model(input_ids=sequences[:, :-1]).logits.log_softmax(-1)
        return scores.gather(-1, sequences[:, 1:, None]).squeeze(-1)[:, 3:].sum(-1)

    greedy, beams = model.generate(ids, **GREEDY), model.generate(ids, **GREEDY, num_beams=12)
    assert (log_likelihood(beams) >= log_likelihood(greedy) - 1e-4).all()


@pytest.mark.parametrize("option", [{"prompt_lookup_num_tokens": 2}, {"prompt_lookup_num_tokens": 4}])
@pytest.mark.parametrize("steps", [2, 4])
def test_prompt_lookup_decoding_gives_the_greedy_tokens(
    any_model: EBTForCausalLM, option: dict[str, Any], steps: int
) -> None:
    ids = tokens(1, 5).repeat(1, 2)
    options = {**GREEDY, "thinking_steps": steps, "eos_token_id": 0}  # transformers 5.10 cannot do it without an end
    assert torch.equal(any_model.generate(ids, **options, **option), any_model.generate(ids, **options))


def test_decoding_with_an_assistant_gives_the_greedy_tokens(make_model: MakeModel) -> None:
    model, ids = make_model(), tokens(1, 5)
    assistant = make_model(step_conditioning="none", num_landscapes=1, thinking_steps=1)
    expected = model.generate(ids, **GREEDY)
    assert torch.equal(model.generate(ids, **GREEDY, assistant_model=assistant), expected)


def test_embeddings_can_be_the_prompt(make_model: MakeModel) -> None:
    model, ids = make_model(), tokens(2, 4)
    got = model.generate(inputs_embeds=model.get_input_embeddings()(ids), **GREEDY)
    assert torch.equal(got, model.generate(ids, **GREEDY)[:, 4:])


def test_a_cache_of_an_earlier_call_can_be_continued(any_model: EBTForCausalLM) -> None:
    ids = tokens(1, 4)
    first = any_model.generate(ids, **{**GREEDY, "max_new_tokens": 3}, return_dict_in_generate=True)
    rest = any_model.generate(
        first.sequences, **{**GREEDY, "max_new_tokens": 3}, past_key_values=first.past_key_values
    )
    assert torch.equal(rest, any_model.generate(ids, **GREEDY))


# ---------------------------------------------------------------------------------- processors, criteria and streamers


def test_logits_processors_see_and_change_the_thought_logits(make_model: MakeModel) -> None:
    model, ids = make_model(), tokens(1, 4)
    free = model.generate(ids, **GREEDY)[0, 4:]
    first = int(free[0])
    assert first not in model.generate(ids, **GREEDY, bad_words_ids=[[first]])[0, 4:]
    assert first not in model.generate(ids, **GREEDY, suppress_tokens=[first])[0, 4:]
    assert len(model.generate(ids, **GREEDY, eos_token_id=first)[0]) == 5
    assert len(model.generate(ids, **GREEDY, eos_token_id=first, min_new_tokens=3)[0]) > 6
    unrepeated = model.generate(ids, **GREEDY, no_repeat_ngram_size=1)[0].tolist()
    assert len(set(unrepeated)) == len(unrepeated)
    assert not torch.equal(model.generate(ids, **GREEDY, repetition_penalty=100.0)[0, 4:], free)

    class Only(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            return torch.full_like(scores, float("-inf")).index_fill(1, torch.tensor([7]), 0.0)

    assert (model.generate(ids, **GREEDY, logits_processor=LogitsProcessorList([Only()]))[0, 4:] == 7).all()


def test_stopping_criteria_stop(make_model: MakeModel) -> None:
    model, ids = make_model(), tokens(2, 4)

    class Long(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
            return torch.full((len(input_ids),), input_ids.shape[1] >= 7)

    criteria = StoppingCriteriaList([Long(), MaxTimeCriteria(1000.0)])
    assert model.generate(ids, **GREEDY, stopping_criteria=criteria).shape == (2, 7)


def test_a_streamer_gets_every_token_as_it_comes(make_model: MakeModel) -> None:
    class Recorder(BaseStreamer):
        def __init__(self) -> None:
            self.parts: list[Tensor] = []
            self.ended = False

        def put(self, value: Tensor) -> None:
            self.parts.append(value.flatten())

        def end(self) -> None:
            self.ended = True

    model, ids, streamer = make_model(), tokens(1, 4), Recorder()
    expected = model.generate(ids, **GREEDY, streamer=streamer, thinking_steps=3)
    assert torch.equal(torch.cat(streamer.parts), expected[0])
    assert len(streamer.parts) == 7 and streamer.ended


# ------------------------------------------------------------------------------------------- how thinking is asked for


@pytest.mark.parametrize(
    "asked",
    [
        {"thinking_steps": 5},
        {"thinking": ThinkingConfig(steps=5)},
        {"thinking": {"steps": 5}},
        {"thinking": {"thinking_steps": 5}},
        {"thinking": ThinkingConfig(steps=9), "thinking_steps": 5},
        {"generation_config": GenerationConfig(thinking_steps=5, max_new_tokens=6)},
        {"generation_config": GenerationConfig(thinking_steps=9, max_new_tokens=6), "thinking_steps": 5},
    ],
)
def test_every_way_to_ask_reaches_every_token(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any]
) -> None:
    model = make_model()
    spy = Spy(model, monkeypatch)
    model.generate(tokens(1, 4), **{"max_new_tokens": 6, **asked})
    assert spy.steps == [5] * 6


def test_the_call_wins_over_the_generation_config_which_wins_over_the_model_config(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = make_model(thinking_steps=3), tokens(1, 4)
    spy = Spy(model, monkeypatch)
    model.generate(ids, max_new_tokens=1)
    model.generation_config.thinking_steps = 4
    model.generate(ids, max_new_tokens=1)
    passed = GenerationConfig(thinking_steps=5, max_new_tokens=1)
    model.generate(ids, generation_config=passed)
    model.generate(ids, passed)
    model.generate(ids, generation_config=passed, thinking_steps=6)
    model.generate(ids, max_new_tokens=1, thinking={"steps": 7})
    assert spy.steps == [3, 4, 5, 5, 6, 7]
    assert passed.thinking_steps == 5 and model.generation_config.thinking_steps == 4


def test_a_generation_config_that_says_nothing_about_thinking_leaves_the_model_s(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    model.generation_config.thinking_steps = 4
    spy = Spy(model, monkeypatch)
    model.generate(tokens(1, 4), generation_config=GenerationConfig(max_new_tokens=1))
    assert spy.steps == [4]


def test_a_saved_generation_config_is_honoured_after_loading(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = make_model()
    model.generation_config.thinking_steps = 5
    model.generation_config.thinking_candidates = 2
    model.save_pretrained(tmp_path)
    loaded = EBTForCausalLM.from_pretrained(tmp_path)
    loaded.save_pretrained(tmp_path / "again")
    for again in (loaded, EBTForCausalLM.from_pretrained(tmp_path / "again")):
        spy = Spy(again, monkeypatch)
        got = again.generate(tokens(1, 4), **GREEDY)
        assert spy.steps == [5] * 6
        assert torch.equal(got, model.generate(tokens(1, 4), **GREEDY, thinking_steps=5, thinking_candidates=2))


def test_generation_configs_are_left_as_they_were(make_model: MakeModel) -> None:
    model, config = make_model(), GenerationConfig(max_new_tokens=2, thinking_steps=3)
    own, passed = copy.deepcopy(model.generation_config), copy.deepcopy(config)
    model.generate(tokens(1, 4), generation_config=config, thinking_steps=4, **WITH_ENERGIES)
    assert config.to_dict() == passed.to_dict()
    assert model.generation_config.to_dict() == own.to_dict()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"thinking_stepz": 3}, "thinking_stepz"),
        ({"thinkng_steps": 3}, "thinkng_steps"),
        ({"thinking": {"stepz": 3}}, "stepz.*Allowed.*steps"),
        ({"thinking_steps": 0}, "thinking_steps.*at least 1.*got 0"),
        ({"thinking_candidates": 0}, "thinking_candidates.*got 0"),
        ({"thinking_noise_std": -1.0}, "thinking_noise_std.*-1.0"),
        ({"thinking_tolerance": -1.0}, "thinking_tolerance.*-1.0"),
        ({"thinking_selection": "best"}, "min_energy.*'best'"),
        ({"thinking_landscapes": [0, 9]}, r"between 0 and 1.*\[0, 9\]"),
        ({"generation_config": GenerationConfig(thinking_steps=0)}, "thinking_steps.*got 0"),
        ({"generation_config": GenerationConfig(thinking_stepz=3)}, "stepz.*Allowed.*steps"),
        ({"output_energies": True}, "return_dict_in_generate"),
        ({**WITH_ENERGIES, "prompt_lookup_num_tokens": 2}, "assisted"),
    ],
)
def test_mistakes_raise_and_name_themselves(make_model: MakeModel, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"(?s){message}"):
        make_model().generate(tokens(1, 4), **{"max_new_tokens": 2, "do_sample": False, **options})


def test_a_typo_in_the_model_s_own_generation_config_raises(make_model: MakeModel) -> None:
    model = make_model()
    model.generation_config.thinking_stepz = 3
    with pytest.raises(ValueError, match="stepz.*Allowed.*steps"):
        model.generate(tokens(1, 4), max_new_tokens=2)


# ------------------------------------------------------------------------------------------------------------ energies


def recomputed(
    model: EBTForCausalLM, sequence: Tensor, prompt: int, mask: Tensor | None = None, **options: Any
) -> Any:
    """Energies and steps of one sequence's new tokens, from one forward over all of it."""
    with torch.no_grad():
        output = model(
            input_ids=sequence[None, :-1],
            attention_mask=None if mask is None else mask[None],
            output_energies=True,
            **options,
        )
    return output.energies[0, prompt - 1 :], output.steps_taken[0, prompt - 1 :]


@pytest.mark.parametrize(
    "mode",
    [
        {},
        {"do_sample": True},
        {"thinking_candidates": 3},
        {"use_cache": False},
        {"do_sample": True, "num_return_sequences": 2},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 2.0},
        {"num_beams": 2, "do_sample": True},
    ],
)
def test_energies_of_generated_tokens_are_those_of_forward(any_model: EBTForCausalLM, mode: dict[str, Any]) -> None:
    ids = tokens(2, 4)
    options = {**GREEDY, **mode, **WITH_ENERGIES, "thinking_steps": 3, "thinking_step_size": 0.7}
    output = any_model.generate(ids, **options)
    assert isinstance(output, EBTGenerateBeamOutput if mode.get("num_beams") else EBTGenerateOutput)
    rows = 2 * mode.get("num_return_sequences", 1)
    assert output.energies.shape == (rows, 6, 4)
    assert output.steps_taken.shape == (rows, 6)
    thinking = {name: value for name, value in options.items() if name.startswith("thinking_")}
    for row, sequence in enumerate(output.sequences):
        energies, steps = recomputed(any_model, sequence, 4, **thinking)
        assert_close(output.energies[row], energies, **CLOSE)
        assert torch.equal(output.steps_taken[row], steps)


@pytest.mark.parametrize("beams", [1, 3])
def test_energies_after_the_end_of_a_row_are_nan(make_model: MakeModel, beams: int) -> None:
    model, ids = make_model(), tokens(2, 4)
    first = model.generate(ids, **GREEDY, num_beams=beams)[0, 5]
    output = model.generate(ids, **GREEDY, **WITH_ENERGIES, num_beams=beams, eos_token_id=int(first))
    assert output.energies.shape[:2] == (2, output.sequences.shape[1] - 4)
    ended = 0
    for row, sequence in enumerate(output.sequences):
        new = sequence[4:]
        ends = (new == first).nonzero().flatten()
        length = int(ends[0]) + 1 if len(ends) else len(new)
        ended += length < len(new)
        energies, steps = recomputed(model, sequence[: 4 + length], 4)
        assert_close(output.energies[row, :length], energies, **CLOSE)
        assert torch.equal(output.steps_taken[row, :length], steps)
        assert output.energies[row, length:].isnan().all()
        assert (output.steps_taken[row, length:] == 0).all()
    assert ended == 1, "the test wants one row that ends early"


def test_energies_of_a_left_padded_batch_are_those_of_its_rows(any_model: EBTForCausalLM) -> None:
    rows = [tokens(length, seed=length) for length in (3, 6)]
    batch = any_model.generate(**left_padded(rows), **GREEDY, **WITH_ENERGIES)
    for index, row in enumerate(rows):
        alone = any_model.generate(row[None], **GREEDY, **WITH_ENERGIES)
        assert_close(batch.energies[index], alone.energies[0], **CLOSE)


def test_steps_taken_count_until_the_tolerance(make_model: MakeModel) -> None:
    output = make_model().generate(tokens(2, 4), **GREEDY, **WITH_ENERGIES, thinking_steps=6, thinking_tolerance=1e9)
    assert (output.steps_taken == 2).all()
    assert output.energies.shape == (2, 6, 7)


def test_other_outputs_of_generate_come_along(make_model: MakeModel) -> None:
    output = make_model().generate(tokens(2, 4), **GREEDY, **WITH_ENERGIES, output_scores=True, output_logits=True)
    assert len(output.scores) == len(output.logits) == 6
    assert output.past_key_values.get_seq_length() == 9
    plain = make_model().generate(tokens(2, 4), **GREEDY, return_dict_in_generate=True)
    assert torch.equal(plain.sequences, output.sequences)
    assert getattr(plain, "energies", None) is None


def test_a_generation_config_may_ask_for_the_dict_that_energies_need(make_model: MakeModel) -> None:
    config = GenerationConfig(max_new_tokens=2, return_dict_in_generate=True)
    assert make_model().generate(tokens(1, 4), generation_config=config, output_energies=True).energies.shape[1] == 2


# ------------------------------------------------------------------------------------------------- surroundings, noise


def test_generation_works_inside_inference_mode(any_model: EBTForCausalLM) -> None:
    rows = [tokens(3), tokens(5)]
    expected = any_model.generate(**left_padded(rows), **GREEDY, **WITH_ENERGIES)
    for options in ({}, {"cache_implementation": "static"}, {"num_beams": 2}):
        plain = any_model.generate(**left_padded(rows), **GREEDY, **options)
        with torch.inference_mode():
            assert torch.equal(any_model.generate(**left_padded(rows), **GREEDY, **options), plain)
    with torch.inference_mode():
        inside = any_model.generate(**left_padded(rows), **GREEDY, **WITH_ENERGIES)
    assert_close(inside.energies, expected.energies, rtol=0, atol=0)


def test_threads_keep_their_energies_apart(make_model: MakeModel) -> None:
    model = make_model()
    prompts = [tokens(1, length, seed=length) for length in (3, 4, 5, 6)]
    expected = [model.generate(prompt, **GREEDY, **WITH_ENERGIES) for prompt in prompts]
    results: dict[int, Any] = {}

    def work(index: int) -> None:
        results[index] = model.generate(prompts[index], **GREEDY, **WITH_ENERGIES)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, want in enumerate(expected):
        assert torch.equal(results[index].sequences, want.sequences)
        assert_close(results[index].energies, want.energies, rtol=0, atol=0)


def test_a_failed_call_leaves_no_trace_for_the_next(make_model: MakeModel) -> None:
    model = make_model()
    with pytest.raises(ValueError, match="between 0 and 40"):
        model.generate(tokens(1, 4) + 41, **GREEDY, **WITH_ENERGIES)
    assert model.generate(tokens(1, 4), **GREEDY, **WITH_ENERGIES).energies.shape[1] == 6


@pytest.mark.parametrize("cache", [{"use_cache": False}, {"cache_implementation": "static"}])
def test_noise_is_the_same_with_every_kind_of_cache(make_model: MakeModel, cache: dict[str, Any]) -> None:
    model, ids = make_model(), tokens(2, 4)
    noisy = {"thinking_noise_std": 1.0, "thinking_step_size": 0.5, "thinking_seed": 3}
    expected = model.generate(ids, **GREEDY, **WITH_ENERGIES, **noisy)
    again = model.generate(ids, **GREEDY, **WITH_ENERGIES, **noisy, **cache)
    assert torch.equal(again.sequences, expected.sequences)
    assert_close(again.energies, expected.energies, **CLOSE)


def test_each_token_has_noise_of_its_own(make_model: MakeModel) -> None:
    # with a step this small the candidate is its noise: the same noise would give the same token each time
    model = make_model(update="residual")
    options = {"thinking_noise_std": 1.0, "thinking_step_size": 1e-4, "thinking_steps": 1}
    assert len(set(model.generate(tokens(1, 4), **GREEDY, **options)[0, 4:].tolist())) > 3


def test_generation_restores_training_mode_settings(make_model: MakeModel) -> None:
    model = make_model()
    model.generate(tokens(1, 4), **GREEDY)
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_batch_of_one_token_prompts_generates(any_model: EBTForCausalLM) -> None:
    assert any_model.generate(tokens(3, 1), **GREEDY).shape == (3, 7)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"cache_implementation": "static"}, {"use_cache": False}])
def test_generation_ends_at_the_context_with_a_word_about_it(make_model: Any, options: dict[str, Any]) -> None:
    model = make_model(max_position_embeddings=9)
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("ebt_transformers.modeling_ebt.generation")
    logger.addHandler(handler)
    try:
        output = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=50, do_sample=False, **options)
    finally:
        logger.removeHandler(handler)
    assert output.shape == (1, 10)
    assert any("context is 9" in message for message in messages)
