"""Pickles that would leave a trace, under every name that something from outside can have: none is ever unpickled."""

import contextlib
import io
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tasks.core.config import ModelConfig, SourceConfig, TrainConfig
from tasks.core.errors import ForgetlessError
from tasks.core.manifest import find_start
from tasks.core.store import FileStore
from tasks.data.sources import content_identity, read_rows
from tasks.models.base import locate_base
from tasks.models.encode import read_examples
from tasks.models.load import load_model, load_shipped
from tasks.models.tokenizer import load_tokenizer
from tasks.training.checkpoints import load_checkpoint


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = str(trace)

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.trace, "w")


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    return tmp_path / "it-went-off"


@pytest.fixture(params=["pickle", "torch"])
def bomb(request: pytest.FixtureRequest, trace: Path) -> bytes:
    """The bytes of a pickle, or of torch's archive around one."""
    if request.param == "pickle":
        return pickle.dumps(Bomb(trace))
    file = io.BytesIO()
    torch.save({"weight": torch.zeros(2), "x": Bomb(trace)}, file)
    return file.getvalue()


def test_the_bomb_works(bomb: bytes, trace: Path) -> None:
    with contextlib.suppress(Exception):
        pickle.loads(bomb)
    with contextlib.suppress(Exception):
        torch.load(io.BytesIO(bomb), weights_only=False)
    assert trace.exists()


