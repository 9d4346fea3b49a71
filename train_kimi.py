"""Policy mirror descent of Kimi K1.5, arXiv:2501.12599, section 2.3.2.

In every iteration the policy at its start is the anchor. The iteration's problem, relative to it,

    max_pi  E[ r(x, y) ] - tau KL(pi || anchor)      has the solution   pi*(y|x) = anchor(y|x) exp(r / tau) / Z(x)

so r - tau log Z = tau log pi*/anchor for every y. The squared difference of both sides, over 2 tau, is the loss:

    rho_i = sum_t log pi(o_it) - log anchor(o_it)                           summed over the completion
    L     = mean_i( -A_i rho_i + tau/2 rho_i^2 ),   A_i = r_i - baseline

Its gradient is minus the report's (1/k) sum_i [(r_i - mean(r)) grad log pi - tau/2 grad rho_i^2]. The baseline is
the group's mean, the report's estimate of tau log Z, or tau log Z itself estimated from the group (--baseline log-z).
There is no clip, no critic, no division by a standard deviation.

At policy = anchor the tau term has no gradient: it takes several updates an iteration (--minibatch-size) to act.
The next iteration's anchor is the policy then, and the optimizer starts afresh, since it is another problem.

Also from the report: the length reward (--length-weight, late in training: --length-reward-start), curriculum and
prioritized sampling (--problem-sampling). Departure: the report gives no tau; ours is for the embedded model.

    python train_kimi.py                                                # the embedded model, no GPU needed
    python train_kimi.py --model Qwen/Qwen2.5-0.5B-Instruct --problems openai/gsm8k:main --learning-rate 1e-6 \\
        --max-new-tokens 512                                                # with a GPU, not run on one yet

What you should see from the first command, in 60 s on 2 cores (AMD EPYC): held-out accuracy, sampled at temperature 1,
from 0.38 to 0.93, greedy accuracy at the hardest difficulty from 0.06 to 1.0; loss/kl, half the
squared log-ratio to the iteration's start, mean over its updates, well below 0.1.
"""

import math
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
    iterations: int = 100
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
    update_epochs: int = 1
    """passes over each iteration's completions"""
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

    tau: float = 0.05
    """strength of the KL to the iteration's anchor"""
    baseline: Literal["mean", "log-z"] = "mean"
    """of the advantages: the group's mean reward | tau log Z estimated from the group"""
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
    """(P,) bool: all rewards of the group are equal, so that it teaches nothing."""
    return rewards.amax(1) == rewards.amin(1)


def kimi_loss(
    logprobs: Tensor,
    anchor_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    tau: float,
    row_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """Squared surrogate of Kimi K1.5's eq. 3, less its constant, over 2 tau. Logprobs and mask are (B, T), advantages
    and row_weights (B,), None: 1/B each. Returns the loss and means over the rows."""
    rho = (logprobs - anchor_logprobs).masked_fill(~mask, 0.0).sum(1)  # (B,): summed over the completion, not averaged
    per_row = -advantages * rho + tau / 2 * rho**2
    if row_weights is None:
        row_weights = torch.full_like(advantages, 1 / len(advantages))
    metrics = {
        "kl": (rho**2 / 2).mean().item(),  # k2 of whole completions, to the anchor
        "ratio_max": rho.detach().max().exp().item(),
    }
    return (row_weights * per_row).sum(), metrics


def main(args: Args) -> None:
    # ------------------------------------------------------------------------------------------------------- Setup
    data.check_flags(args)
    batch_size = args.prompts_per_step * args.group_size
    minibatch_size = args.minibatch_size or max(1, args.prompts_per_step // 4) * args.group_size
    if args.group_size < 2:
        fail(f"--group-size {args.group_size}: must be at least 2: the group is the baseline")
    if minibatch_size % args.group_size or not args.group_size <= minibatch_size <= batch_size:
        allowed = f"a multiple of --group-size {args.group_size}, at most {batch_size} (prompts x group size)"
        fail(f"--minibatch-size {minibatch_size}: must be {allowed}")
    if args.update_epochs == 1 and minibatch_size == batch_size:
        fail(f"--minibatch-size {minibatch_size}: with one epoch at most half the batch: tau acts from the 2nd update")
    if args.baseline == "log-z" and args.tau == 0:
        fail("--baseline log-z: needs --tau above 0")

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
        rewards = sum(reward_weights[name] * values for name, values in components.items())  # (P, G)
        success = components["accuracy"].mean(1)  # (P,)
        for index, rate in zip(indices, success.tolist(), strict=True):
            sampler.record(index, rate)
        evaluate.add_rollout_metrics(metrics, rollout, rewards, components)
        samples = rollout, texts, components
        clock.lap("reward")

        # ---------------------------------------------------------------------------------------------- 3 logprobs
        rows = list(range(rollout.mask.shape[0]))
        anchor_logprobs = torch.zeros_like(rollout.sampler_logprobs)  # (B, T)
        with torch.no_grad():
            for micro in common.micro_batches(rollout, rows, args.micro_batch_tokens):
                anchor_logprobs[micro] = common.completion_logprobs(policy, rollout, micro, args.temperature)[0]
        clock.lap("logprobs")

        # -------------------------------------------------------------------------------------------- 4 advantages
        advantages = group_advantages(rewards, args.tau, args.baseline).flatten().to(device)  # (B,)
        if args.truncated == "mask":
            advantages = advantages.where(rollout.finished, 0.0)

        # ------------------------------------------------------------------------------------------------ 5 update
        learning_rate = args.learning_rate * min(1.0, (iteration + 1) / max(1, args.warmup_iterations))
        common.set_learning_rate(optimizer, learning_rate)
        if not args.keep_optimizer:  # a new anchor makes a new problem
            optimizer.state.clear()
        for epoch in range(args.update_epochs):
            for minibatch in common.minibatches(rollout, minibatch_size, derive_seed(args.seed, "update", x, epoch)):
                policy_loss = 0.0
                for micro in common.micro_batches(rollout, minibatch, args.micro_batch_tokens):
                    logprobs, entropy = common.completion_logprobs(policy, rollout, micro, args.temperature)
                    loss, loss_metrics = kimi_loss(
                        logprobs,
                        anchor_logprobs[micro],
                        advantages[micro],
                        rollout.mask[micro],
                        tau=args.tau,
                        row_weights=torch.full((len(micro),), 1 / len(minibatch), device=device),
                    )
                    loss.backward()
                    policy_loss += loss.item()
                    tokens = rollout.mask[micro].sum().item()
                    metrics.add({"loss/entropy": entropy.sum().item() / tokens}, weight=tokens)
                    metrics.add({f"loss/{name}": value for name, value in loss_metrics.items()}, weight=len(micro))
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
        evaluate.add_logprob_gap(metrics, rollout, anchor_logprobs)
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

    bar.close()
    writer.close()
    common.save_checkpoint(run_dir / "final", policy, tokenizer)
    stop.restore()
    print(f"\n{comparison_table(before, scores)}\n\nmodel: {run_dir / 'final'}")
    print(f"curves: tensorboard --logdir {run_dir}")


if __name__ == "__main__":
    main(common.parse_args(Args))
