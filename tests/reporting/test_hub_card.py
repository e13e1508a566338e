"""The card of a pushed run: what the Hub's own library reads in it, its licence, and nothing of this machine."""

import itertools

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from markdown_it import MarkdownIt

from tasks.core.manifest import RunManifest
from tasks.core.records import LicenceRef
from tasks.reporting.cards import write_card
from tasks.reporting.hub_card import write_hub_card
from tests.dashboards import manifests as made
from tests.hostile import STEERING, TEXTS, active_parts

COMMIT = "c0ffee" + "0" * 34


def run_on(
    source: str, revision: str | None = None, *data: LicenceRef, licence: str | None = "apache-2.0"
) -> RunManifest:
    run = made.promoted()
    run.base = run.base.model_copy(update={"source": source, "revision": revision, "license": licence})
    name = source.rpartition("/")[2] if source.startswith("/") else source
    base = LicenceRef(what="base", key="model.license", name=name, license=licence, is_hub=revision is not None)
    run.licences = [base, *data]
    return run


def rows(name: str, licence: str | None, is_hub: bool = False) -> LicenceRef:
    return LicenceRef(what="data source", key="data.sources license", name=name, license=licence, is_hub=is_hub)


def read(card: str) -> ModelCard:
    found = ModelCard(card)
    assert found.content == card, "the metadata are as huggingface_hub would write them"
    return found


@pytest.mark.parametrize(
    ("kind", "library", "relation"),
    [("adapter", "peft", "adapter"), ("merged", "transformers", "finetune"), ("gguf", "gguf", "quantized")],
)
def test_the_hub_finds_the_base_the_data_and_the_library(kind: str, library: str, relation: str) -> None:
    run = run_on("Qwen/Qwen2.5-0.5B-Instruct", COMMIT, rows("me/faq", "mit", True), rows("own.jsonl", "cc0-1.0"))
    found = read(write_hub_card(run, "me/shop", kind)).data.to_dict()
    assert found["base_model"] == "Qwen/Qwen2.5-0.5B-Instruct"
    assert found["base_model_relation"] == relation
    assert found["library_name"] == library
    assert found["datasets"] == ["me/faq"]
    assert found["pipeline_tag"] == "text-generation"
    assert {"forgetless", run.recipe.train.method} <= set(found["tags"])
    assert found["license"] == "apache-2.0"


def test_the_scores_are_in_the_model_index_as_the_hub_reads_it() -> None:
    run = run_on("owner/base", COMMIT)
    card = read(write_hub_card(run, "me/shop", "merged"))
    name, results = model_index_to_eval_results(card.data.to_dict()["model-index"])
    assert name == "shop"
    assert eval_results_to_model_index(name, results) == card.data.to_dict()["model-index"]
    by_task = {result.dataset_name: result for result in results}
    assert set(by_task) == {delta.name for delta in run.report.tasks}
    text = next(delta for delta in run.report.tasks if delta.name == "en_passages")
    assert by_task["en_passages"].metric_type == "bits_per_byte"
    assert by_task["en_passages"].metric_value == pytest.approx(text.after, abs=1e-6)
    assert by_task["en_passages"].metric_args["low"] == pytest.approx(text.low)
    assert by_task["en_endings_a"].metric_type == "accuracy"


def test_it_says_what_was_gained_and_forgotten_and_how_it_was_made() -> None:
    run = run_on("owner/base", COMMIT, rows("own.jsonl", "cc0-1.0"))
    text = read(write_hub_card(run, "me/shop", "adapter")).text
    assert run.report.reason.split(":")[1].strip().rstrip(".") in text
    for delta in run.report.capabilities:
        assert f"{delta.low:+.2f} to {delta.high:+.2f}" in text
    assert f"owner/base at {COMMIT}: licence apache-2.0" in text
    assert "own.jsonl (not from the Hub): licence cc0-1.0" in text
    assert "rank 16, alpha 32" in text
    assert "torch 2.13.0+cpu" in text
    assert "neither facts beyond them, nor safety, nor bias" in text


