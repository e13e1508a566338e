"""Merging, converting and registering as Prefect tasks."""

import contextlib
import tempfile
from pathlib import Path
from typing import Any

from prefect import task
from prefect.transactions import Transaction, get_transaction

from tasks.core import registry
from tasks.core.config import ExportConfig, ModelConfig
from tasks.core.digest import canonical_json, file_sha256
from tasks.core.errors import ConflictError, ExportError, StoreError
from tasks.core.hardware import resolve_dtype
from tasks.core.progress import report_progress
from tasks.core.records import (
    QUANTISING,
    BaseRef,
    FileRef,
    GgufRef,
    MergeChoice,
    ModelRef,
    OllamaRef,
    ProofRef,
    TokensRef,
    TrainedRef,
)
from tasks.core.registry import Version
from tasks.core.settings import read_settings
from tasks.core.stages import base_file_stage, gguf_stage, merge_choice_stage, merged_stage, precision, proof_stage
from tasks.core.store import Store, open_store, stored
from tasks.export.register import InOllama
from tasks.policy import ONCE_OPTIONS, STAGE_OPTIONS

MODELFILE = "Modelfile"


@task(name="choose-merge", **STAGE_OPTIONS)
def choose_merge(
    model: ModelConfig, base: BaseRef, adapter: TrainedRef, tokens: TokensRef, store_url: str
) -> MergeChoice:
    """Return into which weights an adapter is merged that was trained on a quantised base: those that give the model as
    it was trained."""
    store = open_store(read_settings(store_url))

    def make(folder: Path) -> dict[str, Any]:
        from tasks.export.merge import compare_merges
        from tasks.models.base import open_base
        from tasks.models.load import free_memory, pick_dtype

        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            fields = compare_merges(
                open_base(store, base, model),
                adapter.folder(store.local_folder(adapter.artifact)),
                adapter.method,
                pick_dtype("auto"),
                precision()["device"],
                store.local_folder(tokens.artifact),
                Path(scratch) / "trained.npy",
                lambda done, total: report_progress("after", done, total, "which base to merge into"),
                model.trust_remote_code,
            )
        free_memory()
        (folder / "choice.json").write_bytes(canonical_json(fields))
        return fields

    return stored(store, merge_choice_stage(base, adapter, tokens), MergeChoice, make)


@task(name="merge-adapter", **STAGE_OPTIONS)
def merge_adapter(model: ModelConfig, base: BaseRef, adapter: TrainedRef, store_url: str) -> ModelRef:
    """Return the merged model: the very weights that were scored, as safetensors. Raises ExportError where the method's
    adapters cannot be merged."""
    if adapter.unmerged:
        raise ExportError(f"{adapter.artifact.uri}: {adapter.unmerged}.")
    store = open_store(read_settings(store_url))

    def make(folder: Path) -> dict[str, Any]:
        from tasks.export.merge import write_merged
        from tasks.models.base import open_base
        from tasks.models.load import free_memory, pick_dtype

        report_progress("merge", 0, 0, "merging")
        fields = write_merged(
            open_base(store, base, model),
            adapter.folder(store.local_folder(adapter.artifact)),
            adapter.merges_as,
            base.template,
            pick_dtype(resolve_dtype("auto")),
            folder,
            model.trust_remote_code,
            adapter.strength,
        )
        free_memory()
        return fields

    return stored(store, merged_stage(base, adapter), ModelRef, make)


