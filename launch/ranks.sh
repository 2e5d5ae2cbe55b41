# shellcheck shell=bash
# Sourced by the scripts that start as many ranks as there are GPUs.

# How many GPUs CUDA will show here. nvidia-smi lists those too that CUDA_VISIBLE_DEVICES hides. CUDA
# ends that list at its first entry that names no GPU, such as -1 or NoDevFiles.
moepp_gpus() {
    local gpus entry shown=0
    local -a entries
    gpus=$( (nvidia-smi -L 2>/dev/null || true) | grep -c '^GPU ' || true)
    if [[ -v CUDA_VISIBLE_DEVICES ]]; then
        IFS=, read -r -a entries <<<"$CUDA_VISIBLE_DEVICES"
        for entry in ${entries[@]+"${entries[@]}"}; do
            entry=${entry//[[:space:]]/}
            [[ $entry =~ ^(GPU|MIG)- || ($entry =~ ^[0-9]+$ && $((10#$entry)) -lt $gpus) ]] || break
            shown=$((shown + 1))
        done
        gpus=$((shown < gpus ? shown : gpus))
    fi
    printf '%s\n' "$gpus"
}

# How many ranks this machine is for: its GPUs, or two on CPUs, so that experts are exchanged there too.
moepp_ranks_here() {
    local gpus
    gpus=$(moepp_gpus)
    printf '%s\n' "$((gpus > 0 ? gpus : 2))"
}
