"""A class-conditional pipeline on pixels, with classifier-free guidance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiTTransformer2DModel, ImagePipelineOutput, SchedulerMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils.torch_utils import randn_tensor

from msfp.errors import InputError


class PixelDiTPipeline(DiffusionPipeline):  # type: ignore[misc]
    """diffusers' `DiTPipeline` without its autoencoder: the transformer works on the pixels.

    Args:
        transformer: Predicts the noise from (x_t, t, class label); its label `num_classes` stands
            for "no class".
        scheduler: Any sampler of diffusers that takes noise predictions.
    """

    def __init__(self, transformer: DiTTransformer2DModel, scheduler: SchedulerMixin) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Sequence[int],
        guidance_scale: float = 2.0,
        generator: torch.Generator | None = None,
        num_inference_steps: int = 50,
        output_type: str = "pil",
    ) -> ImagePipelineOutput:
        """Sample one image for each label.

        Args:
            class_labels: Classes of the images.
            guidance_scale: Weight w of eps(none) + w (eps(class) - eps(none)) (Ho and Salimans,
                2022); 1 is the plain conditional model, which is called once instead of twice.
            generator: Source of the starting noise.
            num_inference_steps: Sampler steps.
            output_type: "pil", or "np" for an array (n, height, width, channels) in [0, 1].

        Raises:
            InputError: If a label is not a class of the transformer.
        """
        classes = int(self.transformer.config.num_embeds_ada_norm)
        labels = list(class_labels)
        if not all(0 <= label < classes for label in labels):
            raise InputError(f"class_labels must lie in 0 to {classes - 1}, not {labels}")
        device = self._execution_device
        condition = torch.tensor(labels, device=device)
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        sample = self._noise(len(labels), generator) * self.scheduler.init_noise_sigma
        for timestep in self.progress_bar(self.scheduler.timesteps):
            model_input = self.scheduler.scale_model_input(sample, timestep)
            noise = self._predict(model_input, timestep, condition, guidance_scale)
            sample = self.scheduler.step(noise, timestep, sample).prev_sample
        images = (sample / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).cpu().float().numpy()
        return ImagePipelineOutput(self.numpy_to_pil(images) if output_type == "pil" else images)

    def _noise(self, count: int, generator: torch.Generator | None) -> torch.Tensor:
        """Return the starting noise of `count` images."""
        config = self.transformer.config
        shape = (count, config.in_channels, config.sample_size, config.sample_size)
        dtype = self.transformer.dtype
        noise: torch.Tensor = randn_tensor(
            shape, generator=generator, device=self._execution_device, dtype=dtype
        )
        return noise

    def _predict(
        self, sample: torch.Tensor, timestep: torch.Tensor, labels: torch.Tensor, guidance: float
    ) -> torch.Tensor:
        """Return the guided noise prediction; both branches run as one batch."""
        if guidance == 1:
            return self._forward(sample, timestep, labels)
        none = torch.full_like(labels, int(self.transformer.config.num_embeds_ada_norm))
        both = self._forward(torch.cat([sample] * 2), timestep, torch.cat([labels, none]))
        conditional, unconditional = both.chunk(2)
        return unconditional + guidance * (conditional - unconditional)

    def _forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        prediction: Any = self.transformer(
            sample, timestep=timestep.expand(len(sample)), class_labels=labels
        ).sample
        tensor: torch.Tensor = prediction
        return tensor
