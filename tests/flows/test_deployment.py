"""`prefect deploy --all` and `prefect deployment run` on a real server with a real process worker."""

import json
from pathlib import Path

import pytest

from tasks.core.manifest import read_manifest
from tasks.core.store import FileStore
from tests.flows.servers import prefect_server
from tests.flows.test_finetune import recipe  # noqa: F401 - the tiny recipe is the fixture's

pytestmark = pytest.mark.slow


def test_a_deployed_run_goes_through_a_worker(recipe: Path, tmp_path: Path) -> None:  # noqa: F811
    store = FileStore(tmp_path / "store")
    with prefect_server(tmp_path, FORGETLESS_STORE=str(store.root)) as server:
        server.prefect("work-pool", "create", "cpu", "--type", "process")
        deployed = server.prefect("deploy", "--all")
        assert "finetune/cpu" in deployed and "combine/cpu" in deployed
        server.worker("cpu")
        shown = server.prefect("deployment", "run", "finetune/cpu", "-p", f"recipe={recipe}", "--watch")
        assert "Completed" in shown or "completed" in shown
        manifest = read_manifest(store, "latest")
        assert manifest.status == "completed"
        assert manifest.report.verdict in {"promote", "reject", "inconclusive"}
        assert manifest.flow_run_id
        again = ["-p", f"recipe={recipe}", "-p", 'overrides=["train.rank=2", "train.seed=7"]']
        server.prefect("deployment", "run", "finetune/cpu", *again, "--watch")
        combination = json.dumps({"runs": [manifest.run_id, "latest"], "weights": [0.5, 0.5]})
        asked = ["-p", f"combination={combination}", "-p", "name=mixed"]
        server.prefect("deployment", "run", "combine/cpu", *asked, "--watch")
        combined = read_manifest(store, "latest")
        assert combined.run_id.startswith("mixed-")
        assert combined.status == "completed"
        assert combined.stages["before"].status == "reused"
        assert combined.adapter.rank == 6
