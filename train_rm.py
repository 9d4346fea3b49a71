"""A reward model from preference pairs, after Bradley and Terry: the chance that y+ is preferred to y- is the sigmoid
of the difference of their scores (Stiennon et al. 2020, arXiv:2009.01325; Ouyang et al. 2022, arXiv:2203.02155, eq. 1).

    L = - mean of log sigmoid(r(x, y+) - r(x, y-) - margin)

The model is the policy's backbone under a linear head with one output and no bias, which begins at 0, so that the first
loss is log 2. A score is read at the completion's last token, its EOS. The loss only sees differences, so the level of
the scores is arbitrary: their mean over 1,024 training pairs is kept in the config as `score_mean`, and
`common.completion_scores` subtracts it (Stiennon et al. shift the head's bias; this head has none).

Where it departs from the papers: a batch is of single pairs, and those of a prompt are capped (--max-pairs-per-prompt),
where InstructGPT puts all pairs of a prompt into one batch element. The result is an ordinary sequence classifier with
one label, which transformers loads.

    python train_rm.py                                    # pairs of the embedded model's samples
    python evaluate.py --split all --num-samples 8 --output samples.jsonl && python train_rm.py --data samples.jsonl
    python train_rm.py --model Qwen/Qwen2.5-0.5B-Instruct --data pairs.jsonl --learning-rate 1e-5 \\
        --minibatch-size 64                                            # with a GPU, not run on one yet

What you should see from the first command, in 41 s on 2 cores (AMD EPYC): held-out pairs ranked right from 0.50 to
0.74, with a calibration error of 0.05. The margin goes on growing when the training pairs are known by heart;
eval/pair_loss then turns up again.
"""

import math
import random
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from tqdm import tqdm

import common
import evaluate
from common import fail
from data import (
    SYSTEM_PROMPT,
    ProblemSampler,
    check_flags,
    check_memory,
    context_length,
    encode_pairs,
    is_held_out,
    load_preference_pairs,
    pair_micro_batches,
    pair_rollout,
)
from evaluate import Clock, Metrics, pair_table, ranked_right


@dataclass
class Args:
    model: str = "models/tiny-arithmetic"
    """the policy whose backbone is trained on: local model directory or hub name"""
    data: str = "arithmetic-pairs"
    """"arithmetic-pairs" (N-best samples of the embedded model, made at the start), a .jsonl file (prompt, chosen,
    rejected), or a samples file of evaluate.py; a tenth of the prompts, chosen by hash, is held out"""
    pair_problems: int = 1500
    """arithmetic-pairs: how many problems are sampled, eight times each"""
    pair_weight: Literal["uniform", "gap"] = "uniform"
    """weight of a pair in the loss; gap: proportional to the difference of its scores (samples files)"""
    min_gap: float = 0.5
    """scores of a samples file that differ by less are a near tie, no pair; where a right answer counts 1 and format
    0.2, as in arithmetic-pairs, 0.5 leaves pairs of a right and a wrong one"""
    max_pairs_per_prompt: int = 4
    """at most so many pairs of one prompt, chosen at random"""
    balance_topics: bool = False
    """as many pairs of every topic as there are of the rarest"""
    system_prompt: str = SYSTEM_PROMPT
    """system turn of the chat template ('' for none); the embedded model's template ignores it"""
    seed: int = 1
    device: str = "auto"
    """auto | cpu | cuda | cuda:1 ..."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """of the weights; auto: bfloat16 on a GPU (with fp32 master weights), float32 on a CPU"""
    iterations: int = 200
    """optimizer steps, and the length of the learning rate's cosine (so changing it on --resume bends that)"""
    minibatch_size: int = 64
    """pairs in one optimizer step"""
    learning_rate: float = 3e-4
    """of AdamW at its peak, for the embedded model; 1e-5 for real ones"""
    weight_decay: float = 0.0
    """of AdamW, on all weights"""
    warmup_iterations: int = 20
    """iterations over which the learning rate rises linearly"""
    micro_batch_tokens: int = 4096
    """tokens (prompt and completion of each row) in a forward and backward pass, at least a pair; not the result"""
    gradient_checkpointing: bool = False
    """keep only each layer's input for the backward pass and compute the layer again there: less memory, slower"""
    max_grad_norm: float = 1.0
    """gradients are clipped to this norm"""
    max_bad_updates: int = 10
    """updates with a non-finite loss or gradient are skipped; so many of them in a row end the run"""
    eval_every: int = 0
    """iterations between evaluations; 0: only before and after"""
    eval_problems: int = 300
    """held-out pairs in an evaluation"""
    save_every: int = 0
    """iterations between checkpoints; 0: none but final/"""
    keep_checkpoints: int = 0
    """so many of the newest checkpoints are kept; 0: all"""
    run_root: str = "runs"
    """where run directories are made"""
    resume: str | None = None
    """run directory to go on in, from its newest checkpoint, with its arguments"""

    margin: float = 0.0
    """the scores of a pair should differ by more than this"""


