"""Every causal language model of transformers, tiny and random: exact, or refused in one line?

    python tests/families.py            # a table of all families and variants, then counts
    python tests/families.py llama qwen3

check(name) builds a model of a few thousand weights from transformers' own config class, then loads, samples, trains
and saves it with common.py as a script does. The expected results come from plain transformers, which reads each row
alone, without a cache, from a copy of its own.

Verdicts: "fast" (packed groups) or "slow" (padded rows): all results are equal to the expected ones. "refused": ended
in one line. "crash": a traceback, or an error of several lines. "wrong": a result differs. "unbuildable": no tiny model
of this family can be made here; the reason says why.
"""

import contextlib
import functools
import io
import os
import re
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

import common
from plumbing import engine, runs

VOCABULARY, EOS = 64, 1
LIMIT = 1e-3  # largest difference of a logprob, value or score, and relative one of a gradient
SECONDS = 40  # a family that takes longer hangs


class Verdict(NamedTuple):
    kind: str  # fast, slow, refused, crash, wrong, unbuildable
    why: str


# ---- Tiny configs --------------------------------------------------------------------------------------------------

RULES = [  # (pattern of a field's whole name, its tiny value); the first match counts
    (r"pad_token_id", 0),
    (r"eos_token_id|decoder_start_token_id", EOS),
    (r"bos_token_id", 2),
    (r"(image|video|audio|boi|eoi|boa|eoa|vision_\w+)_token_(id|index)", VOCABULARY - 1),
    (r"(cls|sep|mask|eod|forced_\w+)_token_id", 3),
    (r"\w*vocab_size\w*", VOCABULARY),
    (r"hidden_size|n_embd|d_model|dim|word_embed_proj_dim|\w*embedding_size|emb_dim|embedding_dim|lru_width", 32),
    (r"num_hidden_layers|n_layers?|num_(en|de)coder_layers|num_layers|(en|de)coder_layers|num_blocks", 2),
    (r"(num_|n_|(en|de)coder_|num_(en|de)coder_)(attention_)?heads?|attention_heads", 4),
    (r"(num_|n_)(key_value|kv)_heads|kv_n_heads|\w+_num_key_value_heads|\w+_num_kv_heads", 2),
    (r"\w+_num_attention_heads", 4),
    (r"head_dim|d_head|dim_head|kv_channels|\w*attention_head_size|d_kv|(swa|global|attention)_head_dim", 8),
    (r"qk_(nope|rope)_head_dim|v_head_dim", 8),
    (r"qk_head_dim", 16),
    (r"\w*intermediate_size\w*|\w*ffn_dim|\w*ffn_hidden_size|dff|dim_ff|d_ff|d_inner|feed_forward_size|mlp_dim", 48),
    (r"((num|n|moe_num)_)(local_|routed_)?experts", 4),
    (r"num_experts_per_tok\w*|moe_(topk|top_k|k)|top_k_experts|router_top_k", 2),
    (r"(n|num)_shared_experts|first_k_dense_replace|moe_layer_start_index|num_dense_layers", 1),
    (r"n_group|num_expert_groups?", 2),
    (r"topk_group", 1),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|max_\w+_positions|context_length|max_sequence_length", 64),
    (
        r"sliding_window(_size)?|attention_window_size|attention_chunk_size|local_attention|window_size|keep_window_size",
        8,
    ),
    (r"local_attention_window_len|floor_scale", 8),
    (r"\w*lora_rank|\w*lowrank|laurel_rank|adapter_rank|router_hidden_size|gated_norm_rank|d_rel", 8),
    (r"rel_extent", 16),
    (r"(mamba_)?(dt_rank|time_step_rank)", 4),
    (r"(mamba_d_|ssm_)?state(_size)?|mamba_state_dim", 8),
    (r"mamba_(n|num)_heads|n_mamba_heads", 4),
    (r"mamba_(d_head|head_dim|headdim)", 16),
    (r"mamba_d_ssm", 64),
    (r"(mamba_)?n_?groups", 1),
    (r"(mamba_)?chunk_size|block_size", 4),
    (r"linear_num_key_heads", 2),
    (r"linear_num_(value_)?heads", 4),
    (r"linear_(key_|value_)?head_dim", 8),
    (r"index_head_dim|index_n_heads", 16),  # many heads: of few, the ReLU makes equal scores, of which top-k takes any
    (r"index_topk", 6),
    (r"rotary_dim", 4),
    (r"adapter_(in|out)_dim|adapter_input_size", 32),
    (r"output_channels|nemo_conv_channels|\w+_out_channel", 16),
    (r"zero_expert_num", 2),
    (r"hidden_size_per_layer_input", 8),
    (r"\w*dropout\w*|\w*pdrop|\w*_drop", 0.0),
]

