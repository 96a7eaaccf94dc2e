"""The command ``vlpack chat``: a conversation in a terminal or over a pipe, built on `vlpack.runtime.chat.Chat`."""

from __future__ import annotations

import io
import os
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from vlpack.cli import console
from vlpack.cli.conversations import write_messages
from vlpack.cli.image_arguments import image_files
from vlpack.errors import InputError, OptionError, VlpackError
from vlpack.preprocess import load_image
from vlpack.runtime.chat import Chat
from vlpack.runtime.reasoning import ReasoningStream, opens_reasoning

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession

    from vlpack.runtime.answer import AnswerStream

COMMANDS = (
    ("/image FILE or URL …", 'show images, or all of a folder or pattern, with the next message ("" takes them back)'),
    ("/video FILE …", 'show videos (or folders of images) with the next message ("" takes them back)'),
    (
        "/system [TEXT]",
        'tell the model how to behave; without a text, show the system message ("" removes it)',
    ),
    ("/history", "the conversation so far"),
    ("/drop [N]", "forget the oldest turn, or N of them"),
    ("/reset", "forget the whole conversation"),
    ("/save FILE", "write the conversation as JSON (continue it with vlpack chat PACKAGE --messages FILE)"),
    ("/stats", "time and tokens of the last answer, and how full the context is"),
    ("/exit", "leave; so does Ctrl-D"),
)
"""The commands and their descriptions, as ``/help`` shows them."""
KEYS = (
    "A \\ at the end of a line, or Alt-Enter, continues the message in the next line. To send a message that begins "
    "with /, begin it with //. Ctrl-C stops an answer; the part that was generated stays in the conversation."
)
"""The text of ``/help`` below the commands."""

_NONE = ('""', "''")
"""The arguments of a command that take back what was given."""


