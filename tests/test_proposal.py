"""Laws of models that start at a proposal: without thinking they are their twin, and thinking goes on from there."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import LlamaForCausalLM

from ebt_transformers import (
    EBTConfig,
    EBTForCausalLM,
    EBTImageTrainingArguments,
    EBTTrainer,
    EBTTrainingArguments,
    transformer_pp_config,
)


MakeModel = Callable[..., EBTForCausalLM]

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
PLAIN = {"step_conditioning": "none", "num_landscapes": 1, "thinking_steps": 2, "update": "residual"}


def tokens(*shape: int) -> Tensor:
    """Random token ids, always the same."""
    return torch.randint(41, shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model(make_model: MakeModel) -> EBTForCausalLM:
    """A model that starts at a proposal, without step conditioning."""
    return make_model(candidate_init="proposal", **PLAIN)


def twin_of(model: EBTForCausalLM) -> LlamaForCausalLM:
    """The ordinary language model with the same weights."""
    twin = LlamaForCausalLM(transformer_pp_config(model.config)).eval()
    weights = {name: value for name, value in model.state_dict().items() if name in twin.state_dict()}
    weights["lm_head.weight"] = model.candidate_embedding.weight
    assert set(weights) == set(twin.state_dict())
    twin.load_state_dict(weights)
    return twin


def test_without_thinking_the_model_is_its_twin(model: EBTForCausalLM) -> None:
    twin, ids = twin_of(model), tokens(3, 7)
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[0, :3] = 0
    with torch.no_grad():
        mine = model(ids, attention_mask=mask, labels=ids, thinking_steps=0)
        theirs = twin(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0), labels=ids)
    assert_close(mine.logits[mask.bool()], theirs.logits[mask.bool()], **CLOSE)
    assert mine.step_losses is None and not mine.steps_taken.any()
    assert_close(mine.loss, mine.proposal_loss)
    prompt = tokens(2, 5)
    options = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(prompt, thinking_steps=0, **options), twin.generate(prompt, **options))


def test_the_model_has_the_parameters_of_its_twin_and_an_energy_head_more(model: EBTForCausalLM) -> None:
    more = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in twin_of(model).parameters())
    assert more == model.config.hidden_size + 1  # the energy head, and the step size


def test_a_new_model_leaves_the_proposal_alone_and_learns_not_to() -> None:
    torch.manual_seed(0)
    config = EBTConfig.from_preset("4xs", vocab_size=41, candidate_init="proposal", update="residual", step_size=1.0)
    model, ids = EBTForCausalLM(config).train(), tokens(2, 6)
    output = model(ids, labels=ids)
    assert_close(output.step_losses, output.proposal_loss.expand(2))
    output.loss.backward()
    assert model.model.energy_head.weight.grad.any()


def test_training_without_steps_is_training_the_twin(model: EBTForCausalLM) -> None:
    twin, ids = twin_of(model), tokens(2, 6)
    output = model.train()(ids, labels=ids, thinking_steps=0)
    output.loss.backward()
    twin(ids, labels=ids).loss.backward()
    assert output.mean_energies is None
    assert_close(model.candidate_embedding.weight.grad, twin.lm_head.weight.grad, **CLOSE)
    for layer, other in zip(model.model.layers, twin.model.layers, strict=True):
        assert_close(layer.mlp.up_proj.weight.grad, other.mlp.up_proj.weight.grad, **CLOSE)


def test_the_objective_is_that_of_the_steps_and_the_weighted_proposal(make_model: MakeModel) -> None:
    ids = tokens(2, 6)
    for weight in (0.0, 0.25, 1.0):
        output = make_model(candidate_init="proposal", proposal_loss_weight=weight).train()(ids, labels=ids)
        assert_close(output.loss.detach(), output.step_losses.mean() + weight * output.proposal_loss)


def test_the_start_does_not_depend_on_how_many_steps_follow(make_model: MakeModel) -> None:
    model, ids = make_model(candidate_init="proposal", num_landscapes=3), tokens(2, 5)
    with torch.no_grad():
        start = model(ids, thinking_steps=0).logits
        for steps in (1, 2, 4):
            trajectory = model(ids, thinking_steps=steps, output_trajectory=True).trajectory
            assert_close(trajectory[:, :, 0], start, **CLOSE)


def test_without_steps_the_reported_energy_is_that_of_the_proposal(model: EBTForCausalLM) -> None:
    ids = tokens(2, 5)
    with torch.no_grad():
        output = model(ids, thinking_steps=0, output_energies=True)
        assert_close(output.energies[..., 0], model.energy(ids, candidate_probs=output.logits.softmax(-1)), **CLOSE)


def test_self_verification_without_steps_keeps_the_start_of_lowest_energy(model: EBTForCausalLM) -> None:
    ids = tokens(2, 5)
    with torch.no_grad():
        alone = model(ids, thinking_steps=0, output_energies=True)
        several = model(ids, thinking_steps=0, thinking_candidates=5, output_energies=True)
    assert (several.energies <= alone.energies + 1e-6).all()
    assert (several.energies < alone.energies - 1e-6).any()


def test_noise_in_training_is_around_the_proposal(make_model: MakeModel) -> None:
    model, ids = make_model(candidate_init="proposal", thinking_noise_std=2.0, **PLAIN).train(), tokens(2, 5)
    first, second = (model(ids, labels=ids) for _ in range(2))
    assert torch.equal(first.proposal_loss, second.proposal_loss)
    assert not torch.equal(first.step_losses, second.step_losses)


def test_a_run_logs_the_proposal_and_comes_back(tmp_path: Path, make_model: MakeModel) -> None:
    rows = [{"input_ids": row, "labels": row} for row in tokens(8, 6).tolist()]
    arguments = EBTTrainingArguments(
        str(tmp_path), max_steps=2, logging_steps=1, per_device_train_batch_size=4, report_to="none", use_cpu=True
    )
    trainer = EBTTrainer(make_model(candidate_init="proposal", **PLAIN), arguments, train_dataset=rows)
    trainer.train()
    assert trainer.state.log_history[0]["proposal_loss"] > 0
    trainer.save_model()
    loaded = EBTForCausalLM.from_pretrained(tmp_path).eval()
    ids = tokens(1, 4)
    with torch.no_grad():
        assert torch.equal(loaded(ids, thinking_steps=0).logits, trainer.model.eval()(ids, thinking_steps=0).logits)


def test_a_replay_buffer_is_refused(tmp_path: Path, make_model: MakeModel) -> None:
    arguments = EBTTrainingArguments(str(tmp_path), replay_buffer_size=8, report_to="none", use_cpu=True)
    with pytest.raises(ValueError, match="replay_buffer_size=8.*candidate_init='proposal'"):
        EBTTrainer(make_model(candidate_init="proposal"), arguments, train_dataset=[])


def test_the_recipe_is_for_models_that_start_at_a_proposal(tmp_path: Path, make_model: MakeModel) -> None:
    arguments = EBTTrainingArguments(str(tmp_path), recipe="proposal", report_to="none", use_cpu=True)
    with pytest.raises(ValueError, match="proposal needs a model.*candidate_init='normal'"):
        EBTTrainer(make_model(), arguments, train_dataset=[])
    with pytest.raises(ValueError, match="recipe.*s1, s2, got 'proposal'"):
        EBTImageTrainingArguments(str(tmp_path), recipe="proposal")


def test_only_models_that_start_at_a_proposal_can_skip_thinking(model: EBTForCausalLM, make_model: MakeModel) -> None:
    assert EBTConfig(candidate_init="proposal", thinking_steps=0).thinking_steps == 0
    with pytest.raises(ValueError, match="thinking_steps.*at least 1.*got 0.*candidate_init='proposal'"):
        make_model()(tokens(1, 4), thinking_steps=0)
    with pytest.raises(ValueError, match="thinking_prune_keep.*at most.*2.*got 3"):
        model(tokens(1, 4), thinking_steps=0, thinking_candidates=2, thinking_prune_keep=3)
    with pytest.raises(ValueError, match=r"thinking_landscapes.*\[\]"):
        model(tokens(1, 4), thinking_landscapes=[])
