"""A trainer of your own, put to the checks: copy this file and replace the lines of `step`.

    python conformance/run.py conformance/template.py
"""

import torch

from conformance.checks import Step
from conformance.exact import Exact, Formula, Rows, padded, table


class Mine:
    name, formula = "template", Formula("pg", "token", baseline="batch")  # what it computes; see exact.Formula

    def step(self, case):
        if case.second_turn or case.unscored or case.truncated == "mask" or case.updates > 1 or case.kl_coef:
            raise NotImplementedError("the template has one turn and one update")
        prompts = [prompt for prompt in case.prompts for _ in range(case.group_size)]
        padded_prompts = case.tokenizer.pad({"input_ids": prompts}, return_tensors="pt")  # on the left
        width = padded_prompts.input_ids.shape[1]
        torch.manual_seed(case.seed)
        options = {"do_sample": True, "temperature": case.temperature, "top_k": 0, "max_new_tokens": case.max_new_tokens}
        ids = case.model.generate(**padded_prompts, **options, pad_token_id=case.tokenizer.pad_token_id)
