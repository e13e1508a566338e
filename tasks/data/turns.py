"""Turns: one row's list of messages as it was found, made the canonical one, or the reason why it cannot be.

Calls of tools become text in the Hermes convention (tags as in github.com/NousResearch/Hermes-Function-Calling), which
every chat template can carry: what may be called is told in the system turn, a call is an answer, its result a user
turn. Text is otherwise taken exactly as it stands. Which keys of a row hold its turns is decided in formats.py.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Message = dict[str, str]

ROLES = {
    # usr and sys are CrossWOZ's, where the system answers; client and counselor SMILE's.
    **dict.fromkeys(("user", "human", "prompter", "usr", "client"), "user"),
    **dict.fromkeys(
        ("assistant", "gpt", "chatgpt", "bard", "bing", "claude", "model", "bot", "ai", "sys", "counselor"), "assistant"
    ),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("function_call", "tool_call"), "call"),
    **dict.fromkeys(("observation", "tool", "tool_response", "function", "function_response"), "result"),
}
TAGGED_ROLES = {
    "user_tag": "user",
    "assistant_tag": "assistant",
    "system_tag": "system",
    "function_tag": "call",
    "observation_tag": "result",
}
SPEAKERS = {"system": "system", "user": "user", "assistant": "assistant", "call": "assistant", "result": "user"}
ROLE_KEYS = ("role", "from", "speaker")
TEXT_KEYS = ("content", "value", "text")
UTTERANCE_KEYS = ("message", "utterance")
"""Where a turn that names no role has its text (KdConv, NaturalConv): user and assistant then alternate."""
EXCHANGES = (("human", "assistant"), ("user", "assistant"), ("human", "gpt"))
"""Keys of a turn that is a question and its answer in one (MOSS, ShareGPT in Chinese and English)."""
KINDS: dict[type, str] = {
    **dict.fromkeys((int, float), "a number"),
    **{dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"},
}
WEIGHT_KEYS = ("weight", "loss_weight", "loss", "train")
CALL_KEYS = ("tool_calls", "function_call")
RARE_KEYS = frozenset((*WEIGHT_KEYS, *CALL_KEYS))
TRANSCRIPT = re.compile(r"(?:\A|\n)(Human|Assistant): ?")
CJK = r"[\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
UNSEPARATED = re.compile(rf"{CJK}\S|\S{CJK}")
SEPARATED = re.compile(rf"{CJK}|\A\S(?: \S)+\Z")
SPACE_BETWEEN_CHARACTERS = re.compile(r" (?![A-Za-z0-9])|(?<![A-Za-z0-9]) |(?<![A-Za-z0-9]{2}) (?![A-Za-z0-9]{2})")
TOOLS = """You can call the functions below, each described by a JSON schema.
<tools>
%s
</tools>
To call one, answer with its name and its arguments as a JSON object:
<tool_call>
{"name": "...", "arguments": {...}}
</tool_call>
Its result is then given to you between <tool_response> and </tool_response>."""


class BadRow(Exception):
    """A row that cannot be used. `raw` is set where it could not even be parsed."""

    def __init__(self, reason: str, detail: str, raw: str = "") -> None:
        self.reason, self.detail, self.raw = reason, detail, raw
        super().__init__(reason, detail, raw)  # these, so that it can be sent to another process

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


@dataclass(frozen=True)
class TurnKeys:
    """What the keys and the roles of a source's turns are called."""

    role: tuple[str, ...]
    text: tuple[str, ...]
    roles: Mapping[str, str]


def turn_keys(tags: Mapping[str, str]) -> TurnKeys:
    """Return how a source's turns are read: as `tags` says (LLaMA-Factory's names for it), then as is usual."""
    named = {tags[tag]: role for tag, role in TAGGED_ROLES.items() if tag in tags}
    return TurnKeys(
        role=(*filter(None, [tags.get("role_tag")]), *ROLE_KEYS),
        text=(*filter(None, [tags.get("content_tag")]), *TEXT_KEYS),
        roles={**ROLES, **{_plain_name(name): role for name, role in named.items()}, **named},
    )


