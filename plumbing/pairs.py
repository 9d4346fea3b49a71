"""Preference pairs: where they come from, token ids, batches, and reports."""

import random
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

import common
from common import Rollout
from data import (
    Problem,
    add_mode,
    encode_completions,
    encode_problems,
    encode_prompts,
    is_held_out,
    load_problems,
    read_samples,
    task_of,
    verifier_of,
)
from plumbing.evaluation import evaluate
from plumbing.flags import AtLeast1, NonNegative, fail
from plumbing.rows import (
    EMPTY,
    UNKEPT,
    answer_field,
    as_number,
    as_prompt,
    check_needed,
    continued,
    fail_on,
    find,
    placed_rows,
    prompt_turns,
    required,
    system_turns,
)
from plumbing.statistics import format_table, interval


@dataclass(frozen=True)
class Pair:
    question: str
    chosen: str
    rejected: str
    id: str = ""
    topic: str = ""
    weight: float = 1.0
    chosen_finished: bool = True  # ended by an EOS, not cut by the length limit
    rejected_finished: bool = True
    messages: tuple | None = None  # the prompt's turns, see data.Problem
    problem: Problem | None = None  # whose completions they are, if they were sampled: it judges others
    prompt_ids: tuple = field(default=(), compare=False, repr=False)  # these three are set by encode_pairs; before,
    chosen_ids: tuple = field(default=(), compare=False, repr=False)  # the two hold the ids of a samples file, if any
    rejected_ids: tuple = field(default=(), compare=False, repr=False)


# ---- Where pairs come from -----------------------------------------------------------------------------------------


@dataclass
class PairFlags:
    """Selection and weights of the preference pairs in --data."""

    pair_problems: AtLeast1 = 1500
    """arithmetic-pairs: number of problems; eight completions are sampled for each"""
    pair_weight: Literal["uniform", "gap"] = "uniform"
    """weight of a pair in the loss; gap: proportional to its score difference (needs scored samples)"""
    min_gap: NonNegative = 0.5
    """samples: smallest score difference that makes a pair; 0.5 keeps pairs of a right and a wrong answer"""
    max_pairs_per_prompt: AtLeast1 = 4
    """at most this many pairs per prompt, chosen at random, so that a few prompts don't dominate"""
    balance_topics: bool = False
    """reduce every topic to as many pairs as the rarest topic has"""
    balance_lengths: bool = False
    """keep as many pairs whose chosen completion is the longer one, in tokens, as pairs whose rejected one is"""


def load_preference_pairs(source: str, seed: int = 0, flags: PairFlags | None = None) -> list[Pair]:
    """Loads preference pairs and prints how many were kept and dropped.

    source: "arithmetic-pairs", sampled from the embedded model; a file or hub dataset with `chosen`, `rejected`, and a
    prompt unless they contain it, optionally `weight` (see rows.NAMES); or a samples file of evaluate.py, which holds
    several scored completions of each problem. seed: for the random choices of --max-pairs-per-prompt and
    --balance-topics.
    """
    flags = flags or PairFlags()
    dropped = Counter()
    if source == "arithmetic-pairs":
        samples, rows = True, [(record["id"], record) for record in arithmetic_samples(flags.pair_problems)]
    else:
        rows = placed_rows(source)
        samples = "completions" in rows[0][1]
    if flags.balance_topics and flags.balance_lengths:
        fail("--balance-lengths: doesn't go with --balance-topics, which it would undo")
    if flags.pair_weight == "gap" and not samples:
        fail(f"--pair-weight gap: {source} holds pairs without scores; a samples file is needed")
    pairs = sampled_pairs(rows, source, flags.min_gap, dropped) if samples else read_pairs(rows, source, dropped)

    prompts: dict[tuple, list[Pair]] = {}
    for pair in pairs:
        prompts.setdefault((pair.question, pair.messages), []).append(pair)
    kept = []
    for (question, _), group in prompts.items():
        limit = min(len(group), flags.max_pairs_per_prompt)
        dropped["over --max-pairs-per-prompt"] += len(group) - limit
        kept += random.Random(f"pairs {question} {seed}").sample(group, limit)
    if flags.balance_topics:
        kept = balance(kept, "--balance-topics", source, seed, dropped)
    mean = sum(pair.weight for pair in kept) / len(kept)
    weighted = flags.pair_weight == "gap" or not samples
    kept = [replace(pair, weight=pair.weight / mean if weighted else 1.0) for pair in kept]
    print(f"pairs: {len(kept)} of {len({p.question for p in kept})} prompts from {source}; dropped: {listed(dropped)}")
    return kept


