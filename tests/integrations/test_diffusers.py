"""optimize() of diffusers' models, whose attention modules leave the computation to processors that are no modules."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import gpt4fast
from gpt4fast.backends import dispatch

diffusers = pytest.importorskip("diffusers")


def unet() -> nn.Module:
    return diffusers.UNet2DModel(
        sample_size=32, block_out_channels=(32, 64), layers_per_block=1, attention_head_dim=16,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip


def conditional_unet() -> nn.Module:
    return diffusers.UNet2DConditionModel(
        sample_size=16, block_out_channels=(32, 64), layers_per_block=1, attention_head_dim=4, cross_attention_dim=32,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip


def autoencoder() -> nn.Module:
    return diffusers.AutoencoderKL(
        block_out_channels=(32, 64), latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip


def audio_autoencoder() -> nn.Module:
    return diffusers.AutoencoderOobleck(
        encoder_hidden_size=16, downsampling_ratios=[2, 4], channel_multiples=[1, 2], decoder_channels=16,
        decoder_input_channels=8, audio_channels=1,
    )  # fmt: skip


def dit() -> nn.Module:
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=16, in_channels=4, out_channels=4, num_layers=2, sample_size=16,
        patch_size=2, num_embeds_ada_norm=10,
    )  # fmt: skip


def stable_diffusion_3() -> nn.Module:
    return diffusers.SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=16, out_channels=4,
        pos_embed_max_size=16,
    )  # fmt: skip


def flux() -> nn.Module:
    return diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=16, axes_dims_rope=[4, 6, 6],
    )  # fmt: skip


IMAGES, LATENTS, TEXT = (torch.randn(2, *shape) for shape in ((3, 32, 32), (4, 16, 16), (7, 32)))
STEP, POOLED = torch.tensor([3, 400]), torch.randn(2, 16)
PLACES = torch.cartesian_prod(torch.zeros(1), torch.arange(8.0), torch.arange(8.0))
# name -> (model, its call, attention modules, transposed convolutions)
MODELS = {
    "UNet2DModel": (unet, lambda m: m(IMAGES, 10).sample, 4, 0),
    "UNet2DConditionModel": (conditional_unet, lambda m: m(LATENTS, 10, TEXT).sample, 8, 0),
    "AutoencoderKL": (autoencoder, lambda m: m(IMAGES).sample, 2, 0),
    "AutoencoderOobleck": (audio_autoencoder, lambda m: m.decode(torch.randn(2, 8, 50)).sample, 0, 2),
    "DiT": (dit, lambda m: m(LATENTS, timestep=STEP, class_labels=torch.tensor([1, 2])).sample, 2, 0),
    "Stable Diffusion 3": (
        stable_diffusion_3,
        lambda m: m(LATENTS, encoder_hidden_states=TEXT, pooled_projections=POOLED, timestep=STEP).sample, 2, 0,
    ),
    "Flux": (
        flux,
        lambda m: m(
            LATENTS.view(2, 64, 16), encoder_hidden_states=TEXT, pooled_projections=POOLED, timestep=STEP / 1000,
            img_ids=PLACES, txt_ids=torch.zeros(7, 3),
        ).sample, 2, 0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_models(name, check_optimized) -> None:
    make, run, attentions, convolutions = MODELS[name]
    seed = torch.seed()

    def seeded(model: nn.Module) -> torch.Tensor:
        torch.manual_seed(seed)
        return run(model)

    _, calls = check_optimized(make(), seeded)
    assert (calls["attention"], calls["conv_transpose"]) == (attentions, convolutions)


def heard(run: Callable) -> list[str]:
    ops: list[str] = []
    with dispatch.listening(lambda op, implementation: ops.append(op.name)):
        run()
    return ops


def test_processors_may_be_changed_afterwards() -> None:
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

    fast = gpt4fast.optimize(conditional_unet())
    with torch.no_grad():
        expected = fast(LATENTS, 10, TEXT).sample
        for processor, calls in ((AttnProcessor(), 0), (AttnProcessor2_0(), 8)):
            fast.set_attn_processor(processor)
            assert len(heard(lambda: torch.testing.assert_close(fast(LATENTS, 10, TEXT).sample, expected))) == calls


def test_training() -> None:
    plain = unet()
    fast = gpt4fast.optimize(plain, training=True)
    gradients = []
    for model in (plain, fast):
        plain.zero_grad()  # the two share their parameters
        torch.manual_seed(0)
        model(IMAGES, 10).sample.square().mean().backward()
        gradients.append([p.grad for p in plain.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-5)


def test_a_pipeline() -> None:
    pipeline = diffusers.DDPMPipeline(unet(), diffusers.DDPMScheduler())
    pipeline.set_progress_bar_config(disable=True)

    def sample() -> torch.Tensor:
        images = pipeline(2, torch.Generator().manual_seed(0), num_inference_steps=2, output_type="numpy").images
        return torch.from_numpy(images)

    expected, plain = sample(), pipeline.unet
    pipeline.unet = gpt4fast.optimize(plain)
    assert heard(lambda: torch.testing.assert_close(sample(), expected, rtol=0, atol=1e-4)) == ["attention"] * 8
    restored = gpt4fast.restore(pipeline.unet)
    assert [type(m) for m in restored.modules()] == [type(m) for m in plain.modules()]
