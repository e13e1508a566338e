"""llama.cpp's converter of Hugging Face folders, with three gaps in its reading of tokenizers closed, and without the
code that a folder may bring along.

It knows a byte-level BPE tokenizer by a checksum of the ids it gives, so one with words of its own is refused, although
its text is split as a known one's is: such a tokenizer is known by that split here. Of a SentencePiece BPE that comes
as tokenizer.json alone it writes the same score for every token, where llama.cpp merges by score: here a token's score
is its place among the merges. And it leaves llama.cpp to put a space after every special token, which the tokenizers of
Llama 2 and Mistral do not: here the file says what the tokenizer does.
"""

import contextlib
import json
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import torch
from conversion import ModelBase, ModelType, get_model_architecture, get_model_class
from conversion.base import TextModel
from transformers import AutoTokenizer

WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
PRE_TOKENIZERS = {
    ("ByteLevel",): "gpt-2",
    ("Digits", "ByteLevel"): "smollm",
    (ENGLISH + WORDS % r"\p{N}{1,3}",): "llama-bpe",
    (ENGLISH + WORDS % r"\p{N}",): "qwen2",
}
"""llama.cpp's name for how a text is split into words before the merges, by the steps of tokenizer.json."""


def name_pre_tokenizer(settings: dict[str, Any] | None) -> str | None:
    """Return llama.cpp's name for the pre_tokenizer of a tokenizer.json, or None where it is none of those above."""
    steps = (settings or {}).get("pretokenizers") or [settings or {}]
    names = []
    for step in steps:
        match step:
            case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": bool(splits)}:
                names += ["ByteLevel"] * splits
            case {"type": "Digits", "individual_digits": True}:
                names.append("Digits")
            case {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated", "invert": False}:
                names.append(pattern)
            case _:
                return None
    return PRE_TOKENIZERS.get(tuple(names))


def score_by_merges(settings: dict[str, Any]) -> dict[str, float]:
    """Return of each token that merges make minus the place of the first merge that makes it."""
    scores: dict[str, float] = {}
    for place, merge in enumerate(settings["model"]["merges"]):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        scores.setdefault(left + right, -float(place))
    return scores


def read_settings(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))


class MergedVocab(gguf.LlamaHfVocab):
    def __init__(self, base_path: Path) -> None:
        super().__init__(base_path)
        scores = score_by_merges(read_settings(base_path))
        self.scores = {self.tokenizer.convert_tokens_to_ids(token): score for token, score in scores.items()}

    def get_token_score(self, token_id: int) -> float:
        return self.scores.get(token_id, super().get_token_score(token_id))


def by_checksum_or_structure(model: Any, tokenizer: Any) -> str:
    try:
        return str(by_checksum(model, tokenizer))
    except NotImplementedError:
        name = name_pre_tokenizer(read_settings(model.dir_model).get("pre_tokenizer"))
        if name is None:
            raise
        return name


def puts_space_after_special(folder: Path) -> bool:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    first = tokenizer.tokenize(f"{tokenizer.bos_token or tokenizer.eos_token}x")[1]
    return bool(first.startswith("▁"))


def write_space_prefix(writer: gguf.GGUFWriter, folder: Path) -> None:
    """Write whether llama.cpp is to put a space after a special token, where the vocabulary is SentencePiece's."""
    keys = gguf.Keys.Tokenizer
    written = writer.kv_data[0]
    if written[keys.MODEL].value == "llama":
        written.pop(keys.ADD_PREFIX, None)
        writer.add_add_space_prefix(puts_space_after_special(folder))


by_checksum = TextModel.get_vocab_base_pre
gguf.LlamaHfVocab = MergedVocab  # type: ignore[misc]
TextModel.get_vocab_base_pre = by_checksum_or_structure
KINDS = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16"}


def convert(folder: Path, out: Path, kind: str, trust_remote_code: bool) -> None:
    """Write a Hugging Face folder as a GGUF file in one of KINDS. Raises whatever the converter raises."""
    with contextlib.ExitStack() as stack:
        for name in ("hf-to-gguf", "gguf", "metadata"):
            stack.enter_context(_level(logging.getLogger(name), logging.ERROR))
        place = stack.enter_context(renamed(folder, trust_remote_code))
        stack.enter_context(torch.inference_mode())
        architecture = get_model_architecture(ModelBase.load_hparams(place, False), ModelType.TEXT)
        model = get_model_class(architecture)(place, gguf.LlamaFileType[KINDS[kind]], out)
        write, write_vocabulary = model.gguf_writer.write_tensors_to_file, model.set_vocab

        def write_whole_vocabulary() -> None:
            write_vocabulary()
            write_space_prefix(model.gguf_writer, place)

        model.set_vocab = write_whole_vocabulary
        model.gguf_writer.write_tensors_to_file = lambda progress: write()  # without a bar of its own
        model.write()


@contextlib.contextmanager
def _level(logger: logging.Logger, level: int) -> Iterator[None]:
    before = logger.level
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextlib.contextmanager
def renamed(folder: Path, keep_code: bool) -> Iterator[Path]:
    """Yield a folder's files in one whose name says nothing, as the file keeps it: equal models become equal files
    wherever they are. Without `keep_code` it names no code of its own: the converter would load a tokenizer's class
    from wherever its settings say."""
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch) / "model"
        place.mkdir()
        for path in folder.iterdir():
            if path.name.endswith("config.json") and not keep_code:
                settings = json.loads(path.read_text(encoding="utf-8"))
                content = {key: value for key, value in settings.items() if key != "auto_map"}
                (place / path.name).write_text(json.dumps(content), encoding="utf-8")
            elif path.suffix != ".py" or keep_code:
                (place / path.name).symlink_to(path.resolve())
        yield place
