"""What a generated answer is worth, one item at a time: against its reference, and by itself.

Tokens are words, or single characters where a script has no spaces between words (and in Korean, as in KorQuAD); case
and punctuation do not count. BLEU and chrF are sacrebleu's, ROUGE-L is rouge_score's. Wording alone is measured: no
model is asked whether an answer is true.
"""

import re
import unicodedata
from collections import Counter
from functools import cache
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import regex  # type: ignore[import-untyped]
from sacrebleu.metrics import BLEU, CHRF

MOST_CHARS = 10_000  # of a text that BLEU, chrF and the language look at
MOST_ROUGE_TOKENS = 1_000  # ROUGE-L fills a table of answer x reference tokens: a million cells take 0.2 s

_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}ー\p{Hangul}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_LETTER = rf"[[\p{{L}}\p{{M}}\p{{N}}]--[{_UNSPACED}]]"
TOKEN = regex.compile(rf"(?V1)[{_UNSPACED}]|\d+(?:[.,]\d+)+|{_LETTER}+(?:['’]{_LETTER}+)*")


def measure_answer(answer: str, reference: str | None, question: str) -> dict[str, float]:
    """Return the measures of one answer, all fractions but `length` (tokens).

    Always: repetition (share of its 4-grams that occurred before in it), other_language and refused (0 or 1), length.
    With a reference: exact_match, f1 (SQuAD's and CMRC's, articles kept), rouge_l (F-measure of the first
    MOST_ROUGE_TOKENS), bleu (sentence BLEU, effective order) and chrf (both of the first MOST_CHARS)."""
    text = _normalise(answer)
    tokens = TOKEN.findall(text)
    grams = list(zip(*(tokens[start:] for start in range(4)), strict=False))
    measures = {
        "repetition": 1 - len(set(grams)) / len(grams) if grams else 0.0,
        "other_language": float(_is_other_language(answer, reference or "", question)),
        "refused": float(_is_refusal(answer)),
        "length": float(len(tokens)),
    }
    if reference is None:
        return measures
    expected = _normalise(reference)
    expected_tokens = TOKEN.findall(expected)
    rouge = _rouge_scorer().score(expected_tokens[:MOST_ROUGE_TOKENS], tokens[:MOST_ROUGE_TOKENS])
    pair = answer.strip()[:MOST_CHARS], [reference.strip()[:MOST_CHARS]]
    bleu = BLEU(tokenize=_bleu_tokenizer(reference), effective_order=True).sentence_score(*pair)
    return {
        "exact_match": float(_strip(text) == _strip(expected)),
        "f1": _f1(tokens, expected_tokens),
        "rouge_l": float(rouge["rougeL"].fmeasure),
        "bleu": min(1.0, bleu.score / 100),  # exp(log(100)) is a little more than 100
        "chrf": min(1.0, CHRF().sentence_score(*pair).score / 100),
    } | measures


def corpus_measures(answers: list[str], references: list[str]) -> dict[str, float]:
    """Return corpus BLEU and chrF (0 to 100, sacrebleu's defaults); nothing for no answers.

    Raises ValueError where the lists differ in length: sacrebleu would drop the rest."""
    if len(answers) != len(references):
        raise ValueError(f"Expected a reference for each answer, found {len(answers)} and {len(references)}.")
    if not answers:
        return {}
    bleu = BLEU(tokenize=_bleu_tokenizer("\n".join(references)), force=True)  # force only silences a warning
    return {
        "bleu": min(100.0, bleu.corpus_score(answers, [references]).score),
        "chrf": min(100.0, CHRF().corpus_score(answers, [references]).score),
    }


# --- wording ----------------------------------------------------------------------------------------------------------

VALUE_SIGNS = "-%‰#"  # -5 is not 5, C# is not C


MARKS = regex.compile(r"(\p{M}{30})\p{M}+")


def _normalise(text: str) -> str:
    # 30 marks on a letter, as UAX #15 has it (stream-safe text): normalising sorts them, in quadratic time.
    return unicodedata.normalize("NFKC", MARKS.sub(r"\1", text)).casefold()


def _strip(text: str) -> str:
    """Return a normalised text with single spaces and without punctuation around it, unless it is nothing else."""
    text = " ".join(text.split())
    around = {c for c in set(text) if c in " `" or (unicodedata.category(c)[0] == "P" and c not in VALUE_SIGNS)}
    return text.strip("".join(around)) or text


def _f1(tokens: list[str], expected: list[str]) -> float:
    if not tokens or not expected:
        return float(tokens == expected)
    common = (Counter(tokens) & Counter(expected)).total()
    return 2 * common / (len(tokens) + len(expected))


@cache
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # type: ignore[import-untyped]  # loads nltk: 2 s

    return RougeScorer(["rougeL"], tokenizer=SimpleNamespace(tokenize=list))  # it is given tokens, not text


