"""Laws of the Energy Transformer's models for images, nodes and graphs: losses, batches, saving, loading, mistakes."""

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from torch.nn import functional
from torch.testing import assert_close
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedImageModeling,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

from ebt_transformers import (
    EnergyTransformerConfig,
    EnergyTransformerForGraphClassification,
    EnergyTransformerForImageCompletion,
    EnergyTransformerForNodeClassification,
    EnergyTransformerModel,
)
from ebt_transformers.modeling_et.completion_et import cut_patches


TESTS = Path(__file__).parent
sys.path.insert(0, str(TESTS))

from hub_server import HubServer  # noqa: E402


SMALL: dict[str, Any] = {"hidden_size": 16, "num_attention_heads": 2, "num_memories": 20, "thinking_steps": 3}
GRAPH: dict[str, Any] = {
    **SMALL,
    **{"num_node_features": 5, "num_labels": 3, "num_blocks": 2, "readout_size": 8},
    **{"position_embedding": "laplacian", "num_positions": 3, "edge_modulation": "pairwise", "num_edge_features": 2},
}
MODELS: dict[str, tuple[type[PreTrainedModel], type, dict[str, Any]]] = {
    "images": (
        EnergyTransformerForImageCompletion,
        AutoModelForMaskedImageModeling,
        {**SMALL, "image_size": [8, 12], "patch_size": 4, "self_attention": True, "mask_ratio": 0.6},
    ),
    "nodes": (
        EnergyTransformerForNodeClassification,
        AutoModelForTokenClassification,
        {**GRAPH, "num_relations": 2},
    ),
    "graphs": (EnergyTransformerForGraphClassification, AutoModelForSequenceClassification, GRAPH),
}
KINDS = tuple(MODELS)
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def build(kind: str, **overrides: Any) -> Any:
    """A tiny random model in evaluation mode, away from its flat start."""
    model_class, _, options = MODELS[kind]
    torch.manual_seed(1)
    model = model_class(EnergyTransformerConfig(**{**options, **overrides})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


# 4, 1 and 5 nodes, the second graph without an edge
GRAPH_OF = torch.tensor([0] * 4 + [1] + [2] * 5)
EDGES = torch.tensor(
    [[0, 1, 1, 2, 2, 3, 5, 6, 6, 7, 7, 8, 8, 9, 9, 5], [1, 0, 2, 1, 3, 2, 6, 5, 7, 6, 8, 7, 9, 8, 5, 9]]
)


def inputs_of(kind: str, labels: bool = True, batch: int = 3) -> dict[str, Any]:
    """What fits the models of [`build`]."""
    generator = torch.Generator().manual_seed(2)
    if kind == "images":
        pictures = torch.randn(batch, 3, 8, 12, generator=generator)
        masked = torch.rand(batch, 6, generator=generator).argsort(1) < 3
        return {"pixel_values": pictures, **({"bool_masked_pos": masked} if labels else {})}
    nodes, edges = len(GRAPH_OF), EDGES.shape[1]
    inputs = {
        "node_features": torch.randn(nodes, 5, generator=generator),
        "edge_index": EDGES,
        "edge_features": torch.randn(edges, 2, generator=generator),
        "positions": torch.randn(nodes, 3, generator=generator),
        "graph_index": GRAPH_OF,
    }
    if kind == "nodes":
        inputs["edge_type"] = torch.randint(0, 2, (edges,), generator=generator)
    if labels:
        count = nodes if kind == "nodes" else 3
        inputs["labels"] = torch.randint(0, 3, (count,), generator=generator)
    return inputs


def result_of(output: Any) -> Tensor:
    """The prediction."""
    return output.reconstruction if "reconstruction" in output else output.logits


def run(model: Any, kind: str, **options: Any) -> Tensor:
    """The prediction in evaluation mode."""
    with torch.no_grad():
        return result_of(model.eval()(**inputs_of(kind, labels=False), **options))


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# ------------------------------------------------------------------------------------------------------------ training


def train_once(model: Any, kind: str, **inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients from a fixed random state."""
    model.train().zero_grad()
    torch.manual_seed(3)
    loss = model(**{**inputs_of(kind), **inputs}).loss
    loss.backward()
    return loss.detach(), gradients(model)


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_gets_a_gradient(kind: str) -> None:
    model = build(kind)
    _, slopes = train_once(model, kind)
    assert set(slopes) == {name for name, _ in model.named_parameters()}
    assert [name for name, slope in slopes.items() if not slope.abs().sum() > 0] == []


def test_a_relation_without_edges_and_a_graph_without_any_still_get_gradients() -> None:
    model = build("nodes")
    nowhere = {"edge_type": torch.zeros(EDGES.shape[1], dtype=torch.long)}
    nothing = {"edge_index": EDGES[:, :0], "edge_type": EDGES[0, :0], "edge_features": torch.zeros(0, 2)}
    for inputs in (nowhere, nothing, {**nothing, "edge_features": torch.zeros(0, 0)}):
        loss, slopes = train_once(model, "nodes", **inputs)
        assert loss.isfinite() and len(slopes) == len(list(model.parameters()))
        assert all(slope.isfinite().all() for slope in slopes.values())


@pytest.mark.parametrize("kind", KINDS)
def test_recomputing_changes_nothing(kind: str) -> None:
    model = build(kind, noise_std=0.1)
    loss, slopes = train_once(model, kind)
    model.gradient_checkpointing_enable()
    again, recomputed = train_once(model, kind)
    assert_close(loss, again)
    for name, slope in slopes.items():
        assert_close(recomputed[name], slope, **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_that_of_finite_differences(kind: str) -> None:
    model = build(kind).double()
    inputs = {key: value.double() if value.is_floating_point() else value for key, value in inputs_of(kind).items()}
    if kind == "graphs":
        inputs.pop("graph_index")
        inputs["labels"] = inputs["labels"][:1]
    loss = model(**inputs).loss  # in evaluation mode: no random signs
    loss.backward()
    torch.manual_seed(4)
    for parameter in model.parameters():
        way = torch.randn_like(parameter)
        ends = []
        for amount in (1e-5, -1e-5):
            with torch.no_grad():
                parameter.add_(amount * way)
                ends.append(model(**inputs).loss)
                parameter.sub_(amount * way)
        assert_close((parameter.grad * way).sum(), (ends[0] - ends[1]) / 2e-5, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_keeps_energies_and_tokens_in_single(kind: str) -> None:
    model = build(kind)
    options = {"output_energies": True, "output_trajectory": True}
    exact = model(**inputs_of(kind), **options)
    half = copy.deepcopy(model).bfloat16()
    seen = []
    half.model.register_forward_hook(lambda module, args, output: seen.append(output))
    output = half(**inputs_of(kind), **options)
    assert seen[0].last_hidden_state.dtype == seen[0].trajectory.dtype == torch.float32
    assert output.energies.dtype == result_of(output).dtype == output.loss.dtype == torch.float32
    assert_close(output.energies, exact.energies, rtol=0.05, atol=0.5)
    assert_close(result_of(output), result_of(exact), rtol=0.2, atol=0.2)
    output.loss.backward()
    assert all(slope.isfinite().all() for slope in gradients(half).values())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = model(**inputs_of(kind), **options)
    assert mixed.energies.dtype == torch.float32
    assert_close(mixed.energies, exact.energies, rtol=0.05, atol=0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_inference_mode_gives_the_same(kind: str) -> None:
    model, inputs = build(kind), inputs_of(kind)
    with torch.inference_mode():
        inside = model(**inputs, output_energies=True, output_trajectory=True)
    outside = model(**inputs, output_energies=True, output_trajectory=True)
    assert outside.loss.requires_grad and not inside.loss.requires_grad
    for name in ("loss", "energies", "trajectory", "steps_taken"):
        assert torch.equal(inside[name], outside[name])
    assert torch.equal(result_of(inside), result_of(outside))


@pytest.mark.parametrize("kind", KINDS)
def test_more_and_fewer_steps(kind: str) -> None:
    model = build(kind)
    blocks = model.config.num_blocks
    for steps in (1, 3, 7):
        output = model(**inputs_of(kind), thinking_steps=steps, output_energies=True, output_trajectory=True)
        rows = len(output.energies)
        assert output.energies.shape == (rows, blocks, steps + 1)
        assert output.steps_taken.tolist() == [[steps] * blocks] * rows
        assert output.trajectory.shape[1 if kind == "images" else 0] == blocks * steps + 1
    assert torch.equal(run(model, kind), run(model, kind, thinking={"steps": 3}))
    assert not torch.equal(run(model, kind), run(model, kind, thinking_steps=4))


@pytest.mark.parametrize("kind", KINDS)
def test_a_tuple_has_what_the_output_has(kind: str) -> None:
    model = build(kind)
    whole = model(**inputs_of(kind), output_energies=True, output_trajectory=True)
    pairs = zip(
        whole.to_tuple(),
        model(**inputs_of(kind), output_energies=True, output_trajectory=True, return_dict=False),
        strict=True,
    )
    assert all(torch.equal(one, other) for one, other in pairs)
    plain = model(**inputs_of(kind, labels=False))
    assert plain.loss is None and plain.energies is None and plain.trajectory is None


# -------------------------------------------------------------------------------------------------------------- images


def test_patches_lie_channel_by_channel_row_by_row_and_come_back() -> None:
    model = build("images")
    pictures = inputs_of("images")["pixel_values"]
    patches = cut_patches(pictures, 4)
    assert patches.shape == (3, 6, 48)
    assert torch.equal(patches[1, 4], pictures[1, :, 4:8, 4:8].flatten())
    assert torch.equal(model._join(patches), pictures)


def test_what_is_under_a_mask_is_not_seen() -> None:
    model, inputs = build("images"), inputs_of("images")
    hidden = model._join(inputs["bool_masked_pos"][..., None].expand(-1, -1, 48).float()).bool()
    other = torch.where(hidden, torch.randn(3, 3, 8, 12), inputs["pixel_values"])
    found = [model(pictures, inputs["bool_masked_pos"]).reconstruction for pictures in (inputs["pixel_values"], other)]
    assert torch.equal(*found)
    seen = torch.where(hidden, inputs["pixel_values"], torch.randn(3, 3, 8, 12))
    assert not torch.equal(found[0], model(seen, inputs["bool_masked_pos"]).reconstruction)


def test_the_model_is_the_formula() -> None:
    model, inputs = build("images", thinking_steps=2), inputs_of("images")
    pictures, masked = inputs["pixel_values"], inputs["bool_masked_pos"]
    patches = pictures.reshape(3, 3, 2, 4, 3, 4).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    tokens = patches @ model.patches.weight.T + model.patches.bias
    tokens[masked] = model.mask_token
    tokens = torch.cat([model.cls_token.expand(3, 1, -1), tokens], dim=1) + model.positions
    walked = model.model(tokens, thinking_steps=2).last_hidden_state
    decoded = model.model.norm(walked[:, 1:]) @ model.decoder.weight.T + model.decoder.bias
    pictures = decoded.view(3, 2, 3, 3, 4, 4).permute(0, 3, 1, 4, 2, 5).reshape(3, 3, 8, 12)
    output = model(**inputs, output_trajectory=True)
    assert_close(output.reconstruction, pictures, **CLOSE)
    assert_close(output.trajectory[:, -1], output.reconstruction, **CLOSE)


def test_losses_are_what_they_say() -> None:
    inputs = inputs_of("images")
    scored = inputs["bool_masked_pos"].clone()
    scored[:, 0] = True
    losses = {
        kind: model(**inputs, scored_pos=scored).loss
        for kind in ("mse", "rmse", "diluted_rmse")
        for model in [build("images", completion_loss=kind)]
    }
    found = cut_patches(build("images")(**inputs).reconstruction, 4)
    errors = (found - cut_patches(inputs["pixel_values"], 4)).square()
    assert_close(losses["mse"], errors[scored].mean(), **CLOSE)
    assert_close(losses["rmse"], errors[scored].mean().sqrt(), **CLOSE)
    assert_close(losses["diluted_rmse"], (errors * scored[..., None]).mean().sqrt(), **CLOSE)
    by_default = build("images")(**inputs).loss
    assert_close(by_default, errors[inputs["bool_masked_pos"]].mean(), **CLOSE)


def test_drawn_masks_are_those_of_the_config() -> None:
    config = EnergyTransformerConfig.for_images(
        image_size=32, patch_size=4, mask_ratio=0.5, visible_ratio=0.25, **SMALL
    )
    model = EnergyTransformerForImageCompletion(config)
    masked, scored = model.draw_masks(40, torch.Generator().manual_seed(0))
    assert masked.shape == scored.shape == (40, 64)
    assert (scored.sum(1) == 32).all() and (masked.sum(1) == 24).all()
    assert not (masked & ~scored).any()
    assert masked.float().mean(0).min() > 0  # every place gets its turn
    again, _ = model.draw_masks(40, torch.Generator().manual_seed(0))
    assert torch.equal(masked, again)


def test_images_of_a_batch_are_independent() -> None:
    model, inputs = build("images"), inputs_of("images")
    whole = model(**inputs, output_energies=True)
    for row in range(3):
        alone = model(**{name: value[row : row + 1] for name, value in inputs.items()}, output_energies=True)
        assert_close(whole.reconstruction[row], alone.reconstruction[0], **CLOSE)
        assert_close(whole.energies[row], alone.energies[0], **CLOSE)


# -------------------------------------------------------------------------------------------------------------- graphs


def part(inputs: dict[str, Any], graph: int) -> dict[str, Any]:
    """The inputs of one graph of a batch."""
    nodes, first = graph == GRAPH_OF, int((graph > GRAPH_OF).sum())
    edges = nodes[EDGES[0]]
    chosen = {"node_features": nodes, "positions": nodes, "edge_features": edges, "edge_type": edges}
    own = {name: inputs[name][rows] for name, rows in chosen.items() if name in inputs}
    return {**own, "edge_index": EDGES[:, edges] - first}


@pytest.mark.parametrize("kind", ["nodes", "graphs"])
def test_graphs_of_a_batch_are_independent(kind: str) -> None:
    model, inputs = build(kind), inputs_of(kind, labels=False)
    whole = model(**inputs, output_energies=True, output_trajectory=True)
    assert whole.energies.shape == (3, 2, 4)
    for graph in range(3):
        alone = model(**part(inputs, graph), output_energies=True)
        rows = graph == GRAPH_OF if kind == "nodes" else slice(graph, graph + 1)
        assert_close(whole.logits[rows], alone.logits, **CLOSE)
        assert_close(whole.energies[graph], alone.energies[0], **CLOSE)


@pytest.mark.parametrize("kind", ["nodes", "graphs"])
def test_the_numbering_of_nodes_means_nothing(kind: str) -> None:
    model, inputs = build(kind), inputs_of(kind, labels=False)
    order = torch.randperm(len(GRAPH_OF))
    shuffled = {**inputs, "edge_index": order.argsort()[EDGES]}
    for name in ("node_features", "positions", "graph_index"):
        shuffled[name] = inputs[name][order]
    expected, found = model(**inputs).logits, model(**shuffled).logits
    assert_close(found, expected[order] if kind == "nodes" else expected, **CLOSE)


def test_a_node_feels_others_as_far_as_steps_reach() -> None:
    model = build("nodes", num_blocks=1)
    inputs = inputs_of("nodes", labels=False)
    path = {**inputs, "edge_index": torch.tensor([[0, 1, 2], [1, 2, 3]]), "edge_features": torch.zeros(3, 2)}
    path["edge_type"] = torch.zeros(3, dtype=torch.long)
    path["graph_index"] = None
    changed = {**path, "node_features": path["node_features"].clone()}
    changed["node_features"][0] += 1
    for steps in (1, 2, 3):
        one, other = (model(**each, thinking_steps=steps).logits for each in (path, changed))
        moved = (one != other).any(1)
        assert moved[: steps + 1].all() and not moved[steps + 1 :].any()


def test_signs_of_positions_are_drawn_for_each_graph_in_training_only() -> None:
    model, inputs = build("graphs"), inputs_of("graphs", labels=False)
    flipped = {**inputs, "positions": -inputs["positions"]}
    assert not torch.equal(model(**inputs).logits, model(**flipped).logits)
    model.train()
    seen = {tuple(model(**inputs).logits[2].tolist()) for _ in range(60)}
    assert 4 <= len(seen) <= 8  # three eigenvectors with two signs each


def test_nodes_may_have_a_first_axis_of_one() -> None:
    model, inputs = build("nodes"), inputs_of("nodes")
    plain, batched = model(**inputs), model(**{name: value[None] for name, value in inputs.items()})
    assert batched.logits.shape == (1, 10, 3)
    assert torch.equal(plain.logits, batched.logits[0]) and torch.equal(plain.loss, batched.loss)
    with pytest.raises(ValueError, match=r"different numbers of nodes.*not 2 rows"):
        model(torch.zeros(2, 10, 5), EDGES)


@pytest.mark.parametrize("kind", ["nodes", "graphs"])
def test_the_loss_is_torch_s(kind: str) -> None:
    weights = [1.0, 4.0, 0.5]
    model, inputs = build(kind, class_weights=weights, label_smoothing=0.1), inputs_of(kind)
    inputs["labels"][1] = -100
    output = model(**inputs)
    options = {"weight": torch.tensor(weights), "label_smoothing": 0.1, "reduction": "sum"}
    total = functional.cross_entropy(output.logits, inputs["labels"], **options)
    assert_close(output.loss, total / (inputs["labels"] != -100).sum())
    assert_close(model(**inputs, num_items_in_batch=7).loss, total / 7)
    plain = build(kind)
    assert_close(plain(**inputs).loss, functional.cross_entropy(plain(**inputs).logits, inputs["labels"]))


def test_learned_positions_belong_to_the_nodes_of_one_graph() -> None:
    model = build("nodes", position_embedding="learned", num_positions=10)
    inputs = {name: value for name, value in inputs_of("nodes", labels=False).items() if name != "positions"}
    before = model(**inputs).logits
    with torch.no_grad():
        model.nodes.positions.weight[4] += 1  # a node without edges
    changed = (model(**inputs).logits != before).any(1)
    assert changed.tolist() == [index == 4 for index in range(10)]
    with pytest.raises(ValueError, match="10 nodes of its graph, got 9 nodes"):
        model(inputs["node_features"][:9], EDGES[:, :6], inputs["edge_features"][:6], inputs["edge_type"][:6])


def test_edges_weigh_one_at_the_start() -> None:
    torch.manual_seed(0)
    config = EnergyTransformerConfig(**{**GRAPH, "initializer_range": 0.5})
    model = EnergyTransformerForGraphClassification(config).eval()
    inputs = inputs_of("graphs", labels=False)
    factors = model.modulation(torch.randn(10, 16), EDGES, inputs["edge_features"])
    assert_close(factors, torch.ones(16, 2))
    other = {**inputs, "edge_features": torch.zeros(16, 2)}
    assert torch.equal(model(**inputs).logits, model(**other).logits)
    assert not torch.equal(run(build("graphs"), "graphs"), build("graphs")(**other).logits)


# -------------------------------------------------------------------------------------------------- saving and loading


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_comes_back(kind: str, tmp_path: Path) -> None:
    model = build(kind, class_weights=None if kind == "images" else [1.0, 2.0, 3.0])
    model.save_pretrained(tmp_path)
    model_class, auto_class, _ = MODELS[kind]
    for loaded in (model_class.from_pretrained(tmp_path), auto_class.from_pretrained(tmp_path)):
        assert type(loaded) is model_class and loaded.config.to_diff_dict() == model.config.to_diff_dict()
        state = loaded.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert_close(run(loaded, kind), run(model, kind), **CLOSE)
    assert type(AutoConfig.from_pretrained(tmp_path)) is EnergyTransformerConfig
    half = auto_class.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


def test_the_stack_alone_is_loaded_from_a_model_with_a_head_and_back(tmp_path: Path) -> None:
    model = build("images")
    model.save_pretrained(tmp_path / "head")
    stack = AutoModel.from_pretrained(tmp_path / "head").eval()
    assert type(stack) is EnergyTransformerModel
    tokens = torch.randn(2, 5, 16)
    assert_close(stack(tokens).last_hidden_state, model.model(tokens).last_hidden_state)
    stack.save_pretrained(tmp_path / "stack")
    again = EnergyTransformerForImageCompletion.from_pretrained(tmp_path / "stack")
    assert torch.equal(again.model.stack[0].memory.patterns, stack.stack[0].memory.patterns)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_carries_all_of_its_code_and_nothing_of_the_package(kind: str, tmp_path: Path) -> None:
    build(kind).save_pretrained(tmp_path)
    files = {path.name: path.read_text(encoding="utf-8") for path in tmp_path.glob("*.py")}
    for name, content in (
        ("descent.py", "def descend("),
        ("stopping.py", "class StopRules"),
        ("thinking_ebt.py", "class ThinkingConfig"),
        ("pretrained.py", "class EBTBasePreTrainedModel"),
        ("checks.py", "def check_energies"),
        ("configuration_energy_transformer.py", "class EnergyTransformerConfig"),
        ("energies.py", "class EnergyAttention"),
        ("edges.py", "class Edges"),
    ):
        assert content in files[name]
    imports = [
        f"{name}: {line}"
        for name, content in files.items()
        for line in content.splitlines()
        if line.lstrip().startswith(("from ebt_transformers", "import ebt_transformers", "from .."))
    ]
    assert imports == []


VISIT = """
import sys
sys.modules["ebt_transformers"] = None  # a name that is None here cannot be imported
import torch
from transformers import (
    AutoModel, AutoModelForMaskedImageModeling, AutoModelForSequenceClassification, AutoModelForTokenClassification
)

expected, inputs, (again, place) = torch.load(sys.argv[1]), torch.load(sys.argv[2]), sys.argv[3:]
kinds = {
    "images": AutoModelForMaskedImageModeling,
    "nodes": AutoModelForTokenClassification,
    "graphs": AutoModelForSequenceClassification,
}
trusting = {"trust_remote_code": True}


def check(kind, place):
    model = kinds[kind].from_pretrained(place, **trusting)
    labelled = inputs[kind]
    given = {name: value for name, value in labelled.items() if name not in ("labels", "bool_masked_pos")}
    with torch.no_grad():
        output = model(**given, output_energies=True)
    found = output.reconstruction if kind == "images" else output.logits
    torch.testing.assert_close(found, expected[kind], rtol=1e-3, atol=1e-3)
    assert output.energies.isfinite().all()
    model.train()(**labelled).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    return model


for kind in kinds:
    check(kind, f"{place}/{kind}").save_pretrained(f"{again}/{kind}-again")
    check(kind, f"{again}/{kind}-again")
stack = AutoModel.from_pretrained(f"{place}/stack", **trusting)
torch.testing.assert_close(stack(expected["tokens"]).last_hidden_state, expected["stack"], rtol=1e-3, atol=1e-3)
assert type(stack).__name__ == "EnergyTransformerModel"
assert not any(name.startswith("ebt_transformers.") for name in sys.modules)
print("loaded without the package")
"""


def call(script: str, *arguments: object, env: dict[str, str], cwd: Path) -> str:
    """What a process of its own prints."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def save_all(folder: Path) -> list[Path]:
    """Saves a model of every kind; returns the files with what they give and with what they are given."""
    expected: dict[str, Any] = {"tokens": torch.randn(2, 5, 16)}
    for kind in KINDS:
        model = build(kind)
        model.save_pretrained(folder / kind)
        expected[kind] = run(model, kind)
    stack = build("images").model
    stack.save_pretrained(folder / "stack")
    expected["stack"] = stack(expected["tokens"]).last_hidden_state.detach()
    torch.save(expected, folder / "expected.pt")
    torch.save({kind: inputs_of(kind) for kind in KINDS}, folder / "inputs.pt")
    return [folder / "expected.pt", folder / "inputs.pt"]


def test_saved_models_load_train_and_save_without_the_package(tmp_path: Path) -> None:
    files = save_all(tmp_path)
    cache = {"HF_HOME": str(tmp_path / "home"), "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    said = call(VISIT, *files, tmp_path, tmp_path, env={**os.environ, **cache, "OMP_NUM_THREADS": "1"}, cwd=tmp_path)
    assert "loaded without the package" in said


PUBLISH = """
from huggingface_hub import HfApi
import ebt_transformers

for kind in ("images", "nodes", "graphs", "stack"):
    name = ebt_transformers.EnergyTransformerConfig.from_pretrained(kind).architectures[0]
    getattr(ebt_transformers, name).from_pretrained(kind).push_to_hub(f"user/{kind}")
    info = HfApi().model_info(f"user/{kind}")
    assert {"energy-transformer", "energy-based-model"} <= set(info.tags), info.tags
    task = {"images": "image-to-image", "stack": None}.get(kind, "graph-ml")
    assert info.pipeline_tag == task, (kind, info.pipeline_tag)
"""


@pytest.mark.slow
def test_pushed_models_come_with_all_of_their_code(tmp_path: Path, subprocess_env: dict[str, str]) -> None:
    files = save_all(tmp_path)
    with HubServer(tmp_path / "contents") as hub:
        env = {**hub.environment(tmp_path / "home"), "PYTHONPATH": subprocess_env["PYTHONPATH"]}
        call(PUBLISH, env=env, cwd=tmp_path)
        for kind in KINDS:
            repository = hub.repositories["model", f"user/{kind}"]
            pushed = set(repository.commits[repository.branches["main"]].files)
            assert {path.name for path in (tmp_path / kind).iterdir()} <= pushed
        env = {**hub.environment(tmp_path / "visitor", token=False), "HF_MODULES_CACHE": str(tmp_path / "modules")}
        assert "loaded without the package" in call(VISIT, *files, tmp_path, "user", env=env, cwd=tmp_path)


# ------------------------------------------------------------------------------------------------ adapters, processes


ADAPTED = ["key", "query", "patterns"]


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_learn_merge_and_come_back(kind: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = build(kind)
    options = {"r": 2, "lora_alpha": 4, "target_parameters": ADAPTED}
    adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**options))
    blocks, relations = model.config.num_blocks, model.config.num_relations
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * blocks * (2 * relations + 1)
    assert_close(run(adapted, kind), run(model, kind))  # it starts without effect
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(0.3 * torch.randn_like(parameter))
    found = run(adapted, kind)
    assert not torch.allclose(found, run(model, kind), rtol=1e-3, atol=1e-3)
    adapted.train()(**inputs_of(kind)).loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in trained.values())
    assert all(p.grad is None for name, p in adapted.named_parameters() if name not in trained)

    adapted.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)
    assert_close(run(again, kind), found, **CLOSE)
    merged = adapted.eval().merge_and_unload()
    assert type(merged) is type(model)
    assert_close(run(merged, kind), found, **CLOSE)
    merged.save_pretrained(tmp_path / "merged")
    assert_close(run(type(model).from_pretrained(tmp_path / "merged"), kind), found, **CLOSE)


