"""Budget of FFN experts per token (`moe.budget`).

part.py  applies the budget to the model, step by step
"""
