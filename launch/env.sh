#!/usr/bin/env bash
# Makes the Python environment, or finds it ready. Sourced by the other scripts, or a command:
#
#   source "$root/launch/env.sh"     # then: "$MOEPP_BIN/moepp", "$MOEPP_BIN/python"
#   launch/env.sh [--dev] [--te] [--offline DIR]
#
# Reads  MOEPP_PYTHON  the interpreter to build with (default: the first that fits)
#        MOEPP_PAIR    torch2.11: Python 3.12 and constraints-torch2.11.txt, in .venv-torch2.11
#        MOEPP_VENV    where the environment is or goes (default: .venv in the repository);
#                      one that this script did not make keeps the versions it has
#        MOEPP_ENV     current: install nothing, take MOEPP_PYTHON or the python3 of the PATH, say what it lacks
#        MOEPP_DEV     1, as --dev: also what tests and checks need
#        MOEPP_TE      1, as --te: also Transformer Engine, compiled here (launch/te.sh)
#        MOEPP_OFFLINE a folder of wheels, as --offline: ask no registry. To fill it, elsewhere:
#                      pip download -d DIR -c constraints.txt '.[all]' 'setuptools>=77'  ('.[dev]' for tests).
#                      Later installations take it too while it is there; set it to nothing to ask a registry
# Sets   MOEPP_ROOT, MOEPP_BIN: the repository, the environment's bin folder. Nothing is exported or
# activated. Returns non-zero, with the reason on stderr, on failure.
MOEPP_ROOT=$(cd -P -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/.." && pwd)
_moepp_tested=$MOEPP_ROOT/constraints${MOEPP_PAIR:+-$MOEPP_PAIR}.txt
_moepp_needs='CPython 3.12 or 3.13'
[[ -z ${MOEPP_PAIR:-} ]] || _moepp_needs='CPython 3.12'

_moepp_say() { printf 'set-up: %s\n' "$*" >&2; }
# Runs "$@" with its output in the log $1; shows the end of it on failure.
_moepp_logged() {
    "${@:2}" >>"$1" 2>&1 || { _moepp_say "the installation failed; the end of $1:" && tail -n 15 -- "$1" >&2 && return 1; }
}

# Prints "VERSION PATH" where $1 fits; VERSION ends in "-novenv" where it cannot make environments.
_moepp_probe() {
    [[ ${1##*/} =~ ^python[0-9.]*$ && -x $1 ]] &&
        "$1" -I "$MOEPP_ROOT/launch/env.py" probe ${MOEPP_PAIR:+"$MOEPP_PAIR"} </dev/null 2>/dev/null
}
# Interpreters worth a try, in order: the first on the PATH is often a version manager's shim that refuses.
_moepp_candidates() {
    local name
    for name in python3.12 python3.13 python3; do type -aP "$name" || true; done
    compgen -G '/usr/bin/python3*' || true
    compgen -G "${PYENV_ROOT:-${HOME:-/nonexistent}/.pyenv}/versions/3.1[23]*/bin/python" || true
    ! command -v uv >/dev/null || uv python find --no-project '>=3.12,<3.14' 2>/dev/null || true
}
# Prints "VERSION PATH" of the interpreter to use; one without venv only if nothing better is there.
_moepp_find_python() {
    local candidate found='' fallback=''
    if [[ -n ${MOEPP_PYTHON:-} ]]; then
        _moepp_probe "$(type -P "$MOEPP_PYTHON" || true)" && return
        _moepp_say "MOEPP_PYTHON ($MOEPP_PYTHON) must be $_moepp_needs; unset it or name another"
        return 1
    fi
    while IFS= read -r candidate; do
        found=$(_moepp_probe "$candidate") || continue
        [[ $found == *-novenv\ * ]] || break
        fallback=${fallback:-$found} found=''
    done < <(_moepp_candidates)
    [[ -n ${found:=$fallback} ]] && printf '%s\n' "$found" && return
    _moepp_say "no $_moepp_needs found on the PATH, in /usr/bin or pyenv; install one" \
        "(Debian 13: apt-get install python3-venv; elsewhere pyenv or uv) or set MOEPP_PYTHON"
    return 1
}

_moepp_create_venv() {
    local venv=$1 log=$1/moepp-install.log found python version
    found=$(_moepp_find_python) || return
    version=${found%% *} python=${found#* }
    # The mark comes first: a half-made environment is then known as ours and made anew.
    rm -rf -- "$venv" && mkdir -p -- "$venv" && : >"$venv/.moepp-made" || return
    _moepp_say "making $venv with Python ${version%-novenv} ($python)"
    if [[ $version != *-novenv ]]; then
        _moepp_logged "$log" "$python" -P -m venv "$venv"
    elif command -v uv >/dev/null; then
        _moepp_logged "$log" uv venv --allow-existing --seed --python "$python" "$venv"
    else
        _moepp_say "Python ${version%-novenv} ($python) cannot make environments: its venv module is missing;" \
            "run: apt-get install python${version%-novenv}-venv (or install uv)"
        return 1
    fi
}

# Prints the constraints for the environment $1: all that were tested for our own; for somebody else's, in the
# file $2, only what it lacks, so that a container's own torch stays in place.
_moepp_constraints() {
    if [[ -e $1/.moepp-made ]]; then printf '%s\n' "$_moepp_tested" && return; fi
    "$1/bin/python" -I "$MOEPP_ROOT/launch/env.py" constraints "$_moepp_tested" "$2" && printf '%s\n' "$2"
}
# Prints, one a line, the options by which pip asks no registry.
_moepp_sources() {
    [[ -z ${MOEPP_OFFLINE:-} ]] || printf '%s\n' --no-index -f "$(cd -- "$MOEPP_OFFLINE" && pwd)"
}
_moepp_install() {
    local venv=$1 log=$1/moepp-install.log constraints what='.[all]' size=''
    # pip would compile all files, a third of its time; Python does it where it may write.
    local -a sources=() compile=(--no-compile)
    [[ -z ${PYTHONDONTWRITEBYTECODE:-} ]] || compile=()
    [[ ${MOEPP_DEV:-0} != 1 ]] || what='.[dev]'
    constraints=$(_moepp_constraints "$venv" "$log.constraints") || return
    mapfile -t sources < <(_moepp_sources)
    compgen -G "$venv/lib/python3*/site-packages/torch" >/dev/null ||
        size=': about 3 GB to download, 6 GB on disk, up to 2 minutes on two idle cores'
    _moepp_say "installing $what$size (log: $log)"
    if ((${#sources[@]})); then
        _moepp_say "from the wheels in ${sources[2]}, asking no registry"
        printf '%s\n' "${sources[2]}" >"$venv/.moepp-offline"
    fi
    cd -- "$MOEPP_ROOT" && _moepp_logged "$log" "$venv/bin/python" -P -m pip install "${compile[@]}" \
        --progress-bar off --disable-pip-version-check --no-input "${sources[@]}" -c "$constraints" -e "$what"
}

# What the environment depends on. No Python is started: this is all that a second call costs.
_moepp_stamp() {
    local file
    printf 'root %s\n' "$MOEPP_ROOT"
    for file in "$MOEPP_ROOT/pyproject.toml" "$_moepp_tested" "$1/pyvenv.cfg"; do
        [[ ! -e $file ]] || sha256sum <"$file"
    done
}
# Whether the part $2 (stamp, dev or te) of the environment $1 is there as it should be.
_moepp_has() { [[ -e $1/.moepp-$2 && $(<"$1/.moepp-$2") == "$(_moepp_stamp "$1")" ]]; }
_moepp_is_installed() {
    [[ -x $1/bin/python && -x $1/bin/moepp ]] && _moepp_has "$1" stamp &&
        { [[ ${MOEPP_DEV:-0} != 1 ]] || _moepp_has "$1" dev; }
}
_moepp_is_ready() { _moepp_is_installed "$1" && { [[ ${MOEPP_TE:-0} != 1 ]] || _moepp_has "$1" te; }; }

_moepp_make_ready() {
    local venv=$1
    flock 9 2>/dev/null || _moepp_say "no file lock here; going on without"
    if [[ -x $venv/bin/python && ! -e $venv/.moepp-made ]]; then
        if ! _moepp_probe "$venv/bin/python" >/dev/null; then
            _moepp_say "MOEPP_VENV ($venv) must hold $_moepp_needs; name another or unset it"
            return 1
        fi
    elif [[ -d $venv && ! -e $venv/.moepp-made && -n $(ls -A -- "$venv") ]]; then
        _moepp_say "MOEPP_VENV ($venv) must be an environment with bin/python, or not exist yet; name another folder"
        return 1
    # pip is put in last.
    elif ! { [[ -x $venv/bin/python ]] && "$venv/bin/python" -I -c 'import pip' 2>/dev/null &&
        _moepp_probe "$venv/bin/python" >/dev/null; }; then
        _moepp_create_venv "$venv" || return
    fi
    if ! _moepp_is_installed "$venv"; then
        rm -f -- "$venv/.moepp-stamp"
        (_moepp_install "$venv") || return
        # Last: an interrupted set-up leaves no stamp, so the next call finishes it.
        [[ ${MOEPP_DEV:-0} != 1 ]] || _moepp_stamp "$venv" >"$venv/.moepp-dev"
        _moepp_stamp "$venv" >"$venv/.moepp-new" && mv -- "$venv/.moepp-new" "$venv/.moepp-stamp" || return
    fi
    if ! _moepp_is_ready "$venv"; then
        # shellcheck source=launch/te.sh
        source "$MOEPP_ROOT/launch/te.sh"
        (_moepp_install_te "$venv") && _moepp_stamp "$venv" >"$venv/.moepp-te" || return
    fi
}

_moepp_env() {
    local venv=${MOEPP_VENV:-$MOEPP_ROOT/.venv${MOEPP_PAIR:+-$MOEPP_PAIR}} python
    if [[ ! -e $_moepp_tested ]]; then
        _moepp_say "MOEPP_PAIR ($MOEPP_PAIR) has no $_moepp_tested; set it to torch2.11, or unset it"
        return 1
    elif [[ ${MOEPP_ENV:-} == current ]]; then
        python=$(type -P "${MOEPP_PYTHON:-python3}" || printf none)
        MOEPP_BIN=$(dirname -- "$python")
        if ! _moepp_probe "$python" >/dev/null; then
            _moepp_say "the current Python ($python) must be $_moepp_needs; set MOEPP_PYTHON to one, or unset MOEPP_ENV"
            return 1
        fi
        # With PYTHONPATH, where a container may have its packages.
        "$python" -P "$MOEPP_ROOT/launch/env.py" lacks "$MOEPP_ROOT" "${MOEPP_DEV:-0}"
        return
    elif [[ -n ${MOEPP_ENV:-} ]]; then
        _moepp_say "MOEPP_ENV ($MOEPP_ENV) must be current, or not set; unset it to have one made"
        return 1
    fi
    [[ $venv == /* ]] || venv=$PWD/$venv
    # shellcheck disable=SC2034  # for the sourcing script
    MOEPP_BIN=$venv/bin
    if ! _moepp_is_ready "$venv"; then
        if [[ ! -v MOEPP_OFFLINE && -e $venv/.moepp-offline && -d $(<"$venv/.moepp-offline") ]]; then
            MOEPP_OFFLINE=$(<"$venv/.moepp-offline")
        elif [[ -n ${MOEPP_OFFLINE:-} ]] && ! compgen -G "$MOEPP_OFFLINE/*.whl" >/dev/null; then
            _moepp_say "MOEPP_OFFLINE ($MOEPP_OFFLINE) must be a folder that holds wheels (*.whl);" \
                "fill it with: pip download -d DIR -c ${_moepp_tested##*/} '.[all]' 'setuptools>=77'"
            return 2
        fi
        mkdir -p -- "$(dirname -- "$venv")" && (_moepp_make_ready "$venv") 9>>"$venv.lock" || return
    elif [[ ${BASH_SOURCE[0]} != "$0" ]]; then
        return 0
    fi
    _moepp_say "ready; for this shell: source $(printf %q "$venv/bin/activate"), then moepp --help"
}

# Sourced, "$@" are the other script's.
while [[ ${BASH_SOURCE[0]} == "$0" && $# -gt 0 ]]; do
    case $1 in
    --dev) MOEPP_DEV=1 ;;
    --te) MOEPP_TE=1 ;;
    --offline) if (($# > 1)); then MOEPP_OFFLINE=$2 && shift; else _moepp_say "--offline needs a folder of wheels" && exit 2; fi ;;
    *) _moepp_say "unknown option $1; there are --dev, --te and --offline DIR" && exit 2 ;;
    esac
    shift
done
_moepp_env
