r"""Proximal policy optimization (PPO), Schulman et al. 2017, arXiv:1707.06347, for language models as in RLHF
(Stiennon et al. 2020, arXiv:2009.01325).

    r_t   = -beta (log pi_old(o_t) - log pi_ref(o_t)) + [o_t is the completion's last token] * score
    A, R  = GAE(gamma, lambda) from r and V_old, the critic's values at sampling time; R = A + V_old; then A is whitened
    L_pi  = mean over tokens of max(-A rho, -A clip(rho, 1 - eps, 1 + eps)),  rho = pi / pi_old             (eq. 7)
    L_V   = mean over tokens of 1/2 max((V - R)^2, (clip(V, V_old +- c) - R)^2)

The score is the weighted sum of all rewards (rewards.py); --reward-model adds a reward model's. The models are the
policy, the critic, and the frozen reference (none with --kl-coef 0). No copy of the old policy is kept: its logprobs
are computed before the first update. (The sampler's own differ by rounding.) There is no value coefficient: the critic
has its own optimizer, and Adam would cancel it. There is no entropy bonus.

Departures from Schulman et al., as is usual in RLHF:
1. Values are clipped, advantages whitened, gradients clipped; the policy's learning rate is warmed up.
2. V = 0 after the last token, even if the length limit cut the completion.
3. The critic starts from the policy's backbone with V = 0 (Stiennon et al.: from the reward model).
4. Groups only share the prompt's computation; advantages don't use them.
r_t is the reward; theirs is the ratio, here rho.

    python train_ppo.py                                                 # the embedded model, no GPU needed
    python train_ppo.py --model Qwen/Qwen2.5-0.5B-Instruct --problems openai/gsm8k:main --learning-rate 1e-6 \
        --value-learning-rate 1e-5 --prompts-per-step 128 --group-size 1 --max-new-tokens 512  # needs a GPU; untested

What you should see from the first command, in 190 s on 2 cores (AMD EPYC): held-out accuracy rises from 0.38 to 0.97
(sampled at temperature 1), greedy accuracy at the hardest difficulty from 0.06 to 0.96. At twice the learning rate
accuracy rises sooner, then falls: once nearly all answers are right, whitening magnifies the few failures.
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
    iterations: flags.AtLeast0 = 80
    """number of iterations; each samples a batch and trains on it"""
    prompts_per_step: flags.AtLeast1 = 32
    """P, prompts per iteration"""
    group_size: flags.AtLeast1 = 8
    """G, completions sampled per prompt"""
    max_new_tokens: flags.AtLeast1 = 40
    """maximum length of a completion, in tokens; use e.g. 512 for real models"""
    learning_rate: flags.Positive = 5e-5
    """AdamW's learning rate; the default is for the embedded model, use 1e-6 to 5e-6 for real models"""
    update_epochs: flags.AtLeast1 = 4
    """passes over each iteration's completions, by the policy and by the critic"""
    minibatch_size: flags.AtLeast1 | None = None
    """completions per optimizer step, a multiple of --group-size; None: a quarter of the iteration's batch"""
    loss_norm: Literal["sequence", "token", "constant"] = "token"
    """mean per completion, then over completions | over all tokens | sum / max_new_tokens, mean over completions"""
    setup: flags.Group[flags.SetupFlags] = field(default_factory=flags.SetupFlags)
    sampling: flags.Group[flags.SamplingFlags] = field(default_factory=flags.SamplingFlags)  # temperature 1
    rewards: flags.Group[RewardFlags] = field(default_factory=RewardFlags)
    # 10 iterations of warm-up, gradients clipped to norm 1
    optimization: flags.Group[flags.OptimizationFlags] = field(default_factory=flags.OptimizationFlags)
    run: flags.Group[flags.RunFlags] = field(default_factory=flags.RunFlags)

    clip_low: flags.Positive = 0.2
    """the ratio is clipped at 1 - clip_low"""
    clip_high: flags.Positive = 0.2
    """the ratio is clipped at 1 + clip_high"""
    kl_coef: flags.NonNegative = 0.05
    """beta, weight of the KL penalty to the starting policy in each token's reward; 0 loads no reference model"""
    value_clip: flags.Positive = 0.2
    """c: a value further than this from V_old gets no gradient if its error is smaller than that of V_old +- c"""
    missing_eos_score: float | None = None
    """score that replaces the reward of a completion without EOS; None: such a completion keeps its reward"""
    value_learning_rate: flags.Positive = 3e-4
    """AdamW's learning rate for the critic; the default is for the embedded model, use 1e-5 for real models"""
    gamma: flags.Share = 1.0
    """discount factor per token"""
    gae_lambda: flags.Share = 0.95
    """GAE's lambda: 1 relies on the sampled return, 0 on the critic"""