ROPE = {"rope_type": "default", "rope_theta": 1e4}
SHARED = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2}
GLOBAL_WIDTH = {"hidden_size_global": 32, "vocab_size": VOCABULARY}

# family -> fields that the rules don't find
OVERRIDES: dict[str, dict] = {
    "blt": {"encoder_hash_byte_group_vocab": 64, "encoder_config": GLOBAL_WIDTH, "decoder_config": GLOBAL_WIDTH},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"sliding_attention": ROPE, "full_attention": ROPE},
    },
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_text": {"head_dim": 16},
    "dots3_note": {
        "text_config": {"head_dim": 16},
        "vision_config": {"adapter_out_dim": 32},
        "audio_config": {"adapter_out_dim": 32},
    },
    "gemma3n_text": SHARED | {"intermediate_size": 48, "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "qwen4_exp_text": {
        "indexer_n_heads": 16, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "reformer": {
        "axial_pos_shape": [8, 8], "axial_pos_embds_dim": [16, 16], "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
OVERRIDES["qwen4_exp"] = {"text_config": OVERRIDES["qwen4_exp_text"]}

# A family that applies its layers several times: with larger weights it would amplify rounding beyond LIMIT.
SMALLER_WEIGHTS = {"hrm_text": 0.4}

WITH_ROUTER = """mixtral qwen2_moe qwen3_moe olmoe gpt_oss granitemoe granitemoehybrid jamba dbrx phimoe minimax jetmoe
    ernie4_5_moe flex_olmo nemotron_h qwen3_next deepseek_v2""".split()
ENCODERS = """bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert rembert roberta
    roberta-prelayernorm roc_bert roformer xlm-roberta xlm-roberta-xl xmod""".split()


def rope(kind: str, **fields) -> dict:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **fields}}


