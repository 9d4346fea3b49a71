"""Compares runs: does a change help? Pairs the runs of two or more groups by seed and tests the differences.

    python compare.py --runs 'grpo=runs/train_grpo__*' 'mine=runs/train_mine__*'          # quoted: expanded here
    python compare.py --runs 'grpo=runs/train_grpo__*' 'mine=runs/train_mine__*' --plot mine.png

Each further group is compared with the first. A figure is read off each run's metrics.jsonl: the metric after equal
samples, after equal seconds, and its mean over all samples (the area under the curve, divided by its width). Between
two evaluations the curve is a straight line. Seconds are those of the iterations, without evaluations and checkpoints:
compare them only if all runs had the same machine to themselves.

The difference is a group's value minus the first group's with the same seed; its 95% interval is Student's t. The rule
is that of claims/claims.py: "they differ" if the interval excludes 0, "no difference" if it lies within 0.02 of 0 (or
2%, for a metric with values outside of 0 to 1), else "not visible". One interval in twenty excludes 0 by chance.
"""

import ast
import bisect
import json
import statistics
from dataclasses import dataclass
from glob import glob
from pathlib import Path

from plumbing.files import read_jsonl, replacing
from plumbing.flags import Positive, as_flag, check_folder, fail, start
from plumbing.statistics import DIFFERENT, format_table, judge, paired_difference, pairs_for_half

PICTURES = ".png", ".svg", ".pdf"
# Flags without effect on what a run learns and measures
NO_EFFECT = {"seed", "run_root", "run_name", "resume", "save_every", "keep_checkpoints"}


@dataclass
class Args:
    runs: tuple[str, ...] = ()
    """NAME='PATTERN' ...: groups of finished runs; the first is the one that the others are compared with"""
    tag: str = "eval/accuracy"
    """the metric, as TensorBoard names it"""
    samples: Positive | None = None
    """compare after this many samples (TensorBoard's Step); None: at the end of runs that are equally long"""
    plot: str | None = None
    """draw mean and range of each group to this .png, .svg or .pdf (needs matplotlib)"""


# ---- Reading runs ----------------------------------------------------------------------------------------------------


@dataclass
class FinishedRun:
    path: Path
    flags: dict
    scripts: list[str]  # names of its script's copies
    source: list[str]  # their code, without comments
    task: tuple  # what it was evaluated on
    steps: list[float]  # samples at each value
    seconds: list[float]  # of training, at each value
    values: list[float]  # the metric's


def read_run(path: Path, tag: str) -> FinishedRun:
    """A finished run's flags and its metric. Whatever can't be compared ends the program in one line."""
    args = path / "args.json"
    try:
        flags = json.loads(args.read_text())
        if not isinstance(flags["seed"], int) or not isinstance(flags["iterations"], int):
            raise ValueError
    except OSError:
        fail(f"{path}: no run directory (it has no args.json); narrow the pattern")
    except (ValueError, TypeError, KeyError, RecursionError):
        fail(f"{args}: is damaged (it does not hold a run's flags)")
    rows, logged = read_rows(path)
    if not (path / "final").is_dir() or logged < flags["iterations"]:
        done = f"{logged} of {flags['iterations']} iterations"
        fail(f"{path}: has not finished ({done}); go on with --resume, or narrow the pattern")
    if not (curve := [(row["step"], row["seconds"], row[tag]) for row in rows if tag in row]):
        known = ", ".join(sorted({name for row in rows for name in row if name.startswith("eval/")})[:4])
        fail(f"--tag {tag}: {path} has no such metric (it has {known or 'no evaluation'})")
    steps, seconds, values = zip(*curve, strict=True)
    rising = all(a < b for a, b in zip(steps, steps[1:], strict=False))
    if not rising or not all(isinstance(value, int | float) for value in values):
        fail(f"{path}: its {tag} is not finite, or logged twice for a step")
    asked = [row.get("held_out") for row in read_jsonl(path / "samples.jsonl", cut=True)][:1]
    data = [] if asked else [flags.get(name) for name in ("data", "problems", "pair_problems")]
    task = next((row["eval/pairs"] for row in rows if row.get("eval/pairs")), None), asked, data
    copies, source = sorted(path.glob("*.py")), []
    for copy in copies:
        try:
            source.append(ast.dump(ast.parse(copy.read_bytes())))
        except (SyntaxError, ValueError):
            fail(f"{copy}: is damaged (no Python code)")
    return FinishedRun(path, flags, [copy.name for copy in copies], source, task, steps, seconds, values)


