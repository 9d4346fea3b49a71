r"""Supervised fine-tuning (SFT): cross-entropy on the tokens of demonstrated completions.

    L = - mean over all completion tokens of log pi(token | prompt, tokens before it)

The loss covers a completion's EOS, or the model would never learn to stop, but not the prompt. The learning rate warms
up linearly and decays as a cosine to a tenth. This is the stage before RL: InstructGPT's SFT (arXiv:2203.02155,
section 3.5), the cold start of DeepSeek-R1 (arXiv:2501.12948v1, section 2.3.1).

Departures from InstructGPT: no dropout; steps, not epochs; and the last step's weights are kept, where the paper
chooses a checkpoint by its reward model's score.

    python train_sft.py                                     # a few more steps of the embedded model on its own data
    python train_sft.py --model Qwen/Qwen2.5-0.5B --data demonstrations.jsonl --problems openai/gsm8k:main \
        --learning-rate 1e-5 --minibatch-size 32 --max-new-tokens 512       # needs a GPU; untested
    python train_sft.py --model runs/tiny --from-scratch    # random weights; see models/tiny-arithmetic/README.md

What you should see from the first command, in 30 s on 2 cores (AMD EPYC): the held-out loss stays at 0.240, because
the embedded model was trained on the same teacher's demonstrations, and accuracy changes only by chance. From scratch
(9.5 minutes) the loss falls from 4.6 to 0.240, the entropy of the teacher's random mistakes.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

import common
import data
from plumbing import evaluation, flags, logs, runs


@dataclass
class Args:
    model: str = "models/tiny-arithmetic"
    """the policy to start from: local model directory or hub name"""
    from_scratch: bool = False
    """start from random weights; only the model's config and tokenizer are read"""
    data: tuple[str, ...] = ("arithmetic-demonstrations",)
    """any of: NAME-demonstrations (from a task's teacher), .jsonl files (prompt, completion), samples files; a tenth is
    held out. FILE:COUNT draws COUNT demonstrations of FILE at random, to mix files"""
    demonstrations: flags.AtLeast1 = 20000
    """number of demonstrations that a task's teacher generates"""
    keep: Literal["correct", "longest", "shortest", "random"] = "correct"
    """completions used from a samples file: every right one | the longest, shortest or a random one of each problem's
    right ones, in the right format if there is any"""
    problems: str = "arithmetic"
    """problems whose held-out part is evaluated: "arithmetic", "countdown", a file (docs/data.md), or a hub dataset"""
    seed: int = 1
    """random seed"""
    iterations: flags.AtLeast0 = 200
    """optimizer steps; also the length of the learning rate's cosine: changing it on --resume changes the schedule"""
    minibatch_size: flags.AtLeast1 = 128
    """demonstrations per optimizer step"""
    max_new_tokens: flags.AtLeast1 = 40
    """maximum length of a completion in evaluations, in tokens; use e.g. 512 for real models"""
    format_style: Literal["answer-tags", "think"] = "answer-tags"
    """<think>..</think><answer>..</answer> | <think>..</think>, then \\boxed{} or ####; set --system-prompt to match"""
    learning_rate: flags.Positive = 3e-4
    """AdamW's peak learning rate; the default is for the embedded model, use 1e-5 for real models"""
    weight_decay: flags.NonNegative = 0.1
    """AdamW's weight decay, on all weights"""
    loss_norm: Literal["sequence", "token", "constant"] = "token"
    """mean per completion, then over completions | over all tokens | sum / max_new_tokens, mean over completions"""
    setup: flags.Group[flags.SetupFlags] = field(default_factory=flags.SetupFlags)
    optimization: flags.Group[flags.OptimizationFlags] = field(
        default_factory=lambda: flags.OptimizationFlags(warmup_iterations=20, micro_batch_tokens=4096)
    )
    run: flags.Group[flags.RunFlags] = field(default_factory=lambda: flags.RunFlags(eval_every=0, save_every=0))


