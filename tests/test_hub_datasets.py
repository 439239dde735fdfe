"""Laws of data on the Hub: both training scripts read it over HTTP, whole or as a stream, and push what they learn."""

import io
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest


sys.path.insert(0, str(Path(__file__).parent))

from hub_server import HubServer  # noqa: E402


pytestmark = pytest.mark.slow

COMMON = "--use_cpu --disable_tqdm true --report_to none --max_steps 2 --per_device_train_batch_size 2"
TEXT_SIZE = "hidden_size=16,intermediate_size=16,num_hidden_layers=1,num_attention_heads=2"
TEXT = f"--tokenizer_name tiny_shakespeare --block_size 16 --config_overrides {TEXT_SIZE}"
IMAGES = "--image_size 8 --patch_size 4 --config_overrides hidden_size=16,num_hidden_layers=1,num_attention_heads=2"


def parquet(table: datasets.Dataset) -> bytes:
    """A data set as one file."""
    file = io.BytesIO()
    table.to_parquet(file)
    return file.getvalue()


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    """A Hub with a data set of texts and one of images."""
    texts = datasets.Dataset.from_dict({"text": [f"Speak, speak number {number}. " * 8 for number in range(40)]})
    noise = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
    pictures = datasets.Features({"image": datasets.Image()})
    images = datasets.Dataset.from_dict({"image": [PIL.Image.fromarray(one) for one in noise]}, features=pictures)
    with HubServer(tmp_path_factory.mktemp("hub")) as hub:
        split = "data/{}-00000-of-00001.parquet"
        hub.put("dataset", "user/texts", {split.format("train"): parquet(texts)})
        hub.put("dataset", "user/images", {split.format("train"): parquet(images)})
        yield hub


@pytest.fixture
def train(hub: HubServer, subprocess_env: dict[str, str], tmp_path: Path) -> Callable[[str], str]:
    """Runs `ebt train` against that Hub."""

    def run(options: str) -> str:
        env = {**hub.environment(tmp_path / "home"), "PYTHONPATH": subprocess_env["PYTHONPATH"]}
        command = [sys.executable, "-m", "ebt_transformers.cli", "train", *options.split(), "--output_dir", "run"]
        done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout

    return run


@pytest.mark.parametrize("streaming", ["", "--streaming"])
def test_text_of_the_hub_trains_a_model(train: Callable[[str], str], hub: HubServer, streaming: str) -> None:
    hub.requests.clear()
    assert "Saved to run" in train(f"clm --dataset_name user/texts {streaming} {TEXT} {COMMON}")
    in_ranges = [asked is not None for method, path, asked in hub.requests if "large-files" in path]
    assert in_ranges and all(in_ranges) == bool(streaming)  # a stream reads parts of the file, and keeps none


@pytest.mark.parametrize("streaming", ["", "--streaming"])
def test_images_of_the_hub_train_a_denoiser_that_is_pushed(
    train: Callable[[str], str], hub: HubServer, streaming: str
) -> None:
    push = "--push_to_hub --hub_model_id user/denoiser"
    assert "Saved to run" in train(f"denoise --dataset_name user/images {streaming} {IMAGES} {COMMON} {push}")
    repository = hub.repositories.pop(("model", "user/denoiser"))
    files = repository.commits[repository.branches["main"]].files
    assert {"model.safetensors", "preprocessor_config.json", "modeling_ebt_image.py", "README.md"} <= set(files)
    card = (hub.folder / files["README.md"].oid).read_text(encoding="utf-8")
    assert "- user/images" in card and "image-to-image" in card and "energy-based-model" in card
