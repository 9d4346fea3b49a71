"""Eight faults that public trainers had, put into train_grpo.py's adapter. Each must be flagged by name."""

import torch

import common
from conformance.checks import top_p
from conformance.exact import Formula
from conformance.ours import GRPO, Ours


class AccumulationFactor(Ours):
    """Each micro-batch is averaged by itself, and their sum is not divided by their number."""

    flagged = "gradient is 12 times the exact one"

    def loss(self, case, micro, logprobs, old, ref, A, trained, weights):
        weights = weights.clone()
        weights[micro] = self.weights(trained[micro], case)
        return super().loss(case, micro, logprobs, old, ref, A, trained, weights)


class KLMaximized(Ours):
    flagged = "the KL's sign is wrong: it is maximized"

    def loss(self, case, *given):
        case.kl_coef = -abs(case.kl_coef)
        return super().loss(case, *given)


class GroupsOfOne(Ours):
    """Completions are grouped by an id that each has for itself. A group of one keeps its reward as its advantage."""

    flagged = "each completion is a group of its own: no baseline"

    def prepare(self, case, rollout, rewards, scored, *given):
        A = super().prepare(case, rollout, rewards, scored, *given)
        return rewards.flatten()[:, None].expand_as(A) * (A != 0)


class LeakedRows(Ours):
    """Rejected completions, without a reward, count in their group's mean."""

    flagged = "completions without a reward leak into their group's baseline, as 0"

    def prepare(self, case, rollout, rewards, scored, *given):
        return super().prepare(case, rollout, rewards, torch.ones_like(scored), *given)


class Retokenized(Ours):
    """The completions are decoded for the reward, and their text is encoded again for training."""

    flagged = "trained tokens are not the sampled ones: text was encoded again"

    def train_on(self, case, rollout):
        if case.second_turn:
            raise NotImplementedError("its text has one turn")
        rows = []
        for ids, mask in zip(rollout.completion_ids, rollout.mask, strict=True):
            text = case.tokenizer.decode(ids[mask])
            rows.append(case.tokenizer(text, add_special_tokens=False).input_ids)
        again = common.make_rollout(rollout.prompt_ids, rows, case.group_size)
        again.finished = rollout.finished
        return again


class TruncatedSampling(Ours):
    """Samples with top-p 0.8, trains on the plain log-probabilities."""

    flagged = "sampled with top-p 0.8, differentiated at T 1 of the whole distribution"
    filter = staticmethod(lambda logits: top_p(0.8)(logits.log_softmax(-1)))


class NoStep(Ours):
    """The schedule's first learning rate is 0, as with a warm-up that begins there."""

    flagged = "the update is exactly zero"
    learning_rate = 0.0


class DoubleBOS(Ours):
    """The chat template writes BOS, and the tokenizer adds another."""

    flagged = "the prompt begins with two BOS"

    def prompts(self, case):
        return [case.tokenizer("<bos>" + text).input_ids for text in case.texts]


NAMES = {
    "accumulation's factor": AccumulationFactor,
    "KL with the wrong sign": KLMaximized,
    "groups of one": GroupsOfOne,
    "leaked rows": LeakedRows,
    "retokenization": Retokenized,
    "truncated sampling, plain logprobs": TruncatedSampling,
    "an update that is exactly zero": NoStep,
    "double BOS": DoubleBOS,
}
FORMULAS = {GroupsOfOne: Formula("grpo", std="none")}  # divided by its std, a group of one would have no advantage
SAMPLERS = {TruncatedSampling: None, DoubleBOS: None}  # the others sample as train_grpo.py does
ADAPTERS = [
    mutant(f"mutant: {name}", FORMULAS.get(mutant, GRPO), SAMPLERS.get(mutant, "train_grpo.py"))
    for name, mutant in NAMES.items()
]
