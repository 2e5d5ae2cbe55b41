"""Files that an exported model carries for transformers; copied, never imported from here.

configuration_moepp.py  the model's configuration
modeling_moepp.py       the model
"""
