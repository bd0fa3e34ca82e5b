"""Backends, which lower a FROZEN graph; each has its own folder and is imported on use."""
