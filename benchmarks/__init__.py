"""One measurement a module, run from the repository root: python -m benchmarks.rotate."""
