"""The location of the cache of packages on this machine."""

from __future__ import annotations

import os
from pathlib import Path

from vlpack.errors import OptionError

VARIABLE = "VLPACK_CACHE"
"""Environment variable that names another folder for vlpack's cache."""


def packages_folder() -> Path:
    """The folder of the packages that are built by name, which need not exist yet.

    It is ``packages`` in the folder that the environment variable `VARIABLE` names, or else in the user's cache folder
    (Linux: ``~/.cache/vlpack``).

    Raises:
        OptionError: the variable names a user that does not exist, or a file.
    """
    given = os.environ.get(VARIABLE)
    if given:
        try:
            cache = Path(given).expanduser().absolute()
            is_file = cache.is_file()
        except (OSError, RuntimeError, ValueError) as error:
            raise OptionError(f"{VARIABLE}={given} cannot be used: {error}.", "Set it to a folder.") from None
        if is_file:
            raise OptionError(f"{VARIABLE}={given} is a file, not a folder.", "Set it to a folder.")
    else:
        from platformdirs import user_cache_dir

        cache = Path(user_cache_dir("vlpack", appauthor=False))
    return cache / "packages"
