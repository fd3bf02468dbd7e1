"""The demo's timed pairs: the same weights and inputs, once by plain PyTorch and once by gpt4fast."""

from __future__ import annotations

import copy
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor, nn

from gpt4fast.backends import dispatch
from gpt4fast.demo.timing import check_close, paired
from gpt4fast.generation import generate

_ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh}  # those of the two generators


def plain_generator(generator: nn.Module) -> nn.Module:
    """A copy in torch's own modules, as one writes it: ConvTranspose, BatchNorm and activation one by one."""
    copied = copy.deepcopy(generator)
    plain = nn.Sequential()
    for layer in copied.layers:
        one_dimensional = isinstance(layer, nn.ConvTranspose1d)
        kind = nn.ConvTranspose1d if one_dimensional else nn.ConvTranspose2d
        convolution = kind(
            layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, layer.output_padding,
            bias=layer.bias is not None,
        )  # fmt: skip
        convolution.load_state_dict({k: v for k, v in layer.state_dict().items() if k in ("weight", "bias")})
        plain.append(convolution)
        if layer.norm is not None:
            plain.append(layer.norm)
        if layer.activation is not None:
            plain.append(_ACTIVATIONS[layer.activation]())
    copied.layers = plain
    return copied


@contextmanager
def plain_torch() -> Iterator[None]:
    """Inside, every op of gpt4fast is torch's own kernel (F.scaled_dot_product_attention, F.conv_transpose)."""
    with mock.patch.dict(os.environ, {"GPT4FAST_IMPL": "torch"}):
        yield


def what_runs(call: Callable[[], object]) -> str:
    """Which implementation the ops of one call took, in words."""
    taken: Counter[tuple[str, str]] = Counter()
    with dispatch.listening(lambda op, name: taken.update([(op.name, name)])):
        call()
    return ", ".join(f"{op}: {name}" + (f" ({n}×)" if n > 1 else "") for (op, name), n in sorted(taken.items()))


def inference(what: str, detail: str, unit: str, generator: nn.Module, batch: int, seconds: float) -> dict:
    """The row of a generator at inference: torch's own modules, against `gpt4fast.optimize` of exactly those."""
    import gpt4fast

    plain = plain_generator(generator).eval()
    fast = gpt4fast.optimize(plain)
    z = torch.randn(batch, generator.config.latent_dim, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        check_close(what, plain(z), fast(z))
        times = paired(lambda: plain(z), lambda: fast(z), work=batch, seconds=seconds)
        ran = what_runs(lambda: fast(z))
    return {"what": what, "detail": detail, "unit": unit, "implementation": ran, **times}


def training_step(
    what: str, detail: str, unit: str, generator: nn.Module, discriminator: nn.Module, batch: int, seconds: float
) -> dict:
    """The row of the generator's half of an adversarial step: forward, the discriminator's logits, backward."""
    plain, fast = plain_generator(generator).train(), copy.deepcopy(generator).train()
    judge = copy.deepcopy(discriminator).eval()  # in evaluation nothing is random, so that the losses can be compared
    z = torch.randn(batch, generator.config.latent_dim, generator=torch.Generator().manual_seed(0))

    def step(model: nn.Module) -> Tensor:
        model.zero_grad(set_to_none=True)
        loss = nn.functional.softplus(-judge(model(z))).mean()
        loss.backward()
        return loss.detach()

    check_close(what, step(plain), step(fast))
    times = paired(lambda: step(plain), lambda: step(fast), work=batch, seconds=seconds)
    return {"what": what, "detail": detail, "unit": unit, "implementation": what_runs(lambda: step(fast)), **times}


def attention_model(what: str, detail: str, run: Callable[[], Tensor], tokens: int, seconds: float) -> dict:
    """The row of a Transformer: attention by F.scaled_dot_product_attention against gpt4fast's choice.

    Where that choice is torch's kernel, both sides are the same program, and the row says so: "same".
    """

    def plain() -> Tensor:
        with plain_torch():
            return run()

    check_close(what, plain(), run())
    times = paired(plain, run, work=tokens, seconds=seconds)
    ran = what_runs(run)
    with plain_torch():
        same = ran == what_runs(run)
    return {"what": what, "detail": detail, "unit": "tokens/s", "implementation": ran, "same": same, **times}


def decoding(
    what: str, detail: str, model: nn.Module, source: Tensor, bos_id: int, tokens: int, seconds: float
) -> dict:
    """The row of greedy text generation: every token from scratch in plain torch, against the key-value cache."""

    @torch.inference_mode()
    def plain() -> Tensor:
        with plain_torch():
            read = model.encoder.encode(source)
            written = torch.full((len(source), 1), bos_id)
            for _ in range(tokens):
                logits = model(None, written, encoder_output=read).logits[:, -1]
                written = torch.cat([written, logits.argmax(-1, keepdim=True)], 1)
        return written[:, 1:]

    def fast() -> Tensor:
        return generate(model, source, max_new_tokens=tokens, temperature=0, bos_id=bos_id)

    model.eval()
    if not torch.equal(plain(), fast()):
        raise RuntimeError(f"{what}: the text differs with and without the cache")
    times = paired(plain, fast, work=tokens * len(source), seconds=seconds, turns=8)
    return {"what": what, "detail": detail, "unit": "tokens/s", "implementation": "key-value cache; " + what_runs(fast),
            **times}  # fmt: skip
