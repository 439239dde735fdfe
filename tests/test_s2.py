"""Laws of recipe s2: the replay buffer, the random draws of training, and that neither is felt anywhere else."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM, TrainerCallback

from ebt_transformers import (
    EBTConfig,
    EBTForCausalLM,
    EBTForImageDenoising,
    EBTImageConfig,
    EBTImageTrainingArguments,
    EBTTrainer,
    EBTTrainingArguments,
    transformer_pp_config,
)
from ebt_transformers.modeling_ebt import conversion_ebt as conversion
from ebt_transformers.modeling_ebt import modeling_ebt
from ebt_transformers.training import replay_trainer, run_clm
from ebt_transformers.training.data import CausalLMCollator
from ebt_transformers.training.replay_buffer import REPLAYED, ReplayBuffer


sys.path.append(str(Path(__file__).parent))  # the helper beside this file, under every import mode of pytest
import parity_cases as parity  # noqa: E402
from interruption import StopAt  # noqa: E402


VOCAB, LENGTH = 23, 6
TINY = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
    "initializer_range": 0.1,
}
# no random numbers in training but those of the buffer
NO_DRAWS = {"candidate_init": "zeros", "thinking_noise_std": 0.0, "random_step_size": 1.0, "random_steps": None}


def tiny(**overrides: Any) -> EBTForCausalLM:
    torch.manual_seed(1)
    return EBTForCausalLM(EBTConfig.from_preset("4xs", "s2", **{**TINY, **overrides}))


def rows(count: int, length: int = LENGTH) -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(0, VOCAB, (count, length), generator=torch.Generator().manual_seed(2))
    return [{"input_ids": row, "labels": row} for row in ids]


def arguments(folder: Path, **values: Any) -> EBTTrainingArguments:
    defaults = {
        "recipe": "s2",
        "replay_buffer_size": 8,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
        "save_strategy": "no",
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "learning_rate": 1e-2,
    }
    return EBTTrainingArguments(output_dir=str(folder), **{**defaults, **values})


class Watch(TrainerCallback):
    """Notes the buffer at the end of every update, and what every batch replayed."""

    def __init__(self) -> None:
        self.trainer: EBTTrainer | None = None
        self.stored: list[list[list[int]]] = []
        self.buffer: ReplayBuffer | None = None

    def on_step_end(self, args, state, control, **kwargs):
        self.buffer = self.trainer.replay_buffer
        if self.buffer is None:
            return
        self.stored.append([row["input_ids"].tolist() for row in self.buffer.rows])


def trained(folder: Path, model: EBTForCausalLM | None = None, data: Any = None, **values: Any):
    """A trainer after training, and what its buffer held."""
    watch, callbacks = Watch(), values.pop("callbacks", [])
    resume = values.pop("resume", None)
    trainer = EBTTrainer(
        tiny() if model is None else model,
        arguments(folder, **values),
        train_dataset=rows(16) if data is None else data,
        eval_dataset=rows(4),
        callbacks=[watch, *callbacks],
    )
    watch.trainer = trainer
    trainer.train(resume_from_checkpoint=resume)
    return trainer, watch


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def difference(first: torch.nn.Module, second: torch.nn.Module) -> float:
    other = weights(second)
    return max((value - other[name]).abs().max().item() for name, value in weights(first).items())


def losses(trainer: EBTTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


# ---- the recipe ------------------------------------------------------------------------------------------------


def test_the_recipe_has_the_values_of_the_paper(tmp_path):
    config = EBTConfig.from_preset("xxs", "s2")
    assert (config.step_size, config.learn_step_size, config.random_step_size) == (5.0, False, 2.0)
    assert (config.random_steps, config.thinking_steps, config.num_landscapes) == ([2, 3], 3, 1)
    assert (config.thinking_noise_std, config.loss_on_steps, config.detach_between_steps) == (3.0, "last", False)
    args = arguments(tmp_path, replay_buffer_size=None)
    assert (args.replay_buffer_size, args.replay_buffer_share) == (192, 0.5)
    assert arguments(tmp_path, recipe="s1", replay_buffer_size=None).replay_buffer_size == 0
    images = EBTImageTrainingArguments(str(tmp_path), use_cpu=True, recipe="s2")
    assert images.replay_buffer_size == 0  # nor has the official code for images


def test_the_recipe_converts_to_the_official_flags_and_back():
    flags = conversion.config_to_official(EBTConfig.from_preset("4xs", "s2", vocab_size=VOCAB))
    wanted = {
        "mcmc_step_size": 5.0,
        "mcmc_step_size_learnable": False,
        "randomize_mcmc_step_size_scale": 2.0,
        "randomize_mcmc_num_steps": 2,
        "randomize_mcmc_num_steps_min": 2,
        "langevin_dynamics_noise": 3.0,
        "no_mcmc_detach": True,
        "truncate_mcmc": True,
    }
    assert {flag: flags[flag] for flag in wanted} == wanted


def test_overriding_one_config_leaves_the_recipe_alone():
    EBTConfig.from_preset("4xs", "s2").random_steps.append(9)
    assert EBTConfig.from_preset("4xs", "s2").random_steps == [2, 3]


def test_a_run_is_seeded_and_learns(tmp_path):
    data = rows(4) * 4
    first, _ = trained(tmp_path, data=data, max_steps=20)
    second, _ = trained(tmp_path, data=data, max_steps=20)
    assert difference(first.model, second.model) == 0
    assert losses(first) == losses(second)
    other, _ = trained(tmp_path, data=data, max_steps=20, seed=34)
    assert difference(first.model, other.model) > 0
    assert sum(losses(first)[-5:]) < sum(losses(first)[:5]) - 2


def test_the_number_of_steps_is_drawn_for_every_batch(tmp_path):
    taken = []
    model = tiny()
    model.register_forward_hook(lambda module, inputs, output: taken.append(int(output.steps_taken.max())))
    trained(tmp_path, model, max_steps=8)
    assert set(taken) == {2, 3} and len(taken) == 8


def test_every_trainable_parameter_gets_a_gradient(tmp_path):
    model = tiny()
    seen: dict[str, float] = {}

    class Gradients(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            seen.update({n: 0.0 if p.grad is None else p.grad.abs().max().item() for n, p in model.named_parameters()})

    trained(tmp_path, model, max_steps=2, callbacks=[Gradients()])
    assert [name for name, gradient in seen.items() if not gradient > 0] == ["step_size.value"]
    assert not model.step_size.value.requires_grad and model.step_size.value.item() == 5


def test_checkpointed_activations_change_nothing(tmp_path):
    names = EBTTrainingArguments.__dataclass_fields__
    option = "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
    plain, checkpointed = (trained(tmp_path, **{option: value})[0] for value in (False, True))
    assert difference(plain.model, checkpointed.model) < 1e-6


# ---- the buffer ------------------------------------------------------------------------------------------------


def test_the_buffer_holds_the_newest_rows_and_what_their_descent_ended_at(tmp_path):
    model, data = tiny(**NO_DRAWS), rows(16)
    trainer = EBTTrainer(model, arguments(tmp_path), train_dataset=data)
    trainer.replay_buffer = ReplayBuffer(3, 0.5, 0, "cpu")
    batch = trainer.data_collator(data[:4])
    trainer.compute_loss(model.train(), batch)
    expected = model(**batch).logits
    assert [row["input_ids"].tolist() for row in trainer.replay_buffer.rows] == batch["input_ids"][1:].tolist()
    for row, state in zip(trainer.replay_buffer.rows, expected[1:], strict=True):
        assert torch.equal(row["state"], state) and not row["state"].requires_grad
        assert row["state"].untyped_storage().nbytes() == LENGTH * VOCAB * 4  # a copy, not a view of the batch


def test_replayed_rows_start_where_they_ended_and_come_back_no_second_time(tmp_path):
    data = rows(16)
    model = tiny(**NO_DRAWS)
    trainer = EBTTrainer(model, arguments(tmp_path), train_dataset=data)
    buffer = trainer.replay_buffer = ReplayBuffer(8, 0.5, 0, "cpu")
    first, second = trainer.data_collator(data[:4]), trainer.data_collator(data[4:8])
    trainer.compute_loss(model.train(), first)
    stored = {tuple(row["input_ids"].tolist()): row["state"] for row in buffer.rows}
    [batch] = buffer.extend([second])
    replayed = batch["input_ids"][4:]
    loss, outputs = trainer.compute_loss(model, batch, return_outputs=True)
    starts = torch.stack([torch.zeros(LENGTH, VOCAB)] * 4 + [stored[tuple(ids.tolist())] for ids in replayed])
    ids = torch.cat([second["input_ids"], replayed])
    expected = model(ids, labels=ids, initial_candidate=starts)
    assert torch.equal(outputs.logits, expected.logits) and torch.equal(loss, expected.loss)
    held = [row["input_ids"].tolist() for row in buffer.rows]
    assert held == torch.cat([first["input_ids"], second["input_ids"]]).tolist()


@pytest.mark.parametrize("case", parity.cases("opt_s2_replay_buffer"), ids=str)
def test_two_batches_with_the_buffer_agree_with_the_official_ones(case, tmp_path, monkeypatch):
    model = case.model().train()
    trainer = EBTTrainer(model, arguments(tmp_path, replay_buffer_size=case.hparams["mcmc_replay_buffer_size"]))
    buffer = trainer.replay_buffer = trainer._new_replay_buffer()
    first, second = case.io["initial_candidate_call1"], case.io["initial_candidate_call2"]
    monkeypatch.setattr(modeling_ebt, "training_start", lambda *_: first[:, None])
    monkeypatch.setattr(replay_trainer, "training_start", lambda *_: second.clone())
    indices = case.info["call2_sampled_buffer_indices"]
    monkeypatch.setattr(torch, "randperm", lambda *_, **__: torch.tensor(indices if buffer.rows else []))

    def compute(name: str) -> tuple[dict[str, Any], Any]:
        targets = parity.as_labels(case.io[name][:, 1:])
        [batch] = buffer.extend([{"input_ids": case.io[name][:, :-1], "labels": targets, "shift_labels": targets}])
        return batch, trainer.compute_loss(model, batch, return_outputs=True)[1]

    batch, output = compute("input_ids_call1")
    assert REPLAYED not in batch
    assert output.loss.item() == pytest.approx(case.info["call1_log_dict"]["loss"], rel=parity.LOSS_RTOL)
    held = torch.stack([row["state"] for row in buffer.rows])
    case.close("logits", held, case.io["buffer_after_call1.predicted_logits"], parity.LOSS_RTOL)
    batch, output = compute("input_ids_call2")
    assert torch.equal(batch["input_ids"], case.io["call2.forward_input_ids"])
    case.close("call2.logits.1", output.logits.detach(), case.io["call2.logits.1"], 2 * parity.LOSS_RTOL)
    recorded = case.info["grad_variants"]["default"]
    assert output.loss.item() == pytest.approx(recorded["log_dict"]["loss"], rel=parity.LOSS_RTOL)
    output.loss.backward()
    parity.check_gradients(case, model, "default")
    assert len(buffer) == case.info["buffer_len_after_call2"]


def test_no_row_is_drawn_twice_and_never_more_than_the_share():
    buffer = ReplayBuffer(100, 0.5, 0, "cpu")
    ids = torch.arange(40)[:, None]
    buffer.add({"input_ids": ids}, torch.zeros(40, 1, 3))
    batches = [{"input_ids": ids[:count]} for count in (1, 1, 8, 3)]
    extended = buffer.extend(batches)
    assert [len(batch.get(REPLAYED, [])) for batch in extended] == [0, 1, 4, 1]
    drawn = torch.cat([new["input_ids"][len(old["input_ids"]) :] for new, old in zip(extended, batches, strict=True)])
    assert len(drawn.unique()) == 6


def test_every_stored_row_is_drawn_equally_often():
    buffer = ReplayBuffer(6, 1.0, 0, "cpu")
    buffer.add({"input_ids": torch.arange(6)[:, None]}, torch.zeros(6, 1, 3))
    drawn = torch.tensor([row["input_ids"].item() for _ in range(3000) for row in buffer.draw(2)])
    assert drawn.bincount().float().sub(1000).abs().max() < 120


def test_the_buffer_touches_no_other_random_numbers():
    before = torch.get_rng_state()
    buffer = ReplayBuffer(6, 1.0, 0, "cpu")
    buffer.add({"input_ids": torch.arange(6)[:, None]}, torch.zeros(6, 1, 3))
    buffer.extend([{"input_ids": torch.arange(3)[:, None]}])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("batch", "accumulation"), [(4, 2), (1, 8)])
def test_an_accumulated_batch_is_one_batch_when_only_the_buffer_draws(tmp_path, batch, accumulation):
    # noise, starts, step sizes and numbers of steps are drawn for every forward: with them the two must differ
    options = {"optim": "sgd", "max_steps": 6, "replay_buffer_size": 12}
    whole, held = trained(tmp_path, tiny(**NO_DRAWS), rows(24), per_device_train_batch_size=8, **options)
    sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    parts, same = trained(tmp_path, tiny(**NO_DRAWS), rows(24), **sizes, **options)
    assert held.stored == same.stored
    assert difference(whole.model, parts.model) < 1e-5
    assert losses(whole) == pytest.approx(losses(parts), rel=1e-4)
    unreplayed, _ = trained(tmp_path, tiny(**NO_DRAWS), rows(24), **{**options, "replay_buffer_size": 0}, **sizes)
    assert difference(whole.model, unreplayed.model) > 1e-4


def test_rows_of_different_length_are_replayed_as_they_are_alone(tmp_path):
    collate = CausalLMCollator(pad_token_id=0)
    generator = torch.Generator().manual_seed(4)
    texts = [{"input_ids": torch.randint(1, VOCAB, (n,), generator=generator)} for n in (3, 8, 5, 4, 6, 7)]
    model = tiny(**NO_DRAWS).train()
    trainer = EBTTrainer(model, arguments(tmp_path))
    buffer = trainer.replay_buffer = ReplayBuffer(8, 1.0, 0, "cpu")
    for part in (texts[:2], texts[2:4], texts[4:]):  # replayed rows are now longer, now shorter than the new ones
        before = {len(row["input_ids"]): row["state"] for row in buffer.rows}
        [batch] = buffer.extend([collate(part)])
        _, outputs = trainer.compute_loss(model, batch, return_outputs=True)
        lengths = batch["attention_mask"].sum(1).tolist()
        for index, length in enumerate(lengths):
            start = before[length] if index >= len(part) else torch.zeros(length, VOCAB)
            alone = model(batch["input_ids"][index : index + 1, :length], initial_candidate=start[None])
            torch.testing.assert_close(outputs.logits[index, :length], alone.logits[0], rtol=1e-3, atol=1e-4)
            assert (batch["labels"][index, length:] == -100).all()
    assert [len(row["state"]) for row in buffer.rows] == [3, 8, 5, 4, 6, 7]


# ---- memory and device -----------------------------------------------------------------------------------------


def test_the_size_is_known_in_advance_and_never_exceeded(tmp_path):
    _, watch = trained(tmp_path, max_steps=10, replay_buffer_size=9)
    batch = CausalLMCollator(0)(rows(4))
    expected = 9 * LENGTH * (4 * VOCAB + 2 * 8)  # logits, ids and labels
    assert watch.buffer.nbytes == watch.buffer.nbytes_when_full(batch, VOCAB) == expected
    assert max(map(len, watch.stored)) == 9


def test_the_published_buffer_is_as_large_as_documented():
    batch = {name: torch.zeros(1, 256, dtype=torch.long) for name in ("input_ids", "labels")}
    needed = ReplayBuffer(192, 0.5, 0, "cpu").nbytes_when_full(batch, 50277)
    assert needed / 1024**3 == pytest.approx(9.2, abs=0.05)


def test_a_buffer_that_would_be_too_large_is_refused_before_anything_is_trained(tmp_path):
    model = tiny()
    before = weights(model)
    room = 4.5 * LENGTH * (4 * VOCAB + 2 * 8) / 1024**3
    trainer = EBTTrainer(model, arguments(tmp_path, replay_buffer_memory=room), train_dataset=rows(8))
    with pytest.raises(ValueError, match="8 rows .*over 23 tokens.*`replay_buffer_size` to at most 4"):
        trainer.train()
    assert trainer.state.global_step == 0 and trainer.replay_buffer is None
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())
    trained(tmp_path, replay_buffer_memory=room, replay_buffer_size=4, max_steps=1)


def test_the_buffer_lives_where_it_is_told_to(tmp_path):
    batch = CausalLMCollator(0)(rows(4))
    for device, buffer in (
        ("cpu", EBTTrainer(tiny(), arguments(tmp_path))._new_replay_buffer()),
        ("meta", EBTTrainer(tiny(), arguments(tmp_path, replay_buffer_device="meta"))._new_replay_buffer()),
    ):
        buffer.add(batch, torch.zeros(4, LENGTH, VOCAB))
        assert {value.device.type for row in buffer.rows for value in row.values()} == {device}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("device", [None, "cpu"])
def test_on_a_gpu_the_buffer_may_be_kept_beside_the_processor(tmp_path, device):
    _, watch = trained(tmp_path, use_cpu=False, replay_buffer_device=device, save_strategy="steps", save_steps=2)
    assert {row["state"].device.type for row in watch.buffer.rows} == {device or "cuda"}


def test_training_leaves_no_buffer_behind(tmp_path):
    trainer, watch = trained(tmp_path)
    assert len(watch.buffer) == 8 and trainer.replay_buffer is None


# ---- evaluation and interruption -------------------------------------------------------------------------------


def test_evaluation_leaves_training_and_its_buffer_alone(tmp_path):
    # a DataLoader draws a seed whenever it is started, so that noise differs after an evaluation
    quiet, held = trained(tmp_path, tiny(**NO_DRAWS))
    evaluated, same = trained(tmp_path, tiny(**NO_DRAWS), eval_strategy="steps", eval_steps=1)
    assert len([entry for entry in evaluated.state.log_history if "eval_loss" in entry]) == 4
    assert held.stored == same.stored and same_rows(held.buffer, same.buffer)
    assert difference(quiet.model, evaluated.model) == 0


def same_rows(first: ReplayBuffer, second: ReplayBuffer) -> bool:
    pairs = zip(first.rows, second.rows, strict=True)
    return all(set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a) for a, b in pairs)


@pytest.mark.parametrize(("stop", "accumulation"), [(2, 2), (4, 1)])  # in the middle of an epoch, and at its end
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path, stop, accumulation):
    options = {
        "max_steps": 7,
        "save_strategy": "steps",
        "save_steps": 2,
        "per_device_train_batch_size": 4 // accumulation,
        "gradient_accumulation_steps": accumulation,
    }
    whole, held = trained(tmp_path / "whole", **options)
    trained(tmp_path / "parts", callbacks=[StopAt(stop)], **options)
    resumed, again = trained(tmp_path / "parts", resume="auto", **options)
    assert resumed.state.global_step == 7 and len(again.stored) == 7 - stop
    assert held.stored[stop:] == again.stored and same_rows(held.buffer, again.buffer)
    assert torch.equal(held.buffer.generator.get_state(), again.buffer.generator.get_state())
    assert difference(whole.model, resumed.model) == 0
    assert losses(whole) == losses(resumed)


def test_a_checkpoint_without_a_buffer_is_resumed_with_a_warning(tmp_path, caplog):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    trained(tmp_path, callbacks=[StopAt(2)], **options)
    (tmp_path / "checkpoint-2" / "replay_buffer.safetensors").unlink()
    _, watch = trained(tmp_path, resume="auto", **options)
    assert "holds no replay_buffer.safetensors" in caplog.text and "starts empty" in caplog.text
    assert len(watch.stored[0]) == 4


def test_a_smaller_buffer_resumes_with_the_newest_rows(tmp_path):
    large, small = ReplayBuffer(6, 0.5, 0, "cpu"), ReplayBuffer(2, 0.5, 1, "cpu")
    large.add({"input_ids": torch.arange(6)[:, None]}, torch.rand(6, 1, 3))
    large.save(tmp_path / "rows.safetensors")
    small.load(tmp_path / "rows.safetensors")
    assert [row["input_ids"].item() for row in small.rows] == [4, 5]
    assert torch.equal(small.rows[1]["state"], large.rows[5]["state"])


def test_a_buffer_that_cannot_be_written_keeps_the_last_good_checkpoint(tmp_path, monkeypatch):
    class LoseTheFolder(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            monkeypatch.setattr(EBTTrainer, "_replay_file", lambda *_: tmp_path / "nowhere" / "rows.safetensors")

    with pytest.raises(OSError, match="replay buffer could not be written.*last good checkpoint is .*checkpoint-1"):
        trained(tmp_path, save_strategy="steps", save_steps=1, callbacks=[LoseTheFolder()])
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


# ---- refusals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"replay_buffer_size": -1}, "at least 0 .*got -1"),
        ({"replay_buffer_share": 0.0}, "above 0 and at most 1, got 0.0"),
        ({"replay_buffer_memory": 0.0}, "above 0 GiB, got 0.0"),
        ({"replay_buffer_device": "attic"}, "'attic'.*cpu or cuda:0"),
        ({"replay_buffer_size": 0, "replay_buffer_share": 0.25}, "replay_buffer_share=0.25.*no effect"),
        ({"recipe": "s1", "replay_buffer_size": None, "replay_buffer_device": "cpu"}, "no effect without"),
    ],
)
def test_bad_options_are_refused_in_words(tmp_path, values, message):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **values)


def test_models_that_cannot_replay_are_refused_in_words(tmp_path):
    torch.manual_seed(1)
    twin = LlamaForCausalLM(transformer_pp_config("4xs", **TINY))
    with pytest.raises(ValueError, match="recipe='s2'.*LlamaForCausalLM, which does not think"):
        EBTTrainer(twin, arguments(tmp_path))
    with pytest.raises(ValueError, match="replay_buffer_size=8.*LlamaForCausalLM is none"):
        EBTTrainer(twin, arguments(tmp_path, recipe="s1"))
    image = EBTForImageDenoising(EBTImageConfig.from_preset("4xs", "s2", image_size=8, patch_size=4))
    with pytest.raises(ValueError, match="replay_buffer_size=8.*EBTForImageDenoising is none"):
        EBTTrainer(image, arguments(tmp_path))
    with pytest.raises(ValueError, match="is for text.*noisy image"):
        EBTImageTrainingArguments(str(tmp_path), use_cpu=True, recipe="s2", replay_buffer_size=4)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([{"input_ids": torch.zeros(2, 3), "mask": torch.zeros(2, 1, 3, 3)}], "rows, positions.*replay_buffer_size=0"),
        ([{"input_ids": torch.zeros(2, 3), "names": ["a", "b"]}], "rows, positions"),
        ([{"ids": torch.zeros(2, 3)}], "The batch has ids, the replayed rows input_ids"),
    ],
)
def test_batches_that_are_not_made_of_equal_rows_are_refused_in_words(batches, message):
    buffer = ReplayBuffer(4, 0.5, 0, "cpu")
    buffer.add({"input_ids": torch.zeros(2, 3)}, torch.zeros(2, 3, 5))
    with pytest.raises(ValueError, match=message):
        buffer.extend(batches)


# ---- around it -------------------------------------------------------------------------------------------------


def test_an_adapter_trains_with_the_recipe(tmp_path):
    peft = pytest.importorskip("peft")
    base = tiny()
    before = weights(base)
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    trainer, watch = trained(tmp_path, model)
    assert len(watch.buffer) == 8
    changed = {
        name for name, value in weights(trainer.model.get_base_model()).items() if "lora_B" in name and value.any()
    }
    assert changed and torch.equal(before["model.embed_tokens.weight"], base.model.embed_tokens.weight)


def test_recipe_s1_can_replay_too(tmp_path):
    model = EBTForCausalLM(EBTConfig.from_preset("4xs", "s1", **{**TINY, "step_size": 5.0}))
    _, watch = trained(tmp_path, model, recipe="s1")
    assert len(watch.buffer) == 8


def test_the_script_trains_goes_on_and_trains_further(tmp_path):
    text = tmp_path / "book.txt"
    text.write_text("The quality of mercy is not strain'd. " * 60)
    size = "hidden_size=16,intermediate_size=16,num_hidden_layers=1,num_attention_heads=2"
    common = f"--recipe s2 --train_file {text} --block_size 16 --per_device_train_batch_size 4 --use_cpu "
    common += "--report_to none --disable_tqdm true --max_eval_samples 4 --save_steps 2 --replay_buffer_size 6 "
    new = f"--tokenizer_name tiny_shakespeare --config_overrides {size} --random_steps 1 2 --thinking_noise_std 0.5"
    run_clm.main(f"{common} {new} --output_dir {tmp_path / 'first'} --max_steps 2".split())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    config = model.config
    assert (config.random_steps, config.thinking_noise_std, config.random_step_size) == ([1, 2], 0.5, 2.0)
    held = load_file(tmp_path / "first" / "checkpoint-2" / "replay_buffer.safetensors")
    assert held["5.state"].shape == (16, config.vocab_size)
    run_clm.main(f"{common} {new} --output_dir {tmp_path / 'first'} --max_steps 4".split())
    run_clm.main(
        f"{common} --model_name_or_path {tmp_path / 'first'} --output_dir {tmp_path / 'on'} --max_steps 1".split()
    )
    assert "**recipe**: s2" in (tmp_path / "on" / "README.md").read_text()


DISTRIBUTED = """
import pathlib, sys
sys.path.insert(0, {tests!r})
import conftest
import torch
import test_s2 as laws
folder = pathlib.Path({folder!r})
options = dict(per_device_train_batch_size=2, gradient_accumulation_steps=2, ddp_find_unused_parameters=False,
               save_strategy="steps", save_steps=2, max_steps=6)
