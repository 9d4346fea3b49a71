"""Runs a train script as its user does, once for each seed, and prints what the README claims about it.

    python benchmarks/learning.py                                    # train_grpo.py, seeds 1, 2, 3
    python benchmarks/learning.py --runs runs/train_grpo__* --plot assets/grpo.png     # figures of runs that are there

Seconds are those of the whole process: imports, model loading and evaluations included.
"""

import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))


@dataclass
class Args:
    script: str = "train_grpo.py"
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])
    flags: str = ""
    """more flags for the script, in one string: "--flags=--iterations 100" (with the =, as it begins with dashes)"""
    runs: list[Path] = field(default_factory=list)
    """run directories to report on instead of running anything"""
    plot: Path | None = None
    """write the learning curves to this picture"""


def read_scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def run_script(script: str, seed: int, flags: str) -> tuple[Path, float, float]:
    """The run directory, the seconds from start to exit, and the process's peak resident memory in GB."""
    start = time.perf_counter()
    command = [sys.executable, script, "--seed", str(seed), *flags.split()]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(command)} failed")
    first_line = next(line for line in printed.splitlines() if line.startswith("run directory: "))
    seconds, peak = time.perf_counter() - start, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
    return ROOT / first_line.removeprefix("run directory: "), seconds, peak


def machine() -> str:
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        name = next(line.split(": ")[1] for line in cpuinfo.read_text().splitlines() if line.startswith("model name"))
    import torch
    import transformers

    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}"
    return f"{name}, {torch.get_num_threads()} threads{gpu}; {versions}"


def plot(runs: dict[str, dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), constrained_layout=True)
    for i, (name, scalars) in enumerate(runs.items()):
        color = f"C{i}"
        x, y = zip(*scalars["reward/accuracy"], strict=True)
        left.plot(x, y, color=color, alpha=0.35, linewidth=1)
        x, y = zip(*scalars["eval/accuracy"], strict=True)
        left.plot(x, y, color=color, marker="o", label=f"{name}, held out")
        for tag, style in (("eval/accuracy_greedy_difficulty_6", "-"), ("eval/accuracy_difficulty_6", "--")):
            if tag in scalars:
                x, y = zip(*scalars[tag], strict=True)
                label = name + (", greedy" if style == "-" else ", sampled")
                right.plot(x, y, style, color=color, marker="o", label=label)
    left.set_title("accuracy, sampled at temperature 1 (thin: training batches)")
    right.set_title("held-out accuracy at the hardest difficulty")
    for axes in (left, right):
        axes.set(xlabel="completions sampled", ylim=(0, 1.02))
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8, loc="lower right")
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    print(f"wrote {path}")


def main(args: Args) -> None:
    from evaluate import format_table

    costs, runs = {}, args.runs
    if not runs:
        runs = []
        for seed in args.seeds:
            run, *cost = run_script(args.script, seed, args.flags)
            runs.append(run)
            costs[run] = cost
    rows, curves = [], {}
    for run in runs:
        saved, scalars = json.loads((run / "args.json").read_text()), read_scalars(run)
        name = f"seed {saved['seed']}" + f" ({run.name})" * (f"seed {saved['seed']}" in curves)
        curves[name] = scalars
        row = [name, *costs.get(run, [float("nan")] * 2)]
        for tag in ("eval/accuracy", "eval/accuracy_greedy", "eval/accuracy_greedy_difficulty_6"):
            values = [value for _, value in scalars.get(tag, [(0, float("nan"))])]
            row += [values[0], values[-1]]
        row.append("{:.1e}".format(max(value for _, value in scalars.get("rollout/logprob_gap_max", [(0, 0.0)]))))
        rows.append(row)
    header = ["", "seconds", "peak GB", "sampled before", "after", "greedy before", "after"]
    header += ["greedy, hardest before", "after", "logprob gap max"]
    print(f"{args.script} {args.flags}\n{machine()}\n\n{format_table(header, rows)}")
    if args.plot:
        plot(curves, args.plot)


if __name__ == "__main__":
    main(tyro.cli(Args))