@pytest.fixture
def process_group(tmp_path: Path) -> Any:
    from torch import distributed

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize("kind", KINDS)
def test_distributed_training_gives_the_same_gradients(kind: str, process_group: None) -> None:
    from torch.nn.parallel import DistributedDataParallel

    model = build(kind)
    _, expected = train_once(model, kind)
    wrapped = DistributedDataParallel(model.train())  # raises in the second step if a parameter goes unused
    for _ in range(2):
        model.zero_grad()
        torch.manual_seed(3)
        wrapped(**inputs_of(kind)).loss.backward()
    for name, slope in gradients(model).items():
        assert_close(slope, expected[name], **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_sharded_training_gives_the_same_gradients(kind: str, process_group: None, tmp_path: Path) -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import fully_shard

    model = build(kind)
    _, expected = train_once(model, kind)
    model.save_pretrained(tmp_path / "before")
    for module in model.modules():
        if type(module).__name__ in model._no_split_modules:  # what accelerate shards by itself
            fully_shard(module)
    sharded = fully_shard(model)
    _, slopes = train_once(sharded, kind)
    for name, slope in slopes.items():
        assert_close(slope.full_tensor(), expected[name], **CLOSE)
    whole = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True))
    sharded.save_pretrained(tmp_path / "after", state_dict=whole)
    before, after = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("before", "after")
    )
    assert before == after


