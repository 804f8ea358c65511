"""What a training step will cost on a TPU that is not here: memory from the compiler, time from a roofline."""
