"""Simulates a training step pass by pass, with uneven load, contention, slow nodes, failures."""
