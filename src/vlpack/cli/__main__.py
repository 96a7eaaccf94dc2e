"""Runs the command ``vlpack`` as ``python -m vlpack.cli``."""

from vlpack.cli.app import main

main()
