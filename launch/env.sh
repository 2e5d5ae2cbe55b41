#!/usr/bin/env bash
# Makes the Python environment, or finds it ready. Sourced by the other scripts, or a command:
#
#   source "$root/launch/env.sh"     # then: "$MOEPP_BIN/moepp", "$MOEPP_BIN/python"
#   launch/env.sh [--dev] [--te] [--offline DIR]
#
# Reads  MOEPP_PYTHON  the interpreter to build with (default: the first that fits)
#        MOEPP_PAIR    torch2.11: Python 3.12 and the versions of constraints-torch2.11.txt, in
#                      .venv-torch2.11 (default: those of constraints.txt)
#        MOEPP_VENV    where the environment is or goes (default: .venv in the repository);
#                      one that this script did not make keeps the versions it has
#        MOEPP_ENV     current: install nothing, take MOEPP_PYTHON or the python3 of the PATH, and
#                      say what it lacks
#        MOEPP_DEV     1, as --dev: also what tests and checks need, which no run needs (the extra dev
#                      of pyproject.toml). launch/test.sh and .ci/run set it
#        MOEPP_TE      1, as --te: also Transformer Engine, in the version of constraints.txt. Its
#                      part for torch is compiled: a C++ compiler, half an hour of one core, no GPU, no nvcc
#        MOEPP_WHEELS  where the compiled wheel is kept and found again (default: .wheels in the
#                      repository)
#        MOEPP_OFFLINE a folder of wheels, as --offline: ask no registry. To fill it, elsewhere:
#                      pip download -d DIR -c constraints.txt '.[all]' 'setuptools>=77'  ('.[dev]' for tests).
#                      What the environment is made from, later installations take too, while it is
#                      there; set it to nothing to ask a registry again
# Sets   MOEPP_ROOT    the repository
#        MOEPP_BIN     the environment's bin folder
# Neither is exported, and nothing is activated. Returns non-zero, with the reason on stderr, on failure.

