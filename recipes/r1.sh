#!/usr/bin/env bash
# DeepSeek-R1 (arXiv:2501.12948), every stage. R1-Zero: RL on the base model, rewards for accuracy and format only. The
# pipeline: SFT cold start, RL with a reward for one language too, SFT of the base on the RL model's right samples, RL
# on a preference reward. Distillation into a smaller student, beside the same student trained by RL alone.
set -euo pipefail
cd "$(dirname "$0")/.."
MODEL=${MODEL:-models/tiny-arithmetic} PROBLEMS=${PROBLEMS:-arithmetic} HARDER=${HARDER:-arithmetic:7-8}
OUT=${OUT:-runs/r1} STUDENT=${STUDENT:-} SAMPLE=${SAMPLE:-} # more flags for evaluate.py where it samples
RL=${RL:---iterations 100} COLD=${COLD:---iterations 50 --warmup-iterations 5} SFT=${SFT:---iterations 200}
PPO=${PPO:---iterations 40 --kl-coef 0.05} RM=${RM:-}
STUDENT_SFT=${STUDENT_SFT:---demonstrations 100000 --iterations 1500 --learning-rate 2e-3}
COLD_PROBLEMS=${COLD_PROBLEMS:-200} SAMPLED=${SAMPLED:-2000} EVALUATE=${EVALUATE:---eval-problems 500 --num-samples 2}
[ ! -e "$OUT" ] || { echo "error: $OUT exists; remove it, or set OUT to another directory" >&2; exit 2; }
train() { echo "== $1 =="; python "train_$2.py" --run-root "$OUT/$1" --problems "$PROBLEMS" "${@:3}"; }
final() { echo "$OUT/$1"/*/final; }
sample() { # MODEL COUNT: right and wrong completions of training problems
    python evaluate.py --model "$1" --problems "$PROBLEMS" --split train --eval-problems "$2" --num-samples 4 \
        --output "$3" $SAMPLE
}
QUICK="--eval-every 0 --save-every 0"
mkdir -p "$OUT"

train zero grpo --model "$MODEL" $RL $QUICK
sample "$(final zero)" "$COLD_PROBLEMS" "$OUT/zero.jsonl"
train cold sft --model "$MODEL" --data "$OUT/zero.jsonl" --keep best $COLD
train rl grpo --model "$(final cold)" --language-weight 0.1 $RL $QUICK
sample "$(final rl)" "$SAMPLED" "$OUT/rl.jsonl"
train rejection sft --model "$MODEL" --data "$OUT/rl.jsonl" --keep correct $SFT
python train_rm.py --run-root "$OUT/rm" --model "$(final rejection)" --data "$OUT/rl.jsonl" $RM
train preference ppo --model "$(final rejection)" --reward-model "$(final rm)" $PPO $QUICK

if [ -z "$STUDENT" ]; then # half the width and half the depth, taught by the same sloppy teacher as the base
    python models/make_tiny.py "$OUT/tiny" --hidden 64 --layers 2
    train student sft --model "$OUT/tiny" --from-scratch $STUDENT_SFT
    STUDENT=$(final student)
fi
sample "$(final preference)" "$SAMPLED" "$OUT/teacher.jsonl"
train distilled sft --model "$STUDENT" --data "$OUT/teacher.jsonl" --keep correct $SFT
train student-rl grpo --model "$STUDENT" $RL $QUICK

STAGES="base=$MODEL"
for stage in zero cold rl rejection preference; do STAGES+=" $stage=$(final $stage)"; done
STAGES+=" student=$STUDENT distilled=$(final distilled) student-rl=$(final student-rl)"
python evaluate.py --stages $STAGES --problems "$PROBLEMS" --temperatures 0.6 1.4 $EVALUATE
echo "== outside the training distribution: $HARDER =="
python evaluate.py --stages $STAGES --problems "$HARDER" $EVALUATE
