"""Accuracy of a model on held-out problems, and the samples file.

    python evaluate.py --model runs/.../final
    python evaluate.py --num-samples 8 --output samples.jsonl      # pass@k, majority vote; N-best for later stages

Accuracy is reported *sampled at temperature 1* (the policy that RL trains) and greedy, each with a 95% interval.
"""

import json
import math
import os
import resource
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import common
from common import Rollout, derive_seed, fail
from data import SYSTEM_PROMPT, Problem, check_context, check_flags, decode, encode_prompts, load_problems
from rewards import accuracy_reward, answers_match, extract_answer, format_reward

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
) -> list[dict]:
    """A record for each problem: its fields and `completions`, a list of {text, answer, correct, format, reward,
    length, finished}. reward = correct. batch_size: completions sampled at once."""
    records = []
    per_batch = max(1, batch_size // num_samples)
    # Similar lengths together; an index, not a shuffle, so that the result is in the order of `problems` again.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in tqdm(range(0, len(order), per_batch), desc="evaluate", disable=not progress):
        batch = order[start : start + per_batch]
        rollout = common.sample_groups(
            policy,
            [prompts[i] for i in batch],
            num_samples,
            max_new_tokens,
            temperature,
            derive_seed("evaluate", seed, start),
        )
        texts = decode(tokenizer, rollout)
        for p, i in enumerate(batch):
            completions = []
            for row in range(p * num_samples, (p + 1) * num_samples):
                correct = accuracy_reward(texts[row], problems[i].answer)
                completions.append(
                    {
                        "text": texts[row],
                        "answer": extract_answer(texts[row]),
                        "correct": bool(correct),
                        "format": format_reward(texts[row], format_style),
                        "reward": correct,
                        "length": int(rollout.lengths[row]),
                        "finished": bool(rollout.finished[row]),
                    }
                )
            records.append((i, asdict(problems[i]) | {"completions": completions}))
    return [record for _, record in sorted(records, key=lambda pair: pair[0])]


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
        "majority": mean(
            answers_match(majority_answer([c["answer"] for c in record["completions"]]), record["answer"])
            for record in records
        ),
    }
    for k in sorted({2**i for i in range(n.bit_length())} | {n}):
        right = (sum(c["correct"] for c in record["completions"]) for record in records)
        summary[f"pass_at_{k}"] = mean(pass_at_k(n, c, k) for c in right)
    return summary


def by(records: list[dict], field: str) -> dict[str, list[dict]]:
    """Records by difficulty or topic; those without one are left out."""
    values = {record[field] for record in records} - {None, ""}
    return {value: [r for r in records if r[field] == value] for value in sorted(values)}


def evaluate_policy(policy, tokenizer, problems, prompts, args, batch_size) -> dict[str, float]:
    """What a train script logs: the eval/* scalars, sampled at temperature 1 unless the name says greedy."""

    def run(num_samples: int, temperature: float) -> list[dict]:
        budget = (num_samples, args.max_new_tokens, temperature, args.format_style)
        return evaluate(policy, tokenizer, problems, prompts, *budget, batch_size=batch_size, seed=args.seed)

    sampled, greedy = run(SAMPLES, 1.0), run(1, 0.0)
    summary = summarize(sampled)
    names = ("accuracy", "format", "length", "length_right", "length_wrong", "truncated", "no_answer")
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


def pair_table(before: dict[str, float], after: dict[str, float]) -> str:
    """What a preference method's evaluations say beside the accuracy, before and after training."""
    names = ("pair_accuracy", "pair_margin", "pair_loss", "calibration", "kl", "win_rate")
    rows = [[name, before[f"eval/{name}"], after[f"eval/{name}"]] for name in names if f"eval/{name}" in after]
    return format_table(["held-out", "before", "after"], rows)


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
            "the policy is nearly deterministic and explores no more: a lower --learning-rate, or a KL (--kl-coef)",
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
            lambda kl: kl > 1,
            "the policy is far from where it started: a larger --kl-coef (or --tau), a lower --learning-rate",
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
            write_samples(file, [r for r in records if r["not_finite"]] or records)
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
    problems: str = "arithmetic"
    """"arithmetic", a .jsonl file, or a hub dataset: its held-out part is evaluated (see --split)"""
    split: Literal["eval", "train", "all"] = "eval"
    """which part of --problems"""
    eval_problems: int = 500
    """how many problems"""
    num_samples: int = 1
    """completions a problem, sampled at --temperature; more than one gives pass@k and the majority vote"""
    temperature: float = 1.0
    """of the sampled completions; the greedy ones are reported beside them"""
    max_new_tokens: int = 40
    """length limit of a completion, tokens"""
    system_prompt: str = SYSTEM_PROMPT
    """system turn of the chat template; '' for none"""
    format_style: Literal["answer-tags", "think"] = "answer-tags"
    """answer-tags | think: what the format rate counts"""
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
    if args.output and Path(args.output).is_dir():
        fail(f"--output {args.output}: is a directory, a file's name is expected")
    if args.output and not os.access(Path(args.output).resolve().parent, os.W_OK):
        fail(f"--output {args.output}: its directory is not there or not writable")
    check_flags(args)
    device = common.resolve_device(args.device)
    tokenizer = common.load_tokenizer(args.model)
    problems = load_problems(args.problems, args.split, args.eval_problems)
    prompts = encode_prompts(tokenizer, [p.question for p in problems], args.system_prompt)
    check_context(prompts, [p.id for p in problems], common.load_config(args.model), args.max_new_tokens)
    policy = common.load_policy(args.model, device, common.resolve_dtype(args.dtype, device), tokenizer.eos_token_id)

    sample = (args.max_new_tokens, args.temperature, args.format_style, args.batch_size, args.seed)
    records = evaluate(policy, tokenizer, problems, prompts, args.num_samples, *sample, progress=True)
    greedy = evaluate(policy, tokenizer, problems, prompts, 1, args.max_new_tokens, 0.0, *sample[2:], progress=True)
    if args.output:
        write_samples(Path(args.output), records)

    def row(name: str, sampled: list[dict], greedy: list[dict]) -> list:
        summary, best = summarize(sampled), summarize(greedy)
        ranges = ["{:.3f}-{:.3f}".format(*interval(s["accuracy"], len(sampled))) for s in (summary, best)]
        columns = [name, len(sampled), summary["accuracy"], ranges[0], best["accuracy"], ranges[1]]
        return [*columns, summary["format"], best["format"], summary["length"]]

    rows = [row("all", records, greedy)]
    for field in ("difficulty", "topic"):
        others = by(greedy, field)
        rows += [row(f"{field} {value}", group, others[value]) for value, group in by(records, field).items()]
    header = ["", "problems", f"accuracy (T={args.temperature:g})", "95% interval", "greedy", "95% interval"]
    print(format_table([*header, "format", "greedy format", "length"], rows))
    summary = summarize(records)
    shown = ["length_right", "length_wrong", "truncated", "no_answer"]
    if args.num_samples > 1:
        shown += ["majority", *(name for name in summary if name.startswith("pass_at_"))]
    print("  ".join(f"{name} {summary[name]:.3f}" for name in shown))
    if args.output:
        print(f"samples file: {args.output}")


def write_samples(path: Path, records: list[dict]) -> None:
    """A line per problem. Written aside and renamed, so that what was there stays whole until the new one is."""
    aside = path.with_name(path.name + ".tmp")
    aside.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    os.replace(aside, path)


if __name__ == "__main__":
    main(tyro.cli(Args))
