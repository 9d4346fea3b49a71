r"""Policy gradient: REINFORCE with a choice of baselines, including a learned critic (Spinning Up's VPG).

    grad J = E[ sum_t A_t grad log pi(o_t | q, o_<t) ]

Each iteration samples a fresh batch and makes one policy update. A baseline is subtracted from the return to lower the
variance of the gradient. It adds no bias if it does not depend on the token (Williams 1992; Sutton et al. 2000):

    --baseline none         A_t = the return from t on
    --baseline batch-mean   A_t = the return - the batch's mean reward
    --baseline value        A_t = GAE(gamma, lambda) with a critic V (arXiv:1506.02438), trained to predict the return

The batch's mean includes the row's own reward, which with B rows scales the gradient by 1 - 1/B. GAE with lambda below
1 lowers the variance and adds bias. The reward is given at a completion's last token, so with gamma 1 all its tokens
have the same return. The critic is a separate model with its own optimizer and starts at V = 0. Departures: the formula
sums over tokens; --loss-norm averages over them by default, and with `constant` it is the formula up to a factor.
Advantages are not normalized (Spinning Up normalizes them) and don't use groups. Gradients are clipped.

    python train_pg.py                                                  # the embedded model, no GPU needed
    python train_pg.py --baseline batch-mean --model Qwen/Qwen2.5-0.5B-Instruct --problems openai/gsm8k:main \
        --learning-rate 1e-6 --max-new-tokens 512                           # needs a GPU; untested

What you should see from the first command, in 90 s on 2 cores (AMD EPYC): held-out accuracy rises from 0.38 to 0.94
(sampled at temperature 1), greedy accuracy at the hardest difficulty from 0.06 to 1.00. The critic explains 10 to 30%
of the variance of the return.
"""

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
    Group,
    OptimizationFlags,
    Positive,
    RunFlags,
    SamplingFlags,
    SetupFlags,
    Share,
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
    group_size: AtLeast1 = 8
    """G, completions sampled per prompt"""
    max_new_tokens: AtLeast1 = 40
    """maximum length of a completion, in tokens; use e.g. 512 for real models"""
    learning_rate: Positive = 1.5e-4
    """AdamW's learning rate; the default is for the embedded model, use 1e-6 to 5e-6 for real models"""
    loss_norm: Literal["sequence", "token", "constant"] = "token"
    """mean per completion, then over completions | over all tokens | sum / max_new_tokens, mean over completions"""
    setup: Group[SetupFlags] = field(default_factory=SetupFlags)
    sampling: Group[SamplingFlags] = field(default_factory=SamplingFlags)
    rewards: Group[RewardFlags] = field(default_factory=RewardFlags)
    optimization: Group[OptimizationFlags] = field(default_factory=OptimizationFlags)
    run: Group[RunFlags] = field(default_factory=RunFlags)

    baseline: Literal["none", "batch-mean", "value"] = "value"
    """baseline of the advantages: none | the batch's mean reward | a learned critic, with GAE"""
    value_epochs: AtLeast1 = 2
    """the critic's passes over each iteration's completions"""
    value_minibatch_size: AtLeast1 = 64
    """completions per optimizer step of the critic, rounded down to whole groups (at least one)"""
    value_learning_rate: Positive = 3e-4
    """AdamW's learning rate for the critic; the default is for the embedded model, use 1e-5 for real models"""
    gamma: Share = 1.0
    """discount factor per token"""
    gae_lambda: Share = 0.95
    """GAE's lambda: 1 relies on the sampled return, 0 on the critic"""


def compute_gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation, Schulman et al. 2016, arXiv:1506.02438, eq. 16. All (B, T), 0 on padding.

        delta_t = r_t + gamma V_{t+1} - V_t,   A_t = delta_t + gamma lambda A_{t+1},   V after the last token = 0

    Returns the advantages and the rewards-to-go (sum of discounted rewards from t on), the critic's targets.
    """
    rewards, values = rewards * mask, values * mask  # values on padding must not leak into the real tokens
    advantages, returns = torch.zeros_like(rewards), torch.zeros_like(rewards)
    next_advantage = next_return = next_value = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantages[:, t] = next_advantage = (delta + gamma * gae_lambda * next_advantage) * mask[:, t]
        returns[:, t] = next_return = rewards[:, t] + gamma * next_return
        next_value = values[:, t]
    return advantages, returns


def pg_loss(logprobs: Tensor, advantages: Tensor, weights: Tensor) -> tuple[Tensor, dict[str, float]]:
    """A loss whose gradient is minus the policy gradient. All (B, T); weights are 0 on padding."""
    return -(weights * (logprobs * advantages).masked_fill(weights == 0, 0.0)).sum(), {}


def value_loss(values: Tensor, returns: Tensor, weights: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Half the squared error. All (B, T); weights are 0 on padding. The metric is the mean over tokens."""
    errors = (0.5 * (values - returns) ** 2).masked_fill(weights == 0, 0.0)
    return (weights * errors).sum(), {"value": (errors.sum() / (weights > 0).sum().clamp(min=1)).item()}


