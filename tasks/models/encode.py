"""Conversations to token ids with the learned ones marked, many at a time, and back from disk.

A chat template is a Jinja program, which costs more to run than the tokenizer. Most only put fixed text around what a
turn says: that text is found once, by rendering a few marked conversations, and then joined directly. Conversations
that a template may treat in a way of its own (they hold a string the template mentions) are still rendered by it.
Byte-level tokenizers are run by their fast twin (byte_level.py).
"""

import itertools
import pickle
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks.models.byte_level import FastTokenizer, Spans, prove_fast
from tasks.models.template import Example, Message, encode_conversation, render

MARKS = tuple(f"\n\tturn {letter}{letter} says\t\n" for letter in "qwxz")
LITERAL = re.compile(r"""'((?:[^'\\]|\\.){3,})'|"((?:[^"\\]|\\.){3,})\"""")


@dataclass(frozen=True)
class TurnText:
    """What a template writes around turns: `start` before the first question, `system` before and after a system turn,
    `answer` between a question and its answer (its last `own` characters are the assistant's), `end` after the last
    answer, `again` from an answer to a question.
    `strips` has, for system, user and assistant, whether white space before and after what they say is cut."""

    start: str
    system: tuple[str, str] | None
    answer: str
    own: int
    end: str
    again: str
    strips: dict[str, tuple[bool, bool]]
    literals: tuple[str, ...]
    """Strings the template mentions: who says one of these is rendered by the template itself."""

    def join(self, messages: list[Message]) -> tuple[str, Spans] | None:
        """Return the conversation's text and where in it the answers are, or None where the template has to say."""
        says = [self._stripped(m) for m in messages]
        whole = "\n".join(says)
        if any(literal in whole for literal in self.literals):
            return None
        has_system = messages[0]["role"] == "system"
        if has_system and (self.system is None or len(says) < 3):
            return None
        parts = [self.system[0], says[0], self.system[1]] if has_system and self.system else [self.start]
        spans = []
        length = sum(map(len, parts))
        turns = says[1:] if has_system else says
        for number in range(0, len(turns) - 1, 2):
            question = (self.again[len(self.end) :] if number else "") + turns[number] + self.answer
            begin = length + len(question) - self.own
            length += len(question) + len(turns[number + 1]) + len(self.end)
            spans.append((begin, length))
            parts += [question, turns[number + 1], self.end]
        return "".join(parts), spans

    def _stripped(self, message: Message) -> str:
        text = message["content"]
        before, after = self.strips[message["role"]]
        return text.strip() if before and after else text.lstrip() if before else text.rstrip() if after else text


def read_template(tokenizer: Any) -> TurnText | None:
    """Return the text that the tokenizer's chat template writes around turns, or None where it is not as simple."""
    user, assistant, system, again = MARKS
    first = [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    second = [{"role": "user", "content": again}, {"role": "assistant", "content": system}]
    one = _split(render(tokenizer, first), [user, assistant])
    two = _split(render(tokenizer, [*first, *second]), [user, assistant, again, system])
    if one is None or two is None:
        return None
    (start, answer, end), strips = one
    again_text = two[0][2]
    if two[0] != [start, answer, again_text, answer, end] or not again_text.startswith(end):
        return None
    asked = start + _said(user, strips[0])
    prompt = render(tokenizer, first[:1], answer_next=True)
    if not prompt.startswith(asked) or not answer.startswith(prompt[len(asked) :]):
        return None
    found = {"user": strips[0], "assistant": strips[1], "system": (False, False)}
    around_system = None
    try:
        told = _split(render(tokenizer, [{"role": "system", "content": system}, *first]), [system, user, assistant])
    except Exception as error:  # the template's own refusal of system turns, as tasks.models.template words it
        if type(error).__name__ != "ModelError":
            raise
        told = None
    if told is not None and told[0][2:] == [answer, end] and told[1][1:] == strips:
        around_system = (told[0][0], told[0][1])
        found["system"] = told[1][0]
    names = {"role", "content", "messages", "system", "user", "assistant"}
    quoted = {a or b for a, b in LITERAL.findall(str(tokenizer.chat_template))} - names
    texts = {text.encode("ascii", "ignore").decode("unicode_escape").strip() for text in quoted}
    own = len(asked) + len(answer) - len(prompt)
    literals = tuple(sorted(text for text in texts if len(text) > 2))
    return TurnText(start, around_system, answer, own, end, again_text, found, literals)


def _split(text: str, marks: list[str]) -> tuple[list[str], list[tuple[bool, bool]]] | None:
    """Return what is around the marks in `text`, and of each mark whether white space before and after it is gone."""
    pieces, strips = [], []
    for mark in marks:
        core = mark.strip()
        before, found, text = text.partition(core)
        if not found or core in text:
            return None
        kept = before.endswith("\n\t"), text.startswith("\t\n")
        pieces.append(before.removesuffix("\n\t") if kept[0] else before)
        text = text.removeprefix("\t\n") if kept[1] else text
        strips.append((not kept[0], not kept[1]))
    return [*pieces, text], strips


def _said(mark: str, strips: tuple[bool, bool]) -> str:
    return ("" if strips[0] else "\n\t") + mark.strip() + ("" if strips[1] else "\t\n")


@dataclass
class Examples:
    """Token sequences end to end. Sequence i is ids[starts[i]:starts[i + 1]]; `spans` (n, 3) are the learned stretches:
    sequence, first and past-the-last token in it; `rows` is which row each sequence came from, `lines` the line of its
    source, `times` how often it is seen in an epoch."""

    ids: NDArray[np.uint32]
    starts: NDArray[np.int64]
    spans: NDArray[np.int64]
    rows: NDArray[np.int64]
    lines: NDArray[np.int64]
    times: NDArray[np.int32]

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.diff(self.starts)

    @property
    def supervised_lengths(self) -> NDArray[np.int64]:
        return np.bincount(self.spans[:, 0], self.spans[:, 2] - self.spans[:, 1], len(self)).astype(np.int64)

    @property
    def supervised_tokens(self) -> int:
        return int((self.spans[:, 2] - self.spans[:, 1]).sum())

    def __len__(self) -> int:
        return len(self.starts) - 1

    def example(self, i: int) -> Example:
        """Return sequence i by itself."""
        ids = self.ids[self.starts[i] : self.starts[i + 1]].tolist()
        supervised = [False] * len(ids)
        for _, first, last in self.spans[slice(*np.searchsorted(self.spans[:, 0], [i, i + 1]))].tolist():
            supervised[first:last] = [True] * (last - first)
        return Example(ids, supervised)

    def only(self, which: NDArray[np.bool_]) -> "Examples":
        """Return the marked sequences alone."""
        if which.all():
            return self
        ids = self.ids[np.repeat(which, self.lengths)]
        starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.lengths[which])])
        spans = self.spans[which[self.spans[:, 0]]]
        spans = np.column_stack([(np.cumsum(which) - 1)[spans[:, 0]], spans[:, 1:]])
        return Examples(ids, starts, spans, self.rows[which], self.lines[which], self.times[which])


