"""Watches over a run: bad batches, silent divergence, hangs, stragglers."""
