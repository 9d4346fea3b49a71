"""The same GRPO run here and in TRL's GRPOTrainer: same base, problems in the same order, group size, learning rate and
its schedule, clip range, optimizer, rewards, no KL, float32. Both read the problems from a JSONL file that
curate.py wrote, both start from the same directory, and evaluate.py scores both ends on the same held-out problems.

    pip install trl==1.16.0 datasets                # for this benchmark only
    python benchmarks/vs_trl_learning.py            # the embedded base, three seeds
    python benchmarks/vs_trl_learning.py --model runs/train_grpo__.../final --iterations 20 --seeds 1     # on from ours

Seconds are of the whole process, of ours with two small evaluations; peak memory is the process's.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.learning import ROOT, machine, run_script  # noqa: E402
from data import ProblemSampler  # noqa: E402
from evaluate import interval  # noqa: E402
from plumbing.evaluation import format_table  # noqa: E402
from rewards import accuracy_reward, format_reward  # noqa: E402

FORMAT_WEIGHT = 0.2


@dataclass
class Args:
    model: str = "models/tiny-arithmetic"
    """local model directory to start from"""
    iterations: int = 100
    prompts: int = 32
    group_size: int = 8
    max_new_tokens: int = 40
    learning_rate: float = 1e-4
    warmup_iterations: int = 10
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])
    eval_problems: int = 500
    trl: Path | None = None
    """train with TRL in this process, and write the model here; without it: both, in processes of their own"""
    problems: Path | None = None
    """with --trl: the JSONL file of the problems"""


def train_trl(args: Args) -> None:
    import torch
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    rows = load_dataset("json", data_files=str(args.problems), split="train")
    order = ProblemSampler(list(range(len(rows))), seed=args.seeds[0]).draw(args.iterations * args.prompts)
    rows = rows.select(order).rename_columns({"question": "prompt", "answer": "gold"})
    config = GRPOConfig(
        output_dir=str(args.trl),
        seed=args.seeds[0],
        shuffle_dataset=False,  # the order is our sampler's
        per_device_train_batch_size=args.prompts * args.group_size,
        num_generations=args.group_size,
        max_completion_length=args.max_new_tokens,
        max_steps=args.iterations,
        beta=0.0,
        epsilon=0.2,
        loss_type="grpo",  # the mean of each sequence's mean
        scale_rewards="group",
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        logging_steps=10,
        disable_tqdm=True,
    )

    def accuracy(completions, gold, **_):
        return [accuracy_reward(text, answer) for text, answer in zip(completions, gold, strict=True)]

    def form(completions, **_):
        return [FORMAT_WEIGHT * format_reward(text) for text in completions]

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.0)
    rise = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / args.warmup_iterations))
    trainer = GRPOTrainer(
        model,
        [accuracy, form],
        args=config,
        train_dataset=rows,
        processing_class=tokenizer,
        optimizers=(optimizer, rise),  # TRL's own begins with a step of 0
    )
    trainer.train()
    trainer.save_model(str(args.trl))
    tokenizer.save_pretrained(str(args.trl))


def run_trl(args: Args, seed: int, problems: Path, out: Path) -> tuple[float, float]:
    """Seconds and peak memory in GB of the process."""
    same = "model", "iterations", "prompts", "group_size", "max_new_tokens", "learning_rate", "warmup_iterations"
    flags = [part for name in same for part in (f"--{name.replace('_', '-')}", str(getattr(args, name)))]
    command = [sys.executable, __file__, *flags, "--seeds", str(seed), "--trl", str(out), "--problems", str(problems)]
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(command)} failed")
    return time.perf_counter() - start, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def accuracy_of(model: Path, args: Args, scratch: Path) -> list[float]:
    """Held-out accuracy at temperature 1 and length, by evaluate.py."""
    samples = scratch / "samples.jsonl"
    count, length = str(args.eval_problems), str(args.max_new_tokens)
    command = [sys.executable, "evaluate.py", "--model", str(model), "--problems", "arithmetic"]
    command += ["--eval-problems", count, "--max-new-tokens", length, "--num-samples", "4", "--output", str(samples)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    completions = [c for line in samples.read_text().splitlines() for c in json.loads(line)["completions"]]
    return [sum(c[name] for c in completions) / len(completions) for name in ("correct", "length")]


def main(args: Args) -> None:
    if args.trl:
        train_trl(args)
        return
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        problems = scratch / "problems.jsonl"
        command = [sys.executable, "curate.py", "--problems", "arithmetic", "--output", str(problems)]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        held_out = f"--problems {problems} --eval-data arithmetic --eval-problems 20 --eval-every 0 --save-every 0"
        flags = f"--model {args.model} --iterations {args.iterations} --prompts-per-step {args.prompts} {held_out}"
        flags += f" --group-size {args.group_size} --max-new-tokens {args.max_new_tokens} --run-root {scratch / 'ours'}"
        flags += f" --dtype float32 --learning-rate {args.learning_rate} --warmup-iterations {args.warmup_iterations}"
        for seed in args.seeds:
            run, *cost = run_script("train_grpo.py", seed, f"{flags} --format-weight {FORMAT_WEIGHT}")
            rows.append(["ours", seed, *accuracy_of(run / "final", args, scratch), *cost])
            print(*rows[-1], file=sys.stderr)
            cost = run_trl(args, seed, problems, scratch / f"trl{seed}")
            rows.append(["TRL", seed, *accuracy_of(scratch / f"trl{seed}", args, scratch), *cost])
            print(*rows[-1], file=sys.stderr)
    for name in ("ours", "TRL"):
        of = [row[2:] for row in rows if row[0] == name]
        rows.append([name, "mean", *(sum(values) / len(values) for values in zip(*of, strict=True))])
    for row in rows:
        row.insert(3, "{:.3f}-{:.3f}".format(*interval(row[2], args.eval_problems)))
    what = f"{args.model}, {args.iterations} iterations of {args.prompts} x {args.group_size}, float32"
    print(f"{what}\n{machine()}\n")
    print(format_table(["", "seed", "accuracy (T=1)", "95% interval", "length", "seconds", "peak GB"], rows))


if __name__ == "__main__":
    main(tyro.cli(Args))
