"""The annotation engine beside what a user would write, on a server with known faults. One command, ten minutes:

    python benchmarks/annotate.py [--quick] [--only faults throughput limits kills restart] [--write]

Each measurement has a server of its own, a process on the loopback address. `--write` puts the tables into
docs/benchmarks.md; `--quick` only shows that everything runs.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import yaml

from clients import Job, cpu_s, peak_mib
from pages import ROOT, Row, table, where, write
from sp2dpo.annotate.teacher import body_of
from sp2dpo.calls import Cell, open_calls, open_ledger
from sp2dpo.errors import RunDirError
from sp2dpo.pairs import read_pairs
from sp2dpo.process import load_process
from sp2dpo.runs import Run, open_run
from sp2dpo.stages import prepare_run

sys.path.insert(0, str(ROOT / "tests"))

from fault_server import FaultServer, fault_server, question_key
from faults import cures, judgement

ANNOTATORS: Final = ("first", "second", "third")
VARIANTS: Final = ("v1", "v2", "v3")
CLIENTS: Final = {"bare": "bare aiohttp, until valid", "script": "AsyncOpenAI script", "sp2dpo": "sp2dpo"}
WORDS: Final = ("the", "of", "sea", "what", "model", "answer", "because", "three", "never", "water", "letter", "story")
KINDS: Final = cures("mend", "retry")
"""Every fault after which a question can still be answered."""

RETRIES: Final = 10
DELAY: Final = 0.1


@dataclass(frozen=True)
class Work:
    """Pairs, a process that asks a server about them, and the prepared run."""

    folder: Path
    server: FaultServer
    run: Run
    annotators: Sequence[str]

    def questions(self) -> Iterator[dict[str, Any]]:
        """Every question of the panel: its cell and the body of its request."""
        process = self.run.process
        pairs = read_pairs(self.run.pairs, "").to_pylist()
        for annotator in process.settings.panel.annotators:
            params = process.sent(annotator.name)["params"]
            for pair in pairs:
                for variant in process.settings.panel.variants:
                    body = body_of(annotator.kind, annotator.model, process.pack, pair, (variant,), params)[1]
                    yield {"cell": [pair["pair_id"], annotator.name, variant], "body": body}

    def job(self, **more: Any) -> Job:
        """What a client needs to know."""
        known: dict[str, Any] = {
            "base_url": self.server.base_url,
            "questions": str(self.folder / "questions.jsonl"),
            "answers": str(self.folder / "answers.jsonl"),
            "process": str(self.folder / "process.yaml"),
            "run_dir": str(self.run.path),
            "annotators": len(self.annotators),
            "concurrency": 24,
            "retries": RETRIES,
            "timeout": 2.0,
            "delay": DELAY,
        }
        return Job(**(known | more))

    def right_and_wrong(self, client: str) -> tuple[int, int]:
        """How many answers a client got, and how many of them are not what the server means."""
        meant = {tuple(q["cell"]): tuple(judgement(question_key(q["body"])).values()) for q in self.questions()}
        if client == "sp2dpo":
            with open_calls(self.run.calls) as log:
                got = {call.cell: (call.category, call.magnitude, call.confidence) for call in log.answers()}
        else:
            with (self.folder / "answers.jsonl").open() as lines:
                rows = [json.loads(line) for line in lines]
            got = {tuple(row["cell"]): (row["category"], row["magnitude"], row["confidence"]) for row in rows}
        wrong = sum(meant[cell] != gap for cell, gap in got.items())
        return len(got) - wrong, wrong


def filler(seed: str, words: int) -> str:
    """So many words, the same for the same seed."""
    dice = random.Random(seed)
    return " ".join(dice.choices(WORDS, k=words))


def make_work(
    folder: Path, server: FaultServer, pairs: int, annotators: Sequence[str] = ANNOTATORS, timeout: float = 2.0
) -> Work:
    """Prepare a run of so many pairs."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "pairs.jsonl").open("w") as lines:
        for i in range(pairs):
            texts = {part: f"{i} {filler(f'{i}{part}', 120)}" for part in ("prompt", "chosen", "rejected")}
            lines.write(json.dumps(texts) + "\n")
    panel = {
        "variants": list(VARIANTS),
        "annotators": [{"name": name, "model": f"model-{name}", "base_url": server.base_url} for name in annotators],
        "decoding": {"timeout": timeout, "retry_attempts": RETRIES, "retry_delay_base": DELAY},
    }
    process = {"name": "benchmark", "data": {"source": "pairs.jsonl"}, "panel": panel}
    (folder / "process.yaml").write_text(yaml.safe_dump(process), encoding="utf-8")
    run = open_run(load_process(folder / "process.yaml"), folder / "run")
    prepare_run(run)
    return Work(folder, server, run, annotators)


