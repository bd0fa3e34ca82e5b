"""The presets, one file for each family of methods."""
