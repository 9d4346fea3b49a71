r"""Compares our verifier on real answers with the truth, with math-verify and with recorded verdicts. It prints every
disagreement. math-verify needs `pip install -r requirements-dev.txt`.

    python tests/tools/verifiers.py --gsm8k DIR --math500 FILE

GSM8K's files (train.jsonl, test.jsonl, and example_model_solutions.jsonl, with four models' solutions of each test
problem and whether they are right) are in https://github.com/openai/grade-school-math, MATH-500's test.jsonl in
https://huggingface.co/datasets/HuggingFaceH4/MATH-500.

GSM8K       each answer must be right in five notations, and any other answer wrong unless it is the same number
MATH-500    each problem's own solution must be right, and its answer in four notations; our verdicts on its own
            solution and on those of two other problems are compared with math-verify's
solutions   our verdicts on GSM8K's model solutions are compared with the file's is_correct
"""

import json
import sys
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from benchmarks.real_data import model_solutions  # noqa: E402
from data import placed_rows  # noqa: E402
from plumbing.answers import answers_match, extract_answer, last_boxed  # noqa: E402
from rewards import accuracy_reward  # noqa: E402


@dataclass
class Args:
    gsm8k: Path
    """directory with train.jsonl, test.jsonl and example_model_solutions.jsonl (or model_solutions.jsonl)"""
    math500: Path
    """MATH-500, as .jsonl or as one JSON list"""


class Tally:
    """Counts verdicts and prints each one that differs from the expected one."""

    def __init__(self, name: str):
        self.name, self.total, self.right, self.wrong = name, 0, 0, 0

    def check(self, verdict: bool, expected: bool, *what) -> None:
        self.total += 1
        self.right += verdict
        if verdict != expected:
            self.wrong += 1
            print(f"  {self.name}: {'right' if verdict else 'wrong'} by ours, the opposite is expected: {what!r}"[:400])

    def print(self) -> None:
        counts = f"{self.total:7} answers, {self.right:6} right, {self.wrong:3} verdicts differ"
        print(f"{self.name:48}{counts}, {1 - self.wrong / self.total:.2%} agree")


def writings(answer: str) -> list[str]:
    """The same number as five models would write it; answer: digits with or without commas."""
    plain = answer.replace(",", "")
    grouped = f"{int(plain):,}" if plain.lstrip("-").isdigit() else plain
    decimal = plain if "." in plain else f"{plain}.00"
    return [
        f"<think>so it is {plain}</think><answer>{plain}</answer>",
        f"The answer is $\\boxed{{{grouped}}}$.",
        f"They add up.\n#### {answer}",
        f"<answer>${decimal}</answer>",
        f"<think>1 + 1 = 2</think>\n**{grouped} dollars** is \\boxed{{{plain}\\text{{ dollars}}}}",
    ]


def gsm8k_answers(directory: Path) -> None:
    rows = [row for name in ("train", "test") for _, row in placed_rows(str(directory / f"{name}.jsonl"))]
    answers = [extract_answer(row["answer"]) for row in rows]
    own = Tally(f"GSM8K: {len(answers)} answers in five writings")
    for answer in answers:
        for text in writings(answer):
            own.check(accuracy_reward(text, answer) == 1.0, True, text, answer)
    own.print()
    distinct = sorted(set(answers))
    value = {answer: Decimal(answer.replace(",", "")) for answer in distinct}
    other = Tally(f"GSM8K: every pair of its {len(distinct)} different answers")
    for i, a in enumerate(distinct):
        for b in distinct[i + 1 :]:
            other.check(answers_match(a, b), value[a] == value[b], a, b)
    other.print()


def gsm8k_solutions(directory: Path) -> None:
    tally = Tally("GSM8K: models' solutions against is_correct")
    for record in model_solutions(directory):
        for solution in record["completions"]:
            right = accuracy_reward(solution["text"], record["answer"]) == 1.0
            tally.check(right, solution["correct"], solution["text"][-80:], record["answer"])
    tally.print()


def math_verify_says(solution: str, answer: str) -> bool:
    from math_verify import parse, verify

    return verify(parse(f"${answer}$"), parse(solution))


def math500(path: Path) -> None:
    text = path.read_text()
    rows = json.loads(text) if text.startswith("[") else [row for _, row in placed_rows(str(path))]
    own, written = Tally("MATH-500: own worked solution"), Tally("MATH-500: own answer in four writings")
    library, others = Tally("MATH-500: own solution, ours : math-verify"), Tally("MATH-500: two others' : math-verify")
    for i, row in enumerate(rows):
        answer, solution = row["answer"], row["solution"]
        right = accuracy_reward(solution, answer) == 1.0
        own.check(right, True, last_boxed(solution), answer)
        library.check(right, math_verify_says(solution, answer), last_boxed(solution), answer)
        texts = f"<answer>{answer}</answer>", f"so \\[\\boxed{{{answer}}}\\]", f"<answer>$ {answer} $.</answer>"
        for text in (*texts, f"\\boxed{{{answer}}}".replace("\\frac", "\\dfrac")):
            written.check(accuracy_reward(text, answer) == 1.0, True, text, answer)
        for step in (1, 7):
            other = rows[(i + step) % len(rows)]["solution"]
            verdict = accuracy_reward(other, answer) == 1.0
            others.check(verdict, math_verify_says(other, answer), last_boxed(other), answer)
    for tally in (own, written, library, others):
        tally.print()


if __name__ == "__main__":
    args = tyro.cli(Args)
    gsm8k_answers(args.gsm8k)
    gsm8k_solutions(args.gsm8k)
    math500(args.math500)
