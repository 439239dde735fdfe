"""Laws of training: batches, processes and interruptions change nothing, numbers mean what they say."""

import errno
import json
import math
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
)

from ebt_transformers import EBTConfig, EBTForCausalLM, transformer_pp_config
from ebt_transformers.training import EBTTrainer, EBTTrainingArguments, find_last_checkpoint, run_clm


sys.path.append(str(Path(__file__).parent))  # the helper beside this file, under every import mode of pytest
from interruption import StopAt  # noqa: E402


VOCAB = 40
LENGTH = 12
TINY = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
}
TINY_RUN = "hidden_size=16,intermediate_size=16,num_hidden_layers=1,num_attention_heads=2"


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Models this small only wait for each other on several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny_ebt(**overrides: object) -> EBTForCausalLM:
    torch.manual_seed(1)
    values = {**TINY, "step_size": 5.0, "initializer_range": 0.1, "candidate_init": "zeros", **overrides}
    return EBTForCausalLM(EBTConfig(**values))


def tiny_twin() -> LlamaForCausalLM:
    torch.manual_seed(1)
    return LlamaForCausalLM(transformer_pp_config("4xs", **TINY))


def rows(count: int, uneven: bool = True) -> list[dict[str, torch.Tensor]]:
    """Random rows of one length; uneven ones have different numbers of labels."""
    generator = torch.Generator().manual_seed(2)
    made = []
    for index in range(count):
        ids = torch.randint(0, VOCAB, (LENGTH,), generator=generator)
        labels = ids.clone()
        if uneven:
            labels[: index % (LENGTH - 2)] = -100
        made.append({"input_ids": ids, "labels": labels})
    return made


def arguments(folder: Path, **values: object) -> EBTTrainingArguments:
    defaults = {
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
        "save_strategy": "no",
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "step_size_lr_multiplier": None,
    }
    return EBTTrainingArguments(output_dir=str(folder), **{**defaults, **values})


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def largest_difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    return max((first[name] - second[name]).abs().max().item() for name in first)


def token_loss(model: torch.nn.Module, data: list[dict[str, torch.Tensor]]) -> float:
    """Cross-entropy per token, one row at a time."""
    model.eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for row in data:
            logits = model(input_ids=row["input_ids"][None]).logits[0, :-1]
            targets = row["labels"][1:]
            total += torch.nn.functional.cross_entropy(logits, targets, reduction="sum", ignore_index=-100).item()
            count += int(targets.ne(-100).sum())
    return total / count


# ---- what is trained -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("multiplier", [None, 7.0])
def test_the_step_size_learns_at_its_own_rate_without_decay(tmp_path, multiplier):
    model = tiny_ebt(step_size=4.0)
    trainer = EBTTrainer(
        model, arguments(tmp_path, step_size_lr_multiplier=multiplier, weight_decay=0.1), train_dataset=rows(8)
    )
    decayed, undecayed, own = trainer.create_optimizer().param_groups
    assert [id(p) for p in own["params"]] == [id(model.step_size.value)]
    assert own["lr"] == pytest.approx((12.0 if multiplier is None else 7.0) * 1e-3)
    assert (own["weight_decay"], undecayed["weight_decay"], decayed["weight_decay"]) == (0.0, 0.0, 0.1)
    assert all(p.ndim >= 2 for p in decayed["params"]) and all(p.ndim < 2 for p in undecayed["params"])
    everything = [id(p) for group in (decayed, undecayed, own) for p in group["params"]]
    assert sorted(everything) == sorted(id(p) for p in model.parameters())


def test_a_schedule_keeps_the_ratio_of_the_rates(tmp_path):
    trainer = EBTTrainer(tiny_ebt(), arguments(tmp_path, max_steps=4), train_dataset=rows(8))
    trainer.train()
    decayed, _, own = trainer.optimizer.param_groups
    assert own["lr"] == pytest.approx(15 * decayed["lr"])
    assert decayed["lr"] == pytest.approx(1e-4)  # cosine to a tenth


def test_a_given_optimizer_is_left_alone(tmp_path):
    model = tiny_ebt()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = EBTTrainer(model, arguments(tmp_path), train_dataset=rows(8), optimizers=(optimizer, None))
    assert trainer.create_optimizer() is optimizer and len(optimizer.param_groups) == 1


