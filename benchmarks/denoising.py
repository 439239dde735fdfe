"""Image denoising: Energy-Based Transformers against Diffusion Transformers and classical algorithms.

    python benchmarks/denoising.py --ebt runs/ebt --dit runs/dit --data test.parquet --max-images 500
    python benchmarks/denoising.py --ebt s1=runs/s1 s2=runs/s2 --data kodak24 --crops tiles --tune-data train400
    python benchmarks/denoising.py --ebt runs/ebt --dit runs/dit --data test.parquet --probe --probe-data train.parquet

It evaluates checkpoints (`ebt train denoise` makes them) and trains none. Rows are written to a file as they are
measured; the same command continues where it was interrupted.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Results, add_common_options, command_line, machine_settings, report, timed
from denoisers.figures import Curve, draw_grid, plot_passes
from denoisers.methods import (
    CLASSICAL,
    PROTOCOLS,
    TARGET,
    TARGET_SHARE,
    TUNED,
    ClassicalMethod,
    DiTMethod,
    EBTMethod,
    Method,
    Model,
    tune,
)
from denoisers.pictures import Judge, Noise, Pictures, load_pictures, to_unit
from tqdm import tqdm

from ebt_transformers.reporting import table


NAME = "denoising"
HEADER = (
    *("noise", "method", "protocol", "passes", "forwards", "GFLOP", "ms per image"),
    *("PSNR", "spread", "PSNR of mean MSE", "pixel MSE", "SSIM"),
)
EQUAL_HEADER = (
    *("noise", "PSNR to reach", "is the best of", "EBT", "EBT needs", "DiT", "DiT needs", "time DiT / EBT"),
    "FLOP DiT / EBT",
)
PROBE_HEADER = ("features", "dimensions", "top-1", "top-5", "C")
LIBRARIES = ("diffusers", "scikit-image", "bm3d", "scikit-learn")
TUNING_IMAGES = 8
GRID_STEPS, GRID_PASSES = (1, 2, 3), 100
RUN = "#"  # between the name of a method and the number of a training run
HIGHEST = 60.0  # dB; a saturated part of a picture can come out without any error
EQUAL = 0.01  # dB; a longer run that gains less than this has gained nothing


def named_folders(values: Sequence[str]) -> dict[str, Path]:
    """
    `DIR` and `NAME=DIR` as names and folders; a folder's own name is its default. Several folders, `NAME=DIR,DIR`, are
    one method trained several times: `NAME#1`, `NAME#2`.
    """
    folders: dict[str, Path] = {}
    for value in values:
        name, equals, listed = value.partition("=")
        if not equals or Path(value).is_dir():
            name, listed = Path(value).resolve().name, value
        paths = [Path(listed)] if Path(listed).is_dir() else [Path(part) for part in listed.split(",")]
        for number, path in enumerate(paths, start=1):
            if not path.is_dir():
                raise FileNotFoundError(f"There is no checkpoint folder {path}.")
            own = name if len(paths) == 1 else f"{name}{RUN}{number}"
            if own in folders:
                raise ValueError(f"Two checkpoints are called {own!r}: name them, as in NAME=DIR.")
            folders[own] = path
    return folders


def trained_once(method: Method) -> bool:
    """Whether this is the only or the first run of a method: what weights do not change is measured on it."""
    return method.name.partition(RUN)[2] in ("", "1")


def load_models(options: argparse.Namespace) -> list[Model]:
    """The checkpoints of the command line; settles the size of the images. Raises if they cannot be compared."""
    ebts, dits = named_folders(options.ebt), named_folders(options.dit)
    if taken := sorted(ebts.keys() & dits.keys() | {*ebts, *dits} & {*CLASSICAL}):
        raise ValueError(f"Two methods are called {taken[0]!r}: name checkpoints, as in NAME=DIR.")
    models: list[Model] = []
    models += [EBTMethod(name, folder, options.steps, options.device) for name, folder in ebts.items()]
    models += [
        DiTMethod(name, folder, options.passes, options.protocols, options.device) for name, folder in dits.items()
    ]
    # one number means a square; none, the size the first model was made for
    size = options.image_size or models[0].size
    options.image_size = (size[0], size[-1])
    for model in models:
        if model.channels != models[0].channels:
            raise ValueError(f"{models[0].name} takes {models[0].channels} channels, {model.name} {model.channels}.")
        if model.kind == "dit" and model.size != options.image_size:
            raise ValueError(
                f"{model.name} takes images of {model.size[0]} x {model.size[1]} only, not "
                f"{options.image_size[0]} x {options.image_size[1]}."
            )
    return models


# ---- measuring -------------------------------------------------------------------------------------------------


def measure_quality(
    method: Method,
    noise: Noise,
    protocol: str,
    passes: Sequence[int],
    noisy: torch.Tensor,
    clean: torch.Tensor,
    batch_size: int,
    judge: Judge,
) -> dict[int, dict[str, float]]:
    """Mean PSNR, pixel MSE and SSIM of images (N, C, H, W) for every number of passes."""
    found: dict[int, dict[str, list[float]]] = {count: {"psnr": [], "ssim": []} for count in passes}
    method.steps_taken = []
    starts = tqdm(range(0, len(clean), batch_size), desc=f"{method.name}, passes {list(passes)}", leave=False)
    for start in starts:
        rows = slice(start, start + batch_size)
        for count, denoised in method.denoise(noisy[rows], noise, protocol, passes):
            for name, values in judge(denoised, clean[rows]).items():
                found[count][name] += [min(value, HIGHEST) for value in values]
    return {
        count: {
            "psnr": statistics.fmean(values["psnr"]),
            "mse": statistics.fmean(255**2 / 10 ** (value / 10) for value in values["psnr"]),
            "ssim": statistics.fmean(values["ssim"]),
            # what stops by its energy has only one number of steps, the most it may take
            **({"steps_taken": statistics.fmean(method.steps_taken)} if protocol == TARGET else {}),
        }
        for count, values in found.items()
    }


def quality_key(method: Method, noise: Noise, protocol: str, passes: int, seed: int) -> dict[str, Any]:
    """What a row of quality is found by."""
    target = {"target": method.target} if protocol == TARGET else {}
    return {
        **target,
        **{"kind": "quality", "method": method.name, "checkpoint": method.fingerprint, "level": noise.level},
        **{"protocol": protocol, "passes": passes, "seed": seed},
    }


def evaluate_all(
    results: Results,
    methods: dict[Noise, list[Method]],
    clean: torch.Tensor,
    seeds: Sequence[int],
    batch_size: int,
    judge: Judge,
) -> None:
    """Measures the quality that the results lack, seed by seed and level by level."""
    for seed in seeds:
        for noise, of_level in methods.items():
            noisy = None
            for method in tqdm(of_level, desc=f"noise {noise.level:g}, seed {seed}"):
                for protocol, groups in method.protocols(noise).items():
                    for group in groups:
                        keys = {count: quality_key(method, noise, protocol, count, seed) for count in group}
                        missing = [count for count in group if results.find(**keys[count]) is None]
                        if not missing:
                            continue
                        noisy = noise.add(clean, seed) if noisy is None else noisy
                        work = (method, noise, protocol, missing, noisy, clean, batch_size, judge)
                        for count, values in measure_quality(*work).items():
                            results.append({**keys[count], **values})


def timing_key(method: Method, noise: Noise, protocol: str, passes: int) -> str:
    """What is timed once: a pass of a network takes the same time at every noise level."""
    own = method.kind == "classical" or protocol == TARGET
    level = f"{protocol} level {noise.level:g}".strip() if own else f"{passes} passes"
    return f"{method.name} {method.fingerprint} {level}"


def measure_times(
    results: Results, methods: dict[Noise, list[Method]], images: torch.Tensor, rounds: int, device: str
) -> dict[str, float]:
    """Median seconds per image of everything, over rounds in which all take turns."""
    tasks: dict[str, tuple[Method, Callable[[], Any]]] = {}
    for noise, of_level in methods.items():
        noisy = noise.add(images, 0)
        for method in of_level:
            for protocol, groups in method.protocols(noise).items():
                for passes in (count for group in groups for count in group):
                    work = (noisy, noise, protocol, [passes])
                    if method.name not in ("noisy", "rescaled") and trained_once(method):
                        key = timing_key(method, noise, protocol, passes)
                        tasks.setdefault(key, (method, lambda m=method, work=work: list(m.denoise(*work))))
    done = [
        row["seconds"]
        for row in results.rows
        if row["kind"] == "round" and row["images"] == len(images) and row["seconds"].keys() == tasks.keys()
    ]
    if len(done) < rounds:
        warm = dict(reversed(tasks.values()))  # the first, and cheapest, of each method
        for work in tqdm(warm.values(), desc="warming up", leave=False):
            work()
    while len(done) < rounds:
        label = f"timing, round {len(done) + 1} of {rounds}"
        seconds = {key: timed(work, device) / len(images) for key, (_, work) in tqdm(tasks.items(), desc=label)}
        results.append({"kind": "round", "images": len(images), "seconds": seconds})
        done.append(seconds)
    return {key: statistics.median(row[key] for row in done) for key in tasks} if done else {}


def measure_flops(results: Results, model: Model, noises: Sequence[Noise], image: torch.Tensor) -> None:
    """Counts what the results lack."""
    groups = [group for noise in noises for groups in model.protocols(noise).values() for group in groups]
    counts = sorted({count for group in groups for count in group})
    key = {"kind": "flops", "method": model.name, "checkpoint": model.fingerprint}
    missing = [count for count in counts if results.find(**key, passes=count) is None]
    if missing:
        forward, flops = model.flops(image, missing)
        for count in missing:
            results.append({**key, "passes": count, "flops": flops[count], "forward": forward})


def run_probe(results: Results, options: argparse.Namespace, models: Sequence[Model]) -> list[dict[str, Any]]:
    """The linear probe of every model, of its like with random weights, and of the pixels."""
    from denoisers.probe import collect, features_of, linear_probe, patch_features, untrained

    how = (options.image_size, models[0].channels, options.crops, options.resize_to)
    train_count, test_count = options.probe_train, options.probe_test
    if options.probe_data is None:
        both = load_pictures(options.data, *how, train_count + test_count)
        train, test = both[:train_count], both[train_count:]
    else:
        train = load_pictures(options.probe_data, *how, train_count)
        test = load_pictures(options.data, *how, test_count)
    if train.labels is None or test.labels is None:
        raise ValueError("--probe needs data with classes: a parquet file with a column `label`.")
    if len(test) < test_count or len(train) < train_count:
        raise ValueError(
            f"--probe needs {train_count} images to learn from and {test_count} to test on, the data has {len(train)} "
            f"and {len(test)}: set --probe-train and --probe-test."
        )
    sizes = sorted({model.patch_size for model in models})
    works: list[tuple[str, str, Callable[[], Any]]] = [
        (f"pixels of a {side} x {side} patch", "", lambda side=side: patch_features(side)) for side in sizes
    ]
    seed = options.seeds[0]
    for model in models:
        works.append((model.name, model.fingerprint, lambda m=model: features_of(m)))
        identity = f"{model.fingerprint} seed {seed}"
        works.append((f"{model.name}, random weights", identity, lambda m=model: untrained(m, seed)))
    rows = []
    of_data = {"kind": "probe", "train": train.fingerprint, "test": test.fingerprint}
    for name, identity, make in tqdm(works, desc="linear probe"):
        key = {**of_data, "features": name, "checkpoint": identity}
        if results.find(**key) is None:
            features = make()
            arrays = [collect(features, part, options.batch_size, options.device, name) for part in (train, test)]
            accuracy = linear_probe(arrays[0], train.labels, arrays[1], test.labels)
            results.append({**key, "dimensions": arrays[0].shape[1], **accuracy})
        rows.append(results.find(**key))
    return rows


# ---- what is made of it ----------------------------------------------------------------------------------------


def summarise(
    results: Results, methods: dict[Noise, list[Method]], seeds: Sequence[int], seconds: dict[str, float]
) -> list[dict[str, Any]]:
    """One row for each method, level, protocol and number of passes: means over training runs and seeds, and costs."""
    rows = []
    for noise, of_level in methods.items():
        names = dict.fromkeys(method.name.partition(RUN)[0] for method in of_level)
        for name in names:
            runs = [method for method in of_level if method.name.partition(RUN)[0] == name]
            first = runs[0]
            for protocol, groups in first.protocols(noise).items():
                for passes in sorted(count for group in groups for count in group):
                    each = [
                        results.find(**quality_key(run, noise, protocol, passes, seed))
                        for run in runs
                        for seed in seeds
                    ]
                    mean = {key: statistics.fmean(row[key] for row in each) for key in ("psnr", "mse", "ssim")}
                    key = {"kind": "flops", "method": first.name, "checkpoint": first.fingerprint, "passes": passes}
                    cost = results.find(**key) or {}
                    taken = statistics.fmean(row["steps_taken"] for row in each) if protocol == TARGET else None
                    if taken is not None and cost:
                        # one more pass shows that the energy is low enough
                        cost = {**cost, "flops": cost["flops"] / passes * (taken + 1)}
                    rows.append(
                        {
                            **{"level": noise.level, "method": name, "kind": first.kind, "protocol": protocol},
                            **{"passes": passes, "taken": taken, "runs": len(runs), **mean},
                            "psnr_of_mse": 10 * np.log10(255**2 / mean["mse"]),
                            "spread": max(row["psnr"] for row in each) - min(row["psnr"] for row in each),
                            "flops": cost.get("flops"),
                            "forwards": cost["flops"] / cost["forward"] if cost else None,
                            "seconds": seconds.get(timing_key(first, noise, protocol, passes)),
                        }
                    )
    return rows


def cells(row: dict[str, Any]) -> list[str]:
    """A row of the main table."""
    passes = str(row["passes"] or "") if row["taken"] is None else f"{row['taken']:.2f}"
    return [
        *(f"{row['level']:g}", row["method"], row["protocol"], passes),
        "" if row["forwards"] is None else f"{row['forwards']:.1f}",
        "" if row["flops"] is None else f"{row['flops'] / 1e9:.3g}",
        "" if row["seconds"] is None else f"{1000 * row['seconds']:.4g}",
        *(f"{row['psnr']:.2f}", f"{row['spread']:.2f}" if row["spread"] else "", f"{row['psnr_of_mse']:.2f}"),
        *(f"{row['mse']:.1f}", f"{row['ssim']:.3f}"),
    ]


def amount(kind: str, count: int) -> str:
    """How many passes, in words."""
    one, several = ("step", "steps") if kind == "ebt" else ("pass", "passes")
    return f"{count} {one if count == 1 else several}"


def _cost(row: dict[str, Any]) -> float:
    """What the cheapest row is cheapest in: time, where it was taken."""
    return row["flops"] if row["seconds"] is None else row["seconds"]


def _need(row: dict[str, Any] | None, best: dict[str, Any]) -> str:
    if row is None:
        return f"not reached ({best['psnr']:.2f})"
    time = "" if row["seconds"] is None else f", {1000 * row['seconds']:.4g} ms"
    return amount(row["kind"], row["passes"]) + time


def equal_quality(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """For each EBT and DiT: what both need to reach the best PSNR of the one, and of the other."""
    series: dict[tuple[float, str, str, str], list[dict[str, Any]]] = {}
    for row in (row for row in rows if row["protocol"] != TARGET):
        series.setdefault((row["level"], row["kind"], row["method"], row["protocol"]), []).append(row)
    lines = []
    for (level, kind, ebt, _), of_ebt in series.items():
        for (other_level, other_kind, dit, protocol), of_dit in series.items():
            if (kind, other_kind) != ("ebt", "dit") or level != other_level:
                continue
            dit_name = f"{dit} ({protocol})" if protocol else dit
            bests = [max(side, key=lambda row: row["psnr"]) for side in (of_dit, of_ebt)]
            for best, owner in zip(bests, (dit_name, ebt), strict=True):
                cheapest = [
                    min((row for row in side if row["psnr"] >= best["psnr"] - EQUAL), key=_cost, default=None)
                    for side in (of_ebt, of_dit)
                ]
                ratios = ["", ""]
                if None not in cheapest:
                    for place, unit in enumerate(("seconds", "flops")):
                        if cheapest[0][unit] is not None:
                            ratios[place] = f"{cheapest[1][unit] / cheapest[0][unit]:.3g}"
                lines.append(
                    [
                        *(f"{level:g}", f"{best['psnr']:.2f}", owner, ebt, _need(cheapest[0], bests[1])),
                        *(dit_name, _need(cheapest[1], bests[0]), *ratios),
                    ]
                )
    return lines


def draw(
    options: argparse.Namespace,
    methods: dict[Noise, list[Method]],
    rows: Sequence[dict[str, Any]],
    clean: torch.Tensor,
    judge: Judge,
) -> list[str]:
    """Writes the plot and a grid of images for each level beside the results; returns their lines of markdown."""
    panels: dict[str, list[Curve]] = {}
    lines = []
    for noise, of_level in methods.items():
        known = "as in training" if noise.level == options.train_level else "not seen in training"
        title = f"noise level {noise.level:g} ({known})"
        curves = panels.setdefault(title, [])
        for row in (row for row in rows if row["level"] == noise.level and row["method"] != "noisy"):
            passes = row["passes"] if row["taken"] is None else row["taken"]
            same = curves and (curves[-1].method, curves[-1].protocol) == (row["method"], row["protocol"])
            if not same:
                curves.append(Curve(row["method"], row["protocol"], row["kind"], {}))
            curves[-1].points[passes] = row["psnr"]

        some = clean[: options.grid_images]
        noisy = noise.add(some, options.seeds[0])
        columns = [("clean", to_unit(some), None), ("noisy", to_unit(noisy), judge(noisy, some)["psnr"])]
        # the first EBT, the first DiT, then BM3D
        shown: dict[str, Method] = {}
        for method in sorted(of_level, key=lambda method: method.kind == "classical"):
            if method.kind != "classical" or method.name == "BM3D":
                shown.setdefault(method.kind, method)
        for method in shown.values():
            for protocol, groups in method.protocols(noise).items():
                counts = [count for group in groups for count in group]
                if protocol == TARGET:
                    continue
                if method.kind == "ebt":
                    counts = [count for count in counts if count in GRID_STEPS] or counts[:1]
                elif method.kind == "dit":
                    counts = sorted(counts, key=lambda count: abs(count - GRID_PASSES))[:1]
                if not counts:
                    continue
                for count, denoised in method.denoise(noisy, noise, protocol, counts):
                    name = method.name.partition(RUN)[0] + (f"\n{amount(method.kind, count)}" if count else "")
                    name += f", {protocol}" if protocol else ""
                    columns.append((name, to_unit(denoised), judge(denoised, some)["psnr"]))
        path = options.results.with_name(f"{options.results.stem}_{noise.level:g}.png")
        draw_grid(path, title[0].upper() + title[1:], columns)
        lines.append(f"![Images at {title}]({path.name})")
    path = options.results.with_suffix(".png")
    plot_passes(path, panels)
    return [f"![PSNR against passes]({path.name})", *lines]


def notes_on(
    options: argparse.Namespace,
    results: Results,
    models: Sequence[Model],
    rows: Sequence[dict[str, Any]],
    tuned: dict[tuple[str, float], float],
) -> str:
    """What a reader of the table has to know."""
    height, width = options.image_size
    seeds = f" and {len(options.seeds)} seeds of the noise" if len(options.seeds) > 1 else ""
    if (runs := max(row["runs"] for row in rows)) > 1:
        seeds += f", of what was trained {runs} times also over the runs (time and FLOPs: of the first)"
    if seeds:
        seeds += "; `spread` is the difference of the best and the worst of these"
    chosen = "; ".join(f"{name} at {level:g}: {value:g}" for (name, level), value in tuned.items())
    parts = [
        f"{results.settings['images']} images, {height} x {width} ({Path(options.data).name}, {options.crops} crops). "
        "PSNR and SSIM by scikit-image, on pixels clipped to 0..255 and not rounded; means over images (PSNR: at most "
        f"{HIGHEST:g} each)"
        f"{seeds}. "
        '"PSNR of mean MSE" averages the errors first; the official evaluation does so within each batch, and lies in '
        "between.",
        "A pass is one call of the network on an image: a thinking step of an EBT (forward and backward) or a step of "
        "DDIM (forward). `forwards` is the same work in forward passes of that network, `GFLOP` that in matrix "
        "products per image (counted, backward passes included). Parameters: "
        + ", ".join(
            f"{model.name.partition(RUN)[0]} {model.parameters / 1e6:.3g} M" for model in models if trained_once(model)
        )
        + ".",
        f"`ms per image`: median of {options.rounds} round(s) on a batch of {options.time_images}, all methods taking "
        "turns; classical methods run on the CPU, image by image. BM3D has threads of its own, and a set-up that is "
        "most of its time on small images."
        if options.rounds
        else "Time was not taken.",
        f"Noise level {options.train_level:g} is that of training. At others `paper` starts the DiT at the timestep "
        "of training all the same (the official evaluation), `fair` at the one whose noise is that of the images. "
        "More passes than timesteps are whole runs, each fed with the result of the one before, as in the official "
        "evaluation.",
        *(
            [
                f"`target`: thinking about an image stops when its energy is at most what {100 * TARGET_SHARE:g} % of "
                f"{options.target_images} other images ({Path(options.target_data).name}, noise level "
                f"{options.train_level:g}) come down to in the trained number of steps; at most {max(options.steps)} "
                "steps, their mean number is given. The pass that sees the target reached is counted, too."
            ]
            if options.target_data
            else []
        ),
        "`noisy`: the images as they are. `rescaled`: divided by what the noise shrank them by, as for the classical "
        "methods, which are told the strength of the noise."
        + (f" Chosen on {TUNING_IMAGES} other images: {chosen}." if chosen else ""),
    ]
    return "\n\n".join(parts)


def positive(text: str) -> int:
    """A number of things, at least one."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_options(parser, NAME, text_models=False)
    parser.add_argument(
        "--ebt",
        nargs="+",
        default=[],
        metavar="[NAME=]DIR[,DIR]",
        help="EBTs saved by save_pretrained; several folders of one name are runs to average",
    )
    parser.add_argument("--dit", nargs="+", default=[], metavar="[NAME=]DIR[,DIR]", help="DiT twins")
    parser.add_argument("--data", required=True, help="a parquet file with images, or a folder of images")
    parser.add_argument(
        "--max-images", "--max_images", type=positive, help="evaluate so many, the same random ones each time"
    )
    parser.add_argument(
        *("--image-size", "--image_size"),
        type=positive,
        nargs="+",
        help="side, or height and width; default: the model's",
    )
    parser.add_argument(
        "--crops", choices=("centre", "tiles"), default="centre", help="tiles: all that fit in an image"
    )
    parser.add_argument("--resize-to", type=positive, help="resize the shorter side to this before cropping")
    parser.add_argument("--levels", type=float, nargs="+", default=[0.1, 0.2], help="of noise (default: 0.1 0.2)")
    parser.add_argument("--train-level", type=float, default=0.1, help="the level of noise the models were trained on")
    parser.add_argument(
        "--steps",
        type=positive,
        nargs="+",
        default=[1, 2, 3, 4, 8],
        help="thinking steps of EBTs (default: 1 2 3 4 8)",
    )
    parser.add_argument(
        "--passes",
        type=positive,
        nargs="+",
        default=[1, 10, 20, 50, 100, 200, 300],
        help="of DiTs (default: 1 to 300)",
    )
    parser.add_argument(
        "--protocols", nargs="+", choices=PROTOCOLS, default=list(PROTOCOLS), help="where DiTs start (default: both)"
    )
    parser.add_argument("--classical", nargs="*", choices=CLASSICAL, default=list(CLASSICAL), help="default: all")
    parser.add_argument("--tune-data", help=f"images to tune classical methods on; default: the {TUNING_IMAGES} last")
    parser.add_argument(
        "--target-data",
        help="images to learn from at which energy an EBT may stop thinking; adds rows in which it stops there",
    )
    parser.add_argument("--target-images", type=positive, default=256, help="so many of them (default: 256)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the noise")
    parser.add_argument("--batch-size", type=positive, default=32)
    parser.add_argument("--rounds", type=int, default=3, help="of timing; 0 takes no time")
    parser.add_argument("--time-images", type=positive, default=8, help="images in a timed batch")
    parser.add_argument("--grid-images", type=positive, default=4, help="images shown")
    parser.add_argument("--probe", action="store_true", help="linear probe; needs data with labels")
    parser.add_argument("--probe-data", help="images with labels to learn from; --data is then for testing")
    parser.add_argument("--probe-train", type=positive, default=5000, help="images to learn from")
    parser.add_argument("--probe-test", type=positive, default=2000, help="images to test on")
    options = parser.parse_args(argv)
    if not options.ebt and not options.dit:
        parser.error("give a checkpoint: --ebt or --dit")
    if options.image_size is not None and len(options.image_size) > 2:
        parser.error("--image-size takes one number, or height and width")
    return options


