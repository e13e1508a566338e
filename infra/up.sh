#!/bin/sh
# A Prefect server, the work pools, deployments and automations, and process workers on this machine. Ctrl-C ends them.
set -eu
cd "$(dirname "$0")/.."
export FORGETLESS_HOME="$PWD"
export PREFECT_API_URL="${PREFECT_API_URL:-http://127.0.0.1:4200/api}"
export PREFECT_SERVER_ANALYTICS_ENABLED=false
# On SQLite the server logs a traceback whenever two of its writers meet, and tries again: a file is the place for it.
log="${PREFECT_HOME:-$HOME/.prefect}/server.log"
mkdir -p "$(dirname "$log")"
trap 'trap - EXIT INT TERM; kill 0' EXIT INT TERM
prefect server start >"$log" 2>&1 &
server=$!
until python -c "
import sys, httpx, os
try: sys.exit(httpx.get(os.environ['PREFECT_API_URL'] + '/health').status_code != 200)
except httpx.HTTPError: sys.exit(1)"; do
    kill -0 "$server" 2>/dev/null || { tail -5 "$log" >&2; echo "The Prefect server did not start; its log: $log" >&2; exit 1; }
    sleep 1
done
echo "Prefect UI: ${PREFECT_API_URL%/api} (the server's log: $log)"
python infra/bootstrap.py
echo "Start a run with: PREFECT_API_URL=$PREFECT_API_URL prefect deployment run finetune/cpu"
prefect worker start --pool memory &
prefect worker start --pool gpu --limit 1 &
prefect worker start --pool cpu
