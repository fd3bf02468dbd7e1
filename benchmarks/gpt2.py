"""A GPT-2 of 124M parameters, random weights, as a user writes it in PyTorch: plain, and under ``gpt4fast.fast_ops()``.

    python benchmarks/gpt2.py [--tokens 512] [--output gpt2.json]

Times the prefill of a prompt and a training step (forward, backward, AdamW), float32 and bfloat16, in turns.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gpt4fast
from gpt4fast.benchmarks import report
from gpt4fast.benchmarks.harness import Candidate, CpuTimer, Monitor, Tolerance, measure, pinned_threads

LAYERS, HEADS, WIDTH, VOCABULARY, POSITIONS = 12, 12, 768, 50257, 1024


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(batch, length, WIDTH))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class GPT2(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(POSITIONS, WIDTH)
        self.blocks, self.norm = nn.Sequential(*(Block() for _ in range(LAYERS))), nn.LayerNorm(WIDTH)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits (B, L, vocabulary) of ids (B, L)."""
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        return F.linear(self.norm(self.blocks(x)), self.tokens.weight)


def prefill(model: GPT2, ids: Tensor) -> Tensor:
    """Logits of the next token."""
    with torch.inference_mode():
        x = model.tokens(ids) + model.positions.weight[: ids.shape[1]]
        return F.linear(model.norm(model.blocks(x)[:, -1]), model.tokens.weight)


def train(model: GPT2, optimizer: torch.optim.Optimizer, ids: Tensor) -> Tensor:
    """One step; the loss before it."""
    optimizer.zero_grad()
    loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1).float(), ids[:, 1:].flatten())
    loss.backward()
    optimizer.step()
    return loss.detach()[None]


def fast(run):
    def inside():
        with gpt4fast.fast_ops():
            return run()

    return inside


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    rows = []
    with pinned_threads(None) as threads:
        origin = report.provenance("cpu", threads)
        for dtype in (torch.float32, torch.bfloat16):
            torch.manual_seed(0)
            model = GPT2().to(dtype)
            ids = torch.randint(VOCABULARY, (1, args.tokens + 1))
            # A rate of 0 leaves the weights alone, so that every step's loss can be compared; the work is the same.
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0, foreach=True)
            tasks = {
                "prefill": lambda model=model, ids=ids: prefill(model, ids[:, 1:]),
                "training step": lambda model=model, optimizer=optimizer, ids=ids: train(model, optimizer, ids),
            }
            for task, run in tasks.items():
                plain, ours = measure(
                    [Candidate("torch", run), Candidate("gpt4fast", fast(run))], (run().double(),), Tolerance(3e-2),
                    timer=CpuTimer(), monitor=Monitor(), rounds=11, seconds=60,
                )  # fmt: skip
                name, ratio = str(dtype).removeprefix("torch."), plain.median / ours.median
                print(f"{task:14s} {args.tokens} tokens {name:9s} torch {plain.median * 1e3:8.1f} ms, "
                      f"gpt4fast {ours.median * 1e3:8.1f} ms, {ratio:.2f} times as fast", flush=True)  # fmt: skip
                rows.append({
                    "task": task, "tokens": args.tokens, "dtype": name, "torch_ms": plain.median * 1e3,
                    "gpt4fast_ms": ours.median * 1e3, "ratio": ratio, "status": [plain.status, ours.status], **origin,
                })  # fmt: skip
    if args.output:
        args.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
