"""Problems, prompts, problem samplers, demonstrations and preference pairs.

A problem is a question and its gold answer. `load_problems` reads them from the built-in generator ("arithmetic"),
a JSONL file or a hub dataset; `encode_prompts` turns questions into token ids through the model's chat template;
`ProblemSampler` decides which problems an iteration sees.
"""

import hashlib
import json
import math
import os
import random
import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import common
from common import fail, reason
from rewards import extract_answer

# ---- Problems ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    question: str
    answer: str
    id: str = ""
    topic: str = ""
    difficulty: float | None = None


def is_held_out(question: str) -> bool:
    """True for one question in ten. Decided by the question's text alone, so that no seed, order or file can
    put the same problem into both the train and the eval split."""
    return int.from_bytes(hashlib.sha256(question.encode()).digest()[:8], "big") % 10 == 0


def load_problems(source: str, split: str, limit: int | None = None, seed: int = 0) -> list[Problem]:
    """Problems of one split ("train", "eval", or "all" for both) of one source.

    source: "arithmetic", the path of a .jsonl file, or a hub dataset's name (`name:config` where it has configs).
    A file, and a hub dataset without a test or validation split, is split by `is_held_out`.
    limit: at most so many: of a file a random choice, in its order; of the generator, whose list cycles through the
    difficulties, the first ones.
    seed: of the generator and of that choice.
    """
    if split not in ("train", "eval", "all"):
        raise ValueError(f"split is 'train', 'eval' or 'all', not {split!r}")
    if source == "arithmetic":
        problems = arithmetic_problems(split, limit or (6000 if split == "train" else 3000), seed)
    elif is_file(source):
        rows = read_jsonl(source)
        problems = read_problems([(f"{source}:{line}", row) for line, row in rows], source)
        problems = [p for p in problems if split == "all" or is_held_out(p.question) == (split == "eval")]
    else:
        problems = hub_problems(source, split)
    if not problems:
        hint = "; give held-out problems with --eval-data" if split == "eval" else ""
        fail(f"{source}: no problem left in its {split} split{hint}")
    if limit and limit < len(problems) and source != "arithmetic":
        chosen = random.Random(f"limit {seed}").sample(range(len(problems)), limit)
        problems = [problems[i] for i in sorted(chosen)]
    return problems


def is_file(source: str) -> bool:
    return source.endswith((".jsonl", ".json")) or Path(source).is_file()


def load_train_problems(problems: str, eval_data: str | None) -> list[Problem]:
    """The train split; the whole of a file where --eval-data gives the held-out problems."""
    return load_problems(problems, "all" if eval_data and is_file(problems) else "train")


def load_eval_problems(problems: str, eval_data: str | None, limit: int) -> list[Problem]:
    """Held-out problems: all of the file --eval-data, or the eval split of the source named there, or of --problems."""
    return load_problems(eval_data or problems, "all" if eval_data and is_file(eval_data) else "eval", limit)


def read_jsonl(path: str) -> list[tuple[int, dict]]:
    """(line number, object) of every non-blank line; every malformed line is reported, the first five in full."""
    try:
        text = Path(path).read_bytes().decode("utf-8-sig", errors="surrogateescape")
    except OSError as error:
        fail(f"{path}: can't be read: {error.strerror}")
    rows, errors = [], []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            if re.search("[\udc80-\udcff]", line):
                raise ValueError("invalid UTF-8")
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"a JSON object is expected, not {type(row).__name__}")
            rows.append((number, row))
        except (ValueError, RecursionError) as error:
            errors.append(f"{path}:{number}: {error}")
    fail_on(errors, path)
    if not rows:
        fail(f"{path}: is empty")
    return rows


def fail_on(errors: list[str], source: str) -> None:
    if errors:
        more = f"\n... and {len(errors) - 5} more lines of {source}" if len(errors) > 5 else ""
        fail("\n".join(error[:500] for error in errors[:5]) + more)


