"""Laws of images read while training: the same run however it is read, and every source gives the same pictures."""

import io
import json
import math
import subprocess
import sys
import tarfile
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ebt_transformers.training import run_denoise
from ebt_transformers.training.image_streams import ImageStream, LatentStream
from ebt_transformers.training.images import (
    ImageCut,
    Images,
    NoisyImageCollator,
    first_images,
    load_image_files,
    load_image_set,
    select_images,
)


diffusers = pytest.importorskip("diffusers")

SIDE = 8
COUNT = 10


def picture(index: int, side: int = SIDE) -> Image.Image:
    """Noise of its own for every number."""
    return Image.fromarray(np.random.default_rng(index).integers(0, 256, (side, side, 3), dtype=np.uint8))


def encoded(image: Image.Image, kind: str = "png", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def table(count: int = COUNT, side: int = SIDE) -> datasets.Dataset:
    rows = {"image": [picture(index, side) for index in range(count)], "label": list(range(count))}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    return datasets.Dataset.from_dict(rows, features=features)


def stream(count: int = COUNT, shards: int = 3, cut: ImageCut | None = None, **options: object) -> ImageStream:
    source = select_images(table(count).to_iterable_dataset(num_shards=shards))
    return ImageStream(source, cut or ImageCut((SIDE, SIDE)), **options)


def pixels_of(images: ImageStream, count: int) -> list[tuple[float, ...]]:
    return [tuple(item.pixels.flatten().tolist()) for item in islice(images, count)]


def batches(images: ImageStream, count: int, workers: int, size: int) -> list[dict[str, torch.Tensor]]:
    loader = torch.utils.data.DataLoader(images, size, num_workers=workers, collate_fn=NoisyImageCollator(0.1))
    return list(islice(loader, count))


# ---- the order -------------------------------------------------------------------------------------------------


def test_a_stream_in_order_is_the_table_again_and_again():
    expected = [Images(select_images(table()), (SIDE, SIDE))[index].pixels for index in range(COUNT)]
    found = list(islice(stream(), 2 * COUNT))
    assert all(torch.equal(item.pixels, expected[place % COUNT]) for place, item in enumerate(found))
    assert [item.key for item in found] == [(0, place // COUNT, place % COUNT) for place in range(2 * COUNT)]


def test_every_pass_sees_every_image_once_in_an_order_of_its_own():
    everything = sorted(pixels_of(stream(), COUNT))
    found = pixels_of(stream(shuffle_buffer_size=5, seed=4), 3 * COUNT)
    passes = [found[start : start + COUNT] for start in range(0, 3 * COUNT, COUNT)]
    assert all(sorted(one) == everything for one in passes)
    assert passes[0] != passes[1] != passes[2] != passes[0]
    assert found == pixels_of(stream(shuffle_buffer_size=5, seed=4), 3 * COUNT)
    assert found != pixels_of(stream(shuffle_buffer_size=5, seed=5), 3 * COUNT)


def test_batches_are_the_same_with_any_number_of_workers():
    cut = ImageCut((SIDE - 2, SIDE - 2), resize_to=0, random_crop=True, horizontal_flip=True)
    options = {"cut": cut, "shuffle_buffer_size": 4, "batch_size": 4}
    expected = batches(stream(**options), 7, workers=0, size=4)  # two passes and a half; batches span them
    for workers in (1, 3):
        found = batches(stream(**options), 7, workers, size=4)
        for one, other in zip(expected, found, strict=True):
            assert all(torch.equal(one[name], other[name]) for name in one)
    assert not torch.equal(expected[0]["pixel_values"], expected[0]["labels"])


def test_noise_and_crops_follow_from_the_image_not_from_its_batch():
    options = {"cut": ImageCut((4, 4), resize_to=0, random_crop=True), "shuffle_buffer_size": 4}
    small, large = (batches(stream(**options), 24 // size, 0, size) for size in (3, 8))
    for name in ("pixel_values", "labels"):
        assert torch.equal(torch.cat([batch[name] for batch in small]), torch.cat([batch[name] for batch in large]))


def tiny_vae() -> torch.nn.Module:
    torch.manual_seed(3)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return diffusers.AutoencoderKL(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, **blocks).eval()


def test_latents_of_a_stream_are_those_of_its_images():
    vae = tiny_vae()
    images = stream(batch_size=3)
    for item, latent in zip(images, islice(LatentStream(images, vae), COUNT + 2), strict=False):
        expected = vae.encode(item.pixels[None]).latent_dist.mean[0] * vae.config.scaling_factor
        torch.testing.assert_close(latent.pixels, expected, rtol=1e-4, atol=1e-5)
        assert latent.key == item.key


def test_the_beginning_is_a_table():
    source = select_images(table().to_iterable_dataset(num_shards=3))
    held = Images(first_images(source, 4), (SIDE, SIDE))
    assert [tuple(held[index].pixels.flatten().tolist()) for index in range(len(held))] == pixels_of(stream(), 4)
    with pytest.raises(ValueError, match="no image to evaluate on"):
        first_images(source.take(0), 4)


# ---- sources ---------------------------------------------------------------------------------------------------


def write_tar(path: Path, numbers: range) -> None:
    """A shard as WebDataset writes it: files of one name belong together."""
    with tarfile.open(path, "w") as archive:
        for number in numbers:
            for ending, content in (("png", encoded(picture(number))), ("cls", str(number).encode())):
                member = tarfile.TarInfo(f"{number:04d}.{ending}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """The same pictures in every form."""
    root = tmp_path_factory.mktemp("sources")
    table().to_parquet(root / "images.parquet")
    datasets.DatasetDict({"train": table()}).save_to_disk(root / "saved")
    for number in range(COUNT):
        for folder in ("flat", f"classes/train/{'even' if number % 2 == 0 else 'odd'}", "described"):
            (root / folder).mkdir(parents=True, exist_ok=True)
            picture(number).save(root / folder / f"{number:04d}.png")
    lines = [f"{number:04d}.png,picture {number}" for number in range(COUNT)]
    (root / "described" / "metadata.csv").write_text("file_name,text\n" + "\n".join(lines) + "\n")
    write_tar(root / "shard-0.tar", range(6))
    write_tar(root / "shard-1.tar", range(6, COUNT))
    return root


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "name", ["images.parquet", "saved", "flat", "flat/*.png", "classes", "described", "shard-*.tar"]
)
def test_every_source_gives_the_same_pictures_streamed_or_not(sources, name, streaming):
    tables = [load_image_set(str(sources / name), streaming=streaming)]
    if name not in ("saved", "described"):
        tables.append(load_image_files({"train": [str(sources / name)]}, streaming))
    for loaded in tables:
        chosen = select_images(loaded["train"])
        rows = first_images(chosen, 99) if streaming else chosen
        images = Images(rows, (SIDE, SIDE))
        assert sorted(tuple(image.pixels.flatten().tolist()) for image in images) == sorted(pixels_of(stream(), COUNT))


def test_folders_of_splits_are_splits_and_never_mixed(tmp_path):
    for folder, numbers in (("train", range(4)), ("valid", range(4, 6)), ("test", range(6, 7))):
        for number in numbers:
            (tmp_path / folder / "things").mkdir(parents=True, exist_ok=True)
            picture(number).save(tmp_path / folder / "things" / f"{number}.png")
    splits = load_image_set(str(tmp_path))
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 4, "validation": 2, "test": 1}
    half = load_image_set(str(tmp_path), splits={"train": "train[:50%]", "validation": "test"})
    assert {name: len(rows) for name, rows in half.items()} == {"train": 2, "validation": 1}
    with pytest.raises(ValueError, match="folders for several splits .test, train, valid."):
        load_image_files({"train": [str(tmp_path)]})
    with pytest.raises(ValueError, match="`train_split` 'train.:50%.': a stream has no parts"):
        load_image_set(str(tmp_path), streaming=True, splits={"train": "train[:50%]"})


# ---- one picture -----------------------------------------------------------------------------------------------


def test_every_kind_of_file_becomes_the_same_colours(tmp_path):
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8) * 3
    deep = Image.fromarray(grey.astype(np.uint16) * 257)  # the same brightness in 16 bits
    solid = Image.fromarray(grey).convert("RGB")
    solid.putalpha(128)
    turned = Image.fromarray(np.rot90(grey).copy())
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned to the right
    kinds = {
        "grey.png": encoded(Image.fromarray(grey)),
        "deep.png": encoded(deep),
        "deep.tif": encoded(deep, "tiff"),
        "deep.pgm": b"P5 8 8 65535\n" + np.asarray(deep).astype(">u2").tobytes(),
        "alpha.png": encoded(solid),
        "colour.bmp": encoded(Image.fromarray(grey).convert("RGB"), "bmp"),
        "palette.gif": encoded(Image.fromarray(grey), "gif"),
        "turned.png": encoded(turned, exif=exif),
        "lossless.webp": encoded(Image.fromarray(grey).convert("RGB"), "webp", lossless=True),
    }
    for name, content in kinds.items():
        (tmp_path / name).write_bytes(content)
    expected = torch.from_numpy(grey.astype(np.float32)) / 127.5 - 1
    images = Images(select_images(load_image_files({"train": [str(tmp_path)]})["train"]), (8, 8))
    assert len(images) == len(kinds)
    for name, image in zip(sorted(kinds), images, strict=True):
        torch.testing.assert_close(image.pixels, expected.expand(3, 8, 8), rtol=0, atol=1e-6, msg=name)


def test_pictures_of_any_size_fill_the_size_asked_for():
    rows = {"image": [picture(0, 3), Image.new("RGB", (1, 1), (10, 20, 30)), picture(2, 50).resize((90, 20))]}
    source = datasets.Dataset.from_dict(rows, features=datasets.Features({"image": datasets.Image()}))
    images = ImageStream(select_images(source.to_iterable_dataset()), ImageCut((SIDE, SIDE)))
    assert all(item.pixels.shape == (3, SIDE, SIDE) and item.pixels.abs().max() <= 1 for item in islice(images, 3))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"bytes": encoded(picture(1))[:60], "path": "torn.png"}, r"Image number 1 \(torn.png\) cannot be read"),
        ({"bytes": b"no picture", "path": None}, "Image number 1 cannot be read"),
        ({"bytes": None, "path": "gone.png"}, r"Image number 1 \(gone.png\) cannot be read.*No such file"),
        (None, "Image number 1 is missing: its row is empty"),
        ({"bytes": encoded(Image.new("F", (8, 8)), "tiff"), "path": None}, "32 bits.*save it with 8 or 16 bits"),
    ],
)
def test_an_image_that_cannot_be_read_is_named(row, message):
    rows = [{"image": {"bytes": encoded(picture(0)), "path": None}}, {"image": row}]
    features = datasets.Features({"image": datasets.Image(decode=False)})
    source = datasets.Dataset.from_list(rows, features=features)
    with pytest.raises(ValueError, match=message):
        Images(source, (SIDE, SIDE))
    images = ImageStream(source.to_iterable_dataset(), ImageCut((SIDE, SIDE)))
    with pytest.raises(ValueError, match=message):
        list(islice(images, 2))


def test_a_stream_of_nothing_ends_with_a_message():
    source = select_images(table().to_iterable_dataset())
    with pytest.raises(ValueError, match="holds nothing to train on"):
        next(iter(ImageStream(source.filter(lambda row: False), ImageCut((SIDE, SIDE)))))


# ---- ebt train denoise --streaming -----------------------------------------------------------------------------

TINY_RUN = (
    "--use_cpu --disable_tqdm true --report_to none --streaming --image_size 8 --patch_size 4 --step_size 30 "
    "--config_overrides hidden_size=16,num_hidden_layers=1,num_attention_heads=2 "
    "--lr_scheduler_type constant --warmup_steps 0 --learning_rate 1e-2 --logging_steps 1"
)


def run(sources: Path, out: Path, options: str) -> dict[str, torch.Tensor]:
    """A tiny streamed run on 8 images (2 are held out); its weights."""
    data = f"--train_file {sources / 'images.parquet'} --max_eval_samples 2 --shuffle_buffer_size 4"
    run_denoise.main(f"--output_dir {out} {TINY_RUN} {data} {options}".split())
    return load_file(out / "model.safetensors")


def test_an_interrupted_and_resumed_stream_equals_an_uninterrupted_one(sources, tmp_path, capsys):
    """Three images a step: stopped in the second pass, and ended in the third."""
    common = "--per_device_train_batch_size 3 --save_steps 4"
    whole = run(sources, tmp_path / "whole", f"{common} --max_steps 7")
    shown = capsys.readouterr().out
    assert "first 2 images of the stream are held out" in shown and "train: a stream of images, 8 x 8" in shown
    run(sources, tmp_path / "halves", f"{common} --max_steps 4")
    resumed = run(sources, tmp_path / "halves", f"{common} --max_steps 7")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    first, second = (json.loads((tmp_path / name / "all_results.json").read_text()) for name in ("whole", "halves"))
    assert first["eval_loss"] == second["eval_loss"] and math.isfinite(first["eval_psnr"])


def test_the_order_in_which_batches_are_made_up_changes_nothing(sources, tmp_path):
    """Workers and accumulation: one update after the same six images."""
    options = ("6", "6 --dataloader_num_workers 2", "2 --gradient_accumulation_steps 3")
    runs = [
        run(sources, tmp_path / str(number), f"--max_steps 3 --optim sgd --per_device_train_batch_size {option}")
        for number, option in enumerate(options)
    ]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    for name, value in runs[0].items():
        torch.testing.assert_close(runs[2][name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_two_processes_read_the_stream_of_one(sources, tmp_path, subprocess_env):
    found = []
    for processes, size in ((1, 4), (2, 2)):
        out = tmp_path / str(processes)
        data = f"--train_file {sources / 'images.parquet'} --max_eval_samples 2 --shuffle_buffer_size 4"
        options = f"{data} --optim sgd --max_steps 5 --per_device_train_batch_size {size} --output_dir {out}"
        launch = f"-m torch.distributed.run --standalone --nproc-per-node {processes}"
        script = f"-m ebt_transformers.training.run_denoise {TINY_RUN} {options}"
        command = [sys.executable, *launch.split(), *script.split()]
        subprocess.run(command, check=True, timeout=300, env={**subprocess_env, "OMP_NUM_THREADS": "1"})
        found.append(load_file(out / "model.safetensors"))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-6)


def test_latents_are_streamed_without_workers_or_not_at_all(sources, tmp_path):
    tiny_vae().save_pretrained(tmp_path / "vae")
    latents = f"--vae_name_or_path {tmp_path / 'vae'} --image_size 16 --max_steps 1"
    assert run(sources, tmp_path / "out", latents)
    with pytest.raises(SystemExit, match="--dataloader_num_workers cannot encode latents.*or they are streamed"):
        run(sources, tmp_path / "refused", f"{latents} --dataloader_num_workers 1")


def test_a_stream_with_splits_is_evaluated_on_their_beginnings(tmp_path, capsys):
    for folder, numbers in (("train", range(6)), ("dev", range(6, 9)), ("test", range(9, 10))):
        (tmp_path / "data" / folder).mkdir(parents=True)
        for number in numbers:
            picture(number).save(tmp_path / "data" / folder / f"{number}.png")
    argv = f"--output_dir {tmp_path / 'out'} {TINY_RUN} --dataset_name {tmp_path / 'data'} --max_steps 1"
    run_denoise.main(argv.split())
    shown = capsys.readouterr().out
    assert "validation: 3 images" in shown and "test: 1 images" in shown and "first 1,000 images" in shown
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert math.isfinite(results["eval_psnr"]) and math.isfinite(results["test_psnr"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "A stream has no known end: say how long to train with --max_steps"),
        ("--max_steps 1 --validation_split_percentage 5", "cannot split a stream. Use --validation_file or --max_ev"),
        ("--max_steps 1 --shuffle_buffer_size -1", "at least 0, got -1"),
        ("--max_steps 1 --train_split train", "--train_split needs --dataset_name"),
        ("--max_steps 1 --eval_strategy steps", "--eval_strategy needs validation data"),
        ("--max_steps 1 --image_column label", "'label' holds no images"),
        ("--max_steps 1 --image_column picture", "no column 'picture'. Columns: image, label"),
    ],
)
def test_streams_are_refused_in_words(sources, tmp_path, options, message):
    argv = f"--output_dir {tmp_path} {TINY_RUN} --train_file {sources / 'images.parquet'} {options}"
    with pytest.raises(SystemExit, match=message):
        run_denoise.main(argv.split())
