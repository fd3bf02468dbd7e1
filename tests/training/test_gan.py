"""Adversarial training: losses and penalty against formulas, a small network that must learn, exact resumption."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import gpt4fast.nn as fast_nn
from gpt4fast.data import load_drums
from gpt4fast.models import (
    DCGANConfig,
    DCGANDiscriminator,
    DCGANGenerator,
    WaveGANConfig,
    WaveGANDiscriminator,
    WaveGANGenerator,
)
from gpt4fast.training.gan import discriminator_loss, generator_loss, r1_penalty, train_gan
from gpt4fast.training.gan_presets import (
    VERSIONS,
    digits_gan,
    digits_networks,
    drum_versions,
    drums_gan,
    drums_networks,
)

REAL, FAKE = torch.tensor([-1.0, 0.0, 3.0]), torch.tensor([2.0, -0.5])


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Networks this small gain nothing from a second thread, and on a busy machine would wait for it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_logistic_loss():
    def sigmoid(x):
        return 1 / (1 + math.exp(-x))

    expected = -sum(math.log(sigmoid(x)) for x in (-1, 0, 3)) / 3 - sum(math.log(1 - sigmoid(x)) for x in (2, -0.5)) / 2
    assert discriminator_loss(REAL, FAKE).item() == pytest.approx(expected)
    assert generator_loss(FAKE).item() == pytest.approx(-sum(math.log(sigmoid(x)) for x in (2, -0.5)) / 2)


def test_hinge_loss():
    assert discriminator_loss(REAL, FAKE, "hinge").item() == pytest.approx((2 + 1 + 0) / 3 + (3 + 0.5) / 2)
    assert generator_loss(FAKE, "hinge").item() == pytest.approx(-0.75)


def test_r1_penalty_of_a_quadratic():
    real = torch.randn(5, 3, dtype=torch.float64)
    weight = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    penalty = r1_penalty(lambda x: weight * x.square().sum(1), real)  # its gradient is 2 weight x
    assert penalty.item() == pytest.approx(2 * 0.49 * real.square().sum().item() / 5)
    penalty.backward()
    assert weight.grad.item() == pytest.approx(4 * 0.7 * real.square().sum().item() / 5)


def test_r1_penalty_goes_twice_through_our_transposed_convolution():
    torch.manual_seed(0)
    ours = fast_nn.ConvTranspose2d(2, 3, 4, stride=2, padding=1).double()
    plain = nn.ConvTranspose2d(2, 3, 4, stride=2, padding=1).double()
    plain.load_state_dict(ours.state_dict())
    real = torch.randn(4, 2, 5, 5, dtype=torch.float64)
    penalties = [r1_penalty(lambda x, layer=layer: layer(x).tanh().sum((1, 2, 3)), real) for layer in (ours, plain)]
    assert penalties[0].item() == pytest.approx(penalties[1].item()) and penalties[0] > 0.1
    for penalty in penalties:
        penalty.backward()
    torch.testing.assert_close(ours.weight.grad, plain.weight.grad)
    torch.testing.assert_close(ours.bias.grad, plain.bias.grad)


def two_pictures(n=64):
    """Half the pictures white on the left, half white on the right."""
    data = torch.full((n, 1, 8, 8), -0.8)
    data[: n // 2, ..., :4] = 0.8
    data[n // 2 :, ..., 4:] = 0.8
    return data


def small_pair(stem="standard"):
    torch.manual_seed(0)
    config = DCGANConfig(latent_dim=8, image_size=8, channels=1, base_channels=8, stem=stem)
    return DCGANGenerator(config), DCGANDiscriminator(config)


@pytest.mark.parametrize(("loss", "stem"), [("logistic", "standard"), ("hinge", "standard"), ("logistic", "tutorial")])
def test_generator_learns_both_pictures(tmp_path, loss, stem):
    generator, discriminator = small_pair(stem)
    history = train_gan(
        generator, discriminator, two_pictures(), tmp_path, steps=600, batch_size=16, lr=2e-3, loss=loss
    )
    assert len(history) == 600 and history[0].keys() == {"generator", "discriminator", "real", "fake"}
    assert not generator.training
    images = generator(torch.randn(200, 8))
    distances = torch.cdist(images.flatten(1), two_pictures(2).flatten(1)) / 8  # root mean square
    assert distances.amin(1).median() < 0.35
    assert 0.15 < (distances.argmin(1) == 0).float().mean() < 0.85


def test_kept_generator_is_an_average_with_statistics_of_its_own(tmp_path):
    generator, discriminator = small_pair()
    train_gan(generator, discriminator, two_pictures(), tmp_path, steps=40, batch_size=16, lr=2e-3)
    state = torch.load(tmp_path / "gan.pt", weights_only=True)["modules"]
    weight = "layers.0.weight"
    assert torch.equal(generator.state_dict()[weight], state["averaged"][weight])
    assert not torch.equal(state["averaged"][weight], state["generator"][weight])
    # Averaged statistics give what the batch's own statistics give.
    z = torch.randn(512, 8)
    evaluated, trained = generator.eval()(z), generator.train()(z)
    assert (evaluated - trained).abs().mean() < 0.02
    assert all(module.momentum == 0.1 for module in generator.modules() if isinstance(module, nn.BatchNorm2d))


def test_average_follows_the_formula(tmp_path):
    generator, discriminator = small_pair()
    seen = [generator.layers[0].weight.detach().clone()]
    train_gan(
        generator, discriminator, two_pictures(), tmp_path, steps=4, batch_size=16, average=0.25,
        progress=lambda done, steps, metrics: seen.append(generator.layers[0].weight.detach().clone()),
    )  # fmt: skip
    expected = seen[0]
    for index, weight in enumerate(seen[1:]):
        decay = min(0.25, (1 + index) / (10 + index))
        expected = decay * expected + (1 - decay) * weight
    torch.testing.assert_close(generator.layers[0].weight, expected)


def test_interrupted_training_goes_on_exactly(tmp_path):
    def train(folder, progress=None):
        generator, discriminator = small_pair()
        history = train_gan(
            generator,
            discriminator,
            two_pictures(),
            folder,
            steps=14,
            batch_size=8,
            checkpoint_every=4,
            progress=progress,
        )
        return {**generator.state_dict(), **discriminator.state_dict()}, history

    def stop(done, steps, metrics):
        if done == 7:
            raise KeyboardInterrupt

    whole, history = train(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", stop)
    parts, parts_history = train(tmp_path / "parts")
    again, again_history = train(tmp_path / "parts", stop)  # finished: no step is taken, the same generator comes back
    assert history == parts_history == again_history
    for key, value in whole.items():
        assert torch.equal(value, parts[key]) and torch.equal(value, again[key]), key


def test_sound_trains_too(tmp_path):
    torch.manual_seed(0)
    config = WaveGANConfig(latent_dim=4, samples=128, base_channels=4, phase_shuffle=1)
    generator, discriminator = WaveGANGenerator(config), WaveGANDiscriminator(config)
    time = torch.arange(128)
    data = torch.exp(-time / 20) * torch.sin(2 * math.pi * time / 16) * torch.linspace(0.7, 0.9, 32)[:, None]
    train_gan(generator, discriminator, data[:, None], tmp_path, steps=500, batch_size=16, lr=2e-3, r1=0.2)
    waves = generator(torch.randn(50, 4))[:, 0]
    similarity = torch.cosine_similarity(waves, data[:1], dim=1)
    assert similarity.median() > 0.8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": "wasserstein"}, "loss must be one of logistic, hinge, got 'wasserstein'"),
        ({"batch_size": 1}, "batch_size must be at least 2, got 1"),
        ({"r1": -1.0}, "r1 must be at least 0 and r1_every at least 1, got -1.0 and 4"),
        ({"r1_every": 0}, "r1_every at least 1, got 1.0 and 0"),
        ({"average": 1.0}, r"average must be in \[0, 1\), got 1.0"),
        ({"data": torch.zeros(0, 1, 8, 8)}, r"data must be floating point samples \(N, …\), N > 0"),
        ({"data": torch.zeros(4, 1, 8, 8).byte()}, "data must be floating point samples .* torch.uint8"),
        ({"data": torch.full((4, 1, 8, 8), 255.0)}, r"data must be in \[-1, 1\], got a largest magnitude of 255"),
        ({"data": torch.full((4, 1, 8, 8), math.nan)}, r"data must be in \[-1, 1\]"),
        ({"generator": nn.Linear(3, 3)}, "generator must have config.latent_dim, got Linear"),
        ({"data": torch.zeros(4, 1, 16, 16)}, r"images must be \(batch, 1, 8, 8\)"),
    ],
)
def test_bad_arguments(tmp_path, change, message):
    generator, discriminator = small_pair()
    arguments = {
        "generator": generator,
        "discriminator": discriminator,
        "data": two_pictures(),
        "batch_size": 8,
    } | change
    with pytest.raises(ValueError, match=message):
        train_gan(folder=tmp_path, steps=1, **arguments)


def test_checkpoint_of_other_data_or_settings_is_refused(tmp_path):
    train_gan(*small_pair(), two_pictures(), tmp_path, steps=1, batch_size=8)
    with pytest.raises(ValueError, match="config batch_size is 8 there, 4 here"):
        train_gan(*small_pair(), two_pictures(), tmp_path, steps=1, batch_size=4)
    with pytest.raises(ValueError, match=r"config data is \(64, 1, 8, 8\) there, \(32, 1, 8, 8\) here"):
        train_gan(*small_pair(), two_pictures(32), tmp_path, steps=1, batch_size=8)


@pytest.mark.parametrize("networks", [digits_networks, drums_networks])
def test_presets_always_start_the_same(networks):
    torch.manual_seed(1)
    first = networks()
    torch.manual_seed(2)
    second = networks()
    for a, b in zip(first, second, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize(("gan", "shape"), [(digits_gan, (3, 1, 32, 32)), (drums_gan, (3, 1, 8192))])
def test_presets_run_at_any_scale(tmp_path, monkeypatch, gan, shape):
    monkeypatch.setattr("gpt4fast.training.gan_presets.load_drums", lambda split: SimpleNamespace(waves=HITS))
    seen = []
    generator, discriminator, history = gan(tmp_path, lambda *args: seen.append(args[:2]), 0.001)
    assert 1 <= len(history) <= 3 and seen == [(i + 1, len(history)) for i in range(len(history))]
    samples = generator(torch.randn(3, generator.config.latent_dim))
    assert samples.shape == shape and discriminator(samples).shape == (3,)
    assert gan(tmp_path, None, 0.001)[2] == history


HITS = load_drums("validation").waves[:2]


def test_drum_versions_begin_with_the_hits_and_differ():
    versions = drum_versions(HITS)
    assert versions.shape == (2 * VERSIONS, 1, 8192)
    assert torch.equal(versions[:2, 0], HITS)
    assert torch.equal(versions, drum_versions(HITS))
    assert versions.abs().max() <= 1
    assert torch.pdist(versions[:, 0]).min() > 0.1
