"""One file a family of models, each with its record ``FAMILY``; ``models/registry.py`` finds them."""
