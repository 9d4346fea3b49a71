"""Curation: filters problems, and makes demonstrations or pairs from a samples file (written by evaluate.py --output).

    python curate.py --samples samples.jsonl --output problems.jsonl     # problems with a pass rate from 0.01 to 0.99
    python curate.py --samples samples.jsonl --make correct --output demonstrations.jsonl        # rejection sampling
    python curate.py --problems gsm8k.jsonl --remove-duplicates --decontaminate math500.jsonl --output clean.jsonl

Prints how many problems each filter dropped.
"""

import random
import re
from collections import Counter
from dataclasses import dataclass, replace
from typing import Annotated, Literal

from data import (
    MODES,
    Demonstration,
    Problem,
    add_mode,
    chosen_samples,
    counts_as_right,
    demonstrations_from,
    is_correct,
    load_problems,
    load_task,
    prompt_value,
    read_problems,
    read_samples,
    verifier_of,
)
from plumbing.answers import extract_answer, plain_unicode
from plumbing.files import write_jsonl
from plumbing.flags import AtLeast1, Range, Share, check_output, fail, start
from plumbing.pairs import balance, listed
from plumbing.rows import can_match, is_undivided, placed_rows
from rewards import verifier_prompt

PAIRS = "shorter", "verifier"  # the values of --make that make pairs

# ---- Demonstrations ------------------------------------------------------------------------------------------------

EMPTY_THINKING = "<think>\n\n</think>\n\n"


def in_mode(problem: Problem, mode: str | None) -> Problem:
    question, messages = add_mode(problem.question, problem.messages, mode)
    return replace(problem, question=question, messages=messages)


def fuse_modes(records: list[dict], keep: str = "correct") -> list[Demonstration]:
    """Demonstrations of both thinking modes (Qwen3, arXiv:2505.09388, section 4.3) from samples with thinking: the
    sample as it is, and the sample with an empty think block."""
    demonstrations = []
    for record in records:
        for text in chosen_samples(record, keep):
            _, closed, answer = text.partition("</think>")
            if closed and answer.strip():
                without = EMPTY_THINKING + answer.lstrip()
                for mode, completion in zip(MODES, (text, without), strict=True):
                    question, messages = add_mode(record["question"], record["messages"], mode)
                    demonstrations.append(Demonstration(question, completion, messages))
    return demonstrations


# ---- Pairs, for train_dpo.py and train_rm.py -----------------------------------------------------------------------


def shorter_pairs(records: list[dict]) -> list[dict]:
    """One pair per problem: the shortest right completion is chosen, the longest right one rejected. So the preference
    is about length only, not about being right."""
    rows = []
    for record in records:
        question, messages = add_mode(record["question"], record["messages"], record.get("mode"))
        right = sorted((c for c in record["completions"] if counts_as_right(c)), key=text_length)
        if right and text_length(right[0]) < text_length(right[-1]):
            prompt = prompt_value(question, messages)
            rows.append({"prompt": prompt, "chosen": right[0]["text"], "rejected": right[-1]["text"]})
    return rows


def text_length(completion: dict) -> int:
    return completion.get("length", len(completion["text"]))


def verifier_pairs(records: list[dict], problems: dict[str, Problem]) -> list[dict]:
    """Pairs to train a verifier model on (--verifier-model, a reward model). The prompt has question and reference
    answer; a right answer is chosen, a wrong one rejected. Right answers are used in every form that was sampled.
    problems: by question."""
    rows = []
    for record in records:
        problem = problems[record["question"]]
        if not problem.answer:  # judged by its task
            continue
        answers: dict[bool, dict] = {True: {}, False: {}}  # dicts, because they keep the order
        for completion in record["completions"]:
            if answer := extract_answer(completion["text"]):
                answers[is_correct(completion)][answer] = None
        right = list(answers[True]) or [problem.answer]
        for i, wrong in enumerate(answers[False]):
            rows.append({"prompt": verifier_prompt(problem), "chosen": right[i % len(right)], "rejected": wrong})
    return rows


# ---- Filters: each returns the problems that it keeps, and counts the others by reason in `dropped` ----------------


