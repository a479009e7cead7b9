"""`python -m partition`."""

from partition.cli import main

main()
