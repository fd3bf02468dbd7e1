"""Other libraries, where installed: ONNX Runtime and OpenVINO, on the forward cells and in equal dtypes only.

Models are built node by node with ``onnx.helper`` (convolutions) or the library's own operators (attention). Inputs and
outputs stay in buffers allocated once, as a server would keep them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from .harness import Candidate, Unavailable
from .shapes import AttentionCell, ConvTransposeCell


def installed() -> list[str]:
    """Names of the peers that can run here."""
    with_onnx = importlib.util.find_spec("onnx") is not None
    names = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
    return [title for name, title in names.items() if with_onnx and importlib.util.find_spec(name) is not None]


def build(cell: AttentionCell | ConvTransposeCell, dtype: torch.dtype, threads: int) -> list[Candidate]:
    """The candidates of installed peers that take the cell in this dtype."""
    if cell.backward or cell.mode == "lengths":
        return []
    here, candidates = installed(), []
    inputs = cell.inputs(dtype)  # the same values as every candidate's
    if isinstance(cell, ConvTransposeCell):
        inputs = inputs[0], cell.parameters(dtype)
    if "ONNX Runtime" in here and dtype in (torch.float32, torch.float16):
        candidates.append(_guarded("ONNX Runtime", lambda: _onnxruntime(cell, inputs, threads)))
    # OpenVINO's attention has no grouped heads; with one query the group can be folded into the rows.
    grouped = isinstance(cell, AttentionCell) and cell.heads != cell.kv_heads and cell.mode != "decode"
    if "OpenVINO" in here and dtype == torch.float32 and not grouped:
        candidates.append(_guarded("OpenVINO", lambda: _openvino(cell, inputs, threads)))
    return candidates


def _guarded(name: str, make: Callable[[], Callable[[], Tensor]]) -> Candidate:
    """Built at the first call, so that the harness reports a refusal like any failed check."""
    built: list[Callable[[], Tensor]] = []

    def run() -> Tensor:
        if not built:
            built.append(make())
        return built[0]()

    return Candidate(name, run)


def _onnx_model(cell: AttentionCell | ConvTransposeCell, inputs: tuple) -> tuple[bytes, dict[str, Tensor]]:
    from onnx import TensorProto, helper, numpy_helper

    x = inputs[0]
    kind = TensorProto.FLOAT if x.dtype == torch.float32 else TensorProto.FLOAT16
    nodes, constants = [], []
    if isinstance(cell, AttentionCell):
        feeds = dict(zip(("query", "key", "value"), inputs, strict=True))
        nodes.append(helper.make_node("Attention", list(feeds), ["output"], is_causal=int(cell.is_causal)))
    else:
        feeds, parameters = {"x": x}, inputs[1]

        def constant(name: str, tensor: Tensor) -> str:
            constants.append(numpy_helper.from_array(tensor.detach().contiguous().numpy(), name))
            return name

        current = "x"
        for i, (layer, p) in enumerate(zip(cell.layers, parameters, strict=True)):
            operands = [current, constant(f"w{i}", p["weight"])]
            if p["bias"] is not None:
                operands.append(constant(f"b{i}", p["bias"]))
            settings = {
                "kernel_shape": [layer.kernel] * cell.dims,
                "strides": [layer.stride] * cell.dims,
                "pads": [layer.padding] * (2 * cell.dims),
                "group": layer.groups,
            }
            nodes.append(helper.make_node("ConvTranspose", operands, [f"c{i}"], **settings))
            current = f"c{i}"
            if layer.norm == "batch":
                names = [constant(f"{name}{i}", p[name]) for name in ("gamma", "beta", "mean", "var")]
                nodes.append(helper.make_node("BatchNormalization", [current, *names], [f"n{i}"], epsilon=1e-5))
                current = f"n{i}"
            elif layer.norm == "layer":
                names = [constant(f"{name}{i}", p[name]) for name in ("gamma", "beta")]
                last = [0, *range(2, cell.dims + 2), 1]
                first = [0, cell.dims + 1, *range(1, cell.dims + 1)]
                nodes.append(helper.make_node("Transpose", [current], [f"t{i}"], perm=last))
                nodes.append(helper.make_node("LayerNormalization", [f"t{i}", *names], [f"l{i}"], epsilon=1e-6))
                nodes.append(helper.make_node("Transpose", [f"l{i}"], [f"n{i}"], perm=first))
                current = f"n{i}"
            if layer.activation is not None:
                operator = {"relu": "Relu", "tanh": "Tanh", "gelu": "Gelu"}[layer.activation]
                nodes.append(helper.make_node(operator, [current], [f"a{i}"]))
                current = f"a{i}"
        nodes.append(helper.make_node("Identity", [current], ["output"]))
    graph = helper.make_graph(
        nodes,
        cell.op,
        [helper.make_tensor_value_info(name, kind, list(t.shape)) for name, t in feeds.items()],
        [helper.make_tensor_value_info("output", kind, None)],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    return model.SerializeToString(), feeds


def _onnxruntime(cell: AttentionCell | ConvTransposeCell, inputs: tuple, threads: int) -> Callable[[], Tensor]:
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as errors

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
    model, feeds = _onnx_model(cell, inputs)
    try:
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        binding = session.io_binding()
        for name, tensor in feeds.items():
            value = onnxruntime.OrtValue.ortvalue_from_numpy(tensor.detach().contiguous().numpy())
            binding.bind_ortvalue_input(name, value)
        binding.bind_output("output", "cpu")
        session.run_with_iobinding(binding)
    except (errors.Fail, errors.NotImplemented, errors.InvalidGraph, errors.InvalidArgument) as problem:
        raise Unavailable(str(problem)) from problem
    result = binding.get_outputs()[0]
    binding.clear_binding_outputs()
    binding.bind_ortvalue_output("output", result)
    output = torch.from_numpy(result.numpy())  # numpy() copies: these are the values of the run above

    def run() -> Tensor:
        session.run_with_iobinding(binding)
        return output

    return run


def _openvino(cell: AttentionCell | ConvTransposeCell, inputs: tuple, threads: int) -> Callable[[], Tensor]:
    import openvino
    from openvino import opset13

    if isinstance(cell, AttentionCell):
        query, key, value = inputs
        rows = query.reshape(cell.batch, cell.kv_heads, -1, cell.head_dim)
        feeds = [rows, key, value]
        parameters = [opset13.parameter(list(t.shape), openvino.Type.f32) for t in feeds]
        attended = opset13.scaled_dot_product_attention(*parameters, causal=cell.is_causal)
        model = openvino.Model([attended], parameters, cell.op)
        shape = query.shape
    else:
        serialized, named = _onnx_model(cell, inputs)
        feeds = list(named.values())
        model = openvino.Core().read_model(serialized)
        shape = None
    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    request = openvino.Core().compile_model(model, "CPU", settings).create_infer_request()
    kept = [t.detach().contiguous().numpy() for t in feeds]
    for i, array in enumerate(kept):
        request.set_input_tensor(i, openvino.Tensor(array, shared_memory=True))
    request.infer()
    output = torch.from_numpy(request.get_output_tensor(0).data.copy())
    output = output if shape is None else output.reshape(shape)

    def run() -> Tensor:
        request.infer()
        return output

    return run
