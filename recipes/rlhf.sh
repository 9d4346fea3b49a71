#!/usr/bin/env bash
# RLHF as in InstructGPT (arXiv:2203.02155): SFT, a reward model trained on preference pairs, PPO on its score with a KL
# to the SFT model; and DPO (arXiv:2305.18290) on the same pairs, which needs neither a reward model nor sampling. Left
# out: pretraining gradients (there is no pretraining text) and human labels (a verifier labels the pairs). PPO's
# prompts need no answers: PROMPTS is a file with a column `prompt`; by default, the problems with theirs withheld.
#     PROBLEMS=countdown MODEL=models/tiny-countdown HARDER=countdown:4 LENGTH=120 bash recipes/rlhf.sh
set -euo pipefail
cd "$(dirname "$0")/.."
MODEL=${MODEL:-models/tiny-arithmetic} PROBLEMS=${PROBLEMS:-arithmetic} HARDER=${HARDER:-arithmetic:7-8}
OUT=${OUT:-runs/rlhf} DEMONSTRATIONS=${DEMONSTRATIONS:-$PROBLEMS-demonstrations} LENGTH=${LENGTH:-40}
SAMPLED=${SAMPLED:-3000} SAMPLE=${SAMPLE:-} SFT=${SFT:---iterations 100} RM=${RM:-} PPO=${PPO:---iterations 60}
PROMPTS=${PROMPTS:-} KL=${KL:-0.05} DPO=${DPO:-} EVALUATE=${EVALUATE:---eval-problems 500 --num-samples 2}
[ ! -e "$OUT" ] || { echo "error: $OUT exists; remove it, or set OUT to another directory" >&2; exit 2; }
train() { echo "== $1 =="; python "train_$2.py" --run-root "$OUT/$1" --problems "$PROBLEMS" \
    --max-new-tokens "$LENGTH" "${@:3}"; }
final() { echo "$OUT/$1"/*/final; }
evaluate() { python evaluate.py --problems "$PROBLEMS" --max-new-tokens "$LENGTH" "$@"; }
QUICK="--eval-every 0 --save-every 0"
mkdir -p "$OUT"

train sft sft --model "$MODEL" --data "$DEMONSTRATIONS" $SFT
# right and wrong completions of each problem, as preferences; a tenth is held out of training
evaluate --model "$(final sft)" --split all --eval-problems "$SAMPLED" --num-samples 8 \
    --output "$OUT/pairs.jsonl" $SAMPLE
python train_rm.py --run-root "$OUT/rm" --model "$(final sft)" --data "$OUT/pairs.jsonl" $RM
if [ -z "$PROMPTS" ]; then
    PROMPTS="$OUT/prompts.jsonl"
    python curate.py --problems "$PROBLEMS" --make prompts --output "$PROMPTS"
fi
SCORE="--problems $PROMPTS --eval-data $PROBLEMS --reward-model $(final rm)"
SCORE+=" --accuracy-weight 0 --format-weight 0" # no rule rewards
train ppo ppo --model "$(final sft)" $SCORE --kl-coef "$KL" $PPO $QUICK
train ppo-no-kl ppo --model "$(final sft)" $SCORE --kl-coef 0 $PPO $QUICK
train dpo dpo --model "$(final sft)" --data "$OUT/pairs.jsonl" $DPO

STAGES="base=$MODEL"
for stage in sft ppo ppo-no-kl dpo; do STAGES+=" $stage=$(final $stage)"; done
evaluate --stages $STAGES --temperatures 0.6 1.4 $EVALUATE
echo "== outside the training distribution: $HARDER =="
evaluate --stages $STAGES --problems "$HARDER" $EVALUATE
