"""Runs that are to be combined: what the new run is, and every reason why there can be none, said before any work."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from flows.cli import _parser, main
from tasks.core.combination import read_combination, read_ranks
from tasks.core.config import CombineConfig, Combining, Recipe, load_combination
from tasks.core.errors import ConfigError
from tasks.core.manifest import RunManifest, write_manifest
from tasks.core.records import AdapterRef, ArtifactRef, BaseRef, TokensRef
from tasks.core.stages import Stage, combined_stage
from tasks.core.store import FileStore, put_artifact

CHAT = {"name": "chat", "role": "target", "measure": "bits_per_byte", "tasks": [{"name": "zh", "texts": "/zh.jsonl"}]}
SUMS = {"name": "sums", "role": "target", "measure": "acc", "tasks": [{"name": "sums", "choices": "/sums.jsonl"}]}
TEXT = {
    "name": "text",
    "role": "retention",
    "measure": "bits_per_byte",
    "tasks": [{"name": "en", "texts": "/en.jsonl"}],
}


def add_run(
    store: FileStore,
    name: str,
    *,
    method: str = "lora",
    ranks: dict[str, int] | None = None,
    settings: dict[str, Any] | None = None,
    base: dict[str, Any] | None = None,
    capabilities: list[dict[str, Any]] | None = None,
    train: dict[str, Any] | None = None,
    shipped: dict[str, Any] | None = None,
    content: str = "c0ffee",
    **manifest: Any,
) -> None:
    """Write a finished run whose adapter has these ranks by module."""

    def write(folder: Path) -> None:
        ranks_ = {"model.layers.0.self_attn.q_proj": 8} if ranks is None else ranks
        factors = {}
        for module, rank in ranks_.items():
            factors[f"base_model.model.{module}.lora_A.weight"] = np.zeros((rank, 4), np.float32)
            factors[f"base_model.model.{module}.lora_B.weight"] = np.zeros((4, rank), np.float32)
        save_file(factors, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **(settings or {})}))

    counts = {"trainable_parameters": 1, "steps": 1, "tokens": 1, "supervised_tokens": 1, "dropped_too_long": 0}
    losses = {"first_validation_loss": 2.0, "last_validation_loss": 1.0, "curve": []}
    with store.work_folder() as folder:
        write(folder)
        facts = {"method": method, "seconds": 1.0, "dtype": "float32", **counts, **losses, **(shipped or {})}
        adapter = put_artifact(store, Stage("adapter", 1, [name], {}), folder, AdapterRef, facts)
    artifact = ArtifactRef(kind="base", key="k", uri="file:///base", content=content, size_bytes=1)
    sizes: dict[str, Any] = {what: {} for what in ("sequences", "tokens", "supervised_tokens", "too_long")}
    found = {"source": "owner/base", "revision": None, "license": None, "template": "auto", "parameters": 1}
    recipe = Recipe.model_validate(
        {
            "name": name.partition("-")[0],
            "model": {"base": "owner/base"},
            "data": {"sources": ["rows.jsonl"]},
            "train": {"method": method, **(train or {})},
            "eval": {"capabilities": capabilities or [CHAT, TEXT]},
            "export": {"step": 3, "ollama_name": "mine"},
        }
    )
    fields: dict[str, Any] = {
        "run_id": name,
        "recipe": recipe,
        "status": "completed",
        "started": datetime(2026, 11, 20, tzinfo=UTC),
        "base": BaseRef(artifact=artifact, **{**found, "max_tokens": 8, **(base or {})}),
        "tokens": TokensRef(artifact=artifact, passed=True, checks=[], digest=name, **sizes),
        "adapter": adapter,
    }
    write_manifest(store, RunManifest(**{**fields, **manifest}))


@pytest.fixture
def two(store: FileStore) -> FileStore:
    add_run(store, "zh-1")
    add_run(store, "sums-2", capabilities=[SUMS, TEXT], settings={"r": 8})  # other bytes
    return store


def read(store: FileStore, *runs: str, suites: list[str] | None = None, name: str | None = None, **changes: Any) -> Any:
    return read_combination(store, load_combination({"runs": list(runs), **changes}), suites or [], name)


# --- what the new run is ----------------------------------------------------------------------------------------------


def test_the_new_run_measures_what_its_parts_did_and_ships_under_its_own_name(two: FileStore) -> None:
    found = read(two, "zh-1", "sums-2", weights=[0.7, 0.3], method="ties")
    assert [(c.name, c.primary) for c in found.recipe.eval.capabilities] == [
        ("chat", False),
        ("text", False),
        ("sums", False),
    ]
    assert found.recipe.eval.primary == "chat", "the first run's"
    assert found.recipe.name == "zh-combined"
    assert found.recipe.description == "Combined by ties: 0.7 of zh-1 and 0.3 of sums-2."
    export = found.recipe.export
    assert (export.strength, export.step, export.ollama_name) == (1.0, None, None)
    assert [(p.run, p.weight, p.method) for p in found.parts] == [("zh-1", 0.7, "lora"), ("sums-2", 0.3, "lora")]
    assert read(two, "sums-2", "zh-1", name="both").recipe.name == "both"


def test_a_primary_target_named_as_such_stays_the_only_one(store: FileStore) -> None:
    add_run(store, "zh-1", capabilities=[TEXT, {**SUMS, "name": "more", "tasks": ["arc"]}, {**CHAT, "primary": True}])
    add_run(store, "sums-2", capabilities=[{**SUMS, "primary": True}, {**CHAT}, TEXT])
    found = read(store, "zh-1", "sums-2").recipe.eval
    assert found.primary == "chat"
    assert [c.name for c in found.capabilities if c.primary] == ["chat"]


def test_a_part_counts_as_its_run_ships_it(store: FileStore) -> None:
    add_run(store, "zh-1", shipped={"strength": 0.5, "step": None})
    add_run(store, "zh-2")
    first, second = read(store, "zh-1", "zh-2", weights=[0.8, 1]).parts
    assert (first.share, second.share) == (0.4, 1.0)


def test_a_suite_says_what_is_measured_instead(two: FileStore, tmp_path: Path) -> None:
    suite = tmp_path / "both.yaml"
    suite.write_text(json.dumps({"capabilities": [{**SUMS, "name": "all"}]}))
    assert [c.name for c in read(two, "zh-1", "sums-2", suites=[str(suite)]).recipe.eval.capabilities] == ["all"]
    suite.write_text(json.dumps({"capabilities": [TEXT]}))
    with pytest.raises(ConfigError, match="at least one capability needs role: target"):
        read(two, "zh-1", "sums-2", suites=[str(suite)])


def test_what_a_run_went_on_from_is_noted_to_count_twice(store: FileStore) -> None:
    add_run(store, "zh-1")
    add_run(store, "zh-2", train={"start_from": "zh-1"})
    assert read(store, "zh-1", "zh-2").notes == ["Run zh-2 went on from zh-1: what that one learned counts twice."]


def test_the_key_holds_what_decides_the_bytes_and_no_name(two: FileStore) -> None:
    def key(*runs: str, **changes: Any) -> str:
        found = read(two, *runs, **changes)
        return combined_stage(found.config, found.base, found.parts).key

    add_run(two, "copy-3")
    copy = two.root / "runs/copy-3/manifest.json"
    copy.write_text((two.root / "runs/zh-1/manifest.json").read_text().replace('"zh-1"', '"copy-3"'))
    plain = key("zh-1", "sums-2", method="ties")
    assert plain == key("copy-3", "sums-2", method="ties", weights=[1, 1], density=0.5)
    others = [
        key("sums-2", "zh-1", method="ties"),
        key("zh-1", "sums-2", method="ties", weights=[1, 2]),
        key("zh-1", "sums-2", method="ties", density=0.4),
        key("zh-1", "sums-2", method="ties", seed=1),
        key("zh-1", "sums-2", method="ties_svd"),
        key("zh-1", "sums-2", method="ties_svd", rank=3),
        key("zh-1", "sums-2", method="sequence"),
    ]
    assert len({plain, *others}) == len(others) + 1


def test_ranks_are_read_from_the_shapes(two: FileStore, tmp_path: Path) -> None:
    factors = {
        "base_model.model.model.embed_tokens.lora_embedding_A": np.zeros((3, 9), np.float32),
        "base_model.model.model.embed_tokens.lora_embedding_B": np.zeros((4, 3), np.float32),
        "base_model.model.h.0.c_attn.lora_A.weight": np.zeros((5, 9), np.float32),
        "base_model.model.h.0.c_attn.lora_B.weight": np.zeros((7, 5), np.float32),
    }
    save_file(factors, tmp_path / "adapter_model.safetensors")
    assert read_ranks(tmp_path) == {"model.embed_tokens": 3, "h.0.c_attn": 5}


def test_the_command_line_knows_every_method() -> None:
    for method in Combining.__args__:
        words = ["--sequence"] if method == "sequence" else ["--method", method]
        assert _parser().parse_args(["combine", "a", "b", *words]).method == method
    assert _parser().parse_args(["combine", "a", "b"]).method == CombineConfig.model_fields["method"].default


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"runs": ["a"]}, "combine: runs: expected two runs or more, each once"),
        ({"runs": ["a", "a"]}, "combine: runs: expected two runs or more, each once"),
        ({"weights": [1]}, "combine: weights: expected one for each of 2 runs, none of them 0, found [1]."),
        ({"weights": [1, 0]}, "combine: weights: expected one for each of 2 runs, none of them 0, found [1, 0]."),
        ({"weights": [1, float("nan")]}, "combine: weights.1: input should be a finite number"),
        ({"method": "ties", "density": 0}, "combine: density: input should be greater than 0, found 0."),
        ({"method": "ties", "density": 1.1}, "combine: density: input should be less than or equal to 1, found 1.1."),
        ({"density": 0.5}, "combine: density: method cat keeps every entry; only ties, dare and magnitude_prune"),
        ({"method": "linear", "rank": 4}, "combine: rank: method linear has the rank of its parts; only svd methods"),
        ({"method": "mean"}, "combine: method: input should be 'cat', 'linear'"),
    ],
)
def test_a_wrong_request_is_one_sentence(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_combination({"runs": ["a", "b"], **given})
    (problem,) = caught.value.problems
    assert problem.startswith(sentence)


OTHER_BASE = {"content": "beef", "base": {"source": "owner/other", "revision": "abc"}}
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no adapter": (
        {"adapter": None, "status": "failed"},
        {},
        "Run b-2 made no adapter: it is failed. Run its recipe again.",
    ),
    "another base": (
        OTHER_BASE,
        {},
        "Run a-1 trained owner/base, and run b-2 trained owner/other at abc. Adapters of different bases cannot be "
        "combined.",
    ),
    "another base in sequence": (OTHER_BASE, {"method": "sequence"}, "Run a-1 trained owner/base, and run b-2 trained"),
    "a base that changed": (
        {"content": "beef"},
        {},
        "Run a-1 trained owner/base, and run b-2 trained owner/base, which was changed between them.",
    ),
    "another template": (
        {"base": {"template": "chatml"}},
        {},
        "Run a-1 was trained with model.template auto, and run b-2 with chatml.",
    ),
    "prefix": ({"method": "prefix"}, {"method": "sequence"}, "Run b-2 cannot be combined: its virtual tokens are no"),
    "prompt": ({"method": "prompt"}, {}, "Run b-2 cannot be combined: its virtual tokens are no weights to add."),
    "full": (
        {"method": "full"},
        {"method": "sequence"},
        "Run b-2 cannot be combined: it is a whole model and no adapter to one.",
    ),
    "oft": (
        {"method": "oft", "train": {"rank": 8}},
        {"method": "ties"},
        "Run b-2 cannot be combined by ties: method oft rotates, and only LoRA's adapters add up. Use --sequence.",
    ),
    "qlora and lora": (
        {"method": "qlora"},
        {},
        "These runs were trained on different weights of their base: a-1 on the base as it is (lora), b-2 on 4 bits "
        "(qlora).",
    ),
    "int8 and lora in sequence": (
        {"method": "int8"},
        {"method": "sequence"},
        "These runs were trained on different weights of their base: a-1 on the base as it is (lora), b-2 on 8 bits",
    ),
    "dora": (
        {"settings": {"use_dora": True}},
        {},
        "Run b-2 cannot be combined by cat: it has DoRA's magnitudes, which do not add up. Use --sequence.",
    ),
    "whole modules": (
        {"settings": {"modules_to_save": ["lm_head"]}},
        {},
        "Run b-2 cannot be combined by cat: it has modules trained whole, which do not add up. Use --sequence.",
    ),
    "other ranks": (
        {"ranks": {"model.layers.0.self_attn.q_proj": 4}},
        {"method": "linear"},
        "Method linear needs adapters of equal rank, and model.layers.0.self_attn.q_proj has rank 8 in run a-1 and 4 "
        "in run b-2. Use --method cat or svd.",
    ),
    "other ranks of other layers": (
        {"ranks": {"model.layers.0.self_attn.v_proj": 4}},
        {"method": "ties"},
        "Method ties needs adapters of equal rank, and run a-1 has ranks up to 8, run b-2 up to 4. Use --method "
        "ties_svd, cat or svd.",
    ),
    "measured differently": (
        {"capabilities": [{**CHAT, "tasks": [{"name": "zh", "texts": "/other.jsonl"}]}]},
        {},
        "The runs a-1 and b-2 measure chat differently. Say what counts with a suite, --suite FILE: the capabilities",
    ),
    "one task in two capabilities": (
        {"capabilities": [{**CHAT, "name": "mine"}]},
        {},
        "The runs a-1 and b-2 measure mine differently. Say what counts with a suite, --suite FILE: the capabilities",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_combined_is_one_sentence_before_any_work(
    store: FileStore, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    second, asked, sentence = REFUSED[name]
    add_run(store, "a-1")
    add_run(store, "b-2", **second)
    with pytest.raises(ConfigError) as caught:
        read(store, "a-1", "b-2", **asked)
    (problem,) = caught.value.problems
    assert problem.startswith(sentence)
    method = asked.get("method", "cat")
    words = ["--sequence"] if method == "sequence" else ["--method", method]
    assert main(["combine", "a-1", "b-2", "--store", str(store.root), "--json", *words]) == 2
    assert json.loads(capsys.readouterr().out)["error"].startswith(sentence)
    assert sorted(store.list_folders("runs")) == ["a-1", "b-2"]
    assert store.list_folders("artifacts") == ["adapter"]


def test_methods_that_take_products_take_any_rank(store: FileStore) -> None:
    add_run(store, "a-1")
    add_run(store, "b-2", ranks={"model.layers.0.self_attn.q_proj": 4})
    for method in ("cat", "svd", "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd", "sequence"):
        assert len(read(store, "a-1", "b-2", method=method).parts) == 2
    add_run(store, "c-3", settings={"use_dora": True, "modules_to_save": ["norm"]})
    assert len(read(store, "a-1", "c-3", method="sequence").parts) == 2


def test_latest_is_a_run_that_has_written_its_manifest(two: FileStore) -> None:
    (two.root / "runs" / "zh-20990101-000000-000").mkdir()  # it has just begun
    assert read(two, "zh-1", "latest").config.runs == ["zh-1", "sums-2"]


def test_latest_is_one_of_those_named_or_another(two: FileStore) -> None:
    assert read(two, "zh-1", "latest").config.runs == ["zh-1", "sums-2"]
    with pytest.raises(ConfigError, match="each once"):
        read(two, "sums-2", "latest")


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (["zh-1"], 2, "combine: runs: expected two runs or more"),
        (["zh-1", "nobody"], 1, "There is no run 'nobody' in"),
        (["zh-1", "sums-2", "--name", "No!"], 2, "combine: name: string should match pattern"),
        (["zh-1", "sums-2", "--suite", "nowhere"], 2, "There is no suite 'nowhere'"),
    ],
)
def test_a_wrong_command_is_one_sentence(
    two: FileStore, words: list[str], code: int, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["combine", *words, "--store", str(two.root)]) == code
    error = capsys.readouterr().err
    assert error.startswith(f"forgetless: {sentence}")
    assert error.count("\n") == 1
