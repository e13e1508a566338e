"""Page "Runs": every run in the store, newest first."""

import streamlit as st

from dashboards import results
from tasks.core.errors import ForgetlessError

PAGE_SIZE = 20

url = results.store_url()
st.title("Runs", anchor=False)

try:
    names = results.list_runs(url)
except ForgetlessError as error:
    st.error("The store cannot be read.", icon=":material/error:")
    st.code(str(error), language=None, wrap_lines=True)
    st.text("Set FORGETLESS_STORE to a folder, file:///folder or s3://bucket/prefix, and start the dashboard again.")
    st.stop()

with st.container(horizontal=True, vertical_alignment="center"):
    wanted = st.text_input(
        "Find a run", key="find", type="search", placeholder="Find a run", label_visibility="collapsed", width=280
    )
    st.text(url)

found = results.find_runs(names, wanted)
if not names:
    st.info("No runs in this store yet. Start the first one:", icon=":material/rocket_launch:")
    st.code(results.FIRST_COMMAND, language="bash")
elif not found:
    st.text(f"No run's name contains {wanted!r}.")

shown = found[: st.session_state.get("runs_shown", PAGE_SIZE)]
for name in shown:
    card = results.summarise(results.read_run(url, name))
    with st.container(border=True):
        with st.container(horizontal=True, vertical_alignment="center"):
            with st.container(width=130, gap="xxsmall"):
                for badge in card.badges:
                    st.badge(badge.label, icon=badge.icon, color=badge.color)
            st.page_link(
                "app_pages/run.py",
                label=f"**{results.escape_markdown(name)}**",
                icon=":material/chevron_right:",
                icon_position="right",
                query_params={"run": name},
            )
            st.caption(card.when, text_alignment="right")
        with st.container(horizontal=True):
            if card.base:
                with st.container(width=270, gap="xxsmall"):
                    st.text(card.base)
                    st.caption(card.method)
            for figure in (card.gain, card.retention):
                if figure:
                    with st.container(width=350, gap="xxsmall"):
                        st.markdown(f"{results.escape_markdown(figure.label)} **{figure.value}**")
                        st.caption(figure.detail)
            if card.progress:
                st.progress(card.progress.share, text=card.progress.text, width=400)
            if card.problem:
                with st.container(width=700):
                    st.text(card.problem)

if len(found) > len(shown) and st.button(f"Show more ({len(found) - len(shown)} older)"):
    st.session_state["runs_shown"] = len(shown) + PAGE_SIZE
    st.rerun()


@st.fragment(run_every=results.REFRESH_SECONDS)
def rerun_on_change(seen: tuple[str, ...]) -> None:
    if results.pulse(url, shown) != seen:
        st.rerun()


rerun_on_change(results.pulse(url, shown))
