"""Does GRPO's mean over each sequence make wrong completions longer? The same run with `--loss-norm sequence` and with
`--loss-norm constant` (Dr. GRPO, arXiv:2503.20783), same seed.

    python benchmarks/length_bias.py --plot assets/length_bias.png

Dividing by the length makes a long wrong completion cost less per token than a short one, so it is said that what looks
like thinking longer is partly this bias. Lengths are of the sampled completions of each iteration, the mean of a tenth
of the run in the table.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.learning import curve, machine, new_figure, read_scalars, run_script, save_figure  # noqa: E402
from plumbing.evaluation import format_table  # noqa: E402


@dataclass
class Args:
    seed: int = 1
    flags: str = ""
    """more flags for train_grpo.py, in one string: "--flags=--iterations 100" (with the =)"""
    plot: Path | None = None


def main(args: Args) -> None:
    runs, rows = {}, []
    for norm in ("sequence", "constant"):
        run, _, _ = run_script("train_grpo.py", args.seed, f"--loss-norm {norm} {args.flags}")
        runs[norm] = scalars = read_scalars(run)
        rows.append([norm])
        for tag in ("rollout/length_right", "rollout/length_wrong", "reward/accuracy"):
            values = [value for _, value in scalars[tag]]
            part = max(1, len(values) // 10)
            rows[-1] += [sum(values[:part]) / part, sum(values[-part:]) / part]
        words = scalars["eval/reflection_words"]
        rows[-1] += [words[0][1], words[-1][1]]
    print(f"train_grpo.py --seed {args.seed} {args.flags}\n{machine()}\n")
    header = ["--loss-norm", "length right, first tenth", "last", "length wrong, first", "last"]
    header += ["accuracy, first", "last"]
    print(format_table([*header, "reflection words before", "after"], rows))
    if args.plot:
        figure, (lengths, accuracy) = new_figure(["Length of sampled completions, tokens", "Accuracy of them"])
        for norm, color in zip(runs, ("C0", "C1"), strict=True):
            for kind, style in (("right", "-"), ("wrong", ":")):
                lengths.plot(*curve(runs[norm], f"rollout/length_{kind}"), style, color=color, label=f"{norm}, {kind}")
            accuracy.plot(*curve(runs[norm], "reward/accuracy"), color=color, label=norm)
        lengths.autoscale(axis="y")
        lengths.set_ylim(bottom=0)
        save_figure(figure, args.plot)


if __name__ == "__main__":
    main(tyro.cli(Args))
