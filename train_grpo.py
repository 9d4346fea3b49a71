r"""Group Relative Policy Optimization (GRPO), DeepSeekMath, arXiv:2402.03300.

For each prompt the policy samples a group of G completions o_1..o_G, which get the rewards r_1..r_G. The group's mean
reward is the baseline; there is no critic:

    A_i = (r_i - mean(r)) / (std(r) + 1e-4)                                                      (section 4.1.2)
    J   = E[ 1/G sum_i 1/|o_i| sum_t {min(rho_it A_i, clip(rho_it, 1-eps_low, 1+eps_high) A_i) - beta k3_it} ]  (eq. 3)
    rho_it = pi(o_it) / pi_old(o_it),   k3_it = pi_ref/pi - log(pi_ref/pi) - 1                          (eq. 4)

Departures from the paper:
1. The paper has one eps; here are eps_low and eps_high, equal by default.
2. beta (--kl-coef) is 0 by default, as in most reproductions of R1, and no reference is loaded. With a beta, the
   reference is always the starting policy: Algorithm 1's outer loop, which renews it, is absent, and one of its steps
   is an iteration.
3. std has Bessel's correction; 1e-4 damps groups whose rewards hardly differ.
4. There is no process supervision (section 4.1.3).
5. Gradients are clipped, and the policy term's log-ratio at +-20; the learning rate is warmed up.

Variants, all off by default. In a batch's first update every ratio is 1, and by default there is no second. The
variants that need ratio and clip set --minibatch-size 64, four updates on the 256 completions. DAPO scores answers 1 or
-1; --accuracy-weight 2 gives the same difference of 2, so the overlong penalty weighs as much as in DAPO. Its overlong
filtering, --truncated mask, is left out: with it the penalty would have no effect on cut completions.
--dynamic-sampling drops a group whose rewards are all equal, not counting a reward model's score (DAPO: if all its
answers are right, or all wrong). --loss-norm token is a mean over the minibatch's tokens (DAPO's eq. 8: over one
prompt's completions).
    DAPO (arXiv:2503.14476)      --loss-norm token --clip-high 0.28 --dynamic-sampling --overlong-weight 1
                                 --accuracy-weight 2 --format-weight 0 --minibatch-size 64
    Dr. GRPO (arXiv:2503.20783)  --loss-norm constant --no-normalize-std
    GSPO (arXiv:2507.18071)      --ratio-level gspo --clip-low 3e-4 --clip-high 4e-4 --minibatch-size 64
    R1 (arXiv:2501.12948v1)      --ratio-level sequence --minibatch-size 64; --kl-coef for eq. 1's KL, here per token

With a ratio s_i per completion (gspo: exp(1/|o_i| sum_t log rho_it), sequence: exp(sum_t log rho_it)), --loss-norm
sequence, the default, leaves 1/G sum_i min(s_i A_i, clip(s_i) A_i). Other norms weigh completions by length.

In a batch's first update k3 is an unbiased estimate of KL(pi || ref), but its mean gradient is that of KL(ref || pi).
--unbiased-kl multiplies k3 by the token's ratio, and the mean gradient is that of KL(pi || ref). Both KLs are of the
next-token distributions at each position; a token's effect on later positions is left out.

    python train_grpo.py                                                # the embedded model, no GPU needed
    python train_grpo.py --model Qwen/Qwen2.5-0.5B-Instruct --problems openai/gsm8k:main --learning-rate 1e-6 \
        --max-new-tokens 512                                                # needs a GPU; untested

What you should see from the first command, in 80 s on 2 cores (AMD EPYC): held-out accuracy rises from 0.38 to 0.97
(sampled at temperature 1), greedy accuracy at the hardest difficulty from 0.06 to 0.98. The entropy falls from 0.26 to
0.02. The policy loss stays near 0.
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
    iterations: flags.AtLeast0 = 200
    """number of iterations; each samples a batch and trains on it"""
    prompts_per_step: flags.AtLeast1 = 32
    """P, prompts per iteration"""
    group_size: flags.AtLeast2 = 8
    """G, completions sampled per prompt"""
    max_new_tokens: flags.AtLeast1 = 40
    """maximum length of a completion, in tokens; use e.g. 512 for real models"""
    learning_rate: flags.Positive = 1e-4
    """AdamW's learning rate; the default is for the embedded model, use 1e-6 to 5e-6 for real models"""
    update_epochs: flags.AtLeast1 = 1
    """mu, passes over each iteration's completions"""
    minibatch_size: flags.AtLeast1 | None = None
    """completions per optimizer step, a multiple of --group-size; None: all, so with one epoch nothing is clipped"""
    loss_norm: Literal["sequence", "token", "constant"] = "sequence"
    """mean per completion, then over completions (paper) | over all tokens (DAPO) | sum / max_new_tokens (Dr. GRPO)"""
    setup: flags.Group[flags.SetupFlags] = field(default_factory=flags.SetupFlags)
    sampling: flags.Group[flags.SamplingFlags] = field(default_factory=flags.SamplingFlags)  # temperature 1
    rewards: flags.Group[RewardFlags] = field(default_factory=RewardFlags)
    # 10 iterations of warm-up, gradients clipped to norm 1
    optimization: flags.Group[flags.OptimizationFlags] = field(default_factory=flags.OptimizationFlags)
    run: flags.Group[flags.RunFlags] = field(default_factory=flags.RunFlags)

    normalize_std: bool = True
    """divide the advantages by the group's standard deviation (Dr. GRPO: --no-normalize-std)"""
    clip_low: flags.Positive = 0.2
    """eps_low: the ratio is clipped at 1 - eps_low (gspo: 3e-4)"""
    clip_high: flags.Positive = 0.2
    """eps_high: the ratio is clipped at 1 + eps_high (DAPO's clip-higher: 0.28; gspo: 4e-4)"""
    kl_coef: flags.NonNegative = 0.0
    """beta, weight of the KL penalty to the starting policy; 0 loads no reference model"""
    unbiased_kl: bool = False
    """multiply k3 by the ratio, so that its gradient is that of KL(pi || ref)"""
    ratio_level: Literal["token", "sequence", "gspo"] = "token"
    """ratio per token (paper) | per completion, the product over tokens | per completion, the geometric mean (GSPO)"""
    dynamic_sampling: bool = False
    """drop groups whose rewards by rule are all equal, and sample others (DAPO)"""
    max_sampling_rounds: flags.AtLeast1 = 4
    """with --dynamic-sampling: maximum number of batches per iteration; training then uses the groups found so far"""


