"""Chromium for the tests: where it is, and options that keep it from connecting to anything but this machine."""

from __future__ import annotations

import shutil

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
"""Path of the browser; None if there is none."""

OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    # 127.0.0.1 is exempt from proxies; all other addresses go to a proxy that does not exist, and no name is looked up
    *("--proxy-server=http://127.0.0.1:9", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"),
)
"""Options of a headless browser without a network."""
