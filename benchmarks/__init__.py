"""Scripts that measure what this project promises; run from the repository's root as `python -m benchmarks.…`."""
