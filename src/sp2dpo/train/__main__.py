"""`python -m sp2dpo.train PROCESS.yaml`, for launchers: `accelerate launch -m sp2dpo.train PROCESS.yaml`."""

import sys

from sp2dpo.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
