"""S3 transfers beside boto3's transfer manager, in turns, against one server that keeps everything in memory."""

import argparse
import contextlib
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tasks.core.digest import content_digest
from tasks.core.s3 import MIB, S3Store
from tasks.core.store import MARKER

AT_LEAST = 0.8
SERVER = """
import time
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
time.sleep(86400)
"""


def measure(size: int, rounds: int, work: Path) -> dict[str, Any]:
    from tasks.core.records import ArtifactRef

    source = work / "source"
    source.mkdir()
    data = os.urandom(size)
    (source / "model.bin").write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    del data
    files = {"model.bin": {"sha256": digest, "size": size}}
    content = content_digest({"model.bin": digest})
    seconds: dict[str, list[float]] = {"upload": [], "boto3_upload": [], "download": [], "boto3_download": []}
    for turn in range(rounds):
        store = S3Store("bench", "", work / f"cache{turn}")
        path = f"artifacts/merged/{turn}"
        ref = ArtifactRef(kind="merged", key=str(turn), uri="s3://bench", content=content, size_bytes=size)
        facts = {"artifact": ref.model_dump(exclude={"uri", "reused"}), "files": files}
        marker = json.dumps(facts).encode()
        steps = {
            "upload": lambda store=store, ref=ref, marker=marker: store.upload(source, ref, marker),
            "boto3_upload": lambda store=store: store.client.upload_file(str(source / "model.bin"), "bench", "peer"),
            "download": lambda store=store, ref=ref: store.local_folder(ref),
            "boto3_download": lambda store=store: store.client.download_file("bench", "peer", str(work / "peer")),
        }
        for name, step in steps.items():
            started = time.monotonic()
            step()
            seconds[name].append(time.monotonic() - started)
        store.delete(path)
        assert store.read_bytes(f"{path}/{MARKER}") is None
    best = {name: statistics.median(found) for name, found in seconds.items()}
    ratios = {name: best[f"boto3_{name}"] / best[name] for name in ("upload", "download")}
    return {"size_bytes": size, "seconds": seconds, "ratios": ratios, "holds": min(ratios.values()) >= AT_LEAST}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    os.environ |= {name: "test" for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}
    server = subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert server.stdout is not None
    os.environ |= {"AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{int(server.stdout.readline())}"}
    os.environ |= {"AWS_DEFAULT_REGION": "us-east-1"}
    with contextlib.ExitStack() as stack:
        stack.callback(server.kill)
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        S3Store("bench", "", work).client.create_bucket(Bucket="bench")
        found = measure(options.mib * MIB, options.rounds, work)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
