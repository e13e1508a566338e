"""Pushing a run to the Hugging Face Hub: the folder that goes up, and the upload in one commit, all of it or nothing.

The card comes from reporting; tokens are found by huggingface_hub (HF_TOKEN, hf auth login) and never leave it.
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.core.addresses import shown
from tasks.core.errors import ConfigError, ExportError
from tasks.core.records import BaseRef, GgufRef, TrainedRef

SUFFIXES = {".safetensors", ".json", ".jinja", ".model", ".tiktoken", ".txt", ".py"}
"""What of a merged model goes up. Pickles (.bin, .pt, .pth, .ckpt, .pkl) are none of them."""
STALE = [
    "adapter_*",
    "config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "*.gguf",
    "Modelfile",
    "system",
]
"""What an earlier push may have left: transformers would load an adapter it finds beside a merged model."""
LOG_IN = "log in with hf auth login (or set HF_TOKEN) and run this again"
Place = Callable[[Path, Path], Any]
"""Puts a file (first) to a path (second): copied, or linked."""


@dataclass(frozen=True)
class Pushed:
    """`created`: the repository is new."""

    repo: str
    url: str
    commit: str
    created: bool
    private: bool


# --- the folder -------------------------------------------------------------------------------------------------------


def link(source: Path, target: Path) -> None:
    """Put a file to another path without its bytes twice on the disk, where that can be."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def place_files(source: Path, target: Path, place: Place) -> None:
    """Put the files of a merged model into `target`, without what is none of a model's or a pickle."""
    for file in sorted(source.iterdir()):
        if file.is_file() and not file.name.startswith("_") and file.suffix in SUFFIXES:
            place(file, target / file.name)
    _free_tokenizer(target)


def _free_tokenizer(folder: Path) -> None:
    """Take out of a tokenizer's settings what is of the machine that wrote them, and the name of a class that only
    transformers 5 has; earlier versions have it under another."""
    file = folder / "tokenizer_config.json"
    if not file.is_file():
        return
    settings = json.loads(file.read_text(encoding="utf-8"))
    for key in ("is_local", "local_files_only", "name_or_path"):
        settings.pop(key, None)
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    file.unlink()  # it may be a link to the store's
    file.write_text(json.dumps(settings, ensure_ascii=False, indent=2), encoding="utf-8")


def place_gguf(source: Path, target: Path, gguf: GgufRef, place: Place) -> None:
    """Put the model's GGUF files into `target`, and the system prompt where Ollama looks for it in a repository. An
    adapter and its base stay behind: there they would pass for the model."""
    for name in (*gguf.files.values(), gguf.modelfile, gguf.extras.get("imatrix")):
        if name:
            place(source / name, target / name)
    if gguf.system:
        (target / "system").write_text(gguf.system, encoding="utf-8")


def place_adapter(
    source: Path,
    target: Path,
    base: BaseRef,
    base_folder: Path,
    adapter: TrainedRef,
    trust_remote_code: bool,
    place: Place,
) -> None:
    """Put an adapter as PEFT reads it and its tokenizer into `target`: for the base's public id and commit, scaled by
    its strength. Raises ExportError for what is no adapter, or not to be scaled as one."""
    settings_file, weights_file = source / "adapter_config.json", source / "adapter_model.safetensors"
    if not settings_file.is_file() or not weights_file.is_file():
        raise ExportError(f"Method {adapter.method} trains whole weights and no adapter: push them with --as merged.")
    settings = json.loads(settings_file.read_text(encoding="utf-8"))
    # What is not on the Hub is named only where its name says so by itself: another's model could have any other one.
    packaged = base.source if base.source.startswith("package:") else None
    settings |= {"base_model_name_or_path": base.source if base.revision else packaged, "revision": base.revision}
    if adapter.strength == 1:
        place(weights_file, target / weights_file.name)
    else:
        _scale_lora(weights_file, target / weights_file.name, adapter.strength)
    (target / settings_file.name).write_text(json.dumps(settings, indent=1, sort_keys=True), encoding="utf-8")
    from tasks.models.tokenizer import load_tokenizer, save_tokenizer

    save_tokenizer(load_tokenizer(base_folder, base.template, trust_remote_code), target)
    _free_tokenizer(target)


def _scale_lora(source: Path, target: Path, strength: float) -> None:
    """Write a LoRA adapter that adds `strength` times what the one in `source` adds: B times it."""
    from safetensors.torch import load_file, save_file

    weights = load_file(source)
    if others := [name for name in weights if ".lora_" not in name or "magnitude" in name]:
        raise ExportError(
            f"A strength of {strength:g} is not one of an adapter that is more than LoRA's matrices (it has "
            f"{others[0]}): push the merged model with --as merged."
        )
    scaled = {n: w * strength if ".lora_B" in n or "lora_embedding_B" in n else w for n, w in weights.items()}
    save_file({n: w.contiguous() for n, w in scaled.items()}, target, metadata={"format": "pt"})


