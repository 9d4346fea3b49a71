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
standard deviation.

The tau term has no gradient while policy = anchor, so it acts from an iteration's second update on. By default there
are four, each on a quarter of the batch (--minibatch-size). The next iteration anchors at the updated policy. That is a
new problem, so the optimizer's state is reset.

Also from the report: the length reward (--length-weight; start it late, with --length-reward-start), curriculum and
prioritized sampling (--problem-sampling).

Departures from the report:
1. It gives no tau; the default is for the embedded model.
2. Gradients are clipped, and the learning rate is warmed up.

    python train_kimi.py                                                # the embedded model, no GPU needed
    python train_kimi.py --model Qwen/Qwen2.5-0.5B-Instruct --problems openai/gsm8k:main --learning-rate 1e-6 \
        --max-new-tokens 512                                                # needs a GPU; untested

What you should see from the first command, in 60 s on 2 cores (AMD EPYC): held-out accuracy rises from 0.38 to 0.93
(sampled at temperature 1), greedy accuracy at the hardest difficulty from 0.06 to 1.0. loss/anchor_kl, the mean of
d^2 / 2 over an iteration's updates, stays well below 0.1.
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
    group_size: flags.AtLeast2 = 8
    """G, completions sampled per prompt"""
    max_new_tokens: flags.AtLeast1 = 40
    """maximum length of a completion, in tokens; use e.g. 512 for real models"""
    learning_rate: flags.Positive = 5e-5
    """AdamW's learning rate; the default is for the embedded model, use 1e-6 to 5e-6 for real models"""
    update_epochs: flags.AtLeast1 = 1
    """passes over each iteration's completions"""
    minibatch_size: flags.AtLeast1 | None = None
    """completions per optimizer step, a multiple of --group-size; None: a quarter of the iteration's batch"""
    setup: flags.Group[flags.SetupFlags] = field(default_factory=flags.SetupFlags)
    sampling: flags.Group[flags.SamplingFlags] = field(default_factory=flags.SamplingFlags)  # temperature 1
    rewards: flags.Group[RewardFlags] = field(default_factory=RewardFlags)
    # 10 iterations of warm-up, gradients clipped to norm 1
    optimization: flags.Group[flags.OptimizationFlags] = field(default_factory=flags.OptimizationFlags)
    run: flags.Group[flags.RunFlags] = field(default_factory=flags.RunFlags)

    tau: flags.NonNegative = 0.05
    """weight of the KL penalty to the anchor, the policy at the iteration's start"""
    baseline: Literal["mean", "log-z"] = "mean"
    """baseline of the advantages: the group's mean reward | tau log Z estimated from the group"""


def group_advantages(rewards: Tensor, tau: float, baseline: str, scored: Tensor | None = None) -> Tensor:
    """(P, G) rewards -> (P, G) advantages: r - mean(r), or r - tau log Z with Z = mean(exp(r / tau)).

    scored: (P, G) bool, where the reward is known; None: everywhere. Other completions are not in the mean, and their
    advantage is 0. A group whose rewards are all equal gets exactly 0, not rounding noise.
    """
    scored = torch.ones_like(rewards, dtype=torch.bool) if scored is None else scored
    n = scored.sum(1, keepdim=True).clamp(min=1).to(rewards.dtype)
    mean = rewards.masked_fill(~scored, 0.0).sum(1, keepdim=True) / n
    if baseline == "log-z":
        mean = tau * ((rewards / tau).masked_fill(~scored, -torch.inf).logsumexp(1, keepdim=True) - n.log())
    return (rewards - mean).masked_fill(is_uniform(rewards, scored)[:, None] | ~scored, 0.0)


def is_uniform(rewards: Tensor, scored: Tensor) -> Tensor:
    """(P,) bool: all known rewards of the group are equal, or none is known: its advantages are all 0. Both (P, G)."""
    return rewards.masked_fill(~scored, -torch.inf).amax(1) <= rewards.masked_fill(~scored, torch.inf).amin(1)