def load_data(options: argparse.Namespace, channels: int) -> tuple[Pictures, Pictures | None]:
    """Images to evaluate, and images to tune classical methods on where these are wanted."""
    how = (options.image_size, channels, options.crops, options.resize_to)
    if not set(options.classical) & TUNED.keys():
        return load_pictures(options.data, *how, options.max_images), None
    if options.tune_data is not None:
        tuning = load_pictures(options.tune_data, *how, TUNING_IMAGES)
        return load_pictures(options.data, *how, options.max_images), tuning
    limit = None if options.max_images is None else options.max_images + TUNING_IMAGES
    both = load_pictures(options.data, *how, limit)
    if len(both) <= TUNING_IMAGES:
        raise ValueError(
            f"Of the {len(both)} images the last {TUNING_IMAGES} are for tuning TV and NL means; none is left. Give "
            "--tune-data, or other --classical methods."
        )
    return both[:-TUNING_IMAGES], both[-TUNING_IMAGES:]


def installed(name: str) -> str:
    """The version of a library."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def main(argv: Sequence[str] | None = None) -> str:
    """Measures what is missing, draws the pictures and prints the tables."""
    options = parse(argv)
    settings = machine_settings(options)
    settings["versions"] |= {name: installed(name) for name in LIBRARIES}
    models = load_models(options)
    pictures, tuning = load_data(options, models[0].channels)
    settings |= {"data": pictures.fingerprint, "images": len(pictures), "image_size": list(options.image_size)}
    results = Results(options.results, settings, options.fresh)
    judge, clean = Judge(), pictures.scaled
    noises = [Noise(level) for level in options.levels]

    if options.target_data is not None:
        how = (options.image_size, models[0].channels, options.crops, options.resize_to)
        learned_from = load_pictures(options.target_data, *how, options.target_images)
        noisy = Noise(options.train_level).add(learned_from.scaled, options.seeds[0])
        for model in (model for model in models if model.kind == "ebt"):
            model.learn_target(noisy)
    tuned: dict[tuple[str, float], float] = {}
    methods: dict[Noise, list[Method]] = {}
    for noise in noises:
        for name in (name for name in options.classical if name in TUNED):
            key = {"kind": "tuned", "method": name, "level": noise.level, "images": tuning.fingerprint}
            if results.find(**key) is None:
                results.append({**key, "value": tune(name, tuning.scaled, noise, options.seeds[0], judge)})
            tuned[name, noise.level] = results.find(**key)["value"]
        classical = [ClassicalMethod(name, tuned.get((name, noise.level))) for name in options.classical]
        methods[noise] = [*classical, *models]

    evaluate_all(results, methods, clean, options.seeds, options.batch_size, judge)
    for model in models:
        measure_flops(results, model, noises, clean[:1])
    seconds = measure_times(results, methods, clean[: options.time_images], options.rounds, options.device)
    rows = summarise(results, methods, options.seeds, seconds)
    more = draw(options, methods, rows, clean, judge)
    if lines := equal_quality(rows):
        text = (
            f"For the best PSNR of either: the cheapest row of each that comes within {EQUAL:g} dB of it; where none "
            "does, the best PSNR there is. Ratios above 1: the EBT is cheaper."
        )
        more += ["## What equal quality costs", text, table(EQUAL_HEADER, lines)]
    if options.probe:
        probes = run_probe(results, options, models)
        text = (
            f"Features of clean images, averaged over patches (EBT and DiT: the last layer; DiT: at timestep 0), "
            f"standardised; a logistic regression learns from {options.probe_train:,} images and is tested on "
            f"{options.probe_test:,}. C is chosen on a fifth of the former. With random weights every block of both "
            "networks is the identity: such features are a random linear map of the averaged patch."
        )
        lines = [
            [
                *(row["features"], str(row["dimensions"]), f"{100 * row['top1']:.2f} %", f"{100 * row['top5']:.2f} %"),
                f"{row['strength']:g}",
            ]
            for row in probes
        ]
        more += ["## Linear probe", text, table(PROBE_HEADER, lines)]
    return report(
        results,
        "Image denoising",
        command_line(NAME, sys.argv[1:] if argv is None else argv),
        HEADER,
        [cells(row) for row in rows],
        notes_on(options, results, models, rows, tuned),
        seed=", ".join(map(str, options.seeds)) + " (of the noise)",
        more=more,
    )


if __name__ == "__main__":
    main()
