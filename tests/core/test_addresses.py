"""Addresses lose their secrets where they enter, and only the client that goes there has them."""

import pytest

from tasks.core.addresses import hide, hide_in_override, reveal, shown, without_secrets
from tasks.core.config import SourceConfig, load_recipe
from tasks.core.errors import ConfigError, StoreError
from tasks.core.s3 import S3Store
from tasks.core.settings import read_settings

SIGNED = "https://me:hunter2@host.example/a/rows.jsonl?X-Amz-Signature=hunter2"


def test_what_is_hidden_is_found_again_and_never_mistaken_for_another() -> None:
    assert hide(SIGNED) == "https://host.example/a/rows.jsonl" == hide(hide(SIGNED))
    other = hide(SIGNED.replace("hunter2", "hunter3"))
    assert other == "https://host.example/a/rows.jsonl#2"
    assert (reveal(hide(SIGNED)), reveal(other)) == (SIGNED, SIGNED.replace("hunter2", "hunter3"))
    assert shown(other) == "https://host.example/a/rows.jsonl"
    for plain in ("/data/what?.jsonl", "owner/name", "s3://bucket/what?.jsonl", "https://host.example/b.jsonl"):
        assert hide(plain) == plain == reveal(plain)


@pytest.mark.parametrize(
    "override",
    [
        f"data.sources={SIGNED}",
        f"data.sources=[{{path: '{SIGNED}', weight: 2}}, rows.json]",
        f"data={{sources: ['{SIGNED}']}}",
        f"model.base={SIGNED}",
    ],
)
def test_an_override_keeps_its_meaning_without_the_secret(override: str) -> None:
    hidden = hide_in_override(override)
    assert "hunter2" not in hidden and "host.example" in hidden
    recipe, given = (load_recipe("quickstart", [text]) for text in (hidden, override))
    assert recipe == given and "hunter2" not in recipe.model_dump_json()


@pytest.mark.parametrize("override", ["train.rank=8", "export.prompt=See https://a.example/?q=1", "data.sources=[{"])
def test_other_overrides_stay_as_they_are(override: str) -> None:
    assert hide_in_override(override) == override


def test_a_recipe_never_holds_the_secret_and_no_mistake_repeats_it() -> None:
    source = SourceConfig(path=SIGNED)
    assert source.path == "https://host.example/a/rows.jsonl" and reveal(source.path) == SIGNED
    for override in (f"data.sources=[{SIGNED}", f"train.rank={SIGNED}", SIGNED, f"name.x={SIGNED}"):
        with pytest.raises(ConfigError) as error:
            load_recipe("quickstart", [override])
        assert "hunter2" not in str(error.value) and "https://host" in str(error.value)


def test_messages_lose_secrets_and_nothing_else() -> None:
    text = f"Could not read {SIGNED}: see http://127.0.0.1:9000/x, s3://bucket/a. (https://u:hunter2@b.example:81)."
    told = without_secrets(text)
    assert "hunter2" not in told
    assert told == (
        "Could not read https://host.example/a/rows.jsonl: see http://127.0.0.1:9000/x, s3://bucket/a. "
        "(https://b.example:81)."
    )


def test_a_store_takes_no_credentials_in_its_address(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="Set AWS_ACCESS_KEY_ID") as error:
        read_settings("s3://key:hunter2@bucket/prefix")
    assert "hunter2" not in str(error.value)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://key:hunter2@127.0.0.1:9000")
    with pytest.raises(StoreError, match="AWS_ENDPOINT_URL_S3 holds more than an address") as refused:
        S3Store("bucket", "", tmp_path)
    assert "hunter2" not in str(refused.value)


def test_ollamas_password_is_for_its_client_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_HOST", "http://me:hunter2@127.0.0.1:9")
    assert read_settings().ollama_url == "http://127.0.0.1:9"
    assert reveal(read_settings().ollama_url) == "http://me:hunter2@127.0.0.1:9"
