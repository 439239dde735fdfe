"""Laws of the training step that takes its candidates a few at a time, and of the ways to the second derivative."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from ebt_transformers import EBTConfig, EBTForCausalLM
from ebt_transformers.modeling_ebt import fused
from ebt_transformers.modeling_ebt.descent import standard_normal
from ebt_transformers.modeling_ebt.learning import chunks


VOCABULARY = 37
VARIANTS: dict[str, dict[str, Any]] = {
    "s1": {},
    "residual": {"update": "residual"},
    "shared table": {"candidate_embedding": "shared"},
    "anchor": {"candidate_anchor": "token"},
    "one landscape": {"step_conditioning": "none", "num_landscapes": 1, "thinking_steps": 2},
    "adaln": {"step_conditioning": "adaln"},
    "last step": {"loss_on_steps": "last"},
    "s2": {"loss_on_steps": "last", "detach_between_steps": False, "learn_step_size": False},
    "s2 with noise": {
        "loss_on_steps": "last",
        "detach_between_steps": False,
        "learn_step_size": False,
        "thinking_noise_std": 0.5,
    },
    "noise": {"thinking_noise_std": 0.5},
    "random step sizes": {"random_step_size": 2.0},
    "proposal": {"candidate_init": "proposal", "update": "residual", "step_size": 1.0},
}


def build(**values: Any) -> EBTForCausalLM:
    torch.manual_seed(0)
    size = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = {"num_key_value_heads": 2, "step_size": 3.0, "initializer_range": 0.3, **values}
    return EBTForCausalLM(EBTConfig(**size, **config)).train()


def batch(rows: int = 3, length: int = 7) -> dict[str, Tensor]:
    """Tokens with some left padding and some tokens that do not count."""
    ids = torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))
    mask, labels = torch.ones_like(ids), ids.clone()
    mask[1, :2], labels[1, :2], labels[0, 2:4] = 0, -100, -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def learn(model: EBTForCausalLM, **values: Any) -> tuple[Any, dict[str, Tensor]]:
    """Output and gradients of one training step from a fixed random state."""
    model.zero_grad()
    torch.manual_seed(3)
    output = model(**{**batch(), **values})
    output.loss.backward()
    return output, {name: each.grad for name, each in model.named_parameters() if each.grad is not None}


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert set(found) == set(expected)
    for name, wanted in expected.items():
        scale = float(wanted.abs().max()) + 1e-6
        assert_close(
            found[name] / scale, wanted / scale, rtol=0, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}"
        )


# ------------------------------------------------------------------------------------------------------------- chunks


@pytest.mark.parametrize("size", [1000, 14, 7, 3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_in_chunks_is_the_step_that_autograd_takes(variant: str, size: int) -> None:
    model = build(**VARIANTS[variant])
    noisy = model.config.thinking_noise_std > 0
    if noisy and size < 21:
        pytest.skip("every chunk draws its own noise")
    start = None if variant == "proposal" else torch.randn(3, 7, VOCABULARY)
    model.config.training_chunk_size = 0
    whole, expected = learn(model, initial_candidate=start)
    model.config.training_chunk_size = size
    parts, found = learn(model, initial_candidate=start)
    for name in ("loss", "step_losses", "mean_energies", "logits"):
        assert_close(parts[name], whole[name], rtol=1e-4, atol=1e-4)
    assert_same_gradients(found, expected, 2e-4)
    assert torch.equal(parts.steps_taken, whole.steps_taken)


def test_random_starts_of_one_chunk_are_those_of_all_at_once() -> None:
    model = build()
    model.config.training_chunk_size = 0
    whole, expected = learn(model)
    model.config.training_chunk_size = None
    parts, found = learn(model)
    assert_close(parts.logits, whole.logits, rtol=1e-4, atol=1e-4)
    assert_same_gradients(found, expected, 2e-4)


def test_the_gradient_is_the_slope_of_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    # one step, or the objective of detached steps is not what is differentiated; in float64 to the end
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    model = build(num_landscapes=1, training_chunk_size=7).double()
    start = torch.randn(3, 7, VOCABULARY)
    _, gradients = learn(model, initial_candidate=start)
    ways = {name: torch.randn_like(each) for name, each in gradients.items()}
    losses = []
    for sign in (1, -2):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.add_(sign * 1e-6 * ways[name])
        losses.append(learn(model, initial_candidate=start)[0].loss.item())
    slope = sum((gradients[name] * ways[name]).sum().item() for name in ways)
    assert (losses[0] - losses[1]) / 2e-6 == pytest.approx(slope, rel=1e-6)


@pytest.mark.parametrize(("rows", "positions", "size"), [(4, 256, 512), (3, 7, 14), (2, 9, 4), (1, 1, 512), (5, 3, 1)])
def test_chunks_cover_every_candidate_once(rows: int, positions: int, size: int) -> None:
    seen = torch.zeros(rows, positions)
    for some, part in chunks(rows, positions, size):
        assert 0 < seen[some, part].numel() <= size
        seen[some, part] += 1
    assert (seen == 1).all()


class _Watch(TorchDispatchMode):
    """Notes the products with the table, and how large tensors get."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.products = 0
        self.sizes: list[int] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        tensors = [each for each in args if isinstance(each, Tensor)]
        if "mm" in function.__name__ and any(self.vocabulary in each.shape for each in tensors):
            self.products += 1
        if isinstance(result, Tensor) and result.dim() > 1 and self.vocabulary == result.shape[-1]:
            self.sizes.append(result.numel() // self.vocabulary)
        return result


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_descent_takes_three_products_with_the_table_for_every_step_and_two_more(steps: int) -> None:
    model = build(thinking_steps=steps)
    with _Watch(VOCABULARY) as watch:
        learn(model)
    # half a chunk at a time where a distribution is needed for a moment: p' W of every step, p'^T m of the last
    assert watch.products == (3 * steps + 2) + steps + 1


def test_nothing_v_sized_is_larger_than_a_chunk_but_the_logits() -> None:
    model = build(training_chunk_size=21)
    with _Watch(VOCABULARY) as watch:
        learn(model, **batch(rows=8))
    assert sorted(set(watch.sizes))[-1] == 8 * 7
    assert max(size for size in watch.sizes if size != 8 * 7) <= 21


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_autocast_and_low_precision_weights_learn_in_chunks_as_all_at_once(dtype: torch.dtype) -> None:
    found = {}
    for size in (0, 7):
        model = build(training_chunk_size=size)
        if dtype == torch.bfloat16:
            model = model.to(dtype)
        start = torch.randn(3, 7, VOCABULARY, generator=torch.Generator().manual_seed(2))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.float32):
            output, gradients = learn(model, initial_candidate=start)
        assert all(each.dtype == model.get_parameter(name).dtype for name, each in gradients.items())
        found[size] = output.loss.item(), torch.cat([each.float().flatten() for each in gradients.values()])
    assert found[0][0] == pytest.approx(found[7][0], rel=2e-2)
    assert torch.nn.functional.cosine_similarity(found[0][1], found[7][1], dim=0) > 0.99


