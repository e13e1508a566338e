"""Registration of a GGUF file as a model in a running Ollama, over HTTP, the Modelfile that does it by hand, and chat.

Deliberately not here: conversion and quantisation (Ollama gets a finished GGUF), and starting or installing Ollama.
What an Ollama answers was recorded from 0.32.15, all but a push; numbers such as (040) in comments name the recorded
exchange.
"""

import json
import re
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import httpx

from tasks.core.addresses import reveal, shown
from tasks.core.digest import canonical_json, sha256
from tasks.core.errors import ExportError, describe_os_error
from tasks.core.ollama import name_problem, parameter_problems
from tasks.core.retry import is_passing, retried
from tasks.export.prompts import PromptCase
from tasks.models.encode import common_start

# Kept wide on purpose: a str is one stop sequence, an int is a fine value for a number.
ParameterValue = float | int | str | list[str]

OLDEST_VERSION = (0, 5, 5)  # the first whose /api/create takes `files`; before it, a Modelfile with server-side paths
UPLOAD_CHUNK_BYTES = 1 << 20

# Seconds without a byte from Ollama. Short calls only touch manifests. After an upload it flushes the file to disk, and
# `create` rewrites it without a line of progress: 70 GB at 50 MB/s is 23 minutes. A first answer waits for the model to
# load, which Ollama itself gives up on after 5 minutes.
CONNECT_SECONDS = 5.0
ANSWER_SECONDS = 60.0
UPLOAD_SECONDS = 300.0
CREATE_SECONDS = 1800.0
GENERATE_SECONDS = 600.0
FIRST_WAIT = 0.5  # seconds, before what may be asked twice is asked again

# Ollama penalises repeats unless told otherwise, which greedy decoding elsewhere does not.
GREEDY = {"temperature": 0, "seed": 0, "repeat_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}

_AGAIN = "then run `forgetless export RUN --to ollama` again."
_RERUN = "then run the recipe again: what finished is reused."
_NEXT_STEPS = (
    (
        "no space left on device",
        "Free disk space where Ollama keeps its models (OLLAMA_MODELS; a model needs twice its "
        f"size there while it is registered), {_AGAIN}",
    ),
    ("digest mismatch", f"The GGUF file changed since its sha256 was taken: convert the model anew, {_AGAIN}"),
    ("not in GGUF format", f"The file is not a GGUF: convert the model anew, {_AGAIN}"),
    ("unknown type", f"The file is not a GGUF: convert the model anew, {_AGAIN}"),
    ("exceeds file size", f"The GGUF file is cut short: convert the model anew, {_AGAIN}"),
    ("invalid digest format", "The GGUF's sha256 must be 64 lower-case hexadecimal digits."),
    (
        "no such file or directory",
        "Ollama no longer has the uploaded file: run `forgetless export RUN --to ollama` again to upload it anew.",
    ),
    ("template error", f"A template must be a Go template, not Jinja: mend it or leave it out, {_AGAIN}"),
    ("invalid model name", f"Set export.ollama_name to [namespace/]model, {_RERUN}"),
    ("must be of type", f"Mend the parameter's type in export.ollama_parameters, {_RERUN}"),
    (
        "process has terminated",
        f"This Ollama cannot run the file: update Ollama or set export.serve to another quantisation, {_RERUN}",
    ),
    (
        "authorized",
        "Sign in where Ollama runs (`ollama signin`), or add its public key (id_ed25519.pub in ~/.ollama, or in "
        "/usr/share/ollama/.ollama where it is a service) at ollama.com/settings/keys, and push to a namespace of your "
        "own, then run `forgetless export RUN --to ollama --push NAMESPACE` again.",
    ),
)
_DEFAULT_STEP = f"Look into Ollama's log (`journalctl -u ollama`, or where `ollama serve` runs), {_AGAIN}"


@dataclass(frozen=True)
class Generation:
    """`stopped`: the model ended its answer itself; False where it was cut at max_tokens."""

    text: str
    stopped: bool


@dataclass(frozen=True)
class Registered:
    """A model that Ollama has under `name`. `digest`: its manifest's sha256 (64 hex digits), as `ollama list` shows it.
    `reused`: the name already held exactly this, and was left alone. `replaced`: the digest of the other model that had
    the name before. `generation`: what it answered in the check; None where nothing was created. `template`: the one of
    `templates` that was needed. `compared`: names of the cases whose prompt was as expected; None where this Ollama
    does not show its prompts. `left`: a sentence on a copy of ours that could not be deleted."""

    name: str
    digest: str
    reused: bool
    version: str
    replaced: str | None = None
    generation: Generation | None = None
    template: str | None = None
    compared: tuple[str, ...] | None = ()
    left: str = ""


def write_modelfile(
    gguf_name: str,
    *,
    system: str | None,
    parameters: Mapping[str, ParameterValue],
    license_text: str | None = None,
    template: str | None = None,
) -> str:
    """Return the text of a Modelfile for the GGUF file `gguf_name` beside it, for `ollama create NAME -f Modelfile`.

    Without `template` (a Go template) there is no TEMPLATE line, so that Ollama takes the GGUF's own. Raises
    ExportError for a parameter Ollama does not know and for a text that a Modelfile cannot hold; HTTP takes any text.
    """
    if not gguf_name or "/" in gguf_name or "\\" in gguf_name or gguf_name != gguf_name.strip():
        raise ExportError(f"A Modelfile's FROM names a file beside it, such as model.gguf; found {gguf_name!r}.")
    lines = [f"FROM ./{_quotable(gguf_name, 'the file name', newlines=False)}"]
    for name, value in check_parameters(parameters).items():
        for item in value if isinstance(value, list) else [value]:
            lines.append(f"PARAMETER {name} {_parameter_text(name, item)}")
    for instruction, what, text in (
        ("SYSTEM", "the system prompt", system),
        ("TEMPLATE", "the template", template),
        ("LICENSE", "the license", license_text),
    ):
        if text:  # an empty one is the same as none, in a Modelfile and over HTTP
            lines.append(f'{instruction} """{_quotable(text, what)}"""')
    return "\n".join(lines) + "\n"


def _parameter_text(name: str, value: bool | float | str) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, str):
        return repr(value)
    quotes = '"""' if '"' in value or "\n" in value else '"'
    return f"{quotes}{_quotable(value, f'parameter {name}')}{quotes}"


