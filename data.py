"""Problems, prompts, problem samplers, demonstrations, preference pairs, and filters of all these.

A problem is a question and its gold answer. `load_problems` reads them from the built-in generator ("arithmetic"),
a JSONL file or a hub dataset; `encode_prompts` turns questions into token ids through the model's chat template;
`ProblemSampler` decides which problems an iteration sees.

As a command it filters problems, or makes demonstrations of a samples file (which evaluate.py --output writes):

    python data.py --samples samples.jsonl --output problems.jsonl              # those with a pass rate between 0 and 1
    python data.py --samples samples.jsonl --make correct --output demonstrations.jsonl          # rejection sampling
    python data.py --problems gsm8k.jsonl --remove-duplicates --decontaminate math500.jsonl --output clean.jsonl
"""

import hashlib
import json
import math
import os
import random
import re
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import torch
import tyro
from transformers import AutoModelForCausalLM

import common
from common import fail, reason
from rewards import LANGUAGES, extract_answer

MODES = "think", "no_think"

# ---- Problems ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    question: str
    answer: str
    id: str = ""
    topic: str = ""
    difficulty: float | None = None


def is_held_out(question: str) -> bool:
    """True for one question in ten. Decided by the question's text alone, without system turn and thinking mode, so
    that no seed, order or file can put the same problem into both the train and the eval split."""
    text = re.sub(f" /(?:{'|'.join(MODES)})$", "", plain_text(question))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % 10 == 0


def load_problems(source: str, split: str, limit: int | None = None, seed: int = 0) -> list[Problem]:
    """Problems of one split of one source: "train", "eval", or "all": both, but of a hub dataset with a test or
    validation split never that, since "all" is what demonstrations and pairs to train on are sampled for.

    source: "arithmetic" ("arithmetic:7-8" for other difficulties than 1 to 6), the path of a .jsonl file, or a hub
    dataset's name (`name:config` where it has configs).
    A file, and a hub dataset without a test or validation split, is split by `is_held_out`.
    limit: at most so many: of a file a random choice, in its order; of the generator, whose list cycles through the
    difficulties, the first ones.
    seed: of the generator and of that choice.
    """
    if split not in ("train", "eval", "all"):
        raise ValueError(f"split is 'train', 'eval' or 'all', not {split!r}")
    generated = re.fullmatch(r"arithmetic(?::([1-9])(?:-([1-9]))?)?", source)
    if generated:
        easiest = int(generated[1] or 1)
        hardest = int(generated[2] or generated[1] or HARDEST)
        if easiest > hardest:
            fail(f"{source}: arithmetic:LOW-HIGH is expected")
        count = limit or (6000 if split == "train" else 3000)
        problems = arithmetic_problems(split, count, seed, range(easiest, hardest + 1))
    elif is_file(source):
        problems = read_problems(placed_rows(source), source)
        problems = [p for p in problems if split == "all" or is_held_out(p.question) == (split == "eval")]
    else:
        problems = hub_problems(source, split)
    if not problems:
        hint = "; give held-out problems with --eval-data" if split == "eval" else ""
        fail(f"{source}: no problem left in its {split} split{hint}")
    if limit and limit < len(problems) and not generated:
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


def placed_rows(path: str) -> list[tuple[str, dict]]:
    """(file:line, object), as errors name it."""
    return [(f"{path}:{line}", row) for line, row in read_jsonl(path)]


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


# ---- Conversations: a row may have lists of messages {"role": ..., "content": ...} where others have a text ----------


def read_messages(name: str, value) -> list[dict]:
    """A list of messages, each with a role and a text; ValueError with what is wrong."""
    for message in value:
        if not isinstance(message, dict) or {"role", "content"} - message.keys():
            raise ValueError(f"field {name!r}: each message needs a role and a content")
        if not isinstance(message["content"], str) or not isinstance(message["role"], str):
            raise ValueError(f"field {name!r}: roles and contents are texts, nothing else is understood")
        check_text(name, message["role"] + message["content"])
    if not value:
        raise ValueError(f"field {name!r} is empty")
    return [{"role": message["role"], "content": message["content"]} for message in value]


def as_question(name: str, messages: list[dict]) -> str:
    """What comes before a completion: the user's text if that is all, else the messages as JSON, so that a question
    is a text everywhere. `conversation` reads it back."""
    if not messages or messages[-1]["role"] != "user":
        raise ValueError(f"field {name!r}: a prompt ends with the user's turn")
    if not messages[-1]["content"].strip():
        raise ValueError(f"field {name!r}: the user's turn is empty")
    return messages[0]["content"] if len(messages) == 1 else json.dumps(messages, ensure_ascii=False)


