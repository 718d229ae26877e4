"""The class-conditional latent diffusion pipeline, which diffusers does not have."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ImagePipelineOutput, SchedulerMixin, UNet2DConditionModel, VQModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils.torch_utils import randn_tensor

from msfp.errors import InputError


class ClassConditionalLDMPipeline(DiffusionPipeline):  # type: ignore[misc]
    """Latent diffusion conditioned on class labels by cross-attention (Rombach et al., CVPR 2022).

    The table of class embeddings is the U-Net's own projection of its conditions: a label is given
    as a one-hot row, so that `encoder_hid_proj` looks it up. The last class stands for "none".

    Args:
        vqvae: Decodes latents, which it divides by its `scaling_factor` before.
        unet: With `encoder_hid_dim_type="text_proj"` and as many `encoder_hid_dim` as there are
            classes, "none" included.
        scheduler: Any sampler of diffusers that takes the U-Net's kind of prediction.
    """

    def __init__(
        self, vqvae: VQModel, unet: UNet2DConditionModel, scheduler: SchedulerMixin
    ) -> None:
        super().__init__()
        if unet.config.encoder_hid_dim_type != "text_proj":
            raise InputError(
                "unet must look classes up in encoder_hid_proj: encoder_hid_dim_type must be "
                f"'text_proj', not {unet.config.encoder_hid_dim_type!r}"
            )
        self.register_modules(vqvae=vqvae, unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Sequence[int],
        guidance_scale: float = 3.0,
        generator: torch.Generator | None = None,
        num_inference_steps: int = 20,
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
            InputError: If a label is not a class of the U-Net.
        """
        none = int(self.unet.config.encoder_hid_dim) - 1
        labels = list(class_labels)
        if not all(0 <= label < none for label in labels):
            raise InputError(f"class_labels must lie in 0 to {none - 1}, not {labels}")
        # As in Stable Diffusion, the branch of "none" comes first.
        rows = labels if guidance_scale == 1 else [none] * len(labels) + labels
        device = self._execution_device
        one_hot = F.one_hot(torch.tensor(rows, device=device), none + 1)[:, None]
        condition = one_hot.to(self.unet.dtype)
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        latents = self._noise(len(labels), generator) * self.scheduler.init_noise_sigma
        for timestep in self.progress_bar(self.scheduler.timesteps):
            model_input = self.scheduler.scale_model_input(latents, timestep)
            noise = self._predict(model_input, timestep, condition, guidance_scale)
            latents = self.scheduler.step(noise, timestep, latents).prev_sample
        images = self.vqvae.decode(latents / self.vqvae.config.scaling_factor).sample
        images = (images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).cpu().float().numpy()
        return ImagePipelineOutput(self.numpy_to_pil(images) if output_type == "pil" else images)

    def _noise(self, count: int, generator: torch.Generator | None) -> torch.Tensor:
        """Return the starting noise of `count` images."""
        config = self.unet.config
        shape = (count, config.in_channels, config.sample_size, config.sample_size)
        noise: torch.Tensor = randn_tensor(
            shape, generator=generator, device=self._execution_device, dtype=self.unet.dtype
        )
        return noise

    def _predict(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        condition: torch.Tensor,
        guidance: float,
    ) -> torch.Tensor:
        """Return the guided prediction; both branches run as one batch."""
        repeats = len(condition) // len(latents)
        output: Any = self.unet(
            torch.cat([latents] * repeats), timestep, encoder_hidden_states=condition
        )
        prediction: torch.Tensor = output.sample
        if repeats == 1:
            return prediction
        unconditional, conditional = prediction.chunk(2)
        return unconditional + guidance * (conditional - unconditional)


def pipeline_class(folder: Path) -> type[DiffusionPipeline]:
    """Return the class to load a pipeline folder with: msfp's own where it names that."""
    index = folder / "model_index.json"
    name = json.loads(index.read_text(encoding="utf-8")).get("_class_name")
    own = ClassConditionalLDMPipeline
    return own if name == own.__name__ else DiffusionPipeline