def long_rope(context: int) -> dict:
    factors = {"short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [4.0, 6.0, 8.0, 10.0]}
    original = {"original_max_position_embeddings": context}
    return original | rope("longrope", **original, **factors)


# name -> (family, changes of its tiny config)
VARIANTS: dict[str, tuple[str, dict]] = {
    **{f"{name}+router_logits": (name, {"output_router_logits": True}) for name in WITH_ROUTER},
    **{f"{name}+bidirectional": (name, {"is_decoder": False}) for name in ENCODERS},
    **{
        f"{name}+{what}": (name, {f"output_{what}": True})
        for name in ("llama", "gpt2", "gemma2", "mixtral", "mamba", "qwen3_next", "bert")
        for what in ("hidden_states", "attentions")
    },
    "gemma3_text+bidirectional": ("gemma3_text", {"use_bidirectional_attention": True}),
    "gemma4_text+shared_layers": ("gemma4_text", SHARED),
    "gpt2+scaled_by_layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True}),
    "gpt2+cross_attention": ("gpt2", {"add_cross_attention": True}),
    "falcon+alibi": ("falcon", {"alibi": True}),
    "falcon+new_decoder": ("falcon", {"new_decoder_architecture": True}),
    "granite+multipliers": (
        "granite",
        {f"{name}_multiplier": 0.5 for name in ("embedding", "residual", "attention")} | {"logits_scaling": 2.0},
    ),
    "llama+tied": ("llama", {"tie_word_embeddings": True}),
    "llama+biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama+no_special_ids": ("llama", {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}),
    "llama+several_eos": ("llama", {"eos_token_id": [1, 7, 20]}),
    "llama+rope_linear": ("llama", rope("linear", factor=4.0)),
    "llama+rope_dynamic": ("llama", rope("dynamic", factor=4.0, original_max_position_embeddings=16)),
    "llama+rope_dynamic_past_its_context": ("llama", rope("dynamic", factor=4.0) | {"max_position_embeddings": 16}),
    "llama+rope_yarn": ("llama", rope("yarn", factor=4.0, original_max_position_embeddings=16)),
    "llama+rope_longrope": ("llama", long_rope(16)),
    "llama+rope_llama3": (
        "llama",
        rope("llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16),
    ),
    "phi3+rope_longrope": ("phi3", long_rope(16)),
    "phi3+longrope_within": ("phi3", long_rope(32)),  # texts shorter than the original context
    "qwen2+window": ("qwen2", {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 8}),
    "mistral+no_window": ("mistral", {"sliding_window": None}),
    "doge+window_longer_than_text": ("doge", {"keep_window_size": 64}),
    "deepseek_v32+topk_longer_than_text": ("deepseek_v32", {"index_topk": 64}),
    "llama4_text+chunks_longer_than_text": ("llama4_text", {"attention_chunk_size": 64, "floor_scale": 64}),
}  # fmt: skip

# Families that share a config class are one family: its saved models have one name.
FAMILIES = list({CONFIG_MAPPING[name]: name for name in reversed(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)}.values())[::-1]


def tiny_value(name: str, value):
    """The tiny value of a config's field; `value` itself if no rule fits."""
    if name == "is_decoder":
        return True
    unset = value is None and not re.fullmatch(r"\w+_token_id|head_dim|num_key_value_heads|num_attention_heads", name)
    if unset or isinstance(value, dict | list | str | bool):
        return value
    return next((tiny for pattern, tiny in RULES if re.fullmatch(pattern, name)), value)


def tiny_values(fields: dict) -> dict:
    tiny = {name: tiny_value(name, value) for name, value in fields.items()}
    if "kv_lora_rank" in fields and "num_key_value_heads" in fields:
        tiny["num_key_value_heads"] = 4  # multi-head latent attention: as many as query heads
    return tiny


def tiny_fields(config) -> dict:
    """Fields of a tiny config, by name, for the constructor of config's class. Of layers it keeps one of each kind."""
    fields, parts = config.to_dict(), {name: getattr(config, name, None) for name in type(config).sub_configs}
    changes = {n: v for n, v in tiny_values(fields).items() if v != fields[n] and n not in parts}
    count = getattr(config, "num_hidden_layers", None)
    lists = {n: v for n, v in fields.items() if isinstance(v, list) and len(v) == count and n not in changes}
    kinds = list(zip(*(v for v in lists.values() if isinstance(v[0], str)), strict=True))
    chosen = {kind: i for i, kind in reversed(list(enumerate(kinds)))}.values()
    chosen = sorted(chosen if len(chosen) > 1 else range(min(2, len(kinds))))
    if chosen:
        changes |= {n: len(chosen) for n in ("num_hidden_layers", "n_layer", "n_layers", "num_layers") if n in changes}
        changes |= {name: [value[i] for i in chosen] for name, value in lists.items()}
        if own := {int(i): values for i, values in fields.get("per_layer_config", {}).items()}:
            changes["per_layer_config"] = {n: tiny_values(own[i]) for n, i in enumerate(chosen) if i in own}
    for name, part in parts.items():
        if hasattr(part, "to_dict"):
            changes[name] = tiny_fields(part) | {"model_type": part.model_type}
    return changes


def merged(first: dict, second: dict) -> dict:
    both = {n: merged(first[n], v) for n, v in second.items() if isinstance(v, dict) and isinstance(first.get(n), dict)}
    return first | second | both


SEEDS = {"qwen3_next": 1}  # with seed 0, rounding decides which of two experts a router takes


def tiny_model(name: str) -> tuple:
    """A random causal LM of the family or variant, whose logits are far from uniform, and its whole config."""
    family, changes = VARIANTS.get(name, (name, {}))
    config_class = CONFIG_MAPPING[family]
    fields = merged(merged(tiny_fields(config_class()), OVERRIDES.get(family, {})), changes)
    config = config_class(**fields)
    torch.manual_seed(SEEDS.get(family, 0))
    attention = "eager" if config.output_attentions else None  # no other kernel has these weights
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention).eval()
    randomize(model, SMALLER_WEIGHTS.get(family, 1.0))
    return model, config


@torch.no_grad()
def randomize(model, scale: float) -> None:
    """Weights so large that each token, position and parameter matters. Constants (norms, biases, sinks) get noise."""
    for name, parameter in [*model.named_parameters()]:
        noise = torch.randn_like(parameter)
        if parameter.dim() > 1 and "A_log" not in name:
            parameter.copy_(noise * scale * (0.5 if parameter.shape[-1] <= VOCABULARY else 0.2))
        else:
            parameter.add_(noise * 0.1)


# ---- Expected results: plain transformers, each row alone ----------------------------------------------------------


def row_ids(rollout, row: int) -> Tensor:
    return torch.tensor(
        [rollout.prompt_ids[row // rollout.group_size] + rollout.completion_ids[row][rollout.mask[row]].tolist()]
    )


def expected_logprobs(reference, rollout, row: int) -> Tensor:
    ids = row_ids(rollout, row)
    logits = reference(ids, use_cache=False).logits[0, :-1].float()
    logprobs = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    return logprobs[len(rollout.prompt_ids[row // rollout.group_size]) - 1 :]


@torch.no_grad()
def all_expected(reference, rollout) -> Tensor:
    expected = torch.zeros(rollout.mask.shape)
    for row in range(len(expected)):
        expected[row, rollout.mask[row]] = expected_logprobs(reference, rollout, row)
    return expected


@torch.no_grad()
def later_tokens_matter(reference, rollout) -> float:
    """How much a logit of the longest row changes if the tokens after it are cut off."""
    ids = row_ids(rollout, int(rollout.mask.sum(1).argmax()))
    whole = reference(ids, use_cache=False).logits[0]
    ends = range(2, ids.shape[1], 5)
    return max(
        (whole[end - 1] - reference(ids[:, :end], use_cache=False).logits[0, -1]).abs().max().item() for end in ends
    )


def fixed_rollout():
    """Three prompts with three completions each, all ragged, some longer than a decoder's buffer and a window."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda n: torch.randint(4, VOCABULARY - 4, (n,), generator=generator).tolist()  # noqa: E731
    prompts = [draw(n) for n in (9, 1, 4)]
    return common.make_rollout(prompts, [draw(n) for n in (20, 3, 17, 1, 9, 12, 18, 2, 5)], 3)


# ---- The check -----------------------------------------------------------------------------------------------------


class Wrong(Exception):
    pass


def compare(what: str, ours: Tensor, expected: Tensor, limit: float = LIMIT) -> None:
    if not torch.isfinite(ours).all():
        raise Wrong(f"{what}: not finite")
    if (error := (ours - expected).abs().max().item()) > limit:
        raise Wrong(f"{what}: differ by {error:.2g}")


def compare_gradients(what: str, ours: dict, expected: dict) -> None:
    """Each parameter's gradient, relative to its own norm or, if that is tiny, to a thousandth of all gradients'."""
    total = sum(g.norm() ** 2 for g in expected.values()) ** 0.5
    if missing := [name for name in expected if name not in ours and expected[name].norm() > 1e-6 * total]:
        raise Wrong(f"{what}: {missing[0]} and {len(missing) - 1} more get none")
    errors = {n: ((ours[n] - g).norm() / (g.norm() + 1e-3 * total)).item() for n, g in expected.items() if n in ours}
    worst = max(errors, key=errors.get)
    if not errors[worst] < 10 * LIMIT:
        raise Wrong(f"{what}: {worst} differs by {errors[worst]:.2g} of its norm")


def gradients(model, total) -> dict[str, Tensor]:
    model.zero_grad()
    total()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def where(error: BaseException) -> str:
    """The last line of our code and the last line at all."""
    frames = traceback.extract_tb(error.__traceback__)
    root = str(Path(__file__).parent.parent)
    ours = [f for f in frames if f.filename.startswith(root) and f.filename != __file__]
    names = [f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in [*ours[-1:], frames[-1]]]
    message = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}: {message} ({' > '.join(dict.fromkeys(names))})"


class Untokenized:
    """A tokenizer for runs.save_model: writes nothing."""

    def save_pretrained(self, directory) -> None:
        pass


class Check:
    """One family's check. Each part runs, whatever the others say; `failures` holds what they found."""

    def __init__(self, name: str, directory: Path):
        self.name, self.path = name, str(directory / "model")
        self.directory, self.failures, self.notes = directory, [], []

    def part(self, name: str, function):
        """function(), or None if it failed; the failure is noted. SystemExit with one line of message is a refusal."""
        printed = io.StringIO()
        try:
            with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(io.StringIO()):
                return function()
        except Wrong as error:
            self.failures.append(("wrong", f"{name}: {error}"))
        except SystemExit as stopped:
            text = printed.getvalue()
            line = text[text.find("error: ") :].strip()
            one = stopped.code == 2 and text.count("error: ") == 1 and "\n" not in line
            line = line.removeprefix("error: ").replace(self.path, "PATH")
            self.failures.append(("refused" if one else "crash", f"{name}: {line}"))
        except Exception as error:
            self.failures.append(("crash", f"{name}: {where(error)}"))
        finally:
            self.notes += [line for line in printed.getvalue().splitlines() if line.startswith("note: ")]
        return None

    def refused(self) -> bool:
        return any(kind == "refused" for kind, _ in self.failures)

    def verdict(self) -> Verdict:
        model, config = tiny_model(self.name)
        model.save_pretrained(self.path)
        if type(model.config) is not type(config):  # a composite's text model; the hub has the whole config
            config.save_pretrained(self.path)
        attention = "eager" if config.output_attentions else None
        self.reference = AutoModelForCausalLM.from_pretrained(
            self.path, dtype=torch.float32, attn_implementation=attention
        ).eval()
        self.rollout, self.rows = fixed_rollout(), list(range(9))
        self.expected = all_expected(self.reference, self.rollout)
        if not self.expected.isfinite().all() or self.expected.std() < 0.05:
            raise ValueError(f"random weights give useless logprobs, of spread {self.expected.std():.2g}")
        changed = later_tokens_matter(self.reference, self.rollout)
        self.model = self.part("load", lambda: common.load_policy(self.path, None))
        if self.model is None:
            return self.worst()
        if changed > LIMIT:
            self.part("sampling", self.sample)
            if not self.refused():
                self.part(
                    "load",
                    lambda: compare(
                        "not causal but accepted: later tokens move logits", Tensor([changed]), Tensor([0])
                    ),
                )
            return self.worst()
        for part in (self.sample, self.trainer, self.gradient, self.checkpointed, self.other_attention, self.saved):
            self.part(part.__name__, part)
            if self.refused():
                return self.worst()
        self.heads()
        return self.worst()

    def worst(self) -> Verdict:
        why = [text for kind, text in self.failures if kind != "later"]
        for kind in ("crash", "wrong", "refused"):
            if found := [text for k, text in self.failures if k == kind]:
                return Verdict(kind, "; ".join(dict.fromkeys(found)))
        fast = engine.decoder_class(self.model) is engine.GroupDecoder
        return Verdict("fast" if fast else "slow", "; ".join(dict.fromkeys([*self.notes, *why])))

    def sample(self) -> None:
        for seed in range(5):  # until rows end early and others fill a decoder's buffer
            rollout = common.sample_groups(
                self.model, self.rollout.prompt_ids, 3, 20, seed=seed, eos_token_ids=[1, 7, 20, 33]
            )
            lengths = rollout.mask.sum(1)
            if lengths.max() > engine.GROWTH and len(lengths.unique()) > 2:
                break
        expected = all_expected(self.reference, rollout)
        compare("sampler_logprobs", rollout.sampler_logprobs, expected)
        compare("logprobs of the sampled rows", common.rollout_logprobs(self.model, rollout, 60)[0], expected)

    def trainer(self) -> None:
        for max_tokens in (1000, 40, 1):
            logprobs, entropy = common.rollout_logprobs(self.model, self.rollout, max_tokens)
            compare(f"rollout_logprobs at {max_tokens} tokens", logprobs, self.expected)
        rows = [7, 1, 5]
        logprobs, _ = common.completion_logprobs(self.model, self.rollout, rows)
        compare("completion_logprobs of rows 7, 1, 5", logprobs, self.expected[rows])

    def gradient(self, what: str = "gradient") -> None:
        def plain():
            for row in self.rows:
                expected_logprobs(self.reference, self.rollout, row).sum().backward()

        def ours(max_tokens):
            for micro in common.micro_batches(self.rollout, self.rows, max_tokens):
                common.completion_logprobs(self.model, self.rollout, micro)[0].sum().backward()

        expected = gradients(self.reference, plain)
        for max_tokens in (1000, 40):
            found = gradients(self.model, functools.partial(ours, max_tokens))
            compare_gradients(f"{what} at {max_tokens} tokens", found, expected)

    def checkpointed(self) -> None:
        common.checkpoint_layers(self.model)
        self.gradient("gradient with checkpointing")

    def other_attention(self) -> None:
        """A CPU without AMX loads the eager attention (see common.load_weights)."""
        if self.reference.config._attn_implementation == "eager":
            return
        torch.set_float32_matmul_precision("medium")
        try:
            model = common.load_policy(self.path, None)
        finally:
            torch.set_float32_matmul_precision("highest")
        plain = AutoModelForCausalLM.from_pretrained(self.path, dtype=torch.float32, attn_implementation="eager")
        expected = all_expected(plain.eval(), self.rollout)
        if (difference := (expected - self.expected).abs().max()) > LIMIT:
            self.notes.append(f"note: transformers' eager and sdpa attention differ by {difference:.2g}")
        compare("rollout_logprobs", common.rollout_logprobs(model, self.rollout, 60)[0], expected)
        rollout = common.sample_groups(model, self.rollout.prompt_ids, 3, 20, eos_token_ids=[1, 7, 20, 33])
        compare("sampler_logprobs", rollout.sampler_logprobs, all_expected(plain, rollout))

    def saved(self) -> None:
        """After an update (all weights move), ours and the reloaded model's logprobs agree."""
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        ours, _ = common.rollout_logprobs(self.model, self.rollout, 1000)
        runs.save_model(self.directory / "final", self.model, Untokenized())
        final, options = self.directory / "final", {"dtype": torch.float32, "output_loading_info": True}
        try:
            reloaded, loading = AutoModelForCausalLM.from_pretrained(final, **options)
        except Exception as error:
            raise Wrong(f"plain transformers can't load final/: {where(error)}") from None
        if loading["missing_keys"]:
            raise Wrong(f"{min(loading['missing_keys'])} is not in the saved files")
        expected = all_expected(reloaded.eval(), self.rollout)
        if (expected - self.expected).abs().max() < LIMIT:
            raise Wrong("the update changed nothing")
        compare("reloaded model's logprobs", ours, expected)

    def heads(self) -> None:
        """The critic and the reward model. A refusal of these alone doesn't count against the policy."""
        for part in (self.critic, self.reward):
            before = len(self.failures)
            self.part(part.__name__, part)
            found = self.failures[before:]
            self.failures[before:] = [
                ("later" if kind == "refused" else kind, text[:90]) if kind == "refused" else (kind, text)
                for kind, text in found
            ]

    @staticmethod
    @torch.no_grad()
    def random_head(head) -> None:
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))

    def plain_head(self, auto_class, target):
        model = auto_class.from_pretrained(target, dtype=torch.float32).eval()
        model.config.get_text_config().pad_token_id = model.config.pad_token_id = None  # read each row's last token
        model.config.get_text_config().use_cache = False  # Jamba's cache fails in transformers itself
        return model

    def critic(self) -> None:
        model = common.load_value_model(self.path, None)
        if common.rollout_values(model, self.rollout, 1000).abs().max() != 0:
            raise Wrong("values of a new head are not 0")
        self.random_head(common.value_head(model))
        values = common.rollout_values(model, self.rollout, 60)
        runs.save_model(self.directory / "critic", model, Untokenized())
        plain, expected = (
            self.plain_head(AutoModelForTokenClassification, self.directory / "critic"),
            torch.zeros_like(values),
        )
        with torch.no_grad():
            for row in self.rows:
                start = len(self.rollout.prompt_ids[row // 3]) - 1
                expected[row, self.rollout.mask[row]] = plain(row_ids(self.rollout, row)).logits[0, start:-1, 0]
        compare("completion_values", values, expected)
        common.completion_values(model, self.rollout, self.rows).sum().backward()

    def reward(self) -> None:
        model = common.load_reward_model(self.path, None, new_head=True)
        self.random_head(common.value_head(model))
        runs.save_model(self.directory / "reward", model, Untokenized())
        model = common.load_reward_model(str(self.directory / "reward"), None)
        scores = common.rollout_scores(model, self.rollout, 60)
        plain = self.plain_head(AutoModelForSequenceClassification, self.directory / "reward")
        with torch.no_grad():
            expected = torch.cat([plain(row_ids(self.rollout, row)).logits[:, 0] for row in self.rows])
        compare("completion_scores", scores, expected)
        common.completion_scores(model, self.rollout, self.rows).sum().backward()


def check(name: str) -> Verdict:
    """The verdict on one family or variant. Runs in this process."""
    with tempfile.TemporaryDirectory() as directory, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers_logging.disable_progress_bar()
        verbosity = transformers_logging.get_verbosity()
        transformers_logging.set_verbosity_error()
        run = Check(name, Path(directory))
        try:
            return run.verdict()
        except Exception as error:  # before our code was asked
            return Verdict("unbuildable", where(error))
        finally:
            transformers_logging.set_verbosity(verbosity)


def check_apart(name: str) -> Verdict:
    """check in a child process, so that a crash or a hang of one family doesn't end the sweep."""
    with tempfile.TemporaryFile("w+") as answer:
        if (child := os.fork()) == 0:
            try:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
                answer.write("\0".join(check(name)))
                answer.flush()
            finally:
                os._exit(0)  # a fork must not run the parent's exit handlers
        end = time.time() + SECONDS
        while os.waitpid(child, os.WNOHANG)[0] == 0:
            if time.time() > end:
                os.kill(child, 9)
                os.waitpid(child, 0)
                return Verdict("crash", f"takes more than {SECONDS} seconds")
            time.sleep(0.02)
        answer.seek(0)
        text = answer.read()
        return Verdict(*text.split("\0")) if text else Verdict("crash", "the process died")


def cause(verdict: Verdict) -> str:
    """The verdict in the words of docs/real-models.md."""
    if verdict.kind == "slow" and "each row again" in verdict.why:
        return "exact; sampling computes each row again at every token"
    if verdict.kind in ("fast", "slow"):
        return f"exact, on the {verdict.kind} path"
    if verdict.kind == "unbuildable":
        return "not built here"
    for text in ("not causal", "could not be saved", "the model's context has"):
        if text in verdict.why:
            return f"{verdict.kind}: {text}"
    return f"{verdict.kind}: {verdict.why[:80]}"


def main(names: list[str]) -> None:
    counts, groups = Counter(), defaultdict(list)
    print("| family | verdict | why |\n|---|---|---|")
    for name in names or [*FAMILIES, *VARIANTS]:
        start = time.time()
        verdict = check_apart(name)
        counts[verdict.kind] += 1
        groups[cause(verdict)].append(f"`{name}`")
        late = f" [{time.time() - start:.1f} s]" if time.time() - start > 2 else ""
        print(f"| {name} | {verdict.kind} | {verdict.why.replace('|', '/')}{late} |", flush=True)
    print("\n| what it means | families and variants |\n|---|---|")
    for why, members in sorted(groups.items(), key=lambda group: -len(group[1])):
        print(f"| {why} ({len(members)}) | {' '.join(members)} |")
    print("\n" + ", ".join(f"{count} {kind}" for kind, count in counts.most_common()))


if __name__ == "__main__":
    main(sys.argv[1:])