def read_rows(path: Path) -> tuple[list[dict], int]:
    """A run's rows of metrics.jsonl, each with `seconds` of training so far, and the number of iterations."""
    rows, logged, seconds = read_jsonl(path / "metrics.jsonl", cut=True), 0, 0.0
    for line, row in enumerate(rows, 1):
        if "memory/peak_gb" in row:  # an iteration's row
            logged += 1
            seconds += sum(value or 0.0 for name, value in row.items() if name.startswith("time/"))
        if row.get("iteration") != logged or not isinstance(row.get("step"), int):
            fail(f"{path / 'metrics.jsonl'}: line {line} is damaged (iteration {logged} is expected)")
        row["seconds"] = seconds
    return rows, logged


def read_groups(args: Args) -> dict[str, dict[int, FinishedRun]]:
    """The runs by group and seed, all comparable."""
    groups: dict[str, dict[int, FinishedRun]] = {}
    seen: dict[Path, str] = {}
    for group in args.runs:
        name, _, pattern = group.partition("=")
        if not name or not pattern:
            fail(f"--runs {group}: NAME='PATTERN' is expected")
        if name in groups:
            fail(f"--runs {group}: another group has the name {name}")
        paths = [Path(path) for path in sorted(glob(pattern))]
        if not paths:
            fail(f"--runs {group}: no run matches")
        groups[name] = {}
        for path in paths:
            if (other := seen.setdefault(path.resolve(), name)) != name:
                fail(f"--runs {group}: {path} is in {other}, too; narrow a pattern")
            run = read_run(path, args.tag)
            seed = run.flags["seed"]
            if seed in groups[name]:
                fail(f"--runs {group}: two runs have the seed {seed}: {groups[name][seed].path} and {path}")
            groups[name][seed] = run
        check_group(name, list(groups[name].values()))
    if len(groups) < 2:
        fail("--runs: two groups or more are expected, NAME='PATTERN' each")
    return groups


def check_group(name: str, runs: list[FinishedRun]) -> None:
    """Fails if a group's runs differ in more than their seed. Paths may differ: an earlier stage has a run per seed."""
    first = runs[0]
    for run in runs[1:]:
        for flag, (ours, theirs) in differing(first.flags, run.flags).items():
            if not ("/" in str(ours) and "/" in str(theirs)):
                fail(f"{name}: its runs differ in {as_flag(flag)} ({ours} in {first.path}, {theirs} in {run.path})")
        if run.source != first.source:
            fail(f"{name}: its runs are of different scripts ({first.path} and {run.path}); narrow the pattern")


def differing(first: dict, second: dict) -> dict[str, tuple]:
    """The flags that differ, with both values; "-" where a script has no such flag."""
    names = [name for name in first | second if name not in NO_EFFECT]
    pairs = {name: (first.get(name, "-"), second.get(name, "-")) for name in names}
    return {name: values for name, values in pairs.items() if values[0] != values[1]}


# ---- Figures ---------------------------------------------------------------------------------------------------------


def at(xs: list[float], values: list[float], x: float) -> float:
    """The curve's value at x, on a straight line between its neighbours."""
    i = bisect.bisect_left(xs, x)
    if i == len(xs) or xs[i] == x or i == 0:
        return values[min(i, len(xs) - 1)]
    share = (x - xs[i - 1]) / (xs[i] - xs[i - 1])
    return values[i - 1] + share * (values[i] - values[i - 1])


def mean_until(xs: list[float], values: list[float], start: float, end: float) -> float:
    """The area under the curve from start to end, divided by the width."""
    points = [start, *(x for x in xs if start < x < end), end]
    heights = [at(xs, values, x) for x in points]
    areas = [(b - a) * (u + v) / 2 for a, b, u, v in zip(points, points[1:], heights, heights[1:], strict=False)]
    return sum(areas) / (end - start)


def figures(first: list[FinishedRun], second: list[FinishedRun], end: float) -> dict[str, tuple[list, list]]:
    """By name, the figure of each run of both lists, which are paired."""
    both = first + second
    found = {f"after {end:,g} samples": lambda run: at(run.steps, run.values, end)}
    start = max(run.steps[0] for run in both)
    if all(sum(step <= end for step in run.steps) > 2 for run in both):  # else its line would be mostly made up
        enough = min(at(run.steps, run.seconds, end) for run in both)
        found[f"after {enough:.3g} seconds"] = lambda run: at(run.seconds, run.values, enough)
        found["mean over all samples"] = lambda run: mean_until(run.steps, run.values, start, end)
    return {name: ([*map(figure, first)], [*map(figure, second)]) for name, figure in found.items()}


VERDICTS = {"holds": "they differ", "does not": "no difference", "not visible": "not visible"}


def cells(name: str, first: list[float], second: list[float]) -> list:
    """A row of the table. Values within 0 and 1: their difference; others: it, relative to the first group's mean."""
    share = all(0 <= value <= 1 for value in first + second)
    scale = 1.0 if share else abs(statistics.mean(first)) or 1.0
    mean, low, high = (value / scale for value in paired_difference(second, first))
    shown = [f"{value:+.3f}" if share else f"{100 * value:+.1f}%" for value in (mean, low, high)]
    row = [name, statistics.mean(first), statistics.mean(second), shown[0]]
    if len(first) < 2:
        return [*row, "none: one seed", "not visible"]
    return [*row, f"{shown[1]} to {shown[2]}", VERDICTS[judge(low, high, DIFFERENT)]]


