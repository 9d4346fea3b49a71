#!/usr/bin/env bash
# RLHF as InstructGPT has it (arXiv:2203.02155): SFT, a reward model from preference pairs, PPO on its score with a KL
# to the SFT model; and DPO (arXiv:2305.18290) on the same pairs, which needs neither reward model nor sampling.
set -euo pipefail
cd "$(dirname "$0")/.."
MODEL=${MODEL:-models/tiny-arithmetic} PROBLEMS=${PROBLEMS:-arithmetic} HARDER=${HARDER:-arithmetic:7-8}
OUT=${OUT:-runs/rlhf} DEMONSTRATIONS=${DEMONSTRATIONS:-arithmetic-demonstrations}
SAMPLED=${SAMPLED:-3000} SAMPLE=${SAMPLE:-} SFT=${SFT:---iterations 100} RM=${RM:-} PPO=${PPO:---iterations 60}
KL=${KL:-0.05} DPO=${DPO:-} EVALUATE=${EVALUATE:---eval-problems 500 --num-samples 2}
[ ! -e "$OUT" ] || { echo "error: $OUT exists; remove it, or set OUT to another directory" >&2; exit 2; }
train() { echo "== $1 =="; python "train_$2.py" --run-root "$OUT/$1" "${@:3}"; }
final() { echo "$OUT/$1"/*/final; }
QUICK="--eval-every 0 --save-every 0"
mkdir -p "$OUT"

train sft sft --model "$MODEL" --data "$DEMONSTRATIONS" --problems "$PROBLEMS" $SFT
# right and wrong completions of each problem: the verifier's preferences; a tenth is held out of training
python evaluate.py --model "$(final sft)" --problems "$PROBLEMS" --split all --eval-problems "$SAMPLED" \
    --num-samples 8 --output "$OUT/pairs.jsonl" $SAMPLE
train rm rm --model "$(final sft)" --data "$OUT/pairs.jsonl" $RM
SCORE="--reward-model $(final rm) --accuracy-weight 0 --format-weight 0" # the preference alone
train ppo ppo --model "$(final sft)" --problems "$PROBLEMS" $SCORE --kl-coef "$KL" $PPO $QUICK
train ppo-no-kl ppo --model "$(final sft)" --problems "$PROBLEMS" $SCORE --kl-coef 0 $PPO $QUICK
train dpo dpo --model "$(final sft)" --problems "$PROBLEMS" --data "$OUT/pairs.jsonl" $DPO

STAGES="base=$MODEL"
for stage in sft ppo ppo-no-kl dpo; do STAGES+=" $stage=$(final $stage)"; done
python evaluate.py --stages $STAGES --problems "$PROBLEMS" --temperatures 0.6 1.4 $EVALUATE
echo "== outside the training distribution: $HARDER =="
python evaluate.py --stages $STAGES --problems "$HARDER" $EVALUATE
