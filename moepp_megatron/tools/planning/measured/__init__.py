"""Measured runs and the model: their format, errors by family, machine inputs fitted to them."""
