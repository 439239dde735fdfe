"""Train a small image model in Python; `ebt train denoise` does the same and more from the shell.

    python examples/train_denoiser.py --max_steps 300

The images are pieces of the embedded picture, so that the example needs no download: what it learns is worth nothing
beyond that picture.
"""

import argparse
from collections.abc import Sequence

import datasets
from PIL import Image
from transformers import set_seed

from ebt_transformers import (
    EBTForImageDenoising,
    EBTImageConfig,
    EBTImageProcessor,
    EBTImageTrainingArguments,
    EBTTrainer,
)
from ebt_transformers.assets import example_picture_path
from ebt_transformers.training.images import EpochCallback, Images, NoisyImageCollator, select_images


SIDE, STRIDE = 16, 8


def pieces_of(path: str) -> datasets.Dataset:
    """Overlapping squares of one picture, as a table with a column of images."""
    picture = Image.open(path).convert("RGB")
    lefts = range(0, picture.width - SIDE + 1, STRIDE)
    tops = range(0, picture.height - SIDE + 1, STRIDE)
    squares = [picture.crop((left, top, left + SIDE, top + SIDE)) for top in tops for left in lefts]
    features = datasets.Features({"image": datasets.Image()})
    return datasets.Dataset.from_dict({"image": squares}, features=features)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="runs/example_images")
    parser.add_argument("--max_steps", type=int, default=300)
    options = parser.parse_args(argv)
    set_seed(33)

    split = select_images(pieces_of(str(example_picture_path()))).train_test_split(0.1, seed=0)
    train = Images(split["train"], (SIDE, SIDE), training=True, horizontal_flip=True)
    config = EBTImageConfig.from_preset("4xs", image_size=SIDE, patch_size=4)
    trainer = EBTTrainer(
        EBTForImageDenoising(config),
        EBTImageTrainingArguments(
            options.output_dir,
            max_steps=options.max_steps,
            learning_rate=3e-3,
            per_device_train_batch_size=16,
            report_to="none",
        ),
        train_dataset=train,
        eval_dataset=Images(split["test"], (SIDE, SIDE)),
        processing_class=EBTImageProcessor.from_model_config(config),
        data_collator=NoisyImageCollator(noise_level=0.1),
        callbacks=[EpochCallback(train)],
    )
    before = trainer.evaluate()["eval_psnr"]
    trainer.train()
    print(f"Held-out PSNR: {before:.2f} -> {trainer.evaluate()['eval_psnr']:.2f} dB")
    trainer.save_model()  # model, image processor and model card


if __name__ == "__main__":
    main()