def text_field(row: dict, names: tuple[str, ...]) -> str:
    """The first of the named fields as text; a number becomes its text. Raises ValueError with what is wrong."""
    name = next((name for name in names if row.get(name) is not None), None)
    if name is None:
        raise ValueError(f"no field {' or '.join(map(repr, names))} (it has {', '.join(map(repr, row))})")
    return as_text(name, row[name])


MAX_FIELD_CHARS = 1_000_000


def as_text(name: str, value) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"field {name!r} is of type {type(value).__name__}, text is expected")
    text = str(value)
    if not text.strip():
        raise ValueError(f"field {name!r} is empty")
    return check_text(name, text)


def check_text(name: str, text: str) -> str:
    if len(text) > MAX_FIELD_CHARS:
        raise ValueError(f"field {name!r} has {len(text)} characters, at most {MAX_FIELD_CHARS} are allowed")
    if re.search("[\ud800-\udfff]", text):
        raise ValueError(f"field {name!r} holds half a surrogate pair, which no tokenizer takes")
    return text


def read_problems(rows: list[tuple[str, dict]], source: str) -> list[Problem]:
    """rows: (place, row) with `question` or `prompt`, `answer`, optionally `id`, `topic`, `difficulty`."""
    problems, errors, places = [], [], {}
    for place, row in rows:
        try:
            answer = text_field(row, ("answer",))
            if "####" in answer:  # GSM8K: a worked solution that ends in "#### 72"
                answer = extract_answer(answer) or ""
                if not answer:
                    raise ValueError("nothing stands behind '####' in field 'answer'")
            difficulty = row.get("difficulty")
            number = isinstance(difficulty, int | float) and not isinstance(difficulty, bool)
            if difficulty is not None and not (number and abs(difficulty) < 1e9):  # nor NaN
                raise ValueError(f"field 'difficulty' is {str(difficulty)[:80]!r}, a number is expected")
            question = text_field(row, ("question", "prompt"))
            id = place if row.get("id") is None else as_text("id", row["id"])
            if (first := places.setdefault(id, place)) != place:
                raise ValueError(f"id {id[:80]!r} is the one of {first} already")
            topic = as_text("topic", row["topic"]) if row.get("topic") else ""
            problems.append(Problem(question, answer.strip(), id, topic, difficulty))
        except ValueError as error:
            errors.append(f"{place}: {error}")
    fail_on(errors, source)
    return problems


def hub_problems(source: str, split: str) -> list[Problem]:
    try:
        import datasets
    except ImportError:
        fail(f"{source}: no such file; to read it as a hub dataset: pip install datasets")
    name, _, config = source.partition(":")
    try:
        splits = datasets.load_dataset(name, config or None)
    except Exception as error:  # the hub's errors are many: no such dataset, no network, a config is needed, ...
        fail(f"{source}: neither a file nor a hub dataset that can be loaded: {reason(error)}")
    held_out = next((name for name in ("test", "validation") if name in splits), None)
    if "train" not in splits and not held_out:
        fail(f"{source}: has no split 'train', 'test' or 'validation' (it has {', '.join(splits)})")
    names = {"train": ["train"], "eval": [held_out or "train"], "all": ["train", held_out]}[split]
    rows = [(f"{source} {name} row {i}", row) for name in names if name in splits for i, row in enumerate(splits[name])]
    problems = read_problems(rows, source)
    if held_out or split == "all":
        return problems
    return [p for p in problems if is_held_out(p.question) == (split == "eval")]


# ---- The built-in problems: chains of additions and subtractions, "12+7-5=", difficulty = number of operations -----

HARDEST = 6


def draw_chain(rng: random.Random, difficulty: int) -> tuple[int, list[int]]:
    """A first operand (1-99) and `difficulty` signed ones (1-9) whose running total stays within 0-99."""
    first = total = rng.randint(1, 99)
    steps = []
    while len(steps) < difficulty:
        step = rng.choice((-1, 1)) * rng.randint(1, 9)
        if 0 <= total + step <= 99:
            steps.append(step)
            total += step
    return first, steps


