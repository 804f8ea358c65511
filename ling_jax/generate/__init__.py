"""Decoding: caches, sampling, streaming."""
