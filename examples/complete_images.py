"""Train a small Energy Transformer to complete images, and watch it complete some; `ebt train complete` does more.

    python examples/complete_images.py --max_steps 300

The images are pieces of the embedded picture, so that the example needs no download: what it learns is worth nothing
beyond that picture.
"""

import argparse
from collections.abc import Sequence

import datasets
from PIL import Image
from transformers import pipeline, set_seed

from ebt_transformers import (
    EBTImageProcessor,
    EnergyTransformerConfig,
    EnergyTransformerForImageCompletion,
    EnergyTransformerTrainingArguments,
)
from ebt_transformers.assets import example_picture_path
from ebt_transformers.pipelines import plot_completion
from ebt_transformers.training.complete_data import MaskCollator
from ebt_transformers.training.completion_trainer import CompletionTrainer
from ebt_transformers.training.images import EpochCallback, Images, select_images


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
    parser.add_argument("--output_dir", default="runs/example_completion")
    parser.add_argument("--max_steps", type=int, default=300)
    parser.add_argument("--picture", default="completion.png", help="where to draw completed images")
    options = parser.parse_args(argv)
    set_seed(33)

    split = select_images(pieces_of(str(example_picture_path()))).train_test_split(0.1, seed=0)
    train = Images(split["train"], (SIDE, SIDE), training=True, horizontal_flip=True)
    config = EnergyTransformerConfig.for_images(
        hidden_size=64, num_attention_heads=4, image_size=SIDE, patch_size=2, thinking_steps=8
    )
    trainer = CompletionTrainer(
        EnergyTransformerForImageCompletion(config),
        EnergyTransformerTrainingArguments(
            options.output_dir,
            max_steps=options.max_steps,
            learning_rate=3e-3,
            per_device_train_batch_size=16,
            report_to="none",
        ),
        train_dataset=train,
        eval_dataset=Images(split["test"], (SIDE, SIDE)),
        processing_class=EBTImageProcessor.from_model_config(config),
        data_collator=MaskCollator(config),
        callbacks=[EpochCallback(train)],
    )
    before = trainer.evaluate()["eval_masked_psnr"]
    trainer.train()
    print(f"Held-out PSNR of masked patches: {before:.2f} -> {trainer.evaluate()['eval_masked_psnr']:.2f} dB")
    trainer.save_model()  # model, image processor and model card

    completer = pipeline("image-completion", model=options.output_dir)
    squares = [row["image"] for row in pieces_of(str(example_picture_path())).select([35, 112, 200])]
    results = completer(squares, thinking_steps=16, output_energies=True, output_trajectory=True)
    plot_completion(results, options.picture)
    print(f"Energy of the first: {results[0]['energies'][0]:.1f} -> {results[0]['energies'][-1]:.1f}")
    print(f"What was masked, and what thinking made of it: {options.picture}")


if __name__ == "__main__":
    main()
