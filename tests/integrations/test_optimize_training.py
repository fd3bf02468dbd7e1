"""optimize(training=True): runs of 50 steps follow the plain ones, and optimizers and checkpoints move both ways."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gpt4fast
from gpt4fast.benchmarks.generators import DCGAN, DCGANDiscriminator

STEPS = 50


def gan_losses(models, optimizers, steps) -> list[float]:
    """Losses of discriminator and generator, on pictures of waves."""
    generator, discriminator = models
    losses = []
    for step in steps:
        torch.manual_seed(step)
        real = torch.linspace(0, 9, 64).mul(torch.rand(8, 1, 1, 1)).sin().expand(8, 3, 64, 64)
        fake = generator(torch.randn(8, 10, 1, 1))
        ones, zeros = torch.ones(8), torch.zeros(8)
        loss_d = F.binary_cross_entropy(discriminator(real), ones)
        loss_d = loss_d + F.binary_cross_entropy(discriminator(fake.detach()), zeros)
        optimizers[1].zero_grad()
        loss_d.backward()
        optimizers[1].step()
        loss_g = F.binary_cross_entropy(discriminator(fake), ones)
        optimizers[0].zero_grad()
        loss_g.backward()
        optimizers[0].step()
        losses += [loss_d.item(), loss_g.item()]
    return losses


class Transformer(nn.Module):
    """Predicts the next of 20 tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, 20)

    def forward(self, tokens):
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        return self.head(self.encoder(self.embed(tokens), mask, is_causal=True))


def text_losses(models, optimizers, steps) -> list[float]:
    losses = []
    for step in steps:
        torch.manual_seed(step)
        tokens = (torch.randint(20, (4, 1)) + 3 * torch.arange(17)) % 20
        loss = F.cross_entropy(models[0](tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizers[0].zero_grad()
        loss.backward()
        optimizers[0].step()
        losses.append(loss.item())
    return losses


RUNS = {
    "DCGAN": (lambda: [DCGAN(10, 8), DCGANDiscriminator(8)], gan_losses),
    "transformer": (lambda: [Transformer()], text_losses),
}


def optimizers_of(models: list[nn.Module]) -> list[torch.optim.Optimizer]:
    return [torch.optim.Adam(model.parameters(), 2e-4, (0.5, 0.999), eps=1e-5) for model in models]


@pytest.fixture(params=["auto", "native"])
def impl(request, monkeypatch) -> None:
    if request.param == "native":
        request.getfixturevalue("needs_native")
    monkeypatch.setenv("GPT4FAST_IMPL", request.param)


@pytest.mark.parametrize("name", RUNS)
def test_losses_of_a_run_follow_torchs(name, impl) -> None:
    make, losses_of = RUNS[name]
    torch.manual_seed(0)
    models = make()
    twins, others = copy.deepcopy(models), copy.deepcopy(models)
    expected = losses_of(models, optimizers_of(models), range(STEPS))
    optimizers = optimizers_of(twins)  # made before, of torch's modules
    fast = [gpt4fast.optimize(twin, training=True) for twin in twins]
    losses = losses_of(fast, optimizers, range(STEPS))
    assert losses[:4] == pytest.approx(expected[:4], rel=1e-4)
    # A run that starts a few roundings away tells how far a rounding takes it, which grows from step to step.
    for parameter in (p for model in others for p in model.parameters()):
        parameter.data.mul_(1 + 1e-6 * torch.randn_like(parameter))
    moved, allowed = losses_of(others, optimizers_of(others), range(STEPS)), 0.0
    for ours, torchs, other in zip(losses, expected, moved, strict=True):
        allowed = max(allowed, 10 * abs(other - torchs))
        assert abs(ours - torchs) <= allowed + 1e-4 * abs(torchs)
    assert expected[-len(models)] < 0.9 * expected[0]  # it learnt something


@pytest.mark.parametrize("name", RUNS)
def test_checkpoints_move_both_ways(name) -> None:
    """Half of a run on torch, half on ours, saved and loaded between, in either order."""
    make, losses_of = RUNS[name]
    torch.manual_seed(0)
    start = make()
    plain = copy.deepcopy(start)
    expected = losses_of(plain, optimizers_of(plain), range(10))[len(plain) * 5 :]
    for order in ((False, True), (True, False)):
        models = copy.deepcopy(start)
        models = [gpt4fast.optimize(m, training=True) for m in models] if order[0] else models
        optimizers = optimizers_of(models)
        losses_of(models, optimizers, range(5))
        file = io.BytesIO()
        torch.save([(m.state_dict(), o.state_dict()) for m, o in zip(models, optimizers, strict=True)], file)
        file.seek(0)
        models = make()
        models = [gpt4fast.optimize(m, training=True) for m in models] if order[1] else models
        optimizers = optimizers_of(models)
        for model, optimizer, states in zip(models, optimizers, torch.load(file, weights_only=True), strict=True):
            model.load_state_dict(states[0])
            optimizer.load_state_dict(states[1])
        assert losses_of(models, optimizers, range(5, 10)) == pytest.approx(expected, rel=2e-3)
