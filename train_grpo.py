"""Group Relative Policy Optimization (GRPO), DeepSeekMath, arXiv:2402.03300.

For every prompt a group of G completions o_1..o_G is sampled from the policy and scored, r_i. The group itself is the
baseline, there is no critic:

    A_i = (r_i - mean(r)) / (std(r) + 1e-4)                                                      (section 4.1.2)
    J   = E[ 1/G sum_i 1/|o_i| sum_t min(rho_it A_i, clip(rho_it, 1-eps_low, 1+eps_high) A_i) - beta k3_it ]  (eq. 3)
    rho_it = pi(o_it) / pi_old(o_it),   k3_it = pi_ref/pi - log(pi_ref/pi) - 1                          (eq. 4)

Departures from the paper, each a flag: beta (--kl-coef) is 0 by default and then no reference model is loaded, as most
reproductions of R1 do; --loss-norm token is DAPO's token mean (arXiv:2503.14476), whose --clip-high 0.28 and
--dynamic-sampling are here too; --loss-norm constant with --no-normalize-std is Dr. GRPO (arXiv:2503.20783);
--ratio-level gspo is GSPO (arXiv:2507.18071); --unbiased-kl corrects k3, whose gradient is the forward KL's. The std
has Bessel's correction.

    python train_grpo.py                                                # the embedded model, no GPU needed
    python train_grpo.py --model Qwen/Qwen2.5-0.5B-Instruct --problems openai/gsm8k:main --learning-rate 1e-6 \\
        --max-new-tokens 512                                                # with a GPU, not run on one yet

What you should see from the first command, in 80 s on 2 cores (AMD EPYC): held-out accuracy, sampled at temperature 1,
from 0.38 to 0.97, greedy accuracy at the hardest difficulty from 0.06 to 1.0; the entropy falls from 0.26 to 0.02; the
policy loss stays at 0.
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
    iterations: int = 200
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
    learning_rate: float = 1e-4
    """of AdamW, for the embedded model; 1e-6 to 5e-6 for real ones"""
    warmup_iterations: int = 10
    """iterations over which the learning rate rises linearly; constant afterwards"""
    update_epochs: int = 1
    """passes over each iteration's completions"""
    minibatch_size: int | None = None
    """completions in one optimizer step, whole groups; None: the iteration's whole batch"""
    micro_batch_tokens: int = 8192
    """tokens (prompt and completion of each row) in one forward and backward pass; changes memory only"""
    gradient_checkpointing: bool = False
    """keep only each layer's input for the backward pass and compute the layer again there: less memory, slower"""
    max_grad_norm: float = 1.0
    """gradients are clipped to this norm"""
    max_bad_updates: int = 10
    """updates with a non-finite loss or gradient are skipped; so many of them in a row end the run"""
    loss_norm: Literal["sequence", "token", "constant"] = "sequence"
    """weights of the tokens: each sequence's mean (paper) | the mean of all (DAPO) | a constant (Dr. GRPO)"""
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

    normalize_std: bool = True
    """divide the advantages by the group's standard deviation (Dr. GRPO: no)"""
    clip_low: float = 0.2
    """eps_low: the ratio is clipped at 1 - eps_low (gspo: 3e-4)"""
    clip_high: float = 0.2
    """eps_high: and at 1 + eps_high (DAPO's clip-higher: 0.28; gspo: 4e-4)"""
    kl_coef: float = 0.0
    """beta, weight of the KL to the starting policy; 0 loads no reference"""
    unbiased_kl: bool = False
    """weight k3 with the ratio, so that its gradient is that of the reverse KL"""
    ratio_level: Literal["token", "sequence", "gspo"] = "token"
    """ratio of each token (paper) | of the whole completion (product) | its geometric mean per token (GSPO)"""
    dynamic_sampling: bool = False
    """drop groups whose rewards are all equal and sample others in their place (DAPO)"""
    max_sampling_rounds: int = 4
    """with --dynamic-sampling: batches sampled in an iteration at most; what is found by then is learned from"""


def group_advantages(rewards: Tensor, normalize_std: bool) -> Tensor:
    """(P, G) rewards -> (P, G) advantages, DeepSeekMath section 4.1.2; Dr. GRPO's without the division.

    A group whose rewards are all equal gets exactly 0, not rounding noise.
    """
    advantages = rewards - rewards.mean(1, keepdim=True)
    if normalize_std:
        advantages = advantages / (rewards.std(1, keepdim=True) + 1e-4)
    return advantages.masked_fill(is_uniform(rewards)[:, None], 0.0)


