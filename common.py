"""Code shared by the training scripts: models, the Rollout and group sampling, batches, logprobs, values and scores of
completions, token weights, the optimizer.

Shapes: P prompts x G completions = B rows, row p*G + g. T = longest completion. Per-token tensors are (B, T) and cover
completion tokens only. Entries where `mask` is False are padding, and no result may depend on them.
"""

import dataclasses
import hashlib
import math
import os
import random
import re
import sys
import tempfile
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
)
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils import logging as transformers_logging

from plumbing.engine import PackedGroups, PaddedRows, batch_class, decoder_class, gather_rows
from plumbing.flags import fail, out_of_memory, reason


def derive_seed(*parts) -> int:
    """A seed from (args.seed, purpose, step, ...). Each random draw has its own, so a resumed run repeats the draws."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "big")


# ---- Models and tokenizers -----------------------------------------------------------------------------------------


def resolve_device(device: str) -> torch.device:
    """The device to use; "auto" is the GPU if there is one, else the CPU. Also makes torch's global settings, which
    depend on the device: call it before a model is loaded."""
    name = ("cuda" if sees_gpu() else "cpu") if device == "auto" else device
    try:
        resolved = torch.device(name)
        torch.zeros(1, device=resolved).add(1).item()  # computes: a wheel may have no kernels for the card
        if resolved.type == "cuda" and resolved.index is not None:
            torch.cuda.set_device(resolved)  # CUDA streams and graphs use the current device
        if resolved.type == "cuda":
            torch.backends.cuda.enable_cudnn_sdp(False)  # cuDNN plans again for each new shape: nearly every batch
            torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False  # sums in fp32, as on a CPU
    except (RuntimeError, AssertionError) as error:
        others = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if name.partition(":")[0] == "cuda" else []
        others = [other for other in others if other != (name if ":" in name else "cuda:0")] + ["cpu"]
        fail(f"--device {device}: not usable on this machine ({reason(error)}); try --device {' or '.join(others)}")
    # "medium" doubles the speed of fp32 matmuls on CPUs with bf16 instructions, in three bf16 passes (error 4e-6). With
    # AMX it means one pass, on a GPU TF32. Both are too coarse: sampler and trainer should agree on logprobs.
    medium = resolved.type == "cpu" and not torch.cpu._is_amx_tile_supported()
    torch.set_float32_matmul_precision("medium" if medium else "highest")
    # On a CPU, torch caches compiled matmul kernels for the last 1,024 shapes, in two caches. Every ragged batch brings
    # new shapes, so these caches would take gigabytes for nothing.
    for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(cache, "32")
    transformers_logging.disable_progress_bar()  # "Loading weights", "Writing model shards": one bar is enough
    card = ""
    if resolved.type == "cuda":
        free, total = (size / 1e9 for size in torch.cuda.mem_get_info())
        card = f", {torch.cuda.get_device_name()}, {free:.1f} of {total:.1f} GB free"
    print(f"device: {resolved}{card}")
    return resolved


NVIDIA = Path("/proc/driver/nvidia")  # there if a driver is loaded


def sees_gpu() -> bool:
    """Whether torch sees a GPU. If only the machine does, a note says why the run will be a hundred times slower."""
    with warnings.catch_warnings(record=True) as warned:  # torch warns of a driver that is too old
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            return True
    if NVIDIA.exists():
        why = reason(warned[-1].message) if warned else "CUDA_VISIBLE_DEVICES or the container hides it"
        why = why if torch.version.cuda else f"torch {torch.__version__} is built without CUDA"
        index = "https://download.pytorch.org/whl/cu126"
        what = f"an NVIDIA driver is here, but torch sees no GPU ({why}), so the run takes the CPU"
        print(f"note: {what}. If the driver is older than 580: pip install torch --index-url {index}", file=sys.stderr)
    return False


def has_bfloat16(device: torch.device) -> bool:
    """False for a GPU that would only emulate it (T4, V100) and that some of its matrix products refuse."""
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """auto: bfloat16 on a GPU that computes in it (with fp32 master weights, see `MasterAdamW`), else float32."""
    able = has_bfloat16(device)
    if dtype == "bfloat16" and not able:
        fail(f"--dtype bfloat16: {torch.cuda.get_device_name()} can't compute in it; take --dtype float32")
    name = ("bfloat16" if device.type == "cuda" and able else "float32") if dtype == "auto" else dtype
    if device.type == "cuda":
        why = "" if able else ", because this card has no bfloat16"
        print(f"dtype: {name}{why}" + (", with float32 masters if it is trained" if name == "bfloat16" else ""))
    return getattr(torch, name)


def resolve_model(path: str) -> str:
    """Finds the built-in models beside this file, so that their paths work from any working directory."""
    built_in = Path(__file__).parent / path
    return str(built_in) if not Path(path).exists() and built_in.is_dir() else path


def load_config(path: str, flag: str = "--model"):
    """The model's config; if it can't be loaded, an error that names the flag."""
    path = resolve_model(path)
    local = Path(path).is_dir()
    if local and not (Path(path) / "config.json").exists():
        fail(f"{flag} {path}: the directory has no config.json; a Hugging Face model directory is expected")
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # OSError, ValueError, and whatever the hub client raises
        what = "its config can't be read" if local else "neither a local directory nor a hub name that can be reached"
        fail(f"{flag} {path}: {what} ({reason(error)})")


def context_length(config) -> float:
    """The model's context length in tokens (prompt + completion); inf if its config sets no limit."""
    text = config.get_text_config()
    ropes = getattr(text, "rope_parameters", None) or {}
    limits = [getattr(text, "max_position_embeddings", None) or math.inf]  # XLNet's -1: no limit
    # A longrope changes for the whole batch when one row exceeds the original context: then a row's logprobs would
    # depend on other rows, and on how much of it was cached. ("dynamic" ropes change past max_position_embeddings.)
    for rope in (ropes, *ropes.values()):
        if isinstance(rope, dict) and rope.get("rope_type") == "longrope":
            limits.append(rope["original_max_position_embeddings"])
    limits.append(getattr(text, "keep_window_size", None) or math.inf)  # Doge: past it, later tokens move earlier ones
    return min(limit for limit in limits if limit > 0)


