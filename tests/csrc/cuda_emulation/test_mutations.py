"""Faults planted in the CUDA kernels, one at a time: the emulated tests must find each of them.

What a kernel's own tests do not see, they do not test. Each fault is a change of one place: a barrier or a wait less,
an index one off, another lane, a predicate that is wider.
"""

from __future__ import annotations

import math
import shutil
from types import SimpleNamespace

import pytest
import torch

from .. import test_attention_backward as backward
from ..test_affine_activation import check as check_affine
from ..test_affine_activation import parameters
from ..test_attention_decode import tables
from ..test_attention_forward import assert_close, attend, make_inputs
from . import test_batch_norm as norm
from . import test_conv_transpose as convolution
from .build import CUDA_SOURCES, ROOT, build
from .test_attention_decode import Case

DECODE, CONVOLUTION, AFFINE = "attention_decode.cu", "conv_transpose.cu", "affine_activation.cu"
ATTENTION, HOPPER, BACKWARD = "attention_forward.cu", "attention_forward_hopper.cu", "attention_backward.cu"
TILES, BLOCK, RANGES, WEIGHTS, SCORES = (
    f"attention_{name}.cuh" for name in ("tiles", "forward_block", "block", "weights", "backward_scores")
)
OF_QUERIES, OF_KEYS = "attention_query_gradient.cuh", "attention_key_gradient.cuh"
NORM, KERNEL, WEIGHT = "batch_norm.cu", "conv_transpose_kernel.cuh", "conv_transpose_weight_gradient.cu"
SUMS = "block_sums.cu"
BARRIER, WARP_BARRIER = "__syncthreads();", "__syncwarp();"

