"""Registration of an exported model in Ollama: under a name of its own per file, only if an Ollama answers."""

import json

from tasks.core.config import ExportConfig
from tasks.core.digest import canonical_json
from tasks.core.progress import report_progress
from tasks.core.records import GgufRef, OllamaRef
from tasks.core.settings import read_settings
from tasks.core.store import Store
from tasks.export.ollama import check_name, is_reachable, register_model


def register(export: ExportConfig, gguf: GgufRef, recipe_name: str, store: Store) -> OllamaRef:
    """Return the model's name in Ollama after one generation there; or, where no Ollama answers, the command that
    registers it by hand. Raises ExportError where Ollama answers and refuses."""
    sha256 = gguf.sha256[export.serve]
    name = f"{export.ollama_name or recipe_name}:{sha256[:8]}"
    check_name(name)
    url = read_settings().ollama_url
    folder = store.local_folder(gguf.artifact)
    if is_reachable(url) is None:
        note = f"cd {folder} && ollama create {name} -f {gguf.modelfile}"
        return OllamaRef(name=name, url=url, registered=False, note=note)
    # The digest that Ollama gave at the last registration tells whether it still holds the same model.
    memory = f"registry/ollama/{name.replace('/', '--').replace(':', '--')}.json"
    known = json.loads(store.read_bytes(memory) or b"{}")
    done = register_model(
        url,
        name,
        folder / gguf.files[export.serve],
        sha256,
        system=gguf.system,
        parameters={},
        known_digest=known.get(url),
        progress=lambda sent, total: report_progress("ollama", sent, total, "uploading"),
        prompt=gguf.prompt,
    )
    store.write_bytes(memory, canonical_json({**known, url: done.digest}))
    sample = done.generation.text if done.generation else None
    return OllamaRef(name=name, url=url, registered=True, digest=done.digest, sample=sample)
