"""
The second derivative that learning needs, three ways.

A loss pulls at the move `m = alpha h` of a step, `h = dE/dc`, with `u = dL/dm`; the step's part of the gradient is
that of `sum(u m)`. With `u` a constant and `d = alpha u`, it is the derivative of the energy along `d`,
differentiated once more in everything the energy is made of.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.forward_ad import dual_level, make_dual, unpack_dual


# the step of a central difference, relative to the length of the candidate: about the cube root of the precision of
# float32, where what rounding takes and what the third derivative adds are alike
RELATIVE_STEP = 5e-3


def differentiate(
    energy: Callable[[Tensor], Tensor],
    embedded: Tensor,
    move: Tensor,
    step_size: Tensor | float,
    pull: Tensor,
    leaves: Sequence[Tensor],
    method: str,
) -> list[Tensor | None]:
    """
    The gradient of `sum(pull * move)`.

    Args:
        energy (`Callable`): embedded candidates (r, s, D) -> energies (r, s), each of its own candidate only.
        embedded (`Tensor` of shape `(r, s, D)`): the candidates [c] a step started from, a leaf.
        move (`Tensor` of shape `(r, s, D)`): [m]; with the graph of the energy's gradient for `"double_backward"`.
        step_size (`Tensor` or `float`): [alpha]; broadcasts to `move`.
        pull (`Tensor` of shape `(r, s, D)`): [u].
        leaves (sequence of `Tensor`): what else to differentiate in, step sizes among it.
        method (`str`): `"double_backward"`: exact, by the graph of the gradient. `"forward_over_reverse"`: exact, the
            derivative along [d] in forward mode. `"central_difference"`: from the energies at two points on either
            side; a relative error of 1e-4 to 1e-3 in float32. The last two need no second derivative of any operation.

    Returns:
        The gradients of `embedded` and of all `leaves`, None for those that play no part.
    """
    inputs = [embedded, *leaves]
    if method == "double_backward":
        return _gradients(move, inputs, pull)
    direction = (pull * step_size).detach()
    found: list[Tensor | None] = [None] * len(inputs)
    if move.requires_grad:  # in the step size
        found = _gradients(move, inputs, pull)
    with torch.enable_grad():
        if method == "forward_over_reverse":
            with dual_level():
                along = unpack_dual(energy(make_dual(embedded, direction.to(embedded.dtype)))).tangent
            # outside: not every derivative of a derivative has a forward mode
            return _sum(found, _gradients(along, inputs, torch.ones_like(along)))
        length = direction.norm(dim=-1, keepdim=True)
        reach = RELATIVE_STEP * embedded.detach().norm(dim=-1, keepdim=True) / length
        reach = torch.where(length > 0, reach, 0)  # who is not pulled at has nothing to tell
        weight = torch.where(length > 0, 0.5 / reach, 0)[..., 0]
        for side in (1, -1):
            energies = energy(embedded + (side * reach * direction).to(embedded.dtype))
            found = _sum(found, _gradients(energies, inputs, side * weight.to(energies.dtype)))
    return found


def _gradients(of: Tensor, inputs: Sequence[Tensor], weights: Tensor) -> list[Tensor | None]:
    # as in any backward pass, the precision of products has been decided
    with torch.autocast(of.device.type, enabled=False):
        return list(torch.autograd.grad(of, inputs, weights.to(of.dtype), allow_unused=True))


def _sum(first: list[Tensor | None], second: list[Tensor | None]) -> list[Tensor | None]:
    pairs = zip(first, second, strict=True)
    return [a if b is None else b if a is None else a + b for a, b in pairs]


__all__ = ["differentiate"]
