"""Laws of what a model card measures: the numbers are the model's own, the counts those of what runs."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from ebt_transformers.training.card_measurements import (
    ThinkingMeasurement,
    count_flops,
    measure_thinking,
    relative_flops,
    some_rows,
    thinking_passes,
)
from ebt_transformers.training.card_thinking import verdict
from ebt_transformers.training.data import CausalLMCollator
from ebt_transformers.training.quality import image_psnr


sys.path.append(str(Path(__file__).parent))  # the helper beside this file, under every import mode of pytest
from card_cases import LENGTH, SIDE, VOCAB, image_rows, text_rows, tiny_image_model  # noqa: E402


def test_the_measured_loss_of_text_is_that_of_the_model(make_model):
    model = make_model(vocab_size=VOCAB)
    batch = CausalLMCollator(0)(text_rows())
    measured = measure_thinking(model, batch)
    assert (measured.rows, measured.positions) == (6, 6 * (LENGTH - 1) - 4)
    scored = batch["labels"][:, 1:] != -100
    for steps in measured.steps:
        with torch.no_grad():
            output = model(**batch, thinking_steps=steps)
            longer = model(**batch, thinking_steps=8, output_energies=True)
        assert measured.losses[steps - 1] == pytest.approx(output.loss.item(), rel=1e-5)
    assert measured.energies == pytest.approx(longer.energies[:, :-1][scored].mean(0).tolist(), rel=1e-5)
    assert len(measured.energies) == len(measured.losses) + 1 == 9


@pytest.mark.parametrize("conditioning", ["none", "noisy_image"])
def test_the_measured_psnr_of_images_is_that_of_the_model(conditioning):
    model = tiny_image_model(image_conditioning=conditioning)
    batch = {name: torch.stack([row[name] for row in image_rows()]) for name in ("pixel_values", "labels")}
    measured = measure_thinking(model, batch)
    assert (measured.rows, measured.positions) == (6, 6 * 4)
    assert measured.psnr[0] == pytest.approx(image_psnr(batch["pixel_values"], batch["labels"]).mean().item())
    for steps in measured.steps:
        with torch.no_grad():
            output = model(**batch, thinking_steps=steps, output_energies=True)
        quality = image_psnr(output.reconstruction, batch["labels"]).mean().item()
        assert measured.psnr[steps] == pytest.approx(quality, rel=1e-5)
        assert measured.energies[steps] == pytest.approx(output.energies[:, -1].mean().item(), rel=1e-4)


def test_latents_have_a_loss_and_no_psnr():
    model = tiny_image_model(vae_name_or_path="some/vae")
    measured = measure_thinking(
        model, {name: torch.stack([row[name] for row in image_rows()]) for name in image_rows()[0]}
    )
    assert measured.kind == "latents" and measured.psnr is None and len(measured.losses) == 8


def test_a_default_of_many_steps_is_compared_too(make_model):
    measured = measure_thinking(make_model(thinking_steps=12, vocab_size=VOCAB), CausalLMCollator(0)(text_rows()))
    assert measured.steps == [1, 2, 4, 8, 12] and len(measured.losses) == 12 and measured.default_steps == 12


def test_a_measurement_is_bounded(make_model):
    model = make_model(vocab_size=VOCAB, max_position_embeddings=600)
    long = torch.randint(0, VOCAB, (2, 600))
    assert measure_thinking(model, {"input_ids": long, "labels": long}).positions == 511
    short = torch.randint(0, VOCAB, (40, 4))
    assert measure_thinking(model, {"input_ids": short, "labels": short}).rows == 16


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_passes_are_those_that_run(any_model, steps):
    context_forwards, forwards, backwards = 0, 0, 0
    real = torch.autograd.grad

    def grad(*arguments: object, **options: object) -> object:
        nonlocal backwards
        backwards += 1
        return real(*arguments, **options)

    def count(module: torch.nn.Module, arguments: tuple, options: dict) -> None:
        nonlocal context_forwards, forwards
        if options.get("candidate_embeds") is None:
            context_forwards += options["num_landscapes"]
        else:
            forwards += 1

    handle = any_model.model.register_forward_pre_hook(count, with_kwargs=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.autograd, "grad", grad)
        any_model(torch.tensor([[1, 2, 3]]), thinking_steps=steps, thinking_candidates=1)
    handle.remove()
    assert thinking_passes(any_model, steps) == (context_forwards + forwards, backwards)


def test_operations_grow_by_the_same_for_every_further_step(any_model):
    (first, second, third, sixth), counted_on = relative_flops(
        any_model, {"input_ids": torch.ones(1, 8, dtype=torch.long)}, [1, 2, 3, 6]
    )
    assert counted_on == 8 and first < second
    assert sixth - third == pytest.approx(3 * (third - second), rel=1e-6)


def test_operations_are_counted_as_in_a_textbook():
    assert count_flops(lambda: torch.ones(2, 3) @ torch.ones(3, 5)) == 2 * 2 * 3 * 5
    attention = [torch.ones(1, 1, 4, 8)] * 3
    assert count_flops(lambda: scaled_dot_product_attention(*attention)) == 2 * (2 * 4 * 4 * 8)


def test_operations_of_an_image_step_are_a_forward_and_a_backward_pass():
    (once, twice), patches = relative_flops(
        tiny_image_model(), {"pixel_values": torch.zeros(1, 3, SIDE, SIDE)}, [1, 2]
    )
    assert patches == 4 and twice == pytest.approx(2 * once)
    assert 1.8 < once < 2.5  # the backward pass costs a little more than the forward: attention has two inputs


def test_rows_are_spread_over_the_data_and_streams_begin_at_the_beginning():
    class Numbers(torch.utils.data.IterableDataset):
        def __iter__(self) -> Iterator[int]:
            return iter(range(100))

    assert some_rows(list(range(100)), 4) == [0, 25, 50, 75]
    assert some_rows({"first": [1, 2], "second": [3]}) == [1, 2]
    assert some_rows(Numbers(), 3) == [0, 1, 2]
    assert some_rows(None) == some_rows([]) == some_rows(iter([1, 2])) == []


# ---- in words -----------------------------------------------------------------------------------------------------


MEASURED = ThinkingMeasurement(
    kind="text",
    rows=2,
    positions=510,
    default_steps=2,
    landscapes=2,
    steps=[1, 2, 4, 8],
    losses=[3.0] * 8,
    energies=[0.0] * 9,
    psnr=None,
    flops=[2.0, 4.0, 8.0, 16.0],
    counted_on=64,
)


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        (
            [3.2, 3.0, 3.0, 2.9, 2.9, 2.9, 2.9, 2.8],
            "by default pays here (8 steps: 0.2 nats better than 2, for 4 times",
        ),
        (
            [3.2, 3.0, 3.0, 2.8, 2.9, 2.9, 2.9, 2.9],
            "by default pays here (4 steps: 0.2 nats better than 2, for 2 times",
        ),
        ([3.2, 3.0, 3.0, 3.1, 3.1, 3.1, 3.1, 3.2], "does not pay here (8 steps: 0.2 nats worse than 2, for 4 times"),
        ([3.2, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0, 2.999], "makes no difference worth its cost here (8 steps: 0.001 nats"),
        ([2.5, 3.0, 3.0, 3.1, 3.1, 3.1, 3.1, 3.2], "Thinking less does pay (1 step: 0.5 nats better than 2, for 0.5"),
    ],
)
def test_the_verdict_is_what_the_numbers_say(losses, said):
    assert said in verdict(replace(MEASURED, losses=losses))


def test_the_verdict_on_images_is_about_psnr():
    psnr = [15.0, 25.0, 24.0, 23.0, 22.0, 21.0, 20.0, 19.0, 18.0]
    text = verdict(replace(MEASURED, kind="pixels", psnr=psnr, default_steps=1))
    assert "does not pay here (8 steps: 7 dB worse than 1, for 8 times" in text
    assert "Nothing longer" in verdict(replace(MEASURED, default_steps=8))