@task(name="convert-to-gguf", **STAGE_OPTIONS)
def convert_to_gguf(
    model: ModelConfig,
    export: ExportConfig,
    base: BaseRef,
    adapter: TrainedRef,
    merged: ModelRef,
    tokens: TokensRef,
    store_url: str,
) -> GgufRef:
    """Return the GGUF files, quantised, with a Modelfile and one answer of the file that will be registered; with
    export.imatrix the importance matrix of `tokens`, with export.adapter_gguf the adapter as a file of its own."""
    store = open_store(read_settings(store_url))

    def make(folder: Path) -> dict[str, Any]:
        from tasks.export.gguf import convert_to_gguf as convert
        from tasks.export.gguf import generate_sample, pick_source, quantise_gguf
        from tasks.export.ollama import write_modelfile
        from tasks.export.prompts import go_templates
        from tasks.models.template import default_system
        from tasks.models.tokenizer import load_tokenizer

        place = store.local_folder(merged.artifact)
        tokenizer = load_tokenizer(place, "auto", model.trust_remote_code)
        system = export.system or default_system(tokenizer)
        files = {quantisation: f"model-{quantisation}.gguf" for quantisation in export.quantisations}
        extras: dict[str, str] = {}
        kind = pick_source(list(files), merged.dtype)
        source = folder / f"model-{kind}.gguf"
        report_progress("gguf", 0, len(files), f"converting to {kind.upper()}")
        convert(place, source, kind, model.trust_remote_code)
        if export.adapter_gguf:
            report_progress("gguf", 0, len(files), "converting the adapter")
            extras |= _write_adapter(store, model, base, adapter, place, source, folder)
        matrix = None
        if export.imatrix:
            from tasks.export.imatrix import measure_importance, write_importance

            report_progress("gguf", 0, len(files), "measuring what matters to each layer")
            matrix = measure_importance(
                place, source, store.local_folder(tokens.artifact) / "train", merged.dtype, model.trust_remote_code
            )
            extras["imatrix"] = "imatrix.gguf"
            write_importance(matrix, folder / extras["imatrix"])
        for done, (quantisation, name) in enumerate(files.items()):
            if quantisation != kind:
                report_progress("gguf", done, len(files), f"quantising to {quantisation}")
                quantise_gguf(source, folder / name, quantisation, matrix)
        if kind not in files:
            source.unlink()
        registered = folder / files[export.serve]
        modelfile = write_modelfile(
            registered.name,
            system=system,
            parameters=export.ollama_parameters,
            template=go_templates(tokenizer, system)[-1],
            license_text=base.license,
        )
        (folder / MODELFILE).write_text(modelfile, "utf-8")
        sample = generate_sample(registered, export.prompt, system)
        if not sample.text:
            raise ExportError(
                f"{registered.name} answers nothing to {export.prompt!r}: the exported model is not usable. "
                "The merged safetensors are in the store."
            )
        return {
            "files": files,
            "extras": extras,
            "sha256": {q: file_sha256(folder / name) for q, name in (files | extras).items()},
            "sizes_bytes": {q: (folder / name).stat().st_size for q, name in (files | extras).items()},
            "imatrix_tokens": matrix.tokens if matrix else None,
            "imatrix_seconds": matrix.seconds if matrix else None,
            "modelfile": MODELFILE,
            "system": system,
            "prompt": export.prompt,
            "sample": sample.text,
            "stopped": sample.stopped,
        }

    return stored(store, gguf_stage(export, base, adapter, merged, tokens), GgufRef, make)


def _write_adapter(
    store: Store, model: ModelConfig, base: BaseRef, adapter: TrainedRef, merged: Path, converted: Path, folder: Path
) -> dict[str, str]:
    """Write the adapter as a GGUF file; where it was trained on a rounded base, also that base, which no other file is.
    Return the files' names."""
    from tasks.export.adapter import write_adapter
    from tasks.export.gguf import convert_to_gguf as convert
    from tasks.export.merge import write_merged
    from tasks.models.base import open_base
    from tasks.models.load import free_memory, pick_dtype

    place = open_base(store, base, model)
    names = {"adapter": "adapter-f16.gguf"}
    lora = adapter.folder(store.local_folder(adapter.artifact))
    write_adapter(place, lora, merged, converted, folder / names["adapter"], adapter.strength, model.trust_remote_code)
    if adapter.merges_as in QUANTISING:
        names["base"] = "base-f16.gguf"
        with tempfile.TemporaryDirectory(dir=folder) as rounded:
            write_merged(
                *(place, None, adapter.merges_as, base.template, pick_dtype(resolve_dtype("auto"))),
                *(Path(rounded), model.trust_remote_code),
            )
            free_memory()
            convert(Path(rounded), folder / names["base"], "f16", model.trust_remote_code)
    return names


