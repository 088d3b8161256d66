"""The asv benchmarks of cybn."""
