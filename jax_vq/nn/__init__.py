"""Flax NNX modules: parameters, codebooks, random streams."""
