"""WaveGAN against the same networks as plain torch Sequentials with the weights moved over."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gpt4fast.models import WaveGANConfig, WaveGANDiscriminator, WaveGANGenerator
from gpt4fast.models.wavegan import phase_shuffle

SIZES = [(16384, 16, [64, 32, 16, 8, 4]), (8192, 8, [64, 32, 16, 8, 4]), (1920, 30, [16, 8, 4])]


def move(source, target):
    ours, theirs = source.state_dict(), target.state_dict()
    assert sorted(map(str, (t.shape for t in ours.values()))) == sorted(map(str, (t.shape for t in theirs.values())))
    linear = [n for n in ours if n.startswith("linear")]
    rest = [n for n in ours if not n.startswith("linear")]
    order = linear + rest if target[0].__class__ is nn.Linear else rest + linear
    target.load_state_dict(dict(zip(theirs, (ours[n] for n in order), strict=True)))
    return target


@pytest.mark.parametrize("samples, start, widths", SIZES)
def test_generator_equals_plain_torch(samples, start, widths):
    generator = WaveGANGenerator(WaveGANConfig(samples=samples, base_channels=4))
    layers = [nn.Linear(100, widths[0] * start), nn.ReLU(), nn.Unflatten(1, (widths[0], start))]
    for before, after in zip(widths, [*widths[1:], 1], strict=True):
        layers += [nn.ConvTranspose1d(before, after, 25, stride=4, padding=11, output_padding=1), nn.ReLU()]
    plain = move(generator, nn.Sequential(*layers[:-1], nn.Tanh()))
    z = torch.randn(3, 100)
    waves = generator(z)
    assert waves.shape == (3, 1, samples) and waves.abs().max() <= 1 and waves.std() > 0.01
    torch.testing.assert_close(waves, plain(z), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("samples, start, widths", SIZES)
def test_discriminator_equals_plain_torch(samples, start, widths):
    discriminator = WaveGANDiscriminator(WaveGANConfig(samples=samples, base_channels=4)).eval()
    layers, before = [], 1
    for after in widths[::-1]:
        layers += [nn.Conv1d(before, after, 25, stride=4, padding=11), nn.LeakyReLU(0.2)]
        before = after
    plain = move(discriminator, nn.Sequential(*layers, nn.Flatten(), nn.Linear(before * start, 1)))
    waves = torch.rand(3, 1, samples) * 2 - 1
    logits = discriminator(waves)
    assert logits.shape == (3,)
    torch.testing.assert_close(logits, plain(waves)[:, 0])


def test_sizes_of_the_paper():
    with torch.device("meta"):
        generator = WaveGANGenerator(WaveGANConfig(samples=16384))
    shapes = [tuple(layer.weight.shape) for layer in generator.layers]
    assert shapes == [(1024, 512, 25), (512, 256, 25), (256, 128, 25), (128, 64, 25), (64, 1, 25)]
    assert generator.linear.weight.shape == (256 * 64, 100)


def test_phase_shuffle_shifts_each_row_and_mirrors_the_ends():
    x = torch.arange(10.0).expand(200, 3, 10) + 100 * torch.arange(200.0)[:, None, None]
    shuffled = phase_shuffle(x, 2) - 100 * torch.arange(200.0)[:, None, None]
    expected = {
        (2, 1, 0, 1, 2, 3, 4, 5, 6, 7),
        (1, 0, 1, 2, 3, 4, 5, 6, 7, 8),
        (0, 1, 2, 3, 4, 5, 6, 7, 8, 9),
        (1, 2, 3, 4, 5, 6, 7, 8, 9, 8),
        (2, 3, 4, 5, 6, 7, 8, 9, 8, 7),
    }
    assert {tuple(row) for row in shuffled[:, 0].tolist()} == expected
    assert torch.equal(shuffled[:, 0], shuffled[:, 2])  # all channels of a row alike


def test_phase_shuffle_is_for_training_and_can_be_off():
    waves = torch.randn(4, 1, 512)
    discriminator = WaveGANDiscriminator(WaveGANConfig(samples=512, base_channels=4))
    assert not torch.equal(discriminator(waves), discriminator(waves))
    discriminator.eval()
    assert torch.equal(discriminator(waves), discriminator(waves))
    still = WaveGANDiscriminator(WaveGANConfig(samples=512, base_channels=4, phase_shuffle=0))
    assert torch.equal(still(waves), still(waves))


def test_discriminator_learns_with_a_gradient_penalty():
    discriminator = WaveGANDiscriminator(WaveGANConfig(samples=128, base_channels=8))
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=3e-3)
    t = torch.arange(128) / 128
    losses = []
    for _ in range(20):
        real = torch.sin(2 * torch.pi * (4 * t + torch.rand(16, 1, 1))).requires_grad_()
        made = torch.sin(2 * torch.pi * (24 * t + torch.rand(16, 1, 1)))
        logits = discriminator(real)
        (gradient,) = torch.autograd.grad(logits.sum(), real, create_graph=True)
        loss = F.softplus(-logits).mean() + F.softplus(discriminator(made)).mean()
        optimizer.zero_grad()
        (loss + 0.05 * gradient.square().sum((1, 2)).mean()).backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 1.1 and losses[-1] < 0.6


def test_bfloat16_and_compile():
    config = WaveGANConfig(samples=128, base_channels=8)
    generator, discriminator, z = WaveGANGenerator(config), WaveGANDiscriminator(config), torch.randn(2, 100)
    discriminator.eval()
    expected = discriminator(generator(z))
    compiled = torch.compile(lambda z: discriminator(generator(z)), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(z), expected)
    torch.compile(discriminator.train(), fullgraph=True, backend="aot_eager")(generator(z)).sum().backward()
    generator.bfloat16(), discriminator.bfloat16().eval()
    assert generator(z.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(discriminator(generator(z.bfloat16())).float(), expected, rtol=0.1, atol=0.02)


def test_wrong_uses_are_named():
    for samples in (16000, 31, 8):
        with pytest.raises(ValueError, match=f"samples must be a power of four .*, got {samples}"):
            WaveGANConfig(samples=samples)
    with pytest.raises(ValueError, match="samples must be a positive int, got 0"):
        WaveGANConfig(samples=0)
    with pytest.raises(ValueError, match="phase_shuffle must be from 0 to 7, got 8"):
        WaveGANConfig(samples=128, phase_shuffle=8)
    config = WaveGANConfig(samples=128, base_channels=4)
    with pytest.raises(ValueError, match=r"z must be \(batch, 100\), got \(4, 16\)"):
        WaveGANGenerator(config)(torch.randn(4, 16))
    with pytest.raises(ValueError, match=r"waves must be \(batch, 1, 128\), got \(4, 128\)"):
        WaveGANDiscriminator(config)(torch.zeros(4, 128))
