"""Error and speed of 8-bit codes."""
