"""Linear probe: what of an image's class a model's features of the clean image give away to a linear classifier."""

from collections.abc import Callable

import numpy as np
import torch
from denoisers.methods import EBTMethod, Model
from denoisers.pictures import Pictures
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from tqdm import tqdm

from ebt_transformers import EBTForImageDenoising, EBTImageConfig
from ebt_transformers.training.dit_twin import new_dit, predict_noise


STRENGTHS = tuple(10.0**power for power in range(-4, 3))  # C, the inverse of the regularisation
VALIDATION_SHARE = 0.2
Features = Callable[[Tensor], Tensor]


def patch_features(patch_size: int) -> Features:
    """Pixels at each place of a patch, averaged over the patches: (B, C, H, W) -> (B, C * patch_size ** 2)."""

    def features(images: Tensor) -> Tensor:
        cut = images.unfold(2, patch_size, patch_size).unfold(3, patch_size, patch_size)
        return cut.mean((2, 3)).flatten(1)

    return features


def ebt_features(model: EBTForImageDenoising) -> Features:
    """The last layer's patches, averaged: (B, C, H, W) -> (B, D)."""

    @torch.no_grad()
    def features(images: Tensor) -> Tensor:
        context = images if model.config.image_conditioning == "noisy_image" else None
        return model.model(images, noisy_pixel_values=context).last_hidden_state.mean(1)

    return features


def dit_features(dit: nn.Module) -> Features:
    """The last block's patches at timestep 0, averaged: (B, C, H, W) -> (B, D)."""
    (norm,) = (module for name, module in dit.named_modules() if name.split(".")[-1] == "norm_out")

    @torch.no_grad()
    def features(images: Tensor) -> Tensor:
        seen: list[Tensor] = []
        hook = norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        try:
            predict_noise(dit, images, torch.zeros(len(images), dtype=torch.long, device=images.device))
        finally:
            hook.remove()
        return seen[0].mean(1)

    return features


def features_of(method: Model) -> Features:
    """Features of a checkpoint."""
    return ebt_features(method.model) if isinstance(method, EBTMethod) else dit_features(method.dit)


def untrained(method: Model, seed: int) -> Features:
    """Features of a model of the same shape with random weights."""
    torch.manual_seed(seed)
    if isinstance(method, EBTMethod):
        return ebt_features(EBTForImageDenoising(method.model.config).eval().to(method.device))
    shape = {name: value for name, value in method.dit.config.items() if not name.startswith("_")}
    return dit_features(new_dit(EBTImageConfig(), **shape).eval().to(method.device))


def collect(features: Features, pictures: Pictures, batch_size: int, device: str, name: str) -> np.ndarray:
    """Features (N, D) of clean images."""
    batches = pictures.scaled.split(batch_size)
    found = [
        features(batch.to(device)).float().cpu() for batch in tqdm(batches, desc=f"features: {name}", leave=False)
    ]
    return torch.cat(found).numpy()


def _classifier(strength: float) -> object:
    return make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=2000))


def linear_probe(
    train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, test_labels: np.ndarray
) -> dict[str, float]:
    """
    A logistic regression on standardised features. Its regularisation is chosen on the last fifth of the training
    part, then it learns from all of it.

    Args:
        train, test (`np.ndarray` of shape `(N, D)`): features.
        train_labels, test_labels (`np.ndarray` of shape `(N,)`): classes.

    Returns:
        `dict`: accuracy `top1`, `top5` (1 with five classes or fewer) and the chosen `strength`.
    """
    held = max(1, round(len(train) * VALIDATION_SHARE))
    first, second = (train[:-held], train_labels[:-held]), (train[-held:], train_labels[-held:])
    strength = max(STRENGTHS, key=lambda value: _classifier(value).fit(*first).score(*second))
    classifier = _classifier(strength).fit(train, train_labels)
    likely = np.argsort(-classifier.predict_proba(test), axis=1)
    hits = classifier.classes_[likely] == test_labels[:, None]
    return {"top1": float(hits[:, 0].mean()), "top5": float(hits[:, :5].any(1).mean()), "strength": strength}


__all__ = [
    "collect",
    "dit_features",
    "ebt_features",
    "features_of",
    "linear_probe",
    "patch_features",
    "untrained",
]
