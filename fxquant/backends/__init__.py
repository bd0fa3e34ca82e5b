"""Backends lower a FROZEN graph; each stands in its own folder and is imported on use."""
