"""Merging, converting and registering as Prefect tasks."""

from pathlib import Path
from typing import Any

from prefect import task

from tasks.core.config import ExportConfig, ModelConfig
from tasks.core.digest import file_sha256
from tasks.core.errors import ExportError
from tasks.core.hardware import resolve_dtype
from tasks.core.progress import report_progress
from tasks.core.records import AdapterRef, BaseRef, GgufRef, ModelRef, OllamaRef
from tasks.core.settings import read_settings
from tasks.core.stages import gguf_stage, merged_stage
from tasks.core.store import open_store, stored
from tasks.policy import STAGE_OPTIONS

MODELFILE = "Modelfile"


@task(name="merge-adapter", **STAGE_OPTIONS)
def merge_adapter(model: ModelConfig, base: BaseRef, adapter: AdapterRef, store_url: str) -> ModelRef:
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
            adapter.method,
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
def convert_to_gguf(export: ExportConfig, merged: ModelRef, store_url: str) -> GgufRef:
    """Return the GGUF files, quantised, with a Modelfile and one answer of the file that will be registered."""
    store = open_store(read_settings(store_url))

    def make(folder: Path) -> dict[str, Any]:
        from tasks.export.gguf import convert_to_gguf as convert
        from tasks.export.gguf import generate_sample, quantise_gguf
        from tasks.export.ollama import write_modelfile
        from tasks.models.template import default_system
        from tasks.models.tokenizer import load_tokenizer

        source = store.local_folder(merged.artifact)
        system = export.system or default_system(load_tokenizer(source, "auto"))
        files = {quantisation: f"model-{quantisation}.gguf" for quantisation in export.quantisations}
        f16 = folder / files.get("f16", "model-f16.gguf")
        report_progress("gguf", 0, len(files), "converting to F16")
        convert(source, f16)
        for done, (quantisation, name) in enumerate(files.items()):
            if quantisation != "f16":
                report_progress("gguf", done, len(files), f"quantising to {quantisation}")
                quantise_gguf(f16, folder / name, quantisation)
        if "f16" not in files:
            f16.unlink()
        registered = folder / files[export.serve]
        (folder / MODELFILE).write_text(write_modelfile(registered.name, system=system, parameters={}), "utf-8")
        sample = generate_sample(registered, export.prompt, system)
        if not sample.text:
            raise ExportError(
                f"{registered.name} answers nothing to {export.prompt!r}: the exported model is not usable. "
                "The merged safetensors are in the store."
            )
        return {
            "files": files,
            "sha256": {q: file_sha256(folder / name) for q, name in files.items()},
            "sizes_bytes": {q: (folder / name).stat().st_size for q, name in files.items()},
            "modelfile": MODELFILE,
            "system": system,
            "prompt": export.prompt,
            "sample": sample.text,
            "stopped": sample.stopped,
        }

    return stored(store, gguf_stage(export, merged), GgufRef, make)


@task(name="register-in-ollama", **STAGE_OPTIONS)
def register_in_ollama(export: ExportConfig, gguf: GgufRef, name: str, store_url: str) -> OllamaRef:
    """Return the model's name in Ollama, or how to register it by hand where no Ollama answers."""
    from tasks.export.register import register

    return register(export, gguf, name, open_store(read_settings(store_url)))
