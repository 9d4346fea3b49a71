"""Thinking grows where it pays: train_grpo.py on Countdown, its curves, and the trained policies' remaining errors.

    python benchmarks/thinking.py                                                # trains with seeds 1, 2, 3
    python benchmarks/thinking.py --runs runs/a runs/b --plot assets/countdown.png     # reports on existing runs

A try is an expression with its value in the thinking, such as 3+5-8=0. The second table has the shares of completions
that repeat a try, give one a wrong value, are cut by the length limit, or end with a wrong answer.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))

import common  # noqa: E402
from benchmarks.learning import curve, machine, new_figure, read_scalars, run_script, save_figure  # noqa: E402
from data import encode_problems, load_problems  # noqa: E402
from plumbing.evaluation import evaluate  # noqa: E402
from plumbing.statistics import format_table, summarize  # noqa: E402
from tasks.countdown import tries_in  # noqa: E402

FLAGS = "--model models/tiny-countdown --problems countdown --max-new-tokens 120 --iterations 150"
PANELS = {
    "eval/accuracy": "accuracy, sampled at temperature 1",
    "eval/length": "tokens in a completion",
    "eval/reflection_words": '"wait" in a completion',
}


@dataclass
class Args:
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])
    flags: str = FLAGS
    """flags for train_grpo.py"""
    runs: list[Path] = field(default_factory=list)
    """run directories to report on instead of training"""
    plot: Path | None = None
    """image file to write the curves to"""


def left_over(path: str, problems: str, count: int = 200, samples: int = 4) -> tuple[list, list[dict]]:
    """A row of the second table and the records behind it: held-out problems, sampled at temperature 1."""
    tokenizer = common.load_tokenizer(path)
    policy = common.load_policy(path, tokenizer)
    encoded = encode_problems(tokenizer, load_problems(problems, "eval", count), "", policy.config, 120)
    records = evaluate(policy, tokenizer, encoded, samples, 120)
    completions = [completion for record in records for completion in record["completions"]]
    tries = [tries_in(completion["text"]) for completion in completions]
    n, summary = len(completions), summarize(records)
    repeated = sum(len({expression for expression, _ in t}) < len(t) for t in tries) / n
    wrong = sum(any(not right for _, right in t) for t in tries) / n
    gave_up = sum(c["finished"] and not c["correct"] and c["answer"] is not None for c in completions) / n
    row = [summary["accuracy"], sum(map(len, tries)) / n, repeated, wrong, summary["truncated"], gave_up]
    return row, records


def plot(curves: list[tuple[str, dict]], path: Path) -> None:
    figure, plots = new_figure(PANELS.values())
    for axes, tag in zip(plots, PANELS, strict=True):
        for i, (name, scalars) in enumerate(curves):
            axes.plot(*curve(scalars, tag), color=f"C{i}", marker="o", label=name)
        if tag != "eval/accuracy":
            axes.autoscale(axis="y")
            axes.set_ylim(bottom=0)
    save_figure(figure, path)


def main(args: Args) -> None:
    runs = args.runs or [run_script("train_grpo.py", seed, args.flags)[0] for seed in args.seeds]
    curves, rows = [], []
    for run in runs:
        saved, scalars = json.loads((run / "args.json").read_text()), read_scalars(run)
        curves.append((f"seed {saved['seed']}", scalars))
        rows.append([curves[-1][0]])
        for tag in ("eval/accuracy", "eval/accuracy_greedy", "eval/pass_at_k"):
            values = curve(scalars, tag)[1]
            rows[-1] += [values[0], values[-1]]
        for tag in ("eval/length", "eval/reflection_words"):
            values = curve(scalars, tag)[1]
            rows[-1] += [values[0], max(values), values[-1]]
    print(f"train_grpo.py {args.flags}\n{machine()}\n")
    header = ["", "sampled", "after", "greedy", "after", "pass@4", "after"]
    print(format_table([*header, "length", "longest", "after", "waits", "most", "after"], rows))
    if args.plot:
        plot(curves, args.plot)
    common.resolve_device("cpu")  # left_over's
    first, rows = json.loads((runs[0] / "args.json").read_text())["model"], []
    examples = {}
    for problems in ("countdown", "countdown:4"):
        for name, path in (
            ("before", first),
            *((name, str(run / "final")) for (name, _), run in zip(curves, runs, strict=True)),
        ):
            row, records = left_over(path, problems)
            rows.append([f"{problems}, {name}", *row])
            if problems == "countdown":
                examples[name] = records
    header = ["held out", "accuracy", "tries", "repeated", "wrong sum", "cut", "wrong answer"]
    print(f"\n{format_table(header, rows)}\n")
    hard = min(
        range(len(examples["before"])), key=lambda i: sum(c["correct"] for c in examples["before"][i]["completions"])
    )
    for name, records in examples.items():
        print(f"{name}: {records[hard]['question']}  {records[hard]['completions'][0]['text']}")


if __name__ == "__main__":
    main(tyro.cli(Args))
