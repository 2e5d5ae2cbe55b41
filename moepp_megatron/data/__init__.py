"""Turns text into batches: corpus, tokenizer, Megatron indexed datasets, loader.

`prepare.py` writes a dataset folder, `datasets.py` opens it as megatron-core GPT datasets and
`loader.py` iterates over micro-batches. Nothing is imported here: preparing needs no torch until
the very end, and reusing a prepared folder needs none at all.
"""
