"""Models and results in files and by name."""