def shape_rewards(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor | None, mask: Tensor, kl_coef: float
) -> Tensor:
    """(B,) scores -> (B, T) rewards: the score at each completion's last token in `mask`, the tokens that the policy
    wrote, minus kl_coef times the log-ratio of policy and reference at each of them. No gradient flows through the KL:
    it is part of the reward."""
    rewards = torch.zeros_like(logprobs)
    if ref_logprobs is not None:
        rewards = (-kl_coef * (logprobs - ref_logprobs)).detach().masked_fill(~mask, 0.0)
    rewards[torch.arange(len(scores)), common.last_true(mask)] += scores
    return rewards.masked_fill(~mask, 0.0)  # a completion may have no token of the policy's


def compute_gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation, Schulman et al. 2016, arXiv:1506.02438, eq. 16. All (B, T), 0 outside of the
    mask. t counts only the tokens in `mask`, which the policy wrote: a tool's output between two of them takes no step.

        delta_t = r_t + gamma V_{t+1} - V_t,   A_t = delta_t + gamma lambda A_{t+1},   V after the last token = 0

    Returns the advantages A and the critic's targets A + V, of the same lambda, both before whitening.
    """
    advantages = torch.zeros_like(rewards)
    next_advantage = next_value = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = torch.where(mask[:, t], delta + gamma * gae_lambda * next_advantage, next_advantage)
        next_value = torch.where(mask[:, t], values[:, t], next_value)
        advantages[:, t] = next_advantage
    advantages = advantages.masked_fill(~mask, 0.0)
    return advantages, (advantages + values).masked_fill(~mask, 0.0)


def whiten(advantages: Tensor, mask: Tensor) -> Tensor:
    """Mean 0 and standard deviation 1 over the mask's tokens of the whole batch, which the policy wrote; 0 for one."""
    written = advantages[mask]
    std = written.std() if len(written) > 1 else 0.0
    return ((advantages - written.mean()) / (std + 1e-8)).masked_fill(~mask, 0.0)


def ppo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    weights: Tensor,
    clip_low: float,
    clip_high: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped surrogate, eq. 7, as a loss. All (B, T). mask: the tokens that get a loss; the others are
    ignored. weights: see common.token_weights; one may be 0. Metrics are means over the mask's tokens."""
    ratio = (logprobs - old_logprobs).masked_fill(~mask, 0.0).exp()  # masked before exp: inf * 0 would be NaN
    A = advantages.masked_fill(~mask, 0.0)
    per_token = torch.max(-A * ratio, -A * ratio.clamp(1 - clip_low, 1 + clip_high))
    return (weights * per_token).sum(), logs.ratio_metrics(ratio, A, mask, clip_low, clip_high)


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, weights: Tensor, value_clip: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Half the larger of the squared errors of V and of V clipped to V_old +- value_clip. With the larger one,
    clipping can only remove gradient. All (B, T), mask and weights as in ppo_loss. The metric is the mean over the
    mask's tokens."""
    clipped = old_values + (values - old_values).clamp(-value_clip, value_clip)
    errors = (0.5 * torch.max((values - returns) ** 2, (clipped - returns) ** 2)).masked_fill(~mask, 0.0)
    return (weights * errors).sum(), {"value": errors.detach().sum() / mask.sum().clamp(min=1)}