def load_tokenizer(path: str, flag: str = "--model") -> Tokenizer:
    """The model's tokenizer; if it can't be loaded or has no EOS token, an error that names the flag. Its eos_token is
    the token that ends an assistant's turn in the chat template: a base model's may be another one, Qwen's for example,
    and then no completion would ever end as a turn does."""
    tokenizer = read_tokenizer(path, flag)
    if (end := end_of_turn(tokenizer)) != tokenizer.eos_token:
        print(f"note: {path}: its chat template ends a turn with {end}, not with the eos_token {tokenizer.eos_token}")
        tokenizer.eos_token = end
    if tokenizer.eos_token_id is None:
        fail(f"{flag} {path}: its tokenizer has no EOS token, so no completion could ever end")
    if not tokenizer.chat_template:
        print(f"note: {path} has no chat template: prompts are the bare questions", file=sys.stderr)
    return tokenizer


def special_tokens(tokenizer: Tokenizer) -> dict[int, str]:
    """The texts of the special tokens, by id."""
    return {id: token.content for id, token in tokenizer.added_tokens_decoder.items() if token.special}


def pad_apart(tokenizer: Tokenizer) -> int:
    """A pad id that never ends a text. transformers' sequence classifiers read the last token that is not padding, so
    with pad = EOS, as many tokenizers have it, they read another token than the EOS."""
    ids = [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id, *special_tokens(tokenizer)]
    apart = [id for id in ids if id not in (None, tokenizer.eos_token_id)]
    return apart[0] if apart else max({*tokenizer.get_vocab().values()} - {tokenizer.eos_token_id})


def end_of_turn(tokenizer: Tokenizer) -> str | None:
    """The first special token after an assistant's text in the chat template; the eos_token if there is none."""
    try:
        turns = [{"role": role, "content": text} for role, text in (("user", "-"), ("assistant", "%%"))]
        rest = tokenizer.apply_chat_template(turns, tokenize=False).rpartition("%%")[2]
    except Exception:  # a template may raise anything; encode_prompts will report it
        return tokenizer.eos_token
    special = {*special_tokens(tokenizer).values(), tokenizer.eos_token} - {None}
    found = {rest.find(token): token for token in sorted(special, key=len)}  # of two at one place, the longer
    return next((token for at, token in sorted(found.items()) if at >= 0), tokenizer.eos_token)


def read_tokenizer(path: str, flag: str) -> Tokenizer:
    path = resolve_model(path)
    load_config(path, flag)
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:
        fail(f"{flag} {path}: its tokenizer can't be loaded ({reason(error)})")


def check_vocabulary(path: str, tokenizer: Tokenizer | None, flag: str = "") -> None:
    """An error unless the model at `path` reads each id of `tokenizer` (None: its own) as the same token. The sizes of
    two vocabularies don't tell: equal sizes may hold other tokens, and one family pads the same tokens to different
    sizes."""
    if tokenizer is None or tokenizer.name_or_path == resolve_model(path):
        return
    own, other = tokenizer.get_vocab(), read_tokenizer(path, flag).get_vocab()
    if differ := [token for token in sorted(own, key=own.get) if other.get(token) != own[token]]:
        here, there = own[differ[0]], other.get(differ[0], "missing")
        what = f"{len(differ)} tokens have other ids, such as {differ[0]!r}: {there}, not {here}"
        where = f"{flag} {path}".strip()
        fail(f"{where}: has another vocabulary than {tokenizer.name_or_path} ({what}), so it can't read its ids")


def load_weights(auto_class, path: str, device, dtype, from_scratch: bool = False, new_head: bool = False, **options):
    """Loads a model in eval mode; it stays in eval mode during training. Dropout, in sampling or in the first update,
    would move the importance ratio away from 1 before anything is learned.

    from_scratch: random weights; only the config is read. new_head: the head's weights may be missing from the files.
    Any other missing weight ends the program, because transformers would fill it with random numbers.
    """
    # Where resolve_device chose "medium", torch's fused CPU attention is 5 to 9 times slower than plain matmuls.
    medium = torch.device(device).type == "cpu" and torch.get_float32_matmul_precision() == "medium"
    attention = "eager" if medium and dtype == torch.float32 else None
    options |= {"dtype": dtype, "attn_implementation": attention, "trust_remote_code": False}
    path = resolve_model(path)
    if new_head:
        transformers_logging.set_verbosity_error()  # it would warn about the new head
    try:
        if from_scratch:
            return plain_outputs(auto_class.from_config(load_config(path), **options)).to(device).eval()
        model, loading = auto_class.from_pretrained(path, use_safetensors=True, output_loading_info=True, **options)
    except Exception as error:
        fail(f"{path}: its weights can't be loaded ({reason(error)})")
    finally:
        transformers_logging.set_verbosity_warning()
    missing = sorted(n for n in loading["missing_keys"] if not (new_head and n.startswith(("score.", "classifier."))))
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        fail(f"{path}: its weights are incomplete: {missing[0]}{more} not in its files")
    kinds = {re.sub("[0-9]+", "#", name) for name in model.state_dict()}
    if cut := sorted(name for name in loading["unexpected_keys"] if re.sub("[0-9]+", "#", name) in kinds):
        fail(f"{path}: its config has fewer layers than its files: {cut[0]} has no place in the model")
    check_saving(plain_outputs(model), path, auto_class)
    return model.to(device).eval()


def plain_outputs(model: PreTrainedModel) -> PreTrainedModel:
    """Switches off what a config may ask for and a training loop does not: attention maps, hidden states, router
    logits. They come before or beside the logits, take memory, and some can't be saved in a config."""
    for config in (model.config, model.config.get_text_config()):
        config.return_dict = True
        for name in [name.removeprefix("_") for name, value in vars(config).items() if value is True]:
            if name.startswith("output_"):
                setattr(config, name, False)
    return model


