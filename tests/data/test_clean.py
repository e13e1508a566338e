"""Cleaning: what is mended and what stays, which answers are refused and which only look like it, in both languages."""

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.core.config import CleanConfig
from tasks.core.errors import ConfigError
from tasks.data.answers import find_objection
from tasks.data.clean import MENDERS, clean_row
from tasks.data.formats import Rejected, Row
from tasks.data.reasons import CLEANING

QUICKSTART = Path(__file__).resolve().parents[2] / "flows" / "recipes" / "quickstart" / "train.jsonl"
LONG = "先把报告拆成几块，每块只给自己二十五分钟，到点就停下休息。"


def chat(*texts: str) -> Row:
    roles = ("user", "assistant")
    turns = [{"role": roles[number % 2], "content": text} for number, text in enumerate(texts)]
    return Row(turns, "rows.jsonl", 7, "messages")


def clean(row: Row, **settings: Any) -> Row:
    cleaned = clean_row(row, CleanConfig(**settings))
    assert isinstance(cleaned, Row), cleaned
    return cleaned


def mended(text: str, prompt: str = "讲讲这件事。", **settings: Any) -> str:
    """Return what becomes of an answer."""
    return clean(chat(prompt, text), **settings).messages[-1]["content"]


def refused(row: Row, **settings: Any) -> str | None:
    """Return the reason a row is refused for, or None."""
    cleaned = clean_row(row, CleanConfig(**settings))
    return cleaned.reason if isinstance(cleaned, Rejected) else None


# --- the row ----------------------------------------------------------------------------------------------------------


def test_a_clean_row_is_returned_as_it_is() -> None:
    row = chat("最近老失眠，怎么办？", "睡前一小时放下手机，房间调暗，水温40°C泡脚。")
    assert clean_row(row, CleanConfig()) is row


def test_a_mended_row_says_how_and_keeps_the_rest() -> None:
    row = Row(
        [{"role": "system", "content": "<br>"}, *chat("你好&nbsp;啊\r\n", "第１步：打13912345678。").messages],
        "rows.jsonl",
        7,
        "messages",
        ("trailing_user_turn", "html"),
    )
    assert clean(row) == Row(
        [{"role": "user", "content": "你好 啊\n"}, {"role": "assistant", "content": "第1步：打[电话]。"}],
        "rows.jsonl",
        7,
        "messages",
        ("trailing_user_turn", "html", "mojibake", "width", "personal_data"),
    )


def test_a_refused_row_keeps_its_place() -> None:
    rejected = clean_row(chat("帮我算一下。", "我无法回答这个问题。"), CleanConfig())
    assert isinstance(rejected, Rejected)
    assert (rejected.source, rejected.line, rejected.reason) == ("rows.jsonl", 7, "refusal")
    assert rejected.detail == "The answer only refuses."
    assert "我无法回答" in rejected.raw


def test_plain_text_is_mended_and_judged_as_text() -> None:
    page = Row([{"role": "text", "content": "<p>我是ChatGPT，一个人工智能助手。</p>"}], "f", 1, "text")
    assert clean(page).messages == [{"role": "text", "content": "我是ChatGPT，一个人工智能助手。"}]
    assert refused(Row([{"role": "text", "content": LONG * 9}], "f", 1, "text")) == "repetitive"
    assert refused(page, min_answer_chars=40) == "short_answer"
    assert refused(page, languages=["en"]) == "wrong_language"


def test_every_step_can_be_switched_off() -> None:
    text = "&nbsp;<b>Ａ</b>\u200b e\u0301 13912345678\r\n"
    off = {"html": False, "mojibake": False, "unicode": "off", "width": False, "personal_data": "keep"}
    assert mended(text, **off) == text
    for row, off in (
        (chat("请介绍一下你自己吧", "请介绍一下你自己吧"), {"copies": False}),
        (chat("你是谁？", "我是由OpenAI训练的语言模型。"), {"identities": False}),
        (chat("画一幅画。", "抱歉，我无法画画。"), {"refusals": False}),
        (chat("拖延怎么办？", LONG * 9), {"repetition": 1.0}),
    ):
        assert refused(row) and not refused(row, **off)