def run_client(client: str, work: Work, job: Job) -> Row:
    """Run a client in a process of its own until it ends."""
    if client != "sp2dpo":
        with Path(job.questions).open("w") as lines:
            lines.writelines(json.dumps(question) + "\n" for question in work.questions())
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "clients.py"),
        client,
        str(job.write(work.folder / "job.json")),
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return dict(json.loads(done.stdout))


# Faults -------------------------------------------------------------------------------------------------------------


def faults(folder: Path, quick: bool) -> Iterator[Row]:
    """540 answers, 50 ms, 24 calls in flight, ten retries. 45 % of the requests meet one of 26 faults."""
    pairs = 6 if quick else 60
    for client, name in CLIENTS.items():
        with fault_server(latency_ms=50, fault_rate=0.45, faults=KINDS, faults_per_question=5) as server:
            work = make_work(folder / client, server, pairs)
            took = run_client(client, work, work.job())
            stats = server.stats()
            right, wrong = work.right_and_wrong(client)
        yield {
            "client": name,
            "answers": f"{right:,} of {pairs * 9:,}",
            "wrong answers": wrong,
            "requests": f"{stats['requests']:,}",
            "ideal requests": f"{stats['ideal_requests']:,}",
            "beyond ideal": f"{stats['requests'] / stats['ideal_requests'] - 1:.1%}",
            "seconds": f"{took['seconds']:.1f}",
        }


# Throughput ---------------------------------------------------------------------------------------------------------


def throughput(folder: Path, quick: bool) -> Iterator[Row]:
    """No faults, 50 ms; the best of 30, 60, 120 and 240 calls in flight, for each client."""
    pairs = 10 if quick else 500
    best: dict[str, Row] = {}
    for concurrency in (30,) if quick else (30, 60, 120, 240):
        for client in CLIENTS:
            with fault_server(latency_ms=50) as server:
                work = make_work(folder / f"{client}-{concurrency}", server, pairs, timeout=30.0)
                took = run_client(client, work, work.job(concurrency=concurrency, timeout=30.0))
                assert server.stats()["answered"] == pairs * 9
            if client not in best or took["seconds"] < best[client]["seconds"]:
                best[client] = took | {"in flight": concurrency}
    for client, took in best.items():
        yield {
            "client": CLIENTS[client],
            "calls": f"{pairs * 9:,}",
            "in flight": took["in flight"],
            "calls a second": f"{pairs * 9 / took['seconds']:,.0f}",
            "share of the script": f"{best['script']['seconds'] / took['seconds']:.2f}",
            "CPU ms a call": f"{took['cpu_s'] / pairs / 9 * 1000:.2f}",
            "peak MiB": f"{took['peak_mib']:.0f}",
        }


# Rate limits --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """What a server had admitted and turned away at a time."""

    at: float
    admitted: int
    refused: int


def watch(server: FaultServer, samples: list[Sample], done: threading.Event) -> None:
    """Note what a server does, until told to stop."""
    while not done.wait(0.1):
        stats = server.stats()
        samples.append(Sample(time.monotonic(), stats["requests"], stats["by_kind"].get("limit", 0)))


