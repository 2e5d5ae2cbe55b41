"""Rules of features.

budget.py         `moe.budget`
ignored.py        settings without effect
multi_token.py    `model.mtp_num_layers`
"""
