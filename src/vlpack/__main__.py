"""``python -m vlpack`` is the command ``vlpack``."""

from vlpack.cli import main

main()
