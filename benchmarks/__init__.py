"""Speed on this machine: python -m benchmarks.train_step, python -m benchmarks.decode."""