# (source of the operator, file, what stands there, what is planted)
FAULTS = {
    "decode: tile not waited for": (DECODE, DECODE, "wait_for_copies<kTiles - 2>", "wait_for_copies<kTiles - 1>"),
    "decode: no barrier before a tile is read": (DECODE, DECODE, WARP_BARRIER + "  // every", "// every"),
    "decode: no barrier after conversion": (DECODE, DECODE, f"cache_dtype);\n      {WARP_BARRIER}", "cache_dtype);"),
    "decode: no barrier after the query": (DECODE, DECODE, f"  {BARRIER}\n\n  const Row rows", "\n  const Row rows"),
    "decode: no barrier before the sums": (
        DECODE,
        DECODE,
        f"{BARRIER}\n  const auto peak_of",
        "\n  const auto peak_of",
    ),
    "decode: no barrier after the sums": (DECODE, DECODE, f"{BARRIER}\n  for (int row", "\n  for (int row"),
    "decode: future keys are seen": (DECODE, "attention_decode_cache.cuh", "position + 1 : 0", "position + 2 : 0"),
    "decode: an entry too many": (DECODE, "attention_decode_cache.cuh", "row < to; }", "row <= to; }"),
    "decode: the wrong slot": (DECODE, DECODE, "tiles[warp][step % kTiles]", "tiles[warp][(step + 1) % kTiles]"),
    "decode: lane of a weight": (DECODE, "attention_products.cuh", "key % 8 / 2", "key % 4 / 2"),
    "decode: lane of a matrix": (DECODE, "attention_products.cuh", "values + lane % 16", "values + lane % 8"),
    "decode: half a warp's largest": (
        DECODE,
        "attention_decode_cache.cuh",
        "distance = 16; distance > 0; distance /= 2) {\n    value = fmaxf",
        "distance = 8; distance > 0; distance /= 2) {\n    value = fmaxf",
    ),
    "decode: place in a block": (DECODE, "attention_decode_cache.cuh", "index % size}", "index % size + 1}"),
    "decode: last token is left out": (
        DECODE,
        "attention_decode_cache.cuh",
        "token < p.query_length",
        "token + 1 < p.query_length",
    ),
    "decode: a number of float8": (DECODE, "attention_products.cuh", "(wide & 0x7Fu) << 20", "(wide & 0x3Fu) << 20"),
    "decode: the largest of float8": (DECODE, "attention_decode_cache.cuh", "127.0f : 448.0f", "127.0f : 480.0f"),
    "attention: tile not waited for": (
        ATTENTION,
        ATTENTION,
        "wait_for_copies<2 * kStages - 2>",
        "wait_for_copies<2 * kStages - 1>",
    ),
    "attention: no barrier in the loop": (ATTENTION, ATTENTION, BARRIER + "  // every", "// every"),
    "attention: no barrier before the result": (
        ATTENTION,
        ATTENTION,
        f"  {BARRIER}\n  scalar_t* staged",
        "  scalar_t* staged",
    ),
    "attention: no barrier after the result": (
        ATTENTION,
        TILES,
        f"  {WARP_BARRIER}\n  if (is_wide) {{",
        "  if (is_wide) {",
    ),
    "attention: a future key is seen": (
        ATTENTION,
        TILES,
        "query + offset + 1) : length",
        "query + offset + 2) : length",
    ),
    "attention: the next sequence's query": (ATTENTION, TILES, "to = end - first;", "to = end - first + 1;"),
    "attention: a row too many": (
        ATTENTION,
        BLOCK,
        "row < query_length) {",
        "row <= query_length) {",
    ),
    "attention: keys of a tile that not all queries see": (
        ATTENTION,
        RANGES,
        "as_key(positions.upper(first))};",
        "as_key(positions.upper(last))};",
    ),
    "attention: keys before the first of a tile": (
        ATTENTION,
        RANGES,
        "as_key(positions.lower(last)),",
        "as_key(positions.lower(first)),",
    ),
    "attention: lane of a key": (ATTENTION, "attention_products.cuh", "lane / 8 % 2 * 8", "lane / 16 * 8"),
    "attention: mask of a row too many": (ATTENTION, ATTENTION, "first_row + 8 * i < query_length ?", "true ?"),
    "attention: mask transposed": (ATTENTION, WEIGHTS, "query * row_stride + key * stride", "key * row_stride + query"),
    "attention: hidden values are multiplied": (
        ATTENTION,
        WEIGHTS,
        "if (!(seen >> (key / 8",
        "if (false && !(seen >> (key / 8",
    ),
    "attention: no barrier after hidden values": (
        ATTENTION,
        ATTENTION,
        f"      {BARRIER}\n    }}\n    add_values",
        "    }\n    add_values",
    ),
    "attention: a word of another key": (ATTENTION, WEIGHTS, "key % 64 / 16;", "key % 32 / 16;"),
    "attention: the weight beside is dropped": (ATTENTION, WEIGHTS, "2 * (n + k) + j);", "2 * (n + k) + 1 - j);"),
    "hopper: tile not waited for": (
        HOPPER,
        HOPPER,
        "wait_for_copies<0>();\n      synch",
        "wait_for_copies<1>();\n      synch",
    ),
    "hopper: no barrier": (HOPPER, HOPPER, f"publish_writes();\n    {BARRIER}", "publish_writes();"),
    "hopper: tile not published": (HOPPER, HOPPER, f"publish_writes();\n    {BARRIER}", BARRIER),
    "hopper: scores not waited for": (HOPPER, HOPPER, "wait_for_products<1>", "wait_for_products<2>"),
    "hopper: output not waited for": (
        HOPPER,
        HOPPER,
        "take_weights = [&] {\n    wait_for_products<0>();",
        "take_weights = [&] {\n    wait_for_products<1>();",
    ),
    "hopper: weights that are still multiplied": (
        HOPPER,
        HOPPER,
        "take_weights = [&] {",
        "take_weights = [&] {\n    weights[0][0] = 0;",
    ),
    "hopper: keys that are still multiplied": (HOPPER, HOPPER, "shared.keys, tile + 2", "shared.keys, tile + 3"),
    "hopper: queries of another group": (HOPPER, HOPPER, "warp / 4 * 64, d", "0, d"),
    "hopper: no barrier before the result": (
        HOPPER,
        HOPPER,
        f"{BARRIER}\n  float shares",
        "float shares",
    ),
    "hopper: columns not exchanged": (HOPPER, "swizzled_tile.cuh", "(column / 8 ^ row) % 8", "column / 8 % 8"),
    "hopper: distance of panels": (HOPPER, "swizzled_tile.cuh", "uint64_t{2 * kPanel / 16}", "uint64_t{kPanel / 16}"),
    "gradient of queries: tile not waited for": (
        BACKWARD,
        OF_QUERIES,
        f"wait_for_copies<0>();\n    {BARRIER}",
        f"wait_for_copies<1>();\n    {BARRIER}",
    ),
    "gradient of queries: no barrier in the loop": (BACKWARD, OF_QUERIES, BARRIER + "  // everyone's", "// everyone's"),
    "gradient of queries: no barrier after the output": (BACKWARD, OF_QUERIES, BARRIER + "  // everyone is", "// is"),
    "gradient of queries: keys of a tile that not all queries see": (
        BACKWARD,
        RANGES,
        "as_key(positions.upper(first))};",
        "as_key(positions.upper(last))};",
    ),
    "gradient of queries: sign of lse's gradient": (BACKWARD, OF_QUERIES, "delta -= p.grad_lse", "delta += p.grad_lse"),
    "gradient of queries: hidden keys are multiplied": (
        BACKWARD,
        OF_QUERIES,
        "seen.template clear_others<kKeys>(key_tile);",
        "",
    ),
    "gradient of queries: place in the mask's gradient": (
        BACKWARD,
        OF_QUERIES,
        "* p.kv_length + key : nullptr",
        "* p.kv_length + key + 1 : nullptr",
    ),
    "gradients: slope of the soft cap": (BACKWARD, SCORES, "1.0f - capped * capped", "1.0f - capped"),
    "gradients: dropped weights": (BACKWARD, SCORES, "is_kept ? grad * share : 0.0f", "grad * p.dropout.scale"),
    "gradient of keys: tile not waited for": (
        BACKWARD,
        OF_KEYS,
        f"wait_for_copies<0>();\n    {BARRIER}",
        f"wait_for_copies<1>();\n    {BARRIER}",
    ),
    "gradient of keys: no barrier in the loop": (BACKWARD, OF_KEYS, BARRIER + "  // everyone's", "// everyone's"),
    "gradient of keys: a query too few": (
        BACKWARD,
        TILES,
        "key - offset + p.window_left + 1);",
        "key - offset + p.window_left);",
    ),
    "gradient of keys: queries of a tile that do not see all keys": (
        BACKWARD,
        RANGES,
        "positions.first(first + kRows - 1)",
        "positions.first(first)",
    ),
    "gradient of keys: the first head alone": (BACKWARD, OF_KEYS, "kv_head * group + step / count", "kv_head * group"),
    "gradient of keys: a query that sees nothing": (
        BACKWARD,
        OF_KEYS,
        "notes_of(query_tile, row).lse == -kInfinity &&",
        "false &&",
    ),
    "gradient of keys: a weight of the key 8 before": (BACKWARD, OF_KEYS, ".kept[i % 2] >>", ".kept[0] >>"),
    "gradient of keys: a lane's draw is not passed on": (BACKWARD, WEIGHTS, "distance < 8;", "distance < 4;"),
    "gradient of queries: drawn once": (
        BACKWARD,
        OF_QUERIES,
        "(place == 0 || tile == range.first_tile)",
        "tile == range.first_tile",
    ),
    "gradient of wide keys: that of values": (
        BACKWARD,
        OF_KEYS,
        "sums_keys ? query_tile :",
        "!sums_keys ? query_tile :",
    ),
    "gradient of wide keys: a warp beside its keys": (BACKWARD, OF_KEYS, "warp % Config::kRowWarps *", "warp / 2 *"),
    "convolution: slice not waited for": (
        CONVOLUTION,
        KERNEL,
        "wait_for_copies<kStages - 2>",
        "wait_for_copies<kStages - 1>",
    ),
    "convolution: no barrier in the loop": (CONVOLUTION, KERNEL, BARRIER + "              // every", "// every"),
    "convolution: no barrier before the sums": (
        CONVOLUTION,
        KERNEL,
        f"  {BARRIER}\n#pragma unroll",
        "#pragma unroll",
    ),
    "convolution: statistics of a pixel that is not there": (
        CONVOLUTION,
        KERNEL,
        "row < kPixels && shared.target[row] >= 0;",
        "row < kPixels;",
    ),
    "convolution: no statistics of a tile without pixels": (
        CONVOLUTION,
        KERNEL,
        "keep_statistics({}, part);",
        "",
    ),
    "convolution: gradient of every pixel of the output": (
        CONVOLUTION,
        KERNEL,
        "static_cast<int>(w) * along_w.source_stride",
        "static_cast<int>(w)",
    ),
    "splits: a step too few": (CONVOLUTION, KERNEL, "min(each, steps - first)", "min(each - 1, steps - first)"),
    "splits: all from the first slice": (CONVOLUTION, KERNEL, "slice = first % slices;", "slice = 0;"),
    "splits: all from the first tap": (CONVOLUTION, KERNEL, "tap_w = tap % along_w.taps;", "tap_w = 0;"),
    "splits: from a tap's first channel": (CONVOLUTION, KERNEL, "channel = slice * kDepth;", "channel = 0;"),
    "splits: channels of the weight's first slice": (
        CONVOLUTION,
        KERNEL,
        "(channel + thread / kEach)",
        "thread / kEach",
    ),
    "splits: all in one place": (CONVOLUTION, KERNEL, "p.sums + shared.part * p.numel", "p.sums"),
    "splits: the bias of another channel": (CONVOLUTION, SUMS, "index / p.inner % p.channels", "index % p.channels"),
    "convolution: no barrier after the epilogue": (
        CONVOLUTION,
        KERNEL,
        f"  {BARRIER}\n  write(static_cast",
        "  write(static_cast",
    ),
    "convolution: a stride of two pixels is widened": (
        CONVOLUTION,
        CONVOLUTION,
        "p.in_size[axis] == 1",
        "p.in_size[axis] <= 2",
    ),
    "sums: no barrier between the halves": (
        CONVOLUTION,
        "block_sums.cuh",
        f"    }}\n    {BARRIER}",
        "    }",
    ),
    "sums: spread without the distance of the means": (
        CONVOLUTION,
        "block_sums.cuh",
        "a.spread + b.spread + deviation * deviation * a.count * share",
        "a.spread + b.spread",
    ),
    "weight gradient: slice not waited for": (
        CONVOLUTION,
        WEIGHT,
        "wait_for_copies<kStages - 2>",
        "wait_for_copies<kStages - 1>",
    ),
    "weight gradient: no barrier in the loop": (CONVOLUTION, WEIGHT, BARRIER + "              // every", "// every"),
    "weight gradient: places of the wrong slice": (CONVOLUTION, WEIGHT, "locate(step + kStages)", "locate(step + 1)"),
    "weight gradient: a pixel too many": (CONVOLUTION, WEIGHT, "exists = index < pixels", "exists = index <= pixels"),
    "weight gradient: a column beside the image": (
        CONVOLUTION,
        WEIGHT,
        "out_w < p.out_size[2]",
        "out_w <= p.out_size[2]",
    ),
    "weight gradient: lane of a matrix": (
        CONVOLUTION,
        "conv_transpose_products.cuh",
        "(lane % 8 + lane / 16 * 8) * kRow + lane / 8 % 2 * 16;\n    const char* output_row",
        "lane % 16 * kRow + lane / 16 * 16;\n    const char* output_row",
    ),
    "weight gradient: part left out": (
        CONVOLUTION,
        SUMS,
        "part < p.number; part += kSum",
        "part + 1 < p.number; part += kSum",
    ),
    "convolution: no barrier after the sums": (
        CONVOLUTION,
        KERNEL,
        f"{BARRIER}\n  const auto write",
        "\n  const auto write",
    ),
    "convolution: a column beside the image": (CONVOLUTION, KERNEL, "w < p.in_size[2]", "w <= p.in_size[2]"),
    "convolution: taps the other way round": (
        CONVOLUTION,
        KERNEL,
        "shared.place[2][row] - shift_w",
        "shared.place[2][row] + shift_w",
    ),
    "convolution: a channel too many": (CONVOLUTION, KERNEL, "i < columns);", "i <= columns);"),
    "convolution: a pixel too many": (
        CONVOLUTION,
        "conv_transpose_phase.cuh",
        "residue + stride - 1) / stride",
        "residue + stride) / stride",
    ),
    "convolution: lane of a matrix": (
        CONVOLUTION,
        "conv_transpose_products.cuh",
        "lane / 8 % 2 * 16;\n    const auto load",
        "lane / 16 * 16;\n    const auto load",
    ),
    "convolution: a channel too many of a weight as it is": (
        CONVOLUTION,
        KERNEL,
        "output < columns);",
        "output <= columns);",
    ),
    "convolution: lane of a weight as it is": (
        CONVOLUTION,
        "conv_transpose_products.cuh",
        "channels + lane % 16",
        "channels + lane % 8",
    ),
    "layout: rows in the order of the source": (
        CONVOLUTION,
        "conv_transpose_layout.cuh",
        "is_row ? row : -1",
        "is_row ? first_row + lane : -1",
    ),
    "layout: no barrier": (CONVOLUTION, "conv_transpose_layout.cuh", BARRIER, ""),
    "layout: a channel too many": (
        CONVOLUTION,
        "conv_transpose_layout.cuh",
        "channel < p.channels",
        "channel <= p.channels",
    ),
    "affine: writes past the end": (AFFINE, "channels.cuh", "begin + k < count) {", "begin + k <= count) {"),
    "affine: channels go on": (AFFINE, "channels.cuh", "channel == channels ? 0 : channel", "channel"),
    "norm: a row too many": (NORM, NORM, "min((part + 1) * p.rows_of_part, p.rows)", "(part + 1) * p.rows_of_part"),
    "norm: a channel too many": (NORM, NORM, "last_row = channel < p.channels ?", "last_row = channel <= p.channels ?"),
    "norm: the first row of all": (NORM, NORM, "p.rows_of_part + thread / lanes", "p.rows_of_part"),
    "norm: images of another size": (NORM, NORM, "(row - image * p.image_rows) * p.width", "row * p.width"),
    "norm: no barrier before the sums": (
        NORM,
        "block_sums.cuh",
        f"shared[thread] = value;\n  {BARRIER}",
        "shared[thread] = value;",
    ),
}


