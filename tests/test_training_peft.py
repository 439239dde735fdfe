"""Laws of training adapters: only they move, interruptions change nothing, the scripts do as told."""

import errno
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageToImage,
    AutoTokenizer,
    TrainerCallback,
    pipeline,
)

from ebt_transformers import EBTConfig, EBTForCausalLM, EBTTrainer, cli, transformer_pp_config
from ebt_transformers.assets import checkpoint_path
from ebt_transformers.training import EBTTrainingArguments, find_last_checkpoint, run_clm, run_denoise


pytest.importorskip("peft")
sys.path.insert(0, str(Path(__file__).parent))  # tests are imported by path (see pyproject.toml)

from peft import PeftModel, get_peft_model  # noqa: E402
from peft_models import TEXT, adapted, config_of, example, prediction, saved, tiny  # noqa: E402

from ebt_transformers.modeling_ebt.image_processing_ebt import EBTImageProcessor  # noqa: E402
from ebt_transformers.training.arguments import EBTImageTrainingArguments  # noqa: E402
from ebt_transformers.training.ema import EMACallback  # noqa: E402
from ebt_transformers.training.model_card import is_image_model  # noqa: E402


sys.path.append(str(Path(__file__).parent))  # the helper beside this file, under every import mode of pytest
from interruption import StopAt  # noqa: E402


KINDS = ("text", "image")


def rows(model: torch.nn.Module, count: int = 8) -> list[dict[str, torch.Tensor]]:
    columns = example(model, count)
    return [{name: value[index] for name, value in columns.items()} for index in range(count)]


def trainer_of(model: torch.nn.Module, folder: Path, callbacks: tuple[Any, ...] = (), **values: Any) -> EBTTrainer:
    kind = EBTImageTrainingArguments if is_image_model(model) else EBTTrainingArguments
    defaults = {"use_cpu": True, "disable_tqdm": True, "report_to": "none", "save_strategy": "no", "max_steps": 3}
    defaults |= {"per_device_train_batch_size": 4, "logging_steps": 1, "learning_rate": 1e-2}
    args = kind(output_dir=str(folder), **{**defaults, **values})
    return EBTTrainer(model, args, train_dataset=rows(model), eval_dataset=rows(model, 5), callbacks=[*callbacks])


def new_adapter(kind: str, base: Path, **options: Any) -> PeftModel:
    """A new adapter with a step size of its own, on a model saved in a folder."""
    torch.manual_seed(5)
    return get_peft_model(saved(kind, base), config_of("lora", kind, modules_to_save=["step_size"], **options))


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


# ---- the trainer -----------------------------------------------------------------------------------------------


def test_the_step_size_beside_an_adapter_learns_at_its_own_rate(tmp_path):
    model = new_adapter("text", tmp_path / "base")
    trainer = trainer_of(model, tmp_path, step_size_lr_multiplier=7.0, weight_decay=0.1)
    decayed, undecayed, own = trainer.create_optimizer().param_groups
    assert [id(p) for p in own["params"]] == [id(model.get_base_model().step_size.modules_to_save["default"].value)]
    assert (own["lr"], own["weight_decay"]) == (pytest.approx(7e-2), 0.0)
    assert undecayed["params"] == [] and all(p.ndim == 2 for p in decayed["params"])
    trained = {id(p) for name, p in model.named_parameters() if "lora_" in name}
    assert {id(p) for p in decayed["params"]} == trained


def test_a_rate_of_a_step_size_that_does_not_learn_is_refused(tmp_path):
    model = get_peft_model(tiny("text"), config_of("lora", "text"))
    with pytest.raises(ValueError, match="learns no step size.*modules_to_save"):
        trainer_of(model, tmp_path, step_size_lr_multiplier=2.0)


def test_an_adapter_of_half_a_shared_table_is_not_trained(tmp_path):
    config = config_of("lora", "text", target_modules=["candidate_embedding"])
    with pytest.raises(ValueError, match="tokens and candidates share"):
        trainer_of(get_peft_model(tiny("text", candidate_embedding="shared"), config), tmp_path)