def share(samples: Sequence[Sample], rpm: float) -> str:
    """Share of the limit that was used between the first and the last of these samples."""
    first, last = samples[0], samples[-1]
    return f"{(last.admitted - first.admitted) / (last.at - first.at) * 60 / rpm:.1%}"


def limited(folder: Path, client: str, told: bool, headers: bool, retry_after: bool, quick: bool) -> Row:
    """One client at one server with a limit."""
    rpm, minutes = 600, 0.05 if quick else 2.0
    options = {"rpm": rpm, "limit_headers": headers, "limit_retry_after": retry_after, "latency_ms": 50}
    samples: list[Sample] = []
    done = threading.Event()
    with fault_server(**options) as server:
        work = make_work(folder, server, int(rpm * minutes / len(VARIANTS)), ["only"])
        watcher = threading.Thread(target=watch, args=(server, samples, done))
        watcher.start()
        try:
            run_client(client, work, work.job(concurrency=8, rpm=rpm if told else None))
        finally:
            time.sleep(0.2)
            done.set()
            watcher.join()
        right, _ = work.right_and_wrong(client)
    samples = [sample for sample in samples if sample.admitted > 0]
    samples = samples[: 1 + next(i for i, sample in enumerate(samples) if sample.admitted == samples[-1].admitted)]
    half = [sample for sample in samples if sample.admitted >= samples[-1].admitted / 2]
    return {
        "client": CLIENTS[client],
        "knows the limit from": "a flag" if told else "headers" if headers else "429s",
        "Retry-After": "yes" if retry_after else "no",
        "answers": f"{right:,} of {int(rpm * minutes / 3) * 3:,}",
        "share of the limit": share(samples, rpm),
        "in the second half": share(half, rpm),
        "429s": samples[-1].refused,
        "429s in the second half": half[-1].refused - half[0].refused,
        "seconds": f"{samples[-1].at - samples[0].at:.0f}",
    }


def limits(folder: Path, quick: bool) -> Iterator[Row]:
    """600 requests a minute, eight calls in flight, two minutes of work; all at once, each at a server of its own."""
    cases = [
        ("bare", False, False, True),
        ("script", False, False, True),
        ("sp2dpo", True, False, True),
        ("sp2dpo", False, True, True),
        ("sp2dpo", False, False, True),
        ("sp2dpo", False, False, False),
    ]
    with ThreadPoolExecutor(len(cases)) as pool:
        yield from pool.map(lambda i: limited(folder / str(i), *cases[i], quick), range(len(cases)))


# Kills --------------------------------------------------------------------------------------------------------------


