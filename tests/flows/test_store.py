"""`forgetless store`: what is listed, checked and removed, on a folder and on an S3 server over HTTP."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from flows.cli import main
from flows.store import DAY, collect_garbage, list_artifacts, verify_artifacts
from tasks.core.config import load_recipe
from tasks.core.digest import file_sha256
from tasks.core.errors import StoreError
from tasks.core.lease import hold_lease
from tasks.core.manifest import RunManifest, StageState, run_stage, write_manifest
from tasks.core.records import ArtifactRecord, ArtifactRef, CheckpointRef, ModelRef
from tasks.core.s3 import S3Store
from tasks.core.settings import Settings, read_settings
from tasks.core.stages import Stage, checkpoint_stage
from tasks.core.store import PROBE, FileStore, Store, open_store, stored

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Place:
    """A store, its settings, and a way to the moment: all that is written before it is old, all after it is young."""

    store: Store
    settings: Settings

    def a_day_passes(self) -> float:
        """Return a time by the store's clock, a day after now."""
        time.sleep(2.1)  # S3 tells times in whole seconds
        moment = self.store.clock() + DAY - 0.5
        time.sleep(1.1)
        return moment

    def gc(self, now: float, **options: Any) -> dict[str, str]:
        done = collect_garbage(self.store, self.settings, lambda _: None, now=now, **options)
        return {r["path"]: r["what"] for r in done["removed"]}


