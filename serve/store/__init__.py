"""Adapters by name: names, files, host copies, and a watched directory."""