# --- values -----------------------------------------------------------------------------------------------------------


def text_of(value: Any, field: str, parts: bool = False) -> str:
    """Return `value` if it is text; with `parts`, also a list of text parts as OpenAI has them, joined.

    Raises BadRow, which names the `field`."""
    if type(value) is not str:
        if is_absent(value):
            raise BadRow("null_text", f"{field} is {'null' if value is None else 'NaN'}; expected text.")
        if parts and isinstance(value, list):
            value = "".join(_part(part, field) for part in value)
        if not isinstance(value, str):
            raise BadRow("not_text", f"{field} is {kind_of(value)}; expected text.")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise BadRow("invalid_unicode", f"{field} holds half of a surrogate pair, which is no character.") from None
    return value


def _part(part: Any, field: str) -> str:
    if isinstance(part, dict):
        if part.get("type", "text") != "text":
            raise BadRow("not_text", f"{field} has a part of type {str(part['type'])[:40]!r}; expected text alone.")
        part = first_value(part, ("text", "value"))
    if not isinstance(part, str):
        raise BadRow("not_text", f"{field} has a part that is {kind_of(part)}; expected text.")
    return part


def kind_of(value: Any) -> str:
    """Return what a sentence calls a value of this kind."""
    return KINDS.get(type(value), f"a {type(value).__name__}")


def is_absent(value: Any) -> bool:
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def is_blank(text: str) -> bool:
    return not text or text.isspace()


def first_value(record: Mapping[str, Any], keys: Iterable[str]) -> Any:
    """Return the first value that is not null: Parquet gives every row of a column all the keys that any row has."""
    for key in keys:
        if (value := record.get(key)) is not None:
            return value
    return None


