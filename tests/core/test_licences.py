"""Licences: names as cards and files state them, what each allows, and what a run says before it trains."""

import pytest
import yaml

from flows.cli import main
from tasks.core.errors import ConfigError
from tasks.core.licences import check_use, derive_licence, find_licence, licence_of_card
from tasks.core.records import LicenceRef


def base(licence: str | None, name: str = "owner/base") -> LicenceRef:
    return LicenceRef(what="base", key="model.license", name=name, license=licence)


def data(licence: str | None, name: str = "rows.jsonl") -> LicenceRef:
    return LicenceRef(what="data source", key="data.sources license", name=name, license=licence)


@pytest.mark.parametrize(
    ("stated", "name", "kind"),
    [
        ("apache-2.0", "apache-2.0", "permissive"),
        ("Apache License 2.0", "apache-2.0", "permissive"),
        ("MIT License", "mit", "permissive"),
        ("CC0-1.0", "cc0-1.0", "public domain"),
        ("GPL-3.0-or-later", "gpl-3.0", "share-alike"),
        ("CC BY-NC-SA 4.0", "cc-by-nc-sa-4.0", "non-commercial"),
        ("Llama 3.1 Community License Agreement", "llama3.1", "conditions"),
        ("llama-2", "llama2", "conditions"),
        ("gemma", "gemma", "conditions"),
        ("tongyi-qianwen", "tongyi-qianwen", "conditions"),
        ("qwen-research", "qwen-research", "research"),
        ("fair-noncommercial-research-license", "fair-noncommercial-research-license", "research"),
        ("my own", "my own", "unknown"),
        ("other", "other", "unknown"),
        ("", "not stated", "unknown"),
        (None, "not stated", "unknown"),
    ],
)
def test_a_name_is_found_however_it_is_written(stated: str | None, name: str, kind: str) -> None:
    found = find_licence(stated)
    assert (found.name, found.kind) == (name, kind)
    assert bool(found.terms) == (kind in ("conditions", "share-alike")), "what it asks is said"


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: mit\n---\n# x", "mit"),
        ("---\r\nlanguage: zh\r\nlicense: 'cc-by-nc-4.0'\r\n---\r\n", "cc-by-nc-4.0"),
        ("---\nlicense: other\nlicense_name: qwen-research\n---\n", "qwen-research"),
        ("---\nlicense: other\n---\n", "other"),
        ("---\nlicense:\n- mit\n---\n", "mit"),
        ("---\nlicense: [mit, gpl-3.0]\n---\n", "mit, gpl-3.0"),
        ("---\nlanguage: zh\n---\nlicense: mit\n", None),
        ("---\n: [\n---\n", None),
        ("license: mit\n", None),
        ("", None),
    ],
)
def test_the_licence_of_a_card_is_that_of_its_metadata(card: str, licence: str | None) -> None:
    assert licence_of_card(card) == licence


def test_commercial_use_of_what_forbids_it_is_refused_source_by_source() -> None:
    with pytest.raises(ConfigError) as caught:
        check_use("commercial", [base("qwen-research"), data("cc-by-nc-4.0"), data("mit", "other.jsonl")])
    first, second = caught.value.problems
    assert first.startswith("export.use is commercial, but owner/base is under qwen-research, which allows use in")
    assert second == (
        "export.use is commercial, but rows.jsonl is under cc-by-nc-4.0, which allows no commercial use. Take another "
        "data source, set export.use to research, or correct data.sources license if you have other terms."
    )


@pytest.mark.parametrize(
    ("use", "licences", "notes"),
    [
        ("commercial", ["apache-2.0", "cc0-1.0"], []),
        ("research", ["apache-2.0", "cc-by-nc-4.0"], []),
        ("private", ["llama2", "cc-by-nc-4.0"], []),
        (None, ["llama2", None], []),
        (None, ["mit", "cc-by-nc-4.0"], ["rows.jsonl is under cc-by-nc-4.0, which allows no commercial use."]),
        (
            "private",
            ["qwen-research", "mit"],
            ["export.use is private, but owner/base is under qwen-research, which allows use in research alone."],
        ),
        (
            "commercial",
            ["gemma", "mit"],
            [
                "owner/base is under gemma, which allows commercial use on conditions: Google's terms and its "
                "prohibited-use policy go with it."
            ],
        ),
        (
            "commercial",
            ["my terms", None],
            [
                "It is unknown whether commercial use is allowed by the licence of owner/base (my terms), rows.jsonl "
                "(not stated): state it as model.license and data.sources license."
            ],
        ),
    ],
)
def test_what_a_declared_use_is_told(use, licences: list[str | None], notes: list[str]) -> None:
    assert check_use(use, [base(licences[0]), data(licences[1])]) == notes


