"""What ``gpt4fast bench`` and ``pytest benchmarks`` share: shapes, candidates, peers, the harness and the report."""