def start(work: Work, *more: str) -> subprocess.Popen[bytes]:
    """`sp2dpo annotate`, as a user types it; returns at its first request, or at its end."""
    sp2dpo = str(Path(sys.executable).with_name("sp2dpo"))
    command = [sp2dpo, "annotate", str(work.folder / "process.yaml"), "--run-dir", str(work.run.path), *more]
    asked = work.server.stats()["requests"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while work.server.stats()["requests"] == asked and process.poll() is None:
        time.sleep(0.02)
    return process


def answered(run: Run) -> set[Cell]:
    """Questions that the call log has a valid answer to."""
    try:
        with open_calls(run.calls) as log:
            return {call.cell for call in log.answers()}
    except RunDirError:
        return set()


def kills(folder: Path, quick: bool) -> Iterator[Row]:
    """kill -9 at random moments and the same command again; 50 ms, 24 calls in flight."""
    pairs, most = (60, 3) if quick else (400, 20)
    dice = random.Random(0)
    killed = again = 0
    with fault_server(latency_ms=50) as server:
        work = make_work(folder, server, pairs)
        keys = {tuple(question["cell"]): question_key(question["body"]) for question in work.questions()}
        before: dict[str, int] = {}
        ended = False
        while not ended:
            process = start(work)
            if killed < most:
                time.sleep(dice.uniform(0, 0.5))
                process.kill()
            killed += process.wait() == -signal.SIGKILL
            asked = {key: len(kinds) for key, kinds in server.questions().items()}
            again += sum(asked[key] - n for key, n in before.items())
            before = {keys[cell]: asked[keys[cell]] for cell in answered(work.run)}
            ended = process.returncode != -signal.SIGKILL
        with open_calls(work.run.calls) as log:
            rows = len(log)
        stats = server.stats()
    yield {
        "kills": killed,
        "answers": f"{len(before):,} of {len(keys):,}",
        "requests": f"{stats['requests']:,}",
        "rows in the call log": f"{rows:,}",
        "in flight when killed": f"{stats['requests'] - rows} (at most {killed * 24})",
        "answered, asked again": again,
    }


# Restart ------------------------------------------------------------------------------------------------------------


def fill(run: Run, without: int) -> int:
    """Log a valid answer to every question of every pair but the last ones, as the first pair has them."""
    pair_ids: list[Any] = read_pairs(run.pairs, "").column("pair_id").to_pylist()
    with open_ledger(run.calls) as ledger:
        answers = list(ledger.answers())
        rest = pair_ids[1 : len(pair_ids) - without]
        for i in range(0, len(rest), 1000):
            ledger.append(*(replace(call, pair_id=pair_id) for pair_id in rest[i : i + 1000] for call in answers))
        return len(ledger)


def restart(folder: Path, quick: bool) -> Iterator[Row]:
    """The command with 61,024 pairs, from its start to its first request and its end; nine questions are open."""
    with fault_server() as server:
        work = make_work(folder, server, 200 if quick else 61_024)
        yield {"calls in the log": 0, **started(work)[0]}
        for file in work.run.path.glob("calls.sqlite*"):
            file.unlink()
        start(work, "--limit", "1").wait()
        calls, asked = fill(work.run, without=1), server.stats()["requests"]
        row, began, process = started(work, kill=False)
        peak = row["peak MiB by then"]
        while process.poll() is None:
            peak = peak_mib(process.pid) or peak
            time.sleep(0.02)
        end = {"seconds to the end": f"{time.perf_counter() - began:.1f}", "peak MiB in the end": round(peak)}
        yield {"calls in the log": f"{calls:,}", **row, **end, "requests": server.stats()["requests"] - asked}


def started(work: Work, kill: bool = True) -> tuple[Row, float, subprocess.Popen[bytes]]:
    """What it takes to the first request; when it began; the process, killed if so wanted."""
    began = time.perf_counter()
    process = start(work)
    row = {
        "seconds to the first request": f"{time.perf_counter() - began:.1f}",
        "CPU s by then": f"{cpu_s(process.pid):.1f}",
        "peak MiB by then": round(peak_mib(process.pid) or 0),
    }
    if kill:
        process.kill()
        process.wait()
    return row, began, process


# Tables -------------------------------------------------------------------------------------------------------------

MEASUREMENTS: Final[dict[str, Callable[[Path, bool], Iterator[Row]]]] = {
    "faults": faults,
    "throughput": throughput,
    "limits": limits,
    "kills": kills,
    "restart": restart,
}


def main() -> None:
    """Measure, print and perhaps write."""
    parser = argparse.ArgumentParser(description="Measure the annotation engine beside what a user would write.")
    parser.add_argument("--quick", action="store_true", help="small, to see that everything runs")
    parser.add_argument("--only", nargs="+", choices=MEASUREMENTS, default=[*MEASUREMENTS], help="these measurements")
    parser.add_argument("--write", action="store_true", help="into docs/benchmarks.md")
    args = parser.parse_args()
    for name in args.only:
        text = f"{where('aiohttp', 'openai')}\n\n"
        with tempfile.TemporaryDirectory(prefix="sp2dpo-benchmark-") as folder:
            text += table([*MEASUREMENTS[name](Path(folder), args.quick)])
        print(f"\n{name}: {MEASUREMENTS[name].__doc__}\n\n{text}", flush=True)
        if args.write:
            write(ROOT / "docs" / "benchmarks.md", name, text)


if __name__ == "__main__":
    main()
