#!/usr/bin/env bash
# Transformer Engine for launch/env.sh --te, in the version of the constraints. Its part for torch is compiled against
# the torch that is there: a C++ compiler, half an hour of one core, no GPU, no nvcc. The wheel is kept in MOEPP_WHEELS
# (default: .wheels in the repository), so that another environment or a second try does not compile it again.
# shellcheck disable=SC2154  # _moepp_tested is env.sh's

# Prints the folders of headers of NVIDIA's wheels, as CPLUS_INCLUDE_PATH has them; nothing where CUDA is no wheel.
# Transformer Engine's set-up looks in CUDA's toolkit or in these, and a toolkit has no NCCL.
_moepp_cuda_headers() {
    "$1/bin/python" -P -c '
import nvidia
from pathlib import Path

folders = [folder for path in nvidia.__path__ for folder in Path(path).glob("*/include")]
if any((folder / "cuda_runtime_api.h").exists() for folder in folders):
    print(*folders, sep=":")' 2>/dev/null || true
}

# Installs into the environment $1 and imports it.
_moepp_install_te() {
    local venv=$1 log=$1/moepp-install.log version cuda headers line wheels=${MOEPP_WHEELS:-$MOEPP_ROOT/.wheels}
    local -a pip=("$venv/bin/python" -P -m pip) common=(--disable-pip-version-check --no-input) more=()
    while IFS= read -r line; do
        [[ $line != transformer_engine==* ]] || version=${line#*==}
    done <"$_moepp_tested"
    # 12.9 or 13.2, as torch was built.
    cuda=$("$venv/bin/python" -P -c 'import torch; print(torch.version.cuda or "")')
    if [[ -z $cuda ]]; then
        _moepp_say "Transformer Engine needs a torch that was built for CUDA; this one is for CPUs"
        return 1
    fi
    # Where torch brought CUDA as wheels, it lacks headers that theirs include, and a library.
    headers=$(_moepp_cuda_headers "$venv")
    case $headers:$cuda in
    :*) ;;
    *:12.*) more=("nvidia-cuda-nvcc-cu12==$cuda.*" nvidia-cuda-cccl-cu12) ;;
    *) more=("nvidia-cuda-crt==$cuda.*" nvidia-cuda-cccl nvidia-curand) ;;
    esac
    cuda=${cuda%%.*}
    mapfile -t -O "${#common[@]}" common < <(_moepp_sources)
    # Else its set-up asks its release page for a compiled wheel first.
    [[ -z ${MOEPP_OFFLINE:-} ]] || export NVTE_PYTORCH_FORCE_BUILD=TRUE
    mkdir -p -- "$wheels" || return
    _moepp_say "installing Transformer Engine $version for CUDA $cuda (log: $log; wheel kept in $wheels)"
    _moepp_logged "$log" "${pip[@]}" install "${common[@]}" -c "$_moepp_tested" 'setuptools>=77' wheel ninja \
        pybind11 "transformer_engine_cu$cuda==$version" "${more[@]}" || return
    export CPLUS_INCLUDE_PATH=$headers${CPLUS_INCLUDE_PATH:+:$CPLUS_INCLUDE_PATH} \
        NVTE_BUILD_USE_NVIDIA_WHEELS=$((${#more[@]} > 0))
    _moepp_logged "$log" "${pip[@]}" wheel "${common[@]}" -f "$wheels" --no-build-isolation --no-deps \
        --wheel-dir "$wheels" "transformer_engine_torch==$version" || return
    _moepp_logged "$log" "${pip[@]}" install "${common[@]}" -f "$wheels" -c "$_moepp_tested" \
        "transformer_engine[pytorch,core_cu$cuda]==$version" || return
    if ! "$venv/bin/python" -P -c 'import torch, transformer_engine.pytorch' >>"$log" 2>&1; then
        _moepp_say "Transformer Engine is installed and cannot be imported; the end of $log:"
        tail -n 5 -- "$log" >&2
        return 1
    fi
    _moepp_say "Transformer Engine $version imported"
}