def decoded(value: Any) -> Any:
    """Return the list or object in `value`, which is JSON text where a CSV cell or a tools field holds it, or None."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return None if is_absent(value) or value == "null" else value


# --- turns ------------------------------------------------------------------------------------------------------------


def read_turns(turns: list[Any], keys: TurnKeys) -> list[Message]:
    """Return the messages of a list of turns. Calls that follow each other are one message, and so are results; a call
    right after the assistant's own words belongs to them, as in OpenAI's messages. Raises BadRow."""
    messages: list[Message] = []
    before = ""
    for number, turn in enumerate(_with_roles(turns, keys), 1):
        kind, text = _read_turn(turn, number, keys)
        if (kind == "call" and before in ("call", "assistant")) or kind == before == "result":
            messages[-1]["content"] = "\n".join(filter(None, (messages[-1]["content"], text)))
        else:
            messages.append({"role": SPEAKERS[kind], "content": text})
        before = kind
    return messages


def _with_roles(turns: list[Any], keys: TurnKeys) -> Iterable[Any]:
    """Return the turns, or, where none of them names a role but their shape does, the same with roles."""
    head = turns[0]
    if not isinstance(head, dict) or first_value(head, keys.role) is not None:
        return turns
    if any(isinstance(turn, dict) and first_value(turn, keys.role) is not None for turn in turns):
        return turns
    for key in UTTERANCE_KEYS:
        if key in head:
            return _alternating(turns, key)
    for exchange in EXCHANGES:
        if all(key in head for key in exchange):
            return _exchanges(turns, exchange)
    return turns


def _alternating(turns: list[Any], key: str) -> Iterator[Any]:
    for number, turn in enumerate(turns):
        yield {"role": ("user", "assistant")[number % 2], "content": turn.get(key)} if isinstance(turn, dict) else turn


def _exchanges(turns: list[Any], keys: tuple[str, str]) -> Iterator[Any]:
    for turn in turns:
        if isinstance(turn, dict):
            yield from ({"role": key, "content": turn.get(key)} for key in keys)
        else:
            yield turn


def _plain_name(name: str) -> str:
    return name.strip().lower().replace("-", "_")


def role_of(turn: Mapping[str, Any], keys: TurnKeys) -> str | None:
    """Return who a turn is by: system, user, assistant, `call` or `result`; None where it names no known role."""
    name = first_value(turn, keys.role)
    return (keys.roles.get(name) or keys.roles.get(_plain_name(name))) if isinstance(name, str) else None


def _read_turn(turn: Any, number: int, keys: TurnKeys) -> tuple[str, str]:
    """Return a turn's kind (a role, `call` or `result`) and its text. Raises BadRow."""
    if not isinstance(turn, dict):
        raise BadRow("bad_turn", f"Turn {number} is {kind_of(turn)}; expected a role and a text.")
    name = first_value(turn, keys.role)
    kind = role_of(turn, keys)
    if kind is None:
        named = "names no role" if name is None else f"has the role {str(name)[:40]!r}"
        raise BadRow(
            "unknown_role",
            f"Turn {number} {named}; expected system, user (human) or assistant (gpt), or a name that data.sources "
            "tags gives.",
        )
    value = first_value(turn, keys.text)
    if kind in ("assistant", "call") and not RARE_KEYS.isdisjoint(turn):
        if any(turn.get(key) == 0 for key in WEIGHT_KEYS):
            raise BadRow("unweighted_turn", f"Turn {number} is not to be learned (weight 0), which is not supported.")
        if calls := first_value({key: turn.get(key) or None for key in CALL_KEYS}, CALL_KEYS):
            said = "" if is_absent(value) else text_of(value, f"turn {number} ({name})", parts=True)
            return "call", "\n".join(filter(None, (said, _calls_text(calls, number))))
    if type(value) is str and value.isascii() and kind in ("user", "assistant", "system"):
        return kind, value
    if kind == "call":
        return kind, _calls_text(value, number)
    if kind == "result":
        return kind, _result_text(value, number)
    return kind, text_of(value, f"turn {number} ({name})", parts=True)


def check_turns(turns: list[Message], max_turns: int | None = None) -> tuple[list[Message], tuple[str, ...]]:
    """Return the turns fit for training, at most the first `max_turns` besides the system turn, and what was mended.

    Raises BadRow where they are empty or out of order."""
    if turns and turns[0]["role"] == "system" and is_blank(turns[0]["content"]):
        turns = turns[1:]
    start = 1 if turns and turns[0]["role"] == "system" else 0
    repaired: tuple[str, ...] = ()
    if max_turns and len(turns) - start > max_turns:
        turns, repaired = turns[: start + max_turns], ("max_turns",)
    end = len(turns)
    while end and turns[end - 1]["role"] == "user":  # nobody answered it: it teaches nothing, the turns before it do
        end -= 1
    if end < len(turns):
        turns, repaired = turns[:end], repaired or ("trailing_user_turn",)
    if len(turns) == start:
        raise BadRow("no_assistant_turn", "There is no assistant turn, so there is nothing to learn.")
    expected, following = "user", "assistant"
    for number, turn in enumerate(turns[start:], start + 1):
        if turn["role"] != expected:
            raise BadRow(
                "roles_out_of_order",
                f"Turn {number} is {turn['role']}; expected {expected}: user and assistant must alternate, beginning "
                "with user after an optional system turn.",
            )
        if is_blank(turn["content"]):
            reason = "empty_answer" if expected == "assistant" else "empty_prompt"
            raise BadRow(reason, f"Turn {number} ({expected}) is empty.")
        expected, following = following, expected
    return turns, repaired


# --- conversations written as text ------------------------------------------------------------------------------------