@pytest.fixture(params=["folder", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    url = str(tmp_path / "store")
    if request.param == "s3":
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", request.getfixturevalue("s3_endpoint"))
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        url = f"s3://b{abs(hash(tmp_path)) % 10**9}/team/runs"
    monkeypatch.setenv("FORGETLESS_STORE", url)
    monkeypatch.setenv("FORGETLESS_CACHE", str(tmp_path / "cache"))
    store = open_store(read_settings())
    if isinstance(store, S3Store):
        store.client.create_bucket(Bucket=store.bucket)
    return Place(store, read_settings())


def put(store: Store, name: str, size: int = 100) -> ArtifactRef:
    def make(folder: Path) -> dict[str, str]:
        (folder / "sub").mkdir()
        (folder / "model.bin").write_bytes(name.encode() * size)
        (folder / "sub" / "notes.txt").write_text(name)
        return {"dtype": "float32"}

    return stored(store, Stage("merged", 1, [name], {}), ModelRef, make).artifact


def put_from(store: Store, kind: str, name: str, *inputs: str) -> ArtifactRef:
    """Return an artifact of a kind that was made from `inputs`."""

    def make(folder: Path) -> dict[str, Any]:
        (folder / "file").write_text(f"{kind} {name}")
        return {}

    return stored(store, Stage(kind, 1, list(inputs), {"name": name}), ArtifactRecord, make).artifact


def put_run(store: Store, run_id: str, merged: ArtifactRef, card: ArtifactRef | None = None) -> None:
    note = "Register it: cd /cache/artifacts/merged/abc && ollama create demo -f Modelfile"  # no artifact
    manifest = RunManifest(
        run_id=run_id,
        stages={"ollama": StageState(note=note)},
        recipe=load_recipe("quickstart"),
        started=datetime.now(UTC),
        merged=ModelRef(artifact=merged, dtype="float32"),
        card=card,
    )
    write_manifest(store, manifest)


def path_of(artifact: ArtifactRef) -> str:
    return f"artifacts/{artifact.kind}/{artifact.key}"


def output(capsys: pytest.CaptureFixture[str], *command: str) -> tuple[int, Any]:
    capsys.readouterr()
    code = main([*command, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_artifacts_are_listed_with_the_runs_that_reach_them(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    shared, own, loose = (put(place.store, name) for name in ("shared", "own", "loose"))
    put_run(place.store, "demo-20260101-000000-001", shared)
    put_run(place.store, "demo-20260101-000000-002", shared, own)
    code, found = output(capsys, "store", "ls")
    assert code == 0
    assert {a["key"]: a["runs"] for a in found} == {
        shared.key: ["demo-20260101-000000-001", "demo-20260101-000000-002"],
        own.key: ["demo-20260101-000000-002"],
        loose.key: [],
    }
    assert all(abs(a["written"] - place.store.clock()) < 30 for a in found)
    assert all(a["size_bytes"] > shared.size_bytes / 2 for a in found)
    assert output(capsys, "store", "ls", "merged")[1] == found
    assert {a["key"] for a in output(capsys, "store", "ls", "latest")[1]} == {shared.key, own.key}
    assert main(["store", "ls"]) == 0
    assert "none" in capsys.readouterr().out
    assert main(["store", "ls", "gguf"]) == 1
    assert "neither a kind of artifact" in capsys.readouterr().err


def test_sizes_are_told_by_kind_and_by_who_reaches_them(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    reached, loose = put(place.store, "reached", 1000), put(place.store, "loose", 1000)
    put_run(place.store, "demo-20260101-000000-001", reached)
    work = place.store.kept_folder("training-abc")
    work.mkdir(parents=True)
    (work / "state.safetensors").write_bytes(b"x" * 1234)
    place.store.local_folder(reached)
    _, usage = output(capsys, "store", "du")
    assert usage["reached"] + usage["unreached"] == usage["total"] == usage["kinds"]["merged"]
    assert usage["reached"] > reached.size_bytes
    assert usage["unreached"] > loose.size_bytes
    assert usage["work"] == 1234
    assert usage["cache"]["artifacts"] == (reached.size_bytes if isinstance(place.store, S3Store) else 0)
    assert main(["store", "du"]) == 0
    assert "that no run reaches" in capsys.readouterr().out


def test_each_damaged_missing_and_additional_file_is_named(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad, marker, gone = (put(place.store, name) for name in ("good", "bad", "marker", "gone"))
    put_run(place.store, "demo-20260101-000000-001", bad, gone)
    assert output(capsys, "store", "verify") == (
        0,
        {
            "artifacts": 4,
            "files": 8,
            "size_bytes": sum(a.size_bytes for a in (good, bad, marker, gone)),
            "problems": [],
            "runs": {},
        },
    )
    content = b"".join(place.store.stream(f"{place.store.files_path(bad)}/model.bin"))
    place.store.write_bytes(f"{place.store.files_path(bad)}/model.bin", b"X" + content[1:])  # of the same size
    place.store.delete(f"{place.store.files_path(bad)}/sub/notes.txt")
    place.store.write_bytes(f"{place.store.files_path(bad)}/more.txt", b"more")
    text = place.store.read_bytes(f"{path_of(marker)}/_artifact.json")
    assert text
    place.store.write_bytes(f"{path_of(marker)}/_artifact.json", text.replace(b'"content":"', b'"content":"0'))
    place.store.delete(path_of(gone))
    code, found = output(capsys, "store", "verify")
    assert code == 1
    assert sorted((p["artifact"], p["file"], p["problem"]) for p in found["problems"]) == sorted(
        [
            (f"merged/{bad.key}", "model.bin", "damaged"),
            (f"merged/{bad.key}", "sub/notes.txt", "missing"),
            (f"merged/{bad.key}", "more.txt", "additional"),
            (f"merged/{marker.key}", "_artifact.json", "damaged"),
            (f"merged/{gone.key}", "_artifact.json", "missing"),
        ]
    )
    code, found = output(capsys, "store", "verify", "latest")
    assert code == 1
    assert {p["artifact"] for p in found["problems"]} == {f"merged/{bad.key}", f"merged/{gone.key}"}
    assert main(["store", "verify"]) == 1
    assert f"forgetless store rm merged/{bad.key}" in capsys.readouterr().out


def test_what_verify_says_to_do_mends_the_store(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    bad = put(place.store, "bad")
    place.store.write_bytes(f"{place.store.files_path(bad)}/model.bin", b"other")
    assert main(["store", "verify"]) == 1
    assert main(["store", "rm", f"merged/{bad.key}"]) == 0
    assert not put(place.store, "bad").reused
    assert main(["store", "verify"]) == 0


def test_a_large_file_is_hashed_in_pieces(place: Place) -> None:
    big = put(place.store, "0123456789abcdef", 1 << 19)  # 8 MiB
    pieces = [len(piece) for piece in place.store.stream(f"{place.store.files_path(big)}/model.bin")]
    assert sum(pieces) == 1 << 23
    assert max(pieces) <= 1 << 20
    assert not verify_artifacts(place.store, None, lambda _: None)["problems"]


def test_gc_removes_what_is_old_and_no_run_reaches(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    shared, loose = put(place.store, "shared"), put(place.store, "loose")
    put_run(place.store, "demo-20260101-000000-001", shared)
    put_run(place.store, "demo-20260101-000000-002", shared)
    place.store.write_bytes("artifacts/gguf/abc/model.gguf", b"half")
    now = place.a_day_passes()
    young = put(place.store, "young")
    place.store.write_bytes("artifacts/gguf/def/model.gguf", b"half")
    expected = {path_of(loose): "no run reaches it", "artifacts/gguf/abc": "never finished"}
    before = sorted(file.path for file in place.store.list_files("artifacts"))
    assert place.gc(now, dry_run=True) == expected
    assert sorted(file.path for file in place.store.list_files("artifacts")) == before
    assert place.gc(now) == expected
    assert {a.name for a in list_artifacts(place.store)} == {
        f"merged/{shared.key}",
        f"merged/{young.key}",
        "gguf/def",
    }
    assert main(["store", "rm", "demo-20260101-000000-001"]) == 0
    assert place.gc(now) == {}
    assert main(["store", "rm", "demo-20260101-000000-002"]) == 0
    assert place.gc(now) == {path_of(shared): "no run reaches it"}
    assert output(capsys, "store", "gc")[1]["removed"] == [], "by the store's own clock nothing is old"


def test_what_a_kept_run_was_made_from_stays(place: Place) -> None:
    """Replay, evaluation items (named by key or by their suite), what training went on from, the base as a file (named
    by its sha256) and the scores of served files are in no manifest."""
    store = place.store
    base, suite = put_from(store, "base", "base"), "the digest of a suite"
    items, replay = put_from(store, "items", "items", suite), put_from(store, "replay", "replay", base.content)
    other_items = put_from(store, "items", "of another suite", "another digest")
    start, plain = put_from(store, "start", "start"), put_from(store, "base-gguf", "base-gguf", base.content)
    sha256 = file_sha256(store.local_folder(plain) / "file")
    file_scores = put_from(store, "scores", "served", sha256, base.content, suite)
    served = put_from(store, "comparison", "served", file_scores.content)
    adapter = put_from(store, "adapter", "adapter", base.content, start.content, replay.content)
    curve = put_from(store, "shipping", "curve", file_scores.content)
    asked = put_from(store, "scores", "of eval", base.content, suite)
    for scores in (file_scores, asked):
        store.write_bytes(f"responses/a-model/{scores.key}/responses.json", b"{}")
    run = "demo-20260101-000000-001"
    put_run(store, run, put_from(store, "merged", "merged", adapter.content, served.content))
    far = store.clock() + 3 * DAY
    lost = {path_of(a) for a in (other_items, curve, asked)} | {f"responses/a-model/{asked.key}/responses.json"}
    assert place.gc(far, dry_run=True).keys() == lost
    assert place.gc(far) == dict.fromkeys(lost, "no run reaches it")
    reached = {a.name for a in list_artifacts(store, run)}
    assert {f"{a.kind}/{a.key}" for a in (items, replay, start, plain, file_scores, base, adapter)} < reached
    store.delete(f"runs/{run}")
    assert len(place.gc(far)) == 10, "nine artifacts and the answers"
    assert {file.path for file in store.list_files("")} <= {PROBE}


def test_leases_of_killed_processes_and_broken_downloads_go(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("merged/old.1", "merged/old.1.beat", "merged/long.1"):
        place.store.write_bytes(f"leases/{name}", b"{}")
    left = ["unfinished/ab/01.json", "unfinished/ab/02.json", "handoffs/3132fb0a-81f0-4399.json"]
    for name in (*left, "unfinished/cd/03.json"):
        place.store.write_bytes(name, b"{}")
    now = place.a_day_passes()
    place.store.write_bytes("leases/merged/long.1.beat", b"{}")
    place.store.write_bytes("unfinished/cd/04.json", b"{}")
    place.store.write_bytes("responses/a-model/key/responses.json", b"x" * 1000)
    broken = place.store.kept_folder("download-abc")
    broken.mkdir(parents=True)
    (broken / "model.bin").write_bytes(b"x" * 500)
    broken.with_suffix(".lock").touch()
    _, usage = output(capsys, "store", "du")
    assert (usage["responses"], usage["work"]) == (1000, 518)
    for path in (broken / "model.bin", broken):
        os.utime(path, (now - 2 * DAY, now - 2 * DAY))
    left += ["leases/merged/old.1", "leases/merged/old.1.beat", str(broken)]
    assert place.gc(now) == dict.fromkeys(left, "left by a process")
    assert len(list(place.store.list_files("unfinished"))) == 2, "a scoring that is at work for more than a day"
    assert len(list(place.store.list_files("leases"))) == 2, "whose holder is at work for more than a day"
    assert not broken.with_suffix(".lock").exists()


def test_a_run_at_work_is_not_deleted(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    run = "demo-20260101-000000-001"
    put_run(place.store, run, put(place.store, "kept"))
    with hold_lease(place.store, run_stage(run)):
        assert main(["store", "rm", run]) == 2
        assert f"is at work in process {os.getpid()} on {os.uname().nodename}. Let it" in capsys.readouterr().err
    assert main(["store", "rm", run]) == 0, "its manifest says running, but nobody is at it"


def put_checkpoint(store: Store, training: Stage, run: str | None) -> str:
    def write(folder: Path) -> dict[str, Any]:
        (folder / "state.safetensors").write_bytes(b"state" * 100)
        return {"run": run}

    return path_of(stored(store, checkpoint_stage(training, "000120"), CheckpointRef, write).artifact)


@pytest.mark.parametrize("when", ["before its marker is read", "while its files are read"])
def test_a_checkpoint_that_a_training_deletes_meanwhile_is_not_damaged(
    place: Place, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    run = "demo-20260101-000000-001"
    put_run(place.store, run, put(place.store, "shared"))
    path = put_checkpoint(place.store, Stage("adapter", 1, ["rows"], {}), run)
    what = "list_files" if when.startswith("before") else "stream"
    former = getattr(place.store, what)

    def read(name: str) -> Any:
        found = list(former(name)) if what == "list_files" else None
        if name == "artifacts" or (what == "stream" and name.startswith(path)):
            place.store.delete(path)
        return former(name) if found is None else iter(found)

    with monkeypatch.context() as patch:
        patch.setattr(place.store, what, read)
        found = verify_artifacts(place.store, None, lambda _: None)
    assert found["problems"] == []
    assert not any("checkpoint/" in file.path for file in place.store.list_files("artifacts"))


def test_gc_keeps_the_checkpoints_of_a_training_that_did_not_end(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    training = Stage("adapter", 1, ["rows"], {})
    put_run(place.store, "demo-20260101-000000-001", put(place.store, "shared"))
    kept = put_checkpoint(place.store, training, "demo-20260101-000000-001")
    of_no_run = put_checkpoint(place.store, Stage("adapter", 1, ["others"], {}), None)
    (listed,) = (a for a in output(capsys, "store", "ls", "checkpoint")[1] if kept.endswith(a["key"]))
    assert listed["runs"] == ["demo-20260101-000000-001"]
    assert output(capsys, "store", "du")[1]["kinds"]["checkpoint"] > 1000
    place.store.write_bytes(f"{of_no_run}/_artifact.json", b"{")
    assert [p["artifact"] for p in verify_artifacts(place.store, None, lambda _: None)["problems"]] == [
        of_no_run.removeprefix("artifacts/")
    ]
    far = place.store.clock() + 3 * DAY
    assert place.gc(far) == {of_no_run: "no run reaches it"}
    put_checkpoint(place.store, Stage("adapter", 1, ["deleted"], {}), "demo-20250101-000000-001")
    assert len(place.gc(far, dry_run=True)) == 1
    stored(place.store, training, ModelRef, lambda folder: {"dtype": "float32"})
    assert kept in place.gc(far, dry_run=True), "its adapter is there"
    place.store.delete(f"artifacts/adapter/{training.key}")
    assert kept not in place.gc(far)
    assert main(["store", "rm", "demo-20260101-000000-001"]) == 0
    assert kept in place.gc(far)


def test_gc_keeps_what_the_registry_names(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    kept = put(place.store, "kept")
    put_run(place.store, "demo-20260101-000000-001", kept)
    entry = {"number": 1, "run": "demo-20260101-000000-001"}
    place.store.create_bytes("registry/demo/versions/1.json", json.dumps(entry).encode())
    assert main(["store", "rm", "demo-20260101-000000-001"]) == 2
    assert "is in the registry" in capsys.readouterr().err
    far = place.store.clock() + 3 * DAY
    assert place.gc(far) == {}
    place.store.delete("runs/demo-20260101-000000-001")
    with pytest.raises(StoreError, match="has no manifest"):
        place.gc(far)
    place.store.write_bytes("registry/demo/versions/1.json", b"[")
    with pytest.raises(StoreError, match="not an entry of the registry"):
        place.gc(far)
    assert place.store.read_bytes(f"{path_of(kept)}/_artifact.json")


def test_a_manifest_that_cannot_be_read_stops_gc(place: Place) -> None:
    loose = put(place.store, "loose")
    place.store.write_bytes("runs/demo-20260101-000000-001/manifest.json", b'{"version": 1}')
    with pytest.raises(StoreError, match="nothing was done.*forgetless store rm demo-20260101-000000-001"):
        place.gc(place.store.clock() + 3 * DAY)
    assert place.store.read_bytes(f"{path_of(loose)}/_artifact.json")
    assert main(["store", "rm", "demo-20260101-000000-001"]) == 0
    assert place.gc(place.store.clock() + 3 * DAY) == {path_of(loose): "no run reaches it"}


def test_rm_takes_the_names_of_things_alone(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    kept = put(place.store, "kept")
    for name in ("/", "merged/", "merged/..", "../runs", "merged", "", f"merged/{kept.key}/sub"):
        assert main(["store", "rm", name]) == 1, name
        assert "There is no" in capsys.readouterr().err
    assert not verify_artifacts(place.store, None, lambda _: None)["problems"]


def test_what_killed_processes_left_goes_and_what_is_at_work_stays(place: Place) -> None:
    code = (
        "import pathlib, sys, time; from tasks.core.settings import read_settings; "
        "from tasks.core.store import open_store\n"
        "with open_store(read_settings()).work_folder() as folder:\n"
        "    (folder / 'half').write_bytes(b'x' * 50); print(folder, flush=True); time.sleep(60)"
    )
    folders, processes = [], []
    for _ in range(2):
        process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert process.stdout
        folders.append(process.stdout.readline().strip())
        processes.append(process)
    killed, alive = processes
    try:
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        old, new = (place.store.kept_folder(f"training-{name}") for name in ("old", "new"))
        trackers = place.store.kept_folder("trackers")
        shards = place.store.kept_folder("dataset-old")
        for folder in (old, new, trackers, shards):
            (folder / "last").mkdir(parents=True)
            (folder / "last" / "state.json").write_text("{}")
        now = place.store.clock() + 10
        for path in (*old.rglob("*"), old, *shards.rglob("*"), shards, *trackers.rglob("*"), trackers):
            os.utime(path, (now - 2 * DAY, now - 2 * DAY))
        assert place.gc(now) == dict.fromkeys((str(old), str(shards)), "left by a process"), (
            "the others are younger than a day"
        )
        for path in (Path(folders[0]) / "half", Path(folders[0]), Path(folders[1]) / "half", Path(folders[1])):
            os.utime(path, (now - 2 * DAY, now - 2 * DAY))
        assert place.gc(now, dry_run=True) == place.gc(now) == {folders[0]: "left by a process"}
        assert Path(folders[1], "half").exists(), "its process is alive"
        assert (new / "last" / "state.json").exists()
        assert (trackers / "last" / "state.json").exists()
    finally:
        alive.kill()
        alive.wait()


def test_parts_of_downloads_and_answers_of_unfinished_scorings_go(place: Place) -> None:
    downloads = place.settings.cache / "downloads"
    downloads.mkdir(parents=True)
    old, held, whole = (downloads / name for name in ("part-a-9", "part-b-9", "a"))
    for file in (old, held, whole):
        file.write_bytes(b"x" * 7)
    place.store.write_bytes("unfinished/abc/0.json", b"{}")
    now = place.store.clock() + DAY + 10
    with held.open("rb") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        expected = dict.fromkeys((str(old), "unfinished/abc/0.json"), "left by a process")
        assert place.gc(place.store.clock()) == {}, "younger than a day"
        assert place.gc(now, dry_run=True) == place.gc(now) == expected
    assert sorted(file.name for file in downloads.iterdir()) == ["a", "part-b-9"]
    assert not list(place.store.list_files("unfinished"))


def test_unfinished_uploads_and_temporary_files_go(place: Place) -> None:
    if isinstance(place.store, S3Store):
        upload = place.store.client.create_multipart_upload(
            Bucket=place.store.bucket, Key="team/runs/artifacts/gguf/abc/model.gguf"
        )
        elsewhere = {"Bucket": place.store.bucket, "Key": "team/runs2/model.gguf"}
        place.store.client.create_multipart_upload(**elsewhere)
        (begun,) = place.store.list_partial()
        assert begun.path == f"artifacts/gguf/abc/model.gguf?uploadId={upload['UploadId']}"
    else:
        assert isinstance(place.store, FileStore)
        place.store.write_bytes("runs/a-1/manifest.json.txt", b"kept")
        (place.store.root / "runs" / "a-1" / ".manifest.json.abcd_123").write_bytes(b"half")
        (begun,) = place.store.list_partial()
        place.store.delete("runs/a-1/manifest.json.txt")
    assert place.gc(begun.written + DAY - 1) == {}
    assert place.gc(begun.written + DAY + 1) == {begun.path: "never finished"}
    assert list(place.store.list_partial()) == []


def test_the_cache_keeps_to_its_limit_but_for_what_is_in_use(
    place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not isinstance(place.store, S3Store):
        pytest.skip("a folder is read in place")
    first, second, third, fourth = (put(place.store, name, 1000) for name in ("1_", "2_", "3_", "4_"))
    code = (
        "import sys, time; from tasks.core.records import ArtifactRef; from tasks.core.settings import read_settings; "
        "from tasks.core.store import open_store\n"
        "for ref in sys.argv[2:]:\n"
        "    open_store(read_settings()).local_folder(ArtifactRef.model_validate_json(ref))\n"
        "print('done', flush=True); time.sleep(float(sys.argv[1]))"
    )

    def use(seconds: int, *refs: ArtifactRef) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", code, str(seconds), *(ref.model_dump_json() for ref in refs)]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert process.stdout
        assert process.stdout.readline() == "done\n"
        return process

    def kept() -> set[str]:
        return {folder.name for folder in (place.settings.cache / "artifacts" / "merged").iterdir()}

    monkeypatch.setenv("FORGETLESS_CACHE_LIMIT", "6.5kB")  # three of them
    user = use(60, first)
    try:
        use(0, second).wait()
        use(0, third, second).wait()  # so the third is the longest unused of those that nobody uses
        use(0, fourth).wait()
        assert kept() == {first.content, second.content, fourth.content}
        assert len(place.gc(place.store.clock(), cache=True, dry_run=True)) == 2
        assert main(["store", "gc", "--cache"]) == 0
        assert kept() == {first.content}
    finally:
        user.kill()
        user.wait()
    assert main(["store", "gc", "--cache"]) == 0
    assert kept() == set()
    assert "1 removed" in capsys.readouterr().out


def test_a_limit_that_is_no_size_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("FORGETLESS_STORE", str(tmp_path))
    monkeypatch.setenv("FORGETLESS_CACHE_LIMIT", "much")
    assert main(["store", "du"]) == 2
    assert "expected a size such as 50GB or 500MB, found 'much'" in capsys.readouterr().err
    for text, size in (("50GB", 50 * 10**9), ("1.5 GiB", 3 << 29), ("10B", 10)):
        monkeypatch.setenv("FORGETLESS_CACHE_LIMIT", text)
        assert read_settings().cache_limit == size