def conversation(question: str) -> list[dict]:
    """The messages of a question."""
    if question.startswith('[{"role": '):
        try:
            return read_messages("question", json.loads(question))
        except (ValueError, RecursionError):
            pass  # a plain text after all
    return [{"role": "user", "content": question}]


def plain_text(question: str) -> str:
    """A question without roles and system turn."""
    return "\n\n".join(message["content"] for message in conversation(question) if message["role"] != "system")


def question_field(row: dict, names: tuple[str, ...]) -> str:
    """The first of the named fields: a text, or messages that end with the user's turn."""
    name = next((name for name in names if row.get(name) is not None), None)
    if isinstance(row.get(name), list):
        return as_question(name, read_messages(name, row[name]))
    return text_field(row, names)


def completion_field(row: dict, name: str) -> str:
    """A text, or messages of which there is one, the assistant's."""
    if not isinstance(row.get(name), list):
        return text_field(row, (name,))
    messages = read_messages(name, row[name])
    if [message["role"] for message in messages] != ["assistant"]:
        raise ValueError(f"field {name!r}: one turn, the assistant's, is expected")
    return as_text(name, messages[0]["content"])


def split_conversation(name: str, value) -> tuple[str, str]:
    """A whole conversation as question and completion: its last turn."""
    messages = read_messages(name, value) if isinstance(value, list) else []
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise ValueError(f"field {name!r}: a list of messages that ends with the assistant's turn is expected")
    return as_question(name, messages[:-1]), as_text(name, messages[-1]["content"])


def read_problems(rows: list[tuple[str, dict]], source: str) -> list[Problem]:
    """rows: (place, row) with `question`, `prompt`, `problem` or `messages`, and `answer`; optionally `id`, `topic`,
    `difficulty`."""
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
            question = question_field(row, ("question", "prompt", "problem", "messages"))
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
    part = held_out if split == "eval" and held_out else "train"
    rows = [(f"{source} {part} row {i}", row) for i, row in enumerate(splits.get(part, []))]
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