def pass_rates(records: list[dict], source: str, problems: list[Problem]) -> dict[str, float]:
    """The share of right completions by question. An error if the samples are of other problems."""
    tried, right = Counter(), Counter()
    for record in records:
        tried[record["question"]] += sum(c.get("correct", True) is not None for c in record["completions"])
        right[record["question"]] += sum(map(counts_as_right, record["completions"]))
    rates = {question: right[question] / count for question, count in tried.items() if count}
    if not any(problem.question in rates for problem in problems):
        asked = next(iter(rates), "")
        fail(f"{source}: samples of other problems: it asks {asked[:60]!r}, not {problems[0].question[:60]!r}")
    return rates


def keep_pass_rates(problems: list[Problem], rates: dict, low: float, high: float, dropped: Counter) -> list[Problem]:
    """Keeps problems whose pass rate is from low to high, and stores it in them. A problem that is always solved, or
    never, gives no group with right and wrong completions, so it teaches nothing (Kimi K1.5, arXiv:2501.12599, section
    2.1, keeps problems that are hard for the model)."""
    kept = []
    for problem in problems:
        rate = rates.get(problem.question)
        if rate is not None and low <= rate <= high:
            kept.append(replace(problem, pass_rate=round(rate, 4)))
        else:
            dropped["not sampled" if rate is None else f"pass rate {'under' if rate < low else 'over'} the band"] += 1
    return kept


def label_difficulty(problems: list[Problem], rates: dict) -> list[Problem]:
    """difficulty = 1 - pass rate, for --problem-sampling curriculum."""
    return [replace(p, difficulty=round(1 - rates[p.question], 4)) if p.question in rates else p for p in problems]


def drop_lucky_guesses(problems: list[Problem], rates: dict, dropped: Counter) -> list[Problem]:
    """Drops problems that the model solved without reasoning in any of its tries: they can be guessed (Kimi K1.5,
    section 2.1)."""
    kept = [problem for problem in problems if not rates.get(problem.question, 0.0) > 0]
    dropped["right without reasoning"] += len(problems) - len(kept)
    return kept


def drop_unverifiable(problems: list[Problem], dropped: Counter) -> list[Problem]:
    """Drops problems whose gold answer the rules can't compare (see can_match)."""
    kept = [problem for problem in problems if verifier_of(problem.task) or can_match(problem.answer)]
    if len(kept) < len(problems):
        dropped["gold answer can't be verified"] = len(problems) - len(kept)
    return kept


def drop_wrong_steps(records: list[dict], problems: dict[str, Problem], source: str, dropped: Counter) -> list[dict]:
    """Drops completions that are right by luck, with a right answer after a wrong step, and returns the records with
    the others. The problem's task checks the steps. problems: by question."""
    kept, checked = [], False
    for record in records:
        problem, completions = problems[record["question"]], record["completions"]
        if is_sound := getattr(load_task(problem.task), "steps_are_right", None):
            checked = True
            completions = [c for c in completions if not counts_as_right(c) or is_sound(c["text"], problem)]
            dropped["right answers after a wrong step"] += len(record["completions"]) - len(completions)
        kept.append(record | {"completions": completions})
    if not checked:
        fail(f"--right-steps: {source} has no problem of a task with steps_are_right, such as tasks/arithmetic.py")
    return kept


OPTION = re.compile(r"(?:^|[\s({])\(?([A-Ea-e])[).:]", re.MULTILINE)


def drop_multiple_choice(problems: list[Problem], dropped: Counter) -> list[Problem]:
    """Drops questions whose answer can be guessed from a short list (Kimi K1.5, section 2.1): the question has options
    A, B, ... and the answer is a letter, or the answer is true, false, yes or no."""
    kept = []
    for problem in problems:
        text, answer = problem.question, problem.answer.lower().strip(" .(")
        if answer in ("true", "false", "yes", "no"):
            dropped["true or false"] += 1
        elif re.match(r"[a-e]\b", answer) and {"a", "b"} <= {o.lower() for o in OPTION.findall(text)}:
            dropped["multiple choice"] += 1
        else:
            kept.append(problem)
    return kept


def tokens_of(text: str) -> list[str]:
    """Lower-case words, numbers, and each other sign by itself."""
    return re.findall(r"\w+|[^\w\s]", text.lower())


def ngrams(tokens: list[str], n: int) -> set[tuple[str, ...]]:
    return {tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)}