MOEPP_ROOT=$(cd -P -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/.." && pwd)

# The versions that were tested together.
_moepp_tested=$MOEPP_ROOT/constraints${MOEPP_PAIR:+-$MOEPP_PAIR}.txt

_moepp_say() { printf 'set-up: %s\n' "$*" >&2; }

# ---- finding an interpreter --------------------------------------------------------------

# Every interpreter worth a try, one a line, in order of preference.
_moepp_candidates() {
    local name pyenv=${PYENV_ROOT:-${HOME:-/nonexistent}/.pyenv}
    for name in python3.12 python3.13 python3; do
        # All places on the PATH: the first is often a version manager's shim that refuses.
        type -aP "$name" || true
    done
    compgen -G '/usr/bin/python3*' || true
    compgen -G "$pyenv/versions/3.1[23]*/bin/python" || true
    compgen -G '/usr/local/bin/python3*' || true
    compgen -G "${HOME:-/nonexistent}/.local/bin/python3*" || true
    if command -v uv >/dev/null; then
        uv python find --no-project '>=3.12,<3.14' 2>/dev/null || true
    fi
}

_moepp_versions() { [[ -n ${MOEPP_PAIR:-} ]] && printf '3.12' || printf '3.12 or 3.13'; }

# Prints "VERSION PATH" when $1 is a usable CPython, else fails. VERSION gains "-novenv" where
# `python -m venv` cannot work (Debian keeps ensurepip in a package of its own).
_moepp_probe() {
    [[ ${1##*/} =~ ^python[0-9.]*$ && -x $1 ]] || return 1
    "$1" -I -c '
import sys, sysconfig
versions = [(3, 12)] if sys.argv[1:] else [(3, 12), (3, 13)]
fits = sys.version_info[:2] in versions and sys.implementation.name == "cpython"
if not fits or sysconfig.get_config_var("Py_GIL_DISABLED"):
    sys.exit(1)
try:
    import ensurepip, venv
    ensurepip.version()
    note = ""
except Exception:
    note = "-novenv"
print("%d.%d%s" % (*sys.version_info[:2], note), sys.executable)
' ${MOEPP_PAIR:+"$MOEPP_PAIR"} </dev/null 2>/dev/null
}

# Prints "VERSION PATH" of the interpreter to use; one without venv only if nothing better is there.
_moepp_find_python() {
    local candidate found fallback=''
    if [[ -n ${MOEPP_PYTHON:-} ]]; then
        candidate=$(type -P "$MOEPP_PYTHON" || true)
        if [[ -n $candidate ]] && _moepp_probe "$candidate"; then return 0; fi
        _moepp_say "MOEPP_PYTHON ($MOEPP_PYTHON) must be CPython $(_moepp_versions); unset it or name another"
        return 1
    fi
    while IFS= read -r candidate; do
        found=$(_moepp_probe "$candidate") || continue
        if [[ $found != *-novenv\ * ]]; then
            printf '%s\n' "$found"
            return 0
        fi
        fallback=${fallback:-$found}
    done < <(_moepp_candidates)
    if [[ -n $fallback ]]; then
        printf '%s\n' "$fallback"
        return 0
    fi
    _moepp_say "no Python $(_moepp_versions) found on the PATH, in /usr/bin, /usr/local/bin or pyenv;" \
        "install one (Debian 13: apt-get install python3-venv; elsewhere pyenv or uv) or set MOEPP_PYTHON"
    return 1
}

# ---- making the environment --------------------------------------------------------------

# Runs "$@" with its output in the log file $1; on a terminal its latest line stays in view.
_moepp_logged() {
    local log=$1 line begin=$SECONDS
    shift
    if [[ ! -t 2 ]]; then
        "$@" >>"$log" 2>&1
        return
    fi
    # In the foreground, so that Ctrl-C reaches the installer and not only this shell.
    (
        set -o pipefail
        "$@" 2>&1 | tee -a "$log" | while IFS= read -r line; do
            printf '\r\033[K%4d s  %.70s' "$((SECONDS - begin))" "$line" >&2
        done
    )
    local status=$?
    printf '\r\033[K' >&2
    return "$status"
}

_moepp_create_venv() {
    local venv=$1 log=$2 found version python
    found=$(_moepp_find_python) || return 1
    version=${found%% *} python=${found#* }
    _moepp_say "making $venv with Python ${version%-novenv} ($python)"
    rm -rf -- "$venv"
    # The mark comes first: a half-made environment is then known as ours and made anew.
    mkdir -p -- "$venv" && : >"$venv/.moepp-made" || return 1
    if command -v uv >/dev/null &&
        _moepp_logged "$log" uv venv --allow-existing --seed --python "$python" "$venv"; then
        return 0
    elif [[ $version != *-novenv ]]; then
        _moepp_logged "$log" "$python" -P -m venv "$venv" && return 0
    elif command -v virtualenv >/dev/null; then
        _moepp_logged "$log" virtualenv --python "$python" "$venv" && return 0
    else
        version=${version%-novenv}
        _moepp_say "Python $version ($python) cannot make environments: its venv module is missing;" \
            "run: apt-get install python$version-venv (or install uv or virtualenv)"
        return 1
    fi
    _moepp_say "making the environment failed:"
    tail -n 15 -- "$log" >&2
    return 1
}

# Prints the constraints file for the environment $1: all that were tested for our own, and for
# somebody else's only what it lacks, so that a container's own torch build stays in place.
_moepp_constraints() {
    if [[ -e $1/.moepp-made ]]; then
        printf '%s\n' "$_moepp_tested"
        return
    fi
    "$1/bin/python" -I - "$_moepp_tested" "$2" <<'PYTHON' && printf '%s\n' "$2"
import importlib.metadata, re, sys

def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()

have = {normal(d.metadata["Name"]) for d in importlib.metadata.distributions() if d.metadata["Name"]}
with open(sys.argv[1]) as source, open(sys.argv[2], "w") as target:
    target.writelines(line for line in source if normal(line.split("==")[0].strip()) not in have)
PYTHON
}

# Prints, one a line, the options by which pip and uv ask no registry.
_moepp_sources() {
    if [[ -n ${MOEPP_OFFLINE:-} ]]; then
        printf '%s\n' --no-index -f "$(cd -- "$MOEPP_OFFLINE" && pwd)"
    fi
}

# Whether MOEPP_OFFLINE is not set, or is a folder to install from.
_moepp_offline_fits() {
    local needs
    if [[ -z ${MOEPP_OFFLINE:-} ]]; then return 0; fi
    if [[ ! -d $MOEPP_OFFLINE ]]; then
        needs='be a folder of wheels, and there is no such folder'
    elif ! compgen -G "$MOEPP_OFFLINE/*.whl" >/dev/null; then
        needs='hold wheels (*.whl), and there are none in it'
    else
        return 0
    fi
    _moepp_say "MOEPP_OFFLINE ($MOEPP_OFFLINE) must $needs;" \
        "fill it with: pip download -d DIR -c ${_moepp_tested##*/} '.[all]' 'setuptools>=77'"
    return 2
}

# Whether the largest part is there already.
_moepp_has_torch() { compgen -G "$1/lib/python3*/site-packages/torch" >/dev/null; }

_moepp_install() {
    local venv=$1 log=$2 constraints begin=$SECONDS found what='.[all]' tools=
    local -a sources=()
    # pip compiles every file that it installs, for a third of its time; Python compiles those that a run
    # imports when it first does. Not where it may not write down what it has compiled.
    local -a compile=(--no-compile)
    if [[ -n ${PYTHONDONTWRITEBYTECODE:-} ]]; then compile=(); fi
    if [[ ${MOEPP_DEV:-0} == 1 ]]; then what='.[dev]' tools=' and the tools of tests and checks'; fi
    constraints=$(_moepp_constraints "$venv" "$log.constraints") || return 1
    found=$(_moepp_sources) || return 1
    if [[ -n $found ]]; then mapfile -t sources <<<"$found"; fi
    if ! _moepp_has_torch "$venv"; then
        _moepp_say "installing the package, its dependencies$tools:" \
            "about 3 GB to download, 6 GB on disk, up to 2 minutes on two idle cores (log: $log)"
    else
        _moepp_say "installing the package$tools (log: $log)"
    fi
    if [[ -n ${sources[*]:-} ]]; then
        _moepp_say "from the wheels in ${sources[-1]}, asking no registry"
        printf '%s\n' "${sources[-1]}" >"$venv/.moepp-offline"
    fi
    cd -- "$MOEPP_ROOT" || return 1
    if command -v uv >/dev/null; then
        if _moepp_logged "$log" uv pip install --python "$venv/bin/python" \
            "${sources[@]}" -c "$constraints" -e "$what"; then
            _moepp_say "ready after $((SECONDS - begin)) s"
            return 0
        fi
        # uv reads neither pip's configuration nor the system's certificates.
        _moepp_say "uv could not (its reason is in the log); trying pip"
    fi
    if ! _moepp_logged "$log" "$venv/bin/python" -P -m pip install "${compile[@]}" --progress-bar off \
        --disable-pip-version-check --no-input "${sources[@]}" -c "$constraints" -e "$what"; then
        _moepp_say "the installation failed; the end of $log:"
        tail -n 15 -- "$log" >&2
        return 1
    fi
    _moepp_say "ready after $((SECONDS - begin)) s"
}

# ---- Transformer Engine ------------------------------------------------------------------

# Installs the tested version into the environment $1, log $2, and imports it. Its part for
# torch is compiled against the torch that is there (no build isolation), and the wheel is kept, so
# that another environment or a second try does not compile it again. No nvcc and no GPU is needed.
_moepp_install_te() {
    local venv=$1 log=$2 begin=$SECONDS version wheels=${MOEPP_WHEELS:-$MOEPP_ROOT/.wheels} cuda found
    local -a pip sources=() cuda_wheels=()
    version=$(_moepp_te_version)
    found=$(_moepp_sources) || return 1
    if [[ -n $found ]]; then mapfile -t sources <<<"$found"; fi
    mkdir -p -- "$wheels" || return 1
    # 12.9 or 13.2, as torch was built.
    cuda=$("$venv/bin/python" -P -c 'import torch; print(torch.version.cuda or "")')
    if [[ -z $cuda ]]; then
        _moepp_say "Transformer Engine needs a torch that was built for CUDA; this one is for CPUs"
        return 1
    fi
    # Where torch brought CUDA as wheels, it lacks headers that theirs include, and a library.
    if [[ -n $(_moepp_cuda_headers "$venv") ]]; then
        case $cuda in
        12.*) cuda_wheels=("nvidia-cuda-nvcc-cu12==$cuda.*" nvidia-cuda-cccl-cu12) ;;
        *) cuda_wheels=("nvidia-cuda-crt==$cuda.*" nvidia-cuda-cccl nvidia-curand) ;;
        esac
    fi
    # Else its set-up asks its release page for a compiled wheel first.
    if [[ -n $found ]]; then export NVTE_PYTORCH_FORCE_BUILD=TRUE; fi
    cuda=${cuda%%.*}
    pip=("$venv/bin/python" -P -m pip)
    _moepp_say "installing Transformer Engine $version for CUDA $cuda (log: $log; wheel kept in $wheels)"
    if ! _moepp_logged "$log" "${pip[@]}" install --disable-pip-version-check --no-input \
        "${sources[@]}" -c "$_moepp_tested" 'setuptools>=77' wheel ninja pybind11 "transformer_engine_cu$cuda==$version" \
        ${cuda_wheels[@]+"${cuda_wheels[@]}"} ||
        ! CPLUS_INCLUDE_PATH=$(_moepp_cuda_headers "$venv")${CPLUS_INCLUDE_PATH:+:$CPLUS_INCLUDE_PATH} \
            NVTE_BUILD_USE_NVIDIA_WHEELS=$((${#cuda_wheels[@]} > 0)) \
            _moepp_logged "$log" "${pip[@]}" wheel --disable-pip-version-check --no-input \
            "${sources[@]}" -f "$wheels" --no-build-isolation --no-deps \
            --wheel-dir "$wheels" "transformer_engine_torch==$version" ||
        ! _moepp_logged "$log" "${pip[@]}" install --disable-pip-version-check --no-input \
            "${sources[@]}" -f "$wheels" -c "$_moepp_tested" \
            "transformer_engine[pytorch,core_cu$cuda]==$version"; then
        _moepp_say "the installation failed; the end of $log:"
        tail -n 15 -- "$log" >&2
        return 1
    fi
    found=$("$venv/bin/python" -P -c '
import torch, transformer_engine.pytorch
from importlib.metadata import version
print(version("transformer_engine"))' 2>>"$log") || {
        _moepp_say "Transformer Engine is installed and cannot be imported; the end of $log:"
        tail -n 5 -- "$log" >&2
        return 1
    }
    _moepp_say "Transformer Engine $found imported after $((SECONDS - begin)) s"
    printf '%s\n' "$version" >"$venv/.moepp-te"
}

# Prints the folders of headers of NVIDIA's wheels, as CPLUS_INCLUDE_PATH has them; nothing where CUDA
# is no wheel. Transformer Engine's set-up looks in CUDA's toolkit or in these, and a toolkit has no NCCL.
_moepp_cuda_headers() {
    "$1/bin/python" -P -c '
import nvidia
from pathlib import Path

folders = [folder for path in nvidia.__path__ for folder in Path(path).glob("*/include")]
if any((folder / "cuda_runtime_api.h").exists() for folder in folders):
    print(*folders, sep=":")' 2>/dev/null || true
}

_moepp_te_version() {
    local line
    while IFS= read -r line; do
        if [[ $line == transformer_engine==* ]]; then printf '%s\n' "${line#*==}"; fi
    done <"$_moepp_tested"
}

# Whether Transformer Engine is there, or not asked for.
_moepp_has_te() {
    [[ ${MOEPP_TE:-0} != 1 ]] ||
        [[ -e $1/.moepp-te && $(<"$1/.moepp-te") == "$(_moepp_te_version)" ]]
}

# ---- the environment that is there -------------------------------------------------------

# Says what the interpreter $1 lacks of pyproject.toml; installs nothing.
_moepp_check_current() {
    if ! _moepp_probe "$1" >/dev/null; then
        _moepp_say "the current Python ($1) must be CPython $(_moepp_versions); set MOEPP_PYTHON to one," \
            "or unset MOEPP_ENV"
        return 1
    fi
    # With PYTHONPATH, where a container may have its packages.
    "$1" -P - "$MOEPP_ROOT" "${MOEPP_DEV:-0}" <<'PYTHON'
import sys, tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

try:
    from packaging.requirements import Requirement
except ImportError:
    from pip._vendor.packaging.requirements import Requirement

root = Path(sys.argv[1])
project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
wanted = project["dependencies"] + project["optional-dependencies"]["all"]
if sys.argv[2] == "1":
    # Without the linters: a container need not have them to run the tests.
    tools = project["optional-dependencies"]["dev"]
    wanted += [tool for tool in tools if tool.startswith("pytest")]
lacks = []
for requirement in map(Requirement, wanted):
    try:
        found = version(requirement.name)
    except PackageNotFoundError:
        lacks.append(f"{requirement}: not installed")
        continue
    if not requirement.specifier.contains(found, prereleases=True):
        lacks.append(f"{requirement}: {found} is installed")
if not (Path(sys.executable).parent / "moepp").exists():
    lacks.append(f"moepp-megatron: not installed (pip install --no-deps -e {root})")
for line in lacks:
    print(f"set-up: the current environment lacks {line}", file=sys.stderr)
sys.exit(bool(lacks))
PYTHON
}

# What the environment depends on. No Python is started: this is all that a second call costs.
_moepp_stamp() {
    printf 'root %s\n' "$MOEPP_ROOT"
    sha256sum <"$MOEPP_ROOT/pyproject.toml"
    sha256sum <"$_moepp_tested"
    # The environment's own record of its Python version; absent where it is no venv.
    if [[ -e $1/pyvenv.cfg ]]; then sha256sum <"$1/pyvenv.cfg"; fi
}

_moepp_is_ready() { _moepp_is_installed "$1" && _moepp_has_te "$1"; }

# Whether what is asked for is there: the package, and with MOEPP_DEV its tools.
_moepp_is_installed() {
    local stamp
    [[ -x $1/bin/python && -x $1/bin/moepp && -e $1/.moepp-stamp ]] || return 1
    stamp=$(_moepp_stamp "$1")
    [[ $(<"$1/.moepp-stamp") == "$stamp" ]] || return 1
    [[ ${MOEPP_DEV:-0} != 1 ]] || [[ -e $1/.moepp-dev && $(<"$1/.moepp-dev") == "$stamp" ]]
}

_moepp_make_ready() {
    local venv=$1 log
    if command -v flock >/dev/null && ! flock -n 9; then
        _moepp_say "another set-up of $venv is running; waiting for it"
        flock 9 || _moepp_say "no file lock here; going on without"
    fi
    if _moepp_is_ready "$venv"; then return 0; fi
    log=$venv/moepp-install.log
    if [[ -e $venv/.moepp-made || ! -x $venv/bin/python ]]; then
        if [[ -d $venv && ! -e $venv/.moepp-made && -n $(ls -A -- "$venv") ]]; then
            _moepp_say "MOEPP_VENV ($venv) must be an environment with bin/python, or not exist yet;" \
                "name another folder or remove this one"
            return 1
        fi
        if ! _moepp_works "$venv"; then
            _moepp_create_venv "$venv" "$log" || return 1
        fi
    elif ! _moepp_probe "$venv/bin/python" >/dev/null; then
        _moepp_say "MOEPP_VENV ($venv) must hold CPython $(_moepp_versions); name another or unset it"
        return 1
    fi
    if ! _moepp_is_installed "$venv"; then
        rm -f -- "$venv/.moepp-stamp"
        (_moepp_install "$venv" "$log") || return 1
        # Last, and in one step: an interrupted set-up leaves no stamp, so the next call finishes it.
        if [[ ${MOEPP_DEV:-0} == 1 ]]; then _moepp_stamp "$venv" >"$venv/.moepp-dev" || return 1; fi
        _moepp_stamp "$venv" >"$venv/.moepp-stamp.new" &&
            mv -- "$venv/.moepp-stamp.new" "$venv/.moepp-stamp" || return 1
    fi
    _moepp_has_te "$venv" || (_moepp_install_te "$venv" "$log")
}

# Whether an environment that this script made was made to the end (pip is put in last).
_moepp_works() {
    [[ -x $1/bin/python ]] && "$1/bin/python" -I -c 'import pip' 2>/dev/null &&
        _moepp_probe "$1/bin/python" >/dev/null
}

_moepp_env() {
    local venv=${MOEPP_VENV:-$MOEPP_ROOT/.venv${MOEPP_PAIR:+-$MOEPP_PAIR}} python
    if [[ ! -e $_moepp_tested ]]; then
        _moepp_say "MOEPP_PAIR ($MOEPP_PAIR) has no $_moepp_tested; set it to torch2.11, or unset it"
        return 1
    fi
    case ${MOEPP_ENV:-} in
    '') ;;
    current)
        python=$(type -P "${MOEPP_PYTHON:-python3}" || true)
        MOEPP_BIN=$(dirname -- "${python:-none}")
        _moepp_check_current "${python:-none}"
        return
        ;;
    *)
        _moepp_say "MOEPP_ENV ($MOEPP_ENV) must be current, or not set; unset it to have one made"
        return 1
        ;;
    esac
    [[ $venv == /* ]] || venv=$PWD/$venv
    # shellcheck disable=SC2034  # for the sourcing script
    MOEPP_BIN=$venv/bin
    if _moepp_is_ready "$venv"; then return 0; fi
    # Another script, such as one that needs the tools of tests, knows nothing of --offline.
    if [[ ! -v MOEPP_OFFLINE && -e $venv/.moepp-offline && -d $(<"$venv/.moepp-offline") ]]; then
        MOEPP_OFFLINE=$(<"$venv/.moepp-offline")
    fi
    _moepp_offline_fits || return
    mkdir -p -- "$(dirname -- "$venv")" || return 1
    (_moepp_make_ready "$venv") 9>>"$venv.lock" || return 1
}

# ---- as a command ------------------------------------------------------------------------

_moepp_options() {
    while (($#)); do
        case $1 in
        --dev) MOEPP_DEV=1 ;;
        --te) MOEPP_TE=1 ;;
        --offline)
            if (($# < 2)); then
                _moepp_say "--offline needs a folder of wheels"
                return 2
            fi
            shift
            MOEPP_OFFLINE=$1
            ;;
        *)
            _moepp_say "unknown option $1; there are --dev, --te and --offline DIR"
            return 2
            ;;
        esac
        shift
    done
}

# Sourced, "$@" are the other script's.
if [[ ${BASH_SOURCE[0]} == "$0" ]]; then _moepp_options "$@" || exit; fi

_moepp_env
