"""The task `arithmetic`: chains of additions and subtractions, such as "12+7-5=". Difficulty = number of operations.

A task is a file in tasks/. `--problems NAME` draws from its `draw_problem`, `train_sft.py --data NAME-demonstrations`
from its `demonstrations`. To make a task of your own, copy this file.
"""

import itertools
import random
import re

DIFFICULTIES = range(1, 7)


def draw_chain(rng: random.Random, difficulty: int) -> tuple[int, list[int]]:
    """A first operand (1-99) and `difficulty` signed operands (1-9); every running total is in 0-99."""
    first = total = rng.randint(1, 99)
    steps = []
    while len(steps) < difficulty:
        step = rng.choice((-1, 1)) * rng.randint(1, 9)
        if 0 <= total + step <= 99:
            steps.append(step)
            total += step
    return first, steps


def chain_question(first: int, steps: list[int]) -> str:
    return f"{first}{''.join(f'{step:+d}' for step in steps)}="


def draw_problem(rng: random.Random, difficulty: int) -> dict:
    """A row with the fields of a problem (see data.Problem)."""
    first, steps = draw_chain(rng, difficulty)
    question = chain_question(first, steps)
    topic = "add" if min(steps) > 0 else "subtract" if max(steps) < 0 else "mixed"
    answer = str(first + sum(steps))
    return {"question": question, "answer": answer, "id": question, "topic": topic, "difficulty": difficulty}


def running_totals(question: str) -> list[str]:
    """The total after each operation, as the thinking should list them."""
    return [str(total) for total in itertools.accumulate(map(int, re.findall(r"[+-]?[0-9]+", question)))][1:]


def steps_are_right(text: str, problem) -> bool:
    """Whether the thinking lists exactly the right running totals. A right answer after a wrong total is luck."""
    thinking, closed, _ = text.removeprefix("<think>").partition("</think>")
    return bool(closed) and thinking.split() == running_totals(problem.question)


def demonstrations(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """(question, completion) pairs by a sloppy teacher, for the SFT model that RL starts from.

    A good completion for "12+7-5=" is "<think>19 14</think><answer>14</answer>": the running totals, then the last one.
    The teacher gets one step in five wrong (and goes on from the wrong total) and leaves out a tag in one completion in
    five. It rarely shows chains longer than four operations, and then mostly drops their end. So the model learns the
    task and knows the right way, but does not prefer it: that is left for RL.
    """
    rng = random.Random(f"demonstrations {seed}")
    pairs = []
    while len(pairs) < count:
        difficulty = rng.choices(DIFFICULTIES, weights=(8, 10, 12, 14, 4, 4))[0]
        first, steps = draw_chain(rng, difficulty)
        shown = steps[:4] if difficulty > 4 and rng.random() < 0.65 else steps
        total, totals = first, []
        for step in shown:
            total += step
            if rng.random() < 0.2:
                total += rng.choice((-10, -2, -1, 1, 2, 10))
            total = min(max(total, 0), 99)
            totals.append(str(total))
        parts = ["<think>", " ".join(totals), "</think>", "<answer>", totals[-1], "</answer>"]
        if rng.random() < 0.2:
            del parts[rng.choice((0, 2, 3, 5))]
        pairs.append((chain_question(first, steps), "".join(parts)))
    return pairs
