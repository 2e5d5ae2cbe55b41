"""Measurements by token (`observe.token_groups`).

settings.py  their switch
part.py     FFN experts of each class of tokens
sources.py  loss, FFN share and use of the experts by data source
"""
