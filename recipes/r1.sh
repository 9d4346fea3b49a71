#!/usr/bin/env bash
# DeepSeek-R1 (arXiv:2501.12948), every stage. R1-Zero: RL on the base model, rewards for accuracy and format only. The
# pipeline: SFT cold start, RL with an additional language reward, SFT of the base on the RL model's right samples mixed
# with other demonstrations, RL with rules on reasoning prompts and a reward model on general prompts (compared with
# both rewards, or the model's alone, on reasoning prompts). Distillation into a smaller student, compared with the same
# student trained by RL alone. General prompts are a stand-in: HARDER's problems, their answers withheld, because the
# embedded models know one task. Left out: safety, and the generative judge of the rejection stage.
#     PROBLEMS=countdown MODEL=models/tiny-countdown HARDER=countdown:4 LENGTH=120 bash recipes/r1.sh
set -euo pipefail
cd "$(dirname "$0")/.."
MODEL=${MODEL:-models/tiny-arithmetic} PROBLEMS=${PROBLEMS:-arithmetic} HARDER=${HARDER:-arithmetic:7-8}
OUT=${OUT:-runs/r1} STUDENT=${STUDENT:-} SAMPLE=${SAMPLE:-} LENGTH=${LENGTH:-40} # SAMPLE: evaluate.py's flags
RL=${RL:---iterations 100} COLD=${COLD:---iterations 50 --warmup-iterations 5} SFT=${SFT:---iterations 200}
PREFERENCE=${PREFERENCE:---iterations 40 --kl-coef 0.05} RM=${RM:-} OTHER=${OTHER:-$PROBLEMS-demonstrations:600}
STUDENT_SFT=${STUDENT_SFT:---demonstrations 100000 --iterations 1500 --learning-rate 2e-3}
COLD_PROBLEMS=${COLD_PROBLEMS:-200} SAMPLED=${SAMPLED:-2000} EVALUATE=${EVALUATE:---eval-problems 500 --num-samples 2}
[ ! -e "$OUT" ] || { echo "error: $OUT exists; remove it, or set OUT to another directory" >&2; exit 2; }
train() { echo "== $1 =="; python "train_$2.py" --run-root "$OUT/$1" --problems "$PROBLEMS" \
    --max-new-tokens "$LENGTH" "${@:3}"; }
final() { echo "$OUT/$1"/*/final; }
evaluate() { python evaluate.py --max-new-tokens "$LENGTH" "$@"; }
sample() { # MODEL COUNT FILE: right and wrong completions of training problems
    evaluate --model "$1" --problems "$PROBLEMS" --split train --eval-problems "$2" --num-samples 4 \
        --output "$3" $SAMPLE
}
QUICK="--eval-every 0 --save-every 0"
mkdir -p "$OUT"

train zero grpo --model "$MODEL" $RL $QUICK
sample "$(final zero)" "$COLD_PROBLEMS" "$OUT/zero.jsonl"
train cold sft --model "$MODEL" --data "$OUT/zero.jsonl" --keep longest $COLD
train rl grpo --model "$(final cold)" --language-weight 0.1 $RL $QUICK
sample "$(final rl)" "$SAMPLED" "$OUT/rl.jsonl"
train rejection sft --model "$MODEL" --data "$OUT/rl.jsonl" "$OTHER" --keep correct $SFT
python train_rm.py --run-root "$OUT/rm" --model "$(final rejection)" --data "$OUT/rl.jsonl" $RM
SCORE="--model $(final rejection) --reward-model $(final rm) $PREFERENCE $QUICK"
train preference-alone grpo $SCORE --accuracy-weight 0 --format-weight 0
train rules-and-preference grpo $SCORE
python curate.py --problems "$PROBLEMS" --limit "$SAMPLED" --output "$OUT/reasoning.jsonl"
python curate.py --problems "$HARDER" --limit "$SAMPLED" --make prompts --output "$OUT/general.jsonl"
cat "$OUT/reasoning.jsonl" "$OUT/general.jsonl" >"$OUT/mixed.jsonl"
train routed grpo $SCORE --problems "$OUT/mixed.jsonl" --eval-data "$PROBLEMS" --reward-model-prompts unanswered

if [ -z "$STUDENT" ]; then # half the width and half the depth, taught by the same sloppy teacher as the base
    python models/make_tiny.py "$OUT/tiny" --hidden 64 --layers 2 --characters 等一下
    train student sft --model "$OUT/tiny" --data "$PROBLEMS-demonstrations" --from-scratch $STUDENT_SFT
    STUDENT=$(final student)
fi
sample "$(final routed)" "$SAMPLED" "$OUT/teacher.jsonl"
train distilled sft --model "$STUDENT" --data "$OUT/teacher.jsonl" --keep correct $SFT
train student-rl grpo --model "$STUDENT" $RL $QUICK

STAGES="base=$MODEL"
for name in zero cold rl rejection preference-alone rules-and-preference routed; do
    STAGES+=" $name=$(final $name)"
done
STAGES+=" student=$STUDENT distilled=$(final distilled) student-rl=$(final student-rl)"
evaluate --stages $STAGES --problems "$PROBLEMS" --temperatures 0.6 1.4 $EVALUATE
echo "== outside the training distribution: $HARDER =="
evaluate --stages $STAGES --problems "$HARDER" $EVALUATE
