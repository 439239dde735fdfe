"""The ways of denoising that are compared: Energy-Based Transformers, their DiT twins, classical algorithms."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from denoisers.pictures import Judge, Noise, from_unit, to_unit
from skimage.restoration import denoise_nl_means, denoise_tv_chambolle
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ebt_transformers import EBTForImageDenoising
from ebt_transformers.configuration.noise_ebt import noise_scheduler
from ebt_transformers.training.dit_twin import ddim_denoise, load_dit, predict_noise


# what the two knobs of the classical methods are chosen from, on images that are not evaluated
TUNED: dict[str, tuple[float, ...]] = {
    "TV": tuple(round(float(value), 4) for value in np.geomspace(0.02, 1.0, 13)),
    "NL means": (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2, 1.5),
}
CLASSICAL = ("noisy", "rescaled", "BM3D", "TV", "NL means")
PROTOCOLS = ("paper", "fair")
TARGET = "target"  # an EBT that stops by its energy
TARGET_SHARE = 0.9  # of images with the noise of training that come down to it


def fingerprint(folder: Path) -> str:
    """Tells the weights and config of a checkpoint from others."""
    digest = hashlib.sha256()
    for file in sorted([*folder.glob("*.json"), *folder.glob("*.safetensors")]):
        digest.update(file.name.encode())
        with file.open("rb") as opened:
            while block := opened.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()[:16]


def count_flops(work: Callable[[], Any]) -> int:
    """Floating point operations of the matrix products of a call, backward passes in it included."""
    # the counter knows no fused attention on the CPU; taken apart it is made of matrix products
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


class EBTMethod:
    """
    An EBT; its passes are thinking steps, a forward and a backward pass each.

    Args:
        name (`str`): in tables.
        folder (`Path`): a checkpoint.
        steps (sequence of `int`): numbers of thinking steps to try.
        device (`str`): where to.
    """

    kind = "ebt"
    target: float | None = None

    def __init__(self, name: str, folder: Path, steps: Sequence[int], device: str) -> None:
        self.name, self.steps, self.device = name, sorted(set(steps)), device
        self.steps_taken: list[float] = []  # by images, since the last look
        self.fingerprint = fingerprint(folder)
        self.model = EBTForImageDenoising.from_pretrained(folder).eval().to(device)
        self.model.requires_grad_(False)  # evaluation differentiates images only
        if self.model.config.vae_name_or_path:
            raise ValueError(f"{name} works on latents; this benchmark compares models of pixels.")
        config = self.model.config
        self.parameters = self.model.num_parameters()
        self.channels, self.size, self.patch_size = config.num_channels, config.height_and_width, config.patch_size

    def learn_target(self, noisy: Tensor) -> None:
        """From images (B, C, H, W) with the noise of training: the energy at which thinking may stop."""
        self.target = self.model.suggest_target_energy(noisy.to(self.device), TARGET_SHARE)

    def protocols(self, noise: Noise) -> dict[str, list[list[int]]]:
        """Fixed numbers of steps, and with a target energy as many as each image needs."""
        fixed = {"": [[steps] for steps in self.steps]}
        return fixed if self.target is None else {**fixed, TARGET: [[max(self.steps)]]}

    def denoise(
        self, noisy: Tensor, noise: Noise | None, protocol: str, passes: Sequence[int]
    ) -> Iterator[tuple[int, Tensor]]:
        """Noisy images (B, C, H, W) -> every number of steps with its denoised images."""
        options = {"thinking_target_energy": self.target} if protocol == TARGET else {}
        for steps in passes:
            with torch.no_grad():
                output = self.model(noisy.to(self.device), thinking_steps=steps, **options)
            self.steps_taken += output.steps_taken.tolist()
            yield steps, output.reconstruction.cpu()

    def flops(self, image: Tensor, passes: Sequence[int]) -> tuple[int, dict[int, int]]:
        """Operations of one forward pass on an image (1, C, H, W), and of denoising it."""
        image = image.to(self.device)
        conditional = self.model.config.image_conditioning == "noisy_image"

        @torch.no_grad()
        def forward() -> None:
            self.model.energy(image, noisy_pixel_values=image if conditional else None)

        return count_flops(forward), {
            steps: count_flops(lambda steps=steps: list(self.denoise(image, None, "", [steps]))) for steps in passes
        }


class DiTMethod:
    """
    A DiT twin denoising by DDIM. A run has as many passes as asked for, at most one for each timestep it starts from;
    more are whole runs, each fed with the result of the one before, as in the official evaluation.

    Args:
        name (`str`): in tables.
        folder (`Path`): a checkpoint.
        passes (sequence of `int`): numbers of passes to try; those that no whole number of runs has are left out.
        protocols (sequence of `str`): `"paper"` (whatever the noise, start at the last timestep of training, with the
            schedule stretched to the level) or `"fair"` (start at the timestep of its own schedule that is as noisy as
            the images).
        device (`str`): where to.
    """

    kind = "dit"

    def __init__(self, name: str, folder: Path, passes: Sequence[int], protocols: Sequence[str], device: str) -> None:
        self.name, self.passes, self.asked, self.device = name, sorted(set(passes)), protocols, device
        self.fingerprint = fingerprint(folder)
        self.dit, self.scheduler = load_dit(folder)
        self.dit.to(device).requires_grad_(False)
        config = self.dit.config
        self.parameters = sum(parameter.numel() for parameter in self.dit.parameters())
        self.channels, self.patch_size = config.in_channels, config.patch_size
        self.size = (config.sample_size, config.sample_size)

    def _start(self, noise: Noise, protocol: str) -> tuple[Any, int]:
        """Schedule and timestep to start at."""
        if protocol == "paper":
            return noise_scheduler(noise.level)
        distances = (self.scheduler.alphas_cumprod - noise.remaining).abs()
        return self.scheduler, int(distances.argmin())

    def protocols(self, noise: Noise) -> dict[str, list[list[int]]]:
        """The ways it is used at a noise level, with the numbers of passes each can have; one run gives a group."""
        (stretched, last), (own, start) = (self._start(noise, protocol) for protocol in PROTOCOLS)
        alphas = [scheduler.alphas_cumprod[: last + 1] for scheduler in (stretched, own)]
        if last == start and torch.allclose(*alphas, rtol=1e-4):  # at the level it was trained on
            return {"": self._possible(noise, "fair")}
        return {protocol: self._possible(noise, protocol) for protocol in self.asked}

    def _possible(self, noise: Noise, protocol: str) -> list[list[int]]:
        longest = self._start(noise, protocol)[1] + 1
        whole = [passes for passes in self.passes if passes % longest == 0]
        return [[passes] for passes in self.passes if passes < longest] + ([whole] if whole else [])

    def denoise(
        self, noisy: Tensor, noise: Noise, protocol: str, passes: Sequence[int]
    ) -> Iterator[tuple[int, Tensor]]:
        """Noisy images (B, C, H, W) -> every number of passes with its denoised images."""
        scheduler, start = self._start(noise, protocol or "fair")
        longest = start + 1
        noisy = noisy.to(self.device)
        for count in passes:
            if count < longest:
                yield count, ddim_denoise(self.dit, noisy, scheduler, start, count, clip_sample=True).cpu()
        images = noisy
        for run in range(1, max(passes) // longest + 1):
            images = ddim_denoise(self.dit, images, scheduler, start, longest, clip_sample=True)
            if run * longest in passes:
                yield run * longest, images.cpu()

    def flops(self, image: Tensor, passes: Sequence[int]) -> tuple[int, dict[int, int]]:
        """Operations of one forward pass on an image (1, C, H, W), and of denoising it."""
        image = image.to(self.device)
        timesteps = torch.zeros(1, dtype=torch.long, device=self.device)
        with torch.no_grad():
            forward = count_flops(lambda: predict_noise(self.dit, image, timesteps))
        return forward, {count: count * forward for count in passes}


class ClassicalMethod:
    """
    An algorithm that knows the strength of the noise and works on one image at a time.

    Args:
        name (`str`): one of `CLASSICAL`.
        tuned (`float`, *optional*): the weight of TV, or the filter strength of NL means in standard deviations.
    """

    kind = "classical"

    def __init__(self, name: str, tuned: float | None = None) -> None:
        self.name, self.tuned = name, tuned
        self.fingerprint = "" if tuned is None else f"{tuned:g}"

    def protocols(self, noise: Noise) -> dict[str, list[list[int]]]:
        """The one way it is used; it has no passes."""
        return {"": [[0]]}

    def _image(self, image: np.ndarray, std: float) -> np.ndarray:
        axis = -1 if image.ndim == 3 else None
        if self.name == "BM3D":
            import bm3d

            denoise = bm3d.bm3d if axis is None else bm3d.bm3d_rgb
            return denoise(image, std)
        if self.name == "TV":
            return denoise_tv_chambolle(image, weight=self.tuned, channel_axis=axis)
        return denoise_nl_means(
            image, patch_size=5, patch_distance=6, h=self.tuned * std, sigma=std, fast_mode=True, channel_axis=axis
        )

    def denoise(
        self, noisy: Tensor, noise: Noise, protocol: str, passes: Sequence[int]
    ) -> Iterator[tuple[int, Tensor]]:
        """Noisy images (B, C, H, W) -> denoised images, once."""
        if self.name == "noisy":
            yield 0, noisy
            return
        # the noise shrank the image; undone, what is left is white noise of a known strength
        rescaled = noisy / noise.keep
        if self.name == "rescaled":
            yield 0, rescaled
            return
        std = noise.std / noise.keep / 2  # on 0..1
        yield 0, from_unit(np.stack([self._image(image, std) for image in to_unit(rescaled)]))


Model = EBTMethod | DiTMethod
Method = Model | ClassicalMethod


def tune(name: str, clean: Tensor, noise: Noise, seed: int, judge: Judge) -> float:
    """The best value of `TUNED` by mean PSNR on a few images (B, C, H, W) in -1..1."""
    noisy = noise.add(clean, seed)

    def quality(value: float) -> float:
        ((_, denoised),) = ClassicalMethod(name, value).denoise(noisy, noise, "", [0])
        return float(np.mean(judge(denoised, clean)["psnr"]))

    return max(TUNED[name], key=quality)


__all__ = [
    "CLASSICAL",
    "PROTOCOLS",
    "TARGET",
    "TARGET_SHARE",
    "TUNED",
    "ClassicalMethod",
    "DiTMethod",
    "EBTMethod",
    "Method",
    "Model",
    "count_flops",
    "fingerprint",
    "tune",
]
