"""``python -m vlpack.cli`` is the command ``vlpack``."""

from vlpack.cli.app import main

main()
