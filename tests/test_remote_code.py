"""Law: a saved model carries its code, and loads with `trust_remote_code` where this package is not installed."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, pipeline

from ebt_transformers import EBTForImageDenoising, EBTImageConfig, EBTImageProcessor
from ebt_transformers.assets import checkpoint_path


# without the package: a name that is None in `sys.modules` cannot be imported
SCRIPT = """
import sys
sys.modules["ebt_transformers"] = None
sys.modules["diffusers"] = None  # for latents and for making noise; nothing else may need it
import numpy as np
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageToImage, pipeline

folder, again = sys.argv[1:3]
trusting = {"trust_remote_code": True}
text = AutoModelForCausalLM.from_pretrained(folder + "/text", **trusting)
image = AutoModelForImageToImage.from_pretrained(folder + "/image", **trusting)
proposing = AutoModelForCausalLM.from_pretrained(folder + "/proposing", **trusting)
expected = torch.load(folder + "/expected.pt")


# close, not equal: weights mapped from a file are aligned differently, which picks other matrix kernels
def check(text, image, proposing):
    with torch.no_grad():
        for got, name in (
            (text(expected["ids"], thinking_steps=3).logits, "logits"),
            (image(expected["noisy"], thinking_steps=3).reconstruction, "images"),
            (image.energy(expected["noisy"]), "energies"),
            (proposing(expected["ids"], thinking_steps=0).logits, "proposal"),
            (proposing(expected["ids"], thinking_steps=3).logits, "refined"),
        ):
            torch.testing.assert_close(got, expected[name], rtol=1e-3, atol=1e-3)
    tokens = text.generate(expected["ids"], max_new_tokens=2, do_sample=False)
    assert torch.equal(tokens, expected["tokens"])


check(text, image, proposing)
for model in (text, image, proposing):
    model.train()
    inputs = (expected["noisy"],) if model is image else (expected["ids"],)
    model(*inputs, labels=inputs[0]).loss.backward()
    model.eval()
# what was loaded this way is saved with its code, too
text.save_pretrained(again + "/text")
image.save_pretrained(again + "/image")
proposing.save_pretrained(again + "/proposing")
check(
    AutoModelForCausalLM.from_pretrained(again + "/text", **trusting),
    AutoModelForImageToImage.from_pretrained(again + "/image", **trusting),
    AutoModelForCausalLM.from_pretrained(again + "/proposing", **trusting),
)

# pipelines: a saved folder says itself what it is for, and is saved again with its code
picture = np.zeros((12, 9, 3), dtype=np.uint8)
denoiser = pipeline(model=folder + "/denoiser", **trusting)
assert denoiser.image_processor.do_resize
energies = denoiser(picture, thinking_steps=2, output_energies=True)["energies"]
np.testing.assert_allclose(energies, expected["denoiser_energies"], rtol=1e-3, atol=1e-3)
denoiser.save_pretrained(again + "/denoiser")
denoiser = pipeline("image-denoising", model=again + "/denoiser", **trusting)
found = denoiser(picture, thinking_steps=2, output_energies=True)
assert found["image"].size == (16, 16) and np.allclose(found["energies"], energies, rtol=1e-3, atol=1e-3)
denoiser.model.save_pretrained(again + "/model_of_a_pipeline")
AutoModelForImageToImage.from_pretrained(again + "/model_of_a_pipeline", **trusting)
writer = pipeline("text-generation", model=folder + "/writer", thinking_steps=3, **trusting)
assert writer("ROMEO:", max_new_tokens=3, do_sample=False)[0]["generated_text"] == expected["written"]

assert AutoConfig.from_pretrained(again + "/image", **trusting).model_type == "ebt_image"
assert not any(name.startswith("ebt_transformers.") for name in sys.modules)
print("loaded without the package")
"""


@pytest.fixture
def saved(make_model: Callable, tmp_path: Path) -> Path:
    """Two text models and an image model, also as pipelines, and what they give."""
    text, proposing = make_model(), make_model(candidate_init="proposal", update="residual")
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
            "proposal": proposing(ids, thinking_steps=0).logits,
            "refined": proposing(ids, thinking_steps=3).logits,
            "tokens": text.generate(ids, max_new_tokens=2, do_sample=False),
        }
    text.save_pretrained(tmp_path / "text")
    image.save_pretrained(tmp_path / "image")
    proposing.save_pretrained(tmp_path / "proposing")
    processor = EBTImageProcessor.from_model_config(image.config, do_resize=True, size=16)
    denoiser = pipeline("image-denoising", model=image, image_processor=processor, device="cpu")
    denoiser.save_pretrained(tmp_path / "denoiser")
    picture = np.zeros((12, 9, 3), dtype=np.uint8)
    expected["denoiser_energies"] = denoiser(picture, thinking_steps=2, output_energies=True)["energies"]
    tokenizer = AutoTokenizer.from_pretrained(checkpoint_path())
    writer = pipeline("text-generation", model=make_model(vocab_size=1024), tokenizer=tokenizer, device="cpu")
    writer.save_pretrained(tmp_path / "writer")
    written = writer("ROMEO:", max_new_tokens=3, do_sample=False, thinking_steps=3)
    expected["written"] = written[0]["generated_text"]
    torch.save(expected, tmp_path / "expected.pt")
    return tmp_path


def test_a_checkpoint_carries_real_files_and_nothing_of_the_package(saved: Path) -> None:
    for kind in ("text", "image", "proposing", "denoiser", "writer"):
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


def test_a_distributed_model_is_saved_with_its_own_code(make_model: Callable, tmp_path: Path) -> None:
    from torch import distributed
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import fully_shard

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = make_model()
        model.save_pretrained(tmp_path / "before")
        sharded = fully_shard(model)
        whole = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True))
        sharded.save_pretrained(tmp_path / "after", state_dict=whole)
        assert type(sharded).__name__ == "FSDPEBTForCausalLM"  # as it was
    finally:
        distributed.destroy_process_group()
    before, after = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("before", "after")
    )
    assert before == after
