"""What benchmarks/completion.py measures of completions and of thinking. Not a script.

Shapes: ``B`` images, ``C`` channels, ``H x W`` pixels, ``N`` patches, ``S`` blocks, ``T`` steps of each.
"""

import argparse
import math
from dataclasses import asdict

import torch
from common import Results, alternate
from completers.data import Data
from completers.fillings import Completer, Fillings, judge
from completers.training import BATCH, clock, complete, scaled
from torch import Tensor, nn
from tqdm import tqdm


def validation_error(model: nn.Module, data: Data) -> float | None:
    """Masked MSE on the validation images; None for a model that ran away."""
    images = scaled(data.validation)
    try:
        mse = judge(complete(model, images, data.validation_mask), images, data.hidden(data.validation_mask)).mse
    except ValueError:  # energies that are not finite
        return None
    return mse if math.isfinite(mse) else None


def fill(data: Data, results: Results) -> dict[str, Completer]:
    """Judges the completions without a model, and returns them."""
    images, hidden = scaled(data.test), data.hidden(data.test_mask)
    mean = sum(scaled(each).sum(0, dtype=torch.float64) for each in data.train.split(1000)) / len(data.train)
    methods = Fillings(mean.float(), data.patch).methods  # type: ignore[union-attr]
    for name, method in tqdm(methods.items(), desc="without a model"):
        if results.find(kind="filling", name=name) is None:
            started = clock("cpu")
            completed = method(images, data.test_mask)
            seconds = clock("cpu") - started
            quality = judge(completed, images, hidden)
            results.append({"kind": "filling", "name": name, "ms": 1000 * seconds / len(images), **asdict(quality)})
    return methods


def think(model: nn.Module, name: str, seed: int, data: Data, results: Results, options: argparse.Namespace) -> None:
    """Error and energy after every number of steps, and where a tolerance stops."""
    some = slice(0, options.thinking_images)
    images, mask = scaled(data.test[some]), data.test_mask[some]
    batches = list(zip(images.split(BATCH), mask.split(BATCH), data.hidden(mask).split(BATCH), strict=True))
    about = {"name": name, "seed": seed, "most": options.most_steps, "images": len(images)}
    if results.find(kind="steps", **about) is None:
        errors = torch.zeros(options.most_steps + 1, dtype=torch.float64)
        energies = torch.zeros_like(errors)
        for batch, masks, hidden in batches:
            walks, energy = walk(model, batch, masks, options.most_steps)
            each = [judge(walks[:, step], batch, hidden).mse for step in range(walks.shape[1])]
            errors += torch.tensor(each).double() * len(batch)
            energies += energy.double().sum(0)
        row = {"mse": (errors / len(images)).tolist(), "energy": (energies / len(images)).tolist()}
        results.append({"kind": "steps", **about, **row})
    for tolerance in options.tolerances:
        key = {"kind": "tolerance", "tolerance": tolerance, **about}
        if results.find(**key) is None:
            error, steps = 0.0, 0.0
            for batch, masks, hidden in batches:
                completed, taken = stop_at(model, batch, masks, tolerance, options.most_steps)
                error += judge(completed, batch, hidden).mse * len(batch)
                steps += float(taken.sum())
            results.append({**key, "steps": steps / len(images), "mse": error / len(images)})


@torch.no_grad()
def stop_at(model: nn.Module, images: Tensor, mask: Tensor, tolerance: float, most: int) -> tuple[Tensor, Tensor]:
    """Completions (B, C, H, W) of thinking that a tolerance stops, and the steps that the last block took (B,)."""
    device = next(model.parameters()).device
    how = {"thinking_steps": most, "thinking_tolerance": tolerance}
    output = model(images.to(device), bool_masked_pos=mask.to(device), **how)
    return output.reconstruction.cpu(), output.steps_taken[:, -1].cpu()


@torch.no_grad()
def walk(model: nn.Module, images: Tensor, mask: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Completions after every step of one descent (B, S T + 1, C, H, W), and the last block's energy (B, T + 1)."""
    device = next(model.parameters()).device
    how = {"thinking_steps": most, "output_energies": True, "output_trajectory": True}
    output = model(images.to(device), bool_masked_pos=mask.to(device), **how)
    return output.trajectory.cpu(), output.energies[:, -1].cpu()


def time_models(ours: nn.Module, theirs: nn.Module, data: Data, results: Results, options: argparse.Namespace) -> None:
    """Milliseconds per image of an Energy Transformer and its twin, taking turns."""
    if results.find(kind="time") is None:
        images, mask = scaled(data.test[:BATCH]), data.test_mask[:BATCH]

        def work(model: nn.Module) -> list[float]:
            started = clock(options.device)
            complete(model, images, mask)
            return [1000 * (clock(options.device) - started) / len(images)]

        of_et, of_mae, ratio = alternate(lambda: work(ours), lambda: work(theirs), options.rounds)
        results.append({"kind": "time", "et": of_et, "mae": of_mae, "ratio": ratio})


__all__ = ["fill", "stop_at", "think", "time_models", "validation_error", "walk"]
