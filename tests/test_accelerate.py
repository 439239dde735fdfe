"""Laws of `accelerate launch`: it starts our training scripts and TRL's trainer, and two processes equal one."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ebt_transformers.assets import example_picture_path, shakespeare_path


# accelerate has no launcher for several processes on one CPU machine but this one, whatever its name says
SEVERAL = ["--multi_gpu", "--main_process_port", "0"]
# tiny, and with the same starts of the candidates, however the rows are distributed
TEXT_MODEL = "hidden_size=16,num_hidden_layers=1,num_attention_heads=2,intermediate_size=16,candidate_init_std=0.0"
IMAGE_MODEL = "hidden_size=16,num_hidden_layers=1,num_attention_heads=2"
CLM = ["--tokenizer_name", "tiny_shakespeare", "--block_size", "32", "--step_size", "5"]
CLM += ["--config_overrides", TEXT_MODEL]
DENOISE = ["--image_size", "8", "--patch_size", "4", "--config_overrides", IMAGE_MODEL]
COMMON = ["--use_cpu", "--max_steps", "2", "--report_to", "none", "--save_strategy", "no", "--learning_rate", "1e-3"]
COMMON += ["--logging_steps", "1"]  # what is logged is gathered from all processes

SFT = """
import sys

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import ebt_transformers
from ebt_transformers.assets import checkpoint_path

folder, rows = sys.argv[1], int(sys.argv[2])
model = AutoModelForCausalLM.from_pretrained(checkpoint_path())
model.config.candidate_init_std = 0.0  # the same starts, however the rows are distributed
texts = ["ROMEO:\\nWhat light through yonder window breaks?", "JULIET:\\nAy me!", "NURSE:\\nMadam!", "ROMEO:\\nHush."]
trainer = SFTTrainer(
    model,
    SFTConfig(folder, use_cpu=True, bf16=False, report_to="none", max_steps=2, per_device_train_batch_size=rows,
              optim="sgd", learning_rate=1e-2, save_strategy="no", logging_steps=1),
    train_dataset=Dataset.from_dict({"text": texts}),
    processing_class=AutoTokenizer.from_pretrained(checkpoint_path()),
)
trainer.train()
trainer.save_model()
trainer.save_state()
print("processes", trainer.accelerator.num_processes)
trainer.accelerator.wait_for_everyone()
trainer.accelerator.end_training()
"""


def launch(processes: int, env: dict[str, str], *script: str) -> str:
    """Runs `accelerate launch` with a script (or `-m module`) and its arguments; what it printed."""
    kind = SEVERAL if processes > 1 else ["--cpu"]
    options = ["--num_processes", str(processes), "--num_machines", "1", "--mixed_precision", "no"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *kind, *options, "--dynamo_backend", "no", *script]
    done = subprocess.run(command, env={**env, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(one: Any, two: Any) -> None:
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text(shakespeare_path().read_text(encoding="utf-8")[:6000], encoding="utf-8")
    return str(path)


def train_clm(processes: int, env: dict[str, str], text: str, folder: Path) -> dict[str, Any]:
    data = ["--train_file", text, "--per_device_train_batch_size", str(4 // processes), "--optim", "sgd"]
    script = ["-m", "ebt_transformers.training.run_clm", "--output_dir", str(folder), *data, *CLM, *COMMON]
    launch(processes, env, *script)
    return json.loads((folder / "all_results.json").read_text())


def test_one_process_trains_a_model(subprocess_env: dict[str, str], text: str, tmp_path: Path) -> None:
    results = train_clm(1, subprocess_env, text, tmp_path / "one")
    assert results["eval_loss"] > 0 and "step_size.value" in weights(tmp_path / "one")


@pytest.mark.slow
def test_two_processes_of_run_clm_equal_one(subprocess_env: dict[str, str], text: str, tmp_path: Path) -> None:
    one, two = (train_clm(processes, subprocess_env, text, tmp_path / str(processes)) for processes in (1, 2))
    assert two["eval_loss"] == pytest.approx(one["eval_loss"], rel=1e-4)
    assert two["train_loss"] == pytest.approx(one["train_loss"], rel=1e-4)
    same(weights(tmp_path / "1"), weights(tmp_path / "2"))


@pytest.mark.slow
def test_two_processes_of_run_denoise_train_one_model(subprocess_env: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    picture = Image.open(example_picture_path()).convert("RGB")
    for index in range(16):
        picture.crop((8 * index, 0, 8 * index + 8, 8)).save(folder / f"{index}.png")
    data = ["--train_file", str(folder), "--per_device_train_batch_size", "2"]
    script = ["-m", "ebt_transformers.training.run_denoise", "--output_dir", str(tmp_path / "out"), *data]
    launch(2, subprocess_env, *script, *DENOISE, *COMMON)
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    # two steps of two pictures in each of two processes
    assert results["train_samples_per_second"] == pytest.approx(8 / results["train_runtime"], rel=0.02)
    assert all(torch.isfinite(value).all() for value in weights(tmp_path / "out").values())


@pytest.mark.slow
def test_two_processes_of_trl_equal_one(subprocess_env: dict[str, str], tmp_path: Path) -> None:
    pytest.importorskip("trl")
    script = tmp_path / "sft.py"
    script.write_text(SFT, encoding="utf-8")
    logs = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        printed = launch(processes, subprocess_env, str(script), str(folder), str(4 // processes))
        assert f"processes {processes}" in printed
        logs.append(json.loads((folder / "trainer_state.json").read_text())["log_history"])
    for first, second in zip(*logs, strict=True):
        for name in ("loss", "entropy", "mean_token_accuracy", "num_tokens", "grad_norm"):
            if name in first:
                assert second[name] == pytest.approx(first[name], rel=1e-3), name
    same(weights(tmp_path / "1"), weights(tmp_path / "2"))
