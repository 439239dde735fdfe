"""How near denoised images come to the clean ones, on tensors; the `evaluate` metrics are in `metrics/`."""

import torch


# a module of its own: the demonstration needs it where the Trainer cannot be imported (it wants accelerate)
def image_psnr(images: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
    """
    Peak signal-to-noise ratio of images on pixels clamped to 0..255, in dB.

    Args:
        images, clean (`torch.FloatTensor` of shape `(B, C, H, W)`): -1..1; what lies outside is clamped.

    Returns:
        `torch.FloatTensor` of shape `(B,)`; at most 148 (equal images).
    """
    pixels, truth = ((values.float().clamp(-1, 1) + 1) * 127.5 for values in (images, clean))
    error = (pixels - truth).square().flatten(1).mean(1)
    return 10 * torch.log10(255.0**2 / error.clamp(min=1e-10))


__all__ = ["image_psnr"]
