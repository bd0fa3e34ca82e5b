"""Frozen options: what is quantized how, searched, allocated, recovered. Imports no torch."""
