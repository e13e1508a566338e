"""Charts of a run, as Altair: measured changes with their intervals and budgets, and the training curve.

They draw what the records say and compute nothing. Colours are Okabe-Ito tones with at least 3:1 against a white and
a near-black page; shape and words always say the same as colour.
"""

import math
from collections.abc import Sequence
from itertools import groupby
from typing import cast

import altair as alt
import pandas as pd

from dashboards.results import (
    MEASURES,
    STATUS_SYMBOLS,
    format_budget,
    format_change,
    format_interval,
    point_place,
)
from tasks.core.records import Delta, TrainPoint
from tasks.core.sweep import Axis, Sweep, describe_values

GREEN, VERMILION, PURPLE, BLUE, GREY = "#009E73", "#D55E00", "#CC79A7", "#2B87C2", "#808080"
STATUS_LOOK = {
    "gained": (GREEN, "triangle-up"),
    "kept": (GREEN, "circle"),
    "lost": (VERMILION, "triangle-down"),
    "forgot": (VERMILION, "cross"),
    "unclear": (PURPLE, "diamond"),
    "inconclusive": (PURPLE, "diamond"),
    "at chance": (GREY, "square"),
}
PLACE_LOOK = {  # of a point of a sweep
    "best": (GREEN, "triangle-up"),
    "front": (BLUE, "circle"),
    "behind": (GREY, "square"),
    "front, over budget": (VERMILION, "cross"),
    "behind, over budget": (PURPLE, "diamond"),
}
ROW_PIXELS, FRAME_PIXELS = 66, 105  # a row; title and axis, which Streamlit counts as part of the height
LABEL_PIXELS = 190  # the same for every forest plot, so that plots under each other line up


def forest_plots(deltas: Sequence[Delta]) -> list[alt.LayerChart]:
    """Return one forest plot per role and unit, targets first. Percent and points never share an axis; neither do gains
    and losses, because a gain of 25 % would press a budget of 1 % into one pixel."""
    order = sorted(deltas, key=lambda d: (d.role != "target", d.unit))
    return [forest_plot(list(group)) for _, group in groupby(order, key=lambda d: (d.role, d.unit))]


def forest_plot(deltas: Sequence[Delta]) -> alt.LayerChart:
    """Return the changes of one role and unit: a point, its 95 % interval, and a tick where the budget ends.
    Raises ValueError if units or roles are mixed."""
    if len({(d.unit, d.role) for d in deltas}) != 1:
        raise ValueError("A forest plot has one role and one unit; use forest_plots for several.")
    unit, role = deltas[0].unit, deltas[0].role
    frame = pd.DataFrame(
        {
            "label": f"{d.name} · {STATUS_SYMBOLS[d.status]} {d.status}",
            "name": d.name,
            "status": d.status,
            "delta": d.delta,
            "low": d.low,
            "high": d.high,
            "limit": None if d.budget is None else -d.budget,
            "change": format_change(d.delta, d.unit),
            "interval": format_interval(d),
            "budget": f"budget {format_budget(d)}" if d.budget is not None else "",
            "measure": MEASURES.get(d.measure, d.measure),
            "n": d.n,
        }
        for d in deltas
    ).astype({"limit": float})
    of = "bits per byte" if unit == "%" else "accuracy"
    words = "percent" if unit == "%" else unit
    y = alt.Y(
        "label:N",
        sort=None,
        title=None,
        axis=alt.Axis(labelLimit=LABEL_PIXELS, minExtent=LABEL_PIXELS, labelBaseline="middle"),
    )
    x_title = f"Change in {of} ({words}; left of 0 is worse)"
    base = alt.Chart(frame).encode(y=y)
    statuses = list(STATUS_LOOK)
    color = alt.Color(
        "status:N", legend=None, scale=alt.Scale(domain=statuses, range=[STATUS_LOOK[s][0] for s in statuses])
    )
    shape = alt.Shape(
        "status:N", legend=None, scale=alt.Scale(domain=statuses, range=[STATUS_LOOK[s][1] for s in statuses])
    )
    tooltip = [
        alt.Tooltip("name:N", title="Capability"),
        alt.Tooltip("measure:N", title="Measure"),
        alt.Tooltip("change:N", title="Change"),
        alt.Tooltip("interval:N", title="95 % interval"),
        alt.Tooltip("budget:N", title="Accepted loss"),
        alt.Tooltip("status:N", title="Status"),
        alt.Tooltip("n:Q", title="Items", format=","),
    ]
    zero = alt.Chart(pd.DataFrame({"zero": [0.0]})).mark_rule(color=GREY, strokeWidth=1.5).encode(x="zero:Q")
    intervals = base.mark_rule(strokeWidth=3, strokeCap="round").encode(
        x=alt.X("low:Q", title=x_title, axis=alt.Axis(tickCount=7), scale=alt.Scale(nice=True, padding=30)),
        x2="high:Q",
        color=color,
        tooltip=tooltip,
    )
    points = base.mark_point(filled=True, size=130, opacity=1).encode(
        x=alt.X("delta:Q", title=x_title), color=color, shape=shape, tooltip=tooltip
    )
    values = base.mark_text(dy=-16, color=GREY, fontSize=12).encode(x="delta:Q", text="change:N")
    layers: list[alt.Chart] = [zero, intervals, points, values]
    if role == "retention":
        budgets = base.transform_filter("isValid(datum.limit)")
        layers += [
            budgets.mark_tick(color=GREY, thickness=3, size=26).encode(
                x=alt.X("limit:Q", title=x_title), tooltip=tooltip
            ),
            budgets.mark_text(dy=20, color=GREY, fontSize=11).encode(x="limit:Q", text="budget:N"),
        ]
    return _layered(layers, f"{role.capitalize()}: change in {of}", FRAME_PIXELS + ROW_PIXELS * len(frame))


