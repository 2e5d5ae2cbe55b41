"""Arguments and options that several commands have, for the signatures of their functions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ConfigArgument = Annotated[Path, typer.Argument(help="YAML configuration.", metavar="CONFIG")]
OverridesArgument = Annotated[
    list[str] | None, typer.Argument(help="Settings to change.", metavar="section.key=value")
]
CheckpointArgument = Annotated[
    Path, typer.Argument(help="Checkpoint folder, or a run.", metavar="CHECKPOINT")
]
LayoutArgument = Annotated[
    list[str] | None,
    typer.Argument(help="Layout to use; by default one rank's.", metavar="parallel.key=value"),
]
NprocOption = Annotated[
    int, typer.Option(min=1, help="Ranks to start on this machine (not under torchrun).")
]
JsonOption = Annotated[
    Path | None, typer.Option("--json", help="Write the results here.", metavar="FILE")
]