def _quotable(text: str, what: str, newlines: bool = True) -> str:
    """Return `text` unchanged. A Modelfile has no escapes: three quotes end a text, and Ollama's reader drops without a
    word every character that Go calls unprintable, among them the ideographic space (U+3000) and emoji joiners."""
    if '"""' in text:
        raise ExportError(
            f'A Modelfile cannot hold {what}: it contains """, which would end it there, and there is no escape. '
            "Take the three quotes out, or register over HTTP, which can send any text."
        )
    for at, character in enumerate(text):
        if not character.isprintable() and character not in ("\n\r\t" if newlines else ""):
            raise ExportError(
                f"A Modelfile cannot hold {what}: Ollama's reader would drop the character U+{ord(character):04X} at "
                f"position {at}. Replace it, or register over HTTP, which can send any text."
            )
    return text


def check_name(name: str) -> None:
    """Raise ExportError unless Ollama takes `name` for a model: [[host/]namespace/]model[:tag] (050)."""
    if problem := name_problem(name):
        raise ExportError(f"{problem} Set export.ollama_name.")


def check_parameters(parameters: Mapping[str, ParameterValue]) -> dict[str, ParameterValue]:
    """Return `parameters` as Ollama wants them (one stop text becomes a list of one). Raises ExportError with every
    unknown name and every value of the wrong type (067, 159)."""
    if problems := parameter_problems(parameters):
        raise ExportError("\n".join(problems))
    return {name: [value] if name == "stop" and isinstance(value, str) else value for name, value in parameters.items()}


def is_reachable(base_url: str, timeout_seconds: float = 2.0) -> str | None:
    """Return the version of the Ollama at `base_url`, or None when nothing answers there.

    Raises ExportError where something answers that is not Ollama, or an Ollama that refuses us (153): that is a setting
    to mend, not an absent server.
    """
    with _connect(base_url, timeout_seconds) as client:
        try:
            return _read_version(client)
        except ExportError as error:
            if isinstance(error.__cause__, httpx.ConnectError | httpx.TimeoutException):
                return None
            raise


