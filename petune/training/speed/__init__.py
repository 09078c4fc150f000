"""Optional speed-ups that do not change results."""