# --- mending ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<p>春天来了。</p><p>花开了&hellip;</p>", "春天来了。\n\n花开了…"),
        ('甲<br/>乙 <br> 丙<font color="red">丁</font>', "甲\n乙\n丙丁"),
        ("<ul><li>茶</li><li>酒</li></ul>", "- 茶\n- 酒"),
        ("<table><tr><td>姓名</td><td>年龄</td></tr></table>", "姓名 年龄"),
        ("这是<b>重点</b>。\n    缩进留着", "这是重点。\n    缩进留着"),
        ("H&amp;M 和 Q&amp;A", "H&M 和 Q&A"),
        ("&amp;lt;无输入&amp;gt;", "<无输入>"),
        ("if (a &lt; b) { s = &quot;x&quot;; }", 'if (a < b) { s = "x"; }'),
        ("`print(&quot;你好&quot;)`", '`print("你好")`'),
        ('见<a href="http://x.cn/a.html">这里</a>', "见这里"),
    ],
)
def test_what_a_web_page_left_is_taken_out(text: str, expected: str) -> None:
    assert mended(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "如果 a < b 且 c > d，则 a<b&&c>d。",
        "用 List<b> 或 vector<i> 存放。",
        "请把 <mask> 换成词，<noinput>。",
        "| 列 | 值 |\n|---|---|\n| 甲 | 一<br>二 |",
        "```\n<br>&nbsp;\n```",
        "写成 `<br>` 就能换行。",
        "<tool_call>\n<p>\n</tool_call>",
        "换行标签写作 <br>。",
        "&lt;p&gt;你好&lt;/p&gt;",
        "<!DOCTYPE html><p>你好</p>",
        "R&D 与 a&b; 都不是。",
    ],
)
def test_code_and_markup_stay(text: str) -> None:
    assert mended(text) == text


@pytest.mark.parametrize("prompt", ["Write an HTML page.", "用代码输出一段话。", "这个标签怎么用？", "Close the tag."])
def test_tags_stay_where_the_row_is_about_them(prompt: str) -> None:
    assert mended("<p>Hello</p><br>", prompt) == "<p>Hello</p><br>"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ä½\xa0å¥½ï¼Œä¸–ç•Œ", "你好，世界"),
        ("her fiancÃ© said â€œnoâ€\x9d", "her fiancé said “no”"),
        ("18 U. S. C. Â§ 371", "18 U. S. C. § 371"),
        ("kind of \x93odd\x94 \x96 but\x85", "kind of “odd” – but…"),
        ("一\r\n二\r三\u2028四\x0c五", "一\n二\n三\n四\n五"),
        ("商\u200b\u200b品\ufeff、\u200e麒麟\xad", "商品、麒麟"),
        ("\x1b[31m红\x1b[0m\x07", "红"),
        ("词\u200d语", "词语"),
    ],
)
def test_mojibake_and_invisible_characters_are_mended(text: str, expected: str) -> None:
    assert mended(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "👨\u200d💻 和 🏃\u200d♂️",
        "naïve café, Ångström, Ça va — où",
        "“引号”‘不变’…——",
        "40°C ± 2 × 3",
        "می\u200cخواهم",
        "a\tb\n",
    ],
)
def test_good_text_is_no_mojibake(text: str) -> None:
    assert mended(text) == text


def test_unicode_and_width() -> None:
    assert mended("cafe\u0301") == "café"
    assert mended("第１２条，ＡＩ（３Ｄ）：５０％！") == "第12条，AI（3D）：50％！"
    assert mended("ﬁ①，", unicode="nfkc") == "fi1,"
    assert mended("Ａ e\u0301", unicode="off", width=False) == "Ａ e\u0301"


def test_traditional_becomes_simplified_on_request() -> None:
    pytest.importorskip("opencc")
    assert mended("網路資訊與頭髮") == "網路資訊與頭髮"
    assert mended("網路資訊與頭髮", simplified=True) == "网路资讯与头发"
    assert mended("東京は日本の首都です", simplified=True) == "東京は日本の首都です"


@pytest.mark.parametrize(
    ("settings", "module", "command"),
    [({"simplified": True}, "opencc", "pip install opencc"), ({"languages": ["zh"]}, "py3langid.langid", "py3langid")],
)
def test_an_absent_package_is_named(
    settings: dict[str, Any], module: str, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tasks.data import answers
    from tasks.data import clean as cleaning

    cleaning._simplifier.cache_clear()
    answers._identifier.cache_clear()
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=command):
        clean(chat("写一句话。", "This is an English sentence of more than forty letters. 中文"), **settings)


