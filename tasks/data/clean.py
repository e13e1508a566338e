"""Cleaning: one conversation with its text mended, or the reason why it should not be learned.

Every step is a guess about text, so each is narrow: what it is not sure of stays. All of it is cheap before it is
thorough, because most rows need nothing: a row is first asked whether it holds anything suspicious at all. Duplicates,
which need more than one row, are found in duplicates.py.
"""

import html
import re
import unicodedata
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any, Literal

from tasks.core.config import CleanConfig
from tasks.core.errors import ConfigError
from tasks.data.answers import find_objection
from tasks.data.formats import Rejected, Row, excerpt
from tasks.data.personal_data import mask_personal_data, may_be_personal

MENDERS = {
    "html": "tags and entities of web pages were taken out",
    "mojibake": "wrongly decoded text was mended, or control and invisible characters were dropped",
    "unicode": "characters were brought into one Unicode normal form",
    "width": "full-width letters and digits became ASCII",
    "simplified": "traditional characters became simplified ones",
    "personal_data": "phone, e-mail, ID or card numbers were masked",
}
Turns = list[dict[str, str]]
ROUNDS = 8  # one mend can uncover another (an entity that stood for a full-width letter); two rounds do nearly always


def clean_row(row: Row, config: CleanConfig) -> Row | Rejected:
    """Return the row with its text mended and the steps that changed it in `repaired`, or Rejected with a reason of
    reasons.CLEANING. Cleaning a cleaned row changes nothing. Raises ConfigError where a step's package is absent."""
    turns, repaired = _mend(row.messages, config)
    if "personal_data" in repaired and config.personal_data == "quarantine":
        detail = "The row holds a phone, e-mail, ID or card number, which data.clean.personal_data quarantines."
        return Rejected(row.source, row.line, "personal_data", detail, excerpt(turns))
    if objection := find_objection(turns, config):
        return Rejected(row.source, row.line, *objection, excerpt(turns))
    if not repaired:
        return row
    turns = [turn for turn in turns if turn["role"] != "system" or turn["content"].strip()]
    return replace(row, messages=turns, repaired=tuple(dict.fromkeys((*row.repaired, *repaired))))


# --- mending ----------------------------------------------------------------------------------------------------------

PLAIN = bytes({*range(0x20, 0x7F), 0x09, 0x0A, *range(0xA0, 0xC2), *range(0xF5, 0x100)} - {0xAD})
"""Latin-1 bytes that no step looks at; what starts a mojibake (Â to ô) is not among them."""
STRANGE = re.compile(r"[\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\uffff０-９Ａ-Ｚａ-ｚ]")
MOJIBAKE = re.compile(r"[\x80-\x9f\xc2-\xf4](?:(?<=[\x80-\x9f])|[^\x00-\x7f\u2e80-\uffff])")
LOST_LEAD = re.compile(r"(?<![\xe0-\xf4])\x80([\x80-\xa6])")  # a quote or a dash in UTF-8, less its first byte (â)
WINDOWS_SIGN = re.compile(r"(?<!\x80)[\x85\x91-\x97]")  # as bytes of Windows-1252: an ellipsis, quotes, dashes
BREAKS = re.compile(r"[\r\x0b\x0c\u2028\u2029](?:(?<=\r)\n)?")
JUNK = re.compile(  # a class first: the search then runs through text fast
    r"[\x00-\x08\x0e-\x1f\x7f-\x9f\xad\u200b\u2060-\u2064\u206a-\u206f\ufeff\ufffc\ufffe\uffff]"
    r"(?:(?<=\x1b)\[[0-9;]*[A-Za-z])?"
)
DIRECTIONS = re.compile(r"[\u200e\u200f\u202a-\u202e\u2066-\u2069]")
RIGHT_TO_LEFT = re.compile(r"[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc]")
LOOSE_JOINERS = re.compile(r"(?<![^\x00-\x7f\u2e80-\u9fff\uff00-\uffef])[\u200c\u200d]+")  # not in emoji, not in Hindi
WIDE = {ord(wide): ord(wide) - 0xFEE0 for first, last in ("０９", "ＡＺ", "ａｚ") for wide in
        map(chr, range(ord(first), ord(last) + 1))}  # fmt: skip
