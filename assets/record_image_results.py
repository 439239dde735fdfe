"""Brings the recorded test results of the embedded image model up to date.

    python -m ebt_transformers.assets.record_image_results --rows ROWS.jsonl --ebt NAME --dit NAME --about "..."
    python -m ebt_transformers.assets.record_image_results --data test.parquet

Test results are measured by benchmarks/denoising.py; the first command takes them from its rows (the means over seeds)
into `results.json`. The second measures a small sample of the same test set, which the test suite measures again, and
on it what thinking does. Both write the model card (`README.md`, `energy.png`) from `results.json`, as does a call
without options after a change by hand.
"""

import argparse
import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from . import image_checkpoint_path


HEADING = "Test results"  # a section of the card
LICENCE = """The weights are under Apache-2.0, as the package is. CIFAR-10 (Krizhevsky 2009) is no part of it; the
terms of that data set apply to it."""
SAMPLE_IMAGES, SAMPLE_LEVELS, SAMPLE_STEPS = 16, (0.1, 0.2), (1, 3)
STARTS = {"paper": ", from the last timestep as the paper does", "fair": ", from the timestep of that noise", "": ""}


def results_of(rows: Iterable[dict[str, Any]], name: str) -> dict[str, Any]:
    """
    PSNR of a method in the rows of the benchmark: by noise level, by protocol (of twins) and by passes, rounded to
    hundredths; the mean over seeds, and the newest row where one was measured twice.

    Raises:
        ValueError: if no row is of that method, or its rows are of several checkpoints or sets of images.
    """
    found = [row for row in rows if row.get("kind") == "quality" and row["method"] == name]
    tested = {(row["checkpoint"], row["settings"]["data"]) for row in found}
    if len(tested) != 1:
        raise ValueError(
            f"Rows of {name!r} must be of one checkpoint and one set of images, got {len(tested)} of both."
        )
    newest = {(row["level"], row["protocol"], row["passes"], row["seed"]): row["psnr"] for row in found}
    means: dict[str, Any] = {}
    for level, protocol, passes in sorted({key[:3] for key in newest}):
        value = statistics.fmean(psnr for key, psnr in newest.items() if key[:3] == (level, protocol, passes))
        means.setdefault(f"{level:g}", {}).setdefault(protocol, {})[str(passes)] = round(value, 2)
    return means


def card_table(results: dict[str, Any]) -> str:
    """The section of the model card, computed from the results."""
    lines = ["| noise level | model | passes | PSNR in dB |", "|---|---|---|---|"]
    for level, by_steps in results["ebt"]["psnr"].items():
        lines += [f"| {level} | EBT | {steps} | {value:.2f} |" for steps, value in by_steps.items()]
        for protocol, by_passes in results["dit"]["psnr"][level].items():
            name = f"DiT twin{STARTS[protocol]}"
            lines += [f"| {level} | {name} | {passes} | {value:.2f} |" for passes, value in by_passes.items()]
    ebt, dit = (results[kind]["parameters"] / 1e6 for kind in ("ebt", "dit"))
    return (
        f"PSNR on {results['data']}.\n"
        f"A pass is a thinking step of the EBT ({ebt:.2f} M parameters), forward and backward, or a forward pass of\n"
        f"its Diffusion Transformer twin ({dit:.2f} M parameters; the same data, updates and feed-forward width).\n\n"
        + "\n".join(lines)
    )


def sample_psnr(data: str) -> dict[str, dict[str, float]]:
    """Mean PSNR of the embedded model on the first images of a file, by noise level and steps."""
    from ..demo_image import clean_tensor, load_denoiser, psnr
    from ..training.images import load_image_files, select_images

    denoiser = load_denoiser(device="cpu")
    (table,) = load_image_files({"data": [data]}).values()
    pictures = _decoded(select_images(table).select(range(SAMPLE_IMAGES)))
    clean = [clean_tensor(denoiser, picture) for picture in pictures]
    found: dict[str, dict[str, float]] = {}
    for level in SAMPLE_LEVELS:
        for steps in SAMPLE_STEPS:
            options = {"thinking_steps": steps, "add_noise_level": level, "output_type": "pt"}
            results = denoiser(pictures, batch_size=SAMPLE_IMAGES, progress=False, **options)
            values = [psnr(result["image"], truth) for result, truth in zip(results, clean, strict=True)]
            found.setdefault(f"{level:g}", {})[str(steps)] = round(statistics.fmean(values), 4)
    return found


def _decoded(rows: Iterable[dict[str, Any]]) -> list[Any]:
    import io

    from PIL import Image

    return [Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB") for row in rows]


def sample_thinking(data: str, level: float) -> dict[str, Any]:
    """What thinking does to the first images of a file, with noise of that level."""
    from dataclasses import asdict

    from ..demo_image import load_denoiser
    from ..training.card_measurements import measure_thinking
    from ..training.images import Images, NoisyImageCollator, load_image_files, select_images

    model = load_denoiser(device="cpu").model
    (table,) = load_image_files({"data": [data]}).values()
    images = Images(select_images(table), model.config.height_and_width, training=False)
    batch = NoisyImageCollator(level)([images[index] for index in range(SAMPLE_IMAGES)])
    return asdict(measure_thinking(model, batch))


def write(folder: Path, results: dict[str, Any]) -> None:
    """Writes `results.json`, and the card from it."""
    from ..demo_image import load_denoiser
    from ..training.card_measurements import ThinkingMeasurement
    from ..training.model_card import CardFacts, write_card

    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    write_card(
        folder,
        load_denoiser(str(folder), device="cpu").model,
        CardFacts.from_dict(results["card"]),
        ThinkingMeasurement.from_dict(results["thinking"]),
        {HEADING: card_table(results), "Licence": LICENCE},
        f"lossless CIFAR-10 test set, noise level {results['trained_noise_level']:g},",
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Updates what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, help="rows of benchmarks/denoising.py")
    parser.add_argument("--ebt", help="name of this model in the rows")
    parser.add_argument("--dit", help="name of its twin in the rows")
    parser.add_argument("--about", help='the images of the rows, as in "64 images of the lossless CIFAR-10 test set"')
    parser.add_argument("--data", help="the test set, to measure the sample on")
    parser.add_argument("--folder", type=Path, default=image_checkpoint_path(), help="what to update")
    options = parser.parse_args(argv)
    of_rows = [options.rows, options.ebt, options.dit, options.about]
    if None in of_rows and any(of_rows):
        parser.error("--rows, --ebt, --dit and --about belong together")
    results = json.loads((options.folder / "results.json").read_text(encoding="utf-8"))
    if options.rows is not None:
        rows = [json.loads(line) for line in options.rows.read_text(encoding="utf-8").splitlines()]
        results["data"] = options.about
        results["ebt"]["psnr"] = {level: found[""] for level, found in results_of(rows, options.ebt).items()}
        results["dit"]["psnr"] = results_of(rows, options.dit)
    if options.data is not None:
        results["sample"] = {"images": SAMPLE_IMAGES, "psnr": sample_psnr(options.data)}
        results["thinking"] = sample_thinking(options.data, results["trained_noise_level"])
    write(options.folder, results)


if __name__ == "__main__":
    main()
