"""Commands with a Hub id in place of a package, against a stand-in of the Hub on this machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from local_hub import FIRST, SECOND, LocalHub, serving
from samples import DIGITS, IMAGES, READ, copy_digits
from vlpack.builder import build

ASK = ["--image", IMAGES / "02.png", "--temperature", "0", READ]
NAME = f"org--name@{FIRST[:12]}-int8"
BLOCKED = """
import sys, time
from pathlib import Path
from vlpack import builder
from vlpack.cli.app import main
write, begun, go = builder.write, Path(sys.argv[1]), Path(sys.argv[2])
def blocked(plan, folder, progress):
    begun.touch()
    while not go.exists():
        time.sleep(0.02)
    return write(plan, folder, progress)
builder.write = blocked
main(sys.argv[3:])
"""
"""A program that does what vlpack does, but waits for a file before it writes a package."""


class Machine:
    """A user's machine: an empty working folder and empty caches, with the Hub as its only address."""

    def __init__(self, hub: LocalHub, home: Path) -> None:
        self.hub, self.home = hub, home
        self.here = home / "here"
        self.here.mkdir(parents=True)
        self.packages = home / "vlpack" / "packages"

    def command(self, *arguments: object) -> list[str]:
        return [sys.executable, "-m", "vlpack", *map(str, arguments)]

    def start(self, command: list[str], **more: str) -> subprocess.Popen[str]:
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        environment = self.hub.environment(self.home, **more)
        return subprocess.Popen(command, **pipes, text=True, env=environment, cwd=self.here)  # type: ignore[call-overload]

    def run(self, *arguments: object, **more: str) -> subprocess.CompletedProcess[str]:
        process = self.start(self.command(*arguments), **more)
        out, err = process.communicate(timeout=100)
        assert "Traceback" not in err, err
        return subprocess.CompletedProcess([*map(str, arguments)], process.returncode, out, err)

    def listed(self) -> list[str]:
        return [entry["name"] for entry in json.loads(self.run("list", "--json").stdout)]

    def blocked(self, *arguments: object) -> tuple[subprocess.Popen[str], Path]:
        """A command that has begun a build, and the file for which it waits."""
        begun, go = self.home / "begun", self.home / "go"
        begun.unlink(missing_ok=True)
        process = self.start([sys.executable, "-c", BLOCKED, str(begun), str(go), *map(str, arguments)])
        while not begun.exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        return process, go