def test_a_permissive_base_keeps_its_licence_whatever_open_data_there_is() -> None:
    assert derive_licence([base("mit"), data("apache-2.0")]).id == "mit"
    assert derive_licence([base("cc0-1.0"), data("cc-by-4.0")]).id == "cc-by-4.0"
    assert derive_licence([base("apache-2.0"), data("gpl-3.0")]).id == "gpl-3.0"


@pytest.fixture
def recipe(tmp_path):
    """A recipe on a local base whose card says that it is not for sale."""
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "q", "response": "a"}\n')
    (tmp_path / "texts.jsonl").write_text('{"text": "a text"}\n')
    task = {
        "name": "gain",
        "role": "target",
        "measure": "bits_per_byte",
        "tasks": [{"name": "t", "texts": "texts.jsonl"}],
    }
    settings = {
        "name": "shop",
        "model": {"base": "base"},
        "data": {"sources": [{"path": "rows.jsonl", "license": "MIT"}]},
        "eval": {"capabilities": [task]},
    }
    path = tmp_path / "shop.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.mark.parametrize("command", ["plan", "run"])
def test_a_run_is_refused_before_anything_is_done(recipe, command: str, tmp_path, capsys) -> None:
    words = [command, str(recipe), "--store", str(tmp_path / "store"), "--set", "export.use=commercial"]
    assert main(words) == 2
    assert "forgetless: export.use is commercial, but base is under cc-by-nc-4.0" in capsys.readouterr().err
    assert not (tmp_path / "store" / "runs").exists()
    assert not (tmp_path / "store" / "artifacts").exists()


def test_the_plan_says_what_a_licence_does_not_allow_and_the_recipe_can_state_another(recipe, tmp_path, capsys) -> None:
    words = ["plan", str(recipe), "--store", str(tmp_path / "store")]
    assert main(words) == 0
    assert "Note: base is under cc-by-nc-4.0, which allows no commercial use." in capsys.readouterr().out
    bought = [*words, "--set", "model.license=apache-2.0", "--set", "export.use=commercial"]
    assert main(bought) == 0
    assert "Note:" not in capsys.readouterr().out
    assert main([*words, "--set", "export.use=research", "--data", str(tmp_path / "rows.jsonl")]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "unknown whether research use is allowed by the licence of rows.jsonl (not stated)" in shown


def test_the_card_of_a_hub_data_set_is_read_where_it_is_downloaded(tmp_path, monkeypatch) -> None:
    from tasks.core.config import DataConfig
    from tasks.data.sources import list_licences

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    commit = "c0ffee" + "0" * 34
    snapshot = tmp_path / "datasets--owner--rows" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "README.md").write_text("---\nlicense: cc-by-sa-4.0\n---\n")
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(commit)
    sources = ["owner/rows", {"path": "owner/rows", "license": "mit"}, "owner/absent", "https://host/rows.jsonl"]
    config = DataConfig(sources=sources, replay={"share": 0.1, "sources": "owner/rows"})
    found = [(ref.name, ref.license, ref.is_hub) for ref in list_licences(config)]
    assert found == [
        ("owner/rows", "cc-by-sa-4.0", True),
        ("owner/rows", "mit", True),
        ("owner/absent", None, True),
        ("rows.jsonl", None, False),
        ("owner/rows", "cc-by-sa-4.0", True),
    ]


def test_a_licence_changes_no_key() -> None:
    from tasks.core.config import DataConfig, ModelConfig
    from tasks.core.stages import base_stage, dataset_stage

    plain = DataConfig(sources=["owner/rows"])
    stated = DataConfig(sources=[{"path": "owner/rows", "license": "mit"}])
    assert dataset_stage(plain, ["d"], "s").key == dataset_stage(stated, ["d"], "s").key
    assert base_stage(ModelConfig(base="a/b"), "c").key == base_stage(ModelConfig(base="a/b", license="mit"), "c").key
