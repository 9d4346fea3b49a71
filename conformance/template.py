"""A trainer of your own, put to the checks: copy this file and replace `step` by your trainer's.

    python conformance/run.py conformance/template.py

This one samples with `generate` and makes one REINFORCE update with the batch's mean as baseline.
"""

import torch

from conformance.checks import Step
from conformance.exact import Formula


class Mine:
    name, formula = "template", Formula("pg", "token", baseline="batch")  # what it says that it computes

    def step(self, case):
        if case.second_turn or case.unscored or case.truncated == "mask" or case.micro_batch:
            raise NotImplementedError("it has no such option")  # of a case, in words
        torch.manual_seed(case.seed)
        G, indices, rows, logps = case.group_size, [], [], []
        options = {"do_sample": True, "temperature": case.temperature, "top_k": 0, "num_return_sequences": G}
        for index, prompt in enumerate(case.prompts):  # the groups, one after another
            ids = torch.tensor([prompt])
            ids = case.model.generate(ids, max_new_tokens=case.max_new_tokens, **options)
            new = ids[:, len(prompt) :]
            mask = (new == case.tokenizer.eos_token_id).cumsum(1) - (new == case.tokenizer.eos_token_id).long() == 0
            logits = case.model(ids).logits[:, len(prompt) - 1 : -1] / case.temperature
            logps.append((logits.log_softmax(-1).gather(2, new[:, :, None])[:, :, 0] * mask).sum(1))
            indices += [index] * G
            rows += [i[m].tolist() for i, m in zip(new, mask, strict=True)]
        rewards = [case.reward(case.prompts[i], ids) for i, ids in zip(indices, rows, strict=True)]
        advantages = torch.tensor(rewards) - sum(rewards) / len(rewards)
        loss = -(advantages * torch.cat(logps)).sum() / sum(map(len, rows))
        loss.backward()
        torch.optim.SGD(case.model.parameters(), lr=1.0).step()
        return Step(indices, rows, rewards, case.model)


ADAPTERS = [Mine()]
