"""Registration of an exported model in Ollama: under a name of its own per file, only if an Ollama answers; and
promotion, in the registry first and then in Ollama, or in neither."""

import contextlib
import json
from typing import NamedTuple

from tasks.core import registry
from tasks.core.config import ExportConfig
from tasks.core.digest import canonical_json, file_sha256, sha256
from tasks.core.errors import ConfigError, ConflictError, ExportError, ForgetlessError, StoreError
from tasks.core.ollama import name_problem
from tasks.core.progress import report_progress
from tasks.core.records import BaseRef, GgufRef, ModelRef, OllamaRef, ProofRef
from tasks.core.registry import Move, Version
from tasks.core.settings import read_settings
from tasks.core.store import Store
from tasks.export.ollama import (
    check_name,
    delete_model,
    is_reachable,
    move_alias,
    push_model,
    read_digest,
    register_model,
)
from tasks.export.prompts import go_templates, prompt_cases
from tasks.models.encode import common_start
from tasks.models.tokenizer import load_tokenizer

SMOKE_TOKENS = 48  # as many as llama.cpp may answer with
ENOUGH_TOKENS = 192  # for an answer that llama.cpp ended within those, in other words


class InOllama(NamedTuple):
    """`alias`: name in Ollama that is now the version that the registry says; None where it is not there. `note`: what
    a user should know of it."""

    alias: str | None
    note: str


def require_proven(export: ExportConfig, gguf: GgufRef, proof: ProofRef | None, store: Store) -> None:
    """Raise ExportError where the file that would be registered is not the model that was measured, or no longer the
    file that was proven."""
    if proof is None:
        raise ExportError("This run's files were never proven: it is of an earlier version. Run its recipe again.")
    found = proof.files[export.serve]
    path = store.local_folder(gguf.artifact) / gguf.files[export.serve]
    if (now := file_sha256(path)) != found.sha256:
        raise ExportError(
            f"{path} is not the file that was proven: its sha256 is {now}, not {found.sha256}. It is not registered; "
            f"delete {gguf.artifact.uri} and run the recipe again, which converts it anew."
        )
    if not found.passed:
        others = [name for name, other in proof.files.items() if other.passed]
        step = f"Set export.serve to one that is ({', '.join(others)})" if others else "Convert it again"
        raise ExportError(
            f"{gguf.files[export.serve]} is not the model that was measured, so it is not registered: "
            f"{'; '.join(found.reasons)}. {step}; the report is in {proof.artifact.uri}."
        )


def model_name(export: ExportConfig, gguf: GgufRef, recipe_name: str) -> str:
    """Return what the served file is called in Ollama: a name of its own per content."""
    return f"{export.ollama_name or recipe_name}:{gguf.sha256[export.serve][:8]}"


def register(
    export: ExportConfig,
    gguf: GgufRef,
    merged: ModelRef,
    base: BaseRef,
    recipe_name: str,
    store: Store,
    expected: str | None = None,
) -> OllamaRef:
    """Return the model's name in Ollama after its prompts were compared with the tokenizer's and it answered; or, where
    no Ollama answers, the command that registers it by hand. `expected` is Hugging Face's greedy answer to gguf.prompt,
    where it is known. Raises ExportError where Ollama answers and refuses, ModelError for an odd template."""
    digest = gguf.sha256[export.serve]
    name = model_name(export, gguf, recipe_name)
    check_name(name)
    url = read_settings().ollama_url
    folder = store.local_folder(gguf.artifact)
    if is_reachable(url) is None:
        note = f"cd {folder} && ollama create {name} -f {gguf.modelfile}"
        return OllamaRef(name=name, url=url, registered=False, note=note)
    tokenizer = load_tokenizer(store.local_folder(merged.artifact), "auto")
    templates = go_templates(tokenizer, gguf.system)
    options = export.ollama_parameters
    inputs = sha256(canonical_json([digest, gguf.system, options, base.license, templates]))
    # The digest that Ollama gave at the last registration tells whether it still holds the same model.
    memory = f"registry/ollama/{name.replace('/', '--').replace(':', '--')}.json"
    known = json.loads(store.read_bytes(memory) or b"{}")
    entry = known.get(url)
    last = OllamaRef(**entry["record"]) if isinstance(entry, dict) and entry["inputs"] == inputs else None
    done = register_model(
        url,
        name,
        folder / gguf.files[export.serve],
        digest,
        system=gguf.system,
        parameters=options,
        templates=templates,
        license_text=base.license,
        cases=prompt_cases(tokenizer, gguf.system),
        known_digest=last.digest if last else None,
        progress=lambda sent, total: report_progress("ollama", sent, total, "uploading"),
        prompt=gguf.prompt,
        max_tokens=ENOUGH_TOKENS if gguf.stopped else SMOKE_TOKENS,
        must_stop=gguf.stopped,
    )
    if done.generation is None:  # nothing was done, as Ollama still has what `last` says
        assert last is not None
        return last.model_copy(update={"created": False, "alias": None})
    answer = done.generation.text.strip()
    unseen = "" if done.compared else f"Its prompts were not compared: Ollama {done.version} does not show them."
    ref = OllamaRef(
        name=name,
        url=url,
        registered=True,
        created=not done.reused and done.replaced is None,
        digest=done.digest,
        template=done.template,
        compared=list(done.compared or ()),
        sample=answer,
        same_start=common_start(answer, (expected or gguf.sample).strip()),
        same_as="Hugging Face" if expected else "llama.cpp",
        note=f"{unseen} {done.left}".strip(),
    )
    try:
        record = {"inputs": inputs, "record": ref.model_dump(mode="json")}
        store.write_bytes(memory, canonical_json({**known, ref.url: record}))
    except BaseException:
        take_back(ref)
        raise
    return ref