def decode_battery(ops) -> None:
    Case(1, 1, 3, 7, 90, 40, 24, torch.float16, page=16, lengths=[70]).check(**tables(90, 40))
    Case(1, 1, 2, 1, 600, 64, 64, torch.bfloat16, lengths=[599]).check()
    Case(2, 1, 2, 1, 300, 40, 16, torch.float32, int8=True, lengths=[255, 7]).check()
    Case(1, 1, 2, 2, 40, 16, 16, torch.float16, float8=True, lengths=[30]).check()


def attention_battery(ops) -> None:
    assert_close(*make_inputs(2, 2, 1, 33, 65, 40, 24, torch.float16), is_causal=True, query_offset=30)
    assert_close(*make_inputs(1, 1, 1, 70, 90, 64, 64, torch.bfloat16))
    assert_close(*make_inputs(1, 2, 1, 5, 9, 7, 3, torch.float32), is_causal=True)
    assert_close(*make_inputs(1, 1, 1, 40, 9, 16, 16, torch.float16), kv_lengths=torch.tensor([0]))
    assert_close(
        *make_inputs(1, 1, 1, 70, 200, 16, 16, torch.float16), is_causal=True, window_left=80, query_offset=130
    )
    mask = torch.rand(1, 2, 33, 65) > 0.4
    mask[..., 20:40] = False
    query, key, value = make_inputs(1, 2, 1, 33, 65, 16, 16, torch.float16)
    assert_close(query, key, value, mask)
    expected = attend(query, key, value, mask, **DROPS)
    exact, *_ = backward.definition(*(x.double() for x in (query, key, value)), mask, **DROPS)
    torch.testing.assert_close(expected[0].double(), exact, rtol=4e-3, atol=4e-3)
    value[:, :, 20:40] = math.nan
    assert all(map(torch.equal, attend(query, key, value, mask, **DROPS), expected))


