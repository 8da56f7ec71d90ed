"""The clients of the benchmark, each run as a process of its own: two that a user would write, and sp2dpo.

    python benchmarks/clients.py bare|script|sp2dpo JOB.json

The two ask until a text is a valid judgement, with delays that double after an error, and write answers to a file. They
know nothing of mending, of limits beyond Retry-After, or of restarts. On stdout: seconds, CPU seconds and peak memory.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Final

__all__ = ["CATEGORIES", "Job", "as_valid", "cpu_s", "peak_mib"]

CATEGORIES: Final = ("Safety", "Factuality", "Instruction", "Reasoning", "Helpfulness", "Style")


@dataclass(frozen=True)
class Job:
    """What a client has to do. Rendered questions are for the two; sp2dpo renders its own.

    `concurrency` is of all calls in flight, `annotators` share it evenly; `rpm` is told to sp2dpo only.
    """

    base_url: str
    questions: str
    answers: str
    process: str
    run_dir: str
    concurrency: int
    annotators: int
    retries: int
    timeout: float
    delay: float
    rpm: float | None = None

    def write(self, path: Path) -> Path:
        """Keep it for a process."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")
        return path


class RetryAfter(Exception):
    """An endpoint asks to wait for so many seconds."""


def as_valid(text: str) -> dict[str, Any]:
    """The judgement in a text. Raises ValueError, TypeError or KeyError if it is none."""
    gap = json.loads(text)
    numbers = (gap["semantic_gap_magnitude"], gap["semantic_gap_confidence"])
    if gap["semantic_gap_category"] not in CATEGORIES or not all(0 <= number <= 1 for number in numbers):
        raise ValueError(text)
    return {"category": gap["semantic_gap_category"], "magnitude": numbers[0], "confidence": numbers[1]}


Ask = Callable[[dict[str, Any]], Awaitable[str]]
"""Body of a request → text of the answer."""


async def until_valid(job: Job, ask: Ask, errors: tuple[type[Exception], ...]) -> None:
    """Ask every question until its answer is valid, or the retries are used up."""
    places = asyncio.Semaphore(job.concurrency)
    with Path(job.questions).open() as lines, Path(job.answers).open("w") as answers:
        questions = [json.loads(line) for line in lines]

        async def settle(question: dict[str, Any]) -> None:
            async with places:
                for attempt in range(job.retries + 1):
                    try:
                        gap = as_valid(await ask(question["body"]))
                    except RetryAfter as wait:
                        await asyncio.sleep(wait.args[0])
                    except errors:
                        await asyncio.sleep(job.delay * 2**attempt * random.uniform(0.75, 1.25))
                    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
                        continue
                    else:
                        answers.write(json.dumps({"cell": question["cell"], **gap}) + "\n")
                        return

        await asyncio.gather(*map(settle, questions))


async def bare(job: Job) -> None:
    """aiohttp and nothing else."""
    import aiohttp

    connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=job.timeout)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:

        async def ask(body: dict[str, Any]) -> str:
            async with session.post(f"{job.base_url}/chat/completions", json=body) as response:
                if "retry-after" in response.headers:
                    raise RetryAfter(float(response.headers["retry-after"]))
                response.raise_for_status()
                return str((await response.json())["choices"][0]["message"]["content"])

        await until_valid(job, ask, (aiohttp.ClientError, TimeoutError))


async def script(job: Job) -> None:
    """AsyncOpenAI with a semaphore."""
    import openai

    async with openai.AsyncOpenAI(base_url=job.base_url, api_key="none", max_retries=0, timeout=job.timeout) as client:

        async def ask(body: dict[str, Any]) -> str:
            try:
                completion = await client.chat.completions.create(**body)
            except openai.RateLimitError as limit:
                if "retry-after" in limit.response.headers:
                    raise RetryAfter(float(limit.response.headers["retry-after"])) from limit
                raise
            return str(completion.choices[0].message.content)

        await until_valid(job, ask, (openai.APIError,))


def sp2dpo(job: Job) -> None:
    """This project, through its Python API."""
    from sp2dpo.annotate.run import annotate
    from sp2dpo.process import load_process
    from sp2dpo.runs import open_run

    run = open_run(load_process(Path(job.process)), Path(job.run_dir))
    annotate(run, concurrency=job.concurrency // job.annotators, rpm=None if job.rpm is None else {"": job.rpm})


def cpu_s(pid: int) -> float:
    """CPU seconds of a running process. Linux only."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def peak_mib(pid: int | str) -> float | None:
    """The most memory that a process has held; None if it has ended. Linux only."""
    found = re.findall(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    return int(found[0]) / 1024 if found else None


def main() -> None:
    """Run one client, and say what it took."""
    name, job = sys.argv[1], Job(**json.loads(Path(sys.argv[2]).read_text()))
    import_module({"bare": "aiohttp", "script": "openai", "sp2dpo": "sp2dpo.annotate.run"}[name])
    wall, cpu = time.perf_counter(), time.process_time()
    if name == "sp2dpo":
        sp2dpo(job)
    else:
        asyncio.run({"bare": bare, "script": script}[name](job))
    took = {"seconds": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
    print(json.dumps(took | {"peak_mib": peak_mib("self")}))


if __name__ == "__main__":
    main()
