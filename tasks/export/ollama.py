"""Registration of a GGUF file as a model in a running Ollama, over HTTP, and the Modelfile that does it by hand.

Deliberately not here: conversion and quantisation (Ollama gets a finished GGUF), starting or installing Ollama, and the
check that its rendered prompt equals the tokenizer's. What an Ollama answers was recorded from 0.32.15; numbers such as
(040) in comments name the recorded exchange.
"""

import difflib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeGuard

import httpx

from tasks.core.digest import canonical_json, sha256
from tasks.core.errors import ExportError, describe_os_error

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

# Ollama's own options and their types. The server checks neither: a wrong type is stored, and then every request to the
# model fails with HTTP 500 (067, 159).
PARAMETERS: dict[str, type] = {
    "draft_num_predict": int,
    "frequency_penalty": float,
    "main_gpu": int,
    "min_p": float,
    "num_batch": int,
    "num_ctx": int,
    "num_gpu": int,
    "num_keep": int,
    "num_predict": int,
    "num_thread": int,
    "presence_penalty": float,
    "repeat_last_n": int,
    "repeat_penalty": float,
    "seed": int,
    "stop": list,
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "typical_p": float,
    "use_mmap": bool,
}
_EXPECTED = {int: "a whole number", float: "a number", bool: "true or false", list: "a text or a list of texts"}

_HOST = r"\w[\w.:-]{0,349}"
_NAMESPACE = r"\w[\w-]{0,79}"
_PART = r"\w[\w.-]{0,79}"
_NAME = re.compile(rf"(?:(?:{_HOST}/)?{_NAMESPACE}/)?{_PART}(?::(?P<tag>{_PART}))?", re.ASCII)