class Encoder:
    """Encodes conversations by a tokenizer in transformers' format, and can be sent to another process, where that
    library is imported only for rows that the template must render. Threads of the tokenizer use every core, unless
    the environment's TOKENIZERS_PARALLELISM says otherwise."""

    def __init__(self, tokenizer: Any, sample: list[list[Message]] | None = None) -> None:
        """The fast twin is used if it gives the tokenizer's own ids on `sample` too."""
        self.tokenizer = tokenizer
        self.text = read_template(tokenizer)
        special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
        talk = [{"role": "user", "content": MARKS[0]}, {"role": "assistant", "content": MARKS[1]}]
        end = render(tokenizer, talk).rpartition(MARKS[1].strip())[2]
        ids = [i for i in tokenizer(end, add_special_tokens=False)["input_ids"] if i in special]
        self.eos_id = tokenizer.eos_token_id
        self.end_ids = np.array(ids or [self.eos_id], np.uint32)
        """The special tokens the template ends an answer with; the tokenizer's own end where it uses none."""
        texts = [found[0] for messages in sample or [] if (found := self._joined(messages))]
        self.fast = prove_fast(self.backend, texts)

    def __getstate__(self) -> dict[str, Any]:
        left_out = ("tokenizer", "backend", "fast")
        kept = {name: value for name, value in vars(self).items() if name not in left_out}
        packed = {"_packed": pickle.dumps(self.tokenizer), "_settings": self.backend.to_str()}
        return {**kept, **packed, "_has_fast": self.fast is not None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.fast = FastTokenizer(state["_settings"]) if state["_has_fast"] else None

    @cached_property
    def tokenizer(self) -> Any:
        return pickle.loads(vars(self)["_packed"])  # our own: __getstate__ made it

    @cached_property
    def backend(self) -> Any:
        """The tokenizer in the library tokenizers' format."""
        if "_settings" not in vars(self):
            return self.tokenizer.backend_tokenizer
        from tokenizers import Tokenizer

        return Tokenizer.from_str(vars(self)["_settings"])

    def pieces(self, example: Example) -> list[tuple[str, bool]]:
        """Return the text of a sequence in stretches that are learned or not."""
        edges = [0, *(np.flatnonzero(np.diff(np.array(example.supervised, np.int8))) + 1).tolist(), len(example.ids)]
        return [
            (self.tokenizer.decode(example.ids[a:b], clean_up_tokenization_spaces=False), example.supervised[a])
            for a, b in itertools.pairwise(edges)
            if b > a
        ]

    def encode(self, rows: list[list[Message]], max_text_tokens: int) -> Examples:
        """Return the rows' token sequences: one each, several where the template needs it or plain text is long."""
        joined = [self._joined(messages) for messages in rows]
        encoded = self._encode_texts([found for found in joined if found is not None])
        ids: list[NDArray[np.uint32]] = [np.empty(0, np.uint32)]
        lengths: list[int] = []
        owners: list[int] = []
        spans: list[tuple[int, int, int]] = []

        def add(row: int, length: int, marked: Spans) -> None:
            spans.extend((len(lengths), first, last) for first, last in marked)
            lengths.append(length)
            owners.append(row)

        for row, found in enumerate(joined):
            if found is None:
                for example in encode_conversation(self.tokenizer, rows[row]):
                    ids.append(np.array(example.ids, np.uint32))
                    add(row, len(example.ids), _stretches(example))
                continue
            tokens, marked = next(encoded)
            ids.append(tokens)
            if rows[row][0]["role"] == "text":
                ids.append(np.array([self.eos_id], np.uint32))
                total = len(tokens) + 1
                for start in range(0, total, max_text_tokens):
                    length = min(max_text_tokens, total - start)
                    add(row, length, [(0, length)])
            else:
                add(row, len(tokens), marked)
        return Examples(
            np.concatenate(ids),
            np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)]),
            np.array(spans, np.int64).reshape(-1, 3),
            np.array(owners, np.int64),
            np.array(owners, np.int64),
            np.ones(len(owners), np.int32),
        )

    def _encode_texts(self, joined: list[tuple[str, Spans]]) -> Iterator[tuple[NDArray[np.uint32], Spans]]:
        """Yield each text's ids, and which tokens its spans of characters are."""
        texts = [text for text, _ in joined]
        found = self.fast.encode(texts, [spans for _, spans in joined]) if self.fast else [None] * len(texts)
        left = iter(
            self.backend.encode_batch(
                [text for text, known in zip(texts, found, strict=True) if known is None], add_special_tokens=False
            )
            if None in found
            else []
        )
        for known, (_, spans) in zip(found, joined, strict=True):
            if known is None:
                encoding = next(left)
                known = np.array(encoding.ids, np.uint32), [_tokens_of(encoding, *span) for span in spans]
            yield known

    def _joined(self, messages: list[Message]) -> tuple[str, Spans] | None:
        if messages[0]["role"] == "text":
            return messages[0]["content"], []
        return self.text.join(messages) if self.text else None


