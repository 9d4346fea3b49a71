#!/usr/bin/env bash
# Kimi K1.5 (arXiv:2501.12599): SFT on long chains; problems filtered by the model's own pass rate, without lucky
# guesses, topics balanced; RL by mirror descent in two phases, a curriculum from easy to hard and then problems sampled
# by how often they fail, with the length reward switched on late. long2short instead of that reward: SFT on the first
# phase's shortest right samples, and DPO on shorter against longer ones. For comparison: both phases with the length
# reward from the start, and a second phase judged by a learned verifier. Left out: vanilla SFT before the long chains
# (the base has had it), images, the chain-of-thought reward model, code tests, merging of models, partial rollouts.
#     PROBLEMS=countdown MODEL=models/tiny-countdown LONG=countdown HARDER=countdown:4 LENGTH=120 TOPICS= \
#         bash recipes/kimi.sh
set -euo pipefail
cd "$(dirname "$0")/.."
MODEL=${MODEL:-models/tiny-arithmetic} PROBLEMS=${PROBLEMS:-arithmetic} LONG=${LONG:-arithmetic:5-6}
HARDER=${HARDER:-arithmetic:7-8} OUT=${OUT:-runs/kimi} SAMPLE=${SAMPLE:-} # more flags for evaluate.py when it samples
SAMPLED=${SAMPLED:-3000} SFT=${SFT:---iterations 100} EVALUATE=${EVALUATE:---eval-problems 500 --num-samples 2}
PHASE=${PHASE:-60} SWITCH=${SWITCH:-30} RL=${RL:-} # SWITCH: iterations until the length reward
LENGTH=${LENGTH:-40} TOPICS=${TOPICS---balance-topics} RM=${RM:-} DPO=${DPO:---iterations 30 --minibatch-size 16}
[ ! -e "$OUT" ] || { echo "error: $OUT exists; remove it, or set OUT to another directory" >&2; exit 2; }
train() { echo "== $1 =="; python "train_$2.py" --run-root "$OUT/$1" --eval-data "$OUT/held_out.jsonl" \
    --max-new-tokens "$LENGTH" "${@:3}"; }
final() { echo "$OUT/$1"/*/final; }
evaluate() { python evaluate.py --max-new-tokens "$LENGTH" "$@"; }
sample() { # MODEL PROBLEMS FILE ...: eight samples per problem
    evaluate --model "$1" --problems "$2" --split train --eval-problems "$SAMPLED" --num-samples 8 --output "$3" \
        $SAMPLE "${@:4}"
}
QUICK="--eval-every 0 --save-every 0"
mkdir -p "$OUT"
python curate.py --problems "$PROBLEMS" --split eval --output "$OUT/held_out.jsonl"

sample "$MODEL" "$LONG" "$OUT/long.jsonl"
train sft sft --model "$MODEL" --data "$OUT/long.jsonl" --keep longest $SFT
sample "$(final sft)" "$PROBLEMS" "$OUT/samples.jsonl"
sample "$(final sft)" "$PROBLEMS" "$OUT/guesses.jsonl" --think-budget 1 # closes the think block after its first token
CLEAN="--exclude-unverifiable --exclude-multiple-choice --remove-duplicates --decontaminate $OUT/held_out.jsonl $TOPICS"
python curate.py --samples "$OUT/samples.jsonl" --guesses "$OUT/guesses.jsonl" --label-difficulty $CLEAN \
    --output "$OUT/problems.jsonl"
python curate.py --samples "$OUT/samples.jsonl" --make verifier --output "$OUT/answers.jsonl"
python train_rm.py --run-root "$OUT/verifier" --model "$(final sft)" --system-prompt '' --data "$OUT/answers.jsonl" $RM

CURRICULUM="--problems $OUT/problems.jsonl --problem-sampling curriculum --iterations $PHASE $RL $QUICK"
PRIORITIZED="--problems $OUT/problems.jsonl --problem-sampling prioritized --iterations $PHASE $RL $QUICK"
train curriculum kimi --model "$(final sft)" $CURRICULUM
train late kimi --model "$(final curriculum)" $PRIORITIZED --length-weight 0.5 --length-reward-start "$SWITCH"
train verified kimi --model "$(final curriculum)" $PRIORITIZED --verifier-model "$(final verifier)"
sample "$(final curriculum)" "$PROBLEMS" "$OUT/lengths.jsonl"
train shortest sft --model "$(final curriculum)" --data "$OUT/lengths.jsonl" --keep shortest $SFT
python curate.py --samples "$OUT/lengths.jsonl" --make shorter --output "$OUT/shorter.jsonl"
train shorter dpo --model "$(final curriculum)" --data "$OUT/shorter.jsonl" $DPO
train early-1 kimi --model "$(final sft)" $CURRICULUM --length-weight 0.5
train early-2 kimi --model "$(final early-1)" $PRIORITIZED --length-weight 0.5

STAGES="base=$MODEL"
for stage in sft curriculum late verified shortest shorter early-1 early-2; do STAGES+=" $stage=$(final $stage)"; done
evaluate --stages $STAGES --problems "$OUT/held_out.jsonl" --split all --temperatures 0.6 1.4 $EVALUATE
echo "== outside the training distribution: $HARDER =="
evaluate --stages $STAGES --problems "$HARDER" $EVALUATE
