"""What torch.export, torch.onnx and torch.jit.trace record of our ops and of optimized models: torch's own ops only,
with the sizes of batch and length left open, and the same values where it runs."""

from __future__ import annotations

import io
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gpt4fast
from gpt4fast.backends import native
from gpt4fast.models import GPT, GPTConfig


@dataclass
class Case:
    plain: nn.Module  # what it should compute
    fast: nn.Module  # what is exported
    inputs: Callable[[int, int], tuple[Tensor, ...]]  # of a batch and a length

    def recorded_at(self) -> tuple[Tensor, ...]:
        return self.inputs(2, 6)

    def dynamic_shapes(self) -> tuple:
        """Every dimension that follows batch or length is left open."""
        batch, length = torch.export.Dim("batch"), torch.export.Dim("length", max=64)
        sizes = tuple(
            {d: batch if n == 2 else length for d, (n, m) in enumerate(zip(a.shape, b.shape, strict=True)) if n != m}
            for a, b in zip(self.recorded_at(), self.inputs(3, 9), strict=True)
        )
        return (sizes,) if isinstance(self.fast, Call) else sizes  # its inputs are one argument, *inputs

    def check(self, run: Callable) -> None:
        """``run`` gives what the plain model gives, for the sizes that were recorded and for others."""
        for sizes in ((2, 6), (3, 9)):
            inputs = self.inputs(*sizes)
            with torch.no_grad():
                expected = self.plain(*(t.clone() for t in inputs))
            got = run(*(t.clone() for t in inputs))
            got, expected = ([t] if isinstance(t, Tensor) else list(t) for t in (got, expected))
            tolerance = 2e-3 if got[0].dtype == torch.float16 else 1e-5
            torch.testing.assert_close(got, expected, rtol=10 * tolerance, atol=tolerance)


def optimized(plain: nn.Module, inputs: Callable) -> Case:
    for module in plain.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return Case(plain.eval(), gpt4fast.optimize(plain), inputs)


class Call(nn.Module):
    """``function(*parts, *inputs)`` as a module."""

    def __init__(self, function: Callable, *parts: nn.Module) -> None:
        super().__init__()
        self.function, self.parts = function, nn.ModuleList(parts)

    def forward(self, *inputs: Tensor):
        return self.function(*self.parts, *inputs)


def call(function: Callable, inputs: Callable, *parts: nn.Module) -> Case:
    module = Call(function, *parts)
    return Case(module, module, inputs)


# Models


def generator() -> nn.Sequential:
    return nn.Sequential(
        nn.ConvTranspose2d(16, 32, 4, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.ConvTranspose2d(32, 16, 4, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.ConvTranspose2d(16, 3, 4, 2, 1), nn.Tanh(),
    )  # fmt: skip


def vocoder() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv1d(20, 32, 7, padding=3), nn.LeakyReLU(0.1), nn.ConvTranspose1d(32, 16, 16, 8, 4),
        nn.LeakyReLU(0.1), nn.ConvTranspose1d(16, 8, 4, 2, 1), nn.Conv1d(8, 1, 7, padding=3), nn.Tanh(),
    )  # fmt: skip


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.down = nn.Sequential(nn.Conv2d(8, 16, 4, 2, 1), nn.BatchNorm2d(16), nn.ReLU())
        self.up = nn.Sequential(nn.ConvTranspose2d(16, 8, 2, 2), nn.BatchNorm2d(8), nn.ReLU())
        self.last = nn.Conv2d(16, 3, 1)

    def forward(self, images: Tensor) -> Tensor:
        first = self.first(images)
        return self.last(torch.cat([first, self.up(self.down(first))], 1))


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(32, 96)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2).flatten(2)


class LayerNorm2d(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(channels)), nn.Parameter(torch.rand(channels))

    def forward(self, x: Tensor) -> Tensor:
        x = x - x.mean(1, keepdim=True)
        return (
            x * (x.square().mean(1, keepdim=True) + 1e-6).rsqrt() * self.weight[:, None, None]
            + self.bias[:, None, None]
        )


def our_convolutions() -> Case:
    """Norms of the modules' own: in eval mode scale and shift of the call, elsewhere exported as norms."""
    own = gpt4fast.nn.ConvTranspose2d
    ours = nn.Sequential(
        own(8, 4, 4, 2, 1, norm="batch", activation="relu"), own(4, 4, 3, groups=2, norm="batch", activation="gelu")
    )
    case = optimized(ours, lambda batch, length: (torch.randn(batch, 8, length, length),))
    return Case(case.plain, ours, case.inputs)