def read_transcript(text: str) -> list[Message]:
    """Return the turns of a conversation written out with `Human:` and `Assistant:` before each (BELLE, HH-RLHF), or
    none where the text is not one."""
    lead, *parts = TRANSCRIPT.split(text)
    return (
        []
        if not is_blank(lead)
        else [
            {"role": ROLES[name.lower()], "content": content.strip("\n")}
            for name, content in zip(parts[::2], parts[1::2], strict=True)
        ]
    )


def unspaced(utterance: str) -> str:
    """Return an utterance without the spaces that LCCC puts between all characters; those between words of Latin
    letters stay, and so does everything in an utterance whose characters are not so separated."""
    if utterance[1::2] == " " * (len(utterance) // 2):  # the usual case: all are characters, or there is but one
        return utterance[::2]
    if " " not in utterance or UNSEPARATED.search(utterance) or not SEPARATED.search(utterance):
        return utterance
    return SPACE_BETWEEN_CHARACTERS.sub("", utterance)


# --- tools ------------------------------------------------------------------------------------------------------------


def with_system(turns: list[Message], system: str) -> list[Message]:
    """Return the turns with this system turn first, unless they begin with the same one."""
    message = {"role": "system", "content": system}
    return turns if turns[:1] == [message] else [message, *turns]


def with_tools(turns: list[Message], tools: Any) -> list[Message]:
    """Return the turns with `tools` (schemas, or their JSON) told in the system turn, unless it tells them already.

    Raises BadRow."""
    has_system = bool(turns) and turns[0]["role"] == "system"
    system = turns[0]["content"] if has_system else ""
    if "<tools>" in system:
        return turns
    told = TOOLS % "\n".join(_schema(tool) for tool in (tools if isinstance(tools, list) else [tools]))
    text = told if is_blank(system) else f"{system}\n\n{told}"
    return [{"role": "system", "content": text_of(text, "tools")}, *turns[has_system:]]


def _schema(tool: Any) -> str:
    """Return one tool as OpenAI describes it, which is also what chat templates write: some data sets have the bare
    function."""
    tool = decoded(tool)
    if isinstance(tool, dict) and isinstance(tool.get("name"), str):
        tool = {"type": "function", "function": tool}
    function = tool.get("function") if isinstance(tool, dict) else None
    try:
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise TypeError
        return _json(tool)
    except (TypeError, ValueError, RecursionError):
        raise BadRow("bad_tools", "tools has one that is no JSON schema of a function with a name.") from None


def _calls_text(calls: Any, number: int) -> str:
    if isinstance(calls, str) and "<tool_call>" in calls:
        return text_of(calls, f"turn {number}")
    try:
        found = json.loads(calls) if isinstance(calls, str) else calls
        found = found if isinstance(found, list) else [found]
        text = "\n".join(f"<tool_call>\n{_call(call)}\n</tool_call>" for call in found)
        if not text:
            raise TypeError
    except (TypeError, ValueError, RecursionError):
        raise BadRow(
            "bad_tool_call", f"Turn {number} calls a tool, but is no JSON object of its name and its arguments."
        ) from None
    return text_of(text, f"turn {number}")


def _call(call: Any) -> str:
    if isinstance(call, dict) and isinstance(call.get("function"), dict):
        call = call["function"]
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        raise TypeError
    arguments = call.get("arguments")
    if isinstance(arguments, str):  # OpenAI keeps them as the model wrote them
        arguments = json.loads(arguments or "{}")
    if arguments is not None and not isinstance(arguments, dict):
        raise TypeError
    return _json({"name": call["name"], "arguments": arguments or {}})


def _result_text(value: Any, number: int) -> str:
    if isinstance(value, dict):
        try:
            value = _json(value)
        except (TypeError, ValueError, RecursionError):
            raise BadRow("not_text", f"Turn {number} has a result that cannot be written as JSON.") from None
    text = text_of(value, f"turn {number}", parts=True)
    return text if "<tool_response>" in text else f"<tool_response>\n{text}\n</tool_response>"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