@pytest.fixture(scope="module")
def answer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the shipped checkpoint answers as a package in a folder."""
    folder = build(DIGITS, tmp_path_factory.mktemp("package") / "digits").folder
    done = subprocess.run(
        [sys.executable, "-m", "vlpack", "run", str(folder), *map(str, ASK)], capture_output=True, text=True, check=True
    )
    return done.stdout


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    with serving(copy_digits(tmp_path / "repository")) as hub:
        yield Machine(hub, tmp_path)


def test_a_question_is_checked_before_anything_is_downloaded(machine: Machine) -> None:
    done = machine.run("run", "org/name", "--yes", " ")
    assert (done.returncode, machine.hub.fetched) == (2, [])
    assert "The question is empty." in done.stderr


@pytest.mark.slow
def test_without_a_terminal_nothing_is_downloaded_unless_yes_is_given(machine: Machine) -> None:
    machine.hub.sizes["model.safetensors"] = 30_000_000_000
    for other in ("pytorch_model.bin", "consolidated.pth"):  # files that vlpack does not need count for nothing
        (machine.hub.folder / other).touch()
        machine.hub.sizes[other] = 5_000_000_000
    for verb, *rest in (("run", "Hello"), ("chat",), ("embed", "words"), ("score", "query", "words"), ("serve",)):
        done = machine.run(verb, "org/name", *rest)
        assert done.returncode == 2
        assert done.stdout == ""
        assert "There is no int8 package of org/name" in done.stderr
        assert "30.00 GB will be downloaded" in done.stderr
        assert str(machine.home / "hf" / "hub") in done.stderr
        assert f"about 15.7 MB in {machine.packages}, until `vlpack rm {NAME}" in done.stderr
        assert "about 2 minutes" in done.stderr
        assert "--yes" in done.stderr.splitlines()[-1]
    assert set(machine.hub.fetched) == {"config.json"}
    assert not machine.packages.exists()


@pytest.mark.slow
def test_a_hub_id_is_built_once_and_then_used_without_the_network(machine: Machine, answer: str) -> None:
    first = machine.run("run", "org/name", *ASK, "--yes")
    assert (first.returncode, first.stdout) == (0, answer)
    assert "model.safetensors" in machine.hub.fetched
    machine.hub.asked.clear()
    for given in ("org/name", "org/name@main", f"org/name@{FIRST}", NAME):
        again = machine.run("run", given, *ASK)
        assert (again.returncode, again.stdout) == (0, answer), again.stderr
    assert machine.hub.asked == []
    (entry,) = json.loads(machine.run("list", "--json").stdout)
    assert (entry["name"], entry["repository"], entry["commit"]) == (NAME, "org/name", FIRST)
    assert (entry["precision"], entry["revisions"], entry["options"]) == ("int8", ["main"], {})
    files = list((machine.packages / NAME).iterdir())
    assert entry["bytes"] == sum(path.stat().st_size for path in files)
    assert NAME in machine.run("list").stdout
    assert machine.run("inspect", entry["folder"]).returncode == 0  # no file is foreign
    removed = machine.run("rm", NAME)
    assert (removed.returncode, removed.stdout) == (0, f"Removed {NAME} (16.3 MB).\n")
    assert machine.listed() == []
    assert machine.run("rm", NAME).returncode == 2


@pytest.mark.slow
def test_offline(machine: Machine) -> None:
    offline = {"HF_HUB_OFFLINE": "1"}
    done = machine.run("run", "org/name", "Hello", "--yes", **offline)
    assert done.returncode == 2
    assert "org/name is not, or not completely, in the Hugging Face cache" in done.stderr
    assert "--update needs the network" in machine.run("run", "org/name", "Hello", "--update", **offline).stderr
    assert machine.run("build", "org/name", "-o", "elsewhere").returncode == 0  # the checkpoint is in the cache now
    machine.hub.asked.clear()
    asked = machine.run("run", "org/name", "Hello", **offline)
    assert "Nothing has to be downloaded" in asked.stderr
    assert machine.run("run", "org/name", *ASK, "--yes", **offline).returncode == 0
    assert machine.hub.asked == []


@pytest.mark.slow
def test_update_builds_the_newest_commit(machine: Machine, answer: str) -> None:
    assert machine.run("build", "org/name").returncode == 0
    machine.hub.commit = SECOND
    machine.hub.asked.clear()
    assert machine.run("run", "org/name", *ASK).stdout == answer
    assert machine.hub.asked == []
    asked = machine.run("run", "org/name", "Hello", "--update")
    assert asked.returncode == 2
    assert f"There is {NAME}." in asked.stderr
    assert machine.run("run", "org/name", *ASK, "--update", "--yes").stdout == answer
    new = NAME.replace(FIRST[:12], SECOND[:12])
    assert machine.listed() == [new, NAME]
    assert machine.run("run", "org/name", *ASK, "--update").returncode == 0  # it is the newest: nothing is asked
    os.utime(machine.packages / f"{new}.json", (1, 1))
    assert machine.run("run", "org/name", *ASK).returncode == 0
    assert machine.listed() == [new, NAME]  # the new one was used


def test_folders_come_first_and_have_no_options_of_hub_ids(machine: Machine, answer: str) -> None:
    build(DIGITS, machine.here / "org" / "name", precision="int4")
    assert machine.run("run", "org/name", *ASK).returncode == 0
    for option in (["-p", "int4"], ["--update"]):
        for command in (["run", "org/name", "Hello"], ["serve", "org/name"]):
            done = machine.run(*command, *option)
            assert done.returncode == 2
            assert "is for Hub ids" in done.stderr, done.stderr
    assert machine.hub.asked == []


@pytest.mark.slow
def test_embed_and_score_build_for_their_task(machine: Machine) -> None:
    done = machine.run("embed", "org/name", "words", "more", "--json", "--yes")
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["embeddings"]) == 2
    (name,) = machine.listed()
    assert name.startswith(f"{NAME}-embedding-")
    machine.hub.asked.clear()
    assert machine.run("embed", "org/name", "words").returncode == 0
    assert machine.hub.asked == []
    asked = machine.run("score", "org/name", "query", "words")  # the embedding model is not taken for a reranker
    assert "Nothing has to be downloaded" in asked.stderr


@pytest.mark.slow
def test_two_processes_build_a_package_once(machine: Machine, answer: str) -> None:
    first, go = machine.blocked("build", "org/name")
    second = machine.start(machine.command("run", "org/name", "--yes", *ASK))
    assert second.stderr is not None
    told = ""
    while "Another process is building" not in told:
        line = second.stderr.readline()
        assert line, told
        told += line
    busy = machine.run("rm", "org/name")
    assert busy.returncode == 2
    assert machine.listed() == []
    go.touch()
    out, err = second.communicate(timeout=100)
    first.communicate(timeout=100)
    assert (first.returncode, second.returncode, out) == (0, 0, answer), err
    assert machine.listed() == [NAME]
    assert machine.hub.fetched.count("model.safetensors") == 1
    assert {path.name for path in machine.packages.iterdir()} == {".locks", NAME, f"{NAME}.json"}


@pytest.mark.skipif(sys.platform == "win32", reason="signals of Unix")
@pytest.mark.parametrize("number", [signal.SIGTERM, getattr(signal, "SIGKILL", None)])
def test_a_killed_build_leaves_no_lock_and_no_half_package(number: int, machine: Machine, answer: str) -> None:
    process, _ = machine.blocked("build", "org/name")
    process.send_signal(number)
    process.communicate(timeout=100)
    assert machine.listed() == []
    if number == signal.SIGTERM:
        assert {path.name for path in machine.packages.iterdir()} == {".locks"}
    done = machine.run("run", "org/name", "--yes", *ASK)
    assert (done.returncode, done.stdout) == (0, answer)
    assert "Another process" not in done.stderr
    assert {path.name for path in machine.packages.iterdir()} == {".locks", NAME, f"{NAME}.json"}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="a terminal of Unix")
def test_a_terminal_is_asked_before_a_download(machine: Machine, answer: str) -> None:
    import pexpect

    def started() -> pexpect.spawn:
        command, *rest = machine.command("run", "org/name", *ASK)
        environment = machine.hub.environment(machine.home)
        return pexpect.spawn(
            command, rest, env=environment, cwd=str(machine.here), encoding="utf-8", timeout=100, dimensions=(40, 300)
        )

    for reply in ("n", "", "nonsense"):
        child = started()
        child.expect_exact("24.2 MB will be downloaded")
        child.expect_exact("Go on? [y/N]")
        child.sendline(reply)
        child.expect_exact("Nothing was built.")
        child.expect(pexpect.EOF)
        child.close()
        assert child.exitstatus == 1
    assert set(machine.hub.fetched) == {"config.json"}
    assert machine.listed() == []
    child = started()
    child.expect_exact("Go on? [y/N]")
    child.sendline("y")
    child.expect_exact(answer.strip())
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0
    assert machine.listed() == [NAME]


def test_serve_names_a_hub_id_as_it_is_written(tmp_path: Path) -> None:
    pytest.importorskip("fastapi")
    from vlpack.server.models import named_folders

    made = {"org/name": tmp_path / "a", "org/other": tmp_path / "b"}
    given = ["org/name", "small=org/other", str(tmp_path / "c")]
    assert named_folders(given, made.get) == {"org/name": tmp_path / "a", "small": tmp_path / "b", "c": tmp_path / "c"}
