"""Proximal policy optimization (PPO), Schulman et al. 2017, arXiv:1707.06347, for language models as in RLHF
(Stiennon et al. 2020, arXiv:2009.01325).

    r_t   = -beta (log pi_old(o_t) - log pi_ref(o_t)), plus the score on the completion's last token
    A, R  = GAE(gamma, lambda) of r under the critic's V at sampling time; R = A + V; then A is whitened over the batch
    L_pi  = mean over tokens of max(-A rho, -A clip(rho, 1 - eps, 1 + eps)),  rho = pi / pi_old             (eq. 7)
    L_V   = mean over tokens of 1/2 max((V - R)^2, (clip(V, V_old +- c) - R)^2)

Four models at most: the policy, its own logprobs at sampling time standing for the old policy, the frozen reference
(none with --kl-coef 0), the critic, and with --reward-model a learned score in place of the verifiers' rewards. The
critic has its own optimizer, so there is no value coefficient: Adam would cancel it. No entropy bonus.

    python train_ppo.py                                                 # the embedded model, no GPU needed
    python train_ppo.py --model Qwen/Qwen2.5-0.5B-Instruct --problems openai/gsm8k:main --learning-rate 1e-6 \\
        --value-learning-rate 1e-5 --prompts-per-step 128 --group-size 1 --max-new-tokens 512  # GPU; not run

What you should see from the first command, in 190 s on 2 cores (AMD EPYC): held-out accuracy, sampled at temperature 1,
from 0.38 to 0.97, greedy accuracy at the hardest difficulty from 0.06 to 0.96. At twice the learning rate it comes
sooner and then falls again: when nearly everything is right, whitening makes the few failures loud.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

import common
import data
import evaluate
from common import derive_seed, fail, load_config
from data import SYSTEM_PROMPT, ProblemSampler, check_context, encode_prompts, load_eval_problems, load_train_problems
from evaluate import Clock, Metrics, comparison_table, evaluate_policy
from rewards import format_reward, language_reward, length_reward, overlong_penalty


@dataclass
class Args:
    model: str = "models/tiny-arithmetic"
    """the policy to start from: local model directory or hub name"""
    problems: str = "arithmetic"
    """training problems: "arithmetic", a .jsonl file (question, answer), or a hub dataset (name or name:config)"""
    eval_data: str | None = None
    """held-out problems; without it a tenth of --problems, chosen by hash, is held out"""
    problem_sampling: Literal["uniform", "curriculum", "prioritized"] = "uniform"
    """which problems come next: each once per epoch | easy to hard | the more often failed the likelier"""
    system_prompt: str = SYSTEM_PROMPT
    """system turn of the chat template ('' for none); the embedded model's template ignores it"""
    seed: int = 1
    device: str = "auto"
    """auto | cpu | cuda | cuda:1 ..."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """of the weights in sampling and training; auto: bfloat16 on a GPU (with fp32 master weights), float32 on a CPU"""
    iterations: int = 80
    """how often to sample a batch and learn from it"""
    prompts_per_step: int = 32
    """P, prompts in an iteration"""
    group_size: int = 8
    """G, completions sampled for each prompt"""
    max_new_tokens: int = 40
    """length limit of a completion, tokens"""
    temperature: float = 1.0
    """of sampling, and of every logprob"""
    accuracy_weight: float = 1.0
    """weight of the reward for the right answer (0 or 1)"""
    format_weight: float = 0.2
    """weight of the reward for the right format (0 or 1)"""
    length_weight: float = 0.0
    """weight of the length reward (Kimi K1.5): shorter right answers of a group get more, up to +-0.5"""
    length_reward_start: int = 0
    """iteration from which the length reward counts"""
    language_weight: float = 0.0
    """weight of the language reward (DeepSeek-R1): the share of the reasoning's words in --language's script"""
    language: str = "en"
    """code of the language that the reasoning should be written in"""
    overlong_weight: float = 0.0
    """weight of the soft overlong penalty (DAPO): down to -1 at --max-new-tokens"""
    overlong_buffer: int = 8
    """tokens before --max-new-tokens over which that penalty sets in"""
    truncated: Literal["score", "wrong", "mask"] = "score"
    """a completion cut by the length limit: scored like any other | never right | advantage 0"""
    judge_model: str | None = None
    """a causal LM that is asked whether an answer that the rules don't match is the reference answer"""
    verifier_model: str | None = None
    """a reward model (train_rm.py) that scores such an answer instead: above 0 is right"""
    format_style: Literal["answer-tags", "think"] = "answer-tags"
    """answer-tags: <think>..</think><answer>..</answer>; think: <think>..</think> and then text with the answer in
    \\boxed{} or after #### (ask for that with --system-prompt)"""
    learning_rate: float = 5e-5
    """of AdamW, for the embedded model; 1e-6 to 5e-6 for real ones"""
    warmup_iterations: int = 10
    """iterations over which the learning rate rises linearly; constant afterwards"""
    update_epochs: int = 4
    """passes over each iteration's completions, of the policy and of the critic"""
    minibatch_size: int | None = None
    """completions in one optimizer step, whole groups; None: a quarter of the iteration's batch"""
    micro_batch_tokens: int = 8192
    """tokens (prompt and completion of each row) in one forward and backward pass; changes memory only"""
    gradient_checkpointing: bool = False
    """keep only each layer's input for the backward pass and compute the layer again there: less memory, slower"""
    max_grad_norm: float = 1.0
    """gradients are clipped to this norm"""
    max_bad_updates: int = 10
    """updates with a non-finite loss or gradient are skipped; so many of them in a row end the run"""
    loss_norm: Literal["sequence", "token", "constant"] = "token"
    """weights of the tokens: each sequence's mean | the mean of all | a constant, so that sums remain"""
    eval_every: int = 25
    """iterations between evaluations; 0: only before and after"""
    eval_problems: int = 300
    """held-out problems in an evaluation"""
    save_every: int = 50
    """iterations between checkpoints; 0: none but final/"""
    keep_checkpoints: int = 0
    """so many of the newest checkpoints are kept; 0: all"""
    run_root: str = "runs"
    """where run directories are made"""
    resume: str | None = None
    """run directory to go on in, from its newest checkpoint, with its arguments"""

    clip_low: float = 0.2
    """the ratio is clipped at 1 - clip_low"""
    clip_high: float = 0.2
    """and at 1 + clip_high"""
    kl_coef: float = 0.05
    """beta, weight of the KL to the starting policy in every token's reward; 0 loads no reference"""
    value_clip: float = 0.2
    """c, how far a value may move from the one at sampling time before its loss stops pulling"""
    missing_eos_score: float | None = None
    """score of a completion without EOS, in place of its own; None: the text is judged as it is"""
    reward_model: str | None = None
    """directory of a reward model (train_rm.py): its score is the reward; the verifiers' are only logged"""
    value_learning_rate: float = 3e-4
    """of the critic's AdamW, for the embedded model; 1e-5 for real ones"""
    gamma: float = 1.0
    """discount from token to token"""
    gae_lambda: float = 0.95
    """lambda of GAE: 1 trusts the sampled return, 0 the critic"""


