"""Validation: the prepared splits against a Great Expectations suite, with a report and Data Docs for a person to read.

The rows are read back from disk and judged by what they are, not by what the readers meant to write. No row's text goes
into the report; failing rows are named by file and line.
"""

import html
import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from tasks.core.config import DataConfig
from tasks.core.processes import map_processes, read_chunks
from tasks.core.records import Check, DatasetRef
from tasks.core.settings import quiet_libraries
from tasks.data.formats import conversation_digest
from tasks.data.prepare import SPLITS
from tasks.data.shards import question_number

if TYPE_CHECKING:
    import pandas as pd

IDEOGRAPHS = ((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3134F))
SPACES = np.array([c for c in range(0x3001) if chr(c).isspace()], np.uint32)
PLACEHOLDER = re.compile(r"\{\{\s*\w+\s*\}\}")
USUAL_QUARANTINED_SHARE = 0.05
FROM_TURNS = {
    "line": np.int64,
    "digest": np.uint64,
    "question": np.uint64,
    "n_turns": np.int32,
    "first_role_ok": np.bool_,
    "roles_alternate": np.bool_,
    "ends_with_assistant": np.bool_,
    "min_answer_chars": np.int32,
    "trailing_turn_cut": np.bool_,
}
COLUMNS = {
    **FROM_TURNS,
    "is_train": np.bool_,
    "total_chars": np.int32,
    "cjk_share": np.float32,
    "has_replacement_char": np.bool_,
    "has_placeholder": np.bool_,
}


@dataclass(frozen=True)
class Rule:
    """One expectation, before Great Expectations is loaded: about which frame, its class there and what that takes."""

    frame: Literal["rows", "dataset"]
    expectation: str
    severity: Literal["critical", "warning", "info"]
    description: str
    arguments: dict[str, Any]
    observed: Callable[[Any], str] | None = None
    """How the observed value is said; None where rows are judged one by one, which says how many failed and where."""


def validate_rows(folder: Path, dataset: DatasetRef, config: DataConfig, out: Path) -> tuple[bool, list[Check]]:
    """Return whether no critical expectation failed, and every check. `folder` holds what prepare_dataset wrote.

    Writes report.json (the checks and Great Expectations' own results) and data_docs/index.html under `out`."""
    rows = read_features(folder)
    frames = {"rows": rows, "dataset": _dataset_features(rows, dataset)}

    def place(at: list[int]) -> str:
        first = rows.iloc[at]
        return ", ".join(f"{source}:{line}" for source, line in zip(first["source"], first["line"], strict=True))

    return judge(frames, list_rules(dataset, config), place, out, "Training data")


def judge(
    frames: dict[str, "pd.DataFrame"], rules: list["Rule"], place: Callable[[list[int]], str], out: Path, title: str
) -> tuple[bool, list[Check]]:
    """Return whether no critical rule failed on its frame, and every rule's check; `place` names rows by number.

    Writes report.json (the checks and Great Expectations' own results) and data_docs/index.html under `out`."""
    quiet_libraries()
    results = _run_suites(frames, rules, out / "data_docs")
    checks = [_check(rule, results[rule.description], place) for rule in rules]
    passed = all(check.passed for check in checks if check.severity == "critical")
    report = {
        "passed": passed,
        "checks": [check.model_dump() for check in checks],
        "great_expectations": [results[rule.description].to_json_dict() for rule in rules],
    }
    (out / "report.json").write_text(json.dumps(report, ensure_ascii=False, indent=1, default=str), encoding="utf-8")
    _write_index(out / "data_docs", title, passed, checks)
    return passed, checks


def read_features(folder: Path) -> "pd.DataFrame":
    """Return one record of features per row of train.jsonl and validation.jsonl, without the rows' text."""
    import pandas as pd

    chunks = ((split, chunk) for split in SPLITS for chunk in read_chunks(folder / f"{split}.jsonl"))
    parts = list(map_processes(read_chunk_features, chunks))
    columns = {name: np.concatenate([np.empty(0, kind), *(p[name] for p in parts)]) for name, kind in COLUMNS.items()}
    sources = list(dict.fromkeys(name for part in parts for name in part["sources"]))
    codes = [np.array([sources.index(name) for name in part["sources"]], np.int32)[part["source"]] for part in parts]
    source = pd.Categorical.from_codes(np.concatenate([np.empty(0, np.int32), *codes]), sources)
    # How often each question is asked in the splits, and in each row's own.
    _, question, times = np.unique(columns["question"], return_inverse=True, return_counts=True)
    in_train = np.bincount(question, columns["is_train"], len(times))
    here = np.where(columns["is_train"], in_train[question], (times - in_train)[question])
    repeated = {"prompt_in_both_splits": here < times[question], "prompt_repeated": here > 1}
    split = pd.Categorical.from_codes(np.where(columns.pop("is_train"), 0, 1), list(SPLITS))
    del columns["question"]
    return pd.DataFrame({"split": split, "source": source, **columns, **repeated})


