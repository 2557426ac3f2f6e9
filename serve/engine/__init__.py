"""The engine: continuous batching of requests over one base model. ``serve`` has its public names.

Nothing is imported here, so that the planning modules can be used without JAX.
"""