# ------------------------------------------------------------------------------------------------------------ mistakes


MISTAKES: list[tuple[str, dict[str, Any], str]] = [
    ("images", {"thinking_step": 3}, "Unknown thinking option.*step. Allowed: steps"),
    ("images", {"steps": 3}, "steps"),
    ("images", {"thinking_candidates": 2}, r"thinking_candidates means nothing.*Allowed: thinking_steps"),
    ("images", {"thinking_landscapes": [0]}, "thinking_landscapes means nothing"),
    ("images", {"thinking_steps": 0}, "at least 1.*got 0"),
    ("images", {"thinking_step_size": -1.0}, "step_size.*-1"),
    ("images", {"thinking_step_size_scale": [1.0, 2.0]}, "each of the 3 steps, got 2"),
    ("images", {"pixel_values": torch.zeros(3, 8, 12)}, r"\(3, 8, 12\)"),
    ("images", {"pixel_values": torch.zeros(3, 1, 8, 12)}, r"3 channel\(s\), got 1"),
    ("images", {"pixel_values": torch.zeros(3, 3, 8, 8)}, "8 x 12 pixels.*got 8 x 8"),
    ("images", {"pixel_values": torch.full((3, 3, 8, 12), torch.nan)}, "not finite"),
    ("images", {"pixel_values": torch.full((3, 3, 8, 12), 255.0)}, "up to 255"),
    ("images", {"bool_masked_pos": torch.ones(3, 5)}, r"`bool_masked_pos`.*\(3, 6\).*\(3, 5\)"),
    ("images", {"bool_masked_pos": torch.zeros(3, 6)}, "No patch counts"),
    ("images", {"bool_masked_pos": None, "scored_pos": torch.ones(3, 6)}, "`scored_pos` needs `bool_masked_pos`"),
    ("images", {"scored_pos": torch.ones(2, 6)}, r"`scored_pos`.*\(2, 6\)"),
    ("nodes", {"thinking_tolerance": 0.1}, "3 graphs descend together"),
    ("nodes", {"node_features": torch.zeros(10, 4)}, r"\(nodes, 5\).*\(10, 4\)"),
    ("nodes", {"node_features": torch.full((10, 5), torch.inf)}, "`node_features`.*not finite"),
    ("nodes", {"edge_index": EDGES.T}, r"`edge_index`.*\(2, edges\).*\(16, 2\)"),
    ("nodes", {"edge_index": EDGES + 1}, "from 0 to 9, got 1 to 10"),
    ("nodes", {"edge_index": EDGES.float()}, "`edge_index` must hold integers, got torch.float32"),
    ("nodes", {"edge_features": torch.full((16, 2), torch.nan)}, "`edge_features`.*not finite"),
    ("nodes", {"edge_features": None}, "`edge_features` is missing"),
    ("nodes", {"edge_features": torch.zeros(15, 2)}, r"`edge_features`.*\(16, 2\).*\(15, 2\)"),
    ("nodes", {"edge_features": torch.zeros(16, 3)}, r"`edge_features`.*\(16, 2\).*\(16, 3\)"),
    ("nodes", {"edge_type": None}, "`edge_type` is missing"),
    ("nodes", {"edge_type": torch.zeros(3, dtype=torch.long)}, r"`edge_type`.*\(16,\).*\(3,\)"),
    ("nodes", {"edge_type": torch.full((16,), 2)}, "from 0 to 1, got 2 to 2"),
    ("nodes", {"positions": None}, "`positions` is missing"),
    ("nodes", {"positions": torch.zeros(10, 4)}, r"`positions`.*\(10, 3\).*\(10, 4\)"),
    ("nodes", {"graph_index": GRAPH_OF[:5]}, r"`graph_index`.*\(10,\).*\(5,\)"),
    ("nodes", {"graph_index": GRAPH_OF - 1}, "`graph_index`.*from 0.*got -1"),
    ("nodes", {"labels": torch.zeros(9, dtype=torch.long)}, r"`labels`.*\(10,\).*\(9,\)"),
    ("nodes", {"labels": torch.full((10,), 3)}, "between 0 and 2.*got 3"),
    ("nodes", {"labels": torch.full((10,), -100)}, "all `labels` are -100"),
    ("graphs", {"edge_index": torch.tensor([[0], [4]]), "edge_features": torch.zeros(1, 2)}, "different graphs"),
    ("graphs", {"graph_index": GRAPH_OF * 2}, "without gaps"),
    ("graphs", {"graph_index": GRAPH_OF[:4]}, r"`graph_index`.*\(10,\).*\(4,\)"),
    ("graphs", {"labels": torch.zeros(10, dtype=torch.long)}, r"`labels`.*\(3,\).*\(10,\)"),
    ("graphs", {"edge_features": torch.zeros(20, 2)}, r"`edge_features`.*\(16, 2\).*\(20, 2\)"),
    ("graphs", {"thinking_target_energy": 0.0}, "3 graphs descend together"),
]


