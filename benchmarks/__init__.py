"""Benchmarks: one runner (``python -m benchmarks.run``), measured things as data, results in results/."""
