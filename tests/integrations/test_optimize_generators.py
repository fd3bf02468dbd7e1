"""optimize() on six generators as people write them: outputs, gradients, state dicts, and what becomes of each."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import gpt4fast
from gpt4fast.benchmarks.generators import DCGAN, CycleGAN, HiFiGAN, Pix2pix, StyleGAN2, WaveGAN
from gpt4fast.integrations.merge import Merged

GENERATORS = {
    "DCGAN": (lambda: DCGAN(12, 6), (3, 12, 1, 1)),
    "pix2pix": (lambda: Pix2pix(6, 6), (2, 3, 64, 64)),
    "CycleGAN": (lambda: CycleGAN(6, 2), (2, 3, 24, 24)),
    "StyleGAN2": (lambda: StyleGAN2(16, 12, 16, 2), (3, 12)),
    "HiFi-GAN": (lambda: HiFiGAN(10, 32), (2, 10, 6)),
    "WaveGAN": (lambda: WaveGAN(10, 6), (2, 10)),
}
WITH_BATCH_NORM = ("DCGAN", "pix2pix")


def make(name: str, dropout: float = 0.0) -> tuple[nn.Module, torch.Tensor]:
    """A generator as after some training, and an input."""
    build, shape = GENERATORS[name]
    model = build()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.3, 2)
            nn.init.normal_(module.weight, 1, 0.2)
            nn.init.normal_(module.bias, 0, 0.2)
        elif isinstance(module, nn.Dropout):
            module.p = dropout
    if name == "HiFi-GAN":  # initialized to a whisper
        for up in model.ups:
            up.parametrizations.weight.original0.data.mul_(30)
    return model, torch.randn(shape)


def assert_as_good(ours: torch.Tensor, torchs: torch.Tensor, exact: torch.Tensor, roundings: float = 4) -> None:
    errors = [(out.double() - exact).norm().item() for out in (ours, torchs)]
    assert errors[0] <= 2 * errors[1] + roundings * torch.finfo(torchs.dtype).eps * exact.norm().item()


@pytest.fixture(params=["auto", "native"])
def impl(request, monkeypatch) -> None:
    if request.param == "native":
        request.getfixturevalue("needs_native")
    monkeypatch.setenv("GPT4FAST_IMPL", request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", GENERATORS)
def test_outputs_at_inference(name, dtype, impl) -> None:
    model, x = make(name)
    model.eval().to(dtype)
    fast = gpt4fast.optimize(model)
    exact = copy.deepcopy(model).double()(x.to(dtype).double())
    for layout in (torch.contiguous_format, *([torch.channels_last] if x.dim() == 4 else [])):
        given = x.to(dtype).to(memory_format=layout)
        with torch.no_grad():
            assert_as_good(fast(given), model(given), exact)
        assert_as_good(fast(given), model(given), exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", GENERATORS)
def test_outputs_and_gradients_in_training(name, dtype, impl) -> None:
    model, x = make(name)
    model.to(dtype)
    twin, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    fast = gpt4fast.optimize(twin, training=True)
    assert fast.training and list(fast.state_dict()) == list(model.state_dict())
    assert [id(p) for p in fast.parameters()] == [id(p) for p in twin.parameters()]
    outputs = [m(x.to(m_dtype)) for m, m_dtype in ((fast, dtype), (model, dtype), (exact, torch.float64))]
    assert_as_good(*outputs)
    weight = torch.randn(outputs[0].shape, dtype=torch.float64)
    for output in outputs:
        (output * weight.to(output.dtype)).sum().backward()
    gradients = zip(fast.parameters(), model.parameters(), exact.parameters(), strict=True)
    # What a batch norm subtracts has a gradient of zero but for rounding, so all of them are compared as one.
    ours, torchs, right = (
        torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
        for parameters in zip(*gradients, strict=True)
    )
    assert_as_good(ours, torchs, right)
    if name in WITH_BATCH_NORM and dtype == torch.float32:
        for (key, buffer), expected in zip(fast.named_buffers(), model.buffers(), strict=True):
            torch.testing.assert_close(buffer, expected, rtol=1e-3, atol=1e-4, msg=key)


def test_dropout_in_training_drops_what_torch_drops() -> None:
    model, x = make("pix2pix", dropout=0.5)
    fast = gpt4fast.optimize(copy.deepcopy(model), training=True)
    torch.manual_seed(3)
    expected = model(x)
    torch.manual_seed(3)
    torch.testing.assert_close(fast(x), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", GENERATORS)
def test_copies_pickles_and_state_dicts(name, training) -> None:
    model, x = make(name)
    fast = gpt4fast.optimize(model.eval(), training=training).eval()
    assert type(fast).__name__ == type(model).__name__ and isinstance(fast, type(model))
    expected = fast(x)
    assert torch.equal(copy.deepcopy(fast)(x) if not (training and name == "HiFi-GAN") else expected, expected)
    other = gpt4fast.optimize(make(name)[0], training=training).eval()
    other.load_state_dict(fast.state_dict())
    torch.testing.assert_close(other(x), expected)
    if training:
        plain = make(name)[0].eval()
        plain.load_state_dict(fast.state_dict())
        torch.testing.assert_close(plain(x), expected, rtol=1e-4, atol=1e-5)
    if not (training and name == "HiFi-GAN"):  # torch refuses to pickle parametrizations
        copied = pickle.loads(pickle.dumps(fast))
        assert [type(module) for module in copied.modules()] == [type(module) for module in fast.modules()]
        assert torch.equal(copied(x), expected)


def test_what_becomes_of_each() -> None:
    tables = {name: gpt4fast.explain(gpt4fast.optimize(make(name)[0])) for name in GENERATORS}
    rows = {name: {row.part: (row.runs_on, row.why) for row in table} for name, table in tables.items()}
    conv = "gpt4fast.conv_transpose2d"
    assert rows["DCGAN"]["main.0"] == rows["DCGAN"]["main.9"] == (conv, "with relu in the same pass")
    assert rows["DCGAN"]["main.12"] == (conv, "with tanh in the same pass")
    innermost = "model.model.1" + ".model.3" * 4
    assert rows["pix2pix"][f"{innermost}.model.3"] == (conv, "transposed convolution")
    assert rows["pix2pix"][f"{innermost}.model.4"] == ("gpt4fast", "BatchNorm2d, computed by the module before it")
    down = ("torch", "BatchNorm2d, computed by the module before it")
    assert rows["pix2pix"]["model.model.1.model.2"] == down
    assert [row[0] for row in rows["CycleGAN"].values()] == [conv] * 2
    modulated = ("fast_ops()", "its forward calls attention or transposed convolution")
    assert rows["StyleGAN2"]["convs.0.conv"] == rows["StyleGAN2"]["conv1.conv"] == modulated
    folded = "WeightNorm of its weight folded"
    assert rows["HiFi-GAN"]["conv_pre"] == ("torch", folded)
    assert rows["HiFi-GAN"]["resblocks.3.convs1.2"] == ("torch", folded)
    op, why = rows["HiFi-GAN"]["ups.2"]
    assert op == "gpt4fast.conv_transpose1d"
    assert why.startswith(f"transposed convolution; {folded}; alone, as the forward of HiFiGAN can't be traced: ")
    for i, activation in enumerate(("ReLU", "ReLU", "ReLU", "ReLU", "Tanh"), 1):
        one_pass = f"{activation} in the same pass, in the forward of WaveGAN"
        assert rows["WaveGAN"][f"tconv{i}"] == ("gpt4fast.conv_transpose1d", one_pass)
    assert not any(isinstance(module, Merged) for module in gpt4fast.optimize(make("CycleGAN")[0]).modules())


def test_what_a_wavegan_says_is_said() -> None:
    """A flag that its forward was traced with, set otherwise."""
    model, x = make("WaveGAN")
    fast = gpt4fast.optimize(model)
    expected = fast(x)
    fast.verbose = True
    lines = []
    forward_globals = WaveGAN.forward.__globals__
    forward_globals["print"] = lines.append
    try:
        torch.testing.assert_close(fast(x), expected)
    finally:
        del forward_globals["print"]
    assert lines == [torch.Size([2, 96, 16])]