def group_advantages(rewards: Tensor, normalize_std: bool, scored: Tensor | None = None) -> Tensor:
    """(P, G) rewards -> (P, G) advantages, DeepSeekMath section 4.1.2, or Dr. GRPO's without the division.

    scored: (P, G) bool, where the reward is known; None: everywhere. Other completions are not in the mean and the std,
    and their advantage is 0. A group whose rewards are all equal gets exactly 0, not rounding noise.
    """
    scored = torch.ones_like(rewards, dtype=torch.bool) if scored is None else scored
    n, uniform = scored.sum(1, keepdim=True).to(rewards.dtype), is_uniform(rewards, scored)
    mean = rewards.masked_fill(~scored, 0.0).sum(1, keepdim=True) / n.clamp(min=1)
    rewards = rewards.where(scored, mean)  # so its advantage is 0, and it adds nothing to the sum of squares
    advantages = rewards - mean
    if normalize_std:
        std = rewards.std(1, keepdim=True) * ((rewards.shape[1] - 1) / (n - 1).clamp(min=1)).sqrt()
        advantages = advantages / (std + 1e-4)
    return advantages.masked_fill(uniform[:, None], 0.0)


def is_uniform(rewards: Tensor, scored: Tensor) -> Tensor:
    """(P,) bool: all known rewards of the group are equal, or none is known: its advantages are all 0. Both (P, G)."""
    return rewards.masked_fill(~scored, -torch.inf).amax(1) <= rewards.masked_fill(~scored, torch.inf).amin(1)


