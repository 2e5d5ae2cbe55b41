"""Pages of runs: plots and numbers, only from ``config.yaml`` and ``metrics.jsonl``.

alerts.py              A run's alerts on its page: a table, and marks where they fall on curves
bench.py               results of `moepp bench` as tables
blocks.py              a page as a list of plots, tables and texts, which one template draws
comparison.py          the page of several runs: curves over each other, settings that differ
curves.py              plots over the course of training
drawing.py             the look that all plots share, and turning a figure into text for the page
expert_plots.py        plots of who gets the selections: by expert, by kind, by MoE layer
formatting.py          numbers as a reader wants them
router_health_plots.py plots of the routers' health; docs/routing.md says what each number means
inspection.py          the page of `moepp inspect`
lines.py               the plot of lines that most curves are
measured.py            `moepp plan --measured` on the terminal
page.py                the page itself: numbers, plots and configuration put into the template
plan.py                `moepp plan` on the terminal and as JSON
profile.py             `moepp profile` on the terminal
run_data.py            what a report is made of
savings.py             what the zero-computation experts saved against a vanilla layer
series.py              the one way to a run's numbers over its steps
summary.py             the numbers of a run that the page shows, computed from its records
terminal.py            tables on a terminal that are whole wherever they are printed; progress
token_groups.py        sources, classes of tokens and tasks: a table, and plots over steps
"""
