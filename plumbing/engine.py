"""The forward pass over a batch of groups, which computes each prompt once for all its completions: packed or padded
rows in training, KV caches and CUDA graphs in decoding; and the trial of which of these is exact for a model. Token ids
in, hidden states and logits out.

transformers' models call an attention function that we register and pass extra arguments through to it. So a batch is
packed into one row of tokens without padding, prompts first, and only the attention knows which token belongs to which
completion. All other layers compute each prompt once, and no padding.

Shapes: P prompts, R rows (completions), L length of the longest prompt, T length of the longest completion, N tokens
in total, V vocabulary; H query heads, KVH key/value heads, D width of a head.
"""

import sys
import weakref
from collections.abc import Callable
from inspect import signature

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from plumbing.flags import fail, out_of_memory, reason

GROWTH = 16  # a decoder's buffers grow by this many completion tokens
PREFILL_TOKENS = 2**15  # prompt tokens per prefill pass


# ---- Attention -----------------------------------------------------------------------------------------------------


def group_attention(module, query, key, value, attention_mask, scaling=None, groups=None, **options):
    """transformers' attention interface: query (1, H, N, D), key and value (1, KVH, N, D) -> (1, N, H, D)."""
    if groups is None:  # a call from outside this file
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    special = any(options.get(name) is not None for name in ("sliding_window", "softcap", "s_aux", "position_bias"))
    if special or query.shape[-1] != value.shape[-1]:
        raise NotImplementedError("its attention is not plain causal softmax attention")
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))  # (N, heads, D)
    return groups.attend(module.layer_idx, q, k, v, scaling)[None], None


