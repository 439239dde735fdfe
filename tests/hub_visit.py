"""
What somebody without the package does on a Hub: run by `test_hub.py` in a process of its own, under `HF_ENDPOINT`.

    python hub_visit.py EXPECTED models|everything

checks that what is on the Hub gives what `hub_publish.py` wrote to EXPECTED.
"""

import sys


sys.modules["ebt_transformers"] = None  # type: ignore[assignment]  # what is None here cannot be imported
sys.modules["diffusers"] = None  # type: ignore[assignment]  # nor is this needed

import torch  # noqa: E402
from huggingface_hub import constants  # noqa: E402


constants.DOWNLOAD_CHUNK_SIZE = 4096  # what a broken download keeps is whole chunks; files here are smaller than one

import numpy as np  # noqa: E402
from transformers import AutoModelForCausalLM, AutoModelForImageToImage, pipeline  # noqa: E402


TRUSTING = {"trust_remote_code": True}
CLOSE = {"rtol": 1e-3, "atol": 1e-3}  # weights mapped from a file are aligned differently: other matrix kernels


def load_models(expected: dict[str, torch.Tensor]) -> None:
    """A text model by its tag, whose weights are no longer those of main; an image model; a trainer's."""
    text = AutoModelForCausalLM.from_pretrained("user/text", revision="v1", **TRUSTING)
    image = AutoModelForImageToImage.from_pretrained("user/image", **TRUSTING)
    trained = AutoModelForCausalLM.from_pretrained("user/trained", **TRUSTING)
    with torch.no_grad():
        torch.testing.assert_close(text(expected["ids"], thinking_steps=3).logits, expected["logits"], **CLOSE)
        found = image(expected["noisy"], thinking_steps=3).reconstruction
        torch.testing.assert_close(found, expected["images"], **CLOSE)
        assert torch.isfinite(trained(expected["ids"]).logits).all()


def load_pipelines(expected: dict[str, torch.Tensor]) -> None:
    """One that writes, and two that denoise: by its task, and without saying what it does."""
    writer = pipeline("text-generation", model="user/pipe", thinking_steps=3, device="cpu", **TRUSTING)
    prompt = writer.tokenizer.decode(expected["ids"][0])
    written = writer(prompt, max_new_tokens=4, do_sample=False)[0]["generated_text"]
    assert written == writer.tokenizer.decode(expected["tokens"][0]), written

    picture = np.random.default_rng(0).integers(0, 256, (20, 12, 3), dtype=np.uint8)
    results = []
    for repository, task in (("user/denoiser", "image-denoising"), ("user/denoiser-again", None)):
        denoiser = pipeline(task, model=repository, device="cpu", **TRUSTING)
        assert denoiser.image_processor.do_resize, "the saved processor was not loaded"
        results.append(denoiser(picture, thinking_steps=2, output_energies=True))
        assert results[-1]["image"].size == (16, 16) and len(results[-1]["energies"]) == 3
    np.testing.assert_allclose(results[0]["energies"], results[1]["energies"], rtol=1e-5)


def main(path: str, what: str) -> None:
    """Load, and compare."""
    expected = torch.load(path)
    load_models(expected)
    if what == "everything":
        load_pipelines(expected)
    assert not any(name.startswith("ebt_transformers.") for name in sys.modules)
    print("loaded without the package")


if __name__ == "__main__":
    main(*sys.argv[1:])
