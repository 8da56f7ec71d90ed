"""One of the processes that torchrun starts for a test: `distributed_worker.py FOLDER` runs every case, FOLDER/student.

What rank n saw of a case is in FOLDER/<case>/rank<n>.json.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import distributed_cases
import sharded_cases

if __name__ == "__main__":
    root = Path(sys.argv[1])
    for name in (*distributed_cases.CASES, *sharded_cases.CASES):
        folder = root / name
        folder.mkdir(exist_ok=True)
        if name in sharded_cases.CASES:
            saw = sharded_cases.compare(*sharded_cases.CASES[name], folder)
        else:
            saw = distributed_cases.train(folder, int(os.environ["WORLD_SIZE"]), **distributed_cases.CASES[name])
        (folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps(saw), encoding="utf-8")
