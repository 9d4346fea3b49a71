"""Makes the tokenizer and the config of an embedded model; `train_sft.py --from-scratch` then trains it.

    python models/make_tiny.py runs/tiny
    python models/make_tiny.py runs/student --hidden 64 --layers 2          # a smaller one

The tokenizer is a character tokenizer: every printable ASCII character, newline and the four tags are one token
each, and so are the --characters; anything else is `<unk>`. The tags are ordinary vocabulary, not registered special
tokens: decoding with `skip_special_tokens=True` must keep them, since the rewards read them.
"""

from pathlib import Path

import tyro
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

TAGS = ["<think>", "</think>", "<answer>", "</answer>"]
SPECIAL = ["<pad>", "<eos>", "<unk>"]
# The prompt is the bare question. System prompts are ignored, because the model was never trained on one.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'user' %}{{ message.content }}"
    "{% elif message.role == 'assistant' %}{{ message.content + eos_token }}{% endif %}{% endfor %}"
)


def make_tokenizer(characters: str = "") -> PreTrainedTokenizerFast:
    printable = [chr(code) for code in range(32, 127)] + ["\n"]
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *TAGS, *printable, *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    pattern = Regex("|".join(TAGS) + r"|[\s\S]")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pattern, behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )


def make_config(tokenizer: PreTrainedTokenizerFast, hidden: int = 128, layers: int = 4) -> LlamaConfig:
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=hidden * 43 // 16,  # 344
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )


def main(directory: tyro.conf.Positional[Path], hidden: int = 128, layers: int = 4, characters: str = "") -> None:
    """directory: output directory. hidden, layers: the model's size. characters: more tokens, beyond ASCII."""
    tokenizer = make_tokenizer(characters)
    tokenizer.save_pretrained(directory)
    make_config(tokenizer, hidden, layers).save_pretrained(directory)
    print(f"wrote the tokenizer ({len(tokenizer)} tokens) and the config to {directory}")


if __name__ == "__main__":
    tyro.cli(main)
