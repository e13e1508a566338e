"""Where things are on this machine: read from the environment, never part of a recipe or a digest."""

import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path

from tasks.core.addresses import hide, shown
from tasks.core.errors import ConfigError

STORE_VARIABLE = "FORGETLESS_STORE"
OLLAMA_VARIABLE = "OLLAMA_HOST"
LIMIT_VARIABLE = "FORGETLESS_CACHE_LIMIT"


@dataclass(frozen=True)
class Settings:
    """`store_url`: file:///folder or s3://bucket/prefix. `cache`: folder for local copies of remote artifacts.
    `ollama_url`: base URL of the Ollama server. `dask`: address of a Dask scheduler, or `local`. `cache_limit`: most
    bytes that artifacts may take in the cache, None for any."""

    store_url: str
    cache: Path
    ollama_url: str
    dask: str | None = None
    cache_limit: int | None = None


def read_settings(store: str | None = None) -> Settings:
    """Return the settings of this process; `store` (from the command line) wins over the environment."""
    url = store or os.environ.get(STORE_VARIABLE) or ".forgetless"
    if shown(url) != url:
        raise ConfigError(
            f"The store's address {shown(url)} was given with a user, a password, a query or a fragment, which do not "
            "belong in it. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY instead."
        )
    if "://" not in url:
        url = Path(url).expanduser().absolute().as_uri()
    cache = Path(os.environ.get("FORGETLESS_CACHE") or Path.home() / ".cache" / "forgetless")
    host = os.environ.get(OLLAMA_VARIABLE) or "127.0.0.1:11434"
    dask = os.environ.get("FORGETLESS_DASK") or None
    limit = os.environ.get(LIMIT_VARIABLE)
    return Settings(
        store_url=url.rstrip("/"),
        cache=cache,
        ollama_url=ollama_url(host),
        dask=dask,
        cache_limit=_bytes(limit) if limit else None,
    )


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kMGT]?)(i?)B", text.strip())
    if match is None:
        raise ConfigError(f"{LIMIT_VARIABLE}: expected a size such as 50GB or 500MB, found {text!r}.")
    number, unit, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** " kMGT".index(unit or " "))


def ollama_url(host: str) -> str:
    """Return `host` as a base URL, with Ollama's own defaults for scheme and port, its password hidden."""
    scheme, _, rest = host.rpartition("://")
    name, _, path = rest.partition("/")
    if name.startswith("0.0.0.0"):  # what a server binds to, not what a client can call
        name = name.replace("0.0.0.0", "127.0.0.1", 1)
    if ":" not in name and scheme != "https":
        name += ":11434"
    return hide(f"{scheme or 'http'}://{name}{'/' + path if path else ''}".rstrip("/"))


def quiet_libraries() -> None:
    """Turn off the telemetry, progress bars and notices of our dependencies that a user cannot act on, and let their
    threads share a busy machine.
    Must run before those libraries are imported; what the user has set in the environment stays."""
    for name, value in library_settings().items():
        os.environ.setdefault(name, value)
    logging.getLogger("bitsandbytes").setLevel(
        logging.ERROR
    )  # as it is imported it tells of a kernel it has no need of


def training_settings() -> dict[str, str]:
    """Return the environment variables of a process that trains: its packs rarely have the same shape twice, and
    libraries that keep the code of each would take 0.3 GB more every step."""
    cores = max(2, os.cpu_count() or 1)
    return {
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": str(64 * cores),
        "LRU_CACHE_CAPACITY": "128",
        "MALLOC_ARENA_MAX": str(cores),
    }


def library_settings() -> dict[str, str]:
    """Return the environment variables of `quiet_libraries`."""
    return {
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "DO_NOT_TRACK": "1",
        "GX_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "90",
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
        "STREAMLIT_BROWSER_GATHER_USAGE_STATS": "false",
        "TOKENIZERS_PARALLELISM": "false",
        # Waiting threads yield soon: with another busy process on two cores the default made a step 10 times slower.
        "GOMP_SPINCOUNT": "100000",
        "TRANSFORMERS_VERBOSITY": "error",
        "TQDM_DISABLE": "1",  # lm-eval's and transformers' bars; ours show the same work with its stage
        "BITSANDBYTES_NOWELCOME": "1",
        # oneDNN and torch keep the code of every shape they met, 0.2 MB each. A row of scoring has hundreds.
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "1024",
        "LRU_CACHE_CAPACITY": "1024",
    }
