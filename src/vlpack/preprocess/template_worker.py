"""The program of the separate process that renders a chat template with limited memory and time.

To start quickly, this file is run by its path and imports nothing of vlpack but ``template_sandbox.py`` beside it.
A message is its length in eight bytes, little-endian, followed by JSON. The first one is
``{"path", "source", "memory", "seconds"}``, the next ones are the template's variables for each prompt. An answer is
``{"text"}``, or ``{"error", "message"}`` with the name of one of the sandbox's exceptions.
"""

from __future__ import annotations

import json
import sys
from typing import IO, Any


def read(stream: IO[bytes]) -> Any:
    """Reads the next message; None at the end of the stream."""
    size = stream.read(8)
    return json.loads(stream.read(int.from_bytes(size, "little"))) if len(size) == 8 else None


def write(stream: IO[bytes], message: Any) -> None:
    """Writes a message; lone surrogates in texts are preserved."""
    data = json.dumps(message, ensure_ascii=False).encode("utf-8", "surrogatepass")
    stream.write(len(data).to_bytes(8, "little") + data)
    stream.flush()


def limit(memory: int) -> None:
    """Limits this process to ``memory`` more bytes, and forbids writing files and starting processes.

    Each limit is applied only where the operating system has it.
    """
    try:
        import resource
    except ImportError:  # Windows, where the parent process watches the memory
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
    """Makes the system end this process after ``seconds`` more of processor time, in case the parent is gone."""
    try:
        import resource
    except ImportError:
        return
    usage = resource.getrusage(resource.RUSAGE_SELF)
    soft = int(usage.ru_utime + usage.ru_stime) + seconds
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


def load_sandbox() -> Any:
    """Imports ``template_sandbox.py`` from beside this file without importing the vlpack package, which takes long."""
    import importlib.util
    from pathlib import Path

    spec = importlib.util.spec_from_file_location("sandbox", Path(__file__).with_name("template_sandbox.py"))
    assert spec is not None, "a path to a file"
    assert spec.loader is not None, "a file has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules["sandbox"] = module
    spec.loader.exec_module(module)
    return module


def main() -> None:
    """Answers messages until the parent process closes the pipe."""
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
