"""A user's questions in Markdown and JSON Lines: every form that is read, and every mistake with its line."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.core.errors import ConfigError
from tasks.evaluation.questions import Question, read_questions

BANK = """# 银行客服考题（2025 年版）

由信贷部的同事编写。

## 个人贷款

### 1. 等额本息与等额本金，哪种方式的**总利息**较少？

A. 等额本息
B、等额本金
（C）两者相同
D) 无法比较

答案：B

### 下列哪项不属于贷款“三查”？

- [ ] 贷前调查
- [ ] 贷时审查
- [x] 贷后催收
- [ ] 贷后检查

## 账户

问：借记卡丢失后应当怎么办？
请分步骤说明。
答：
1. 立即拨打客服电话挂失；
2. 携带身份证到柜台补卡。

补卡一般需要 **7 个工作日**。

---

**Q2：** What does IBAN stand for?
**Answer:** International Bank Account Number
"""


def read(folder: Path, text: str | bytes, name: str = "set.md") -> list[Question]:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return [replace(q, place=q.place.removeprefix(f"{path}:")) for q in read_questions(path)]


def read_rows(folder: Path, *rows: Any) -> list[Question]:
    return read(folder, "\n".join(json.dumps(row, ensure_ascii=False) for row in rows), "set.jsonl")


def problems(folder: Path, text: str | bytes, name: str = "set.md") -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read(folder, text, name)
    return [problem.removeprefix(f"{folder / name}:") for problem in caught.value.problems]


def asked(question: str, answer: str, subject: str | None = None, place: str = "1", **more: Any) -> Question:
    return Question(
        question, answer, **{"choices": [], "gold": None, "system": None, **more}, subject=subject, place=place
    )


def test_a_set_as_people_write_it(tmp_path: Path) -> None:
    ways = ["等额本息", "等额本金", "两者相同", "无法比较"]
    checks = ["贷前调查", "贷时审查", "贷后催收", "贷后检查"]
    steps = "1. 立即拨打客服电话挂失；\n2. 携带身份证到柜台补卡。\n\n补卡一般需要 **7 个工作日**。"
    assert read(tmp_path, BANK) == [
        asked("等额本息与等额本金，哪种方式的**总利息**较少？", "等额本金", "个人贷款", "7", choices=ways, gold=1),
        asked("下列哪项不属于贷款“三查”？", "贷后催收", "个人贷款", "16", choices=checks, gold=2),
        asked("借记卡丢失后应当怎么办？\n请分步骤说明。", steps, "账户", "25"),
        asked("What does IBAN stand for?", "International Bank Account Number", "账户", "35"),
    ]


def test_a_bom_windows_lines_and_an_upper_suffix_are_read(tmp_path: Path) -> None:
    data = b"\xef\xbb\xbf" + BANK.replace("\n", "\r\n").encode()
    assert read(tmp_path, data, "SET.MD") == read(tmp_path, BANK, "set.markdown")
    row = b'\xef\xbb\xbf{"question": "q", "answer": "a"}\r\n\r\n'
    assert read(tmp_path, row, "set.jsonl") == [asked("q", "a")]


@pytest.mark.parametrize(
    "mark", ["Q:", "q: ", "Q1:", "Question:", "问：", "问:", "问题：", "- Q:", "**Q:** ", "### ", "###", "1. "]
)
@pytest.mark.parametrize(
    "reply", ["A:", "a: ", "A：", "Answer:", "答案：", "答：", "正确答案:", "**Answer**: ", "- 答："]
)
def test_marks_of_questions_and_answers(tmp_path: Path, mark: str, reply: str) -> None:
    assert read(tmp_path, f"{mark}什么是利率？\n{reply}利息与本金之比") == [asked("什么是利率？", "利息与本金之比")]


@pytest.mark.parametrize(
    "choices",
    [
        "A. x\nB. y\nC. z",
        "A) x\nB) y\nC) z",
        "A、x\nB、y\nC、z",
        "- A. x\n- B. y\n- C. z",
        "（A）x\n（B）y\n（C）z",
        "(A) x\n(B) y\n(C) z",
        "Ａ．x\nＢ．y\nＣ．z",
        "**A.** x\n**B.** y\n**C.** z",
        "A. x\n\nB. y\n\nC. z\n",
        "- [ ] x\n- [ ] y\n- [ ] z",
        "- [ ] A. x\n- [ ] B. y\n- [ ] C. z",
    ],
)
@pytest.mark.parametrize("answer", ["B", "B.", "(B)", "（B）", "b", "**B**", "Ｂ", "y", "B. y", "B、y"])
def test_forms_of_choices_and_of_the_letter(tmp_path: Path, choices: str, answer: str) -> None:
    expected = asked("Which?", "y", choices=["x", "y", "z"], gold=1)
    assert read(tmp_path, f"### Which?\n{choices}\nAnswer: {answer}") == [expected]


@pytest.mark.parametrize("tail", ["", "\n答案：B", "\nAnswer: y"])
def test_a_tick_marks_the_right_choice_and_an_answer_may_repeat_it(tmp_path: Path, tail: str) -> None:
    expected = asked("Which?", "y", choices=["x", "y"], gold=1)
    assert read(tmp_path, f"Q: Which?\n- [ ] x\n- [X] y{tail}") == [expected]


def test_names_of_species_in_a_task_list_are_no_letters(tmp_path: Path) -> None:
    (found,) = read(tmp_path, "### Which is a worm?\n- [ ] E. coli\n- [x] C. elegans\n- [ ] B. subtilis")
    assert found.choices == ["E. coli", "C. elegans", "B. subtilis"]
    assert found.answer == "C. elegans"


def test_numbered_questions_and_indented_lists_in_them(tmp_path: Path) -> None:
    text = "1. 开户要\n   几步？\n   A: 两步：\n   1. 填表\n      - 签字\n   2. 交表\n"
    text += "2. π 约为\n3.14 吗？\n答：是\n\n3) Q: Why?\nA: So."
    assert read(tmp_path, text) == [
        asked("开户要\n几步？", "两步：\n1. 填表\n   - 签字\n2. 交表", place="1"),
        asked("π 约为\n3.14 吗？", "是", place="7"),
        asked("Why?", "So.", place="11"),
    ]


def test_numbers_inside_other_questions_are_text(tmp_path: Path) -> None:
    text = "### 正确的有几项？\n1. 甲\n2. 乙\n答案：1 项，理由：\n1. 甲对\n2. 乙错"
    assert read(tmp_path, text) == [asked("正确的有几项？\n1. 甲\n2. 乙", "1 项，理由：\n1. 甲对\n2. 乙错")]


def test_nothing_in_a_code_fence_is_read(tmp_path: Path) -> None:
    code = "```python\n# Title\n### no question\nA. no choice  \n\n\n<!-- kept -->\nAnswer: no\n~~~\n```"
    text = f"### What does it print?\n\n{code}\n\nAnswer: {code}\n## End\nnot in the answer"
    assert read(tmp_path, text) == [asked(f"What does it print?\n\n{code}", code)]
    (found,) = read(tmp_path, f"Q: Which runs?\nA.\n{code}\nB. ~~~~\n~~~\nAnswer: A\n~~~~\n答案：B")
    assert found.choices == [code, "~~~~\n~~~\nAnswer: A\n~~~~"]


def test_comments_are_no_text_and_keep_the_line_numbers(tmp_path: Path) -> None:
    text = "<!-- Q: old\nA: old\n--> \n### Who<!-- sure? -->?\n<!-- check\nA. again -->\n"
    text += "is `<!-- x -->`\n答：me <!-- a --> <!--\nb -->!"
    assert read(tmp_path, text) == [asked("Who?\nis `<!-- x -->`", "me\n!", place="4")]


def test_headings_end_an_answer_and_rules_are_no_part_of_it(tmp_path: Path) -> None:
    text = "## a #\nQ: x\nA: one\n\n---\ntwo\n\n---\n***\n\n# Part 2\n\n## b\nAbout.\n\nQ: y\nA: z\n##\nQ: v\nA: w"
    assert read(tmp_path, text) == [
        asked("x", "one\n\n---\ntwo", "a", "2"),
        asked("y", "z", "b", "16"),
        asked("v", "w", None, "19"),
    ]


def test_one_stem_over_other_choices_is_another_question(tmp_path: Path) -> None:
    text = "### 正确的是\nA. 1\nB. 2\n答案：A\n### 正确的是\nA. 3\nB. 4\n答案：A\n### Why?\nA: So.\n### Why?\nA: So."
    assert [q.answer for q in read(tmp_path, text)] == ["1", "3", "So.", "So."]


def test_abbreviations_are_no_choices(tmp_path: Path) -> None:
    assert read(tmp_path, "### Is the\nU.S. a state?\nA: No.")[0].question == "Is the\nU.S. a state?"


def test_rows(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "q6"}, {"role": "assistant", "content": "a"}]
    rows: list[dict[str, Any]] = [
        {"question": "q1", "answer": " a\n", "subject": "s", "system": "Be brief."},
        {"question": "q2", "choices": ["x", "y"], "answer": "B", "category": "c", "id": 7, "gold": None},
        {"question": "q3", "choices": ["x", "y"], "gold": 0},
        {"input": "q4", "output": "a"},
        {"instruction": "Translate.", "input": "q5", "output": "a"},
        {"messages": turns},
        {"messages": [{"role": "system", "content": "S"}, *turns], "subject": ""},
        {"question": "q7", "choices": ["x", "y"], "answer": "y", "gold": 1},
        {"question": "one\u2028line", "answer": "a"},
    ]
    two = ["x", "y"]
    assert read_rows(tmp_path, *rows) == [
        asked("q1", "a", "s", "1", system="Be brief."),
        asked("q2", "y", "c", "2", choices=two, gold=1),
        asked("q3", "x", None, "3", choices=two, gold=0),
        asked("q4", "a", None, "4"),
        asked("Translate.\nq5", "a", None, "5"),
        asked("q6", "a", None, "6"),
        asked("q6", "a", None, "7", system="S"),
        asked("q7", "y", None, "8", choices=two, gold=1),
        asked("one\u2028line", "a", None, "9"),
    ]


NO_ANSWER = 'has no answer. Expected "Answer: …" or "答案：…" below it; a list inside'
NO_QUESTION = 'Expected "### question", "Q: question" or "1. question", and below it "Answer: …"'


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("### 什么是利率？\n\n### Why?\nA: So.", [f'1: the question "什么是利率？" {NO_ANSWER}']),
        ("Q: Why?\nAnswer:\n", [f'1: the question "Why?" {NO_ANSWER}']),
        ("### Which?\nA. x\nB. y\n", ['1: the question "Which?" has no answer. Expected a tick [x] or "Answer: B"']),
        ("1. q\nA: two:\n1. a\n2. b", ['3: the question "a" has no answer.', "4: "]),
        ("###\nA: So.", ["1: the question has no text."]),
        ("\nQ: Which?\nA. w\nB. x\nC. y\nD. z\n答案：E", ["2: answer E, but the choices are A to D."]),
        (
            "Q: Which?\nA. x\nB. y\n答案：A、B",
            ['1: answer "A、B" is none of the choices. Expected a letter from A to B'],
        ),
        ("Q: Which?\nA. x\nB. y\n答案：B\n解析：略", ['1: answer "B 解析：略" is none of the choices.']),
        ("Q: Which?\nA. x\nB. x\n答案：A", ["1: choices A and B are the same."]),
        ("Q: Which?\nA. x\nB. \n答案：A", ["1: choice B has no text."]),
        ("Q: Which?\nA. x B. y\n答案：A", ["1: expected 2 to 26 choices, each on a line of its own, found 1."]),
        (
            "Q: Which? A. x B. y\n答案：A",
            ["1: found choices inside the text. Expected each on a line of its own before"],
        ),
        ("Q: Which?\nA: x\nB: y", ["1: found choices inside the text."]),
        ("Q: Which?\n答案：A\nA. x\nB. y", ["1: found choices inside the text."]),
        ("Q: Which?\n- [x] x\n- [x] y", ["1: expected one right choice, found A and B."]),
        ("Q: Which?\n- [x] x\n- [ ] y\nAnswer: B", ["1: expected one right choice, found A and B."]),
        ("Q: Which?\nA. B\nB. A\nAnswer: B", ["1: expected one right choice, found A and B."]),
        ("Q: Which?\nA. x\nC. y\nAnswer: A", ["3: found choice C, expected choice B."]),
        ("Q: Which?\n- [ ] A. x\n- [x] y", ["3: found choice without a letter, expected choice B."]),
        (
            "Q: Which?\nA. x\nB. y\nA: B",
            ["1: the question", '4: found "A:" after choices. Expected a choice "A. text"'],
        ),
        ("Q: Which?\nA. x\nB. y\n\nThink.\nAnswer: B", ['5: found "Think." after the choices, expected a choice or']),
        ("Q: Why?\nA: So.\nWho?\nA: Me.", ["4: found a second answer to one question. Expected a question before it."]),
        ("Who?\n\nA: Me.", [f'3: found "A: Me." with no question before it. {NO_QUESTION}']),
        ("- [ ] write questions", ["1: found"]),
        ("Q: Why?\nA: So.\n#### More", ["3: found a heading of level 4, expected #, ## or ###."]),
        ("Q: Why?\nA: So.\n```\nQ: x", ["3: found ```, which is never closed."]),
        ("Q: Why?\nA: So.\n<!-- Q: x\n", ["3: found <!--, which is never closed."]),
        (
            "Q: Why?\nA: So.\nQ:  Why?\nA: No.",
            ["3: the same question is at ", "set.md:1 with another answer. Keep one."],
        ),
        (
            "Q: How?\nA: run\n# first\npip install x\nx",
            ['4: found "pip install x" after a title, which ends an answer.'],
        ),
        ("", [f"1: found no question. {NO_QUESTION}"]),
        ("# Title\n\nWords.\n", ["1: found no question."]),
        (
            "问：什么？\n答：无".encode("gb18030"),
            ["1: expected UTF-8, found the byte 0xce. Save the file as UTF-8 (from"],
        ),
        (b"Q: x\nA: y\xff\n", ["2: expected UTF-8, found the byte 0xff."]),
    ],
)
def test_mistakes_in_markdown(tmp_path: Path, text: str | bytes, sentences: list[str]) -> None:
    found = "\n".join(problems(tmp_path, text))
    for sentence in sentences:
        assert sentence in found
    assert len(found.split("\n")) == len({s.split(":")[0] for s in sentences if s[0].isdigit()})


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ('{"question": "q"', "not valid JSON (Expecting ',' delimiter: column 17"),
        ('{"question": "\\ud800", "answer": "a"}', "not valid JSON ("),
        ("[" * 100_000, "not valid JSON ("),
        ('["q", "a"]', "expected a row {question, answer}, {question, choices, answer or gold}"),
        ('{"question": "q", "choices": ["x", "y"]}', "expected {question, answer}, "),
        ('{"text": "q"}', "found {text}."),
        ('{"question": "q", "answer": 42}', 'expected a text as answer, found "42".'),
        ('{"question": "q", "input": "r", "answer": "a"}', "found both question and input, expected one of them."),
        ('{"question": "q", "answer": "a", "output": "b"}', "found both answer and output, expected one of them."),
        ('{"question": "q", "choices": "xy", "gold": 0}', "expected a list of texts as choices."),
        ('{"question": "q", "choices": ["x", "y"], "gold": 2}', 'gold "2", expected a number from 0 to 1.'),
        ('{"question": "q", "choices": ["x", "y"], "gold": true}', 'gold "true", expected a number from 0 to 1.'),
        ('{"question": "q", "answer": "a", "gold": 0}', 'gold "0", expected no gold where there are no choices.'),
        (
            '{"question": "q", "choices": ["x", "y"], "gold": 0, "answer": "B"}',
            "expected one right choice, found A and B",
        ),
        ('{"question": "q", "choices": ["x", "y"], "answer": "C"}', "answer C, but the choices are A to B."),
        ('{"question": "q", "choices": ["x", "x"], "gold": 0}', "choices A and B are the same."),
        ('{"question": " ", "answer": "a"}', "the question has no text."),
        ('{"question": "q", "answer": " "}', 'the question "q" has no answer.'),
        ('{"messages": []}', "expected messages with a text each: one of the user and one of the assistant, before"),
        ('{"messages": [{"role": "user", "content": "q"}]}', "the system's, found user."),
        ('{"messages": [{"role": "user", "content": ["q"]}]}', "the system's, found others."),
        (
            '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "answer": "b"}',
            "found both messages and answer, expected one of them.",
        ),
    ],
)
def test_mistakes_in_rows(tmp_path: Path, row: str, sentence: str) -> None:
    (found,) = problems(tmp_path, f'{{"question": "Why?", "answer": "So."}}\n\n{row}\n', "set.jsonl")
    assert found.startswith("3: ")
    assert sentence in found


def test_every_problem_is_said_at_once_in_the_order_of_the_lines(tmp_path: Path) -> None:
    text = "A: x\n### a\n### b\nA. 1\nC. 2\n答案：D\n### c\nA: d\n### c\nA: e\n~~~"
    assert [p.split(":")[0] for p in problems(tmp_path, text)] == ["1", "2", "3", "5", "9", "11"]


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"expected a file of questions in \.md, \.markdown or \.jsonl, found '\.txt'"
    ):
        read(tmp_path, "Q: a\nA: b", "set.txt")
    with pytest.raises(ConfigError, match=r"Could not read the questions in .*absent\.md: there is no such file"):
        read_questions(tmp_path / "absent.md")
    assert problems(tmp_path, "\n", "set.jsonl")[0].startswith(
        "1: found no question. Expected a row a line: {question,"
    )


# --- written out and read back ----------------------------------------------------------------------------------------

LINE = st.from_regex(r"[一-龥a-z0-9]{2}([一-龥a-z0-9A-Z ?？，。+=*_<>|$\\-]{0,12}[一-龥a-z0-9?？。])?", fullmatch=True)
CODE = st.lists(
    st.sampled_from(["# x", "### x", "Q: x", "A: x", "A. x", "- [x] x", "1. x", "<!--", "", " ~~~", "答："])
)
FENCED = CODE.map(lambda lines: "\n".join(["```python", *lines, "```"]))


@st.composite
def texts(draw: st.DrawFn) -> str:
    parts = [draw(LINE), *draw(st.lists(LINE | FENCED, max_size=3))]
    return draw(st.sampled_from(["\n", "\n\n"])).join(parts)


@st.composite
def sets(draw: st.DrawFn) -> list[Question]:
    found = []
    for text in draw(st.lists(texts(), min_size=1, max_size=4, unique_by=lambda t: " ".join(t.split()))):
        choices = draw(st.just([]) | st.lists(LINE, min_size=2, max_size=5, unique=True))
        gold = draw(st.integers(0, len(choices) - 1)) if choices else None
        answer = draw(texts()) if gold is None else choices[gold]
        subject = draw(LINE)
        found.append(Question(text, answer, choices, gold, subject, None, ""))
    return found


def written(question: Question, draw: Any) -> str:
    mark, form = (
        draw(st.sampled_from(["### ", "Q: ", "问：", "12. "])),
        draw(st.sampled_from(["{}. ", "({}) ", "{}、", "- [{}] "])),
    )
    lines = [f"## {question.subject}", mark + question.question]
    for i, choice in enumerate(question.choices):
        lines.append(form.format(" x"[i == question.gold] if "[" in form else "ABCDE"[i]) + choice)
    if question.gold is None or "[" not in form:
        answers = [question.answer] if question.gold is None else [question.answer, "ABCDE"[question.gold]]
        lines.append(draw(st.sampled_from(["Answer: ", "答案：", "答："])) + draw(st.sampled_from(answers)))
    return draw(st.sampled_from(["\n", "\n<!-- x -->\n"])).join(lines)


@settings(deadline=None)
@given(st.data(), sets())
def test_what_is_written_out_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, data: Any, questions: list[Question]
) -> None:
    folder = tmp_path_factory.getbasetemp()
    text = "\n\n".join(written(question, data.draw) for question in questions)
    assert [replace(q, place="") for q in read(folder, text)] == questions
    rows = [{k: v for k, v in vars(q).items() if k not in ("place", "gold")} for q in questions]
    assert [replace(q, place="") for q in read_rows(folder, *rows)] == questions


PIECES = [
    "# ",
    "## ",
    "### ",
    "#### ",
    "Q: ",
    "问：",
    "1. ",
    "A: ",
    "A. ",
    "B. ",
    "- [x] ",
    "- [ ] ",
    "答案：B",
    "Answer: ",
]
PIECES += [
    "\n",
    "\n\n",
    "\r",
    " ",
    "```",
    "~~~",
    "`",
    "<!--",
    "-->",
    "**",
    "---",
    "Ａ．",
    "x",
    "y",
    "{",
    '"',
    "\ufeff",
    "\x00",
]


@settings(deadline=None)
@given(st.lists(st.sampled_from(PIECES) | st.text(max_size=3)).map("".join), st.sampled_from(["a.md", "a.jsonl"]))
def test_any_text_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, text: str, name: str) -> None:
    try:
        questions = read(tmp_path_factory.getbasetemp(), text.encode("utf-8", "replace"), name)
    except ConfigError:
        return
    assert questions and all(q.question and q.answer for q in questions)
