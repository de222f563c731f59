"""`python -m gemopt`."""

from gemopt.cli import main

main()