def loss_chart(curve: Sequence[TrainPoint]) -> alt.LayerChart:
    """Return the losses by step: of training, of validation, and of retention texts where these are followed; in nats
    per supervised token."""
    frame = pd.DataFrame(
        [
            {"step": p.step, "loss": value, "of": of}
            for p in curve
            for of, value in (("training", p.loss), ("validation", p.validation_loss), ("retention", p.retention_loss))
            if value is not None
        ],
        columns=["step", "loss", "of"],
    )
    series = ["training", "validation", *(["retention"] if any(p.retention_loss is not None for p in curve) else [])]
    legend = alt.Legend(title=None, orient="top", symbolType="stroke", symbolStrokeWidth=2, symbolSize=400)
    base = alt.Chart(frame).encode(
        x=_steps(),
        y=alt.Y("loss:Q", title="Loss (nats per supervised token)", scale=alt.Scale(zero=False)),
        color=alt.Color("of:N", scale=alt.Scale(domain=series, range=[BLUE, VERMILION, GREEN]), legend=legend),
        tooltip=[
            alt.Tooltip("step:Q", title="Step"),
            alt.Tooltip("of:N", title="Loss of"),
            alt.Tooltip("loss:Q", title="Nats per token", format=".4f"),
        ],
    )
    lines = base.mark_line(strokeWidth=2).encode(
        strokeDash=alt.StrokeDash("of:N", scale=alt.Scale(domain=series, range=[[1, 0], [6, 4], [2, 3]]), legend=legend)
    )
    points = base.transform_filter("datum.of != 'training'").mark_point(filled=True, size=60, opacity=1)
    return _layered([lines, points], "Loss", 340)


def front_chart(sweep: Sweep) -> alt.LayerChart:
    """Return a sweep's points with both intervals: gain upwards, the worst loss as a share of its budget to the right,
    a rule where the budget ends, and a line along the front. Strengths of an adapter are hollow."""
    frame = pd.DataFrame(
        {
            "settings": describe_values(point),
            "place": point_place(sweep, number),
            "on_front": point.on_front,
            "scaled": point.strength is not None,
            "worst": point.worst,
            "gain": point.gain.value,
            "gain_low": point.gain.low,
            "gain_high": point.gain.high,
            "loss": point.forgetting.value,
            "loss_low": point.forgetting.low,
            "loss_high": point.forgetting.high,
            "trials": len(point.trials),
        }
        for number, point in enumerate(sweep.points)
    )
    color, shape = _places()
    tooltip = [
        alt.Tooltip("settings:N", title="Settings"),
        alt.Tooltip("place:N", title="Place"),
        alt.Tooltip("gain:Q", title=f"Gain ({sweep.unit})", format="+.2f"),
        alt.Tooltip("loss:Q", title="Loss / budget", format="+.0%"),
        alt.Tooltip("worst:N", title="Of"),
        alt.Tooltip("trials:Q", title="Seeds"),
    ]
    x = alt.X("loss:Q", title="Worst loss / budget (right of 100 % is over it)", axis=alt.Axis(format="+.0%"))
    y = alt.Y("gain:Q", title=f"Gain of {sweep.recipe.eval.primary} ({sweep.unit})", scale=alt.Scale(zero=False))
    base = alt.Chart(frame).encode(color=color, tooltip=tooltip)
    budget = alt.Chart(pd.DataFrame({"budget": [1.0]})).mark_rule(color=GREY, strokeWidth=1.5, strokeDash=[6, 4])
    front = alt.Chart(frame).transform_filter("datum.on_front").mark_line(color=GREY, strokeWidth=1)
    points = base.mark_point(size=130, opacity=1, strokeWidth=2).encode(x=x, y=y, shape=shape)
    layers = [
        budget.encode(x="budget:Q"),
        front.encode(x=x, y=y, order="loss:Q"),
        base.mark_rule(strokeWidth=1.5).encode(x="loss_low:Q", x2="loss_high:Q", y=y),
        base.mark_rule(strokeWidth=1.5).encode(x=x, y="gain_low:Q", y2="gain_high:Q"),
        points.transform_filter("!datum.scaled").encode(fill=color),
        points.transform_filter("datum.scaled"),
    ]
    return _layered(layers, "Gain against forgetting", 420)


