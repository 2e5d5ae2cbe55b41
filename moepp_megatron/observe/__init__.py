"""The records of a run: the metrics of every logged step, and their sinks.

alert_sinks.py      alert sinks: `RUN/alerts.jsonl`, the console, a webhook
alerts.py           an alert, and reading `RUN/alerts.jsonl`
console.py          shows a running training: a live bar on a terminal, or plain lines in a log
jsonl.py            `RUN/metrics.jsonl`
numbers.py          iterates over every number of a record, by the catalogue
line_file.py        a file of a run that grows by whole lines, and keeps its name
metrics.py          the record of one logged step
guard_judge.py      judges rules over a step's numbers: when one begins to apply, and ends
shift/              detects changes of the data and of the routers in the series of a run
sinks.py            all sinks of a run, and the fan-out that protects training from their failures
status.py           `RUN/status.json`: the training processes, the resume command
tail.py             reads new lines of a file that another process appends to and sometimes rewrites
tensorboard.py      writes to TensorBoard: scalars, and histograms of a record's lists
wandb_sink.py        Weights & Biases
"""
