"""One whole GRPO step, from sampling to optimizer, here and in TRL's GRPOTrainer: same model, prompts, group size,
length limit and one float32 optimizer step, each in its own process. Seconds are the median of all steps but the first.

    pip install -r requirements-dev.txt
    python benchmarks/training_step.py --model DIR --problems gsm8k/train.jsonl

TRL runs with its defaults except for the precision, which by default is mixed bfloat16. Gradient checkpointing, which
trades time for memory, is on by default in TRL and off in ours, so each side also runs with the other's setting. TRL
runs once more with the matmul precision that our code sets on a CPU.
"""

import subprocess
import sys
import tempfile
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))

import common  # noqa: E402
import rewards  # noqa: E402
import train_grpo  # noqa: E402
from benchmarks.learning import machine, read_scalars  # noqa: E402
from data import as_dicts, load_problems  # noqa: E402
from plumbing.evaluation import format_table  # noqa: E402
from plumbing.flags import SYSTEM_PROMPT, from_flat  # noqa: E402
from plumbing.metrics import peak_memory_gb  # noqa: E402

CHECKPOINTING = "gradient checkpointing"
WAYS = "ours", "trl", "trl, our precision", f"trl, no {CHECKPOINTING}", f"ours, {CHECKPOINTING}"


@dataclass
class Args:
    model: str = "models/tiny-arithmetic"
    """local model directory or hub name"""
    problems: str = "arithmetic"
    """a .jsonl file of problems, or "arithmetic\""""
    prompts: int = 4
    group_size: int = 8
    max_new_tokens: int = 64
    micro_batch_tokens: int | None = None
    """our tokens in one forward and backward pass; None: train_grpo.py's default"""
    kl_coef: float = 0.0
    """weight of the KL; above 0 both sides load a reference"""
    steps: int = 3
    learning_rate: float = 1e-6
    way: str = ""
    """measure this one of WAYS in this process; empty: measure each in its own process and print the table"""


def reward_of(text: str) -> float:
    """From 0 to 1, by the text alone. It differs within groups, so both sides need a backward pass for every row."""
    return zlib.crc32(text.encode()) / 2**32


def measure_ours(args: Args, directory: str) -> list[list[float]]:
    rewards.format_reward = lambda text, style: reward_of(text)
    same = "model", "problems", "group_size", "max_new_tokens", "learning_rate", "kl_coef"
    flags = {name: getattr(args, name) for name in same}
    flags |= {"micro_batch_tokens": args.micro_batch_tokens} if args.micro_batch_tokens else {}
    flags |= {"prompts_per_step": args.prompts, "iterations": args.steps}
    flags |= {"gradient_checkpointing": CHECKPOINTING in args.way, "dtype": "float32", "run_root": directory}
    flags |= {"eval_problems": 1, "eval_every": 0, "save_every": 0}
    train_grpo.main(from_flat(train_grpo.Args(), flags))
    scalars = read_scalars(next(Path(directory).iterdir()))
    parts = [scalars[f"time/{name}"] for name in ("sample", "reward", "logprobs", "update")]
    return [[sum(part[i][1] for part in parts), *(part[i][1] for part in parts)] for i in range(args.steps)]


def measure_trl(args: Args, directory: str) -> list[list[float]]:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    problems = load_problems(args.problems, "train")[: args.prompts * args.steps]
    turns = [p.messages or (("user", p.question),) for p in problems]
    system = ("system", SYSTEM_PROMPT)
    rows = [{"prompt": as_dicts(m if m[0][0] == "system" else (system, *m))} for m in turns]
    if "our precision" in args.way:
        common.load_policy("models/tiny-arithmetic")  # sets the precision
    config = GRPOConfig(
        output_dir=directory,
        per_device_train_batch_size=args.prompts * args.group_size,
        num_generations=args.group_size,
        max_completion_length=args.max_new_tokens,
        max_steps=args.steps,
        learning_rate=args.learning_rate,
        beta=args.kl_coef,
        bf16=False,
        gradient_checkpointing=CHECKPOINTING not in args.way,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )
    steps, started = [], [0.0]

    class Timer(TrainerCallback):
        def on_step_begin(self, *_, **__):
            started[0] = time.perf_counter()

        def on_step_end(self, *_, **__):
            steps.append([time.perf_counter() - started[0]])

    def reward(completions, **_):
        return [reward_of(completion[0]["content"]) for completion in completions]

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    tokenizer = common.load_tokenizer(args.model)
    GRPOTrainer(
        model,
        reward,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[Timer()],
    ).train()
    return steps


def main(args: Args) -> None:
    if args.way:
        with tempfile.TemporaryDirectory() as directory:
            steps = (measure_ours if args.way.startswith("ours") else measure_trl)(args, directory)
        middle = [sorted(values)[len(values) // 2] for values in zip(*steps[1:], strict=True)]
        print("measured", peak_memory_gb(common.resolve_device("auto")), *middle)
        return
    rows = []
    for way in WAYS:
        command = [sys.executable, __file__, *sys.argv[1:], "--way", way]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            sys.exit(result.stderr[-2000:])
        peak, *seconds = map(float, result.stdout.split("measured ")[1].split())
        rows.append([way, seconds[0], peak, *(f"{s:.2f}" for s in seconds[1:] or [0] * 4)])
        rows[-1][3:3] = [rows[-1][1] / rows[0][1], rows[0][2] / rows[-1][2]]
    what = f"{args.prompts} x {args.group_size} x {args.max_new_tokens}"
    kl = f", KL {args.kl_coef:g}" if args.kl_coef else ""
    print(f"{args.model}, {args.problems}, {what}, float32{kl}\n{machine()}\n")
    header = ["", "seconds a step", "peak GB", "times slower than ours", "our peak / its"]
    print(format_table([*header, "sample", "reward", "logprobs", "update"], rows))


if __name__ == "__main__":
    main(tyro.cli(Args))
