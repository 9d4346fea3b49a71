#!/usr/bin/env bash
# Qwen3 (arXiv:2505.09388): SFT on samples whose steps are all right; RL on few problems that are solved sometimes but
# not always, with several counts to see how few suffice; fusion of both modes into one model, which /think and
# /no_think switch; RL in thinking mode with rules on reasoning prompts and a reward model on general prompts; accuracy
# under thinking budgets. General prompts are a stand-in: HARDER's problems, their answers withheld, because the
# embedded models know one task. Left out: strong-to-weak distillation (r1.sh has it), tools.
#     PROBLEMS=countdown MODEL=models/tiny-countdown HARDER=countdown:4 LENGTH=120 bash recipes/qwen3.sh
set -euo pipefail
cd "$(dirname "$0")/.."
MODEL=${MODEL:-models/tiny-arithmetic} PROBLEMS=${PROBLEMS:-arithmetic} HARDER=${HARDER:-arithmetic:7-8}
OUT=${OUT:-runs/qwen3} COLD_PROBLEMS=${COLD_PROBLEMS:-400} SAMPLED=${SAMPLED:-2000} SAMPLE=${SAMPLE:-}
LENGTH=${LENGTH:-40} SFT=${SFT:---iterations 50 --warmup-iterations 5} FEW=${FEW:-32 128 512} RL=${RL:---iterations 100}
RM=${RM:-} FUSION=${FUSION:---iterations 600} BUDGETS=${BUDGETS:-1 5 9 13 17 21}
GENERAL=${GENERAL:---iterations 40 --kl-coef 0.05} EVALUATE=${EVALUATE:---eval-problems 500 --num-samples 2}
[ ! -e "$OUT" ] || { echo "error: $OUT exists; remove it, or set OUT to another directory" >&2; exit 2; }
train() { echo "== $1 =="; python "train_$2.py" --run-root "$OUT/$1" --eval-data "$OUT/eval.jsonl" \
    --max-new-tokens "$LENGTH" "${@:3}"; }
final() { echo "$OUT/$1"/*/final; }
evaluate() { python evaluate.py --max-new-tokens "$LENGTH" "$@"; }
sample() { # MODEL COUNT FILE ...: samples of training problems
    evaluate --model "$1" --problems "$OUT/train.jsonl" --split all --eval-problems "$2" --num-samples 4 \
        --output "$3" $SAMPLE "${@:4}"
}
QUICK="--eval-every 0 --save-every 0" CLEAN="--remove-duplicates --decontaminate $OUT/eval.jsonl"
mkdir -p "$OUT"
for split in train eval; do python curate.py --problems "$PROBLEMS" --split $split --output "$OUT/$split.jsonl"; done

sample "$MODEL" "$COLD_PROBLEMS" "$OUT/cold.jsonl"
python curate.py --samples "$OUT/cold.jsonl" --make longest --right-steps $CLEAN --output "$OUT/cold_best.jsonl"
train sft sft --model "$MODEL" --data "$OUT/cold_best.jsonl" $SFT
sample "$(final sft)" "$SAMPLED" "$OUT/tries.jsonl"
python curate.py --samples "$OUT/tries.jsonl" $CLEAN --output "$OUT/all.jsonl"
for few in $FEW; do
    python curate.py --problems "$OUT/all.jsonl" --split all --limit "$few" --output "$OUT/$few.jsonl"
done
for few in $FEW all; do train "rl-$few" grpo --model "$(final sft)" --problems "$OUT/$few.jsonl" $RL $QUICK; done
sample "$(final rl-all)" "$SAMPLED" "$OUT/thoughts.jsonl"
python curate.py --samples "$OUT/thoughts.jsonl" --make fusion --output "$OUT/fusion.jsonl"
train fusion sft --model "$(final rl-all)" --data "$OUT/fusion.jsonl" $FUSION
for mode in think no_think; do sample "$(final fusion)" "$SAMPLED" "$OUT/$mode.jsonl" --modes $mode; done
cat "$OUT/think.jsonl" "$OUT/no_think.jsonl" >"$OUT/preferences.jsonl"
python train_rm.py --run-root "$OUT/rm" --model "$(final fusion)" --data "$OUT/preferences.jsonl" $RM
python curate.py --problems "$OUT/all.jsonl" --split all --mode think --output "$OUT/reasoning.jsonl"
python curate.py --problems "$HARDER" --limit "$(wc -l <"$OUT/reasoning.jsonl")" --mode think --make prompts \
    --output "$OUT/prompts.jsonl" # as many as there are reasoning prompts
cat "$OUT/reasoning.jsonl" "$OUT/prompts.jsonl" >"$OUT/general.jsonl"
python curate.py --problems "$OUT/eval.jsonl" --split all --mode think --output "$OUT/general-eval.jsonl"
train general grpo --model "$(final fusion)" --problems "$OUT/general.jsonl" --eval-data "$OUT/general-eval.jsonl" \
    --reward-model "$(final rm)" --reward-model-prompts unanswered $GENERAL $QUICK

STAGES="base=$MODEL sft=$(final sft)" HELD_OUT="--problems $OUT/eval.jsonl --split all"
for few in $FEW all; do STAGES+=" rl-$few=$(final "rl-$few")"; done
evaluate --stages $STAGES $HELD_OUT --temperatures 0.6 1.4 $EVALUATE
STAGES="fusion=$(final fusion) general=$(final general)" MODES="--modes think,no_think"
evaluate --stages $STAGES $HELD_OUT $MODES --temperatures 0.6 1.4 $EVALUATE
echo "== outside the training distribution: $HARDER =="
evaluate --stages $STAGES --problems "$HARDER" $MODES $EVALUATE
for budget in $BUDGETS; do
    evaluate --stages "budget-$budget=$(final fusion)" $HELD_OUT --modes think --think-budget "$budget" $EVALUATE
done