def _bleu_tokenizer(reference: str) -> str:
    scripts = _count_scripts(reference[:MOST_CHARS])
    return "zh" if scripts and scripts.most_common(1)[0][0] == "Han" else "13a"


# --- language ---------------------------------------------------------------------------------------------------------

NO_LANGUAGE = re.compile(
    r"<tool_call>.*?</tool_call>|```.*?(?:```|\Z)|`[^`\n]+`|https?://\S+|<[^<>\n]+>|\$[^$\n]+\$", re.DOTALL
)
NAMED_LANGUAGE = re.compile(  # the answer may be in that one; 用中文回答 of a Chinese question changes nothing
    r"翻译|[译翻]成|[英日韩法德俄泰]语|[英日韩法德俄外]文|西班牙语|葡萄牙语|阿拉伯语|意大利语|translat"
    r"|(?:English|Chinese|Mandarin|Japanese|Korean|French|German|Spanish|Russian|Arabic|Italian|Portuguese)\b",
    re.IGNORECASE,
)
WORD = regex.compile(r"(?V1)[[\p{L}\p{M}]--[\p{Han}\p{Hiragana}\p{Katakana}ー\p{Hangul}]]+")
CODE_SIGN = re.compile(r"[{}()\[\];=<>_/\\|]")
SCRIPTS = {"CJK": "Han", "HIRAGANA": "Kana", "KATAKANA": "Kana", "KATAKANA-HIRAGANA": "Kana", "HANGUL": "Hangul"}
DENSE = ("Han", "Kana", "Hangul")
DENSE_WEIGHT = 3  # a character of these says about as much as three letters
ENOUGH, ENOUGH_ASKED, ENOUGH_FOR_KANJI, ENOUGH_TO_IDENTIFY = 24, 9, 60, 40  # weighted letters
SURE = 0.9
# Too near to each other to be told apart in a line or two.
NEAR = {"nb": "no", "nn": "no", "da": "no", "ms": "id", "bs": "sr", "hr": "sr", "sk": "cs", "gl": "pt"}


def _is_other_language(answer: str, reference: str, question: str) -> bool:
    """Return whether the answer is clearly in another language than its reference, or than its question where the
    reference is absent or too short to tell. By script; within a script by py3langid, for longer texts only."""
    said, wanted, asked = (NO_LANGUAGE.sub(" ", text[:MOST_CHARS]) for text in (answer, reference, question))
    scripts, expected, questioned = (_count_scripts(text) for text in (said, wanted, asked))
    if not scripts:
        return False
    accepted = {script for script, letters in expected.items() if 4 * letters >= max(expected.values())}
    if expected.total() < ENOUGH:
        if NAMED_LANGUAGE.search(question):
            return False
        # A question may be a line of Chinese over an English article: its answer may be in either.
        accepted |= {s for s, n in questioned.items() if n >= ENOUGH_ASKED and (s != "LATIN" or _is_prose(asked))}
    accepted |= questioned.keys() & {"Kana"}  # in Japanese a short reference may be all kanji
    main, letters = scripts.most_common(1)[0]
    if not accepted or (main == "LATIN" and not _is_prose(said)):
        return False
    if main not in accepted:
        enough = ENOUGH_FOR_KANJI if main == "Han" and "Kana" in accepted else ENOUGH
        return letters >= enough and letters > 3 * sum(scripts[script] for script in accepted)
    if main in DENSE:
        return False
    found, meant = _identify(said), _identify(wanted if expected else asked)
    return found is not None and meant is not None and found != meant


def _count_scripts(text: str) -> Counter[str]:
    """Return letters by script, weighted. Han characters count as kana in a text that is a quarter kana: Japanese is
    about half kana, Chinese at most quotes a name."""
    scripts: Counter[str] = Counter()
    for char, count in Counter(text).items():
        if char.isalpha():
            name = unicodedata.name(unicodedata.normalize("NFKC", char)[0], "?").split(" ")[0]  # LATIN SMALL LETTER A
            script = SCRIPTS.get(name, name)
            scripts[script] += count * (DENSE_WEIGHT if script in DENSE else 1)
    if 3 * scripts["Kana"] > scripts["Han"]:
        scripts["Kana"] += scripts.pop("Han", 0)
    return +scripts


def _is_prose(text: str) -> bool:
    """Return whether a text has words in sentences: more than names, a title, a list of terms or code."""
    words = list(WORD.finditer(text))
    follow = sum(
        a.end() + 1 == b.start() and text[a.end()] == " " and not b[0][0].isupper() for a, b in pairwise(words)
    )
    letters = sum(len(word[0]) for word in words)
    return follow >= 3 and letters >= ENOUGH and 12 * len(CODE_SIGN.findall(text)) < len(text)


