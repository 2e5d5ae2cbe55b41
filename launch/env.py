"""Answers what launch/env.sh asks an interpreter; standard library only, so that any Python can."""

import re
import sys
import sysconfig
from importlib import metadata
from pathlib import Path


def probe(pair: str = "") -> None:
    """Print "VERSION PATH" of a CPython that fits, "VERSION-novenv" without venv; else fail."""
    fits = sys.version_info[:2] in ([(3, 12)] if pair else [(3, 12), (3, 13)])
    is_free_threaded = sysconfig.get_config_var("Py_GIL_DISABLED")
    if not fits or sys.implementation.name != "cpython" or is_free_threaded:
        sys.exit(1)
    note = ""
    try:
        import ensurepip
        import venv  # noqa: F401

        ensurepip.version()
    except Exception:
        # Debian keeps it in a package of its own.
        note = "-novenv"
    print(".".join(map(str, sys.version_info[:2])) + note, sys.executable)


def constraints(tested: str, target: str) -> None:
    """Write the lines of `tested` whose packages are not installed."""
    names = (dist.metadata["Name"] for dist in metadata.distributions())
    have = {_normal(name) for name in names if name}
    lines = Path(tested).read_text().splitlines(keepends=True)
    left = [line for line in lines if _normal(line.split("==")[0].strip()) not in have]
    Path(target).write_text("".join(left))


def lacks(root: str, dev: str) -> None:
    """Say what is not installed of pyproject.toml; fail if something is not."""
    import tomllib

    try:
        from packaging.requirements import Requirement
    except ImportError:
        from pip._vendor.packaging.requirements import Requirement  # type: ignore[assignment]

    project = tomllib.loads(Path(root, "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = project["dependencies"] + extras["all"]
    if dev == "1":
        # Without the linters: a container need not have them to run the tests.
        wanted += [tool for tool in extras["dev"] if tool.startswith("pytest")]
    missing = []
    for requirement in map(Requirement, wanted):
        try:
            found = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            missing.append(f"{requirement}: not installed")
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            missing.append(f"{requirement}: {found} is installed")
    if not (Path(sys.executable).parent / "moepp").exists():
        missing.append(f"moepp-megatron: not installed (pip install --no-deps -e {root})")
    for line in missing:
        print(f"set-up: the current environment lacks {line}", file=sys.stderr)
    sys.exit(bool(missing))


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    _, asked, *words = sys.argv
    if asked == "probe":
        probe(*words)
    elif asked == "constraints":
        constraints(*words)
    elif asked == "lacks":
        lacks(*words)
    else:
        sys.exit(f"launch/env.py answers probe, constraints and lacks, not {asked}")
