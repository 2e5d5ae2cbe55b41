"""Measurements by token (`observe.token_groups`).

settings.py  their switch
part.py      FFN experts of each class of tokens; loss, FFN share and use of experts by data source
"""