def padded_self_attention() -> Case:
    plain = nn.MultiheadAttention(32, 4, batch_first=True).eval()

    def function(mha: nn.Module, x: Tensor, padding: Tensor) -> Tensor:
        return mha(x, x, x, key_padding_mask=padding, need_weights=False)[0]

    def inputs(batch: int, length: int) -> tuple[Tensor, Tensor]:
        return torch.randn(batch, length, 32), torch.arange(length).expand(batch, length) >= length - 2

    return Case(Call(function, plain), Call(function, gpt4fast.optimize(plain)), inputs)


def gpt(config: GPTConfig, padded: bool = False) -> Case:
    model = GPT(config).eval()

    def inputs(batch: int, length: int) -> tuple[Tensor, ...]:
        ids = torch.randint(config.vocab_size, (batch, length))
        return (ids, torch.arange(length).expand(batch, length) >= torch.arange(batch)[:, None]) if padded else (ids,)

    return call(lambda model, ids, mask=None: model(ids, attention_mask=mask).logits, inputs, model)


def transformers_model() -> Case:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    plain = transformers.LlamaForCausalLM(config).eval()
    models = (Call(lambda model, ids: model(ids, use_cache=False).logits, m) for m in (plain, gpt4fast.optimize(plain)))
    return Case(*models, lambda batch, length: (torch.randint(50, (batch, length)),))


SIZES = {"vocab_size": 50, "num_layers": 2, "num_heads": 4, "embed_dim": 32, "max_length": 64}
MODELS = {
    "generator": lambda: optimized(generator(), lambda batch, _: (torch.randn(batch, 16, 1, 1),)),
    "vocoder": lambda: optimized(vocoder(), lambda batch, length: (torch.randn(batch, 20, length),)),
    "U-Net": lambda: optimized(UNet(), lambda batch, _: (torch.randn(batch, 3, 16, 16),)),
    "encoder": lambda: optimized(
        nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2),
        lambda batch, length: (torch.randn(batch, length, 32),),
    ),
    "self-attention": lambda: optimized(SelfAttention(), lambda batch, length: (torch.randn(batch, length, 32),)),
    "layer norm over channels": lambda: optimized(
        nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), LayerNorm2d(16), nn.GELU()),
        lambda batch, length: (torch.randn(batch, 3, 6 * length, 32),),
    ),
    "own norms": our_convolutions,
    "MultiheadAttention, padded": padded_self_attention,
    "GPT-2": lambda: gpt(GPTConfig.gpt2(**SIZES)),
    "GPT-2, padded": lambda: gpt(GPTConfig.gpt2(**SIZES), padded=True),
    "Llama": lambda: gpt(GPTConfig.llama(**SIZES)),
    "transformers' Llama": transformers_model,
}


# Calls


def heads(batch: int, length: int, count: int = 4, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, count, length, 8, dtype=dtype)


def attends(inputs: Callable = lambda batch, length: (heads(batch, length),), **settings) -> Callable[[], Case]:
    """Self-attention, or of query and key; the names of further inputs are settings whose value is ``...``."""
    names = [name for name, value in settings.items() if value is ...]

    def function(query: Tensor, key: Tensor | None = None, *others: Tensor):
        key = query if key is None else key
        return gpt4fast.attention(query, key, key, **settings | dict(zip(names, others, strict=True)))

    return lambda: call(function, inputs)


def query_key(*others: Callable) -> Callable:
    return lambda batch, length: (heads(batch, length), heads(batch, length), *(o(batch, length) for o in others))


def lengths(batch: int, _: int) -> Tensor:
    return torch.tensor([3, 5, 4][:batch])


