#!/bin/sh
# A process worker that can be stopped without loss: infra/worker.sh --pool cpu (and what `prefect worker start` takes)
# Prefect's own, told to end, kills its runs at once, and their training before it has written a checkpoint. Here a stop
# goes to the runs: training writes its checkpoint, the run says that it was terminated, and then the worker ends.
set -u
# A shell lets what it starts in the background ignore SIGINT, by which Prefect's worker ends.
env --default-signal=INT prefect worker start --type process "$@" &
worker=$!

runs() { cat /proc/"$worker"/task/*/children 2>/dev/null; }

stop() {
    trap '' TERM INT
    # Word by word: one signal for each process.
    # shellcheck disable=SC2046
    kill -TERM $(runs) 2>/dev/null
    while [ -n "$(runs)" ]; do sleep 0.2; done
    kill -TERM "$worker"
}
trap stop TERM INT

# `wait` returns when the trap has run, too.
while kill -0 "$worker" 2>/dev/null; do
    wait "$worker"
    code=$?
done
exit "$code"