def arithmetic_samples(count: int) -> list[dict]:
    """Records as in a samples file: eight completions by the embedded model for each of `count` problems of both
    splits, with train_grpo.py's default reward. The seed is fixed and sampling is on the CPU in fp32, so that a resumed
    run gets the same pairs on any device."""
    model = "models/tiny-arithmetic"
    tokenizer = common.load_tokenizer(model)
    policy = common.load_policy(model, tokenizer)
    problems = load_problems("arithmetic", "all", count)
    problems = encode_problems(tokenizer, problems, "", policy.config, 40)
    records = evaluate(policy, tokenizer, problems, num_samples=8, max_new_tokens=40, progress=True)
    for completion in (c for record in records for c in record["completions"]):
        completion["reward"] = completion["correct"] + 0.2 * completion["format"]
    return records


def sampled_pairs(rows: list[tuple[str, dict]], source: str, min_gap: float, dropped: Counter) -> list[Pair]:
    """All pairs of a better (chosen) and a worse completion of a problem, min_gap or more apart; weight = that gap."""
    pairs, questions = [], set()
    for (place, _), record in zip(rows, read_samples(rows, source), strict=True):
        question, messages = add_mode(record["question"], record["messages"], record.get("mode"))
        scored: dict[str, dict] = {}  # by text: duplicates add no information
        for completion in record["completions"]:
            dropped["duplicate texts"] += completion["text"] in scored
            scored.setdefault(completion["text"], completion)
        if (question, messages) in questions:
            dropped["duplicate prompts"] += 1
            continue
        questions.add((question, messages))
        problem = sampled_problem(place, record, source)
        best_first = sorted(scored.values(), key=lambda completion: -completion["reward"])
        for i, better in enumerate(best_first):
            for worse in best_first[i + 1 :]:
                gap = better["reward"] - worse["reward"]
                dropped["near ties (--min-gap)"] += 0 < gap < min_gap
                if gap > 0 and gap >= min_gap:
                    ends = better.get("finished", True), worse.get("finished", True)
                    topic = str(record.get("topic") or "")
                    ids = tuple(better.get("ids", ())), tuple(worse.get("ids", ()))
                    texts = better["text"], worse["text"]
                    pairs.append(Pair(question, *texts, place, topic, gap, *ends, messages, problem, (), *ids))
    if not pairs:
        fail(f"{source}: no prompt has two completions whose scores differ by --min-gap {min_gap:g} or more")
    return pairs


def sampled_problem(place: str, record: dict, source: str) -> Problem:
    """The problem of a samples file's record; its answer is "" if its task's verifier decides, or if it has none."""
    task, answer = task_of(record), ""
    try:
        if record.get("answer") not in EMPTY and not verifier_of(task):
            answer = answer_field(record)
    except ValueError as error:
        fail_on([(place, error)], source)
    columns = {name: value for name, value in record.items() if name not in UNKEPT}
    return Problem(record["question"], answer, messages=record["messages"], task=task, columns=columns)


def read_pairs(rows: list[tuple[str, dict]], source: str, dropped: Counter) -> list[Pair]:
    pairs, errors = {}, []
    for place, row in rows:
        try:
            name, prompt = "chosen", system_turns(row)
            if asked := find(row, "question", ("prompt",)):
                name, prompt = prompt_turns(row, ("prompt",))
                as_prompt(name, prompt)
            *turns, chosen = continued(prompt, *required(row, "chosen"))
            *other, rejected = continued(prompt, *required(row, "rejected"))
            if turns != other:
                raise ValueError("chosen and rejected differ before their last turns")
            if not asked:
                check_needed(row, name, turns)
            if turns == system_turns(row):  # chosen is no conversation
                required(row, "question", ("prompt",))
            question, messages = as_prompt(name, turns)
            chosen, rejected = chosen["content"], rejected["content"]
            weight = 1.0 if row.get("weight") is None else as_number("weight", row["weight"])
            if weight <= 0:
                raise ValueError(f"field 'weight' is {weight:g}, a number above 0 is expected")
            if chosen == rejected or not chosen.strip() or not rejected.strip():
                dropped["equal or empty completions"] += 1
                continue
            dropped["duplicate pairs"] += (question, messages, chosen, rejected) in pairs
            pair = Pair(question, chosen, rejected, place, str(row.get("topic") or ""), weight, messages=messages)
            pairs.setdefault((question, messages, chosen, rejected), pair)
        except ValueError as error:
            errors.append((place, error))
    fail_on(errors, source)
    if not pairs:
        fail(f"{source}: no pair left; dropped: {listed(dropped)}")
    return list(pairs.values())


