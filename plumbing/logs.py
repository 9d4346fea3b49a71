"""Logging and monitoring of a run: means over an iteration, times, metrics of rollouts and updates, samples as text,
and signs of collapse."""

import math
import resource
import sys
import time
from collections import Counter
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from common import Rollout
from data import decode
from plumbing.files import write_jsonl
from plumbing.flags import fail
from plumbing.runs import Writer


class Metrics:
    """Weighted means of the values added in an iteration; names that end in "_max" keep the largest value instead."""

    def __init__(self):
        self.tokens = 0  # sampled tokens
        self.added: list[tuple[str, float | Tensor, float | Tensor | None]] = []  # name, value, weight
        self.weighted: dict[str, bool] = {}

    def add(self, values: dict[str, float | Tensor], weight: float | Tensor | None = None) -> None:
        """weight: weight of these values in their means, such as the number of tokens; None: equal weights. Tensors may
        be on the GPU: `means` reads them all at once, because each reading waits for it."""
        for name, value in values.items():
            weighted = weight is not None and not name.endswith("_max")
            if self.weighted.setdefault(name, weighted) != weighted:
                raise ValueError(f"{name} was added with a weight and without one: use two names")
            self.added.append((name, unread(value), unread(weight) if weighted else 1.0))

    def means(self) -> dict[str, float]:
        sums, weights = {}, {}
        numbers = iter(read([number for _, *pair in self.added for number in pair]))
        for (name, _, _), value, weight in zip(self.added, numbers, numbers, strict=True):
            if name.endswith("_max"):
                sums[name], weights[name] = max(value, sums.get(name, -float("inf"))), 1.0
            elif weight > 0:
                sums[name] = sums.get(name, 0.0) + weight * value
                weights[name] = weights.get(name, 0.0) + weight
        return {name: total / weights[name] for name, total in sums.items()}


def unread(value: float | Tensor) -> float | Tensor:
    """A float, or a copy on the GPU, so that nobody has to wait for it now."""
    on_gpu = isinstance(value, Tensor) and value.device.type != "cpu"
    return value.detach().float().clone() if on_gpu else float(value)


def read(values: list[float | Tensor]) -> list[float]:
    """The values as floats; the GPU is waited for once."""
    waiting = [value for value in values if isinstance(value, Tensor)]
    numbers = iter(torch.stack(waiting).tolist() if waiting else [])
    return [next(numbers) if isinstance(value, Tensor) else value for value in values]


class Clock:
    """Seconds between laps, by name; a lap waits for the GPU's queued work."""

    def __init__(self, device: torch.device):
        self.device, self.seconds = device, {}
        self.last = time.perf_counter()

    def lap(self, name: str) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize()
        last, self.last = self.last, time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + self.last - last


def peak_memory_gb(device: torch.device) -> float:
    """The GPU's peak of allocated memory, or the process's peak resident size on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def log_scalars(writer: Writer, scalars: dict[str, float], global_step: int, samples: list[dict] | None = None) -> None:
    """Writes the scalars as events and as one line of metrics.jsonl. samples: an evaluation's records, a line each of
    samples.jsonl (`HeldOut.samples`)."""
    writer.add_scalars_as_row(scalars, global_step)
    for record in samples or ():
        writer.add_row("samples", record, global_step)


def log_iteration(writer: Writer, metrics: Metrics, clock: Clock, global_step: int, bar: tqdm) -> dict:
    """Writes the iteration's means, times and memory, and moves the progress bar. Returns what was written."""
    scalars = metrics.means() | {f"time/{name}": seconds for name, seconds in clock.seconds.items()}
    scalars["memory/peak_gb"] = peak_memory_gb(clock.device)
    if metrics.tokens:
        scalars["rollout/tokens_per_second"] = metrics.tokens / clock.seconds["sample"]
    writer.iteration += 1
    log_scalars(writer, scalars, global_step)
    shown = {"loss/policy": "loss", "loss/pair": "loss", "rewards/accuracy": "acc"}
    if metrics.tokens:
        shown = {"reward/total": "reward", "reward/accuracy": "acc", "rollout/tokens_per_second": "tok/s"}
    bar.set_postfix_str(" ".join(f"{name} {scalars[tag]:.3g}" for tag, name in shown.items() if tag in scalars))
    bar.update()
    if bar.n == bar.total:
        bar.close()
    return scalars


