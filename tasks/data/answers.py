"""Answers: why those of a conversation should not be learned, if so.

Phrases are matched narrowly: an answer that refuses and then helps, or speaks of another assistant without being it,
is a good one. What is plain text is judged by its length, repetition and language alone.
"""

import math
import re
from collections import Counter
from functools import cache
from itertools import pairwise
from typing import Any

from tasks.core.config import CleanConfig
from tasks.core.errors import ConfigError

Turns = list[dict[str, str]]
Objection = tuple[str, str]
"""A reason of reasons.CLEANING, and a sentence."""

LEARNED = ("assistant", "text")


def find_objection(turns: Turns, config: CleanConfig) -> Objection | None:
    """Return why a mended conversation should not be learned, or None. Raises ConfigError where a package is absent."""
    answers = [turn["content"] for turn in turns if turn["role"] in LEARNED]
    is_chat = turns[0]["role"] != "text"
    return (
        _too_short(turns, answers, config.min_answer_chars)
        or (_copied(turns) if config.copies and is_chat else None)
        or (_only_refused(turns, answers) if config.refusals and is_chat else None)
        or (_other_identity(answers) if config.identities and is_chat else None)
        or _repetitive(answers, config.repetition)
        or (_wrong_language(answers, config.languages) if config.languages else None)
    )


def _too_short(turns: Turns, answers: list[str], min_chars: int) -> Objection | None:
    for turn in turns:
        if not turn["content"].strip() and turn["role"] != "system":
            reason = "short_answer" if turn["role"] in LEARNED else "empty_prompt"
            return reason, f"A turn of the {turn['role']} is empty once it is mended."
    longest = max(len(answer.strip()) for answer in answers)
    if longest >= min_chars:
        return None
    return "short_answer", f"The longest answer has {longest} characters; expected {min_chars} or more."


# --- copies -----------------------------------------------------------------------------------------------------------

LETTER = re.compile(r"[^\W_]")
NO_LETTERS = re.compile(r"[\W_]+")
SHORTEST_COPY = 8  # letters; a greeting is answered by the same greeting
SAME_AGAIN = re.compile(
    r"翻译|复述|重复|抄写|照抄|粘贴|输出|纠正|更正|修正|改正|校对|标点|语法|拼写|排序|顺序|提取|检查|判断|找出|识别|选择|去除|删除|补全"
    r"|translat|repeat|copy|paste|output|correct|proofread|punctuat|grammar|spell|format|sort|arrange|order|organi[sz]"
    r"|extract|check|identif|choose|select|fix|find|quote|recite|remove|delete",
    re.IGNORECASE,
)


def _copied(turns: Turns) -> Objection | None:
    """Object to an answer of the same letters as its prompt, or to one that is the prompt's input (what follows an
    Alpaca row's first line) to the last comma, unless the first line asks for what can leave it as it was."""
    for prompt, answer in pairwise(turns):
        if answer["role"] != "assistant" or prompt["role"] != "user":
            continue
        asked, said = prompt["content"], answer["content"]
        if len(said) > 2 * len(asked) or not (first := LETTER.search(said)):
            continue
        if (other := LETTER.search(asked)) and other[0].casefold() == first[0].casefold() and _is_same(asked, said):
            return "copied_prompt", "An answer is its prompt again."
        order, _, given = asked.partition("\n")
        if given and given.strip() == said.strip() and not SAME_AGAIN.search(order) and len(given) >= SHORTEST_COPY:
            return "copied_prompt", "An answer is its prompt's input again."
    return None


def _is_same(asked: str, said: str) -> bool:
    letters = NO_LETTERS.sub("", said).casefold()
    return len(letters) >= SHORTEST_COPY and letters == NO_LETTERS.sub("", asked).casefold()


# --- repetition -------------------------------------------------------------------------------------------------------

WINDOW = 8
SHORTEST_REPETITION = 80
SAMPLES = 8
TOKEN = re.compile(r"[\u3041-\u30fa\u3400-\u9fff\uac00-\ud7a3]|[^\W_\u3041-\u30fa\u3400-\u9fff\uac00-\ud7a3]{1,12}")
FENCED = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)
CODE_SIGNS = re.compile(r"[{}()\[\];=<>_/\\|#*+（）]")


