"""Inspects what a trained model does with a text's tokens.

request.py     the request of `moepp inspect`, checked before anything heavy is imported
text.py        a text as tokens with their places, cut into windows
findings.py    experts, gates and loss of every token; means by class, token and layer; JSON
record.py      runs the model over the text, in any layout

`moepp_megatron.tools.report.inspection` builds the page.
"""
