"""Token sequences to train on: sums, whose answers a two-layer model can learn."""

from pathlib import Path

import pytest

from tasks.models.encode import Encoder, write_examples
from tasks.models.tokenizer import load_tokenizer


@pytest.fixture
def tokens(tiny_folder: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "tokens"
    folder.mkdir()
    rows = [
        {"messages": [{"role": "user", "content": f"{a}+{b}?"}, {"role": "assistant", "content": f"= {a + b}."}]}
        for a in range(6)
        for b in range(6)
    ]
    encoder = Encoder(load_tokenizer(tiny_folder, "auto"))
    for split, part in (("train", rows[:30]), ("validation", rows[30:])):
        write_examples([encoder.encode([row["messages"] for row in part], 256)], folder / split)
    return folder
