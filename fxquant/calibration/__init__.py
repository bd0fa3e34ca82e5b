"""Calibration images, and what is sampled and measured while they run through the graph."""
