r"""Policy gradient: REINFORCE with a choice of baselines, including a learned critic (Spinning Up's VPG).

    grad J = E[ sum_t A_t grad log pi(o_t | q, o_<t) ]

Each iteration samples a fresh batch and makes one policy update. A baseline is subtracted from the return to lower the
variance of the gradient. It adds no bias if it does not depend on the token (Williams 1992; Sutton et al. 2000):

    --baseline none         A_t = the return from t on
    --baseline batch-mean   A_t = the return - the batch's mean reward
    --baseline value        A_t = GAE(gamma, lambda) with a critic V (arXiv:1506.02438), trained to predict the return

The batch's mean includes the row's own reward, which with B rows scales the gradient by 1 - 1/B. GAE with lambda below
1 lowers the variance and adds bias. The reward is given at a completion's last token, so with gamma 1 all its tokens
have the same return. The critic is a separate model with its own optimizer and starts at V = 0.

Departures:
1. The formula sums over tokens; --loss-norm averages over them by default. With `constant` it is the formula up to a
   factor.
2. Advantages are not normalized (Spinning Up normalizes them) and don't use groups.
3. Gradients are clipped; the learning rate is warmed up.

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
from data import ProblemSampler, decode, encode_problems, load_eval_problems, load_train_problems
from plumbing import evaluation, flags, logs, runs
from rewards import RewardFlags, Verifier, check_rewards, reward_weights, score_completions, success_rates, sum_rewards


@dataclass
class Args:
    model: str = "models/tiny-arithmetic"
    """the policy to start from: local model directory or hub name"""
    problems: str = "arithmetic"
    """training problems: "arithmetic", "countdown", a file (docs/data.md), or a hub dataset (name:config)"""
    seed: int = 1
    """random seed"""
    iterations: flags.AtLeast0 = 100
    """number of iterations; each samples a batch and trains on it"""
    prompts_per_step: flags.AtLeast1 = 32
    """P, prompts per iteration"""
    group_size: flags.AtLeast1 = 8
    """G, completions sampled per prompt"""
    max_new_tokens: flags.AtLeast1 = 40
    """maximum length of a completion, in tokens; use e.g. 512 for real models"""
    learning_rate: flags.Positive = 1.5e-4
    """AdamW's learning rate; the default is for the embedded model, use 1e-6 to 5e-6 for real models"""
    loss_norm: Literal["sequence", "token", "constant"] = "token"
    """mean per completion, then over completions | over all tokens | sum / max_new_tokens, mean over completions"""
    setup: flags.Group[flags.SetupFlags] = field(default_factory=flags.SetupFlags)
    sampling: flags.Group[flags.SamplingFlags] = field(default_factory=flags.SamplingFlags)  # temperature 1
    rewards: flags.Group[RewardFlags] = field(default_factory=RewardFlags)
    # 10 iterations of warm-up, gradients clipped to norm 1
    optimization: flags.Group[flags.OptimizationFlags] = field(default_factory=flags.OptimizationFlags)
    run: flags.Group[flags.RunFlags] = field(default_factory=flags.RunFlags)

    baseline: Literal["none", "batch-mean", "value"] = "value"
    """baseline of the advantages: none | the batch's mean reward | a learned critic, with GAE"""
    value_epochs: flags.AtLeast1 = 2
    """the critic's passes over each iteration's completions"""
    value_minibatch_size: flags.AtLeast1 = 64
    """completions per optimizer step of the critic, rounded down to whole groups (at least one)"""
    value_learning_rate: flags.Positive = 3e-4
    """AdamW's learning rate for the critic; the default is for the embedded model, use 1e-5 for real models"""
    gamma: flags.Share = 1.0
    """discount factor per token"""
    gae_lambda: flags.Share = 0.95
    """GAE's lambda: 1 relies on the sampled return, 0 on the critic"""


def compute_gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation, Schulman et al. 2016, arXiv:1506.02438, eq. 16. All (B, T), 0 outside of the
    mask. t counts only the tokens in `mask`, which the policy wrote: a tool's output between two of them takes no step.

        delta_t = r_t + gamma V_{t+1} - V_t,   A_t = delta_t + gamma lambda A_{t+1},   V after the last token = 0

    Returns the advantages and the rewards-to-go (sum of discounted rewards from t on), the critic's targets.
    """
    advantages, returns = torch.zeros_like(rewards), torch.zeros_like(rewards)
    next_advantage = next_return = next_value = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = torch.where(mask[:, t], delta + gamma * gae_lambda * next_advantage, next_advantage)
        next_return = torch.where(mask[:, t], rewards[:, t] + gamma * next_return, next_return)
        next_value = torch.where(mask[:, t], values[:, t], next_value)
        advantages[:, t], returns[:, t] = next_advantage, next_return
    return advantages.masked_fill(~mask, 0.0), returns.masked_fill(~mask, 0.0)


def pg_loss(logprobs: Tensor, advantages: Tensor, mask: Tensor, weights: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """A loss whose gradient is minus the policy gradient. All (B, T). mask: the tokens that the policy wrote; the
    others are ignored. weights: see common.token_weights; one may be 0."""
    return -(weights * (logprobs * advantages).masked_fill(~mask, 0.0)).sum(), {}


def value_loss(values: Tensor, returns: Tensor, mask: Tensor, weights: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Half the squared error. All (B, T), mask and weights as in pg_loss. The metric is the mean over the mask's
    tokens."""
    errors = (0.5 * (values - returns) ** 2).masked_fill(~mask, 0.0)
    return (weights * errors).sum(), {"value": errors.detach().sum() / mask.sum().clamp(min=1)}


