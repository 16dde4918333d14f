"""The Hub card of a model folder: its template and what fills it."""