def sft_loss(logprobs: Tensor, mask: Tensor, weights: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Cross-entropy. All (B, T). mask: the tokens to learn, the others are ignored; weights: common.token_weights."""
    return -(weights * logprobs.masked_fill(~mask, 0.0)).sum(), {}


def demonstration_rollout(demonstrations: list[data.Demonstration], device) -> common.Rollout:
    prompts, completions = zip(*((d.prompt_ids, d.completion_ids) for d in demonstrations), strict=True)
    return common.make_rollout(prompts, completions, device=device)


def held_out_loss(policy, demonstrations: list[data.Demonstration], max_tokens: int) -> float:
    """Mean cross-entropy per token of held-out demonstrations."""
    rollout = demonstration_rollout(demonstrations, policy.device)
    return -common.rollout_logprobs(policy, rollout, max_tokens)[0].sum().item() / rollout.mask.sum().item()


def main(args: Args) -> None:
    # ------------------------------------------------------------------------------------------------------------ Setup
    device = common.resolve_device(args.setup.device)
    dtype = common.resolve_dtype(args.setup.dtype, device)
    tokenizer, config = common.load_tokenizer(args.model), common.load_config(args.model)
    demonstrations = data.mix_demonstrations(args.data, args.demonstrations, args.keep)
    context = common.context_length(config)
    demonstrations = data.encode_demonstrations(tokenizer, demonstrations, args.setup.system_prompt, context)
    held_out_demonstrations = [d for d in demonstrations if data.is_held_out(d.question)][: args.run.eval_problems]
    train = [d for d in demonstrations if not data.is_held_out(d.question)]
    if len(train) < args.minibatch_size:
        flags.fail(
            f"--minibatch-size {args.minibatch_size}: only {len(train)} demonstrations are left to train on; lower it"
        )
    sampler = data.ProblemSampler(train, seed=args.seed)
    eval_problems = data.load_eval_problems(args.problems, args.setup.eval_data, args.run.eval_problems)
    eval_problems = data.encode_problems(
        tokenizer, eval_problems, args.setup.system_prompt, config, args.max_new_tokens
    )
    limits = args.max_new_tokens, args.format_style, args.minibatch_size, args.seed
    held_out = evaluation.HeldOut(tokenizer, eval_problems, *limits)

    run = runs.Run(args, tokenizer)
    torch.manual_seed(args.seed % 2**63)  # for --from-scratch
    from_scratch = args.from_scratch and run.start_from == args.model
    policy = common.load_policy(run.start_from, tokenizer, device, dtype, from_scratch)
    if args.optimization.gradient_checkpointing:
        common.checkpoint_layers(policy)
    options = {"offload": args.optimization.offload_optimizer, "weight_decay": args.weight_decay}
    optimizer = common.MasterAdamW(policy, args.learning_rate, betas=(0.9, 0.95), **options)
    run.restore(optimizer=optimizer, sampler=sampler)  # checkpointed together with the policy

    def evaluate_now() -> dict[str, float]:
        scores = held_out.evaluate(policy)
        if held_out_demonstrations:
            budget = args.optimization.micro_batch_tokens
            scores["eval/loss"] = held_out_loss(policy, held_out_demonstrations, budget)
        return scores

    iteration, global_step = run.progress["iteration"], run.progress["global_step"]  # global_step: demonstrations seen
    before, scores = run.progress.get("before"), run.progress.get("scores")
    if before is None:  # a new run
        before = scores = evaluate_now()
        logs.log_scalars(run.writer, scores, global_step, held_out.samples)

    bar = tqdm(total=args.iterations, initial=iteration, desc="SFT", unit="it")
    health = logs.Health(run.dir, tokenizer, args.optimization.max_bad_updates, dtype)
    health.watch(before)
    while iteration < args.iterations:
        metrics, clock = logs.Metrics(), logs.Clock(device)
        # ----------------------------------------------------------------------------------------------------- 1 sample
        rollout = demonstration_rollout(sampler.draw(args.minibatch_size), device)
        global_step += args.minibatch_size
        clock.lap("sample")

        # ----------------------------------------------------------------------------------------------------- 2 update
        rise = min(1.0, (iteration + 1) / max(1, args.optimization.warmup_iterations))
        learning_rate = args.learning_rate * rise * (0.55 + 0.45 * math.cos(math.pi * iteration / args.iterations))
        common.set_learning_rate(optimizer, learning_rate)
        weights = common.token_weights(rollout.trained, args.loss_norm, args.max_new_tokens)  # (B, T)
        policy_loss = 0.0
        for micro in common.micro_batches(rollout, list(range(len(weights))), args.optimization.micro_batch_tokens):
            logprobs, entropy = common.completion_logprobs(policy, rollout, micro)  # (R, T)
            loss, _ = sft_loss(logprobs, rollout.trained[micro], weights[micro])
            loss.backward()
            policy_loss += loss.detach()
            metrics.add(logs.token_metrics(rollout, micro, entropy), weight=rollout.trained[micro].sum())
        grad_norm = torch.nn.utils.clip_grad_norm_(optimizer.masters, args.optimization.max_grad_norm).item()
        finite = health.allows_step(policy_loss, grad_norm, rollout, range(len(rollout.mask)))
        if finite:
            optimizer.step()
        optimizer.zero_grad()
        metrics.add({"loss/policy": policy_loss, "loss/grad_norm": grad_norm, "loss/skipped": not finite})
        clock.lap("update")

        # -------------------------------------------------------------------------------------------------------- 3 log
        iteration += 1
        metrics.add({"loss/learning_rate": learning_rate})
        health.watch(logs.log_iteration(run.writer, metrics, clock, global_step, bar))

        # ------------------------------------------------------------------------------------------ 4 evaluate and save
        if iteration == args.iterations or (args.run.eval_every and iteration % args.run.eval_every == 0):
            scores = evaluate_now()
            health.watch(scores)
            logs.log_scalars(run.writer, scores, global_step, held_out.samples)
        run.checkpoint(policy, iteration, global_step, before=before, scores=scores)

    run.finish(policy, evaluation.comparison_table(before, scores))


if __name__ == "__main__":
    flags.start(main, Args)
