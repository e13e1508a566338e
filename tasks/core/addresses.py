"""Addresses without what is secret in them: user:password@, a query with a signature or token, a fragment.

Whatever keeps or tells an address (recipe, manifest, Prefect parameter, message) has it without. The whole one stays in
the memory of the process that was given it, and is looked up by the client that goes there.
"""

import json
import re

import yaml

_whole: dict[str, str] = {}
_IN_TEXT = re.compile(r"[A-Za-z][\w+.-]*://[^\s'\"<>]*[^\s'\"<>.,;:)\]}]")


def shown(address: str) -> str:
    """Return a path as it is, and an address without what may be secret in it: the user, the query, the fragment."""
    scheme, separator, rest = address.partition("://")
    if not separator:
        return address
    place = rest if scheme.lower() == "s3" else re.split(r"[?#]", rest, maxsplit=1)[0]
    server, slash, path = place.partition("/")
    server = server.rpartition("@")[2]
    if not re.fullmatch(r"[\w.-]*|\[[\da-fA-F:]+\]", re.sub(r":\d*$", "", server)):
        return f"{scheme}://…"  # a password that was not escaped, most likely
    return f"{scheme}://{server}{slash}{path}"


def hide(address: str) -> str:
    """Return an address without its secrets, by which `reveal` finds the whole one; a path as it is. Several that
    differ in what is secret alone are numbered."""
    name, number = shown(address), 1
    if address == name or address in _whole:
        return address
    while _whole.setdefault(name, address) != address:
        number += 1
        name = f"{shown(address)}#{number}"
    return name


def reveal(address: str) -> str:
    """Return the whole address that `hide` was given, or what it never saw as it is."""
    return _whole.get(address, address)


def hide_in_override(override: str) -> str:
    """Return a `section.key=value` with the addresses in its value hidden, where the section reads from addresses."""
    key, equals, text = override.partition("=")
    if not key.strip().startswith(("data.", "data", "model.")) or "://" not in text:
        return override
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return override  # which is refused
    return f"{key}{equals}{json.dumps(_hidden_in(value), ensure_ascii=False, default=str)}"


def _hidden_in(value: object) -> object:
    if isinstance(value, dict):
        return {key: _hidden_in(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_hidden_in(item) for item in value]
    return hide(value) if isinstance(value, str) else value


def without_secrets(text: str) -> str:
    """Return a message with every address in it that carries a user, a query or a fragment as `shown` has it."""

    def clean(match: re.Match[str]) -> str:
        return shown(match[0]) if re.search("[@?#]", match[0]) else match[0]

    return _IN_TEXT.sub(clean, text)