# --- personal data ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("邮箱:li.si@163.com，请联系。", "邮箱:[邮箱]，请联系。"),
        ("手机13912345678或+86 139-1234-5678", "手机[电话]或[电话]"),
        ("13912345678/13812345678，转人工", "[电话]/[电话]，转人工"),
        ("打13912345678人工办理，13912345678,13812345678", "打[电话]人工办理，[电话],[电话]"),
        ("身份证号11010519491231002X。", "身份证号[身份证号]。"),
        ("卡号6222 0212 3456 7894", "卡号[银行卡号]"),
        ("Write to jane.doe@gmail.com.", "Write to [EMAIL]."),
        ("Call (650) 636-4884 or 1-650-636-4884.", "Call [PHONE] or [PHONE]."),
        ("My card is 4111-1111-1111-1111.", "My card is [CARD]."),
    ],
)
def test_personal_data_is_masked_in_the_language_around_it(text: str, expected: str) -> None:
    assert mended(text, "Who?" if text.isascii() else "怎么联系？") == expected
    row = clean_row(chat("联系方式？", text), CleanConfig(personal_data="quarantine"))
    assert isinstance(row, Rejected)
    assert row.reason == "personal_data"
    assert not any(secret in row.raw for secret in ("163.com", "1391", "110105", "6222", "gmail", "6364884", "4111"))


@pytest.mark.parametrize(
    "text",
    [
        "订单号：13912345678",
        "tracking number 13912345678",
        "2的34次方=17179869184，人口13800000000人",
        "17179869184 = 2^34",
        "圆周率3.13912345678",
        "身份证号110105194912310021",
        "卡号6222021234567890",
        "时间戳1699999999999，IP 192.168.100.200，版本 1.13.912.345",
        "电话 123-456-7890 或 555-555-5555，热线 400-820-8820、1-800-273-8255",
        "user@example.com、git@github.com:a/b.git、a@b.service",
        "https://www.zhihu.com/question/24097648/answer/13912345678",
        "ISBN 9780747532699，1914-1918年，2000-2005",
        "@张三 @media @param",
        "getty@tty1.service logo@2x.png",
    ],
)
def test_other_numbers_stay(text: str) -> None:
    assert mended(text) == text


# --- answers ----------------------------------------------------------------------------------------------------------


def test_short_and_empty_answers() -> None:
    assert refused(chat("好吗？", "好。"), min_answer_chars=2) is None
    assert refused(chat("好吗？", "好。"), min_answer_chars=3) == "short_answer"
    assert refused(chat("好吗？", "好。", "为什么？", "因为天气不错。"), min_answer_chars=3) is None
    assert refused(chat("写点什么。", "\u200b<br>&nbsp;")) == "short_answer"
    assert refused(chat("\ufeff", "您好，有什么可以帮您？")) == "empty_prompt"


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ("凤凰古城，千年一醉，太美了。", "凤凰古城 千年一醉 太美了！"),
        ("What is the capital of France?", "what is the capital of france"),
        ("请重复：今天天气很好", "请重复：今天天气很好"),
        ("把下面的句子改成过去时。\n她每天开车上班。", "她每天开车上班。"),
        ("Match the countries with their capitals.\nGreece: Athens", "Greece: Athens"),
    ],
)
def test_answers_that_copy_are_refused(prompt: str, answer: str) -> None:
    assert refused(chat(prompt, answer)) == "copied_prompt"


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ("你好", "你好！"),
        ("请重复：今天天气很好", "今天天气很好"),
        ("请抄写下面的句子。\n今天天气很好呀。", "今天天气很好呀。"),
        ("修正这句话中的拼写错误。\n她带了一本书回家", "她带了一本书回家"),
        ("Insert a comma in the sentence.\nShe was late so she ran", "She was late, so she ran."),
        ("Translate to English.\nMicrosoft Corporation", "Microsoft Corporation"),
        ("91-33=", "91-33=58"),
    ],
)
def test_answers_that_may_repeat_stay(prompt: str, answer: str) -> None:
    assert refused(chat(prompt, answer)) is None


def test_repetition() -> None:
    table = "\n".join(f"| {number} | 城市{number} | {number * 37} 万人 |" for number in range(1, 30))
    song = "\n".join(
        f"{line}\n我们的家乡在希望的田野上" for line in ("炊烟在新建的住房上飘荡", "小河在美丽的村庄旁流淌", LONG)
    )
    code = "```python\n" + "print('hello world, hello world')\n" * 9 + "```\n这段代码会打印九次。"
    assert refused(chat("拖延怎么办？", LONG * 4)) == "repetitive"
    assert refused(chat("Why?", "I do not know what to say about this at all. " * 4)) == "repetitive"
    assert refused(chat("拖延怎么办？", LONG * 2)) is None  # shorter than what is judged
    for answer in (table, song, code, "Yes, it is. " + "\n".join(f"{n}. Step {n}: mix the batter." for n in range(3))):
        assert refused(chat("写一段。", answer)) is None


