"""gpt4fast in code that was written for others: torch (``fast_ops()``, ``optimize()``), transformers and flash-attn."""