# --- the upload -------------------------------------------------------------------------------------------------------


def check_repo(repo: str, base: str | None) -> None:
    """Raise ConfigError unless `repo` can be the id of a repository, and is not the base's own."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
        valid = repo.count("/") == 1
    except HFValidationError:
        valid = False
    if not valid:
        raise ConfigError(
            f"--repo {repo!r} is not a repository's id: expected NAMESPACE/NAME (your user or organisation, then "
            "letters, digits, -, _ and ., at most 96 in all)."
        )
    if repo == base:
        raise ConfigError(
            f"--repo {repo} is the base itself, which would be overwritten: name a repository of its own."
        )


def check_token() -> None:
    """Raise ExportError where there is no token to write to the Hub with, or the Hub is switched off."""
    from huggingface_hub import constants, get_token

    if constants.is_offline_mode():
        raise ExportError(
            "HF_HUB_OFFLINE is set, so nothing can be pushed: unset it, or write a folder with --dry-run."
        )
    if get_token() is None:
        raise ExportError(f"There is no Hugging Face token here: {LOG_IN}.")


def push_folder(folder: Path, repo: str, private: bool, message: str) -> Pushed:
    """Upload a folder as one commit to the model repository `repo`, which is created if it is not there, and deleted
    again where it was created and nothing came into it. Raises ExportError in a sentence, without the token.

    huggingface_hub sends large files through Xet, which takes up where an upload was broken off: what has gone up is
    not sent again. It splits commits only above 20 files, which no model of ours has."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries; what comes of them is told
    api = HfApi()
    created = False
    try:
        try:
            found: Any = api.model_info(repo)
        except HfHubHTTPError as error:
            if not isinstance(error, RepositoryNotFoundError) and error.response.status_code != 404:
                raise
            found = None
        if found is None:
            api.create_repo(repo, private=private or None)
            created = True
        elif private and not found.private:
            raise ExportError(
                f"{repo} is there already and public: make it private in its settings, or name another --repo."
            )
        stale = None if created else STALE
        commit = api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message, delete_patterns=stale)
    except BaseException as error:
        left = _undo(api, repo) if created else ""
        if isinstance(error, ExportError) or not isinstance(error, Exception):
            raise
        raise ExportError(_sentence(error, repo, shown(api.endpoint)) + left) from None
    return Pushed(repo, f"{shown(api.endpoint)}/{repo}", commit.oid, created, bool(found.private if found else private))


def _undo(api: Any, repo: str) -> str:
    """Delete a repository just created, unless more than its first commit is in it; return what is left to say."""
    try:
        if len(api.list_repo_commits(repo)) <= 1:  # the Hub makes the first one itself
            api.delete_repo(repo)
        return ""
    except Exception:
        return f" The repository {repo}, created for it, could not be deleted again: do that on its page."


def _sentence(error: Exception, repo: str, endpoint: str) -> str:
    """Return what went wrong and what to do; nothing of the request, where the token is."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    response = getattr(error, "response", None)
    # hf_xet has its statuses in the words of an error of connections.
    in_words = re.search(r"HTTP status \w+ error \((\d{3})", str(error))
    status = response.status_code if response is not None else int(in_words.group(1)) if in_words else None
    said = f" ({_one_line(message)})" if (message := getattr(error, "server_message", None)) else ""
    namespace = repo.partition("/")[0]
    again = "run this again: what has gone up already is not sent twice"
    if status == 401:
        return f"The Hub does not accept the token{said}: {LOG_IN}."
    if status == 403:
        return (
            f"The token has no right to write to {repo}{said}: take a token that may write to {namespace}, or name "
            "another --repo."
        )
    if status == 404:
        return f"The Hub has no {namespace} that this token may write to: name your user or organisation in --repo."
    if status == 409:
        return f"{repo} is taken already by a repository that this token cannot see: name another --repo."
    if status is not None:
        return f"The Hub refused {repo} with HTTP {status}{said}: {again if status >= 429 else 'look at its settings'}."
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so nothing can be pushed: unset it, or write a folder with --dry-run."
    if kinds & {"TransportError", "ConnectionError", "OSError"}:
        return f"{endpoint} cannot be reached, or broke off: check the network, then {again}."
    return f"The upload to {repo} failed: {_one_line(str(error)) or type(error).__name__}. Mend it, then {again}."


def _one_line(text: str) -> str:
    from huggingface_hub import get_token

    return " ".join(text.split())[:300].replace(get_token() or "\0", "…").rstrip(".")