def mixed_groups(components: dict[str, Tensor], weights: dict[str, float], scored: Tensor) -> list[int]:
    """DAPO section 3.2: the groups worth training on, whose rewards by rule (not a reward model's) are not all equal.
    Groups without an answer are all kept: only a reward model judges them. components by name and scored: (P, G)."""
    rewards = sum(weights[name] * values.nan_to_num() for name, values in components.items() if name != "model")
    unanswered = components["accuracy"].isnan() & scored
    return (~is_uniform(rewards, scored) | unanswered.any(1)).nonzero()[:, 0].tolist()


def grpo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    weights: Tensor,
    clip_low: float,
    clip_high: float,
    kl_coef: float,
    ratio_level: str = "token",
    unbiased_kl: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Minus DeepSeekMath's eq. 3. Tensors are (B, T). mask: the tokens that get a loss; the others are ignored.
    weights, made by common.token_weights, are eq. 3's 1/G 1/|o_i| and the mean over prompts; a weight may be 0.
    Returns the loss and metrics, means over the mask's tokens. If you add a term, see `trains` in main."""
    A = advantages
    token_log_ratio = (logprobs - old_logprobs).masked_fill(~mask, 0.0)  # masked before exp: inf * 0 would be NaN
    log_ratio = token_log_ratio
    if ratio_level == "sequence":  # product over the completion
        log_ratio = token_log_ratio.sum(1, keepdim=True).expand_as(mask)
    elif ratio_level == "gspo":  # the geometric mean over its tokens
        log_ratio = (token_log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)).expand_as(mask)
    ratio = log_ratio.clamp(-20.0, 20.0).exp()  # a product over hundreds of tokens must not overflow

    per_token = -torch.min(ratio * A, ratio.clamp(1 - clip_low, 1 + clip_high) * A)  # eq. 3, as a loss
    metrics = logs.ratio_metrics(ratio, A, mask, clip_low, clip_high)
    if ref_logprobs is not None:
        ref_log_ratio = (ref_logprobs - logprobs).masked_fill(~mask, 0.0)
        k3 = torch.expm1(ref_log_ratio) - ref_log_ratio  # eq. 4
        metrics["kl"] = k3.detach().sum() / mask.sum().clamp(min=1)
        per_token = per_token + kl_coef * (token_log_ratio.exp() * k3 if unbiased_kl else k3)
    return (weights * per_token.masked_fill(~mask, 0.0)).sum(), metrics


