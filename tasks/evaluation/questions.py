"""A user's own questions about a domain, written by hand as plain Markdown or as JSON Lines.

What could be meant in two ways is refused with its line, never guessed. Asking and scoring are not done here.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from string import ascii_uppercase as LETTERS
from typing import Any
from unicodedata import normalize

from tasks.core.errors import ConfigError, describe_os_error

BULLET = r"\s*(?:[-*+]\s+)?"
HEADING = re.compile(r" {0,3}(?P<level>#{2,}|#(?=\s|$))\s*(?P<text>.*?)(?:\s+#+)?\s*$")
ASKED = re.compile(BULLET + r"(?:q|question|问|问题)\s*[0-9]*\s*[:：]\s*(?P<text>.*)", re.I)
NUMBERED = re.compile(
    r"(?P<indent>\s*)[0-9]{1,3}(?:[.．](?![0-9])|[、)）])\s*(?P<text>.*)"
)  # 3.14 is no number of a line
ANSWER = re.compile(
    BULLET + r"(?:(?P<short>a)|(?:correct )?answer|(?:正确|参考|标准)?答案|答)\s*[:：]\s*(?P<text>.*)", re.I
)
TICK = re.compile(r"\s*[-*+]\s+\[(?P<tick>[ xX])\]\s*(?P<text>.*)")
LETTER = re.compile(  # a line that starts with "U.S." is no choice
    BULLET + r"(?:[(（]\s*(?P<a>[A-ZＡ-Ｚ])\s*[)）]|(?P<b>[A-ZＡ-Ｚ])(?:[.．](?![A-Za-z]\.)|[、)）]))\s*(?P<text>.*)"
)
BOLD = re.compile(r"\s*(?:(?:[-*+]|\[[ xX]\]|#+|[0-9]{1,3}[.、)])\s+)*\*\*")
FENCE = re.compile(r"\s*(?:[-*+]\s+)?(?:[^`~<]{1,12}[:：.、)）]\s*)?(?P<fence>`{3,}|~{3,})[^`]*$")
COMMENT = re.compile(r"(?<!`)(?P<code>`+)(?!`).*?(?<!`)(?P=code)(?!`)|<!--.*?(?:-->|$)")
RULE = re.compile(r"\s*(?:-{3,}|\*{3,})\s*")
CHOSEN = re.compile(r"[(（]?(?P<letter>[A-Za-zＡ-Ｚ])(?:[)）.．、。:：\s]+(?P<text>.*))?", re.S)
CHOICES_INSIDE = re.compile(r"(?:^|\s)[(（]?A\s*[.．、)）:：].*\s[(（]?B\s*[.．、)）:：]", re.I | re.S)
WANTED = 'Expected "### question", "Q: question" or "1. question", and below it "Answer: …" or "答案：…"'
ROW = "{question, answer}, {question, choices, answer or gold}, {instruction or input, output} or {messages}"

Problems = list[tuple[int, str]]  # a line and a sentence


@dataclass(frozen=True)
class Question:
    """One question. `answer` is the reference; of a question with `choices` it is the text of the right one, which has
    the index `gold`. `place` is its file and line."""

    question: str
    answer: str
    choices: list[str]
    gold: int | None
    subject: str | None
    system: str | None
    place: str


Draft = tuple[int, Question, list[int]]  # its line, the question before its gold is known, the choices marked as right


def read_questions(path: Path) -> list[Question]:
    """Return the questions of a .md, .markdown or .jsonl file in their order; equal ones with one answer are all kept.

    Markdown: `## subject`; `### question`, `Q: question` or `1. question`, over several lines; choices as `A. text` or
    as a task list with the right one ticked; `Answer: text or letter`. Beside numbered questions a list of another kind
    is indented. JSON Lines: {question, answer}, {question, choices, answer or gold}, {instruction, input, output} or
    {messages}, with subject (or category) and system where wanted; gold counts from 0.

    Raises ConfigError with every problem of the file."""
    suffix = path.suffix.lower()
    if suffix not in (".md", ".markdown", ".jsonl"):
        raise ConfigError(f"{path}: expected a file of questions in .md, .markdown or .jsonl, found {suffix!r}.")
    problems: Problems = []
    drafts = (_read_json_lines if suffix == ".jsonl" else _read_markdown)(_read_text(path), problems)
    questions: list[Question] = []
    known: dict[Any, Question] = {}
    for line, draft, marked in drafts:
        gold, faults = _find_gold(draft, marked)
        problems += [(line, fault) for fault in faults]
        if not faults:
            answer = draft.answer if gold is None else draft.choices[gold]
            question = replace(draft, answer=answer, gold=gold, place=f"{path}:{line}")
            # One stem ("Which is right?") may be asked of several sets of choices.
            key = (" ".join(question.question.split()), question.system, frozenset(question.choices))
            earlier = known.setdefault(key, question)
            if earlier.answer != answer:
                problems.append((line, f"the same question is at {earlier.place} with another answer. Keep one."))
            questions.append(question)
    if not drafts and not problems:
        wanted = f"Expected a row a line: {ROW}" if suffix == ".jsonl" else WANTED
        problems.append((1, f"found no question. {wanted}."))
    if problems:
        raise ConfigError([f"{path}:{line}: {sentence}" for line, sentence in sorted(problems)])
    return questions


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(describe_os_error(error, f"read the questions in {path}")) from None
    try:
        text = data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{path}:{line}: expected UTF-8, found the byte 0x{data[error.start]:02x}. Save the file as UTF-8 "
            f"(from GBK: iconv -f GB18030 -t UTF-8)."
        ) from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _find_gold(draft: Question, marked: list[int]) -> tuple[int | None, list[str]]:
    """Return the index of the right choice, None for an open question, and a sentence for everything wrong."""
    answer, choices = draft.answer, draft.choices
    faults = [] if draft.question else ["the question has no text."]
    if not answer and not marked:
        below = 'a tick [x] or "Answer: B"' if choices else '"Answer: …" or "答案：…"'
        faults.append(
            f"the question {_quote(draft.question)} has no answer. Expected {below} below it; a list inside a "
            "question or an answer is indented."
        )
    if not choices:
        return None, faults
    if not 2 <= len(choices) <= len(LETTERS):
        return None, [*faults, f"expected 2 to 26 choices, each on a line of its own, found {len(choices)}."]
    for i, choice in enumerate(choices):
        if not choice:
            faults.append(f"choice {LETTERS[i]} has no text.")
        elif choice in choices[:i]:
            faults.append(f"choices {LETTERS[choices.index(choice)]} and {LETTERS[i]} are the same.")
    right = set(marked)
    if answer and not faults:
        last, chosen = LETTERS[len(choices) - 1], CHOSEN.fullmatch(answer.strip("*` "))
        letter = normalize("NFKC", chosen["letter"]).upper() if chosen else ""
        after = (chosen and chosen["text"]) or ""
        found = {i for i, c in enumerate(choices) if c == answer or (LETTERS[i] == letter and after in ("", c))}
        if not found and letter and not after:
            faults.append(f"answer {letter}, but the choices are A to {last}.")
        elif not found:
            faults.append(
                f"answer {_quote(answer)} is none of the choices. Expected a letter from A to {last} alone, or exactly "
                "the text of one choice."
            )
        right |= found
    if len(right) > 1:
        faults.append(f"expected one right choice, found {' and '.join(LETTERS[i] for i in sorted(right))}.")
    return min(right, default=None), faults


def _quote(text: str) -> str:
    line = " ".join(text.split())
    return f'"{line[:40]}{"…" if len(line) > 40 else ""}"'


# --- Markdown ---------------------------------------------------------------------------------------------------------


@dataclass
class _Lines:
    """The lines of one question as they are met; `indent` is that of a numbered one."""

    line: int
    subject: str | None
    question: list[str]
    indent: int | None = None
    choices: list[list[str]] = field(default_factory=list)
    lettered: bool = True
    ticked: list[int] = field(default_factory=list)
    answer: list[str] = field(default_factory=list)

    @property
    def last(self) -> list[str]:
        return self.answer or (self.choices[-1] if self.choices else self.question)


def _read_markdown(text: str, problems: Problems) -> list[Draft]:
    found: list[_Lines] = []
    current: _Lines | None = None
    subject: str | None = None
    cut = False  # by a title that may be a comment in code without a fence
    for number, line, verbatim in _visible_lines(text, problems):
        if verbatim:
            if current:
                current.last.append(line)
            continue
        marked = _without_bold_mark(line)
        heading, numbered = HEADING.match(marked), NUMBERED.match(marked)
        if heading and len(heading["level"]) > 3:
            problems.append((number, f"found a heading of level {len(heading['level'])}, expected #, ## or ###."))
        elif heading and len(heading["level"]) < 3:
            cut, current = heading["level"] == "#" and (cut or current is not None), None
            subject = (heading["text"] or None) if heading["level"] == "##" else subject
        elif heading or ASKED.match(marked):
            current = _Lines(number, subject, [_without_mark(heading["text"] if heading else marked)])
            found.append(current)
        elif numbered and (not current or (current.indent is not None and len(numbered["indent"]) <= current.indent)):
            current = _Lines(number, subject, [_without_mark(marked)], len(numbered["indent"]))
            found.append(current)
        elif current:
            _add_line(current, number, line, marked, problems)
        elif ANSWER.match(marked) or TICK.match(marked) or LETTER.match(marked):
            problems.append((number, f"found {_quote(line)} with no question before it. {WANTED}."))
        elif cut and line:
            cut = False
            sentence = "after a title, which ends an answer. Fence code with ```, or comment the text out."
            problems.append((number, f"found {_quote(line)} {sentence}"))
    return [_draft(lines, problems) for lines in found]


def _add_line(current: _Lines, number: int, line: str, marked: str, problems: Problems) -> None:
    """Add a line to a question: its answer, its next choice, or more of what came last."""
    answer, tick = ANSWER.match(marked), TICK.match(marked)
    rest = tick["text"] if tick else marked
    letter = LETTER.match(rest)
    if answer and current.answer:
        problems.append((number, "found a second answer to one question. Expected a question before it."))
    elif answer and answer["short"] and current.choices:
        problems.append((number, 'found "A:" after choices. Expected a choice "A. text", or "Answer: B".'))
    elif answer:
        current.answer.append(answer["text"])
    elif not current.answer and (tick or (letter and current.lettered)):
        next_letter = LETTERS[min(len(current.choices), 25)]
        found = normalize("NFKC", letter["a"] or letter["b"]) if letter else "without a letter"
        if not current.choices:
            current.lettered = not tick or found == "A"
        if current.lettered and found != next_letter:
            problems.append((number, f"found choice {found}, expected choice {next_letter}."))
        current.ticked += [len(current.choices)] if tick and tick["tick"] != " " else []
        current.choices.append([letter["text"] if letter and current.lettered else rest])
    else:
        last, flush = current.last, line[:1].strip() and not FENCE.match(line) and not RULE.fullmatch(line)
        if current.choices and not current.answer and len(last) > 1 and not last[-1] and flush:
            problems.append((number, f"found {_quote(line)} after the choices, expected a choice or an answer."))
        last.append(line)


def _draft(lines: _Lines, problems: Problems) -> Draft:
    question, answer = _join(lines.question), _join(lines.answer)
    lone = CHOSEN.fullmatch(answer.split("\n")[0])
    inside = lone and not lone["text"] and CHOICES_INSIDE.search(f"{question}\n{answer}")
    if not lines.choices and (inside or (lines.answer[1:] and re.match(r"\s*B\s*[:：]", lines.answer[1]))):
        sentence = 'found choices inside the text. Expected each on a line of its own before the answer, as "A. text".'
        problems.append((lines.line, sentence))
    choices = [_join(choice) for choice in lines.choices]
    return lines.line, Question(question, answer, choices, None, lines.subject, None, ""), lines.ticked


def _join(lines: list[str]) -> str:
    """Return the text of some lines without the indent that all but the first share, and without rules at its end."""
    kept = list(lines)
    while kept and (not kept[-1].strip() or RULE.fullmatch(kept[-1])):
        kept.pop()
    indent = min((len(line) - len(line.lstrip()) for line in kept[1:] if line.strip()), default=0)
    return "\n".join([*kept[:1], *(line[indent:] for line in kept[1:])]).strip()


def _without_mark(text: str) -> str:
    """Return a question without its number and its `Q:`."""
    for mark in (NUMBERED, ASKED):
        found = mark.match(text)
        text = found["text"] if found else text
    return text


def _without_bold_mark(line: str) -> str:
    """Return `**Answer:** text` or `**A. text**` without its stars, and other lines as they are."""
    bold = BOLD.match(line)
    plain = line[bold.end() :].replace("**", "", 1) if bold else ""
    return bold[0][:-2] + plain if bold and any(m.match(plain) for m in (ASKED, ANSWER, LETTER)) else line


def _visible_lines(text: str, problems: Problems) -> Iterator[tuple[int, str, bool]]:
    """Yield the number and text of each line without comments, and whether it lies in a code fence."""
    fence, comment, opened = "", False, 0
    for number, whole in enumerate(text.split("\n"), start=1):
        line = whole
        if fence:
            yield number, line, True
            if re.fullmatch(rf"\s*{fence[0]}{{{len(fence)},}}\s*", line):
                fence = ""
            continue
        if comment:
            _, end, line = line.partition("-->")
            if not end:
                continue
        begins = FENCE.match(line)
        comment = False
        if begins:
            fence, opened = begins["fence"], number
        else:
            comment = any(not m["code"] and not m[0].endswith("-->") for m in COMMENT.finditer(line))
            opened = number if comment else opened
            line = COMMENT.sub(lambda m: m[0] if m["code"] else "", line)
        if line.strip() or line == whole:  # a line of comments alone is no break between paragraphs
            yield number, line.rstrip(), False
    if fence or comment:
        problems.append((opened, f"found {fence or '<!--'}, which is never closed."))


# --- JSON Lines -------------------------------------------------------------------------------------------------------


def _read_json_lines(text: str, problems: Problems) -> list[Draft]:
    drafts = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            json.dumps(row, ensure_ascii=False).encode()  # half a surrogate pair could never be written out again
        except (ValueError, RecursionError) as error:
            problems.append((number, f"not valid JSON ({str(error).replace('line 1 ', '')})."))
            continue
        faults: list[str] = [] if isinstance(row, dict) else [f"expected a row {ROW}, found {_quote(line)}."]
        draft = _read_row(row, faults) if isinstance(row, dict) else None
        problems += [(number, fault) for fault in faults]
        if draft and not faults:
            drafts.append((number, *draft))
    return drafts


def _read_row(found: dict[str, Any], faults: list[str]) -> tuple[Question, list[int]] | None:
    """Return a row's question and the choice its gold marks, or None with the `faults` found."""
    row = {key: value for key, value in found.items() if value is not None}
    if "messages" in row:
        row |= _read_messages(row, faults)
    for key in ("question", "instruction", "input", "answer", "output", "subject", "category", "system"):
        if key in row and not isinstance(row[key], str):
            faults.append(f"expected a text as {key}, found {_quote(json.dumps(row[key], ensure_ascii=False))}.")
    for one, other in (("question", "instruction"), ("question", "input"), ("answer", "output")):
        if one in row and other in row:
            faults.append(f"found both {one} and {other}, expected one of them.")
    choices, gold = row.get("choices", []), row.get("gold")
    if not isinstance(choices, list) or not all(isinstance(c, str) for c in choices):
        faults.append("expected a list of texts as choices.")
    elif gold is not None and (type(gold) is not int or not 0 <= gold < len(choices)):
        wanted = f"a number from 0 to {len(choices) - 1}" if choices else "no gold where there are no choices"
        faults.append(f"gold {_quote(json.dumps(gold))}, expected {wanted}.")
    if not ({"question", "instruction", "input", "messages"} & row.keys()) or not (
        {"answer", "output", "gold", "messages"} & row.keys()
    ):
        faults.append(f"expected {ROW}, found {{{', '.join(found)}}}.")
    if faults:
        return None
    parts = (row.get(key, "").strip() for key in ("question", "instruction", "input"))
    question, answer = "\n".join(filter(None, parts)), row.get("answer", row.get("output", "")).strip()
    subject = row.get("subject", row.get("category", "")).strip() or None
    texts = [choice.strip() for choice in choices]
    draft = Question(question, answer, texts, None, subject, row.get("system") or None, "")
    return draft, [] if gold is None else [gold]


def _read_messages(row: dict[str, Any], faults: list[str]) -> dict[str, str]:
    """Return question, answer and system of a conversation of one exchange."""
    turns = row["messages"]
    fine = isinstance(turns, list) and all(isinstance(t, dict) and isinstance(t.get("content"), str) for t in turns)
    roles = [str(turn.get("role")) for turn in turns] if fine else []
    if roles not in (["user", "assistant"], ["system", "user", "assistant"]):
        faults.append(
            "expected messages with a text each: one of the user and one of the assistant, before them perhaps the "
            f"system's, found {', '.join(roles) or 'others'}."
        )
        return {}
    names = {"system": "system", "user": "question", "assistant": "answer"}
    said = {names[turn["role"]]: turn["content"] for turn in turns}
    for key in sorted((said.keys() | {"instruction", "input", "output"}) & row.keys()):
        if row[key] != said.get(key):
            faults.append(f"found both messages and {key}, expected one of them.")
    return said
