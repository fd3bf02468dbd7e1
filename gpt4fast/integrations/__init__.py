"""gpt4fast in code that was written for torch: ``fast_ops()`` for calls, ``optimize()`` for models."""
