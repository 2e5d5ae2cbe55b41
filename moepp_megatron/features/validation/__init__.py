"""Validation losses (`training.eval_interval`, `data.validation`).

part.py  evaluates the model on the validation sets
"""
