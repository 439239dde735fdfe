"""Laws of `pipeline("text-generation")`: thinking options reach the model, energies reach the caller."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase, TextStreamer, pipeline
from transformers.pipelines import TextGenerationPipeline

from ebt_transformers import EBTForCausalLM
from ebt_transformers.assets import checkpoint_path


PROMPTS = ["ROMEO:", "What light through yonder window", "O"]
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 5, "return_full_text": False}

# checked: 5.17 hands other outputs than the tokens on by prompt, and not at all for a batch; 5.23 by sequence
outputs_by_sequence = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"), reason="this transformers mixes up the outputs of sequences"
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    """The tokenizer that ships with the package."""
    return AutoTokenizer.from_pretrained(checkpoint_path())


@pytest.fixture
def model(
    make_model: Callable[..., EBTForCausalLM], tokenizer: PreTrainedTokenizerBase, request: pytest.FixtureRequest
) -> EBTForCausalLM:
    """A tiny random model over that tokenizer's vocabulary."""
    return make_model(vocab_size=len(tokenizer), max_position_embeddings=64, **getattr(request, "param", {}))


@pytest.fixture
def thoughts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(steps, candidates) of every forward of any model."""
    seen: list[tuple[int, int]] = []
    think = EBTForCausalLM._think

    def recorded(self: EBTForCausalLM, state: Tensor, context: Any, schedule: list[Any], *args: Any) -> Any:
        seen.append((len(schedule), state.shape[1]))
        return think(self, state, context, schedule, *args)

    monkeypatch.setattr(EBTForCausalLM, "_think", recorded)
    return seen


@pytest.fixture
def logged() -> Iterator[list[str]]:
    """Everything transformers logs."""
    messages: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    handler, logger = Keep(), logging.getLogger("transformers")
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)


def test_thinking_reaches_the_model_from_construction_and_from_the_call(
    model: EBTForCausalLM, tokenizer: PreTrainedTokenizerBase, thoughts: list[tuple[int, int]]
) -> None:
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer, thinking_steps=3)
    generator(PROMPTS[0], **GREEDY)
    generator(PROMPTS[0], thinking_candidates=2, **GREEDY)
    generator(PROMPTS[0], thinking_steps=4, **GREEDY)
    generator(PROMPTS[0], thinking={"candidates": 2}, **GREEDY)
    generator(PROMPTS[0], generation_config=GenerationConfig(max_new_tokens=5, thinking_steps=7))
    assert thoughts == [(3, 1)] * 5 + [(3, 2)] * 5 + [(4, 1)] * 5 + [(3, 2)] * 5 + [(3, 1)] * 5


def test_a_saved_folder_is_all_a_pipeline_needs(
    model: EBTForCausalLM, tokenizer: PreTrainedTokenizerBase, thoughts: list[tuple[int, int]], tmp_path: Path
) -> None:
    model.generation_config.thinking_steps = 4
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    expected = pipeline("text-generation", model=model, tokenizer=tokenizer)(PROMPTS[0], **GREEDY)
    loaded = pipeline("text-generation", model=str(tmp_path))
    assert isinstance(loaded, TextGenerationPipeline)
    assert loaded(PROMPTS[0], **GREEDY) == expected
    assert thoughts == [(4, 1)] * 10


@pytest.mark.parametrize("model", [{}, {"step_conditioning": "adaln", "update": "residual"}], indirect=True)
@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_a_batch_of_unequal_prompts_gives_what_each_gives_alone(
    model: EBTForCausalLM, tokenizer: PreTrainedTokenizerBase, batch_size: int
) -> None:
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    together = generator(PROMPTS, batch_size=batch_size, **GREEDY)
    assert together == [generator(prompt, **GREEDY) for prompt in PROMPTS]


def test_the_text_is_that_of_generate(model: EBTForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    (record,) = pipeline("text-generation", model=model, tokenizer=tokenizer)(PROMPTS[1], thinking_steps=3, **GREEDY)
    ids = tokenizer(PROMPTS[1], return_tensors="pt").input_ids
    new = model.generate(ids, do_sample=False, max_new_tokens=5, thinking_steps=3)[0, ids.shape[1] :]
    assert record["generated_text"] == tokenizer.decode(new, skip_special_tokens=True)


@outputs_by_sequence
@pytest.mark.parametrize("returned", [1, 2])
def test_energies_come_with_the_text_on_request(
    model: EBTForCausalLM, tokenizer: PreTrainedTokenizerBase, returned: int
) -> None:
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer, thinking_steps=3)
    options = {**GREEDY, "do_sample": returned > 1, "num_return_sequences": returned}
    records = generator(PROMPTS[0], return_dict_in_generate=True, output_energies=True, **options)
    assert len(records) == returned
    for record in records:
        assert torch.as_tensor(record["energies"]).shape == (5, 4)
        assert torch.as_tensor(record["steps_taken"]).tolist() == [3] * 5


@outputs_by_sequence
def test_energies_of_a_batch_are_those_of_each_prompt(
    model: EBTForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    options = {**GREEDY, "return_dict_in_generate": True, "output_energies": True}
    for prompt, (record,) in zip(PROMPTS, generator(PROMPTS, batch_size=3, **options), strict=True):
        (alone,) = generator(prompt, **options)
        torch.testing.assert_close(
            torch.as_tensor(record["energies"]), torch.as_tensor(alone["energies"]), rtol=1e-3, atol=1e-3
        )


def test_a_streamer_speaks_through_the_pipeline(
    model: EBTForCausalLM, tokenizer: PreTrainedTokenizerBase, capsys: pytest.CaptureFixture[str]
) -> None:
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    (record,) = generator(PROMPTS[1], streamer=streamer, **GREEDY)
    assert capsys.readouterr().out.strip() == record["generated_text"].strip()


def test_transformers_has_nothing_to_complain_about(
    model: EBTForCausalLM, tokenizer: PreTrainedTokenizerBase, logged: list[str]
) -> None:
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer, thinking_steps=3)
    generator(PROMPTS, batch_size=2, thinking_candidates=2, **GREEDY)
    assert [message for message in logged if "support" in message or "thinking" in message] == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"thinking_steps": 0}, "thinking_steps.*got 0"),
        ({"thinking_stepz": 3}, "thinking_stepz"),
        ({"output_energies": True}, "return_dict_in_generate"),
    ],
)
def test_mistakes_raise_through_the_pipeline(
    model: EBTForCausalLM, tokenizer: PreTrainedTokenizerBase, options: dict[str, Any], message: str
) -> None:
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    with pytest.raises(ValueError, match=message):
        generator(PROMPTS[0], **{**GREEDY, **options})
