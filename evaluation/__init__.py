"""Measures vision-language models on remote sensing benchmarks."""
