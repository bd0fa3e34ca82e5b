"""The compiled model: what it runs, reports, saves and lowers to."""
