"""Statistics: of evaluated completions (accuracy, intervals, pass@k, majority vote), of paired differences and the rule
that judges them, and the tables that show them.

A record is one problem's row in a samples file, as plumbing/evaluation.py makes it: its `completions` is a list of
dicts with text, answer, correct, format, length, finished and logprob.
"""

import math
import re
import statistics

from plumbing.answers import answers_match


def interval(rate: float, problems: int) -> tuple[float, float]:
    """95% Wilson score interval. The sample size is the number of problems, not of completions: completions of one
    problem are not independent. With several completions per problem the interval is therefore rather too wide."""
    z, n = 1.96, max(problems, 1)
    center = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, center - half), min(1.0, center + half)


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Unbiased estimate, from n samples, of the probability that at least one of k samples is right (Chen et al. 2021,
    arXiv:2107.03374, eq. 1): 1 - C(n - correct, k) / C(n, k)."""
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


# Words with which a model rechecks its own text, as in R1's "aha moments" (arXiv:2501.12948, table 3). R1's base model
# uses them too (arXiv:2503.20783, section 2.3), so they are counted before the first update as well.
REFLECTION = re.compile(
    r"\b(?:wait|hmm+|however|alternatively|actually|re-?check|re-?examine|re-?evaluate|double[- ]check|verify|"
    r"mistake|let me (?:check|verify|re\w+)|let's check|check again)\b|等一下|等等|不对|再(?:检查|想)",
    re.IGNORECASE,
)


def count_reflection_words(text: str) -> int:
    return sum(1 for _ in REFLECTION.finditer(text))


def summarize(records: list[dict]) -> dict[str, float]:
    """Means over all completions of the records; `pass_at_<k>` is a mean over problems. A completion whose `correct` is
    None, because its problem has no answer, counts as neither right nor wrong."""
    completions = [c for record in records for c in record["completions"]]
    n = max(len(record["completions"]) for record in records)

    def mean(values) -> float:
        values = list(values)
        return sum(values) / len(values) if values else float("nan")

    summary = {
        "accuracy": mean(c["correct"] for c in completions if c["correct"] is not None),
        "format": mean(c["format"] for c in completions),
        "length": mean(c["length"] for c in completions),
        "length_right": mean(c["length"] for c in completions if c["correct"]),
        "length_wrong": mean(c["length"] for c in completions if c["correct"] is False),
        "truncated": mean(not c["finished"] for c in completions),
        "no_answer": mean(c["answer"] is None for c in completions),
        "reflection_words": mean(count_reflection_words(c["text"]) for c in completions),
    }
    for k in sorted({2**i for i in range(n.bit_length())} | {n}):
        tried = [[c["correct"] for c in record["completions"] if c["correct"] is not None] for record in records]
        summary[f"pass_at_{k}"] = mean(pass_at_k(len(right), sum(right), k) for right in tried if len(right) >= k)
    return summary


def group_by(records: list[dict], name: str) -> dict[str, list[dict]]:
    """Records grouped by a field (difficulty or topic); records without a value are left out."""
    values = {record[name] for record in records} - {None, ""}
    return {value: [r for r in records if r[name] == value] for value in sorted(values)}


def diversity(records: list[dict]) -> dict[str, float]:
    """entropy: nats per token, the mean of -log p over the sampled tokens (an unbiased estimate). distinct: number of
    different texts among a problem's completions."""
    completions = [c for record in records for c in record["completions"]]
    entropy = -sum(c["logprob"] for c in completions) / max(1, sum(c["length"] for c in completions))
    return {
        "entropy": entropy,
        "distinct": sum(len({c["text"] for c in r["completions"]}) for r in records) / len(records),
    }


def majority_answer(answers: list[str | None]) -> str | None:
    """The most frequent answer, where equivalent answers count as one; of tied ones, the first given."""
    votes: list[tuple[str, int]] = []
    for answer in answers:
        if answer is None:
            continue
        for i, (other, count) in enumerate(votes):
            if other == answer or answers_match(answer, other):
                votes[i] = (other, count + 1)
                break
        else:
            votes.append((answer, 1))
    return max(votes, key=lambda vote: vote[1])[0] if votes else None


