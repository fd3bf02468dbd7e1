"""The shapes that are measured ("cells"): their names, inputs, exact work, and reference values in float64.

Work that a mask or a crop hides does not count, so a floor computed from it can be reached only by skipping that work.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .harness import Tolerance

FLOAT32, BFLOAT16, FLOAT16 = (torch.float32,), (torch.bfloat16,), (torch.float16,)
# Largest relative error of one op's right values; a wrong index or a lost tap is far above.
ERRORS = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def _generator(device: str) -> torch.Generator:
    return torch.Generator(device).manual_seed(0)


@dataclass(frozen=True)
class AttentionCell:
    """Self-attention over ``length`` tokens, or with ``mode`` "decode" one new token over a cache of ``length``."""

    batch: int
    heads: int
    kv_heads: int
    length: int
    head_dim: int
    causal: bool = True
    mode: str = "forward"  # "forward", "training" (forward and backward) or "decode"
    dtypes: tuple[torch.dtype, ...] = FLOAT32 + BFLOAT16
    quick: tuple[torch.dtype, ...] = ()  # those of the quick subset

    op = "attention"

    @property
    def name(self) -> str:
        kind = "decode" if self.mode == "decode" else "causal" if self.causal else "full"
        shape = f"({self.batch},{self.heads},{self.kv_heads},{self.length},{self.head_dim})"
        return f"{kind} {shape}" + (" fwd+bwd" if self.mode == "training" else "")

    @property
    def backward(self) -> bool:
        return self.mode == "training"

    @property
    def queries(self) -> int:
        return 1 if self.mode == "decode" else self.length

    @property
    def is_causal(self) -> bool:
        """Whether a mask hides anything: the one query of a decoding step sees all."""
        return self.causal and self.mode != "decode"

    def tolerance(self, dtype: torch.dtype) -> Tolerance:
        return Tolerance(ERRORS[dtype])

    def operations(self) -> float:
        """Additions and multiplications of the visible pairs; backward recomputes the scores: 2.5 times forward's."""
        pairs = self.length * (self.length + 1) / 2 if self.is_causal else self.queries * self.length
        return 4 * self.batch * self.heads * self.head_dim * pairs * (3.5 if self.backward else 1)

    def bytes(self, dtype: torch.dtype) -> float:
        """Every operand read, every result written once; training does that for out and the four gradients too."""
        small = self.batch * self.heads * self.queries * self.head_dim
        large = self.batch * self.kv_heads * self.length * self.head_dim
        return (2 * small + 2 * large) * (2.5 if self.backward else 1) * dtype.itemsize

    def inputs(self, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, ...]:
        """query, key, value and for training the output's gradient, drawn from a normal distribution."""
        generator = _generator(device)
        small = (self.batch, self.heads, self.queries, self.head_dim)
        large = (self.batch, self.kv_heads, self.length, self.head_dim)
        shapes = (small, large, large) + ((small,) if self.backward else ())
        tensors = tuple(torch.randn(s, generator=generator, device=device).to(dtype) for s in shapes)
        for t in tensors[: 3 if self.backward else 0]:
            t.requires_grad_()
        return tensors

    def reference(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """float64: out, and for training the gradients of query, key and value. By the formula, a head at a time."""
        query, key, value, *grad = (t.detach().double() for t in inputs)
        out, grads = torch.empty_like(query), [torch.zeros_like(t) for t in (query, key, value)]
        hidden = torch.ones(self.queries, self.length, dtype=torch.bool, device=query.device).triu(1)
        for b in range(self.batch):
            for h in range(self.heads):
                rows = (h, *(h // (self.heads // self.kv_heads),) * 2)
                q, k, v = (
                    t[b, row].requires_grad_(self.backward) for t, row in zip((query, key, value), rows, strict=True)
                )
                with torch.set_grad_enabled(self.backward):
                    scores = q @ k.T / math.sqrt(self.head_dim)
                    if self.is_causal:
                        scores = scores.masked_fill(hidden, -math.inf)
                    y = scores.softmax(-1) @ v
                out[b, h] = y.detach()
                if self.backward:
                    parts = torch.autograd.grad(y, (q, k, v), grad[0][b, h])
                    for total, part, row in zip(grads, parts, rows, strict=True):
                        total[b, row] += part
        return (out, *grads) if self.backward else (out,)


def _attention_cells() -> list[AttentionCell]:
    causal = [(1, 12, 12, 1024, 64), (1, 12, 12, 4096, 64), (8, 12, 12, 256, 64), (1, 16, 16, 2048, 128)]
    full = [(1, 12, 12, 512, 64), (64, 12, 12, 128, 64)]
    odd = [(1, 9, 3, 777, 64), (2, 8, 8, 333, 80), (1, 8, 2, 512, 96), (4, 4, 4, 96, 32)]
    decode = [(1, 12, 12, 1024, 64), (16, 12, 12, 1024, 64), (1, 32, 8, 4096, 128), (1, 14, 2, 2048, 64)]
    decode += [(8, 32, 8, 1000, 128)]
    quick = {(1, 12, 12, 1024, 64), (8, 12, 12, 256, 64), (1, 12, 12, 512, 64), (1, 14, 2, 2048, 64)}
    both, all_three = FLOAT32 + BFLOAT16, FLOAT32 + BFLOAT16 + FLOAT16
    cells = []
    for shapes, is_causal in ((causal, True), (full, False)):
        for shape in shapes:
            cells.append(AttentionCell(*shape, is_causal, dtypes=all_three, quick=both if shape in quick else ()))
    cells += [AttentionCell(*shape, is_causal) for shape in odd for is_causal in (True, False)]
    for cell in cells[: len(causal + full)]:
        in_quick = cell.length == 256
        cells.append(replace(cell, mode="training", dtypes=both, quick=FLOAT32 if in_quick else ()))
    for shape in decode:
        cells.append(AttentionCell(*shape, mode="decode", dtypes=all_three, quick=BFLOAT16 if shape in quick else ()))
    return cells


@dataclass(frozen=True)
class Layer:
    """A transposed convolution, then a norm, then an activation."""

    in_channels: int
    out_channels: int
    kernel: int = 4
    stride: int = 2
    padding: int = 1
    norm: str | None = None  # "batch" or "layer" (over channels)
    activation: str | None = None
    groups: int = 1

    @property
    def bias(self) -> bool:
        return self.norm != "batch"  # batch norm takes any bias out again

    def output_size(self, size: int) -> int:
        return (size - 1) * self.stride - 2 * self.padding + self.kernel

    def pairs(self, size: int) -> int:
        """(input, tap) pairs along one axis that land inside the output; padding crops the others."""
        total, out = 0, self.output_size(size)
        for tap in range(self.kernel):
            first = max(0, -((tap - self.padding) // self.stride))
            last = min(size - 1, (out - 1 + self.padding - tap) // self.stride)
            total += max(0, last - first + 1)
        return total

    def taps(self, size: int) -> int:
        """Taps along one axis that any output uses: a 1×1 input under padding leaves some unread."""
        out = self.output_size(size)
        return sum(
            max(0, -((t - self.padding) // self.stride)) <= min(size - 1, (out - 1 + self.padding - t) // self.stride)
            for t in range(self.kernel)
        )


@dataclass(frozen=True)
class ConvTransposeCell:
    """Layers in sequence on (batch, in_channels, *size).

    With ``mode`` "training" batch norm takes the batch's statistics and all gradients are computed; "step" is a whole
    step of a GAN, the generator's and the discriminator's gradients; "lengths" changes the last size at every call.
    """

    name: str
    batch: int
    layers: tuple[Layer, ...]
    size: tuple[int, ...]
    mode: str = "forward"
    dtypes: tuple[torch.dtype, ...] = FLOAT32 + BFLOAT16
    quick: tuple[torch.dtype, ...] = ()

    op = "conv_transpose"

    @property
    def backward(self) -> bool:
        return self.mode in ("training", "step")

    @property
    def dims(self) -> int:
        return len(self.size)

    def tolerance(self, dtype: torch.dtype) -> Tolerance:
        """Errors add up over the layers, of which a step has as many again in the discriminator."""
        if not self.backward:
            return Tolerance(ERRORS[dtype] * len(self.layers))
        # 5e-3 is for the few elements that rounding moves across a kink, which float32 has too.
        depth = 2 * len(self.layers) if self.mode == "step" else 1
        return Tolerance(ERRORS[dtype] * depth + 5e-3, "rms")

    def last_sizes(self) -> range:
        """What the last spatial size is drawn from with ``mode`` "lengths"."""
        return range(self.size[-1], self.size[-1] + (2048 if self.dims == 1 else 512))

    def sizes(self) -> list[tuple[int, ...]]:
        """Spatial sizes before the first layer and after each; those of the middle length where it changes."""
        size = self.size
        if self.mode == "lengths":
            size = (*size[:-1], self.last_sizes()[len(self.last_sizes()) // 2])
        sizes = [size]
        for layer in self.layers:
            sizes.append(tuple(layer.output_size(n) for n in sizes[-1]))
        return sizes

    def operations(self) -> float:
        """Additions and multiplications of the pairs that land in the output; training takes three times as many.

        A step runs the generator 3 times (forward and backward) and its mirror image, the discriminator, 8 times.
        """
        total = 0.0
        for layer, size in zip(self.layers, self.sizes(), strict=False):
            pairs = math.prod(layer.pairs(n) for n in size)
            total += 2 * self.batch * layer.in_channels * layer.out_channels / layer.groups * pairs
        return total * {"forward": 1, "lengths": 1, "training": 3, "step": 11}[self.mode]

    def bytes(self, dtype: torch.dtype) -> float:
        """The first input, the last output and every weight that is used, once; training: three times."""
        sizes = self.sizes()
        total = self.batch * self.layers[0].in_channels * math.prod(sizes[0])
        total += self.batch * self.layers[-1].out_channels * math.prod(sizes[-1])
        for layer, size in zip(self.layers, sizes, strict=False):
            total += layer.in_channels * layer.out_channels // layer.groups * math.prod(layer.taps(n) for n in size)
        return total * dtype.itemsize * (3 if self.backward else 1)

    def parameters(self, dtype: torch.dtype, device: str = "cpu") -> list[dict[str, Tensor | None]]:
        """For each layer weight, bias, and the norm's gamma, beta, mean, var; those absent are None."""
        generator, parameters = _generator(device), []

        def normal(*shape: int, mean: float = 0.0, std: float = 1.0) -> Tensor:
            return (mean + std * torch.randn(shape, generator=generator, device=device)).to(dtype)

        for layer in self.layers:
            c, out = layer.in_channels, layer.out_channels
            taps = (layer.kernel / layer.stride) ** self.dims if math.prod(self.size) > 1 else 1.0
            std = (taps * c / layer.groups) ** -0.5  # keeps the variance
            p: dict[str, Tensor | None] = dict.fromkeys(("bias", "gamma", "beta", "mean", "var"))
            p["weight"] = normal(c, out // layer.groups, *(layer.kernel,) * self.dims, std=std)
            if layer.bias:
                p["bias"] = normal(out, std=0.1)
            if layer.norm is not None:
                p["gamma"], p["beta"] = normal(out, mean=1.0, std=0.1), normal(out, std=0.1)
            if layer.norm == "batch":
                p["mean"], p["var"] = normal(out, std=0.1), normal(out).abs() + 0.5
            parameters.append(p)
        for p in parameters:
            for name in ("weight", "bias", "gamma", "beta"):
                if p[name] is not None:
                    p[name] = nn.Parameter(p[name], requires_grad=self.backward)
        return parameters

    def inputs(self, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor]:
        """The input; and something of the output's shape: its gradient for training, real images for a step."""
        generator = _generator(device)
        shapes = ((self.layers[0].in_channels, *self.size), (self.layers[-1].out_channels, *self.sizes()[-1]))
        x, y = (torch.randn((self.batch, *s), generator=generator, device=device).to(dtype) for s in shapes)
        return x.requires_grad_(self.mode == "training"), y


def normalize(x: Tensor, layer: Layer, p: dict[str, Tensor | None], training: bool) -> Tensor:
    """The layer's norm in torch."""
    if layer.norm == "batch":
        running = (None, None) if training else (p["mean"], p["var"])
        return F.batch_norm(x, *running, p["gamma"], p["beta"], training)
    if layer.norm == "layer":
        y = F.layer_norm(x.movedim(1, -1), (x.shape[1],), p["gamma"], p["beta"], 1e-6)
        return y.movedim(-1, 1)
    return x


ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda x: x,
    "relu": F.relu,
    "tanh": torch.tanh,
    "gelu": F.gelu,
}
CONVOLVE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def run_layer_in_torch(x: Tensor, layer: Layer, p: dict[str, Tensor | None], training: bool) -> Tensor:
    """Convolution, norm and activation as a model's author writes them."""
    convolve = CONVOLVE[x.dim() - 2]
    x = convolve(x, p["weight"], p["bias"], layer.stride, layer.padding, groups=layer.groups)
    return ACTIVATIONS[layer.activation](normalize(x, layer, p, training))


Network = Callable[[Tensor, list[dict]], Tensor]  # a cell's layers on an input and their parameters


def torch_network(cell: ConvTransposeCell) -> Network:
    """The layers on torch's own ops."""

    def network(x: Tensor, parameters: list[dict]) -> Tensor:
        for layer, p in zip(cell.layers, parameters, strict=True):
            x = run_layer_in_torch(x, layer, p, cell.backward)
        return x

    return network


def trainable(parameters: list[dict]) -> list[Tensor]:
    return [t for p in parameters for t in p.values() if t is not None and t.requires_grad]


def train(network: Network, x: Tensor, grad: Tensor, parameters: list[dict]) -> tuple[Tensor, ...]:
    """Output, and from its gradient those in x and all parameters."""
    y = network(x, parameters)
    return y.detach(), *torch.autograd.grad(y, [x, *trainable(parameters)], grad)


def discriminator(cell: ConvTransposeCell, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    """Weights of the mirror image of the generator's layers, ending in one logit."""
    generator = _generator(device)
    widths = [layer.out_channels for layer in reversed(cell.layers)] + [1]
    weights = []
    for before, after in pairwise(widths):
        w = torch.randn((after, before, 4, 4), generator=generator, device=device) * (2 / (16 * before)) ** 0.5
        weights.append(w.to(dtype).requires_grad_())
    return weights


def gan_step(
    network: Network, z: Tensor, real: Tensor, parameters: list[dict], judge: list[Tensor], convolve=F.conv2d
) -> tuple[Tensor, ...]:
    """Gradients of the discriminator's loss in its weights, then of the generator's loss in its parameters.

    ``convolve`` is what the discriminator's layers call.
    """

    def logits(images: Tensor) -> Tensor:
        for i, weight in enumerate(judge):
            images = convolve(images, weight, None, *((2, 1) if i < len(judge) - 1 else (1, 0)))
            if i < len(judge) - 1:
                images = F.leaky_relu(images, 0.2)
        return images.flatten()

    fake = network(z, parameters)
    loss = F.softplus(-logits(real)).mean() + F.softplus(logits(fake.detach())).mean()
    judge_grads = torch.autograd.grad(loss, judge)
    generator_grads = torch.autograd.grad(F.softplus(-logits(fake)).mean(), trainable(parameters))
    return *judge_grads, *generator_grads


DCGAN64 = (
    Layer(100, 512, stride=1, padding=0, norm="batch", activation="relu"),
    Layer(512, 256, norm="batch", activation="relu"),
    Layer(256, 128, norm="batch", activation="relu"),
    Layer(128, 64, norm="batch", activation="relu"),
    Layer(64, 3, activation="tanh"),
)


def _conv_transpose_cells() -> list[ConvTransposeCell]:
    both = FLOAT32 + BFLOAT16
    cells = []

    def add(name: str, batch: int, layers, *size: int, mode: str = "forward", quick=()) -> None:
        layers = layers if isinstance(layers, tuple) else (layers,)
        cells.append(ConvTransposeCell(f"{name} b{batch}", batch, layers, size, mode, quick=quick))

    add("DCGAN-64 generator", 1, DCGAN64, 1, 1, quick=both)
    add("DCGAN-64 generator", 64, DCGAN64, 1, 1, quick=FLOAT32)
    for batch in (1, 64):
        add("first 100→512, 1²→4²", batch, DCGAN64[0], 1, 1, quick=FLOAT32)
    for batch in (1, 16, 64):
        add("last 64→3 + tanh, 32²", batch, DCGAN64[-1], 32, 32, quick=both if batch == 16 else ())
    add("pix2pix 1024→512, 8²", 1, Layer(1024, 512, norm="batch", activation="relu"), 8, 8)
    add("pix2pix 512→512, 1²", 1, Layer(512, 512, norm="batch", activation="relu"), 1, 1, quick=FLOAT32)
    add("pix2pix last 128→3, 128²", 1, Layer(128, 3, activation="tanh"), 128, 128)
    add("SAM 256→64 k2 + LN + GELU, 64²", 1, Layer(256, 64, 2, 2, 0, "layer", "gelu"), 64, 64)
    add("SAM 64→32 k2 + GELU, 128²", 1, Layer(64, 32, 2, 2, 0, None, "gelu"), 128, 128)
    add("HiFi-GAN 128→64 k4, T 6400", 8, Layer(128, 64), 6400)
    add("HiFi-GAN 64→32 k4, T 12800", 8, Layer(64, 32), 12800)
    for batch in (1, 8):
        quick = BFLOAT16 if batch == 1 else ()
        add("HiFi-GAN 512→256 k16 s8, T 100", batch, Layer(512, 256, 16, 8, 4), 100, quick=quick)
        add("HiFi-GAN 256→128 k16 s8, T 800", batch, Layer(256, 128, 16, 8, 4), 800)
    for layer, n in zip(DCGAN64[1:4], (4, 8, 16), strict=True):
        channels = f"{layer.in_channels}→{layer.out_channels}"
        add(f"{channels}, {n}²", 64, layer, n, n)
        add(f"{channels}, {n}² fwd+bwd", 64, layer, n, n, mode="training", quick=FLOAT32 if n == 4 else ())
    add("U-Net 128→64, 128²", 1, Layer(128, 64, norm="batch", activation="relu"), 128, 128)
    add("3-D 128→64, 4·8·8", 4, Layer(128, 64, norm="batch", activation="relu"), 4, 8, 8)
    add("U-Net 256→128 k2, 64²", 1, Layer(256, 128, 2, 2, 0), 64, 64)
    add("new length 128→64, T 512 to 2559", 1, Layer(128, 64), 512, mode="lengths", quick=FLOAT32)
    add("new size 128→64, 16·(8 to 519)", 1, Layer(128, 64), 16, 8, mode="lengths")
    add("depthwise 128, 32²", 1, Layer(128, 128, groups=128, norm="batch", activation="relu"), 32, 32, quick=FLOAT32)
    add("8 groups 128→128, 32²", 1, Layer(128, 128, groups=8, norm="batch", activation="relu"), 32, 32)
    add("DCGAN-64 step", 64, DCGAN64, 1, 1, mode="step")
    return cells


ATTENTION_CELLS = _attention_cells()
CONV_TRANSPOSE_CELLS = _conv_transpose_cells()
CELLS = {"attention": ATTENTION_CELLS, "conv_transpose": CONV_TRANSPOSE_CELLS}


def select(op: str, quick: bool) -> list[tuple[AttentionCell | ConvTransposeCell, torch.dtype]]:
    """Pairs of a cell and a dtype, all or the quick subset."""
    if op not in CELLS:
        raise ValueError(f"op must be one of {', '.join(CELLS)}, but is {op!r}")
    return [(cell, dtype) for cell in CELLS[op] for dtype in (cell.quick if quick else cell.dtypes)]
