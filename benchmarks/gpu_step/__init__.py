"""Time, bandwidth and memory of a step on a GPU."""
