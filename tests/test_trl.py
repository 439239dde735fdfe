"""
Laws of supervised fine-tuning with TRL: its unmodified SFTTrainer trains the objective of an energy-based model.

TRL replaces a model's forward by one that multiplies hidden states by the output layer. On an energy-based model that
would train an ordinary language model in silence, with a falling loss; each of these laws fails then.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from ebt_transformers import EBTForCausalLM, EBTTrainer, EBTTrainingArguments
from ebt_transformers.assets import checkpoint_path
from ebt_transformers.modeling_ebt.token_scores import score_tokens


trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

TEXTS = [
    "ROMEO:\nWhat light through yonder window breaks?",
    "JULIET:\nAy me!",
    "NURSE:\nMadam!",
    "ROMEO:\nShe speaks.",
]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
# marks what the assistant says, end token included, so that the loss can be restricted to it
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}ASSISTANT:\n"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['role'] | upper }}:\n{{ message['content'] }}\n\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:\n{% endif %}"
)
DATA = {
    "text": [{"text": text} for text in TEXTS],
    "prompt and completion": [
        {"prompt": text.split("\n")[0] + "\n", "completion": text.split("\n")[1]} for text in TEXTS
    ],
    "chat": [
        {"messages": [{"role": "user", "content": "Speak."}, {"role": "assistant", "content": text}]} for text in TEXTS
    ],
}


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint_path())
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def shipped() -> EBTForCausalLM:
    return AutoModelForCausalLM.from_pretrained(checkpoint_path())


def sft(folder: Any, model: Any, tokenizer: Any, kind: str = "text", peft_config: Any = None, **options: Any) -> Any:
    """TRL's own trainer, without a word about energies."""
    defaults = {"use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    defaults |= {"per_device_train_batch_size": 4, "logging_steps": 1, "max_steps": 4, "learning_rate": 1e-3}
    data = datasets.Dataset.from_list(DATA[kind])
    return trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(str(folder), **{**defaults, "gradient_checkpointing": False, **options}),
        train_dataset=data,
        eval_dataset=data,
        processing_class=tokenizer,
        peft_config=peft_config,
    )


def batch_of(trainer: Any) -> dict[str, Any]:
    return trainer.data_collator(list(trainer.train_dataset))


def loss_and_gradients(trainer: Any, model: EBTForCausalLM, batch: dict[str, Any], items: Any) -> tuple[Any, Any]:
    model.train().zero_grad()
    torch.manual_seed(3)  # the random starts of the candidates
    loss = trainer.compute_loss(model, dict(batch), num_items_in_batch=items)
    loss.backward()
    gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    return loss.detach(), {name: gradient.clone() for name, gradient in gradients.items()}


# ---- what is trained -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("items", [None, 11])
@pytest.mark.parametrize("kind", list(DATA))
def test_loss_and_gradients_are_those_of_the_ebt_trainer(tmp_path, tokenizer, kind, items):
    model = shipped()
    ours = EBTTrainer(model, EBTTrainingArguments(str(tmp_path), use_cpu=True, report_to="none"))
    theirs = sft(tmp_path, model, tokenizer, kind)
    items = None if items is None else torch.tensor(items)
    batch = batch_of(theirs)
    loss, gradients = loss_and_gradients(theirs, model, batch, items)
    expected, expected_gradients = loss_and_gradients(ours, model, batch, items)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    assert gradients.keys() == expected_gradients.keys() and "step_size.value" in gradients
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-3, atol=1e-6, msg=name)


def test_a_model_can_be_given_by_its_folder(tmp_path, tokenizer):
    trainer = sft(tmp_path, str(checkpoint_path()), tokenizer)
    assert isinstance(trainer.model, EBTForCausalLM)
    assert torch.equal(trainer.model.candidate_embedding.weight, shipped().candidate_embedding.weight)


@pytest.mark.parametrize("scored", ["all", "last"])
def test_log_probabilities_add_up_to_the_objective_of_the_recipe(make_model: Callable, scored: str) -> None:
    model = make_model(loss_on_steps=scored, detach_between_steps=scored == "all").train()
    ids = torch.randint(0, 41, (2, 9))
    labels = ids.masked_fill(torch.rand(2, 9) < 0.3, -100)
    torch.manual_seed(3)
    expected = model(ids, labels=labels)
    torch.manual_seed(3)
    scores = score_tokens(model, [], labels=labels, input_ids=ids)
    torch.testing.assert_close(scores.loss, expected.loss)
    torch.testing.assert_close(-scores.log_probs.sum(), expected.loss * (labels[:, 1:] != -100).sum())
    assert (scores.log_probs[labels[:, 1:] == -100] == 0).all()