@pytest.mark.parametrize(
    ("kind", "wrong", "said"), MISTAKES, ids=[f"{kind}-{index}" for index, (kind, *_) in enumerate(MISTAKES)]
)
def test_a_mistake_is_named(kind: str, wrong: dict[str, Any], said: str) -> None:
    model = build(kind)
    with pytest.raises((ValueError, TypeError), match=f"(?s){said}"):
        model(**{**inputs_of(kind), **wrong})


@pytest.mark.parametrize(
    "option", ["thinking_tolerance", "thinking_target_energy", "thinking_accept_only_lower_energy"]
)
def test_rules_that_judge_are_for_evaluation(option: str) -> None:
    model = build("images").train()
    with pytest.raises(ValueError, match=rf"{option} is for evaluation"):
        model(**inputs_of("images"), **{option: True if "accept" in option else 0.5})


STACK_MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"inputs_embeds": torch.zeros(4, 16)}, r"\(samples, tokens, width\), got shape \(4, 16\)"),
    ({"inputs_embeds": torch.zeros(2, 0, 16)}, "non-empty"),
    ({"inputs_embeds": torch.zeros(2, 4, 15)}, "width 16, got 15"),
    ({"attention_mask": torch.ones(2, 5)}, r"\(2, 4\), \(2, 4, 4\), \(2, 2, 4, 4\), got \(2, 5\)"),
    ({"attention_weights": torch.ones(2, 3, 4, 4)}, r"broadcast to \(2, 2, 4, 4\), got \(2, 3, 4, 4\)"),
    ({"attention_weights": torch.ones(1, 2, 2, 4, 4)}, "broadcast"),
    ({"edge_weights": torch.ones(3, 2)}, "`edge_weights` needs `edge_index`"),
    ({"num_graphs": 2}, "`num_graphs` needs `edge_index`"),
    ({"edge_index": EDGES[:, :2]}, r"\(tokens, width\), with `edge_index`"),
    (
        {"inputs_embeds": torch.zeros(4, 16), "edge_index": EDGES[:, :2], "attention_mask": torch.ones(4, 4)},
        "needs no",
    ),
    ({"inputs_embeds": torch.zeros(4, 16), "edge_index": EDGES[:, :2], "edge_type": EDGES[0, :2]}, "was given"),
    (
        {"inputs_embeds": torch.zeros(4, 16), "edge_index": EDGES[:, :2], "edge_weights": torch.ones(2, 3)},
        r"\(2, 2\): edges, heads; got \(2, 3\)",
    ),
    (
        {
            "inputs_embeds": torch.zeros(2, 16),
            "edge_index": EDGES[:, :2],
            "graph_index": EDGES[0, :2],
            "num_graphs": 1,
        },
        "from 0 to 0, got 0 to 1",
    ),
    ({"input_ids": torch.ones(2, 4)}, "Unknown argument.*input_ids"),
]