# ---- Metrics of a rollout and of an update -------------------------------------------------------------------------


def add_rollout_metrics(
    metrics: Metrics, rollout: Rollout, rewards: Tensor, components: dict[str, Tensor], scored: Tensor
) -> None:
    """Adds reward/* and rollout/* of one sampled batch. rewards, scored and each component: (P, G). Means of rewards
    are over scored completions. rollout/same_opening: of the groups' first completions, the share that begins with the
    most frequent 16 tokens."""
    lengths, known, accuracy = rollout.lengths.float().cpu(), scored.flatten(), components["accuracy"]
    some = scored.any(1)  # (P,) groups with a scored completion
    judged = (scored & ~accuracy.isnan()).any(1)  # (P,) groups with a verdict
    for name, values in (components | {"total": rewards}).items():
        applies = scored & ~values.isnan()
        metrics.add({f"reward/{name}": values[applies].float().mean()}, applies.sum().item())
    openings = Counter(map(tuple, rollout.completion_ids[:: rollout.group_size, :16].tolist()))
    values = {
        "rollout/same_opening": max(openings.values()) / len(rewards),
        "rollout/length_mean": lengths.mean(),
        "rollout/length_max": lengths.max(),
        "rollout/finished": rollout.finished.float().mean(),
    }
    if not known.all():
        values["reward/unscored"] = (~known).float().mean()
    metrics.add(values, len(rewards))
    values = {
        "reward/frac_all_right": ((accuracy > 0) | ~scored)[judged].all(1).float().mean(),
        "reward/frac_all_wrong": ((accuracy == 0) | ~scored)[judged].all(1).float().mean(),
    }
    metrics.add(values, judged.sum().item())
    if rollout.group_size > 1 and some.any():
        stds = [group[of_group].std(correction=0) for group, of_group in zip(rewards[some], scored[some], strict=True)]
        metrics.add({"reward/std_within_group": torch.stack(stds).mean()}, some.sum().item())
    for name, chosen in (("right", known & (accuracy.flatten() > 0)), ("wrong", known & (accuracy.flatten() == 0))):
        if chosen.any():
            metrics.add({f"rollout/length_{name}": lengths[chosen].mean()}, chosen.sum().item())
    metrics.tokens += int(lengths.sum())


def token_metrics(rollout: Rollout, rows: list[int], entropy: Tensor, old_logprobs: Tensor | None = None) -> dict:
    """Over the rows' trained tokens: mean entropy and, with old_logprobs, the logprob gap of sampler and trainer. If
    both use the same weights, only kernels, cache and rounding differ. entropy, old_logprobs: (R, T)."""
    trained = rollout.trained[rows]
    values = {"loss/entropy": (entropy.detach() * trained).sum() / trained.sum()}  # NaN without a token: weight 0
    if old_logprobs is not None:
        gap = (rollout.sampler_logprobs[rows] - old_logprobs).abs().masked_fill(~trained, 0.0)
        values |= {"rollout/logprob_gap_mean": gap.sum() / trained.sum(), "rollout/logprob_gap_max": gap.max()}
    return values


@torch.no_grad()
def ratio_metrics(ratio: Tensor, advantages: Tensor, mask: Tensor, clip_low: float, clip_high: float) -> dict:
    """Fractions of tokens whose ratio has left the clip range on the side to which their advantage pushes it, where
    PPO's clip removes the gradient, and the largest ratio. Tensors are (B, T)."""
    tokens = mask.sum().clamp(min=1)
    clipped_low, clipped_high = (advantages < 0) & (ratio < 1 - clip_low), (advantages > 0) & (ratio > 1 + clip_high)
    return {
        "clip_low": (clipped_low & mask).sum() / tokens,
        "clip_high": (clipped_high & mask).sum() / tokens,
        "ratio_max": ratio.masked_fill(~mask, 0.0).max(),
    }


