"""The same GRPO run here and in TRL's GRPOTrainer, by recipes/trl_grpo.py: same base, order of problems, group size,
learning rate and schedule, clip range, optimizer and rewards, no KL, float32. evaluate.py scores both final models on
the same held-out problems.

    pip install -r requirements-dev.txt
    python benchmarks/vs_trl_learning.py            # the embedded base, three seeds
    python benchmarks/vs_trl_learning.py --model runs/train_grpo__.../final --iterations 20 --seeds 1     # on from ours

Seconds and peak memory are the whole process's; our seconds include two small evaluations.
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
from plumbing.statistics import format_table, interval  # noqa: E402


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
    processes: int = 1
    """number of TRL's processes"""


def run_trl(run: Path, processes: int) -> tuple[float, float]:
    """Repeats the run in TRL; returns seconds and peak memory in GB (of the largest process)."""
    command = [sys.executable, "recipes/trl_grpo.py", "--run", str(run)]
    if processes > 1:  # not --cpu: with it, accelerate launch starts one process
        several = ["--multi_gpu", "--num_processes", str(processes), "--main_process_port", "0"]
        command[1:1] = ["-m", "accelerate.commands.launch", *several]
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    error = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(command)} failed\n{error[-2000:]}")
    return time.perf_counter() - start, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def accuracy_of(model: Path, args: Args, scratch: Path) -> list[float]:
    """Held-out accuracy and mean length at temperature 1, by evaluate.py."""
    samples = scratch / "samples.jsonl"
    count, length = str(args.eval_problems), str(args.max_new_tokens)
    command = [sys.executable, "evaluate.py", "--model", str(model), "--problems", "arithmetic"]
    command += ["--eval-problems", count, "--max-new-tokens", length, "--num-samples", "4", "--output", str(samples)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    completions = [c for line in samples.read_text().splitlines() for c in json.loads(line)["completions"]]
    return [sum(c[name] for c in completions) / len(completions) for name in ("correct", "length")]


def main(args: Args) -> None:
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        flags = f"--model {args.model} --iterations {args.iterations} --prompts-per-step {args.prompts}"
        flags += " --problems arithmetic --eval-problems 20 --eval-every 0 --save-every 0"
        flags += f" --group-size {args.group_size} --max-new-tokens {args.max_new_tokens} --run-root {scratch / 'ours'}"
        flags += f" --dtype float32 --learning-rate {args.learning_rate} --warmup-iterations {args.warmup_iterations}"
        for seed in args.seeds:
            run, *cost = run_script("train_grpo.py", seed, flags)
            rows.append(["ours", seed, *accuracy_of(run / "final", args, scratch), *cost])
            print(*rows[-1], file=sys.stderr)
            cost = run_trl(run, args.processes)
            rows.append(["TRL", seed, *accuracy_of(run / "trl" / "final", args, scratch), *cost])
            print(*rows[-1], file=sys.stderr)
    for name in ("ours", "TRL"):
        figures = [row[2:] for row in rows if row[0] == name]
        rows.append([name, "mean", *(sum(values) / len(values) for values in zip(*figures, strict=True))])
    for row in rows:
        row.insert(3, "{:.3f}-{:.3f}".format(*interval(row[2], args.eval_problems)))
    what = f"{args.model}, {args.iterations} iterations of {args.prompts} x {args.group_size}, float32"
    print(f"{what}\n{machine()}\n")
    print(format_table(["", "seed", "accuracy (T=1)", "95% interval", "length", "seconds", "peak GB"], rows))


if __name__ == "__main__":
    main(tyro.cli(Args))
