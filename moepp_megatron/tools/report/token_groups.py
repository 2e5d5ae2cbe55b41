"""Data sources, classes of tokens and tasks: a table of sources, and plots over steps."""

from dataclasses import replace

import numpy as np

from moepp_megatron.catalogue import OF_RECORD
from moepp_megatron.data.token_classes import BANDS
from moepp_megatron.tools.report import formatting
from moepp_megatron.tools.report.blocks import Cell, Plot, Table, number
from moepp_megatron.tools.report.curves import drawn_metrics, plain_plot
from moepp_megatron.tools.report.drawing import LINE_COLOURS
from moepp_megatron.tools.report.run_data import RunData
from moepp_megatron.tools.report.summary import finite_mean, tail


def source_table(run: RunData) -> Table | None:
    """The data sources, those of the most tokens first; None where all is of one source."""
    places = np.flatnonzero(~np.isnan(run.numbers.values("source_tokens")))
    if not len(places):
        return None
    newest = tail(places)
    rows = []
    for name in _sources(run):
        rows.append(
            [
                Cell(name),
                number(formatting.percent(_mean(run, newest, "source_tokens", name))),
                number(formatting.or_dash(_mean(run, newest, "source_loss", name))),
                number(
                    formatting.or_dash(
                        _mean(run, newest, "source_ffn_share", name), formatting.percent
                    )
                ),
            ]
        )
    head = ("Data source", "Tokens", "Loss", "FFN share")
    return Table(head, rows, "Means over the last tenth of the records.")


def token_plots(run: RunData) -> list[Plot]:
    """The plots that the records have numbers for."""
    # The table has all sources.
    sources = _sources(run)[: len(LINE_COLOURS)]
    plots = []
    for key, drawn in drawn_metrics(run, "names"):
        names = sources if OF_RECORD[key].labels == "source" else None
        if key == "class_ffn_per_token":
            bands = replace(drawn, title="FFN experts by frequency of the token")
            plots.append(plain_plot(run, key, bands, names=BANDS))
            names = [name for name in run.numbers.names(key) if name not in BANDS]
        plots.append(plain_plot(run, key, drawn, names=names))
    return [plot for plot in plots if plot.image is not None]


def _sources(run: RunData) -> list[str]:
    """Names of the sources, those of the most tokens in the run first."""
    names = run.numbers.names("source_tokens")
    tokens = {name: np.nansum(run.numbers.values("source_tokens", name)) for name in names}
    return sorted(names, key=lambda name: -tokens[name])


def _mean(run: RunData, places: np.ndarray, key: str, name: str) -> float:
    """Mean over the records in which the source has a token; NaN where none has."""
    return finite_mean(run.numbers.values(key, name)[places])
