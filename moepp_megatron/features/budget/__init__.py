"""Budget of FFN experts per token (`moe.budget`).

settings.py  section `moe.budget`, and what it changes in `moe`
part.py      applies the budget to the model, step by step
"""
