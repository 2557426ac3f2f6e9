"""Devices: the mesh and compiled programs."""
