"""Adversarial training, the same for pictures and sounds.

The generator turns noise into samples, the discriminator gives each sample a logit: how sure it is that the sample is
real. They train in turns, on the non-saturating logistic loss (Goodfellow et al. 2014) or the hinge loss (Lim and Ye
2017), with the R1 penalty on the discriminator's gradient at real samples (Mescheder, Geiger and Nowozin 2018), which
needs a second derivative. What is kept in the end is a moving average of the generator's weights (Karras et al. 2018).
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt4fast.training.loop import Loop, Metrics

LOSSES = ("logistic", "hinge")


def discriminator_loss(real: Tensor, fake: Tensor, loss: str = "logistic") -> Tensor:
    """What the discriminator minimises, of its logits for real samples (B,) and generated ones (B,); a scalar."""
    if loss == "hinge":
        return F.relu(1 - real).mean() + F.relu(1 + fake).mean()
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def generator_loss(fake: Tensor, loss: str = "logistic") -> Tensor:
    """What the generator minimises, of the discriminator's logits (B,) for its samples; a scalar."""
    return -fake.mean() if loss == "hinge" else F.softplus(-fake).mean()


def r1_penalty(discriminator: nn.Module, real: Tensor) -> Tensor:
    """Half the squared norm of the gradient of the logit at real samples, averaged over the batch; a scalar that can
    be differentiated."""
    real = real.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(discriminator(real).sum(), real, create_graph=True)
    return gradient.square().sum() / (2 * len(real))


def train_gan(
    generator: nn.Module,
    discriminator: nn.Module,
    data: Tensor,
    folder: str | os.PathLike[str],
    *,
    steps: int,
    batch_size: int = 32,
    lr: float | tuple[float, float] = 2e-4,
    betas: tuple[float, float] = (0.0, 0.99),
    loss: str = "logistic",
    r1: float = 1.0,
    r1_every: int = 4,
    average: float = 0.99,
    seed: int = 0,
    name: str = "gan",
    seconds: float | None = None,
    checkpoint_every: int = 100,
    progress: Callable[[int, int, Metrics], None] | None = None,
) -> list[Metrics]:
    """Trains both networks in place; interrupted, the same call goes on (see `Loop`).

    In the end the generator holds the average of its weights, its batch norms statistics made for it, and is in
    evaluation mode.

    Args:
        generator: noise (B, generator.config.latent_dim) to samples shaped like the rows of `data`.
        discriminator: samples to logits (B,).
        data: (N, …) real samples in [-1, 1].
        folder: where the checkpoint `name`.pt lives.
        steps: pairs of updates.
        batch_size: samples of each kind in a step.
        lr: Adam's learning rate, or one for the generator and one for the discriminator.
        betas: Adam's.
        loss: "logistic" or "hinge".
        r1: weight of the R1 penalty; 0 is without.
        r1_every: the penalty is taken only every so many steps, times as much (Karras et al. 2020).
        average: decay per step of the moving average of the weights; shorter at the start.
        seed: seed of noise and batches.
        seconds, checkpoint_every, progress: see `Loop`.

    Returns:
        One dict per step: generator, discriminator (their losses), real, fake (mean logits).

    Raises:
        ValueError: an argument out of range (named), or a checkpoint of another configuration.
        FloatingPointError: training has diverged.
    """
    _check(generator, data, batch_size, loss, r1, r1_every, average)
    lr_generator, lr_discriminator = lr if isinstance(lr, tuple) else (lr, lr)
    averaged = copy.deepcopy(generator).requires_grad_(False)
    adam_generator = torch.optim.Adam(generator.parameters(), lr=lr_generator, betas=betas)
    adam_discriminator = torch.optim.Adam(discriminator.parameters(), lr=lr_discriminator, betas=betas)
    device = next(generator.parameters()).device
    latent_dim = generator.config.latent_dim
    data = data.to(device)

    def noise() -> Tensor:
        return torch.randn(batch_size, latent_dim, device=device)

    def step(index: int) -> Metrics:
        real = data[torch.randint(len(data), (batch_size,), device=device)]
        fake = generator(noise())

        discriminator.requires_grad_(True)
        real_logits, fake_logits = discriminator(real), discriminator(fake.detach())
        d_loss = discriminator_loss(real_logits, fake_logits, loss)
        total = d_loss
        if r1 > 0 and index % r1_every == 0:
            total = total + r1 * r1_every * r1_penalty(discriminator, real)
        adam_discriminator.zero_grad()
        total.backward()
        adam_discriminator.step()

        discriminator.requires_grad_(False)
        g_loss = generator_loss(discriminator(fake), loss)
        adam_generator.zero_grad()
        g_loss.backward()
        adam_generator.step()

        decay = min(average, (1 + index) / (10 + index))  # at the start the weights are not worth remembering
        with torch.no_grad():
            for mean, parameter in zip(averaged.parameters(), generator.parameters(), strict=True):
                mean.lerp_(parameter, 1 - decay)
        return {
            "generator": g_loss.item(),
            "discriminator": d_loss.item(),
            "real": real_logits.mean().item(),
            "fake": fake_logits.mean().item(),
        }

    generator.train()
    discriminator.train()
    loop = Loop(
        folder,
        name,
        modules={"generator": generator, "discriminator": discriminator, "averaged": averaged},
        optimizers={"adam_generator": adam_generator, "adam_discriminator": adam_discriminator},
        steps=steps,
        checkpoint_every=checkpoint_every,
        seconds=seconds,
        seed=seed,
        config={
            "batch_size": batch_size,
            "loss": loss,
            "r1": r1,
            "r1_every": r1_every,
            "average": average,
            "data": tuple(data.shape),
        },
    )
    history = loop.run(step, progress)
    discriminator.requires_grad_(True)
    generator.load_state_dict(averaged.state_dict())
    _measure_batch_norms(generator, latent_dim, batch_size, seed, device)
    return history


def _check(
    generator: nn.Module, data: Tensor, batch_size: int, loss: str, r1: float, r1_every: int, average: float
) -> None:
    if not hasattr(getattr(generator, "config", None), "latent_dim"):
        raise ValueError(f"generator must have config.latent_dim, got {type(generator).__name__}")
    if data.dim() < 2 or len(data) == 0 or not data.is_floating_point():
        raise ValueError(f"data must be floating point samples (N, …), N > 0, got {tuple(data.shape)} {data.dtype}")
    if not data.abs().amax() <= 1.01:  # also refuses NaN
        raise ValueError(f"data must be in [-1, 1], got a largest magnitude of {data.abs().amax().item():g}")
    if batch_size < 2:
        raise ValueError(f"batch_size must be at least 2, got {batch_size}")
    if loss not in LOSSES:
        raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {loss!r}")
    if not r1 >= 0 or r1_every < 1:
        raise ValueError(f"r1 must be at least 0 and r1_every at least 1, got {r1} and {r1_every}")
    if not 0 <= average < 1:
        raise ValueError(f"average must be in [0, 1), got {average}")


def _measure_batch_norms(
    generator: nn.Module, latent_dim: int, batch_size: int, seed: int, device: torch.device
) -> None:
    """Averaged weights need statistics of their own: means over 20 batches. Leaves the generator in evaluation mode."""
    norms = [module for module in generator.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [module.momentum for module in norms]
    for module in norms:
        module.reset_running_stats()
        module.momentum = None  # a plain mean of all batches
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _ in range(20 if norms else 0):
            generator(torch.randn(batch_size, latent_dim, generator=source).to(device))
    for module, momentum in zip(norms, momenta, strict=True):
        module.momentum = momentum
    generator.eval()