def main(args: Args) -> None:
    # ------------------------------------------------------------------------------------------------------------ Setup
    batch_size = args.prompts_per_step * args.group_size
    budget, temperature = args.optimization.micro_batch_tokens, args.sampling.temperature

    device = common.resolve_device(args.setup.device)
    dtype = common.resolve_dtype(args.setup.dtype, device)
    tokenizer, config = common.load_tokenizer(args.model), common.load_config(args.model)
    problems = load_train_problems(args.problems, args.setup.eval_data, bool(args.rewards.reward_model))
    check_rewards(args.rewards, args.max_new_tokens, tokenizer, problems)
    problems = encode_problems(tokenizer, problems, args.setup.system_prompt, config, args.max_new_tokens)
    draws = args.iterations * args.prompts_per_step
    sampler = ProblemSampler(problems, args.sampling.problem_sampling, args.seed, args.sampling.priority_floor, draws)
    verify, path = Verifier(args.rewards, device, dtype, budget), args.rewards.reward_model
    reward_model = common.load_reward_model(path, tokenizer, device, dtype) if path else None
    eval_problems = load_eval_problems(args.problems, args.setup.eval_data, args.run.eval_problems, bool(path))
    eval_problems = encode_problems(tokenizer, eval_problems, args.setup.system_prompt, config, args.max_new_tokens)
    limits = args.max_new_tokens, args.rewards.format_style, batch_size, args.seed, verify
    held_out = evaluation.HeldOut(tokenizer, eval_problems, *limits, reward_model=reward_model, max_tokens=budget)

    run = runs.Run(args, tokenizer)
    policy = common.load_policy(run.start_from, tokenizer, device, dtype)
    if args.optimization.gradient_checkpointing:
        common.checkpoint_layers(policy)
    optimizer = common.MasterAdamW(policy, args.learning_rate, args.optimization.offload_optimizer)
    stateful = {"optimizer": optimizer, "sampler": sampler}  # checkpointed together with the policy
    if args.baseline == "value":
        value_model = common.load_value_model(args.model, tokenizer, device, dtype)
        if args.optimization.gradient_checkpointing:
            common.checkpoint_layers(value_model)
        value_optimizer = common.MasterAdamW(value_model, args.value_learning_rate, args.optimization.offload_optimizer)
        value_health = logs.Health(run.dir, tokenizer, args.optimization.max_bad_updates, dtype)
        stateful |= {"critic": value_model, "value_optimizer": value_optimizer}
    run.restore(**stateful)
    iteration, global_step = run.progress["iteration"], run.progress["global_step"]  # global_step: completions sampled
    before, scores = run.progress.get("before"), run.progress.get("scores")
    if before is None:  # a new run
        before = scores = held_out.evaluate(policy)
        logs.log_scalars(run.writer, scores, global_step, held_out.samples)

    bar = tqdm(total=args.iterations, initial=iteration, unit="it")
    health = logs.Health(run.dir, tokenizer, args.optimization.max_bad_updates, dtype)
    metrics, clock = logs.Metrics(), logs.Clock(device)
    while iteration < args.iterations:
        # ----------------------------------------------------------------------------------------------------- 1 sample
        batch = sampler.draw(args.prompts_per_step)
        rollout = common.sample_groups(
            policy,
            [problem.prompt_ids for problem in batch],
            args.group_size,
            args.max_new_tokens,
            temperature,
            common.derive_seed(args.seed, "sample", global_step),
        )
        global_step += batch_size
        clock.lap("sample")

        # ----------------------------------------------------------------------------------------------------- 2 reward
        texts = decode(tokenizer, rollout)
        scoring = args.rewards, args.max_new_tokens, verify, reward_model, budget
        components = score_completions(texts, batch, rollout, *scoring)  # by name
        component_weights = reward_weights(args.rewards, iteration)  # by name; a component of your own needs one too
        rewards, scored = sum_rewards(components, component_weights, texts, batch)  # (P, G), CPU; components too
        sampler.record(batch, success_rates(components["accuracy"], scored))
        logs.add_rollout_metrics(metrics, rollout, rewards, components, scored)
        rollout = rollout.without(~scored)  # no loss where a reward is unknown (None)
        clock.lap("reward")

        # --------------------------------------------------------------------------------------------------- 3 logprobs
        old_values = torch.zeros_like(rollout.sampler_logprobs)  # (B, T)
        if args.baseline == "value":
            old_values = common.rollout_values(value_model, rollout, budget)
        clock.lap("logprobs")

        # ------------------------------------------------------------------------------------------------- 4 advantages
        rows, trained = list(range(batch_size)), rollout.trained  # (B, T): the tokens that get a loss
        eos_scores = rewards.flatten().to(device)  # (B,)
        token_rewards = torch.zeros_like(old_values)  # (B, T): the score on the last token, EOS or not
        token_rewards[rows, common.last_true(trained)] = eos_scores
        advantages, returns = compute_gae(token_rewards, old_values, trained, args.gamma, args.gae_lambda)
        if args.baseline == "value":
            explained = 1 - (returns - old_values)[trained].var() / returns[trained].var()
            metrics.add({"loss/explained_variance": explained.nan_to_num(0.0, neginf=0.0).item()})
        else:
            advantages = returns - (rewards[scored].mean() if args.baseline == "batch-mean" else 0.0)
        if args.rewards.truncated == "mask":
            advantages = advantages.where(rollout.finished[:, None], 0.0)

        # ----------------------------------------------------------------------------------------------------- 5 update
        learning_rate = args.learning_rate * min(1.0, (iteration + 1) / max(1, args.optimization.warmup_iterations))
        common.set_learning_rate(optimizer, learning_rate)
        weights = common.token_weights(trained, args.loss_norm, args.max_new_tokens)  # (B, T)
        policy_loss = 0.0
        for micro in common.micro_batches(rollout, rows, budget):
            logprobs, entropy = common.completion_logprobs(policy, rollout, micro, temperature)  # (R, T)
            loss, _ = pg_loss(logprobs, advantages[micro], trained[micro], weights[micro])
            loss.backward()
            policy_loss += loss.detach()
            token_metrics = logs.token_metrics(rollout, micro, entropy, logprobs.detach())
            metrics.add(token_metrics, weight=trained[micro].sum())
        grad_norm = torch.nn.utils.clip_grad_norm_(optimizer.masters, args.optimization.max_grad_norm).item()
        finite = health.allows_step(policy_loss, grad_norm, rollout, rows, advantages=advantages)
        if finite:
            optimizer.step()
        optimizer.zero_grad()
        metrics.add({"loss/policy": policy_loss, "loss/grad_norm": grad_norm, "loss/skipped": not finite})

        for epoch in range(args.value_epochs if args.baseline == "value" else 0):
            seed = common.derive_seed(args.seed, "value", global_step, epoch)
            for minibatch in common.minibatches(rollout, args.value_minibatch_size, seed):
                weights = torch.zeros_like(old_values)  # (B, T), indexed by row like the others
                weights[minibatch] = common.token_weights(trained[minibatch], args.loss_norm, args.max_new_tokens)
                critic_loss = 0.0
                for micro in common.micro_batches(rollout, minibatch, budget):
                    values = common.completion_values(value_model, rollout, micro)  # (R, T)
                    loss, loss_metrics = value_loss(values, returns[micro], trained[micro], weights[micro])
                    loss.backward()
                    critic_loss += loss.detach()
                    loss_metrics = {f"loss/{name}": value for name, value in loss_metrics.items()}
                    metrics.add(loss_metrics, weight=trained[micro].sum())
                max_norm = args.optimization.max_grad_norm
                value_norm = torch.nn.utils.clip_grad_norm_(value_optimizer.masters, max_norm).item()
                finite = value_health.allows_step(critic_loss, value_norm, rollout, minibatch, returns=returns)
                if finite:
                    value_optimizer.step()
                metrics.add({"loss/skipped": not finite})
                value_optimizer.zero_grad()
        clock.lap("update")

        # -------------------------------------------------------------------------------------------------------- 6 log
        iteration += 1
        metrics.add({"loss/learning_rate": learning_rate} | sampler.summary() | verify.summary())
        health.watch(logs.log_iteration(run.writer, metrics, clock, global_step, bar), rollout.filtered)

        # ------------------------------------------------------------------------------------------ 7 evaluate and save
        if iteration == args.iterations or (args.run.eval_every and iteration % args.run.eval_every == 0):
            scores = held_out.evaluate(policy)
            logs.log_scalars(run.writer, scores, global_step, held_out.samples)
            logs.log_samples(run.writer, tokenizer, rollout, texts, components, global_step)
        run.checkpoint(policy, iteration, global_step, before=before, scores=scores)
        metrics, clock = logs.Metrics(), logs.Clock(device)

    run.finish(policy, evaluation.comparison_table(before, scores))


if __name__ == "__main__":
    flags.start(main, Args)