def register_model(
    base_url: str,
    name: str,
    gguf: Path,
    gguf_sha256: str,
    *,
    system: str | None,
    parameters: Mapping[str, ParameterValue],
    templates: Sequence[str | None] = (None,),
    license_text: str | None = None,
    cases: Sequence[PromptCase] = (),
    progress: Callable[[int, int], None] | None = None,
    known_digest: str | None = None,
    prompt: str = "Hello! Who are you?",
    max_tokens: int = 32,
    must_stop: bool = False,
) -> Registered:
    """Return the model `name` of the Ollama at `base_url`, made from `gguf` and the given settings.

    Ollama says nothing about what a model was made from: it rewrites the GGUF (030), so not even the layer's digest is
    ours. But the manifest's digest in /api/tags is a function of the input alone, whatever the name, the order and the
    restarts between (fd5f44... for seven names in 069b, 142 and 155). So the caller keeps `Registered.digest` with the
    inputs it belongs to and gives it back as `known_digest`: if the name still has that digest, nothing is created. An
    upgraded Ollama may digest the same input differently; that costs one more registration and is right again.

    The file is uploaded only if Ollama has no blob of that sha256; `progress` gets (bytes sent, bytes in all). The
    model is created under a name of our own, and only if it is sound there is it copied to `name`: a model the name had
    before stays as it is until then, and has a second name until the copy stands. Whatever fails, our own names are
    deleted. They depend on the input alone: the next run takes over what a killed one left.

    It is sound where the prompt of each of `cases` is as expected and it answers `prompt`; with `must_stop`, in fewer
    than `max_tokens` tokens. `templates` are tried in turn until the prompts are as expected: a Go template, which
    Ollama ignores where the GGUF's own supports tools (087), or None for what it makes of the GGUF's. `parameters`
    replace, name by name, those that Ollama takes with the GGUF's template. Raises ExportError.
    """
    check_name(name)
    options = check_parameters(parameters)
    if not re.fullmatch(r"[0-9a-f]{64}", gguf_sha256):
        raise ExportError(
            f"Expected the sha256 of {gguf} as 64 lower-case hexadecimal digits, found {gguf_sha256!r}. "
            f"Convert the model anew, {_AGAIN}"
        )
    content = {
        "files": {"model.gguf": f"sha256:{gguf_sha256}"},
        **({"system": system} if system else {}),
        **({"license": license_text} if license_text else {}),
        **({"parameters": options} if options else {}),
    }
    own = f"forgetless-{sha256(canonical_json([_full_name(name), content, list(templates)]))[:16]}"
    trial, previous = f"{own}:trial", f"{own}:previous"
    with _connect(base_url) as client:
        version = _read_version(client)
        _check_version(client, version)
        present = _read_digests(client).get(_full_name(name))
        if present is not None and present == known_digest:
            return Registered(name, present, reused=True, version=version)
        uploaded = _upload_blob(client, gguf, gguf_sha256, progress)
        try:
            making = f"create {name!r} from {gguf.name}"
            template, compared = _create_faithful(client, trial, making, content, templates, cases)
            generation = _try_answer(
                client, trial, f"get an answer from the new {name!r}", prompt, max_tokens, must_stop
            )
            digest = _read_digests(client).get(_full_name(trial))
            if digest is None:
                raise ExportError(f"Ollama at {_where(client)} created {name!r} but does not list it. {_DEFAULT_STEP}")
            if digest != present:
                _put_in_place(client, trial, name, previous if present else None)
        except BaseException as error:  # an interrupt too must leave nothing behind
            left = _try_delete(client, trial)
            if present is not None and not isinstance(error, _NotRestoredError):
                left += _try_delete(client, previous)
            if not isinstance(error, ExportError):
                raise
            if present is None:
                kept = f" No model {name!r} was registered."
            elif isinstance(error, _NotRestoredError):
                kept = ""
            else:
                kept = f" The model that had the name {name!r} before (digest {present[:12]}) is unchanged."
            if uploaded:  # a client cannot delete a blob (140)
                kept += " The uploaded file stays with Ollama until it is restarted: a next try need not send it again."
            raise ExportError(f"{error}{kept}{left}") from error
        left = _try_delete(client, trial)
        if present is not None:
            left += _try_delete(client, previous)  # the copy made just now, or by a run that was killed
    replaced = present if present != digest else None
    return Registered(name, digest, present == digest, version, replaced, generation, template, compared, left.strip())