def read_chunk_features(job: tuple[str, bytes]) -> dict[str, Any]:
    """Return the columns of some lines of a split, and the sources that their numbers stand for."""
    split, lines = job
    rows = [json.loads(line) for line in lines.splitlines()]
    sources: dict[str, int] = {}
    found = [_features(row, sources) for row in rows]
    texts = ["".join(m["content"] for m in row["messages"]) for row in rows]
    codes = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), np.uint32)
    ends = np.cumsum([0, *map(len, texts)])

    def share_of(marked: Any, among: Any) -> Any:
        counted = [np.diff(np.concatenate([[0], np.cumsum(which)])[ends]) for which in (marked, among)]
        return counted[0] / np.maximum(1, counted[1])

    ideograph = np.zeros(len(codes), bool)
    for low, high in IDEOGRAPHS:
        ideograph |= (codes >= low) & (codes <= high)
    features: dict[str, Any] = {
        name: np.array([f[name] for f in found], kind) for name, kind in COLUMNS.items() if name in FROM_TURNS
    }
    return {
        **features,
        "is_train": np.full(len(rows), split == "train"),
        "source": np.array([sources[row["source"]] for row in rows], np.int32),
        "sources": list(sources),
        "total_chars": np.diff(ends).astype(np.int32),
        "cjk_share": share_of(ideograph, ~np.isin(codes, SPACES)).astype(np.float32),
        "has_replacement_char": share_of(codes == 0xFFFD, np.ones(len(codes), bool)) > 0,
        "has_placeholder": np.array([PLACEHOLDER.search(text) is not None for text in texts], bool),
    }


def _features(row: dict[str, Any], sources: dict[str, int]) -> dict[str, Any]:
    messages = row["messages"]
    sources.setdefault(row["source"], len(sources))
    roles = [message["role"] for message in messages]
    is_text = roles == ["text"]
    dialogue = roles[1:] if roles[:1] == ["system"] else roles
    answers = [len(m["content"].strip()) for m in messages if m["role"] == "assistant" or is_text]
    return {
        "line": row["line"],
        "digest": int(conversation_digest(messages)[:16], 16),
        "question": question_number(messages),
        "n_turns": len(dialogue),
        "first_role_ok": is_text or dialogue[:1] == ["user"],
        "roles_alternate": is_text or all(role == ("user", "assistant")[i % 2] for i, role in enumerate(dialogue)),
        "ends_with_assistant": is_text or roles[-1:] == ["assistant"],
        "min_answer_chars": min(answers, default=0),
        "trailing_turn_cut": "trailing_user_turn" in row.get("repaired", ()),
    }


def _dataset_features(rows: "pd.DataFrame", dataset: DatasetRef) -> "pd.DataFrame":
    """Return one record of what only the data set as a whole has."""
    import pandas as pd

    by_source = rows["source"].value_counts()
    quarantined = sum(dataset.quarantined.values())
    return pd.DataFrame(
        {
            "quarantined_share": [quarantined / dataset.read if dataset.read else 1.0],
            "unaccounted_rows": [dataset.read - len(rows) - quarantined - dataset.unused],
            # A single source dominates by design: nothing to warn of.
            "largest_source_share": [by_source.max() / len(rows) if len(by_source) > 1 else 0.0],
        }
    )