KANA = re.compile(r"[\u3041-\u30fa]")


def _mend(turns: Turns, config: CleanConfig) -> tuple[Turns, list[str]]:
    """Return the mended turns, and the steps that changed any; the same list where none did."""
    texts, done = [turn["content"] for turn in turns], list[str]()
    for _ in range(ROUNDS):
        before = texts
        for name, mend in _steps_for("\n".join(texts), config):
            if (mended := [mend(text) for text in texts]) != texts:
                texts = mended
                done.append(name)
        if texts is before:
            break
    if not done:
        return turns, done
    return [{**turn, "content": text} for turn, text in zip(turns, texts, strict=True)], done


def _steps_for(text: str, config: CleanConfig) -> list[tuple[str, Callable[[str], str]]]:
    """Return the steps that a row of this text may need. Takes about 5 microseconds for 350 Chinese characters."""
    steps: list[tuple[str, Callable[[str], str]]] = []
    latin = text.encode("latin-1", "ignore")  # fast, and of Chinese text it leaves next to nothing to look at
    is_ascii = len(latin) == len(text) and text.isascii()
    if config.html and (b"<" in latin or b"&" in latin) and MARKUP.search(text):
        said = TAG.sub("", text)
        if not ABOUT_MARKUP.search(said):
            steps.append(("html", partial(_strip_html, tags=not ABOUT_CODE.search(said))))
    strange = not is_ascii and STRANGE.search(text)
    if config.mojibake and (strange or latin.translate(None, PLAIN)):
        steps.append(("mojibake", _mend_encoding))
    form: Literal["NFC", "NFKC"] = "NFC" if config.unicode == "nfc" else "NFKC"
    if config.unicode != "off" and not is_ascii and not unicodedata.is_normalized(form, text):
        steps.append(("unicode", partial(unicodedata.normalize, form)))
    if config.width and strange:
        steps.append(("width", lambda turn: turn.translate(WIDE)))
    if config.simplified and not is_ascii:
        steps.append(("simplified", _simplify))
    if config.personal_data != "keep" and may_be_personal(latin):
        steps.append(("personal_data", partial(mask_personal_data, all_text=text)))
    return steps


def _mend_encoding(text: str) -> str:
    if MOJIBAKE.search(text):
        from ftfy import fix_encoding

        text = LOST_LEAD.sub(lambda sign: chr(0x1F80 + ord(sign[1])), text)
        text = fix_encoding(text, fix_c1_controls=False)
        text = WINDOWS_SIGN.sub(lambda sign: sign[0].encode("latin-1").decode("windows-1252"), text)
    text = JUNK.sub("", BREAKS.sub("\n", text))
    if DIRECTIONS.search(text) and not RIGHT_TO_LEFT.search(text):
        text = DIRECTIONS.sub("", text)
    return LOOSE_JOINERS.sub("", text) if "\u200c" in text or "\u200d" in text else text


def _simplify(text: str) -> str:
    return text if KANA.search(text) else _simplifier().convert(text)


@cache
def _simplifier() -> Any:
    try:
        from opencc import OpenCC
    except ImportError:
        raise ConfigError(
            "data.clean.simplified needs the package opencc, which is not installed. "
            "Install it with: pip install opencc, or set data.clean.simplified=false."
        ) from None
    return OpenCC("t2s")


# --- HTML -------------------------------------------------------------------------------------------------------------

