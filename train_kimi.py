r"""Policy mirror descent of Kimi K1.5, arXiv:2501.12599, section 2.3.2.

Each iteration takes the policy at its start as the anchor and maximizes the reward with a KL penalty to it:

    max_pi  E[ r(x, y) ] - tau KL(pi || anchor)      has the solution   pi*(y|x) = anchor(y|x) exp(r / tau) / Z(x)

so r - tau log Z = tau log(pi*/anchor) for every y. The report's squared loss is the square of the difference of the
two sides, with pi for pi*. With A for r - tau log Z and d for log(pi/anchor) it is (A - tau d)^2. Dividing by 2 tau
and dropping A^2 / (2 tau), which has no gradient, leaves

    L   = mean_i( -A_i d_i + tau/2 d_i^2 ),   A_i = r_i - baseline
    d_i = sum_t [log pi(o_it) - log anchor(o_it)]                           log-ratio of the whole completion

Its gradient is minus the report's eq. 3, (1/k) sum_i [(r_i - mean(r)) grad log pi - tau/2 grad d_i^2]. The baseline
estimates tau log Z: by default the group's mean reward, which the report uses in eq. 3; with --baseline log-z the
report's other estimate, tau log(1/k sum_j exp(r_j / tau)). There is no clip of the ratio, no critic, no division by a
standard deviation. Gradients are clipped, and the learning rate is warmed up.

The tau term has no gradient while policy = anchor, so it acts from an iteration's second update on. By default there
are four, each on a quarter of the batch (--minibatch-size). The next iteration anchors at the updated policy. That is a
new problem, so the optimizer's state is reset.

Also from the report: the length reward (--length-weight; start it late, with --length-reward-start), curriculum and
prioritized sampling (--problem-sampling). Departure: the report gives no tau; the default is for the embedded model.

    python train_kimi.py                                                # the embedded model, no GPU needed
    python train_kimi.py --model Qwen/Qwen2.5-0.5B-Instruct --problems openai/gsm8k:main --learning-rate 1e-6 \
        --max-new-tokens 512                                                # needs a GPU; untested

What you should see from the first command, in 60 s on 2 cores (AMD EPYC): held-out accuracy rises from 0.38 to 0.93
(sampled at temperature 1), greedy accuracy at the hardest difficulty from 0.06 to 1.0. loss/kl, the mean of d^2 / 2
over an iteration's updates, stays well below 0.1.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

import common
from common import derive_seed
from data import ProblemSampler, decode, encode_problems, load_eval_problems, load_train_problems
from plumbing.evaluation import comparison_table, evaluate_policy
from plumbing.flags import (
    AtLeast0,
    AtLeast1,
    AtLeast2,
    Group,
    NonNegative,
    OptimizationFlags,
    Positive,
    RunFlags,
    SamplingFlags,
    SetupFlags,
    check_minibatch,
    fail,
    parse_args,
)
from plumbing.metrics import (
    Clock,
    Health,
    Metrics,
    add_rollout_metrics,
    log_iteration,
    log_samples,
    log_scalars,
    token_metrics,
)
from plumbing.runs import Run
from rewards import RewardFlags, Verifier, check_rewards, reward_weights, score_completions


@dataclass
class Args:
    model: str = "models/tiny-arithmetic"
    """the policy to start from: local model directory or hub name"""
    problems: str = "arithmetic"
    """training problems: "arithmetic", "countdown", a .jsonl file (question, answer), or a hub dataset (name:config)"""
    seed: int = 1
    """random seed"""
    iterations: AtLeast0 = 100
    """number of iterations; each samples a batch and trains on it"""
    prompts_per_step: AtLeast1 = 32
    """P, prompts per iteration"""
    group_size: AtLeast2 = 8
    """G, completions sampled per prompt"""
    max_new_tokens: AtLeast1 = 40
    """maximum length of a completion, in tokens; use e.g. 512 for real models"""
    learning_rate: Positive = 5e-5
    """AdamW's learning rate; the default is for the embedded model, use 1e-6 to 5e-6 for real models"""
    update_epochs: AtLeast1 = 1
    """passes over each iteration's completions"""
    minibatch_size: AtLeast1 | None = None
    """completions per optimizer step, a multiple of --group-size; None: a quarter of the iteration's batch"""
    setup: Group[SetupFlags] = field(default_factory=SetupFlags)
    sampling: Group[SamplingFlags] = field(default_factory=SamplingFlags)
    rewards: Group[RewardFlags] = field(default_factory=RewardFlags)
    optimization: Group[OptimizationFlags] = field(default_factory=OptimizationFlags)
    run: Group[RunFlags] = field(default_factory=RunFlags)

    tau: NonNegative = 0.05
    """weight of the KL penalty to the anchor, the policy at the iteration's start"""
    baseline: Literal["mean", "log-z"] = "mean"
    """baseline of the advantages: the group's mean reward | tau log Z estimated from the group"""
    keep_optimizer: bool = False
    """keep the optimizer's state from one iteration to the next (the report resets it)"""


