"""
What somebody with the package does on a Hub: run by `test_hub.py` in a process of its own, under `HF_ENDPOINT`.

    python hub_publish.py REPORT EXPECTED

writes what came back as JSON to REPORT, and what the pushed models give to EXPECTED.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from transformers import AutoImageProcessor, AutoModelForCausalLM, AutoModelForImageToImage, AutoTokenizer, pipeline
from transformers.utils import cached_file

from ebt_transformers import (
    EBTConfig,
    EBTForCausalLM,
    EBTForImageDenoising,
    EBTImageConfig,
    EBTImageProcessor,
    EBTTrainer,
    EBTTrainingArguments,
)
from ebt_transformers.assets import checkpoint_path


BY_HAND = "---\nlicense: apache-2.0\ntags: [mine]\n---\n\n# Written by hand\n"
IDS = torch.tensor([[3, 1, 4, 1, 5]])


def text_model(seed: int) -> EBTForCausalLM:
    """A tiny one that takes the ids of the shipped tokenizer."""
    torch.manual_seed(seed)
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return EBTForCausalLM(EBTConfig(vocab_size=1024, max_position_embeddings=64, **size)).eval()


def image_model() -> EBTForImageDenoising:
    """A tiny one, its energy away from the flat start."""
    torch.manual_seed(1)
    size = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = EBTForImageDenoising(EBTImageConfig(**size)).eval()
    with torch.no_grad():
        for parameter in model.model.parameters():
            parameter.normal_(std=0.3)
    return model


def logits(model: EBTForCausalLM) -> torch.Tensor:
    """What is compared of a text model."""
    with torch.no_grad():
        return model(IDS, thinking_steps=3).logits


def gives_the_same(model: EBTForCausalLM, repository: str, **options: Any) -> bool:
    """Whether what is loaded from the Hub is that model."""
    loaded = AutoModelForCausalLM.from_pretrained(repository, **options)
    return torch.allclose(logits(loaded), logits(model), rtol=1e-3, atol=1e-3)


def error(function: Callable[[], Any]) -> str:
    """What a call raises."""
    try:
        function()
    except Exception as raised:  # whatever it is: the test looks at the words
        return f"{type(raised).__name__}: {raised}"
    return ""


def push_revisions(api: HfApi) -> dict[str, Any]:
    """Three models in one repository: tagged, on a branch, and last on main, where the card was written by hand."""
    first, second, third = (text_model(seed) for seed in (1, 2, 3))
    commit = first.push_to_hub("user/text", tags=["toy"]).oid
    AutoTokenizer.from_pretrained(checkpoint_path()).push_to_hub("user/text")
    new_card = api.model_info("user/text")
    api.create_tag("user/text", tag="v1")
    second.push_to_hub("user/text", revision="second")
    api.upload_file(path_or_fileobj=BY_HAND.encode(), path_in_repo="README.md", repo_id="user/text")
    third.push_to_hub("user/text", commit_message="Better weights")
    kept_card = api.model_info("user/text")
    return {
        "new_card": {"tags": new_card.tags, "task": new_card.pipeline_tag, "library": new_card.library_name},
        "kept_card": {"tags": kept_card.tags, "task": kept_card.pipeline_tag, "library": kept_card.library_name},
        "titles": [entry.title for entry in api.list_repo_commits("user/text")],
        "main": gives_the_same(third, "user/text"),
        "tag": gives_the_same(first, "user/text", revision="v1"),
        "branch": gives_the_same(second, "user/text", revision="second"),
        "commit": gives_the_same(first, "user/text", revision=commit),
        "main_is_not_the_first": not gives_the_same(first, "user/text"),
        "class_tags": EBTForCausalLM.model_tags,
    }


def push_images(folder: Path) -> dict[str, Any]:
    """A model and a processor, and both as a pipeline."""
    model = image_model()
    processor = EBTImageProcessor.from_model_config(model.config, do_resize=True, size=16)
    model.push_to_hub("user/image")
    processor.push_to_hub("user/image")
    denoiser = pipeline("image-denoising", model=model, image_processor=processor, device="cpu")
    denoiser.push_to_hub("user/denoiser", tags=["toy"])
    denoiser.save_pretrained(folder / "denoiser", push_to_hub=True, repo_id="user/denoiser-again")
    torch.manual_seed(0)
    noisy = torch.randn(2, 3, 8, 8)
    loaded = AutoModelForImageToImage.from_pretrained("user/image")
    with torch.no_grad():
        images, found = (one(noisy, thinking_steps=3).reconstruction for one in (model, loaded))
    again = pipeline("image-denoising", model="user/denoiser", device="cpu")
    return {
        "expected": {"noisy": noisy, "images": images},
        "model": torch.allclose(images, found, rtol=1e-3, atol=1e-3),
        "processor": AutoImageProcessor.from_pretrained("user/image").to_dict() == processor.to_dict(),
        "pipeline": type(again).__module__ + str(again.image_processor.size),
    }


def push_a_run(folder: Path) -> dict[str, Any]:
    """A short training run that pushes on its way and at its end."""
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(0, 1024, (4, 8))]
    size = {"max_steps": 2, "per_device_train_batch_size": 2, "use_cpu": True, "report_to": "none", "save_steps": 1}
    hub = {"push_to_hub": True, "hub_model_id": "user/trained", "hub_strategy": "every_save", "hub_always_push": True}
    trainer = EBTTrainer(
        text_model(1),
        EBTTrainingArguments(str(folder / "run"), save_strategy="steps", **size, **hub),
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(checkpoint_path()),
    )
    trainer.train()
    trainer.push_to_hub(dataset="rows of numbers")
    return {"same": gives_the_same(trainer.model.eval(), "user/trained")}


def main(report: Path, expected: Path) -> None:
    """Push, load again, and say what came of it."""
    api = HfApi()
    found = {"text": push_revisions(api), "image": push_images(report.parent), "run": push_a_run(report.parent)}
    text = pipeline("text-generation", model=text_model(4), tokenizer=AutoTokenizer.from_pretrained(checkpoint_path()))
    text.push_to_hub("user/pipe", tags=text.model.model_tags)
    text.model.push_to_hub("user/secret", private=True)
    found["errors"] = {
        "repository": error(lambda: AutoModelForCausalLM.from_pretrained("user/nobody")),
        "revision": error(lambda: AutoModelForCausalLM.from_pretrained("user/text", revision="v9")),
        "file": error(lambda: cached_file("user/image", "model-2.safetensors")),
        "secret": error(lambda: AutoModelForCausalLM.from_pretrained("user/secret", token=False)),
    }
    found["secret"] = gives_the_same(text.model, "user/secret")
    with torch.no_grad():
        tokens = text.model.generate(IDS, max_new_tokens=4, do_sample=False, thinking_steps=3)
    torch.save(
        {"ids": IDS, "logits": logits(text_model(1)), "tokens": tokens, **found["image"].pop("expected")}, expected
    )
    report.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
