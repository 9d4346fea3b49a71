"""What is the critic for? PPO, whose critic values every token, against GRPO, whose baseline is one number for a whole
completion, on the longest chains only (5 and 6 operations), at the same budget and without a KL.

    python benchmarks/long_chains.py --plot assets/long_chains.png
"""

import json
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.learning import curve, machine, new_figure, read_scalars, run_script, save_figure  # noqa: E402
from data import load_problems  # noqa: E402
from plumbing.evaluation import format_table  # noqa: E402

RUNS = (
    ("train_ppo.py", "--kl-coef 0"),
    ("train_grpo.py", "--learning-rate 2e-4"),
    ("train_grpo.py", "--learning-rate 5e-5 --update-epochs 4 --minibatch-size 64"),  # PPO's updates, without a critic
)


@dataclass
class Args:
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])
    iterations: int = 100
    min_difficulty: int = 5
    """operations of the shortest chain"""
    plot: Path | None = None
    """write accuracy and length over completions to this picture"""


def plot(runs: list[tuple[str, dict]], path: Path) -> None:
    figure, (left, right) = new_figure(("held-out accuracy, sampled at temperature 1", "length in training, tokens"))
    for i, (name, scalars) in enumerate(runs):
        names = [other for other, _ in runs]
        color, label = f"C{list(dict.fromkeys(names)).index(name)}", name if names.index(name) == i else None
        left.plot(*curve(scalars, "eval/accuracy"), color=color, marker="o", label=label)
        right.plot(*curve(scalars, "rollout/length_mean"), color=color, alpha=0.7, label=label)
    right.set_ylim(bottom=10, top=25)
    save_figure(figure, path)


def main(args: Args) -> None:
    problems = [p for p in load_problems("arithmetic", "all", 6000) if p.difficulty >= args.min_difficulty]
    rows, runs = [], []
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "long-chains.jsonl"
        lines = [{"question": p.question, "answer": p.answer, "difficulty": p.difficulty} for p in problems]
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        for script, flags in RUNS:
            for seed in args.seeds:
                more = f"--problems {file} --iterations {args.iterations} {flags}"
                run, seconds, _ = run_script(script, seed, more)
                runs.append((f"{script} {flags}", read_scalars(run)))
                row = [f"{script} {flags} seed {seed}", seconds]
                for tag in ("eval/accuracy", "eval/accuracy_greedy", "eval/length", "rollout/length_right"):
                    values = curve(runs[-1][1], tag)[1]
                    row += [values[0], values[-1]]
                rows.append(row + [curve(runs[-1][1], "reward/frac_all_wrong")[1][0]])
    header = ["", "seconds", "sampled before", "after", "greedy before", "after", "length before", "after"]
    header += ["of right ones first", "last", "groups all wrong, first"]
    print(f"{len(problems)} problems, {args.iterations} iterations\n{machine()}\n\n{format_table(header, rows)}")
    if args.plot:
        plot(runs, args.plot)


if __name__ == "__main__":
    main(tyro.cli(Args))
