"""Formats: the conversation that one row of training data holds, whatever shape the row has, or why it has none.

A row's text is taken exactly as it stands, but for the spaces that LCCC puts between characters. Cleaning and guessing
are deliberately not done here: what does not fit is refused with a reason, so that it can be counted. Under which keys
a row may keep what is in fields.py, what its turns mean in turns.py.
"""

import difflib
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

from tasks.core.config import SourceConfig
from tasks.core.digest import canonical_json, sha256
from tasks.core.errors import DataError
from tasks.data.fields import MEDIA, Fields, Reading, reading_of
from tasks.data.turns import (
    ROLE_KEYS,
    BadRow,
    Message,
    check_turns,
    decoded,
    first_value,
    is_absent,
    is_blank,
    kind_of,
    read_transcript,
    read_turns,
    role_of,
    text_of,
    unspaced,
    with_system,
    with_tools,
)

EXCERPT_CHARS = 200
KNOWN_FORMATS = (
    "alpaca (instruction, input, output), sharegpt (conversations of from and value), messages (messages of role and "
    "content, or a bare list of them), pairs (prompt and response, or question and answer), lccc (a list of "
    "utterances), seed_tasks (instruction and instances), text (text)"
)
PAIRS = (
    ("prompt", "response"),
    ("prompt", "completion"),
    ("question", "answer"),
    ("question", "response"),  # OpenOrca
    ("question", "std_answer"),  # BELLE's evaluation set
    ("query", "response"),
    ("input", "output"),
    ("input", "target"),  # Firefly
)
ANSWER_TO = dict(reversed(PAIRS))
ALIKE = {"sharegpt": "messages", "messages": "sharegpt"}  # read by the same code: a file may mix them
UNTRAINABLE = {
    "preference": "preference pairs (a chosen and a rejected answer), which supervised fine-tuning cannot use. "
    "Expected one answer per row: keep the chosen one, as output or as the last assistant message, or set data.sources "
    "preference: chosen.",
    "choices": "evaluation items (options to choose from, or endings to predict), which are no conversations. Evaluate "
    "on them as a task (eval.capabilities), or name the two columns to train on in data.sources columns.",
}
# Keys of evaluation items: a row that has all of one line.
ITEM_KEYS = (
    {"choices"},  # ARC, HellaSwag, BoolQ and OpenBookQA as they are most often written
    {"A", "B", "C", "D"},  # C-Eval, CMMLU
    {"ctx", "endings"},  # HellaSwag
    {"goal", "sol1", "sol2"},  # PIQA
    {"premise", "choice1", "choice2"},  # COPA, XCOPA
    {"sentence", "option1", "option2"},  # WinoGrande
    {"context_options", "continuation"},  # WinoGrande with its options filled in
    {"context", "continuation"},  # LAMBADA
    {"sentence_good", "sentence_bad"},  # BLiMP
    {"question", "mc1_targets"},  # TruthfulQA
    {"Question", "Best Answer", "Incorrect Answers"},  # TruthfulQA's table
)
LETTERS = ("A", "B", "C", "D")
PLACEHOLDER = re.compile(r"\{\{([^{}]+)\}\}")


@dataclass(frozen=True)
class Row:
    """One usable conversation: an optional system turn, then user and assistant in turn, the assistant last; or plain
    text, which is one turn of the role `text`, learned whole."""

    messages: list[Message]
    source: str
    """File name (inside its folder, where the source is one) or Hub id; never an absolute path."""
    line: int
    """Line the row starts on; for arrays, Parquet and the Hub the number of the row. Counts from 1."""
    format: str
    repaired: tuple[str, ...] = ()
    """What was mended to make the row usable, each once: `max_turns` or `trailing_user_turn` was cut, and clean.py's
    steps."""


@dataclass(frozen=True)
class Rejected:
    """One row that cannot be trained on: `reason` is what it is counted under, `detail` a sentence."""

    source: str
    line: int
    reason: str
    detail: str
    raw: str
    """The row's first 200 characters."""


def excerpt(value: Any) -> str:
    """Return the start of a row as printable text of at most 200 characters."""
    try:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    except (TypeError, ValueError, RecursionError):  # keys that are no text; nested more deeply than can be written
        text = f"<{type(value).__name__}>"
    return text[:EXCERPT_CHARS].encode("utf-8", "backslashreplace").decode()[:EXCERPT_CHARS]


