"""Page "Run": one run in full. The query parameter `run` names it; a select box changes it."""

import streamlit as st

from dashboards import charts, results
from tasks.core.errors import ForgetlessError

url = results.store_url()
wanted = st.query_params.get("run")

try:
    names = results.list_runs(url)
except ForgetlessError as error:
    st.error("The store cannot be read.", icon=":material/error:")
    st.code(str(error), language=None, wrap_lines=True)
    st.stop()

if not names:
    st.info("No runs in this store yet. Start the first one:", icon=":material/rocket_launch:")
    st.code(results.FIRST_COMMAND, language="bash")
    st.stop()


def choose() -> None:
    st.query_params["run"] = st.session_state["chosen"]


# The query parameter is the truth; the select box follows it, and writes it back when it is changed by hand.
name = results.choose_run(names, wanted)
st.session_state["chosen"] = name
index = 0 if name else None  # with None the box can be cleared, which only an unknown run needs
st.selectbox("Run", names, index=index, key="chosen", on_change=choose, placeholder="Choose a run", width=460)
if name is None:
    st.warning("There is no such run in this store. Choose another one above, or list them with: forgetless runs")
    st.code(wanted or "", language=None, wrap_lines=True)
    st.text(url)
    st.stop()
st.query_params["run"] = name


@st.fragment(run_every=results.REFRESH_SECONDS)
def rerun_on_change(shown: str, seen: tuple[str, ...]) -> None:
    if results.pulse(url, [shown]) != seen:
        st.rerun()


rerun_on_change(name, results.pulse(url, [name]))

run = results.read_run(url, name)
if run.manifest is None:
    st.warning("This run cannot be shown.", icon=":material/broken_image:")
    st.code(run.problem, language=None, wrap_lines=True)
    st.text(results.advice_for_unreadable(url, name))
    st.stop()
manifest = run.manifest

# The verdict, and why

with st.container(horizontal=True, vertical_alignment="center"):
    for badge in results.badges(manifest):
        st.header(f":{badge.color}[{badge.icon} {badge.label}]", anchor=False, width="content")
with st.container(gap="xsmall"):
    if manifest.report:
        st.text(manifest.report.reason)
    if manifest.recipe.description:
        st.text(manifest.recipe.description)
    st.caption(results.describe_run(manifest))
if manifest.sweep:
    label = f"A trial of the sweep **{results.escape_markdown(manifest.sweep)}**, which exports nothing"
    st.page_link("app_pages/sweep.py", label=label, query_params={"sweep": manifest.sweep})
for note in manifest.notes:
    st.info(results.escape_markdown(note))

if manifest.status == "failed":
    st.error(results.describe_failure(manifest), icon=":material/error:")
    st.code(manifest.error or "No error was recorded.", language=None, wrap_lines=True)
if manifest.status == "running":
    progress = results.progress(manifest)
    st.progress(progress.share, text=progress.text)
    st.caption("This page follows the run. If it was interrupted, start it again: what has finished is not done twice.")

changes, training, data, export, record = st.tabs(["Changes", "Training", "Data", "Export", "Record"], key="part")

with changes:
    if manifest.report is None:
        st.text("Nothing is compared yet: this needs the scores of the base and of the adapter.")
    else:
        for chart in charts.forest_plots(manifest.report.capabilities):
            st.altair_chart(
                chart, alt="Measured changes with 95 % intervals and budgets; the table below has the numbers"
            )
        st.caption(
            "Point: the change. Bar: its 95 % interval. Tick: the accepted loss (budget); a bar that stays right of it "
            "is kept. Below 0 is always worse."
        )
        st.dataframe(
            results.delta_table(manifest.report.capabilities),
            hide_index=True,
            column_config=results.DELTA_COLUMNS,
            alt="Changes by capability",
        )
        if manifest.report.tasks:
            with st.expander("By task"):
                st.dataframe(
                    results.delta_table(manifest.report.tasks),
                    hide_index=True,
                    column_config=results.DELTA_COLUMNS,
                    alt="Changes by task",
                )

with training:
    if manifest.adapter is not None:
        curve = getattr(manifest.adapter, "curve", [])  # what is combined was not trained
        st.text(results.describe_training(manifest.adapter))
        for note in manifest.adapter.notes:
            st.info(results.escape_markdown(note))
    else:
        curve = results.read_live_curve(url, manifest.run_id) if results.is_training(manifest) else []
        st.text(f"Step {curve[-1].step:,} so far." if curve else "No adapter is trained yet.")
    if curve:
        st.altair_chart(charts.loss_chart(curve), alt="Training and validation loss by optimizer step")
        rate, throughput = st.columns(2)
        rate.altair_chart(charts.learning_rate_chart(curve), alt="Learning rate by optimizer step")
        throughput.altair_chart(charts.throughput_chart(curve), alt="Tokens per second by optimizer step")

with data:
    if manifest.combine:
        st.text("This run combines others: it reads no training data.")
    elif manifest.dataset is None:
        st.text("No data has been read yet.")
    else:
        st.text(results.describe_rows(manifest.dataset))
        st.dataframe(
            results.row_table(manifest.dataset), hide_index=True, width="content", alt="Rows by fate and reason"
        )
        st.code("\n".join(manifest.dataset.sources), language=None, wrap_lines=True)
    if manifest.data_report is None and not manifest.combine:
        st.text("The data has not been checked yet.")
    if manifest.data_report is not None:
        st.subheader("Checks passed" if manifest.data_report.passed else "Checks failed", anchor=False)
        st.dataframe(results.check_table(manifest.data_report), hide_index=True, alt="Data checks with their severity")
    if manifest.tokens is not None:
        st.subheader("Tokens as they are learned", anchor=False)
        st.dataframe(results.check_table(manifest.tokens), hide_index=True, alt="Checks of the tokenised rows")

with export:
    if manifest.gguf is None:
        st.text("Nothing is exported yet.")
    else:
        st.dataframe(
            results.file_table(manifest.gguf, manifest.recipe.export.serve, manifest.proof),
            hide_index=True,
            alt="Exported files with size and sha256",
        )
        if manifest.merge_choice:
            st.caption(f"Merged {manifest.merge_choice.summary}.")
        st.subheader(results.describe_sample(manifest.gguf), anchor=False)
        with st.chat_message("user", avatar=":material/person:"):
            st.text(manifest.gguf.prompt)
        with st.chat_message("assistant", avatar=":material/smart_toy:"):
            st.text(manifest.gguf.sample)
    state, command = results.ollama_state(manifest)
    st.subheader("Ollama", anchor=False)
    st.text(state)
    if manifest.gguf:
        st.code(command, language="bash")

with record:
    st.subheader("Stages", anchor=False)
    st.dataframe(results.stage_table(manifest), hide_index=True, height="content", alt="Stages with status and time")
    st.subheader("Artifacts", anchor=False)
    st.dataframe(results.artifact_table(manifest), hide_index=True, height="content", alt="Where each artifact lies")
    st.subheader("Settings", anchor=False)
    st.code(results.recipe_yaml(manifest), language="yaml", height=400)
    st.subheader("Environment", anchor=False)
    st.dataframe(results.environment_table(manifest), hide_index=True, width="content", alt="Versions and machine")
