"""Accuracy against the thinking budget of a model that thinks when it is told /think (recipes/qwen3.sh makes one).

    python benchmarks/think_budget.py --model DIR --budgets 1 5 9 13 17 --plot assets/think_budget.png

At the budget the stop sentence closes the think block and the model goes on to its answer (evaluate.py --think-budget).
Beside it /no_think, and /think without a budget.
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import tyro
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))

import common  # noqa: E402
from benchmarks.learning import machine, new_figure, save_figure  # noqa: E402
from data import encode_problems, load_problems  # noqa: E402
from evaluate import interval, sample_within_budget, stop_ids  # noqa: E402
from plumbing.evaluation import evaluate, format_table, summarize  # noqa: E402
from plumbing.flags import SYSTEM_PROMPT, fail  # noqa: E402


@dataclass
class Args:
    model: str
    problems: str = "arithmetic"
    budgets: tuple[int, ...] = (1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21)
    """tokens"""
    eval_problems: int = 500
    num_samples: int = 2
    max_new_tokens: int = 40
    """after the budget"""
    stop_sentence: str = "</think>"
    seed: int = 0
    plot: Path | None = None


def main(args: Args) -> None:
    if min(args.budgets) < 1:
        fail(f"--budgets {min(args.budgets)}: must be 1 or more")
    tokenizer, device = common.load_tokenizer(args.model), common.resolve_device("auto")
    policy = common.load_policy(args.model, device, common.resolve_dtype("auto", device), tokenizer.eos_token_id)
    problems = load_problems(args.problems, "eval", args.eval_problems)

    def measure(mode: str, budget: int | None) -> tuple:
        room, sample = args.max_new_tokens, common.sample_groups
        if budget:
            room += budget + len(stop_ids(tokenizer, args.stop_sentence))
            options = {"tokenizer": tokenizer, "budget": budget, "stop_sentence": args.stop_sentence}
            sample = partial(sample_within_budget, **options)
        encoded = encode_problems(tokenizer, problems, SYSTEM_PROMPT, policy.config, room, mode=mode)
        limits = args.num_samples, args.max_new_tokens
        summary = summarize(evaluate(policy, tokenizer, encoded, *limits, seed=args.seed, sample=sample))
        return summary["accuracy"], interval(summary["accuracy"], len(problems)), summary["length"], summary["format"]

    cases = [("/no_think", "no_think", None)]
    cases += [(f"/think, at most {budget}", "think", budget) for budget in args.budgets]
    cases.append(("/think", "think", None))
    measured = {name: measure(mode, budget) for name, mode, budget in tqdm(cases)}
    rows = [
        [name, accuracy, "{:.3f}-{:.3f}".format(*ends), length, form]
        for name, (accuracy, ends, length, form) in measured.items()
    ]
    print(f"{args.model}, {args.problems}, T=1\n{machine()}\n")
    print(format_table(["thinking budget, tokens", "accuracy", "95% interval", "length", "format"], rows))
    if args.plot:
        budgets = [measured[f"/think, at most {budget}"] for budget in args.budgets]
        figure, (axes,) = new_figure(["Held-out accuracy, sampled at temperature 1"])
        low, high = zip(*(ends for _, ends, _, _ in budgets), strict=True)
        axes.fill_between(args.budgets, low, high, alpha=0.2)
        axes.plot(args.budgets, [accuracy for accuracy, *_ in budgets], marker="o", label="/think with a budget")
        for name, style in (("/think", "--"), ("/no_think", ":")):
            axes.axhline(measured[name][0], linestyle=style, color="gray", label=name)
        axes.set(xlabel="thinking budget, tokens", ylabel="accuracy", ylim=(0, 1.02))
        axes.legend()
        save_figure(figure, args.plot)


if __name__ == "__main__":
    main(tyro.cli(Args))