@pytest.mark.parametrize("conditioning", ["none", "time_embed", "adaln", "adaln_zero"])
@pytest.mark.parametrize("embedding", ["linear", "shared"])
def test_every_trainable_parameter_gets_a_gradient_in_one_step(tmp_path, conditioning, embedding):
    landscapes = 1 if conditioning == "none" else 2
    model = tiny_ebt(step_conditioning=conditioning, candidate_embedding=embedding, num_landscapes=landscapes)
    if conditioning == "adaln_zero":  # starts with zero energies everywhere: one step away from there
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    seen: dict[str, float | None] = {}

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            for name, parameter in model.named_parameters():
                seen[name] = None if parameter.grad is None else parameter.grad.abs().max().item()

    EBTTrainer(model, arguments(tmp_path, max_steps=1), train_dataset=rows(4), callbacks=[Watch()]).train()
    assert set(seen) == {name for name, _ in model.named_parameters()}
    assert [name for name, gradient in seen.items() if not gradient] == []


# ---- batches, accumulation, processes --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [tiny_ebt, tiny_twin])
def test_one_batch_of_eight_equals_eight_of_one(tmp_path, kind):
    results = []
    for batch, accumulation in ((8, 1), (1, 8), (3, 3)):
        model = kind()
        count = 9 if batch == 3 else 8
        args = arguments(
            tmp_path, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, optim="sgd"
        )
        data = rows(8) if count == 8 else [*rows(8), {"input_ids": rows(1)[0]["input_ids"], "labels": None}]
        if count == 9:
            data[8]["labels"] = torch.full((LENGTH,), -100)  # a row without labels counts for nothing
        trainer = EBTTrainer(model, args, train_dataset=data)
        trainer.train()
        results.append((weights(model), [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]))
    for found, losses in results[1:]:
        assert largest_difference(results[0][0], found) < 1e-5
        assert losses == pytest.approx(results[0][1], rel=1e-4)


def test_the_twin_trains_as_with_the_parent_trainer(tmp_path):
    found = []
    for kind in (Trainer, EBTTrainer):
        model = tiny_twin()
        kind(model, arguments(tmp_path, weight_decay=0.1), train_dataset=rows(8)).train()
        found.append(weights(model))
    assert largest_difference(*found) == 0


def test_checkpointed_activations_change_nothing(tmp_path):
    names = EBTTrainingArguments.__dataclass_fields__
    option = "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
    found = []
    for checkpointing in (False, True):
        model = tiny_ebt()
        EBTTrainer(model, arguments(tmp_path, **{option: checkpointing}), train_dataset=rows(8)).train()
        found.append(weights(model))
    assert largest_difference(*found) < 1e-5


DISTRIBUTED = """
import json, sys
sys.path.insert(0, {tests!r})
import conftest
import importlib.util
spec = importlib.util.spec_from_file_location("laws", {file!r})
laws = importlib.util.module_from_spec(spec)
spec.loader.exec_module(laws)
import pathlib, torch
processes = int(sys.argv[1])
model = laws.tiny_ebt()
args = laws.arguments(pathlib.Path({folder!r}), per_device_train_batch_size=4 // processes,
                      per_device_eval_batch_size=2, ddp_find_unused_parameters=False, optim="sgd")
trainer = laws.EBTTrainer(model, args, train_dataset=laws.rows(8), eval_dataset=laws.rows(7))
trainer.train()
metrics = trainer.evaluate()
if trainer.is_world_process_zero():
    torch.save({{"weights": laws.weights(model), "loss": metrics["eval_loss"], "log": trainer.state.log_history}},
               sys.argv[2])
# or a process may end while threads of its group still run, which aborts it
trainer.accelerator.wait_for_everyone()
trainer.accelerator.end_training()
"""


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    script = tmp_path / "train.py"
    folder = str(tmp_path / "out")
    script.write_text(DISTRIBUTED.format(tests=str(Path(__file__).parent), file=__file__, folder=folder))
    results = []
    for processes in (1, 2):
        path = tmp_path / f"result{processes}.pt"
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), str(script)]
        subprocess.run([sys.executable, *launch, str(processes), str(path)], check=True, timeout=300)
        results.append(torch.load(path))
    one, two = results
    assert largest_difference(one["weights"], two["weights"]) < 1e-5
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)  # 7 rows: the repeated one is not counted
    for first, second in zip(one["log"], two["log"], strict=True):
        for name in ("loss", "initial_loss", "final_loss", "energy_gap", "step_size"):
            if name in first:
                assert second[name] == pytest.approx(first[name], rel=1e-3, abs=1e-6), name


