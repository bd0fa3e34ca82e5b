"""Algorithm cores: pure tensor functions, apart from their wiring."""