def check_saving(model: PreTrainedModel, path: str, auto_class) -> None:
    """An error if a checkpoint's config could not be written or loaded again: before training, not after."""
    try:
        with tempfile.TemporaryDirectory() as directory:
            model.config.save_pretrained(directory)
            config = AutoConfig.from_pretrained(directory)
            if type(config) not in auto_class._model_mapping:
                raise ValueError(f"{auto_class.__name__} knows no {type(config).__name__}")
    except Exception as error:
        fail(f"{path}: a checkpoint of it could not be saved and loaded again ({reason(error)})")


def load_policy(
    path: str, tokenizer: Tokenizer | None, device="cpu", dtype=torch.float32, from_scratch: bool = False
) -> PreTrainedModel:
    """Loads a causal LM. tokenizer: whose ids it will read (see check_vocabulary); None: its own. Completions end at
    the tokenizer's EOS token and at those of the model's generation config."""
    check_vocabulary(path, tokenizer)
    model = load_weights(AutoModelForCausalLM, path, device, dtype, from_scratch)
    set_stops(model, tokenizer)
    return model


def set_stops(model: PreTrainedModel, tokenizer: Tokenizer | None) -> None:
    """Keeps nothing of the generation config but where to stop, no top-p or penalties: the policy is the plain softmax
    over the ids that have a token."""
    text_config, stops = model.config.get_text_config(), {None if tokenizer is None else tokenizer.eos_token_id}
    for named in (model.generation_config.eos_token_id, getattr(text_config, "eos_token_id", None)):
        stops |= {*named} if isinstance(named, list) else {named}
    size = len(model.get_input_embeddings().weight)
    if bad := [stop for stop in stops if stop is not None and not (type(stop) is int and 0 <= stop < size)]:
        fail(f"{model.name_or_path}: eos_token_id {bad[0]!r} is no id of its {size} embeddings")
    model.generation_config = GenerationConfig(
        eos_token_id=sorted(stops - {None}) or None,
        pad_token_id=getattr(text_config, "pad_token_id", None),
        suppress_tokens=None if tokenizer is None else unused_ids(model, tokenizer),
    )


def unused_ids(model: PreTrainedModel, tokenizer: Tokenizer) -> list[int] | None:
    """The ids without a token: embeddings are often padded to a round number. They decode to nothing, so they have
    probability 0 in sampler and trainer (generation_config.suppress_tokens). None: there is none. An error if the
    embeddings are smaller than the vocabulary."""
    used, size = {*tokenizer.get_vocab().values()}, len(model.get_input_embeddings().weight)
    if beyond := sorted(used - {*range(size)} - {tokenizer.pad_token_id}):
        what = f"{len(beyond)} tokens, such as {tokenizer.convert_ids_to_tokens(beyond[0])!r}"
        fail(f"{model.name_or_path}: its tokenizer has {what}, past the model's {size} embeddings")
    return sorted({*range(size)} - used) or None


def load_value_model(
    path: str,
    tokenizer: Tokenizer | None,
    device="cpu",
    dtype=torch.float32,
    auto_class=AutoModelForTokenClassification,
):
    """Loads a critic: the path's backbone with a new linear head, initialised to zero so that V = 0 at first.
    tokenizer: whose ids it will read; None: its own."""
    check_vocabulary(path, tokenizer)
    model = load_weights(auto_class, path, device, dtype, new_head=True, num_labels=1)
    for parameter in value_head(model).parameters():
        nn.init.zeros_(parameter)
    return model


def value_head(model: PreTrainedModel) -> nn.Module:
    """The linear layer from a hidden state to a value or score."""
    heads = [getattr(model, name, None) for name in ("score", "classifier")]
    linear = [head for head in heads if isinstance(head, nn.Linear)]
    if not linear:
        fail(f"{model.name_or_path}: {type(model).__name__} has no linear head, as critics and reward models need here")
    return linear[0]


def load_reward_model(
    path: str, tokenizer: Tokenizer | None, device="cpu", dtype=torch.float32, new_head=False, flag="--reward-model"
):
    """Loads a sequence classifier with one label (see train_rm.py). tokenizer: whose ids it will read; None: its own.
    new_head: puts a new zero head on any backbone."""
    if new_head:
        return load_value_model(path, tokenizer, device, dtype, AutoModelForSequenceClassification)
    check_reward_model(path, tokenizer, flag)
    model = load_weights(AutoModelForSequenceClassification, path, device, dtype)
    value_head(model)
    return model


def check_reward_model(path: str, tokenizer: Tokenizer | None, flag: str = "--reward-model") -> None:
    """An error unless the model has one label and reads the tokenizer's ids."""
    if (labels := load_config(path, flag).num_labels) != 1:
        fail(f"{flag} {path}: has {labels} labels, a reward model has one")
    check_vocabulary(path, tokenizer, flag)


def checkpoint_layers(model: PreTrainedModel) -> None:
    """Gradient checkpointing: keeps only each layer's input, recomputes the rest. transformers' needs train mode."""
    decoder = model.base_model.get_decoder()  # not an image encoder, which may have more layers
    for layer in max((m for m in decoder.modules() if isinstance(m, nn.ModuleList)), key=len):

        def forward(*args, run=layer.forward, **kwargs):
            if not torch.is_grad_enabled():
                return run(*args, **kwargs)
            return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

        layer.forward = forward


# ---- Rollouts ------------------------------------------------------------------------------------------------------


@dataclass
class Rollout:
    """P prompts with G completions each. Demonstrations (G = 1) and preference pairs (G = 2: chosen, rejected) are
    Rollouts too, so that all methods share one way to compute logprobs."""

    prompt_ids: list[list[int]]  # P
    completion_ids: Tensor  # (B, T), right-padded
    mask: Tensor  # (B, T) bool: real tokens, EOS included; set by the sampler, never computed as ids != pad
    sampler_logprobs: Tensor  # (B, T), at sampling time; 0 on padding and on tokens that the policy did not sample
    finished: Tensor  # (B,) bool: ended by an EOS or a stop, not by the length limit
    group_size: int
    loss_mask: Tensor | None = None  # (B, T) bool: the real tokens that get a loss; None: all of them
    filtered: bool = False  # sampled through a filter: then sampler_logprobs are not the policy's own
    stop_ids: tuple = ()  # the tokens that end a completion, where it was sampled

    @property
    def trained(self) -> Tensor:
        """(B, T) bool: the tokens that get a loss. The policy wrote them, and their completion's reward is known."""
        return self.mask if self.loss_mask is None else self.mask & self.loss_mask

    @property
    def lengths(self) -> Tensor:
        """(B,) number of tokens that get a loss; 0 for a completion that `without` took out."""
        return self.trained.sum(1)

    def without(self, rows: Tensor) -> "Rollout":
        """The same Rollout, in which the given completions, (B,) or (P, G) bool, get no loss."""
        if not rows.any():
            return self
        return replace(self, loss_mask=self.trained & ~rows.flatten().to(self.mask.device)[:, None])


