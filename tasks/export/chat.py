"""Chat models behind one interface: a GGUF file in llama.cpp, a model in transformers, a name in a running Ollama.

All write alike: temperature, then top-p, without penalties or other cuts. Deliberately not here: the terminal, and what
was said before.
"""

import codecs
import contextlib
import os
import threading
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal, Protocol

from tasks.core.config import ModelConfig, TemplateName
from tasks.core.errors import ConfigError, ExportError, ForgetlessError, ModelError
from tasks.core.hardware import device_class
from tasks.core.manifest import RunManifest
from tasks.core.settings import read_settings
from tasks.core.stages import base_stage
from tasks.core.store import Store
from tasks.export.ollama import is_reachable, read_context, read_digest, stream_chat
from tasks.export.register import model_name
from tasks.models.base import locate_base, open_base, read_gguf_metadata
from tasks.models.template import Message, check_template, render
from tasks.models.tokenizer import load_tokenizer

Kind = Literal["auto", "adapter", "merged", "gguf", "ollama"]
MOST_CONTEXT = 8192  # of a GGUF file: llama.cpp takes the memory for all of it at once, 1 GiB for an 8B model


@dataclass(frozen=True)
class Sampling:
    """How an answer is written: greedily at temperature 0, else by chance, which the seed repeats."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    max_tokens: int = 512


class ChatModel(Protocol):
    label: str
    """What it is, and what runs it."""
    system: str | None
    """What a conversation begins with; None where the template or the server adds its own, if any."""
    context: int | None
    """Tokens that a conversation and its next answer may have; None where that is not known."""

    def count(self, messages: list[Message]) -> int:
        """Return the tokens of a conversation, up to where the model would answer."""

    def stream(self, messages: list[Message], sampling: Sampling) -> Generator[str, None, bool]:
        """Yield the answer piece by piece, and return whether the model ended it itself. Raises ForgetlessError."""


def fit(model: ChatModel, messages: list[Message], max_tokens: int) -> list[Message]:
    """Return the conversation without its oldest turns, as many as leave room for an answer of `max_tokens` (at most
    half of the context). The system prompt and the last message always stay."""
    if model.context is None:
        return messages
    first = 1 if messages[0]["role"] == "system" else 0
    most = model.context - min(max_tokens, model.context // 2)
    while len(messages) > first + 1 and model.count(messages) > most:
        messages = [*messages[:first], *messages[first + 2 :]]  # a question and its answer
    return messages


# --- models -----------------------------------------------------------------------------------------------------------


class GgufModel:
    """A GGUF file. Raises ModelError where it is absent, is no whole GGUF, has no chat template or cannot be run."""

    def __init__(self, path: Path, name: str, system: str | None = None) -> None:
        import llama_cpp
        from llama_cpp.llama_chat_format import Jinja2ChatFormatter

        from tasks.models.llama import quiet_llama

        if not path.is_file():
            raise ModelError(f"{path} is not there: expected a .gguf file.")
        metadata = read_gguf_metadata(path)
        template = metadata.get("tokenizer.chat_template")
        if not template:
            raise ModelError(f"{path} has no chat template, so there is no telling a question from its answer.")
        check_template(template, str(path))
        made_for = int(metadata.get(f"{metadata.get('general.architecture')}.context_length", MOST_CONTEXT))
        # llama.cpp would read prompts with every core, and its threads wait for each other without sleeping: beside
        # another busy process a prompt took five times as long with two threads on two cores as with one.
        threads = max(1, (os.cpu_count() or 1) // 2)
        self.context: int | None = min(made_for, MOST_CONTEXT)
        with quiet_llama() as notes:
            try:
                self.llama = llama_cpp.Llama(
                    str(path),
                    n_ctx=min(made_for, MOST_CONTEXT),
                    n_threads=threads,
                    n_threads_batch=threads,
                    verbose=False,
                )
            except (ValueError, RuntimeError) as error:
                raise ModelError(f"{path} cannot be run: {error} {notes[-1] if notes else ''}".strip()) from error
        vocabulary = llama_cpp.llama_model_get_vocab(self.llama.model)
        self.is_end: Callable[[int], bool] = lambda token: llama_cpp.llama_vocab_is_eog(vocabulary, token)
        ends = (self.llama.token_eos(), self.llama.token_bos())
        eos, bos = (llama_cpp.llama_vocab_get_text(vocabulary, t).decode() if t >= 0 else "" for t in ends)
        self.formatter = Jinja2ChatFormatter(template, eos_token=eos, bos_token=bos)
        self.label, self.system = f"{name} (llama.cpp)", system

    def _encode(self, messages: list[Message]) -> list[int]:
        try:
            text = self.formatter(messages=messages).prompt  # type: ignore[arg-type]
        except Exception as error:  # its own refusal, the sandbox's, or whatever a broken one raises
            roles = ", ".join(message["role"] for message in messages)
            raise ModelError(f"The file's chat template refuses a conversation of {roles}: {error}") from None
        return list(self.llama.tokenize(text.encode(), add_bos=False, special=True))

    def count(self, messages: list[Message]) -> int:
        return len(self._encode(messages))

    def stream(self, messages: list[Message], sampling: Sampling) -> Generator[str, None, bool]:
        tokens = self._encode(messages)
        most = _room(self.context, len(tokens), sampling.max_tokens)
        if sum(message["role"] != "system" for message in messages) == 1:
            self.llama.reset()  # what was computed before may change a rounding, and equal questions their answers
        self.llama.set_seed(sampling.seed)
        # Not create_completion, which goes past its limit where a character comes in several tokens.
        characters = codecs.getincrementaldecoder("utf-8")("replace")
        written = self.llama.generate(
            tokens, top_k=0, top_p=sampling.top_p, min_p=0.0, temp=sampling.temperature, repeat_penalty=1.0
        )
        try:
            for number, token in enumerate(written, 1):
                ended = self.is_end(token)
                if not ended and (text := characters.decode(self.llama.detokenize([token]))):
                    yield text
                if ended or number == most:
                    return ended
        except RuntimeError as error:
            raise ModelError(f"{self.label} broke off its answer: {error}") from error
        return False


class TransformersModel:
    """A model in memory, with its tokenizer."""

    def __init__(self, model: Any, tokenizer: Any, name: str, system: str | None = None) -> None:
        from transformers import GenerationConfig

        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        found = base.generation_config.eos_token_id
        self.ends = sorted({*(found if isinstance(found, list) else [found]), tokenizer.eos_token_id} - {None})
        # In place of its author's, whose penalties and cuts the same model would not have in llama.cpp.
        pad = self.ends[0] if self.ends else 0
        base.generation_config = GenerationConfig(eos_token_id=self.ends or None, pad_token_id=pad)
        self.model, self.tokenizer, self.device, self.system = model, tokenizer, base.device, system
        self.label = f"{name} (transformers, {str(base.dtype).removeprefix('torch.')})"
        limit = getattr(base.config.get_text_config(), "max_position_embeddings", None)
        self.context = limit - getattr(model, "virtual_tokens", 0) if limit else None

    def _encode(self, messages: list[Message]) -> list[int]:
        text = render(self.tokenizer, messages, answer_next=True)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def count(self, messages: list[Message]) -> int:
        return len(self._encode(messages))

    def stream(self, messages: list[Message], sampling: Sampling) -> Generator[str, None, bool]:
        import torch

        tokens = self._encode(messages)
        most = _room(self.context, len(tokens), sampling.max_tokens)
        inputs = torch.tensor([tokens], device=self.device)
        options: dict[str, Any] = {"do_sample": False}
        if sampling.temperature:
            options = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        written = _Written()

        def write() -> None:
            try:
                torch.manual_seed(sampling.seed)
                self.model.generate(
                    input_ids=inputs,
                    attention_mask=torch.ones_like(inputs),
                    max_new_tokens=most,
                    streamer=written,
                    **options,
                )
                written.queue.put(None)
            except Exception as error:  # for the thread that reads
                written.queue.put(error)

        thread = threading.Thread(target=write, daemon=True)
        thread.start()
        ids: list[int] = []
        shown = ""
        try:
            while isinstance(item := written.queue.get(), list):
                ids += item
                text = str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
                if not text.endswith("\ufffd") and text != shown:  # else a part of a character is to come
                    yield text[len(shown) :]
                    shown = text
        finally:
            written.closed = True
            thread.join()
        if item is not None:
            raise ModelError(f"{self.label} broke off its answer: {type(item).__name__}: {item}") from item
        return ids[-1:] != [] and ids[-1] in self.ends


class _Written:
    """Where transformers' generate puts its tokens, the prompt's first: a queue, until nobody reads any more."""

    def __init__(self) -> None:
        self.queue: SimpleQueue[list[int] | Exception | None] = SimpleQueue()
        self.closed = self.began = False

    def put(self, tokens: Any) -> None:
        if self.closed:
            raise InterruptedError
        if self.began:
            self.queue.put(tokens.flatten().tolist())
        self.began = True

    def end(self) -> None:
        pass


class OllamaModel:
    """A model of a running Ollama. Raises ExportError where none answers, or the model is not there: `remedy` says
    what to do then."""

    def __init__(self, name: str, remedy: str) -> None:
        self.url, self.name = read_settings().ollama_url, name
        if is_reachable(self.url) is None:
            raise ExportError(
                f"No Ollama answers at {self.url}. Start it (ollama serve), or set OLLAMA_HOST to where it runs."
            )
        if not read_digest(self.url, name):
            raise ExportError(f"The Ollama at {self.url} has no model {name!r}. {remedy}")
        self.label = f"{name} (Ollama)"
        self.system: str | None = None
        self.context: int | None = None
        self.tokens_per_char = 0.0

    def count(self, messages: list[Message]) -> int:
        """Return an estimate: Ollama counts the tokens of a conversation only when it answers."""
        return round(self.tokens_per_char * sum(len(message["content"]) for message in messages))

    def stream(self, messages: list[Message], sampling: Sampling) -> Generator[str, None, bool]:
        options = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": sampling.seed,
            "num_predict": sampling.max_tokens,
            **{"top_k": 0, "min_p": 0.0, "repeat_penalty": 1.0},  # its own defaults would be a cut and a penalty
        }
        done = yield from stream_chat(self.url, self.name, messages, options)
        self.context = self.context or read_context(self.url, self.name)
        chars = sum(len(message["content"]) for message in messages)
        self.tokens_per_char = done.get("prompt_eval_count", 0) / max(1, chars)
        return done.get("done_reason") == "stop"


def _room(context: int | None, size: int, max_tokens: int) -> int:
    """Return how many tokens an answer may have. Raises ModelError where the question leaves no room for any."""
    if context is None:
        return max_tokens
    if size >= context:
        raise ModelError(
            f"That makes {size:,} tokens, and the model reads {context:,}: shorten it or the system prompt."
        )
    return min(max_tokens, context - size)


# --- opening ----------------------------------------------------------------------------------------------------------


def open_path(path: Path) -> ChatModel:
    """Return the model of a GGUF file, or of a folder as Hugging Face has it. Raises ModelError."""
    if path.suffix == ".gguf" or path.is_file():
        return GgufModel(path, path.name)
    if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        raise ModelError(f"{path} holds an adapter, not a model. Chat with its run: forgetless chat RUN --as adapter")
    if not (path / "config.json").is_file():
        found = "no config.json in it" if path.is_dir() else "nothing"
        raise ModelError(
            f"{path}: expected a .gguf file, or a folder with config.json and *.safetensors; found {found}."
        )
    tokenizer = load_tokenizer(path, None)
    if not tokenizer.chat_template:
        raise ModelError(f"{path} has no chat template, so there is no telling a question from its answer.")
    return TransformersModel(_load(path), tokenizer, str(path))


def open_named(name: str) -> ChatModel:
    """Return a model of a running Ollama by its name. Raises ExportError."""
    return OllamaModel(name, "See: ollama list")


def open_run(store: Store, run: RunManifest, kind: Kind, quantisation: str | None = None) -> ChatModel:
    """Return what a run made. `kind` auto is its GGUF file, or its adapter where that cannot be merged. Raises
    ForgetlessError, saying what to do, where the run did not get that far."""
    kind = _resolve(run, kind)
    if quantisation and kind != "gguf":
        raise ConfigError(
            f"--file chooses among a run's GGUF files, and the {kind} model is none of them: leave it out."
        )
    if kind == "adapter":
        return _open_adapter(store, run)
    if kind == "merged":
        if run.merged is None:
            raise _unfinished(run, "merged model")
        folder = store.local_folder(run.merged.artifact)
        model = _load(folder, run.recipe.model)
        tokenizer = load_tokenizer(folder, "auto", run.recipe.model.trust_remote_code)
        return TransformersModel(model, tokenizer, f"{run.run_id}, merged", run.recipe.export.system)
    if run.gguf is None:
        raise _unfinished(run, "exported model")
    if kind == "ollama":
        name = run.ollama.name if run.ollama else model_name(run.recipe.export, run.gguf, run.recipe.name)
        return OllamaModel(name, f"Register it: forgetless export {run.run_id} --to ollama")
    quantisation = quantisation or run.recipe.export.serve
    if quantisation not in run.gguf.files:
        known = ", ".join(run.gguf.files)
        raise ConfigError(f"The run has no GGUF file {quantisation!r}; expected one of {known}.")
    file = run.gguf.files[quantisation]
    return GgufModel(store.local_folder(run.gguf.artifact) / file, file, run.gguf.system)


def open_run_base(store: Store, run: RunManifest, kind: Kind) -> ChatModel:
    """Return the base of a run: a GGUF file in llama.cpp where a GGUF file or Ollama is compared with it, else in
    transformers. Raises ForgetlessError."""
    if run.base is None:
        raise _unfinished(run, "base model")
    config, system = run.recipe.model, run.gguf.system if run.gguf else run.recipe.export.system
    can_be_gguf = config.base.endswith(".gguf") and config.template == TemplateName.AUTO
    if can_be_gguf and _resolve(run, kind) in ("gguf", "ollama"):
        with contextlib.suppress(ModelError):  # it may be gone from this machine: the store has it for transformers
            source = locate_base(config, store=store)
            if base_stage(config, source.content).key == run.base.artifact.key:  # the very file that was trained on
                return GgufModel(source.path, config.base, system)
    folder = open_base(store, run.base, config)
    tokenizer = load_tokenizer(folder, run.base.template, config.trust_remote_code)
    return TransformersModel(_load(folder, config), tokenizer, run.base.source, system)


def _resolve(run: RunManifest, kind: Kind) -> Kind:
    if kind != "auto":
        return kind
    return "adapter" if run.adapter and run.adapter.unmerged else "gguf"


def _open_adapter(store: Store, run: RunManifest) -> ChatModel:
    if run.adapter is None or run.base is None:
        raise _unfinished(run, "adapter")
    from tasks.models.load import load_shipped, pick_dtype

    config, adapter = run.recipe.model, run.adapter
    folder = open_base(store, run.base, config)
    place = adapter.folder(store.local_folder(adapter.artifact))
    options = (adapter.method, pick_dtype("auto"), device_class(), config.trust_remote_code, adapter.strength)
    model = _loaded(f"The adapter in {place}", lambda: load_shipped(folder, place, *options))
    tokenizer = load_tokenizer(folder, run.base.template, config.trust_remote_code)
    name = f"{run.base.source} with the adapter of {run.run_id}"
    return TransformersModel(model, tokenizer, name, run.recipe.export.system)


def _load(folder: Path, config: ModelConfig | None = None) -> Any:
    from tasks.models.load import load_model, pick_dtype

    trust = config is not None and config.trust_remote_code
    return _loaded(
        f"The model in {folder}",
        lambda: load_model(folder, pick_dtype("auto"), device_class(), trust_remote_code=trust),
    )


def _loaded(what: str, load: Callable[[], Any]) -> Any:
    from safetensors import SafetensorError

    try:
        return load()
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, SafetensorError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"{what} cannot be loaded: {reason.rstrip('.')}. If its files are damaged, delete it and make it anew."
        ) from error


def _unfinished(run: RunManifest, what: str) -> ForgetlessError:
    skipped = run.stages["gguf"].note if "gguf" in run.stages else ""
    reason = f" ({run.error or skipped})" if run.error or skipped else ""
    steps = [] if run.status == "completed" else ["run its recipe again to finish it"]
    steps += [f"chat with its adapter: forgetless chat {run.run_id} --as adapter"] if run.adapter else []
    return ForgetlessError(
        f"Run {run.run_id} has no {what}: it is {run.status}{reason}. To go on, {', or '.join(steps)}"
    )
