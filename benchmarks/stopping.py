"""When to stop thinking: quality of denoising by fixed numbers of steps, and by stopping at an energy.

    python benchmarks/stopping.py --ebt runs/ebt --data test.parquet --target-data train.parquet

One descent of each image gives the result for every rule at once: a rule only says where on it to stop.
"""

import argparse
import sys
from collections.abc import Sequence

import torch
from common import Results, add_common_options, command_line, machine_settings, report
from denoisers.pictures import Noise, load_pictures
from tqdm import tqdm

from ebt_transformers import EBTForImageDenoising
from ebt_transformers.reporting import table
from ebt_transformers.training.quality import image_psnr


NAME = "stopping"
SHARES = (0.98, 0.95, 0.9, 0.8, 0.7, 0.5)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_options(parser, NAME, text_models=False)
    parser.add_argument("--ebt", required=True, help="a checkpoint")
    parser.add_argument("--data", required=True, help="images to denoise: a parquet file or a folder")
    parser.add_argument("--target-data", required=True, help="images to learn the energy from")
    parser.add_argument("--images", type=int, default=256, help="of either")
    parser.add_argument("--levels", type=float, nargs="+", default=[0.05, 0.1, 0.15, 0.2, 0.3], help="of noise")
    parser.add_argument("--train-level", type=float, default=0.1, help="the one the model was trained on")
    parser.add_argument("--most", type=int, default=8, help="steps at most")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> str:
    """Measures, prints the tables and writes them down."""
    options = parse(argv)
    settings = machine_settings(options)
    model = EBTForImageDenoising.from_pretrained(options.ebt).eval().to(options.device)
    config = model.config
    how = (config.height_and_width, config.num_channels, "centre", None, options.images)
    clean = load_pictures(options.data, *how).scaled
    known = Noise(options.train_level).add(load_pictures(options.target_data, *how).scaled, 0).to(options.device)
    settings |= {"images": len(clean), "levels": options.levels, "most": options.most, "ebt": options.ebt}
    results = Results(options.results, settings, fresh=True)

    targets = {share: model.suggest_target_energy(known, share) for share in SHARES}
    with torch.no_grad():
        of_clean = model.energy(clean.to(options.device))
    quality: dict[str, list[float]] = {}
    energies, taken = [], []
    for level in tqdm(options.levels, desc="noise levels"):
        noisy = Noise(level).add(clean, 0)
        paths, values = [], []
        for part in noisy.split(32):
            with torch.no_grad():
                output = model(
                    part.to(options.device), thinking_steps=options.most, output_energies=True, output_trajectory=True
                )
            paths.append(output.trajectory.cpu())
            values.append(output.energies.cpu())
        path, value = torch.cat(paths), torch.cat(values)
        energies.append(
            [f"{level:g}", f"{value[:, 0].std():.3f}", *(f"{mean:.3f}" for mean in value.mean(0).tolist())]
        )
        for steps in range(1, options.most + 1):
            quality.setdefault(f"{steps} step{'s' if steps > 1 else ''}", []).append(
                float(image_psnr(path[:, steps], clean).mean())
            )
        for share, target in targets.items():
            low = value[:, :-1] <= target
            stop = torch.where(low.any(1), low.int().argmax(1), options.most)
            stopped = path[torch.arange(len(stop)), stop]
            quality.setdefault(f"share {share:g}", []).append(float(image_psnr(stopped, clean).mean()))
            if share == 0.9:
                taken.append(f"{float(stop.float().mean()):.2f}")
    rows = []
    for rule, found in quality.items():
        results.append({"rule": rule, "psnr": found})
        rows.append([rule, *(f"{value:.2f}" for value in found), f"{sum(found) / len(found):.2f}"])
    header = ["rule", *(f"noise {level:g}" for level in options.levels), "mean"]
    steps = ["before", *(f"after {step}" for step in range(1, options.most + 1))]
    return report(
        results,
        "Where to stop thinking",
        command_line(NAME, sys.argv[1:] if argv is None else argv),
        header,
        rows,
        f"Mean PSNR in dB of {len(clean)} images. `share`: thinking stops at the energy that this share of "
        f"{options.images} other images with the noise of training ({options.train_level:g}) come down to in the "
        f"trained number of steps; at most {options.most} steps. Mean steps at share 0.9: {', '.join(taken)}.",
        seed="0 (of the noise)",
        more=[
            "## Energies",
            f"Means over the images; clean ones: {float(of_clean.mean()):.3f} (standard deviation "
            f"{float(of_clean.std()):.3f}).",
            table(["noise", "std before", *steps], energies),
        ],
    )


if __name__ == "__main__":
    main()