def test_a_recipe_is_checked_through_an_adapter(tmp_path):
    model = get_peft_model(tiny("text", loss_on_steps="last"), config_of("lora", "text"))
    with pytest.raises(ValueError, match="scores every thinking step"):
        trainer_of(model, tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_training_moves_the_adapter_alone(tmp_path, kind):
    model = new_adapter(kind, tmp_path / "base")
    before = weights(model)
    trainer = trainer_of(model, tmp_path / "run")
    trainer.train()
    after = weights(model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if "lora_" in name or "modules_to_save" in name}
    logged = [entry for entry in trainer.state.log_history if "initial_loss" in entry]
    assert len(logged) == 3 and all("energy_gap" in entry for entry in logged)
    # the trained copy, not the one kept for when the adapter is switched off
    assert logged[-1]["step_size"] == pytest.approx(float(model.step_size()))
    assert logged[-1]["step_size"] != logged[0]["step_size"]


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_evaluated_as_its_merged_model(tmp_path, kind):
    model = adapted(saved(kind, tmp_path / "base"), config_of("lora", kind))
    own = trainer_of(model, tmp_path).evaluate()
    merged = trainer_of(model.merge_and_unload(), tmp_path).evaluate()
    for name in ("eval_loss", "eval_perplexity" if kind == "text" else "eval_psnr"):
        assert own[name] == pytest.approx(merged[name], rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_adapter_goes_on_as_if_it_had_not_been(tmp_path, kind):
    def make(folder: str, *callbacks: TrainerCallback) -> EBTTrainer:
        model = new_adapter(kind, tmp_path / "base", lora_dropout=0.1)
        saving = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}
        return trainer_of(model, tmp_path / folder, callbacks, max_steps=5, **saving)

    whole = make("whole")
    whole.train()
    make("parts", StopAt(3)).train()
    last = find_last_checkpoint(tmp_path / "parts")
    assert last is not None and last.name == "checkpoint-3"
    assert not list(last.glob("model*")) and not (last / "README.md").exists()
    resumed = make("parts")
    resumed.train(resume_from_checkpoint="auto")
    assert resumed.state.global_step == 5
    expected, found = weights(whole.model), weights(resumed.model)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_the_best_adapter_comes_back_at_the_end(tmp_path):
    evaluating = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    model = new_adapter("text", tmp_path / "base")
    trainer = trainer_of(
        model, tmp_path / "run", max_steps=4, learning_rate=1.0, load_best_model_at_end=True, **evaluating
    )
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert losses.index(min(losses)) < 3  # at this rate it does not stay the best
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-6)
    assert all(parameter.requires_grad for name, parameter in model.named_parameters() if "lora_" in name)


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_run_holds_an_adapter_that_auto_classes_load(tmp_path, kind):
    trainer = trainer_of(new_adapter(kind, tmp_path / "base"), tmp_path / "run")
    trainer.train()
    trainer.save_model()
    auto = AutoModelForCausalLM if kind == "text" else AutoModelForImageToImage
    assert torch.equal(prediction(auto.from_pretrained(tmp_path / "run")), prediction(trainer.model))
    card = (tmp_path / "run" / "README.md").read_text()
    assert "Energy-Based Transformer" in card and "More Information Needed" not in card


def test_a_full_disk_keeps_the_saved_adapter(tmp_path, monkeypatch):
    model = new_adapter("text", tmp_path / "base")
    trainer = trainer_of(model, tmp_path / "run")
    trainer.save_model()
    before = prediction(AutoModelForCausalLM.from_pretrained(tmp_path / "run"))

    def write_half(tensors, filename, *args, **kwargs):
        Path(filename).write_bytes(b"half a file")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("peft.peft_model.safe_save_file", write_half)
    trainer.train()
    with pytest.raises(OSError, match="No space"):
        trainer.save_model()
    assert torch.equal(prediction(AutoModelForCausalLM.from_pretrained(tmp_path / "run")), before)
    assert not list((tmp_path / "run").glob(".saving-*"))


def test_an_average_of_an_adapter_is_what_is_saved(tmp_path):
    pytest.importorskip("diffusers")
    model = new_adapter("image", tmp_path / "base")
    trainer = trainer_of(model, tmp_path / "run", (EMACallback(0.5),))
    states: list[dict[str, torch.Tensor]] = []

    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            states.append(weights(model))

    trainer.add_callback(Keep())
    trainer.train()
    name = next(name for name in states[-1] if "lora_B" in name)
    assert not torch.equal(weights(model)[name], states[-1][name])  # the average, not the last
    base = next(name for name in states[-1] if "base_layer" in name)
    assert torch.equal(weights(model)[base], states[0][base])


