"""The Ling 2.0 network: pure functions in flax.nnx containers."""
