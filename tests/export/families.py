"""Tiny random models of the families that are exported most, each with a tokenizer of its family's structure.

The words are learned here from a few sentences. What is real is how a text is split, merged and marked.
"""

import io
import json
from pathlib import Path
from typing import Any

import torch
from sentencepiece import SentencePieceTrainer
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoTokenizer,
    LlamaForCausalLM,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2ForCausalLM,
)

from tasks.models.tokenizer import save_tokenizer

TEXTS = [
    "The quick brown fox jumps over the lazy dog, and the dog doesn't mind.",
    "In 2024 there were 12345 parcels; 678 of them came back within 14 days.",
    "你好，今天天气怎么样？我们可以在十四天内退货。谢谢你的帮助！",
    "def answer(question: str) -> str:\n    return 'forty-two'  # 42\n",
    "  Two spaces,\ttabs\n\n\nand blank lines — with a dash… and an emoji 🚀.",
] * 4
PROBES = [
    *TEXTS[:4],
    "I'll say WE'VE seen 1234567 of them",
    "语言模型 language-model ñandú Ωmega",
    "a  b   c \n d",
    TEXTS[4].strip(),
]
CHATML_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + "
    "m['content'] + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
INST_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace("{1,3}", "")


def byte_level_bpe(split: str, special: list[str], names: dict[str, str]) -> Any:
    """Return a byte-level BPE tokenizer that splits text by a pattern, as Qwen 2's and Llama 3's are."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=split == LLAMA3_SPLIT))
    tokenizer.normalizer = normalizers.NFC() if split == QWEN2_SPLIT else None
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.add_special_tokens(special)
    if begin := names.get("bos_token"):
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", special_tokens=[(begin, tokenizer.token_to_id(begin))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def sentencepiece_bpe(folder: Path, legacy: bool) -> Any:
    """Return a SentencePiece BPE with byte fallback, as Llama 2's and Mistral's are; only tokenizer.json is kept of it,
    as transformers does. A legacy one puts a space after every special token."""
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_writer=model,
        model_type="bpe",
        vocab_size=460,
        hard_vocab_limit=False,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True, "legacy": legacy}
    settings = {"tokenizer_class": "LlamaTokenizer", **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (folder / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    (folder / "tokenizer.model").unlink()
    return tokenizer


SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
SIZES |= {"intermediate_size": 128, "max_position_embeddings": 512, "initializer_range": 0.2}
QWEN2 = (QWEN2_SPLIT, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], {"eos_token": "<|im_end|>"})
LLAMA3 = (
    LLAMA3_SPLIT,
    ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
)
FAMILIES: dict[str, tuple[Any, dict[str, Any], Any, str]] = {
    "llama 3": (LlamaForCausalLM, {"rope_theta": 500_000.0}, LLAMA3, LLAMA3_TEMPLATE),
    "qwen2": (Qwen2ForCausalLM, {"tie_word_embeddings": False}, QWEN2, CHATML_TEMPLATE),
    "qwen2, tied": (Qwen2ForCausalLM, {"tie_word_embeddings": True}, QWEN2, CHATML_TEMPLATE),
    "llama, legacy": (LlamaForCausalLM, {}, True, INST_TEMPLATE),
    "mistral": (MistralForCausalLM, {"sliding_window": None, "head_dim": 32}, False, INST_TEMPLATE),
}


def write_family(name: str, folder: Path, **sizes: int) -> Path:
    """Write a tiny random model of a family with its tokenizer as a Hugging Face folder."""
    folder.mkdir(exist_ok=True)
    kind, options, split, template = FAMILIES[name]
    tokenizer = byte_level_bpe(*split) if isinstance(split, tuple) else sentencepiece_bpe(folder, split)
    tokenizer.chat_template = template
    torch.manual_seed(0)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    model = kind(kind.config_class(vocab_size=len(tokenizer), **{**SIZES, **ends, **options, **sizes}))
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if key.endswith("bias"):  # Qwen 2's begin at nothing
                weight.normal_(std=0.2)
    model.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    return folder