def decontaminate(problems: list[Problem], held_out: list[Problem], n: int, dropped: Counter) -> list[Problem]:
    """Drops problems that share n consecutive words with a held-out question. A held-out question with fewer than n
    words drops problems equal to it and, if it has at least 8 words and signs, problems that contain it. Shorter ones
    occur in other problems by chance."""
    long, short = set(), set()
    for question in (plain_unicode(p.question) for p in held_out):
        words = re.findall(r"\w+", question.lower())
        if len(words) >= n:
            long |= ngrams(words, n)
        else:
            short.add(tuple(tokens_of(question)))
    lengths = {len(question) for question in short if len(question) >= 8}
    kept = []
    for problem in problems:
        text = plain_unicode(problem.question)
        tokens, shared = tokens_of(text), ngrams(re.findall(r"\w+", text.lower()), n) & long
        if shared or tuple(tokens) in short or any(ngrams(tokens, length) & short for length in lengths):
            dropped[f"{n}-gram of a held-out question"] += 1
        else:
            kept.append(problem)
    return kept


def drop_duplicates(problems: list[Problem], near: float, dropped: Counter) -> list[Problem]:
    """Keeps the first of equal questions (ignoring case, spacing and sentence punctuation) and of near duplicates: the
    same numbers, and a Jaccard similarity of their triples of words and signs of at least `near`."""
    kept, seen, triples, index = [], set(), [], {}
    for problem in problems:
        text = plain_unicode(problem.question)
        tokens = tokens_of(re.sub(r'[.,;:?"]+(?=\s|$)', " ", text))
        if tuple(tokens) in seen:
            dropped["duplicate"] += 1
            continue
        seen.add(tuple(tokens))
        mine = ngrams(tokens, 3) or {tuple(tokens)}
        numbers = tuple(re.findall(r"\d+(?:[.,:]\d+)*", text))
        shared = Counter(other for gram in mine for other in index.get((numbers, gram), ()))
        if any(count >= near * (len(mine) + len(triples[other]) - count) for other, count in shared.items()):
            dropped["near duplicate"] += 1
            continue
        for gram in mine:
            index.setdefault((numbers, gram), []).append(len(triples))
        triples.append(mine)
        kept.append(problem)
    return kept


# ---- The command ---------------------------------------------------------------------------------------------------


@dataclass
class Args:
    output: str
    """write the problems, demonstrations or pairs to this .jsonl file"""
    problems: str | None = None
    """"arithmetic", a file, or a hub dataset; without it the problems of --samples"""
    split: Literal["train", "eval", "all"] = "train"
    """which part of --problems; all: both parts, except a hub dataset's test or validation split"""
    samples: str | None = None
    """samples file (evaluate.py --output): gives pass rates, and completions for --make"""
    min_pass_rate: Share | None = None
    """with --samples: lowest pass rate of a kept problem; None: 0.01, or 0 if --make makes demonstrations or pairs. To
    keep only problems that were never solved: --min-pass-rate 0 --max-pass-rate 0"""
    max_pass_rate: Share | None = None
    """with --samples: highest pass rate of a kept problem; None: 0.99, or 1 for demonstrations and pairs"""
    label_difficulty: bool = False
    """with --samples: set difficulty to 1 - pass rate, for --problem-sampling curriculum"""
    guesses: str | None = None
    """samples file made without reasoning (evaluate.py --modes no_think): drop problems that are solved in it"""
    exclude_unverifiable: bool = False
    """drop problems whose gold answer the rules can't compare, such as a sentence"""
    right_steps: bool = False
    """with --samples and --make: drop right answers after a wrong step (only for tasks that can check steps)"""
    exclude_multiple_choice: bool = False
    """drop multiple-choice and true/false questions"""
    remove_duplicates: bool = False
    """keep only the first of equal or nearly equal questions"""
    near_duplicate: Annotated[float, Range(0, 1, open=True)] = 0.8
    """with --remove-duplicates: Jaccard similarity of word triples from which questions count as nearly equal"""
    decontaminate: str | None = None
    """held-out problems, which must not be trained on: a file (all of it), or a task or hub dataset (its eval split)"""
    ngram: AtLeast1 = 13
    """with --decontaminate: drop problems that share this many consecutive words with a held-out question"""
    balance_topics: bool = False
    """keep the same number of problems of every topic, that of the rarest topic"""
    make: Literal[
        "problems", "prompts", "correct", "longest", "shortest", "random", "fusion", "shorter", "verifier"
    ] = "problems"
    """the kept problems, or their prompts alone (for a learned reward), or from their --samples: demonstrations
    (correct: all right completions; longest, shortest, random: one of each problem's; fusion: the right ones in both
    thinking modes, /think and /no_think) or pairs (shorter: a problem's shortest and longest right completion;
    verifier: a right and a wrong answer, to train a --verifier-model)"""
    limit: AtLeast1 | None = None
    """keep at most this many problems, chosen at random"""
    mode: Literal["think", "no_think"] | None = None
    """append this thinking mode's flag to every question, to train a fused model in that mode"""
    seed: int = 0
    """random seed"""