def move_alias(base_url: str, name: str, alias: str) -> str:
    """Let `alias` name the model that `name` names; nothing is done where it does. Return nothing, or a sentence on a
    copy of ours that could not be deleted. Raises ExportError; `alias` then names what it did before."""
    check_name(alias)
    with _connect(base_url) as client:
        digests = _read_digests(client)
        wanted, present = (digests.get(_full_name(n)) for n in (name, alias))
        if wanted is not None and wanted == present:
            return ""
        previous = f"forgetless-{sha256(_full_name(alias).encode())[:16]}:previous" if present else None
        try:
            _put_in_place(client, name, alias, previous)
        except _NotRestoredError:
            raise
        except BaseException as error:
            left = _try_delete(client, previous) if previous else ""
            if not isinstance(error, ExportError):
                raise
            kept = f" {alias!r} names the same model as before." if present else ""
            raise ExportError(f"{error}{kept}{left}") from error
        return _try_delete(client, previous).strip() if previous else ""


def push_model(base_url: str, name: str, remote: str, progress: Callable[[int, int], None] | None = None) -> None:
    """Push model `name` to a registry (ollama.com, where the name says no other) as `remote`, namespace/model:tag, a
    name that it has here too afterwards. `progress` gets (bytes sent, bytes in all) of the layer at work. Written from
    Ollama's API documentation: no recording has a push. Raises ExportError."""
    check_name(remote)
    with _connect(base_url) as client:
        is_new = _full_name(remote) not in _read_digests(client)
        if _full_name(remote) != _full_name(name):
            _copy(client, name, remote)

        def follow(line: dict[str, Any]) -> None:
            if progress and isinstance(line.get("total"), int):
                progress(line.get("completed") or 0, line["total"])

        try:
            request = {"model": remote, "stream": True}
            _stream(client, "/api/push", request, f"push {remote!r}", UPLOAD_SECONDS, follow)
        except BaseException as error:
            left = _try_delete(client, remote) if is_new else ""
            if not isinstance(error, ExportError):
                raise
            raise ExportError(f"{error}{left}") from error


def generate_once(base_url: str, name: str, prompt: str, max_tokens: int = 32) -> Generation:
    """Return the greedy answer of model `name` to one chat message, each time the same (090, 091).
    Raises ExportError."""
    check_name(name)
    with _connect(base_url) as client:
        return _generate(client, name, f"get an answer from {name!r}", prompt, max_tokens)


def read_digest(base_url: str, name: str) -> str | None:
    """Return the digest of the model `name` in the Ollama at `base_url`, None where it has none. Raises ExportError."""
    with _connect(base_url) as client:
        return _read_digests(client).get(_full_name(name))


def read_context(base_url: str, name: str) -> int | None:
    """Return how many tokens Ollama reads of a conversation with the loaded model `name` (099); None where it is not
    loaded, or Ollama does not say. Raises ExportError."""
    with _connect(base_url) as client:
        loaded = _call_json(client, "GET", "/api/ps", "list its loaded models", again=True).get("models") or []
        found = [
            model.get("context_length") for model in loaded if _full_name(model.get("name", "")) == _full_name(name)
        ]
    return found[0] if found else None


def stream_chat(
    base_url: str, name: str, messages: list[dict[str, str]], options: Mapping[str, ParameterValue]
) -> Generator[str, None, dict[str, Any]]:
    """Yield the answer of model `name` to a conversation as it is written, and return Ollama's last line, which has
    the counts of tokens (097). Raises ExportError."""
    doing, step = (
        f"chat with {name!r}",
        "Look into Ollama's log (`journalctl -u ollama`, or where `ollama serve` runs).",
    )
    request = {"model": name, "messages": messages, "options": options}
    timeout = httpx.Timeout(GENERATE_SECONDS, connect=CONNECT_SECONDS)
    with _connect(base_url) as client:
        try:
            with client.stream("POST", "/api/chat", json=request, timeout=timeout) as response:
                if response.status_code != 200:
                    response.read()
                    _refuse(client, doing, response)
                for line in filter(str.strip, response.iter_lines()):
                    part = _parse_json(line)
                    if not isinstance(part, dict) or "error" in part:
                        _fail(client, doing, str(part["error"] if isinstance(part, dict) else part), step)
                    if text := (part.get("message") or {}).get("content"):
                        yield text
                    if part.get("done"):
                        return part
        except httpx.TransportError as error:
            _fail(client, doing, f"the connection broke off ({error or type(error).__name__})", step)
        _fail(client, doing, "its answer ended without a last line", step)