# ---- metrics ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [tiny_ebt, tiny_twin])
@pytest.mark.parametrize("batch", [1, 3, 7])
def test_perplexity_is_exp_of_the_mean_loss_per_token_however_the_batches_fall(tmp_path, kind, batch):
    model, data = kind(), rows(7)
    trainer = EBTTrainer(model, arguments(tmp_path, per_device_eval_batch_size=batch), eval_dataset=data)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(token_loss(model, data), rel=1e-5)
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(metrics["eval_loss"]))


def test_evaluation_returns_no_logits_unless_asked(tmp_path):
    trainer = EBTTrainer(tiny_ebt(), arguments(tmp_path), eval_dataset=rows(4))
    batch = trainer.data_collator(rows(4))
    loss, logits, labels = trainer.prediction_step(trainer.model, batch, prediction_loss_only=True)
    assert loss is not None and logits is None and labels is None
    predicted = trainer.predict(rows(4))
    assert predicted.predictions.shape == (4, LENGTH, VOCAB)
    assert "test_perplexity" in predicted.metrics


@pytest.mark.parametrize("accumulation", [1, 4])
def test_logged_losses_are_the_losses_of_the_first_and_last_step(tmp_path, accumulation):
    data = rows(8)
    model = tiny_ebt()
    batch = {name: torch.stack([row[name] for row in data]) for name in data[0]}
    with torch.enable_grad():
        expected = model.train()(**batch)
    args = arguments(
        tmp_path,
        max_steps=1,
        per_device_train_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation,
    )
    trainer = EBTTrainer(model, args, train_dataset=data)
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["initial_loss"] == pytest.approx(expected.step_losses[0].item(), rel=1e-4)
    assert log["final_loss"] == pytest.approx(expected.step_losses[-1].item(), rel=1e-4)
    assert log["loss"] == pytest.approx((log["initial_loss"] + log["final_loss"]) / 2, rel=1e-4)
    gap = (expected.mean_energies[0] - expected.mean_energies[-1]).item()
    assert log["energy_gap"] == pytest.approx(gap, rel=1e-3, abs=1e-6)
    assert log["step_size"] == pytest.approx(model.step_size.value.item())


def test_logged_losses_are_averages_since_the_last_log(tmp_path):
    logs = []
    for every in (1, 2):
        trainer = EBTTrainer(
            tiny_ebt(), arguments(tmp_path, max_steps=2, logging_steps=every), train_dataset=rows(8, uneven=False)
        )
        trainer.train()
        logs.append([entry["initial_loss"] for entry in trainer.state.log_history if "initial_loss" in entry])
    assert logs[1] == pytest.approx([sum(logs[0]) / 2])


def test_the_twin_logs_no_thinking(tmp_path):
    trainer = EBTTrainer(tiny_twin(), arguments(tmp_path), train_dataset=rows(8))
    trainer.train()
    assert not {"initial_loss", "energy_gap", "step_size"} & set(trainer.state.log_history[0])


def test_training_lowers_the_loss(tmp_path):
    data = rows(8, uneven=False)
    model = tiny_ebt(initializer_range=1.0, step_size=20.0)
    before = token_loss(model, data)
    EBTTrainer(
        model, arguments(tmp_path, max_steps=40, learning_rate=1e-2, optim="adamw_torch"), train_dataset=data
    ).train()
    assert token_loss(model, data) < before - 0.5


# ---- interruption ----------------------------------------------------------------------------------------------


def test_interrupted_and_resumed_equals_uninterrupted(tmp_path):
    def make(folder: str, callbacks: list[TrainerCallback]) -> EBTTrainer:
        args = arguments(tmp_path / folder, max_steps=6, save_strategy="steps", save_steps=1, save_total_limit=2)
        # random starts: the random state has to be restored, too
        model = tiny_ebt(candidate_init="normal")
        return EBTTrainer(model, args, train_dataset=rows(10), callbacks=callbacks)

    whole = make("whole", [])
    whole.train()
    make("parts", [StopAt(4)]).train()
    resumed = make("parts", [])
    resumed.train(resume_from_checkpoint="auto")
    assert resumed.state.global_step == 6
    assert largest_difference(weights(whole.model), weights(resumed.model)) == 0
    ends = [[e for e in t.state.log_history if "initial_loss" in e][-2:] for t in (whole, resumed)]
    assert ends[0] == ends[1]


