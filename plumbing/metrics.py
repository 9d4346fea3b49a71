"""What a run logs and watches: means over an iteration, times, metrics of a rollout and of an update, samples as text,
and signs of collapse."""

import math
import resource
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from common import Rollout
from data import decode, write_jsonl
from plumbing.flags import fail


class Metrics:
    """Weighted means of what is added in an iteration. Names that end in "_max" keep the largest value instead."""

    def __init__(self):
        self.tokens = 0  # sampled
        self.sums: dict[str, float] = {}
        self.weights: dict[str, float] = {}
        self.weighted: dict[str, bool] = {}

    def add(self, values: dict[str, float], weight: float | None = None) -> None:
        """weight: of these values in their means, such as the tokens that they are about; None: all weigh the same."""
        for name, value in values.items():
            if name.endswith("_max"):
                self.sums[name] = max(float(value), self.sums.get(name, -float("inf")))
                self.weights[name] = 1.0
                continue
            if self.weighted.setdefault(name, weight is not None) != (weight is not None):
                raise ValueError(f"{name} was added with a weight and without one: two metrics need two names")
            if weight is None or weight > 0:
                self.sums[name] = self.sums.get(name, 0.0) + (weight or 1.0) * float(value)
                self.weights[name] = self.weights.get(name, 0.0) + (weight or 1.0)

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


def log_scalars(writer: SummaryWriter, scalars: dict[str, float], global_step: int) -> None:
    for tag, value in scalars.items():
        writer.add_scalar(tag, value, global_step)


def log_iteration(writer: SummaryWriter, metrics: Metrics, clock: Clock, global_step: int, bar: tqdm) -> dict:
    """Writes the iteration's means, times and memory, and moves the progress bar. Returns what was written."""
    scalars = metrics.means() | {f"time/{name}": seconds for name, seconds in clock.seconds.items()}
    scalars["memory/peak_gb"] = peak_memory_gb(clock.device)
    if metrics.tokens:
        scalars["rollout/tokens_per_second"] = metrics.tokens / clock.seconds["sample"]
    log_scalars(writer, scalars, global_step)
    shown = {"loss/policy": "loss", "rewards/accuracy": "acc"}
    if metrics.tokens:
        shown = {"reward/total": "reward", "reward/accuracy": "acc", "rollout/tokens_per_second": "tok/s"}
    bar.set_postfix_str(" ".join(f"{name} {scalars[tag]:.3g}" for tag, name in shown.items() if tag in scalars))
    bar.update()
    if bar.n == bar.total:
        bar.close()
    return scalars


# ---- Metrics of a rollout and of an update -------------------------------------------------------------------------


def add_rollout_metrics(metrics: Metrics, rollout: Rollout, rewards: Tensor, components: dict[str, Tensor]) -> None:
    """reward/* and rollout/* of one sampled batch. rewards, components: (P, G)."""
    lengths, right = rollout.lengths.float().cpu(), components["accuracy"].flatten() > 0
    values = {f"reward/{name}": values.float().mean() for name, values in components.items()} | {
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


def token_metrics(rollout: Rollout, rows: list[int], entropy: Tensor, old_logprobs: Tensor | None = None) -> dict:
    """Means over the rows' trained tokens: entropy, and with old_logprobs the gap between sampler and trainer. They
    compute the same weights and tokens, so only kernels, cache and rounding differ. entropy, old_logprobs: (R, T)."""
    trained = rollout.trained[rows]
    if not trained.any():
        return {}
    values = {"loss/entropy": (entropy.detach() * trained).sum() / trained.sum()}
    if old_logprobs is not None:
        gap = (rollout.sampler_logprobs[rows] - old_logprobs)[trained].abs()
        values |= {"rollout/logprob_gap_mean": gap.mean(), "rollout/logprob_gap_max": gap.max()}
    return values


@torch.no_grad()
def ratio_metrics(ratio: Tensor, advantages: Tensor, mask: Tensor, clip_low: float, clip_high: float) -> dict:
    """Shares of the tokens whose gradient the clip stops, and the largest ratio. All (B, T)."""
    tokens = mask.sum().clamp(min=1)
    clipped_low, clipped_high = (advantages < 0) & (ratio < 1 - clip_low), (advantages > 0) & (ratio > 1 + clip_high)
    return {
        "clip_low": ((clipped_low & mask).sum() / tokens).item(),
        "clip_high": ((clipped_high & mask).sum() / tokens).item(),
        "ratio_max": ratio.masked_fill(~mask, 0.0).max().item(),
    }


def log_samples(writer: SummaryWriter, tokenizer, rollout: Rollout, texts, components: dict, global_step: int) -> None:
    """The first completion of the first eight prompts, as indented blocks: markdown would eat tags and newlines."""
    parts = []
    for p in range(min(8, len(rollout.prompt_ids))):
        row = p * rollout.group_size
        scores = ", ".join(f"{name} {values[p, 0].item():g}" for name, values in components.items())
        text = f"{tokenizer.decode(rollout.prompt_ids[p])}\n----\n{texts[row]}"
        parts.append(f"{scores}\n\n" + "\n".join("    " + line for line in text.split("\n")))
    writer.add_text("samples", "\n\n".join(parts), global_step)


# ---- Health --------------------------------------------------------------------------------------------------------


class Health:
    """Watches a run. An update whose loss or gradient is not finite is skipped. If a run shows a sign of collapse for
    PATIENCE iterations in a row, one warning with suggestions is printed."""

    PATIENCE = 5
    SIGNS = {  # tag: (is it a sign?, what it means and what to try)
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
        "drop of rollout/finished": (
            lambda drop: drop > 0.5,
            "completions have grown into the length limit, which cuts most of them now: look at the texts for "
            "repetition; a larger --max-new-tokens, --overlong-weight, or --loss-norm token or constant",
        ),
        "loss/kl": (
            lambda kl: kl > 5,
            "the policy is far from its reference: a larger --kl-coef or --tau, a lower --learning-rate",
        ),
    }

    def __init__(self, run_dir: Path, tokenizer, max_bad_updates: int):
        self.most_finished = 0.0
        self.run_dir, self.tokenizer, self.max_bad_updates = run_dir, tokenizer, max_bad_updates
        self.bad_updates, self.streaks = 0, Counter()

    def is_finite(self, loss: float, grad_norm: float, rollout: Rollout, rows: list[int], **values: Tensor) -> bool:
        """Whether an optimizer may take this step. After max_bad_updates bad ones in a row the run ends, and
        `bad_update.jsonl` in the run directory has the minibatch: the rows with a non-finite entry in one of the
        values, (B,) or (B, T), or else all rows."""
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
        finished = logged.get("rollout/finished", 0.0)
        self.most_finished = max(self.most_finished, finished)
        if finished:  # else it is the sign above
            logged = logged | {"drop of rollout/finished": self.most_finished - finished}
        for tag, (is_sign, advice) in self.SIGNS.items():
            self.streaks[tag] = self.streaks[tag] + 1 if tag in logged and is_sign(logged[tag]) else 0
            if self.streaks[tag] == self.PATIENCE and not self.streaks[f"{tag} told"]:
                self.streaks[f"{tag} told"] = 1
                now = f"{tag} {logged[tag]:.3g} for {self.PATIENCE} iterations"
                tqdm.write(f"warning: {now}: {advice}", file=sys.stderr)
