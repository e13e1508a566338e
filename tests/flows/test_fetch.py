"""`forgetless fetch`: what a recipe needs from a Hub and servers into the store, and then runs without a network."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.cli import main
from flows.store import DAY, collect_garbage
from tasks.core.digest import file_sha256
from tasks.core.errors import StoreError
from tasks.core.fetched import read_records
from tasks.core.manifest import read_manifest
from tasks.core.settings import read_settings
from tasks.core.store import FileStore, Store, open_store
from tests.conftest import ROOT
from tests.local_hub import LocalHub

TOKEN = "hf_secretTokenOfTheTests0123456789"
CARD = """---
license: cc-by-4.0
configs:
- config_name: en
  data_files: [{split: train, path: en/*.jsonl}]
- config_name: zh
  data_files: [{split: train, path: "zh/*.jsonl"}]
---
# Rows
"""
QUIZ = {
    "task": "quiz",
    "dataset_path": "me/quiz",
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "gold",
    "metric_list": [
        {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        {"metric": "tally", "aggregation": "mean", "higher_is_better": True, "hf_evaluate": True},
    ],
    "metadata": {"version": 1},
}
METRIC = """
import datasets
import evaluate

class Tally(evaluate.Metric):
    def _info(self):
        numbers = {name: datasets.Value("int64") for name in ("predictions", "references")}
        return evaluate.MetricInfo(description="", citation="", features=datasets.Features(numbers))

    def _compute(self, predictions, references):
        return {"tally": len(predictions)}
"""
# What a run makes of what is elsewhere: its keys' inputs, rows with their labels, the base's files, the items' texts.
PROGRAM = """
import json, sys
from tasks.core.config import load_recipe
from tasks.core.digest import file_sha256
from tasks.core.settings import read_settings
from tasks.core.store import open_store
from tasks.data.formats import Row
from tasks.data.sources import all_sources, list_licences, read_files, source_digests
from tasks.evaluation.hub_data import hub_data
from tasks.evaluation.suite import read_item_texts
from tasks.models.base import locate_base

recipe, store = load_recipe(sys.argv[1]), open_store(read_settings())
base = locate_base(recipe.model, store=store)
files = [file for source in all_sources(recipe.data) for file in read_files(source, store)]
with hub_data(store):
    items = read_item_texts(recipe.eval)
print(json.dumps({
    "base": [base.content, base.license],
    "weights": {p.name: file_sha256(p) for p in sorted(base.path.iterdir()) if p.is_file()},
    "digests": source_digests(recipe.data, store),
    "rows": [[file.name, file.where, file.format, [str(record) for record in file.records]] for file in files],
    "licences": [ref.license for ref in list_licences(recipe.data, store)],
    "items": items,
}))
"""


def lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@dataclass
class Place:
    """A recipe whose parts are on a Hub, and a store to bring them into."""

    hub: LocalHub
    recipe: Path
    store: Store
    environment: dict[str, str]

    def run(self, *words: str, home: Path, **more: str) -> "subprocess.CompletedProcess[str]":
        """Run Python on a machine whose caches are in `home`."""
        return subprocess.run(
            [sys.executable, "-W", "ignore", *words],
            env={**self.environment, **machine(home), **more},
            cwd=self.recipe.parent,
            capture_output=True,
            text=True,
            timeout=450,
            check=False,
        )

    def forgetless(self, *words: str, home: Path, **more: str) -> "subprocess.CompletedProcess[str]":
        return self.run("-m", "flows.cli", *words, "--store", self.store.url, home=home, **more)

    def look(self, home: Path, **more: str) -> dict[str, Any]:
        done = self.run("-c", PROGRAM, str(self.recipe), home=home, **{"FORGETLESS_STORE": self.store.url, **more})
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def moved(self, root: Path) -> "Place":
        """Return the place with its store copied elsewhere, as to another machine."""
        assert isinstance(self.store, FileStore)
        shutil.copytree(self.store.root, root)
        return Place(self.hub, self.recipe, FileStore(root), self.environment)


def machine(home: Path) -> dict[str, str]:
    names = {"HOME": "", "HF_HOME": "hf", "FORGETLESS_CACHE": "cache", "PREFECT_HOME": "prefect"}
    return {name: str(home / folder) for name, folder in names.items()}


@pytest.fixture(scope="module")
def hub(tiny_folder: Path) -> Iterator[LocalHub]:
    found = LocalHub()
    found.token = TOKEN
    colours = {"grass": "green", "snow": "white", "coal": "black", "the sky": "blue", "blood": "red", "gold": "yellow"}
    rows = [
        {"instruction": f"What colour is {thing}, question {i}?", "input": "", "output": f"Surely {thing} is {colour}."}
        for i in range(8)
        for thing, colour in colours.items()
    ]
    found.repos = {
        "models/me/tiny": {
            **{path.name: path.read_bytes() for path in tiny_folder.iterdir()},
            "README.md": b"---\nlicense: mit\n---\n",
            "pytorch_model.bin": b"never wanted",
        },
        "datasets/me/rows": {
            "README.md": CARD.encode(),
            "en/a.jsonl": lines(rows[:1]),
            "zh/b.jsonl": lines(rows[24:]),
            "zh/a.jsonl": lines(rows[:24]),
        },
        "datasets/me/quiz": {
            "test.jsonl": lines(
                [
                    {"question": f"The {how} colour of {t} is", "choices": [f" {c}", " seven"], "gold": 0}
                    for t, c in colours.items()
                    for how in ("usual", "known")
                ]
            )
        },
        "spaces/evaluate-metric/tally": {"tally.py": METRIC.encode(), "sample.csv": b""},
    }
    found.files = {"/shared/general.jsonl": lines([{"prompt": f"Say {n}.", "response": f"{n}!"} for n in range(12)])}
    yield found
    found.close()


@pytest.fixture(scope="module")
def recipe(hub: LocalHub, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "evals").mkdir()
    (folder / "evals" / "quiz.yaml").write_text(yaml.safe_dump(QUIZ))
    chats = [
        {"messages": [{"role": "user", "content": f"Is it {n}?"}, {"role": "assistant", "content": f"Surely {n}."}]}
        for n in range(8)
    ]
    (folder / "chat.jsonl").write_bytes(lines(chats))
    sizes = {"step_tokens": 256, "pack_tokens": 256, "max_tokens": 256}
    settings = {
        "name": "shop",
        "model": {"base": "me/tiny"},
        "data": {
            "sources": [{"path": "me/rows", "subset": "zh"}],
            "clean": {"near_duplicates": None},
            "replay": {"share": 0.2, "sources": f"{hub.url}/shared/general.jsonl"},
        },
        "train": {"method": "lora", "rank": 4, "learning_rate": 0.02, "epochs": 1, **sizes},
        "eval": {
            "task_folders": ["evals"],
            "capabilities": [
                {
                    "name": "chat",
                    "role": "target",
                    "measure": "bits_per_byte",
                    "tasks": [{"name": "chat", "conversations": "chat.jsonl"}],
                },
                {"name": "quiz", "role": "retention", "tasks": ["quiz"]},
            ],
        },
        "export": {"quantisations": ["f16"], "serve": "f16"},
    }
    path = folder / "shop.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture(scope="module")
def environment(hub: LocalHub) -> dict[str, str]:
    own = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN, "PYTHONPATH": str(ROOT)}
    kept = {name: value for name, value in os.environ.items() if name not in ("HF_DATASETS_OFFLINE", "HF_HOME")}
    return {**kept, **own, "OLLAMA_HOST": "127.0.0.1:9"}


def bring(place: Place, home: Path) -> dict[str, Any]:
    done = place.forgetless("fetch", str(place.recipe), "--json", home=home)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def fetched(
    hub: LocalHub, recipe: Path, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Place, dict[str, Any]]:
    """The recipe's parts in a folder store, hidden as the default one is, and what the command said."""
    folder = tmp_path_factory.mktemp("fetched")
    place = Place(hub, recipe, FileStore(folder / ".forgetless"), environment)
    return place, bring(place, folder / "home")


def test_what_is_elsewhere_comes_into_the_store(fetched: tuple[Place, dict[str, Any]]) -> None:
    place, done = fetched
    hub, store = place.hub, place.store
    assert isinstance(store, FileStore)
    assert [(item["kind"], item["name"], item["commit"]) for item in done["items"]] == [
        ("model", "me/tiny", hub.head("models/me/tiny")),
        ("dataset", "me/rows", hub.head("datasets/me/rows")),
        (
            "address",
            f"{hub.url}/shared/general.jsonl",
            file_sha256(next(store.root.glob("artifacts/download/*/file"))),
        ),
        ("metric", "evaluate-metric/tally", hub.head("spaces/evaluate-metric/tally")),
        ("dataset", "me/quiz", hub.head("datasets/me/quiz")),
    ]
    files = {path.name for path in store.root.rglob("*") if path.is_file()}
    assert {"model.safetensors", "tokenizer.json", "b.jsonl", "test.jsonl", "tally.py"} <= files
    assert not {"pytorch_model.bin", "sample.csv"} & files
    assert not list(store.root.rglob("en/*")), "of a data set the subset alone"
    assert not [path for path in store.root.rglob("*") if path.is_symlink()]
    assert not [path for path in store.root.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
    assert list(read_records(store)) == [done["record"]]


@pytest.mark.parametrize("kind", ["folder", "s3"])
def test_offline_all_is_as_it_was_fetched(
    kind: str, fetched: tuple[Place, dict[str, Any]], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    place, _ = fetched
    if kind == "s3":
        place = on_s3(place, request.getfixturevalue("s3_endpoint"))
        bring(place, tmp_path / "fetching")
    else:
        place = place.moved(tmp_path / "copied" / ".forgetless")
    elsewhere = str(tmp_path / "empty")
    online = place.look(tmp_path / "online", FORGETLESS_STORE=elsewhere)
    assert len(online["rows"][0][3]) == 48 and len(online["items"]) == 20
    assert online["licences"] == ["cc-by-4.0", None]
    rows = place.hub.repos["datasets/me/rows"]
    assert isinstance(rows, dict)
    before = dict(rows)
    rows["zh/a.jsonl"] = b'{"prompt": "Another?", "response": "Another."}\n'
    try:
        with place.hub.stopped():
            assert place.look(tmp_path / "offline") == online
            if kind == "folder":
                assert place.look(tmp_path / "forbidden", HF_HUB_OFFLINE="1") == online
    finally:
        place.hub.repos["datasets/me/rows"] = before


def on_s3(place: Place, endpoint: str) -> Place:
    own = {"AWS_ENDPOINT_URL_S3": endpoint, "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
    own["AWS_DEFAULT_REGION"] = "us-east-1"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in own.items():
            patch.setenv(name, value)
        store = open_store(read_settings("s3://fetched/team"))
        store.client.create_bucket(Bucket="fetched")  # type: ignore[attr-defined]
    return Place(place.hub, place.recipe, store, {**place.environment, **own})


def test_all_that_is_missing_is_named_before_anything_starts(
    fetched: tuple[Place, dict[str, Any]], tmp_path: Path
) -> None:
    place = Place(fetched[0].hub, fetched[0].recipe, FileStore(tmp_path / "store"), fetched[0].environment)
    with place.hub.stopped():
        done = place.forgetless("run", str(place.recipe), home=tmp_path)
    said = [line.removeprefix("forgetless: ") for line in done.stderr.splitlines()]
    assert done.returncode == 2, done.stderr
    starts = [
        "The base model me/tiny is not in the local cache and the Hub cannot be reached.",
        "me/rows is not a file or folder here, and as a Hub data set it is not downloaded",
        f"{place.hub.url}/shared/general.jsonl: the server cannot be reached",
        "eval task quiz: data set me/quiz is not in the local cache and the Hub cannot be reached.",
        "forgetless fetch RECIPE, where there is a network, brings it into the store.",
    ]
    assert [line[: len(start)] for line, start in zip(said, starts, strict=True)] == starts
    assert not (tmp_path / "store" / "runs").exists()
    assert not (tmp_path / "prefect").exists()


def test_a_damaged_file_is_found_and_fetched_again_alone(fetched: tuple[Place, dict[str, Any]], tmp_path: Path) -> None:
    place = fetched[0].moved(tmp_path / "store")
    assert isinstance(place.store, FileStore)
    (weights,) = place.store.root.rglob("model.safetensors")
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with place.hub.stopped():
        done = place.forgetless("plan", str(place.recipe), home=tmp_path / "offline")
    assert done.returncode == 2
    assert f"{weights}: expected the bytes that were fetched (me/tiny), found others. Delete" in done.stderr
    place.hub.asked.clear()
    assert bring(place, tmp_path / "home")["items"] == fetched[1]["items"]
    assert weights.read_bytes() == whole
    assert list(read_records(place.store)) == [fetched[1]["record"]]
    asked = {line.rpartition("/")[2] for line in place.hub.asked if line.startswith("GET")}
    assert "model.safetensors" in asked
    assert not {"a.jsonl", "b.jsonl", "test.jsonl", "tally.py"} & asked, (
        "what is whole in the store is not fetched again"
    )


def test_gc_keeps_what_was_fetched_until_it_is_removed(
    fetched: tuple[Place, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place, record = fetched[0].moved(tmp_path / "store"), fetched[1]["record"]
    store = ["--store", place.store.url]

    def collect() -> list[str]:
        now = place.store.clock() + 2 * DAY
        done = collect_garbage(place.store, read_settings(place.store.url), lambda _: None, now=now)
        return sorted(entry["path"] for entry in done["removed"])

    artifacts = sorted({f"artifacts/{item['artifact']}" for item in fetched[1]["items"]})
    assert collect() == []
    assert main(["store", "ls", record, "--json", *store]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert sorted(f"artifacts/{a['kind']}/{a['key']}" for a in listed) == artifacts
    assert all(a["runs"] == [record] for a in listed)
    assert main(["store", "rm", "fetched/other", *store]) == 1
    assert "There is no 'fetched/other'" in capsys.readouterr().err
    assert main(["store", "rm", record, *store]) == 0
    assert collect() == artifacts


def test_a_record_that_cannot_be_read_stops_gc(store: FileStore) -> None:
    store.write_bytes("fetched/shop-1.json", b"[]")
    with pytest.raises(StoreError, match="fetched/shop-1.json cannot be read.*forgetless store rm fetched/shop-1"):
        collect_garbage(store, read_settings(store.url), lambda _: None)
    assert main(["store", "rm", "fetched/shop-1", "--store", store.url]) == 0
    assert collect_garbage(store, read_settings(store.url), lambda _: None)["removed"] == []


def test_a_recipe_of_local_files_needs_nothing(store: FileStore, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fetch", "quickstart", "--store", store.url]) == 0
    assert "quickstart needs nothing from elsewhere." in capsys.readouterr().out
    assert read_records(store) == {}


def ask_for_base(place: Place, home: Path, **more: str) -> "subprocess.CompletedProcess[str]":
    code = (
        "import sys; from tasks.core.config import ModelConfig; from tasks.core.errors import ForgetlessError\n"
        "from tasks.models.base import locate_base\n"
        "try: print(locate_base(ModelConfig(base='me/tiny')).content)\n"
        "except ForgetlessError as error: sys.exit(str(error))"
    )
    return place.run("-c", code, home=home, **more)


def test_a_busy_hub_is_asked_again(fetched: tuple[Place, dict[str, Any]], tmp_path: Path) -> None:
    place, _ = fetched
    place.hub.faults = {"/api/models/me/tiny/revision": [503, 429], "/resolve/": [500]}
    done = ask_for_base(place, tmp_path)
    assert done.stdout.strip() == f"hub:me/tiny@{place.hub.head('models/me/tiny')}", done.stderr
    assert not any(place.hub.faults.values())


def test_a_wrong_token_is_said_at_once(fetched: tuple[Place, dict[str, Any]], tmp_path: Path) -> None:
    place, _ = fetched
    place.hub.asked.clear()
    done = ask_for_base(place, tmp_path, HF_TOKEN="hf_wrong")
    assert done.stderr == (
        "The base model me/tiny: The Hub refuses your token (401). Log in again with hf auth login, or "
        "correct HF_TOKEN.\n"
    )
    assert place.hub.asked.count("GET /api/models/me/tiny/revision/main") == 1
    code = (
        "import sys; from tasks.core.config import SourceConfig; from tasks.data.sources import hub_commit\n"
        "try: hub_commit(SourceConfig(path='me/rows'))\n"
        "except Exception as error: sys.exit(str(error))"
    )
    done = place.run("-c", code, home=tmp_path, HF_TOKEN="hf_wrong")
    assert done.stderr.startswith("Hub data set me/rows: The Hub refuses your token (401).")


@pytest.fixture
def without_a_network() -> Callable[[list[str]], list[str]]:
    """Return a command as it runs in a network of its own that has its loopback and no route."""
    code = (
        "import fcntl, os, socket, struct, sys\n"
        "link = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
        "fcntl.ioctl(link, 0x8914, struct.pack('16sh14x', b'lo', 1))\n"  # SIOCSIFFLAGS, IFF_UP
        "os.execv(sys.argv[1], sys.argv[1:])"
    )
    prefix = ["unshare", "-n", sys.executable, "-c", code]
    try:
        probe = subprocess.run([*prefix, "/bin/true"], capture_output=True, text=True, check=False)
        if probe.returncode:
            pytest.skip(f"unshare -n is not permitted here: {probe.stderr.strip().splitlines()[-1]}")
    except FileNotFoundError:
        pytest.skip("unshare is not installed")
    return lambda words: [*prefix, *words]


@pytest.mark.slow
def test_a_whole_run_without_a_network(
    fetched: tuple[Place, dict[str, Any]], tmp_path: Path, without_a_network: Callable[[list[str]], list[str]]
) -> None:
    place = fetched[0].moved(tmp_path / "store")
    command = [sys.executable, "-W", "ignore", "-m", "flows.cli", "run", str(place.recipe), "--json", "--debug"]
    environment = {name: value for name, value in place.environment.items() if name != "HF_ENDPOINT"}
    (tmp_path / "home").mkdir()
    done = subprocess.run(
        without_a_network([*command, "--store", place.store.url]),
        env={**environment, **machine(tmp_path / "home")},
        cwd=place.recipe.parent,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    run = read_manifest(place.store, "latest")
    assert run.status == "completed"
    assert run.base and run.base.revision == place.hub.head("models/me/tiny")
    assert run.gguf and run.report
    assert [(delta.name, delta.n) for delta in run.report.capabilities] == [("chat", 8), ("quiz", 12)]
    planned = place.forgetless("plan", str(place.recipe), "--json", home=tmp_path / "online")
    assert planned.returncode == 0, planned.stderr
    actions = {stage["stage"]: stage["action"] for stage in json.loads(planned.stdout)["stages"]}
    assert {name for name, action in actions.items() if action != "reuse"} == {"ollama", "publish"}