def listed(names: Collection[str], most: int = 12) -> str:
    """Return the names found in a file as they can stand in a sentence."""
    shown = [printable(name if len(name) <= 40 else f"{name[:39]}…") for name in islice(names, most)]
    return f"{', '.join(shown)}{f' and {len(names) - most} more' if len(names) > most else ''}"


def printable(text: str) -> str:
    """Return a text as it can stand in one line of any terminal."""
    text = " ".join(text.split())
    return text if text.isprintable() else "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in text)


def conversation_digest(messages: list[Message]) -> str:
    """Return the sha256 of a conversation's canonical JSON: equal for equal messages, whatever file they came from."""
    return sha256(canonical_json(messages))


# --- which format -----------------------------------------------------------------------------------------------------


def detect_format(records: list[Any], named: str, where: str, source: SourceConfig, is_table: bool = False) -> str:
    """Return the format most of a file's first `records` are in; `named` (unless auto) must be among those found.
    `where` is what the messages begin with; a table's keys are what its first row says.

    Raises DataError with the keys found where no format fits, where the source's column map names absent columns, and
    where the rows are preference pairs or multiple-choice items."""
    reading = reading_of(source)
    if reading.mapped:
        _check_columns(records, source.columns, where)
    votes = Counter(filter(None, (_format_of(_answered(record, reading), reading) for record in records)))
    for kind, sentence in UNTRAINABLE.items():
        if votes[kind] * 2 > votes.total():
            raise DataError(f"{where}: these are {sentence}")
        del votes[kind]
    if not votes:
        header = " The first row of a table must hold the names of its columns." if is_table else ""
        raise DataError(
            f"{where}: the format cannot be told from the first {_rows(len(records))}: found {_keys(records)}. "
            f"Expected one of: {KNOWN_FORMATS}. Rename the fields to these, or name them in data.sources columns."
            f"{header}"
        )
    likeliest = votes.most_common(1)[0][0]
    if named == "auto" or (named == "pairs" and reading.mapped):  # a mapped pair is read as alpaca
        return likeliest
    if named not in votes and ALIKE.get(named) not in votes:
        raise DataError(
            f"{where}: format: {named} was named, but by the first {_rows(len(records))} it is {likeliest}: found "
            f"{_keys(records)}. Correct data.sources format, or leave it out."
        )
    return named


def _check_columns(records: list[Any], columns: Mapping[Any, str], where: str) -> None:
    present = list(dict.fromkeys(str(key) for record in records if isinstance(record, dict) for key in record))
    absent = [name for name in columns.values() if name not in present]
    if absent:
        near = [match for name in absent for match in difflib.get_close_matches(name, present, 1)]
        meant = f" Did you mean {' or '.join(near)}?" if near else ""
        raise DataError(
            f"{where}: data.sources columns names {', '.join(absent)}, absent from the first {_rows(len(records))}: "
            f"found {_keys(records)}.{meant} Correct columns, or leave it out."
        )
    if not columns.keys() & {"prompt", "query", "messages", "text"}:
        raise DataError(
            f"{where}: data.sources columns names {', '.join(columns)} alone. Expected also messages, text, or prompt "
            "with response: a map is complete, other columns are not read."
        )


def _format_of(record: Any, reading: Reading) -> str | None:
    """Return the format one row is in, `preference` or `choices` for what cannot be trained on, or None."""
    if isinstance(record, dict):
        if reading.mapped:
            return _mapped_format(record, reading.fields)
        if not reading.telling.isdisjoint(record) and (told := _told_format(record, reading.fields)):
            return told
        if "instruction" in record and ("output" in record or "response" in record):
            return "preference" if _is_ranked(record, reading.fields) else "alpaca"
        return _plain_format(record, reading.fields)
    if isinstance(record, list) and record:
        if isinstance(record[0], str):
            return "lccc"
        if isinstance(record[0], dict) and first_value(record[0], reading.keys.role) is not None:
            return "messages"
    return None


def _mapped_format(record: dict[str, Any], named: Fields) -> str | None:
    if _is_preference(record) or _is_ranked(record, named):
        return "preference"
    if named.messages:
        return _turns_format(record, named.messages[0]) if named.messages[0] in record else None
    if named.text and "chosen" not in record:
        return "text" if named.text[0] in record else None
    return "alpaca" if named.prompt and any(key in record for key in (*named.prompt, *named.response)) else None


def _told_format(record: dict[str, Any], named: Fields) -> str | None:
    if _is_preference(record):
        return "preference"
    key = _turns_key(record, named)
    if key and record[key] is not None and (found := _turns_format(record, key)):
        return found
    return "seed_tasks" if "instances" in record and "instruction" in record else None


