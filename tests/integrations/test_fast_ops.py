"""fast_ops(): which calls are rerouted, which are torch's, and that nothing else changes."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import gpt4fast
from gpt4fast.backends import dispatch


@pytest.fixture
def calls(monkeypatch, every_call_dispatched) -> list[str]:
    """The ops that were dispatched, by name."""
    names = []
    run = dispatch.run

    def recording(op, impl, call):
        names.append(op.name)
        return run(op, impl, call)

    monkeypatch.setattr(dispatch, "run", recording)
    return names


@pytest.fixture(params=["auto", "reference"])
def impl(request, monkeypatch) -> str:
    monkeypatch.setenv("GPT4FAST_IMPL", request.param)
    return request.param


Q, K, V = (4, 4, 6, 8), (4, 4, 5, 8), (4, 4, 5, 8)
ATTENTION_CALLS = {
    "positional": ((Q, K, V), (None, 0.0, True), {}),
    "keywords": ((Q, K, V), (), {"is_causal": True, "scale": 0.3}),
    "bool mask": ((Q, K, V), ("bool", 0.0), {}),
    "float mask": ((Q, K, V), (), {"attn_mask": "float"}),
    "mask per head": ((Q, K, V), (), {"attn_mask": "heads"}),
    "value wider": ((Q, K, (4, 4, 5, 3)), (), {}),
    "2-D": (((6, 8), (5, 8), (5, 8)), (), {}),
    "2-D causal": (((6, 8), (5, 8), (5, 8)), (), {"is_causal": True}),
    "3-D": (((4, 6, 8), (4, 5, 8), (4, 5, 8)), (), {"attn_mask": "bool"}),
    "5-D": (((2, *Q), (2, *K), (2, *V)), (), {"attn_mask": "float"}),
    "batch broadcasts": ((Q, (1, *K[1:]), (1, *V[1:])), (), {}),
    "value's batch only": (((1, *Q[1:]), (1, *K[1:]), V), (), {}),
    "query 3-D, key 4-D": ((Q[1:], K, V), (), {}),
    "query 2-D, key 4-D": ((Q[2:], K, V), (), {}),
    "one key head": ((Q, (4, 1, 5, 8), (4, 1, 5, 8)), (), {}),
    "grouped": ((Q, (4, 2, 5, 8), (4, 2, 5, 8)), (), {"enable_gqa": True}),
    "grouped, causal": ((Q, (4, 2, 5, 8), (4, 2, 5, 8)), (None, 0.0, True), {"enable_gqa": True}),
    "grouped, masked": ((Q, (4, 2, 5, 8), (4, 2, 5, 8)), (), {"enable_gqa": True, "attn_mask": "heads"}),
    "grouped 3-D": (((4, 6, 8), (2, 5, 8), (2, 5, 8)), (), {"enable_gqa": True}),
    "one query": (((4, 4, 1, 8), K, V), (), {}),
    "no batch": (((0, 4, 6, 8), (0, 4, 5, 8), (0, 4, 5, 8)), (), {}),
    "no queries": (((4, 4, 0, 8), K, V), (), {}),
    "no keys": ((Q, (4, 4, 0, 8), (4, 4, 0, 8)), (), {}),
    "scale 0": ((Q, K, V), (), {"scale": 0.0}),
    "negative scale": ((Q, K, V), (), {"scale": -0.5}),
    "scale is a tensor": ((Q, K, V), (), {"scale": torch.tensor(0.5)}),
}
LEFT_TO_TORCH = ("scale is a tensor", "query 2-D, key 4-D")  # the latter: query's one head broadcasts over key's
MASKS = {
    "bool": lambda: (torch.arange(30).view(6, 5) % 3 > 0) & (torch.arange(6) != 2).unsqueeze(1),  # row 2 sees nothing
    "float": lambda: torch.linspace(-2, 2, 30).view(6, 5).masked_fill(torch.arange(30).view(6, 5) % 7 == 0, -torch.inf),
    "heads": lambda: torch.linspace(-2, 2, 4 * 30).view(4, 6, 5),
}


def attention_arguments(case: str) -> tuple[list, dict]:
    shapes, args, kwargs = ATTENTION_CALLS[case]
    mask = {name: make() for name, make in MASKS.items()}
    tensors = [torch.randn(shape, requires_grad=True) for shape in shapes]
    return [*tensors, *(mask.get(a, a) for a in args)], {
        k: mask.get(v, v) if isinstance(v, str) else v for k, v in kwargs.items()
    }


def layout(tensor: torch.Tensor) -> list[int]:
    """The strides that mean something: not those of dimensions of size 1."""
    return [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size != 1]


@pytest.mark.parametrize("case", ATTENTION_CALLS)
def test_every_form_of_an_attention_call(case, impl, calls) -> None:
    args, kwargs = attention_arguments(case)
    expected = F.scaled_dot_product_attention(*args, **kwargs)
    with gpt4fast.fast_ops():
        ours = F.scaled_dot_product_attention(*args, **kwargs)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=2e-6)
    assert ours.numel() == 0 or layout(ours) == layout(expected)
    grads = torch.autograd.grad(ours.square().sum(), args[:3])
    torch.testing.assert_close(grads, torch.autograd.grad(expected.square().sum(), args[:3]), rtol=1e-4, atol=1e-5)
    assert calls == ([] if case in LEFT_TO_TORCH else ["attention"])


def test_the_layout_is_torchs_for_every_layout_of_query(impl) -> None:
    packed = torch.randn(2, 6, 3, 4, 8)
    query, key, value = (t.transpose(1, 2) for t in packed.unbind(2))
    layouts = {
        "packed": query,
        "transposed": query.transpose(1, 2).contiguous().transpose(1, 2),
        "contiguous": query.contiguous(),
        "expanded": query[:, :1].expand(-1, 4, -1, -1),
        "last dimension strided": query.transpose(2, 3).contiguous().transpose(2, 3),
    }
    masks = {"none": None, "constant": torch.zeros(6, 6), "learned": torch.zeros(6, 6, requires_grad=True)}
    for form, q in layouts.items():
        for name, mask in masks.items():
            expected = F.scaled_dot_product_attention(q, key, value, mask)
            with gpt4fast.fast_ops():
                ours = F.scaled_dot_product_attention(q, key, value, mask)
            assert ours.stride() == expected.stride(), (form, name)
            torch.testing.assert_close(ours, expected)


BAD_CALLS = {
    "no arguments": lambda: F.scaled_dot_product_attention(),
    "unknown keyword": lambda: F.scaled_dot_product_attention(*(torch.ones(2, 3),) * 3, window=3),
    "scale by position": lambda: F.scaled_dot_product_attention(*(torch.ones(2, 3),) * 3, None, 0.0, False, 0.5),
    "1-D": lambda: F.scaled_dot_product_attention(*(torch.ones(3),) * 3),
    "dtypes": lambda: F.scaled_dot_product_attention(torch.ones(2, 3), *(torch.ones(2, 3, dtype=torch.float64),) * 2),
    "integers": lambda: F.scaled_dot_product_attention(*(torch.ones(2, 3, dtype=torch.int64),) * 3),
    "head_dim": lambda: F.scaled_dot_product_attention(torch.ones(1, 2, 3), *(torch.ones(1, 2, 4),) * 2),
    "heads without enable_gqa": lambda: F.scaled_dot_product_attention(
        torch.ones(1, 4, 2, 3), *(torch.ones(1, 2, 2, 3),) * 2
    ),
    "enable_gqa of 2-D": lambda: F.scaled_dot_product_attention(*(torch.ones(2, 3),) * 3, enable_gqa=True),
    "mask of 1 dimension": lambda: F.scaled_dot_product_attention(*(torch.ones(1, 1, 2, 3),) * 3, torch.zeros(2)),
    "mask shape": lambda: F.scaled_dot_product_attention(*(torch.ones(1, 1, 2, 3),) * 3, torch.zeros(3, 2)),
    "mask larger than scores": lambda: F.scaled_dot_product_attention(
        *(torch.ones(1, 2, 3),) * 3, torch.zeros(5, 1, 2, 2)
    ),
    "integer mask": lambda: F.scaled_dot_product_attention(
        *(torch.ones(1, 1, 2, 3),) * 3, torch.ones(2, 2, dtype=torch.int64)
    ),
    "mask dtype": lambda: F.scaled_dot_product_attention(
        *(torch.ones(1, 1, 2, 3),) * 3, torch.ones(2, 2, dtype=torch.float64)
    ),
    "dropout": lambda: F.scaled_dot_product_attention(*(torch.ones(2, 3),) * 3, None, 1.5),
    "mask and causal": lambda: F.scaled_dot_product_attention(*(torch.ones(1, 2, 3),) * 3, torch.ones(2, 2), 0.0, True),
    "not a tensor": lambda: F.scaled_dot_product_attention(torch.ones(2, 3), None, torch.ones(2, 3)),
    "conv channels": lambda: F.conv_transpose1d(torch.ones(1, 3, 4), torch.ones(2, 1, 3)),
    "conv dimensions": lambda: F.conv_transpose2d(torch.ones(3, 4), torch.ones(3, 1, 3, 3)),
    "conv bias": lambda: F.conv_transpose1d(torch.ones(1, 2, 4), torch.ones(2, 1, 3), torch.ones(2)),
    "conv stride": lambda: F.conv_transpose1d(torch.ones(1, 2, 4), torch.ones(2, 1, 3), None, 0),
    "conv output_padding": lambda: F.conv_transpose1d(torch.ones(1, 2, 4), torch.ones(2, 1, 3), None, 1, 0, 1),
    "conv padding": lambda: F.conv_transpose1d(torch.ones(1, 2, 4), torch.ones(2, 1, 3), None, 1, 9),
    "conv groups": lambda: F.conv_transpose1d(torch.ones(1, 2, 4), torch.ones(2, 1, 3), groups=3),
    "conv dtypes": lambda: F.conv_transpose1d(torch.ones(1, 2, 4), torch.ones(2, 1, 3, dtype=torch.float64)),
    "conv stride name": lambda: torch.conv_transpose2d(torch.ones(1, 2, 4, 4), torch.ones(2, 1, 3, 3), strides=2),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_errors_are_torchs(case) -> None:
    with pytest.raises(Exception) as torchs:  # noqa: B017, PT011 - whichever torch raises
        BAD_CALLS[case]()
    with pytest.raises(Exception) as ours, gpt4fast.fast_ops():  # noqa: B017, PT011
        BAD_CALLS[case]()
    assert type(ours.value) is type(torchs.value)
    assert str(ours.value) == str(torchs.value)


def test_transposed_convolution_by_every_name(calls) -> None:
    x, w, b = torch.randn(2, 4, 5, 5), torch.randn(4, 3, 3, 3), torch.randn(3)
    expected = F.conv_transpose2d(x, w, b, 2, 1, 1)
    with gpt4fast.fast_ops():
        for ours in (
            F.conv_transpose2d(x, w, b, 2, 1, 1),
            torch.conv_transpose2d(x, w, b, (2, 2), [1, 1], 1),
            F.conv_transpose2d(weight=w, input=x, bias=b, stride=[2], padding=1, output_padding=(1, 1)),
            F.conv_transpose2d(input=x, weight=w, bias=b, stride=2, padding=1, output_padding=1, groups=1, dilation=1),
        ):
            torch.testing.assert_close(ours, expected)
        module = nn.ConvTranspose2d(4, 3, 3)
        module(x)
        F.conv_transpose1d(x[:, :, 0], w[:, :, 0])
        F.conv_transpose3d(x[None].transpose(1, 2), w[..., None])
    assert calls == ["conv_transpose"] * 7


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_transposed_convolution_keeps_torchs_memory_format(layout, impl) -> None:
    weights = torch.randn(4, 3, 3, 3), torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last)
    x = torch.randn(2, 4, 5, 6).to(memory_format=layout)
    for weight in weights:
        expected = F.conv_transpose2d(x, weight, stride=2)
        with gpt4fast.fast_ops():
            ours = F.conv_transpose2d(x, weight, stride=2)
        assert ours.stride() == expected.stride()
        torch.testing.assert_close(ours, expected)


class Marked(torch.Tensor):
    """A tensor subclass; torch keeps the class of the result."""


def test_subclasses_nested_tensors_and_sdpa_kernel_are_torchs(calls) -> None:
    q = torch.randn(2, 4, 6, 8)
    nested = torch.nested.nested_tensor([torch.randn(n, 4, 8) for n in (3, 5)], layout=torch.jagged)
    with gpt4fast.fast_ops():
        marked = F.scaled_dot_product_attention(*(q.as_subclass(Marked),) * 3)
        assert type(marked) is Marked
        F.scaled_dot_product_attention(*(nested.transpose(1, 2),) * 3)
        with sdpa_kernel(SDPBackend.MATH):
            F.scaled_dot_product_attention(q, q, q)
        assert not calls
        F.scaled_dot_product_attention(q, q, q)
    assert calls == ["attention"]


@pytest.fixture
def native_only(monkeypatch, needs_native) -> None:
    """Ours would be the native kernel, which has no rules for transforms and tracers: it must not be asked."""
    monkeypatch.setenv("GPT4FAST_IMPL", "native")


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_function_transforms_are_torchs(native_only, calls) -> None:
    q = torch.randn(3, 2, 4, 8)

    def attend(x):
        return F.scaled_dot_product_attention(x, x, x, is_causal=True)

    def upsample(x):
        return F.conv_transpose1d(x[0], x[0].transpose(0, 1)).square().sum()

    def dual():
        with torch.autograd.forward_ad.dual_level():
            x = torch.autograd.forward_ad.make_dual(q, q.cos())
            return torch.autograd.forward_ad.unpack_dual(upsample(x))

    transforms = {
        "vmap": lambda: torch.vmap(attend)(q.unsqueeze(2)),
        "grad": lambda: torch.func.grad(lambda x: attend(x).square().sum())(q),
        "jvp": lambda: torch.func.jvp(upsample, (q,), (q.sin(),)),
        "jacrev of grad": lambda: torch.func.jacrev(torch.func.grad(upsample))(q),
        "dual numbers": dual,
    }
    for name, transform in transforms.items():
        expected = transform()
        with gpt4fast.fast_ops():
            ours = transform()
        torch.testing.assert_close(tuple(ours), tuple(expected), msg=name)
    assert not calls


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_traces_and_exports_hold_torchs_ops(native_only) -> None:
    class Model(nn.Module):
        def forward(self, x):
            with gpt4fast.fast_ops():
                return F.scaled_dot_product_attention(x, x, x), F.conv_transpose1d(x[0], x[0].transpose(0, 1))

    x = torch.randn(1, 2, 4, 8)
    for strict in (False, True):
        exported = torch.export.export(Model(), (x,), strict=strict)
        targets = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
        assert {"aten.scaled_dot_product_attention.default", "aten.conv_transpose1d.default"} <= targets
        assert not any("gpt4fast" in target for target in targets)
    traced = torch.jit.trace(Model(), x)
    assert "aten::scaled_dot_product_attention" in str(traced.inlined_graph)
    torch.testing.assert_close(traced(x), Model()(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_torchs(dtype, impl, calls) -> None:
    q, x, w = torch.randn(2, 4, 6, 8), torch.randn(2, 4, 5), torch.randn(4, 3, 3)
    mask = torch.randn(6, 6)

    def both():
        with torch.autocast("cpu", dtype):
            return F.scaled_dot_product_attention(q, q, q, mask), F.conv_transpose1d(x, w, stride=2)

    expected = both()
    with gpt4fast.fast_ops():
        ours = both()
    assert [t.dtype for t in ours] == [t.dtype for t in expected] == [dtype, dtype]
    torch.testing.assert_close(ours, expected, rtol=2e-2, atol=2e-2)
    assert calls == ["attention", "conv_transpose"]


def test_unseen_nan_is_the_one_difference() -> None:
    q = torch.randn(1, 1, 3, 8)
    kv = torch.randn(1, 1, 3, 8)
    kv[:, :, 2] = torch.nan
    mask = torch.tensor([True, True, False])[None]
    with gpt4fast.fast_ops():
        ours = F.scaled_dot_product_attention(q, kv, kv, mask)
    torch.testing.assert_close(ours, F.scaled_dot_product_attention(q, kv[:, :, :2], kv[:, :, :2]))


def test_nesting_exceptions_and_threads(calls) -> None:
    q = torch.randn(1, 2, 3, 4)
    with gpt4fast.fast_ops(), gpt4fast.fast_ops():
        F.scaled_dot_product_attention(q, q, q)
    assert calls == ["attention"]
    with pytest.raises(RuntimeError, match="on purpose"), gpt4fast.fast_ops():
        raise RuntimeError("on purpose")
    F.scaled_dot_product_attention(q, q, q)  # the context is gone
    assert calls == ["attention"]

    def elsewhere() -> None:
        F.scaled_dot_product_attention(q, q, q)  # another thread has its own
        with gpt4fast.fast_ops():
            F.conv_transpose1d(q[0], q[0].transpose(0, 1))

    with gpt4fast.fast_ops():
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    assert calls == ["attention", "conv_transpose"]


def test_other_torch_functions_do_not_change() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    with gpt4fast.fast_ops():
        y = (x @ x.T).softmax(-1).unflatten(0, (3, 1)) + torch.ones(3, 1, 3, dtype=torch.float64)
        y.sum().backward()
    assert y.shape == (3, 1, 3)
    assert y.dtype == torch.float64
    assert x.grad.shape == x.shape


class Attention(nn.Module):
    """As people write it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x):
        batch, length, width = x.shape
        q, k, v = (t.view(batch, length, self.heads, -1).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).view(batch, length, width))  # the view needs torch's layout


class TinyGPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        self.blocks = nn.ModuleList(
            nn.ModuleList([nn.LayerNorm(32), Attention(32, 4), nn.LayerNorm(32), nn.Linear(32, 32)]) for _ in range(2)
        )
        self.head = nn.Linear(32, 50)

    def forward(self, ids):
        x = self.embed(ids)
        for norm_a, attention, norm_b, mlp in self.blocks:
            x = x + attention(norm_a(x))
            x = x + F.gelu(mlp(norm_b(x)))
        return self.head(x)


def train(model: nn.Module, fast: bool) -> tuple[list[float], dict]:
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    losses = []
    for _ in range(4):
        ids = torch.randint(50, (2, 17))
        with gpt4fast.fast_ops() if fast else torch.enable_grad():
            loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, model.state_dict()


def test_an_unchanged_gpt_trains_the_same(impl, calls) -> None:
    model = TinyGPT()
    twin = TinyGPT()
    twin.load_state_dict(model.state_dict())
    losses, weights = train(model, fast=False)
    assert not calls
    fast_losses, fast_weights = train(twin, fast=True)
    assert calls == ["attention"] * 8
    torch.testing.assert_close(fast_losses, losses, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(fast_weights, weights, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_under_torch_compile(backend, impl) -> None:
    model = TinyGPT().eval()
    ids = torch.randint(50, (2, 9))
    upsample = nn.ConvTranspose1d(32, 8, 4, 2, 1)

    @torch.compile(backend=backend, fullgraph=True)
    def compiled(ids):
        with gpt4fast.fast_ops():
            return upsample(model.embed(ids).transpose(1, 2)), model(ids)

    torch._dynamo.reset()
    if impl == "reference" and backend == "inductor":
        pytest.skip("one compilation of the reference is enough")
    expected = upsample(model.embed(ids).transpose(1, 2)), model(ids)
    torch.testing.assert_close(compiled(ids), expected, rtol=1e-4, atol=1e-5)


def test_torchs_multi_head_attention_module_is_rerouted(impl, calls) -> None:
    for batch_first in (False, True):
        module = nn.MultiheadAttention(16, 4, batch_first=batch_first).eval()
        x = torch.randn(3, 5, 16)
        expected, _ = module(x, x, x, need_weights=False)
        with gpt4fast.fast_ops(), torch.no_grad():
            ours, weights = module(x, x, x, need_weights=False)
        assert weights is None
        torch.testing.assert_close(ours, expected)
    assert calls == ["attention"] * 2
    with gpt4fast.fast_ops():
        ours, weights = module(x, x, x)
    torch.testing.assert_close((ours, weights), module(x, x, x))
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval()
    with gpt4fast.fast_ops():
        ours = layer(x, src_key_padding_mask=torch.arange(5).expand(3, 5) > 3)
    torch.testing.assert_close(ours, layer(x, src_key_padding_mask=torch.arange(5).expand(3, 5) > 3))
    assert calls == ["attention"] * 3