def main(args: Args) -> None:
    # ------------------------------------------------------------------------------------------------------------ Setup
    batch_size = args.prompts_per_step * args.group_size
    check_rewards(args.rewards, args.max_new_tokens, args.model)

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
    stateful = {"optimizer": optimizer, "sampler": sampler}  # checkpointed together with the policy
    if args.baseline == "value":
        value_model = common.load_value_model(args.model, device, dtype)
        if args.optimization.gradient_checkpointing:
            common.checkpoint_layers(value_model)
        value_optimizer = common.MasterAdamW(value_model, args.value_learning_rate, args.optimization.offload_optimizer)
        value_health = Health(run.dir, tokenizer, args.optimization.max_bad_updates)
        stateful |= {"critic": value_model, "value_optimizer": value_optimizer}
    run.restore(**stateful)
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
        values = torch.zeros_like(rollout.sampler_logprobs)  # (B, T)
        if args.baseline == "value":
            values = common.rollout_values(value_model, rollout, budget)
        clock.lap("logprobs")

        # ------------------------------------------------------------------------------------------------- 4 advantages
        rows = list(range(batch_size))
        eos_scores = rewards.flatten().to(device)  # (B,)
        token_rewards = torch.zeros_like(values)  # (B, T): the score on the last token, EOS or not
        token_rewards[rows, rollout.mask.sum(1) - 1] = eos_scores
        advantages, returns = compute_gae(token_rewards, values, rollout.mask, args.gamma, args.gae_lambda)
        if args.baseline == "value":
            explained = 1 - (returns - values)[rollout.mask].var() / returns[rollout.mask].var()
            metrics.add({"loss/explained_variance": explained.nan_to_num(0.0, neginf=0.0).item()})
        else:
            advantages = returns - (eos_scores.mean() if args.baseline == "batch-mean" else 0.0)
        if args.rewards.truncated == "mask":
            advantages = advantages.where(rollout.finished[:, None], 0.0)

        # ----------------------------------------------------------------------------------------------------- 5 update
        learning_rate = args.learning_rate * min(1.0, (iteration + 1) / max(1, args.optimization.warmup_iterations))
        common.set_learning_rate(optimizer, learning_rate)
        weights = common.token_weights(rollout.trained, args.loss_norm, args.max_new_tokens)  # (B, T)
        policy_loss = 0.0
        for micro in common.micro_batches(rollout, rows, budget):
            logprobs, entropy = common.completion_logprobs(policy, rollout, micro, temperature)  # (R, T)
            loss, _ = pg_loss(logprobs, advantages[micro], weights[micro])
            loss.backward()
            policy_loss += loss.item()
            values = token_metrics(rollout, micro, entropy, logprobs.detach())
            metrics.add(values, weight=rollout.trained[micro].sum().item())
        grad_norm = torch.nn.utils.clip_grad_norm_(optimizer.masters, args.optimization.max_grad_norm).item()
        finite = health.is_finite(policy_loss, grad_norm, rollout, rows, advantages=advantages)
        if finite:
            optimizer.step()
        optimizer.zero_grad()
        metrics.add({"loss/policy": policy_loss, "loss/grad_norm": grad_norm, "loss/skipped": not finite})

        for epoch in range(args.value_epochs if args.baseline == "value" else 0):
            seed = derive_seed(args.seed, "value", global_step, epoch)
            for minibatch in common.minibatches(rollout, args.value_minibatch_size, seed):
                trained = rollout.trained[minibatch]
                token_weights = torch.zeros_like(rollout.sampler_logprobs)  # (B, T), indexed by row like the others
                token_weights[minibatch] = common.token_weights(trained, args.loss_norm, args.max_new_tokens)
                critic_loss = 0.0
                for micro in common.micro_batches(rollout, minibatch, budget):
                    values = common.completion_values(value_model, rollout, micro)  # (R, T)
                    loss, loss_metrics = value_loss(values, returns[micro], token_weights[micro])
                    loss.backward()
                    critic_loss += loss.item()
                    loss_metrics = {f"loss/{name}": value for name, value in loss_metrics.items()}
                    metrics.add(loss_metrics, weight=rollout.trained[micro].sum().item())
                max_norm = args.optimization.max_grad_norm
                value_norm = torch.nn.utils.clip_grad_norm_(value_optimizer.masters, max_norm).item()
                finite = value_health.is_finite(critic_loss, value_norm, rollout, minibatch, returns=returns)
                if finite:
                    value_optimizer.step()
                metrics.add({"loss/skipped": not finite})
                value_optimizer.zero_grad()
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