def main(args: Args) -> None:
    # ------------------------------------------------------------------------------------------------------------ Setup
    batch_size = args.prompts_per_step * args.group_size
    minibatch_size = args.minibatch_size or max(1, args.prompts_per_step // 4) * args.group_size
    flags.check_minibatch(minibatch_size, args.group_size, batch_size)
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
    value_model = common.load_value_model(args.model, tokenizer, device, dtype)
    if args.optimization.gradient_checkpointing:
        common.checkpoint_layers(policy)
        common.checkpoint_layers(value_model)
    ref = common.load_policy(args.model, tokenizer, device, dtype).requires_grad_(False) if args.kl_coef > 0 else None
    offload = args.optimization.offload_optimizer
    optimizer = common.MasterAdamW(policy, args.learning_rate, offload, eps=1e-5)  # Adam's eps as in most PPO code
    value_optimizer = common.MasterAdamW(value_model, args.value_learning_rate, offload, eps=1e-5)
    # checkpointed together with the policy
    run.restore(optimizer=optimizer, sampler=sampler, critic=value_model, value_optimizer=value_optimizer)
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
        old_logprobs, _ = common.rollout_logprobs(policy, rollout, budget, temperature)  # (B, T)
        old_values = common.rollout_values(value_model, rollout, budget)  # (B, T)
        ref_logprobs = None
        if ref is not None:
            ref_logprobs, _ = common.rollout_logprobs(ref, rollout, budget, temperature)
        clock.lap("logprobs")

        # ------------------------------------------------------------------------------------------------- 4 advantages
        eos_scores = rewards.flatten().to(device)  # (B,)
        if args.missing_eos_score is not None:
            eos_scores = eos_scores.where(rollout.finished, args.missing_eos_score)
        trained = rollout.trained  # (B, T): the tokens that get a loss; a tool's tokens are no steps
        token_rewards = shape_rewards(eos_scores, old_logprobs, ref_logprobs, trained, args.kl_coef)  # (B, T)
        advantages, returns = compute_gae(token_rewards, old_values, trained, args.gamma, args.gae_lambda)
        advantages = whiten(advantages, trained)
        if args.rewards.truncated == "mask":  # the critic, the whitening and the token mean still count these rows
            advantages = advantages.where(rollout.finished[:, None], 0.0)
        explained = 1 - (returns - old_values)[trained].var() / returns[trained].var()
        metrics.add({"loss/explained_variance": explained.nan_to_num(0.0, neginf=0.0).item()})
        if ref is not None:  # the KL in the reward, mean per token
            metrics.add({"loss/kl": (old_logprobs - ref_logprobs)[trained].mean().item()})

        # ----------------------------------------------------------------------------------------------------- 5 update
        learning_rate = args.learning_rate * min(1.0, (iteration + 1) / max(1, args.optimization.warmup_iterations))
        common.set_learning_rate(optimizer, learning_rate)
        for epoch in range(args.update_epochs):
            seed = common.derive_seed(args.seed, "update", global_step, epoch)
            for minibatch in common.minibatches(rollout, minibatch_size, seed):
                weights = torch.zeros_like(old_logprobs)  # (B, T), indexed by row like the others
                weights[minibatch] = common.token_weights(trained[minibatch], args.loss_norm, args.max_new_tokens)
                policy_loss = 0.0
                for micro in common.micro_batches(rollout, minibatch, budget):  # statistics over rows belong above here
                    logprobs, entropy = common.completion_logprobs(policy, rollout, micro, temperature)  # (R, T)
                    loss, loss_metrics = ppo_loss(
                        logprobs,
                        old_logprobs[micro],
                        advantages[micro],
                        trained[micro],
                        weights[micro],
                        clip_low=args.clip_low,
                        clip_high=args.clip_high,
                    )
                    loss.backward()
                    policy_loss += loss.detach()
                    values = common.completion_values(value_model, rollout, micro)  # (R, T)
                    critic_loss, value_metrics = value_loss(
                        values, old_values[micro], returns[micro], trained[micro], weights[micro], args.value_clip
                    )
                    critic_loss.backward()
                    loss_metrics = {f"loss/{name}": value for name, value in (loss_metrics | value_metrics).items()}
                    loss_metrics |= logs.token_metrics(rollout, micro, entropy, old_logprobs[micro])
                    metrics.add(loss_metrics, weight=trained[micro].sum())
                max_norm = args.optimization.max_grad_norm
                grad_norm = torch.nn.utils.clip_grad_norm_(optimizer.masters, max_norm).item()
                value_norm = torch.nn.utils.clip_grad_norm_(value_optimizer.masters, max_norm).item()
                norms = grad_norm + value_norm  # finite if both are
                finite = health.allows_step(policy_loss, norms, rollout, minibatch, advantages=advantages)
                if finite:
                    optimizer.step()
                    value_optimizer.step()
                optimizer.zero_grad()
                value_optimizer.zero_grad()
                metrics.add({"loss/policy": policy_loss, "loss/grad_norm": grad_norm, "loss/skipped": not finite})
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