def last_true(mask: Tensor) -> Tensor:
    """(B,) column of each row's last True in a (B, T) mask; 0 if it has none."""
    return (mask * torch.arange(mask.shape[1], device=mask.device)).amax(1)


def make_rollout(prompts: list[list[int]], completions: list[list[int]], group_size: int = 1, device="cpu") -> Rollout:
    """A Rollout of given completions (token ids, EOS included), for training on data that was not sampled here."""
    ids = pad_sequence([torch.tensor(c) for c in completions], batch_first=True).to(device)
    lengths = torch.tensor([len(c) for c in completions], device=device)
    mask = torch.arange(ids.shape[1], device=device) < lengths[:, None]
    return Rollout(
        [list(p) for p in prompts], ids, mask, torch.zeros(ids.shape, device=device), mask.any(1), group_size
    )


def join_groups(parts: list[tuple], limit: int) -> tuple:
    """Joins groups of several sampled batches: the first `limit` of the chosen ones. Returns everything that belongs to
    a batch, in the order of the parts.

    parts: (indices of the chosen groups, Rollout, others...). Others hold one entry a prompt or one a completion, in
    lists, in tensors such as (P, G), or in dicts of these.
    """
    prompts = [len(rollout.prompt_ids) for _, rollout, *_ in parts]

    def join(values: list):
        first = values[0]
        if isinstance(first, dict):
            return {name: join([value[name] for value in values]) for name in first}
        if isinstance(first, Rollout):
            if any(value.loss_mask is not None for value in values):
                values = [replace(value, loss_mask=value.trained) for value in values]
            names = [field.name for field in dataclasses.fields(Rollout)]
            return Rollout(**{name: join([getattr(value, name) for value in values]) for name in names})
        if first is None or isinstance(first, int | tuple):  # no loss_mask; group_size, filtered, stop_ids
            return max(values) if first is not None else None
        size = len(first) // prompts[0]  # entries a group
        picked = [[p * size + i for p in groups for i in range(size)] for groups, *_ in parts]
        if isinstance(first, list):
            return [value[i] for value, chosen in zip(values, picked, strict=True) for i in chosen][: limit * size]
        rows = [value[chosen] for value, chosen in zip(values, picked, strict=True) if chosen]
        if first.dim() == 2:  # (B, T) of different T
            T = max(value.shape[1] for value in values)
            rows = [nn.functional.pad(row, (0, T - row.shape[1])) for row in rows]
        return torch.cat(rows)[: limit * size]

    return tuple(join(list(values)) for values in zip(*(values for _, *values in parts), strict=True))


# ---- Batches -------------------------------------------------------------------------------------------------------


