"""The cost of writing a long target list: python -m tests.benchmarks.export

Compares export_targets for many hosts with a plain json.dump() of the same list. Each run is a new process; the two
alternate. CPU time covers creating and writing the list; memory is the peak growth of the process.
"""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from django_promports.targets import TargetGroup, dump_json, dump_yaml, target_groups, write_file

ROOT = Path(__file__).resolve().parents[2]
HOSTS = (100, 1_000, 10_000)
PORTS = range(19100, 19132)
LABELS = {"site": "shop"}
ROUNDS = 7
# What is required of 10,000 hosts.
RATIO, MEGABYTES = 1.0, 16.0


def main() -> None:
    print("| hosts x ports | | CPU time | / plain | grows by | required |")
    print("|---|---|---|---|---|---|")
    for hosts in HOSTS:
        rounds = [{way: run(way, hosts) for way in WAYS} for _ in range(ROUNDS)]
        for way in WAYS:
            seconds = statistics.median(found[way]["seconds"] for found in rounds)
            ratio = statistics.median(found[way]["seconds"] / found["plain"]["seconds"] for found in rounds)
            grown = statistics.median(found[way]["megabytes"] for found in rounds)
            required = f"at most {RATIO} and {MEGABYTES:.0f} MB" if (way, hosts) == ("json", HOSTS[-1]) else ""
            cells = [f"{hosts:,} x {len(PORTS)}", WAYS[way], f"{seconds:.2f} s", f"{ratio:.2f}", f"{grown:.1f} MB"]
            print("| " + " | ".join([*cells, required]) + " |")


def run(way: str, hosts: int) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.export", way, str(hosts)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, float] = json.loads(done.stdout)
    return found


def measure(way: str, hosts: int) -> None:
    names = [f"web{number}.example.com" for number in range(hosts)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "targets")
        if way == "unchanged":
            write_file(path, lambda: dump_json(make(names)))
        Path("/proc/self/clear_refs").write_text("5")  # man 5 proc: resets the peak
        before, began = memory("VmRSS"), time.process_time()
        if way == "plain":
            targets = [f"{name}:{port}" for name in names for port in PORTS]
            with path.open("w") as file:
                json.dump([{"targets": targets, "labels": LABELS}], file, indent=2, ensure_ascii=False)
        else:
            dump = dump_yaml if way == "yaml" else dump_json
            assert write_file(path, lambda: dump(make(names))) == (way != "unchanged")
        seconds = time.process_time() - began
        grown = (memory("VmHWM") - before) / 1024
    print(json.dumps({"seconds": seconds, "megabytes": grown}))


def make(names: list[str]) -> Iterator[TargetGroup]:
    return target_groups(dict.fromkeys(names, PORTS), labels=LABELS)


def memory(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found
    return int(found[1])


WAYS = {
    "plain": "plain `json.dump`",
    "json": "`export_targets`",
    "unchanged": "`export_targets`, the file is up to date",
    "yaml": "`export_targets --format yaml`",
}

if __name__ == "__main__":
    if len(sys.argv) > 1:
        measure(sys.argv[1], int(sys.argv[2]))
    else:
        main()
