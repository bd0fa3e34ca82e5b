"""The compiled model: runs, reports, saves, and lowers to backends."""
