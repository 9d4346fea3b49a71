"""Evaluates a model on held-out problems: sampling, scores, and the before/after table."""

import math
import re
from collections.abc import Callable

import torch
from tqdm import tqdm

from common import derive_seed, sample_groups
from data import Problem, decode
from plumbing.answers import extract_answer
from rewards import Verifier, format_reward

SAMPLES = 4  # completions per problem in a training script's evaluations


@torch.no_grad()
def evaluate(
    policy,
    tokenizer,
    problems: list[Problem],
    num_samples: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    format_style: str = "answer-tags",
    batch_size: int = 256,
    seed: int = 0,
    progress: bool = False,
    is_right: Callable | None = None,
    sample: Callable = sample_groups,
    rewards: dict[str, Callable] | None = None,
) -> list[dict]:
    """One record per problem: its row and `completions`, a list of {text, answer, correct, format, reward, length,
    finished, logprob}. reward equals correct; logprob is the sum over the completion's tokens, at `temperature`.

    problems: encoded (see data.encode_problems). batch_size: completions sampled at once.
    is_right: a Verifier or a function (text, problem) -> bool; None: the rules. sample: a function with sample_groups'
    arguments. rewards: further rewards by name, functions (text, problem) -> float; each adds a field to completions.
    """
    verify = is_right if isinstance(is_right, Verifier) else Verifier(is_right=is_right)
    records: list[dict] = [{}] * len(problems)
    per_batch = max(1, batch_size // num_samples)
    order = sorted(range(len(problems)), key=lambda i: len(problems[i].prompt_ids))  # similar lengths together
    for start in tqdm(range(0, len(order), per_batch), desc="evaluate", disable=not progress):
        batch = order[start : start + per_batch]
        prompts, batch_seed = [problems[i].prompt_ids for i in batch], derive_seed("evaluate", seed, start)
        rollout = sample(policy, prompts, num_samples, max_new_tokens, temperature, batch_seed)
        texts, lengths, finished = decode(tokenizer, rollout), rollout.lengths.tolist(), rollout.finished.tolist()
        logprobs = rollout.sampler_logprobs.sum(1).tolist()
        correct = verify(texts, [problems[i] for i in batch for _ in range(num_samples)])
        completions = [
            {
                "text": text,
                "answer": extract_answer(text),
                "correct": bool(right),
                "format": format_reward(text, format_style),
                "reward": right,
                "length": length,
                "finished": ended,
                "logprob": logprob,
            }
            for text, right, length, ended, logprob in zip(texts, correct, lengths, finished, logprobs, strict=True)
        ]
        for p, i in enumerate(batch):
            group = completions[p * num_samples : (p + 1) * num_samples]
            for completion in group if rewards else ():
                completion |= {name: float(f(completion["text"], problems[i])) for name, f in rewards.items()}
            records[i] = problems[i].to_row() | {"completions": group}
    return records


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
    """Means over all completions of the records; `pass_at_<k>` is a mean over problems."""
    completions = [c for record in records for c in record["completions"]]
    n = len(records[0]["completions"])

    def mean(values) -> float:
        values = list(values)
        return sum(values) / len(values) if values else float("nan")

    summary = {
        "accuracy": mean(c["correct"] for c in completions),
        "format": mean(c["format"] for c in completions),
        "length": mean(c["length"] for c in completions),
        "length_right": mean(c["length"] for c in completions if c["correct"]),
        "length_wrong": mean(c["length"] for c in completions if not c["correct"]),
        "truncated": mean(not c["finished"] for c in completions),
        "no_answer": mean(c["answer"] is None for c in completions),
        "reflection_words": mean(count_reflection_words(c["text"]) for c in completions),
    }
    for k in sorted({2**i for i in range(n.bit_length())} | {n}):
        right = (sum(c["correct"] for c in record["completions"]) for record in records)
        summary[f"pass_at_{k}"] = mean(pass_at_k(n, c, k) for c in right)
    return summary


def group_by(records: list[dict], name: str) -> dict[str, list[dict]]:
    """Records grouped by a field (difficulty or topic); records without a value are left out."""
    values = {record[name] for record in records} - {None, ""}
    return {value: [r for r in records if r[name] == value] for value in sorted(values)}


def evaluate_policy(
    policy, tokenizer, problems, max_new_tokens, format_style, batch_size, seed, is_right=None, rewards=None, **options
) -> dict[str, float]:
    """The eval/* scalars of a training script. Completions are sampled at temperature 1 unless the tag says greedy.
    is_right, rewards, options (such as sample): see `evaluate`; the mean of a reward is eval/<name>."""

    def run(num_samples: int, temperature: float) -> list[dict]:
        limits = num_samples, max_new_tokens, temperature, format_style, batch_size, seed
        return evaluate(policy, tokenizer, problems, *limits, is_right=is_right, rewards=rewards, **options)

    sampled, greedy = run(SAMPLES, 1.0), run(1, 0.0)
    if isinstance(is_right, Verifier):
        is_right.summary()  # resets the counts: verifier/* is about training batches only
    summary = summarize(sampled)
    scores = {f"eval/{name}": v for name, v in summary.items() if not (math.isnan(v) or name.startswith("pass_at"))}
    scores["eval/pass_at_k"] = summary[f"pass_at_{SAMPLES}"]
    scores["eval/accuracy_greedy"] = summarize(greedy)["accuracy"]
    for name in rewards or ():
        scores[f"eval/{name}"] = sum(c[name] for r in sampled for c in r["completions"]) / (SAMPLES * len(sampled))
    for records, name in ((sampled, "accuracy"), (greedy, "accuracy_greedy")):
        for difficulty, group in group_by(records, "difficulty").items():
            scores[f"eval/{name}_difficulty_{difficulty:g}"] = summarize(group)["accuracy"]
    return scores


# ---- Tables --------------------------------------------------------------------------------------------------------


def format_table(header: list[str], rows: list[list]) -> str:
    cells = [header, *([f"{c:.3f}" if isinstance(c, float) else str(c) for c in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = [
        "  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in cells
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def comparison_table(before: dict[str, float], after: dict[str, float]) -> str:
    """Table of held-out accuracy, overall and by difficulty, and other metrics before and after training."""
    prefix = "eval/accuracy_difficulty_"
    rows = [["all", ""]] + [
        [f"difficulty {tag[len(prefix) :]}", tag[len("eval/accuracy") :]] for tag in after if tag.startswith(prefix)
    ]
    columns = ("eval/accuracy", "eval/accuracy_greedy")
    header = ["held-out accuracy", "sampled before", "after", "greedy before", "after"]
    table = [
        [name] + [s.get(c + suffix, float("nan")) for c in columns for s in (before, after)] for name, suffix in rows
    ]
    others = ("format", "length", "truncated", "no_answer", "pass_at_k")
    table += [[f"{name} (sampled)", before[f"eval/{name}"], after[f"eval/{name}"], "", ""] for name in others]
    return format_table(header, table)