def _plain_format(record: dict[str, Any], named: Fields) -> str | None:
    if any(keys <= record.keys() for keys in ITEM_KEYS) or _is_mmlu(record):
        return "choices"
    if _pair_of(record):
        return "pairs"
    if "text" in record:
        return "text"
    key = _turns_key(record, named)
    return _turns_format(record, key) if key else None


def _is_mmlu(record: dict[str, Any]) -> bool:
    """Return whether a row is of MMLU's tables: question, four options and a letter, of which the first row was taken
    for the names of columns."""
    return len(record) == 6 and next(reversed(record)) in LETTERS and next(reversed(record.values())) in LETTERS


def _is_preference(record: dict[str, Any]) -> bool:
    return "chosen" in record and "rejected" in record and (record["chosen"], record["rejected"]) != (None, None)


def _is_ranked(record: dict[str, Any], named: Fields) -> bool:
    """Return whether a row has several answers, the best first, as OASST's reward data has up to five."""
    answers = first_value(record, named.response)
    return isinstance(answers, list) and len(answers) >= 2 and any(key in record for key in named.prompt)


def _turns_key(record: dict[str, Any], named: Fields) -> str | None:
    """Return the key a row keeps its turns under, one with a value where there are several."""
    present = [key for key in named.messages if key in record]
    return next((key for key in present if record[key] is not None), present[0] if present else None)


def _turns_format(record: dict[str, Any], key: str) -> str | None:
    turns = decoded(record[key])
    if isinstance(turns, str):  # a dialogue written out as one text
        return None
    head = turns[0] if isinstance(turns, list) and turns else None
    if isinstance(head, str):
        return "lccc"
    if isinstance(head, dict):
        return "sharegpt" if "from" in head or "value" in head else "messages"
    return "sharegpt" if key == "conversations" else "messages"  # nothing in it: the key alone has to tell


def _pair_of(record: dict[str, Any]) -> tuple[str, str] | None:
    return next((pair for pair in PAIRS if pair[0] in record and pair[1] in record), None)