class Terminal:
    """The loop of a chat: reads messages and commands from standard input and prints the answers.

    Args:
        chat: the conversation.
        images: files and URLs of images for the first message.
        videos: files and folders of videos for the first message.

    Raises:
        InputError: an image or video does not exist, or the package does not take it.
    """

    def __init__(self, chat: Chat, images: Sequence[str] = (), videos: Sequence[str] = ()) -> None:
        self.chat = chat
        self.images, self.videos = self._there(images), self._there(videos, of_videos=True)
        self._stoppable = False
        self._stream: AnswerStream | None = None
        self._written: set[Path] = set()
        self._commands: dict[str, Callable[[str], None]] = {
            "image": self._image,
            "video": self._video,
            "system": self._system,
            "history": self._history,
            "drop": self._drop,
            "reset": self._reset,
            "save": self._save,
            "stats": self._stats,
            "help": self._help,
        }
        self.interactive = console.is_terminal(sys.stdin) and console.is_terminal(sys.stdout)

    def run(self) -> None:
        """Runs the chat until /exit or the end of the input."""
        before = signal.getsignal(signal.SIGINT)  # ends the program, which is right if the input is a pipe
        try:
            if self.interactive:
                signal.signal(signal.SIGINT, self._interrupted)
                self._say(f"{self.chat.context} tokens of context · /help · Ctrl-D leaves")
            self._say_pending()
            self._warn()
            read = self._reader()
            while (line := read()) is not None:
                if line.strip() in ("/exit", "/quit", "/bye"):
                    break
                self._take(line)
        finally:
            signal.signal(signal.SIGINT, before)

    def _take(self, line: str) -> None:
        """Handles one message or command. An error in it is printed, and the chat goes on."""
        try:
            try:
                self._stoppable = True
                self._do(line)
            finally:
                self._stoppable = False
        except VlpackError as error:
            console.show_error(error)
        except KeyboardInterrupt:
            self._say("Stopped.")

    def _do(self, line: str) -> None:
        if line.startswith("/") and not line.startswith("//"):
            name, rest = [*line[1:].split(maxsplit=1), "", ""][:2]
            if name not in self._commands:
                raise OptionError(f"There is no command /{name}.", "/help lists them; // begins a message with /.")
            self._commands[name](rest.strip())
        elif line.strip():
            try:
                self._answer(line[1:] if line.startswith("//") else line)
            except VlpackError:
                self._say_pending()
                if self.images:
                    self._say('/image "" takes the images back.')
                raise

    def _interrupted(self, number: int, frame: object) -> None:
        """Stops the current answer on Control-C; a second Control-C is ignored while the first is being handled."""
        if self._stoppable:
            self._stoppable = False
            raise KeyboardInterrupt

    def _answer(self, text: str) -> None:
        with console.waiting("preparing the question"):
            stream = self.chat.stream(text, self.images, self.videos)
        self._stream, turns = stream, len(self.chat.turns)
        reasoning = ReasoningStream(opens_reasoning(stream.prompt.text))
        if self.images:
            console.note_large_images(self.chat.model, stream.prompt)
        stopped = False
        try:
            with console.waiting(console.reading(stream.prompt)):
                first = next(stream, "")
            self._show(reasoning.push(first))
            for piece in stream:
                self._show(reasoning.push(piece))
        except KeyboardInterrupt:
            stopped = True
            stream.close()
        except BaseException:
            console.out.print()
            raise
        self._show(reasoning.flush())
        console.out.print()
        if stays := len(self.chat.turns) > turns:
            self.images, self.videos = [], []
        if stopped:
            kept = "the generated part stays in the conversation" if stays else "nothing stays in the conversation"
            self._say(f"(stopped; {kept})")
        elif stream.answer.finish_reason == "length":
            count = len(stream.answer.tokens)
            why = "" if count >= self.chat.max_tokens else ", as the context is full: /drop forgets the oldest turn"
            self._say(f"(cut after {count} tokens{why})")
        self._warn()

    def _warn(self) -> None:
        if warning := self.chat.warning():
            console.err.print(f"{warning} /drop forgets the oldest{self._images_back()}.", style="yellow")

    def _images_back(self) -> str:
        """An addition to the warning about the context, if images wait for the next question."""
        return ', and /image "" takes back the images that wait for the next question' if self.images else ""

    def _show(self, pieces: Sequence[tuple[bool, str]]) -> None:
        for thinking, text in pieces:
            shown = console.without_controls(text) if console.is_terminal(sys.stdout) else text
            if thinking and self.interactive:
                console.out.print(Text(shown, style="dim"), end="")
            else:  # not by rich, which replaces :words: by emoji and tabs by spaces
                print(shown, end="")
        print(end="", flush=True)

    def _image(self, rest: str) -> None:
        named = [] if rest in _NONE else _sources(rest, "/image FILE")
        sources = [file for name in named for file in image_files(name)]
        self.images = self.images + self._there(sources) if sources else []
        self._say_pending()

    def _video(self, rest: str) -> None:
        sources = [] if rest in _NONE else _sources(rest, "/video FILE")
        self.videos = self.videos + self._there(sources, of_videos=True) if sources else []
        self._say_pending()

    def _there(self, sources: Sequence[str], *, of_videos: bool = False) -> list[str]:
        """Checks the sources of images or videos now, so that an error is not reported only with the question."""
        self.chat.model.prompts.check_takes(images=bool(sources) and not of_videos, videos=bool(sources) and of_videos)
        for source in sources:
            if not of_videos:
                load_image(source, allow_private_urls=self.chat.allow_private_urls)
            elif not os.path.exists(source):
                raise InputError(f"{source} does not exist.")
        return list(sources)

    def _say_pending(self) -> None:
        named = [*self.images, *self.videos]
        if named:
            self._say(f"With the next message: {', '.join(named)}")

    def _help(self, rest: str) -> None:
        _nothing(rest, "/help")
        table = Table.grid(padding=(0, 3, 0, 0))
        for name, meaning in COMMANDS:
            table.add_row(Text(name), Text(meaning))
        for part in (table, Text(KEYS)):  # wrapped between words; a terminal would break words
            self._console_of_notes().print(part, style="dim", soft_wrap=False)

    def _console_of_notes(self) -> Console:
        """The console for notes: standard error if standard output, which has the answers, is a pipe."""
        return console.out if self.interactive else console.err

    def _system(self, rest: str) -> None:
        if rest:
            self.chat.system = None if rest in _NONE else rest
        self._say(f"System message: {self.chat.system or 'none'}")

    def _history(self, rest: str) -> None:
        _nothing(rest, "/history")
        for message in self.chat.messages:
            content = message.get("content") or ""
            if isinstance(content, list):
                content = " ".join(map(_part, content))
            console.out.print(f"[bold]{message['role']}:[/] {escape(console.without_controls(content))}", emoji=False)

    def _drop(self, rest: str) -> None:
        if rest and not (rest.isdecimal() and len(rest) < 10):
            raise OptionError(f"/drop takes a number of turns, not {rest}.")
        self.chat.drop(int(rest or 1))
        self._say(f"{self.chat.tokens} tokens are left in the conversation.")

    def _reset(self, rest: str) -> None:
        _nothing(rest, "/reset")
        self.chat.reset()
        self.images, self.videos = [], []
        self._say("The conversation is empty.")

    def _save(self, rest: str) -> None:
        (name,) = _sources(rest, "/save FILE", single=True)
        path = Path(name).absolute()
        if os.path.lexists(path) and path not in self._written:
            raise OptionError(f"{path} already exists.", "Give another name.")
        write_messages(path, self.chat.messages)
        self._written.add(path)
        self._say(f"{path} has {_turns(self.chat)}.")

    def _stats(self, rest: str) -> None:
        _nothing(rest, "/stats")
        if self._stream is not None:
            self._say(console.timing(self._stream.answer.stats))
        self._say(
            f"{_turns(self.chat)}, {self.chat.tokens} of {self.chat.context} tokens · "
            f"loaded in {self.chat.model.load_seconds:.2f} s"
        )

    def _say(self, text: str) -> None:
        self._console_of_notes().print(Text(console.without_controls(text), style="dim"))

    def _reader(self) -> Callable[[], str | None]:
        """A function that reads the next message: with an editor in a terminal, else as one line of standard input."""
        if sys.stdin is None:
            raise OptionError("Standard input is closed.", "Run chat in a terminal, or give it lines by a pipe.")
        if not self.interactive:
            if isinstance(sys.stdin, io.TextIOWrapper):
                sys.stdin.reconfigure(errors="surrogateescape")  # file names may contain any bytes
            return lambda: line.rstrip("\r\n") if (line := sys.stdin.readline()) else None
        session = _editor([f"/{name}" for name in (*self._commands, "exit")])

        def read() -> str | None:
            while True:
                try:
                    return session.prompt("> ")
                except KeyboardInterrupt:
                    self._say("Ctrl-D or /exit leaves.")
                except EOFError:
                    return None

        return read


