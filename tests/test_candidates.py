"""The V-sized arithmetic of text candidates: whatever is fastest for a number of rows, the result is the formula's."""

import pytest
import torch

from ebt_transformers.modeling_ebt.candidates import TextCandidates


@pytest.mark.parametrize("rows", [(1, 1), (1, 2), (3, 1), (2, 4), (3, 3), (4, 8)])
@pytest.mark.parametrize("rule", ["replace", "residual"])
def test_update_is_the_formula(rows, rule):
    table, state, gradient = torch.randn(37, 8), torch.randn(*rows, 37), torch.randn(*rows, 8)
    space = TextCandidates(table, rule)
    point = space.point(state)
    moved = space.update(state, point, gradient, 0.5)
    expected = (point if rule == "replace" else state) - 0.5 * torch.einsum("bnd,vd->bnv", gradient, table)
    torch.testing.assert_close(moved, expected)
    assert moved.shape == state.shape and moved.is_contiguous()


def test_update_of_few_rows_is_differentiable_in_the_step_size():
    table, state, gradient = torch.randn(37, 8), torch.randn(1, 1, 37), torch.randn(1, 1, 8)
    step_size = torch.tensor([0.5], requires_grad=True)
    space = TextCandidates(table)
    weights = torch.randn(37)
    (space.update(state, space.point(state), gradient, step_size)[0, 0] @ weights).backward()
    torch.testing.assert_close(step_size.grad, -(gradient[0, 0] @ table.t() @ weights)[None])