def test_evaluation_and_metrics_are_those_of_the_final_prediction(tmp_path, tokenizer):
    model = shipped()
    trainer = sft(tmp_path, model, tokenizer, "prompt and completion", per_device_eval_batch_size=4)
    metrics = trainer.evaluate()
    batch = batch_of(trainer)
    with torch.no_grad():
        logits = shipped()(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    logits, labels = logits[labels != -100], labels[labels != -100]
    entropy = torch.distributions.Categorical(logits=logits).entropy().mean().item()
    assert metrics["eval_loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-4)
    assert metrics["eval_entropy"] == pytest.approx(entropy, rel=1e-4)
    assert metrics["eval_mean_token_accuracy"] == pytest.approx((logits.argmax(-1) == labels).float().mean().item())


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}, {"packing": True, "max_length": 64}])
def test_fine_tuning_lowers_the_loss_and_the_model_still_thinks(tmp_path, tokenizer, options):
    trainer = sft(tmp_path, shipped(), tokenizer, num_train_epochs=4, max_steps=-1, **options)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before - 0.5
    prompt = tokenizer("ROMEO:\n", return_tensors="pt")
    model = trainer.model.eval()
    told = [model.generate(**prompt, max_new_tokens=3, do_sample=False, thinking_steps=steps) for steps in (1, 4)]
    assert told[0].shape == told[1].shape == (1, 6)
    trainer.save_model(str(tmp_path / "saved"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(again.generate(**prompt, max_new_tokens=3, do_sample=False, thinking_steps=4), told[1])


def test_activation_checkpointing_changes_nothing(tmp_path, tokenizer):
    found = []
    for checkpointing in (False, True):
        model = shipped()
        sft(tmp_path, model, tokenizer, gradient_checkpointing=checkpointing, optim="sgd", max_steps=2).train()
        found.append({name: value.detach() for name, value in model.named_parameters()})
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-4, atol=1e-5, msg=name)


# ---- adapters --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora_trains_the_adapter_alone(tmp_path, tokenizer, checkpointing):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=ATTENTION, r=4)
    trainer = sft(
        tmp_path, shipped(), tokenizer, peft_config=config, learning_rate=2e-2, gradient_checkpointing=checkpointing
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before - 0.2
    trainer.save_model(str(tmp_path / "adapter"))
    original, base = shipped(), trainer.model.get_base_model()
    for name, value in original.named_parameters():
        layer, _, kind = name.rpartition(".")
        name = name if layer.rpartition(".")[2] not in ATTENTION else f"{layer}.base_layer.{kind}"
        assert torch.equal(value, base.get_parameter(name)), name
    ids = tokenizer("ROMEO:\n", return_tensors="pt").input_ids
    with torch.no_grad():
        expected = trainer.model.eval()(input_ids=ids, thinking_steps=3).logits
        again = peft.PeftModel.from_pretrained(original, tmp_path / "adapter").eval()
        torch.testing.assert_close(again(input_ids=ids, thinking_steps=3).logits, expected)
        assert not torch.allclose(shipped()(ids, thinking_steps=3).logits, expected)


# ---- data ------------------------------------------------------------------------------------------------------


def test_packing_does_not_change_the_loss(tmp_path, tokenizer):
    losses = []
    for packing in (False, True):
        trainer = sft(tmp_path, shipped(), tokenizer, packing=packing, max_length=64, per_device_eval_batch_size=4)
        losses.append(trainer.evaluate()["eval_loss"])
    assert "position_ids" in batch_of(trainer)
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_assistant_only_loss_scores_what_the_assistant_says(tmp_path, tokenizer):
    trainer = sft(tmp_path, shipped(), tokenizer, "chat", assistant_only_loss=True)
    row = trainer.train_dataset[0]
    scored = [token for token in row["labels"] if token != -100]
    assert tokenizer.decode(scored) == TEXTS[0] + tokenizer.eos_token
    assert tokenizer.decode(row["input_ids"]).startswith("USER:\nSpeak.")


# ---- the seam --------------------------------------------------------------------------------------------------


def test_without_being_asked_for_log_probabilities_the_model_is_as_before(tmp_path, tokenizer):
    model, ids = shipped(), torch.tensor([[5, 6, 7, 8]])
    expected = model(ids, labels=ids, output_energies=True)
    sft(tmp_path, model, tokenizer)
    for again in (model, copy.deepcopy(model)):
        output = again.eval()(ids, labels=ids, output_energies=True)
        for name in ("loss", "logits", "energies"):
            torch.testing.assert_close(output[name], expected[name])


def test_every_question_is_answered_as_trl_answers_it_for_a_language_model(make_model: Callable) -> None:
    model = make_model()
    ids = torch.randint(0, 41, (2, 7))
    labels = ids.masked_fill(torch.rand(2, 7) < 0.3, -100)
    with torch.no_grad():
        logits = model(ids).logits[:, :-1]
    # a language model whose hidden states are those logits, and whose output layer does nothing
    from trl.trainer.utils import _ChunkedLogProbFunction

    names = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
    flat = logits.reshape(-1, 41), torch.eye(41), None, labels[:, 1:].clamp(min=0).reshape(-1)
    expected = _ChunkedLogProbFunction.apply(*flat, 1.0, 41, None, 1.0, names)
    scores = score_tokens(model, list(names[1:]), labels=labels, input_ids=ids)
    mask = labels[:, 1:] != -100
    for name, answer in zip(names, expected, strict=True):
        answer = answer.view(mask.shape).masked_fill(~mask, 0)
        torch.testing.assert_close(scores[name].to(answer.dtype), answer, rtol=1e-4, atol=1e-5, msg=name)


def test_a_forward_replaced_by_anybody_else_is_left_alone(make_model: Callable) -> None:
    model = make_model()
    model.forward = replacement = lambda input_ids: "mine"  # noqa: E731
    assert model.forward is replacement and model(torch.zeros(1, 1)) == "mine"


def test_what_cannot_be_had_is_said(make_model: Callable) -> None:
    from trl.trainer.utils import add_fused_lm_head

    model, ids = make_model(), torch.tensor([[1, 2, 3]])
    with pytest.raises(ValueError, match="temperature 0.5"):
        add_fused_lm_head(model, temperature=0.5)
    with pytest.raises(ValueError, match="needs `labels`"):
        score_tokens(model, [], input_ids=ids)
    with pytest.raises(ValueError, match="must be 'mean' or 'none', got 'sum'"):
        model(ids, labels=ids, loss_reduction="sum")
    with pytest.raises(ValueError, match="divides a sum"):
        model(ids, labels=ids, loss_reduction="none", num_items_in_batch=3)
