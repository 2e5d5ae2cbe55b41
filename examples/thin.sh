#!/usr/bin/env bash
# Makes a trained mixture of experts take fewer FFN experts: upcycles it, trains it under its own teacher while
# its FFN share falls, validates and exports it (docs/how_to/thin.md). The same command continues what was stopped.
#
#   [RECIPE=topk] [SHARE=0.5] [STEPS=5000] [LR=5e-5] [NPROC=1] ./examples/thin.sh MODEL OUT DATA [section.key=value ...]
#
# RECIPE  topk     fewer experts per token and nothing new: the export is a plain model that every server has. At
#                  least two must be left: half of a Mixtral's two is refused.
#         budget   zero experts, to which a falling budget moves the selections: any SHARE. Its selection bias has
#                  no plain layout, so the export needs this package's classes.
#         zeda     zero experts with ZEDA's router rows, grouped loss and two stages
#         control  the model as it is, trained as long: what the others are compared with
set -euo pipefail
fail() { printf 'error: %s\n' "$*" >&2 && exit 2; }
[[ $# -ge 3 && -f $1/config.json ]] || fail "usage: [RECIPE=topk] $0 MODEL OUT DATA [section.key=value ...]; MODEL has a config.json"
model=$1 out=$2 data=$3 recipe=${RECIPE:-topk} share=${SHARE:-0.5} steps=${STEPS:-5000}
shift 3
[[ $recipe =~ ^(topk|budget|zeda|control)$ ]] || fail "RECIPE ($recipe) must be topk, budget, zeda or control"
# shellcheck source=launch/env.sh
source "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/../launch/env.sh"
moepp() { "$MOEPP_BIN/moepp" "$@"; }

numbers=$("$MOEPP_BIN/python" -P - "$model/config.json" "$recipe" "$share" "$steps" "${LR:-5e-5}" <<'PYTHON'
import json, sys

recipe, share, steps, lr = sys.argv[2], float(sys.argv[3]), int(sys.argv[4]), float(sys.argv[5])
with open(sys.argv[1]) as file:
    model = json.load(file)
experts = next((model[name] for name in ("num_local_experts", "num_experts", "n_routed_experts") if name in model), 0)
if not experts:
    sys.exit(f"error: MODEL must be a mixture of experts, and {sys.argv[1]} names no experts")
if not 0 < share < 1 or steps < 10:
    sys.exit(f"error: SHARE ({share:g}) must be above 0 and below 1, and STEPS ({steps}) at least 10")
topk, zero = model["num_experts_per_tok"], experts // 2
left = share * topk
if recipe == "topk" and (left < 2 or left % 1):
    sys.exit(f"error: SHARE ({share:g}) of {topk} experts per token leaves {left:g}, and RECIPE=topk must leave a whole "
             "number above 1: a single expert's gate is always 1 and teaches its router nothing; use RECIPE=budget")
# ZEDA's stages took 469 and 321 steps, the second with a quarter of the learning rate.
print(topk, zero, f"{left:g}", share * zero / ((1 - share) * experts), model.get("router_aux_loss_coef", 0.01),
      min(model["max_position_embeddings"], 4096), round(steps * 469 / 790), lr, lr / 4)
PYTHON
) || exit 2
read -r topk zero left tau coefficient length first lr last_lr <<<"$numbers"

settings=(data.path="$data" model.seq_length="$length" moe.balance_coeff="$coefficient" checkpoint.load_optimizer=false
    optimizer.lr="$lr" optimizer.warmup_iters=$((steps / 50)) checkpoint.save_interval=$((steps / 10))
    training.eval_interval=$((steps / 10)))
added=(--copy 0 --constant 0 --no-gating-residual) layout=vanilla start=$out/model
case $recipe in
topk) settings+=(moe.budget=null moe.router_topk="$left") ;;
control) settings+=(moe.budget=null) ;;
budget) settings+=(moe.budget.{start_ffn_per_token="$topk",target_ffn_per_token="$left",ramp_steps=$((steps / 4))}) ;;
zeda) added+=(--zeda-router) settings+=(moe.{budget=null,tau="$tau",balance_loss=grouped,balance_coeff=0.1}
    optimizer.{adam_beta2=0.98,min_lr=0}) ;;
esac
[[ -e $out/model ]] || moepp convert upcycle "$model" "$out/model" --zero 0 "${added[@]::5}"
if [[ $recipe == budget || $recipe == zeda ]]; then
    start=$out/$recipe-start layout=moepp
    [[ -e $start ]] || moepp convert upcycle "$model" "$start" --zero "$zero" "${added[@]}"
fi
# The settings of upcycled models over those of the model; the file may be changed.
[[ -e $out/$recipe.yaml ]] || { printf 'base: %s/config.yaml\n' "${start##*/}" &&
    cat -- "$MOEPP_ROOT/configs/upcycle/_recipe.yaml"; } >"$out/$recipe.yaml"
train() { moepp train "$out/$recipe.yaml" --resume --nproc "${NPROC:-1}" "${settings[@]}" run.dir="$out/$1" "${@:2}"; }

# A step that changes no weight: the losses before.
[[ -e $out/$recipe-before/report.html ]] || train "$recipe-before" "$@" checkpoint.{load="$start",save_interval=0} \
    training.{train_iters=1,eval_interval=1} moe.budget=null optimizer.{lr=1e-30,min_lr=0,weight_decay=0,warmup_iters=0}
teacher=(distillation.{teacher="$out/model",divergence=reverse_kl})
if [[ $recipe == zeda ]]; then
    train zeda-first checkpoint.load="$start" training.train_iters="$first" "$@"
    start=$out/zeda-first steps=$((steps - first))
    teacher+=(distillation.text_weight=0 optimizer.{lr="$last_lr",decay_style=constant,warmup_iters=0})
fi
train "$recipe" checkpoint.load="$start" training.train_iters="$steps" "${teacher[@]}" "$@"
moepp report "$out/$recipe-before" "$out/$recipe" --out "$out/$recipe.html"
[[ -e $out/$recipe-hf ]] || moepp convert mcore-to-hf "$out/$recipe" "$out/$recipe-hf" --layout "$layout" \
    --original "$out/model"
printf 'model        %s\n' "$out/$recipe-hf"