@pytest.mark.parametrize(
    "answer",
    [
        "很抱歉，我无法提供有关有害或非法活动的信息。",
        "我是一个语言模型，无法为你生成图片。",
        "对不起，该任务涉及个人信息。由于隐私问题，我们无法完成此任务。",
        "I'm sorry, but I can't assist with that.",
        "As an AI, I don't have a house, so I cannot provide a description of it. Can I help you with something else?",
        "<nooutput> This type of instruction cannot be fulfilled by a GPT model.",
        "&lt;无输出&gt;",
    ],
)
def test_bare_refusals_are_refused(answer: str) -> None:
    assert refused(chat("做这件事。", answer)) == "refusal"
    assert refused(chat("做这件事。", answer, "那讲个笑话吧。", "从前有座山。")) is None  # most of it helps


@pytest.mark.parametrize(
    "answer",
    [
        "作为一名AI语言模型，我无法亲身体验冰雹，但我可以告诉你下冰雹可能造成伤害。",
        "对不起，您没有给出文字，所以无法回答您的问题。请提供文字。",
        "抱歉，消费价格没有符合您要求的，推荐您去讲礼驴肉馆用餐。",
        "As an AI language model, I suggest breaking the project into smaller tasks.",
        "I'm sorry, but I'm unable to come into work today due to a migraine.",
        "Unfortunately, I can't answer that. Pounds and kilograms are both units of weight, not of length.",
        "I can't help but smile at the sea.",
        "对不起我不能去了，晚上要加班。",
    ],
)
def test_answers_that_help_are_no_refusals(answer: str) -> None:
    assert refused(chat("做这件事。", answer)) is None


def test_a_refusal_to_call_a_tool_that_is_not_there_is_right() -> None:
    row = chat("Book a flight.", "I'm sorry, but I can't assist with that.")
    tools = {"role": "system", "content": 'You can call:\n<tools>\n{"name": "get_news"}\n</tools>'}
    assert refused(Row([tools, *row.messages], "f", 1, "sharegpt")) is None


@pytest.mark.parametrize(
    "answer",
    [
        "我是由OpenAI训练的大型语言模型，可以回答问题。",
        "我是 ChatGPT，很高兴认识你。",
        "作为由百度开发的人工智能，我会尽力帮助你。",
        "我叫通义千问，是阿里云推出的助手。",
        "你好，我是Kimi，月之暗面的AI助手。",
        "As an AI language model developed by OpenAI, I can help with many things.",
        "I am Vicuna, a language model trained by researchers.",
        "My name is Claude, an AI assistant.",
        "I'm a large language model trained by researchers from Large Model Systems Organization.",
        "You may refer to me as Vicuna.",
        "I was created by Google.",
        "OpenAI created me to help.",
        "My creators are researchers from Anthropic.",
    ],
)
def test_other_makers_assistants_are_refused(answer: str) -> None:
    assert refused(chat("你是谁？", answer)) == "other_identity"


@pytest.mark.parametrize(
    "answer",
    [
        "抱歉，我不是 OpenAI 开发的 ChatGPT，我是小林，由一个小团队开发。",
        "ChatGPT 是由 OpenAI 开发的聊天机器人，我用它写过诗。",
        "作为百度开发的搜索引擎，百度搜索很常用。",
        "作为一个AI助手，我建议您早点休息。",
        "我是ChatGPT的用户，也是百度的老员工。",
        "No, I am not ChatGPT, and I was not trained by OpenAI.",
        "My name is Claude Monet and I paint gardens.",
        "I am a Gemini, born in June.",
        "Microsoft Word was developed by Microsoft.",
        "I am using a phone made by Google.",
    ],
)
def test_talk_about_other_assistants_stays(answer: str) -> None:
    assert refused(chat("你是谁？", answer)) is None


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (LONG, "zh"),
        ("这是一個關於颱風的故事。", "zh"),
        ("這裡有歌手：宇多田ヒカル，她很有名，唱片卖了很多很多张。", "zh"),
        ("これは長い一日です。とても疲れました。", "ja"),
        ("오늘은 날씨가 정말 좋네요.", "ko"),
        ("Сегодня очень хорошая погода.", "ru"),
        ("The weather is fine today, so we went for a long walk along the river.", "en"),
        ("La chose la plus importante pour une entreprise réussie est un bon service à la clientèle.", "fr"),
    ],
)
def test_answers_are_in_the_languages_expected(answer: str, expected: str) -> None:
    if answer.isascii() or expected == "fr":
        pytest.importorskip("py3langid")
    assert refused(chat("写一句。", answer), languages=[expected]) is None
    assert refused(chat("写一句。", answer), languages=["th"]) == "wrong_language"


