"""Training data: rows, batches and the built-in task."""