whole, held = laws.trained(folder / "whole", **options)
laws.trained(folder / "parts", callbacks=[laws.StopAt(2)], **options)
resumed, again = laws.trained(folder / "parts", resume="auto", **options)
process = whole.args.process_index
same = laws.difference(whole.model, resumed.model) == 0 and laws.same_rows(held.buffer, again.buffer)
torch.save({{"weights": laws.weights(whole.model), "stored": held.stored, "processes": whole.args.world_size,
            "resumed": same}}, folder / f"result{{process}}.pt")
whole.accelerator.wait_for_everyone()
whole.accelerator.end_training()
"""


@pytest.mark.slow
def test_two_processes_have_buffers_of_their_own_and_one_model(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(DISTRIBUTED.format(tests=str(Path(__file__).parent), folder=str(tmp_path)))
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    subprocess.run([sys.executable, *launch], check=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    one, two = (torch.load(tmp_path / f"result{process}.pt") for process in (0, 1))
    assert one["processes"] == 2 and one["resumed"] and two["resumed"]
    assert all(torch.equal(value, two["weights"][name]) for name, value in one["weights"].items())
    both = [{tuple(row) for row in held["stored"][0]} for held in (one, two)]
    assert len(both[0]) == len(both[1]) == 4 and not both[0] & both[1]
    names = {path.name for path in (tmp_path / "whole" / "checkpoint-2").glob("replay_buffer*")}
    assert names == {"replay_buffer_0.safetensors", "replay_buffer_1.safetensors"}
