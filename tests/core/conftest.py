"""Fixtures of the store: a folder, and a bucket on an S3 server over HTTP."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tasks.core.s3 import S3Store
from tasks.core.store import FileStore, Store


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(params=["folder", "s3"])
def any_store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    if request.param == "folder":
        return FileStore(tmp_path / "store")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", request.getfixturevalue("s3_endpoint"))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    bucket = f"b{abs(hash(tmp_path)) % 10**9}"
    store = S3Store(bucket, "team/runs", tmp_path / "cache")
    store.client.create_bucket(Bucket=bucket)
    return store