def minibatches(rollout: Rollout, size: int, seed: int) -> list[list[int]]:
    """Splits all rows into random minibatches of `size` completions and whole groups; the last one may be smaller."""
    G, P = rollout.group_size, len(rollout.prompt_ids)
    groups, per_batch = random.Random(seed).sample(range(P), P), max(1, size // G)
    batches = [groups[i : i + per_batch] for i in range(0, P, per_batch)]
    return [[p * G + g for p in batch for g in range(G)] for batch in batches]


def micro_batches(
    rollout: Rollout, rows: list[int], max_tokens: int, trains: list[bool] | None = None
) -> list[list[int]]:
    """Splits `rows` into micro-batches of at most max_tokens prompt and completion tokens (a single row may have more).
    Groups stay whole where they fit, because a prompt is computed once for its group. Rows of similar length go
    together, because a model that can't share prompts pads them. trains: which rows need a backward pass; they never
    share a micro-batch with the others."""
    if trains is not None:
        parts = [row for row in rows if trains[row]], [row for row in rows if not trains[row]]
        return [micro for part in parts for micro in micro_batches(rollout, part, max_tokens)]
    G, lengths = rollout.group_size, rollout.mask.sum(1).tolist()
    size = {row: len(rollout.prompt_ids[row // G]) + lengths[row] for row in rows}
    groups: dict[int, list[int]] = {}
    for row in sorted(rows, key=lambda row: (size[row], row)):  # ascending: the last row added is the longest
        groups.setdefault(row // G, []).append(row)
    batches, used = [[]], 0
    for group in sorted(groups.values(), key=lambda group: size[group[-1]]):
        for i, row in enumerate(group):
            needed = size[row] if i else sum(size[row] for row in group)  # a group is split only if it is too large
            if batches[-1] and used + needed > max_tokens:
                batches, used = [*batches, []], 0
            batches[-1].append(row)
            used += size[row]
    return [batch for batch in batches if batch]


# ---- Sampling ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def sample_groups(
    model: PreTrainedModel,
    prompts: list[list[int]],
    group_size: int,
    max_new_tokens: int | list[int],
    temperature: float = 1.0,
    seed: int = 0,
    eos_token_ids: int | list[int] | None = None,
    stop: Callable[[list[int]], bool] | None = None,
    filter: Callable[[Tensor], Tensor] | None = None,
) -> Rollout:
    """Samples `group_size` completions of every prompt (token ids) from the model's plain softmax at `temperature` (0:
    greedy). Other sampling settings of the generation config (top-p, penalties) are ignored.

    Each prompt is computed once for its whole group. Finished rows leave the batch.
    max_new_tokens: the length limit, or one of 1 or more for each completion. eos_token_ids: tokens that end a
    completion; None: those of the model's generation config.

    Two hooks; each costs a synchronization with the GPU at every token:
    stop(ids) -> bool gets one completion's tokens so far. If it is true, the last of them, which is kept and trained,
    ends the completion as an EOS would.
    filter(logits) -> logits gets the batch's logits / temperature, (R, V), and may set some to -inf (top-p, allowed
    tokens). Tokens are drawn from the filtered distribution, and sampler_logprobs are of that distribution.
    """
    prompts = [list(prompt) for prompt in prompts]
    device, B = model.device, len(prompts) * group_size
    limits = [max_new_tokens] * B if isinstance(max_new_tokens, int) else max_new_tokens
    longest, context = max(limits), context_length(model.config)
    needed = max(len(prompts[row // group_size]) + limit for row, limit in enumerate(limits))
    if needed > context:
        fail(f"a prompt and the length limit need {needed} tokens, the model's context has {context}: lower the limit")
    limits = None if min(limits) == longest else torch.tensor(limits, device=device)
    if eos_token_ids is None:
        eos_token_ids = model.generation_config.eos_token_id
    if eos_token_ids is None:
        raise ValueError("the model's generation config has no eos_token_id: pass eos_token_ids")
    eos = torch.tensor(eos_token_ids, device=device).flatten()

    # Draw all random numbers now, on the CPU: then a row's draws depend neither on the device nor on which rows ended.
    generator = torch.Generator().manual_seed(seed)
    uniforms = torch.rand(B, longest, generator=generator).to(device)
    completion_ids = torch.zeros(B, longest, dtype=torch.long, device=device)
    mask = torch.zeros(B, longest, dtype=torch.bool, device=device)
    sampler_logprobs = torch.zeros(B, longest, device=device)
    finished = torch.zeros(B, dtype=torch.bool, device=device)

    decoder = decoder_class(model)(model, prompts, group_size, longest)
    logits, unused = decoder.prefill(), suppressed(model)  # (B, V)
    rows, ended = torch.arange(B, device=device), finished.clone()  # the rows in the batch, and which of them ended
    for step in range(longest):
        if unused is not None:
            logits = logits.index_fill(1, unused, -torch.inf)
        tokens, logprobs = sample_tokens(logits, temperature, uniforms[rows, step], filter)
        completion_ids[rows, step], sampler_logprobs[rows, step], mask[rows, step] = tokens, logprobs, ~ended
        stops = torch.isin(tokens, eos)
        if stop is not None:
            written, over = completion_ids[rows, : step + 1].tolist(), ended.tolist()
            stops |= torch.tensor([not o and bool(stop(ids)) for ids, o in zip(written, over, strict=True)]).to(device)
        finished[rows] |= stops & ~ended
        ended = ended | stops
        if limits is not None:
            ended = ended | (limits[rows] == step + 1)
        if step == longest - 1:
            break
        if (step + 1) % decoder.check_every == 0:  # not every step: the check waits for the GPU
            live = int((~ended).sum())
            if live == 0:
                break
            if (size := decoder.batch_size(live)) < len(rows):
                kept = ended.argsort(stable=True)[:size].sort().values  # live rows first; ended ones fill up
                rows, tokens, ended = rows[kept], tokens[kept], ended[kept]
                decoder.keep(kept)
        logits = decoder.step(tokens)

    T = int(mask.sum(1).max())
    if not sampler_logprobs.masked_fill(~mask, 0.0).isfinite().all():
        fail("the sampled tokens have NaN or infinite logprobs: damaged weights, or a temperature that is too small")
    completion_ids, sampler_logprobs = completion_ids.masked_fill(~mask, 0), sampler_logprobs.masked_fill(~mask, 0.0)
    tensors = completion_ids[:, :T], mask[:, :T], sampler_logprobs[:, :T], finished
    return Rollout(prompts, *tensors, group_size, filtered=filter is not None, stop_ids=tuple(eos.tolist()))


def continue_groups(
    model: PreTrainedModel,
    rollout: Rollout,
    inserts: list[list[int] | None],
    max_new_tokens: int | list[int],
    temperature: float = 1.0,
    seed: int = 0,
    stop: Callable[[list[int]], bool] | None = None,
    filter: Callable[[Tensor], Tensor] | None = None,
) -> Rollout:
    """Appends the token ids inserts[i] to row i and samples at most max_new_tokens (or max_new_tokens[i]) more; a row
    whose insert is None stays as it is, and one whose limit is 0 or less gets its insert only. Returns the new Rollout.
    Its random numbers differ from those of the turns before, even with the same seed.

    Inserted tokens, such as a user's next turn or a tool's result, are real (in `mask`) but not trained (not in
    `loss_mask`), because the policy did not write them. stop, filter: see sample_groups; `stop` gets the tokens since
    the insert. A row that would leave the model's context ends the program.
    """
    G, device = rollout.group_size, rollout.mask.device
    limits = [max_new_tokens] * len(inserts) if isinstance(max_new_tokens, int) else max_new_tokens
    completions = [ids[mask].tolist() for ids, mask in zip(rollout.completion_ids, rollout.mask, strict=True)]
    logprobs = [values[mask].tolist() for values, mask in zip(rollout.sampler_logprobs, rollout.mask, strict=True)]
    trained = [values[mask].tolist() for values, mask in zip(rollout.trained, rollout.mask, strict=True)]
    finished, continued = rollout.finished.clone(), []
    for row, insert in enumerate(inserts):
        if insert is not None:
            completions[row] += insert
            logprobs[row] += [0.0] * len(insert)
            trained[row] += [False] * len(insert)
            finished[row] = False
            continued += [row] if limits[row] > 0 else []
    needed = max(len(rollout.prompt_ids[row // G]) + len(completions[row]) for row in range(len(inserts)))
    if needed > (context := context_length(model.config)):
        fail(f"a prompt and its completion have {needed} tokens, the model's context has {context}: insert less")
    if continued:
        heads = [rollout.prompt_ids[row // G] + completions[row] for row in continued]
        seed = derive_seed(seed, "continue", int(rollout.mask.sum()))
        rest = sample_groups(
            model, heads, 1, [limits[row] for row in continued], temperature, seed, stop=stop, filter=filter
        )
        for i, row in enumerate(continued):
            new = rest.mask[i]
            completions[row] += rest.completion_ids[i][new].tolist()
            logprobs[row] += rest.sampler_logprobs[i][new].tolist()
            trained[row] += [True] * int(new.sum())
        finished[continued] = rest.finished
    whole = make_rollout(rollout.prompt_ids, completions, G, device)
    whole.sampler_logprobs[whole.mask] = torch.tensor([value for row in logprobs for value in row], device=device)
    loss_mask = whole.mask.clone()
    loss_mask[whole.mask] = torch.tensor([value for row in trained for value in row], device=device)
    filtered = rollout.filtered or filter is not None
    return replace(whole, finished=finished, loss_mask=loss_mask, filtered=filtered, stop_ids=rollout.stop_ids)


def suppressed(model: PreTrainedModel) -> Tensor | None:
    """The ids that the policy never samples (see unused_ids)."""
    ids = getattr(model.generation_config, "suppress_tokens", None)
    return None if ids is None else torch.tensor(ids, device=model.device)


CDF_BLOCK = 16  # vocabulary entries per block of the cumulative sum


def sample_tokens(logits: Tensor, temperature: float, uniforms: Tensor, filter=None) -> tuple[Tensor, Tensor]:
    """Samples one token per row. Returns tokens and their logprobs, both (R,), from logits (R, V) and uniform random
    numbers (R,). Computes in fp32; temperature 0 is argmax. filter: see sample_groups.

    Inverse-CDF sampling: exact, without sorting the vocabulary, and a row's token depends only on its own random
    number. The cumulative sum is taken over blocks first, then within the chosen block.
    """
    logits = logits.float()
    scaled = logits if temperature in (0, 1) else logits / temperature
    if filter is not None:
        scaled = filter(scaled)
        if scaled.shape != logits.shape or not (scaled.amax(-1) > -torch.inf).all():
            fail("sample_groups: `filter` must return logits (R, V) that leave each row at least one token")
    if temperature == 0:
        tokens = scaled.argmax(-1)
        return tokens, scaled.gather(1, tokens[:, None])[:, 0] - scaled.logsumexp(-1)
    R, V = scaled.shape
    largest = scaled.amax(-1, keepdim=True)
    weights = logits.new_empty(R, -(-V // CDF_BLOCK) * CDF_BLOCK)  # exp(logit - largest): unnormalised probabilities
    weights[:, V:] = 0.0
    torch.sub(scaled, largest, out=weights[:, :V]).exp_()
    weights = weights.view(R, -1, CDF_BLOCK)
    ends = weights.sum(-1).cumsum(-1)  # (R, blocks)
    total = ends[:, -1:]
    target = keep_below(uniforms[:, None] * total, total)
    # Clamp: NaN logits give an index past the end, and on a GPU that kills the process before anything can be saved.
    block = torch.searchsorted(ends, target, right=True).clamp(max=ends.shape[1] - 1)
    start = torch.where(block > 0, ends.gather(1, (block - 1).clamp(min=0)), 0.0)
    inside = weights[torch.arange(R, device=logits.device), block[:, 0]].cumsum(-1)  # (R, CDF_BLOCK)
    tokens = block * CDF_BLOCK + torch.searchsorted(inside, keep_below(target - start, inside[:, -1:]), right=True)
    tokens = tokens.clamp(max=V - 1)
    return tokens[:, 0], (scaled.gather(1, tokens) - largest - total.log())[:, 0]


def keep_below(target: Tensor, limit: Tensor) -> Tensor:
    """Clamps target to [0, limit). Rounding may have raised it to limit, past the last token of nonzero probability."""
    return torch.minimum(target, torch.nextafter(limit, torch.zeros_like(limit))).clamp(min=0)


# ---- Logprobs ------------------------------------------------------------------------------------------------------


def pack_rows(model: PreTrainedModel, rollout: Rollout, rows: list[int]) -> PackedGroups | PaddedRows:
    """The given rows of a Rollout as one batch. batch.run(model) returns the model's output at all tokens.
    batch.targets (N,) are the N completion tokens, in the order of mask[rows].nonzero(), batch.predictor (N,) the
    positions that predict them, and batch.ends (R,) each row's last position."""
    mask, prompts = rollout.mask.cpu()[rows], {row // rollout.group_size: None for row in rows}
    mask = mask[:, : int(mask.sum(1).max())]
    number = {p: i for i, p in enumerate(prompts)}
    group = torch.tensor([number[row // rollout.group_size] for row in rows])
    packed = [rollout.prompt_ids[p] for p in prompts], rollout.completion_ids.cpu()[rows, : mask.shape[1]], mask, group
    return batch_class(model)(*packed, model.device)


def logits_at_once(device: torch.device) -> int:
    """How many logits may exist at once: 128 MB in fp32, 512 MB on a GPU. There, smaller slices would spend more time
    on reading and writing the head's gradient than on the matmuls."""
    return 2**27 if device.type == "cuda" else 2**25


PLAIN_HEADS: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # model -> has_plain_head


@torch.no_grad()
def has_plain_head(model: PreTrainedModel) -> bool:
    """True if the logits are exactly (bit for bit) the last hidden state times the output embedding, without
    soft-capping, scaling or bias. Tested once per model, on two tokens."""
    if model not in PLAIN_HEADS:
        ids, head = torch.tensor([[0, 1]], device=model.device), model.get_output_embeddings()
        try:
            hidden = model.base_model(ids, use_cache=False)[0]
            PLAIN_HEADS[model] = torch.equal(hidden @ head.weight.T, model(ids, use_cache=False).logits)
        except (RuntimeError, TypeError, AttributeError) as error:  # no output embedding, or one that doesn't fit
            if out_of_memory(error):
                raise
            PLAIN_HEADS[model] = False
        if not PLAIN_HEADS[model]:
            print("note: this model's head is not a plain linear layer: logprobs take more memory", file=sys.stderr)
    return PLAIN_HEADS[model]


def slices(hidden: Tensor, weight: Tensor | None) -> list[slice]:
    """Slices of hidden's rows, each with at most logits_at_once() logits."""
    size = max(1, logits_at_once(hidden.device) // (hidden.shape[1] if weight is None else len(weight)))
    return [slice(start, start + size) for start in range(0, len(hidden), size)]


def scaled_logits(hidden: Tensor, weight: Tensor | None, temperature: float, unused: Tensor | None) -> Tensor:
    """Logits / temperature in fp32, -inf at unused ids, as a new tensor that the caller may change in place."""
    if weight is None:
        logits = hidden.float() / temperature
    else:
        logits = (hidden @ weight.T).float()
        logits = logits if temperature == 1 else logits.div_(temperature)
    return logits if unused is None else logits.index_fill_(1, unused, -torch.inf)


class HeadLogprobs(torch.autograd.Function):
    """log softmax(hidden @ weight.T / temperature) at the targets (N,), and the softmax's entropy, both (N,) in fp32,
    from hidden (N, H). Saves memory: only one slice of the logits exists at a time, and the backward pass recomputes
    them. weight None: hidden holds the logits. unused: ids that have no probability, or None."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, unused):
        logprobs, entropy, normalizers = (torch.empty(len(hidden), device=hidden.device) for _ in range(3))
        for rows in slices(hidden, weight):
            logits = scaled_logits(hidden[rows], weight, temperature, unused)
            normalizers[rows] = logits.logsumexp(-1)
            logprobs[rows] = logits.gather(1, targets[rows, None])[:, 0] - normalizers[rows]
            logits -= normalizers[rows, None]
            entropy[rows] = -(logits.exp() * logits.clamp(min=-1e4)).sum(-1)  # 0 * -inf would be NaN
        ctx.save_for_backward(hidden, weight, targets, normalizers, entropy)
        ctx.temperature, ctx.unused = temperature, unused
        ctx.set_materialize_grads(False)  # an unused output's gradient is None: no work for it
        return logprobs, entropy

    @staticmethod
    def backward(ctx, gradient, entropy_gradient):
        hidden, weight, targets, normalizers, entropy = ctx.saved_tensors
        if gradient is None:
            gradient = torch.zeros_like(normalizers)
        hidden_gradient, gradient = torch.empty_like(hidden), gradient / ctx.temperature
        trains_head = ctx.needs_input_grad[1]  # False without a weight, or if the head is frozen
        weight_gradient = torch.zeros_like(weight, dtype=torch.float32) if trains_head else None
        for rows in slices(hidden, weight):
            logits = scaled_logits(hidden[rows], weight, ctx.temperature, ctx.unused)
            log_softmax = logits.sub_(normalizers[rows, None])
            # d logprob / d logits = (one at the target) - softmax
            # d entropy / d logits = - softmax * (log softmax + entropy)
            if entropy_gradient is None:
                error = log_softmax.exp_().mul_(-gradient[rows, None])
            else:
                bonus = entropy_gradient[rows, None] / ctx.temperature
                bonus = bonus * (log_softmax.clamp(min=-1e4) + entropy[rows, None])
                error = log_softmax.exp_().mul_(-gradient[rows, None] - bonus)
            error.scatter_add_(1, targets[rows, None], gradient[rows, None])
            error = error.to(hidden.dtype)
            hidden_gradient[rows] = error if weight is None else error @ weight
            if trains_head:
                weight_gradient += error.T @ hidden[rows]
        return hidden_gradient, weight_gradient.to(weight.dtype) if trains_head else None, None, None, None


def completion_logprobs(
    model: PreTrainedModel, rollout: Rollout, rows: list[int], temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """logprobs and entropy of the completions in `rows`, both (R, T), 0 on padding, with gradient. One forward pass."""
    batch, mask = pack_rows(model, rollout, rows), rollout.mask[rows]
    options = batch.targets, temperature, suppressed(model)
    if has_plain_head(model):
        hidden = gather_rows(batch.run(model.base_model), batch.predictor)
        logprobs, entropy = HeadLogprobs.apply(hidden, model.get_output_embeddings().weight, *options)
    else:
        logprobs, entropy = HeadLogprobs.apply(batch.logits(model), None, *options)
    zeros = torch.zeros(mask.shape, device=mask.device)
    return zeros.masked_scatter(mask, logprobs), zeros.masked_scatter(mask, entropy)


@torch.no_grad()
def rollout_logprobs(
    model: PreTrainedModel, rollout: Rollout, max_tokens: int, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """completion_logprobs of all rows, logprobs and entropy, both (B, T), without gradient, in micro-batches of
    max_tokens. Statistics over a batch, such as a quantile of the entropy, belong on these: a micro-batch is an
    arbitrary part of the batch."""
    logprobs, entropy = torch.zeros_like(rollout.sampler_logprobs), torch.zeros_like(rollout.sampler_logprobs)
    for micro in micro_batches(rollout, list(range(len(logprobs))), max_tokens):
        logprobs[micro], entropy[micro] = completion_logprobs(model, rollout, micro, temperature)
    return logprobs, entropy


def completion_values(value_model: PreTrainedModel, rollout: Rollout, rows: list[int]) -> Tensor:
    """Values V(s_t), (R, T), 0 on padding, read at the position that predicts token t: token t is not yet known."""
    batch, mask = pack_rows(value_model, rollout, rows), rollout.mask[rows]
    values = value_head(value_model)(gather_rows(batch.run(value_model.base_model), batch.predictor))[:, 0].float()
    return torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, values)


@torch.no_grad()
def rollout_values(value_model: PreTrainedModel, rollout: Rollout, max_tokens: int) -> Tensor:
    """(B, T) completion_values of all rows, without gradient, in micro-batches of max_tokens."""
    values = torch.zeros_like(rollout.sampler_logprobs)
    for micro in micro_batches(rollout, list(range(len(values))), max_tokens):
        values[micro] = completion_values(value_model, rollout, micro)
    return values


def completion_scores(reward_model: PreTrainedModel, rollout: Rollout, rows: list[int]) -> Tensor:
    """(R,) scores of whole completions, read at the last real token, minus the config's `score_mean`. The index of that
    token comes from the batch. The model's own forward would search for the pad id and stop too early if pad and EOS
    are the same."""
    batch = pack_rows(reward_model, rollout, rows)
    scores = value_head(reward_model)(batch.run(reward_model.base_model)[batch.ends])[:, 0].float()
    return scores - getattr(reward_model.config, "score_mean", 0.0)


@torch.no_grad()
def rollout_scores(reward_model: PreTrainedModel, rollout: Rollout, max_tokens: int) -> Tensor:
    """(B,) completion_scores of all rows, without gradient, in micro-batches of max_tokens."""
    scores = torch.zeros(len(rollout.mask), device=rollout.mask.device)
    for micro in micro_batches(rollout, list(range(len(scores))), max_tokens):
        scores[micro] = completion_scores(reward_model, rollout, micro)
    return scores


# ---- Weights and the optimizer -------------------------------------------------------------------------------------


def token_weights(mask: Tensor, loss_norm: str, max_new_tokens: int) -> Tensor:
    """(B, T) weights for summing a per-token loss; exactly 0 where mask is False. Compute them for the whole minibatch
    at once: then its split into micro-batches doesn't change the gradient.

    "sequence": mean over rows of the mean over each row's tokens (DeepSeekMath, arXiv:2402.03300, eq. 3).
    "token": mean over all tokens of the minibatch (DAPO, arXiv:2503.14476; its eq. 8: over one prompt's completions).
    "constant": sum over a row's tokens / max_new_tokens, mean over rows (Dr. GRPO, arXiv:2503.20783).
    A row without any token is not counted: the others' weights are those that they would have alone.
    """
    m, rows = mask.float(), mask.any(1).sum().clamp(min=1)
    if loss_norm == "sequence":
        return m / m.sum(1, keepdim=True).clamp(min=1) / rows
    if loss_norm == "token":
        return m / m.sum().clamp(min=1)
    if loss_norm == "constant":
        return m / (rows * max_new_tokens)
    raise ValueError(f"loss_norm is 'sequence', 'token' or 'constant', not {loss_norm!r}")


def free_host_memory() -> float:
    """Free host memory in bytes; inf if the system doesn't report it."""
    meminfo = Path("/proc/meminfo")
    lines = meminfo.read_text().splitlines() if meminfo.exists() else []
    return next((int(line.split()[1]) * 1024.0 for line in lines if line.startswith("MemAvailable")), math.inf)


def check_host_memory(parameters: int) -> None:
    """An error if an offloaded optimizer doesn't fit in host memory. Each parameter takes 16 bytes: master weight, two
    moments, gradient."""
    free = free_host_memory()
    if 16 * parameters > free:
        need = f"{16 * parameters / 1e9:.1f} GB of host memory, {free / 1e9:.1f} GB are free"
        fail(f"--offload-optimizer: needs {need}; take a smaller model or a machine with more memory")


class Masters:
    """Mixin that makes a torch optimizer update fp32 master copies of the model's weights (the weights themselves if
    they are fp32). At a learning rate of 1e-6 most steps are too small for bf16; in fp32 they add up. Gradients are
    accumulated in fp32 too, over all micro-batches. Clip the gradients of `optimizer.masters`, not the model's.

    Weights with requires_grad=False are left out. To use another optimizer: `class MyOptimizer(Masters,
    torch.optim.SGD): pass`. offload: keeps masters, optimizer state and accumulated gradients in host memory. Each
    gradient leaves the GPU as soon as autograd has computed it, so at most one layer's gradients are there."""

    def __init__(self, model: nn.Module, lr: float, offload: bool = False, **options):
        self.weights = [p for p in model.parameters() if p.requires_grad]
        if offload:
            check_host_memory(sum(w.numel() for w in self.weights))
            self.masters = [torch.empty(w.shape).copy_(w.detach()) for w in self.weights]
        else:
            self.masters = [w if w.dtype == torch.float32 else w.detach().float() for w in self.weights]
        for weight, master in zip(self.weights, self.masters, strict=True):
            if master is not weight:
                weight.register_post_accumulate_grad_hook(lambda w, master=master: self.collect(w, master))
        super().__init__(self.masters, lr=lr, **options)

    @staticmethod
    def collect(weight: Tensor, master: Tensor) -> None:
        gradient = weight.grad.to(master.device)
        master.grad = gradient.float() if master.grad is None else master.grad.add_(gradient)
        weight.grad = None

    @torch.no_grad()
    def step(self, closure=None):
        super().step(closure)
        for weight, master in zip(self.weights, self.masters, strict=True):
            if weight is not master:
                weight.copy_(master)  # in place: the sampler reads the same tensors

    def state_dict(self) -> dict:
        copies = [] if all(w.dtype == torch.float32 for w in self.weights) else self.masters  # fp32 weights are masters
        return super().state_dict() | {"masters": copies}

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        if not state["masters"] and any(w.dtype != torch.float32 for w in self.weights):
            fail("--resume: the run's weights are float32, a 16-bit dtype rounds them: go on with --dtype float32")
        super().load_state_dict({name: value for name, value in state.items() if name != "masters"})
        for own in self.state.values():  # copies: a checkpoint's tensors are mapped to a file that may be removed
            own |= {name: value.clone() for name, value in own.items() if torch.is_tensor(value)}
        # [] if the run's weights were fp32: then copy the model's, which must be restored first (a critic's too).
        for master, saved in zip(self.masters, state["masters"] or self.weights, strict=True):
            master.copy_(saved)


class MasterAdamW(Masters, torch.optim.AdamW):
    """AdamW on fp32 master weights, by default without weight decay."""

    def __init__(self, model: nn.Module, lr: float, offload: bool = False, weight_decay: float = 0.0, **options):
        super().__init__(model, lr, offload, weight_decay=weight_decay, fused=True, **options)


def backward(loss: Tensor) -> None:
    """loss.backward(), or nothing if the loss has no gradient: then .grad stays None and Adam skips the update. A loss
    without a gradient must be exactly 0, or a term of it would be dropped in silence."""
    if loss.requires_grad:
        loss.backward()
    elif loss.isfinite() and loss != 0:
        fail(
            f"the loss of rows that get no backward pass is {loss.item():g}, not 0: a term of it would be ignored. "
            "Set `trains` in section 4 to True for every row that has a gradient, such as [True] * len(advantages); a "
            "statistic over rows or tokens belongs above the loop over micro-batches"
        )


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
