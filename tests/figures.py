"""Figures that are made but not rendered: rendering takes half of the time of a short command."""

import matplotlib.figure

_render = matplotlib.figure.Figure.savefig


def save_empty(figure, target, **options):
    """Stand in for `Figure.savefig`: SVG has no content, other formats are rendered."""
    if options.get("format") == "svg":
        target.write('<svg><style type="text/css"></style></svg>')
    else:
        _render(figure, target, **options)


def leave_unrendered():
    """From here on, in this process and its forks."""
    matplotlib.figure.Figure.savefig = save_empty  # type: ignore[assignment]
