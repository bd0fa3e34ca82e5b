"""Helpers independent of quantization: files, logging, progress, suggestions."""