@task(name="prove-gguf", **STAGE_OPTIONS)
def prove_gguf(gguf: GgufRef, merged: ModelRef, tokens: TokensRef, store_url: str) -> ProofRef:
    """Return how near every file is to the merged model, and whether its tokens, template and ends are the same."""
    store = open_store(read_settings(store_url))

    def make(folder: Path) -> dict[str, Any]:
        from tasks.export.proof import prove_file, record_merged
        from tasks.models.load import free_memory

        source, files = store.local_folder(merged.artifact), store.local_folder(gguf.artifact)
        asked = [{"role": "system", "content": gguf.system}] if gguf.system else []
        asked.append({"role": "user", "content": gguf.prompt})
        report_progress("proof", 0, len(gguf.files), "what the merged model answers")
        recorded = record_merged(source, store.local_folder(tokens.artifact), asked)
        free_memory()
        proofs = {}
        for done, (quantisation, name) in enumerate(gguf.files.items()):
            report_progress("proof", done, len(gguf.files), name)
            proofs[quantisation] = prove_file(files / name, quantisation, recorded)
        fields = {
            "files": {name: proof.model_dump() for name, proof in proofs.items()},
            "precision": recorded.precision,
            "answer": recorded.answer,
        }
        (folder / "proof.json").write_bytes(canonical_json(fields))
        return fields

    return stored(store, proof_stage(gguf, merged, tokens), ProofRef, make)


@task(name="convert-base", **STAGE_OPTIONS)
def convert_base(model: ModelConfig, base: BaseRef, store_url: str) -> FileRef:
    """Return the base as an F16 file: what the exported file is compared with in llama.cpp."""
    store = open_store(read_settings(store_url))

    def make(folder: Path) -> dict[str, Any]:
        from tasks.export.gguf import convert_to_gguf as convert
        from tasks.models.base import open_base

        report_progress("served", 0, 0, "converting the base")
        path = folder / "base-f16.gguf"
        convert(open_base(store, base, model), path, "f16", model.trust_remote_code)
        return {"name": path.name, "sha256": file_sha256(path)}

    return stored(store, base_file_stage(base), FileRef, make)


@task(name="register-in-ollama", **ONCE_OPTIONS)
def register_in_ollama(
    export: ExportConfig,
    base: BaseRef,
    merged: ModelRef,
    gguf: GgufRef,
    name: str,
    store_url: str,
    expected: str | None = None,
) -> OllamaRef:
    """Return the model's name in Ollama, or how to register it by hand where no Ollama answers. In a transaction that
    fails later, a model that it created is deleted again."""
    from tasks.export.register import register

    ref = register(export, gguf, merged, base, name, open_store(read_settings(store_url)), expected)
    if transaction := get_transaction():
        transaction.set("registered", ref)
    return ref


@register_in_ollama.on_rollback
def take_back_registration(transaction: Transaction) -> None:
    from tasks.export.register import take_back

    try:
        take_back(transaction.get("registered"))
    except ExportError as error:  # what failed before it is what the user must hear of
        transaction.logger.error(str(error))


@task(name="register-version", **ONCE_OPTIONS)
def register_version(
    name: str, run_id: str, verdict: str, gguf_sha256: str, ollama: OllamaRef | None, store_url: str
) -> Version:
    """Return the run's version of a model in the registry. In a transaction that fails later it is withdrawn."""
    version = registry.add_version(open_store(read_settings(store_url)), name, run_id, verdict, gguf_sha256, ollama)
    if transaction := get_transaction():
        transaction.set("version", (store_url, name, version))
    return version


@register_version.on_rollback
def withdraw_version(transaction: Transaction) -> None:
    store_url, name, version = transaction.get("version")
    try:
        registry.withdraw_version(open_store(read_settings(store_url)), name, version)
    except StoreError as error:
        transaction.logger.error(str(error))


@task(name="promote-version", **ONCE_OPTIONS)
def promote_version(name: str, alias: str, version: Version, why: str, store_url: str) -> InOllama:
    """Return what became of the alias in Ollama after it was moved to a version in the registry. Raises ExportError
    where it cannot be moved there; both aliases then name what they did before."""
    from tasks.export.register import promote

    while True:
        # The verdict holds whatever the alias names, so a run that another was faster than comes after it.
        with contextlib.suppress(ConflictError):
            return promote(open_store(read_settings(store_url)), name, alias, version, why)[1]
