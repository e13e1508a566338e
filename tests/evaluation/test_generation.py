"""Measures of generated answers: worked by hand, compared with the libraries, and never out of range."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sacrebleu import corpus_bleu, sentence_bleu, sentence_chrf

from tasks.evaluation.generation import TOKEN, corpus_measures, measure_answer

AGAINST = {"exact_match", "f1", "rouge_l", "bleu", "chrf"}
ALONE = {"repetition", "other_language", "refused", "length"}
ENGLISH = "The capital of France is Paris, a large city on the river Seine that many people visit every year."
GERMAN = (
    "Die Hauptstadt von Frankreich ist Paris, eine große Stadt an der Seine, die jedes Jahr viele Menschen besuchen."
)
RUSSIAN = "Столица Франции — Париж, большой город на реке Сене, который каждый год посещают многие люди."
UKRAINIAN = "Столиця Франції — Париж, велике місто на річці Сені, яке щороку відвідує багато людей з усього світу."
CHINESE = "法国的首都是巴黎，它是塞纳河畔的一座大城市，每年有很多人去那里旅游。"
JAPANESE = "フランスの首都はパリで、セーヌ川のほとりにある大きな都市です。毎年多くの人が訪れます。"
KOREAN = "프랑스의 수도는 파리이며 센강 가에 있는 큰 도시로 매년 많은 사람들이 방문합니다."


def measure(answer: str, reference: str | None = None, question: str = "") -> dict[str, float]:
    return measure_answer(answer, reference, question)


def test_english_by_hand() -> None:
    found = measure("The cat sat on the mat.", "the cat lay on a mat")
    assert found["exact_match"] == 0
    assert found["f1"] == pytest.approx(2 * 4 / 12), "the, cat, on, mat of six and six"
    assert found["rouge_l"] == pytest.approx(4 / 6)
    assert found["length"] == 6


def test_chinese_by_hand() -> None:
    found = measure("巴黎是法国首都。", "法国首都是巴黎")
    assert found["f1"] == 1, "the same characters"
    assert found["rouge_l"] == pytest.approx(4 / 7), "法国首都 is the longest common subsequence"
    assert found["exact_match"] == 0
    assert found["length"] == 7


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("用GPT-4模型", ["用", "gpt", "4", "模", "型"]),
        ("Don't pay 1,000.50!", ["don't", "pay", "1,000.50"]),
        ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),
        ("パーティー", ["パ", "ー", "テ", "ィ", "ー"]),
        ("。。。 🙂 __", []),
    ],
)
def test_tokens(text: str, tokens: list[str]) -> None:
    assert TOKEN.findall(text.lower()) == tokens


@pytest.mark.parametrize(
    ("answer", "reference", "same"),
    [
        ("  “巴黎”。", "巴黎", True),
        ("ＰＡＲＩＳ！", "Paris", True),
        ("**New\n York**", "new york", True),
        ("《红楼梦》", "红楼梦", True),
        ("-5", "5", False),
        ("C#", "C", False),
        ("巴 黎", "巴黎", False),
        ("", "。", False),
        ("", "", True),
    ],
)
def test_exact_match_is_normalised(answer: str, reference: str, same: bool) -> None:
    assert measure(answer, reference)["exact_match"] == same


def test_bleu_and_chrf_are_those_of_sacrebleu() -> None:
    zh, said = CHINESE, "巴黎是法国的首都，是塞纳河畔的大城市。"
    found = measure(said, zh)
    assert found["bleu"] == pytest.approx(sentence_bleu(said, [zh], tokenize="zh").score / 100)
    assert found["chrf"] == pytest.approx(sentence_chrf(said, [zh]).score / 100)
    en, said = ENGLISH, "Paris is the capital of France, a city on the river Seine."
    assert measure(said, en)["bleu"] == pytest.approx(sentence_bleu(said, [en], tokenize="13a").score / 100)
    mixed = "用 PyTorch 和 TensorFlow 训练模型，再用 lm-eval 评估。"
    assert measure("用 PyTorch 训练模型", mixed)["bleu"] > 0.1, "the Chinese between is split"


def test_corpus_measures() -> None:
    answers, references = [CHINESE, "今天天气很好。"], [CHINESE, "今天的天气非常好。"]
    found = corpus_measures(answers, references)
    assert found["bleu"] == pytest.approx(corpus_bleu(answers, [references], tokenize="zh").score)
    assert 0 < found["chrf"] < 100
    assert corpus_measures(references, references) == {"bleu": pytest.approx(100), "chrf": pytest.approx(100)}
    assert corpus_measures([], []) == {}
    assert corpus_measures([""], [""]) == {"bleu": 0, "chrf": 0}
    with pytest.raises(ValueError, match="found 2 and 1"):
        corpus_measures(answers, references[:1])


def test_repetition_is_the_share_of_four_grams_seen_before() -> None:
    assert measure("a b c")["repetition"] == 0
    assert measure("a b c d e f g h")["repetition"] == 0
    assert measure("a b c d a b c d")["repetition"] == pytest.approx(1 / 5)
    assert measure("好好好好好好好好好好")["repetition"] == pytest.approx(6 / 7)


@pytest.mark.parametrize("text", [ENGLISH, GERMAN, RUSSIAN, UKRAINIAN, CHINESE, JAPANESE, KOREAN])
@pytest.mark.parametrize("other", [ENGLISH, GERMAN, RUSSIAN, UKRAINIAN, CHINESE, JAPANESE, KOREAN])
def test_other_language(text: str, other: str) -> None:
    assert measure(text, other)["other_language"] == (text != other)
    assert measure(text, None, other)["other_language"] == (text != other)


@pytest.mark.parametrize(
    ("answer", "reference", "question"),
    [
        ("", CHINESE, ""),
        ("42", CHINESE, ""),
        ("William Shakespeare", CHINESE, "谁写了《哈姆雷特》这部戏剧？"),
        ("The United States of America", None, "世界上最大的经济体是哪个国家？"),
        ("可以使用 PyTorch、TensorFlow、JAX、Keras、scikit-learn 或 Hugging Face Transformers。", CHINESE, ""),
        ("```python\ndef add(first, second):\n    return first + second\n```", CHINESE, "写一个加法函数"),
        ("def add(first, second):\n    return (first + second) / len([first, second])", CHINESE, "写一个加法函数"),
        ("请看 https://example.org/a/very/long/path/of/words/that/goes/on", CHINESE, ""),
        (ENGLISH, None, f"请把这句话翻译成英文：{CHINESE}"),
        (ENGLISH, "Paris", "用英语介绍法国的首都"),
        (CHINESE, None, f"请总结下面的文章：\n{ENGLISH}"),
        (CHINESE, "巴黎", "What is the capital of France?"),
        ("巴黎", ENGLISH, ""),
        ("東京都、大阪府、京都府、北海道", JAPANESE, ""),
        ("情報処理推進機構です。そのとおりですよ。", "独立行政法人情報処理推進機構", "これは何の組織ですか"),
        ("Real Madrid, Manchester United, Borussia Dortmund, Juventus Turin", ENGLISH, ""),
        ("Paris.", GERMAN, ""),
        ("\ud800\udfff", ENGLISH, ""),
    ],
)
def test_no_false_alarm_over_the_language(answer: str, reference: str | None, question: str) -> None:
    assert measure(answer, reference, question)["other_language"] == 0


@pytest.mark.parametrize(
    ("answer", "reference", "question"),
    [
        ("The capital of France is Paris.", None, "法国的首都是哪里？"),
        ("The capital of France is Paris.", "巴黎", "法国的首都是哪里？"),
        (ENGLISH, None, "请用中文回答：法国的首都是哪里？"),
        (f"好的。{ENGLISH}", CHINESE, ""),
        (CHINESE, None, "What is the capital of France?"),
    ],
)
def test_drift_of_short_or_mixed_answers(answer: str, reference: str | None, question: str) -> None:
    assert measure(answer, reference, question)["other_language"] == 1


@pytest.mark.parametrize(
    "answer",
    [
        "I'm sorry, but I can't help with that.",
        "I’m sorry, but I can’t assist with that request. However, I can help with something else.",
        "I'm sorry, but I can't ...",
        "As an AI language model, I cannot express personal opinions.",
        "As an artificial intelligence, I cannot have an opinion on this.",
        "As an AI assistant developed by Alibaba Cloud, I am not able to browse the internet.",
        "I am unable to provide medical advice.",
        "I cannot fulfill this request.",
        "Hello! I'm sorry, but I cannot provide instructions for that.",
        "抱歉，我无法回答这个问题。",
        "很抱歉，我无法帮助你做这件事，但我可以帮你做其他事情。",
        "抱歉，我无法…",
        "作为一个人工智能语言模型，我不能发表个人观点。",
        "作为AI助手，我没有能力访问互联网。",
        "对不起，我不能提供违法的信息。",
        "您好，很遗憾，我不能为您预测股票的走势。",
        "我无法提供相关内容。",
        "我是一个语言模型，无法为你生成图片。",
    ],
)
def test_refusals(answer: str) -> None:
    assert measure(answer)["refused"] == 1


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "I cannot recommend this book enough.",
        "I'm sorry, but I cannot recommend this book enough!",
        "I can't help but admire the view.",
        "I can't help falling in love with you",
        "Sorry for the delay. The answer is 42.",
        "I'm sorry, but I can't attend your creative workshop tomorrow.",
        "As an AI researcher, I cannot ignore this result.",
        "As an AI language model, I cannot eat, but I would recommend the noodles.",
        "I'm sorry, I can't give legal advice. In general, here are the steps: ...",
        'She said: "I am sorry, but I cannot help you."',
        "抱歉让你久等了，答案是四十二。",
        "对不起，我不能没有你。",
        "作为一名AI工程师，我不能忽视数据安全。",
        "我不能停止想念你。",
        "对不起，作为一个语言模型，我无法实时地查询天气。但我能告诉您如何查询：打开天气网站。",
        "我是一种人工智能，不能吃东西。",
        "水无法燃烧，因此不能用来提供热量。",
        "人工智能无法完全取代人类。",
        "很抱歉，我无法查看天气。以下是一些建议：带伞。",
        "The answer is long. " * 10 + "I am unable to help.",
    ],
)
def test_no_refusals(answer: str) -> None:
    assert measure(answer)["refused"] == 0


TEXTS = st.text(st.characters(categories=None), max_size=60) | st.text("ab 中文，。.é가か'-<>$`\n1", max_size=60)


@settings(deadline=None)
@given(TEXTS, st.none() | TEXTS, TEXTS)
def test_shares_lie_between_0_and_1(answer: str, reference: str | None, question: str) -> None:
    found = measure_answer(answer, reference, question)
    assert found.keys() == (ALONE if reference is None else ALONE | AGAINST)
    assert all(0 <= value <= 1 for name, value in found.items() if name != "length")
    assert found["length"] == int(found["length"]) >= 0


@settings(deadline=None)
@given(TEXTS.filter(TOKEN.search))
def test_the_reference_itself_is_a_full_match(text: str) -> None:
    found = measure_answer(text, text, text)
    assert {name: found[name] for name in AGAINST} == {name: pytest.approx(1) for name in AGAINST}
    assert found["other_language"] == 0


@pytest.mark.parametrize(
    "part", ["字", "word ", "<tool_call>", "$", "`", "抱歉", "I'm sorry ", "\ud800", "가 b", "\u0300\u0316"]
)
def test_long_answers_are_measured_in_a_second(part: str) -> None:
    measure("a", "a")  # imports
    text = (part * 100_000)[:100_000]
    start = time.perf_counter()
    found = measure_answer(text, text, text)
    assert time.perf_counter() - start < 2, "twice what is meant, for a busy machine"
    assert found["exact_match"] == 1
