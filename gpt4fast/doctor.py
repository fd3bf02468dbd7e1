"""`gpt4fast doctor`: what this installation is, and which implementation each op takes here, and why."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from dataclasses import dataclass
from pathlib import Path

import torch


def cpu_model() -> str:
    """The processor's own name, else its architecture."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith(("model name", "Model")):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _installed(name: str) -> str:
    if importlib.util.find_spec(name) is None:
        return "not installed"
    return importlib.metadata.version(name)


def versions() -> dict[str, str]:
    """Rows of the table of versions, {label: value}."""
    import gpt4fast
    from gpt4fast.backends import native

    build = native.build_info()
    return {
        "gpt4fast": gpt4fast.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _installed("triton"),
        "nvcc seen at build": str(build.get("nvcc") or "none"),
        "compiler at build": str(build.get("compiler") or "none (pure Python)"),
    }


def machine() -> dict[str, str]:
    """Rows of the table of the machine and of what was loaded, {label: value}."""
    from gpt4fast.backends import native

    cpu_error, cuda_error = native.cpu_library_error(), native.cuda_library_error()
    if torch.cuda.is_available():
        gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    else:
        gpus = ["none that torch sees"]
    return {
        "processor": cpu_model(),
        "CPU level": native.cpu_level(),
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} cores",
        "CPU library": "loaded" if cpu_error is None else f"not loaded: {cpu_error}",
        "CUDA library": "loaded" if cuda_error is None else f"not loaded: {cuda_error}",
        "GPU": ", ".join(gpus),
        "GPT4FAST_IMPL": os.environ.get("GPT4FAST_IMPL", "auto (not set)"),
    }


@dataclass(frozen=True)
class Choice:
    """Which implementation one typical call takes; `reasons` tells why not each of the others."""

    op: str
    call: str
    implementation: str
    reasons: dict[str, str]


def choices(device: str = "cpu") -> list[Choice]:
    """What `auto` takes on `device` for a typical call of every op (nothing is computed)."""
    import gpt4fast as g

    def rand(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, device=device)

    qkv = [rand(2, 8, 512, 64) for _ in range(3)]
    with_gradient = [x.clone().requires_grad_() for x in qkv]
    cache = [rand(2, 8, 1024, 64) for _ in range(2)]
    lengths = torch.tensor([800, 1024], device=device)
    channels = {"scale": rand(64), "shift": rand(64), "activation": "relu"}
    calls = [
        ("attention", "causal, 2×8 heads, 512×64", g.attention, qkv, {"is_causal": True}),
        ("attention", "the same with gradient", g.attention, with_gradient, {"is_causal": True}),
        ("attention", "decoding, 1 new token, cache of 1024", g.attention,
         [rand(2, 8, 1, 64), *cache], {"kv_lengths": lengths}),
        ("conv_transpose1d", "64 channels, length 256, kernel 25, stride 4", g.conv_transpose1d,
         [rand(8, 128, 256), rand(128, 64, 25)], {"stride": 4, "padding": 11, "output_padding": 1, **channels}),
        ("conv_transpose2d", "64 channels, 16×16, kernel 4, stride 2", g.conv_transpose2d,
         [rand(16, 128, 16, 16), rand(128, 64, 4, 4)], {"stride": 2, "padding": 1, **channels}),
        ("conv_transpose3d", "64 channels, 8×8×8, kernel 4, stride 2", g.conv_transpose3d,
         [rand(1, 128, 8, 8, 8), rand(128, 64, 4, 4, 4)], {"stride": 2, "padding": 1, **channels}),
    ]  # fmt: skip
    taken = []
    for name, call, op, args, kwargs in calls:
        try:
            why = g.explain(op, *args, **kwargs)
        except RuntimeError as error:  # GPT4FAST_IMPL asks for what can't serve this call
            taken.append(Choice(name, call, "none", {"error": str(error)}))
        else:
            taken.append(Choice(name, call, why.implementation, dict(why.reasons)))
    return taken


def print_report(console) -> None:
    """Prints all tables on a rich console."""
    from rich.markup import escape
    from rich.table import Table

    for title, rows in (("Versions", versions()), ("Machine", machine())):
        table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
        table.add_column(style="cyan", no_wrap=True)
        table.add_column(overflow="fold")
        for label, value in rows.items():
            table.add_row(label, value)
        console.print(table)
        console.print()
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        chosen = choices(device)
        table = Table(title=f"What a typical float32 call takes on {device}", title_justify="left", box=None)
        for column in ("op", "call", "takes"):
            table.add_column(column, overflow="fold", style="green" if column == "takes" else None)
        for choice in chosen:
            table.add_row(choice.op, choice.call, choice.implementation)
        console.print(table)
        console.print()
        console.print("Why not another:", style="italic")
        for (name, reason), ops in _reasons(chosen).items():
            console.print(f"  [cyan]{name}[/cyan] [dim]for {', '.join(ops)}:[/dim] {escape(reason)}", highlight=False)
        console.print()


def _reasons(chosen: list[Choice]) -> dict[tuple[str, str], list[str]]:
    """{(implementation, why it was not taken): ops}, each reason once."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for choice in chosen:
        for name, reason in choice.reasons.items():
            ops = reasons.setdefault((name, reason), [])
            if choice.op not in ops:
                ops.append(choice.op)
    return reasons