def arithmetic_problems(split: str, limit: int, seed: int = 0, difficulties=range(1, HARDEST + 1)) -> list[Problem]:
    """At most `limit` distinct problems of a split, difficulties 1-6 in turn (there are about 1,700 of one operation,
    so its share ends first)."""
    by_difficulty = []
    for difficulty in difficulties:
        rng = random.Random(f"problems {split} {difficulty} {seed}")
        wanted, found = -(-limit // len(difficulties)), {}
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
    """Token ids of each question as chat turns, up to where the assistant's text begins. A conversation with a system
    turn of its own keeps that.

    Without a chat template the prompt is the bare question. A template that refuses a system turn (Gemma's) gets
    the system prompt at the head of the user's turn.
    """
    if not tokenizer.chat_template:
        texts = ["\n\n".join(message["content"] for message in conversation(question)) for question in questions]
        return [tokenizer(text).input_ids for text in texts]
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []

    def chats(in_user_turn: bool) -> list:
        turns = [conversation(question) for question in questions]
        turns = [messages if messages[0]["role"] == "system" else [*system, *messages] for messages in turns]
        return [without_system(messages) for messages in turns] if in_user_turn else turns

    def without_system(messages: list[dict]) -> list[dict]:
        first, *rest = messages
        if first["role"] != "system":
            return messages
        return [{**rest[0], "content": f"{first['content']}\n\n{rest[0]['content']}"}, *rest[1:]]

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


def encode_completions(tokenizer, completions: list[str], prompts: list[list[int]]) -> list[list[int]]:
    """Token ids of each completion and the EOS that ends it. They follow a prompt's ids, never merged with them; where
    the template opens the think block in the prompt, `decode` had put the tag in front of the text."""
    opened = opens_thinking(tokenizer, prompts)
    texts = [text.removeprefix("<think>") if o else text for text, o in zip(completions, opened, strict=True)]
    ids = []
    for start in range(0, len(texts), 1000):  # the tokenizer's own records of a batch are a hundred times its ids
        ids += tokenizer(texts[start : start + 1000], add_special_tokens=False).input_ids
    return [tokens + [tokenizer.eos_token_id] for tokens in ids]


def opens_thinking(tokenizer, prompts: list[list[int]]) -> list[bool]:
    """Whether the chat template opened the think block at each prompt's end."""
    heads = tokenizer.batch_decode([prompt[-8:] for prompt in prompts])
    return [head.rstrip().endswith("<think>") for head in heads]


def load_demonstrations(source: str, count: int, seed: int = 0, keep: str = "correct") -> list[tuple[str, str]]:
    """(prompt, completion) texts: "arithmetic-demonstrations", `count` of them made from the seed; a .jsonl file with
    the fields `prompt` (or `question`) and `completion`, or `messages`; or a samples file, of which `chosen_samples`
    keeps some."""
    if source == "arithmetic-demonstrations":
        return arithmetic_demonstrations(count, seed)
    rows = placed_rows(source)
    if "completions" in rows[0][1]:
        chosen = demonstrations_from(sample_records(rows, source), keep)
        if not chosen:
            fail(f"{source}: none of its completions is right and finished: nothing to learn from")
        return chosen
    demonstrations, errors = [], []
    for place, row in rows:
        try:
            if row.get("messages") is not None:
                demonstrations.append(split_conversation("messages", row["messages"]))
            else:
                question = question_field(row, ("prompt", "question"))
                demonstrations.append((question, completion_field(row, "completion")))
        except ValueError as error:
            errors.append(f"{place}: {error}")
    fail_on(errors, source)
    return demonstrations


# ---- Samples files: problems with scored completions, written by evaluate.py --output --------------------------------


def sample_completions(row: dict) -> list[dict]:
    """The completions of one line; ValueError where it is not a samples file's."""
    if not isinstance(row.get("completions"), list):
        raise ValueError("no field 'completions' with a list, as a samples file has")
    for completion in row["completions"]:
        if not isinstance(completion, dict) or not isinstance(completion.get("text"), str):
            raise ValueError("a completion has no field 'text'")
        check_text("text", completion["text"])
        score = completion.get("reward")
        if not isinstance(score, int | float) or not abs(score) < 1e9:  # nor NaN
            raise ValueError(f"a completion's 'reward' is {str(score)[:80]}, a number is expected")
    return row["completions"]


def sample_records(rows: list[tuple[str, dict]], source: str) -> list[dict]:
    """A samples file's rows (place, row), each checked, with `question` as text."""
    records, errors = [], []
    for place, row in rows:
        try:
            question = question_field(row, ("question", "prompt"))
            records.append(row | {"question": question, "completions": sample_completions(row)})
        except ValueError as error:
            errors.append(f"{place}: {error}")
    fail_on(errors, source)
    return records


def is_right(completion: dict) -> bool:
    return bool(completion.get("correct", completion["reward"] > 0)) and completion.get("finished", True)


def chosen_samples(record: dict, keep: str) -> list[str]:
    """Texts for SFT. "correct": the right ones, each text once (rejection sampling); "best": of these the one with the
    highest reward, the shortest of several."""
    right = {c["text"]: c for c in record["completions"] if is_right(c) and c["text"]}
    if keep == "best" and right:
        return [min(right, key=lambda text: (-right[text]["reward"], len(text)))]
    return list(right)


def demonstrations_from(records: list[dict], keep: str) -> list[tuple[str, str]]:
    return [
        (mode_question(record["question"], record.get("mode")), text)
        for record in records
        for text in chosen_samples(record, keep)
    ]


def pass_rates(records: list[dict], source: str, problems: list[Problem]) -> dict[str, float]:
    """The share of right completions by question; one line where the samples are not of these problems."""
    tried, right = Counter(), Counter()
    for record in records:
        tried[record["question"]] += len(record["completions"])
        right[record["question"]] += sum(map(is_right, record["completions"]))
    rates = {question: right[question] / count for question, count in tried.items() if count}
    if not any(problem.question in rates for problem in problems):
        asked = next(iter(rates), "")
        fail(f"{source}: samples of other problems: it asks {asked[:60]!r}, not {problems[0].question[:60]!r}")
    return rates


# ---- Filters: each takes problems, returns those that are kept, and counts in `dropped` why the others are not -------


def keep_pass_rates(problems: list[Problem], rates: dict, low: float, high: float, dropped: Counter) -> list[Problem]:
    """Those right in low to high of their samples. What is always right, or always wrong, has no group with both and so
    teaches nothing (Kimi K1.5, arXiv:2501.12599, section 2.1, keeps what is hard for the model)."""
    kept = []
    for problem in problems:
        rate = rates.get(problem.question)
        if rate is not None and low <= rate <= high:
            kept.append(problem)
        else:
            dropped["not sampled" if rate is None else f"pass rate {'under' if rate < low else 'over'} the band"] += 1
    return kept


def label_difficulty(problems: list[Problem], rates: dict) -> list[Problem]:
    """difficulty = 1 - pass rate, for --problem-sampling curriculum."""
    return [replace(p, difficulty=round(1 - rates[p.question], 4)) if p.question in rates else p for p in problems]


def drop_lucky_guesses(problems: list[Problem], rates: dict, dropped: Counter) -> list[Problem]:
    """Kimi K1.5, section 2.1: what the model gets right without reasoning, in one of its tries, can be guessed."""
    kept = [problem for problem in problems if not rates.get(problem.question, 0.0) > 0]
    dropped["right without reasoning"] += len(problems) - len(kept)
    return kept


OPTION = re.compile(r"(?:^|[\s({])\(?([A-Ea-e])[).:]", re.MULTILINE)


def drop_multiple_choice(problems: list[Problem], dropped: Counter) -> list[Problem]:
    """Questions whose answer can be guessed from a short list (Kimi K1.5, section 2.1): options A, B, ... in the
    question with a letter as the answer, and answers that are true, false, yes or no."""
    kept = []
    for problem in problems:
        text, answer = plain_text(problem.question), problem.answer.lower().strip(" .(")
        if answer in ("true", "false", "yes", "no"):
            dropped["true or false"] += 1
        elif re.match(r"[a-e]\b", answer) and {"a", "b"} <= {o.lower() for o in OPTION.findall(text)}:
            dropped["multiple choice"] += 1
        else:
            kept.append(problem)
    return kept


def balance(items: list, flag: str, source: str, seed: int, dropped: Counter) -> list:
    """As many items of every topic as there are of the rarest, a random choice."""
    topics = {topic: [item for item in items if item.topic == topic] for topic in sorted({i.topic for i in items})}
    if len(topics) < 2:
        fail(f"{flag}: {source} does not name two topics")
    rarest, rng = min(map(len, topics.values())), random.Random(f"topics {seed}")
    dropped["to balance topics"] = len(items) - rarest * len(topics)
    return [item for group in topics.values() for item in rng.sample(group, rarest)]


def tokens_of(text: str) -> list[str]:
    """Words, numbers, and every sign by itself."""
    return re.findall(r"\w+|[^\w\s]", text.lower())


def ngrams(tokens: list[str], n: int) -> set[tuple[str, ...]]:
    return {tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)}