def _repetitive(answers: list[str], most: float) -> Objection | None:
    """Object to an answer of which more than `most` of the windows of 8 words (8 characters of Chinese) occur again in
    it. Code does not count: fences are taken out, and text full of brackets is not judged.

    A few windows are looked up first: an answer over a limit of 0.7 is missed in one case of a hundred if it is just
    over, in one of a thousand at 0.8. Counting all of them costs as much as all other steps together."""
    for answer in answers:
        if len(answer) < SHORTEST_REPETITION or not _may_repeat(answer, most):
            continue
        text = FENCED.sub("", answer)
        tokens = TOKEN.findall(text)
        windows = Counter(zip(*(tokens[start:] for start in range(WINDOW)), strict=False))
        share = sum(count for count in windows.values() if count > 1) / max(1, windows.total())
        if share > most and len(text) >= SHORTEST_REPETITION and len(CODE_SIGNS.findall(text)) * 12 < len(text):
            return "repetitive", f"{share:.0%} of an answer occurs in it again; expected {most:.0%} at most."
    return None


def _may_repeat(text: str, most: float) -> bool:
    size = 3 * WINDOW if text.isascii() else WINDOW  # eight letters of English occur again in every longer text
    misses = SAMPLES - math.ceil(SAMPLES * most / 2)
    for start in range(0, len(text) - size, (len(text) - size) // SAMPLES):
        if text.count(text[start : start + size]) < 2:
            misses -= 1
            if misses < 0:
                return False
    return True


# --- refusals ---------------------------------------------------------------------------------------------------------

LONGEST_REFUSAL = 400
NO_OUTPUT = re.compile(r"<(?:no ?output|无输出)>")
AI = r"(?:AI|A\.I\.|人工智能|语言模型|大模型|机器人|助手|助理|程序|GPT|模型)"
REFUSING_START = re.compile(
    r"\s*(?:(?:很|非常|十分|真的?|实在)?(?:抱歉|对不起|不好意思|遗憾)"
    rf"|(?:由于|因为)?(?:作为|我是|我只是|身为)[^。！\n]{{0,30}}?{AI}|(?:GPT|语言)模型|我(?:无法|不能|没有能力|没有办法|不便)"
    r"|(?:I(?:['’]m| am)(?: \w+)? (?:sorry|afraid)|Sorry|I apologi[sz]e|My apologies|Unfortunately)\b"
    r"|As an? (?:\w+ ){0,3}?(?:AI|model|assistant|chatbot)\b|I (?:can(?:not|['’]t)|won['’]t|am unable|am not able)\b"
    r"|I['’]m (?:unable|not able)\b|This (?:type of )?instruction cannot)"
)
REFUSING = re.compile(
    r"(?:无法|不能|没有能力|没有办法|没办法|没有权限|不具备|不便|拒绝|不会|不支持)[^，。\n]{0,24}?"
    r"(?:回答|提供|满足|帮|协助|完成|执行|生成|创建|创作|访问|给出|讨论|评论|评价|获取|处理|浏览|播放|查看|看到|预测|评估|参与|实现"
    r"|输出|显示|绘制|画|写|订|下载|发送|查询|搜索|知道|得知|理解|识别|告诉|回忆|接入|联网|推断)"
    r"|\b(?:can(?:not|['’]t)|could(?:n['’]t| not)|unable to|not able to|won['’]t"
    r"|not (?:allowed|permitted|programmed|designed|capable)[\w ]*)\b[^.\n]{0,24}?"
    r"\b(?:assist|help|provid|answer|fulfil|complet|compl[yi]|generat|creat|access|brows|shar|discuss|support|engag"
    r"|perform|giv|writ|offer|process|respond|produc|predict|draw|display|do (?:that|this|so))"
    r"|\b(?:do(?:n['’]t| not) have (?:the |an |any )?(?:ability|capability|capacity|access|permission))"
)
EXCUSE = re.compile(
    rf"抱歉|对不起|不好意思|谅解|理解|其他问题|其它问题|其他帮助|{AI}"
    r"|\b(?:sorry|apolog|language model|anything else|something else|other questions|understand|feelings|personal)",
    re.IGNORECASE,
)
HELP = re.compile(
    r"但|不过|然而|以下|例如|比如|建议|如果|若|通常|一般|可以|请|您能|你能|能否|[:：]\s*\n|提供更多|未提供|没有(?:提供|给|指定)"
    r"|需要(?:您|你)|您未"
    r"|\b(?:however|but (?!I(?:['’]m| am| can| do| won)|as an)|instead|here (?:are|is)|for example|such as"
    r"|you (?:can|could|may|might|should|need|did)|I (?:can|could|suggest|recommend|would|will)\b(?! not|['’]t)|if you"
    r"|generally|typically|please|(?:could|can) you|let me|feel free|without (?:more|additional|further)|enough"
    r"|more (?:information|context|details))\b",
    re.IGNORECASE,
)
SENTENCE_END = re.compile(r"[。！？!?\n]+|\.(?=\s|$)")


def _only_refused(turns: Turns, answers: list[str]) -> Objection | None:
    """Object to a conversation of which most answers only refuse, unless it is about calling tools: there,
    to say that no tool fits is right."""
    refused = sum(_only_refuses(answer) for answer in answers)
    if 2 * refused <= len(answers) or "<tools>" in turns[0]["content"]:
        return None
    said = "The answer only refuses." if len(answers) == 1 else f"{refused} of {len(answers)} answers only refuse."
    return "refusal", said


def _only_refuses(answer: str) -> bool:
    if len(answer) > LONGEST_REFUSAL:
        return False
    if NO_OUTPUT.match(answer):
        return True
    if not REFUSING_START.match(answer) or not REFUSING.search(answer) or HELP.search(answer):
        return False
    sentences = (sentence for sentence in SENTENCE_END.split(answer) if sentence.strip())
    return all(REFUSING.search(sentence) or EXCUSE.search(sentence) for sentence in sentences)


# --- identities -------------------------------------------------------------------------------------------------------

MODEL = (
    "(?:ChatGPT|InstructGPT|GPT-?[34](?:\\.5|o)?|Vicuna|ERNIE|Qwen|DeepSeek|ChatGLM|InternLM|Baichuan|Bing Chat"
    "|Open ?Assistant|Doubao|文心一言|文心大模型|通义千问|讯飞星火|豆包|混元|智谱清言|深度求索)"
)
MODEL_OR_NAME = "(?:Claude|Bard|Gemini|LLaMA|LLaMa|Llama|Alpaca|Kimi|Copilot|Grok|MOSS|Mistral)"
MAKER = (
    "(?:Open ?AI|Anthropic|Google|DeepMind|Microsoft|Meta|Facebook|Baidu|Alibaba|Tencent|ByteDance|Zhipu|Moonshot"
    "|DeepSeek|iFLYTEK|Mistral|xAI|LMSYS|Large Model Systems Organization|LAION|Stability AI"
    "|百度|阿里|腾讯|字节跳动|智谱|月之暗面|深度求索|科大讯飞|讯飞|华为|商汤|百川智能|谷歌|微软)"
)
MADE = "(?:开发|研发|训练|创建|创造|打造|推出|制造|制作|设计|提供)"
NAMED = re.compile(f"{MODEL[3:-1]}|{MODEL_OR_NAME[3:-1]}|{MAKER[3:-1]}")
AI_TALK = re.compile(r"\bAI\b|language model|assistant|chatbot|人工智能|语言模型|大模型|助手")
NOUN = r"(?:AI|model|assistant|chatbot|bot|program|intelligence|system)\b"
I_AM = r"(?:\bI am|\bI['’]m|\b[Mm]y name is|\b[Cc]all me|\brefer to me as|\bgo by(?: the name)?(?: of)?)"
FILLERS = (
    r"(?:(?:actually|just|only|simply|called|named|an?|the|AI|artificial|intelligence|large|language|model|chatbot|assistant"
    r"|virtual|based|on|powered|by|version|of|known|as),?\s+)*"
)
I_AM_ZH = r"我(?:是|叫|就是|只是|其实是|的名字是|的名字叫)[^。！？，,\n不没非否]{0,12}?"
NOT_OF = r"(?!\s*的?(?:用户|粉丝|员工|开发者|使用者|爱好者|团队|创始人|竞争|朋友|研究))"
IDENTITY = re.compile(
    rf"{I_AM}\s+{FILLERS}[\"“]?{MODEL}|{I_AM_ZH}{MODEL}{NOT_OF}"
    rf"|作为[^。！？，,\n]{{0,16}}?(?:{MAKER}[^。！？，,\n]{{0,8}}?{MADE}|{MODEL})[^。！？，,\n]{{0,16}}[，,]\s*我(?!们)"
    rf"|我(?:是|由|就是|只是|是由)[^。！？，,\n不没非否]{{0,16}}?{MAKER}[^。！？，,\n]{{0,8}}?{MADE}"
    rf"|{MAKER}(?:公司|团队)?{MADE}了我|我的(?:开发者|创造者|制造者|母公司)是\s*{MAKER}"
    rf"|(?:\bI am|\bI['’]m|\bI was|\b[Aa]s)\s+(?:an? (?:[\w-]+ ){{0,4}}?{NOUN}[^.\n]{{0,60}}?)?"
    r"\b(?:developed|created|trained|made|built|designed|programmed)\s+(?:and \w+ )?(?:by|at)\s+(?:\w+ ){0,4}?"
    rf"{MAKER}\b"
    rf"|\b{MAKER}(?: \(\w+\))? (?:created|developed|trained|built|made|designed) me\b"
    rf"|\b[Mm]y (?:creator|developer|maker)s?,?(?: at| is| are)? (?:\w+ (?:at|from) )?{MAKER}\b"
)
IDENTITY_BY_NAME = re.compile(rf"{I_AM}\s+{FILLERS}[\"“]?{MODEL_OR_NAME}\b|{I_AM_ZH}{MODEL_OR_NAME}{NOT_OF}")


def _other_identity(answers: list[str]) -> Objection | None:
    for number, answer in enumerate(answers, 1):
        if not NAMED.search(answer):
            continue
        found = IDENTITY.search(answer) or (AI_TALK.search(answer) and IDENTITY_BY_NAME.search(answer))
        if found and (name := NAMED.search(found[0])):
            return "other_identity", f"Answer {number} says that it is {name[0]}, or made by it."
    return None


# --- languages --------------------------------------------------------------------------------------------------------

SCRIPTS = {
    "zh": (re.compile(r"[\u3400-\u9fff\U00020000-\U0003ffff]+"), ("zh",)),
    "ja": (re.compile(r"[\u3041-\u3096\u30a1-\u30fa]+"), ("ja",)),
    "ko": (re.compile(r"[\uac00-\ud7a3]+"), ("ko",)),
    "Cyrillic": (re.compile(r"[\u0400-\u04ff]+"), ("ru", "uk", "bg", "sr", "mk", "be", "kk", "ky", "mn", "tg")),
    "Arabic": (re.compile(r"[\u0600-\u06ff]+"), ("ar", "fa", "ur", "ps", "ug", "ku", "sd")),
    "Hebrew": (re.compile(r"[\u0590-\u05ff]+"), ("he", "yi")),
    "Greek": (re.compile(r"[\u0370-\u03ff]+"), ("el",)),
    "Thai": (re.compile(r"[\u0e00-\u0e7f]+"), ("th",)),
    "Devanagari": (re.compile(r"[\u0900-\u097f]+"), ("hi", "mr", "ne", "sa")),
    "Bengali": (re.compile(r"[\u0980-\u09ff]+"), ("bn", "as")),
    "Tamil": (re.compile(r"[\u0b80-\u0bff]+"), ("ta",)),
}
LATIN = re.compile(r"[A-Za-z\u00c0-\u024f\u1e00-\u1eff]+")
NO_LANGUAGE = re.compile(
    r"<tool_call>.*?</tool_call>|```.*?(?:```|\Z)|`[^`\n]+`|https?://\S+|<[^<>\n]+>|\$[^$\n]+\$", re.DOTALL
)
RARE_LETTER = re.compile(r"[\u0370-\u1dff\u3041-\u30fa\uac00-\ud7a3]")
LEAST_LETTERS, LEAST_LATIN = 8, 40
MOST_CHARS, ENOUGH_LATIN = 1000, 300  # py3langid takes a microsecond per letter
HAN_WEIGHT = 3  # a Han character says about as much as three Latin letters
SURE = 0.9


def _wrong_language(answers: list[str], expected: list[str]) -> Objection | None:
    codes = {re.split("[-_]", language.lower())[0] for language in expected}
    found, accepted = _language_of("\n".join(answers))
    if not accepted or not codes.isdisjoint(accepted):
        return None
    return "wrong_language", f"The answers look like {found}; expected {', '.join(expected)} (data.clean.languages)."


def _language_of(text: str) -> tuple[str, tuple[str, ...]]:
    """Return what a text's language or script is called, and the codes it may stand for; none where it cannot be told,
    as of numbers, code and short text."""
    text = NO_LANGUAGE.sub(" ", text)[:MOST_CHARS]
    scripts = SCRIPTS if RARE_LETTER.search(text) else {"zh": SCRIPTS["zh"]}
    letters = {name: sum(map(len, script.findall(text))) for name, (script, _) in scripts.items()}
    if letters.get("ja", 0) * 3 > letters["zh"]:  # Japanese is about half kana; Chinese at most quotes names
        letters["ja"] += letters.pop("zh")
    script = max(letters, key=lambda name: letters[name])
    words = LATIN.findall(text)
    latin = sum(map(len, words))
    weight = HAN_WEIGHT if script in ("zh", "ja", "ko") else 1
    if letters[script] * weight >= latin:
        return (script, SCRIPTS[script][1]) if letters[script] >= LEAST_LETTERS else ("", ())
    if latin < LEAST_LATIN or len(CODE_SIGNS.findall(text)) * 12 > latin:
        return "", ()
    language, probability = _identifier().classify(" ".join(words)[:ENOUGH_LATIN])
    return (language, (language,)) if probability >= SURE else ("", ())


@cache
def _identifier() -> Any:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier  # type: ignore[import-untyped]
    except ImportError:
        raise ConfigError(
            "data.clean.languages needs the package py3langid, which is not installed. "
            "Install it with: pip install py3langid, or leave data.clean.languages out."
        ) from None
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
