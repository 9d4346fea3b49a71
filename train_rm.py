r"""Trains a reward model on preference pairs. In the Bradley-Terry model, y+ is preferred to y- with a probability of
sigmoid(r(x, y+) - r(x, y-)) (Stiennon et al. 2020, arXiv:2009.01325; Ouyang et al. 2022, arXiv:2203.02155, eq. 1).

    L = - mean of log sigmoid(r(x, y+) - r(x, y-) - margin)              margin (--margin) is 0 in these papers

The model is the policy's backbone with a linear head that has one output and no bias. The head starts at 0, so the
first loss is log 2. The score is read at the completion's last token, its EOS. The loss depends only on differences, so
the level of the scores is arbitrary: their mean over 1,024 training pairs is saved in the config as `score_mean`, and
`common.completion_scores` subtracts it (InstructGPT shifts a bias so that demonstrations have mean 0).

The trained model is an ordinary sequence classifier with one label, which transformers loads.

Departures from the papers:
1. Pairs are drawn one by one, and a prompt has at most --max-pairs-per-prompt; InstructGPT puts all pairs of a prompt
   into one batch element.
2. The optimizer is AdamW; its learning rate decays as a cosine to a tenth, and gradients are clipped.

    python train_rm.py                                    # pairs of the embedded model's samples
    python evaluate.py --split all --num-samples 8 --output samples.jsonl && python train_rm.py --data samples.jsonl
    python train_rm.py --model Qwen/Qwen2.5-0.5B-Instruct --data pairs.jsonl --learning-rate 1e-5 \
        --minibatch-size 64                                            # needs a GPU; untested

What you should see from the first command, in 41 s on 2 cores (AMD EPYC): the share of held-out pairs ranked right
rises from 0.50 to 0.74, with a calibration error of 0.05. Once the training pairs are memorized, the margin keeps
growing and eval/pair_loss rises again.
"""

import math
import random
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from tqdm import tqdm

import common
from data import ProblemSampler, is_held_out
from plumbing import flags, logs, pairs, runs


@dataclass
class Args:
    model: str = "models/tiny-arithmetic"
    """model whose backbone the reward model starts from: local model directory or hub name"""
    data: str = "arithmetic-pairs"
    """pairs: "arithmetic-pairs", a file (docs/data.md), or a samples file; a tenth is held out"""
    seed: int = 1
    """random seed"""
    iterations: flags.AtLeast0 = 200
    """optimizer steps; also the length of the learning rate's cosine: changing it on --resume changes the schedule"""
    minibatch_size: flags.AtLeast1 = 64
    """pairs per optimizer step"""
    learning_rate: flags.Positive = 3e-4
    """AdamW's peak learning rate; the default is for the embedded model, use 1e-5 for real models"""
    weight_decay: flags.NonNegative = 0.0
    """AdamW's weight decay, on all weights"""
    system_prompt: str = flags.SYSTEM_PROMPT
    """system turn of the chat template ('' for none); the embedded model's template ignores it"""
    device: str = "auto"
    """auto | cpu | cuda | cuda:1 ..."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """dtype of the weights; auto: bfloat16 on a GPU that has it (with fp32 master weights), else float32"""
    selection: flags.Group[pairs.PairFlags] = field(default_factory=pairs.PairFlags)
    optimization: flags.Group[flags.OptimizationFlags] = field(
        default_factory=lambda: flags.OptimizationFlags(warmup_iterations=20, micro_batch_tokens=4096)
    )
    run: flags.Group[flags.RunFlags] = field(default_factory=lambda: flags.RunFlags(eval_every=0, save_every=0))

    margin: flags.NonNegative = 0.0
    """subtracted from the difference of a pair's scores in the loss"""