def parallel_chart(sweep: Sweep) -> alt.LayerChart:
    """Return parallel coordinates: a line for each point through its settings, its gain and its worst loss, each axis
    from its least value below to its largest above. Values that are no numbers stand in the order of the grid."""
    columns = [(axis.key, [p.values[axis.key] for p in sweep.points]) for axis in sweep.axes]
    heights = [(key, _heights(values, axis)) for (key, values), axis in zip(columns, sweep.axes, strict=True)]
    results = (
        (f"gain ({sweep.unit})", [p.gain.value for p in sweep.points], "+.2f"),
        ("worst loss / budget", [p.forgetting.value for p in sweep.points], "+.0%"),
    )
    columns += [(name, [f"{value:{form}}" for value in values]) for name, values, form in results]
    heights += [(name, _heights(values)) for name, values, _ in results]
    frame = pd.DataFrame(
        {
            "point": number,
            "axis": name,
            "at": at[number],
            "value": str(values[number]),
            "settings": describe_values(point),
            "place": point_place(sweep, number),
        }
        for (name, values), (_, at) in zip(columns, heights, strict=True)
        for number, point in enumerate(sweep.points)
    )
    color, shape = _places()
    base = alt.Chart(frame).encode(
        x=alt.X("axis:N", sort=None, title=None, axis=alt.Axis(labelAngle=0, grid=True)),
        y=alt.Y("at:Q", axis=None, scale=alt.Scale(domain=[-0.05, 1.05])),
        color=color,
        detail="point:N",
        tooltip=[
            alt.Tooltip("settings:N", title="Settings"),
            alt.Tooltip("axis:N", title="Axis"),
            alt.Tooltip("value:N", title="Value"),
            alt.Tooltip("place:N", title="Place"),
        ],
    )
    layers = [
        base.mark_line(strokeWidth=2, opacity=0.8),
        base.mark_point(filled=True, size=70, opacity=1).encode(shape=shape),
        base.mark_text(dx=10, align="left", fontSize=11, color=GREY).encode(text="value:N", color=alt.value(GREY)),
    ]
    return _layered(layers, "Settings and what they gave", 340)


def _places() -> tuple[alt.Color, alt.Shape]:
    """Return the colour and the shape of a point of a sweep by its place, with one legend for both."""
    names = list(PLACE_LOOK)
    legend = alt.Legend(title=None, orient="top", labelLimit=0)
    color, shape = (alt.Scale(domain=names, range=[PLACE_LOOK[name][i] for name in names]) for i in (0, 1))
    return alt.Color("place:N", scale=color, legend=legend), alt.Shape("place:N", scale=shape, legend=legend)


def _heights(values: Sequence[object], axis: Axis | None = None) -> list[float]:
    """Return where values stand on an axis from 0 to 1."""
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        numbers = [cast(float, value) for value in values]
        if axis and axis.log:
            numbers = [math.log(number) for number in numbers]
    else:
        numbers = [float(axis.values.index(value)) if axis and axis.values else 0.0 for value in values]
    low, high = min(numbers, default=0.0), max(numbers, default=0.0)
    return [(number - low) / (high - low) if high > low else 0.5 for number in numbers]


def learning_rate_chart(curve: Sequence[TrainPoint]) -> alt.Chart:
    """Return the learning rate by step."""
    return _line([(p.step, p.learning_rate) for p in curve], "Learning rate", "Learning rate", "~e")


def throughput_chart(curve: Sequence[TrainPoint]) -> alt.Chart:
    """Return the training throughput by step, in tokens per second."""
    return _line([(p.step, p.tokens_per_second) for p in curve], "Throughput", "Tokens per second", ",.0f")


def _line(points: Sequence[tuple[int, float | None]], title: str, unit: str, number: str) -> alt.Chart:
    frame = pd.DataFrame([p for p in points if p[1] is not None], columns=["step", "value"])
    line = alt.Chart(frame, title=alt.Title(title, anchor="start"), height=260).mark_line(color=BLUE, strokeWidth=2)
    encoded: alt.Chart = line.encode(
        x=_steps(),
        y=alt.Y("value:Q", title=unit, axis=alt.Axis(format=number), scale=alt.Scale(zero=True)),
        tooltip=[alt.Tooltip("step:Q", title="Step"), alt.Tooltip("value:Q", title=unit, format=number)],
    )
    return encoded


def _layered(layers: Sequence[alt.Chart], title: str, height: int) -> alt.LayerChart:
    chart = alt.layer(*layers).properties(title=alt.Title(title, anchor="start"), height=height)
    return cast(alt.LayerChart, chart)  # alt.layer gives a FacetChart only for facets


def _steps() -> alt.X:
    return alt.X(
        "step:Q", title="Optimizer step", axis=alt.Axis(tickMinStep=1, tickCount=10), scale=alt.Scale(nice=False)
    )
