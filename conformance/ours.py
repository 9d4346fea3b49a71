"""Adapters for this repository's scripts: their sampler, logprobs, advantages, losses and weights, with plain SGD."""

import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import common  # noqa: E402
import train_dpo  # noqa: E402
import train_grpo  # noqa: E402
import train_kimi  # noqa: E402
import train_pg  # noqa: E402
import train_ppo  # noqa: E402
import train_sft  # noqa: E402
from conformance.checks import Step  # noqa: E402
from conformance.exact import Formula  # noqa: E402
from conformance.toy import EOS, Case  # noqa: E402
from plumbing.pairs import pair_micro_batches  # noqa: E402


class SGD(common.Masters, torch.optim.SGD):
    pass


class Ours:
    """One of train_pg, train_ppo, train_grpo, train_kimi. The methods are sections 1 to 5 of the scripts' main."""

    learning_rate, filter = 1.0, None

    def __init__(self, name: str, formula: Formula, sampler: str | None = None):
        """sampler: the name of an adapter with the same sampler; then check B is left to that one."""
        self.name, self.formula, self.sampler = name, formula, sampler

    def prompts(self, case: Case) -> list[list[int]]:
        return case.prompts

    def sample(self, case: Case) -> common.Rollout:
        limit = 1 if case.second_turn else case.max_new_tokens
        options = {"temperature": case.temperature, "seed": case.seed, "eos_token_ids": EOS, "filter": self.filter}
        rollout = common.sample_groups(case.model, self.prompts(case), case.group_size, limit, **options)
        if case.second_turn:
            case.model.generation_config.eos_token_id = EOS
            inserts = [case.second_turn] * len(rollout.mask)
            rollout = common.continue_groups(case.model, rollout, inserts, 1, case.temperature, case.seed)
        return rollout

    def reward(self, case: Case, rollout: common.Rollout) -> list[float | None]:
        rows = enumerate(completions(rollout))
        return [case.reward(case.prompts[i // case.group_size], ids) for i, ids in rows]

    def prepare(self, case: Case, rollout, rewards, scored, old, ref, values):
        """(B, T) advantages; Kimi's are (B,)."""
        formula, trained = self.formula, rollout.trained
        if formula.objective == "kimi":
            A = train_kimi.group_advantages(rewards, formula.tau, "mean", scored).flatten()
            return A.where(rollout.finished, 0.0) if case.truncated == "mask" else A
        if formula.objective == "grpo":
            A = train_grpo.group_advantages(rewards, formula.std == "group", scored).flatten()[:, None]
            A = A.repeat(1, trained.shape[1])
        elif formula.objective == "ppo":
            token_rewards = train_ppo.shape_rewards(rewards.flatten(), old, ref, trained, case.kl_coef)
            A, _ = train_ppo.compute_gae(token_rewards, values, trained, 1.0, formula.gae_lambda)
            A = train_ppo.whiten(A, trained)
        else:
            token_rewards = torch.zeros(trained.shape)
            token_rewards[range(len(trained)), common.last_true(trained)] = rewards.flatten()
            A, returns = train_pg.compute_gae(token_rewards, values, trained, 1.0, formula.gae_lambda)
            if formula.baseline != "value":
                A = returns - (rewards[scored].mean() if formula.baseline == "batch" else 0.0)
        return A.where(rollout.finished[:, None], 0.0) if case.truncated == "mask" else A

    def loss(self, case: Case, micro, logprobs, old, ref, A, trained, weights):
        formula = self.formula
        if formula.objective == "kimi":
            row_weights = (trained.any(1) / trained.any(1).sum())[micro]
            return train_kimi.kimi_loss(logprobs, old[micro], A[micro], trained[micro], formula.tau, row_weights)[0]
        if formula.objective == "pg":
            return train_pg.pg_loss(logprobs, A[micro], trained[micro], weights[micro])[0]
        inputs = A[micro], trained[micro], weights[micro], *formula.clip
        if formula.objective == "ppo":
            return train_ppo.ppo_loss(logprobs, old[micro], *inputs)[0]
        options = case.kl_coef, formula.ratio, formula.kl == "rho k3"
        old = logprobs.detach() if case.updates == 1 else old[micro]
        return train_grpo.grpo_loss(logprobs, old, None if ref is None else ref[micro], *inputs, *options)[0]

    def weights(self, trained, case: Case):
        return common.token_weights(trained, self.formula.loss_norm, case.max_new_tokens)

    def step(self, case: Case) -> Step:
        rollout, budget = self.sample(case), budget_of(case)
        known = self.reward(case, rollout)
        rewards = torch.tensor([r or 0.0 for r in known]).view(-1, case.group_size)
        scored = torch.tensor([r is not None for r in known]).view(-1, case.group_size)
        sampled = completions(rollout)
        rollout = self.train_on(case, rollout).without(~scored)
        old = common.rollout_logprobs(case.model, rollout, budget, case.temperature)[0]
        ref = common.rollout_logprobs(case.reference, rollout, budget, case.temperature)[0] if case.kl_coef else None
        values = torch.zeros(old.shape)
        if self.formula.objective == "ppo" or self.formula.baseline == "value":  # a critic of random values
            values = torch.rand(old.shape, generator=torch.Generator().manual_seed(case.seed)) * rollout.mask
        A, trained = self.prepare(case, rollout, rewards, scored, old, ref, values), rollout.trained
        optimizer = SGD(case.model, self.learning_rate)
        for _ in range(case.updates):
            weights = self.weights(trained, case)
            for micro in common.micro_batches(rollout, [*range(len(trained))], budget):
                logprobs, _ = common.completion_logprobs(case.model, rollout, micro, case.temperature)
                self.loss(case, micro, logprobs, old, ref, A, trained, weights).backward()
            optimizer.step()
            optimizer.zero_grad()
        rows = [i // case.group_size for i in range(len(sampled))]
        return Step(
            rows, sampled, known, case.model, [v[m].tolist() for v, m in zip(values, rollout.mask, strict=True)]
        )

    def train_on(self, case: Case, rollout: common.Rollout) -> common.Rollout:
        return rollout  # the tokens that were sampled


class OnData:
    """train_dpo or train_sft: completions are given."""

    def __init__(self, name: str, formula: Formula):
        self.name, self.formula = name, formula

    def step(self, case: Case) -> Step:
        pairs, formula = self.formula.objective != "sft", self.formula
        G = 2 if pairs else 1
        prompts = [case.prompts[index] for index, _ in case.data[::G]]
        rollout = common.make_rollout(prompts, [ids for _, ids in case.data], G)
        mean, ref = formula.objective == "simpo", None
        if pairs and not mean:
            ref = train_dpo.sequence_logps(
                common.rollout_logprobs(case.reference, rollout, 10**6)[0], rollout.mask, mean
            )
        optimizer, budget = SGD(case.model, 1.0), budget_of(case)
        weights = common.token_weights(rollout.trained, formula.loss_norm, case.max_new_tokens)
        rows = [*range(len(rollout.mask))]
        micros = pair_micro_batches(rollout, budget) if pairs else common.micro_batches(rollout, rows, budget)
        for micro in micros:
            logprobs, _ = common.completion_logprobs(case.model, rollout, micro)
            if pairs:
                logps = train_dpo.sequence_logps(logprobs, rollout.trained[micro], mean)
                refs = (None, None) if ref is None else (ref[micro][0::2], ref[micro][1::2])
                name = {"dpo": "sigmoid"}.get(formula.objective, formula.objective)
                share = torch.full((len(micro) // 2,), 2 / len(rows))
                sides = logps[0::2], logps[1::2], *refs
                loss, _ = train_dpo.dpo_loss(*sides, formula.beta, name, formula.gamma, row_weights=share)
            else:
                loss, _ = train_sft.sft_loss(logprobs, rollout.trained[micro], weights[micro])
            loss.backward()
        optimizer.step()
        given = [ids for _, ids in case.data]
        return Step([index for index, _ in case.data], given, [None] * len(rows), case.model)


def completions(rollout: common.Rollout) -> list[list[int]]:
    return [ids[mask].tolist() for ids, mask in zip(rollout.completion_ids, rollout.mask, strict=True)]


def budget_of(case: Case) -> int:
    """Tokens of a micro-batch that holds case.micro_batch completions of the longest prompt."""
    return 10**6 if case.micro_batch is None else case.micro_batch * (max(map(len, case.prompts)) + case.max_new_tokens)


GRPO = Formula("grpo")
VARIANTS = {
    "train_grpo.py DAPO": replace(GRPO, loss_norm="token", clip=(0.2, 0.28)),
    "train_grpo.py Dr. GRPO": replace(GRPO, loss_norm="constant", std="none"),
    "train_grpo.py GSPO": replace(GRPO, ratio="gspo", clip=(3e-4, 4e-4)),
    "train_grpo.py R1, --unbiased-kl": replace(GRPO, ratio="sequence", kl="rho k3"),
    "train_pg.py none": Formula("pg", "token", baseline="none"),
    "train_pg.py batch-mean": Formula("pg", "token", baseline="batch"),
    "train_pg.py value": Formula("pg", "token", baseline="value"),
    "train_ppo.py": Formula("ppo", "token"),
    "train_kimi.py": Formula("kimi"),
}
GIVEN = {
    "train_dpo.py": Formula("dpo", beta=1.0),
    "train_dpo.py IPO": Formula("ipo"),
    "train_dpo.py SimPO": Formula("simpo", beta=2.0),
    "train_sft.py": Formula("sft", "token"),
}
ADAPTERS = [
    Ours("train_grpo.py", GRPO),
    *(Ours(name, formula, "train_grpo.py") for name, formula in VARIANTS.items()),
    *(OnData(name, formula) for name, formula in GIVEN.items()),
]
