"""Validation losses (`training.eval_interval`, `data.validation`).

settings.py  `training.eval_interval`, `training.eval_iters`, `data.validation`
part.py      evaluates the model on the validation sets
"""