DISTRIBUTED = """
import sys
sys.path.insert(0, {tests!r})
import conftest
import importlib.util
spec = importlib.util.spec_from_file_location("laws", {file!r})
laws = importlib.util.module_from_spec(spec)
spec.loader.exec_module(laws)
import pathlib, torch
processes, folder = int(sys.argv[1]), pathlib.Path({folder!r})
torch.manual_seed(5)
config = laws.config_of("lora", "text", modules_to_save=["step_size"])
model = laws.get_peft_model(laws.tiny("text", candidate_init="zeros"), config)
trainer = laws.trainer_of(model, folder, per_device_train_batch_size=4 // processes, optim="sgd",
                          ddp_find_unused_parameters=False)
trainer.train()
loss = trainer.evaluate()["eval_loss"]
if trainer.is_world_process_zero():
    torch.save({{"weights": laws.weights(model), "loss": loss}}, sys.argv[2])
trainer.accelerator.wait_for_everyone()
trainer.accelerator.end_training()
"""


@pytest.mark.slow
def test_two_processes_train_the_adapter_of_one(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(
        DISTRIBUTED.format(tests=str(Path(__file__).parent), file=__file__, folder=str(tmp_path / "out"))
    )
    results = []
    for processes in (1, 2):
        path = tmp_path / f"result{processes}.pt"
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), str(script)]
        subprocess.run([sys.executable, *launch, str(processes), str(path)], check=True, timeout=300)
        results.append(torch.load(path))
    one, two = results
    for name, value in one["weights"].items():
        assert_close(two["weights"][name], value, rtol=1e-5, atol=1e-5)
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)


# ---- the scripts -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with the embedded tokenizer."""
    folder = tmp_path_factory.mktemp("text_base")
    tokenizer = AutoTokenizer.from_pretrained(str(checkpoint_path()))
    tokenizer.save_pretrained(folder)
    torch.manual_seed(1)
    EBTForCausalLM(EBTConfig(**{**TEXT, "vocab_size": len(tokenizer)})).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def image_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of colour images with its image processor."""
    folder = tmp_path_factory.mktemp("image_base")
    model = tiny("image", num_channels=3)
    model.save_pretrained(folder)
    EBTImageProcessor.from_model_config(model.config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for index in range(12):
        pixels = np.cumsum(generator.integers(0, 40, (8, 8, 3)), axis=1) % 256
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("ROMEO:\nBut soft, what light through yonder window breaks?\n\n" * 20)
    return path


@pytest.fixture
def clm(text: Path) -> Callable[..., None]:
    """Runs the script on a few lines."""

    def run(folder: Path, *options: str, steps: int = 2) -> None:
        common = ["--train_file", str(text), "--block_size", "16", "--max_eval_samples", "4", "--report_to", "none"]
        common += ["--per_device_train_batch_size", "4", "--disable_tqdm", "true", "--use_cpu", "--save_steps", "1"]
        run_clm.main(["--output_dir", str(folder), "--max_steps", str(steps), *common, *options])

    return run


@pytest.fixture
def no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cards measure the model and draw a plot: not every run here needs one."""
    for module in ("trainer", "model_card"):
        monkeypatch.setattr(f"ebt_transformers.training.{module}.write_model_card", lambda *args, **kwargs: None)


def denoise(folder: Path, pictures: Path, *options: str, steps: int = 2) -> list[str]:
    common = ["--train_file", str(pictures), "--validation_split_percentage", "25", "--use_cpu", "--report_to", "none"]
    common += ["--per_device_train_batch_size", "4", "--disable_tqdm", "true", "--save_steps", "1"]
    return ["--output_dir", str(folder), "--max_steps", str(steps), *common, *options]


@pytest.mark.parametrize("method", ["lora", "ia3"])
def test_clm_trains_and_merges_an_adapter_that_the_shell_can_use(tmp_path, clm, text_base, capsys, method):
    run = tmp_path / "run"
    clm(run, "--model_name_or_path", str(text_base), "--peft", method, "--peft_train_step_size", "--peft_merge")
    assert f"with {method.upper()}" in capsys.readouterr().out
    config = json.loads((run / "adapter_config.json").read_text())
    assert (config["peft_type"], config["modules_to_save"]) == (method.upper(), ["step_size"])
    assert not list(run.glob("model*.safetensors")) and (run / "checkpoint-2" / "adapter_model.safetensors").is_file()
    adapter = AutoModelForCausalLM.from_pretrained(run)
    merged = AutoModelForCausalLM.from_pretrained(run / "merged")
    assert not (run / "merged" / "adapter_config.json").exists()
    assert_close(prediction(merged), prediction(adapter), rtol=1e-3, atol=1e-3)
    assert float(merged.step_size()) == float(adapter.step_size()) != TEXT["step_size"]
    answers = []
    for model in (run, run / "merged"):
        assert (
            cli.main(["generate", "ROMEO:", "--model", str(model), "--max-new-tokens", "4", "--thinking-steps", "3"])
            == 0
        )
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]
    assert pipeline("text-generation", model=str(run))("ROMEO:", max_new_tokens=2, do_sample=False, thinking_steps=3)


