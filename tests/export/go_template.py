"""Go's text/template as far as chat templates over .Messages use it, so that tests can say what Ollama renders. It was
compared with every recorded rendering of such a template; whatever it does not know raises."""

import re
from typing import Any

Node = tuple[str, Any, Any]


def render_go(template: str, messages: list[dict[str, str]]) -> str:
    """Return the prompt for a conversation; as in Ollama, turns of one role in a row are joined first."""
    turns: list[dict[str, str]] = []
    for message in messages:
        if turns and turns[-1]["Role"] == message["role"]:
            turns[-1]["Content"] += "\n\n" + message["content"]
        else:
            turns.append({"Role": message["role"], "Content": message["content"]})
    system = "\n\n".join(m["content"] for m in messages if m["role"] == "system")
    parts = re.split(r"(\{\{.*?\}\})", template, flags=re.S)
    for at in range(1, len(parts), 2):
        if parts[at].startswith("{{- "):
            parts[at - 1] = parts[at - 1].rstrip(" \t\r\n")
        if parts[at].endswith(" -}}"):
            parts[at + 1] = parts[at + 1].lstrip(" \t\r\n")
    nodes, end = _parse(parts)
    assert end is None, f"{end} without a beginning"
    return _run(nodes, {"System": system, "Messages": turns}, {})


def _parse(parts: list[str]) -> tuple[list[Node], str | None]:
    """Consume `parts` up to an end or else; return the nodes and what ended them."""
    nodes: list[Node] = []
    while parts:
        part = parts.pop(0)
        if not part.startswith("{{"):
            nodes.append(("text", part, None))
            continue
        word, _, rest = re.sub(r"^\{\{-?|-?\}\}$", "", part).strip().partition(" ")
        if word in ("end", "else"):
            return nodes, f"{word} {rest}".strip()
        if word == "range":
            body, end = _parse(parts)
            assert end == "end"
            nodes.append(("range", rest, body))
        elif word == "if":
            branches = [(rest, *_parse(parts))]
            while branches[-1][2] != "end":
                condition = (branches[-1][2] or "").removeprefix("else").strip()
                branches.append((condition.removeprefix("if ") or "true", *_parse(parts)))
            nodes.append(("if", branches, None))
        elif word.startswith("$") and rest.startswith(("= ", ":= ")):
            nodes.append(("set", word, rest.partition("= ")[2]))
        else:
            nodes.append(("show", f"{word} {rest}".strip(), None))
    return nodes, None


def _run(nodes: list[Node], dot: dict[str, Any], variables: dict[str, Any]) -> str:
    text = ""
    for kind, first, second in nodes:
        if kind == "text":
            text += first
        elif kind == "range":
            text += "".join(_run(second, turn, variables) for turn in _value(first, dot, variables))
        elif kind == "if":
            text += next((_run(body, dot, variables) for test, body, _ in first if _value(test, dot, variables)), "")
        elif kind == "set":
            variables[first] = _value(second, dot, variables)
        else:
            text += str(_value(first, dot, variables))
    return text


def _value(expression: str, dot: dict[str, Any], variables: dict[str, Any]) -> Any:
    if expression.startswith("eq "):
        one, other = expression.removeprefix("eq ").split(" ")
        return _value(one, dot, variables) == _value(other, dot, variables)
    if match := re.fullmatch(r'"([^"\\]*)"', expression):
        return match[1]
    if match := re.fullmatch(r"\.(\w+)", expression):
        return dot[match[1]]
    return {"true": True, "false": False, **variables}[expression]
