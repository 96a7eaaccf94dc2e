"""vlpack beside its peers, on the same works in one run: the time to the first token, a later token, memory.

Every round asks each of them once, so that what else the machine does falls on all; figures are the best of the rounds,
ratios are to the fastest peer. Peers that are not given are left out. How to make their models: docs/benchmarks.md.

Usage: python benchmarks/compare.py --vlpack PACKAGE [PACKAGE ...] [--upstream FOLDER] [--llama FILE.gguf --node FOLDER]
       [--openvino FOLDER --openvino-python PYTHON] [--works 512 2048 640x480 ...] [--rounds 3] [--output result.json]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from vlpack.benchmark import machine

PEERS = Path(__file__).parent / "peers"


def commands(given: argparse.Namespace) -> dict[str, tuple[list[str], str | None]]:
    """Name → command, to which works are added, and the folder it runs in."""
    options = [str(given.threads), str(given.new_tokens), "1"]
    made: dict[str, tuple[list[str], str | None]] = {}
    for package in given.vlpack:
        made[f"vlpack {package.name}"] = ([sys.executable, __file__, "--one", str(package), *options], None)
    if given.upstream:
        made["upstream int4"] = ([sys.executable, str(PEERS / "upstream_model.py"), given.upstream, *options], None)
    if given.llama:
        command = ["node", str(PEERS / "llama_cpp.mjs"), os.path.abspath(given.llama), *options]
        made["llama.cpp Q4_0"] = (command, given.node)
    if given.openvino:
        command = [given.openvino_python, str(PEERS / "openvino_model.py"), given.openvino, *options]
        made["OpenVINO GenAI int4"] = (command, None)
    return made


def one(arguments: list[str]) -> None:
    """vlpack in the form of the peers' scripts: PACKAGE THREADS NEW_TOKENS REPEAT WORK …"""
    from vlpack.benchmark_work import work

    package, threads, new, repeat, *works = arguments
    found = []
    for name in works:
        asked: dict[str, Any] = {"package": package, "threads": int(threads), "new": int(new), "repeat": int(repeat)}
        asked |= {"image": tuple(map(int, name.split("x")))} if "x" in name else {"tokens": int(name)}
        found.append({"name": name if "x" in name else f"{name} tokens", **work(asked)})
    print(json.dumps({"load": found[0]["load"], "works": found}))


def measure(command: list[str], folder: str | None, name: str) -> dict[str, Any] | None:
    done = subprocess.run([*command, name], cwd=folder, capture_output=True, text=True, check=False, timeout=1800)
    try:
        found = json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        print(f"{command[1]}: {name}: {done.stderr.strip()[-300:]}", file=sys.stderr)
        return None
    work = found["works"][0]
    first = min(work.get("first_token") or work["prefill"])
    return {"first": first, "token": min(work["token"]), "resident": work["resident"], "load": found["load"]}


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        one(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vlpack", type=Path, nargs="+", required=True)
    parser.add_argument("--upstream")
    parser.add_argument("--llama")
    parser.add_argument("--node", default=".")
    parser.add_argument("--openvino")
    parser.add_argument("--openvino-python", default=sys.executable)
    parser.add_argument("--works", nargs="+", default=["512", "2048", "4096", "640x480", "1024x768"])
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    results: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for _ in range(given.rounds):
        for work in given.works:
            for name, (command, folder) in commands(given).items():
                if "x" in work and name.startswith(("upstream", "llama")):  # which have no images here
                    continue
                if (found := measure(command, folder, work)) is not None:
                    results.setdefault(work, {}).setdefault(name, []).append(found)
    if given.output:
        given.output.write_text(json.dumps({"machine": machine(), "results": results}, indent=1), encoding="utf-8")
    print(table(results))


def table(results: dict[str, dict[str, list[dict[str, Any]]]]) -> str:
    heads = ("work", "who", "first token, s", "of best peer", "a token, ms", "of best peer", "resident, GB", "load, s")
    lines = ["| " + " | ".join(heads) + " |"]
    lines.append("|" + " --- |" * 8)
    for work, rows in results.items():
        best = {who: {key: min(run[key] for run in runs) for key in runs[0]} for who, runs in rows.items()}
        peers = [figures for who, figures in best.items() if not who.startswith("vlpack")]
        for who, figures in best.items():
            ratios = {
                key: f"{figures[key] / min(peer[key] for peer in peers):.2f}" if peers else "-"
                for key in ("first", "token")
            }
            cells = (
                work, who, f"{figures['first']:.2f}", ratios["first"], f"{1e3 * figures['token']:.1f}",
                ratios["token"], f"{figures['resident'] / 1e9:.2f}", f"{figures['load']:.1f}",
            )  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
