#!/usr/bin/env bash
# What is claimed for a real pretrained model, SmolLM2-135M-Instruct on a CPU of 2 cores: benchmarks/RESULTS.md.
#
#     MODEL=HuggingFaceTB/SmolLM2-135M-Instruct bash benchmarks/real_model.sh words           # cold start, then GRPO
#     MODEL=... GSM8K=DIR bash benchmarks/real_model.sh preferences                            # train_rm and train_dpo
#     MODEL=... GSM8K=DIR bash benchmarks/real_model.sh sft
#
# GSM8K: directory with train.jsonl, test.jsonl, example_model_solutions.jsonl (github.com/openai/grade-school-math)
set -euo pipefail
cd "$(dirname "$0")/.."
MODEL=${MODEL:-HuggingFaceTB/SmolLM2-135M-Instruct} OUT=${OUT:-runs/real} SEED=${SEED:-1}
COLD=${COLD:---iterations 20} GRPO=${GRPO:---iterations 80} RM=${RM:-} DPO=${DPO:-} SFT=${SFT:-}
train() { echo "== $1 =="; time python "train_$2.py" --seed "$SEED" --run-root "$OUT/$1" "${@:3}"; }
final() { echo "$OUT/$1"/*/final; }

case "${1:-}" in
words)
    python benchmarks/real_data.py "$OUT/data"
    train cold sft --model "$MODEL" --data "$OUT/data/words_demonstrations.jsonl" --problems "$OUT/data/words.jsonl" \
        --minibatch-size 32 --learning-rate 3e-5 --warmup-iterations 3 --max-new-tokens 80 --eval-problems 200 $COLD
    train grpo grpo --model "$(final cold)" --problems "$OUT/data/words.jsonl" --prompts-per-step 16 --group-size 8 \
        --learning-rate 2e-5 --warmup-iterations 5 --max-new-tokens 80 --eval-problems 200 --eval-every 40 \
        --save-every 20 --keep-checkpoints 1 $GRPO
    python evaluate.py --stages "base=$MODEL" "cold=$(final cold)" "rl=$(final grpo)" \
        --problems "$OUT/data/words.jsonl" --eval-problems 400 --max-new-tokens 80
    ;;
preferences)
    python benchmarks/real_data.py "$OUT/data" --gsm8k "$GSM8K"
    train rm rm --model "$MODEL" --data "$OUT/data/gsm8k_samples.jsonl" $RM
    train dpo dpo --model "$MODEL" --data "$OUT/data/gsm8k_samples.jsonl" --problems "$GSM8K/test.jsonl" $DPO
    ;;
sft)
    python benchmarks/real_data.py "$OUT/data" --gsm8k "$GSM8K"
    train sft sft --model "$MODEL" --data "$OUT/data/gsm8k_demonstrations.jsonl" --problems "$GSM8K/train.jsonl" $SFT
    ;;
*)
    echo "error: words, preferences or sft is expected" >&2
    exit 2
    ;;
esac
