"""Inspects what a trained model does with a text's tokens: recording, classes, aggregates.

    request.py     the request of `moepp inspect`, checked before anything heavy is imported
    text.py        a text as tokens with their places, cut into windows
    trace.py       experts, gates and loss of every token
    record.py      fills a trace, in any layout
    aggregates.py  means by class, token and layer
    findings.py    all aggregates; all results as JSON

The page is built in `moepp_megatron.tools.report.inspect`.
"""