def shape_rewards(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor | None, mask: Tensor, kl_coef: float
) -> Tensor:
    """(B,) scores -> (B, T) rewards: the score on each completion's last token, minus kl_coef times the log-ratio of
    policy and reference at every token. Without gradient: the KL is part of the reward."""
    rewards = torch.zeros_like(logprobs)
    if ref_logprobs is not None:
        rewards = (-kl_coef * (logprobs - ref_logprobs)).detach().masked_fill(~mask, 0.0)
    rewards[torch.arange(len(scores)), mask.sum(1) - 1] += scores
    return rewards


def compute_gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation, Schulman et al. 2016, arXiv:1506.02438, eq. 16. All (B, T), 0 on padding.

        delta_t = r_t + gamma V_{t+1} - V_t,   A_t = delta_t + gamma lambda A_{t+1},   V after the last token = 0

    Returns the advantages and the critic's targets A + V, of the advantages as they are here: not whitened.
    """
    rewards, values = rewards * mask, values * mask  # what stands on padding must not leak over the EOS
    advantages = torch.zeros_like(rewards)
    next_advantage = next_value = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantages[:, t] = next_advantage = (delta + gamma * gae_lambda * next_advantage) * mask[:, t]
        next_value = values[:, t]
    return advantages, advantages + values


def whiten(advantages: Tensor, mask: Tensor) -> Tensor:
    """Mean 0 and standard deviation 1 over the real tokens of the whole batch."""
    real = advantages[mask]
    return ((advantages - real.mean()) / (real.std() + 1e-8)).masked_fill(~mask, 0.0)


def ppo_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, weights: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, dict[str, float]]:
    """The clipped surrogate, eq. 7, as a loss. All (B, T); weights are 0 on padding. Metrics are means over tokens."""
    mask = weights > 0
    ratio = (logprobs - old_logprobs).masked_fill(~mask, 0.0).exp()  # masked before exp: inf * 0 would be NaN
    A = advantages.masked_fill(~mask, 0.0)
    per_token = torch.max(-A * ratio, -A * ratio.clamp(1 - clip_low, 1 + clip_high))
    tokens = mask.sum().clamp(min=1)
    metrics = {
        "clip_low": (((A < 0) & (ratio < 1 - clip_low)).sum() / tokens).item(),
        "clip_high": (((A > 0) & (ratio > 1 + clip_high)).sum() / tokens).item(),
        "ratio_max": ratio.detach().masked_fill(~mask, 0.0).max().item(),
    }
    return (weights * per_token).sum(), metrics


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, weights: Tensor, value_clip: float
) -> tuple[Tensor, dict[str, float]]:
    """Half the larger of the squared errors of V and of V clipped to V_old +- value_clip: the larger, so that the clip
    can only hold a value back. All (B, T); weights are 0 on padding. The metric is the mean over tokens."""
    clipped = old_values + (values - old_values).clamp(-value_clip, value_clip)
    errors = (0.5 * torch.max((values - returns) ** 2, (clipped - returns) ** 2)).masked_fill(weights == 0, 0.0)
    return (weights * errors).sum(), {"value": (errors.sum() / (weights > 0).sum().clamp(min=1)).item()}


def main(args: Args) -> None:
    # ------------------------------------------------------------------------------------------------------- Setup
    data.check_flags(args)
    batch_size = args.prompts_per_step * args.group_size
    minibatch_size = args.minibatch_size or max(1, args.prompts_per_step // 4) * args.group_size
    if minibatch_size % args.group_size or not args.group_size <= minibatch_size <= batch_size:
        allowed = f"a multiple of --group-size {args.group_size}, at most {batch_size} (prompts x group size)"
        fail(f"--minibatch-size {minibatch_size}: must be {allowed}")
    data.check_reward_model(args.reward_model, args.model)

    device = common.resolve_device(args.device)
    dtype = common.resolve_dtype(args.dtype, device)
    tokenizer = common.load_tokenizer(args.model)
    problems = load_train_problems(args.problems, args.eval_data)
    eval_problems = load_eval_problems(args.problems, args.eval_data, args.eval_problems)
    prompts = encode_prompts(tokenizer, [p.question for p in problems], args.system_prompt)
    eval_prompts = encode_prompts(tokenizer, [p.question for p in eval_problems], args.system_prompt)
    names = [p.id for p in problems + eval_problems]
    config = load_config(args.model)
    check_context(prompts + eval_prompts, names, config, args.max_new_tokens)
    data.check_memory(args, config, list(map(len, prompts)), device, dtype)
    verify = evaluate.Verifier(args, device, dtype)

    state = common.load_checkpoint(args.resume)  # {} unless a run is resumed
    run_dir, writer = common.start_run(args, state)
    stop = common.StopSignal()
    health = evaluate.Health(run_dir, tokenizer, args.max_bad_updates)
    policy = common.load_policy(state.get("model", args.model), device, dtype, tokenizer.eos_token_id)
    ref = common.load_policy(args.model, device, dtype).requires_grad_(False) if args.kl_coef > 0 else None
    reward_model = common.load_reward_model(args.reward_model, device, dtype) if args.reward_model else None
    optimizer = common.MasterAdamW(policy, lr=args.learning_rate, eps=1e-5)
    value_model = common.load_value_model(args.model, device, dtype)
    if args.gradient_checkpointing:
        common.checkpoint_layers(policy)
        common.checkpoint_layers(value_model)
    value_optimizer = common.MasterAdamW(value_model, lr=args.value_learning_rate, eps=1e-5)
    sampler = ProblemSampler(problems, args.problem_sampling, args.seed)
    iteration, x = 0, 0  # x: completions sampled so far, the x-axis of every event
    if state:
        common.restore_optimizer(optimizer, state)
        sampler.load_state_dict(state["sampler"])
        value_model.load_state_dict(state["critic"]["weights"])
        common.restore_optimizer(value_optimizer, state.pop("critic"))
        iteration, x, before, scores = state["iteration"], state["x"], state["before"], state["scores"]
    else:
        before = scores = evaluate_policy(policy, tokenizer, eval_problems, eval_prompts, args, batch_size, verify)
        evaluate.log_scalars(writer, scores, x)

    bar = tqdm(total=args.iterations, initial=iteration, unit="it")
    metrics, clock = Metrics(), Clock(device)
    while iteration < args.iterations:
        # ------------------------------------------------------------------------------------------------ 1 sample
        indices = sampler.draw(args.prompts_per_step)
        rollout = common.sample_groups(
            policy,
            [prompts[i] for i in indices],
            args.group_size,
            args.max_new_tokens,
            args.temperature,
            derive_seed(args.seed, "sample", x),
        )
        x += batch_size
        clock.lap("sample")

        # ------------------------------------------------------------------------------------------------ 2 reward
        texts = data.decode(tokenizer, rollout)
        components = {
            "accuracy": torch.tensor(verify(texts, [problems[i] for i in indices for _ in range(args.group_size)])),
            "format": torch.tensor([format_reward(t, args.format_style) for t in texts]),
        }
        if args.truncated == "wrong":
            components["accuracy"] *= rollout.finished.cpu()
        if args.language_weight > 0:
            components["language"] = torch.tensor([language_reward(t, args.language) for t in texts])
        if args.overlong_weight > 0:
            components["overlong"] = overlong_penalty(rollout.lengths.cpu(), args.max_new_tokens, args.overlong_buffer)
        components = {name: values.view(-1, args.group_size) for name, values in components.items()}  # (P, G)
        if args.length_weight > 0:
            lengths = rollout.lengths.view(-1, args.group_size).cpu()
            components["length"] = length_reward(lengths, components["accuracy"])
        reward_weights = {name: getattr(args, f"{name}_weight") for name in components}
        if iteration < args.length_reward_start:
            reward_weights["length"] = 0.0
        if reward_model is not None:
            model_scores = torch.zeros(batch_size)
            with torch.no_grad():
                for micro in common.micro_batches(rollout, list(range(batch_size)), args.micro_batch_tokens):
                    model_scores[micro] = common.completion_scores(reward_model, rollout, micro).cpu()
            components["model"] = model_scores.view(-1, args.group_size)
            reward_weights = dict.fromkeys(components, 0.0) | {"model": 1.0}
        rewards = sum(reward_weights[name] * values for name, values in components.items())  # (P, G)
        success = components["accuracy"].mean(1)  # (P,)
        for index, rate in zip(indices, success.tolist(), strict=True):
            sampler.record(index, rate)
        evaluate.add_rollout_metrics(metrics, rollout, rewards, components)
        samples = rollout, texts, components
        clock.lap("reward")

        # ---------------------------------------------------------------------------------------------- 3 logprobs
        rows = list(range(batch_size))
        old_logprobs = torch.zeros_like(rollout.sampler_logprobs)  # (B, T)
        ref_logprobs = torch.zeros_like(old_logprobs) if ref is not None else None
        old_values = torch.zeros_like(old_logprobs)
        with torch.no_grad():
            for micro in common.micro_batches(rollout, rows, args.micro_batch_tokens):
                old_logprobs[micro] = common.completion_logprobs(policy, rollout, micro, args.temperature)[0]
                if ref is not None:
                    ref_logprobs[micro] = common.completion_logprobs(ref, rollout, micro, args.temperature)[0]
                old_values[micro] = common.completion_values(value_model, rollout, micro)
        clock.lap("logprobs")

        # -------------------------------------------------------------------------------------------- 4 advantages
        eos_scores = rewards.flatten().to(device)  # (B,)
        if args.missing_eos_score is not None:
            eos_scores = eos_scores.where(rollout.finished, args.missing_eos_score)
        token_rewards = shape_rewards(eos_scores, old_logprobs, ref_logprobs, rollout.mask, args.kl_coef)  # (B, T)
        advantages, returns = compute_gae(token_rewards, old_values, rollout.mask, args.gamma, args.gae_lambda)
        advantages = whiten(advantages, rollout.mask)
        if args.truncated == "mask":
            advantages = advantages.where(rollout.finished[:, None], 0.0)
        explained = 1 - (returns - old_values)[rollout.mask].var() / returns[rollout.mask].var()
        metrics.add({"loss/explained_variance": explained.nan_to_num(0.0, neginf=0.0).item()})
        if ref is not None:  # the KL that the reward has paid for, per token
            metrics.add({"loss/kl": (old_logprobs - ref_logprobs)[rollout.mask].mean().item()})

        # ------------------------------------------------------------------------------------------------ 5 update
        learning_rate = args.learning_rate * min(1.0, (iteration + 1) / max(1, args.warmup_iterations))
        common.set_learning_rate(optimizer, learning_rate)
        for epoch in range(args.update_epochs):
            for minibatch in common.minibatches(rollout, minibatch_size, derive_seed(args.seed, "update", x, epoch)):
                weights = torch.zeros_like(old_logprobs)  # (B, T) like all the rest, so that rows index it too
                weights[minibatch] = common.token_weights(rollout.mask[minibatch], args.loss_norm, args.max_new_tokens)
                policy_loss = 0.0
                for micro in common.micro_batches(rollout, minibatch, args.micro_batch_tokens):
                    logprobs, entropy = common.completion_logprobs(policy, rollout, micro, args.temperature)
                    loss, loss_metrics = ppo_loss(
                        logprobs,
                        old_logprobs[micro],
                        advantages[micro],
                        weights[micro],
                        clip_low=args.clip_low,
                        clip_high=args.clip_high,
                    )
                    loss.backward()
                    policy_loss += loss.item()
                    tokens = rollout.mask[micro].sum().item()
                    loss_metrics["entropy"] = entropy.sum().item() / tokens
                    values = common.completion_values(value_model, rollout, micro)
                    loss, value_metrics = value_loss(
                        values, old_values[micro], returns[micro], weights[micro], args.value_clip
                    )
                    loss.backward()
                    loss_metrics |= value_metrics
                    metrics.add({f"loss/{name}": value for name, value in loss_metrics.items()}, weight=tokens)
                grad_norm = torch.nn.utils.clip_grad_norm_(optimizer.masters, args.max_grad_norm).item()
                value_norm = torch.nn.utils.clip_grad_norm_(value_optimizer.masters, args.max_grad_norm).item()
                norms = grad_norm + value_norm
                finite = health.is_finite(policy_loss, norms, rollout, minibatch, advantages=advantages)
                if finite:
                    optimizer.step()
                    value_optimizer.step()
                optimizer.zero_grad()
                value_optimizer.zero_grad()
                metrics.add({"loss/policy": policy_loss, "loss/grad_norm": grad_norm, "loss/skipped": not finite})
        clock.lap("update")

        # --------------------------------------------------------------------------------------------------- 6 log
        iteration += 1
        metrics.add({"loss/learning_rate": learning_rate})
        metrics.add(sampler.summary() | verify.summary())
        evaluate.add_logprob_gap(metrics, rollout, old_logprobs)
        logged = evaluate.log_iteration(writer, metrics, clock, x)
        health.watch(logged)
        bar.set_postfix_str(
            "reward {reward/total:.3f} acc {reward/accuracy:.3f} tok/s {rollout/tokens_per_second:.0f}".format(**logged)
        )
        bar.update()

        # ------------------------------------------------------------------------------------- 7 evaluate and save
        last = iteration == args.iterations
        if last or (args.eval_every and iteration % args.eval_every == 0):
            scores = evaluate_policy(policy, tokenizer, eval_problems, eval_prompts, args, batch_size, verify)
            evaluate.log_scalars(writer, scores, x)
            evaluate.log_samples(writer, tokenizer, *samples, x)
        if stop.number or (args.save_every and (last or iteration % args.save_every == 0)):
            state = {"iteration": iteration, "x": x, "before": before, "scores": scores}
            state["sampler"] = sampler.state_dict()
            state["critic"] = {"weights": value_model.state_dict(), **common.optimizer_state(value_optimizer)}
            writer.flush()
            target = run_dir / "checkpoints" / f"step_{iteration:06d}"
            common.save_checkpoint(target, policy, tokenizer, optimizer, state, args.keep_checkpoints)
        if stop.number:
            stop.leave(run_dir)
        metrics, clock = Metrics(), Clock(device)

    bar.close()
    writer.close()
    common.save_checkpoint(run_dir / "final", policy, tokenizer)
    stop.restore()
    print(f"\n{comparison_table(before, scores)}\n\nmodel: {run_dir / 'final'}")
    print(f"curves: tensorboard --logdir {run_dir}")


if __name__ == "__main__":
    main(common.parse_args(Args))