def main(args: Args) -> None:
    # ------------------------------------------------------------------------------------------------------------ Setup
    batch_size = args.prompts_per_step * args.group_size
    minibatch_size = args.minibatch_size or batch_size
    flags.check_minibatch(minibatch_size, args.group_size, batch_size)
    if args.dynamic_sampling and not any((reward_weights(args.rewards, args.iterations) | {"model": 0.0}).values()):
        flags.fail("--dynamic-sampling: needs a reward by rule with a weight, which it compares within a group")
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
    ref = common.load_policy(args.model, tokenizer, device, dtype).requires_grad_(False) if args.kl_coef else None
    optimizer = common.MasterAdamW(policy, args.learning_rate, args.optimization.offload_optimizer)
    run.restore(optimizer=optimizer, sampler=sampler)  # checkpointed together with the policy
    iteration, global_step = run.progress["iteration"], run.progress["global_step"]  # global_step: completions sampled
    before, scores = run.progress.get("before"), run.progress.get("scores")
    if before is None:  # a new run
        before = scores = held_out.evaluate(policy)
        logs.log_scalars(run.writer, scores, global_step, held_out.samples)
    one_update = args.update_epochs == 1 and minibatch_size == batch_size
    if one_update:
        print("note: one update per batch: every ratio is 1, no clip acts, a loss near 0 is normal (docs/curves.md)")

    bar = tqdm(total=args.iterations, initial=iteration, unit="it")
    health = logs.Health(run.dir, tokenizer, args.optimization.max_bad_updates, dtype)
    metrics, clock = logs.Metrics(), logs.Clock(device)
    kept = []  # with --dynamic-sampling: this iteration's batches so far
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
        if args.dynamic_sampling:  # sample until P groups are mixed, then join all of a batch: your own tensors, too
            mixed = mixed_groups(components, component_weights, scored)
            kept.append((mixed, rollout, batch, texts, components, rewards, scored))
            found = sum(len(groups) for groups, *_ in kept)
            if found < args.prompts_per_step and len(kept) < args.max_sampling_rounds:
                continue
            if found:  # can be fewer than P after the last round; if 0, train on the last batch as it is
                rollout, batch, texts, components, rewards, scored = common.join_groups(kept, args.prompts_per_step)

        # --------------------------------------------------------------------------------------------------- 3 logprobs
        old_logprobs = ref_logprobs = None  # (B, T) each, if needed
        if not one_update:  # else the policy is still the one that sampled: section 5 detaches its own logprobs
            old_logprobs, _ = common.rollout_logprobs(policy, rollout, budget, temperature)  # _ is the entropy
        if ref is not None:
            ref_logprobs, _ = common.rollout_logprobs(ref, rollout, budget, temperature)
        clock.lap("logprobs")

        # ------------------------------------------------------------------------------------------------- 4 advantages
        advantages = group_advantages(rewards, args.normalize_std, scored).flatten().to(device)  # (B,)
        if args.rewards.truncated == "mask":
            advantages = advantages.where(rollout.finished, 0.0)
        advantages = advantages[:, None].repeat(1, rollout.mask.shape[1])  # (B, T)
        trained = rollout.trained  # (B, T): the tokens that get a loss, so neither a tool's nor those of unscored rows
        # Rows whose loss has a gradient; the others get a forward pass only, for the metrics. If you add a loss term
        # that has a gradient where the advantage is 0, write [True] * len(advantages).
        trains = ((advantages != 0).any(1) | (args.kl_coef != 0)).tolist()

        # ----------------------------------------------------------------------------------------------------- 5 update
        learning_rate = args.learning_rate * min(1.0, (iteration + 1) / max(1, args.optimization.warmup_iterations))
        common.set_learning_rate(optimizer, learning_rate)
        for epoch in range(args.update_epochs):
            seed = common.derive_seed(args.seed, "update", global_step, epoch)
            for minibatch in common.minibatches(rollout, minibatch_size, seed):
                weights = torch.zeros(trained.shape, device=device)  # (B, T), indexed by row like the others
                weights[minibatch] = common.token_weights(trained[minibatch], args.loss_norm, args.max_new_tokens)
                policy_loss = 0.0  # the KL included
                # A micro-batch is an arbitrary part of the minibatch, in any order: statistics over rows or tokens, and
                # pairs of rows, belong above here.
                for micro in common.micro_batches(rollout, minibatch, budget, trains):
                    with torch.set_grad_enabled(trains[micro[0]]):  # a micro-batch's rows all train, or none does
                        logprobs, entropy = common.completion_logprobs(policy, rollout, micro, temperature)  # (R, T)
                    old = logprobs.detach() if old_logprobs is None else old_logprobs[micro]  # one update: log-ratio 0
                    loss, loss_metrics = grpo_loss(
                        logprobs,
                        old,
                        ref_logprobs[micro] if ref is not None else None,
                        advantages[micro],
                        trained[micro],
                        weights[micro],
                        clip_low=args.clip_low,
                        clip_high=args.clip_high,
                        kl_coef=args.kl_coef,
                        ratio_level=args.ratio_level,
                        unbiased_kl=args.unbiased_kl,
                    )
                    common.backward(loss)
                    policy_loss += loss.detach()
                    loss_metrics = {f"loss/{name}": value for name, value in loss_metrics.items()}
                    loss_metrics |= logs.token_metrics(rollout, micro, entropy, old)
                    metrics.add(loss_metrics, weight=trained[micro].sum())
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
        metrics, clock, kept = logs.Metrics(), logs.Clock(device), []

    run.finish(policy, evaluation.comparison_table(before, scores))


if __name__ == "__main__":
    flags.start(main, Args)
