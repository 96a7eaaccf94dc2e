"""``python -m vlpack`` is the command ``vlpack``."""

from vlpack.cli.app import main

main()