SLOPES = torch.tensor([0.1, 0.2, 0.3, 0.4])
CALLS = {
    "causal": attends(is_causal=True),
    "half": attends(lambda batch, length: (heads(batch, length, dtype=torch.float16),), is_causal=True),
    "float64": attends(lambda batch, length: (heads(batch, length, dtype=torch.float64),), is_causal=True),
    "three dimensions": attends(lambda batch, length: (torch.randn(2, length, 8),)),
    "five dimensions": attends(lambda batch, length: (heads(batch, length)[None],), is_causal=True),
    "other keys": attends(lambda batch, length: (heads(batch, 6), heads(batch, length)), is_causal=True),
    "grouped": attends(
        lambda batch, length: (heads(batch, length), heads(batch, length, 2)),
        is_causal=True, window=(2, 1), query_offset=1,
    ),
    "boolean mask": attends(query_key(lambda b, n: torch.rand(b, 1, n, n) > 0.5), attn_mask=...),
    "float mask": attends(
        query_key(lambda b, n: torch.randn(n, n).masked_fill(torch.eye(n) > 0, -torch.inf)), attn_mask=...
    ),
    "window": attends(is_causal=True, window=(2, 0)),
    "kv_lengths": attends(query_key(lengths), kv_lengths=...),
    "query_offset": attends(query_key(lengths), is_causal=True, query_offset=...),
    "softcap": attends(softcap=3.0),
    "alibi": attends(alibi_slopes=SLOPES),
    "return_lse": attends(is_causal=True, return_lse=True),
    "everything": attends(
        query_key(lengths, lambda b, n: lengths(b, n) - 2),
        is_causal=True, softcap=3.0, window=(3, 1), alibi_slopes=SLOPES, return_lse=True, kv_lengths=..., kv_starts=...,
    ),  # fmt: skip
    "packed": lambda: call(
        lambda query, ends: gpt4fast.attention_varlen(query, query, query, ends, ends, 16, 16, is_causal=True),
        lambda batch, length: (torch.randn(length, 4, 8), torch.tensor([0, 2, length])),
    ),
    "decoding": lambda: call(
        lambda query, keys, values, lengths, key: gpt4fast.attention_decode(
            query, keys, values, lengths, key=key, value=key
        ),
        lambda batch, length: (heads(batch, 1), *(heads(batch, length, 2) for _ in range(2)), lengths(batch, 0) - 2,
                               heads(batch, 1, 2)),
    ),
    "conv_transpose1d": lambda: call(
        lambda x, weight: gpt4fast.conv_transpose1d(x, weight, stride=3, groups=2, activation="leaky_relu"),
        lambda batch, length: (torch.randn(batch, 4, length), WEIGHT[..., 0, 0]),
    ),
    "conv_transpose3d": lambda: call(
        lambda x, weight: gpt4fast.conv_transpose3d(
            x, weight, None, 2, 1, scale=SLOPES[:2], shift=SLOPES[2:], activation="silu"
        ),
        lambda batch, length: (torch.randn(batch, 4, length, 3, 3), WEIGHT),
    ),
    "conv_transpose, half": lambda: call(
        lambda x, weight: gpt4fast.conv_transpose1d(x, weight, scale=SLOPES[:2], activation="relu"),
        lambda batch, length: (torch.randn(batch, 4, length).half(), WEIGHT[..., 0, 0].half()),
    ),
}  # fmt: skip
WEIGHT = torch.linspace(-1, 1, 4 * 2 * 27).sin().view(4, 2, 3, 3, 3)


def make(case: str) -> Case:
    return (MODELS | CALLS)[case]()


def targets(program: torch.export.ExportedProgram) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


def export(case: Case, **options) -> torch.export.ExportedProgram:
    return torch.export.export(case.fast, case.recorded_at(), dynamic_shapes=case.dynamic_shapes(), **options)


@pytest.mark.parametrize("case", [*MODELS, *CALLS])
def test_torch_export(case) -> None:
    case = make(case)
    program = export(case)
    assert all(target.startswith(("aten.", "<built-in function getitem>")) for target in targets(program))
    case.check(program.module())


@pytest.mark.parametrize("case", ["generator", "self-attention", "everything"])
def test_strict_export(case) -> None:
    case = make(case)
    program = export(case, strict=True)
    assert not any("gpt4fast" in target for target in targets(program))
    case.check(program.module())


def test_a_folded_norm_stays_folded_and_attention_stays_one_op() -> None:
    assert Counter(targets(export(make("generator")))) == {
        "aten.conv_transpose2d.input": 3, "aten.relu.default": 2, "aten.tanh.default": 1,
    }  # fmt: skip
    assert targets(export(make("causal"))) == ["aten.scaled_dot_product_attention.default"]


def test_a_model_in_training() -> None:
    plain = generator()
    exported = torch.export.export(gpt4fast.optimize(plain, training=True).train(), (torch.randn(4, 16, 1, 1),))
    assert not any("gpt4fast" in target for target in targets(exported))
    program, x = exported.module(), torch.randn(4, 16, 1, 1)
    torch.testing.assert_close(program(x), plain.train()(x))


