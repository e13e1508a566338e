"""Scores equal lm-eval's own backend item by item, and every file shape becomes a task."""

import json
import math
import multiprocessing
import os
import resource
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.models.huggingface import HFLM
from transformers import (
    GraniteConfig,
    GraniteForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from flows.cli import main
from tasks.core.config import EvalConfig
from tasks.core.errors import ConfigError
from tasks.core.records import ItemScore, TaskScore
from tasks.core.store import FileStore
from tasks.evaluation import harness
from tasks.evaluation.divergence import base_divergence, with_divergence
from tasks.evaluation.harness import calibration_error
from tasks.evaluation.prefix_lm import SharedPrefixLM
from tasks.evaluation.responses import Responses
from tasks.evaluation.suite import suite_digest
from tasks.evaluation.tree import Text, TokenTree, make_rows
from tasks.models.load import load_model
from tasks.models.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def smollm(smollm_folder: Path):
    """A model that scoring takes over: its layers are replaced."""
    return load_model(smollm_folder, torch.float32, "cpu"), load_tokenizer(smollm_folder, "auto")


@pytest.fixture(scope="module")
def library(smollm_folder: Path) -> HFLM:
    """lm-eval's own backend, on a model of its own."""
    model, tokenizer = load_model(smollm_folder, torch.float32, "cpu"), load_tokenizer(smollm_folder, "auto")
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)


def score_model(model: Any, tokenizer: Any, config: EvalConfig, say: Any) -> Any:
    return harness.score_model(SharedPrefixLM(model, tokenizer, config.batch_tokens, say), tokenizer, config)