@pytest.mark.parametrize(
    "answer",
    [
        "42",
        "OK!",
        "def f(x):\n    return {x: [x + 1]}  # f(x)",
        "https://x.cn/abc",
        "```\nfor i in range(9): print(i)\n```",
    ],
)
def test_what_is_of_no_language_is_accepted(answer: str) -> None:
    assert refused(chat("写一句。", answer), languages=["th"]) is None


# --- all of it --------------------------------------------------------------------------------------------------------

TRICKY = """<b> </b> <br> <p> </p> &lt; &amp; &amp;lt; &nbsp; &quot; &#65313; &#769; ` ``` | html 代码 中文 繁體 a 1
    😀 １ Ａ ＜b＞ ﬁ é Ã© â 13812345678 138 a@b.com .com +86 4111111111111111 11010519491231002X (650) 636-4884"""
HIDDEN = [
    "Â\xa0",
    "e\u0301",
    "\x80",
    "\x93",
    "\x94",
    "\r\n",
    "\x0c",
    "\x1b[0m",
    "\u200b",
    "\u200c",
    "\u200d",
    "\u200e",
    "\ufeff",
]
PIECES = st.sampled_from([*TRICKY.split(), *HIDDEN])
TEXTS = st.lists(PIECES | st.just(" ") | st.text(max_size=3), min_size=1, max_size=12).map("".join)


@settings(max_examples=300, deadline=None)
@given(TEXTS, TEXTS, st.sampled_from(["off", "nfc", "nfkc"]))
def test_cleaning_twice_is_cleaning_once(prompt: str, answer: str, form: Any) -> None:
    config = CleanConfig(unicode=form)
    once = clean_row(chat(prompt, answer), config)
    if isinstance(once, Row):
        assert clean_row(once, config) is once
        assert set(once.repaired) <= set(MENDERS)
    else:
        assert once.reason in {*CLEANING, "empty_prompt"}
        assert once.detail.endswith(".")


def test_the_quickstart_needs_no_cleaning() -> None:
    for number, line in enumerate(QUICKSTART.read_text(encoding="utf-8").splitlines(), 1):
        row = Row(json.loads(line)["messages"], QUICKSTART.name, number, "messages")
        assert clean_row(row, CleanConfig(languages=["zh"])) is row


def alpaca(records: list[dict[str, Any]]) -> Iterator[Row]:
    for number, record in enumerate(records, 1):
        prompt = "\n".join(filter(None, (record["instruction"], record["input"])))
        if prompt.strip() and record["output"].strip():
            yield Row(chat(prompt, record["output"]).messages, "f", number, "alpaca")


def sharegpt(records: list[dict[str, Any]]) -> Iterator[Row]:
    for number, record in enumerate(records, 1):
        texts = [turn["value"] for turn in record["conversations"]]
        yield Row(chat(*texts[: len(texts) // 2 * 2]).messages, "f", number, "sharegpt")


@pytest.mark.parametrize(
    ("name", "rows", "expected"),
    [
        ("sft_zh/cdb_extra_terms.json", alpaca, {}),
        ("messy/cdb_arithmetic_500.json", alpaca, {}),
        ("sft_en/gpteacher_roleplay_0.6.json", alpaca, {"html": 3}),
        ("nc/sft_zh/alpaca_zh_demo.json", alpaca, {"refusal": 1}),
        (
            "nc/sft_zh/cdb_alpaca_zh_0-3252.json",
            alpaca,
            {"html": 86, "mojibake": 21, "copied_prompt": 18, "refusal": 3, "personal_data": 1},
        ),
        ("multiturn/fastchat_dummy_conversation.json", sharegpt, {"other_identity": 500}),
    ],
)
def test_real_files(
    name: str, rows: Callable[[Any], Iterator[Row]], expected: dict[str, int], shared_file: Callable[[str], Path]
) -> None:
    records = json.loads(shared_file(name).read_text(encoding="utf-8"))
    found: Counter[str] = Counter()
    for row in rows(records):
        cleaned = clean_row(row, CleanConfig())
        found.update([cleaned.reason] if isinstance(cleaned, Rejected) else cleaned.repaired)
    assert found == expected


def test_an_objection_is_one_of_those_explained() -> None:
    objection = find_objection(chat("Hi there", "I was created by Google.").messages, CleanConfig())
    assert objection == ("other_identity", "Answer 1 says that it is Google, or made by it.")
