"""Scores equal lm-eval's own backend item by item, and every file shape becomes a task."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lm_eval.models.huggingface import HFLM

from tasks.core.config import EvalConfig
from tasks.core.errors import ConfigError
from tasks.evaluation.harness import score_model
from tasks.evaluation.prefix_lm import SharedPrefixLM, TokenTree
from tasks.evaluation.suite import suite_digest
from tasks.models.load import load_model
from tasks.models.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def smollm(smollm_folder: Path):
    return load_model(smollm_folder, torch.float32, "cpu"), load_tokenizer(smollm_folder, "auto")


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
def test_log_likelihoods_equal_lm_evals_backend(smollm, row_tokens: int) -> None:
    model, tokenizer = smollm
    requests = [SimpleNamespace(args=r) for r in REQUESTS]
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1).loglikelihood(requests, disable_tqdm=True)
    ours = SharedPrefixLM(model, tokenizer, row_tokens, lambda done, total: None).loglikelihood(requests)
    for (a, greedy_a), (b, greedy_b) in zip(theirs, ours, strict=True):
        assert b == pytest.approx(a, abs=1e-3)
        assert greedy_a == greedy_b


def test_rolling_log_likelihoods_equal_lm_evals_backend(smollm) -> None:
    model, tokenizer = smollm
    texts = ["A short text.", "Another one, a little longer, about rivers and the towns on them.", "河流与城镇。"]
    requests = [SimpleNamespace(args=(t,)) for t in texts]
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
    theirs._max_length = 8  # several windows per text
    ours = SharedPrefixLM(model, tokenizer, None, lambda done, total: None)
    ours._max_length = 8
    expected = theirs.loglikelihood_rolling(requests, disable_tqdm=True)
    assert ours.loglikelihood_rolling(requests) == pytest.approx(expected, abs=1e-3)


def test_a_tree_computes_each_shared_prefix_once() -> None:
    tree = TokenTree()
    for i, sequence in enumerate([[1, 2, 3], [1, 2, 3, 4], [1, 2, 5], [7]]):
        tree.add(i, sequence)
    assert tree.tokens == [1, 2, 3, 4, 5, 7]
    assert tree.depths == [0, 1, 2, 3, 2, 0]
    assert dict(tree.paths)[2] == [0, 1, 4]
    seen = {node: row.nonzero()[:, 0].tolist() for node, row in enumerate(tree.mask()[0, 0])}
    assert seen[4] == [0, 1, 4]
    assert seen[5] == [5]


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