_AGAIN = "then run `forgetless export RUN --to ollama` again."
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
    ("invalid model name", f"Set export.ollama_name to [namespace/]model[:tag], {_AGAIN}"),
    ("must be of type", f"Mend the parameter's type, {_AGAIN}"),
    (
        "process has terminated",
        f"This Ollama cannot run the file: update Ollama or set export.serve to another quantisation, {_AGAIN}",
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
    the name before. `generation`: what it answered in the check; None where nothing was created."""

    name: str
    digest: str
    reused: bool
    version: str
    replaced: str | None = None
    generation: Generation | None = None


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
    match = _NAME.fullmatch(name)
    if match is None:
        raise ExportError(
            f"Ollama refuses the model name {name!r}: expected [namespace/]model[:tag], each part at most 80 ASCII "
            "letters, digits, '_', '-' and '.' (no '.' in the namespace) and not starting with '-' or '.'. "
            "Set export.ollama_name."
        )
    tag = (match["tag"] or "").lower()
    if tag in ("cloud", "local") or tag.endswith("-cloud"):
        # Newer versions cut these off when a model is used: x:cloud is asked for at ollama.com, x:local is x:latest.
        raise ExportError(
            f"The model name {name!r} cannot be used: Ollama keeps the tags cloud, local and those ending in -cloud "
            "for itself. Set export.ollama_name to a name with another tag."
        )


def check_parameters(parameters: Mapping[str, ParameterValue]) -> dict[str, bool | float | int | list[str]]:
    """Return `parameters` as Ollama wants them (one stop text becomes a list of one). Raises ExportError with every
    unknown name, with the nearest known ones, and every value of the wrong type."""
    problems = []
    checked: dict[str, bool | float | int | list[str]] = {}
    for name, value in parameters.items():
        kind = PARAMETERS.get(name)
        if kind is None:
            near = difflib.get_close_matches(name, PARAMETERS, 3)
            hint = f"did you mean {' or '.join(near)}?" if near else f"it knows {', '.join(PARAMETERS)}."
            problems.append(f"Ollama has no parameter {name!r}; {hint}")
        elif kind is list and isinstance(value, str | list):
            texts = [value] if isinstance(value, str) else value
            if texts and all(isinstance(text, str) and text for text in texts):
                checked[name] = texts
            else:
                problems.append(f"Ollama's parameter {name!r} must be texts that are not empty; found {value!r}.")
        elif _is_number(value, kind):
            checked[name] = value
        else:
            problems.append(f"Ollama's parameter {name!r} must be {_EXPECTED[kind]}; found {value!r}.")
    if problems:
        raise ExportError("\n".join(problems))
    return checked


def _is_number(value: ParameterValue, kind: type) -> TypeGuard[bool | float | int]:
    """Return whether `value` is of `kind` (int, float or bool). Python counts a bool as an int, Ollama does not."""
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    if kind is float:
        return isinstance(value, int | float) and math.isfinite(value)
    return isinstance(value, int) and kind is int


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
    template: str | None = None,
    license_text: str | None = None,
    progress: Callable[[int, int], None] | None = None,
    known_digest: str | None = None,
    prompt: str = "Hello! Who are you?",
    max_tokens: int = 32,
) -> Registered:
    """Return the model `name` of the Ollama at `base_url`, made from `gguf` and the given settings.

    Ollama says nothing about what a model was made from: it rewrites the GGUF (030), so not even the layer's digest is
    ours. But the manifest's digest in /api/tags is a function of the input alone, whatever the name, the order and the
    restarts between (fd5f44... for seven names in 069b, 142 and 155). So the caller keeps `Registered.digest` with the
    inputs it belongs to and gives it back as `known_digest`: if the name still has that digest, nothing is created. An
    upgraded Ollama may digest the same input differently; that costs one more registration and is right again.

    The file is uploaded only if Ollama has no blob of that sha256; `progress` gets (bytes sent, bytes in all). The
    model is created under a name of our own, must answer `prompt` there, and only then is copied to `name`: a model
    the name had before stays as it is until then, and has a second name until the copy stands. Whatever fails, our
    own names are deleted. They depend on the input alone: the next run takes over what a killed one left.

    `parameters` replace, name by name, those that Ollama takes with the GGUF's template; `template` is a Go template,
    which Ollama ignores where the GGUF's own supports tools (087). Raises ExportError.
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
        **({"template": template} if template else {}),
        **({"license": license_text} if license_text else {}),
        **({"parameters": options} if options else {}),
    }
    own = f"forgetless-{sha256(canonical_json([_full_name(name), content]))[:16]}"
    trial, previous = f"{own}:trial", f"{own}:previous"
    with _connect(base_url) as client:
        version = _read_version(client)
        _check_version(client, version)
        present = _read_digests(client).get(_full_name(name))
        if present is not None and present == known_digest:
            return Registered(name, present, reused=True, version=version)
        _upload_blob(client, gguf, gguf_sha256, progress)
        try:
            _create_model(client, trial, content, f"create {name!r} from {gguf.name}")
            generation = _generate(client, trial, f"get an answer from the new {name!r}", prompt, max_tokens)
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
            raise ExportError(f"{error}{kept}{left}") from error
        _delete(client, trial)
        if present is not None:
            _delete(client, previous)  # the copy made just now, or by a run that was killed
    replaced = present if present != digest else None
    return Registered(name, digest, present == digest, version, replaced, generation)


def generate_once(base_url: str, name: str, prompt: str, max_tokens: int = 32) -> Generation:
    """Return the greedy answer of model `name` to one chat message, each time the same (090, 091).
    Raises ExportError."""
    check_name(name)
    with _connect(base_url) as client:
        return _generate(client, name, f"get an answer from {name!r}", prompt, max_tokens)


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
) -> None:
    """Upload `gguf` in pieces unless Ollama has its bytes. Half an upload cannot be gone on with, only a whole one
    skipped."""
    path = f"/api/blobs/sha256:{gguf_sha256}"
    if _call(client, "HEAD", path, f"say whether it has {gguf.name}", accept=(200, 404)).status_code == 200:
        return
    doing = f"store the upload of {gguf}"
    try:
        size_bytes = gguf.stat().st_size
        # A known length, not chunked coding: a server that stops reading (a full disk) is then heard.
        headers = {"Content-Length": str(size_bytes), "Content-Type": "application/octet-stream"}
        content = _read_pieces(gguf, size_bytes, progress)
        # 200: somebody else uploaded it since we asked (021)
        _call(client, "POST", path, doing, UPLOAD_SECONDS, (200, 201), content=content, headers=headers)
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


