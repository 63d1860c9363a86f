"""Run the `patchscan` command with `python -m patchscan`."""

from patchscan.cli import main

if __name__ == "__main__":
    main()
