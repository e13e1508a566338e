"""Start-up stays fast: what deploys, helps and shows imports neither torch nor what belongs to a stage."""

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [p for folder in ("flows", "tasks", "dashboards") for p in sorted((ROOT / folder).rglob("*.py"))]
HEAVY = ("torch", "transformers", "peft", "lm_eval", "great_expectations", "bitsandbytes", "datasets", "llama_cpp")


@pytest.mark.parametrize(
    ("modules", "forbidden"),
    [
        ("flows.cli", (*HEAVY, "prefect", "pydantic", "rich", "numpy")),
        ("flows.plan, flows.screen, flows.doctor", (*HEAVY, "prefect")),
        ("flows.finetune", HEAVY),
        ("dashboards.results, dashboards.charts", (*HEAVY, "prefect")),
        ("tasks.core.config, tasks.core.manifest, tasks.core.store, tasks.core.paired", (*HEAVY, "prefect", "boto3")),
    ],
)
def test_importing_it_does_not_import(modules: str, forbidden: tuple[str, ...]) -> None:
    code = f"import sys\nimport {modules}\nprint(*[m for m in {forbidden!r} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []


def test_help_answers_at_once() -> None:
    started = time.monotonic()
    result = subprocess.run([sys.executable, "-m", "flows.cli", "--help"], capture_output=True, text=True, check=True)
    assert "prove what it gained and what it forgot" in result.stdout
    assert time.monotonic() - started < 5, "half a second on an idle machine; the bound only catches a heavy import"


def imported(path: Path, at_the_top_only: bool) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if at_the_top_only else ast.walk(tree)
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.partition(".")[0])
    return names


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_prefect_stays_in_flows_and_steps_and_heavy_libraries_in_functions(path: Path) -> None:
    place = path.relative_to(ROOT).as_posix()
    if not place.startswith("flows/") and path.name not in ("steps.py", "policy.py"):
        assert "prefect" not in imported(path, at_the_top_only=False)
    if path.name in ("steps.py", "policy.py") or place.startswith(("flows/", "dashboards/", "tasks/core/")):
        assert not imported(path, at_the_top_only=True) & set(HEAVY)


# What could run code that came as data, and why each use of it does not.
JUSTIFIED = {
    (
        "tasks/models/encode.py",
        "pickle",
    ): "a tokenizer on its way to a process of our own, in memory: never from a file",
}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_MODULES = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "code", "xml"}
FORBIDDEN_NAMES = {
    *("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "torch.load", "np.load", "numpy.load"),
    *("os.system", "os.popen", "torch.hub.load", "tarfile.open", "shutil.unpack_archive", "jinja2.Template"),
    *("jinja2.Environment", "pd.read_pickle", "components.html", "st.html"),
}


def uses(tree: ast.AST) -> set[str]:
    """Return what a source does that could run code it was given."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {a.name.partition(".")[0] for a in node.names} & FORBIDDEN_MODULES
        elif isinstance(node, ast.ImportFrom) and node.module:
            top = node.module.partition(".")[0]
            found |= {top} & FORBIDDEN_MODULES
            found |= {f"{node.module}.{a.name}" for a in node.names} & FORBIDDEN_NAMES
        elif isinstance(node, ast.Call):
            options = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
            name = ast.unparse(node.func)
            if name in FORBIDDEN_CALLS or (name in FORBIDDEN_NAMES and options.get("allow_pickle") is not False):
                found.add(name)
            found |= {
                f"{option}=True"
                for option in ("shell", "trust_remote_code", "allow_pickle", "unsafe_allow_html", "weights_only")
                if options.get(option) is (option != "weights_only")
            }
            if name.endswith("from_pretrained") and "Model" in name and options.get("use_safetensors") is False:
                found.add("use_safetensors=False")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_nothing_that_came_as_data_is_run(path: Path) -> None:
    place = path.relative_to(ROOT).as_posix()
    expected = {what for (where, what) in JUSTIFIED if where == place}
    assert uses(ast.parse(path.read_text(encoding="utf-8"))) == expected


@pytest.mark.parametrize(
    "line",
    [
        "eval('1')",
        "torch.load(path)",
        "from pickle import loads",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text)",
        "subprocess.run(text, shell=True)",
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
        "st.markdown(x, unsafe_allow_html=True)",
        "from jinja2 import Template",
    ],
)
def test_the_search_for_what_runs_data_finds_it(line: str) -> None:
    assert uses(ast.parse(line))
    assert not uses(ast.parse("np.load(path, allow_pickle=False)\nyaml.safe_load(x)\nmodel.eval()"))
