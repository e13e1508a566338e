"""What is merged, and what is refused a merge."""

import pytest

from tasks.core.config import ModelConfig, TrainConfig
from tasks.core.errors import ExportError
from tasks.core.records import AdapterRef, ArtifactRef, BaseRef
from tasks.export.steps import merge_adapter

ARTIFACT = ArtifactRef(kind="adapter", key="k", uri="file:///store/adapter/k", content="c", size_bytes=1)


def adapter(method: str) -> AdapterRef:
    counts = {"trainable_parameters": 1, "steps": 1, "tokens": 1, "supervised_tokens": 1, "dropped_too_long": 0}
    losses = {"first_validation_loss": 2.0, "last_validation_loss": 1.0, "curve": []}
    return AdapterRef(artifact=ARTIFACT, method=method, seconds=1.0, dtype="float32", **counts, **losses)


def test_only_virtual_tokens_cannot_be_merged() -> None:
    methods = TrainConfig.model_fields["method"].annotation.__args__  # type: ignore[union-attr]
    assert {m for m in methods if adapter(m).unmerged} == {"prefix", "prompt"}


def test_a_merge_that_cannot_be_is_refused_with_what_to_do(tmp_path) -> None:
    base = BaseRef(
        artifact=ARTIFACT, source="b", revision=None, license=None, template="auto", parameters=1, max_tokens=8
    )
    sentence = r"adapter/k: the virtual tokens of method prompt cannot be merged into weights: load the base with PEFT"
    with pytest.raises(ExportError, match=sentence):
        merge_adapter.fn(ModelConfig(base="b"), base, adapter("prompt"), f"file://{tmp_path}")
