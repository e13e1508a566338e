"""Chat formats: the messages that a row of Alpaca, ShareGPT, OpenAI or prompt/response data holds, or why it has none.

A row's text is taken exactly as it stands. Cleaning, filling in and guessing are deliberately not done here: what does
not fit is refused with a reason, so that it can be counted.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from tasks.core.digest import canonical_json, sha256
from tasks.core.errors import DataError

Message = dict[str, str]

EXCERPT_CHARS = 200
KNOWN_FORMATS = (
    "alpaca (instruction, input, output), sharegpt (conversations of from and value), messages (messages of role and "
    "content, or a bare list of them), pairs (prompt and response, or question and answer)"
)
ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bard", "bing", "claude", "model", "bot", "ai"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("function_call", "observation", "tool", "tool_call", "tool_response", "function"), "tool"),
}
TURN_LISTS = ("messages", "conversations", "conversation")
ROLE_KEYS = ("role", "from", "speaker")
TEXT_KEYS = ("content", "value", "text")
PAIRS = (("prompt", "response"), ("prompt", "completion"), ("question", "answer"), ("query", "response"))
ANSWER_KEYS = ("output", "response")
INPUT_KEYS = ("input", "context")


@dataclass(frozen=True)
class Row:
    """One usable conversation: an optional system turn, then user and assistant in turn, the assistant last."""

    messages: list[Message]
    source: str
    """File name (inside its folder, where the source is one) or Hub id; never an absolute path."""
    line: int
    """Line the row starts on; for arrays, Parquet and the Hub the number of the row. Counts from 1."""
    digest: str
    format: str
    repaired: str | None = None
    """What was mended to make the row usable: `trailing_user_turn` was cut."""


@dataclass(frozen=True)
class Rejected:
    """One row that cannot be trained on: `reason` is what it is counted under, `detail` a sentence."""

    source: str
    line: int
    reason: str
    detail: str
    raw: str
    """The row's first 200 characters."""


class BadRow(Exception):
    """A row that cannot be used. `raw` is set where it could not even be parsed."""

    def __init__(self, reason: str, detail: str, raw: str = "") -> None:
        self.reason, self.detail, self.raw = reason, detail, raw
        super().__init__(f"{reason}: {detail}")


def excerpt(value: Any) -> str:
    """Return the start of a row as printable text of at most 200 characters."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text[:EXCERPT_CHARS].encode("utf-8", "backslashreplace").decode()[:EXCERPT_CHARS]


def conversation_digest(messages: list[Message]) -> str:
    """Return the sha256 of a conversation's canonical JSON: equal for equal messages, whatever file they came from."""
    return sha256(canonical_json(messages))


def detect_format(records: list[Any], named: str, where: str) -> str:
    """Return the format most of a file's first `records` are in; `named` (unless auto) must be among those found.

    Raises DataError with the keys found where no format fits, and where the rows are preference pairs."""
    votes = Counter(filter(None, map(_format_of, records)))
    if votes["preference"] * 2 > sum(votes.values()):
        raise DataError(
            f"{where}: these are preference pairs (a chosen and a rejected answer), which supervised fine-tuning "
            "cannot use. Expected one answer per row: keep the chosen one, as output or as the last assistant message."
        )
    del votes["preference"]
    if not votes:
        raise DataError(
            f"{where}: the format cannot be told from the first {_rows(len(records))}: found {_keys(records)}. "
            f"Expected one of: {KNOWN_FORMATS}. Rename the fields to one of these."
        )
    if named == "auto":
        return votes.most_common(1)[0][0]
    if not votes[named] and {named, *votes} != {"sharegpt", "messages"}:  # those two are read alike
        raise DataError(
            f"{where}: format: {named} was named, but the first {_rows(len(records))} look like "
            f"{votes.most_common(1)[0][0]}: found {_keys(records)}. Correct data.sources format, or leave it out."
        )
    return named


def _format_of(record: Any) -> str | None:
    if isinstance(record, list):
        return "messages" if is_bare_conversation(record) else None
    if not isinstance(record, dict):
        return None
    if "chosen" in record and "rejected" in record:
        return "preference"
    if key := _turn_list(record):
        turns = _decoded(record[key])
        if not turns:  # null or empty: the key alone has to tell
            return "messages" if key == "messages" else "sharegpt"
        if not is_bare_conversation(turns):
            return None
        return "sharegpt" if "from" in turns[0] or "value" in turns[0] else "messages"
    if "instruction" in record:
        answer = _first(record, ANSWER_KEYS)
        if isinstance(answer, list) and len(answer) >= 2:  # OASST ranks up to five
            return "preference"
        return "alpaca" if any(key in record for key in ANSWER_KEYS) else None
    return "pairs" if any(prompt in record and answer in record for prompt, answer in PAIRS) else None


