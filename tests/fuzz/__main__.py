"""`python -m tests.fuzz`: see runner.py, which the processes that it starts import by its name."""

from tests.fuzz.runner import main

main()
