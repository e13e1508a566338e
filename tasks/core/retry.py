"""Trying again what failed for a reason that passes: silence, a broken connection, an overloaded server, wrong bytes.

Which errors those are is told by status and kind, so that boto3, httpx and huggingface_hub need not be imported here.
"""

import random
import time
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")

TRIES = 4
LONGEST_WAIT = 20.0  # seconds
PASSING_CODES = {"BadDigest", "IncompleteBody", "RequestTimeout", "SlowDown", "Throttling", "ThrottlingException"}
PASSING_KINDS = {
    *("HTTPClientError", "ConnectionError", "IncompleteReadError", "ResponseStreamingError", "ResponseParserError"),
    *("TransportError", "TimeoutError", "WrongBytes"),  # httpx's, Python's, ours
}
OUT_OF_REACH = {"LocalEntryNotFoundError", "ConnectionError", "NetworkError", "TimeoutException", "RemoteProtocolError"}
"""What the Hub's library, Python, botocore and httpx raise where nothing answered."""


class WrongBytes(Exception):
    """What arrived is not what was sent, by its length or its digest."""


def error_code(error: BaseException) -> tuple[int | None, str]:
    """Return the HTTP status (None: there was no answer) and the service's own word for an error."""
    response: Any = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore's
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return status, str(response.get("Error", {}).get("Code", ""))
    return getattr(response, "status_code", None), ""


def is_passing(error: BaseException) -> bool:
    """Return whether the same request may well succeed a little later."""
    status, code = error_code(error)
    if code and code == str(status) and not str(getattr(error, "operation_name", "")).startswith("Head"):
        return True  # its words were cut off, so that a missing object could be a missing bucket
    if status is not None:
        return status in (408, 429) or (status >= 500 and status != 501) or code in PASSING_CODES
    if is_unknown_host(error):
        return False
    return bool(PASSING_KINDS & {kind.__name__ for kind in type(error).__mro__})


def is_unknown_host(error: BaseException) -> bool:
    """Return whether the server's name has no address. Libraries wrap what the system says, as cause or as a field."""
    found: Any = error
    for _ in range(6):
        if found is None:
            return False
        if type(found).__name__ in ("gaierror", "NameResolutionError"):
            return True
        found = getattr(found, "kwargs", {}).get("error") or found.__cause__ or getattr(found, "reason", None)
    return False


def is_out_of_reach(error: BaseException) -> bool:
    """Return whether an error, or the one that an error of ours was raised for, says that nothing answered or that the
    server is down, and not that what was asked for is absent or closed."""
    cause = error.__cause__ or error.__context__
    for found in (error, *([cause] if cause else [])):
        status, _ = error_code(found)
        if (status or 0) >= 500 or status == 429:
            return True
        if OUT_OF_REACH & {kind.__name__ for kind in type(found).__mro__}:
            return True
    return False


def retried(
    work: Callable[[], T], first_wait: float = 0.5, is_worth: Callable[[BaseException], bool] = is_passing
) -> T:
    """Return what `work` returns, tried up to 4 times while its errors are worth it; raises the last error.

    The waits (seconds) double, and each is drawn from half of it to all of it, so that many clients do not come back at
    once."""
    for attempt in range(TRIES):
        try:
            return work()
        except Exception as error:
            if attempt == TRIES - 1 or not is_worth(error):
                raise
            time.sleep(min(LONGEST_WAIT, first_wait * 2**attempt) * random.uniform(0.5, 1))
    raise AssertionError("unreachable")
