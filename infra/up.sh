#!/bin/sh
# A Prefect server, the cpu work pool, the deployments and a process worker on this machine. Ctrl-C ends them.
set -eu
cd "$(dirname "$0")/.."
export FORGETLESS_HOME="$PWD"
export PREFECT_API_URL="${PREFECT_API_URL:-http://127.0.0.1:4200/api}"
export PREFECT_SERVER_ANALYTICS_ENABLED=false
trap 'trap - EXIT INT TERM; kill 0' EXIT INT TERM
prefect server start &
until python -c "
import sys, httpx, os
try: sys.exit(httpx.get(os.environ['PREFECT_API_URL'] + '/health').status_code != 200)
except httpx.HTTPError: sys.exit(1)"; do sleep 1; done
prefect work-pool inspect cpu >/dev/null 2>&1 || prefect work-pool create cpu --type process
prefect --no-prompt deploy --all
echo "Start a run with: PREFECT_API_URL=$PREFECT_API_URL prefect deployment run finetune/cpu"
prefect worker start --pool cpu
