"""Sampling: parameters, and how tokens are drawn on the device."""