def hopper_battery(ops) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPT4FAST_WGMMA", "1")
        for widths in ((64, 64), (40, 128)):
            assert_close(*make_inputs(1, 1, 1, 200, 500, *widths, torch.float16), is_causal=True, query_offset=280)
        assert_close(*make_inputs(1, 1, 1, 9, 500, 7, 3, torch.bfloat16))


DROPS = {"dropout_p": 0.4, "dropout_seed": torch.tensor([2**62 + 5])}


def backward_battery(ops) -> None:
    inputs = backward.make_inputs(1, 4, 2, 70, 150, 16, 16, torch.float16)
    backward.assert_close(inputs, is_causal=True, query_offset=60, window_left=50, grad_lse=torch.randn(1, 4, 70))
    mask = torch.randn(1, 4, 70, 150)
    backward.assert_close(inputs, mask=mask, softcap=1.5, **DROPS)
    backward.assert_close(backward.make_inputs(1, 2, 1, 40, 60, 7, 9), is_causal=True, query_offset=20, **DROPS)
    backward.assert_close(backward.make_inputs(1, 1, 1, 18, 66, 136, 136, torch.float16), is_causal=True)
    hidden = torch.arange(150) % 2 == 0
    mask.masked_fill_(hidden, -math.inf)[:, :, 30] = -math.inf
    query, key, value, grad_out = (x.clone() for x in inputs)
    out, lse = attend(query, key, value, mask)
    expected = backward.gradients(query, key, value, grad_out, mask=mask, saved=(out, lse))
    query[:, :, 30] = grad_out[:, :, 30] = out[:, :, 30] = key[:, :, hidden] = value[:, :, hidden] = math.nan
    got = backward.gradients(query, key, value, grad_out, mask=mask, saved=(out, lse))
    assert all(map(torch.equal, got, expected))


