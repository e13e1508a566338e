"""Personal data: e-mail addresses, phone, ID and card numbers, masked where they stand.

What a number is, its shape alone does not tell: a check digit has to agree where there is one, and what stands around
it must not say that it is an order, an amount or a sum. Names and addresses are not looked for.
"""

import re
from collections.abc import Callable

NOT_DIGITS = bytes(set(range(256)) - set(b"0123456789"))
MASKS = {"email": ("[邮箱]", "[EMAIL]"), "phone": ("[电话]", "[PHONE]"), "id": ("[身份证号]", "[ID]"),
         "card": ("[银行卡号]", "[CARD]")}  # fmt: skip
EMAIL = re.compile(
    r"(?P<email>(?<![A-Za-z0-9._%+/-])[A-Za-z0-9][A-Za-z0-9._%+-]{0,63}"
    r"@(?P<domain>(?:[A-Za-z0-9][A-Za-z0-9-]{0,62}\.)+(?P<tld>[A-Za-z]{2,18})))"
    r"(?![A-Za-z0-9@(]|[.-][A-Za-z0-9]|:[A-Za-z])"
)
MANY_DIGITS = re.compile(r"[0-9](?:[ ().+-]{0,2}[0-9]){9}")  # a phone's ten; found fast, unlike the patterns below
NUMBER = re.compile(
    r"(?:(?<![A-Za-z0-9_./=&#%@+*^-])|(?<=\d{11}/))(?:"
    r"(?P<id>[1-9]\d{5}(?:18|19|20)\d{2}(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])\d{3}[\dXx])"
    r"|(?P<card>(?:62|4\d|5[1-5]|2[2-7]|35|60|65|95)\d{2}(?P<gap>[ -]?)\d{4}(?P=gap)\d{4}(?P=gap)\d{4}"
    r"(?:(?P=gap)\d{1,3})?)"
    r"|(?P<phone>(?:\(?(?:\+|00)?86\)?[ -]?)?1[3-9]\d(?P<dash>[ -]?)\d{4}(?P=dash)\d{4}"
    r"|(?:\+?1[ .-]?)?(?:\([2-9]\d\d\) ?|[2-9]\d\d(?P<dot>[.-]))[2-9]\d\d(?:(?P=dot)|[.-])\d{4})"
    r")(?![A-Za-z0-9_%]|\.\d|[,/=+*^-]\d{1,9}(?!\d)| ?[=+*^×÷])",
    re.ASCII,
)
PLACEHOLDERS = re.compile(
    r"(?:.*\.)?(?:example[\w-]*|(?:your|my)?(?:domain|company|site|email)|xx+|foo|bar)\.[a-z.]+", re.IGNORECASE
)
NOT_DOMAINS = re.compile(
    "service|socket|timer|target|local|localhost|test|invalid|example|internal"
    "|png|jpe?g|gif|svg|webp|js|ts|css|json|html|txt|zip|gz",
    re.IGNORECASE,
)
NOT_PERSONAL = re.compile(
    r"(?:订单|单号|编号|流水|序列|货号|条码|\b(?:order|tracking|invoice|serial|isbn|sku))"
    r"(?:号码?|number|no|[ .#])*(?:是|为|is)?[:：\s]*$|[=×÷≈<>$¥￥€£]\s?$",
    re.IGNORECASE,
)
AMOUNT = re.compile(
    r"\s?(?:[万亿]|元|美元|人(?!工)|次|个(?!人)|吨|公里|千米|米|年|秒|(?:dollars|people|years|seconds|bytes|km|miles)\b)"
)
NO_PERSON = re.compile(r"400|8(?:00|33|44|55|66|77|88)|555|...555")  # hot lines, and numbers for films
HAN = re.compile(r"[\u3400-\u9fff\U00020000-\U0003ffff]")
LETTER = re.compile(r"[^\W\d_]")
NEAR = 40


def may_be_personal(latin: bytes) -> bool:
    """Return whether a text, of which these are the Latin-1 characters, can hold any: an @, or a phone's ten digits."""
    return b"@" in latin or len(latin.translate(None, NOT_DIGITS)) >= 10


def mask_personal_data(text: str, all_text: str) -> str:
    """Return a turn's text with personal data masked, each mask in the language of the text around it, or of the whole
    row, `all_text`."""

    def mask(found: re.Match[str]) -> str:
        kind = next(kind for kind, value in found.groupdict().items() if kind in MASKS and value)
        if not _is_personal(kind, found):
            return found[0]
        around = found.string[max(0, found.start() - NEAR) : found.start()] + found.string[found.end() :][:NEAR]
        is_chinese = HAN.search(around if LETTER.search(around) else all_text)
        return MASKS[kind][0 if is_chinese else 1]

    while (masked := _mask_once(text, mask)) != text:
        text = masked
    return text


def _mask_once(text: str, mask: Callable[[re.Match[str]], str]) -> str:
    if "@" in text:
        text = EMAIL.sub(mask, text)
    return NUMBER.sub(mask, text) if MANY_DIGITS.search(text) else text


def _is_personal(kind: str, found: re.Match[str]) -> bool:
    if kind == "email":
        is_host = found[0].startswith(("git@", "root@", "user@", "username@"))
        return not is_host and not NOT_DOMAINS.fullmatch(found["tld"]) and not PLACEHOLDERS.fullmatch(found["domain"])
    digits = re.sub(r"[^0-9Xx]", "", found[0])
    if kind == "id":
        return _is_resident_id(digits)
    before = found.string[max(0, found.start() - NEAR // 2) : found.start()]
    if NOT_PERSONAL.search(before) or AMOUNT.match(found.string, found.end()):
        return False
    if kind == "card":
        return _passes_luhn(digits)
    is_mobile = found["dash"] is not None
    return is_mobile or not NO_PERSON.match(digits[-10:])


def _is_resident_id(digits: str) -> bool:
    """Return whether the 18th character checks the 17 before it (GB 11643-1999: ISO 7064, MOD 11-2)."""
    total = sum(int(digit) * pow(2, 17 - place, 11) for place, digit in enumerate(digits[:17]))
    return "10X98765432"[total % 11] == digits[17].upper()


def _passes_luhn(digits: str) -> bool:
    """Return whether a card number's last digit checks the others (ISO/IEC 7812-1, annex B)."""
    return sum(sum(divmod(int(digit) * (1 + place % 2), 10)) for place, digit in enumerate(reversed(digits))) % 10 == 0