def test_a_saved_program_runs_where_gpt4fast_is_not_installed(tmp_path) -> None:
    case = make("generator")
    inputs = case.recorded_at()
    torch.export.save(export(case), tmp_path / "program.pt2")
    torch.save((inputs, case.plain(*inputs).detach()), tmp_path / "values.pt")
    code = """
import sys
sys.modules["gpt4fast"] = None  # importing it is an error
import torch
inputs, expected = torch.load("values.pt")
torch.testing.assert_close(torch.export.load("program.pt2").module()(*inputs), expected)
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


def test_torch_compile_still_runs_on_our_ops() -> None:
    if native.cpu_library_error() is not None:
        pytest.skip(native.cpu_library_error())
    ops = []

    def backend(graph, inputs):
        ops.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    x = torch.randn(1, 4, 64, 64)
    compiled = torch.compile(lambda x: gpt4fast.attention(x, x, x, window=(8, 8)), backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(x), gpt4fast.attention(x, x, x, window=(8, 8)))
    assert any("gpt4fast" in op for op in ops)


def test_a_kernel_that_was_asked_for_can_not_be_exported(monkeypatch) -> None:
    monkeypatch.setenv("GPT4FAST_IMPL", "native")
    with pytest.raises(Exception, match="'native'"):  # by torch.export's own exception type where it wraps ours
        export(make("causal"))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("case", ["generator", "own norms", "layer norm over channels", "self-attention", "everything"])
def test_torch_jit_trace(case) -> None:
    case = make(case)
    with torch.no_grad():
        traced = torch.jit.trace(case.fast, case.inputs(2, 12))
        assert "gpt4fast::" not in str(traced.inlined_graph)
        inputs = case.inputs(2, 12)
        torch.testing.assert_close(traced(*inputs), case.plain(*inputs), rtol=1e-4, atol=1e-5)


# ONNX


def to_onnx(case: Case, **options):
    """The graph's nodes, and the model as a function on ONNX Runtime."""
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    file = io.BytesIO()
    torch.onnx.export(case.fast, case.recorded_at(), file, verbose=False, **options)
    nodes = onnx.load_from_string(file.getvalue()).graph.node
    assert {node.domain for node in nodes} == {""}  # standard ops
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])

    def run(*inputs: Tensor) -> list[Tensor]:
        names = [input.name for input in session.get_inputs()]
        outputs = session.run(None, {name: t.numpy() for name, t in zip(names, inputs, strict=True)})
        return [torch.from_numpy(output) for output in outputs]

    return Counter(node.op_type for node in nodes), run


ONNX = ["generator", "vocoder", "U-Net", "encoder", "self-attention", "layer norm over channels", "own norms",
        "MultiheadAttention, padded", "GPT-2", "Llama", "transformers' Llama", "grouped", "kv_lengths", "softcap",
        "everything", "conv_transpose3d"]  # fmt: skip


@pytest.mark.parametrize("case", ONNX)
def test_onnxruntime(case) -> None:
    pytest.importorskip("onnxscript")
    case = make(case)
    _, run = to_onnx(case, dynamo=True, dynamic_shapes=case.dynamic_shapes())
    case.check(run)


def test_onnx_ops() -> None:
    pytest.importorskip("onnxscript")
    for name in ("generator", "own norms"):  # ONNX's optimizer folds norms that were not
        case = make(name)
        ops, _ = to_onnx(case, dynamo=True, dynamic_shapes=case.dynamic_shapes())
        assert ops == ({"ConvTranspose": 3, "Relu": 2, "Tanh": 1} if name == "generator" else
                       {"ConvTranspose": 2, "Relu": 1, "Gelu": 1})  # fmt: skip
    case = make("causal")
    ops, run = to_onnx(case, dynamo=True, dynamic_shapes=case.dynamic_shapes(), opset_version=23)
    assert ops == {"Attention": 1}
    case.check(run)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", ["generator", "vocoder", "own norms", "layer norm over channels", "self-attention",
                                  "window", "everything", "conv_transpose3d"])  # fmt: skip
def test_the_older_onnx_exporter(case) -> None:
    pytest.importorskip("torch.onnx._internal.torchscript_exporter")
    case = make(case)
    names = [f"input{n}" for n in range(len(case.recorded_at()))]
    sizes = case.dynamic_shapes()[0] if isinstance(case.fast, Call) else case.dynamic_shapes()
    axes = {name: {d: size.__name__ for d, size in dims.items()} for name, dims in zip(names, sizes, strict=True)}
    with torch.no_grad():
        _, run = to_onnx(case, dynamo=False, input_names=names, dynamic_axes=axes)
    case.check(run)
