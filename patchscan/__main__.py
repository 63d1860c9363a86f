"""`python -m patchscan` is the `patchscan` command."""

from patchscan.cli import main

if __name__ == "__main__":
    main()