def kimi_loss(
    logprobs: Tensor,
    anchor_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    tau: float,
    row_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Kimi K1.5's squared surrogate over 2 tau, without its constant; its gradient is minus eq. 3. Logprobs
    and mask (B, T), advantages and row_weights (B,), None: 1/B each. Returns the loss and metrics over rows."""
    d = (logprobs - anchor_logprobs).masked_fill(~mask, 0.0).sum(1)  # (B,): summed over the completion, not averaged
    per_row = -advantages * d + tau / 2 * d**2
    if row_weights is None:
        row_weights = torch.full_like(advantages, 1 / len(advantages))
    metrics = {
        "anchor_kl": (d.detach() ** 2 / 2).mean(),  # half the squared log-ratio of whole completions to the anchor (k2)
        "ratio_max": d.detach().max().exp(),
    }
    return (row_weights * per_row).sum(), metrics


def main(args: Args) -> None:
    # ------------------------------------------------------------------------------------------------------------ Setup
    batch_size = args.prompts_per_step * args.group_size
    minibatch_size = args.minibatch_size or max(1, args.prompts_per_step // 4) * args.group_size
    flags.check_minibatch(minibatch_size, args.group_size, batch_size)
    budget, temperature = args.optimization.micro_batch_tokens, args.sampling.temperature
    if args.update_epochs == 1 and minibatch_size == batch_size:
        flags.fail(
            f"--minibatch-size {minibatch_size}: one update per iteration, but tau acts from the 2nd on; lower it"
        )
    if args.baseline == "log-z" and args.tau == 0:
        flags.fail("--baseline log-z: needs --tau above 0")

    device = common.resolve_device(args.setup.device)
    dtype = common.resolve_dtype(args.setup.dtype, device)
    tokenizer, config = common.load_tokenizer(args.model), common.load_config(args.model)
    problems = load_train_problems(args.problems, args.setup.eval_data, bool(args.rewards.reward_model))
    check_rewards(args.rewards, args.max_new_tokens, tokenizer, problems)
    problems = encode_problems(tokenizer, problems, args.setup.system_prompt, config, args.max_new_tokens)
    sampling = args.sampling.problem_sampling, args.seed, args.sampling.priority_floor
    sampler = ProblemSampler(problems, *sampling, args.iterations)
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
    run.restore(optimizer=optimizer, sampler=sampler)  # checkpointed together with the policy
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
        batch = sampler.draw(args.prompts_per_step, iteration)
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
        anchor_logprobs, _ = common.rollout_logprobs(policy, rollout, budget, temperature)  # (B, T)
        clock.lap("logprobs")

        # ------------------------------------------------------------------------------------------------- 4 advantages
        advantages = group_advantages(rewards, args.tau, args.baseline, scored).flatten().to(device)  # (B,)
        if args.rewards.truncated == "mask":
            advantages = advantages.where(rollout.finished, 0.0)
        trained = rollout.trained  # (B, T): the tokens that get a loss, so neither a tool's nor those of unscored rows

        # ----------------------------------------------------------------------------------------------------- 5 update
        learning_rate = args.learning_rate * min(1.0, (iteration + 1) / max(1, args.optimization.warmup_iterations))
        common.set_learning_rate(optimizer, learning_rate)
        optimizer.state.clear()  # a new anchor is a new optimization problem
        for epoch in range(args.update_epochs):
            seed = common.derive_seed(args.seed, "update", global_step, epoch)
            for minibatch in common.minibatches(rollout, minibatch_size, seed):
                written = trained.any(1)  # (B,): rows with a token that gets a loss
                row_weights = written / written[minibatch].sum().clamp(min=1)  # (B,)
                policy_loss = 0.0
                for micro in common.micro_batches(rollout, minibatch, budget):  # statistics over rows belong above here
                    logprobs, entropy = common.completion_logprobs(policy, rollout, micro, temperature)  # (R, T)
                    loss, loss_metrics = kimi_loss(
                        logprobs,
                        anchor_logprobs[micro],
                        advantages[micro],
                        trained[micro],
                        tau=args.tau,
                        row_weights=row_weights[micro],
                    )
                    loss.backward()
                    policy_loss += loss.detach()
                    tokens = trained[micro].sum()
                    metrics.add(logs.token_metrics(rollout, micro, entropy, anchor_logprobs[micro]), weight=tokens)
                    metrics.add({f"loss/{name}": value for name, value in loss_metrics.items()}, weight=len(micro))
                grad_norm = torch.nn.utils.clip_grad_norm_(optimizer.masters, args.optimization.max_grad_norm).item()
                finite = health.allows_step(policy_loss, grad_norm, rollout, minibatch, advantages=advantages)
                if finite:
                    optimizer.step()
                optimizer.zero_grad()
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
