"""Accuracy of a model on held-out problems, and the samples file.

    python evaluate.py --model runs/.../final
    python evaluate.py --num-samples 8                             # pass@k, majority vote
    python evaluate.py --split all --num-samples 8 --output samples.jsonl               # N-best for later stages
    python evaluate.py --stages base=models/tiny-arithmetic grpo=runs/.../final --temperatures 0.5 1.5   # side by side

Accuracy is reported *sampled at temperature 1* (the policy that RL trains) and greedy, each with a 95% interval.
"""

import math
import resource
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import common
from common import Rollout, derive_seed, fail
from data import (
    MODES,
    SYSTEM_PROMPT,
    Problem,
    check_context,
    check_flags,
    context_length,
    decode,
    encode_completions,
    encode_prompts,
    load_problems,
    mode_question,
    opens_thinking,
    plain_text,
    write_jsonl,
)
from rewards import (
    MAX_ANSWER_CHARS,
    answers_match,
    count_reflection_words,
    extract_answer,
    format_reward,
    matched_by,
)

SAMPLES = 4  # completions a problem in a train script's evaluations


def evaluate(
    policy,
    tokenizer,
    problems: list[Problem],
    prompts: list[list[int]],
    num_samples: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    format_style: str = "answer-tags",
    batch_size: int = 256,
    seed: int = 0,
    progress: bool = False,
    think_budget: int | None = None,
    stop_sentence: str = "</think>",
    verify=None,
) -> list[dict]:
    """A record for each problem: its fields and `completions`, a list of {text, answer, correct, format, reward,
    length, finished}. reward = correct. batch_size: completions sampled at once. think_budget: see
    `sample_within_budget`. verify: a Verifier, None for the rules alone."""
    records = []
    verify = verify or Verifier()
    sample, options = common.sample_groups, ()
    if think_budget:
        sample, options = sample_within_budget, (tokenizer, think_budget, stop_sentence)
    per_batch = max(1, batch_size // num_samples)
    # Similar lengths together; an index, not a shuffle, so that the result is in the order of `problems` again.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in tqdm(range(0, len(order), per_batch), desc="evaluate", disable=not progress):
        batch = order[start : start + per_batch]
        rollout = sample(
            policy,
            [prompts[i] for i in batch],
            num_samples,
            max_new_tokens,
            temperature,
            derive_seed("evaluate", seed, start),
            *options,
        )
        texts = decode(tokenizer, rollout)
        correct = verify(texts, [problems[i] for i in batch for _ in range(num_samples)])
        for p, i in enumerate(batch):
            completions = []
            for row in range(p * num_samples, (p + 1) * num_samples):
                completions.append(
                    {
                        "text": texts[row],
                        "answer": extract_answer(texts[row]),
                        "correct": bool(correct[row]),
                        "format": format_reward(texts[row], format_style),
                        "reward": correct[row],
                        "length": int(rollout.lengths[row]),
                        "finished": bool(rollout.finished[row]),
                    }
                )
            records.append((i, asdict(problems[i]) | {"completions": completions}))
    return [record for _, record in sorted(records, key=lambda pair: pair[0])]


def sample_within_budget(
    policy, prompts, group_size, max_new_tokens, temperature, seed, tokenizer, budget, stop_sentence
) -> Rollout:
    """Qwen3's thinking budget (arXiv:2505.09388, section 4.3): a completion that is still thinking after `budget`
    tokens gets the stop sentence, which closes the think block, and goes on to its answer; one that is past its
    thoughts just goes on. max_new_tokens: after the budget. All of it counts as the completion's length, the stop
    sentence too."""
    rollout = common.sample_groups(policy, prompts, group_size, budget, temperature, seed)
    stop, texts = tokenizer(stop_sentence, add_special_tokens=False).input_ids, decode(tokenizer, rollout)
    completions = [ids[mask].tolist() for ids, mask in zip(rollout.completion_ids, rollout.mask, strict=True)]
    finished = rollout.finished.clone()
    going_on = (~finished).nonzero()[:, 0].tolist()
    for row in going_on:
        if "<think>" in texts[row] and "</think>" not in texts[row]:
            completions[row] += stop
    if going_on:
        heads = [prompts[row // group_size] + completions[row] for row in going_on]
        rest = common.sample_groups(policy, heads, 1, max_new_tokens, temperature, derive_seed("answers", seed))
        for row, ids, mask in zip(going_on, rest.completion_ids, rest.mask, strict=True):
            completions[row] += ids[mask].tolist()
        finished[going_on] = rest.finished
    whole = common.make_rollout(prompts, completions, group_size, finished.device)
    return replace(whole, finished=finished)


class Verifier:
    """Whether completions are right: by rule (numbers and strings), else symbolically (math-verify), else, where there
    is one, by a model: `--judge-model`, a causal LM that is asked for yes or no, or `--verifier-model`, a reward model
    (train_rm.py) that scores the answer above 0. `counts`: completions found right by each, and wrong."""

    def __init__(self, args=None, device="cpu", dtype=torch.float32):
        self.counts: Counter = Counter()
        judge, verifier = getattr(args, "judge_model", None), getattr(args, "verifier_model", None)
        if judge and verifier:
            fail("--judge-model and --verifier-model: only one of them")
        self.model = None
        if path := judge or verifier:
            flag = "--judge-model" if judge else "--verifier-model"
            self.tokenizer = common.load_tokenizer(path, flag)
            self.yes, self.no = self.replies(path) if judge else ([], [])
            if judge and opens_thinking(self.tokenizer, encode_prompts(self.tokenizer, ["?"]))[0]:
                fail(f"{flag} {path}: its chat template opens a think block, so its next token is no yes or no")
            self.context = context_length(common.load_config(path, flag))
            if judge:
                self.model = common.load_policy(path, device, dtype)
            else:
                self.model = common.load_reward_model(path, device, dtype, flag=flag)

    def replies(self, path: str) -> tuple[list[int], list[int]]:
        """The single tokens with which the judge may begin its yes, and its no."""
        tokens = []
        for word in ("yes", "no"):
            spellings = (word, word.capitalize(), " " + word, " " + word.capitalize())
            ids = [self.tokenizer(text, add_special_tokens=False).input_ids for text in spellings]
            tokens.append([i[0] for i in ids if len(i) == 1 and i[0] != self.tokenizer.unk_token_id])
        if not all(tokens):
            fail(f"--judge-model {path}: its tokenizer has no single tokens for yes and no, so it can't be asked")
        return tuple(sorted(set(ids)) for ids in tokens)

    def __call__(self, texts: list[str], problems: list[Problem]) -> list[float]:
        answers = [extract_answer(text) for text in texts]
        stages = [matched_by(answer, p.answer) for answer, p in zip(answers, problems, strict=True)]
        if self.model is not None:  # what the rules don't match and what is an answer at all, each once
            rows = {(p, a): None for a, p, s in zip(answers, problems, stages, strict=True) if a and not s}
            open_questions = [(p, a) for p, a in rows if len(a) <= MAX_ANSWER_CHARS]
            right = dict(zip(open_questions, self.ask(open_questions), strict=True))
            for row, pair in enumerate(zip(problems, answers, strict=True)):
                if stages[row] is None and right.get(pair):
                    stages[row] = "model"
        self.counts.update(stage or "wrong" for stage in stages)
        return [float(stage is not None) for stage in stages]

    @torch.no_grad()
    def ask(self, pairs: list[tuple[Problem, str]]) -> list[bool]:
        if not pairs:
            return []
        for token in self.tokenizer.all_special_tokens:  # an answer may not end its turn and begin another
            pairs = [(problem, answer.replace(token, " ")) for problem, answer in pairs]
        texts = [
            f"Question: {plain_text(problem.question)}\nReference answer: {problem.answer}" for problem, _ in pairs
        ]
        if self.yes:
            ask = "Is the given answer the same as the reference answer? Reply with yes or no."
            texts = [f"{text}\nGiven answer: {answer}\n{ask}" for text, (_, answer) in zip(texts, pairs, strict=True)]
        prompts = encode_prompts(self.tokenizer, texts)
        if self.yes:
            completions = [[[token] for token in self.yes + self.no]] * len(pairs)
        else:
            completions = [[ids] for ids in encode_completions(self.tokenizer, [a for _, a in pairs], prompts)]
        right = [False] * len(pairs)  # what is too long to be asked is wrong
        fits = [i for i in range(len(pairs)) if len(prompts[i]) + len(completions[i][-1]) <= self.context]
        if fits:
            replies = [ids for i in fits for ids in completions[i]]
            values = self.values([prompts[i] for i in fits], replies, len(completions[0])).view(len(fits), -1)
            if self.yes:
                yes, no = values.exp().split([len(self.yes), len(self.no)], 1)
                values = yes.sum(1) - no.sum(1)
            for i, value in zip(fits, values.flatten().tolist(), strict=True):
                right[i] = value > 0
        return right

    def values(self, prompts: list[list[int]], replies: list[list[int]], group_size: int) -> Tensor:
        """(B,) logprobs of the judge's replies, or the verifier's scores of the answers."""
        rollout = common.make_rollout(prompts, replies, group_size, self.model.device)
        values = torch.zeros(len(replies))
        for micro in common.micro_batches(rollout, list(range(len(replies))), 8192):
            if self.yes:
                values[micro] = common.completion_logprobs(self.model, rollout, micro)[0][:, 0].cpu()
            else:
                values[micro] = common.completion_scores(self.model, rollout, micro).cpu()
        return values

    def summary(self) -> dict[str, float]:
        """Shares of the completions since the last call, where a model has a say."""
        counts, self.counts = self.counts, Counter()
        if self.model is None or not counts:
            return {}
        return {f"verifier/{name}": counts[name] / counts.total() for name in ("rule", "symbolic", "model")}


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Unbiased estimate, from n samples, of the chance that one of k is right (Chen et al. 2021, arXiv:2107.03374,
    eq. 1): 1 - C(n - correct, k) / C(n, k)."""
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def majority_answer(answers: list[str | None]) -> str | None:
    """The answer that most completions gave, in any writing; the first given one where it is a tie."""
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


def interval(rate: float, problems: int) -> tuple[float, float]:
    """95% Wilson score interval. `problems`, not completions, is the sample size: several completions of one problem
    are not independent, so with more than one each this errs on the wide side."""
    z, n = 1.96, max(problems, 1)
    center = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, center - half), min(1.0, center + half)


def summarize(records: list[dict]) -> dict[str, float]:
    """Means over all completions of the records; `majority` and `pass_at_<k>` over problems."""
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
        "majority": mean(majority_is_right(record["completions"]) for record in records),
    }
    for k in sorted({2**i for i in range(n.bit_length())} | {n}):
        right = (sum(c["correct"] for c in record["completions"]) for record in records)
        summary[f"pass_at_{k}"] = mean(pass_at_k(n, c, k) for c in right)
    return summary


def by(records: list[dict], field: str) -> dict[str, list[dict]]:
    """Records by difficulty or topic; those without one are left out."""
    values = {record[field] for record in records} - {None, ""}
    return {value: [r for r in records if r[field] == value] for value in sorted(values)}


def evaluate_policy(policy, tokenizer, problems, prompts, args, batch_size, verify=None) -> dict[str, float]:
    """What a train script logs: the eval/* scalars, sampled at temperature 1 unless the name says greedy."""

    def run(num_samples: int, temperature: float) -> list[dict]:
        budget = (num_samples, args.max_new_tokens, temperature, args.format_style)
        options = {"batch_size": batch_size, "seed": args.seed, "verify": verify}
        return evaluate(policy, tokenizer, problems, prompts, *budget, **options)

    sampled, greedy = run(SAMPLES, 1.0), run(1, 0.0)
    if verify is not None:
        verify.summary()  # its counts are of training batches
    summary = summarize(sampled)
    names = "accuracy format length length_right length_wrong truncated no_answer reflection_words".split()
    scores = {f"eval/{name}": summary[name] for name in names if not math.isnan(summary[name])}
    scores["eval/pass_at_k"] = summary[f"pass_at_{SAMPLES}"]
    scores["eval/accuracy_greedy"] = summarize(greedy)["accuracy"]
    for records, name in ((sampled, "accuracy"), (greedy, "accuracy_greedy")):
        for difficulty, group in by(records, "difficulty").items():
            scores[f"eval/{name}_difficulty_{difficulty:g}"] = summarize(group)["accuracy"]
    return scores


def format_table(header: list[str], rows: list[list]) -> str:
    cells = [header, *([f"{c:.3f}" if isinstance(c, float) else str(c) for c in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = [
        "  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in cells
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def comparison_table(before: dict[str, float], after: dict[str, float]) -> str:
    """Held-out accuracy before and after training, in all and by difficulty."""
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


def ranked_right(margins: Tensor) -> Tensor:
    """(B,) reward(chosen) - reward(rejected) -> (B,): 1 where a pair is ranked as labelled, 0 where not, 0.5 for a tie.
    A margin within rounding is a tie: in float32 that of a policy that is still its reference is 1e-6, not 0."""
    return ((margins.abs() > 1e-4) * margins.sign() + 1) / 2


def pair_table(before: dict[str, float], after: dict[str, float], questions: list[str]) -> str:
    """What a preference method's evaluations say beside the accuracy, before and after training. questions: those of
    the held-out pairs; pairs of one question say much the same, so the interval is that of so many questions."""
    names = ("pair_accuracy", "pair_margin", "pair_loss", "calibration", "kl", "win_rate")
    rows = [[name, before[f"eval/{name}"], after[f"eval/{name}"]] for name in names if f"eval/{name}" in after]
    if rows and rows[0][0] == "pair_accuracy":
        ranges = ["{:.3f}-{:.3f}".format(*interval(rate, len(set(questions)))) for rate in rows[0][1:]]
        rows.insert(1, ["  its 95% interval", *ranges])
    return format_table([f"held-out, {len(questions)} pairs", "before", "after"], rows)


# ---- What the train scripts log --------------------------------------------------------------------------------------


class Metrics:
    """Weighted means over everything added; names that end in "max" keep the largest value instead."""

    def __init__(self):
        self.tokens = 0  # sampled
        self.sums: dict[str, float] = {}
        self.weights: dict[str, float] = {}

    def add(self, values: dict[str, float], weight: float = 1.0) -> None:
        for name, value in values.items():
            if name.endswith("max"):
                self.sums[name] = max(float(value), self.sums.get(name, -float("inf")))
                self.weights[name] = 1.0
            elif weight > 0:
                self.sums[name] = self.sums.get(name, 0.0) + weight * float(value)
                self.weights[name] = self.weights.get(name, 0.0) + weight

    def means(self) -> dict[str, float]:
        return {name: total / self.weights[name] for name, total in self.sums.items()}


class Clock:
    """Seconds between one lap and the next, the device's queued work included."""

    def __init__(self, device: torch.device):
        self.device, self.seconds = device, {}
        self.last = time.perf_counter()

    def lap(self, name: str) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        last, self.last = self.last, time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + self.last - last


def peak_memory_gb(device: torch.device) -> float:
    """The GPU's peak of allocated memory, or the process's peak resident size on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def log_scalars(writer: SummaryWriter, scalars: dict[str, float], x: int) -> None:
    for tag, value in scalars.items():
        writer.add_scalar(tag, value, x)


def log_iteration(writer: SummaryWriter, metrics: Metrics, clock: Clock, x: int) -> dict[str, float]:
    scalars = metrics.means() | {f"time/{name}": seconds for name, seconds in clock.seconds.items()}
    scalars["memory/peak_gb"] = peak_memory_gb(clock.device)
    if metrics.tokens:
        scalars["rollout/tokens_per_second"] = metrics.tokens / clock.seconds["sample"]
    log_scalars(writer, scalars, x)
    return scalars


def add_rollout_metrics(metrics: Metrics, rollout: Rollout, rewards: Tensor, components: dict[str, Tensor]) -> None:
    """reward/* and rollout/* of one sampled batch. rewards, components: (P, G)."""
    lengths, right = rollout.lengths.float().cpu(), components["accuracy"].flatten() > 0
    metrics.add({f"reward/{name}": values.mean() for name, values in components.items()}, len(rewards))
    values = {
        "reward/total": rewards.mean(),
        "reward/frac_all_right": (components["accuracy"] > 0).all(1).float().mean(),
        "reward/frac_all_wrong": (components["accuracy"] == 0).all(1).float().mean(),
        "rollout/length_mean": lengths.mean(),
        "rollout/length_max": lengths.max(),
        "rollout/finished": rollout.finished.float().mean(),
    }
    if rollout.group_size > 1:
        values["reward/std_within_group"] = rewards.std(1, correction=0).mean()
    metrics.add(values, len(rewards))
    for name, chosen in (("right", right), ("wrong", ~right)):
        if chosen.any():
            metrics.add({f"rollout/length_{name}": lengths[chosen].mean()}, chosen.sum().item())
    metrics.tokens += int(lengths.sum())


def add_logprob_gap(metrics: Metrics, rollout: Rollout, old_logprobs: Tensor) -> None:
    """Sampler against trainer: the same weights and tokens, so all that differs is kernels, cache and rounding."""
    gap = (rollout.sampler_logprobs - old_logprobs)[rollout.mask].abs()
    metrics.add({"rollout/logprob_gap_mean": gap.mean(), "rollout/logprob_gap_max": gap.max()})


def log_samples(writer: SummaryWriter, tokenizer, rollout: Rollout, texts, components: dict, x: int) -> None:
    """The first completion of the first eight prompts, as indented blocks: markdown would eat tags and newlines."""
    parts = []
    for p in range(min(8, len(rollout.prompt_ids))):
        row = p * rollout.group_size
        scores = ", ".join(f"{name} {values[p, 0].item():g}" for name, values in components.items())
        text = f"{tokenizer.decode(rollout.prompt_ids[p])}\n----\n{texts[row]}"
        parts.append(f"{scores}\n\n" + "\n".join("    " + line for line in text.split("\n")))
    writer.add_text("samples", "\n\n".join(parts), x)


class Health:
    """Watches a run: an update whose loss or gradient is not finite is skipped, and signs of a collapse are printed,
    each once, when they have held for PATIENCE iterations in a row."""

    PATIENCE = 5
    SIGNS = {  # tag: (is it so?, what it means and what to try)
        "loss/entropy": (
            lambda entropy: entropy < 0.005,
            "the policy is nearly deterministic and explores no more: a lower --learning-rate, or more regularisation",
        ),
        "reward/std_within_group": (
            lambda std: std == 0,
            "all completions of every prompt score alike, so a group teaches nothing: other problems, a larger "
            "--group-size, or train_sft.py first",
        ),
        "rollout/finished": (
            lambda finished: finished == 0,
            "every completion is cut by the length limit, so none has an answer: a larger --max-new-tokens, or a model "
            "that ends what it writes (train_sft.py)",
        ),
        "loss/kl": (
            lambda kl: kl > 5,
            "the policy is far from the one that it is held to: a larger --kl-coef or --tau, a lower --learning-rate",
        ),
    }

    def __init__(self, run_dir: Path, tokenizer, max_bad_updates: int):
        self.run_dir, self.tokenizer, self.max_bad_updates = run_dir, tokenizer, max_bad_updates
        self.bad_updates, self.streaks = 0, Counter()

    def is_finite(self, loss: float, grad_norm: float, rollout: Rollout, rows: list[int], **values: Tensor) -> bool:
        """Whether an optimizer may take this step. After max_bad_updates in a row that it may not, the run ends, and
        `bad_update.jsonl` in the run directory has the minibatch: of its rows those with a non-finite entry in one of
        the values, (B,) or (B, T), or else all."""
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.bad_updates = 0
            return True
        self.bad_updates += 1
        what = f"loss {loss:g}, gradient norm {grad_norm:g}"
        if self.bad_updates == 1:
            tqdm.write(f"warning: {what}: this update is skipped (see loss/skipped)", file=sys.stderr)
        if self.bad_updates == self.max_bad_updates:
            file = self.run_dir / "bad_update.jsonl"
            texts, records = decode(self.tokenizer, rollout), []
            for row in rows:
                prompt = self.tokenizer.decode(rollout.prompt_ids[row // rollout.group_size])
                not_finite = [name for name, value in values.items() if not value[row].isfinite().all()]
                ids = rollout.completion_ids[row][rollout.mask[row]].tolist()
                records.append({"not_finite": not_finite, "prompt": prompt, "completion": texts[row], "ids": ids})
            write_jsonl(str(file), [r for r in records if r["not_finite"]] or records)
            limit = f"--max-bad-updates {self.max_bad_updates} updates in a row were not finite"
            fail(f"{limit} (the last: {what}), the weights are as before them; its rows are in {file}")
        return False

    def watch(self, logged: dict[str, float]) -> None:
        """Called with what an iteration has logged."""
        for tag, (is_so, advice) in self.SIGNS.items():
            self.streaks[tag] = self.streaks[tag] + 1 if tag in logged and is_so(logged[tag]) else 0
            if self.streaks[tag] == self.PATIENCE and not self.streaks[f"{tag} told"]:
                self.streaks[f"{tag} told"] = 1
                now = f"{tag} {logged[tag]:.3g} for {self.PATIENCE} iterations"
                tqdm.write(f"warning: {now}: {advice}", file=sys.stderr)


def arithmetic_samples(count: int) -> list[dict]:
    """Records as in a samples file, from the embedded model: eight completions of each of `count` problems of both
    splits, with the reward that is train_grpo.py's default. Always from one seed, on the CPU, in fp32: a run that is
    resumed, on whatever device, must find the same ones."""
    model = "models/tiny-arithmetic"
    tokenizer = common.load_tokenizer(model)
    policy = common.load_policy(model, eos_token_id=tokenizer.eos_token_id)
    problems = load_problems("arithmetic", "all", count)
    prompts = encode_prompts(tokenizer, [p.question for p in problems])
    records = evaluate(policy, tokenizer, problems, prompts, num_samples=8, max_new_tokens=40, progress=True)
    for completion in (c for record in records for c in record["completions"]):
        completion["reward"] = completion["correct"] + 0.2 * completion["format"]
    return records


@dataclass
class Args:
    model: str = "models/tiny-arithmetic"
    """local model directory or hub name"""
    stages: tuple[str, ...] = ()
    """NAME=DIRECTORY ...: several models instead, a table row each"""
    problems: str = "arithmetic"
    """"arithmetic" ("arithmetic:7-8" for difficulties 7 and 8), a .jsonl file, or a hub dataset: its held-out part is
    evaluated (see --split)"""
    split: Literal["eval", "train", "all"] = "eval"
    """which part of --problems; all: both, but never a hub dataset's test or validation split"""
    eval_problems: int = 500
    """how many problems"""
    num_samples: int = 1
    """completions a problem, sampled at --temperature; more than one gives pass@k and the majority vote"""
    temperature: float = 1.0
    """of the sampled completions; the greedy ones are reported beside them"""
    temperatures: tuple[float, ...] = ()
    """others, whose accuracy is a column each"""
    max_new_tokens: int = 40
    """length limit of a completion, tokens; with --think-budget of what comes after it"""
    modes: str = ""
    """think,no_think: each of these, asked for at the end of the user's turn, a table row each"""
    think_budget: int | None = None
    """tokens after which a completion that is still thinking gets --stop-sentence and goes on to its answer"""
    stop_sentence: str = "</think>"
    """closes the think block; Qwen3's begins "Considering the limited time by the user, I have to ..." """
    system_prompt: str = SYSTEM_PROMPT
    """system turn of the chat template; '' for none"""
    format_style: Literal["answer-tags", "think"] = "answer-tags"
    """answer-tags | think: what the format rate counts"""
    judge_model: str | None = None
    """a causal LM that is asked whether an answer that the rules don't match is the reference answer"""
    verifier_model: str | None = None
    """a reward model that scores such an answer instead: above 0 is right (trained with --system-prompt '' on pairs of
    a right and a wrong answer to "Question: ...\nReference answer: ...")"""
    output: str | None = None
    """write the samples file here: a line per problem with its completions"""
    batch_size: int = 256
    """completions sampled at once"""
    seed: int = 0
    device: str = "auto"
    """auto | cpu | cuda"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 on a GPU, float32 on a CPU"""


def main(args: Args) -> None:
    check_flags(args)
    modes = [mode.strip() for mode in args.modes.split(",")] if args.modes else [""]
    if unknown := [mode for mode in modes if args.modes and mode not in MODES]:
        fail(f"--modes {args.modes}: {unknown[0]!r} is none of {', '.join(MODES)}")
    if bad := [t for t in args.temperatures if not (math.isfinite(t) and t > 0)]:
        fail(f"--temperatures {bad[0]}: must be more than 0")
    stages = [stage.partition("=")[::2] for stage in args.stages] or [("", args.model)]
    if bad := [name for name, path in stages if not path]:
        fail(f"--stages {bad[0]}: NAME=DIRECTORY is expected")
    several = len(stages) * len(modes) > 1
    if several and args.output:
        fail("--output: holds the samples of one model in one mode, not of several")
    device = common.resolve_device(args.device)
    dtype = common.resolve_dtype(args.dtype, device)
    problems = load_problems(args.problems, args.split, args.eval_problems)
    flag = "--stages" if args.stages else "--model"
    for _, path in stages:
        common.load_config(path, flag)
    verify, rows = Verifier(args, device, dtype), []
    for name, path in stages:
        tokenizer, policy = common.load_tokenizer(path, flag), None
        for mode in modes:
            questions = [mode_question(p.question, mode) for p in problems]
            prompts = encode_prompts(tokenizer, questions, args.system_prompt)
            stop = tokenizer(args.stop_sentence, add_special_tokens=False).input_ids if args.think_budget else []
            total = args.max_new_tokens + len(stop) + (args.think_budget or 0)
            limits = "--think-budget + --stop-sentence + --max-new-tokens" if args.think_budget else "--max-new-tokens"
            check_context(prompts, [p.id for p in problems], common.load_config(path), total, limits)
            policy = policy or common.load_policy(path, device, dtype, tokenizer.eos_token_id)

            def sample(count: int, temperature: float, prompts=prompts, policy=policy, tokenizer=tokenizer):
                budget = (count, args.max_new_tokens, temperature, args.format_style, args.batch_size, args.seed)
                thinking = (args.think_budget, args.stop_sentence, verify)
                return evaluate(policy, tokenizer, problems, prompts, *budget, not several, *thinking)

            records, greedy = sample(args.num_samples, args.temperature), sample(1, 0.0)
            others = [summarize(sample(args.num_samples, t))["accuracy"] for t in args.temperatures]
            label = ", ".join(part for part in (name, mode) if part) or "all"
            rows.append(accuracy_row(label, records, greedy) + others)
            del sample  # it holds the policy, and the next one needs its room
    if args.output:
        write_jsonl(args.output, [record | ({"mode": modes[0]} if modes[0] else {}) for record in records])
    if not several:
        for field in ("difficulty", "topic"):
            best = by(greedy, field)
            for value, group in by(records, field).items():
                rows.append(accuracy_row(f"{field} {value}", group, best[value]) + [""] * len(args.temperatures))
    header = ["", "problems", f"accuracy (T={args.temperature:g})", "95% interval", "greedy", "95% interval"]
    header += ["format", "greedy format", "length", *(f"T={t:g}" for t in args.temperatures)]
    print(format_table(header, rows))
    if not several:
        summary = summarize(records)
        shown = ["length_right", "length_wrong", "truncated", "no_answer"]
        if args.num_samples > 1:
            shown += ["majority", *(name for name in summary if name.startswith("pass_at_"))]
        print("  ".join(f"{name} {summary[name]:.3f}" for name in shown))
    if (shares := verify.summary()) and not several:
        print(
            "right by: " + "  ".join(f"{name.removeprefix('verifier/')} {share:.3f}" for name, share in shares.items())
        )
    if args.output:
        print(f"samples file: {args.output}")


def accuracy_row(name: str, sampled: list[dict], greedy: list[dict]) -> list:
    summary, best = summarize(sampled), summarize(greedy)
    ranges = ["{:.3f}-{:.3f}".format(*interval(s["accuracy"], len(sampled))) for s in (summary, best)]
    columns = [name, len(sampled), summary["accuracy"], ranges[0], best["accuracy"], ranges[1]]
    return [*columns, summary["format"], best["format"], summary["length"]]


if __name__ == "__main__":
    main(tyro.cli(Args))
