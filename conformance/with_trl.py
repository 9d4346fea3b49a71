"""Adapters for TRL's GRPOTrainer and DPOTrainer, at their defaults and made equal to the plain formulas by flags."""

import contextlib
import io
import tempfile
import warnings

import torch

from conformance.checks import Step
from conformance.exact import Formula
from conformance.toy import Case

MINIMAL = {"use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
MINIMAL |= {"max_grad_norm": 0.0, "gradient_checkpointing": False, "logging_strategy": "no"}  # 0: no clipping


class Trained:
    """Runs a trainer quietly in a temporary folder, with SGD at learning rate 1."""

    def __init__(self, name: str, formula: Formula, **flags):
        self.name, self.formula, self.flags = name, formula, flags

    def train(self, case: Case, make, Config, rows: int, **fields) -> torch.nn.Module:
        from datasets import disable_progress_bars

        disable_progress_bars()
        micro = case.micro_batch or rows
        if rows % micro:
            raise NotImplementedError(f"{micro} rows do not divide {rows}")
        fields |= {"per_device_train_batch_size": micro, "gradient_accumulation_steps": rows // micro}
        fields |= {"max_steps": case.updates, "seed": case.seed}
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
            with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
                warnings.simplefilter("ignore")
                if case.kl_coef:  # GRPOTrainer loads its reference from the policy's path
                    case.reference.save_pretrained(folder)
                    case.model.config._name_or_path = case.model.name_or_path = folder
                config = Config(**MINIMAL | fields | self.flags, output_dir=folder)
                sgd = torch.optim.SGD(case.model.parameters(), lr=1.0)
                constant = torch.optim.lr_scheduler.LambdaLR(sgd, lambda step: 1.0)
                trainer = make(args=config, optimizers=(sgd, constant), processing_class=case.tokenizer)
                trainer.train()
        return case.model


class GRPO(Trained):
    def step(self, case: Case) -> Step:
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer

        seen = []  # (prompt's text, ids, reward), in the order of the groups

        def reward(prompts, completion_ids, **_):
            rewards = [
                case.reward(case.prompts[case.texts.index(p)], i) for p, i in zip(prompts, completion_ids, strict=True)
            ]
            seen.extend(zip(prompts, completion_ids, rewards, strict=True))
            return rewards

        def two_turns(prompts, trainer) -> dict:
            """TRL's hook for turns that it can't sample itself."""
            torch.manual_seed(case.seed)
            ids = [trainer.processing_class(text).input_ids for text in prompts]
            rows = []
            for prompt in ids:
                first = torch.tensor([prompt])
                for inserted in ([], case.second_turn):
                    first = torch.cat([first, torch.tensor([inserted], dtype=torch.long)], 1)
                    with torch.no_grad():
                        logits = case.model(first).logits[0, -1] / case.temperature
                    first = torch.cat([first, logits.softmax(-1).multinomial(1)[None]], 1)
                rows.append(first[0, len(prompt) :].tolist())
            mask = [[1] + [0] * len(case.second_turn) + [1]] * len(rows)
            return {
                "prompt_ids": ids,
                "completion_ids": rows,
                "logprobs": [[0.0] * len(r) for r in rows],
                "env_mask": mask,
            }

        def make(**given):
            data = Dataset.from_list([{"prompt": text} for text in case.texts])
            hook = {"rollout_func": two_turns} if case.second_turn else {}
            return GRPOTrainer(case.model, reward, train_dataset=data, **given, **hook)

        fields = {"num_generations": case.group_size, "max_completion_length": case.max_new_tokens}
        fields |= {"temperature": case.temperature, "num_iterations": case.updates, "beta": case.kl_coef}
        fields |= {"mask_truncated_completions": case.truncated == "mask"}
        fields |= {"epsilon": self.formula.clip[0], "epsilon_high": self.formula.clip[1]}
        rows = len(case.texts) * case.group_size
        model = self.train(case, make, GRPOConfig, rows, **fields)
        texts, ids, rewards = zip(*seen, strict=True)
        return Step([case.texts.index(text) for text in texts], [list(i) for i in ids], list(rewards), model)


class DPO(Trained):
    def step(self, case: Case) -> Step:
        from datasets import Dataset
        from trl import DPOConfig, DPOTrainer

        def text(row: int) -> str:
            return case.tokenizer.decode(case.data[row][1])

        def make(**given):
            rows = [(case.texts[case.data[i][0]], text(i), text(i + 1)) for i in range(0, len(case.data), 2)]
            data = Dataset.from_list([dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in rows])
            return DPOTrainer(case.model, case.reference, train_dataset=data, **given)

        pairs = len(case.data) // 2
        case.micro_batch = case.micro_batch and max(1, case.micro_batch // 2)  # TRL counts pairs
        model = self.train(case, make, DPOConfig, pairs, beta=self.formula.beta)
        prompts, ids = zip(*case.data, strict=True)
        return Step(list(prompts), list(ids), [None] * len(ids), model)


PLAIN = {"loss_type": "grpo", "use_bias_correction_kl": False, "disable_dropout": True}
ADAPTERS = [
    GRPO("TRL GRPOTrainer, defaults", Formula("grpo")),
    GRPO("TRL GRPOTrainer, made equal", Formula("grpo"), **PLAIN),
    DPO("TRL DPOTrainer, defaults", Formula("dpo")),
]