def is_bare_conversation(value: Any, role_keys: tuple[str, ...] = ROLE_KEYS) -> bool:
    """Return whether `value` is a list of messages, each naming a role."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(turn, dict) and any(key in turn for key in role_keys) for turn in value)
    )


def _keys(records: list[Any]) -> str:
    keys = list(dict.fromkeys(str(key) for record in records if isinstance(record, dict) for key in record))
    if keys:
        return f"the keys {listed(keys)}"
    inner = {kind_of(item) for record in records if isinstance(record, list) for item in record}
    kinds = sorted({kind_of(record) for record in records})
    holding = f" that holds {' or '.join(sorted(inner))}" if inner else ""
    return f"rows that are {' or '.join(kinds)}{holding}"


def _rows(count: int) -> str:
    return "row" if count == 1 else f"{count} rows"


# --- one row ----------------------------------------------------------------------------------------------------------


def to_row(record: Any, format_: str, name: str, line: int, source: SourceConfig) -> Row | Rejected:
    """Return what one record of a file in `format_` holds. `record` may be a BadRow met while parsing."""
    try:
        if isinstance(record, BadRow):
            raise record
        messages, repaired = _conversation(record, format_, reading_of(source))
    except BadRow as bad:
        return Rejected(name, line, bad.reason, bad.detail, bad.raw or excerpt(record))
    return Row(messages, name, line, format_, repaired)


def _conversation(record: Any, format_: str, reading: Reading) -> tuple[list[Message], tuple[str, ...]]:
    if reading.chosen:
        record = _answered(record, reading)
    found = _format_of(record, reading)
    if found == "preference":
        why = "no question to its chosen answer" if reading.chosen else "a chosen and a rejected answer"
        raise BadRow("preference_pair", f"The row has {why}; expected one question and one answer.")
    if found is None or (found != format_ and ALIKE.get(found) != format_):
        is_ = f", which is {found}" if found else ""
        raise BadRow("wrong_format", f"Expected the file's own format, {format_}; found {_keys([record])}{is_}.")
    if found == "text":
        return _plain_text(record, reading.fields), ()
    turns = READERS[found](record, reading)
    if isinstance(record, dict) and not reading.framing.isdisjoint(record):
        turns = _framed(record, turns, reading.fields)
    return check_turns(turns, reading.max_turns)


def _plain_text(record: dict[str, Any], named: Fields) -> list[Message]:
    text = _text_at(record, named.text)
    if is_blank(text):
        raise BadRow("empty_text", f"{named.text[0]} is empty.")
    return [{"role": "text", "content": text}]


def _framed(record: dict[str, Any], turns: list[Message], named: Fields) -> list[Message]:
    """Return the turns with the system prompt and the tools that a row has beside them."""
    if media := [key for key in MEDIA if not is_absent(record.get(key)) and record[key] != []]:
        raise BadRow("not_text", f"The row has {' and '.join(media)}; expected text alone.")
    if not is_absent(first_value(record, named.system)):
        turns = with_system(turns, _text_at(record, named.system))
    tools = decoded(first_value(record, named.tools))
    return with_tools(turns, tools) if tools else turns


def _alpaca(record: dict[str, Any], reading: Reading) -> list[Message]:
    named = reading.fields
    prompt, answer = _prompt_of(record, named), _text_at(record, named.response)
    history = first_value(record, named.history)
    if history is not None:
        return [*_history(history), *_exchange(prompt, answer)]
    if prompt.startswith("Human:") and "history" not in record:  # BELLE's multi-turn chat, up to the last Assistant:
        *earlier, last = read_transcript(prompt)
        if last["role"] == "assistant" and is_blank(last["content"]):
            return [*earlier, {"role": "assistant", "content": answer}]
    return _exchange(prompt, answer)


def _prompt_of(record: dict[str, Any], named: Fields) -> str:
    prompt = _text_at(record, named.prompt)
    return prompt if is_absent(first_value(record, named.query)) else _joined(prompt, _text_at(record, named.query))


def _joined(prompt: str, query: str) -> str:
    """Return instruction and input with a line break between them, as LLaMA-Factory joins them."""
    return prompt if is_blank(query) else query if is_blank(prompt) else f"{prompt}\n{query}"


def _exchange(prompt: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def _history(history: Any) -> list[Message]:
    pairs = decoded(history) or []
    if not isinstance(pairs, list) or any(not isinstance(pair, list) or len(pair) != 2 for pair in pairs):
        raise BadRow("bad_history", "history must be a list of [user, assistant] pairs.")
    texts = [[text_of(text, f"history, pair {number}") for text in pair] for number, pair in enumerate(pairs, 1)]
    return [message for prompt, answer in texts for message in _exchange(prompt, answer)]


def _pair_turns(record: dict[str, Any], reading: Reading) -> list[Message]:
    prompt_key, answer_key = _pair_of(record) or PAIRS[0]
    prompt, answer = record[prompt_key], record[answer_key]
    if is_bare_conversation(prompt):  # as TRL has them: messages, and those that continue them
        return read_turns([*prompt, *_as_turns(answer, reading)], reading.keys)
    return _exchange(text_of(prompt, prompt_key), text_of(answer, answer_key))


def _seed_task(record: dict[str, Any], reading: Reading) -> list[Message]:
    """Return one exchange per instance, each with the instruction, so that a task of several loses none."""
    instances = decoded(record["instances"])
    if not isinstance(instances, list) or not instances or any(not isinstance(item, dict) for item in instances):
        raise BadRow("bad_instances", "instances must be a list of objects with input and output, and not be empty.")
    prompt = text_of(record["instruction"], "instruction")
    turns = []
    for number, item in enumerate(instances, 1):
        query = item.get("input")
        question = prompt if is_absent(query) else _joined(prompt, text_of(query, f"instance {number}, input"))
        turns += _exchange(question, text_of(item.get("output"), f"instance {number}, output"))
    return turns


def _utterances(record: Any, reading: Reading) -> list[Message]:
    utterances = _listed(record, reading)
    if len(utterances) < 2:
        raise BadRow("too_few_turns", "The conversation is one utterance; expected at least two.")
    return [
        {"role": ("assistant", "user")[number % 2], "content": unspaced(text_of(text, f"utterance {number}"))}
        for number, text in enumerate(utterances, 1)
    ]


def _messages(record: Any, reading: Reading) -> list[Message]:
    turns = _listed(record, reading)
    if not turns:
        raise BadRow("no_assistant_turn", "The conversation is empty; expected a user and an assistant turn.")
    if not isinstance(turns, list):
        raise BadRow("bad_turn", f"The conversation is {kind_of(turns)}; expected a list of turns.")
    return read_turns(turns, reading.keys)


def _listed(record: Any, reading: Reading) -> Any:
    key = _turns_key(record, reading.fields) if isinstance(record, dict) else None
    return record if key is None else decoded(record[key])


READERS: Mapping[str, Callable[[Any, Reading], list[Message]]] = {
    "alpaca": _alpaca,
    "pairs": _pair_turns,
    "seed_tasks": _seed_task,
    "lccc": _utterances,
    "messages": _messages,
    "sharegpt": _messages,
}


def _text_at(record: dict[str, Any], keys: tuple[str, ...]) -> str:
    """Return the text under the first key that has a value. Raises BadRow, which names that key."""
    for key in keys:
        if (value := record.get(key)) is not None:
            return text_of(value, key)
    return text_of(None, next((key for key in keys if key in record), keys[0]))


# --- preference pairs -------------------------------------------------------------------------------------------------


def _answered(record: Any, reading: Reading) -> Any:
    """Return a preference row, where its chosen side is asked for, as the plain row that this side alone would be."""
    if not reading.chosen or not isinstance(record, dict):
        return record
    named = reading.fields
    if not _is_preference(record):
        best = first_value(record, named.response)[0] if _is_ranked(record, named) else None
        return record if best is None else {**record, named.response[0]: best}
    rest = {key: value for key, value in record.items() if key not in ("chosen", "rejected")}
    prompt_keys = (*named.messages, *named.prompt, *(() if reading.mapped else ANSWER_TO))
    prompt_key = next((key for key in prompt_keys if rest.get(key) is not None), "")
    answer_key = named.response[0] if prompt_key in named.prompt else ANSWER_TO.get(prompt_key)
    prompt, chosen = rest.get(prompt_key), record["chosen"]
    if (before := _message_list(prompt, reading)) is not None:
        after = _as_turns(chosen, reading)
        shared = before.index(after[0]) if after[0] in before else len(before)  # some repeat the prompt, others do not
        turns = [*before[:shared], *after]
    elif (turns := _message_list(chosen, reading) or []) and isinstance(prompt, str):
        query = first_value(rest, named.query) if prompt_key in named.prompt else None
        asked = {"role": "user", "content": _joined(prompt, query) if isinstance(query, str) else prompt}
        turns = [asked, *turns] if role_of(turns[0], reading.keys) == "assistant" else turns
    elif isinstance(prompt, str) and answer_key:
        return {**rest, answer_key: chosen}
    elif not turns and isinstance(chosen, str):
        turns = read_transcript(chosen)
    return {**rest, named.messages[0]: turns} if turns and named.messages else record


def _message_list(value: Any, reading: Reading) -> list[Any] | None:
    """Return a message, or a list of them, as a list; None for anything else, such as an answer that is text."""
    found = decoded(value)
    found = [found] if isinstance(found, dict) else found
    return found if is_bare_conversation(found, reading.keys.role) else None


def _as_turns(answer: Any, reading: Reading) -> list[Any]:
    turns = _message_list(answer, reading)
    return [{"role": "assistant", "content": answer}] if turns is None else turns


# --- out again --------------------------------------------------------------------------------------------------------


def fill_placeholders(messages: list[Message], fill: dict[str, str]) -> tuple[list[Message], bool]:
    """Return the messages with {{name}} replaced by the value that `fill` has for it, and whether one was. Spaces
    inside the braces do not count; placeholders of other names stay."""
    if not fill or not any("{{" in message["content"] for message in messages):
        return messages, False
    filled = [
        {**message, "content": PLACEHOLDER.sub(lambda found: fill.get(found[1].strip(), found[0]), message["content"])}
        for message in messages
    ]
    return filled, filled != messages


def to_format(messages: list[Message], format_: Literal["messages", "alpaca", "sharegpt"]) -> dict[str, Any]:
    """Return a conversation as a row of `format_`, of which to_row makes the same messages again. Plain text is a row
    of `text` in every format."""
    if messages[0]["role"] == "text":
        return {"text": messages[0]["content"]}
    if format_ == "messages":
        return {"messages": messages}
    if format_ == "sharegpt":
        names = {"system": "system", "user": "human", "assistant": "gpt"}
        return {"conversations": [{"from": names[turn["role"]], "value": turn["content"]} for turn in messages]}
    start = 1 if messages[0]["role"] == "system" else 0
    texts = [message["content"] for message in messages[start:]]
    pairs = [list(pair) for pair in zip(texts[::2], texts[1::2], strict=True)]
    row = {"instruction": pairs[-1][0], "input": "", "output": pairs[-1][1], "history": pairs[:-1]}
    return {**row, "system": messages[0]["content"]} if start else row