def _identify(text: str) -> str | None:
    words = " ".join(WORD.findall(text))[:300]  # py3langid takes a microsecond per letter
    if len(words) < ENOUGH_TO_IDENTIFY or not _is_prose(text):
        return None
    language, probability = _identifier().classify(words)
    return NEAR.get(language, language) if probability >= SURE else None


@cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier  # type: ignore[import-untyped]

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


# --- refusals ---------------------------------------------------------------------------------------------------------

_CANNOT = r"(?:I (?:can ?not|can't|could not|couldn't|won't|will not)|I(?:'m| am) (?:unable|not (?:able|allowed)) to)\b"
_ACT = (
    r"(?:assist|comply|fulfil|help(?! but\b| \w+ing\b)|provid|generat|creat|engage in|discuss|respond to|access|brows"
    r"|do (?:that|this|so)\b|(?:answer|complete) (?:\w+ )?(?:question|request|task))"
)
_ACT_SORRY = (
    rf"(?:{_ACT}|answer|complet|shar|giv|writ|tell|draw|predict|display|process|produc|perform|open|view|play"
    r"|translat|recommend|offer|participat|promot|express|suggest|determin|verify)"
)
_AI = (
    r"(?:AI|artificial intelligence|chatbot"
    r"|(?:AI|artificial intelligence|language|virtual)(?: \w+)? (?:model|assistant|system|program))"
)
_CANNOT_ZH = r"(?:无法|不能|没办法|没有(?:办法|能力|权限)|不便|不方便|不可以|拒绝)"
_ACT_ZH = r"(?:回答|提供|满足|协助|帮助?[你您]|执行|生成|遵从|讨论|评论)"
_ACT_SORRY_ZH = (
    rf"(?:{_ACT_ZH}|帮|完成|创建|创作|访问|给出|评价|处理|浏览|播放|查看|预测|评估|参与|显示|绘制|发送|查询|搜索|识别|告诉|联网"
    r"|透露|推荐|翻译|写|画)"
)
_AI_ZH = r"(?:(?:AI|人工智能|智能|虚拟|语言)\s*(?:语言)?(?:助手|助理|模型|程序|系统)|AI|人工智能|大模型|机器人)"
_AS_AI_ZH = rf"[^，。！？\n]{{0,16}}?{_AI_ZH}(?=\s*[，,我])[^。！？\n]{{0,30}}?{_CANNOT_ZH}"
REFUSAL = re.compile(
    r"(?:\A|(?<=[.!?。！？\n]))\s*(?:(?:您好|你好|Hello|Hi)[,，!！]?\s*)?(?:"
    r"(?:(?:I'm|I am)(?: \w+)? (?:sorry|afraid)|Sorry|(?:I|My) apolog\w+|Unfortunately)\b[^.!?\n]{0,60}?"
    rf"\b{_CANNOT}(?:(?: \w+ly| just)? {_ACT_SORRY}|\s*(?:[.…!]|\Z))"
    rf"|As an? (?:[\w-]+ ){{0,3}}?{_AI}(?: \w+ by [^.,\n]{{1,40}})?,[^.!?\n]{{0,60}}?\b{_CANNOT}"
    rf"|{_CANNOT}(?: \w+ly| just)? {_ACT}|I(?:'m| am) (?:unable|not able) to\b|I (?:must|have to) (?:\w+ )?decline\b"
    r"|(?:我|很|非常|十分|真的?|实在)*(?:抱歉|对不起|不好意思|遗憾)[^。！？!?\n]{0,30}?"
    rf"{_CANNOT_ZH}(?:[^，。！？\n]{{0,16}}?{_ACT_SORRY_ZH}|\s*(?:[.。…！]|\Z))"
    rf"|(?:作为|身为){_AS_AI_ZH}|我只?是{_AS_AI_ZH}[^，。！？\n]{{0,16}}?{_ACT_SORRY_ZH}"
    rf"|我{_CANNOT_ZH}[^，。！？\n]{{0,8}}?{_ACT_ZH}"
    r")(?![^.!?\n]{0,80}\benough\b)",
    re.IGNORECASE,
)
# An answer that goes on to help is none; that it could do something else is no help.
HELP = re.compile(
    r"(?:[,，;；] ?(?:but|但是?|不过)|[.。]\s*(?:But|However|但是?|不过),? ?(?:I can|我可以|我能))"
    r"(?![^.。\n]{0,60}(?:其[他它]|别的|\belse\b|\bother\b))"
    r"|\bhere (?:is|are)\b|以下(?:是|为|几|一些)|如下|下面是",
    re.IGNORECASE,
)
LATEST_REFUSAL = 80  # characters before it


def _is_refusal(answer: str) -> bool:
    text = answer[:600].lstrip().replace("’", "'")
    found = REFUSAL.search(text)
    return found is not None and found.start() <= LATEST_REFUSAL and not HELP.search(text[found.end() :][:200])