def log_samples(writer: SummaryWriter, tokenizer, rollout: Rollout, texts, components: dict, global_step: int) -> None:
    """Logs one completion of each of the first eight prompts, indented: markdown would drop tags and newlines."""
    parts = []
    for p in range(min(8, len(rollout.prompt_ids))):
        row = p * rollout.group_size
        values = {name: values[p, 0].item() for name, values in components.items()}
        scores = ", ".join(f"{name} {value:g}" for name, value in values.items() if not math.isnan(value))
        text = f"{tokenizer.decode(rollout.prompt_ids[p])}\n----\n{texts[row]}"
        parts.append(f"{scores}\n\n" + "\n".join("    " + line for line in text.split("\n")))
    writer.add_text("samples", "\n\n".join(parts), global_step)


# ---- Health --------------------------------------------------------------------------------------------------------


class Health:
    """Monitors a run. Updates with a non-finite loss or gradient are skipped. If a sign of collapse persists for
    PATIENCE iterations in a row (in evaluations, which are rare: shows once), or if sampler and trainer are not one
    policy, it prints one warning with suggestions.
    """

    PATIENCE = 5
    CLOSER = "try a larger --kl-coef, --beta (DPO) or --tau (Kimi), or a lower --learning-rate"
    SIGNS = {  # tag: (test for the sign, meaning and advice)
        "loss/entropy": (
            lambda entropy: entropy < 0.005,
            "the policy is nearly deterministic and no longer explores: lower --learning-rate or add regularisation",
        ),
        "reward/std_within_group": (
            lambda std: std == 0,
            "in every group all completions get the same reward, so nothing is learned: try other problems, a larger "
            "--group-size, or train_sft.py first",
        ),
        "rollout/finished": (
            lambda finished: finished == 0,
            "every completion is cut by the length limit, so none has an answer: try a larger --max-new-tokens, or a "
            "model that ends its completions (train_sft.py)",
        ),
        "drop of rollout/finished": (
            lambda drop: drop > 0.5,
            "completions have grown to the length limit, which now cuts most of them: check the texts for repetition; "
            "try a larger --max-new-tokens, --overlong-weight, or --loss-norm token or constant",
        ),
        "rise of rollout/same_opening": (
            lambda rise: rise > 0.5,
            "most completions begin with the same words, whatever the question: a template that some reward likes? "
            "Read the samples; lower that reward's weight, or raise --kl-coef",
        ),
        "rise of eval/truncated": (
            lambda rise: rise > 0.25,
            "completions have grown to the length limit: read them; are the chosen ones mostly the longer ones? Try "
            "--length-normalize, a larger --beta, or pairs that don't differ in length",
        ),
        # Nats a completion, one limit for each quantity. Measured on the embedded models, with healthy runs first: GRPO
        # at most 1.0, PPO on a reward model 3.1, or 15 at a KL weight of 0.0001, which ruined it; Kimi 0.05, ruined at
        # 176; DPO on its pairs 4, ruined at 17; DPO on its samples 1.3, ruined at 8.
        "loss/kl x rollout/length_mean": (lambda kl: kl > 5, f"the policy is far from its reference: {CLOSER}"),
        "loss/anchor_kl": (lambda kl: kl > 5, f"an iteration moves the policy far from its start: {CLOSER}"),
        "loss/pair_kl": (lambda kl: kl > 10, f"the policy is far from its reference: {CLOSER}"),
        "eval/kl": (lambda kl: kl > 5, f"the policy is far from its reference: {CLOSER}"),
    }
    CHANGES = {"drop of rollout/finished": -1, "rise of rollout/same_opening": 1, "rise of eval/truncated": 1}
    # The rollout/logprob_gap_mean that rounding explains. Measured on a CPU, on the policy's own fresh samples: 3e-7
    # in float32; in bfloat16 0.0014 for the embedded model, 0.045 for SmolLM2-135M. One step of 1e-4 moves the embedded
    # model by 0.008, which only float32 can tell from rounding.
    GAP_LIMITS = {torch.float32: 1e-4, torch.bfloat16: 0.15}

    def __init__(self, run_dir: Path, tokenizer, max_bad_updates: int, dtype: torch.dtype = torch.float32):
        self.run_dir, self.tokenizer, self.max_bad_updates = run_dir, tokenizer, max_bad_updates
        self.gap_limit = self.GAP_LIMITS[dtype]
        self.bad_updates = 0
        self.lowest: dict[str, float] = {}  # of the quantities in CHANGES, with their sign
        self.streaks: Counter = Counter()  # tag: iterations in a row that show its sign
        self.warned: set[str] = set()

    def allows_step(
        self, loss: float | Tensor, grad_norm: float, rollout: Rollout, rows: list[int], **values: Tensor
    ) -> bool:
        """Whether the optimizer may take this step: not with a loss or gradient that is not finite. After
        max_bad_updates of those in a row it reports the last minibatch (see `give_up`) and ends the run."""
        loss = float(loss)
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.bad_updates = 0
            return True
        self.bad_updates += 1
        what = f"loss {loss:g}, gradient norm {grad_norm:g}"
        if self.bad_updates == 1:
            tqdm.write(f"warning: {what}: this update is skipped (see loss/skipped)", file=sys.stderr)
        if self.bad_updates == self.max_bad_updates:
            self.give_up(what, rollout, rows, values)
        return False

    def give_up(self, what: str, rollout: Rollout, rows: list[int], values: dict[str, Tensor]) -> NoReturn:
        """Writes rows of the last minibatch to `bad_update.jsonl` in the run directory, and ends the run. values: (B,)
        or (B, T); only rows with a non-finite entry in one of them are written, or all rows if there is none."""
        file = self.run_dir / "bad_update.jsonl"
        texts, records = decode(self.tokenizer, rollout), []
        for row in rows:
            prompt = self.tokenizer.decode(rollout.prompt_ids[row // rollout.group_size])
            not_finite = [name for name, value in values.items() if not value[row].isfinite().all()]
            ids = rollout.completion_ids[row][rollout.mask[row]].tolist()
            records.append({"not_finite": not_finite, "prompt": prompt, "completion": texts[row], "ids": ids})
        write_jsonl(file, [r for r in records if r["not_finite"]] or records)
        limit = f"--max-bad-updates {self.max_bad_updates} updates in a row were not finite"
        fail(f"{limit} (the last: {what}); they did not change the weights. The last one's rows are in {file}")

    def watch(self, logged: dict[str, float], filtered: bool = False) -> None:
        """Checks the logged scalars of an iteration or of an evaluation. filtered: the rollout was sampled through a
        filter."""
        logged = dict(logged)
        for change, sign in self.CHANGES.items():
            value = logged.get(change.rpartition(" ")[2])
            if value is not None and (value or sign > 0):  # that none has finished is a sign of its own
                self.lowest[change] = min(sign * value, self.lowest.get(change, math.inf))
                logged[change] = sign * value - self.lowest[change]
        if "loss/kl" in logged:  # a long completion may have more nats, at up to 0.05 a token
            nats = logged["loss/kl"] * logged.get("rollout/length_mean", 1.0)
            logged["loss/kl x rollout/length_mean"] = nats if logged["loss/kl"] > 0.05 else 0.0
        for tag in [tag for tag in self.SIGNS if tag in logged]:
            is_sign, advice = self.SIGNS[tag]
            self.streaks[tag] = self.streaks[tag] + 1 if is_sign(logged[tag]) else 0
            patience = 1 if "eval/" in tag else self.PATIENCE
            if self.streaks[tag] == patience:
                lasting = f" for {patience} iterations" if patience > 1 else ""
                self.warn(tag, f"{logged[tag]:.3g}{lasting}: {advice}")
        tag = "rollout/logprob_gap_mean"
        if (gap := logged.get(tag, 0.0)) > self.gap_limit or filtered:
            stale = "another policy sampled this batch (an older one, or one with another temperature or dtype)"
            cause = "the sampler's `filter` changed the distribution" if filtered else stale
            limit = f"{gap:.3g}, rounding explains {self.gap_limit:g}"
            self.warn(
                tag, f"{limit}: {cause}. Unless the loss corrects for it, it takes the tokens as the policy's own"
            )

    def warn(self, tag: str, text: str) -> None:
        """Prints a warning, once for each tag."""
        if tag not in self.warned:
            self.warned.add(tag)
            tqdm.write(f"warning: {tag} {text}", file=sys.stderr)
