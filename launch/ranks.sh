# shellcheck shell=bash
# Sourced by local.sh and multinode.sh.

# How many ranks this machine is for: its GPUs, or two on CPUs, so that experts are exchanged there too.
moepp_ranks_here() {
    local gpus
    gpus=$( (nvidia-smi -L 2>/dev/null || true) | grep -c '^GPU ' || true)
    printf '%s\n' "$((gpus > 0 ? gpus : 2))"
}
