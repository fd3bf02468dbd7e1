"""The main job end to end: `gpt4fast demo` trains on small real data, generates, and writes a report."""