def decontaminate(problems: list[Problem], held_out: list[Problem], n: int, dropped: Counter) -> list[Problem]:
    """Drops what shares n words in a row with a held-out question. A held-out question of fewer words must be the whole
    problem, or, where it has at least 8 words and signs, a part of it: shorter ones are parts of others by chance."""
    long, short = set(), set()
    for question in (plain_text(p.question) for p in held_out):
        words = re.findall(r"\w+", question.lower())
        if len(words) >= n:
            long |= ngrams(words, n)
        else:
            short.add(tuple(tokens_of(question)))
    lengths = {len(question) for question in short if len(question) >= 8}
    kept = []
    for problem in problems:
        text = plain_text(problem.question)
        tokens, shared = tokens_of(text), ngrams(re.findall(r"\w+", text.lower()), n) & long
        if shared or tuple(tokens) in short or any(ngrams(tokens, length) & short for length in lengths):
            dropped[f"{n}-gram of a held-out question"] += 1
        else:
            kept.append(problem)
    return kept


def drop_duplicates(problems: list[Problem], near: float, dropped: Counter) -> list[Problem]:
    """Keeps the first of equal questions (case, spacing and the punctuation of sentences apart), and of questions with
    the same numbers that share `near` of their triples of words and signs (Jaccard)."""
    kept, seen, triples, index = [], set(), [], {}
    for problem in problems:
        text = plain_text(problem.question)
        tokens = tokens_of(re.sub(r'[.,;:?"]+(?=\s|$)', " ", text))
        if tuple(tokens) in seen:
            dropped["duplicate"] += 1
            continue
        seen.add(tuple(tokens))
        mine = ngrams(tokens, 3) or {tuple(tokens)}
        numbers = tuple(re.findall(r"\d+(?:[.,:]\d+)*", text))
        shared = Counter(other for gram in mine for other in index.get((numbers, gram), ()))
        if any(count >= near * (len(mine) + len(triples[other]) - count) for other, count in shared.items()):
            dropped["near duplicate"] += 1
            continue
        for gram in mine:
            index.setdefault((numbers, gram), []).append(len(triples))
        triples.append(mine)
        kept.append(problem)
    return kept


# ---- Thinking mode (Qwen3, arXiv:2505.09388, section 4.3) ------------------------------------------------------------

EMPTY_THINKING = "<think>\n\n</think>\n\n"


def mode_question(question: str, mode: str | None) -> str:
    """The flag stands at the end of the user's turn."""
    if not mode:
        return question
    *before, last = conversation(question)
    return as_question("question", [*before, {**last, "content": f"{last['content']} /{mode}"}])


def fuse_modes(records: list[dict], keep: str = "correct") -> list[tuple[str, str]]:
    """Demonstrations of both modes from samples with thinking: the sample as it is, and without its thoughts, which
    leave an empty block."""
    demonstrations = []
    for record in records:
        for text in chosen_samples(record, keep):
            _, closed, answer = text.partition("</think>")
            if closed and answer.strip():
                without = EMPTY_THINKING + answer.lstrip()
                for mode, completion in zip(MODES, (text, without), strict=True):
                    demonstrations.append((mode_question(record["question"], mode), completion))
    return demonstrations