def take_back(ref: OllamaRef) -> None:
    """Delete the model where this run created it, and nothing else. Raises ExportError."""
    if ref.created:
        delete_model(read_settings().ollama_url, ref.name)


def promote(
    store: Store, name: str, alias: str, version: Version, why: str, forced: bool = False
) -> tuple[Move, InOllama]:
    """Return the alias's move to a version, and what became of the alias in Ollama. Raises ConflictError, ExportError:
    both then name what they did before."""
    seen = registry.read_current(store, name, alias)
    if seen and seen.version == version.number:  # again: only Ollama may have something else
        return seen, follow(store, name, alias)
    return _moved(store, name, alias, seen, registry.promote_version(store, name, alias, seen, version, why, forced))


def roll_back(store: Store, name: str, alias: str, why: str) -> tuple[Move, InOllama]:
    """Return the alias's move to the version before, and what became of the alias in Ollama. Raises as `promote`, and
    ForgetlessError where no version was before."""
    seen = registry.read_current(store, name, alias)
    return _moved(store, name, alias, seen, registry.roll_back(store, name, alias, seen, why))


def _moved(store: Store, name: str, alias: str, before: Move | None, done: Move) -> tuple[Move, InOllama]:
    """Let Ollama follow what was `done` in the registry, or undo it there."""
    try:
        return done, follow(store, name, alias)
    except BaseException as error:
        what = f"{name}:{alias} names {registry.named(before)} as before."
        try:
            registry.undo_move(store, name, alias, done, before, str(error) or type(error).__name__)
            with contextlib.suppress(ForgetlessError):  # an interrupt may have come after Ollama's alias was moved
                follow(store, name, alias)
        except ConflictError as later:
            what = str(later)
        except StoreError as failed:
            what = f"The registry still says {registry.named(done)}: {failed}"
        if not isinstance(error, ForgetlessError):
            raise
        raise ExportError(f"{error} {what}") from error


def follow(store: Store, name: str, alias: str) -> InOllama:
    """Let the alias in Ollama name the version that the registry's names, where that is in Ollama. Of several at once,
    whoever is last finds the registry as it moved the alias, so both agree in the end. Raises ExportError."""
    url = read_settings().ollama_url
    while True:
        entry = registry.read_current(store, name, alias)
        if entry is None or entry.version is None:
            return InOllama(None, "")
        version = registry.read_version(store, name, entry.version)
        tag = f"{name}:{alias}"
        model = f"{name}:{version.gguf_sha256[:8]}"
        again = f"forgetless export {version.run} --to ollama"
        if is_reachable(url) is None:
            if version.ollama:
                raise ExportError(
                    f"No Ollama answers at {url}, where {model} would get the name {tag}. Start it (ollama "
                    "serve), or set OLLAMA_HOST, then do it again."
                )
            done = InOllama(None, f"No Ollama answers at {url}, so no name was moved there.")
        elif read_digest(url, model):
            done = InOllama(tag, move_alias(url, model, tag))
        elif version.ollama:
            raise ExportError(f"Ollama at {url} has no {model}, which would get the name {tag}. Register it: {again}")
        else:
            done = InOllama(None, f"It is not in Ollama, where {tag} stays what it is. Register it: {again}")
        try:
            if registry.read_current(store, name, alias) == entry:
                return done
        except StoreError:  # nothing fails once Ollama is done; whoever moves the alias next lets it follow too
            return done


def follow_all(store: Store, name: str, run_id: str) -> list[str]:
    """Return the aliases in Ollama that name a run's version as those of the registry do, after they were moved."""
    moves = registry.read_aliases(store, name).items()
    return [done for alias, move in moves if move.run == run_id and (done := follow(store, name, alias).alias)]


def name_to_push(export: ExportConfig, gguf: GgufRef, recipe_name: str, target: str) -> str:
    """Return the name that `target` (NAMESPACE or NAMESPACE/NAME, with a tag or without) means. Raises ConfigError."""
    model = (export.ollama_name or recipe_name).rpartition("/")[2]
    name = target if "/" in target else f"{target}/{model}"
    if ":" not in name.rpartition("/")[2]:
        name += f":{gguf.sha256[export.serve][:8]}"
    if problem := name_problem(name):
        raise ConfigError(f"--push {target}: {problem} Expected NAMESPACE or NAMESPACE/NAME.")
    return name


def push(ref: OllamaRef, name: str) -> None:
    """Push a registered model as `name`. Raises ExportError."""
    url = read_settings().ollama_url
    push_model(url, ref.name, name, lambda sent, total: report_progress("ollama", sent, total, "pushing"))
