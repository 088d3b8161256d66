"""The asv benchmarks of cybn, by what a user does. `libraries` has what is timed; the other files what is asked."""
