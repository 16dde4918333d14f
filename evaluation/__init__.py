"""Measures a model on published benchmarks and on scenes of our own: loaders, prompts, metrics and reports."""