def test_clm_goes_on_with_the_adapter_of_its_last_checkpoint(tmp_path, clm, no_card, text_base, capsys):
    options = ("--model_name_or_path", str(text_base), "--peft", "lora", "--lora_r", "2", "--lora_alpha", "3")
    clm(tmp_path / "run", *options, "--lora_dropout", "0.1", "--peft_target_modules", "all-linear")
    config = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (2, 3.0, 0.1)
    assert any(path.endswith("energy_head") for path in config["target_modules"])
    again = (*options, "--lora_dropout", "0.1", "--peft_target_modules", "all-linear")
    clm(tmp_path / "run", *again, steps=3)
    assert "checkpoint-2: going on from there" in capsys.readouterr().out
    clm(tmp_path / "run", *again, "--do_eval")
    with pytest.raises(SystemExit, match="another adapter.*r is 2 there and 3 here"):
        clm(tmp_path / "run", *(word if word != "2" else "3" for word in again))
    other = shutil.copytree(text_base, tmp_path / "other")
    with pytest.raises(SystemExit, match="another adapter.*base_model_name_or_path is .*text_base.* there"):
        clm(tmp_path / "run", *(str(other) if word == str(text_base) else word for word in again))
    with pytest.raises(SystemExit, match="holds an adapter"):
        clm(tmp_path / "run", "--model_name_or_path", str(text_base))
    with pytest.raises(SystemExit, match="is an adapter"):
        clm(tmp_path / "more", "--model_name_or_path", str(tmp_path / "run"), "--peft", "lora")


