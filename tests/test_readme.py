"""Laws of what the README says of the shipped model. That its code runs is tested in `test_docs.py`."""

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from ebt_transformers import EBTForCausalLM, perplexity_by_steps
from ebt_transformers.assets import checkpoint_path
from ebt_transformers.training.data import held_out_blocks


ROOT = Path(__file__).resolve().parent.parent


def test_the_shipped_model_is_small_and_carries_no_code() -> None:
    files = {path.name: path.stat().st_size for path in checkpoint_path().iterdir()}
    assert files["model.safetensors"] <= 10_000_000
    assert {"README.md", "config.json", "generation_config.json", "results.json", "tokenizer.json"} <= set(files)
    assert not [name for name in files if name.endswith(".py")]


def test_the_recorded_losses_of_the_shipped_model_are_its_losses() -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint_path()).eval()
    assert isinstance(model, EBTForCausalLM)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint_path())
    recorded = json.loads((checkpoint_path() / "results.json").read_text(encoding="utf-8"))
    # part of the split: enough to notice other weights, or another way of computing
    blocks = held_out_blocks(tokenizer, 256)
    measured = perplexity_by_steps(model, blocks, steps=(1, 2, 4, 8), progress_bar=False)
    for count, loss in recorded["ebt"]["test_loss_by_steps"].items():
        assert torch.tensor(measured[int(count)]).log().item() == pytest.approx(loss, abs=2e-3)


def test_the_shipped_model_writes_words_with_every_number_of_steps() -> None:
    text = (ROOT / "assets" / "tiny_shakespeare.txt").read_text(encoding="utf-8").lower()
    known = set(re.findall(r"[a-z']+", text))
    generator = pipeline("text-generation", model=str(checkpoint_path()))
    for steps in (1, 2, 4, 8):
        torch.manual_seed(0)
        output = generator("ROMEO:\n", thinking_steps=steps, max_new_tokens=50, return_full_text=False)
        words = re.findall(r"[a-z']+", output[0]["generated_text"].lower())
        assert len(words) >= 10
        # the first and the last word may be cut
        assert sum(word in known for word in words) / len(words) > 0.7
