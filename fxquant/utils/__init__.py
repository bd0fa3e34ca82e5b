"""Helpers that know nothing of quantization: files, progress, suggestions."""