def reward_model_loss(
    chosen_scores: Tensor, rejected_scores: Tensor, margin: float | Tensor = 0.0, row_weights: Tensor | None = None
) -> tuple[Tensor, dict[str, float]]:
    """Scores (B,) of whole completions. row_weights (B,): of the pairs, the loss is their weighted sum; None: the mean.
    Returns the loss and means over pairs."""
    margins = chosen_scores - rejected_scores  # positive where the pair is ranked as labelled
    per_row = -logsigmoid(margins - margin)  # arXiv:2203.02155, eq. 1
    if row_weights is None:
        row_weights = torch.full_like(per_row, 1 / len(per_row))
    metrics = {
        "rewards/chosen": chosen_scores.mean().item(),
        "rewards/rejected": rejected_scores.mean().item(),
        "rewards/margin": margins.mean().item(),
        "rewards/accuracy": ranked_right(margins).mean().item(),
    }
    return (row_weights * per_row).sum(), metrics


def calibration_error(margins: Tensor, bins: int = 10) -> float:
    """Expected calibration error: the model is sigmoid(|margin|) sure of the side that it prefers. In each of the equal
    bins of 0.5 to 1, |how often it is right - how sure it is|, weighted by the bin's share of the pairs."""
    confidence, right = margins.abs().sigmoid(), ranked_right(margins)
    index = ((confidence - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    gaps = torch.zeros(bins, dtype=margins.dtype, device=margins.device).index_add(0, index, right - confidence)
    return gaps.abs().sum().item() / len(margins)


@torch.no_grad()
def pair_scores(reward_model, prompts: list[list[int]], completions: list, max_tokens: int) -> Tensor:
    """(N, 2) scores of N pairs: chosen, rejected."""
    scores = torch.zeros(2 * len(prompts))
    for start in range(0, len(prompts), 256):
        chunk = slice(start, start + 256)
        rollout = pair_rollout(prompts[chunk], completions[chunk], reward_model.device)
        for micro in pair_micro_batches(rollout, max_tokens):
            rows = [2 * start + row for row in micro]
            scores[rows] = common.completion_scores(reward_model, rollout, micro).cpu()
    return scores.view(-1, 2)


def main(args: Args) -> None:
    # ------------------------------------------------------------------------------------------------------- Setup
    check_flags(args)
    device = common.resolve_device(args.device)
    dtype = common.resolve_dtype(args.dtype, device)
    tokenizer = common.load_tokenizer(args.model)
    config = common.load_config(args.model)
    options = args.seed, args.pair_problems, args.pair_weight, args.min_gap, args.max_pairs_per_prompt
    pairs = load_preference_pairs(args.data, *options, args.balance_topics)
    pairs, prompts, completions = encode_pairs(tokenizer, pairs, args.system_prompt, context_length(config))
    held_out = [i for i, pair in enumerate(pairs) if is_held_out(pair.question)][: args.eval_problems]
    train = [i for i, pair in enumerate(pairs) if not is_held_out(pair.question)]
    if len(train) < args.minibatch_size:
        fail(f"--minibatch-size {args.minibatch_size}: only {len(train)} pairs are left to train on")
    check_memory(args, config, [len(prompts[i]) + sum(map(len, completions[i])) for i in train], device, dtype)

    state = common.load_checkpoint(args.resume)  # {} unless a run is resumed
    run_dir, writer = common.start_run(args, state)
    stop = common.StopSignal()
    health = evaluate.Health(run_dir, tokenizer, args.max_bad_updates)
    rm = common.load_reward_model(state.get("model", args.model), device, dtype, new_head=not state)
    rm.config.pad_token_id = tokenizer.pad_token_id  # by which its own forward finds the last token
    rm.config.score_mean = 0.0  # found at the end
    if args.gradient_checkpointing:
        common.checkpoint_layers(rm)
    optimizer = common.MasterAdamW(rm, lr=args.learning_rate, betas=(0.9, 0.95), weight_decay=args.weight_decay)

    def evaluate_all() -> dict[str, float]:
        scores = {}
        if held_out:
            data = [prompts[i] for i in held_out], [completions[i] for i in held_out]
            chosen, rejected = pair_scores(rm, *data, args.micro_batch_tokens).unbind(1)
            loss, values = reward_model_loss(chosen, rejected, args.margin)
            values = {name: values[f"rewards/{name}"] for name in ("accuracy", "margin")} | {"loss": loss.item()}
            scores = {f"eval/pair_{name}": value for name, value in values.items()}
            scores["eval/calibration"] = calibration_error(chosen - rejected)
        evaluate.log_scalars(writer, scores, x)
        return scores

    sampler = ProblemSampler(train, seed=args.seed)
    iteration, x = 0, 0  # x: pairs seen so far, the x-axis of every event
    if state:
        common.restore_optimizer(optimizer, state)
        sampler.load_state_dict(state["sampler"])
        iteration, x, before, scores = state["iteration"], state["x"], state["before"], state["scores"]
    else:
        before = scores = evaluate_all()

    bar = tqdm(total=args.iterations, initial=iteration, desc="RM", unit="it")
    while iteration < args.iterations:
        metrics, clock = Metrics(), Clock(device)
        # ------------------------------------------------------------------------------------------------ 1 sample
        batch = [train[i] for i in sampler.draw(args.minibatch_size)]
        rollout = pair_rollout([prompts[i] for i in batch], [completions[i] for i in batch], device)
        row_weights = torch.tensor([pairs[i].weight / len(batch) for i in batch], device=device)
        x += len(batch)
        clock.lap("sample")

        # ------------------------------------------------------------------------------------------------ 5 update
        rise = min(1.0, (iteration + 1) / max(1, args.warmup_iterations))
        learning_rate = args.learning_rate * rise * (0.55 + 0.45 * math.cos(math.pi * iteration / args.iterations))
        common.set_learning_rate(optimizer, learning_rate)
        policy_loss = 0.0
        for micro in pair_micro_batches(rollout, args.micro_batch_tokens):
            pair = common.completion_scores(rm, rollout, micro)  # chosen, rejected, chosen, ...
            weights = row_weights[[row // 2 for row in micro[0::2]]]
            loss, loss_metrics = reward_model_loss(pair[0::2], pair[1::2], args.margin, weights)
            loss.backward()
            policy_loss += loss.item()
            metrics.add(loss_metrics, weight=len(micro))
        grad_norm = torch.nn.utils.clip_grad_norm_(optimizer.masters, args.max_grad_norm).item()
        finite = health.is_finite(policy_loss, grad_norm, rollout, range(len(rollout.mask)))
        if finite:
            optimizer.step()
        optimizer.zero_grad()
        metrics.add({"loss/policy": policy_loss, "loss/grad_norm": grad_norm, "loss/skipped": not finite})
        clock.lap("update")

        # --------------------------------------------------------------------------------------------------- 6 log
        iteration += 1
        metrics.add({"loss/learning_rate": learning_rate})
        logged = evaluate.log_iteration(writer, metrics, clock, x)
        health.watch(logged)
        bar.set_postfix_str(f"loss {logged['loss/policy']:.3f} acc {logged['rewards/accuracy']:.3f}")
        bar.update()

        # ------------------------------------------------------------------------------------- 7 evaluate and save
        last = iteration == args.iterations
        if last or (args.eval_every and iteration % args.eval_every == 0):
            scores = evaluate_all()
        if stop.number or (args.save_every and (last or iteration % args.save_every == 0)):
            state = {"iteration": iteration, "x": x, "before": before, "scores": scores}
            state["sampler"] = sampler.state_dict()
            writer.flush()
            target = run_dir / "checkpoints" / f"step_{iteration:06d}"
            common.save_checkpoint(target, rm, tokenizer, optimizer, state, args.keep_checkpoints)
        if stop.number:
            stop.leave(run_dir)

    bar.close()
    writer.close()
    some = random.Random(args.seed).sample(train, min(1024, len(train)))  # their mean is close enough
    data = [prompts[i] for i in some], [completions[i] for i in some]
    rm.config.score_mean = pair_scores(rm, *data, args.micro_batch_tokens).mean().item()
    common.save_checkpoint(run_dir / "final", rm, tokenizer)
    stop.restore()
    print(f"\n{pair_table(before, scores, [pairs[i].question for i in held_out])}\n\nmodel: {run_dir / 'final'}")
    print(f"curves: tensorboard --logdir {run_dir}")


if __name__ == "__main__":
    main(common.parse_args(Args))
