"""train_grpo.py on arithmetic with a reward for the process instead of the outcome: the share of the running totals in
the thinking that are right, up to the first wrong one. Evaluations count answers, as ever.

    python claims/process_reward.py --iterations 60          # flags as train_grpo.py's
"""

import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import train_grpo  # noqa: E402
from data import Problem  # noqa: E402
from plumbing.flags import parse_args  # noqa: E402
from tasks.arithmetic import running_totals  # noqa: E402


def process_reward(text: str, problem: Problem) -> float:
    """Right totals before the first wrong one / operations; 0 if there are more totals than operations, so that writing
    on never pays."""
    totals = running_totals(problem.question)
    written = text.removeprefix("<think>").partition("</think>")[0].split()
    right = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(written, totals, strict=False))
    return len(list(right)) / len(totals) if len(written) <= len(totals) else 0.0


def main() -> None:
    by_rules = train_grpo.score_completions

    def score_completions(texts, problems, rollout, *rest):
        process = [process_reward(text, problems[i // rollout.group_size]) for i, text in enumerate(texts)]
        return by_rules(texts, problems, rollout, *rest) | {"accuracy": process}

    train_grpo.score_completions = score_completions
    train_grpo.main(parse_args(train_grpo.Args))


if __name__ == "__main__":
    main()
