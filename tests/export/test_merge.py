"""What is merged, and what is refused a merge."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from tasks.core.config import ModelConfig, TrainConfig
from tasks.core.errors import ExportError
from tasks.core.records import AdapterRef, ArtifactRef, BaseRef
from tasks.export.merge import suit_older_readers
from tasks.export.steps import merge_adapter
from tasks.models.load import load_model
from tasks.models.template import render
from tasks.models.tokenizer import load_tokenizer

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


def test_older_readers_find_the_template_the_rotary_base_and_the_precision(tiny_folder: Path, tmp_path: Path) -> None:
    """Shown by hand too: transformers 4.46 reads such a folder with the same logits, and refuses one without."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    suit_older_readers(folder)
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert tokenizer["chat_template"] == (folder / "chat_template.jinja").read_text(encoding="utf-8")
    assert (config["rope_theta"], config["torch_dtype"]) == (config["rope_parameters"]["rope_theta"], config["dtype"])
    talk = [{"role": "user", "content": "你好 🙂"}]
    tokenizers = [load_tokenizer(f, "auto") for f in (tiny_folder, folder)]
    texts = [render(tokenizer, talk, answer_next=True) for tokenizer in tokenizers]
    ids = [tokenizer(text)["input_ids"] for tokenizer, text in zip(tokenizers, texts, strict=True)]
    assert ids[0] == ids[1]
    logits = [load_model(f, torch.float32, "cpu")(torch.tensor([ids[0]])).logits for f in (tiny_folder, folder)]
    assert torch.equal(*logits)