ALL_ATTENTION_FUNCTIONS.register("groups", group_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register("groups", sdpa_mask)


def attention(q: Tensor, k: Tensor, v: Tensor, scaling: float, bias: Tensor | None = None) -> Tensor:
    """Softmax attention of q (R, T, H, D) over k, v (R, S, KVH, D), where H is a multiple of KVH. bias (R, T, S), in
    q's dtype on a GPU: 0 where a query may see a key, -inf elsewhere; None: causal. Returns (R, T, H, D)."""
    R, T, H, D = q.shape
    S, KVH = k.shape[1:3]
    if q.is_cuda:
        mask, causal = None if bias is None else bias[:, None], bias is None
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        # Ask torch whether a fused kernel takes fewer key heads than query heads. If none does, enable_gqa would take
        # the slow one, which stores all scores.
        asked = torch.backends.cuda.SDPAParams(q, k, v, mask, 0.0, causal, True)
        grouped = torch.backends.cuda.can_use_flash_attention(asked)
        grouped = grouped or torch.backends.cuda.can_use_efficient_attention(asked)
        if not grouped:
            k, v = k.repeat_interleave(H // KVH, 1), v.repeat_interleave(H // KVH, 1)
        options = {"scale": scaling, "enable_gqa": grouped, "is_causal": causal}
        return nn.functional.scaled_dot_product_attention(q, k, v, mask, **options).transpose(1, 2)
    # On a CPU, plain matrix products are faster than torch's fused attention (see common.load_weights). Query heads
    # that share a key/value head are stacked as additional queries.
    if bias is None:
        bias = causal_bias(T, q.device)[None]
    q = (q.float() * scaling).reshape(R, T, KVH, H // KVH, D).permute(0, 2, 3, 1, 4).reshape(R * KVH, -1, D)
    k, v = (t.transpose(1, 2).reshape(R * KVH, S, D) for t in (k, v))
    scores = (q @ k.float().transpose(1, 2)).view(R, KVH, -1, T, S)
    scores = scores.add_(bias[:, None, None]).softmax(-1).to(v.dtype)  # in place: autograd no longer needs the scores
    out = scores.view(R * KVH, -1, S) @ v  # (R * KVH, H / KVH * T, D)
    return out.view(R, KVH, -1, T, D).permute(0, 3, 1, 2, 4).reshape(R, T, H, D)


def products(q: Tensor, k: Tensor) -> Tensor:
    """Batched q @ k^T with a float32 result even for 16-bit inputs, as in fused attention: Qwen2.5's keys are so large
    that 16-bit scores would be off by whole units."""
    if q.is_cuda and q.dtype != torch.float32:
        return torch.bmm(q, k.transpose(1, 2), out_dtype=torch.float32)
    return q.float() @ k.float().transpose(1, 2)


def causal_bias(T: int, device: torch.device) -> Tensor:
    return torch.full((T, T), -torch.inf, device=device).triu(1)


def rows_bias(lengths: Tensor, T: int, L: int, dtype: torch.dtype) -> Tensor:
    """(R, T, L + T) bias for rows of T tokens after prompts of the given lengths (R,), padded to L: -inf on the padding
    and on the row's later tokens."""
    padded = torch.arange(L, device=lengths.device) >= lengths[:, None]
    prompt = torch.zeros(padded.shape, device=lengths.device).masked_fill(padded, -torch.inf)[:, None]  # (R, 1, L)
    parts = prompt, causal_bias(T, lengths.device)
    return torch.cat([part.expand(len(lengths), T, -1) for part in parts], 2).to(dtype)


def move_together(device: torch.device, tensors: list[Tensor]) -> list[Tensor]:
    """The integer tensors on the device, by one copy: the CPU waits for each."""
    moved = torch.cat([t.flatten() for t in tensors]).to(device).split([t.numel() for t in tensors])
    return [flat.view(t.shape) for flat, t in zip(moved, tensors, strict=True)]


SCORES_KEPT = 2**21  # on a CPU, the backward pass recomputes a layer's attention if it has more scores


def call_with_groups(model: nn.Module, ids: Tensor, positions: Tensor, groups, **options) -> Tensor:
    """The model's first output for one row of tokens, ids (1, N). Every layer's attention is groups.attend."""
    unused = ids.new_zeros(1, 1, 1, 1)  # models pass a 4-dimensional mask on unchanged, so none builds an N x N mask
    options |= {"position_ids": positions, "attention_mask": unused, "use_cache": False, "groups": groups}
    return model(ids, **options)[0][0]


class PackedGroups:
    """P prompts and R completions packed into one row of N tokens: all prompts, then all completions.

    completions, mask: (R, T); group (R,): the index of each row's prompt; all three on the CPU. device: the model's.
    Only inside the attention are rows padded (on the right); no real token attends to the padding.
    """

    def __init__(self, prompts: list[list[int]], completions: Tensor, mask: Tensor, group: Tensor, device="cpu"):
        self.cache = None
        # Indices are built on the CPU and moved together: on a GPU, nearly every line below would wait for it.
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        prompt_mask = torch.arange(int(lengths.max())) < lengths[:, None]  # (P, L)
        flat = torch.tensor([token for prompt in prompts for token in prompt])
        ids = torch.cat([flat, completions[mask]])[None]  # (1, N)
        row, column = mask.nonzero(as_tuple=True)  # row and column of each completion token
        positions = torch.cat([prompt_mask.nonzero()[:, 1], lengths[group][row] + column])[None]
        # index in the packed row of each token of the padded prompts
        prompt_at = (prompt_mask.flatten().cumsum(0) - 1).view_as(prompt_mask).clamp(min=0)
        # indices of the token that predicts each completion token, and of the last token of each prompt and row
        prompt_ends = lengths.cumsum(0) - 1  # (P,)
        before = torch.arange(len(flat) - 1, ids.numel() - 1)
        predictor = torch.where(column == 0, prompt_ends[group][row], before)
        ends = len(flat) + mask.sum(1).cumsum(0) - 1  # (R,)

        # The shorter and the longer half of the rows are padded separately, each to its own longest row. For each
        # half: query indices, key indices, and the lengths of the prompts, beyond which no query looks.
        completion_at = (len(flat) + mask.flatten().cumsum(0) - 1).view_as(mask).clamp(max=ids.numel() - 1)
        parts, place, done = [], torch.zeros_like(completion_at), prompt_mask.numel()
        for rows in mask.sum(1).argsort(stable=True).tensor_split(2):
            if len(rows):
                T = int(mask[rows].sum(1).max())
                at = completion_at[rows, :T]
                parts += [at, torch.cat([prompt_at[group[rows]], at], 1), lengths[group[rows]]]
                place[rows, :T] = torch.arange(at.numel()).view_as(at) + done
                done += at.numel()
        # index of each of the N tokens in the concatenated attention outputs (padded prompts, then the two halves)
        source = torch.cat([prompt_mask.flatten().nonzero()[:, 0], place[mask]])
        whole = [ids, completions[mask], positions, prompt_at, predictor, prompt_ends, ends, source]
        moved = move_together(device, whole + parts)
        self.ids, self.targets, self.positions, self.prompt_at, self.predictor, self.prompt_ends, self.ends = moved[:7]
        self.source, parts = moved[7], moved[8:]
        self.parts = [(*parts[i : i + 3], {}) for i in range(0, len(parts), 3)]  # {}: the bias, by dtype

    def logits(self, model: nn.Module) -> Tensor:
        return self.run(model, logits_to_keep=self.predictor)

    def run(self, model: nn.Module, **options) -> Tensor:
        """The model's first output, (N, ...) unless options such as logits_to_keep select fewer tokens."""
        return call_with_groups(model, self.ids, self.positions, self, **options)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        scores = q.shape[1] * sum(at.numel() * seen_at.shape[1] for at, seen_at, *_ in self.parts)
        if torch.is_grad_enabled() and scores > SCORES_KEPT and not q.is_cuda:  # GPU kernels store none
            return checkpoint(self.attend_rows, q, k, v, scaling, use_reentrant=False)
        return self.attend_rows(q, k, v, scaling)

    def attend_rows(self, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        prompt_k, prompt_v = gather_rows(k, self.prompt_at), gather_rows(v, self.prompt_at)  # (P, L, KVH, D)
        if self.cache is not None:
            self.cache.append((prompt_k, prompt_v))
        outputs = [attention(gather_rows(q, self.prompt_at), prompt_k, prompt_v, scaling).flatten(0, 1)]
        for at, seen_at, lengths, biases in self.parts:
            dtype = q.dtype if q.is_cuda else torch.float32  # a CPU adds it to scores in float32
            if dtype not in biases:  # made in the first layer, for all of them
                biases[dtype] = rows_bias(lengths, at.shape[1], seen_at.shape[1] - at.shape[1], dtype)
            keys, values = gather_rows(k, seen_at), gather_rows(v, seen_at)  # (R, L + T, KVH, D)
            outputs.append(attention(gather_rows(q, at), keys, values, scaling, biases[dtype]).flatten(0, 1))
        return gather_rows(torch.cat(outputs), self.source)


class PaddedRows:
    """PackedGroups for models whose attention can't be replaced: each row is prompt + completion, right-padded. Under
    a causal mask no real token sees the padding, so no mask is needed and positions count from 0."""

    note = "this model's attention can't be replaced: sampling and training take the slow path"

    def __init__(self, prompts: list[list[int]], completions: Tensor, mask: Tensor, group: Tensor, device="cpu"):
        heads = [torch.tensor(prompts[p]) for p in group.tolist()]
        rows = [torch.cat([head, ids[m]]) for head, ids, m in zip(heads, completions, mask, strict=True)]
        ids = pad_sequence(rows, batch_first=True)
        row, column = mask.nonzero(as_tuple=True)
        starts = torch.tensor([len(head) for head in heads]) + torch.arange(len(rows)) * ids.shape[1]
        whole = [ids, completions[mask], starts[row] + column - 1, starts + mask.sum(1) - 1]
        self.ids, self.targets, self.predictor, self.ends = move_together(device, whole)

    def logits(self, model: nn.Module) -> Tensor:
        return self.run(model)[self.predictor]

    def run(self, model: nn.Module) -> Tensor:
        return model(self.ids, use_cache=False)[0].flatten(0, 1)


def gather_rows(t: Tensor, index: Tensor) -> Tensor:
    """t[index] as an embedding lookup, the only indexing whose backward pass is fast on a CPU."""
    return nn.functional.embedding(index, t.flatten(1)).view(*index.shape, *t.shape[1:])


# ---- Decoding ------------------------------------------------------------------------------------------------------


class PlainDecoder:
    """Decoder for any model with a cache of transformers'. Prompts are left-padded, so that all rows write to the same
    cache slot; the cache is expanded to one entry per completion."""

    check_every = 1  # steps between checks for rows that have ended
    note = "sampling takes the slow path"

    def __init__(self, model: PreTrainedModel, prompts: list[list[int]], group_size: int, max_new_tokens: int):
        self.model, self.prompts, self.group_size, self.done = model, prompts, group_size, 0

    def prefill(self) -> Tensor:
        device, longest = self.model.device, max(map(len, self.prompts))
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in self.prompts], device=device)
        lengths = torch.tensor([len(prompt) for prompt in self.prompts], device=device)
        attention = (torch.arange(longest, device=device) >= longest - lengths[:, None]).long()
        positions = (attention.cumsum(1) - 1).clamp(min=0)  # count real tokens only
        last = {"logits_to_keep": 1} if "logits_to_keep" in signature(self.model.forward).parameters else {}
        output = self.call(ids, attention, positions, None, **last)
        self.cache, expand = output.past_key_values, torch.arange(len(ids), device=device)
        expand = expand.repeat_interleave(self.group_size)
        self.cache.reorder_cache(expand)
        self.attention, self.lengths = attention[expand], lengths[expand]
        return output.logits[expand, -1]

    def call(self, ids: Tensor, attention: Tensor, positions: Tensor, cache, **options):
        """One pass with the cache. Positions only where the model takes them: others count by the mask."""
        if "position_ids" in signature(self.model.forward).parameters:
            options["position_ids"] = positions
        return self.model(ids, attention_mask=attention, past_key_values=cache, use_cache=True, **options)

    def batch_size(self, live: int) -> int:
        return live

    def keep(self, rows: Tensor) -> None:
        self.cache.reorder_cache(rows)
        self.attention, self.lengths = self.attention[rows], self.lengths[rows]

    def step(self, tokens: Tensor) -> Tensor:
        """Logits (R, V) after one more token in each row of the batch."""
        self.attention = torch.cat([self.attention, self.attention.new_ones(len(tokens), 1)], 1)
        positions = (self.lengths + self.done)[:, None]
        self.done += 1
        return self.call(tokens[:, None], self.attention, positions, self.cache).logits[:, -1]


class UncachedDecoder:
    """Decoder for models without a cache that could be used here, such as some recurrent ones: every step computes the
    whole rows again."""

    check_every = 1
    note = "sampling computes each row again at every token, which is slow"

    def __init__(self, model: PreTrainedModel, prompts: list[list[int]], group_size: int, max_new_tokens: int):
        self.model = model
        self.rows = [torch.tensor(prompt, device=model.device) for prompt in prompts for _ in range(group_size)]

    def prefill(self) -> Tensor:
        size = max(1, PREFILL_TOKENS // max(map(len, self.rows)))
        return torch.cat([self.last_logits(self.rows[i : i + size]) for i in range(0, len(self.rows), size)])

    def last_logits(self, rows: list[Tensor]) -> Tensor:
        logits = self.model(pad_sequence(rows, batch_first=True), use_cache=False).logits
        return torch.stack([row_logits[len(row) - 1] for row_logits, row in zip(logits, rows, strict=True)])

    def batch_size(self, live: int) -> int:
        return live

    def keep(self, rows: Tensor) -> None:
        self.rows = [self.rows[row] for row in rows.tolist()]

    def step(self, tokens: Tensor) -> Tensor:
        self.rows = [torch.cat([row, token[None]]) for row, token in zip(self.rows, tokens, strict=True)]
        return self.prefill()


class GroupDecoder:
    """Decoder that stores and reads a prompt's keys and values once for all rows of its group. Those of completions
    are in buffers that grow by GROWTH tokens and shrink when ended rows are dropped."""

    check_every = 1  # steps between checks for rows that have ended
    note = "sampling runs without CUDA graphs"

    def __init__(self, model: PreTrainedModel, prompts: list[list[int]], group_size: int, max_new_tokens: int):
        self.model, self.prompts, self.group_size = model, prompts, group_size
        self.group = torch.arange(len(prompts), device=model.device).repeat_interleave(group_size)  # (R,), ascending
        self.lengths = torch.tensor([len(prompt) for prompt in prompts], device=model.device)[self.group]  # (R,)
        self.width, self.capacity = max(map(len, prompts)), GROWTH  # L, and columns for completion tokens
        self.done = 0  # completion tokens computed
        self.keys = self.values = None  # (R, KVH, capacity, D) per layer

    def prefill(self) -> Tensor:
        """Computes the prompts' keys and values, (P, KVH, L, D) per layer. Returns the first tokens' logits (R, V)."""
        device, size = self.model.device, max(1, PREFILL_TOKENS // self.width)
        slices = [self.prefill_slice(self.prompts[i : i + size]) for i in range(0, len(self.prompts), size)]
        logits = torch.cat([logits for logits, _ in slices])[self.group]
        layers = zip(*(layers for _, layers in slices), strict=True)  # each layer's (keys, values) of all slices
        joined = [[t[0] if len(t) == 1 else torch.cat(t) for t in zip(*pairs, strict=True)] for pairs in layers]
        self.prompt_keys, self.prompt_values = zip(*joined, strict=True)
        if self.keys is None:
            _, KVH, _, D = self.prompt_keys[0].shape
            shape = len(self.group), KVH, self.capacity, D
            kinds = self.prompt_keys, self.prompt_values
            self.keys, self.values = ([layer.new_zeros(shape) for layer in layers] for layers in kinds)
        seen = torch.arange(self.width + self.capacity, device=device) < self.lengths[:, None]
        self.bias = torch.zeros(seen.shape, device=device).masked_fill(~seen, -torch.inf)  # (R, L + capacity)
        self.column = torch.zeros(1, dtype=torch.long, device=device)  # buffer column of this step's keys and values
        self.slot, self.rows = self.place_rows(self.group.bincount().max())
        return logits

    def prefill_slice(self, prompts: list[list[int]]) -> tuple[Tensor, list[list[Tensor]]]:
        """Logits (P, V) after the prompts' last tokens, and each layer's keys and values."""
        none = torch.zeros(0, 1, dtype=torch.long)  # no completions yet
        packed = PackedGroups(prompts, none, none.bool(), none[:, 0], self.model.device)
        packed.cache = []  # attend() puts the layers' keys and values there
        logits = packed.run(self.model, logits_to_keep=packed.prompt_ends)
        pad = (0, 0, 0, self.width - packed.prompt_at.shape[1])
        # Keys are float32 on a CPU: scores are float32, so each step would convert all 16-bit keys again.
        cache = packed.cache if logits.is_cuda else [(k.float(), v) for k, v in packed.cache]
        return logits, [[nn.functional.pad(t.transpose(1, 2), pad).contiguous() for t in pair] for pair in cache]

    def place_rows(self, G: int) -> tuple[Tensor, Tensor]:
        """Index maps for the products with the prompts: each row's slot in the flattened (P, G) grid, and the row in
        each slot, (P * G,). Empty slots hold row 0."""
        R, counts = len(self.group), self.group.bincount(minlength=len(self.prompt_keys[0]))
        row = torch.arange(R, device=self.group.device)
        slot = self.group * G + row - (counts.cumsum(0) - counts)[self.group]
        return slot, torch.zeros(len(counts) * int(G), dtype=torch.long, device=row.device).index_copy_(0, slot, row)

    def batch_size(self, live: int) -> int:
        """Number of rows to continue with. Dropping rows copies the buffers, so it waits for an eighth to end."""
        return live if live <= len(self.group) * 7 // 8 else len(self.group)

    def keep(self, rows: Tensor) -> None:
        self.keys, self.values = [t[rows] for t in self.keys], [t[rows] for t in self.values]
        self.group, self.lengths, self.bias = self.group[rows], self.lengths[rows], self.bias[rows]
        left, self.group = self.group.unique(return_inverse=True)
        if len(left) < len(self.prompt_keys[0]):
            self.prompt_keys = [t[left] for t in self.prompt_keys]
            self.prompt_values = [t[left] for t in self.prompt_values]
        self.slot, self.rows = self.place_rows(self.group.bincount().max())

    def step(self, tokens: Tensor) -> Tensor:
        """Logits (R, V) after one more token in each row of the batch."""
        if self.done == self.capacity:
            self.capacity += GROWTH
            self.keys = [nn.functional.pad(t, (0, 0, 0, GROWTH)) for t in self.keys]
            self.values = [nn.functional.pad(t, (0, 0, 0, GROWTH)) for t in self.values]
            self.bias = nn.functional.pad(self.bias, (0, GROWTH), value=-torch.inf)
        self.column.fill_(self.done)
        self.bias[:, self.width + self.done] = 0.0
        self.done += 1
        return self.compute(tokens, self.lengths + self.done - 1)

    def compute(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return call_with_groups(self.model, tokens[None], positions[None], self)

    def store(self, buffer: Tensor, new: Tensor) -> None:
        buffer[:, :, self.done - 1] = new

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        """One query per row over the prompt's keys and the row's own: q (R, H, D), k and v (R, KVH, D) -> (R, H, D)."""
        (R, H, D), KVH = q.shape, k.shape[1]
        keys, values = self.keys[layer][:R], self.values[layer][:R]
        self.store(keys, k)
        self.store(values, v)
        q = q.reshape(R, KVH, H // KVH, D)
        scores = products(q.flatten(0, 1), keys.flatten(0, 1)).view(R, KVH, H // KVH, -1)
        old = products(self.to_slots(q), self.prompt_keys[layer].flatten(0, 1))
        scores = torch.cat([self.to_rows(old, R, KVH), scores], -1)
        scores = scores.mul_(scaling).add_(self.bias[:R, None, None]).softmax(-1).to(v.dtype)
        old, new = scores.split([self.width, keys.shape[2]], -1)
        out = (new.reshape(R * KVH, H // KVH, -1) @ values.flatten(0, 1)).view(R, KVH, H // KVH, D)
        out = out + self.to_rows(self.to_slots(old) @ self.prompt_values[layer].flatten(0, 1), R, KVH)
        return out.view(R, H, D)

    def to_slots(self, t: Tensor) -> Tensor:
        """(R, KVH, H / KVH, X) -> (P * KVH, G * H / KVH, X): stacks the queries that share a prompt."""
        _, KVH, _, X = t.shape
        P = len(self.prompt_keys[0])
        return t[self.rows].view(P, -1, *t.shape[1:]).transpose(1, 2).reshape(P * KVH, -1, X)

    def to_rows(self, t: Tensor, R: int, KVH: int) -> Tensor:
        """The inverse of to_slots, for the first R rows."""
        P = len(self.prompt_keys[0])
        return t.view(P, KVH, len(self.rows) // P, -1, t.shape[-1]).transpose(1, 2).flatten(0, 1)[self.slot[:R]]


class GraphDecoder(GroupDecoder):
    """GroupDecoder whose step is a CUDA graph: on a GPU, launching a small model's thousand kernels takes several times
    as long as running them. A graph reads fixed addresses, so buffers have their full size from the start. Rows are
    dropped only when half of them have ended, and each batch size has its own graph. Graphs and buffers are kept
    for the next batch of the same shape. Weights are updated in place, so the graphs remain valid."""

    check_every = 8  # each check synchronizes with the GPU
    stream = None  # shared by all captures: libraries keep one workspace per stream
    # model -> state for its next batch of the same shape. Not the decoder, which refers to the model: that reference
    # cycle would keep the model's memory long after its last use.
    kept: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()

    def __init__(self, model: PreTrainedModel, prompts: list[list[int]], group_size: int, max_new_tokens: int):
        self.asked, width = len(prompts) * group_size, 0
        P, G, L, _ = self.kept[model]["shape"] if model in self.kept else (0, 0, 0, 0)
        if G == group_size and len(prompts) <= P <= 2 * len(prompts):
            # Neither narrower nor fewer prompts than before, so that graphs can be reused: an evaluation's last batch
            # is smaller. The rows of the added prompts are computed and ignored.
            prompts, width = prompts + [min(prompts, key=len)] * (P - len(prompts)), L
        super().__init__(model, prompts, group_size, max_new_tokens)
        sizes = max(self.width, width), max_new_tokens
        self.width, self.capacity = (-(-size // 64) * 64 for size in sizes)  # so shapes rarely change
        self.shape = len(prompts), group_size, self.width, self.capacity
        self.graphs: dict[int, tuple] = {}  # number of rows -> (graph, its logits)

    def prefill(self) -> Tensor:
        last = self.kept.get(self.model)
        reusable = last is not None and last["shape"] == self.shape
        if reusable:
            self.keys, self.values, self.graphs = last["keys"], last["values"], last["graphs"]
        else:
            last = None
            self.kept.pop(self.model, None)  # frees its memory before the new buffers are made
        logits = super().prefill()
        self.tokens, self.positions = torch.zeros_like(self.lengths), torch.zeros_like(self.lengths)
        names = "tokens", "positions", "bias", "column", "slot", "rows", "prompt_keys", "prompt_values"
        for name in names if reusable else ():
            old, new = last[name], getattr(self, name)
            for target, source in [(old, new)] if torch.is_tensor(old) else zip(old, new, strict=True):
                target.copy_(source)
            setattr(self, name, old)
        self.kept[self.model] = {name: getattr(self, name) for name in ("shape", "keys", "values", "graphs", *names)}
        return logits[: self.asked]

    def store(self, buffer: Tensor, new: Tensor) -> None:
        buffer.index_copy_(2, self.column, new[:, :, None])

    def batch_size(self, live: int) -> int:
        size = len(self.group)
        while size // 2 >= max(live, 4):
            size //= 2
        return size

    def keep(self, rows: Tensor) -> None:
        R, self.group, self.lengths = len(rows), self.group[rows], self.lengths[rows]
        for t in (*self.keys, *self.values, self.bias):
            t[:R] = t[rows]
        self.slot[:R], self.rows[:] = self.place_rows(self.group_size)

    def compute(self, tokens: Tensor, positions: Tensor) -> Tensor:
        R = len(positions)  # the rows of added prompts, too
        self.tokens[: len(tokens)], self.positions[:R] = tokens, positions
        if R not in self.graphs:
            self.graphs[R] = self.capture(R)
        graph, logits = self.graphs[R]
        graph.replay()
        return logits[: len(tokens)]

    def capture(self, R: int) -> tuple:
        inputs = self.tokens[:R], self.positions[:R]
        stream = GraphDecoder.stream = GraphDecoder.stream or torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        # A step that waits for the GPU would break the capture, and with it the error that says why: raise before that.
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            with torch.cuda.stream(stream):  # warm up: a library's first allocations must not be captured
                for _ in range(2):
                    super().compute(*inputs)
        finally:
            torch.cuda.set_sync_debug_mode(mode)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        pool = next((other.pool() for other, _ in self.graphs.values()), None)  # one memory pool for all sizes
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            logits = super().compute(*inputs)
        return graph, logits


# ---- Which way is exact? -------------------------------------------------------------------------------------------

BATCHES: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # model -> batch_class
DECODERS: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # model -> decoder_class
COMPLETIONS = torch.tensor([[2, 0, 3], [0, 1, 3], [1, 1, 2], [3, 0, 1]])  # of prompts 0 1 2 3 0 and 1 3, two each


def batch_class(model: PreTrainedModel) -> type:
    """The first of PackedGroups and PaddedRows that is exact for this model. Tried once per model: what it computes for
    a few tokens must be what the model computes for each row alone."""
    if model not in BATCHES:
        prompts, completions = probe_ids(model)
        implementation, group = model.config.get_text_config()._attn_implementation, torch.tensor([0, 0, 1, 1])
        mask = torch.ones(completions.shape, dtype=torch.bool)
        mask[1, 2] = False  # rows of different lengths
        expected = rows_alone(model, prompts, completions)[mask.to(model.device)]

        def compute(kind: type) -> Tensor:
            if kind is PackedGroups and not layer_types(model) <= {"full_attention", "attention"}:
                raise NotImplementedError("windows, chunks or recurrences, which a test on short texts would miss")
            model.set_attn_implementation("groups" if kind is PackedGroups else implementation)
            if kind is PaddedRows:
                check_causality(model)
            batch = kind(prompts, completions.cpu(), mask, group, model.device)
            return batch.logits(model) if generates(model) else batch.run(model.base_model)[batch.predictor]

        BATCHES[model] = first_exact(model, (PackedGroups, PaddedRows), compute, expected)
    return BATCHES[model]


def decoder_class(model: PreTrainedModel) -> type:
    """The first decoder that is exact for this model: prefill and two steps, with a row that leaves in between."""
    if model not in DECODERS:
        prompts, completions = probe_ids(model)
        kinds = [PlainDecoder, UncachedDecoder]
        if batch_class(model) is PackedGroups:
            kinds = [GraphDecoder] * (model.device.type == "cuda") + [GroupDecoder, *kinds]
        expected = rows_alone(model, prompts, completions)

        def compute(kind: type) -> Tensor:
            if kind is PlainDecoder and any("chunk" in name for name in layer_types(model)):
                raise NotImplementedError("padding on the left would move the chunks of its attention")
            decoder, kept = kind(model, prompts, 2, 3), torch.tensor([1, 3], device=model.device)
            first, second = decoder.prefill(), decoder.step(completions[:, 0]).clone()
            decoder.keep(kept)
            third = expected[:, 2].index_copy(0, kept, decoder.step(completions[kept, 1]))
            GraphDecoder.kept.pop(model, None)
            return torch.stack([first, second, third], 1)

        DECODERS[model] = first_exact(model, kinds, compute, expected)
    return DECODERS[model]


def layer_types(model: PreTrainedModel) -> set[str]:
    return {*(getattr(model.config.get_text_config(), "layer_types", None) or [])}


def check_causality(model: PreTrainedModel) -> None:
    """Raises if cutting off a text's second half changes the first half's outputs."""
    ids = torch.arange(32, device=model.device)[None] % 7 + model.config.get_text_config().vocab_size // 3
    whole, half = (model.base_model(part, use_cache=False)[0][0, :16] for part in (ids, ids[:, :16]))
    if (whole - half).float().norm() > 0.15 * half.float().norm():
        raise NotImplementedError("it is not causal: later tokens move earlier ones")


def generates(model: PreTrainedModel) -> bool:
    """False for a critic and a reward model."""
    return model.get_output_embeddings() is not None


def probe_ids(model: PreTrainedModel) -> tuple[list[list[int]], Tensor]:
    """Two prompts and four completions (4, 3) of ordinary tokens: special ids are chaotic in bf16."""
    first = model.config.get_text_config().vocab_size // 3
    prompts = [[first + token for token in prompt] for prompt in ([0, 1, 2, 3, 0], [1, 3])]
    return prompts, COMPLETIONS.to(model.device) + first


@torch.no_grad()
def rows_alone(model: PreTrainedModel, prompts: list[list[int]], completions: Tensor) -> Tensor:
    """(4, 3, V) logits, of a critic or reward model (4, 3, H) hidden states, that predict the completions' tokens. Each
    row is computed alone, without padding and cache."""
    rows, run = [], model if generates(model) else model.base_model
    try:
        for row, completion in enumerate(completions.tolist()):
            ids = torch.tensor([prompts[row // 2] + completion[:2]], device=model.device)
            rows.append(run(ids, use_cache=False)[0][0, -3:])
    except Exception as error:
        if out_of_memory(error):
            raise
        fail(f"{model.name_or_path}: can't compute a row of tokens as a causal language model ({reason(error)})")
    if not torch.stack(rows).isfinite().all():
        fail(f"{model.name_or_path}: its outputs are NaN or infinite: damaged weights, or too large for {model.dtype}")
    return torch.stack(rows)


@torch.no_grad()
def first_exact(model: PreTrainedModel, kinds, compute: Callable[[type], Tensor], expected: Tensor) -> type:
    """The first of the classes for which compute(class) is `expected`, compared by the last dimension. A note says why
    it is not the first; if none is exact, the program ends."""
    limit, whys = 0.15 if model.dtype.itemsize == 2 else 1e-3, []  # exact ways differ by up to 0.07 and 3e-6
    for kind in kinds:
        try:
            error = (compute(kind) - expected).float().norm(dim=-1) / expected.float().norm(dim=-1).clamp(min=1e-6)
            if error.max().item() < limit:
                break
            why = f"its outputs differ by {error.max().item():.2g}, more than {limit:g}"
        except Exception as error:  # an unsupported model may raise anything
            if out_of_memory(error):
                raise
            why = reason(error)
        whys.append(f"{kind.__name__}: {why}")
    else:
        fail(f"{model.name_or_path}: can't be run exactly here: {'; '.join(whys)}")
    if whys:
        print(f"note: {kind.note} ({whys[-1]})", file=sys.stderr)
    elif kind is GraphDecoder:
        print(f"decoder: {kind.__name__}: its trial differs from the model by {error.max().item():.1g}")
    return kind
