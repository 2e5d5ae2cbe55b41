#!/usr/bin/env bash
# Runs tests/vllm and the tests of vLLM's Transformers backend:
#
#   MOEPP_VLLM_PYTHON=ENVIRONMENT/bin/python tests/vllm/run.sh [pytest args]
#
# The environment has the versions of tests/vllm/requirements.txt, which says how to make it.
set -euo pipefail
root=$(cd -P -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/../.." && pwd)
cd -- "$root"
"${MOEPP_VLLM_PYTHON:?must be the interpreter of an environment with vLLM (tests/vllm/requirements.txt)}" - <<'PYTHON'
from importlib.metadata import version

for line in open("tests/vllm/requirements.txt"):
    name, is_pin, wanted = line.strip().partition("==")
    if is_pin and not line.startswith("#") and version(name) != wanted:
        raise SystemExit(f"{name} ({version(name)}) must be {wanted}: tests/vllm/requirements.txt says how")
PYTHON
# shellcheck disable=SC2034  # read by env.sh
MOEPP_DEV=1
# shellcheck source=launch/env.sh
source launch/env.sh
exec "$MOEPP_BIN/python" -m pytest -q -p no:cacheprovider tests/vllm tests/interop/test_serving.py "$@"
