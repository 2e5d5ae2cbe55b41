#!/usr/bin/env bash
# Builds the documentation site into build/site; a warning is an error, and so is a page that loads
# something from another host:
#
#   ./launch/docs.sh
#   python3 -m http.server --directory build/site 8000      # then open http://localhost:8000
#
# Makes the environment if needed, and adds to it what the extra "docs" of pyproject.toml names.
set -euo pipefail
# shellcheck source=launch/env.sh
source "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/env.sh"
cd -- "$MOEPP_ROOT"

mkdir -p build
if ! "$MOEPP_BIN/python" -P -c 'import furo, myst_parser, sphinx' 2>/dev/null; then
    if [[ ${MOEPP_ENV:-} == current ]]; then
        _moepp_say "the current environment lacks the site's packages: pip install -e '.[docs]'"
        exit 1
    fi
    constraints=$(_moepp_constraints "$(dirname -- "$MOEPP_BIN")" build/constraints.txt)
    found=$(_moepp_sources)
    sources=()
    if [[ -n $found ]]; then mapfile -t sources <<<"$found"; fi
    "$MOEPP_BIN/python" -P -m pip install --quiet --disable-pip-version-check --no-input \
        "${sources[@]}" -c "$constraints" -e '.[docs]'
fi

# Settings, commands, metrics, Megatron-LM's arguments.
"$MOEPP_BIN/python" -m benchmarks.pages

# What an earlier build has left is not part of the site, and pages that it has read give no warnings.
rm -rf build/site build/doctrees
# The API pages import the package, and with it libraries whose warnings are not about the docs.
PYTHONWARNINGS=ignore "$MOEPP_BIN/python" -m sphinx --quiet --fail-on-warning --keep-going \
    --conf-dir docs --doctree-dir build/doctrees . build/site
"$MOEPP_BIN/python" -m benchmarks.site_check build/site
