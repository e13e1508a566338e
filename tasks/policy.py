"""How tasks are retried: transient failures with backoff, a user's mistake never."""

from typing import Any

from prefect.cache_policies import NO_CACHE

from tasks.core.errors import ForgetlessError


def is_transient(task: Any, task_run: Any, state: Any) -> bool:
    """Return whether the failure may pass: network and operating-system errors, except those a user must mend."""
    error = state.result(raise_on_failure=False)
    return isinstance(error, OSError | TimeoutError) and not isinstance(error, ForgetlessError)


# The artifact store's commit marker is the one memo, so Prefect's own result cache stays out of it.
STAGE_OPTIONS: dict[str, Any] = {
    "cache_policy": NO_CACHE,
    "persist_result": False,
    "retries": 2,
    "retry_delay_seconds": [2, 10],
    "retry_jitter_factor": 0.5,
    "retry_condition_fn": is_transient,
}

# A transaction is rolled back by a failed attempt alone, even by one that would be retried.
ONCE_OPTIONS: dict[str, Any] = {**STAGE_OPTIONS, "retries": 0}
