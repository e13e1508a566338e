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

from tasks.core.config import DataConfig
from tasks.core.records import Check, DatasetRef
from tasks.core.settings import quiet_libraries
from tasks.data.formats import conversation_digest
from tasks.data.split import SPLITS, prompt_digest

if TYPE_CHECKING:
    import pandas as pd

CJK = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f]")
PLACEHOLDER = re.compile(r"\{\{\s*\w+\s*\}\}")
USUAL_QUARANTINED_SHARE = 0.05
COLUMNS = {
    "split": "str",
    "source": "str",
    "line": "int64",
    "digest": "str",
    "n_turns": "int64",
    "first_role_ok": "bool",
    "roles_alternate": "bool",
    "ends_with_assistant": "bool",
    "min_answer_chars": "int64",
    "total_chars": "int64",
    "cjk_share": "float64",
    "has_replacement_char": "bool",
    "has_placeholder": "bool",
    "trailing_turn_cut": "bool",
    "prompt_in_both_splits": "bool",
    "prompt_repeated": "bool",
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
    quiet_libraries()
    rows = read_features(folder)
    frames = {"rows": rows, "dataset": _dataset_features(rows, dataset)}
    rules = list_rules(dataset, config)
    results = _run_suites(frames, rules, out / "data_docs")
    checks = [_check(rule, results[rule.description], rows) for rule in rules]
    passed = all(check.passed for check in checks if check.severity == "critical")
    report = {
        "passed": passed,
        "checks": [check.model_dump() for check in checks],
        "great_expectations": [results[rule.description].to_json_dict() for rule in rules],
    }
    (out / "report.json").write_text(json.dumps(report, ensure_ascii=False, indent=1, default=str), encoding="utf-8")
    _write_index(out / "data_docs", passed, checks)
    return passed, checks


def read_features(folder: Path) -> "pd.DataFrame":
    """Return one record of features per row of train.jsonl and validation.jsonl, without the rows' text."""
    import pandas as pd

    columns: dict[str, list[Any]] = {name: [] for name in COLUMNS}
    asked: dict[str, Counter[bytes]] = {}
    questions: list[bytes] = []
    for split in SPLITS:
        start = len(questions)
        with (folder / f"{split}.jsonl").open(encoding="utf-8") as file:
            for line in file:
                fields = json.loads(line)
                questions.append(bytes.fromhex(prompt_digest(fields["messages"]))[:16])
                for name, value in {"split": split, **_features(fields)}.items():
                    columns[name].append(value)
        asked[split] = Counter(questions[start:])
    columns["prompt_in_both_splits"] = [all(question in asked[split] for split in SPLITS) for question in questions]
    columns["prompt_repeated"] = [sum(asked[split][question] for split in SPLITS) > 1 for question in questions]
    return pd.DataFrame(columns).astype(COLUMNS)


def _features(fields: dict[str, Any]) -> dict[str, Any]:
    messages = fields["messages"]
    roles = [message["role"] for message in messages]
    dialogue = roles[1:] if roles[:1] == ["system"] else roles
    text = "".join(message["content"] for message in messages)
    answers = [len(message["content"].strip()) for message in messages if message["role"] == "assistant"]
    return {
        "source": fields["source"],
        "line": fields["line"],
        "digest": conversation_digest(messages)[:32],
        "n_turns": len(dialogue),
        "first_role_ok": dialogue[:1] == ["user"],
        "roles_alternate": all(role == ("user", "assistant")[i % 2] for i, role in enumerate(dialogue)),
        "ends_with_assistant": roles[-1:] == ["assistant"],
        "min_answer_chars": min(answers, default=0),
        "total_chars": len(text),
        "cjk_share": len(CJK.findall(text)) / max(1, len("".join(text.split()))),
        "has_replacement_char": "\ufffd" in text,
        "has_placeholder": PLACEHOLDER.search(text) is not None,
        "trailing_turn_cut": fields.get("repaired") == "trailing_user_turn",
    }


def _dataset_features(rows: "pd.DataFrame", dataset: DatasetRef) -> "pd.DataFrame":
    """Return one record of what only the data set as a whole has."""
    import pandas as pd

    by_source = rows["source"].value_counts()
    quarantined = sum(dataset.quarantined.values())
    return pd.DataFrame(
        {
            "quarantined_share": [quarantined / dataset.read if dataset.read else 1.0],
            "unaccounted_rows": [dataset.read - len(rows) - quarantined],
            # A single source dominates by design: nothing to warn of.
            "largest_source_share": [by_source.max() / len(rows) if len(by_source) > 1 else 0.0],
        }
    )


def list_rules(dataset: DatasetRef, config: DataConfig) -> list[Rule]:
    """Return what is expected of a data set, the most serious first. Descriptions name the checks, so they differ."""
    quarantined, read = sum(dataset.quarantined.values()), dataset.read
    reasons = ", ".join(f"{reason} {n:,}" for reason, n in Counter(dataset.quarantined).most_common(3))
    rejected = f"{quarantined:,} of {_rows(read)}{f': {reasons}' if reasons else ''}"
    sizes = " and ".join(f"{_rows(dataset.rows.get(split, 0))} for {split}" for split in SPLITS)

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
            f"At least {_rows(config.min_rows)} can be used",
            {"min_value": config.min_rows},
            _rows,
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
            lambda _: f"{_rows(read)} read, {sum(dataset.rows.values()):,} kept, {quarantined:,} quarantined",
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


def _check(rule: Rule, result: Any, rows: "pd.DataFrame") -> Check:
    error = (result.exception_info or {}).get("exception_message")
    return Check(
        expectation=rule.description,
        severity=rule.severity,
        passed=bool(result.success),
        observed=f"could not be checked: {error}" if error else _observed(rule, result.result, rows),
    )


def _observed(rule: Rule, result: dict[str, Any], rows: "pd.DataFrame") -> str:
    if rule.observed is not None:
        return rule.observed(result.get("observed_value"))
    failing, total = result["unexpected_count"], result["element_count"]
    if not failing:
        return f"all {_rows(total)} pass" if total else "no rows"
    first = rows.iloc[result["partial_unexpected_index_list"][:3]]
    places = ", ".join(f"{source}:{line}" for source, line in zip(first["source"], first["line"], strict=True))
    more = ", …" if failing > len(first) else ""
    return f"{failing:,} of {_rows(total)} ({failing / total:.1%}): {places}{more}"


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count:,} rows"


def _write_index(site: Path, passed: bool, checks: list[Check]) -> None:
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
<html lang="en"><head><meta charset="utf-8"><title>Training data: {"passed" if passed else "rejected"}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
:root {{ color-scheme: light dark }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem }}
table {{ border-collapse: collapse; width: 100% }}
td, th {{ text-align: left; vertical-align: top; padding: .4rem .8rem .4rem 0; border-bottom: 1px solid #8884 }}
.critical td:first-child {{ color: #c62828; font-weight: bold }} .warning td:first-child {{ color: #b26a00 }}
</style></head><body>
<h1>Training data: {"passed" if passed else "rejected"}</h1>
<p>A critical check that fails stops the run; warnings and infos do not.</p>
<table><thead><tr><th>Outcome</th><th>Severity</th><th>Check</th><th>Observed</th></tr></thead><tbody>
{body}</tbody></table>
<h2>Great Expectations</h2>
<ul>
{links}<li><a href="great_expectations.html">All pages (needs the network)</a></li>
</ul></body></html>
"""
    (site / "index.html").write_text(page, encoding="utf-8")
