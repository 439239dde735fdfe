"""Laws of packed rows: positions that begin anew, without a mask, say that a row holds several texts."""

from collections.abc import Callable

import pytest
import torch

from ebt_transformers import EBTForCausalLM


def positions_of(texts: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([torch.arange(text.shape[1]) for text in texts])[None]


@pytest.fixture
def texts() -> list[torch.Tensor]:
    """40 tokens in all, for a context of 32."""
    return [torch.randint(0, 41, (1, length)) for length in (9, 14, 1, 16)]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_texts_packed_in_a_row_are_as_apart(any_model: EBTForCausalLM, texts: list, attention: str) -> None:
    any_model.set_attn_implementation(attention)
    with torch.no_grad():
        packed = any_model(torch.cat(texts, 1), position_ids=positions_of(texts), output_energies=True)
        apart = [any_model(text, output_energies=True) for text in texts]
    for name in ("logits", "energies"):
        expected = torch.cat([output[name] for output in apart], 1)
        torch.testing.assert_close(packed[name], expected, rtol=1e-3, atol=1e-3)


def test_gradients_of_packed_texts_are_those_of_the_texts(make_model: Callable, texts: list) -> None:
    model = make_model(candidate_init_std=0.0).train()  # or every shape has random starts of its own
    labels = torch.cat([torch.nn.functional.pad(text[:, 1:], (0, 1), value=-100) for text in texts], 1)
    found = []
    for rows, positions in ((texts, [None] * 4), ([torch.cat(texts, 1)], [positions_of(texts)])):
        model.zero_grad()
        targets = labels.split([row.shape[1] for row in rows], dim=1)
        for row, target, position in zip(rows, targets, positions, strict=True):
            model(row, shift_labels=target, position_ids=position, num_items_in_batch=36).loss.backward()
        found.append({name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None})
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-3, atol=1e-5, msg=name)


def test_texts_of_a_row_without_a_mark_do_see_each_other(make_model: Callable, texts: list) -> None:
    model, row = make_model(max_position_embeddings=64), torch.cat(texts, 1)
    with torch.no_grad():
        packed, joined = model(row, position_ids=positions_of(texts)).logits, model(row).logits
    assert torch.allclose(packed[:, :9], joined[:, :9], atol=1e-3)
    assert not torch.allclose(packed[:, 9:], joined[:, 9:], atol=0.1)


def test_positions_that_go_on_are_one_text(make_model: Callable) -> None:
    model, ids = make_model(), torch.randint(0, 41, (2, 8))
    with torch.no_grad():
        torch.testing.assert_close(model(ids, position_ids=torch.arange(8)[None]).logits, model(ids).logits)


def test_a_packed_text_that_is_too_long_is_refused(make_model: Callable) -> None:
    positions = torch.cat([torch.arange(33), torch.arange(5)])[None]
    with pytest.raises(ValueError, match="has 33 tokens, the model takes at most 32"):
        make_model()(torch.zeros(1, 38, dtype=torch.long), position_ids=positions)
