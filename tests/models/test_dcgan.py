"""DCGAN against the same networks as plain torch Sequentials with the weights moved over."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gpt4fast.models import DCGANConfig, DCGANDiscriminator, DCGANGenerator

WIDTHS = {8: [64], 32: [256, 128, 64], 64: [512, 256, 128, 64]}


def plain_generator(stem, size, norm="batch", channels=3):
    layers = []
    if stem == "tutorial":
        for before, after in ((100, 256), (256, 512), (512, 784), (784, 100)):
            layers.append(nn.Linear(before, after, bias=norm is None))
            layers += [nn.BatchNorm1d(after)] * (norm == "batch") + [nn.ReLU()]
    layers.append(nn.Unflatten(1, (100, 1, 1)))
    before, stride, padding = 100, 1, 0
    for width in WIDTHS[size]:
        layers.append(nn.ConvTranspose2d(before, width, 4, stride, padding, bias=norm is None))
        layers += [nn.BatchNorm2d(width)] * (norm == "batch") + [nn.ReLU()]
        before, stride, padding = width, 2, 1
    return nn.Sequential(*layers, nn.ConvTranspose2d(before, channels, 4, 2, 1), nn.Tanh())


def move(source, target):
    """The state of one network into another that has the same tensors in the same order under other names."""
    ours, theirs = source.state_dict(), target.state_dict()
    assert [t.shape for t in ours.values()] == [t.shape for t in theirs.values()]
    target.load_state_dict(dict(zip(theirs, ours.values(), strict=True)))
    return target


@pytest.mark.parametrize("stem", ["tutorial", "standard"])
@pytest.mark.parametrize("size", [8, 32, 64])
def test_generator_equals_plain_torch(stem, size):
    config = DCGANConfig(stem=stem, image_size=size)
    generator = DCGANGenerator(config)
    z = torch.randn(4, 100)
    generator(z * 2 + 1)  # so that the running statistics are not the initial ones
    plain = move(generator, plain_generator(stem, size))
    for mode in (True, False):
        generator.train(mode), plain.train(mode)
        images, expected = generator(z), plain(z)
        assert images.shape == (4, 3, size, size) and images.abs().max() <= 1
        assert images.std() > 0.05
        torch.testing.assert_close(images, expected, rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(generator.buffers(), plain.buffers(), strict=True):  # the running statistics moved alike
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_generator_gradients_equal_plain_torch():
    generator = DCGANGenerator(DCGANConfig(stem="tutorial", image_size=8, channels=1, generator_norm=None)).double()
    plain = move(generator, plain_generator("tutorial", 8, norm=None, channels=1).double())
    z, weights = torch.randn(3, 100, dtype=torch.float64), torch.randn(3, 1, 8, 8, dtype=torch.float64)
    for model in (generator, plain):
        (model(z) * weights).sum().backward()
    for ours, theirs in zip(generator.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12)


def test_the_tutorial_generator_has_the_tutorials_layers():
    generator = DCGANGenerator(DCGANConfig())
    linear = [(m.in_features, m.out_features) for m in generator.modules() if isinstance(m, nn.Linear)]
    convolutions = [m for m in generator.modules() if isinstance(m, nn.ConvTranspose2d)]
    assert linear == [(100, 256), (256, 512), (512, 784), (784, 100)]
    assert [(m.in_channels, m.out_channels) for m in convolutions] == [(100, 256), (256, 128), (128, 64), (64, 3)]
    assert all(m.kernel_size == (4, 4) for m in convolutions)
    assert len(DCGANGenerator(DCGANConfig(stem="standard")).stem) == 0


@pytest.mark.parametrize("norm", [None, "batch"])
@pytest.mark.parametrize("size", [8, 32, 64])
def test_discriminator_equals_plain_torch(size, norm):
    discriminator = DCGANDiscriminator(DCGANConfig(image_size=size, discriminator_norm=norm))
    before, layers = 3, []
    for width in WIDTHS[size][::-1]:
        normed = norm == "batch" and before != 3
        layers.append(nn.Conv2d(before, width, 4, 2, 1, bias=before == 3 or norm is None))
        layers += [nn.BatchNorm2d(width)] * normed + [nn.LeakyReLU(0.2)]
        before = width
    plain = move(discriminator, nn.Sequential(*layers, nn.Conv2d(before, 1, 4)))
    images = torch.rand(4, 3, size, size) * 2 - 1
    logits = discriminator(images)
    assert logits.shape == (4,)
    torch.testing.assert_close(logits, plain(images)[:, 0, 0, 0])


def test_logits_are_unbounded_and_each_depends_on_its_own_image():
    discriminator = DCGANDiscriminator(DCGANConfig(image_size=8))
    images = torch.randn(3, 3, 8, 8, requires_grad=True)
    assert discriminator(images * 1e5).abs().max() > 1
    (gradient,) = torch.autograd.grad(discriminator(images)[1], images)
    assert gradient[1].abs().max() > 0 and gradient[[0, 2]].abs().max() == 0


def test_discriminator_learns_with_a_gradient_penalty():
    discriminator = DCGANDiscriminator(DCGANConfig(image_size=8, channels=1, base_channels=16))
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=2e-3)
    losses = []
    for _ in range(20):
        real = (0.3 * torch.randn(16, 1, 8, 8) + 0.5).requires_grad_()
        made = 0.3 * torch.randn(16, 1, 8, 8) - 0.5
        logits = discriminator(real)
        (gradient,) = torch.autograd.grad(logits.sum(), real, create_graph=True)
        loss = F.softplus(-logits).mean() + F.softplus(discriminator(made)).mean()
        optimizer.zero_grad()
        (loss + 0.05 * gradient.square().sum((1, 2, 3)).mean()).backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 1.2 and losses[-1] < 0.6


def test_generator_learns_one_image():
    generator = DCGANGenerator(DCGANConfig(image_size=8, channels=1, base_channels=8, latent_dim=16))
    optimizer = torch.optim.Adam(generator.parameters(), lr=5e-3)
    target = torch.linspace(-0.8, 0.8, 64).reshape(1, 1, 8, 8)
    losses = []
    for _ in range(40):
        loss = (generator(torch.randn(8, 16)) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize("stem", ["tutorial", "standard"])
def test_bfloat16_and_compile(stem):
    config = DCGANConfig(stem=stem, image_size=8, base_channels=8)
    generator, discriminator, z = DCGANGenerator(config).eval(), DCGANDiscriminator(config).eval(), torch.randn(2, 100)
    expected = discriminator(generator(z))
    compiled = torch.compile(lambda z: discriminator(generator(z)), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(z), expected)
    generator.bfloat16(), discriminator.bfloat16()
    assert generator(z.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(discriminator(generator(z.bfloat16())).float(), expected, rtol=0.1, atol=0.01)


def test_wrong_uses_are_named():
    for size in (4, 48, 0):
        with pytest.raises(ValueError, match="image_size must be a"):
            DCGANConfig(image_size=size)
    with pytest.raises(ValueError, match="stem must be one of 'tutorial', 'standard', got 'other'"):
        DCGANConfig(stem="other")
    with pytest.raises(ValueError, match="generator_norm must be one of 'batch', None, got 'layer'"):
        DCGANConfig(generator_norm="layer")
    config = DCGANConfig(image_size=8)
    with pytest.raises(ValueError, match=r"z must be \(batch, 100\), got \(4, 100, 1, 1\)"):
        DCGANGenerator(config)(torch.randn(4, 100, 1, 1))
    with pytest.raises(TypeError, match="z must be floating point, got torch.int64"):
        DCGANGenerator(config)(torch.zeros(4, 100, dtype=torch.long))
    with pytest.raises(ValueError, match=r"images must be \(batch, 3, 8, 8\), got \(4, 784\)"):
        DCGANDiscriminator(config)(torch.zeros(4, 784))