def is_uniform(rewards: Tensor) -> Tensor:
    """(P,) bool: all rewards of the group are equal, so that it teaches nothing."""
    return rewards.amax(1) == rewards.amin(1)


def grpo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor | None,
    advantages: Tensor,
    weights: Tensor,
    clip_low: float,
    clip_high: float,
    kl_coef: float,
    ratio_level: str = "token",
    unbiased_kl: bool = False,
) -> tuple[Tensor, dict[str, float]]:
    """Minus DeepSeekMath's eq. 3. Logprobs and weights are (B, T), advantages (B,); weights are 0 on padding, where
    the logprobs may hold anything. Returns the loss and token-weighted means."""
    mask = weights > 0
    log_ratio = (logprobs - old_logprobs).masked_fill(~mask, 0.0)  # before exp: inf * 0 would be NaN
    token_ratio = log_ratio.exp()
    if ratio_level == "sequence":  # product over the completion
        log_ratio = log_ratio.sum(1, keepdim=True).expand_as(log_ratio)
    elif ratio_level == "gspo":  # GSPO: its geometric mean
        log_ratio = (log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)).expand_as(log_ratio)
    ratio = log_ratio.clamp(-20.0, 20.0).exp()  # a product over hundreds of tokens must not overflow

    A = advantages[:, None]
    per_token = -torch.min(ratio * A, ratio.clamp(1 - clip_low, 1 + clip_high) * A)
    clipped_low, clipped_high = (A < 0) & (ratio < 1 - clip_low), (A > 0) & (ratio > 1 + clip_high)
    tokens = mask.sum().clamp(min=1)
    metrics = {
        "clip_low": ((clipped_low & mask).sum() / tokens).item(),
        "clip_high": ((clipped_high & mask).sum() / tokens).item(),
        "ratio_max": ratio.detach().masked_fill(~mask, 0.0).max().item(),
    }
    if ref_logprobs is not None:
        x = (ref_logprobs - logprobs).masked_fill(~mask, 0.0)
        k3 = torch.expm1(x) - x  # eq. 4
        metrics["kl"] = (k3.detach().sum() / tokens).item()
        per_token = per_token + kl_coef * (token_ratio * k3 if unbiased_kl else k3)
    return (weights * per_token.masked_fill(~mask, 0.0)).sum(), metrics


