"""Smoothing of channels: where scales and shifts can be folded, and which are chosen."""
