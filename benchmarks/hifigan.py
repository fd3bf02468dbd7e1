"""A vocoder of HiFi-GAN V1's shape, random weights, as a user writes it in PyTorch: plain, and through ``optimize()``.

    python benchmarks/hifigan.py [--frames 100] [--output hifigan.json]

Generates audio from mel spectrograms of 80 bins, of one length and of a new length at every call, float32 and bfloat16,
in turns. Reference: Kong et al., "HiFi-GAN", 2020.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gpt4fast
from gpt4fast.benchmarks import report
from gpt4fast.benchmarks.harness import Candidate, CpuTimer, Monitor, Tolerance, measure, pinned_threads

UPSAMPLING = ((512, 256, 16, 8), (256, 128, 16, 8), (128, 64, 4, 2), (64, 32, 4, 2))
SPREAD = 40  # new lengths are drawn from frames - SPREAD to frames + SPREAD


class ResidualBlock(nn.Module):
    def __init__(self, channels: int, kernel: int):
        super().__init__()
        convs = [
            nn.Conv1d(channels, channels, kernel, dilation=d, padding=d * (kernel - 1) // 2) for d in (1, 1, 3, 1, 5, 1)
        ]
        self.pairs = nn.ModuleList(nn.ModuleList(pair) for pair in zip(convs[::2], convs[1::2], strict=True))

    def forward(self, x: Tensor) -> Tensor:
        for first, second in self.pairs:
            x = x + second(F.leaky_relu(first(F.leaky_relu(x, 0.1)), 0.1))
        return x


class Vocoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.before = nn.Conv1d(80, 512, 7, padding=3)
        self.ups = nn.ModuleList(
            nn.ConvTranspose1d(c, out, kernel, stride, (kernel - stride) // 2) for c, out, kernel, stride in UPSAMPLING
        )
        self.blocks = nn.ModuleList(
            nn.ModuleList(ResidualBlock(out, kernel) for kernel in (3, 7, 11)) for _, out, _, _ in UPSAMPLING
        )
        self.after = nn.Conv1d(32, 1, 7, padding=3)

    def forward(self, mel: Tensor) -> Tensor:
        """Audio (N, 1, 256 * T) of mel spectrograms (N, 80, T)."""
        x = self.before(mel)
        for up, blocks in zip(self.ups, self.blocks, strict=True):
            x = up(F.leaky_relu(x, 0.1))
            x = sum(block(x) for block in blocks) / 3
        return torch.tanh(self.after(F.leaky_relu(x)))


def changing(model: nn.Module, mels: list[Tensor]):
    upcoming = itertools.cycle(mels)
    return lambda: model(next(upcoming))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--frames", type=int, default=100)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    rows = []
    with pinned_threads(None) as threads:
        origin = report.provenance("cpu", threads)
        for dtype in (torch.float32, torch.bfloat16):
            torch.manual_seed(0)
            model = Vocoder().to(dtype).eval()
            fast = gpt4fast.optimize(copy.deepcopy(model))
            lengths = args.frames - SPREAD + torch.randperm(2 * SPREAD + 1)
            mels = [torch.randn(1, 80, n).to(dtype) for n in lengths.tolist()]
            mel = torch.randn(1, 80, args.frames).to(dtype)
            with torch.inference_mode():
                tasks = {
                    "one length": [lambda m=m, mel=mel: m(mel) for m in (model, fast)],
                    # The two never share a length: torch keeps its set-up for each.
                    "new lengths": [changing(m, mels[i::2]) for i, m in enumerate((model, fast))],
                }
                expected = model(mel).double()
                for task, runs in tasks.items():
                    checks = [lambda m=m, mel=mel: m(mel) for m in (model, fast)]
                    plain, ours = measure(
                        [Candidate(name, run, check=check) for name, run, check in
                         zip(("torch", "gpt4fast"), runs, checks, strict=True)],
                        (expected,), Tolerance(3e-2), timer=CpuTimer(), monitor=Monitor(), rounds=15, seconds=40,
                    )  # fmt: skip
                    name, ratio = str(dtype).removeprefix("torch."), plain.median / ours.median
                    print(f"{task:12s} {args.frames} frames {name:9s} torch {plain.median * 1e3:7.1f} ms, "
                          f"gpt4fast {ours.median * 1e3:7.1f} ms, {ratio:.2f} times as fast", flush=True)  # fmt: skip
                    rows.append({
                        "task": task, "frames": args.frames, "dtype": name, "torch_ms": plain.median * 1e3,
                        "gpt4fast_ms": ours.median * 1e3, "ratio": ratio, "status": [plain.status, ours.status],
                        **origin,
                    })  # fmt: skip
    if args.output:
        args.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