BLOCKS = "br|p|div|tr|h[1-6]|hr|table|thead|tbody|ul|ol|dl|dt|dd|blockquote|center|section|article"
NAMES = f"{BLOCKS}|li|td|th|span|a|b|i|u|s|em|strong|font|small|big|img"
TAG = re.compile(
    rf"""<(/?)({NAMES})((?:\s+(?:[a-zA-Z][\w:.-]*\s*=\s*(?:"[^"<>]*"|'[^'<>]*'|[^\s"'<>=]+)|nowrap|noshade))*)\s*/?>""",
    re.IGNORECASE,
)
BLOCK = re.compile(BLOCKS)
ENTITY = re.compile(
    "&(?:amp|lt|gt|quot|apos|nbsp|ensp|emsp|thinsp|[lr][sd]quo|mdash|ndash|hellip|middot|bull|copy|reg|trade|times"
    "|divide|deg|laquo|raquo|euro|yen|pound|#[0-9]{1,6}|#[xX][0-9a-fA-F]{1,5});"
)
MARKUP = re.compile(rf"{TAG.pattern}|{ENTITY.pattern}", re.IGNORECASE)
SPACES = re.compile(r"[\u2002\u2003\u2009\xa0]")
CODE = re.compile(r"(```.*?(?:```|\Z)|`[^`\n]+`)", re.DOTALL)
DOCUMENT = (
    r"/?(?:html|head|body|script|style|form|input|button|meta|link|svg|title|label|header|footer|nav|textarea|select)\b"
)
TOOLS = r"/?(?:tool_call|tools|tool_response)>"
ABOUT_MARKUP = re.compile(
    rf"<(?:{DOCUMENT}|{TOOLS}|!|\?xml|%)|&lt;(?:{DOCUMENT}|/?(?:{NAMES})(?:[\s/]|&gt;)|!)"
    r"|html|xml|\bcss\b|markup|escap|entit(?:y|ies)\b|标签|标记语言|转义|实体|网页|前端",
    re.IGNORECASE,
)
ABOUT_CODE = re.compile(
    r"```|代码|编程|程序|函数|\btags?\b|\bcode\b|javascript|\bscript\b|\bjsx?\b|react|markdown", re.IGNORECASE
)
LINE_ENDS = re.compile(r"[ \t]*\n[ \t]*(\n?)\s*")


def _strip_html(text: str, tags: bool) -> str:
    """Return the text that a web page showed: without entities and, with `tags`, without tags, outside of code."""
    if tags and (stripped := _outside_code(text, _strip_tags)) != text:
        text = stripped.strip()
    if "&" not in text:
        return text
    if "<" not in text and not ENTITY.sub("", text).count("&"):  # escaped as a whole, code and all
        return _decode_entities(text)
    return _outside_code(text, _decode_entities)


def _outside_code(text: str, mend: Callable[[str], str]) -> str:
    if "`" not in text:
        return mend(text)
    return "".join(part if number % 2 else mend(part) for number, part in enumerate(CODE.split(text)))


def _strip_tags(text: str) -> str:
    names = {(end, name.lower()) for end, name, _ in TAG.findall(text)}

    def words(tag: re.Match[str]) -> str:
        end, name, attributes = tag[1], tag[2].lower(), tag[3]
        alone = len(name) == 1 and not attributes and (("" if end else "/"), name) not in names
        if alone or _is_in_table(text, tag.start()):  # List<b> is no bold text
            return tag[0]
        if name == "li":
            return "" if end else "\n- "
        return "\n" if BLOCK.fullmatch(name) else " " if end and name in ("td", "th") else ""

    stripped = TAG.sub(words, text)
    return LINE_ENDS.sub(r"\n\1", stripped) if stripped.count("\n") > text.count("\n") else stripped


def _is_in_table(text: str, place: int) -> bool:
    """Return whether a place is in a line of a Markdown table, where <br> is the only line break there is."""
    line = text[text.rfind("\n", 0, place) + 1 : place]
    return line.lstrip().startswith("|")


def _decode_entities(text: str) -> str:
    return ENTITY.sub(lambda entity: SPACES.sub(" ", html.unescape(entity[0])), text)
