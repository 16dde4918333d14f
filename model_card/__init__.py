"""The model card of a model folder: its template, its metadata and its results."""