def majority_is_right(completions: list[dict]) -> bool:
    voted = majority_answer([completion["answer"] for completion in completions])
    return any(completion["correct"] for completion in completions if voted and completion["answer"] == voted)


def majority_accuracy(records: list[dict]) -> float:
    """The share of problems whose majority answer is right. Compares all answers of a problem."""
    return sum(majority_is_right(record["completions"]) for record in records) / len(records)


# ---- Paired differences --------------------------------------------------------------------------------------------

HIGHER, LOWER, AS_GOOD, DIFFERENT = ">", "<", ">=", "!="


def students_t(n: int) -> float:
    """The 97.5% quantile of Student's t with n - 1 degrees of freedom, for n >= 2: half a 95% interval of n values, in
    standard errors. From the series of the distribution for whole degrees (Abramowitz and Stegun, 26.7.3 and 26.7.4).
    """
    degrees = n - 1

    def inside(t: float) -> float:  # the probability between -t and t
        angle = math.atan(t / math.sqrt(degrees))
        sine, cosine = math.sin(angle), math.cos(angle)
        term = total = cosine if degrees % 2 else 1.0
        for i in range(3 + degrees % 2, degrees + 1, 2):
            term *= cosine * cosine * (i - 2) / (i - 1)
            total += term
        if degrees % 2 == 0:
            return sine * total
        return 2 / math.pi * (angle + (sine * total if degrees > 1 else 0.0))

    low, high = 0.0, 13.0  # 12.71 is the quantile for two values
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if inside(middle) < 0.95 else (low, middle)
    return high


def paired_difference(first: list[float], second: list[float]) -> tuple[float, float, float]:
    """The mean of first - second, pair by pair, and the ends of its 95% interval by Student's t; nan and nan for one
    pair."""
    differences = [a - b for a, b in zip(first, second, strict=True)]
    mean, n = statistics.mean(differences), len(differences)
    if n < 2:
        return mean, math.nan, math.nan
    half = students_t(n) * statistics.stdev(differences) / math.sqrt(n)
    return mean, mean - half, mean + half


def judge(low: float, high: float, claimed: str, margin: float = 0.02) -> str:
    """The verdict on a claim about a difference with this 95% interval: "holds", "does not" or "not visible", by the
    rule at the top of claims/claims.py. claimed: HIGHER, LOWER, AS_GOOD or DIFFERENT."""
    if math.isnan(low):
        return "not visible"
    if claimed == LOWER:
        low, high, claimed = -high, -low, HIGHER
    if claimed == DIFFERENT:
        return "holds" if low > 0 or high < 0 else "does not" if -margin <= low and high <= margin else "not visible"
    if claimed == AS_GOOD:
        return "holds" if low >= -margin else "does not" if high < 0 else "not visible"
    return "holds" if low > 0 else "does not" if high < 0 or (-margin <= low and high <= margin) else "not visible"


def pairs_for_half(n: int) -> int:
    """How many more pairs make an interval half as wide, if the differences go on to spread as they do."""
    more = 1
    while students_t(n + more) / math.sqrt(n + more) > students_t(n) / math.sqrt(n) / 2:
        more += 1
    return more


def paired_problems(first: list[dict], second: list[dict]) -> tuple[list[float], list[float]]:
    """For each problem that has completions in both lists of records, its accuracy in the first and in the second."""
    first, second = accuracy_by_problem(first), accuracy_by_problem(second)
    both = [problem for problem in first if problem in second]
    return [first[problem] for problem in both], [second[problem] for problem in both]


def accuracy_by_problem(records: list[dict]) -> dict[tuple, float]:
    """Accuracy by (question, answer), of the problems that have an answer."""
    found: dict[tuple, list[bool]] = {}
    for record in records:
        problem = record["question"], str(record.get("answer"))
        verdicts = [completion["correct"] for completion in record["completions"]]
        found.setdefault(problem, []).extend(right for right in verdicts if right is not None)
    return {problem: statistics.mean(map(float, correct)) for problem, correct in found.items() if correct}


# ---- Tables --------------------------------------------------------------------------------------------------------


def format_table(header: list[str], rows: list[list]) -> str:
    cells = [header, *([f"{c:.3f}" if isinstance(c, float) else str(c) for c in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = [
        "  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in cells
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