def context_length(config) -> float:
    return getattr(config.get_text_config(), "max_position_embeddings", None) or math.inf


def decode(tokenizer: common.Tokenizer, rollout: common.Rollout) -> list[str]:
    """(B,) texts of the completions without EOS; for rewards and for people, never to be encoded again.

    Where the chat template opens the think block in the prompt, the tag is put back in front: it belongs to the text.
    """
    G, rows = rollout.group_size, zip(rollout.completion_ids.tolist(), rollout.lengths.tolist(), strict=True)
    texts = tokenizer.batch_decode([ids[:n] for ids, n in rows], skip_special_tokens=True)
    opened = opens_thinking(tokenizer, rollout.prompt_ids)
    return ["<think>" * opened[i // G] + text for i, text in enumerate(texts)]


AT_LEAST_1 = (
    "prompts_per_step group_size max_new_tokens update_epochs minibatch_size micro_batch_tokens eval_problems "
    "max_sampling_rounds demonstrations num_samples batch_size value_epochs value_minibatch_size pair_problems "
    "max_pairs_per_prompt max_bad_updates ngram limit "
    "overlong_buffer think_budget"
).split()
POSITIVE = (
    "temperature learning_rate value_learning_rate max_grad_norm clip_low clip_high value_clip beta near_duplicate"
).split()
ANY_SIGN = "seed", "missing_eos_score"


def check_flags(args) -> None:
    """Every number must be finite and in its range, every directory writable: one line that names the flag and what is
    allowed."""
    at_most_1 = ["min_pass_rate", "max_pass_rate", "near_duplicate"]
    at_most_1 += ["gae_lambda", "gamma"] if hasattr(args, "gae_lambda") else []  # SimPO's gamma is a margin
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
    weights = {n: v for n, v in vars(args).items() if n.endswith("_weight") and isinstance(v, int | float)}
    if weights and not any(weights.values()) and not getattr(args, "reward_model", None):
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in weights)
        fail(f"{flags} are all 0: there is nothing to learn from")
    if getattr(args, "overlong_weight", 0) > 0 and args.overlong_buffer > args.max_new_tokens:
        fail(f"--overlong-buffer {args.overlong_buffer}: must be at most --max-new-tokens {args.max_new_tokens}")
    if getattr(args, "language", "en") not in LANGUAGES:
        fail(f"--language {args.language}: must be one of {', '.join(sorted(LANGUAGES))}")
    output = getattr(args, "output", None)
    if output and Path(output).is_dir():
        fail(f"--output {output}: is a directory, a file's name is expected")
    if output and not os.access(Path(output).resolve().parent, os.W_OK):
        fail(f"--output {output}: its directory is not there or not writable")
    for name in ("run_root", "ref_cache"):
        if folder := getattr(args, name, None):
            path = Path(folder).resolve()
            nearest = next(place for place in (path, *path.parents) if place.exists())
            if not nearest.is_dir() or not os.access(nearest, os.W_OK):
                flag = f"--{name.replace('_', '-')} {folder}"
                fail(f"{flag}: can't be written ({nearest} is not a directory that can be written)")


def check_reward_model(path: str | None, model: str) -> None:
    """It reads the policy's token ids."""
    if path and common.load_config(path, "--reward-model").vocab_size != common.load_config(model).vocab_size:
        fail(f"--reward-model {path}: has another vocabulary than --model {model}")


def check_context(
    prompts: list[list[int]], names: list[str], config, max_new_tokens: int, flag: str = "--max-new-tokens"
) -> None:
    """Every prompt, with room for its completion, must fit the model's context."""
    context = context_length(config)
    too_long = [i for i, prompt in enumerate(prompts) if len(prompt) + max_new_tokens > context]
    if too_long:
        name, tokens = names[too_long[0]], len(prompts[too_long[0]])
        more = f" (so do {len(too_long) - 1} more)" if len(too_long) > 1 else ""
        need = f"{tokens} prompt tokens + {flag} {max_new_tokens}"
        fail(f"problem {name!r}: {need} exceed the model's context of {context}{more}")


def attention_widths(config) -> tuple[int, int]:
    """Of a token's queries and of its keys, all heads together; values are as wide as keys."""
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return heads * head_dim, (getattr(config, "num_key_value_heads", None) or heads) * head_dim


def cache_bytes(config, dtype: torch.dtype) -> int:
    """Of one token's keys and values in all layers."""
    config = config.get_text_config()
    return 2 * config.num_hidden_layers * attention_widths(config)[1] * dtype.itemsize


def free_memory(device: torch.device) -> float:
    """Bytes; inf where it can't be known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    lines = meminfo.read_text().splitlines() if meminfo.exists() else []
    return next((int(line.split()[1]) * 1024.0 for line in lines if line.startswith("MemAvailable")), math.inf)


def parameters(config) -> int:
    """Of the causal LM; no weight is made."""
    with torch.device("meta"):
        return sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())


def memory_needs(config, size: int, args, dtype: torch.dtype, longest: int, cpu: bool) -> dict[str, float]:
    """Bytes that a run takes, by what they are for. An estimate: benchmarks/memory.py compares it with measured peaks.

    size: parameters of the model; longest: tokens of the longest prompt (RL), demonstration or preference pair.
    """
    config = config.get_text_config()
    heads, hidden, layers = config.num_attention_heads, config.hidden_size, config.num_hidden_layers
    queries, keys = attention_widths(config)
    width = next((w for w in (getattr(config, n, None) for n in ("intermediate_size", "n_inner")) if w), 4 * hidden)
    item, P, G = dtype.itemsize, getattr(args, "prompts_per_step", 0), getattr(args, "group_size", 1)
    completion = args.max_new_tokens if P else 0
    critic = hasattr(args, "gae_lambda") and getattr(args, "baseline", "value") == "value"
    frozen = (P > 0 and getattr(args, "kl_coef", 0) > 0) + bool(getattr(args, "reward_model", None))
    trained = 1 + critic

    # What autograd keeps of a token in a Llama-like layer: of the MLP four times its width, queries twice, keys and
    # values three times, and of the layer's own width four in the dtype and two, in the norms, in fp32.
    row = longest + completion
    tokens = min(max(args.micro_batch_tokens, row), (getattr(args, "minibatch_size", None) or P * G) * row)
    tokens *= (completion + longest / G) / row  # a prompt is computed once for its group, see sampling.PackedGroups
    layer = tokens * (item * (4 * width + 2 * queries + 3 * keys + 4 * hidden) + 8 * hidden)
    kept = layers * tokens * hidden * item + layer if args.gradient_checkpointing else layers * layer
    scores = 3 * 4 * tokens * heads * row if cpu else 0  # of one layer; a GPU's kernel keeps none
    head = 3 * 4 * min(tokens * config.vocab_size, common.LOGITS_AT_ONCE) + 4 * config.vocab_size * hidden
    return {
        "weights": size * item * (trained + frozen),
        "optimizer": size * trained * (8 if item == 4 else 12),  # Adam's two moments, and fp32 masters
        "sampling": P * (longest + G * completion) * cache_bytes(config, dtype) + 3 * 4 * P * G * config.vocab_size,
        "training": size * trained * 4 + kept + scores + head,  # gradients, in fp32
    }


def peak(needs: dict[str, float], cpu: bool) -> float:
    """Bytes, with what the libraries take for themselves. On a CPU sampling and training take turns, and an allocator
    that keeps pieces of what is freed takes a seventh more (measured); on a GPU the sampler's graphs keep their
    buffers."""
    turns = needs["sampling"], needs["training"]
    total = 0.6e9 + needs["weights"] + needs["optimizer"] + (max(turns) if cpu else sum(turns))
    return total * 1.15 if cpu else total


def flags_that_fit(config, size: int, args, dtype: torch.dtype, longest: int, memory: float, cpu: bool) -> dict | None:
    """The first change of flags, from those that change the time only to those that change the run, under which it
    fits into `memory` bytes; {} where it fits as it is, None where nothing helps."""
    P, minibatch = getattr(args, "prompts_per_step", 1), getattr(args, "minibatch_size", None) or 0
    budgets = [args.micro_batch_tokens, *(2**n for n in range(14, 9, -1) if 2**n < args.micro_batch_tokens)]
    for prompts in (P // 2**n for n in range(20)):
        if prompts < P and (prompts < 2 or prompts * args.group_size < minibatch):
            return None
        for checkpointing in (True,) if args.gradient_checkpointing else (False, True):
            for budget in budgets:
                change = {"micro_batch_tokens": budget, "gradient_checkpointing": checkpointing}
                change |= {"prompts_per_step": prompts} if hasattr(args, "prompts_per_step") else {}
                changed = SimpleNamespace(**vars(args) | change)
                if peak(memory_needs(config, size, changed, dtype, longest, cpu), cpu) <= memory:
                    return {name: value for name, value in change.items() if value != getattr(args, name)}
    return None


def as_flags(change: dict) -> str:
    return " ".join("--" + k.replace("_", "-") + ("" if v is True else f" {v}") for k, v in change.items())


def check_memory(args, config, lengths: list[int], device: torch.device, dtype: torch.dtype) -> None:
    """Ends a run before anything is loaded where it can't fit in what is free now, with flags under which it would.
    lengths: tokens of the prompts (RL), demonstrations or preference pairs."""
    free, cpu = free_memory(device), device.type == "cpu"
    try:
        size = parameters(config)
        change = flags_that_fit(config, size, args, dtype, max(lengths), free, cpu)
    except (AttributeError, ValueError, TypeError):  # no transformer, or no causal LM: nothing is known of it
        return
    if change == {}:
        return
    parts = memory_needs(config, size, args, dtype, max(lengths), cpu)
    takes = ", ".join(f"{name} {value / 1e9:.1f}" for name, value in parts.items() if value)
    total = f"--model {args.model}: the run takes about {peak(parts, cpu) / 1e9:.1f} GB ({takes})"
    advice = f"it would fit with {as_flags(change)}" if change else "no flags make it fit; take a smaller model"
    fail(f"{total}, {free / 1e9:.1f} GB are free: {advice}")


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
        rows = placed_rows(source)
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
        kept = balance(kept, "--balance-topics", source, seed, dropped)
    mean = sum(pair.weight for pair in kept) / len(kept)
    kept = [replace(pair, weight=pair.weight / mean if pair_weight == "gap" else 1.0) for pair in kept]
    print(f"pairs: {len(kept)} of {len({p.question for p in kept})} prompts from {source}; dropped: {listed(dropped)}")
    return kept


def listed(dropped: Counter) -> str:
    return ", ".join(f"{count} {why}" for why, count in dropped.items() if count) or "none"


def sampled_pairs(rows: list[tuple[str, dict]], source: str, min_gap: float, dropped: Counter) -> list[Pair]:
    """All pairs that each problem's scored completions induce, the better one chosen; weight = the scores' gap."""
    pairs, questions = [], set()
    for (place, _), record in zip(rows, sample_records(rows, source), strict=True):
        question = mode_question(record["question"], record.get("mode"))
        scored: dict[str, dict] = {}  # by text: a completion that was sampled twice says nothing new
        for completion in record["completions"]:
            dropped["duplicate texts"] += completion["text"] in scored
            scored.setdefault(completion["text"], completion)
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
                    topic = str(record.get("topic") or "")
                    pairs.append(Pair(question, better["text"], worse["text"], place, topic, gap, *ends))
    if not pairs:
        fail(f"{source}: no prompt has two completions whose scores differ by --min-gap {min_gap:g} or more")
    return pairs


def read_pairs(rows: list[tuple[str, dict]], source: str, dropped: Counter) -> list[Pair]:
    pairs, errors = {}, []
    for place, row in rows:
        try:
            if isinstance(row.get("chosen"), list) and len(row["chosen"]) > 1:  # each with the prompt before it
                question, chosen = split_conversation("chosen", row["chosen"])
                other, rejected = split_conversation("rejected", row.get("rejected"))
                if other != question:
                    raise ValueError("chosen and rejected differ before their last turns")
            else:
                question = question_field(row, ("prompt", "question"))
                chosen, rejected = completion_field(row, "chosen"), completion_field(row, "rejected")
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

    def encode(texts: list[str], finished: list[bool]) -> list[list[int]]:
        ids = encode_completions(tokenizer, texts, prompts)
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


def join_groups(
    parts: list[tuple[common.Rollout, torch.Tensor, list[int]]], limit: int
) -> tuple[common.Rollout, torch.Tensor]:
    """The first `limit` of the given groups of several Rollouts and of their rewards (P, G), as one of each."""
    G, T = parts[0][0].group_size, max(rollout.mask.shape[1] for rollout, _, _ in parts)

    def gather(field: str) -> torch.Tensor:
        rows = [getattr(r, field)[[p * G + g for p in groups for g in range(G)]] for r, _, groups in parts if groups]
        rows = [torch.nn.functional.pad(t, (0, T - t.shape[1])) if t.dim() == 2 else t for t in rows]
        return torch.cat(rows)[: limit * G]

    prompts = [rollout.prompt_ids[p] for rollout, _, groups in parts for p in groups][:limit]
    rewards = torch.cat([rewards[groups] for _, rewards, groups in parts])[:limit]
    return common.Rollout(prompts, *map(gather, ("completion_ids", "mask", "sampler_logprobs", "finished")), G), rewards


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


# ---- The command -----------------------------------------------------------------------------------------------------


@dataclass
class Args:
    output: str
    """write the problems, or the demonstrations, here (.jsonl)"""
    problems: str | None = None
    """"arithmetic", a .jsonl file, or a hub dataset; without it the problems of --samples"""
    split: Literal["train", "eval", "all"] = "train"
    """which part of --problems; all: both, but never a hub dataset's test or validation split"""
    samples: str | None = None
    """samples file (evaluate.py --output): gives pass rates, and completions for --make"""
    min_pass_rate: float | None = None
    """with --samples: of the kept problems, at least; 0 and --max-pass-rate 0: only those that failed every time.
    Without it 0.01, and 0 for demonstrations"""
    max_pass_rate: float | None = None
    """with --samples: of the kept problems, at most. Without it 0.99, and 1 for demonstrations"""
    label_difficulty: bool = False
    """with --samples: difficulty = 1 - pass rate, for --problem-sampling curriculum"""
    guesses: str | None = None
    """samples file made without reasoning (evaluate.py --modes no_think): what is right there is dropped"""
    exclude_multiple_choice: bool = False
    """drop multiple-choice and true/false questions"""
    remove_duplicates: bool = False
    """keep one of equal and of nearly equal questions"""
    near_duplicate: float = 0.8
    """with --remove-duplicates: share of common word triples from which on two questions count as one"""
    decontaminate: str | None = None
    """problems (a source like --problems; its eval split, or a whole file) that must not be trained on"""
    ngram: int = 13
    """with --decontaminate: so many words in a row must not be shared"""
    balance_topics: bool = False
    """as many problems of every topic as there are of the rarest"""
    make: Literal["problems", "correct", "best", "fusion"] = "problems"
    """problems | demonstrations from --samples, of the problems that are left: all right completions | of each problem
    the best | the right ones in both thinking modes, /think and /no_think"""
    limit: int | None = None
    """at most so many problems, a random choice"""
    seed: int = 0


def main(args: Args) -> None:
    check_flags(args)
    if not args.problems and not args.samples:
        fail("--problems or --samples: one of them is needed")
    if args.make != "problems" and not args.samples:
        fail(f"--make {args.make}: needs --samples")
    low, high = (0.01, 0.99) if args.make == "problems" else (0.0, 1.0)
    low = low if args.min_pass_rate is None else args.min_pass_rate
    high = high if args.max_pass_rate is None else args.max_pass_rate
    if low > high:
        fail(f"--min-pass-rate {low:g}: must be at most --max-pass-rate {high:g}")
    source = args.problems or args.samples
    rows = placed_rows(args.samples) if args.samples else []
    if args.problems:
        problems = load_problems(args.problems, args.split, seed=args.seed)
    else:
        problems = read_problems(rows, args.samples)
    before, dropped, records = len(problems), Counter(), sample_records(rows, args.samples)
    if args.samples:
        rates = pass_rates(records, args.samples, problems)
        problems = keep_pass_rates(problems, rates, low, high, dropped)
        if args.label_difficulty:
            problems = label_difficulty(problems, rates)
    if args.guesses and problems:
        guesses = sample_records(placed_rows(args.guesses), args.guesses)
        problems = drop_lucky_guesses(problems, pass_rates(guesses, args.guesses, problems), dropped)
    if args.exclude_multiple_choice:
        problems = drop_multiple_choice(problems, dropped)
    if args.remove_duplicates:
        problems = drop_duplicates(problems, args.near_duplicate, dropped)
    if args.decontaminate:
        held_out = load_problems(args.decontaminate, "all" if is_file(args.decontaminate) else "eval")
        problems = decontaminate(problems, held_out, args.ngram, dropped)
    if args.balance_topics and problems:
        problems = balance(problems, "--balance-topics", source, args.seed, dropped)
    if args.limit and args.limit < len(problems):
        dropped["over --limit"] = len(problems) - args.limit
        problems = random.Random(f"limit {args.seed}").sample(problems, args.limit)
    print(f"{source}: {len(problems)} of {before} problems kept; dropped: {listed(dropped)}")
    if not problems:
        fail(f"{args.output} is not written: the filters leave nothing")
    rows = [asdict(problem) for problem in problems]
    if args.make != "problems":
        kept = {problem.question for problem in problems}
        records = [record for record in records if record["question"] in kept]
        if args.make == "fusion":
            pairs = fuse_modes(records)
        else:
            pairs = demonstrations_from(records, args.make)
        if not pairs:
            fail(f"{args.output} is not written: no completion is right and finished")
        rows = [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]
        print(f"{len(rows)} demonstrations ({args.make})")
    write_jsonl(args.output, rows)


def write_jsonl(path: str, rows: list[dict]) -> None:
    """Written aside and renamed, so that what was there stays whole until the new one is."""
    aside = Path(path + ".tmp")
    try:
        aside.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        os.replace(aside, path)
    except OSError as error:
        fail(f"{path}: can't be written ({error.strerror})")


if __name__ == "__main__":
    main(tyro.cli(Args))
