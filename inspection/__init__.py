"""Shows what a model does inside while it answers."""
