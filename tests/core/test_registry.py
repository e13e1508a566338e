"""The registry on a folder and on an S3 server: of many processes one wins, and nothing of the history is lost."""

import json
import multiprocessing
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest

from tasks.core import registry
from tasks.core.errors import ConfigError, ConflictError, ForgetlessError, StoreError
from tasks.core.registry import Move, Version
from tasks.core.settings import Settings
from tasks.core.store import FileStore, Store, open_store

PROCESSES = 20
ROUNDS = 3
SPAWN = multiprocessing.get_context("spawn")


def add(store: Store, run: str, name: str = "shop", verdict: str = "promote") -> Version:
    return registry.add_version(store, name, run, verdict, f"{hash(run) % 16**8:08x}" + 56 * "0", None)


def promote(store: Store, version: Version, alias: str = "promoted", name: str = "shop") -> Move:
    seen = registry.read_current(store, name, alias)
    return registry.promote_version(store, name, alias, seen, version, "gained")


def check_linear(history: list[Move]) -> None:
    assert [m.number for m in history] == list(range(1, len(history) + 1))
    assert [m.replaced for m in history] == [None, *(m.version for m in history[:-1])]


def test_a_run_is_one_version_however_often_it_is_added(any_store: Store) -> None:
    before = any_store.clock()
    first, second = add(any_store, "a"), add(any_store, "b", verdict="reject")
    assert add(any_store, "a") == first
    assert registry.read_versions(any_store, "shop") == [first, second]
    assert (first.number, second.number, second.verdict) == (1, 2, "reject")
    assert before - 2 <= first.when.timestamp() <= any_store.clock() + 2
    assert json.loads(any_store.read_bytes("registry/shop/versions/1.json"))["run"] == "a"


def test_an_alias_names_the_last_version_promoted_and_goes_back_one_at_a_time(any_store: Store) -> None:
    one, two, three = (add(any_store, run) for run in "abc")
    assert registry.read_current(any_store, "shop", "promoted") is None
    for version in (one, two, three):
        promote(any_store, version)
    for expected in (2, 1):
        seen = registry.read_current(any_store, "shop", "promoted")
        done = registry.roll_back(any_store, "shop", "promoted", seen, "it answers in French")
        assert (done.kind, done.version, done.replaced) == ("rollback", expected, expected + 1)
    with pytest.raises(ForgetlessError, match="names version 1; no version was before"):
        registry.roll_back(any_store, "shop", "promoted", done, "")
    promote(any_store, three)
    seen = registry.read_current(any_store, "shop", "promoted")
    assert registry.roll_back(any_store, "shop", "promoted", seen, "").version == 1
    history = registry.read_history(any_store, "shop", "promoted")
    check_linear(history)
    assert [m.version for m in history] == [1, 2, 3, 2, 1, 3, 1]
    assert history[3].why == "it answers in French" and "@" in history[3].who
    assert json.loads(any_store.read_bytes("registry/shop/aliases/promoted/000004.json"))["version"] == 2
    assert registry.read_aliases(any_store, "shop") == {"promoted": history[-1]}


def test_a_move_that_is_undone_stays_in_the_history(any_store: Store) -> None:
    one, two = add(any_store, "a"), add(any_store, "b")
    first = promote(any_store, one)
    undone = registry.undo_move(any_store, "shop", "promoted", first, None, "Ollama refused")
    assert (undone.version, undone.run, undone.kind) == (None, None, "undo")
    with pytest.raises(ForgetlessError, match="names no version, so there is none before"):
        registry.roll_back(any_store, "shop", "promoted", undone, "")
    before = promote(any_store, one)
    assert before.back == 0, "what was undone is not gone back to"
    second = promote(any_store, two)
    assert registry.undo_move(any_store, "shop", "promoted", second, before, "refused").version == 1
    with pytest.raises(ConflictError, match=r"moved shop:promoted to version 1 \(run a\) at the same time \(undo\)"):
        registry.undo_move(any_store, "shop", "promoted", second, before, "refused")
    check_linear(registry.read_history(any_store, "shop", "promoted"))


def test_the_same_move_by_two_is_won_by_one(any_store: Store) -> None:
    """Same version, user and second: a bucket's clock ticks once a second, and the store takes equal bytes for one's
    own."""
    version = add(any_store, "a")
    for _ in range(3):
        seen = registry.read_current(any_store, "shop", "promoted")
        registry.promote_version(any_store, "shop", "promoted", seen, version, "gained")
        with pytest.raises(ConflictError, match=r"to version 1 \(run a\) at the same time \(promote\)"):
            registry.promote_version(any_store, "shop", "promoted", seen, version, "gained")


def promote_in_rounds(settings: Settings, number: int, barrier: Barrier, results: "Queue[Any]") -> None:
    """Promote from the same state as all others, round after round; then once more until it is done."""
    store = open_store(settings)
    version = registry.read_version(store, "shop", number)
    for round_number in range(ROUNDS):
        seen = registry.read_current(store, "shop", "promoted")
        barrier.wait(120)
        try:
            won = registry.promote_version(store, "shop", "promoted", seen, version, "at once")
            results.put((round_number, number, won.number, ""))
        except ConflictError as error:
            results.put((round_number, number, None, str(error)))
        barrier.wait(120)
    while True:
        try:
            done = promote(store, version)
        except ConflictError:
            continue
        results.put((ROUNDS, number, done.number, ""))
        return


