"""The model: its parameters, one layer, and the forward passes."""