def main(args: Args) -> None:
    # ------------------------------------------------------------------------------------------------------- Setup
    data.check_flags(args)
    batch_size = args.prompts_per_step * args.group_size
    minibatch_size = args.minibatch_size or batch_size
    if args.group_size < 2:
        fail(f"--group-size {args.group_size}: must be at least 2: the group is the baseline")
    if minibatch_size % args.group_size or not args.group_size <= minibatch_size <= batch_size:
        allowed = f"a multiple of --group-size {args.group_size}, at most {batch_size} (prompts x group size)"
        fail(f"--minibatch-size {minibatch_size}: must be {allowed}")

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
    if args.gradient_checkpointing:
        common.checkpoint_layers(policy)
    ref = common.load_policy(args.model, device, dtype).requires_grad_(False) if args.kl_coef > 0 else None
    optimizer = common.MasterAdamW(policy, lr=args.learning_rate)
    sampler = ProblemSampler(problems, args.problem_sampling, args.seed)
    iteration, x = 0, 0  # x: completions sampled so far, the x-axis of every event
    if state:
        common.restore_optimizer(optimizer, state)
        sampler.load_state_dict(state["sampler"])
        iteration, x, before, scores = state["iteration"], state["x"], state["before"], state["scores"]
    else:
        before = scores = evaluate_policy(policy, tokenizer, eval_problems, eval_prompts, args, batch_size, verify)
        evaluate.log_scalars(writer, scores, x)
    one_update = args.update_epochs == 1 and minibatch_size == batch_size
    if one_update and args.loss_norm == "sequence":
        print("note: a policy loss near 0 is expected (ratio 1, a group's advantages sum to 0); its gradient is not 0")

    bar = tqdm(total=args.iterations, initial=iteration, unit="it")
    metrics, clock = Metrics(), Clock(device)
    kept = []
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
        rewards = sum(reward_weights[name] * values for name, values in components.items())  # (P, G)
        success = components["accuracy"].mean(1)  # (P,)
        for index, rate in zip(indices, success.tolist(), strict=True):
            sampler.record(index, rate)
        evaluate.add_rollout_metrics(metrics, rollout, rewards, components)
        samples = rollout, texts, components
        clock.lap("reward")

        if args.dynamic_sampling:  # DAPO section 3.2: groups that teach nothing are replaced, by going back to sample
            kept.append((rollout, rewards, (~is_uniform(rewards)).nonzero()[:, 0].tolist()))
            found = sum(len(groups) for _, _, groups in kept)
            if found < args.prompts_per_step and len(kept) < args.max_sampling_rounds:
                continue
            if found:  # at the cap there may be fewer than P; if none, the last batch is left, its advantages all 0
                rollout, rewards = data.join_groups(kept, args.prompts_per_step)

        # ---------------------------------------------------------------------------------------------- 3 logprobs
        rows = list(range(rollout.mask.shape[0]))
        old_logprobs = torch.zeros_like(rollout.sampler_logprobs)  # (B, T)
        ref_logprobs = torch.zeros_like(old_logprobs) if ref is not None else None
        with torch.no_grad():
            for micro in common.micro_batches(rollout, rows, args.micro_batch_tokens):
                if not one_update:  # else section 5 has them without an extra pass
                    old_logprobs[micro] = common.completion_logprobs(policy, rollout, micro, args.temperature)[0]
                if ref is not None:
                    ref_logprobs[micro] = common.completion_logprobs(ref, rollout, micro, args.temperature)[0]
        clock.lap("logprobs")

        # -------------------------------------------------------------------------------------------- 4 advantages
        advantages = group_advantages(rewards, args.normalize_std).flatten().to(device)  # (B,)
        if args.truncated == "mask":
            advantages = advantages.where(rollout.finished, 0.0)
        taught = ((advantages != 0) | (ref is not None)).tolist()  # B; the other rows have no gradient: only forward

        # ------------------------------------------------------------------------------------------------ 5 update
        learning_rate = args.learning_rate * min(1.0, (iteration + 1) / max(1, args.warmup_iterations))
        common.set_learning_rate(optimizer, learning_rate)
        for epoch in range(args.update_epochs):
            for minibatch in common.minibatches(rollout, minibatch_size, derive_seed(args.seed, "update", x, epoch)):
                weights = torch.zeros_like(old_logprobs)  # (B, T) like all the rest, so that rows index it too
                weights[minibatch] = common.token_weights(rollout.mask[minibatch], args.loss_norm, args.max_new_tokens)
                policy_loss = 0.0
                for micro in common.micro_batches(rollout, minibatch, args.micro_batch_tokens, apart=taught):
                    with torch.set_grad_enabled(taught[micro[0]]):
                        logprobs, entropy = common.completion_logprobs(policy, rollout, micro, args.temperature)
                    if one_update:  # the policy has not moved since it sampled
                        old_logprobs[micro] = logprobs.detach()
                    loss, loss_metrics = grpo_loss(
                        logprobs,
                        old_logprobs[micro],
                        ref_logprobs[micro] if ref is not None else None,
                        advantages[micro],
                        weights[micro],
                        clip_low=args.clip_low,
                        clip_high=args.clip_high,
                        kl_coef=args.kl_coef,
                        ratio_level=args.ratio_level,
                        unbiased_kl=args.unbiased_kl,
                    )
                    if loss.requires_grad:  # nowhere in the minibatch: then Adam makes no step, of momentum neither
                        loss.backward()
                    policy_loss += loss.item()
                    tokens = rollout.mask[micro].sum().item()
                    metrics.add({"loss/entropy": entropy.sum().item() / tokens}, weight=tokens)
                    metrics.add({f"loss/{name}": value for name, value in loss_metrics.items()}, weight=tokens)
                grad_norm = torch.nn.utils.clip_grad_norm_(optimizer.masters, args.max_grad_norm).item()
                finite = health.is_finite(policy_loss, grad_norm, rollout, minibatch, advantages=advantages)
                if finite:
                    optimizer.step()
                optimizer.zero_grad()
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
            writer.flush()
            target = run_dir / "checkpoints" / f"step_{iteration:06d}"
            common.save_checkpoint(target, policy, tokenizer, optimizer, state, args.keep_checkpoints)
        if stop.number:
            stop.leave(run_dir)
        metrics, clock = Metrics(), Clock(device)
        kept = []

    bar.close()
    writer.close()
    common.save_checkpoint(run_dir / "final", policy, tokenizer)
    stop.restore()
    print(f"\n{comparison_table(before, scores)}\n\nmodel: {run_dir / 'final'}")
    print(f"curves: tensorboard --logdir {run_dir}")


if __name__ == "__main__":
    main(common.parse_args(Args))