def test_of_twenty_processes_one_wins_each_round_and_nothing_is_lost(any_store: Store, tmp_path: Path) -> None:
    for number in range(PROCESSES):
        add(any_store, f"run-{number}")
    barrier, results = SPAWN.Barrier(PROCESSES), SPAWN.Queue()
    settings = Settings(any_store.url, tmp_path / "cache", "")
    processes = [
        SPAWN.Process(target=promote_in_rounds, args=(settings, n + 1, barrier, results)) for n in range(PROCESSES)
    ]
    for process in processes:
        process.start()
    found = [results.get(timeout=240) for _ in range(PROCESSES * (ROUNDS + 1))]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    history = registry.read_history(any_store, "shop", "promoted")
    check_linear(history)
    assert len(history) == ROUNDS + PROCESSES
    for round_number in range(ROUNDS):
        here = [result for result in found if result[0] == round_number]
        ((_, version, won, _),) = [result for result in here if result[2]]
        assert (won, history[won - 1].version) == (round_number + 1, version)
        told = [result[3] for result in here if not result[2]]
        assert len(told) == PROCESSES - 1
        assert all(f"to version {version} (run run-{version - 1}) at the same time" in sentence for sentence in told)
    landed = {number: version for last, version, number, _ in found if last == ROUNDS}
    assert landed == {m.number: m.version for m in history[ROUNDS:]}, "each of those that tried again is there once"


def add_runs(settings: Settings, runs: list[str], results: "Queue[Any]") -> None:
    store = open_store(settings)
    results.put({run: add(store, run).number for run in runs})


def test_of_many_processes_that_add_runs_each_gets_its_own_version(any_store: Store, tmp_path: Path) -> None:
    results = SPAWN.Queue()
    settings = Settings(any_store.url, tmp_path / "cache", "")
    own = [[f"run-{i}", "shared", f"more-{i}"] for i in range(4)]
    processes = [SPAWN.Process(target=add_runs, args=(settings, runs, results)) for runs in own]
    for process in processes:
        process.start()
    found = [results.get(timeout=120) for _ in processes]
    for process in processes:
        process.join(60)
    assert len({numbers["shared"] for numbers in found}) == 1
    versions = registry.read_versions(any_store, "shop")
    assert [v.number for v in versions] == list(range(1, 10))
    assert {v.run: v.number for v in versions} == {run: n for numbers in found for run, n in numbers.items()}


def test_a_withdrawn_version_keeps_its_number(any_store: Store) -> None:
    one = add(any_store, "a")
    registry.withdraw_version(any_store, "shop", one)
    assert registry.read_version(any_store, "shop", 1).withdrawn
    assert add(any_store, "b").number == 2


def test_names_with_a_namespace_have_a_folder_of_their_own_and_no_case(any_store: Store) -> None:
    for name in ("team/shop", "team-shop", "registry.example:5000/team/shop", "ollama"):
        promote(any_store, add(any_store, "a", name), name=name)
    any_store.write_bytes("registry/ollama/shop--1a2b3c4d.json", b"{}")  # what the registration remembers
    assert sorted(registry.read_names(any_store)) == [
        "ollama",
        "registry.example:5000/team/shop",
        "team-shop",
        "team/shop",
    ]
    assert add(any_store, "a", "Team/Shop").number == 1
    assert registry.read_current(any_store, "TEAM/shop", "Promoted").version == 1
    assert any_store.read_bytes("registry/team%2Fshop/versions/1.json")


@pytest.mark.parametrize("name", ["..", "../x", "a/../b", "/etc", "a/", "", "a b", "a:b", ".a", "a\n", "x/y/z/a"])
def test_names_cannot_leave_their_folder(store: FileStore, name: str) -> None:
    with pytest.raises(ConfigError, match="is not a model's name: expected"):
        add(store, "a", name)
    assert not list(store.root.rglob("*"))


@pytest.mark.parametrize("alias", ["..", "../x", "a/b", "/etc", "", "a b", "a:b", ".a", "a\n", "cloud", "1A2b3c4d"])
def test_aliases_cannot_leave_their_folder(store: FileStore, alias: str) -> None:
    version = add(store, "a")
    with pytest.raises(ConfigError, match="is not an alias: expected"):
        promote(store, version, alias)
    assert registry.read_aliases(store, "shop") == {}


def test_a_history_that_was_cut_by_hand_is_said(any_store: Store) -> None:
    for version in (add(any_store, "a"), add(any_store, "b")):
        promote(any_store, version)
    any_store.delete("registry/shop/aliases/promoted/000001.json")
    with pytest.raises(StoreError, match="promoted/000001.json is missing, so the registry was changed by hand"):
        registry.read_history(any_store, "shop", "promoted")
    any_store.write_bytes("registry/shop/aliases/promoted/000002.json", b"[]")
    with pytest.raises(
        StoreError,
        match="000002.json cannot be read: expected JSON with number, kind, version.* Restore it from a backup",
    ):
        registry.read_current(any_store, "shop", "promoted")