def group_advantages(rewards: Tensor, tau: float, baseline: str) -> Tensor:
    """(P, G) rewards -> (P, G) advantages: r - mean(r), or r - tau log Z with Z = mean(exp(r / tau)).

    A group whose rewards are all equal gets exactly 0, not rounding noise.
    """
    advantages = rewards - rewards.mean(1, keepdim=True)
    if baseline == "log-z":
        advantages = rewards - tau * ((rewards / tau).logsumexp(1, keepdim=True) - math.log(rewards.shape[1]))
    return advantages.masked_fill(is_uniform(rewards)[:, None], 0.0)


def is_uniform(rewards: Tensor) -> Tensor:
    """(P,) bool: all rewards of the group are equal, so its advantages are all 0."""
    return rewards.amax(1) == rewards.amin(1)


def kimi_loss(
    logprobs: Tensor,
    anchor_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    tau: float,
    row_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """Kimi K1.5's squared surrogate over 2 tau, without its constant; its gradient is minus eq. 3. Logprobs
    and mask (B, T), advantages and row_weights (B,), None: 1/B each. Returns the loss and metrics over rows."""
    d = (logprobs - anchor_logprobs).masked_fill(~mask, 0.0).sum(1)  # (B,): summed over the completion, not averaged
    per_row = -advantages * d + tau / 2 * d**2
    if row_weights is None:
        row_weights = torch.full_like(advantages, 1 / len(advantages))
    metrics = {
        "kl": (d**2 / 2).mean().item(),  # half the squared log-ratio of whole completions to the anchor (k2)
        "ratio_max": d.detach().max().exp().item(),
    }
    return (row_weights * per_row).sum(), metrics


def main(args: Args) -> None:
    # ------------------------------------------------------------------------------------------------------------ Setup
    batch_size = args.prompts_per_step * args.group_size
    minibatch_size = args.minibatch_size or max(1, args.prompts_per_step // 4) * args.group_size
    check_minibatch(minibatch_size, args.group_size, batch_size)
    check_rewards(args.rewards, args.max_new_tokens, args.model)
    if args.update_epochs == 1 and minibatch_size == batch_size:
        fail(f"--minibatch-size {minibatch_size}: one update per iteration, but tau acts from the 2nd on; lower it")
    if args.baseline == "log-z" and args.tau == 0:
        fail("--baseline log-z: needs --tau above 0")

    device = common.resolve_device(args.setup.device)
    dtype = common.resolve_dtype(args.setup.dtype, device)
    tokenizer, config = common.load_tokenizer(args.model), common.load_config(args.model)
    problems = load_train_problems(args.problems, args.setup.eval_data)
    problems = encode_problems(tokenizer, problems, args.setup.system_prompt, config, args.max_new_tokens)
    eval_problems = load_eval_problems(args.problems, args.setup.eval_data, args.run.eval_problems)
    eval_problems = encode_problems(tokenizer, eval_problems, args.setup.system_prompt, config, args.max_new_tokens)
    draws = args.iterations * args.prompts_per_step
    sampler = ProblemSampler(problems, args.sampling.problem_sampling, args.seed, args.sampling.priority_floor, draws)
    verify = Verifier(args.rewards, device, dtype)
    evaluation = tokenizer, eval_problems, args.max_new_tokens, args.rewards.format_style, batch_size, args.seed, verify

    run = Run(args, tokenizer)
    policy = common.load_policy(run.start_from, device, dtype, tokenizer.eos_token_id)
    if args.optimization.gradient_checkpointing:
        common.checkpoint_layers(policy)
    optimizer = common.MasterAdamW(policy, args.learning_rate, args.optimization.offload_optimizer)
    run.restore(optimizer=optimizer, sampler=sampler)  # checkpointed together with the policy
    iteration, global_step = run.progress["iteration"], run.progress["global_step"]  # global_step: completions sampled
    before, scores = run.progress.get("before"), run.progress.get("scores")
    if before is None:  # a new run
        before = scores = evaluate_policy(policy, *evaluation)
        log_scalars(run.writer, scores, global_step)

    bar = tqdm(total=args.iterations, initial=iteration, unit="it")
    health = Health(run.dir, tokenizer, args.optimization.max_bad_updates)
    metrics, clock = Metrics(), Clock(device)
    while iteration < args.iterations:
        # ----------------------------------------------------------------------------------------------------- 1 sample
        batch = sampler.draw(args.prompts_per_step)
        rollout = common.sample_groups(
            policy,
            [problem.prompt_ids for problem in batch],
            args.group_size,
            args.max_new_tokens,
            args.sampling.temperature,
            derive_seed(args.seed, "sample", global_step),
        )
        global_step += batch_size
        clock.lap("sample")

        # ----------------------------------------------------------------------------------------------------- 2 reward
        texts = decode(tokenizer, rollout)
        components = score_completions(texts, batch, rollout, args.rewards, args.max_new_tokens, verify)  # name: (P, G)
        weights = reward_weights(args.rewards, iteration)  # name: float; a new component needs a weight too
        rewards = sum(weights[name] * values for name, values in components.items())  # (P, G)
        sampler.record(batch, components["accuracy"].mean(1).tolist())
        add_rollout_metrics(metrics, rollout, rewards, components)
        samples = rollout, texts, components
        clock.lap("reward")

        # --------------------------------------------------------------------------------------------------- 3 logprobs
        budget, temperature = args.optimization.micro_batch_tokens, args.sampling.temperature
        anchor_logprobs = common.rollout_logprobs(policy, rollout, budget, temperature)  # (B, T)
        clock.lap("logprobs")

        # ------------------------------------------------------------------------------------------------- 4 advantages
        advantages = group_advantages(rewards, args.tau, args.baseline).flatten().to(device)  # (B,)
        if args.rewards.truncated == "mask":
            advantages = advantages.where(rollout.finished, 0.0)

        # ----------------------------------------------------------------------------------------------------- 5 update
        learning_rate = args.learning_rate * min(1.0, (iteration + 1) / max(1, args.optimization.warmup_iterations))
        common.set_learning_rate(optimizer, learning_rate)
        if not args.keep_optimizer:  # a new anchor is a new optimization problem
            optimizer.state.clear()
        for epoch in range(args.update_epochs):
            seed = derive_seed(args.seed, "update", global_step, epoch)
            for minibatch in common.minibatches(rollout, minibatch_size, seed):
                row_weights = torch.full_like(advantages, 1 / len(minibatch))  # (B,)
                policy_loss = 0.0
                for micro in common.micro_batches(rollout, minibatch, budget):
                    logprobs, entropy = common.completion_logprobs(policy, rollout, micro, temperature)  # (R, T)
                    loss, loss_metrics = kimi_loss(
                        logprobs,
                        anchor_logprobs[micro],
                        advantages[micro],
                        rollout.trained[micro],
                        tau=args.tau,
                        row_weights=row_weights[micro],
                    )
                    loss.backward()
                    policy_loss += loss.item()
                    values = token_metrics(rollout, micro, entropy, anchor_logprobs[micro])
                    metrics.add(values, weight=rollout.trained[micro].sum().item())
                    metrics.add({f"loss/{name}": value for name, value in loss_metrics.items()}, weight=len(micro))
                grad_norm = torch.nn.utils.clip_grad_norm_(optimizer.masters, args.optimization.max_grad_norm).item()
                finite = health.is_finite(policy_loss, grad_norm, rollout, minibatch, advantages=advantages)
                if finite:
                    optimizer.step()
                optimizer.zero_grad()
                metrics.add({"loss/policy": policy_loss, "loss/grad_norm": grad_norm, "loss/skipped": not finite})
        clock.lap("update")

        # -------------------------------------------------------------------------------------------------------- 6 log
        iteration += 1
        metrics.add({"loss/learning_rate": learning_rate} | sampler.summary() | verify.summary())
        health.watch(log_iteration(run.writer, metrics, clock, global_step, bar))

        # ------------------------------------------------------------------------------------------ 7 evaluate and save
        if iteration == args.iterations or (args.run.eval_every and iteration % args.run.eval_every == 0):
            scores = evaluate_policy(policy, *evaluation)
            log_scalars(run.writer, scores, global_step)
            log_samples(run.writer, tokenizer, *samples, global_step)
        run.checkpoint(policy, iteration, global_step, before=before, scores=scores)
        metrics, clock = Metrics(), Clock(device)

    run.finish(policy, comparison_table(before, scores))


if __name__ == "__main__":
    main(parse_args(Args))
