"""Calibration: reads images, and samples rows and measures losses while the graph runs on them."""
