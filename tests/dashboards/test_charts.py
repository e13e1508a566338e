"""The charts' specifications: units on every axis, and never two units on one."""

from typing import Any

import pytest

from dashboards import charts
from tests.dashboards import manifests as made


def titles(spec: Any, channel: str) -> set[str]:
    """Return the titles of one channel's axes, over all layers of a chart's specification."""
    found = {
        layer["encoding"][channel].get("title") for layer in spec.get("layer", [spec]) if channel in layer["encoding"]
    }
    return {title for title in found if title}


def rows(spec: Any) -> list[dict[str, Any]]:
    return [row for data in spec["datasets"].values() for row in data if "name" in row]


def test_percent_and_points_and_gains_and_losses_have_their_own_plots() -> None:
    report = made.promoted().report
    assert report
    specs = [plot.to_dict() for plot in charts.forest_plots(report.capabilities)]
    assert [spec["title"]["text"] for spec in specs] == [
        "Target: change in bits per byte",
        "Retention: change in bits per byte",
        "Retention: change in accuracy",
    ]
    assert [titles(spec, "x") for spec in specs] == [
        {"Change in bits per byte (percent; left of 0 is worse)"},
        {"Change in bits per byte (percent; left of 0 is worse)"},
        {"Change in accuracy (points; left of 0 is worse)"},
    ]


def test_mixed_units_on_one_axis_are_refused() -> None:
    with pytest.raises(ValueError, match="one role and one unit"):
        charts.forest_plot([made.text_retention(0, 1, "kept"), made.endings_retention(0, 1, "kept")])


def test_a_forest_plot_draws_the_records_own_numbers() -> None:
    spec = charts.forest_plot([made.endings_retention(-1.2, 1.9, "kept")]).to_dict()
    (row,) = rows(spec)
    assert [row[key] for key in ("delta", "low", "high", "limit")] == pytest.approx([-1.2, -3.1, 0.7, -5.0])
    assert row["label"] == "english-endings · ✓ kept"
    assert row["budget"] == "budget 5 points"
    marks = [layer["mark"]["type"] for layer in spec["layer"]]
    assert marks == ["rule", "rule", "point", "text", "tick", "text"]


def test_status_is_told_by_shape_and_words_not_colour_alone() -> None:
    assert set(charts.STATUS_LOOK) == {"gained", "kept", "lost", "forgot", "unclear", "inconclusive", "at chance"}
    by_color: dict[str, set[str]] = {}
    for color, shape in charts.STATUS_LOOK.values():
        by_color.setdefault(color, set()).add(shape)
    shapes = [shape for group in by_color.values() for shape in group]
    assert len(shapes) == len(set(shapes))  # no shape has two colours


def test_a_capability_without_budget_and_an_empty_report_draw() -> None:
    spec = charts.forest_plot([made.text_retention(0, 1, "at chance", budget=None)]).to_dict()
    assert rows(spec)[0]["limit"] is None
    assert charts.forest_plots([]) == []


def test_the_training_charts_name_their_units() -> None:
    curve = made.curve()
    loss = charts.loss_chart(curve).to_dict()
    assert titles(loss, "y") == {"Loss (nats per supervised token)"}
    assert titles(loss, "x") == {"Optimizer step"}
    points = next(iter(loss["datasets"].values()))
    assert len([p for p in points if p["of"] == "training"]) == 40
    assert len([p for p in points if p["of"] == "validation"]) == 9
    assert titles(charts.learning_rate_chart(curve).to_dict(), "y") == {"Learning rate"}
    assert titles(charts.throughput_chart(curve).to_dict(), "y") == {"Tokens per second"}


def test_the_loss_of_retention_texts_is_a_line_of_its_own() -> None:
    curve = [p.model_copy(update={"retention_loss": p.validation_loss}) for p in made.curve()]
    points = next(iter(charts.loss_chart(curve).to_dict()["datasets"].values()))
    assert len([p for p in points if p["of"] == "retention"]) == 9


def test_an_empty_curve_draws() -> None:
    for chart in (charts.loss_chart, charts.learning_rate_chart, charts.throughput_chart):
        drawn = chart([]).to_dict()
        assert [p for points in drawn.get("datasets", {}).values() for p in points] == []
        assert "Optimizer step" in titles(drawn, "x")


def test_a_front_has_both_intervals_the_budget_and_hollow_strengths() -> None:
    sweep = made.sweep()
    spec: Any = charts.front_chart(sweep).to_dict()
    assert titles(spec, "x") == {"Worst loss / budget (right of 100 % is over it)"}
    assert titles(spec, "y") == {"Gain of zh-answers (%)"}
    points = [row for data in spec["datasets"].values() for row in data if "place" in row]
    assert {row["settings"]: row["place"] for row in points} == {
        "learning_rate 0.0001, rank 4": "best",
        "learning_rate 0.001, rank 4": "front, over budget",
        "learning_rate 0.0001, rank 8": "behind",
        "learning_rate 0.0001, rank 4, strength 0.5": "front",
    }
    assert {(row["loss_low"], row["loss"], row["loss_high"]) for row in points if row["scaled"]} == {(0.0, 0.1, 0.2)}
    assert [{"budget": 1.0}] in list(spec["datasets"].values())
    assert [layer["transform"] for layer in spec["layer"][-2:]] == [
        [{"filter": "!datum.scaled"}],
        [{"filter": "datum.scaled"}],
    ]


def test_parallel_coordinates_lead_each_point_through_settings_and_results() -> None:
    spec: Any = charts.parallel_chart(made.sweep()).to_dict()
    (data,) = spec["datasets"].values()
    first = {row["axis"]: (row["at"], row["value"]) for row in data if row["point"] == 0}
    assert first == {
        "train.rank": (0, "4"),
        "train.learning_rate": (0, "0.0001"),
        "gain (%)": (pytest.approx(4 / 24), "+10.00"),
        "worst loss / budget": (pytest.approx(0.3 / 1.8), "+40%"),
    }
    assert {row["at"] for row in data if row["axis"] == "train.rank"} == {0, 1}
    assert all(0 <= row["at"] <= 1 for row in data)
