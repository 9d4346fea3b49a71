"""RLHF on the embedded model: a reward model from preference pairs, then PPO on its score instead of the verifiers',
once for each KL coefficient. The verifier's accuracy is measured all the same: where the score goes on rising and the
accuracy doesn't, the policy has found what the reward model gets wrong.

    python benchmarks/rlhf.py --plot assets/rlhf.png
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.learning import curve, machine, read_scalars, run_script  # noqa: E402
from plumbing.evaluation import format_table  # noqa: E402


@dataclass
class Args:
    kl_coefs: list[float] = field(default_factory=lambda: [0.0, 0.05])
    """weights of the KL to the start model in the reward"""
    flags: str = ""
    """more flags for train_ppo.py, in one string: "--flags=--iterations 100" (with the =)"""
    reward_model: Path | None = None
    """trained already; without it train_rm.py is run"""
    seed: int = 1
    plot: Path | None = None
    """write score and accuracy over completions to this picture"""


def smooth(values: tuple, width: int = 5) -> list[float]:
    """Means over `width` iterations, the last ones up to each."""
    return [sum(values[max(0, i - width + 1) : i + 1]) / min(width, i + 1) for i in range(len(values))]


def plot(runs: list[tuple[float, dict]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, plots = plt.subplots(1, len(runs), figsize=(11, 4), constrained_layout=True, squeeze=False)
    proxies = [smooth(curve(scalars, "reward/model")[1]) for _, scalars in runs]
    low, high = min(map(min, proxies)), max(map(max, proxies))
    for axes, (kl_coef, scalars), proxy in zip(plots[0], runs, proxies, strict=True):
        x, accuracy = curve(scalars, "reward/accuracy")
        axes.plot(x, smooth(accuracy), color="C0", label="accuracy, training batches (verifier)")
        axes.plot(*curve(scalars, "eval/accuracy"), "o", color="C0", label="accuracy, held out")
        axes.plot([], [], color="C1", label="reward model's score (right axis)")
        axes.set(title=f"--kl-coef {kl_coef:g}", xlabel="completions sampled", ylim=(0, 1.02), ylabel="accuracy")
        axes.grid(alpha=0.3)
        right = axes.twinx()
        right.plot(x, proxy, color="C1")
        right.set(ylim=(low - 0.05 * (high - low), high + 0.05 * (high - low)), ylabel="score")
    plots[0][0].legend(frameon=False, fontsize=8, loc="center right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    print(f"wrote {path}")


def main(args: Args) -> None:
    model = args.reward_model
    if model is None:
        run, *_ = run_script("train_rm.py", args.seed, "")
        scalars = read_scalars(run)
        print(f"reward model: held-out pair accuracy {scalars['eval/pair_accuracy'][-1][1]:.3f}")
        model = run / "final"
    rows, curves = [], []
    for kl_coef in args.kl_coefs:
        flags = f"--reward-model {model} --accuracy-weight 0 --format-weight 0 --kl-coef {kl_coef} {args.flags}"
        run, seconds, _ = run_script("train_ppo.py", args.seed, flags)
        scalars = read_scalars(run)
        curves.append((kl_coef, scalars))
        score, held_out = smooth(curve(scalars, "reward/model")[1]), curve(scalars, "eval/accuracy")[1]
        rows.append([f"--kl-coef {kl_coef:g}", seconds, score[0], score[-1], held_out[0], max(held_out), held_out[-1]])
        for tag in ("eval/accuracy_greedy", "eval/format", "eval/length"):
            values = curve(scalars, tag)[1]
            rows[-1] += [values[0], values[-1]]
    header = ["", "seconds", "score first", "last", "accuracy before", "best", "after"]
    header += ["greedy before", "after", "format before", "after", "length before", "after"]
    print(f"train_ppo.py --reward-model {args.flags}\n{machine()}\n\n{format_table(header, rows)}")
    if args.plot:
        plot(curves, args.plot)


if __name__ == "__main__":
    main(tyro.cli(Args))