def reward_model_loss(
    chosen_scores: Tensor, rejected_scores: Tensor, margin: float | Tensor = 0.0, row_weights: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Scores of whole completions, (B,). row_weights (B,): the loss is the sum of the pairs' losses with these weights;
    None: the mean. Returns the loss and metrics, which are means over pairs."""
    margins = chosen_scores - rejected_scores  # positive where the pair is ranked as labelled
    per_row = -logsigmoid(margins - margin)  # arXiv:2203.02155, eq. 1
    if row_weights is None:
        row_weights = torch.full_like(per_row, 1 / len(per_row))
    metrics = {
        "rewards/chosen": chosen_scores.mean().detach(),
        "rewards/rejected": rejected_scores.mean().detach(),
        "rewards/margin": margins.mean().detach(),
        "rewards/accuracy": pairs.ranked_right(margins).mean().detach(),
    }
    return (row_weights * per_row).sum(), metrics


def calibration_error(margins: Tensor, bins: int = 10) -> float:
    """Expected calibration error of (N,) margins. sigmoid(|margin|) is the confidence in the preferred side. Over equal
    bins of 0.5 to 1: |accuracy - mean confidence| of each bin, averaged with its share of the pairs as the weight."""
    confidence, right = margins.abs().sigmoid(), pairs.ranked_right(margins)
    index = ((confidence - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    gaps = torch.zeros(bins, dtype=margins.dtype, device=margins.device).index_add(0, index, right - confidence)
    return gaps.abs().sum().item() / len(margins)


def pair_scores(reward_model, dataset: list[pairs.Pair], max_tokens: int) -> Tensor:
    """(N, 2) scores of N pairs: chosen, rejected."""
    scores = []
    for start in range(0, len(dataset), 256):
        rollout = pairs.pair_rollout(dataset[start : start + 256], reward_model.device)
        scores.append(common.rollout_scores(reward_model, rollout, max_tokens).cpu())
    return torch.cat(scores).view(-1, 2)


def main(args: Args) -> None:
    # ------------------------------------------------------------------------------------------------------------ Setup
    device = common.resolve_device(args.device)
    dtype = common.resolve_dtype(args.dtype, device)
    tokenizer, config = common.load_tokenizer(args.model), common.load_config(args.model)
    dataset = pairs.load_preference_pairs(args.data, args.seed, args.selection)
    dataset = pairs.encode_pairs(tokenizer, dataset, args.system_prompt, common.context_length(config))
    held_out_pairs = [pair for pair in dataset if is_held_out(pair.question)][: args.run.eval_problems]
    train = [pair for pair in dataset if not is_held_out(pair.question)]
    if len(train) < args.minibatch_size:
        flags.fail(f"--minibatch-size {args.minibatch_size}: only {len(train)} pairs are left to train on; lower it")
    sampler = ProblemSampler(train, seed=args.seed, contents=dataset)

    run = runs.Run(args, tokenizer)
    rm = common.load_reward_model(run.start_from, tokenizer, device, dtype, new_head=run.start_from == args.model)
    rm.config.pad_token_id = tokenizer.pad_token_id = common.pad_apart(tokenizer)
    rm.config.score_mean = 0.0  # set after training
    if args.optimization.gradient_checkpointing:
        common.checkpoint_layers(rm)
    options = {"offload": args.optimization.offload_optimizer, "weight_decay": args.weight_decay}
    optimizer = common.MasterAdamW(rm, args.learning_rate, betas=(0.9, 0.95), **options)
    run.restore(optimizer=optimizer, sampler=sampler)  # checkpointed together with the model

    def evaluate_now() -> dict[str, float]:
        if not held_out_pairs:
            return {}
        chosen, rejected = pair_scores(rm, held_out_pairs, args.optimization.micro_batch_tokens).unbind(1)
        loss, values = reward_model_loss(chosen, rejected, args.margin)
        values = {name: values[f"rewards/{name}"] for name in ("accuracy", "margin")} | {"loss": loss.item()}
        scores = {f"eval/pair_{name}": value for name, value in values.items()}
        scores |= {"eval/calibration": calibration_error(chosen - rejected), "eval/pairs": float(len(held_out_pairs))}
        return scores

    iteration, global_step = run.progress["iteration"], run.progress["global_step"]  # global_step: pairs seen
    before, scores = run.progress.get("before"), run.progress.get("scores")
    if before is None:  # a new run
        before = scores = evaluate_now()
        logs.log_scalars(run.writer, scores, global_step)

    bar = tqdm(total=args.iterations, initial=iteration, desc="RM", unit="it")
    health = logs.Health(run.dir, tokenizer, args.optimization.max_bad_updates, dtype)
    while iteration < args.iterations:
        metrics, clock = logs.Metrics(), logs.Clock(device)
        # ----------------------------------------------------------------------------------------------------- 1 sample
        batch = sampler.draw(args.minibatch_size)
        rollout = pairs.pair_rollout(batch, device)  # rows chosen, rejected, chosen, ...
        row_weights = torch.tensor([pair.weight / len(batch) for pair in batch], device=device)  # (B,), one per pair
        global_step += len(batch)
        clock.lap("sample")

        # ----------------------------------------------------------------------------------------------------- 2 update
        rise = min(1.0, (iteration + 1) / max(1, args.optimization.warmup_iterations))
        learning_rate = args.learning_rate * rise * (0.55 + 0.45 * math.cos(math.pi * iteration / args.iterations))
        common.set_learning_rate(optimizer, learning_rate)
        minibatch_loss = 0.0
        for micro in pairs.pair_micro_batches(rollout, args.optimization.micro_batch_tokens):
            row_scores = common.completion_scores(rm, rollout, micro)  # chosen, rejected, chosen, ...
            weights = row_weights[[row // 2 for row in micro[0::2]]]
            loss, loss_metrics = reward_model_loss(row_scores[0::2], row_scores[1::2], args.margin, weights)
            loss.backward()
            minibatch_loss += loss.detach()
            metrics.add(loss_metrics, weight=len(micro))
        grad_norm = torch.nn.utils.clip_grad_norm_(optimizer.masters, args.optimization.max_grad_norm).item()
        finite = health.allows_step(minibatch_loss, grad_norm, rollout, range(len(rollout.mask)))
        if finite:
            optimizer.step()
        optimizer.zero_grad()
        metrics.add({"loss/pair": minibatch_loss, "loss/grad_norm": grad_norm, "loss/skipped": not finite})
        clock.lap("update")

        # -------------------------------------------------------------------------------------------------------- 3 log
        iteration += 1
        metrics.add({"loss/learning_rate": learning_rate})
        health.watch(logs.log_iteration(run.writer, metrics, clock, global_step, bar))

        # ------------------------------------------------------------------------------------------ 4 evaluate and save
        if iteration == args.iterations or (args.run.eval_every and iteration % args.run.eval_every == 0):
            scores = evaluate_now()
            logs.log_scalars(run.writer, scores, global_step)
        run.checkpoint(rm, iteration, global_step, before=before, scores=scores)

    some = random.Random(args.seed).sample(train, min(1024, len(train)))  # enough for the mean
    rm.config.score_mean = pair_scores(rm, some, args.optimization.micro_batch_tokens).mean().item()
    run.finish(rm, pairs.pair_table(before, scores, [pair.question for pair in held_out_pairs]))


if __name__ == "__main__":
    flags.start(main, Args)
