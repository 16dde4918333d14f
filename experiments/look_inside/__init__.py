"""Attention, linear probes and routing of two trained models, one with injection and one without."""