def list_rules(dataset: DatasetRef, config: DataConfig) -> list[Rule]:
    """Return what is expected of a data set, the most serious first. Descriptions name the checks, so they differ."""
    quarantined, read = sum(dataset.quarantined.values()), dataset.read
    reasons = ", ".join(f"{reason} {n:,}" for reason, n in Counter(dataset.quarantined).most_common(3))
    rejected = f"{quarantined:,} of {count_rows(read)}{f': {reasons}' if reasons else ''}"
    sizes = " and ".join(f"{count_rows(dataset.rows.get(split, 0))} for {split}" for split in SPLITS)

    def share(column: str, most: float, severity: Any, description: str, observed: Callable[[Any], str]) -> Rule:
        arguments = {"column": column, "max_value": most}
        return Rule("dataset", "ExpectColumnMaxToBeBetween", severity, description, arguments, observed)

    def equal(column: str, value: bool, severity: Any, description: str, mostly: float = 1.0) -> Rule:
        arguments = {"column": column, "value_set": [value], "mostly": mostly}
        return Rule("rows", "ExpectColumnValuesToBeInSet", severity, description, arguments)

    def within(column: str, limits: tuple[int, int | None], severity: Any, description: str, mostly: float = 1) -> Rule:
        arguments = {"column": column, "min_value": limits[0], "max_value": limits[1], "mostly": mostly}
        return Rule("rows", "ExpectColumnValuesToBeBetween", severity, description, arguments)

    return [
        Rule(
            "rows",
            "ExpectTableRowCountToBeBetween",
            "critical",
            f"At least {count_rows(config.min_rows)} can be used",
            {"min_value": config.min_rows},
            count_rows,
        ),
        share(
            "quarantined_share",
            config.max_quarantined_share,
            "critical",
            f"At most {config.max_quarantined_share:.0%} of the rows are quarantined",
            lambda part: f"{part:.1%} ({rejected})",
        ),
        Rule(
            "dataset",
            "ExpectColumnValuesToBeInSet",
            "critical",
            "Every row read was either kept or quarantined",
            {"column": "unaccounted_rows", "value_set": [0]},
            lambda _: f"{count_rows(read)} read, {sum(dataset.rows.values()):,} kept, {quarantined:,} quarantined",
        ),
        Rule(
            "rows",
            "ExpectColumnDistinctValuesToContainSet",
            "critical",
            "Neither the training nor the validation split is empty",
            {"column": "split", "value_set": list(SPLITS)},
            lambda _: sizes,
        ),
        equal(
            "first_role_ok", True, "critical", "Every conversation begins with the user, after a system turn or none"
        ),
        equal("roles_alternate", True, "critical", "User and assistant alternate"),
        equal("ends_with_assistant", True, "critical", "Every conversation ends with the assistant"),
        within("min_answer_chars", (1, None), "critical", "No answer is empty"),
        within("total_chars", (1, config.max_chars), "critical", f"No row exceeds {config.max_chars:,} characters"),
        equal("prompt_in_both_splits", False, "critical", "No question is in both splits"),
        Rule(
            "rows",
            "ExpectColumnValuesToBeUnique",
            "critical",
            "No conversation is there twice",
            {"column": "digest"},
        ),
        share(
            "quarantined_share",
            USUAL_QUARANTINED_SHARE,
            "warning",
            f"No more rows are quarantined than usual ({USUAL_QUARANTINED_SHARE:.0%})",
            lambda part: f"{part:.1%} ({rejected})",
        ),
        share(
            "largest_source_share",
            0.9,
            "warning",
            "No source among several makes up more than 90% of the rows",
            lambda part: f"the largest has {part:.0%}" if part else "one source",
        ),
        equal("has_replacement_char", False, "warning", "At most 1% of the rows hold U+FFFD, a lost character", 0.99),
        equal("has_placeholder", False, "warning", "At most 1% of the rows hold a {{placeholder}} to fill in", 0.99),
        equal("prompt_repeated", False, "warning", "At most 20% of the rows share their question with another", 0.8),
        within("min_answer_chars", (2, None), "warning", "At most 5% of the rows have an answer of 1 character", 0.95),
        equal("trailing_turn_cut", False, "info", "No row ended with an unanswered question, which was cut"),
        Rule(
            "rows",
            "ExpectColumnMaxToBeBetween",
            "info",
            "The longest conversation",
            {"column": "n_turns", "min_value": 1},
            lambda turns: "no rows" if turns is None else f"{turns:,.0f} turns",
        ),
        Rule(
            "rows",
            "ExpectColumnMeanToBeBetween",
            "info",
            "The share of Chinese characters",
            {"column": "cjk_share", "min_value": 0, "max_value": 1},
            lambda part: "no rows" if part is None else f"{part:.0%} of a row's characters, on average",
        ),
    ]