def test_an_incomplete_checkpoint_is_passed_over(tmp_path):
    args = arguments(tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    EBTTrainer(tiny_ebt(), args, train_dataset=rows(8)).train()
    assert find_last_checkpoint(tmp_path).name == "checkpoint-2"
    (tmp_path / "checkpoint-2" / "trainer_state.json").write_text('{"global_st')
    (tmp_path / "checkpoint-10").mkdir()
    assert find_last_checkpoint(tmp_path).name == "checkpoint-1"
    assert find_last_checkpoint(tmp_path / "nowhere") is None
    with pytest.raises(ValueError, match="no complete checkpoint"):
        EBTTrainer(tiny_ebt(), args, train_dataset=rows(8)).train(str(tmp_path / "checkpoint-10"))
    with pytest.raises(ValueError, match="no complete checkpoint in"):
        other = arguments(tmp_path / "empty")
        EBTTrainer(tiny_ebt(), other, train_dataset=rows(8)).train(resume_from_checkpoint=True)


# A full disk is imitated at the one place where transformers writes weights: the writer leaves half a file, then
# raises what the operating system would raise.
def fill_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def write_half(tensors, filename, *args, **kwargs):
        Path(filename).write_bytes(b"half a file")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", write_half)


def test_a_full_disk_keeps_the_last_good_checkpoint(tmp_path, monkeypatch):
    args = arguments(tmp_path, save_strategy="steps", save_steps=1)

    class FillTheDisk(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            fill_the_disk(monkeypatch)

    with pytest.raises(
        OSError, match="Could not save checkpoint .*checkpoint-2.*last good checkpoint is .*checkpoint-1"
    ):
        EBTTrainer(tiny_ebt(), args, train_dataset=rows(8), callbacks=[FillTheDisk()]).train()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    monkeypatch.undo()
    trainer = EBTTrainer(tiny_ebt(), args, train_dataset=rows(8))
    trainer.train(resume_from_checkpoint="auto")
    assert trainer.state.global_step == 3


def test_a_full_disk_keeps_the_saved_model(tmp_path, monkeypatch):
    model = tiny_ebt()
    trainer = EBTTrainer(model, arguments(tmp_path), train_dataset=rows(8))
    trainer.save_model()
    before = weights(AutoModelForCausalLM.from_pretrained(tmp_path))
    fill_the_disk(monkeypatch)
    with torch.no_grad():
        model.step_size.value.add_(1)
    with pytest.raises(OSError, match="No space"):
        trainer.save_model()
    monkeypatch.undo()
    assert largest_difference(before, weights(AutoModelForCausalLM.from_pretrained(tmp_path))) == 0
    assert not list(tmp_path.glob(".saving-*"))


def test_early_stopping_returns_to_the_best_checkpoint(tmp_path):
    args = arguments(
        tmp_path,
        max_steps=50,
        learning_rate=1.0,  # gets worse at once
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        early_stopping_patience=2,
    )
    trainer = EBTTrainer(tiny_twin(), args, train_dataset=rows(8), eval_dataset=rows(4))
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert trainer.state.global_step < 50
    assert losses.index(min(losses)) == len(losses) - 3
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-5)


# ---- arguments -------------------------------------------------------------------------------------------------


def test_defaults_are_the_papers(tmp_path):
    args = EBTTrainingArguments(str(tmp_path), use_cpu=True)
    assert (args.learning_rate, args.weight_decay, args.adam_beta1, args.adam_beta2) == (1.2e-3, 0.01, 0.9, 0.999)
    assert (args.max_grad_norm, args.lr_scheduler_kwargs) == (1.0, {"min_lr_rate": 0.1})
    own = EBTTrainingArguments(str(tmp_path), use_cpu=True, lr_scheduler_kwargs='{"min_lr": 1e-5}')
    assert own.lr_scheduler_kwargs == {"min_lr": 1e-5}
    assert not EBTTrainingArguments(str(tmp_path), use_cpu=True, lr_scheduler_type="linear").lr_scheduler_kwargs


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"recipe": "s3"}, "one of s1, s2, proposal, got 's3'"),
        ({"step_size_lr_multiplier": 0.0}, "above 0, got 0.0"),
        ({"early_stopping_patience": 2}, "eval_strategy"),
        ({"early_stopping_patience": 0, "eval_strategy": "epoch"}, "at least 1"),
        ({"early_stopping_threshold": 0.1}, "no effect without"),
    ],
)
def test_bad_arguments_are_refused_in_words(tmp_path, values, message):
    with pytest.raises(ValueError, match=message):
        EBTTrainingArguments(str(tmp_path), use_cpu=True, **values)


