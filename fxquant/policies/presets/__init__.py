"""The presets, one file for each kind of method."""
