"""Page "Sweeps": one sweep's front of gain against forgetting. The query parameter `sweep` names it."""

import streamlit as st

from dashboards import charts, results
from tasks.core.errors import ForgetlessError

url = results.store_url()
wanted = st.query_params.get("sweep")

try:
    names = results.list_sweeps(url)
except ForgetlessError as error:
    st.error("The store cannot be read.", icon=":material/error:")
    st.code(str(error), language=None, wrap_lines=True)
    st.stop()

if not names:
    st.info("No sweeps in this store yet. Start the first one:", icon=":material/rocket_launch:")
    st.code(results.FIRST_SWEEP, language="bash")
    st.stop()


def choose() -> None:
    st.query_params["sweep"] = st.session_state["chosen_sweep"]


name = results.choose_run(names, wanted)
st.session_state["chosen_sweep"] = name
index = 0 if name else None
st.selectbox("Sweep", names, index=index, key="chosen_sweep", on_change=choose, placeholder="Choose a sweep", width=460)
if name is None:
    st.warning("There is no such sweep in this store. Choose another one above.")
    st.code(wanted or "", language=None, wrap_lines=True)
    st.stop()
st.query_params["sweep"] = name


@st.fragment(run_every=results.REFRESH_SECONDS)
def rerun_on_change(shown: str, seen: str) -> None:
    if results.sweep_pulse(url, shown) != seen:
        st.rerun()


rerun_on_change(name, results.sweep_pulse(url, name))

sweep = results.read_sweep(url, name)
if isinstance(sweep, str):
    st.warning("This sweep cannot be shown.", icon=":material/broken_image:")
    st.code(sweep, language=None, wrap_lines=True)
    st.stop()

badge = results.sweep_badge(sweep)
st.header(f":{badge.color}[{badge.icon} {badge.label}]", anchor=False)
with st.container(gap="xsmall"):
    if sweep.reason:
        st.text(sweep.reason)
    st.caption(results.escape_markdown(results.describe_sweep(sweep)))
if sweep.status == "failed":
    st.error("This sweep stopped. The same command goes on from there.", icon=":material/error:")
    st.code(sweep.error or "No error was recorded.", language=None, wrap_lines=True)
if sweep.status == "running":
    st.caption("This page follows the sweep. If it was interrupted, the same command goes on from there.")
if sweep.command:
    st.text("Export the best, with nothing trained again:")
    st.code(sweep.command, language="bash", wrap_lines=True)

front, trials = st.tabs(["Front", "Trials"], key="sweep_part")

with front:
    if not sweep.points:
        st.text("No trial is finished yet.")
    else:
        st.altair_chart(
            charts.front_chart(sweep), alt="Gain against forgetting with intervals; the table below has the numbers"
        )
        st.caption(
            "Each point: settings, on the half of the items that chooses, with 95 % intervals. Right of the dashed "
            "line is over budget. Hollow: the best adapter, scaled."
        )
        st.dataframe(results.point_table(sweep), hide_index=True, alt="Points with gain and forgetting")
        st.altair_chart(charts.parallel_chart(sweep), alt="Settings, gain and forgetting of each point")
    if sweep.confirmed:
        st.subheader("The best on the other half of the items", anchor=False)
        st.dataframe(
            results.delta_table(sweep.confirmed),
            hide_index=True,
            column_config=results.DELTA_COLUMNS,
            alt="Changes by capability of the best",
        )
    if sweep.differences:
        st.subheader("The rest of the front beside it", anchor=False)
        st.dataframe(results.difference_table(sweep), hide_index=True, alt="Differences from the best")
    if sweep.importance:
        st.subheader("What matters", anchor=False)
        st.caption("Share of the variance between points that lies between a key's values.")
        st.dataframe(results.importance_table(sweep), hide_index=True, width="content", alt="Importance of each key")

with trials:
    st.dataframe(results.trial_table(sweep), hide_index=True, height="content", alt="Trials with their ends and runs")
    run = next((trial.run for trial in sweep.trials if sweep.run and trial.run == sweep.run), None)
    if run:
        st.page_link(
            "app_pages/run.py",
            label=f"**{results.escape_markdown(run)}**",
            icon=":material/chevron_right:",
            icon_position="right",
            query_params={"run": run},
        )