def _run_suites(frames: dict[str, "pd.DataFrame"], rules: list[Rule], site: Path) -> dict[str, Any]:
    """Return Great Expectations' result of each rule by its description, with its Data Docs built into `site`."""
    import great_expectations as gx
    import great_expectations.expectations as gxe
    from great_expectations.core.run_identifier import RunIdentifier
    from great_expectations.data_context.types import base

    docs = {
        "class_name": "SiteBuilder",
        "show_how_to_buttons": False,
        "site_index_builder": {"class_name": "DefaultSiteIndexBuilder"},
        "store_backend": {"class_name": "TupleFilesystemStoreBackend", "base_directory": str(site.absolute())},
    }
    # Given no project of its own, an ephemeral context leaves a folder in /tmp behind for its Data Docs.
    project = base.DataContextConfig(
        store_backend_defaults=base.InMemoryStoreBackendDefaults(),
        analytics_enabled=False,
        progress_bars=base.ProgressBarsConfig(globally=False),
        data_docs_sites={"data": docs},
    )
    context = gx.get_context(mode="ephemeral", project_config=project)
    source = context.data_sources.add_pandas("data")
    run = RunIdentifier(run_name="validation", run_time=datetime.now(UTC))
    results: dict[str, Any] = {}
    for name, frame in frames.items():
        expectations = [
            getattr(gxe, rule.expectation)(**rule.arguments, severity=rule.severity, description=rule.description)
            for rule in rules
            if rule.frame == name
        ]
        suite = context.suites.add(gx.ExpectationSuite(name=name, expectations=expectations))
        batch = source.add_dataframe_asset(name).add_batch_definition_whole_dataframe("all")
        definition = context.validation_definitions.add(gx.ValidationDefinition(name=name, data=batch, suite=suite))
        outcome = definition.run(batch_parameters={"dataframe": frame}, result_format="SUMMARY", run_id=run)
        for result in outcome.results:  # in an order of its own
            assert result.expectation_config is not None
            results[str(result.expectation_config.description)] = result
    context.build_data_docs()
    for animation in (site / "static" / "images").glob("*.gif"):
        animation.unlink()  # 3 MB of how-to that no page shows
    return results


def _check(rule: Rule, result: Any, place: Callable[[list[int]], str]) -> Check:
    error = (result.exception_info or {}).get("exception_message")
    return Check(
        expectation=rule.description,
        severity=rule.severity,
        passed=bool(result.success),
        observed=f"could not be checked: {error}" if error else _observed(rule, result.result, place),
    )


def _observed(rule: Rule, result: dict[str, Any], place: Callable[[list[int]], str]) -> str:
    if rule.observed is not None:
        return rule.observed(result.get("observed_value"))
    failing, total = result["unexpected_count"], result["element_count"]
    if not failing:
        return f"all {count_rows(total)} pass" if total else "no rows"
    first = result["partial_unexpected_index_list"][:3]
    more = ", …" if failing > len(first) else ""
    return f"{failing:,} of {count_rows(total)} ({failing / total:.1%}): {place(first)}{more}"


def count_rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count:,} rows"


def _write_index(site: Path, title: str, passed: bool, checks: list[Check]) -> None:
    """Write the start page: every check with its outcome, and links to Great Expectations' own pages.

    Great Expectations' start page, kept beside it, fills its table by scripts from the network: blank without it."""
    (site / "index.html").rename(site / "great_expectations.html")
    pages = [
        (f"{title} ({page.relative_to(site).parts[1].removesuffix('.html')})", page.relative_to(site).as_posix())
        for title, folder in (("Results", "validations"), ("Expectations", "expectations"))
        for page in sorted((site / folder).rglob("*.html"))
    ]
    body = "".join(
        f'<tr class="{"passed" if check.passed else check.severity}"><td>{"passed" if check.passed else "failed"}</td>'
        f"<td>{check.severity}</td><td>{html.escape(check.expectation)}</td><td>{html.escape(check.observed)}</td></tr>\n"
        for check in checks
    )
    links = "".join(f'<li><a href="{html.escape(path)}">{html.escape(title)}</a></li>\n' for title, path in pages)
    page = f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}: {"passed" if passed else "rejected"}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
:root {{ color-scheme: light dark }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem }}
table {{ border-collapse: collapse; width: 100% }}
td, th {{ text-align: left; vertical-align: top; padding: .4rem .8rem .4rem 0; border-bottom: 1px solid #8884 }}
.critical td:first-child {{ color: #c62828; font-weight: bold }} .warning td:first-child {{ color: #b26a00 }}
</style></head><body>
<h1>{title}: {"passed" if passed else "rejected"}</h1>
<p>A critical check that fails stops the run; warnings and infos do not.</p>
<table><thead><tr><th>Outcome</th><th>Severity</th><th>Check</th><th>Observed</th></tr></thead><tbody>
{body}</tbody></table>
<h2>Great Expectations</h2>
<ul>
{links}<li><a href="great_expectations.html">All pages (needs the network)</a></li>
</ul></body></html>
"""
    (site / "index.html").write_text(page, encoding="utf-8")