# --------------------------------------------------------------------------------------- what can be asked of its loss


def test_the_loss_can_be_scaled_and_differentiated_twice_over() -> None:
    model = build()
    _, once = learn(model)
    model.zero_grad()
    torch.manual_seed(3)
    loss = model(**batch()).loss
    (0.5 * loss).backward(retain_graph=True)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, 1.5 * once[name], rtol=1e-5, atol=1e-7)


def test_a_gradient_through_the_logits_is_refused_and_not_lost() -> None:
    output = build()(**batch())
    with pytest.raises(RuntimeError, match="training_chunk_size = 0"):
        (output.loss + output.logits.square().mean()).backward()
    free = build(training_chunk_size=0)(**batch())
    (free.loss + free.logits.square().mean()).backward()


def test_a_second_derivative_of_the_loss_needs_the_whole_graph() -> None:
    model = build()
    weight = model.candidate_embedding.weight
    with pytest.raises(RuntimeError, match="only once"):
        torch.autograd.grad(model(**batch()).loss, weight, create_graph=True)
    model.config.training_chunk_size = 0
    (slope,) = torch.autograd.grad(model(**batch()).loss, weight, create_graph=True)
    slope.square().sum().backward()
    assert weight.grad.abs().sum() > 0


def test_weights_that_are_no_parameters_of_the_model_are_left_to_autograd() -> None:
    model = build()
    _, expected = learn(model)
    copies = {name: each.detach().clone().requires_grad_() for name, each in model.named_parameters()}
    torch.manual_seed(3)
    output = torch.func.functional_call(model, copies, kwargs=batch())
    found = dict(zip(copies, torch.autograd.grad(output.loss, list(copies.values())), strict=True))
    assert_same_gradients(found, expected, 2e-4)


def test_frozen_parts_get_no_gradient() -> None:
    model = build()
    model.candidate_embedding.requires_grad_(False)
    model.model.layers[0].requires_grad_(False)
    _, gradients = learn(model)
    trained = {name for name, each in model.named_parameters() if each.requires_grad}
    assert set(gradients) == trained and len(trained) > 10


@pytest.mark.parametrize("values", [{"training_chunk_size": -1}, {"second_order": "triple_backward"}])
def test_bad_options_are_named(values: dict[str, Any]) -> None:
    (name,) = values
    with pytest.raises(StrictDataclassClassValidationError, match=name):
        build(**values)


# ------------------------------------------------------------------------------------------------------- second order


