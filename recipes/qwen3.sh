#!/usr/bin/env bash
# Qwen3 (arXiv:2505.09388): SFT, RL on few problems (and how few are enough), fusion of thinking and not thinking into
# one model that is told by /think or /no_think, a stage on preferences; then what a thinking budget costs.
set -euo pipefail
cd "$(dirname "$0")/.."
MODEL=${MODEL:-models/tiny-arithmetic} PROBLEMS=${PROBLEMS:-arithmetic} HARDER=${HARDER:-arithmetic:7-8}
OUT=${OUT:-runs/qwen3} COLD_PROBLEMS=${COLD_PROBLEMS:-400} SAMPLED=${SAMPLED:-2000} SAMPLE=${SAMPLE:-}
SFT=${SFT:---iterations 50 --warmup-iterations 5} FEW=${FEW:-32 128 512} RL=${RL:---iterations 100}
FUSION=${FUSION:---iterations 300} DPO=${DPO:---iterations 50} BUDGETS=${BUDGETS:---budgets 1 3 5 7 9 11 13 15 17 19 21}
EVALUATE=${EVALUATE:---eval-problems 500 --num-samples 2}
[ ! -e "$OUT" ] || { echo "error: $OUT exists; remove it, or set OUT to another directory" >&2; exit 2; }
train() { echo "== $1 =="; python "train_$2.py" --run-root "$OUT/$1" --eval-data "$OUT/eval.jsonl" "${@:3}"; }
final() { echo "$OUT/$1"/*/final; }
sample() { # MODEL COUNT FILE ...: of training problems
    python evaluate.py --model "$1" --problems "$PROBLEMS" --split train --eval-problems "$2" --num-samples 4 \
        --output "$3" $SAMPLE "${@:4}"
}
QUICK="--eval-every 0 --save-every 0"
mkdir -p "$OUT"
for split in train eval; do python curate.py --problems "$PROBLEMS" --split $split --output "$OUT/$split.jsonl"; done

sample "$MODEL" "$COLD_PROBLEMS" "$OUT/cold.jsonl"
train sft sft --model "$MODEL" --data "$OUT/cold.jsonl" --keep best $SFT
for few in $FEW; do
    python curate.py --problems "$OUT/train.jsonl" --split all --limit "$few" --output "$OUT/$few.jsonl"
    train "rl-$few" grpo --model "$(final sft)" --problems "$OUT/$few.jsonl" $RL $QUICK
done
train rl-all grpo --model "$(final sft)" --problems "$OUT/train.jsonl" $RL $QUICK
sample "$(final rl-all)" "$SAMPLED" "$OUT/thoughts.jsonl"
python curate.py --samples "$OUT/thoughts.jsonl" --make fusion --output "$OUT/fusion.jsonl"
train fusion sft --model "$(final rl-all)" --data "$OUT/fusion.jsonl" $FUSION
for mode in think no_think; do sample "$(final fusion)" "$SAMPLED" "$OUT/$mode.jsonl" --modes $mode; done
cat "$OUT/think.jsonl" "$OUT/no_think.jsonl" >"$OUT/preferences.jsonl"
train preference dpo --model "$(final fusion)" --data "$OUT/preferences.jsonl" $DPO

STAGES="base=$MODEL sft=$(final sft)"
for few in $FEW all; do STAGES+=" rl-$few=$(final "rl-$few")"; done
python evaluate.py --stages $STAGES --problems "$OUT/eval.jsonl" --split all --temperatures 0.6 1.4 $EVALUATE
STAGES="fusion=$(final fusion) preference=$(final preference)"
python evaluate.py --stages $STAGES --problems "$OUT/eval.jsonl" --split all --modes think,no_think \
    --temperatures 0.6 1.4 $EVALUATE
echo "== outside the training distribution: $HARDER =="
python evaluate.py --stages $STAGES --problems "$HARDER" --modes think,no_think $EVALUATE
python benchmarks/think_budget.py --model "$(final fusion)" --problems "$PROBLEMS" $BUDGETS