def lines(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    return str(path)


def suite(tmp_path: Path, **tasks: str) -> EvalConfig:
    return EvalConfig(
        capabilities=[
            {"name": f"c_{shape}", "role": "target", "measure": "acc", "tasks": [{"name": shape, shape: path}]}
            for shape, path in tasks.items()
        ]
    )


REQUESTS = [
    ("The capital of France is", " Paris."),
    ("The capital of France is", " London."),
    ("The capital of France is", " a city on the river Seine, and has been for a long time."),
    ("The capital of Italy is", " Rome."),
    ("", "Hello there."),
    ("请问", "你好。"),
    ("The capital of France is", " Paris."),
]


@pytest.mark.parametrize("row_tokens", [8, 40, 4000])
def test_log_likelihoods_equal_lm_evals_backend(smollm, library: HFLM, row_tokens: int) -> None:
    model, tokenizer = smollm
    requests = [SimpleNamespace(args=r) for r in REQUESTS]
    theirs = library.loglikelihood(requests, disable_tqdm=True)
    backend = SharedPrefixLM(model, tokenizer, row_tokens, lambda done, total: None)
    assert backend.plans
    for (a, greedy_a), (b, greedy_b) in zip(theirs, backend.loglikelihood(requests), strict=True):
        assert b == pytest.approx(a, abs=1e-4, rel=1e-5)
        assert greedy_a == greedy_b


def test_log_likelihoods_are_nearer_to_float64_than_lm_evals_own(smollm, library: HFLM, smollm_folder: Path) -> None:
    """What is left of a difference in float32 is the library's rounding."""
    model, tokenizer = smollm
    requests = [SimpleNamespace(args=r) for r in REQUESTS]
    wide = HFLM(pretrained=load_model(smollm_folder, torch.float64, "cpu"), tokenizer=tokenizer, batch_size=1)
    exact = [total for total, _ in wide.loglikelihood(requests, disable_tqdm=True)]
    del wide
    theirs = library.loglikelihood(requests, disable_tqdm=True)
    ours = SharedPrefixLM(model, tokenizer, 40, lambda done, total: None).loglikelihood(requests)

    def furthest(found: list[tuple[float, bool]]) -> float:
        return max(abs(a - b) for (a, _), b in zip(found, exact, strict=True))

    assert furthest(ours) < 5e-5
    assert furthest(ours) < furthest(theirs)


@pytest.mark.parametrize("asked", ["loglikelihood", "generate_until"])
def test_an_interrupt_ends_scoring_with_the_row_at_work(smollm, asked: str) -> None:
    model, tokenizer = smollm
    told: list[int] = []

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    def say(done: int, total: int) -> None:  # in a thread of the scoring; the signal is the main thread's
        told.append(done)
        if len(told) == 1:
            os.kill(os.getpid(), signal.SIGUSR1)

    backend = SharedPrefixLM(model, tokenizer, 16, say)
    texts = [f"Number {i} says that {word}" for word in ("the sea", "a tree", "snow") for i in range(60)]
    options = {"until": ["\n"], "max_gen_toks": 3}
    requests = [SimpleNamespace(args=(t, options if asked == "generate_until" else " is wide.")) for t in texts]
    former = signal.signal(signal.SIGUSR1, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            getattr(backend, asked)(requests)
    finally:
        signal.signal(signal.SIGUSR1, former)
    assert told[-1] < len(requests) / 2


def test_a_model_whose_attention_is_not_ours_is_scored_with_a_mask(tmp_path: Path, smollm) -> None:
    tokenizer = smollm[1]
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = MistralConfig(vocab_size=len(tokenizer), num_hidden_layers=2, sliding_window=512, **sizes)
    MistralForCausalLM(config).save_pretrained(tmp_path)
    models = [load_model(tmp_path, torch.float32, "cpu") for _ in range(2)]
    requests = [SimpleNamespace(args=r) for r in REQUESTS]
    backend = SharedPrefixLM(models[0], tokenizer, None, lambda done, total: None)
    assert not backend.plans
    theirs = HFLM(pretrained=models[1], tokenizer=tokenizer, batch_size=1).loglikelihood(requests, disable_tqdm=True)
    found = backend.loglikelihood(requests)
    assert [a for a, _ in found] == pytest.approx([a for a, _ in theirs], abs=1e-4)


@pytest.mark.parametrize("options", [{"logits_scaling": 4.0}, {"logits_scaling": 1.0, "residual_multiplier": 0.5}])
def test_a_model_that_scales_its_logits_is_scored_as_it_is(tmp_path: Path, smollm, options: dict) -> None:
    tokenizer = smollm[1]
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = GraniteConfig(vocab_size=len(tokenizer), num_hidden_layers=2, **sizes, **options)
    GraniteForCausalLM(config).save_pretrained(tmp_path)
    models = [load_model(tmp_path, torch.float32, "cpu") for _ in range(2)]
    requests = [SimpleNamespace(args=r) for r in REQUESTS]
    theirs = HFLM(pretrained=models[1], tokenizer=tokenizer, batch_size=1).loglikelihood(requests, disable_tqdm=True)
    found = SharedPrefixLM(models[0], tokenizer, None, lambda done, total: None).loglikelihood(requests)
    assert [a for a, _ in found] == pytest.approx([a for a, _ in theirs], abs=1e-4)


def peak_growth(kind: str, folder: Path, found: Any) -> None:
    """Put into `found` by how many MiB scoring long texts and many choices raises this process's peak memory."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"vocab_size": 151_936, "num_hidden_layers": 1, "max_position_embeddings": 4096}
    made = MistralForCausalLM(MistralConfig(**sizes)) if kind == "mask" else Qwen2ForCausalLM(Qwen2Config(**sizes))
    model, tokenizer = made.eval(), load_tokenizer(folder, "auto")
    backend = SharedPrefixLM(model, tokenizer, None, lambda done, total: None)
    assert backend.plans == (kind != "mask")
    backend.loglikelihood([SimpleNamespace(args=r) for r in REQUESTS])  # code is compiled for the first
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    backend.loglikelihood_rolling([SimpleNamespace(args=("一二三四五六七八" * 400,))])
    choices = [("Which of them?", f" {i} " + "and so on " * 30) for i in range(200)]
    backend.loglikelihood([SimpleNamespace(args=r) for r in choices])
    found.put((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


@pytest.mark.parametrize("kind", ["plan", "mask"])
def test_memory_does_not_grow_with_the_vocabulary_or_the_choices(kind: str, smollm_folder: Path) -> None:
    """The logits of the longest text alone would take 2.3 GB in float32, those of all choices 3.7 GB."""
    context = multiprocessing.get_context("spawn")
    found = context.Queue()
    process = context.Process(target=peak_growth, args=(kind, smollm_folder, found))
    process.start()
    growth = found.get(timeout=300)
    process.join()
    assert growth < 400


def test_rolling_log_likelihoods_equal_lm_evals_backend(smollm, library: HFLM) -> None:
    model, tokenizer = smollm
    texts = ["A short text.", "Another one, a little longer, about rivers and the towns on them.", "河流与城镇。"]
    requests = [SimpleNamespace(args=(t,)) for t in texts]
    ours = SharedPrefixLM(model, tokenizer, None, lambda done, total: None)
    before = library._max_length
    library._max_length = ours._max_length = 8  # several windows per text
    expected = library.loglikelihood_rolling(requests, disable_tqdm=True)
    library._max_length = before
    assert ours.loglikelihood_rolling(requests) == pytest.approx(expected, abs=1e-3)


PROMPTS = [
    "Question: What is 2 + 2?\nAnswer: 4\n\nQuestion: What is the capital of France?\nAnswer:",
    "Question: What is 2 + 2?\nAnswer: 4\n\nQuestion: Name a colour of the sky.\nAnswer:",
    "Question: What is 2 + 2?\nAnswer: 4\n\nQuestion:",
    "从前有一座山，",
]


@pytest.mark.parametrize("prompts", [PROMPTS[:3], PROMPTS, PROMPTS[3:]])
@pytest.mark.parametrize("until", [["\n"], ["Question:"], []])
def test_generations_equal_lm_evals_backend(smollm, library: HFLM, prompts: list[str], until: list[str]) -> None:
    model, tokenizer = smollm
    options = {"until": until, "do_sample": False, "max_gen_toks": 24}
    requests = [SimpleNamespace(args=(prompt, dict(options))) for prompt in prompts]
    theirs = library.generate_until(requests, disable_tqdm=True)
    progress: list[int] = []
    ours = SharedPrefixLM(model, tokenizer, None, lambda done, total: progress.append(done))
    assert ours.generate_until(requests) == theirs
    assert progress[-1] == len(prompts)


def test_a_penalty_for_repetition_is_the_librarys(smollm, library: HFLM) -> None:
    model, tokenizer = smollm
    options = {"until": [], "do_sample": False, "max_gen_toks": 24, "repetition_penalty": 1.3}
    requests = [SimpleNamespace(args=(prompt, dict(options))) for prompt in PROMPTS]
    ours = SharedPrefixLM(model, tokenizer, None, lambda done, total: None).generate_until(requests)
    assert ours == library.generate_until(requests, disable_tqdm=True)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"do_sample": True, "temperature": 0.7}, "sampling or beams: scores before and after are paired"),
        ({"num_beams": 4}, "sampling or beams"),
        ({"no_repeat_ngram_size": 3}, "no_repeat_ngram_size"),
        ({"max_gen_toks": 10_000}, "up to 10000 tokens, but the model reads at most"),
    ],
)
def test_a_generation_that_cannot_be_paired_is_refused(smollm, options: dict, sentence: str) -> None:
    backend = SharedPrefixLM(*smollm, None, lambda done, total: None)
    with pytest.raises(ConfigError, match=sentence):
        backend.generate_until([SimpleNamespace(args=("Hello", {"until": [], **options}))])


def tree(*sequences: list[int], base: tuple[int, ...] = ()) -> TokenTree:
    row = TokenTree(base)
    for i, sequence in enumerate(sequences):
        row.add(Text(i, sequence, 0))
    return row


def test_a_tree_computes_each_shared_prefix_once() -> None:
    row = tree([1, 2, 3], [1, 2, 3, 4], [1, 2, 5], [7])
    assert row.tokens == [1, 2, 3, 4, 5, 7]
    assert row.positions == [0, 1, 2, 3, 2, 0]
    assert row.paths[2][1] == [0, 1, 4]
    assert [s.spans for s in row.stretches] == [(), ((0, 3),), ((0, 2),), ()]
    seen = {place: line.nonzero()[:, 0].tolist() for place, line in enumerate(row.mask()[0, 0])}
    assert seen[4] == [0, 1, 4]
    assert seen[5] == [5]


def test_a_path_with_gaps_is_seen_as_its_spans() -> None:
    row = tree([1, 2], [1, 3], [1, 3, 4, 5], [1, 3, 4, 6])
    assert row.tokens == [1, 2, 3, 4, 5, 6]
    assert row.stretches[-1].spans == ((0, 1), (2, 4))
    assert row.paths[3][1] == [0, 2, 3, 5]


def test_a_row_goes_on_from_what_it_shares_with_the_one_before() -> None:
    head = list(range(100, 130))
    texts = [Text(i, [*head, 200 + i, 7, 8], len(head) + 1) for i in range(30)]
    rows = list(make_rows(texts, 60, goes_on=True))
    assert len(rows) > 1
    assert [row.base for row in rows] == [0] + [30] * (len(rows) - 1)
    assert [row.keep for row in rows] == [30] * (len(rows) - 1) + [0]
    assert sum(len(row.tokens) for row in rows) == 30 + 30 * 3, "the head once"
    assert [text.index for row in rows for text, _ in row.paths] == list(range(30))
    alone = list(make_rows(texts, 60, goes_on=False))
    assert {row.base for row in alone} == {0}


def test_what_is_read_is_never_left_to_the_row_before() -> None:
    head = list(range(100, 130))
    texts = [Text(0, head, 0), Text(1, [*head, 5], 20), Text(2, [*head, 6], 30)]
    for budget in (1, 31, 35):
        for row in make_rows(texts, budget, goes_on=True):
            assert all(text.read >= row.base for text, _ in row.paths)


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=40), min_size=1, max_size=12), st.integers(1, 60))
def test_rows_hold_every_text_whole(sequences: list[list[int]], budget: int) -> None:
    texts = [Text(i, tokens, len(tokens) - 1) for i, tokens in enumerate(sorted(sequences))]
    last: list[int] = []
    found = []
    for row in make_rows(texts, budget, goes_on=True):
        base = last[: row.base]
        for text, path in row.paths:
            assert [*base, *(row.tokens[p] for p in path)] == text.tokens
            assert [row.positions[p] for p in path] == list(range(row.base, len(text.tokens)))
            found.append(text.index)
        last = row.paths[-1][0].tokens
    assert found == list(range(len(texts)))


def test_every_file_shape_is_scored_with_what_its_measure_needs(smollm, tmp_path: Path) -> None:
    model, tokenizer = smollm
    config = suite(
        tmp_path,
        choices=lines(
            tmp_path / "c.jsonl",
            [
                {"context": "The sun rises in the", "choices": ["east.", "spoon."], "gold": 0},
                {"context": "她每天喝一杯", "choices": ["石头。", "牛奶。"], "gold": 1},
            ],
        ),
        texts=lines(tmp_path / "t.jsonl", [{"text": "Rivers run to the sea."}, {"text": "It rained all day."}]),
        conversations=lines(
            tmp_path / "m.jsonl",
            [
                {
                    "messages": [
                        {"role": "user", "content": "Hi"},
                        {"role": "assistant", "content": "Hello!"},
                        {"role": "user", "content": "Bye"},
                        {"role": "assistant", "content": "Goodbye!"},
                    ]
                }
            ],
        ),
    )
    progress: list[int] = []
    scores, items = score_model(model, tokenizer, config, lambda done, total: progress.append(done))
    by_task = {s.task: s for s in scores}
    assert by_task["choices"].n == 2
    assert by_task["choices"].chance == 0.5
    assert by_task["choices"].acc in (0.5, 1.0)
    assert [i.prompt != "" and i.margin is not None for i in items if i.task == "choices"] == [True, True]
    texts = [i for i in items if i.task == "texts"]
    assert [i.size_bytes for i in texts] == [22, 18]
    nll = sum(i.nll or 0 for i in texts)
    assert by_task["texts"].bits_per_byte == pytest.approx(nll / math.log(2) / 40)
    answers = [i for i in items if i.task == "conversations"]
    assert [i.size_bytes for i in answers] == [6, 8]
    assert {i.cluster for i in answers} == {"0"}
    assert progress
    again = score_model(model, tokenizer, config, lambda done, total: None)
    assert again[1] == items


def test_written_answers_are_measured_against_their_references(smollm, tmp_path: Path) -> None:
    model, tokenizer = smollm
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"What is {a} plus {a}?"},
                {"role": "assistant", "content": str(2 * a)},
            ]
        }
        for a in (1, 2)
    ]
    rows[0]["messages"] += [{"role": "user", "content": "Say hello."}, {"role": "assistant", "content": "Hello!"}]
    task = {"name": "written", "answers": lines(tmp_path / "a.jsonl", rows), "max_answer_tokens": 24}
    config = EvalConfig(capabilities=[{"name": "c", "role": "target", "measure": "f1", "tasks": [task]}])
    scores, items = score_model(model, tokenizer, config, lambda done, total: None)
    assert [i.expected for i in items] == ["Hello!", "4"], "the last answer of each conversation"
    assert [i.question for i in items] == ["Say hello.", "What is 2 plus 2?"]
    for item in items:
        assert item.answered
        assert 0 <= item.f1 <= 1
        assert item.refused == 0
        tokens = tokenizer(item.answered, add_special_tokens=False)["input_ids"]
        assert item.stopped == float(len(tokens) < 24)
    assert scores[0].generated.keys() >= {"f1", "rouge_l", "stopped", "length", "bleu", "chrf"}
    assert scores[0].generated["f1"] == pytest.approx(sum(i.f1 for i in items) / 2)


QUESTIONS = """# Our shop
## Parcels
### What colour is the sky on a clear day?
A. blue
B. made of cheese
Answer: A
### Which animal barks?
A. the table
B. the dog
Answer: B
"""


def test_a_question_set_in_markdown_is_scored(smollm, tmp_path: Path) -> None:
    model, tokenizer = smollm
    (tmp_path / "shop.md").write_text(QUESTIONS)
    scores, items = score_model(
        model, tokenizer, suite(tmp_path, questions=str(tmp_path / "shop.md")), lambda done, total: None
    )
    assert [i.cluster for i in items] == ["Parcels", "Parcels"]
    assert [i.expected for i in items] == ["blue", "the dog"]
    assert {i.answered for i in items} <= {"blue", "made of cheese", "the table", "the dog"}
    assert (scores[0].n, scores[0].chance) == (2, 0.5)
    assert all(0.5 <= i.confidence <= 1 for i in items), "of two, the chosen one has at least half"
    (tmp_path / "shop.md").write_text(QUESTIONS + "### Who are you?\nAnswer: A shop.\n")
    with pytest.raises(ConfigError, match="mixes 2 questions with choices and 1 open ones"):
        score_model(model, tokenizer, suite(tmp_path, questions=str(tmp_path / "shop.md")), lambda done, total: None)


def test_calibration_error_of_known_items() -> None:
    def item(confidence: float, acc: float) -> ItemScore:
        return ItemScore(task="t", doc="d", prompt="p", acc=acc, confidence=confidence)

    assert calibration_error([item(1.0, 1), item(1.0, 1)]) == 0
    assert calibration_error([item(0.9, 1), item(0.9, 0)]) == pytest.approx(0.4)
    # Bins of 2 and 1 items: gaps 0.4 and 0.55.
    assert calibration_error([item(0.9, 1), item(0.9, 0), item(0.55, 0)]) == pytest.approx((2 * 0.4 + 0.55) / 3)
    assert calibration_error([ItemScore(task="t", doc="d", prompt="p", acc=1.0)]) is None


def test_a_model_does_not_diverge_from_itself_and_a_changed_one_does(tiny_folder: Path) -> None:
    base, tuned = (load_model(tiny_folder, torch.float32, "cpu") for _ in range(2))
    tokenizer = load_tokenizer(tiny_folder, "auto")
    texts = ["Rivers run to the sea.", "It rained all day.", "a"]
    assert base_divergence(base, base, tokenizer, texts) == pytest.approx([0.0, 0.0], abs=1e-6)
    with torch.no_grad():
        tuned.model.layers[0].mlp.down_proj.weight.mul_(30)
    found = base_divergence(base, tuned, tokenizer, texts)
    ids = tokenizer(texts[1], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        p, q = (model(ids).logits[0].double().softmax(-1) for model in (base, tuned))
    assert found[1] == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), rel=1e-3)
    assert found[1] > 0.001
    score = with_divergence(TaskScore(task="t", n=2), found)
    assert score.kl_low < score.kl < score.kl_high


def test_only_new_requests_are_computed(smollm, tmp_path: Path) -> None:
    model, tokenizer = smollm
    store = FileStore(tmp_path / "store")
    computed: list[int] = []

    def ask(texts: list[str], answers: list[str]) -> tuple[list[float], list[tuple[float, bool]], list[str], set[str]]:
        backend = SharedPrefixLM(model, tokenizer, None, lambda done, total: computed.append(total))
        responses = Responses(store, "model")
        responses.attach(backend)
        found = (
            backend.loglikelihood_rolling([SimpleNamespace(args=(t,)) for t in texts]),
            backend.loglikelihood([SimpleNamespace(args=(c, a)) for c, a in REQUESTS]),
            backend.generate_until([SimpleNamespace(args=(t, {"until": ["\n"], "max_gen_toks": 4})) for t in answers]),
            backend.unfinished,
        )
        responses.write(str(len(computed)))
        return found

    first = ask(["Rivers run.", "It rained."], ["The sky is", "Hello"])
    computed.clear()
    assert ask(["Rivers run.", "It rained."], ["The sky is", "Hello"]) == first
    assert not computed, "all of it was known"
    more = ask(["It rained.", "A new text.", "Rivers run."], ["Hello"])
    assert set(computed) == {1}, "the new text alone"
    assert more[0][::2] == first[0][::-1]
    for file in (tmp_path / "store").rglob("responses.json"):
        file.write_bytes(file.read_bytes().replace(b"-", b"+", 1))
    assert Responses(store, "model").known == {}, "damaged files are scored again"
    assert Responses(store, "another model").known == {}


def test_a_users_own_lm_eval_task_folder_is_found_by_name(smollm, tmp_path: Path) -> None:
    model, tokenizer = smollm
    data = lines(
        tmp_path / "rows.jsonl", [{"q": "2+2=", "a": ["4", "9"], "g": 0}, {"q": "1+1=", "a": ["7", "2"], "g": 1}]
    )
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "sums.yaml").write_text(
        f"task: sums\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
        'output_type: multiple_choice\ndoc_to_text: "{{q}}"\ndoc_to_choice: "{{a}}"\ndoc_to_target: g\n'
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\nmetadata: {version: 3}\n"
    )
    config = EvalConfig(task_folders=[str(folder)], capabilities=[{"name": "c", "role": "target", "tasks": ["sums"]}])
    scores, items = score_model(model, tokenizer, config, lambda done, total: None)
    assert [s.version for s in scores] == ["3"]
    assert len(items) == 2
    before = suite_digest(config)
    lines(tmp_path / "rows.jsonl", [{"q": "2+2=", "a": ["4", "5"], "g": 0}])
    assert suite_digest(config) != before, "other items must not be taken from the cache"


def test_lm_evals_own_command_line_has_the_backend(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = lines(tmp_path / "rows.jsonl", [{"text": "Rivers run to the sea."}, {"text": "It rained all day."}])
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "texts.yaml").write_text(
        f"task: own_texts\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {rows}}}}}\ntest_split: test\n"
        'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{text}}"\n'
        "metric_list: [{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}]\n"
    )
    monkeypatch.setattr(sys, "argv", ["forgetless"])
    found = {}
    for model in ("forgetless", "hf"):
        arguments = ["--model", model, "--model_args", f"pretrained={tiny_folder},dtype=float32", "--device", "cpu"]
        arguments += ["--tasks", "own_texts", "--include_path", str(folder), "--output_path", str(tmp_path / model)]
        assert main(["lm-eval", *arguments]) == 0
        (result,) = (tmp_path / model).rglob("results_*.json")
        found[model] = json.loads(result.read_text())["results"]["own_texts"]["bits_per_byte,none"]
    assert found["forgetless"] == pytest.approx(found["hf"], abs=1e-6)
    wrong = ["--model", "forgetless", "--model_args", f"pretrained={tiny_folder},rank=8"]
    assert main(["lm-eval", *wrong, "--tasks", "own_texts", "--include_path", str(folder)]) == 2


def test_unknown_tasks_and_absent_files_are_all_named(smollm, tmp_path: Path) -> None:
    model, tokenizer = smollm
    config = EvalConfig(capabilities=[{"name": "c", "role": "target", "tasks": ["no_such", "nor_this"]}])
    with pytest.raises(ConfigError) as caught:
        score_model(model, tokenizer, config, lambda done, total: None)
    assert len(caught.value.problems) == 2
    assert "eval task no_such: unknown (looked in no task_folders; set eval.builtin_tasks: true" in str(caught.value)
    with pytest.raises(ConfigError, match="the file .*absent.jsonl is not there"):
        suite_digest(suite(tmp_path, choices=str(tmp_path / "absent.jsonl")))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"context": "a", "choices": ["b", "c"], "gold": 2}], "gold 2 is outside the 2 choices"),
        ([{"text": "a"}], "has not the expected shape"),
        ([], "has no rows, so there is nothing to score"),
    ],
)
def test_rows_of_the_wrong_shape_are_said(smollm, tmp_path: Path, rows: list[dict], message: str) -> None:
    model, tokenizer = smollm
    config = suite(tmp_path, choices=lines(tmp_path / "c.jsonl", rows))
    with pytest.raises(ConfigError, match=message):
        score_model(model, tokenizer, config, lambda done, total: None)