def plant(folder: Path, bomb: bytes, *names: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_bytes(bomb)
    return folder


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt", "model.ckpt", "model.pkl"])
def test_a_model_of_pickles_is_refused(name: str, bomb: bytes, trace: Path, tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    plant(folder, bomb, name)
    with pytest.raises(ForgetlessError, match=r"expected config.json and \*.safetensors"):
        locate_base(ModelConfig(base=str(folder)))
    for load in (
        lambda: load_model(folder, torch.float32, "cpu"),
        lambda: load_model(folder, torch.float32, "cpu", True),
    ):
        with pytest.raises(OSError):
            load()
    assert not trace.exists()


def test_pickles_beside_a_models_weights_are_left_alone(
    bomb: bytes, trace: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    names = ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "tokenizer.pkl", "scheduler.pt", "spiece.model")
    plant(folder, bomb, *names, "adapter_model.bin", "vocab.pkl", "generation_config.pkl", "rng_state.pth")
    source = locate_base(ModelConfig(base=str(folder)))
    load_model(source.path, torch.float32, "cpu")
    load_tokenizer(source.path, "auto")
    assert not trace.exists()


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json", "tokenizer_config.json"])
def test_a_pickle_with_a_models_name_is_no_model(
    name: str, bomb: bytes, trace: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    plant(folder, bomb, name)

    def load() -> None:
        load_model(locate_base(ModelConfig(base=str(folder))).path, torch.float32, "cpu")
        load_tokenizer(folder, "auto")

    with pytest.raises(Exception):  # noqa: B017 - every reader has its own
        load()
    assert not trace.exists()


def test_a_gguf_that_is_a_pickle(bomb: bytes, trace: Path, tmp_path: Path) -> None:
    for head in (b"", b"GGUF"):
        plant(tmp_path, head + bomb, "model.gguf")
        with pytest.raises(ForgetlessError, match="is not a GGUF file|is truncated or damaged"):
            locate_base(ModelConfig(base=str(tmp_path / "model.gguf")))
    assert not trace.exists()


@pytest.fixture
def adapter(tiny_folder: Path, tmp_path: Path) -> Path:
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    get_peft_model(model, LoraConfig(r=2, target_modules="all-linear")).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_an_adapter_of_pickles_is_refused(bomb: bytes, trace: Path, tiny_folder: Path, adapter: Path) -> None:
    weights = adapter / "adapter_model.safetensors"
    plant(adapter, bomb, "adapter_model.bin", "training_args.bin")
    load_shipped(tiny_folder, adapter, "lora", torch.float32, "cpu")
    weights.unlink()
    store = FileStore(adapter.parent / "store")
    with pytest.raises(ForgetlessError, match="expected a folder with adapter_config.json and safetensors"):
        find_start(store, TrainConfig(start_from=str(adapter), method="lora"), None, bring=True)
    with pytest.raises(ForgetlessError, match="has no adapter_model.safetensors"):
        load_shipped(tiny_folder, adapter, "lora", torch.float32, "cpu")
    weights.write_bytes(bomb)
    with pytest.raises(Exception):  # noqa: B017 - safetensors' own
        load_shipped(tiny_folder, adapter, "lora", torch.float32, "cpu")
    assert not trace.exists()


def test_what_goes_along_with_an_adapter_is_no_pickle(bomb: bytes, trace: Path, adapter: Path) -> None:
    plant(adapter, bomb, "adapter_model.bin", "optimizer.pt", "x.pkl")
    store = FileStore(adapter.parent / "store")
    start = find_start(store, TrainConfig(start_from=str(adapter), method="lora"), None, bring=True)
    kept = {path.suffix for path in store.local_folder(start.artifact).iterdir()}
    assert kept == {".safetensors", ".json"} and not trace.exists()


def test_safetensors_that_lie_are_an_error(trace: Path, bomb: bytes, tmp_path: Path) -> None:
    good = tmp_path / "good.safetensors"
    save_file({"a": torch.zeros(4)}, good)
    size = int.from_bytes(good.read_bytes()[:8], "little")
    header = json.loads(good.read_bytes()[8 : 8 + size])
    body = good.read_bytes()[8 + size :]

    def lie(**changes: Any) -> bytes:
        text = json.dumps({"a": {**header["a"], **changes}}).encode()
        return len(text).to_bytes(8, "little") + text + body

    for data in (
        bomb,
        lie(data_offsets=[0, 1 << 40]),
        lie(data_offsets=[-8, 8]),
        lie(shape=[1 << 40]),
        lie(dtype="O"),
        lie(dtype="PICKLE"),
        (1 << 60).to_bytes(8, "little") + b"{}",
        good.read_bytes()[:-1],
        b"",
    ):
        (tmp_path / "x.safetensors").write_bytes(data)
        with pytest.raises(Exception):  # noqa: B017 - safetensors' own
            load_file(tmp_path / "x.safetensors")
    assert not trace.exists()


def test_a_checkpoint_of_pickles_is_none(bomb: bytes, trace: Path, tmp_path: Path) -> None:
    names = ("state.safetensors", "state.json", "state.pt", "optimizer.pt", "state.pkl")
    plant(tmp_path / "last", bomb, *names)
    assert load_checkpoint(tmp_path, "last", [], None, None) is None
    assert not trace.exists()


def test_stored_tokens_hold_no_objects(trace: Path, bomb: bytes, tmp_path: Path) -> None:
    (tmp_path / "rows.ids").write_bytes(b"\0" * 16)
    objects = np.array([Bomb(trace)], dtype=object)
    np.savez(tmp_path / "rows.npz", starts=objects, spans=objects, rows=objects, lines=objects, times=objects)
    with pytest.raises(ValueError, match="allow_pickle=False"):
        read_examples(tmp_path / "rows")
    (tmp_path / "rows.npz").write_bytes(bomb)
    with pytest.raises((ValueError, KeyError, OSError)):
        read_examples(tmp_path / "rows")
    assert not trace.exists()


SUFFIXES = ("json", "jsonl", "csv", "tsv", "parquet", "xlsx", "txt", "zip", "jsonl.gz", "jsonl.zst")


@pytest.mark.parametrize("suffix", [*SUFFIXES, "pkl", "pickle", "npy", "npz", "pt", "arrow", "feather", "joblib"])
def test_rows_that_are_a_pickle(suffix: str, bomb: bytes, trace: Path, tmp_path: Path) -> None:
    path = tmp_path / f"rows.{suffix}"
    path.write_bytes(bomb)
    source = SourceConfig(path=str(path))
    with pytest.raises(ForgetlessError) as error:
        [content_identity(source), *read_rows(source)]
    assert "rows." in str(error.value) and "\n" not in str(error.value)
    assert not trace.exists()


@pytest.mark.parametrize("type_name", ["arrow.py_extension_type", "pandas.period", "forgetless.unknown"])
def test_a_parquet_file_whose_schema_is_a_pickle(type_name: str, trace: Path, tmp_path: Path) -> None:
    metadata = {"ARROW:extension:name": type_name, "ARROW:extension:metadata": pickle.dumps(Bomb(trace))}
    text = [f"row {i}" for i in range(4)]
    fields = [pa.field(name, pa.string(), metadata=metadata) for name in ("prompt", "response")]
    table = pa.table([text, text], pa.schema(fields, {b"pandas": pickle.dumps(Bomb(trace))}))
    pq.write_table(table, tmp_path / "rows.parquet")
    with contextlib.suppress(ForgetlessError):
        assert len(list(read_rows(SourceConfig(path=str(tmp_path / "rows.parquet"))))) == 4
    assert not trace.exists()


def test_code_in_a_models_folder_is_not_run(trace: Path, tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    (folder / "evil.py").write_text(f"open({str(trace)!r}, 'w')\nclass Evil: pass\n")
    auto = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil", "AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    for name in ("config.json", "tokenizer_config.json"):
        settings = json.loads((folder / name).read_text()) | {"auto_map": auto, "model_type": "evil"}
        settings |= {"architectures": ["Evil"], "tokenizer_class": "Evil"}
        (folder / name).write_text(json.dumps(settings))
    attempts: list[Callable[[], Any]] = [
        lambda: load_model(folder, torch.float32, "cpu"),
        lambda: load_tokenizer(folder, "auto"),
    ]
    for attempt in attempts:
        with contextlib.suppress(Exception):
            attempt()
    assert not trace.exists()