def convolution_battery(ops) -> None:
    for name, dtype in (
        ("doubling", torch.float16),
        ("odd channels", torch.float32),
        ("groups", torch.bfloat16),
        ("splits of small tiles", torch.float16),
    ):
        input, weight, bias, geometry = convolution.operands(name, dtype)
        layouts = [torch.channels_last] if input.dim() == 4 else []
        for layout in (torch.contiguous_format, *layouts):
            same = weight.contiguous(memory_format=layout)
            output, _, _, variance = convolution.with_statistics(ops, input, same, bias, geometry, 0.0)
            convolution.check(output, input, weight, bias, geometry)
            exact = output.double().var([0, *range(2, output.dim())], correction=0)
            torch.testing.assert_close(variance.double(), exact, rtol=1e-4, atol=1e-5)
            grad = torch.randn_like(output)
            grads = convolution.gradients(ops, grad, input, same, geometry)
            convolution.check_gradients(grads, grad, input, weight, geometry)
    convolution.check_unequal_phases(ops)
    input, weight, grad = torch.randn(1, 9, 1201), torch.randn(9, 8, 1), torch.randn(1, 8, 1201)
    geometry = (1, 0, 0, 1, 1)
    convolution.check_gradients(
        convolution.gradients(ops, grad, input, weight, geometry), grad, input, weight, geometry
    )


