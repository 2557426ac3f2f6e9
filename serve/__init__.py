"""Serving: the benchmark program and what it is made of."""