def test_clm_adapts_the_twin_as_well(tmp_path, clm, no_card, text_base):
    tokenizer = AutoTokenizer.from_pretrained(text_base)
    tokenizer.save_pretrained(tmp_path / "twin")
    shape = {name: TEXT[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    twin = AutoModelForCausalLM.from_config(transformer_pp_config("4xs", vocab_size=len(tokenizer), **shape))
    twin.save_pretrained(tmp_path / "twin")
    clm(tmp_path / "run", "--model_name_or_path", str(tmp_path / "twin"), "--peft", "lora")
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()
    with pytest.raises(SystemExit, match="has no step size"):
        options = ("--model_name_or_path", str(tmp_path / "twin"), "--peft", "lora", "--peft_train_step_size")
        clm(tmp_path / "other", *options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--peft", "lora"], "--peft adapts a trained model.*--model_name_or_path"),
        (["--model_name_or_path", "BASE", "--peft", "prefix"], "Unknown --peft 'prefix'. Allowed: lora, ia3"),
        (
            ["--model_name_or_path", "BASE", "--lora_r", "4", "--peft_merge"],
            "--lora_r, --peft_merge has an effect",
        ),
        (
            ["--model_name_or_path", "BASE", "--peft", "ia3", "--lora_r", "4"],
            "has an effect with --peft lora only",
        ),
        (["--model_name_or_path", "BASE", "--peft", "lora", "--lora_r", "0"], "--lora_r must be at least 1, got 0"),
        (["--model_name_or_path", "BASE", "--peft", "lora", "--lora_alpha", "-1"], "--lora_alpha must be above 0"),
        (
            ["--model_name_or_path", "BASE", "--peft", "lora", "--lora_dropout", "1"],
            "--lora_dropout must be at least",
        ),
        (
            ["--model_name_or_path", "BASE", "--peft", "lora", "--peft_target_modules", "q_proj", "query"],
            "has no layer 'query'. Allowed: all-linear, or some of candidate_embedding, .*q_proj",
        ),
        (
            ["--model_name_or_path", "BASE", "--peft", "lora", "--step_size_lr_multiplier", "2"],
            "needs --peft_train_step_size",
        ),
        (["--model_name_or_path", "BASE", "--peft", "lora", "--preset", "4xs"], "would change the architecture"),
        (["--trust_remote_code"], "--trust_remote_code has an effect with"),
    ],
)
def test_options_of_adapters_that_mean_nothing_are_refused(tmp_path, clm, text_base, options, message):
    filled = [word.replace("BASE", str(text_base)) for word in options]
    with pytest.raises(SystemExit, match=message):
        clm(tmp_path / "run", *filled)


def test_an_adapter_is_not_written_over_its_model(clm, text_base):
    with pytest.raises(SystemExit, match="is the folder of the model itself"):
        clm(text_base, "--model_name_or_path", str(text_base), "--peft", "lora", "--overwrite")


def test_denoise_trains_and_merges_an_adapter(tmp_path, no_card, image_base, pictures, capsys):
    run = tmp_path / "run"
    options = ("--model_name_or_path", str(image_base), "--peft", "lora", "--peft_train_step_size", "--peft_merge")
    run_denoise.main(denoise(run, pictures, *options, "--ema_decay", "0.5"))
    run_denoise.main(denoise(run, pictures, *options, "--ema_decay", "0.5", steps=3))
    said = capsys.readouterr().out
    assert "EBTForImageDenoising with LORA" in said and "checkpoint-2: going on" in said
    adapter, merged = (AutoModelForImageToImage.from_pretrained(folder) for folder in (run, run / "merged"))
    assert_close(prediction(merged), prediction(adapter), rtol=1e-4, atol=1e-4)
    picture = str(pictures / "0.png")
    results = [
        pipeline("image-denoising", model=str(folder))(picture, add_noise_level=0.1, thinking_steps=3)["image"]
        for folder in (run, run / "merged")
    ]
    assert np.abs(np.asarray(results[0], dtype=int) - np.asarray(results[1], dtype=int)).max() <= 1
    output = ["--output-dir", str(tmp_path / "clean")]
    assert cli.main(["denoise", picture, "--model", str(run), "--thinking-steps", "2", *output]) == 0
    assert list((tmp_path / "clean").glob("*.png"))
    with pytest.raises(SystemExit, match="--peft adapts a trained model"):
        run_denoise.main(denoise(tmp_path / "new", pictures, "--peft", "lora"))


@pytest.mark.parametrize("trust", [False, True])
def test_code_that_comes_with_a_model_runs_only_when_asked_for(tmp_path, clm, no_card, text_base, monkeypatch, trust):
    seen: dict[str, Any] = {}

    def watch(auto: type) -> None:
        load = auto.from_pretrained

        def from_pretrained(name, *args, **kwargs):
            seen[auto.__name__] = kwargs.get("trust_remote_code", False)
            return load(name, *args, **kwargs)

        monkeypatch.setattr(auto, "from_pretrained", from_pretrained)

    for auto in (AutoConfig, AutoTokenizer, AutoModelForCausalLM):
        watch(auto)
    clm(tmp_path / "run", "--model_name_or_path", str(text_base), *(["--trust_remote_code"] if trust else []), steps=1)
    assert seen == {"AutoConfig": trust, "AutoTokenizer": trust, "AutoModelForCausalLM": trust}


# ---- the Hub ---------------------------------------------------------------------------------------------------


PUSHED = """
import sys
sys.path.insert(0, {tests!r})
import importlib.util
spec = importlib.util.spec_from_file_location("laws", {file!r})
laws = importlib.util.module_from_spec(spec)
spec.loader.exec_module(laws)
import pathlib, torch
folder = pathlib.Path({folder!r})
laws.tiny("text").push_to_hub("user/base")
base = laws.EBTForCausalLM.from_pretrained("user/base")
model = laws.get_peft_model(base, laws.config_of("lora", "text", modules_to_save=["step_size"]))
trainer = laws.trainer_of(model, folder, push_to_hub=True, hub_model_id="user/adapter")
trainer.train()
trainer.push_to_hub()
loaded = laws.AutoModelForCausalLM.from_pretrained("user/adapter")
assert torch.equal(laws.prediction(loaded), laws.prediction(trainer.model))
"""


@pytest.mark.slow
def test_an_adapter_is_pushed_and_finds_its_base_on_the_hub(tmp_path, subprocess_env):
    from hub_server import HubServer

    script = tmp_path / "push.py"
    tests, folder = str(Path(__file__).parent), str(tmp_path / "out")
    script.write_text(PUSHED.format(tests=tests, file=__file__, folder=folder))
    with HubServer(tmp_path / "hub") as hub:
        environment = {**hub.environment(tmp_path / "home"), "PYTHONPATH": subprocess_env["PYTHONPATH"]}
        subprocess.run([sys.executable, str(script)], check=True, timeout=300, env=environment)
        pushed = hub.repositories["model", "user/adapter"]
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "user/base"
    files = pushed.commits[pushed.branches["main"]].files
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= set(files)
    assert not any(name.startswith("model") or name.endswith(".py") for name in files)