def report(base: str, name: str, groups: dict[str, dict[int, FinishedRun]], args: Args) -> str:
    """The comparison of one group with the first, as text."""
    seeds = [seed for seed in groups[base] if seed in groups[name]]
    if not seeds:
        fail(f"{base} and {name}: no seed has a run in both")
    first, second = ([groups[group][seed] for seed in seeds] for group in (base, name))
    for run in first + second:
        if run.task != first[0].task:
            fail(f"{run.path}: was not evaluated on the problems of {first[0].path}")
    ends = {run.steps[-1]: run.path for run in first + second}
    if args.samples is None and len(ends) > 1:
        low, high = min(ends), max(ends)
        many = f"{ends[low]} ends after {low:,} samples, {ends[high]} after {high:,}"
        fail(f"{many}: other budgets; --samples {low} compares after as many")
    end = args.samples or max(ends)
    for run in first + second:
        if not run.steps[0] < end <= run.steps[-1]:
            fail(f"--samples {end:g}: {run.path} has values from {run.steps[0]:g} to {run.steps[-1]:g} samples")
    table = [cells(what, *values) for what, values in figures(first, second, end).items()]
    header = [args.tag, base, name, "difference", "95% interval", "verdict"]
    lines = [format_table(header, table), f"seeds in both: {', '.join(map(str, seeds))}"]
    if alone := sorted({*groups[base], *groups[name]} - {*seeds}):
        lines.append(f"seeds in one group only, left out: {', '.join(map(str, alone))}")
    if len(table) == 1:
        lines.append("fewer than three evaluations: no figure at equal seconds, no mean over samples (--eval-every)")
    if len(seeds) > 1:
        lines.append(f"an interval half as wide takes about {pairs_for_half(len(seeds))} more seeds in each group")
    else:
        lines.append("one seed: no interval; run more seeds")
    differ = differing(first[0].flags, second[0].flags)
    shown = [f"{as_flag(flag)} {values[0]} | {values[1]}" for flag, values in differ.items()]
    if first[0].source != second[0].source:
        shown.insert(0, f"{' '.join(first[0].scripts)} | {' '.join(second[0].scripts)}")
    lines.append(f"what differs: {'; '.join(shown) or 'neither flags nor script'}")
    return "\n".join(lines)


# ---- The picture -----------------------------------------------------------------------------------------------------


def check_plot(path: str) -> None:
    if Path(path).suffix not in PICTURES:
        fail(f"--plot {path}: must end in {', '.join(PICTURES)}")
    check_folder("--plot", str(Path(path).parent))
    try:
        import matplotlib
    except ImportError:
        fail("--plot: needs matplotlib: pip install matplotlib")
    matplotlib.use("Agg")


def draw(groups: dict[str, dict[int, FinishedRun]], tag: str, path: str) -> None:
    """Mean over the seeds of each group, and the range of its runs shaded: over samples, and over seconds."""
    import matplotlib.pyplot as plt

    figure, plots = plt.subplots(1, 2, figsize=(11, 4), constrained_layout=True, sharey=True)
    for axes, axis, label in zip(plots, ("steps", "seconds"), ("samples", "seconds of training"), strict=True):
        for name, runs in groups.items():
            curves = [(getattr(run, axis), run.values) for run in runs.values()]
            end = min(xs[-1] for xs, _ in curves)
            start = max(xs[0] for xs, _ in curves)
            xs = sorted({x for xs, _ in curves for x in xs if start <= x <= end})
            heights = [[at(*curve, x) for curve in curves] for x in xs]
            (line,) = axes.plot(xs, [*map(statistics.mean, heights)], label=f"{name} ({len(runs)} seeds)")
            axes.fill_between(xs, [*map(min, heights)], [*map(max, heights)], color=line.get_color(), alpha=0.2)
        axes.set(xlabel=label, xlim=(0, None))
        axes.grid(alpha=0.3)
    plots[0].set(ylabel=tag, title="mean and range of the seeds")
    plots[0].legend(frameon=False)
    with replacing(path) as new, new.open("wb") as file:
        figure.savefig(file, format=Path(path).suffix[1:], dpi=110)
    plt.close(figure)
    print(f"\nwrote {path}")


# ---- The command -----------------------------------------------------------------------------------------------------


def main(args: Args) -> None:
    if args.plot:
        check_plot(args.plot)
    groups = read_groups(args)
    base, *others = groups
    print("\n\n".join(report(base, name, groups, args) for name in others))
    if args.plot:
        draw(groups, args.tag, args.plot)


if __name__ == "__main__":
    start(main, Args)