def affine_battery(ops) -> None:
    for shape in ((2, 3, 17), (3, 65, 3)):
        check_affine(torch.randn(shape), *parameters(shape[1]), "relu")


def norm_battery(ops) -> None:
    for x in (norm.far_from_zero(shape, torch.float16) for shape in ((2, 3, 4, 8), (3, 67, 37), (70, 24))):
        norm.check(x, "leaky_relu")


# Sources that an operator needs besides its own.
OTHERS = {
    CONVOLUTION: [WEIGHT, NORM, SUMS],
    NORM: [AFFINE, SUMS],
    ATTENTION: [HOPPER],
    HOPPER: [ATTENTION],
}
BATTERIES = {
    DECODE: decode_battery,
    ATTENTION: attention_battery,
    HOPPER: hopper_battery,
    BACKWARD: backward_battery,
    CONVOLUTION: convolution_battery,
    AFFINE: affine_battery,
    NORM: norm_battery,
}


@pytest.mark.parametrize("source", BATTERIES)
def test_without_a_fault(source, monkeypatch, cuda_ops):
    monkeypatch.setattr(torch.ops, "gpt4fast", cuda_ops)
    BATTERIES[source](cuda_ops)


@pytest.mark.parametrize("index", range(len(FAULTS)), ids=list(FAULTS))
def test_planted_fault_is_found(index, tmp_path, monkeypatch):
    source, name, text, planted = list(FAULTS.values())[index]
    csrc = tmp_path / "csrc"
    ignored = shutil.ignore_patterns("cpu")
    shutil.copytree(ROOT / "csrc", csrc, ignore=ignored)
    path = csrc / "cuda" / name
    before = path.read_text()
    assert before.count(text) == 1, f"{text!r} is {before.count(text)} times in {name}"
    path.write_text(before.replace(text, planted))
    sources = [csrc / "cuda" / needed for needed in (source, *OTHERS.get(source, []))]
    library = build(sources, f"gpt4fast_fault_{index}", csrc)
    torch.ops.load_library(str(library))
    ops = getattr(torch.ops, f"gpt4fast_fault_{index}")
    if source == BACKWARD:  # what the forward kernel saves is right
        torch.ops.load_library(str(build(CUDA_SOURCES, "gpt4fast_emulation")))
        forward = torch.ops.gpt4fast_emulation.attention_forward
        ops = SimpleNamespace(attention_forward=forward, attention_backward=ops.attention_backward)
    monkeypatch.setattr(torch.ops, "gpt4fast", ops)
    with pytest.raises((RuntimeError, AssertionError)) as found:
        BATTERIES[source](ops)
    assert not isinstance(found.value, NotImplementedError), "the battery needs another operator, too"
