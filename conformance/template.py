"""An adapter to copy: replace `reinforce` by your trainer, and say in `formula` what it computes.
`python conformance/run.py conformance/template.py` prints what the checks find."""

import torch

from conformance.checks import Step
from conformance.exact import Formula


class Mine:
    name, formula = "template", Formula("pg", "token", baseline="batch")  # see exact.Formula

    def step(self, case):
        if case.second_turn or case.unscored or case.truncated == "mask" or case.micro_batch:
            raise NotImplementedError("it has no such option")  # what your trainer can't do: the check is left out
        torch.manual_seed(case.seed)
        optimizer = torch.optim.SGD(case.model.parameters(), lr=1.0)
        options = {"temperature": case.temperature, "max_new_tokens": case.max_new_tokens}
        inputs = case.model, case.prompts, case.group_size, case.reward, optimizer
        completions, rewards = reinforce(*inputs, **options)
        index = [i for i in range(len(case.prompts)) for _ in range(case.group_size)]  # each completion's prompt
        return Step(index, completions, rewards, case.model)


ADAPTERS = [Mine()]


def reinforce(model, prompts, group_size, reward, optimizer, **options):
    """A trainer: one step of REINFORCE, with the batch's mean reward as its baseline."""
    completions, rewards, logps = [], [], []
    for prompt in prompts:
        ids = torch.tensor([prompt] * group_size)
        ids = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, **options)
        new = ids[:, len(prompt) :]
        ended = new == model.config.eos_token_id
        mask = ended.cumsum(1) - ended.long() == 0  # up to the first EOS, EOS included
        logits = model(ids).logits[:, len(prompt) - 1 : -1] / options["temperature"]
        logps.append((logits.log_softmax(-1).gather(2, new[:, :, None])[:, :, 0] * mask).sum(1))
        completions += [row[real].tolist() for row, real in zip(new, mask, strict=True)]
        rewards += [reward(prompt, row) for row in completions[-group_size:]]
    advantages = torch.tensor(rewards) - sum(rewards) / len(rewards)
    loss = -(advantages * torch.cat(logps)).sum() / sum(map(len, completions))
    loss.backward()
    optimizer.step()
    return completions, rewards