@pytest.mark.parametrize(
    ("base", "data", "id", "name", "said"),
    [
        ("apache-2.0", "cc0-1.0", "apache-2.0", None, "under open licences"),
        ("mit", "cc-by-nc-4.0", "cc-by-nc-4.0", None, "rows (cc-by-nc-4.0)"),
        ("Llama 2 Community License", "mit", "llama2", None, "acceptable-use policy"),
        ("llama2", "cc-by-nc-4.0", "other", "llama2-and-cc-by-nc-4.0", "These bind together."),
        ("qwen-research", "mit", "other", "qwen-research", "owner/base (qwen-research)"),
        ("apache-2.0", None, "other", "not-stated", "is to be asked of its owner"),
        (None, "mit", "other", "not-stated", "owner/base (not stated)"),
        ("My Own Terms 1", "mit", "other", "my-own-terms-1", "not known here"),
    ],
)
def test_its_licence_is_the_strictest_or_other_with_a_reason(
    base: str | None, data: str | None, id: str, name: str | None, said: str
) -> None:
    run = run_on("owner/base", COMMIT, rows("rows", data), licence=base)
    card = read(write_hub_card(run, "me/shop", "adapter"))
    assert card.data.license == id
    assert card.data.get("license_name") == name
    assert said in card.text


@pytest.mark.parametrize("source", ["/home/ann/models/my-base", "/home/ann/models/my-base.gguf"])
@pytest.mark.parametrize("kind", ["adapter", "merged", "gguf"])
def test_no_path_of_the_machine_is_on_it(source: str, kind: str) -> None:
    run = run_on(source)
    run.licences = []  # as a run from before they were recorded
    run.recipe = run.recipe.model_copy(
        update={"train": run.recipe.train.model_copy(update={"start_from": "/home/ann/adapters/first"})}
    )
    card = write_hub_card(run, "me/shop", kind)
    assert "/home" not in card
    assert "my-base" in card
    assert "zh_answers.jsonl (not from the Hub): licence not stated" in card.replace("\\", "")
    assert "base_model" not in read(card).data.to_dict(), "what is not on the Hub is no model of it"
    assert "with the adapter that training went on from" in card


def test_what_users_and_models_wrote_is_no_markup() -> None:
    run = run_on("owner/base", COMMIT)
    prompt = 'Say "```" twice\n```\n# no'
    export = run.recipe.export.model_copy(update={"prompt": prompt, "system": "你是{助手}"})
    run.recipe = run.recipe.model_copy(update={"description": made.HOSTILE, "export": export})
    card = write_hub_card(run, "me/shop", "merged")
    assert "<script>" not in card
    assert card.count("```") == 2
    (code,) = [part for part in card.split("```") if part.startswith("python\n")]
    line = next(line for line in code.splitlines() if line.startswith("messages = "))
    scope: dict = {}
    exec(line, scope)
    assert [m["content"] for m in scope["messages"]] == ["你是{助手}", prompt]


def test_the_runs_own_card_says_the_licences_too() -> None:
    run = run_on("owner/base", COMMIT, rows("faq.jsonl", None))
    run.notes = ["It is unknown whether commercial use is allowed."]
    card = write_card(run)
    assert "| Licence of faq.jsonl | not stated |" in card
    assert run.notes[0] in card


def test_the_search_for_active_parts_finds_them() -> None:
    assert all(active_parts(text) for text in TEXTS[:6])
    assert not active_parts("**bold** `<script>` \\<script\\>")


@pytest.mark.parametrize("text", TEXTS)
def test_a_card_shows_hostile_text_as_text(text: str) -> None:
    quiet, loud = made.promoted(), made.promoted()
    loud.recipe = loud.recipe.model_copy(update={"description": text})
    loud.notes = [text, text]
    licences = [rows(text, text), rows("b", text)]
    loud.licences = [LicenceRef(what="base", key="", name=text, license=text), *licences]
    loud.base = loud.base.model_copy(update={"source": text, "license": text, "revision": text})
    loud.dataset = loud.dataset.model_copy(update={"sources": [text, text], "replay": {text: 1}})
    loud.gguf = loud.gguf.model_copy(update={"prompt": text, "sample": text})
    loud.report = loud.report.model_copy(update={"reason": text})
    loud.environment = {text: text}
    for write in (write_card, lambda run: write_hub_card(run, "me/shop", "gguf").partition("\n---\n")[2]):
        card = write(loud)
        assert not set(active_parts(card)) - set(active_parts(write(quiet)))
        assert not STEERING.search(card)
        assert headings(card) == headings(write(quiet))


def headings(card: str) -> list[str]:
    tokens = MarkdownIt("commonmark").parse(card)
    return [after.content for token, after in itertools.pairwise(tokens) if token.type == "heading_open"]
