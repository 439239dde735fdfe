"""
Energy-Based Transformer for images (arXiv 2507.02092, section 4.3): a noisy image descends the transformer's energy.

Shapes: ``B`` images, ``M`` candidates an image, ``C`` channels, ``H x W`` pixels, ``K`` steps.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.utils import can_return_tuple

from .candidates import ImageCandidates
from .checks import check_energies, check_image_values, check_images, outside_inference_mode
from .configuration_ebt_image import EBTImageConfig
from .descent import DescentOutput, DescentStep, descend, standard_normal
from .layers_common import EBTStepSize
from .losses import ImageStepLosses
from .outputs import EBTImageDenoisingOutput
from .stopping import EnergyFunction, Index, Narrowing
from .thinking import (
    Thinking,
    choose_candidate,
    given_start,
    make_schedule,
    pick_candidate,
    random_generator,
    random_offsets,
    random_step_sizes,
    resolve_thinking,
    stop_rules,
)
from .thinking_ebt import ThinkingConfig
from .transformer_image import EBTImageModel, EBTImagePreTrainedModel


class EBTForImageDenoising(EBTImagePreTrainedModel):
    r"""
    Energy-Based Transformer for images: the clean image is found by descending an energy from the noisy one.

    Args:
        config ([`EBTImageConfig`]): the architecture.

    Example:

    ```python
    >>> import torch
    >>> from ebt_transformers import EBTForImageDenoising, EBTImageConfig

    >>> model = EBTForImageDenoising(EBTImageConfig.from_preset("4xs", image_size=32, patch_size=4)).eval()
    >>> output = model(torch.zeros(2, 3, 32, 32), thinking_steps=3, output_energies=True)
    >>> output.reconstruction.shape, output.energies.shape
    (torch.Size([2, 3, 32, 32]), torch.Size([2, 4]))
    ```
    """

    _auto_class = "AutoModelForImageToImage"  # a saved model carries its code
    # half precision holds a step size of 3000 to the nearest 2 or 16 only
    _keep_in_fp32_modules_strict = ["step_size"]

    def __init__(self, config: EBTImageConfig) -> None:
        super().__init__(config)
        self.model = EBTImageModel(config)
        self.step_size = EBTStepSize(config)
        self.gradient_checkpointing = False
        self.post_init()

    @outside_inference_mode
    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        thinking: ThinkingConfig | dict[str, Any] | None = None,
        initial_candidate: Tensor | None = None,
        output_energies: bool | None = None,
        output_trajectory: bool | None = None,
        **kwargs: Any,
    ) -> EBTImageDenoisingOutput:
        """
        Args:
            pixel_values (`torch.FloatTensor` of shape `(B, C, H, W)`): noisy images scaled as in training (pixels: -1
                to 1 before the noise), or latents. `H` and `W` are any multiples of `config.patch_size`.
            labels (`torch.FloatTensor` of shape `(B, C, H, W)`, *optional*): the clean images.
            thinking ([`ThinkingConfig`] or `dict`, *optional*): how to think; its fields can also be given flat, as
                `thinking_steps=3`. Unset fields come from the config. Energies, tolerance and the choice among
                candidates are those of whole images.
            initial_candidate (`torch.FloatTensor` of shape `(B, C, H, W)` or `(B, M, C, H, W)`, *optional*): images to
                start from.
            output_energies (`bool`, *optional*): return `energies`, the last being that of the returned image (one
                more forward).
            output_trajectory (`bool`, *optional*): return `trajectory`, the image after every step.
            kwargs: `num_items_in_batch` for the loss.

        Returns:
            [`EBTImageDenoisingOutput`].

        Raises:
            ValueError: for bad images (empty, wrong channels, sides that are no multiple of the patch, values that are
                not finite or look like 0 to 255), labels with such values or of another shape, an initial candidate of
                another shape, thinking options that are unknown or out of range, and several candidates that would all
                be the same.
        """
        check_images(pixel_values, self.config.num_channels, self.config.patch_size)
        check_image_values(pixel_values)
        flat = {name: kwargs.pop(name) for name in list(kwargs) if name.startswith("thinking_")}
        num_items = kwargs.pop("num_items_in_batch", None)
        if kwargs:
            raise TypeError(
                f"Unknown argument(s) {', '.join(sorted(kwargs))}. Allowed beside thinking options: labels, thinking, "
                "initial_candidate, output_energies, output_trajectory, num_items_in_batch, return_dict."
            )
        resolved = resolve_thinking(self.config, thinking, flat, self.training)
        schedule = make_schedule(resolved, self._step_size(pixel_values))
        noisy = pixel_values.float()
        state = self._initial_state(noisy, resolved, initial_candidate)
        losses = None
        if labels is not None:
            if labels.shape != pixel_values.shape:
                raise ValueError(
                    f"`labels` must be clean images of the shape of `pixel_values`, {tuple(pixel_values.shape)}, got "
                    f"{tuple(labels.shape)}."
                )
            check_image_values(labels)
            losses = ImageStepLosses(
                labels.to(noisy.device),
                self.config.reconstruction_loss,
                self.config.loss_on_steps,
                num_items,
            )
        states: list[Tensor] = [state] if output_trajectory else []

        def on_step(index: int, state: Tensor, energy: Tensor) -> None:
            if losses is not None and state.shape[1] == 1:
                losses.record(index, state[:, 0], energy)
            if output_trajectory:
                states.append(state.detach())

        watched = output_trajectory or (losses is not None and state.shape[1] == 1)
        result = self._think(state, noisy, schedule, resolved, bool(output_energies), on_step if watched else None)
        if not self.training:
            check_energies(result.energies[-1], schedule[-1].step_size)
        chosen = choose_candidate(result, resolved.selection, state.shape[1])
        reconstruction = pick_candidate(result.state, chosen)[:, 0]
        energies = pick_candidate(torch.stack(result.energies, dim=-1), chosen)[:, 0]
        loss = None
        if losses is not None:
            loss = losses.objective() if self.training else losses(reconstruction)
        mean_energies = None
        if self.training:
            mean_energies = torch.stack([energy.detach().mean() for energy in result.energies[: len(schedule)]])
        return EBTImageDenoisingOutput(
            loss=loss,
            reconstruction=reconstruction,
            energies=energies if output_energies else None,
            steps_taken=pick_candidate(result.steps_taken, chosen)[:, 0],
            step_losses=None if losses is None else losses.stacked(),
            mean_energies=mean_energies,
            trajectory=pick_candidate(torch.stack(states, dim=2), chosen)[:, 0] if output_trajectory else None,
        )

    @outside_inference_mode
    def energy(
        self,
        pixel_values: Tensor,
        noisy_pixel_values: Tensor | None = None,
        landscape: int | None = None,
        per_patch: bool = False,
    ) -> Tensor:
        """
        Energy of given images: how badly each fits (what the model knows of clean images, and of its noisy image if it
        is conditional). Lower is better. Differentiable in the images.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(B, C, H, W)`): images to judge.
            noisy_pixel_values (`torch.FloatTensor` of shape `(B, C, H, W)`, *optional*): the noisy images they are
                candidates for; needed by models with `image_conditioning="noisy_image"`.
            landscape (`int`, *optional*): which landscape to judge on; the last by default.
            per_patch (`bool`, *optional*, defaults to `False`): the energy of every patch instead of their mean.

        Returns:
            `torch.FloatTensor` of shape `(B,)`, or `(B, T)` with `per_patch`, row by row; in float32.

        Raises:
            ValueError: as [`EBTImageModel.forward`].

        Example:

        ```python
        >>> import torch
        >>> from ebt_transformers import EBTForImageDenoising, EBTImageConfig

        >>> model = EBTForImageDenoising(EBTImageConfig.from_preset("4xs", image_size=32, patch_size=4)).eval()
        >>> model.energy(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2])
        ```
        """
        landscape = self.config.num_landscapes - 1 if landscape is None else landscape
        check_images(pixel_values, self.config.num_channels, self.config.patch_size)
        check_image_values(pixel_values)
        images = pixel_values.to(self.dtype)
        energies = self.model(images, noisy_pixel_values=noisy_pixel_values, landscape=landscape).energies
        return energies if per_patch else energies.mean(-1)

    @torch.no_grad()
    def suggest_target_energy(self, pixel_values: Tensor, share: float = 0.9, **thinking: Any) -> float:
        """
        Where thinking can stop (`thinking_target_energy`): the energy that this share of images comes down to. Give it
        images with the noise of training; noisier ones then take as many steps as they need to get there, and cleaner
        ones fewer. Not in the paper.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(B, C, H, W)`): noisy images, a hundred or more.
            share (`float`, *optional*, defaults to 0.9): of the images that reach the energy, above 0 and at most 1. A
                smaller share thinks longer about noise stronger than in training, and blurs more images with less.
            thinking: options of the descent, `thinking_steps=2` and the like; the checkpoint's own by default.

        Returns:
            `float`, on the model's own scale of energy.

        Raises:
            ValueError: for a share out of range, and as [`forward`].

        Example:

        ```python
        >>> import torch
        >>> from ebt_transformers import EBTForImageDenoising, EBTImageConfig

        >>> model = EBTForImageDenoising(EBTImageConfig.from_preset("4xs", image_size=32, patch_size=4)).eval()
        >>> target = model.suggest_target_energy(torch.randn(8, 3, 32, 32))
        >>> output = model(torch.randn(2, 3, 32, 32), thinking_steps=8, thinking_target_energy=target)
        ```
        """
        if not 0 < share <= 1:
            raise ValueError(f"`share` must be above 0 and at most 1, got {share}.")
        if self.training:
            raise ValueError("A target energy is for evaluation: call `model.eval()` first.")
        check_images(pixel_values, self.config.num_channels, self.config.patch_size)
        energies = [self(part, output_energies=True, **thinking).energies[:, -1] for part in pixel_values.split(32)]
        return float(torch.cat(energies).quantile(share))

    def _step_size(self, images: Tensor) -> Tensor:
        """The step size, in training one for each image; it grows with the patches the energy is averaged over."""
        rows, columns = (side // self.config.patch_size for side in images.shape[-2:])
        step_size = self.step_size() * (rows * columns / (self.config.grid[0] * self.config.grid[1]))
        if not self.training:
            return step_size
        return random_step_sizes(self.config, step_size, (len(images), 1, 1, 1, 1))

    def _initial_state(self, noisy: Tensor, thinking: Thinking, given: Tensor | None) -> Tensor:
        """Initial images (B, M, C, H, W) in float32."""
        shape = (len(noisy), thinking.candidates, *noisy.shape[1:])
        if given is not None:
            axes = "images, candidates, channels, height, width"
            return given_start(given, shape, axes, self.training).to(noisy.device)
        mean = noisy if self.config.candidate_init == "image" else torch.zeros_like(noisy)
        spread = self.config.start_spread
        starts = mean[:, None].expand(shape)
        if self.training:
            if thinking.init == "mean":
                return starts
            return starts + spread * standard_normal(shape, None, noisy.device, torch.float32)
        if thinking.candidates > 1 and spread == 0 and not any(thinking.noises):
            raise ValueError(
                f"All {thinking.candidates} candidates would start at the noisy image and come out the same. Give "
                "them noise (`thinking_noise_std=0.05`), or use one candidate."
            )
        return starts if spread == 0 else starts + random_offsets(thinking, shape[1:], spread, noisy.device)

    def _think(
        self,
        state: Tensor,
        noisy: Tensor,
        schedule: list[DescentStep],
        thinking: Thinking,
        output_energies: bool,
        on_step: Callable[[int, Tensor, Tensor], None] | None,
    ) -> DescentOutput:
        """Descends all candidates of all images at once."""
        candidates = state.shape[1]
        learning = self.training and torch.is_grad_enabled()
        context = None
        if self.config.image_conditioning == "noisy_image":
            context = noisy.to(self.dtype).repeat_interleave(candidates, dim=0)

        def energy(embedded: Tensor, landscape: int, context: Tensor | None = context) -> Tensor:
            judged = self.model(embedded.flatten(0, 1), noisy_pixel_values=context, landscape=landscape)
            return judged.energies.mean(-1).view(embedded.shape[:2])

        def narrow(index: Index) -> EnergyFunction:
            if context is None:
                return energy
            return partial(energy, context=context.unflatten(0, (-1, candidates))[index].flatten(0, 1))

        graph = "none"
        if learning:
            graph = "all" if self.config.loss_on_steps == "all" else "last"
        return descend(
            energy,
            ImageCandidates(self.dtype),
            state,
            schedule,
            detach_between_steps=self.config.detach_between_steps or not learning,
            graph_on_steps=graph,
            accept_only_lower_energy=thinking.accept_only_lower_energy,
            stop=stop_rules(thinking, candidates),
            narrow=Narrowing(narrow),
            final_energy=output_energies or candidates > 1,
            generator=random_generator(thinking, state.device),
            checkpoint=self._gradient_checkpointing_func if learning and self.gradient_checkpointing else None,
            on_step=on_step,
        )


__all__ = ["EBTForImageDenoising", "EBTImageModel", "EBTImagePreTrainedModel"]
