"""Evaluates a model on held-out problems: sampling, scores, and the before/after table."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from tqdm import tqdm

from common import derive_seed, rollout_scores, sample_groups
from data import Problem, decode, text_ids
from plumbing.answers import extract_answer
from plumbing.statistics import format_table, group_by, summarize
from rewards import ABSENT, Verifier, format_reward

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
    verify: Callable | None = None,
    sample: Callable = sample_groups,
    rewards: dict[str, Callable] | None = None,
    reward_model=None,
    max_tokens: int = 8192,
) -> list[dict]:
    """One record per problem: its row and `completions`, a list of {text, answer, correct, format, reward, length,
    finished, logprob, ids}. reward is the verdict, 1 if correct; logprob is the sum over the completion's tokens, at
    `temperature`; ids are the text's tokens as they were sampled. Completions whose verdict is None are left out, and
    so are problems without any other. A completion of a problem without an answer has correct None, and the reward
    model's score as its reward.

    problems: encoded (see data.encode_problems). batch_size: completions sampled at once. verify: a Verifier; None: the
    rules. sample: a function with sample_groups' arguments. rewards: further rewards by name, functions (text, problem)
    -> float; each adds a field to completions. reward_model: its score is the field `model`; it reads at most
    max_tokens at once.
    """
    verify = verify or Verifier()
    records: list[dict] = [{}] * len(problems)
    per_batch = max(1, batch_size // num_samples)
    order = sorted(range(len(problems)), key=lambda i: len(problems[i].prompt_ids))  # similar lengths together
    # The whole batches, longest first, then the smaller one: a GPU's graphs fit what is no larger than before.
    starts = sorted(range(0, len(order), per_batch), key=lambda start: (start + per_batch > len(order), -start))
    for start in tqdm(starts, desc="evaluate", disable=not progress):
        batch = order[start : start + per_batch]
        prompts, batch_seed = [problems[i].prompt_ids for i in batch], derive_seed("evaluate", seed, start)
        rollout = sample(policy, prompts, num_samples, max_new_tokens, temperature, batch_seed)
        texts, lengths, finished = decode(tokenizer, rollout), rollout.lengths.tolist(), rollout.finished.tolist()
        ids = text_ids(tokenizer, rollout)
        logprobs = rollout.sampler_logprobs.sum(1).tolist()
        correct = verify(texts, [problems[i] for i in batch for _ in range(num_samples)])
        scores = [] if reward_model is None else rollout_scores(reward_model, rollout, max_tokens).tolist()
        completions = [
            {
                "text": text,
                "answer": extract_answer(text),
                "correct": None if right == ABSENT else right == 1,
                "format": format_reward(text, format_style),
                "reward": right,
                "length": length,
                "finished": ended,
                "logprob": logprob,
                "ids": own_ids,
            }
            for text, right, length, ended, logprob, own_ids in zip(
                texts, correct, lengths, finished, logprobs, ids, strict=True
            )
        ]
        for completion, score in zip(completions, scores, strict=False):  # no scores without a reward model
            completion["model"] = score
            completion["reward"] = score if completion["correct"] is None else completion["reward"]
        for p, i in enumerate(batch):
            group = [c for c in completions[p * num_samples : (p + 1) * num_samples] if c["reward"] is not None]
            for completion in group if rewards else ():
                completion |= {name: float(f(completion["text"], problems[i])) for name, f in rewards.items()}
            records[i] = problems[i].to_row() | {"completions": group}
    return [record for record in records if record["completions"]]


@dataclass
class HeldOut:
    """Held-out problems, and all that a training script's evaluation of a policy on them needs.

    problems: encoded (see data.encode_problems). verify, sample, rewards: see `evaluate`.
    """

    tokenizer: object
    problems: list[Problem]
    max_new_tokens: int
    format_style: str
    batch_size: int  # completions sampled at once
    seed: int
    verify: Verifier = field(default_factory=Verifier)
    sample: Callable = sample_groups
    rewards: dict[str, Callable] = field(default_factory=dict)  # the mean of each is eval/<name>
    reward_model: object = None  # its mean score is eval/model
    max_tokens: int = 8192  # that it reads at once
    samples: list[dict] = field(default_factory=list)
    """the last evaluation's records of the first eight problems; their field `held_out` is a digest of all problems"""

    def evaluate(self, policy) -> dict[str, float]:
        """The eval/* scalars. Completions are sampled at temperature 1 unless the tag says greedy."""

        def run(num_samples: int, temperature: float) -> list[dict]:
            limits = num_samples, self.max_new_tokens, temperature, self.format_style, self.batch_size, self.seed
            options = {"verify": self.verify, "sample": self.sample, "rewards": self.rewards}
            options |= {"reward_model": self.reward_model, "max_tokens": self.max_tokens}
            return evaluate(policy, self.tokenizer, self.problems, *limits, **options)

        counts = self.verify.counts.copy()
        sampled, greedy = run(SAMPLES, 1.0), run(1, 0.0)
        self.verify.counts = counts  # verifier/* is about training batches only
        problems = [(p.question, p.messages, p.answer, p.columns) for p in self.problems]
        asked = {"held_out": f"{derive_seed(problems):x}"}  # a digest, by which compare.py knows equal problems
        self.samples = [asked | record | {"completions": without_ids(record["completions"])} for record in sampled[:8]]
        if not sampled or not greedy:
            return {}  # nothing could be judged
        summary = summarize(sampled)
        scores = {f"eval/{name}": value for name, value in summary.items() if not name.startswith("pass_at")}
        if f"pass_at_{SAMPLES}" in summary:
            scores["eval/pass_at_k"] = summary[f"pass_at_{SAMPLES}"]
        scores["eval/accuracy_greedy"] = summarize(greedy)["accuracy"]
        scores["eval/problems"] = float(sum(record["completions"][0]["correct"] is not None for record in sampled))
        for name in (*self.rewards, *(["model"] if self.reward_model else [])):
            values = [completion[name] for record in sampled for completion in record["completions"]]
            scores[f"eval/{name}"] = sum(values) / len(values)
        for records, name in ((sampled, "accuracy"), (greedy, "accuracy_greedy")):
            for difficulty, group in group_by(records, "difficulty").items():
                scores[f"eval/{name}_difficulty_{difficulty:g}"] = summarize(group)["accuracy"]
        return {tag: score for tag, score in scores.items() if not math.isnan(score)}  # NaN: nothing to average


def without_ids(completions: list[dict]) -> list[dict]:
    return [{name: value for name, value in c.items() if name != "ids"} for c in completions]


# ---- Tables --------------------------------------------------------------------------------------------------------


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
    others = ["format", "length", "truncated", "no_answer", "pass_at_k"]
    for name in others + ["model"] * ("eval/model" in after):
        table.append([f"{name} (sampled)", *(s.get(f"eval/{name}", float("nan")) for s in (before, after)), "", ""])
    return format_table(header, table)