def chain_question(first: int, steps: list[int]) -> str:
    return f"{first}{''.join(f'{step:+d}' for step in steps)}="


def arithmetic_problems(split: str, limit: int, seed: int = 0) -> list[Problem]:
    """At most `limit` distinct problems of a split, difficulties 1-6 in turn (there are about 1,700 of one operation,
    so its share ends first)."""
    by_difficulty = []
    for difficulty in range(1, HARDEST + 1):
        rng = random.Random(f"problems {split} {difficulty} {seed}")
        wanted, found = -(-limit // HARDEST), {}
        for _ in range(200 * wanted):  # enough draws to meet every single problem of one operation
            first, steps = draw_chain(rng, difficulty)
            question = chain_question(first, steps)
            if split != "all" and is_held_out(question) != (split == "eval"):
                continue
            topic = "add" if min(steps) > 0 else "subtract" if max(steps) < 0 else "mixed"
            found[question] = Problem(question, str(first + sum(steps)), question, topic, difficulty)
            if len(found) == wanted:
                break
        by_difficulty.append(list(found.values()))
    in_turn = [group[i] for i in range(max(map(len, by_difficulty))) for group in by_difficulty if i < len(group)]
    return in_turn[:limit]


def arithmetic_demonstrations(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """(question, completion) pairs by a sloppy teacher, for the SFT model that RL starts from.

    A good one reads "<think>19 14</think><answer>14</answer>" for "12+7-5=": the running totals, then the last of them.
    The teacher gets a step wrong one time in five (and goes on from the wrong total), leaves out a tag one time in
    five, and of chains longer than four operations, which it rarely shows, it mostly drops the end. So the model
    learns the task, knows the right way, and does not prefer it: what is left for RL to do.
    """
    rng = random.Random(f"demonstrations {seed}")
    demonstrations = []
    while len(demonstrations) < count:
        difficulty = rng.choices(range(1, HARDEST + 1), weights=(8, 10, 12, 14, 4, 4))[0]
        first, steps = draw_chain(rng, difficulty)
        shown = steps[:4] if difficulty > 4 and rng.random() < 0.65 else steps
        total, totals = first, []
        for step in shown:
            total += step
            if rng.random() < 0.2:
                total += rng.choice((-10, -2, -1, 1, 2, 10))
            total = min(max(total, 0), 99)
            totals.append(str(total))
        parts = ["<think>", " ".join(totals), "</think>", "<answer>", totals[-1], "</answer>"]
        if rng.random() < 0.2:
            del parts[rng.choice((0, 2, 3, 5))]
        demonstrations.append((chain_question(first, steps), "".join(parts)))
    return demonstrations


# ---- Prompts -------------------------------------------------------------------------------------------------------

SYSTEM_PROMPT = (
    "Think about the question first, then answer it. Write your reasoning between <think> and </think>, and after it "
    "only the final answer between <answer> and </answer>, like this: <think>reasoning</think><answer>42</answer>"
)


def encode_prompts(tokenizer, questions: list[str], system_prompt: str = "") -> list[list[int]]:
    """Token ids of each question as a chat turn, up to where the assistant's text begins.

    Without a chat template the prompt is the bare question. A template that refuses a system turn (Gemma's) gets
    the system prompt at the head of the user's turn.
    """
    if not tokenizer.chat_template:
        return [tokenizer(question).input_ids for question in questions]
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []

    def chats(in_user_turn: bool) -> list:
        if in_user_turn:
            return [[{"role": "user", "content": f"{system_prompt}\n\n{question}"}] for question in questions]
        return [[*system, {"role": "user", "content": question}] for question in questions]

    def encode(conversations: list) -> list[list[int]]:
        ids = []
        for start in range(0, len(conversations), 1000):
            chunk = conversations[start : start + 1000]
            texts = tokenizer.apply_chat_template(chunk, add_generation_prompt=True, tokenize=False)
            # The template writes the BOS itself where there is one: adding special tokens again would double it.
            ids += tokenizer(texts, add_special_tokens=False).input_ids
        return ids

    from jinja2 import TemplateError

    try:
        return encode(chats(in_user_turn=False))
    except TemplateError:
        return encode(chats(in_user_turn=True))


def encode_completions(tokenizer, completions: list[str]) -> list[list[int]]:
    """Token ids of each completion and the EOS that ends it. They follow a prompt's ids, never merged with them."""
    ids = []
    for start in range(0, len(completions), 1000):  # the tokenizer's own records of a batch are a hundred times its ids
        ids += tokenizer(completions[start : start + 1000], add_special_tokens=False).input_ids
    return [tokens + [tokenizer.eos_token_id] for tokens in ids]


def load_demonstrations(source: str, count: int, seed: int = 0) -> list[tuple[str, str]]:
    """(prompt, completion) texts: "arithmetic-demonstrations", `count` of them made from the seed, or a .jsonl file
    with the fields `prompt` (or `question`) and `completion`."""
    if source == "arithmetic-demonstrations":
        return arithmetic_demonstrations(count, seed)
    demonstrations, errors = [], []
    for line, row in read_jsonl(source):
        try:
            demonstrations.append((text_field(row, ("prompt", "question")), text_field(row, ("completion",))))
        except ValueError as error:
            errors.append(f"{source}:{line}: {error}")
    fail_on(errors, source)
    return demonstrations


def context_length(config) -> float:
    return getattr(config.get_text_config(), "max_position_embeddings", None) or math.inf


def decode(tokenizer: common.Tokenizer, rollout: common.Rollout) -> list[str]:
    """(B,) texts of the completions without EOS; for rewards and for people, never to be encoded again.

    Where the chat template opens the think block in the prompt, the tag is put back in front: it belongs to the text.
    """
    G, rows = rollout.group_size, zip(rollout.completion_ids.tolist(), rollout.lengths.tolist(), strict=True)
    texts = tokenizer.batch_decode([ids[:n] for ids, n in rows], skip_special_tokens=True)
    heads = tokenizer.batch_decode([prompt[-8:] for prompt in rollout.prompt_ids])
    return ["<think>" * heads[i // G].rstrip().endswith("<think>") + text for i, text in enumerate(texts)]


AT_LEAST_1 = (
    "prompts_per_step group_size max_new_tokens update_epochs minibatch_size micro_batch_tokens eval_problems "
    "max_sampling_rounds demonstrations num_samples batch_size value_epochs value_minibatch_size pair_problems "
    "max_pairs_per_prompt max_bad_updates"
).split()
POSITIVE = ("temperature learning_rate value_learning_rate max_grad_norm clip_low clip_high value_clip beta").split()
ANY_SIGN = "seed", "missing_eos_score"


def check_flags(args) -> None:
    """Every number must be finite and in its range, every directory writable: one line that names the flag and what is
    allowed."""
    at_most_1 = ["gae_lambda", "gamma"] if hasattr(args, "gae_lambda") else []  # SimPO's gamma is a margin
    for name, value in vars(args).items():
        if isinstance(value, int | float):
            checks = {
                "finite": math.isfinite(value),
                "more than 0": value > 0 or name not in POSITIVE,
                "1 or more": value >= 1 or name not in AT_LEAST_1,
                "0 or more": value >= 0 or name in ANY_SIGN,
                "at most 1": value <= 1 or name not in at_most_1,
            }
            for allowed, fits in checks.items():
                if not fits:
                    fail(f"--{name.replace('_', '-')} {value}: must be {allowed}")
    for name in ("run_root", "ref_cache"):
        if folder := getattr(args, name, None):
            path = Path(folder).resolve()
            nearest = next(place for place in (path, *path.parents) if place.exists())
            if not nearest.is_dir() or not os.access(nearest, os.W_OK):
                flag = f"--{name.replace('_', '-')} {folder}"
                fail(f"{flag}: can't be written ({nearest} is not a directory that can be written)")


def check_context(prompts: list[list[int]], names: list[str], config, max_new_tokens: int) -> None:
    """Every prompt, with room for its completion, must fit the model's context."""
    context = context_length(config)
    too_long = [i for i, prompt in enumerate(prompts) if len(prompt) + max_new_tokens > context]
    if too_long:
        name, tokens = names[too_long[0]], len(prompts[too_long[0]])
        more = f" (so do {len(too_long) - 1} more)" if len(too_long) > 1 else ""
        need = f"{tokens} prompt tokens + --max-new-tokens {max_new_tokens}"
        fail(f"problem {name!r}: {need} exceed the model's context of {context}{more}")


def cache_bytes(config, dtype: torch.dtype) -> int:
    """Of one token's keys and values in all layers."""
    config = config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * head_dim * dtype.itemsize


def free_memory(device: torch.device) -> float:
    """Bytes; inf where it can't be known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    lines = meminfo.read_text().splitlines() if meminfo.exists() else []
    return next((int(line.split()[1]) * 1024.0 for line in lines if line.startswith("MemAvailable")), math.inf)


def check_memory(policy, prompts: list[list[int]], args) -> None:
    """Ends a run before it begins where sampling, at the longest prompt, and the optimizer can't fit in what is free
    now."""
    rows, longest = args.prompts_per_step * args.group_size, max(map(len, prompts))
    tokens = (args.prompts_per_step if common.takes_groups(policy) else rows) * longest + rows * args.max_new_tokens
    logits = 3 * 4 * rows * policy.config.get_text_config().vocab_size
    sampling = tokens * cache_bytes(policy.config, policy.dtype) + logits
    training = sum(p.numel() for p in policy.parameters()) * (12 if policy.dtype == torch.float32 else 16)
    needed = sampling + training if policy.device.type == "cuda" else max(sampling, training)  # one after the other
    if needed > (free := free_memory(policy.device)):
        sizes = f"--prompts-per-step {args.prompts_per_step} --group-size {args.group_size}"
        sizes += f" --max-new-tokens {args.max_new_tokens}"
        takes = f"sampling takes {sampling / 1e9:.1f} GB, gradients and optimizer {training / 1e9:.1f} GB"
        fail(f"{sizes}: {takes}, {free / 1e9:.1f} GB are free; lower them, or take a smaller --model")


# ---- Preference pairs ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    question: str
    chosen: str
    rejected: str
    id: str = ""
    topic: str = ""
    weight: float = 1.0
    chosen_finished: bool = True  # ended by an EOS, not cut by the length limit
    rejected_finished: bool = True


def load_preference_pairs(
    source: str,
    seed: int = 0,
    pair_problems: int = 1500,
    pair_weight: str = "uniform",
    min_gap: float = 0.5,
    max_pairs_per_prompt: int = 4,
    balance_topics: bool = False,
) -> list[Pair]:
    """Preference pairs, and a printed line that counts them and what was dropped.

    source: "arithmetic-pairs", N-best samples of the embedded model for `pair_problems` problems; a .jsonl file with
    the fields `prompt` (or `question`), `chosen`, `rejected`; or a samples file of evaluate.py, which holds several
    scored completions of each problem.
    pair_weight: "uniform", or "gap": proportional to the difference of the two scores, with a mean of 1.
    min_gap: scores of a samples file that differ by less are a near tie, no pair.
    max_pairs_per_prompt: at most so many of one prompt, a random choice from `seed`, lest a few prompts dominate.
    balance_topics: as many pairs of every topic as there are of the rarest.
    """
    dropped = Counter()
    if source == "arithmetic-pairs":
        from evaluate import arithmetic_samples  # here, since evaluate imports this module

        samples, rows = True, [(record["id"], record) for record in arithmetic_samples(pair_problems)]
    else:
        rows = [(f"{source}:{line}", row) for line, row in read_jsonl(source)]
        samples = "completions" in rows[0][1]
    if pair_weight == "gap" and not samples:
        fail(f"--pair-weight gap: {source} holds pairs without scores; a samples file is needed")
    pairs = sampled_pairs(rows, source, min_gap, dropped) if samples else read_pairs(rows, source, dropped)

    prompts: dict[str, list[Pair]] = {}
    for pair in pairs:
        prompts.setdefault(pair.question, []).append(pair)
    kept = []
    for question, group in prompts.items():
        dropped["over --max-pairs-per-prompt"] += max(0, len(group) - max_pairs_per_prompt)
        kept += random.Random(f"pairs {question} {seed}").sample(group, min(len(group), max_pairs_per_prompt))
    if balance_topics:
        topics = {topic: [pair for pair in kept if pair.topic == topic] for topic in sorted({p.topic for p in kept})}
        if len(topics) < 2:
            fail(f"--balance-topics: {source} does not name two topics")
        rarest, rng = min(map(len, topics.values())), random.Random(f"topics {seed}")
        dropped["to balance topics"] = len(kept) - rarest * len(topics)
        kept = [pair for group in topics.values() for pair in rng.sample(group, rarest)]
    mean = sum(pair.weight for pair in kept) / len(kept)
    kept = [replace(pair, weight=pair.weight / mean if pair_weight == "gap" else 1.0) for pair in kept]
    counts = ", ".join(f"{count} {why}" for why, count in dropped.items() if count) or "none"
    print(f"pairs: {len(kept)} of {len({pair.question for pair in kept})} prompts from {source}; dropped: {counts}")
    return kept


def sampled_pairs(rows: list[tuple[str, dict]], source: str, min_gap: float, dropped: Counter) -> list[Pair]:
    """All pairs that each problem's scored completions induce, the better one chosen; weight = the scores' gap."""
    pairs, errors, questions = [], [], set()
    for place, row in rows:
        try:
            question = text_field(row, ("question", "prompt"))
            scored: dict[str, dict] = {}  # by text: a completion that was sampled twice says nothing new
            if not isinstance(row.get("completions"), list):
                raise ValueError("no field 'completions' with a list, as the first line has")
            for completion in row["completions"]:
                if not isinstance(completion, dict) or not isinstance(completion.get("text"), str):
                    raise ValueError("a completion has no field 'text'")
                check_text("text", completion["text"])
                score = completion.get("reward")
                if not isinstance(score, int | float) or not math.isfinite(score):
                    raise ValueError(f"a completion's 'reward' is {score!r}, a number is expected")
                dropped["duplicate texts"] += completion["text"] in scored
                scored.setdefault(completion["text"], completion)
        except ValueError as error:
            errors.append(f"{place}: {error}")
            continue
        if question in questions:
            dropped["duplicate prompts"] += 1
            continue
        questions.add(question)
        best_first = sorted(scored.values(), key=lambda completion: -completion["reward"])
        for i, better in enumerate(best_first):
            for worse in best_first[i + 1 :]:
                gap = better["reward"] - worse["reward"]
                dropped["near ties (--min-gap)"] += 0 < gap < min_gap
                if gap > 0 and gap >= min_gap:
                    ends = better.get("finished", True), worse.get("finished", True)
                    topic = str(row.get("topic") or "")
                    pairs.append(Pair(question, better["text"], worse["text"], place, topic, gap, *ends))
    fail_on(errors, source)
    if not pairs:
        fail(f"{source}: no prompt has two completions whose scores differ by --min-gap {min_gap:g} or more")
    return pairs


def read_pairs(rows: list[tuple[str, dict]], source: str, dropped: Counter) -> list[Pair]:
    pairs, errors = {}, []
    for place, row in rows:
        try:
            question = text_field(row, ("prompt", "question"))
            chosen, rejected = text_field(row, ("chosen",)), text_field(row, ("rejected",))
            if chosen == rejected:
                raise ValueError("chosen and rejected are equal")
            dropped["duplicate pairs"] += (question, chosen, rejected) in pairs
            pair = Pair(question, chosen, rejected, place, str(row.get("topic") or ""))
            pairs.setdefault((question, chosen, rejected), pair)
        except ValueError as error:
            errors.append(f"{place}: {error}")
    fail_on(errors, source)
    return list(pairs.values())


def encode_pairs(
    tokenizer, pairs: list[Pair], system_prompt: str, context: float
) -> tuple[list[Pair], list[list[int]], list[tuple[list[int], list[int]]]]:
    """The pairs that fit the context, their prompts' token ids, and (chosen, rejected) ids of each.

    A pair that the context would cut is dropped and counted: what is cut off is the answer and the EOS.
    """
    prompts = encode_prompts(tokenizer, [pair.question for pair in pairs], system_prompt)
    for pair, prompt in zip(pairs, prompts, strict=True):
        if len(prompt) >= context:
            fail(f"{pair.id}: its prompt of {len(prompt)} tokens leaves no room in the model's context of {context}")
    heads = tokenizer.batch_decode([prompt[-8:] for prompt in prompts])

    def encode(texts: list[str], finished: list[bool]) -> list[list[int]]:
        # Where the template opens the think block in the prompt, `decode` had put the tag in front of the text.
        opened = [head.rstrip().endswith("<think>") for head in heads]
        texts = [t.removeprefix("<think>") if o else t for t, o in zip(texts, opened, strict=True)]
        ids = encode_completions(tokenizer, texts)
        return [i if whole else i[:-1] for i, whole in zip(ids, finished, strict=True)]  # what was cut has no EOS

    chosen = encode([pair.chosen for pair in pairs], [pair.chosen_finished for pair in pairs])
    rejected = encode([pair.rejected for pair in pairs], [pair.rejected_finished for pair in pairs])
    both = list(zip(chosen, rejected, strict=True))
    fits = [i for i, ids in enumerate(both) if len(prompts[i]) + max(map(len, ids)) <= context and all(ids)]
    if len(fits) < len(pairs):
        print(f"note: {len(pairs) - len(fits)} of {len(pairs)} pairs exceed the context of {context}: dropped")
    return [pairs[i] for i in fits], [prompts[i] for i in fits], [both[i] for i in fits]


def pair_rollout(prompts: list[list[int]], completions: list, device) -> common.Rollout:
    """The pairs as groups of two: chosen, rejected."""
    return common.make_rollout(prompts, [ids for pair in completions for ids in pair], group_size=2, device=device)


def pair_micro_batches(rollout: common.Rollout, max_tokens: int) -> list[list[int]]:
    """All rows of a Rollout of pairs in micro-batches of whole pairs, in the order chosen, rejected, chosen, ...: a
    pair's loss needs both rows. The budget is never under what the largest pair takes."""
    G, lengths = rollout.group_size, rollout.lengths.view(-1, rollout.group_size).sum(1).tolist()
    largest = max(G * len(prompt) + length for prompt, length in zip(rollout.prompt_ids, lengths, strict=True))
    batches = common.micro_batches(rollout, list(range(len(rollout.mask))), max(max_tokens, largest))
    return [sorted(rows) for rows in batches]  # similar lengths together had put the shorter of a pair first


def join_groups(parts: list[tuple[common.Rollout, list[int]]]) -> common.Rollout:
    """One Rollout of the given groups of several."""
    G, T = parts[0][0].group_size, max(rollout.mask.shape[1] for rollout, _ in parts)

    def gather(field: str) -> torch.Tensor:
        rows = [getattr(r, field)[[p * G + g for p in groups for g in range(G)]] for r, groups in parts if groups]
        return torch.cat([torch.nn.functional.pad(t, (0, T - t.shape[1])) if t.dim() == 2 else t for t in rows])

    prompts = [rollout.prompt_ids[p] for rollout, groups in parts for p in groups]
    return common.Rollout(prompts, *map(gather, ("completion_ids", "mask", "sampler_logprobs", "finished")), G)


# ---- Which problems an iteration sees ------------------------------------------------------------------------------


class ProblemSampler:
    """Draws problem indices. Its whole state is in `state_dict()`: a resumed run goes on where it stopped.

    mode "uniform": every problem once per epoch, in an order that (seed, epoch) fixes.
    "curriculum": the same, but from easy to hard by `difficulty` within each epoch.
    "prioritized": with a chance proportional to 1 - success rate (Kimi K1.5, arXiv:2501.12599, section 2.3.4), at
    least `FLOOR` so that nothing is lost for good; problems not drawn yet have a success rate of 0.
    """

    FLOOR = 0.05

    def __init__(self, problems: list, mode: str = "uniform", seed: int = 0):
        if mode not in ("uniform", "curriculum", "prioritized"):
            raise ValueError(f"mode is 'uniform', 'curriculum' or 'prioritized', not {mode!r}")
        if mode == "curriculum" and any(p.difficulty is None for p in problems):
            fail("--problem-sampling curriculum: needs problems that all have a difficulty")
        self.problems, self.size, self.mode, self.seed, self.drawn = problems, len(problems), mode, seed, 0
        self.attempts, self.successes = [0] * self.size, [0.0] * self.size
        self.epoch, self.order = -1, []

    def draw(self, count: int) -> list[int]:
        if self.mode == "prioritized":
            return self.draw_prioritized(count)
        indices = []
        while len(indices) < count:
            epoch, position = divmod(self.drawn, self.size)
            if epoch != self.epoch:
                self.epoch, self.order = epoch, list(range(self.size))
                random.Random(f"epoch {epoch} {self.seed}").shuffle(self.order)
                if self.mode == "curriculum":
                    self.order.sort(key=lambda i: self.problems[i].difficulty)  # stable: shuffled among equals
            taken = self.order[position : position + count - len(indices)]
            indices += taken
            self.drawn += len(taken)
        return indices

    def draw_prioritized(self, count: int) -> list[int]:
        """Without replacement: the `count` largest of u ** (1 / weight), u uniform (Efraimidis and Spirakis 2006)."""
        rng = random.Random(f"prioritized {self.drawn} {self.seed}")
        rates = [s / n if n else 0.0 for s, n in zip(self.successes, self.attempts, strict=True)]
        keys = [rng.random() ** (1 / max(self.FLOOR, 1 - rate)) for rate in rates]
        self.drawn += count
        order = sorted(range(self.size), key=lambda i: -keys[i])
        return (order * (count // self.size + 1))[:count]

    def record(self, index: int, success_rate: float) -> None:
        """The ledger: how often a problem was drawn and the sum of its groups' success rates."""
        self.attempts[index] += 1
        self.successes[index] += success_rate

    def summary(self) -> dict[str, float]:
        """The share of problems drawn so far, and their mean success rate over all their draws."""
        rates = [s / n for s, n in zip(self.successes, self.attempts, strict=True) if n]
        return {"sampler/seen": len(rates) / self.size, "sampler/success_rate": sum(rates) / max(1, len(rates))}

    def state_dict(self) -> dict:
        return {"drawn": self.drawn, "attempts": list(self.attempts), "successes": list(self.successes)}

    def load_state_dict(self, state: dict) -> None:
        if len(state["attempts"]) != self.size:
            fail(f"--resume: the run had {len(state['attempts'])} problems to draw from, now there are {self.size}")
        self.drawn = state["drawn"]
        self.attempts, self.successes = list(state["attempts"]), list(state["successes"])
