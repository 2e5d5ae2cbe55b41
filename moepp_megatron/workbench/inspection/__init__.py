"""What a trained model does with the tokens of a text: recording, token classes, aggregates.

    request.py     what `moepp inspect` is asked to do, checked before anything heavy is imported
    text.py        a text as tokens with their places, cut into windows
    classes.py     what kind of thing a token is: word, fragment, keyword, number, ...
    tags.py        parts of speech, where the user brings them
    trace.py       experts, gates and loss of every token of one model
    record.py      fills a trace, in any layout
    aggregates.py  means by class, token, position, frequency, layer
    findings.py    all aggregates of one model
    export.py      all of it as JSON

The page is made in `moepp_megatron.workbench.report.inspect`.
"""
