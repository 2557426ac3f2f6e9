"""Device kernels of preft-jax: low-rank edits over rank pages, and attention over a paged KV cache.

``kernels.api`` is the entry: every operation takes ``implementation=None`` (the best available) or an explicit name.
"""
