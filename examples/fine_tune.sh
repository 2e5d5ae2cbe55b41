#!/usr/bin/env bash
# Fine-tunes the quickstart's model on conversations, then asks it something:
#
#   ./launch/quickstart.sh && ./examples/fine_tune.sh [section.key=value ...]
set -euo pipefail
# shellcheck source=launch/env.sh
source "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/../launch/env.sh"
cd -- "$MOEPP_ROOT"

"$MOEPP_BIN/python" examples/make_chat.py data/chat.jsonl
"$MOEPP_BIN/moepp" data prepare data/chat.jsonl --out data/chat --force \
    --chat --template examples/chat.jinja --tokenizer data/stdlib --seq-length 256
"$MOEPP_BIN/moepp" train examples/fine_tune.yaml --nproc 2 --overwrite "$@"
"$MOEPP_BIN/moepp" generate runs/fine_tuned --chat --temperature 0 \
    --prompt 'In which module is deepcopy?' --prompt 'Where is OrderedDict?'