def _editor(commands: Sequence[str]) -> PromptSession[str]:
    """An editor for messages: Enter sends, Alt-Enter or a backslash before Enter starts a new line, Tab completes."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
    from prompt_toolkit.document import Document
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    class Commands(Completer):
        """Completes commands, and file names after the commands that take a file."""

        def get_completions(self, document: Document, complete_event: CompleteEvent):  # type: ignore[no-untyped-def]
            text = document.text_before_cursor
            name, space, rest = text.partition(" ")
            if name in ("/image", "/video", "/save") and space:
                for file in PathCompleter(expanduser=True).get_completions(Document(rest), complete_event):
                    folder = file.display_text.endswith("/")  # so that the next Tab looks into it
                    yield Completion(file.text + "/" * folder, file.start_position, file.display)
            elif text.startswith("/"):
                yield from (Completion(c, -len(text)) for c in commands if c.startswith(text))

    keys = KeyBindings()

    @keys.add("enter")
    def _enter(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.text_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _another_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return PromptSession(
        multiline=True,
        key_bindings=keys,
        completer=Commands(),
        complete_while_typing=False,
        prompt_continuation="… ",
    )


def _sources(rest: str, usage: str, *, single: bool = False) -> list[str]:
    """Splits file names and URLs: quoted, with escaped spaces, or a single existing file whose name has spaces."""
    whole = os.path.expanduser(rest)
    if whole and (single or os.path.exists(whole)):
        if not os.path.exists(whole) and len(whole) > 1 and whole[0] == whole[-1] and whole[0] in "\"'":
            whole = os.path.expanduser(whole[1:-1])
        return [whole]
    try:
        words = shlex.split(rest, posix=os.name != "nt")
    except ValueError as error:
        raise OptionError(f"{rest} cannot be read: {error}.", usage) from None
    if not words:
        raise OptionError("Which file?", usage)
    return [os.path.expanduser(word.strip("\"'") if os.name == "nt" else word) for word in words]


def _part(part: Any) -> str:
    """The text of a part of a message, or its type in brackets."""
    return part if isinstance(part, str) else part.get("text") or f"[{part['type']}]"


def _turns(chat: Chat) -> str:
    return f"{len(chat.turns)} turn{'s' * (len(chat.turns) != 1)}"


def _nothing(rest: str, name: str) -> None:
    if rest:
        raise OptionError(f"{name} takes no argument.", f"Write {name} alone.")
