"""Decides whether an existing output folder is reused, replaced or refused."""

from collections.abc import Callable
from pathlib import Path

from moepp_megatron.config.errors import ConfigError
from moepp_megatron.data.manifest import CACHE, FILES, Inputs, Manifest
from moepp_megatron.file_names import DATA_MANIFEST_FILE

_OURS = frozenset({DATA_MANIFEST_FILE, CACHE, *FILES})


def find_reusable(
    out: Path,
    settings: dict[str, str | int | None],
    stat_sha256: str,
    content_sha256: Callable[[], str],
    force: bool,
) -> Manifest | None:
    """Look for the same prepared data in `out`.

    Returns:
        The manifest if the folder can be used as it is, None if it must be written.

    Raises:
        ConfigError: something is there that must not be overwritten.
    """
    if not out.exists():
        return None
    if not out.is_dir():
        raise ConfigError(f"--out ({out}) must be a folder, but is a file; choose another")
    names = {path.name for path in out.iterdir()}
    # Never remove what this command has not written, not even with --force.
    if names and (DATA_MANIFEST_FILE not in names or names - _OURS):
        stranger = min(names - _OURS or names)
        raise ConfigError(
            f"--out ({out}) must be a new or empty folder, or one written by this command, but "
            f"holds {stranger}; choose another"
        )
    if not names or force:
        return None
    manifest, difference = _compare(out, settings, stat_sha256, content_sha256)
    if difference:
        raise ConfigError(
            f"--out ({out}) already holds another dataset ({difference}); "
            "pass --force to replace it or choose another folder"
        )
    return manifest


def _compare(
    out: Path,
    settings: dict[str, str | int | None],
    stat_sha256: str,
    content_sha256: Callable[[], str],
) -> tuple[Manifest | None, str]:
    try:
        manifest = Manifest.read(out)
    except ValueError as error:
        return None, f"its manifest is unusable: {error}"
    if not manifest.is_intact(out):
        return None, "it is damaged: files are missing or cut short"
    there: Inputs = manifest.inputs
    for name in there.settings | settings:
        before, value = there.settings.get(name), settings.get(name)
        if before != value:
            return None, f"{name} is {before}, not {value}"
    if there.stat_sha256 != stat_sha256 and there.content_sha256 != content_sha256():
        return None, "the sources differ"
    return manifest, ""
