"""The fast twin of a byte-level tokenizer gives the tokenizer's own ids and edges, or says that it cannot."""

import json
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from tasks.models.byte_level import PROBES, FastTokenizer, prove_fast
from tasks.models.encode import Encoder
from tasks.models.tokenizer import load_tokenizer
from tests.conftest import DATA

pytest.importorskip("fastokens", reason="fastokens is not installed: it has no package for this machine")

# The published pre-tokenizer patterns of two families; the vocabularies are trained here, on PROBES.
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN_2 = LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")


def train(pattern: str | None, normalizer: Any = None, digits: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    parts: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    if pattern:
        parts += [pre_tokenizers.Split(Regex(pattern), "isolated")]
    parts += [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer:
        tokenizer.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(PROBES * 3, trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet))
    tokenizer.add_special_tokens([AddedToken("<|im_start|>", special=True), AddedToken("<|im_end|>", special=True)])
    return tokenizer


@pytest.fixture(scope="module")
def tokenizers(tiny_folder: Path) -> dict[str, Tokenizer]:
    return {
        "gpt2": train(None),
        "llama3": train(LLAMA_3),
        "qwen2": train(QWEN_2, normalizers.NFC()),
        "digits": train(None, digits=True),
        "smollm2": load_tokenizer(tiny_folder, "auto").backend_tokenizer,
    }


PIECES = st.one_of(
    st.text(max_size=30),
    st.sampled_from(
        [
            "你好，世界。",
            "  two",
            "\n\n",
            "e\u0301",
            "🙂👨‍👩‍👧",
            "<|im_end|>",
            "<|im_start|>",
            "'ll",
            "1234567",
            "\r\n\t",
            "Ünï",
            " ",
        ]
    ),
)


@pytest.mark.parametrize("name", ["gpt2", "llama3", "qwen2", "digits", "smollm2"])
@settings(max_examples=150, suppress_health_check=list(HealthCheck), deadline=None)
@given(pieces=st.lists(PIECES, min_size=3, max_size=9))
def test_ids_and_edges_are_the_tokenizers_own(tokenizers: dict[str, Tokenizer], name: str, pieces: list[str]) -> None:
    tokenizer = tokenizers[name]
    fast = FastTokenizer(tokenizer.to_str())
    text = "".join(pieces)
    begin, end = len(pieces[0]), len(pieces[0] + pieces[1])
    (found,) = fast.encode([text], [[(begin, end)]])
    encoding = tokenizer.encode(text, add_special_tokens=False)
    if found is None:
        return
    ids, [(first, last)] = found
    assert ids.tolist() == encoding.ids
    # Each part by itself is the same tokens, so the edges are where it says.
    assert tokenizer.decode(encoding.ids[:first], skip_special_tokens=False) == text[:begin]
    assert tokenizer.decode(encoding.ids[first:last], skip_special_tokens=False) == text[begin:end]


def test_it_says_where_it_cannot_tell(tokenizers: dict[str, Tokenizer]) -> None:
    plain, inside, lacking = "你好<|im_end|>再见", "ab", "x\U00040000y"
    fast = FastTokenizer(tokenizers["smollm2"].to_str())
    found = fast.encode([plain, inside, lacking, plain], [[(2, 12)], [(1, 2)], [(0, 1)], [(2, 12)]])
    assert [known is None for known in found] == [False, True, True, False]  # an edge in a token; a byte it lacks
    assert fast.encode([], []) == []
    composed = FastTokenizer(tokenizers["qwen2"].to_str())
    assert [known is None for known in composed.encode(["e\u0301", "é"], [[(0, 2)], [(0, 1)]])] == [True, False]


def test_real_text_is_told_nearly_always(tokenizers: dict[str, Tokenizer]) -> None:
    path = DATA / "sft_zh" / "oaast_sft_zh.json"
    if not path.is_file():
        pytest.skip(f"{DATA} is absent; FORGETLESS_DATA names the folder of the shared data")
    rows = json.loads(path.read_text(encoding="utf-8"))
    texts = [f"<|im_start|>user\n{r['instruction']}<|im_end|>\n<|im_start|>assistant\n{r['output']}" for r in rows]
    spans = [[(text.rindex("<|im_start|>") + 22, len(text))] for text in texts]
    for name in ("smollm2", "llama3", "qwen2"):
        found = FastTokenizer(tokenizers[name].to_str()).encode(texts, spans)
        own = tokenizers[name].encode_batch(texts, add_special_tokens=False)
        known = [(pair[0].tolist(), encoding.ids) for pair, encoding in zip(found, own, strict=True) if pair]
        assert all(ids == its for ids, its in known)
        assert len(known) >= 0.97 * len(texts)


def other_kinds() -> Iterator[Tokenizer]:
    unigram = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], 0))
    yield unigram
    pieces = Tokenizer(models.BPE({"▁": 0, "a": 1, "▁a": 2}, [("▁", "a")]))  # as Llama 2's: spaces are ▁
    pieces.normalizer = normalizers.Replace(" ", "▁")
    pieces.decoder = decoders.Replace("▁", " ")
    yield pieces
    lower = train(None, normalizers.Lowercase())
    yield lower


def test_other_tokenizers_have_no_twin() -> None:
    for tokenizer in other_kinds():
        assert prove_fast(tokenizer, []) is None


def test_a_twin_that_gives_other_ids_is_not_used(tokenizers: dict[str, Tokenizer]) -> None:
    changed = Tokenizer.from_str(tokenizers["gpt2"].to_str())
    assert prove_fast(changed, []) is not None

    class Wrong:
        """A tokenizer whose ids differ from those of the settings it gives."""

        def to_str(self) -> str:
            return changed.to_str()

        def encode_batch(self, texts: list[str], add_special_tokens: bool) -> Any:
            return tokenizers["digits"].encode_batch(texts, add_special_tokens=add_special_tokens)

    assert prove_fast(Wrong(), []) is None


def test_an_encoder_in_another_process_needs_no_transformers(tiny_folder: Path, tmp_path: Path) -> None:
    encoder = Encoder(load_tokenizer(tiny_folder, "auto"))
    assert encoder.fast is not None
    row = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "再见 🙂"}]
    odd = [{"role": "user", "content": "<|im_start|>"}, {"role": "assistant", "content": "said by the template"}]
    (tmp_path / "encoder").write_bytes(pickle.dumps((encoder, row, odd)))
    program = """
import pickle, sys
encoder, row, odd = pickle.load(open(sys.argv[1], "rb"))
print(encoder.encode([row], 64).ids.tolist())
assert "transformers" not in sys.modules
print(encoder.encode([odd], 64).ids.tolist())
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "encoder")], capture_output=True, text=True, check=True
    )
    expected = [encoder.encode([messages], 64).ids.tolist() for messages in (row, odd)]
    assert [json.loads(line) for line in done.stdout.splitlines()] == expected