def _create_model(client: httpx.Client, name: str, content: dict[str, Any], doing: str) -> None:
    """Create `name`. A stream that failed is an HTTP 200 too (040, 044, 048, 065): only the last line tells."""
    last: Any = None
    timeout = httpx.Timeout(CREATE_SECONDS, connect=CONNECT_SECONDS)
    request = {"model": name, "stream": True, **content}
    with _explained(client, doing), client.stream("POST", "/api/create", json=request, timeout=timeout) as response:
        if response.status_code != 200:
            response.read()
            _refuse(client, doing, response)
        for line in response.iter_lines():
            if not line.strip():
                continue
            last = _parse_json(line)
            if isinstance(last, dict) and "error" in last:
                _fail(client, doing, str(last["error"]))
    if last != {"status": "success"}:
        _fail(client, doing, f"its answer ended without success, after {json.dumps(last)}")


def _generate(client: httpx.Client, name: str, doing: str, prompt: str, max_tokens: int) -> Generation:
    request = {
        "model": name,
        "messages": [{"role": "user", "content": prompt}],
        "stream": False,
        "options": {"temperature": 0, "seed": 0, "num_predict": max_tokens},
    }
    answer = _call_json(client, "POST", "/api/chat", doing, GENERATE_SECONDS, json=request)
    message = answer.get("message")
    if answer.get("done") is not True or not isinstance(message, dict):
        _fail(client, doing, f"expected one finished message, found {json.dumps(answer)[:200]}")
    return Generation(text=str(message.get("content", "")), stopped=answer.get("done_reason") == "stop")


def _copy(client: httpx.Client, source: str, destination: str) -> None:
    request = {"source": source, "destination": destination}
    _call(client, "POST", "/api/copy", f"copy {source!r} to {destination!r}", json=request)


def _delete(client: httpx.Client, name: str) -> bool:
    """Delete `name`; return False if there is no such model."""
    response = _call(client, "DELETE", "/api/delete", f"delete {name!r}", accept=(200, 404), json={"model": name})
    return response.status_code == 200


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
    models = _call_json(client, "GET", "/api/tags", doing).get("models") or []
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
        url = httpx.URL(base_url)
    except httpx.InvalidURL:
        url = httpx.URL()
    if url.scheme not in ("http", "https") or not url.host:
        raise ExportError(
            f"Expected Ollama's address as http://host:port, found {base_url!r}. "
            "Set OLLAMA_HOST, such as 127.0.0.1:11434."
        )
    seconds = timeout_seconds or ANSWER_SECONDS
    timeout = httpx.Timeout(seconds, connect=min(seconds, CONNECT_SECONDS))
    return httpx.Client(base_url=str(url).rstrip("/"), timeout=timeout, trust_env=False, follow_redirects=False)


def _where(client: httpx.Client) -> str:
    """Return the address for a message, without a password it may hold."""
    url = client.base_url
    return f"{url.scheme}://{url.netloc.decode()}{url.path}".rstrip("/")


def _call(
    client: httpx.Client,
    method: str,
    path: str,
    doing: str,
    seconds: float | None = None,
    accept: tuple[int, ...] = (200,),
    **request: Any,
) -> httpx.Response:
    """Return the answer, or raise ExportError where its status is not among `accept`, or there is none."""
    if seconds is not None:
        request["timeout"] = httpx.Timeout(seconds, connect=CONNECT_SECONDS)
    with _explained(client, doing):
        response = client.request(method, path, **request)
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
