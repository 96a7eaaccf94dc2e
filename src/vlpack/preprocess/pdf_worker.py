"""A script that renders the PDF on standard input, in its own process: PDFium is native code, and PDFs are untrusted.

``pdf_worker.py FIRST COUNT`` writes a line to standard output for each of COUNT pages from the index FIRST on: a
``data:`` URI of a JPEG image. ``pdf_worker.py count`` writes the number of pages. The script imports nothing of vlpack.
"""

import base64
import contextlib
import io
import sys

MAX_EDGE, SCALE = 2000, 2.0
"""Largest longer edge of a page in pixels, and usual pixels per point (1/72 inch)."""

MAX_MEMORY, MAX_CPU = 2 << 30, 60
"""Limits of the process: bytes of address space, and seconds of processor time."""

MISSING = 3
"""Exit code if pypdfium2 is not installed."""


def main() -> int:
    """Renders the PDF; returns the exit code."""
    try:
        import pypdfium2
    except ImportError:
        return MISSING
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource  # not on Windows

        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
        resource.setrlimit(resource.RLIMIT_CPU, (MAX_CPU, MAX_CPU))
    document = pypdfium2.PdfDocument(sys.stdin.buffer.read())
    if sys.argv[1:] == ["count"]:
        sys.stdout.write(f"{len(document)}\n")
        return 0
    first, count = map(int, sys.argv[1:])
    for index in range(first, min(len(document), first + count)):
        page = document[index]
        scale = min(SCALE, MAX_EDGE / max(page.get_size()))
        file = io.BytesIO()
        page.render(scale=scale).to_pil().convert("RGB").save(file, "JPEG", quality=90)
        sys.stdout.write("data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode() + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
