"""`vlpack chat` in a real (pseudo-)terminal: text is typed, and the screen is read."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import vlpack
from runtime.test_chat import THINKING
from samples import ANSWERS, COUNT, DIGITS, IMAGES, READ, copy_digits
from tiny import Tiny
from vlpack.cli import chat_terminal

if sys.platform == "win32":
    pytest.skip("a terminal of Unix", allow_module_level=True)

import pexpect
import pyte

ENTER, ALT_ENTER, CONTROL_C, CONTROL_D = "\r", "\x1b\r", "\x03", "\x04"
CHAT = (sys.executable, "-m", "vlpack", "chat")
GREEDY = ("--temperature", "0")


class Terminal:
    """A pseudo-terminal in which the program runs; it types text and reads the screen."""

    def __init__(self, *arguments: object, width: int = 100) -> None:
        command, *rest = [*CHAT, *map(str, arguments)]
        # COLUMNS and LINES would override the terminal's own size
        environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
        self.child = pexpect.spawn(command, rest, dimensions=(60, width), timeout=300, env=environment)
        screen: Any = pyte.Screen(width, 60)
        screen.write_process_input = self.child.send  # answers the program's question for the cursor's position
        self.screen, self.stream, self.raw = screen, pyte.ByteStream(screen), b""

    @property
    def text(self) -> str:
        return "\n".join(line.rstrip() for line in self.screen.display).rstrip()

    def type(self, text: str) -> None:
        self.child.send(text)

    def say(self, text: str) -> None:
        """Types a line once the program is ready for input."""
        self.until(lambda: self.text.endswith("\n>") or self.text == ">")
        self.type(text + ENTER)

    def see(self, text: str) -> None:
        self.until(lambda: text in self.text)

    def until(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + 300
        while not condition():
            assert time.monotonic() < end, f"never seen; there is:\n{self.text}"
            try:
                data = self.child.read_nonblocking(1 << 16, timeout=0.2)
            except pexpect.TIMEOUT:
                continue
            except pexpect.EOF:
                assert condition(), f"ended with:\n{self.text}"
                return
            self.raw += data
            self.stream.feed(data)

    def end(self) -> int:
        """Waits for the program to end and returns its exit code."""
        self.until(lambda: not self.child.isalive())
        self.child.close()
        status: int = self.child.exitstatus
        return status


@pytest.fixture
def terminal() -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def open_terminal(*arguments: object, width: int = 100) -> Terminal:
        opened.append(Terminal(*arguments, width=width))
        return opened[-1]

    yield open_terminal
    for one in opened:
        one.child.close(force=True)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vlpack.build(DIGITS, tmp_path_factory.mktemp("chat") / "digits").folder


@pytest.fixture(scope="module")
def talker(built: Callable[..., Path]) -> Path:
    """A package that never ends an answer by itself."""
    return built(Tiny(seed=1))


def test_a_conversation(terminal: Callable[..., Terminal], package: Path, tmp_path: Path) -> None:
    file = tmp_path / "with spaces.png"
    file.write_bytes((IMAGES / "05.png").read_bytes())
    screen = terminal(package, "--image", IMAGES / "01.png")
    screen.see("/help")
    screen.see("With the next message: ")
    screen.say(READ)
    first = ANSWERS["01.png"]["read"]
    screen.see("\n" + first)
    screen.say("/reset")
    screen.see("The conversation is empty.")
    screen.say(f"/image {file}")
    screen.see(f"With the next message: {str(file)[:40]}")
    screen.say(READ)
    screen.see("\n" + ANSWERS["05.png"]["read"])
    screen.say("/system Count well.")
    screen.see("System message: Count well.")
    screen.say(COUNT)
    screen.say("/stats")
    screen.see("tokens/s")
    screen.see("2 turns, ")
    saved = tmp_path / "saved.json"
    screen.say(f"/save {saved}")
    screen.see("saved.json has 2 turns.")
    screen.say(f"/save {file}")
    screen.see("already exists.")
    screen.say("/frobnicate")
    screen.see("There is no command /frobnicate.")
    screen.say("/image nothing.png")
    screen.see("nothing.png")
    screen.say("/drop 5")
    screen.see("5 turns cannot be dropped")
    screen.say("/drop")
    screen.see("are left in the conversation.")
    screen.say(f"/save {saved}")  # the command /save of chat itself
    screen.see("saved.json has 1 turn.")
    screen.say("/history")
    screen.see(f"user: {COUNT}")
    screen.type(CONTROL_D)
    assert screen.end() == 0
    messages = json.loads(saved.read_text(encoding="utf-8"))
    assert [message["role"] for message in messages] == ["system", "user", "assistant"]
    assert b"Traceback" not in screen.raw


def test_continuing_a_saved_conversation(terminal: Callable[..., Terminal], package: Path, tmp_path: Path) -> None:
    chat = vlpack.load(package).chat(sampling=vlpack.Sampling(temperature=0))
    chat.ask(READ, [IMAGES / "01.png"])
    from vlpack.cli.conversations import saved

    file = tmp_path / "saved.json"
    file.write_text(json.dumps(saved(chat.messages)), encoding="utf-8")
    expected = chat.ask(COUNT).text
    screen = terminal(package, "--messages", file, *GREEDY)
    screen.say(COUNT)
    screen.say("/history")
    screen.see(f"user: [image] {READ}")
    screen.see(f"assistant: {ANSWERS['01.png']['read']}".splitlines()[0])
    screen.say("/exit")
    assert screen.end() == 0
    assert expected.splitlines()[-1] in screen.text


def test_an_answer_is_stopped(terminal: Callable[..., Terminal], talker: Path, tmp_path: Path) -> None:
    screen = terminal(talker, *GREEDY, "--max-tokens", 3500, "--threads", 1)
    screen.say("Tell me everything.")
    # the answer has begun, not only the line with the current step
    screen.until(lambda: len("".join(screen.text.partition("Tell me everything.")[2].split())) > 300)
    screen.type(CONTROL_C)
    screen.see("(stopped; the generated part stays in the conversation)")
    screen.until(lambda: screen.text.endswith("\n>"))
    screen.type(CONTROL_C)  # no answer is running
    screen.see("Ctrl-D or /exit leaves.")
    screen.say(f"/save {tmp_path / 'saved.json'}")
    screen.see("saved.json has 1 turn.")
    question, answer = json.loads((tmp_path / "saved.json").read_text(encoding="utf-8"))
    assert question["content"] == "Tell me everything."
    assert len(answer["content"]) > 100
    screen.say("/exit")
    assert screen.end() == 0
    assert b"Traceback" not in screen.raw


def test_several_lines(terminal: Callable[..., Terminal], talker: Path, tmp_path: Path) -> None:
    screen = terminal(talker, *GREEDY, "--max-tokens", 3)
    screen.see("\n>")
    screen.type("one\\" + ENTER + "two" + ALT_ENTER)
    screen.type("\x1b[200~three\nfour\x1b[201~" + ENTER)  # pasted
    screen.see("(cut after 3 tokens)")
    screen.say("//slash")
    screen.see("//slash")
    screen.say(f"/save {tmp_path / 'saved.json'}")
    screen.see("saved.json has 2 turns.")
    messages = json.loads((tmp_path / "saved.json").read_text(encoding="utf-8"))
    assert [message["content"] for message in messages[::2]] == ["one\ntwo\nthree\nfour", "/slash"]
    screen.see("\n>")
    screen.type("/sta\t")  # completed
    screen.see("> /stats")
    screen.type(ENTER)
    screen.see("2 turns, ")


def test_tab_completes_within_folders(terminal: Callable[..., Terminal], talker: Path, tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "one.png").write_bytes((IMAGES / "01.png").read_bytes())
    screen = terminal(talker)
    screen.see("\n>")
    screen.type(f"/save {tmp_path}/pict\t")
    screen.until(lambda: screen.text.replace("\n", "").endswith("/pictures/"))
    screen.type("\t")
    screen.until(lambda: screen.text.replace("\n", "").endswith("/pictures/one.png"))
    screen.type(CONTROL_C)
    screen.say("/exit")
    assert screen.end() == 0


def test_help_is_wrapped_between_words(terminal: Callable[..., Terminal], talker: Path) -> None:
    screen = terminal(talker, width=50)
    screen.say("/help")
    screen.see("conversation.")  # the last word of the help
    words = " ".join(f"{name} {meaning}" for name, meaning in chat_terminal.COMMANDS).split()
    shown = screen.text.split()
    for word in (*words, *chat_terminal.KEYS.split()):
        assert word in shown
    screen.say("/exit")
    assert screen.end() == 0


def test_images_of_a_folder(package: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes((IMAGES / "01.png").read_bytes())
    done = piped(package, *GREEDY, text=f"/image {tmp_path}\n{READ}\n/image {tmp_path}/*.png\n")
    assert done.stdout == ANSWERS["01.png"]["read"] + "\n"
    assert done.stderr.count(f"With the next message: {tmp_path / 'a.png'}") == 2


def test_images_that_do_not_fit_can_be_removed(package: Path) -> None:
    done = piped(package, "--context", 30, text=f'/image {IMAGES / "01.png"}\n{READ * 5}\n/image ""\nHi\n')
    assert done.stderr.count('/image "" takes the images back.') == 1
    assert done.stdout


def test_a_warning_comes_before_the_context_is_full(terminal: Callable[..., Terminal], talker: Path) -> None:
    screen = terminal(talker, *GREEDY, "--max-tokens", 20, "--context", 110, width=200)
    for number in range(1, 6):
        screen.say("And then?")
        screen.until(lambda: screen.text.count("(cut after") == number and screen.text.endswith("\n>"))  # noqa: B023
        if "are left for a question and its answer." in screen.text:
            break
    screen.see("/drop forgets the oldest.")
    screen.say("And would you please tell me, at length and in many words, what it is that comes then, and why?")
    screen.see("error: The conversation would have")
    screen.say("/drop")
    screen.say("And then?")
    screen.say("/exit")
    assert screen.end() == 0


def test_reasoning_is_dimmed(terminal: Callable[..., Terminal], tmp_path: Path) -> None:
    source = copy_digits(tmp_path / "checkpoint")
    (source / "chat_template.jinja").write_text(THINKING, encoding="utf-8")
    package = vlpack.build(source, tmp_path / "package").folder
    thought = next(vlpack.load(package).chat(sampling=vlpack.Sampling(temperature=0)).stream("Think."))
    screen = terminal(package, *GREEDY, "--max-tokens", 4)
    screen.say("Think.")
    screen.until(lambda: b"\x1b[2m" + thought.strip().encode() in screen.raw)


def piped(package: Path, *arguments: object, text: str) -> subprocess.CompletedProcess[str]:
    command: list[Any] = [*CHAT, package, *arguments]
    return subprocess.run(list(map(str, command)), input=text, capture_output=True, text=True, check=False)


def test_lines_of_a_pipe(package: Path) -> None:
    done = piped(package, "--image", IMAGES / "01.png", text=f"{READ}\n/stats\n\n/reset now\n")
    assert done.returncode == 0
    assert done.stdout == ANSWERS["01.png"]["read"] + "\n"
    assert "1 turn, " in done.stderr
    assert "/reset takes no argument." in done.stderr


def test_unknown_commands_and_missing_files(package: Path, tmp_path: Path) -> None:
    text = "/drop " + "1" * 5000 + "\n/save a\0b\n/save " + "x" * 400 + "\n/system <|image_pad|>\n/history\n/stats\n"
    done = piped(package, text=text)
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr.count("cannot be written") == 2
    assert "/drop takes a number of turns" in done.stderr
    assert "0 turns, " in done.stderr
    done = piped(package, "--image", "nothing.png", text="Hello\n")
    assert done.returncode == 2
    assert "There is no image file nothing.png." in done.stderr


def test_images_that_were_deleted_can_be_removed(package: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    file.write_bytes((IMAGES / "01.png").read_bytes())
    command = [*CHAT, str(package)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        assert child.stdin is not None
        assert child.stderr is not None
        child.stdin.write(f"/image {file}\n")
        child.stdin.flush()
        assert "With the next message" in child.stderr.readline()
        file.unlink()
        stdout, stderr = child.communicate('What?\n/image ""\nWhat?\n')
    assert stderr.count("There is no image file") == 1
    assert len(stdout.splitlines()) == 1


def test_input_that_is_not_utf8(package: Path) -> None:
    environment = {**os.environ, "PYTHONUTF8": "1"}
    done = subprocess.run(
        [*CHAT, str(package)], input=b"h\xe9\n/stats\n", capture_output=True, check=False, env=environment
    )
    assert done.returncode == 0
    assert b"not valid Unicode" in done.stderr
    assert b"0 turns, " in done.stderr


def test_a_closed_standard_input(package: Path) -> None:
    done = subprocess.run(f"{shlex.join([*CHAT, str(package)])} <&-", shell=True, capture_output=True, check=False)
    assert done.returncode == 2
    assert b"Standard input is closed." in done.stderr


def test_texts_of_others_are_shown_without_markup_or_control_characters(
    terminal: Callable[..., Terminal], package: Path, tmp_path: Path
) -> None:
    file = tmp_path / "saved.json"
    messages = [
        {"role": "system", "content": "\x1b]0;title\x07Be :cat:."},
        {"role": "user", "content": ["one", {"type": "text", "text": "[bold]two[/]"}]},
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "It is a :cat:."},
    ]
    file.write_text(json.dumps(messages), encoding="utf-8")
    screen = terminal(package, "--messages", file, "--context", 200)
    screen.see("are left for a question and its answer.")  # reported before the first question
    screen.say("/history")
    screen.see("user: one [bold]two[/]")
    screen.see("assistant: It is a :cat:.")
    screen.say("/system")
    screen.see("System message: ]0;titleBe :cat:.")
    assert b"\x1b]0;" not in screen.raw


def test_markup_in_answers_is_not_interpreted(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    screen = chat_terminal.Terminal(vlpack.load(package).chat())
    screen._show([(False, "a\tb :cat:"), (True, " :dog:"), (False, "\n")])
    assert capsys.readouterr().out == "a\tb :cat: :dog:\n"


def test_interrupts_one_after_another(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a second Control-C while the first is being handled nor one without a running answer ends the program."""
    chat = vlpack.load(package).chat(sampling=vlpack.Sampling(temperature=0))
    screen = chat_terminal.Terminal(chat)
    shown: list[str] = []

    def show(pieces: Any) -> None:
        shown.extend(text for _, text in pieces)
        screen._interrupted(2, None)

    monkeypatch.setattr(screen, "_show", show)
    screen._take(READ)
    screen._interrupted(2, None)
    assert len(chat.turns) == 1
    assert chat.turns[0].assistant["content"] == "".join(shown)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read"),
        ("[", "is not JSON"),
        ("{}", "does not hold a list"),
        ('[{"role": "user", "content": "?"}]', "in turn"),
    ],
)
def test_a_conversation_that_cannot_go_on(content: str | None, said: str, package: Path, tmp_path: Path) -> None:
    file = tmp_path / "saved.json"
    if content is not None:
        file.write_text(content, encoding="utf-8")
    done = piped(package, "--messages", file, text="Hello\n")
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