def delete_model(base_url: str, name: str) -> None:
    """Delete model `name` and the layers no other model uses. Raises ExportError, also where there is none (112)."""
    check_name(name)
    with _connect(base_url) as client:
        if not _delete(client, name):
            raise ExportError(
                f"There is no model {name!r} in the Ollama at {_where(client)} to delete. See `ollama list`."
            )


class _NotRestoredError(ExportError):
    """The name is lost to both models; the message says where the earlier one is."""


def _put_in_place(client: httpx.Client, trial: str, name: str, previous: str | None) -> None:
    """Copy `trial` over `name`. Its present model is first copied to `previous`: a copy that breaks off (a full disk)
    would leave neither, and deleting `previous` afterwards frees its layers, which overwriting a name does not."""
    if previous is not None:
        _copy(client, name, previous)
    try:
        _copy(client, trial, name)
    except ExportError as error:
        if previous is None:
            left = _try_delete(client, name)  # a copy whose answer was lost may stand
            raise ExportError(f"{error}{left}") from error
        try:
            _copy(client, previous, name)
        except ExportError:
            raise _NotRestoredError(
                f"{error} The model that had the name before is kept as {previous!r}: "
                f"`ollama cp {previous} {name}` brings it back."
            ) from error
        raise


def _upload_blob(
    client: httpx.Client, gguf: Path, gguf_sha256: str, progress: Callable[[int, int], None] | None
) -> bool:
    """Upload `gguf` in pieces unless Ollama has its bytes; return whether that was needed. Half an upload cannot be
    gone on with, only a whole one skipped."""
    path = f"/api/blobs/sha256:{gguf_sha256}"
    asked = _call(client, "HEAD", path, f"say whether it has {gguf.name}", accept=(200, 404), again=True)
    if asked.status_code == 200:
        return False
    doing = f"store the upload of {gguf}"
    try:
        size_bytes = gguf.stat().st_size
        # A known length, not chunked coding: a server that stops reading (a full disk) is then heard.
        headers = {"Content-Length": str(size_bytes), "Content-Type": "application/octet-stream"}
        # 200: somebody else uploaded it since we asked (021)
        accept, more = (200, 201), {"headers": headers, "content": lambda: _read_pieces(gguf, size_bytes, progress)}
        _call(client, "POST", path, doing, UPLOAD_SECONDS, accept, again=True, **more)
        return True
    except OSError as error:
        raise ExportError(describe_os_error(error, f"read {gguf} to upload it to {_where(client)}")) from error


def _read_pieces(gguf: Path, size_bytes: int, progress: Callable[[int, int], None] | None) -> Iterator[bytes]:
    sent = 0
    with gguf.open("rb") as file:
        while piece := file.read(min(UPLOAD_CHUNK_BYTES, size_bytes - sent)):
            yield piece
            sent += len(piece)
            if progress:
                progress(sent, size_bytes)
    if sent != size_bytes:
        raise ExportError(
            f"{gguf} shrank from {size_bytes} to {sent} bytes while it was uploaded. Convert the model anew, {_AGAIN}"
        )