def _tokens_of(encoding: Any, begin: int, end: int) -> tuple[int, int]:
    """Return the tokens that overlap the characters from `begin` to `end`: a token that only overlaps an answer counts
    too, because some tokenizers put a prompt's last space into its first word."""
    first = last = None
    while first is None and begin < end:
        first, begin = encoding.char_to_token(begin), begin + 1
    while last is None and end > 0:
        end, last = end - 1, encoding.char_to_token(end - 1)
    return (first, last + 1) if first is not None and last is not None else (0, 0)


def _stretches(example: Example) -> Spans:
    marked = np.flatnonzero(np.diff(np.array([0, *example.supervised, 0], np.int8)))
    return [(int(a), int(b)) for a, b in marked.reshape(-1, 2)]


def write_examples(parts: Iterable[Examples], path: Path) -> Examples:
    """Write parts as one, `path`.ids (little-endian 32-bit tokens) and `path`.npz (the rest, no pickle); return it.

    Parts are taken one by one, so that the tokens of one alone are in memory."""
    columns: dict[str, list[NDArray[Any]]] = {
        "starts": [np.empty(0, np.int64)],
        "spans": [np.empty((0, 3), np.int64)],
        **{name: [np.empty(0, kind)] for name, kind in (("rows", np.int64), ("lines", np.int64), ("times", np.int32))},
    }
    tokens = sequences = 0
    with path.with_suffix(".ids").open("wb") as file:
        for part in parts:
            part.ids.astype("<u4", copy=False).tofile(file)
            columns["starts"].append(part.starts[:-1] + tokens)
            columns["spans"].append(part.spans + np.array([sequences, 0, 0]))
            for name in ("rows", "lines", "times"):
                columns[name].append(getattr(part, name))
            tokens += len(part.ids)
            sequences += len(part)
    columns["starts"].append(np.array([tokens], np.int64))
    arrays = {name: np.concatenate(columns.pop(name)) for name in list(columns)}
    np.savez(path.with_suffix(".npz"), allow_pickle=False, **arrays)
    return Examples(_map_ids(path, tokens), **arrays)


def read_examples(path: Path) -> Examples:
    """Return what write_examples wrote; the ids stay on disk until they are looked at."""
    with np.load(path.with_suffix(".npz"), allow_pickle=False) as file:
        arrays = {name: file[name] for name in ("starts", "spans", "rows", "lines", "times")}
    return Examples(_map_ids(path, arrays["starts"][-1]), **arrays)


def _map_ids(path: Path, tokens: int) -> NDArray[np.uint32]:
    return np.memmap(path.with_suffix(".ids"), "<u4", "r") if tokens else np.empty(0, np.uint32)


def read_ids(path: Path, start: int, stop: int) -> NDArray[np.uint32]:
    """Return some of the tokens that write_examples wrote, as a copy: pages of a mapped file would count as memory."""
    return np.fromfile(path.with_suffix(".ids"), "<u4", stop - start, offset=4 * start)


def common_start(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Return how many tokens, or characters, two texts share at their start."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((at for at, (one, other) in pairs if one != other), min(len(first), len(second)))
