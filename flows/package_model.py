"""Merge an adapter, convert it to GGUF and prove the files, on a deployment whose machine has the memory."""

from prefect import flow

from flows.dispatch import handing_over, run_on
from tasks.core.config import ExportConfig, ModelConfig
from tasks.core.records import BaseRef, GgufRef, ModelRef, ProofRef, TokensRef, TrainedRef
from tasks.core.settings import read_settings
from tasks.core.store import open_store
from tasks.export.steps import convert_to_gguf, merge_adapter, prove_gguf


class Package(ModelRef):
    """The merged model, its GGUF files and their proof."""

    gguf: GgufRef
    proof: ProofRef


@flow(name="package-model", persist_result=False)
def package_model_flow(
    model: ModelConfig, export: ExportConfig, base: BaseRef, adapter: TrainedRef, tokens: TokensRef, store_url: str
) -> Package:
    """Return what is shipped of an adapter, proven on rows of `tokens` to be the model that was measured."""

    def work() -> Package:
        merged = merge_adapter(model, base, adapter, store_url)
        gguf = convert_to_gguf(model, export, base, adapter, merged, tokens, store_url)
        return Package(**merged.model_dump(), gguf=gguf, proof=prove_gguf(gguf, merged, tokens, store_url))

    return handing_over(store_url, work)


def package_model(
    model: ModelConfig,
    export: ExportConfig,
    base: BaseRef,
    adapter: TrainedRef,
    tokens: TokensRef,
    store_url: str,
    on: str,
) -> Package:
    """Return what package_model_flow does `on` a deployment."""
    asked = {"model": model, "export": export, "base": base, "adapter": adapter, "tokens": tokens}
    store = open_store(read_settings(store_url))
    return run_on(on, {**asked, "store_url": store_url}, Package, store, "merge")