def _create_faithful(
    client: httpx.Client,
    model: str,
    doing: str,
    content: dict[str, Any],
    templates: Sequence[str | None],
    cases: Sequence[PromptCase],
) -> tuple[str | None, tuple[str, ...] | None]:
    """Create `model` with the first of `templates` whose prompts are as expected; return that template and the names of
    the cases that were compared, None where this Ollama does not show its prompts."""
    different = ""
    for template in templates:
        _create_model(client, model, {**content, **({"template": template} if template else {})}, doing)
        for case in cases:
            found = _render(client, model, "show the prompts of the new model", case.messages)
            if found is None:
                return template, None
            if found not in case.prompts:
                different = _describe_difference(case, found)
                break
        else:
            return template, tuple(case.name for case in cases)
    raise ExportError(
        f"Ollama at {_where(client)} would send the model another prompt than it was trained with: {different}. "
        "Update Ollama, start it without OLLAMA_GO_TEMPLATE, or serve the GGUF with llama.cpp's llama-server, which "
        f"uses the template in the file; {_AGAIN}"
    )


def _render(client: httpx.Client, model: str, doing: str, messages: list[dict[str, str]]) -> str | None:
    """Return the text that the model would get for a conversation; None from an Ollama that answers it instead."""
    request = {
        "model": model,
        "messages": messages,
        "stream": False,
        "_debug_render_only": True,
        "options": {"num_predict": 1},
    }
    answer = _call_json(client, "POST", "/api/chat", doing, GENERATE_SECONDS, json=request)
    shown = answer.get("_debug_info")
    if isinstance(shown, dict) and isinstance(shown.get("rendered_template"), str):
        return str(shown["rendered_template"])
    if answer.get("done") is not True:
        _fail(client, doing, f"expected a rendered template, found {json.dumps(answer)[:200]}")
    return None


def _describe_difference(case: PromptCase, found: str) -> str:
    """Return what was expected and what was found around the first character that differs."""
    at, expected = max((common_start(p, found), p) for p in case.prompts)

    def around(text: str) -> str:
        start, end = max(0, at - 30), at + 60
        return f"{'…' if start else ''}{text[start:end]}{'…' if len(text) > end else ''}"

    return f"for {case.name} expected {around(expected)!r}, found {around(found)!r}"


def _try_answer(
    client: httpx.Client, model: str, doing: str, prompt: str, max_tokens: int, must_stop: bool
) -> Generation:
    generation = _generate(client, model, doing, prompt, max_tokens)
    if not generation.text.strip():
        _fail(client, doing, f"it answered nothing to {prompt!r}, where llama.cpp gives an answer with the same file")
    if must_stop and not generation.stopped:
        what = f"its answer to {prompt!r} had no end within {max_tokens} tokens"
        reason = f"{what}, where llama.cpp ends it with the same file"
        _fail(client, doing, reason, f"Set export.ollama_parameters.stop to the model's end of turn, {_RERUN}")
    return generation


def _create_model(client: httpx.Client, name: str, content: dict[str, Any], doing: str) -> None:
    request = {"model": name, "stream": True, **content}
    _stream(client, "/api/create", request, doing, CREATE_SECONDS, again=True)


def _stream(
    client: httpx.Client,
    path: str,
    request: dict[str, Any],
    doing: str,
    seconds: float,
    follow: Callable[[dict[str, Any]], None] | None = None,
    again: bool = False,
) -> None:
    """POST `request` and read lines until one says success; an error is in a line too, after HTTP 200 (040)."""
    timeout = httpx.Timeout(seconds, connect=CONNECT_SECONDS)

    def ask() -> Any:
        last: Any = None
        with client.stream("POST", path, json=request, timeout=timeout) as response:
            if response.status_code != 200:
                response.read()
                raise httpx.HTTPStatusError("", request=response.request, response=response)
            for line in response.iter_lines():
                if not line.strip():
                    continue
                last = _parse_json(line)
                if isinstance(last, dict) and "error" in last:
                    _fail(client, doing, str(last["error"]))
                if isinstance(last, dict) and follow:
                    follow(last)
        return last

    def is_worth(error: BaseException) -> bool:
        return again and _is_worth(error) and not isinstance(error, httpx.TimeoutException)  # it was given long enough

    with _explained(client, doing):
        last = retried(ask, FIRST_WAIT, is_worth)
    if last != {"status": "success"}:
        _fail(client, doing, f"its answer ended without success, after {json.dumps(last)}")


