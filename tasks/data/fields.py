"""Fields: under which keys the rows of one source keep what, from the source's options.

What is found under the keys is not looked at here.
"""

from dataclasses import dataclass, fields
from functools import lru_cache

from tasks.core.config import SourceConfig
from tasks.data.turns import TurnKeys, turn_keys

MEDIA = ("image", "images", "video", "videos", "audio", "audios")


@dataclass(frozen=True)
class Fields:
    """The keys a row may have each thing under, the first that has a value; a column map names one each, or none."""

    prompt: tuple[str, ...] = ("instruction",)
    query: tuple[str, ...] = ("input", "context")
    response: tuple[str, ...] = ("output", "response")
    system: tuple[str, ...] = ("system", "system_prompt")
    history: tuple[str, ...] = ("history",)
    messages: tuple[str, ...] = ("messages", "conversations", "conversation", "dialogue", "dialog")
    tools: tuple[str, ...] = ("tools", "functions")
    text: tuple[str, ...] = ("text",)


@dataclass(frozen=True)
class Reading:
    """How the rows of one source are read."""

    fields: Fields
    mapped: bool
    """Whether a column map gives the fields, so that no other key tells what a row is."""
    keys: TurnKeys
    chosen: bool
    max_turns: int | None
    telling: frozenset[str]
    """Keys that make a row something other than an instruction with its output."""
    framing: frozenset[str]
    """Keys of what stands around the turns: system prompt, tools, pictures."""


def reading_of(source: SourceConfig) -> Reading:
    """Return how the rows of a source are read; equal options give the same object, so it may be asked for each row."""
    columns = tuple(source.columns.items()) if source.columns else ()
    tags = tuple(source.tags.items()) if source.tags else ()
    return _make_reading(columns, tags, source.preference == "chosen", source.max_turns)


@lru_cache(maxsize=64)
def _make_reading(
    columns: tuple[tuple[str, str], ...], tags: tuple[tuple[str, str], ...], chosen: bool, max_turns: int | None
) -> Reading:
    found = _mapped_fields(dict(columns)) if columns else Fields()
    return Reading(
        fields=found,
        mapped=bool(columns),
        keys=turn_keys(dict(tags)),
        chosen=chosen,
        max_turns=max_turns,
        telling=frozenset((*found.messages, "chosen", "instances")),
        framing=frozenset((*MEDIA, *found.system, *found.tools)),
    )


def _mapped_fields(columns: dict[str, str]) -> Fields:
    """Return the fields of a column map, which is complete: what it does not name is not read, as in LLaMA-Factory.

    There, a prompt alone is plain text (pre-training), unless the row has a chosen answer."""
    if "prompt" not in columns and "query" in columns:
        columns["prompt"] = columns.pop("query")
    if "prompt" in columns and not columns.keys() & {"response", "messages", "text"}:
        columns["text"] = columns["prompt"]
    columns.setdefault("response", "chosen")
    return Fields(**{field.name: tuple(filter(None, [columns.get(field.name)])) for field in fields(Fields)})
