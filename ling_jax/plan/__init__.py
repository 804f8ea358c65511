"""Plans of a training step on a TPU that is not here: memory from the compiler, time from a roofline."""