def _turn_list(record: dict[str, Any]) -> str | None:
    """Return the key a row keeps its turns under, one with a value where there are several."""
    present = [key for key in TURN_LISTS if key in record]
    return next((key for key in present if record[key] is not None), present[0] if present else None)


def is_bare_conversation(value: Any) -> bool:
    """Return whether `value` is a list of messages, each naming a role."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(turn, dict) and any(key in turn for key in ROLE_KEYS) for turn in value)
    )


def _keys(records: list[Any]) -> str:
    keys = list(dict.fromkeys(str(key) for record in records if isinstance(record, dict) for key in record))
    if keys:
        return f"the keys {', '.join(key[:40] for key in keys[:12])}{', …' if len(keys) > 12 else ''}"
    inner = {type(item).__name__ for record in records if isinstance(record, list) for item in record}
    kinds = sorted({type(record).__name__ for record in records})
    of = f" of {', '.join(sorted(inner))}" if inner else ""
    return f"rows that are a {' or '.join(kinds)}{of}"


def _rows(count: int) -> str:
    return "row" if count == 1 else f"{count} rows"


def to_row(record: Any, format_: str, source: str, line: int) -> Row | Rejected:
    """Return what one record of a file in `format_` holds. `record` may be a BadRow met while parsing."""
    try:
        if isinstance(record, BadRow):
            raise record
        turns, repaired = _checked(_turns(record, format_))
    except BadRow as bad:
        return Rejected(source, line, bad.reason, bad.detail, bad.raw or excerpt(record))
    return Row(turns, source, line, conversation_digest(turns), format_, repaired)


def _turns(record: Any, format_: str) -> list[Message]:
    found = _format_of(record)
    if found == "preference":
        raise BadRow("preference_pair", "The row has a chosen and a rejected answer; expected one answer.")
    key = _turn_list(record) if isinstance(record, dict) else None
    has_turns = key is not None or found == "messages"
    if has_turns != (format_ in ("sharegpt", "messages")) or (not has_turns and found != format_):
        is_ = f", which is {found}" if found else ""
        raise BadRow("wrong_format", f"Expected the file's own format, {format_}; found {_keys([record])}{is_}.")
    if isinstance(record, dict) and _decoded(record.get("tools")):
        raise BadRow("tool_calls", "The row declares tools; training on tool calls is not supported yet.")
    if format_ == "alpaca":
        return _alpaca_turns(record)
    if format_ == "pairs":
        prompt, answer = next(pair for pair in PAIRS if pair[0] in record and pair[1] in record)
        return _conversation(record, [(record[prompt], prompt)], (record[answer], answer))
    turns = _decoded(record[key]) if key is not None else record
    if not turns:
        raise BadRow("no_assistant_turn", "The conversation is empty; expected a user and an assistant turn.")
    if not isinstance(turns, list):
        raise BadRow("bad_turn", f"{key} is a {type(turns).__name__}; expected a list of turns.")
    system = _system(record) if isinstance(record, dict) else []
    return [*system, *(_message(turn, number) for number, turn in enumerate(turns, 1))]


def _alpaca_turns(record: dict[str, Any]) -> list[Message]:
    answer_key = next(key for key in ANSWER_KEYS if key in record)
    input_key = next((key for key in INPUT_KEYS if key in record), "input")
    parts = [(record["instruction"], "instruction")]
    if not _absent(record.get(input_key)):
        parts.append((record[input_key], input_key))
    turns = _conversation(record, parts, (record[answer_key], answer_key))
    history = _decoded(record.get("history"))
    if not history:
        return turns
    if not isinstance(history, list) or any(not isinstance(pair, list) or len(pair) != 2 for pair in history):
        raise BadRow("bad_history", "history must be a list of [user, assistant] pairs.")
    earlier = [
        {"role": role, "content": _text(text, f"history, pair {number}")}
        for number, pair in enumerate(history, 1)
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    return [*turns[:-2], *earlier, *turns[-2:]]


def _conversation(record: dict[str, Any], prompt: list[tuple[Any, str]], answer: tuple[Any, str]) -> list[Message]:
    """Return the one-turn conversation of these (text, field) parts; prompt parts are joined by a line break, as
    LLaMA-Factory joins instruction and input."""
    texts = [_text(text, field) for text, field in prompt]
    return [
        *_system(record),
        {"role": "user", "content": "\n".join(text for text in texts if text.strip())},
        {"role": "assistant", "content": _text(*answer)},
    ]


def _system(record: dict[str, Any]) -> list[Message]:
    system = record.get("system")
    return [] if _absent(system) else [{"role": "system", "content": _text(system, "system")}]


def _message(turn: Any, number: int) -> Message:
    if not isinstance(turn, dict):
        raise BadRow("bad_turn", f"Turn {number} is a {type(turn).__name__}; expected a role and a text.")
    name = _first(turn, ROLE_KEYS)
    role = ROLES.get(name.strip().lower().replace("-", "_")) if isinstance(name, str) else None
    if role is None:
        named = "names no role" if name is None else f"has the role {str(name)[:40]!r}"
        raise BadRow("unknown_role", f"Turn {number} {named}; expected system, user (human) or assistant (gpt).")
    if role == "tool" or turn.get("tool_calls") or turn.get("function_call"):
        raise BadRow("tool_calls", f"Turn {number} ({name}) calls a tool; training on tool calls is not supported yet.")
    if role == "assistant" and 0 in (turn.get("weight"), turn.get("loss_weight")):
        raise BadRow("unweighted_turn", f"Turn {number} asks not to be learned (weight 0), which is not supported yet.")
    return {"role": role, "content": _text(_first(turn, TEXT_KEYS), f"turn {number} ({name})", parts=True)}


def _checked(turns: list[Message]) -> tuple[list[Message], str | None]:
    """Return the turns fit for training, and what was mended. Raises BadRow where they are empty or out of order."""
    if turns[0]["role"] == "system" and not turns[0]["content"].strip():
        turns = turns[1:]
    if not any(turn["role"] == "assistant" for turn in turns):
        raise BadRow("no_assistant_turn", "There is no assistant turn, so there is nothing to learn.")
    repaired = None
    while turns[-1]["role"] == "user":  # nobody answered it: it teaches nothing, the turns before it do
        turns, repaired = turns[:-1], "trailing_user_turn"
    start = 1 if turns[0]["role"] == "system" else 0
    for number, turn in enumerate(turns[start:]):
        expected = ("user", "assistant")[number % 2]
        if turn["role"] != expected:
            raise BadRow(
                "roles_out_of_order",
                f"Turn {start + number + 1} is {turn['role']}; expected {expected}: user and assistant must alternate, "
                "beginning with user after an optional system turn.",
            )
        if not turn["content"].strip():
            reason = "empty_answer" if expected == "assistant" else "empty_prompt"
            raise BadRow(reason, f"Turn {start + number + 1} ({expected}) is empty.")
    return turns, repaired


def _text(value: Any, field: str, parts: bool = False) -> str:
    """Return `value` if it is text; with `parts`, also a list of text parts as OpenAI has them, joined."""
    if _absent(value):
        if isinstance(value, str):
            return value
        raise BadRow("null_text", f"{field} is {'null' if value is None else 'NaN'}; expected text.")
    if parts and isinstance(value, list):
        value = "".join(_part(part, field) for part in value)
    if not isinstance(value, str):
        raise BadRow("not_text", f"{field} is a {type(value).__name__}; expected text.")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadRow("invalid_unicode", f"{field} holds half of a surrogate pair, which is not a character.") from None
    return value


def _part(part: Any, field: str) -> str:
    if isinstance(part, dict):
        if part.get("type", "text") != "text":
            raise BadRow("not_text", f"{field} has a part of type {str(part['type'])[:40]!r}; expected text alone.")
        part = _first(part, ("text", "value"))
    if not isinstance(part, str):
        raise BadRow("not_text", f"{field} has a part that is a {type(part).__name__}; expected text.")
    return part


def _absent(value: Any) -> bool:
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def _first(record: dict[str, Any], keys: Iterable[str]) -> Any:
    """Return the first value that is not null: Parquet gives every row of a column all the keys that any row has."""
    return next((record[key] for key in keys if record.get(key) is not None), None)


def _decoded(value: Any) -> Any:
    """Return the list in `value`, which is JSON text where a CSV cell or a tools field holds it."""
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return None if _absent(value) or value == "null" else value
