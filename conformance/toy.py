"""A language model so small that every completion can be enumerated, its prompts, and its exact distribution.

Six tokens: <pad> 0, <eos> 1, <bos> 2, a 3, b 4, ab 5. The text "ab" has two encodings, [3, 4] and [5], so a trainer
that decodes and encodes again trains other tokens than were sampled. Every token, <pad> too, can be sampled.
Completions have at most three tokens.
"""

import copy
import functools
import random
from dataclasses import dataclass, field

import torch
from tokenizers import Tokenizer, decoders, models, processors
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, PreTrainedModel, PreTrainedTokenizerFast

PAD, EOS, BOS, A, B, AB = range(6)
V, T = 6, 3  # vocabulary, maximum length of a completion
IDS = {"vocab_size": V, "pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": BOS, "tie_word_embeddings": False}


def make_model(positions: str = "rotary", seed: int = 0, dropout: float = 0.0) -> PreTrainedModel:
    """A random causal LM in fp32 with distinct next-token distributions. positions: "rotary", where only distances
    count, or "learned", where a wrong position id shows. LayerNorm, because RMSNorm computes in fp32 whatever the
    weights' type."""
    torch.manual_seed(seed)
    if positions == "rotary":
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
        config = GPTNeoXConfig(**IDS, **sizes, max_position_embeddings=32, rotary_pct=1.0, hidden_dropout=dropout)
    else:
        off = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": 0.0}
        config = GPT2Config(**IDS, **off, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.25)  # far enough from uniform that a wrong mask, position or prompt shows
    return model


def make_tokenizer(pad: str = "<pad>") -> PreTrainedTokenizerFast:
    """Byte-pair encoding with one merge. It puts <bos> before every text."""
    vocabulary = {"<pad>": PAD, "<eos>": EOS, "<bos>": BOS, "a": A, "b": B, "ab": AB}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b")]))
    tokenizer.add_special_tokens(["<pad>", "<eos>", "<bos>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    tokenizer.decoder = decoders.Fuse()
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": pad}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **names)


def reward(prompt: list[int], completion: list[int]) -> float:
    """In [0, 1), fixed for each prompt and completion, and without any order: no two ways to be wrong agree on it."""
    return random.Random(str((list(prompt), list(completion)))).random()


@dataclass
class Case:
    """One step that a trainer is asked to make from `model`: what varies between the checks. Plain SGD, learning rate
    1, no clipping of gradients, no weight decay, no warm-up."""

    model: PreTrainedModel = field(default_factory=make_model)  # to be trained, fp32
    reference: PreTrainedModel = field(default_factory=lambda: make_model(seed=1))  # of KL and DPO; not the policy
    tokenizer: PreTrainedTokenizerFast = field(default_factory=make_tokenizer)
    texts: tuple[str, ...] = ("a", "bab", "bb")
    group_size: int = 4  # G completions for each prompt
    max_new_tokens: int = T
    temperature: float = 1.0
    micro_batch: int | None = None  # completions in one backward pass; None: all
    updates: int = 1  # steps on the same completions
    kl_coef: float = 0.0
    truncated: str = "score"  # completions cut by the length limit: "score", or "mask": no loss
    reward_scale: float = 1.0
    unscored: bool = False  # the reward of completions that begin with b is unknown (None)
    second_turn: list[int] | None = None  # after the first token come these, which nobody trains, then one more token
    data: list[tuple[int, list[int]]] | None = None  # SFT, DPO: (prompt's index, completion); DPO: chosen, rejected
    seed: int = 0

    @functools.cached_property
    def prompts(self) -> list[list[int]]:
        return [self.tokenizer(text).input_ids for text in self.texts]

    def reward(self, prompt: list[int], completion: list[int]) -> float | None:
        if self.unscored and completion[0] == B:
            return None
        return self.reward_scale * reward(prompt, completion)


class Exact:
    """Every next-token distribution of a model after a prompt, in float64, with gradient. One forward pass without
    padding covers all completions. offset: the first token's position."""

    def __init__(self, model: PreTrainedModel, prompt: list[int], temperature: float = 1.0, offset: int = 0):
        pairs = torch.cartesian_prod(torch.arange(V), torch.arange(V))  # (V * V, 2): all first and second tokens
        ids = torch.cat([torch.tensor(prompt).expand(V * V, -1), pairs], dim=1)
        positions = torch.arange(offset, offset + ids.shape[1]).expand(ids.shape)
        inputs = {"attention_mask": torch.ones_like(ids), "position_ids": positions, "use_cache": False}
        logits = model(ids, **inputs).logits[:, -3:]
        assert logits.dtype == torch.float64, "exact results need a float64 model: see Exact.of"
        first, second, third = (logits / temperature).log_softmax(-1).unbind(1)  # (V * V, V) each
        # log pi of the token after no token (V,), after one (V, V), after two (V, V, V)
        self.steps = first[0], second[::V], third.view(V, V, V)

    @staticmethod
    def of(model: PreTrainedModel) -> PreTrainedModel:
        return copy.deepcopy(model).double().eval()

    def logprobs(self, ids: Tensor) -> Tensor:
        """(R, W) tokens, W at most T -> (R, W) log pi of each, given the prompt and the tokens before it."""
        return torch.stack([self.steps[t][ids[:, : t + 1].unbind(1)] for t in range(ids.shape[1])], 1)

    def distribution(self, max_new_tokens: int = T) -> dict[tuple[int, ...], Tensor]:
        """The probability of every completion; they sum to 1."""
        found = {}
        for t in range(1, max_new_tokens + 1):
            ids = torch.cartesian_prod(*[torch.arange(V)] * t).view(-1, t)
            last = (ids[:, -1] == EOS) | (t == max_new_tokens)
            ids = ids[last & (ids[:, :-1] != EOS).all(1)]
            found |= zip(map(tuple, ids.tolist()), self.logprobs(ids).sum(1).exp(), strict=True)
        return found
