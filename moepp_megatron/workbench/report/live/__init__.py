"""A run while it goes on: its state, a terminal view, and numbers for Prometheus."""
