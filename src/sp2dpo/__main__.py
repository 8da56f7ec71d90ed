"""`python -m sp2dpo`: the command line."""

from sp2dpo.cli import main

if __name__ == "__main__":
    main()
