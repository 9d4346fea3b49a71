"""Small random models of several architectures, and the embedded one. Everything runs on a CPU in fp32."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may depend on a network

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

import common

EMBEDDED = "models/tiny-arithmetic"
VOCABULARY, EOS = 40, 1
SHAPE = {"vocab_size": VOCABULARY, "eos_token_id": EOS, "pad_token_id": 0, "bos_token_id": None}
DEEP = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
CONFIGS = {
    "llama": LlamaConfig(**SHAPE, **DEEP, intermediate_size=64, max_position_embeddings=64),
    "qwen2": Qwen2Config(**SHAPE, **DEEP, intermediate_size=64, max_position_embeddings=64),  # biases
    "qwen3": Qwen3Config(**SHAPE, **DEEP, intermediate_size=64, max_position_embeddings=64, head_dim=8),
    "gpt2": GPT2Config(**SHAPE, n_embd=32, n_layer=2, n_head=4, n_positions=64),  # learned positions
    # a sliding window: no attention for groups, so the slow path
    "mistral": MistralConfig(**SHAPE, **DEEP, intermediate_size=64, max_position_embeddings=64, sliding_window=4),
}


def make_model(name: str, seed: int = 0, **changes):
    """A random model whose logits are far from uniform, so that a wrong position or mask is seen."""
    torch.manual_seed(seed)
    config = type(CONFIGS[name]).from_dict(CONFIGS[name].to_dict() | changes)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    model.generation_config.eos_token_id = EOS
    return model


@pytest.fixture(params=list(CONFIGS))
def model(request):
    return make_model(request.param)


@pytest.fixture(scope="session")
def embedded():
    return common.load_policy(EMBEDDED), common.load_tokenizer(EMBEDDED)


@pytest.fixture(autouse=True)
def fixed_settings():
    """Loading a policy sets the process's matmul precision: no test may depend on which ones ran before it."""
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("highest")


def ragged_prompts() -> list[list[int]]:
    return [[5, 6, 7, 8, 9, 10, 11], [12], [13, 14, 15]]
