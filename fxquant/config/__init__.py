"""Frozen options of quantization, search, bit allocation and recovery. Imports no torch."""