def balance(items: list, flag: str, source: str, seed: int, dropped: Counter) -> list:
    """Reduces every topic, at random, to as many items as the rarest topic has."""
    topics = {topic: [item for item in items if item.topic == topic] for topic in sorted({i.topic for i in items})}
    if len(topics) < 2:
        fail(f"{flag}: {source} does not name two topics")
    rarest, rng = min(map(len, topics.values())), random.Random(f"topics {seed}")
    dropped["to balance topics"] = len(items) - rarest * len(topics)
    return [item for group in topics.values() for item in rng.sample(group, rarest)]


def listed(dropped: Counter) -> str:
    return ", ".join(f"{count} {why}" for why, count in dropped.items() if count) or "none"


# ---- Token ids and batches -----------------------------------------------------------------------------------------


def encode_pairs(
    tokenizer, pairs: list[Pair], system_prompt: str, context: float, seed: int = 0, flags: PairFlags | None = None
) -> list[Pair]:
    """The pairs that fit the context, with their token ids; with --balance-lengths, what `balance_lengths` keeps.

    Longer pairs are dropped and counted: truncation would remove the answer and the EOS. seed: for the random choice of
    --balance-lengths.
    """
    prompts = encode_prompts(tokenizer, [pair.messages or pair.question for pair in pairs], system_prompt)
    for pair, prompt in zip(pairs, prompts, strict=True):
        if len(prompt) >= context:
            fail(f"{pair.id}: its prompt of {len(prompt)} tokens leaves no room in the model's context of {context}")

    def encode(texts: list[str], finished: list[bool], sampled: list[tuple]) -> list[tuple[int, ...]]:
        ids = encode_completions(tokenizer, texts, prompts, sampled)
        return [tuple(i if whole else i[:-1]) for i, whole in zip(ids, finished, strict=True)]  # truncated: no EOS

    chosen, rejected = (
        encode(*([getattr(pair, side + name) for pair in pairs] for name in ("", "_finished", "_ids")))
        for side in ("chosen", "rejected")
    )
    encoded = [
        replace(pair, prompt_ids=tuple(prompt), chosen_ids=better, rejected_ids=worse)
        for pair, prompt, better, worse in zip(pairs, prompts, chosen, rejected, strict=True)
    ]
    fits = [p for p in encoded if p.chosen_ids and p.rejected_ids and pair_length(p) <= context]
    dropped = Counter({f"longer than the context of {context}": len(pairs) - len(fits)})
    kept = balance_lengths(fits, seed, dropped) if flags and flags.balance_lengths else fits
    if len(kept) < len(pairs):
        print(f"pairs: {len(kept)} of {len(pairs)} left; dropped: {listed(dropped)}")
    return kept


def balance_lengths(pairs: list[Pair], seed: int, dropped: Counter) -> list[Pair]:
    """Drops pairs at random until the chosen completion is the longer one, in tokens, as often as the rejected one:
    among the pairs to train on, and among the held-out ones. Pairs of equal lengths stay."""
    rng, surplus = random.Random(f"lengths {seed}"), set()
    longer_by = [len(pair.chosen_ids) - len(pair.rejected_ids) for pair in pairs]
    for held_out in (False, True):
        split = [i for i, pair in enumerate(pairs) if is_held_out(pair.question) == held_out]
        longer, shorter = [i for i in split if longer_by[i] > 0], [i for i in split if longer_by[i] < 0]
        if bool(longer) != bool(shorter) and not held_out:
            which = "longer" if longer else "shorter"
            fail(f"--balance-lengths: of completions that differ in length, the {which} one is chosen in every pair")
        few, many = sorted((longer, shorter), key=len)
        surplus |= {*rng.sample(many, len(many) - len(few))}
    dropped["to balance lengths"] = len(surplus)
    return [pair for i, pair in enumerate(pairs) if i not in surplus]