def test_options_that_would_be_ignored_are_refused(tmp_path):
    with pytest.raises(ValueError, match="learns no step size"):
        EBTTrainer(tiny_twin(), arguments(tmp_path, step_size_lr_multiplier=3.0))
    with pytest.raises(ValueError, match="learns no step size"):
        EBTTrainer(tiny_ebt(learn_step_size=False), arguments(tmp_path, step_size_lr_multiplier=3.0))
    with pytest.raises(ValueError, match="label_smoothing_factor=0.1"):
        EBTTrainer(tiny_ebt(), arguments(tmp_path, label_smoothing_factor=0.1))
    with pytest.raises(ValueError, match="loss_on_steps='last'"):
        EBTTrainer(tiny_ebt(loss_on_steps="last"), arguments(tmp_path))


# ---- ebt train clm ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A saved tokenizer: one token per byte and one for the end of a text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={"<eos>": 0, **{x: n + 1 for n, x in enumerate(letters)}}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>").save_pretrained(folder)
    return str(folder)


@pytest.fixture
def command(tmp_path, tokenizer_folder):
    """Runs the script on a small text with a tiny model; options given twice count the second time."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {number} of a short text\n" for number in range(60)), encoding="utf-8")
    lines = [{"body": f"text number {number}", "id": number} for number in range(60)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    datasets.Dataset.from_list(lines).to_parquet(tmp_path / "text.parquet")
    common = f"--use_cpu --disable_tqdm true --block_size 16 --tokenizer_name {tokenizer_folder} --logging_steps 1"

    def run(options: str, source: str = "text.txt", model: str = TINY_RUN, out: str = "out") -> Path:
        argv = [*common.split(), "--output_dir", str(tmp_path / out), *options.split()]
        argv += ["--train_file", str(tmp_path / source)] if source else []
        argv += ["--config_overrides", model] if model else []
        run_clm.main(argv)
        return tmp_path / out

    return run


def test_the_script_trains_evaluates_saves_and_goes_on(command, capsys):
    out = command("--max_steps 3 --save_steps 2 --step_size 20")
    results = json.loads((out / "all_results.json").read_text())
    assert results["eval_perplexity"] == pytest.approx(math.exp(results["eval_loss"]))
    assert f"perplexity {results['eval_perplexity']:.6g}" in capsys.readouterr().out
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert type(model).__name__ == "EBTForCausalLM" and (out / "generation_config.json").is_file()
    assert model.config.step_size == 20 and model.config.hidden_size == 16
    assert tokenizer("line")["input_ids"] and model.config.vocab_size == len(tokenizer)
    card = (out / "README.md").read_text()
    for part in ("ebt train clm", "--max_steps 3", "validation perplexity", "**seed**: 33", "**recipe**: s1", "torch"):
        assert part in card
    command("--max_steps 5 --step_size 20")
    assert f"Found {out / 'checkpoint-3'}: going on" in capsys.readouterr().out
    assert json.loads((out / "trainer_state.json").read_text())["global_step"] == 5


def test_a_finished_run_started_again_trains_nothing_and_finds_the_same_loss(command, capsys):
    out = command("--max_steps 3 --step_size 20")
    card, results = (out / "README.md").read_text(), json.loads((out / "all_results.json").read_text())
    capsys.readouterr()
    command("--max_steps 3 --step_size 20")
    assert "nothing to train" in capsys.readouterr().out
    assert json.loads((out / "trainer_state.json").read_text())["global_step"] == 3
    assert (out / "README.md").read_text() == card
    assert json.loads((out / "all_results.json").read_text())["eval_loss"] == pytest.approx(results["eval_loss"])


def test_the_twin_trains_by_the_same_script(command):
    out = command("--max_steps 2 --twin")
    model = AutoModelForCausalLM.from_pretrained(out)
    assert isinstance(model, LlamaForCausalLM) and model.config.hidden_size == 16
    assert "eval_perplexity" in json.loads((out / "all_results.json").read_text())
    assert "thinking" not in (out / "README.md").read_text()


def test_the_twin_starts_from_the_distributions_of_the_ebt(command):
    twin = AutoModelForCausalLM.from_pretrained(command("--max_steps 1 --twin --learning_rate 1e-9"))
    ebt = AutoModelForCausalLM.from_pretrained(command("--max_steps 1 --learning_rate 1e-9 --overwrite"))
    theirs, mine = dict(twin.named_parameters()), dict(ebt.named_parameters())
    shared = [name for name in set(theirs) & set(mine) if theirs[name].dim() == 2]
    assert len(shared) == 1 + 7 * twin.config.num_hidden_layers
    for name in shared:
        assert float(theirs[name].detach().std()) == pytest.approx(float(mine[name].detach().std()), rel=0.25)
    table = ebt.candidate_embedding.weight
    assert float(twin.lm_head.weight.detach().std()) == pytest.approx(float(table.detach().std()), rel=0.25)


def test_the_twin_can_start_as_transformers_would(command):
    twin = AutoModelForCausalLM.from_pretrained(command("--max_steps 1 --twin --twin_init llama --learning_rate 1e-9"))
    for name, parameter in twin.named_parameters():
        if parameter.dim() == 2:
            assert float(parameter.detach().std()) == pytest.approx(0.02, rel=0.25), name


def test_the_proposal_recipe_trains_by_the_same_script(command):
    out = command("--max_steps 3 --recipe proposal --logging_steps 1")
    config = AutoModelForCausalLM.from_pretrained(out).config
    assert config.candidate_init == "proposal" and config.random_steps == [1, 4]
    log = json.loads((out / "trainer_state.json").read_text())["log_history"][0]
    assert log["loss"] > log["proposal_loss"] > 0
    assert "**recipe**: proposal" in (out / "README.md").read_text()


def test_the_embedded_text_is_the_default(tmp_path):
    argv = f"--output_dir {tmp_path / 'out'} --use_cpu --disable_tqdm true --block_size 16 --max_steps 1"
    limits = f"--max_train_samples 8 --max_eval_samples 2 --config_overrides {TINY_RUN}"
    run_clm.main([*argv.split(), *limits.split()])
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert {"eval_perplexity", "test_perplexity"} <= set(results)


@pytest.mark.parametrize(
    ("source", "options"),
    [
        ("text.jsonl", "--text_column body"),
        ("text.parquet", "--text_column body --no_packing"),
        ("text.jsonl", "--text_column body --streaming --max_eval_samples 4"),
        ("text.parquet", "--text_column body --streaming --max_eval_samples 4 --no_packing"),
        ("text.txt", "--no_packing --text_unit line --validation_split_percentage 10"),
        ("text.txt", "--validation_split_percentage 0"),
    ],
)
def test_other_sources_train_too(command, source, options):
    results = json.loads((command(f"--max_steps 2 {options}", source) / "all_results.json").read_text())
    assert math.isfinite(results["train_loss"])
    assert ("eval_perplexity" in results) == ("percentage 0" not in options)


def test_the_console_script_runs_it_in_a_process_of_its_own(tmp_path, subprocess_env):
    argv = ["ebt", "train", "clm", "--output_dir", str(tmp_path / "out"), "--use_cpu", "--max_steps", "1"]
    argv += [
        "--block_size",
        "16",
        "--config_overrides",
        TINY_RUN,
        "--max_train_samples",
        "8",
        "--max_eval_samples",
        "2",
    ]
    code = f"import sys; sys.argv = {argv!r}; from ebt_transformers.cli import main; sys.exit(main())"
    subprocess.run([sys.executable, "-c", code], check=True, env=subprocess_env, timeout=300)
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_saved_model_trains_further(command, tmp_path):
    first = command("--max_steps 2")
    second = command(f"--max_steps 1 --model_name_or_path {first}", model="", out="second")
    assert AutoModelForCausalLM.from_pretrained(second).config.hidden_size == 16
    card = (second / "README.md").read_text()
    # a folder is no name on the Hub: a card with one among its metadata is refused there
    assert f"**started from**: {first}" in card and "base_model" not in card


def test_the_learning_rate_is_the_presets_unless_given(command, capsys):
    command("--max_steps 1 --preset 3xs --warmup_steps 0")
    assert "0.0018" in capsys.readouterr().out
    command("--max_steps 1 --preset 3xs --warmup_steps 0 --learning_rate 0.5 --overwrite")
    assert "'0.5'" in capsys.readouterr().out


def test_only_what_is_asked_for_is_done(command, capsys):
    out = command("--max_steps 2 --do_train")
    assert not (out / "eval_results.json").exists()
    command("--do_eval")
    loss = json.loads((out / "eval_results.json").read_text())["eval_loss"]
    command("--max_steps 2 --overwrite")  # the same training, evaluated at its end
    assert loss == pytest.approx(json.loads((out / "eval_results.json").read_text())["eval_loss"])


def test_an_output_folder_with_other_content_is_not_touched(command, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    with pytest.raises(SystemExit, match="has content but no complete checkpoint.*--overwrite"):
        command("--max_steps 1")
    out = command("--max_steps 1 --overwrite")
    assert (out / "thesis.tex").is_file() and (out / "model.safetensors").is_file()
    command("--max_steps 2 --overwrite --save_steps 2")
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-2"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--text_column body", "no column 'body'. Columns: text"),
        ("--dataset_name x", "both name the data"),
        ("--block_size 1", "at least 2, got 1"),
        ("--streaming", "--max_steps"),
        ("--shuffle_buffer_size 5", "needs --streaming"),
        ("--twin_init llama", "--twin_init has an effect with --twin only"),
        ("--twin --twin_init zeros", "--twin_init must be ebt or llama, got zeros"),
        ("--twin --num_landscapes 3", "--num_landscapes means nothing to the twin"),
        ("--model_name_or_path x --preset xs", "--preset.*would change the architecture"),
        ("--preset gigantic", "Allowed: 4xs, 3xs"),
        ("--recipe s3", "one of s1, s2, proposal, got 's3'"),
        ("--twin --recipe s2", "--recipe means nothing to the twin"),
        ("--twin --random_steps 2 3", "--random_steps means nothing to the twin"),
        ("--random_steps 2", "fewest and the most steps"),
        ("--replay_buffer_size 8 --twin", "--replay_buffer_size means nothing to the twin"),
        ("--replay_buffer_share 0.5 --replay_buffer_memory 3", "replay_buffer_memory=3.0.*no effect without"),
        ("--step_conditioning sometimes", "must be one of none, time_embed"),
        ("--resume_from_checkpoint nowhere", "no complete checkpoint"),
        ("--resume_from_checkpoint auto --overwrite", "contradict"),
        ("--max_train_samples 0", "at least 1, got 0"),
        ("--validation_split_percentage 0 --eval_strategy steps", "needs validation data"),
    ],
)
def test_the_script_refuses_in_words(command, options, message):
    with pytest.raises(SystemExit, match=message):
        command(options)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (TINY_RUN + ",max_position_embeddings=8", "--block_size 16 is too long: the model takes at most 8"),
        (TINY_RUN + ",hiden_size=8", "'hiden_size=8' is no field=value of EBTConfig"),
        (TINY_RUN + ",num_attention_heads=3", "head width|multiple"),
    ],
)
def test_the_script_refuses_impossible_models(command, model, message):
    with pytest.raises(SystemExit, match=message):
        command("--max_steps 1", model=model)


def test_missing_data_is_refused_in_words(command, tmp_path, capsys):
    with pytest.raises(SystemExit, match="train file .*nowhere.txt.* does not exist"):
        command("--max_steps 1", "nowhere.txt")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(SystemExit, match="train file .*empty.jsonl' is empty"):
        command("--max_steps 1", "empty.jsonl")
    (tmp_path / "blank.jsonl").write_text('{"text": ""}\n' * 40)
    with pytest.raises(SystemExit, match="0 tokens; at least 2"):
        command("--max_steps 1", "blank.jsonl")
    with pytest.raises(SystemExit) as ended:
        command("--help")
    assert ended.value.code == 0 and "--twin" in capsys.readouterr().out
