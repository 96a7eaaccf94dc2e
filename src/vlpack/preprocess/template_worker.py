"""Renders a checkpoint's chat template in a process of its own, which has little memory and can be ended any time.

This file is run by its path and imports nothing of vlpack but ``template_sandbox.py`` beside it, to start quickly.
Messages are JSON after eight bytes that tell their length: first ``{"path", "source", "memory", "seconds"}``, then for
each prompt the template's variables. An answer is ``{"text"}``, or ``{"error", "message"}`` with the name of one of the
sandbox's exceptions.
"""

from __future__ import annotations

import json
import sys
from typing import IO, Any


def read(stream: IO[bytes]) -> Any:
    """The next message, or None where there are no more."""
    size = stream.read(8)
    return json.loads(stream.read(int.from_bytes(size, "little"))) if len(size) == 8 else None


def write(stream: IO[bytes], message: Any) -> None:
    """Send a message; lone surrogates of a text stay what they are."""
    data = json.dumps(message, ensure_ascii=False).encode("utf-8", "surrogatepass")
    stream.write(len(data).to_bytes(8, "little") + data)
    stream.flush()


def limit(memory: int) -> None:
    """No more than ``memory`` bytes beyond what this process has now, no files, no processes; where the system can."""
    try:
        import resource
    except ImportError:  # Windows, where the parent watches
        return
    try:
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
    except OSError:
        used = 0
    for name, most in (("AS", used + memory), ("DATA", used + memory), ("CORE", 0), ("FSIZE", 0), ("NPROC", 0)):
        try:
            kind = getattr(resource, f"RLIMIT_{name}")
            hard = resource.getrlimit(kind)[1]
            allowed = most if hard == resource.RLIM_INFINITY else min(most, hard)
            resource.setrlimit(kind, (allowed, allowed))
        except (AttributeError, OSError, ValueError):
            continue


def limit_time(seconds: int) -> None:
    """End this process when it has computed so much longer, should nobody be there any more who would."""
    try:
        import resource
    except ImportError:
        return
    usage = resource.getrusage(resource.RUSAGE_SELF)
    soft = int(usage.ru_utime + usage.ru_stime) + seconds
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


def load_sandbox() -> Any:
    """The module beside this file, without the package that it is in, whose imports take long."""
    import importlib.util
    from pathlib import Path

    spec = importlib.util.spec_from_file_location("sandbox", Path(__file__).with_name("template_sandbox.py"))
    assert spec is not None, "a path to a file"
    assert spec.loader is not None, "likewise"
    module = importlib.util.module_from_spec(spec)
    sys.modules["sandbox"] = module
    spec.loader.exec_module(module)
    return module


def main() -> None:
    """Answer until the parent closes its end."""
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    first = read(requests)
    sys.path[:] = first["path"]
    sandbox = load_sandbox()
    limit(first["memory"])
    limit_time(first["seconds"])
    try:
        template = sandbox.Template(first["source"])
    except sandbox.ChatTemplateError as error:
        write(answers, {"error": type(error).__name__, "message": str(error)})
        return
    write(answers, {"text": ""})
    while (variables := read(requests)) is not None:
        limit_time(first["seconds"])
        try:
            answer = {"text": template.render(variables)}
        except sandbox.ChatTemplateError as error:
            answer = {"error": type(error).__name__, "message": str(error)}
        write(answers, answer)


if __name__ == "__main__":
    main()
