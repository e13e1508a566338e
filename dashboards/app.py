"""The dashboard: what each run gained and forgot, read from the store alone.

Start it with `forgetless dashboard`, or `python -m streamlit run dashboards/app.py`; FORGETLESS_STORE says which store.
"""

import streamlit as st

from tasks.core.settings import quiet_libraries

# A page's Material icon would be fetched from Google as the tab's icon; an SVG of our own keeps the dashboard offline.
ICON = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16">
<rect width="16" height="16" rx="4" fill="#0072B2"/>
<path d="M3 10h10M6 7v6M10.5 3.5v6" stroke="#fff" stroke-width="1.6" stroke-linecap="round"/>
</svg>"""

quiet_libraries()
st.set_page_config(page_title="forgetless", page_icon=ICON, layout="wide")
st.navigation(
    [
        st.Page(
            "app_pages/runs.py",
            title="Runs",
            icon=":material/list:",
            help="Every run in the store, newest first: its verdict, what it gained and what it lost most of.",
            default=True,
        ),
        st.Page(
            "app_pages/run.py",
            title="Run",
            icon=":material/science:",
            url_path="run",
            help="One run in full: the measured changes, the training curve, the data, the exported files, the record.",
        ),
        st.Page(
            "app_pages/sweep.py",
            title="Sweeps",
            icon=":material/scatter_plot:",
            url_path="sweep",
            help="What settings were tried: the front of gain against forgetting, its best point, and what matters.",
        ),
    ],
    position="top",
).run()
