"""Text to batches: sources -> tokenizer -> packing -> pipeline. Knows numpy, not jax."""
