"""
Pieces of the candidate stream that are differentiated twice in training, with their derivatives in closed form.

Autograd derives them, too, but out of dozens of small operations, each of which keeps and writes whole tensors. In
forward mode (dual numbers) and under `torch.compile` the plain formulas are used.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual


def has_closed_form(tensor: Tensor) -> bool:
    """Whether the functions of this file may stand in for the plain formulas here."""
    if torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return False
    return unpack_dual(tensor).tangent is None


class _JointSoftmax(torch.autograd.Function):
    """See [`joint_softmax`]."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, own: Tensor, hidden: Tensor | None) -> tuple[Tensor, Tensor]:
        weights = scores.clone() if hidden is None else scores.masked_fill(hidden, float("-inf"))
        top = torch.maximum(weights.amax(-1, keepdim=True), own)
        weights.sub_(top).exp_()
        own = (own - top).exp_()
        total = weights.sum(-1, keepdim=True).add_(own)
        weights.div_(total)
        own.div_(total)
        ctx.save_for_backward(weights, own)
        return weights, own

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_own: Tensor) -> tuple[Tensor, Tensor, None]:
        return *_JointSoftmaxGradient.apply(*ctx.saved_tensors, grad, grad_own), None


class _JointSoftmaxGradient(torch.autograd.Function):
    """The gradient of [`joint_softmax`] by its results `w` and the gradients `g` there: `w (g - sum(w g))`."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, own: Tensor, grad: Tensor, grad_own: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(weights, own, grad, grad_own)
        by_scores = weights * grad
        mean = by_scores.sum(-1, keepdim=True).addcmul_(own, grad_own)
        by_scores.addcmul_(weights, mean, value=-1)
        return by_scores, own * (grad_own - mean)

    @staticmethod
    def backward(ctx: Any, pull: Tensor, pull_own: Tensor) -> tuple[Tensor, ...]:
        weights, own, grad, grad_own = ctx.saved_tensors
        mean = (weights * grad).sum(-1, keepdim=True) + own * grad_own
        pulled = (weights * pull).sum(-1, keepdim=True) + own * pull_own
        if torch.is_grad_enabled():  # somebody differentiates a third time
            by_weights = pull * (grad - mean) - pulled * grad
            by_grad = weights * (pull - pulled)
        else:
            by_weights = (grad - mean).mul_(pull).addcmul_(pulled, grad, value=-1)
            by_grad = (pull - pulled).mul_(weights)
        by_own = pull_own * (grad_own - mean) - pulled * grad_own
        return by_weights, by_own, by_grad, own * (pull_own - pulled)


def joint_softmax(scores: Tensor, own: Tensor, hidden: Tensor | None) -> tuple[Tensor, Tensor]:
    """
    One softmax over the columns of two tensors.

    Args:
        scores (`Tensor` of shape `(..., N, C)`): of the context.
        own (`Tensor` of shape `(..., N, 1)`): of every candidate itself.
        hidden (`Tensor`, *optional*): True for columns that are not looked at; broadcasts to `scores`.

    Returns:
        The weights, (..., N, C) and (..., N, 1); together they sum to 1.
    """
    if scores.shape[-1] and has_closed_form(scores):
        return _JointSoftmax.apply(scores, own, hidden)
    if hidden is not None:
        scores = scores.masked_fill(hidden, float("-inf"))
    both = torch.cat([scores, own], dim=-1)
    # torch's own softmax in forward mode cannot be differentiated further
    both = torch.exp(both - both.detach().amax(-1, keepdim=True))
    both = both / both.sum(-1, keepdim=True)
    return both[..., :-1], both[..., -1:]


class _Rotation(torch.autograd.Function):
    """See [`rotate`]. A rotation is linear, and its transpose turns the other way."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        half = tensor.shape[-1] // 2
        turned = tensor * cos
        turned[..., :half].addcmul_(tensor[..., half:], sin[..., :half], value=-1)
        turned[..., half:].addcmul_(tensor[..., :half], sin[..., half:])
        return turned

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _Rotation.apply(grad, cos, -sin), None, None


def rotate(tensor: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """
    Rotary positions: turns the pairs (i, i + d/2) of every head.

    Args:
        tensor (`Tensor` of shape `(B, H, S, d)`): queries or keys.
        cos, sin (`Tensor` of shape `(B or 1, 1, S, d)`): of the angles, the second half as the first.

    Returns:
        The same shape.
    """
    if has_closed_form(tensor):
        return _Rotation.apply(tensor, cos, sin)
    first, second = tensor.chunk(2, dim=-1)
    return tensor * cos + torch.cat([-second, first], dim=-1) * sin


class _Normalize(torch.autograd.Function):
    """See [`normalize`]."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, eps: float) -> Tensor:
        scale = tensor.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        normed = tensor * scale
        ctx.save_for_backward(tensor)
        ctx.eps = eps
        return normed

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _NormalizeGradient.apply(*ctx.saved_tensors, grad, ctx.eps), None


class _NormalizeGradient(torch.autograd.Function):
    """The gradient of [`normalize`] by its argument `x` and the gradient `g` at `n = s x`: `s (g - n mean(n g))`."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, grad: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(tensor, grad)
        ctx.eps = eps
        scale = tensor.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        normed = tensor * scale
        mean = (normed * grad).mean(-1, keepdim=True)
        return torch.addcmul(grad, normed, mean, value=-1).mul_(scale)

    @staticmethod
    def backward(ctx: Any, pull: Tensor) -> tuple[Tensor, Tensor, None]:
        tensor, grad = ctx.saved_tensors
        scale = (tensor.square().mean(-1, keepdim=True) + ctx.eps).rsqrt()
        normed = tensor * scale
        along, pulled = (normed * grad).mean(-1, keepdim=True), (normed * pull).mean(-1, keepdim=True)
        both = (grad * pull).mean(-1, keepdim=True)
        by_tensor = (3 * along * pulled - both) * normed - along * pull - pulled * grad
        return by_tensor * scale.square(), (pull - normed * pulled) * scale, None


def normalize(tensor: Tensor, eps: float) -> Tensor:
    """
    Division by the root mean square of the last dimension.

    Args:
        tensor (`Tensor` of shape `(..., D)`): what to normalize.
        eps (`float`): added to the mean square.

    Returns:
        The same shape.
    """
    if has_closed_form(tensor):
        return _Normalize.apply(tensor, eps)
    return tensor * torch.rsqrt(tensor.square().mean(-1, keepdim=True) + eps)


__all__ = ["joint_softmax", "normalize", "rotate"]
