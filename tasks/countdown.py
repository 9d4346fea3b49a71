"""The task `countdown`: reach a target with all of the given numbers, as in "3,5,8=16". Difficulty = count of numbers.

Many answers are right, so the task brings its own verifier, `is_right`. The embedded model models/tiny-countdown was
trained on its `demonstrations`.
"""

import itertools
import random
import re
from fractions import Fraction

from plumbing.answers import extract_answer

DIFFICULTIES = (3,)
WAIT = ("wait", "等一下")  # the teacher's word before another try, in two languages
MAX_CHARS, MAX_DEPTH = 200, 10  # limits of an expression: its length, and its nested brackets


def signed_sums(numbers: list[int]) -> list[tuple[str, int]]:
    """Every way to add and subtract all the numbers, with its value: ("3+5-8", 0), ... The first term is added."""
    found = []
    for signs in itertools.product("+-", repeat=len(numbers)):
        if "+" in signs:
            terms = [sign + str(number) for sign, number in zip(signs, numbers, strict=True)]
            terms.insert(0, terms.pop(signs.index("+")))
            found.append(("".join(terms)[1:], sum(map(int, terms))))
    return found


def draw_numbers(rng: random.Random, count: int) -> tuple[list[int], int]:
    """Distinct numbers from 1 to 19, sorted, and a target above 0 that adding and subtracting them can reach."""
    while True:
        numbers = sorted(rng.sample(range(1, 20), count))
        target = sum(rng.choice((-1, 1)) * number for number in numbers)
        if target > 0:
            return numbers, target


def question(numbers: list[int], target: int) -> str:
    """The question's text. Sorted numbers give each problem one text, so that it can't be in both splits."""
    return f"{','.join(map(str, sorted(numbers)))}={target}"


def draw_problem(rng: random.Random, difficulty: int) -> dict:
    """A row with the fields of a problem (see data.Problem). It has no answer: `is_right` decides."""
    numbers, target = draw_numbers(rng, difficulty)
    text, columns = question(numbers, target), {"nums": numbers, "target": target}
    return {"question": text, "answer": "", "id": text, "difficulty": difficulty, "columns": columns}


def complete_row(row: dict) -> dict:
    """Checks a row's `nums` and `target` (else ValueError). Adds its question and difficulty if it has none."""
    numbers, target = row.get("nums"), row.get("target")
    if row.get("answer") is not None:
        raise ValueError("fields 'answer' and 'nums': a row can have only one of them")
    if not isinstance(numbers, list) or not numbers or any(type(n) is not int or not 0 <= n < 1e9 for n in numbers):
        raise ValueError(f"field 'nums' is {str(numbers)[:80]}, a list of integers from 0 is expected")
    if type(target) is not int or abs(target) >= 1e9:
        raise ValueError(f"field 'target' is {str(target)[:80]}, an integer is expected")
    named = any(row.get(name) is not None for name in ("question", "prompt", "problem", "messages"))
    return {"difficulty": len(numbers)} | row | ({} if named else {"question": question(numbers, target)})


# ---- The verifier --------------------------------------------------------------------------------------------------


def is_right(text: str, problem) -> bool:
    """Whether a completion's answer is an expression that uses each number once and equals the target exactly."""
    try:
        value, numbers = read_expression(extract_answer(text) or "")
    except (ValueError, ZeroDivisionError):
        return False
    return value == problem.columns["target"] and sorted(numbers) == sorted(problem.columns["nums"])


def read_expression(text: str) -> tuple[Fraction, list[int]]:
    """The exact value of an expression and the numbers in it, by recursive descent:

        sum = "-"? product (("+" | "-") product)*;  product = factor (("*" | "/") factor)*
        factor = number | "(" sum ")"

    Nothing is evaluated as code. Raises ValueError for any other text, and ZeroDivisionError.
    """
    if len(text) > MAX_CHARS:
        raise ValueError("too long")
    tokens = [*re.findall(r"[0-9]+|\S", text), "end"]
    numbers: list[int] = []

    def sum_(depth: int) -> Fraction:
        value = -product(depth) if tokens[0] == "-" and tokens.pop(0) else product(depth)
        while tokens[0] in ("+", "-"):
            value = value + product(depth) if tokens.pop(0) == "+" else value - product(depth)
        return value

    def product(depth: int) -> Fraction:
        value = factor(depth)
        while tokens[0] in ("*", "/"):
            value = value * factor(depth) if tokens.pop(0) == "*" else value / factor(depth)
        return value

    def factor(depth: int) -> Fraction:
        token = tokens.pop(0)
        if token == "(" and depth < MAX_DEPTH:
            value = sum_(depth + 1)
            if tokens.pop(0) != ")":
                raise ValueError("a bracket is not closed")
            return value
        if not re.fullmatch("[0-9]+", token):
            raise ValueError(f"{token} where a number is expected")
        numbers.append(int(token))
        return Fraction(numbers[-1])

    value = sum_(0)
    if tokens != ["end"]:
        raise ValueError(f"{tokens[0]} where the expression should end")
    return value, numbers


def tries_in(text: str) -> list[tuple[str, bool]]:
    """The tries in a completion's thinking, such as 3+5-8=0: each expression, and whether its value is right."""
    tries = []
    for expression, value in re.findall(r"(-?[0-9(][-+*/() 0-9]*)=\s*(-?[0-9]{1,9})", text.partition("</think>")[0]):
        try:
            tries.append((expression.strip(), read_expression(expression)[0] == int(value)))
        except (ValueError, ZeroDivisionError):
            tries.append((expression.strip(), False))
    return tries


def steps_are_right(text: str, problem) -> bool:
    """Whether the thinking has at least one try, and states the right value of each."""
    tries = tries_in(text)
    return "</think>" in text and bool(tries) and all(right for _, right in tries)


# ---- The teacher ---------------------------------------------------------------------------------------------------


def demonstrations(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """(question, completion) pairs by a teacher that searches by trying, and gives up too early.

        3,5,8=16  ->  <think>3+5-8=0 wait 3-5+8=6 wait 3+5+8=16</think><answer>3+5+8</answer>

    It tries sums in a random order. After a wrong one it gives up half of the time, and answers with it. It leaves out
    a tag one time in ten. One time in four it says "wait" in Chinese. So the model knows how to search but lacks
    persistence: that is left for RL.
    """
    rng = random.Random(f"demonstrations {seed}")
    pairs = []
    for _ in range(count):
        numbers, target = draw_numbers(rng, rng.choice(DIFFICULTIES))
        tries, wait = [], WAIT[rng.random() < 0.25]
        for expression, value in rng.sample(signed_sums(numbers), 2 ** len(numbers) - 1):
            tries.append(f"{expression}={value}")
            if value == target or rng.random() < 0.5:
                break
        parts = ["<think>", f" {wait} ".join(tries), "</think>", "<answer>", expression, "</answer>"]
        if rng.random() < 0.1:
            del parts[rng.choice((0, 2, 3, 5))]
        pairs.append((question(numbers, target), "".join(parts)))
    return pairs
