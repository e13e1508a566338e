#!/bin/sh
# A Prefect server, all that bootstrap.py makes, and a worker for each pool, on this machine. Ctrl-C ends them, the
# workers first: their runs leave a checkpoint.
set -eu
cd "$(dirname "$0")/.."
export FORGETLESS_HOME="$PWD"
export PREFECT_API_URL="${PREFECT_API_URL:-http://127.0.0.1:4200/api}"
export PREFECT_SERVER_ANALYTICS_ENABLED=false
# On SQLite the server logs a traceback whenever two of its writers meet, and tries again: a file is the place for it.
log="${PREFECT_HOME:-$HOME/.prefect}/server.log"
mkdir -p "$(dirname "$log")"
workers=
end() {
    trap - EXIT INT TERM
    if [ -n "$workers" ]; then
        # shellcheck disable=SC2086
        kill $workers 2>/dev/null || true
        # shellcheck disable=SC2086
        wait $workers || true
    fi
    kill "$server"
}
trap end EXIT INT TERM
setsid prefect server start >"$log" 2>&1 &
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
# Each in a session of its own, which a terminal's Ctrl-C does not reach.
for pool in "gpu --limit 1" memory cpu; do
    # shellcheck disable=SC2086
    setsid infra/worker.sh --pool $pool &
    workers="$workers $!"
done
wait
