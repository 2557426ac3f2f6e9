"""Benchmarks: each runs beside a peer or a computed floor in one run, prints a table and then one JSON line."""