def main(args: Args) -> None:
    check_output(args.output, args.problems, args.samples, args.guesses, args.decontaminate)
    if not args.problems and not args.samples:
        fail("--problems or --samples: one of them is needed")
    of_problems = args.make in ("problems", "prompts")
    if not of_problems and not args.samples:
        fail(f"--make {args.make}: needs --samples")
    low, high = (0.01, 0.99) if of_problems else (0.0, 1.0)
    low = low if args.min_pass_rate is None else args.min_pass_rate
    high = high if args.max_pass_rate is None else args.max_pass_rate
    if args.mode and not of_problems:
        fail(f"--mode {args.mode}: goes with problems, not with --make {args.make}")
    if args.right_steps and of_problems:
        fail("--right-steps: filters completions: goes with demonstrations and pairs, see --make")
    if low > high:
        fail(f"--min-pass-rate {low:g}: must be at most --max-pass-rate {high:g}")
    source = args.problems or args.samples
    rows = placed_rows(args.samples) if args.samples else []
    if args.problems:
        problems = load_problems(args.problems, args.split, seed=args.seed, unanswered=True)
    else:
        problems = read_problems(rows, args.samples, unanswered=True)
    before, dropped, records = len(problems), Counter(), read_samples(rows, args.samples)
    if args.samples:
        rates = pass_rates(records, args.samples, problems)
        problems = keep_pass_rates(problems, rates, low, high, dropped)
        if args.label_difficulty:
            problems = label_difficulty(problems, rates)
    if args.guesses and problems:
        guesses = read_samples(placed_rows(args.guesses), args.guesses)
        problems = drop_lucky_guesses(problems, pass_rates(guesses, args.guesses, problems), dropped)
    if args.exclude_unverifiable:
        problems = drop_unverifiable(problems, dropped)
    if args.exclude_multiple_choice:
        problems = drop_multiple_choice(problems, dropped)
    if args.remove_duplicates:
        problems = drop_duplicates(problems, args.near_duplicate, dropped)
    if args.decontaminate:
        held_out = load_problems(args.decontaminate, "all" if is_undivided(args.decontaminate) else "eval")
        problems = decontaminate(problems, held_out, args.ngram, dropped)
    if args.balance_topics and problems:
        problems = balance(problems, "--balance-topics", source, args.seed, dropped)
    if args.limit and args.limit < len(problems):
        dropped["over --limit"] = len(problems) - args.limit
        problems = random.Random(f"limit {args.seed}").sample(problems, args.limit)
    print(f"{source}: {len(problems)} of {before} problems kept; dropped: {listed(dropped)}")
    if not problems:
        fail(f"{args.output} is not written: the filters leave nothing")
    rows = [in_mode(problem, args.mode).to_row() for problem in problems]
    if args.make == "prompts":
        rows = [
            {name: row[name] for name in ("question", "id", "topic", "difficulty") if row.get(name)} for row in rows
        ]
    if not of_problems:
        kept = {problem.question: problem for problem in problems}
        records = [record for record in records if record["question"] in kept]
        if args.right_steps:
            lucky: Counter = Counter()
            records = drop_wrong_steps(records, kept, args.samples, lucky)
            print(f"completions dropped: {listed(lucky)}")
        if args.make == "shorter":
            rows = shorter_pairs(records)
        elif args.make == "verifier":
            rows = verifier_pairs(records, kept)
        else:
            chosen = fuse_modes(records) if args.make == "fusion" else demonstrations_from(records, args.make)
            rows = [demonstration.to_row() for demonstration in chosen]
        if not rows:
            what = "no two completions make a pair" if args.make in PAIRS else "no completion is right and finished"
            fail(f"{args.output} is not written: {what}")
        print(f"{len(rows)} {'pairs' if args.make in PAIRS else 'demonstrations'} ({args.make})")
    write_jsonl(args.output, rows)


if __name__ == "__main__":
    start(main, Args)
