"""Runs a training script as a user does, once per seed, and prints its accuracy, time and memory.

    python benchmarks/learning.py                                    # train_grpo.py, seeds 1, 2, 3
    python benchmarks/learning.py --script train_ppo.py "--flags=--iterations 100"
    python benchmarks/learning.py --runs runs/train_grpo__* --plot assets/grpo.png     # reports on finished runs

"seconds" is the whole process, with imports, model loading and evaluations. "sample", "logprobs" and "update" are parts
of one iteration, averaged over the run.
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
    """report on these finished run directories and train nothing"""
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


def plot_seeds(runs: list[tuple[str, dict]], path: Path) -> None:
    """Training and held-out accuracy of each run; the hardest difficulty in its own panel."""
    figure, (left, right) = new_figure(("accuracy, sampled at temperature 1", "held-out accuracy, hardest difficulty"))
    for i, (name, scalars) in enumerate(runs):
        left.plot(*curve(scalars, "reward/accuracy"), color=f"C{i}", alpha=0.35, linewidth=1)
        left.plot(*curve(scalars, "eval/accuracy"), color=f"C{i}", marker="o", label=f"{name}, held out")
        for tag, style, how in (("accuracy_greedy", "-", "greedy"), ("accuracy", "--", "sampled")):
            points = curve(scalars, f"eval/{tag}_difficulty_6")
            right.plot(*points, style, color=f"C{i}", marker="o", label=f"{name}, {how}")
    left.plot([], [], color="gray", alpha=0.5, linewidth=1, label="training batches")
    save_figure(figure, path)


def curve(scalars: dict, tag: str) -> tuple:
    return tuple(zip(*scalars[tag], strict=True)) if tag in scalars else ([], [])


def new_figure(titles):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = (5.5 * len(titles), 4)
    figure, (plots,) = plt.subplots(1, len(titles), figsize=size, constrained_layout=True, squeeze=False)
    for axes, title in zip(plots, titles, strict=True):
        axes.set(title=title, xlabel="completions sampled", ylim=(0, 1.02))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, plots


def save_figure(figure, path: Path) -> None:
    for axes in figure.axes:
        axes.set_xlim(left=0)
        axes.legend(frameon=False, fontsize=8, loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    print(f"wrote {path}")


def main(args: Args) -> None:
    from plumbing.statistics import format_table

    costs, runs = {}, list(args.runs)
    if not runs:
        for seed in args.seeds:
            run, *cost = run_script(args.script, seed, args.flags)
            runs.append(run)
            costs[run] = cost
    rows, curves = [], []
    for run in runs:
        saved, scalars = json.loads((run / "args.json").read_text()), read_scalars(run)
        script = run.name.split("__")[0]
        curves.append((f"seed {saved['seed']}", scalars))
        row = [f"{script} seed {saved['seed']}", *costs.get(run, [float("nan")] * 2)]
        for part in ("sample", "logprobs", "update"):
            values = [value for _, value in scalars.get(f"time/{part}", [(0, 0.0)])]
            row.append(sum(values) / len(values))
        for tag in ("eval/accuracy", "eval/accuracy_greedy", "eval/accuracy_greedy_difficulty_6"):
            values = [value for _, value in scalars.get(tag, [(0, float("nan"))])]
            row += [values[0], values[-1]]
        row.append("{:.1e}".format(max(value for _, value in scalars.get("rollout/logprob_gap_max", [(0, 0.0)]))))
        rows.append(row)
    header = ["", "seconds", "peak GB", "sample s", "logprobs s", "update s"]
    header += ["sampled", "after", "greedy", "after", "hardest", "after", "gap max"]
    print(f"{args.script} {args.flags}\n{machine()}\n\n{format_table(header, rows)}")
    if args.plot:
        plot_seeds(curves, args.plot)


if __name__ == "__main__":
    main(tyro.cli(Args))
