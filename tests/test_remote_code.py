"""Law: a saved model carries its code, and loads with `trust_remote_code` where this package is not installed."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ebt_transformers import EBTForImageDenoising, EBTImageConfig


# without the package: a name that is None in `sys.modules` cannot be imported
SCRIPT = """
import sys
sys.modules["ebt_transformers"] = None
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageToImage

folder, again = sys.argv[1:3]
trusting = {"trust_remote_code": True}
text = AutoModelForCausalLM.from_pretrained(folder + "/text", **trusting)
image = AutoModelForImageToImage.from_pretrained(folder + "/image", **trusting)
expected = torch.load(folder + "/expected.pt")


# close, not equal: weights mapped from a file are aligned differently, which picks other matrix kernels
def check(text, image):
    with torch.no_grad():
        for got, name in (
            (text(expected["ids"], thinking_steps=3).logits, "logits"),
            (image(expected["noisy"], thinking_steps=3).reconstruction, "images"),
            (image.energy(expected["noisy"]), "energies"),
        ):
            torch.testing.assert_close(got, expected[name], rtol=1e-3, atol=1e-3)
    tokens = text.generate(expected["ids"], max_new_tokens=2, do_sample=False)
    assert torch.equal(tokens, expected["tokens"])


check(text, image)
for model in (text, image):
    model.train()
    inputs = (expected["ids"],) if model is text else (expected["noisy"],)
    model(*inputs, labels=inputs[0]).loss.backward()
    model.eval()
# what was loaded this way is saved with its code, too
text.save_pretrained(again + "/text")
image.save_pretrained(again + "/image")
check(
    AutoModelForCausalLM.from_pretrained(again + "/text", **trusting),
    AutoModelForImageToImage.from_pretrained(again + "/image", **trusting),
)
assert AutoConfig.from_pretrained(again + "/image", **trusting).model_type == "ebt_image"
assert not any(name.startswith("ebt_transformers.") for name in sys.modules)
print("loaded without the package")
"""


@pytest.fixture
def saved(make_model: Callable, tmp_path: Path) -> Path:
    """A text and an image model, and what they give."""
    text = make_model()
    torch.manual_seed(1)
    image = EBTForImageDenoising(
        EBTImageConfig(image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    ).eval()
    with torch.no_grad():
        for parameter in image.model.parameters():
            parameter.normal_(std=0.3)
    ids, noisy = torch.tensor([[3, 1, 4, 1, 5]]), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        expected = {
            "ids": ids,
            "noisy": noisy,
            "logits": text(ids, thinking_steps=3).logits,
            "images": image(noisy, thinking_steps=3).reconstruction,
            "energies": image.energy(noisy),
            "tokens": text.generate(ids, max_new_tokens=2, do_sample=False),
        }
    text.save_pretrained(tmp_path / "text")
    image.save_pretrained(tmp_path / "image")
    torch.save(expected, tmp_path / "expected.pt")
    return tmp_path


def test_a_checkpoint_carries_real_files_and_nothing_of_the_package(saved: Path) -> None:
    for kind in ("text", "image"):
        files = {path.name: path.read_text(encoding="utf-8") for path in (saved / kind).glob("*.py")}
        assert "class EBTBaseConfig" in files["base_ebt.py"]
        assert "class ThinkingConfig" in files["thinking_ebt.py"]
        imports = [
            f"{name}: {line}"
            for name, content in files.items()
            for line in content.splitlines()
            if line.lstrip().startswith(("from ebt_transformers", "import ebt_transformers", "from .."))
        ]
        assert imports == []
    assert "class EBTConfig" in (saved / "text" / "configuration_ebt.py").read_text(encoding="utf-8")
    assert "class EBTImageConfig" in (saved / "image" / "configuration_ebt_image.py").read_text(encoding="utf-8")


def test_saved_models_load_think_train_and_save_without_the_package(saved: Path, tmp_path: Path) -> None:
    cache = {"HF_HOME": str(tmp_path / "home"), "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    (tmp_path / "again").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(saved), str(tmp_path / "again")],
        env={**os.environ, **cache, "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "loaded without the package" in done.stdout