@pytest.mark.parametrize(("wrong", "said"), STACK_MISTAKES, ids=range(len(STACK_MISTAKES)))
def test_a_mistake_of_the_stack_is_named(wrong: dict[str, Any], said: str) -> None:
    model = EnergyTransformerModel(EnergyTransformerConfig(**SMALL)).eval()
    with pytest.raises((ValueError, TypeError), match=f"(?s){said}"):
        model(**{"inputs_embeds": torch.randn(2, 4, 16), **wrong})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [1, 3])
def test_broken_weights_are_said_to_be_broken(kind: str, steps: int) -> None:
    model = build(kind)
    with torch.no_grad():
        model.model.stack[0].memory.patterns[0, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite.*weights are broken"):
        model(**inputs_of(kind, labels=False), thinking_steps=steps)


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        ("nodes", {"num_node_features": None}, "needs `num_node_features`"),
        ("graphs", {"num_relations": 2}, "num_relations=2.*for nodes"),
        ("graphs", {"position_embedding": "learned", "num_positions": 4}, "for the nodes of one graph"),
        ("nodes", {"edge_modulation": "none"}, "num_edge_features=2.*means nothing"),
        ("nodes", {"position_embedding": "none"}, "num_positions=3.*means nothing"),
        ("nodes", {"position_embedding": "sine"}, "none, laplacian, learned, got 'sine'"),
        ("images", {"hopfield": "gelu"}, "relu, power, softmax, got 'gelu'"),
        ("images", {"hopfield_power": 1.5}, "at least 2, got 1.5"),
        ("images", {"completion_loss": "mae"}, "mse, rmse, diluted_rmse, got 'mae'"),
        ("images", {"image_size": 10}, r"`image_size` \(10\).*`patch_size` \(4\)"),
        ("images", {"step_size": 0.0}, "`step_size`.*above 0, got 0"),
        ("images", {"mask_ratio": 1.5}, "`mask_ratio`.*got 1.5"),
    ],
)
def test_a_mistake_in_the_config_is_named(kind: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises((ValueError, StrictDataclassError), match=f"(?s){said}"):
        build(kind, **options)


def test_class_weights_have_to_fit_the_labels() -> None:
    with pytest.raises(ValueError, match="`class_weights` must hold 3 numbers.*got 2"):
        build("nodes", class_weights=[1.0, 2.0])(**inputs_of("nodes"))
