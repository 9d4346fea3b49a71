"""Runs hostile completions through every verifier and reward: counts exceptions, times calls, watches memory.

    python tests/tools/hostile.py                # 100,000 strings, a few minutes

A policy learns to write whatever is rewarded, so rewards must expect adversarial text. The generated strings mix tags,
boxes, numbers, LaTeX, Unicode digits, right-to-left marks, lone surrogates, huge exponents, NUL and patterns that make
backtracking regular expressions slow. Most are short; one in a hundred has up to a million characters.
"""

import random
import resource
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import tyro
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from benchmarks.learning import machine  # noqa: E402
from plumbing.answers import answers_match, extract_answer  # noqa: E402
from plumbing.statistics import format_table  # noqa: E402
from rewards import accuracy_reward, format_reward, language_reward  # noqa: E402

TAGS = ["<think>", "</think>", "<answer>", "</answer>", "####", "#### ", r"\boxed{", r"\fbox {", "}", "{", "<", "</"]
NUMBERS = ["0", "9", "18", "1,000", "1e999", "1e-999", "9" * 50, "0." + "3" * 40, "1/0", "-", "+", ".", ",", "%", "$"]
LATEX = [r"\frac{", r"\frac12", r"\sqrt{", "^{", "^", "_", r"\left(", r"\right)", r"\text{", r"\pm", r"\int", r"\sum"]
LATEX += r"\binom{ \infty \begin{pmatrix} \end{pmatrix} & \\ ! ( ) [ ] | = x".split()
UNICODE = "٣ ๑ ² ½ Ⅷ ∞ \u202e \u200f \u200b \ufeff \u2212 \ud800 😀 e\u0301 世".split()
OTHER = ["\0", "\n", "\r", "\t", " ", "\x1b[2J", "\u2028", "a", "eggs", "nan", "inf", " or "]
OTHER += ["__import__('os')", "lambda:"]
FRAGMENTS = TAGS * 2 + NUMBERS + LATEX + UNICODE + OTHER
GOLDS = [
    "18",
    "-3",
    "1/2",
    "0.5",
    r"\frac{3}{4}",
    "x+1",
    r"\sqrt{2}",
    "(1, 2)",
    "nan",
    "",
    "A",
    "10^{10}",
    r"[0, \infty)",
]


@dataclass
class Args:
    strings: int = 100_000
    seed: int = 0
    long_share: float = 0.01
    """share of strings with up to a million characters"""


def hostile_string(rng: random.Random, long: bool) -> str:
    kind = rng.randrange(4)
    if kind == 0:  # one piece repeated: nesting, and patterns on which regular expressions backtrack
        piece = "".join(rng.choices(FRAGMENTS, k=rng.randint(1, 3)))
        limit = 1_000_000 if long else 60
        return piece * rng.randint(1, max(1, limit // len(piece))) + rng.choice(FRAGMENTS)
    text = "".join(rng.choices(FRAGMENTS, k=rng.randint(0, 200_000 if long else 25)))
    if kind == 1:  # any code points
        return "".join(chr(rng.randrange(0x110000)) for _ in range(rng.randint(0, 20))) + text
    if kind == 2:  # nearly the right format
        return f"<think>{text}</think><answer>{''.join(rng.choices(FRAGMENTS, k=rng.randint(0, 6)))}</answer>"
    return text


def resident_mb() -> float:
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * resource.getpagesize() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


def main(args: Args) -> None:
    rng = random.Random(args.seed)
    seconds, slowest, errors = defaultdict(float), defaultdict(float), []
    after_tenth = 0.0
    for i in tqdm(range(args.strings)):
        text, gold = hostile_string(rng, rng.random() < args.long_share), rng.choice(GOLDS)
        calls = {
            "extract_answer": lambda text=text: extract_answer(text),
            "answers_match": lambda text=text, gold=gold: answers_match(text, gold),
            "accuracy_reward": lambda text=text, gold=gold: accuracy_reward(text, gold),
            "format_reward, answer-tags": lambda text=text: format_reward(text),
            "format_reward, think": lambda text=text: format_reward(text, "think"),
            "language_reward, en": lambda text=text: language_reward(text, "en"),
            "language_reward, ja": lambda text=text: language_reward(text, "ja"),
        }
        for name, call in calls.items():
            start = time.perf_counter()
            try:
                call()
            except Exception as error:
                errors.append(f"{name}({text[:80]!r}): {type(error).__name__}: {error}")
            taken = time.perf_counter() - start
            seconds[name] += taken
            slowest[name] = max(slowest[name], taken)
        if i + 1 == max(1, args.strings // 10):
            after_tenth = resident_mb()
    failed = {name: sum(error.startswith(f"{name}(") for error in errors) for name in seconds}
    rows = [[name, failed[name], f"{seconds[name]:.1f}", f"{slowest[name]:.3f}"] for name in seconds]
    print(f"{machine()}\n{args.strings} strings, seed {args.seed}\n")
    print(format_table(["", "exceptions", "seconds in all", "slowest call"], rows))
    print(f"memory: {after_tenth:.0f} MB after a tenth of the strings, {resident_mb():.0f} MB at the end")
    for error in errors[:20]:
        print(error)


if __name__ == "__main__":
    main(tyro.cli(Args))
