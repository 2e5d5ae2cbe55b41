"""Watches a run: its state, a terminal view, and numbers for Prometheus."""