def pair_length(pair: Pair) -> int:
    return len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids))


def pair_rollout(pairs: list[Pair], device) -> Rollout:
    """A Rollout with groups of two: row 2i is pair i's chosen completion, row 2i + 1 its rejected one."""
    completions = [ids for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids)]
    return common.make_rollout([pair.prompt_ids for pair in pairs], completions, group_size=2, device=device)


def length_metrics(rollout: Rollout) -> dict[str, Tensor]:
    """Mean tokens of both sides of a Rollout of pairs, EOS included."""
    chosen, rejected = rollout.lengths.float().view(-1, 2).mean(0)
    return {"rollout/length_chosen": chosen, "rollout/length_rejected": rejected}


def pair_micro_batches(rollout: Rollout, max_tokens: int) -> list[list[int]]:
    """All rows of a Rollout of pairs in micro-batches of whole pairs, because a pair's loss needs both rows, ordered
    chosen, rejected, chosen, ... If the largest pair exceeds max_tokens, its size is the limit."""
    G, lengths = rollout.group_size, rollout.mask.sum(1).view(-1, rollout.group_size).sum(1).tolist()
    largest = max(G * len(prompt) + length for prompt, length in zip(rollout.prompt_ids, lengths, strict=True))
    batches = common.micro_batches(rollout, list(range(len(rollout.mask))), max(max_tokens, largest))
    return [sorted(rows) for rows in batches]  # restore chosen/rejected order, which sorting by length changed


# ---- Reports -------------------------------------------------------------------------------------------------------


def ranked_right(margins: Tensor) -> Tensor:
    """Margins reward(chosen) - reward(rejected), (B,) -> (B,): 1 if a pair is ranked as labelled, 0 if not, 0.5 for a
    tie. Margins within rounding error are ties: a policy equal to its reference has margins of 1e-6 in float32."""
    return ((margins.abs() > 1e-4) * margins.sign() + 1) / 2


def calibration_error(margins: Tensor, bins: int = 10) -> float:
    """Expected calibration error of (N,) margins. sigmoid(|margin|) is the confidence in the preferred side. Over equal
    bins of 0.5 to 1: |accuracy - mean confidence| of each bin, averaged with its share of the pairs as the weight."""
    confidence, right = margins.abs().sigmoid(), ranked_right(margins)
    index = ((confidence - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    gaps = torch.zeros(bins, dtype=margins.dtype, device=margins.device).index_add(0, index, right - confidence)
    return gaps.abs().sum().item() / len(margins)


def held_out_scores(margins: Tensor, loss: Tensor) -> dict[str, float]:
    """The eval/* scalars of held-out pairs: from their (N,) margins and their loss, a mean with the pairs' weights."""
    return {
        "eval/pair_accuracy": ranked_right(margins).mean().item(),
        "eval/pair_margin": margins.mean().item(),
        "eval/pair_loss": loss.item(),
        "eval/calibration": calibration_error(margins),
        "eval/pairs": float(len(margins)),
    }


def pair_table(before: dict[str, float], after: dict[str, float], questions: list[str]) -> str:
    """Table of a preference method's metrics, except accuracy, before and after training. questions: one per held-out
    pair. Pairs of one question are not independent, so the interval counts distinct questions, not pairs."""
    names = ("pair_accuracy", "pair_margin", "pair_loss", "calibration", "pair_length", "kl", "win_rate")
    rows = [[name, before[f"eval/{name}"], after[f"eval/{name}"]] for name in names if f"eval/{name}" in after]
    if rows and rows[0][0] == "pair_accuracy":
        ranges = ["{:.3f}-{:.3f}".format(*interval(rate, len(set(questions)))) for rate in rows[0][1:]]
        rows.insert(1, ["  its 95% interval", *ranges])
    return format_table([f"held-out, {len(questions)} pairs", "before", "after"], rows)