def _generate(client: httpx.Client, name: str, doing: str, prompt: str, max_tokens: int) -> Generation:
    request = {
        "model": name,
        "messages": [{"role": "user", "content": prompt}],
        "stream": False,
        "options": {**GREEDY, "num_predict": max_tokens},
    }
    answer = _call_json(client, "POST", "/api/chat", doing, GENERATE_SECONDS, json=request)
    message = answer.get("message")
    if answer.get("done") is not True or not isinstance(message, dict):
        _fail(client, doing, f"expected one finished message, found {json.dumps(answer)[:200]}")
    text = str(message.get("content") or message.get("thinking") or "")
    return Generation(text=text, stopped=answer.get("done_reason") == "stop")


def _copy(client: httpx.Client, source: str, destination: str) -> None:
    request = {"source": source, "destination": destination}
    _call(client, "POST", "/api/copy", f"copy {source!r} to {destination!r}", again=True, json=request)


def _delete(client: httpx.Client, name: str) -> bool:
    """Delete `name`; return False if there is no such model."""
    doing, what = f"delete {name!r}", {"model": name}
    response = _call(client, "DELETE", "/api/delete", doing, accept=(200, 404), again=True, json=what)
    return response.status_code == 200 or response.extensions["tries"] > 1  # deleted, and the answer was lost


def _try_delete(client: httpx.Client, name: str) -> str:
    """Delete `name` after a failure; return nothing, or the sentence that says it is still there."""
    try:
        _delete(client, name)
    except ExportError:
        return f" Ollama may be left with {name!r}: `ollama rm {name}` deletes it."
    return ""


def _read_digests(client: httpx.Client) -> dict[str, str]:
    """Return {full name: manifest digest} of every model."""
    doing = "list its models"
    models = _call_json(client, "GET", "/api/tags", doing, again=True).get("models") or []
    try:
        return {_full_name(model["name"]): model["digest"] for model in models}
    except (TypeError, KeyError):
        _fail(client, doing, f"expected a name and a digest for each, found {json.dumps(models)[:200]}")


def _full_name(name: str) -> str:
    """Return `name` as Ollama compares it: without case or its own registry, with a tag (121, 155)."""
    head, slash, last = name.lower().rpartition("/")
    full = f"{head}{slash}{last if ':' in last else f'{last}:latest'}"
    return full.removeprefix("registry.ollama.ai/").removeprefix("library/")


def _read_version(client: httpx.Client) -> str:
    version = _call_json(client, "GET", "/api/version", "say its version").get("version")
    if not isinstance(version, str):
        _fail(client, "say its version", "the answer has none, so it is not an Ollama")
    return version


def _check_version(client: httpx.Client, version: str) -> None:
    numbers = tuple(int(n) for n in re.findall(r"\d+", version)[:3])
    if numbers and numbers < OLDEST_VERSION and any(numbers):  # 0.0.0 is one that somebody built from source
        raise ExportError(
            f"The Ollama at {_where(client)} is version {version}, but only {'.'.join(map(str, OLDEST_VERSION))} and "
            f"newer can create a model from an uploaded file. Update Ollama, {_AGAIN}"
        )


def _connect(base_url: str, timeout_seconds: float | None = None) -> httpx.Client:
    """Return a client that uses no proxy and follows no redirect, so that weights go nowhere but to `base_url`."""
    try:
        url = httpx.URL(reveal(base_url))
    except httpx.InvalidURL:
        url = httpx.URL()
    if url.scheme not in ("http", "https") or not url.host:
        raise ExportError(
            f"Expected Ollama's address as http://host:port, found {shown(base_url)!r}. "
            "Set OLLAMA_HOST, such as 127.0.0.1:11434."
        )
    seconds = timeout_seconds or ANSWER_SECONDS
    timeout = httpx.Timeout(seconds, connect=min(seconds, CONNECT_SECONDS))
    return httpx.Client(base_url=str(url).rstrip("/"), timeout=timeout, trust_env=False, follow_redirects=False)


def _where(client: httpx.Client) -> str:
    return shown(str(client.base_url)).rstrip("/")


