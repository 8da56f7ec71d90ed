"""`transformers serve` with a tiny random model made on the spot, for typed decisions on a CPU.

It is the server class that the command runs, in the process that made the model, so that torch is loaded once. It
answers `/v1/systemone`, as any chat model does there: the probabilities of the option labels as the next token. They
mean nothing, but they are always those of a model. As a program it prints one line of JSON and serves until Ctrl-C, or
until stdin closes: `python tests/decision_server.py --workdir DIR`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

START_SECONDS = 120.0
LABELS = "A B C D E F G H I J Yes No"


@dataclass(frozen=True)
class DecisionServer:
    """Where it listens, and the name of its model, which every request must give."""

    base_url: str
    model: str


def write_model(folder: Path) -> None:
    """A model whose tokenizer knows the words of the question pack, and each label of an answer as one token."""
    from sp2dpo.prompts import load_pack
    from sp2dpo.train.toy import make_toy

    text = "\n".join(load_pack(None, ("v1", "v2", "v3"), decisions=True).files.values())
    make_toy(folder, [[{"role": "user", "content": f"{text}\n{LABELS}\n" * 2}]], steps=1)


def serve(workdir: Path, *, until_eof: bool) -> None:
    """Serve on a free port of the loopback address and say where."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}  # read when transformers is imported
    import torch
    from transformers.cli.serve import Serve

    torch.set_num_threads(1)
    folder = workdir / "tiny"
    write_model(folder)
    server = Serve(force_model=str(folder), device="cpu", host="127.0.0.1", port=0, non_blocking=True)
    deadline = time.monotonic() + START_SECONDS
    while not server.server.started and time.monotonic() < deadline:
        time.sleep(0.02)
    port = server.server.servers[0].sockets[0].getsockname()[1]
    print(json.dumps({"base_url": f"http://127.0.0.1:{port}/v1", "model": str(folder)}), flush=True)
    with suppress(KeyboardInterrupt):
        if until_eof:
            sys.stdin.read()
        else:
            threading.Event().wait()
    server.kill_server()


@contextmanager
def decision_server(workdir: Path) -> Iterator[DecisionServer]:
    """Run it as a process of its own, and stop it in the end."""
    workdir.mkdir(parents=True, exist_ok=True)
    log = workdir / "server.log"
    command = [sys.executable, __file__, "--workdir", str(workdir), "--until-eof"]
    with (
        log.open("w") as stderr,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True) as process,
    ):
        watchdog = threading.Timer(START_SECONDS, process.kill)
        watchdog.start()
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise RuntimeError(
                    f"transformers serve did not start (exit {process.wait()}):\n{log.read_text()[-3000:]}"
                )
            watchdog.cancel()
            yield DecisionServer(**json.loads(line))
        finally:
            watchdog.cancel()
            process.kill()


def main() -> None:
    """Parse the command line and serve."""
    parser = argparse.ArgumentParser(description="transformers serve with a tiny model of random weights.")
    parser.add_argument("--workdir", type=Path, required=True, help="where to write the model")
    parser.add_argument("--until-eof", action="store_true", help="stop when stdin closes: no orphan if the parent dies")
    args = parser.parse_args()
    serve(args.workdir, until_eof=args.until_eof)


if __name__ == "__main__":
    main()
