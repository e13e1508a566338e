"""A whole run on a bad network ends with the bytes of a run on a good one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flows.lineage import compare_runs
from flows.store import verify_artifacts
from tasks.core.manifest import RunManifest, read_manifest
from tasks.core.s3 import S3Store
from tests.conftest import ROOT
from tests.core.faulty_s3 import FAULTS, FaultyS3
from tests.flows.test_finetune import recipe  # noqa: F401 (a fixture)

SEEN_BY = {
    "500": "told so, asked again",
    "503": "told so (SlowDown), waited and asked again",
    "reset": "no answer, asked again",
    "hang": "silence for FORGETLESS_S3_TIMEOUT, asked again",
    "truncated": "a short body, asked again",
    "wrong bytes": "another MD5, sent or fetched again",
}


def run(recipe_file: Path, url: str, endpoint: str, cache: Path) -> RunManifest:
    """Return the manifest of a run through the command line, read over a good network."""
    command = [sys.executable, "-m", "flows.cli", "run", str(recipe_file), "--store", url, "--json"]
    places = {"AWS_ENDPOINT_URL_S3": endpoint, "FORGETLESS_CACHE": str(cache), "PYTHONPATH": str(ROOT)}
    environment = {**os.environ, **places, "OLLAMA_HOST": "127.0.0.1:9", "FORGETLESS_S3_TIMEOUT": "5"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return read_manifest(S3Store("network", url.rpartition("/")[2], cache), "latest")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_run_on_a_bad_network_has_the_bytes_of_a_good_one(
    recipe: Path,  # noqa: F811
    tmp_path: Path,
    s3_endpoint: str,
    aws: None,
) -> None:
    S3Store("network", "", tmp_path).client.create_bucket(Bucket="network")
    good = run(recipe, "s3://network/good", s3_endpoint, tmp_path / "good")
    proxy = FaultyS3(s3_endpoint, share=0.2, hang=6.0)
    bad = run(recipe, "s3://network/bad", proxy.url, tmp_path / "bad")
    proxy.server.shutdown()
    print("\n| fault | times | mended | what the client did |\n|---|---|---|---|")
    for fault in FAULTS:
        print(f"| {fault} | {proxy.injected[fault]} | {proxy.mended[fault]} | {SEEN_BY[fault]} |")
    assert bad.status == good.status == "completed"
    assert all(proxy.injected[fault] for fault in FAULTS)
    compared = compare_runs(good, bad)
    assert compared["same"], compared["artifacts"]
    assert bad.served and good.served and bad.served.capabilities == good.served.capabilities
    store = S3Store("network", "bad", tmp_path / "other")
    assert not verify_artifacts(store, None, lambda _: None)["problems"]