@pytest.mark.parametrize(("method", "tolerance"), [("forward_over_reverse", 1e-4), ("central_difference", 1e-2)])
@pytest.mark.parametrize("variant", ["s1", "adaln", "last step", "random step sizes", "anchor"])
def test_every_way_to_the_second_derivative_gives_the_same(variant: str, method: str, tolerance: float) -> None:
    model = build(training_chunk_size=7, **VARIANTS[variant])
    start = torch.randn(3, 7, VOCABULARY)
    whole, expected = learn(model, initial_candidate=start)
    model.config.second_order = method
    output, found = learn(model, initial_candidate=start)
    assert_close(output.loss, whole.loss, rtol=1e-5, atol=1e-5)
    assert_same_gradients(found, expected, tolerance)


@pytest.mark.parametrize("values", [{"output_energies": True}, {"output_trajectory": True}, {"labels": None}])
def test_another_second_order_is_refused_where_it_would_be_ignored(values: dict[str, Any]) -> None:
    model = build(second_order="central_difference")
    with pytest.raises(ValueError, match="central_difference"):
        model(**{**batch(), **values})
    assert model.eval()(**{**batch(), **values}).logits.isfinite().all()


# ------------------------------------------------------------------------------------------- pieces with closed forms

DOUBLE = {"dtype": torch.float64, "requires_grad": True}
HIDDEN = torch.tensor([[True, False, False], [True, True, True], [False, False, False]])


def angles() -> dict[str, Tensor]:
    turns = torch.randn(1, 1, 3, 2, dtype=torch.float64).repeat(1, 1, 1, 2)
    return {"cos": turns.cos(), "sin": turns.sin()}


PIECES: dict[str, Callable[[], tuple[Callable[..., Any], tuple[Tensor, ...]]]] = {
    "softmax": lambda: (
        lambda scores, own: fused.joint_softmax(scores, own, None),
        (torch.randn(2, 3, 3, **DOUBLE), torch.randn(2, 3, 1, **DOUBLE)),
    ),
    "masked softmax": lambda: (
        lambda scores, own: fused.joint_softmax(scores, own, HIDDEN),
        (torch.randn(2, 3, 3, **DOUBLE), torch.randn(2, 3, 1, **DOUBLE)),
    ),
    "rotation": lambda: (
        partial(fused.rotate, **angles()),
        (torch.randn(2, 2, 3, 4, **DOUBLE),),
    ),
    "norm": lambda: (lambda tensor: fused.normalize(tensor, 1e-5), (torch.randn(2, 3, 4, **DOUBLE),)),
}


@pytest.mark.parametrize("piece", PIECES)
def test_closed_forms_are_right_up_to_the_third_derivative(piece: str) -> None:
    function, inputs = PIECES[piece]()

    def slope(*inputs: Tensor) -> tuple[Tensor, ...]:
        results = function(*inputs)
        total = sum(part.sin().sum() for part in (results if isinstance(results, tuple) else (results,)))
        return torch.autograd.grad(total, inputs, create_graph=True)

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(slope, inputs)


@pytest.mark.parametrize("piece", PIECES)
def test_closed_forms_equal_the_plain_formulas(piece: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function, inputs = PIECES[piece]()
    expected = function(*inputs)
    monkeypatch.setattr(fused, "has_closed_form", lambda tensor: False)
    assert_close(function(*inputs), expected)


def test_a_candidate_that_sees_nothing_looks_at_itself() -> None:
    weights, own = fused.joint_softmax(torch.randn(3, 3), torch.randn(3, 1), HIDDEN)
    assert weights[1].tolist() == [0, 0, 0] and own[1].item() == 1
    assert fused.joint_softmax(torch.randn(3, 0), torch.randn(3, 1), None)[1].tolist() == [[1], [1], [1]]


# ---------------------------------------------------------------------------------------------------------- randomness


def test_many_numbers_are_drawn_alike_by_any_number_of_threads() -> None:
    shape = (3, 2**20)
    drawn = []
    for threads in (1, 2, 1):
        torch.set_num_threads(threads)
        try:
            drawn.append(standard_normal(shape, torch.Generator().manual_seed(5), torch.device("cpu"), torch.float32))
        finally:
            torch.set_num_threads(1)
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[0], drawn[2])
    assert abs(drawn[0].mean().item()) < 3e-3 and drawn[0].std().item() == pytest.approx(1, abs=3e-3)
    assert abs((drawn[0][0] * drawn[0][1]).mean().item()) < 4e-3
    torch.manual_seed(6)
    first = standard_normal(shape, None, torch.device("cpu"), torch.float32)
    assert not torch.equal(first, standard_normal(shape, None, torch.device("cpu"), torch.float32))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_model_learns_as_the_plain_one() -> None:
    model, start = build(), torch.randn(3, 7, VOCABULARY)
    _, expected = learn(model, initial_candidate=start)
    compiled = torch.compile(model)
    model.zero_grad()
    compiled(**batch(), initial_candidate=start).loss.backward()
    assert_same_gradients({name: each.grad for name, each in model.named_parameters()}, expected, 2e-4)
