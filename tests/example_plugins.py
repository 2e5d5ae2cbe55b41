"""The package in examples/plugins as if pip had installed it, without pip or a network."""

import shutil
import tomllib

from tests import ROOT

SOURCE = ROOT / "examples/plugins"


def install(folder):
    """Put module and entry points into a folder, which is for the path of imports."""
    project = tomllib.loads((SOURCE / "pyproject.toml").read_text())
    modules = project["tool"]["setuptools"]["py-modules"]
    for module in modules:
        shutil.copy(SOURCE / f"{module}.py", folder)
    write_entry_points(folder, project["project"]["entry-points"])
    return folder


def write_entry_points(folder, groups, name="example"):
    """Write the entry points of an installed package."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = []
    for group, names in groups.items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in names.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