def _call(
    client: httpx.Client,
    method: str,
    path: str,
    doing: str,
    seconds: float | None = None,
    accept: tuple[int, ...] = (200,),
    again: bool = False,
    **request: Any,
) -> httpx.Response:
    """Return the answer, or raise ExportError where its status is not among `accept`, or there is none. What does the
    same if it is asked twice may be asked `again`; its `content` is a function then, that gives it anew. The answer's
    extension `tries` says how often it was asked."""
    if seconds is not None:
        request["timeout"] = httpx.Timeout(seconds, connect=CONNECT_SECONDS)
    make, tries = request.pop("content", None), 0

    def ask() -> httpx.Response:
        nonlocal tries
        tries += 1
        answer = client.request(method, path, content=make and make(), **request)
        if answer.status_code >= 500 or answer.status_code in (408, 429):
            raise httpx.HTTPStatusError("", request=answer.request, response=answer)
        return answer

    with _explained(client, doing):
        response = retried(ask, FIRST_WAIT, _is_worth) if again else ask()
    response.extensions["tries"] = tries
    if response.status_code not in accept:
        _refuse(client, doing, response)
    return response


def _call_json(
    client: httpx.Client, method: str, path: str, doing: str, seconds: float | None = None, **request: Any
) -> dict[str, Any]:
    answer = _parse_json(_call(client, method, path, doing, seconds, **request).text)
    if not isinstance(answer, dict):
        _fail(client, doing, "the answer is not a JSON object, so it is not an Ollama")
    return answer


def _is_worth(error: BaseException) -> bool:
    """Return whether a call may succeed a little later: not where no Ollama listens, which is told at once, and not
    where it says with HTTP 500 why it cannot, a file that is none or a full disk."""
    if isinstance(error, httpx.HTTPStatusError) and error.response.status_code == 500:
        said = _parse_json(error.response.text)
        return not (isinstance(said, dict) and "error" in said)
    return is_passing(error) and not isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)


def _parse_json(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text[:200]


@contextmanager
def _explained(client: httpx.Client, doing: str) -> Iterator[None]:
    """Turn what goes wrong with the connection inside into an ExportError, with the cause kept."""
    try:
        yield
    except httpx.HTTPStatusError as error:
        _refuse(client, doing, error.response)
    except (httpx.ConnectError, httpx.ConnectTimeout) as error:
        raise ExportError(
            f"No Ollama answers at {_where(client)} to {doing} ({error or 'timed out'}). "
            f"Start it with `ollama serve`, or set OLLAMA_HOST to where it runs, {_AGAIN}"
        ) from error
    except httpx.TimeoutException as error:
        raise ExportError(
            f"Ollama at {_where(client)} did not answer in time when asked to {doing}. {_DEFAULT_STEP}"
        ) from error
    except httpx.TransportError as error:
        raise ExportError(
            f"Ollama at {_where(client)} broke off the connection when asked to {doing} ({error}); a full disk on its "
            f"side looks like this. {_DEFAULT_STEP}"
        ) from error


def _refuse(client: httpx.Client, doing: str, response: httpx.Response) -> NoReturn:
    """Raise ExportError for an answer with a status we did not expect."""
    status = response.status_code
    if status == 403:  # with an empty body (152, 153)
        raise ExportError(
            f"Ollama at {_where(client)} refused (HTTP 403) to {doing}: it serves only the host names and origins it "
            f"knows. Set OLLAMA_HOST to an address of its machine, such as 127.0.0.1:11434, {_AGAIN}"
        )
    if response.is_redirect:
        location = response.headers.get("location", "nowhere")
        _fail(client, doing, f"it redirects to {location}, which is not followed; set OLLAMA_HOST to Ollama itself")
    answer = _parse_json(response.text)
    error = answer.get("error") if isinstance(answer, dict) else None
    if error is None:
        _fail(client, doing, f"HTTP {status} without an error message, so it may not be an Ollama")
    if status == 404:
        _fail(client, doing, str(error), f"See `ollama list`, register the model, {_AGAIN}")
    _fail(client, doing, str(error))


def _fail(client: httpx.Client, doing: str, reason: str, step: str | None = None) -> NoReturn:
    """Raise ExportError: where, what was asked for, what was found, and what to do next."""
    step = step or next((step for found, step in _NEXT_STEPS if found in reason), _DEFAULT_STEP)
    raise ExportError(f"Ollama at {_where(client)} could not {doing}: {reason.rstrip('.')}. {step}")
