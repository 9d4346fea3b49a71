#!/usr/bin/env bash
# Trains a real pretrained model, SmolLM2-135M-Instruct, on a CPU: the stages that RESULTS.md reports.
#
#     bash benchmarks/real_model.sh words                     # SFT cold start, then GRPO, on arithmetic in words
#     GSM8K=DIR bash benchmarks/real_model.sh rm              # a reward model from GSM8K's real N-best solutions
#     GSM8K=DIR bash benchmarks/real_model.sh dpo             # DPO on the same pairs
#     GSM8K=DIR bash benchmarks/real_model.sh sft             # SFT on GSM8K's worked solutions
#
# MODEL: hub name or directory. GSM8K: directory with train.jsonl, test.jsonl and example_model_solutions.jsonl, such as
# grade_school_math/data of https://github.com/openai/grade-school-math. OUT: directory for the runs, a new one for each
# call.
set -euo pipefail
cd "$(dirname "$0")/.."
STAGE=${1:-} MODEL=${MODEL:-HuggingFaceTB/SmolLM2-135M-Instruct} SEED=${SEED:-1}
OUT=${OUT:-runs/real-$STAGE}
case "$STAGE" in words | rm | dpo | sft) ;; *) echo "error: give a stage: words, rm, dpo or sft" >&2 && exit 2 ;; esac
[ ! -e "$OUT" ] || { echo "error: $OUT exists; remove it, or set OUT to another directory" >&2; exit 2; }
[ "$STAGE" = words ] || [ -n "${GSM8K:-}" ] || { echo "error: set GSM8K to the directory with its files" >&2; exit 2; }
train() { echo "== $1 =="; time python "train_$2.py" --seed "$SEED" --run-root "$OUT/$1" "${@:3}"; }
final() { echo "$OUT/$1"/*/final; }
python benchmarks/real_data.py "$OUT/data" ${GSM8K:+--gsm8k "$GSM8K"}

case "$STAGE" in
words)
    train cold sft --model "$MODEL" --data "$OUT/data/words_demonstrations.jsonl" --problems "$OUT/data/words.jsonl" \
        --iterations 5 --minibatch-size 32 --learning-rate 5e-5 --warmup-iterations 1 --max-new-tokens 48 \
        --eval-problems 60
    train rl grpo --model "$(final cold)" --problems "$OUT/data/words.jsonl" --iterations 50 --prompts-per-step 16 \
        --group-size 8 --learning-rate 6e-6 --warmup-iterations 3 --format-weight 0 --max-new-tokens 48 \
        --eval-problems 60 --eval-every 0 --save-every 10 --keep-checkpoints 1
    python evaluate.py --stages "base=$MODEL" "cold=$(final cold)" "rl=$(final rl)" --problems "$OUT/data/words.jsonl" \
        --eval-problems 400 --max-new-tokens 48
    ;;
rm)
    train rm rm --model "$MODEL" --data "$OUT/data/gsm8k_samples.jsonl" --system-prompt "" --iterations 40 \
        --minibatch-size 16 --learning-rate 2e-5 --warmup-iterations 4
    ;;
dpo)
    train dpo dpo --model "$MODEL" --data "$OUT/data/gsm8k_samples.jsonl" --eval-data "$OUT/data/gsm8k_few.jsonl" \
        --system-prompt "" --max-pairs-per-prompt 2 --iterations 60 --minibatch-size 16 --learning-rate 1e-5 \
        --warmup-iterations 6 --beta 0.1 --max-new-tokens 128
    ;;
sft)
    train sft sft --model "$MODEL" --data "$OUT/data/gsm8k_demonstrations.jsonl" --problems "$GSM8K/train.jsonl" \
        --system-prompt "" --iterations 30 --minibatch-size 16 --learning-rate 3e-5 --warmup-iterations 3 \
        --max-new-tokens 200 --eval-problems 60
    ;;
esac
