"""Chat in the terminal: with one model, or with a base and the model made from it, each with its own conversation.

Answers go to the standard output and all else to the standard error, so that a pipe gets answers alone."""

import contextlib
import io
import re
import sys
from collections.abc import Callable, Generator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from flows.screen import SafeConsole, show_progress, visible
from tasks.core.errors import ConfigError, ForgetlessError
from tasks.core.manifest import read_manifest, run_ids
from tasks.core.store import Store

if TYPE_CHECKING:
    from tasks.export.chat import ChatModel, Kind, Sampling

WIDE = 100  # columns of a terminal on which two answers stand side by side
HELP = "/clear begins a new conversation, /system TEXT sets the system prompt, /exit or Ctrl-D ends the chat."


@dataclass
class Speaker:
    """A model in a chat, and its conversation. `system` None stands for what the model itself begins with."""

    name: str
    model: "ChatModel"
    system: str | None = None
    turns: list[dict[str, str]] = field(default_factory=list)
    stopped: bool = False
    """Whether the model ended its last answer itself."""
    note: str = ""
    """What the reader should know of the last answer."""

    @property
    def begins_with(self) -> str | None:
        return self.model.system if self.system is None else self.system

    def ask(self, text: str, sampling: "Sampling") -> Generator[str, None, None]:
        """Yield the answer piece by piece. It is kept with its question, also what was written before it was stopped;
        a question that got no answer is forgotten. Raises ForgetlessError."""
        from tasks.export.chat import fit

        first = [{"role": "system", "content": self.begins_with}] if self.begins_with else []
        asked = [*first, *self.turns, {"role": "user", "content": text}]
        messages = fit(self.model, asked, sampling.max_tokens)
        self.stopped, self.note = False, ""
        if left_out := (len(asked) - len(messages)) // 2:
            turns = "turn was" if left_out == 1 else f"{left_out} turns were"
            self.note = f"The oldest {turns} left out: the model reads {self.model.context:,} tokens. "
        answer = ""
        stream = self.model.stream(messages, sampling)
        try:
            with contextlib.closing(stream):
                while True:
                    piece = next(stream)
                    piece = piece if answer else piece.lstrip()
                    answer += piece
                    if piece:
                        yield piece
        except StopIteration as end:
            self.stopped = bool(end.value)
            if not self.stopped:
                self.note += "The answer was cut off: see --max-tokens."
        finally:
            if answer:
                self.turns = [*messages[len(first) :], {"role": "assistant", "content": answer.rstrip()}]


def open_speakers(
    store: Store, model: str, kind: "Kind", quantisation: str | None, base: bool, system: str | None
) -> list[Speaker]:
    """Return the model that is meant; of a run after its base, where `base` says so. Raises ForgetlessError."""
    own = _kind_of(model, store)
    if own:
        for option, given in ((f"--as {kind}", kind not in ("auto", own)), ("--file", quantisation), ("--base", base)):
            if given:
                raise ConfigError(f"{option} chooses among what a run made, and {model} is no run: leave it out.")
    run = None if own else read_manifest(store, model)
    with show_progress() as say:
        say("Loading the model")
        from tasks.export import chat

        if run is None:
            named = own == "ollama"
            opened = chat.open_named(model.removeprefix("ollama:")) if named else chat.open_path(Path(model))
            return [Speaker("model", opened, system)]
        speakers = [Speaker("tuned", chat.open_run(store, run, kind, quantisation), system)]
        if base:
            say("Loading the base")
            speakers.insert(0, Speaker("base", chat.open_run_base(store, run, kind), system))
    return speakers


def _kind_of(model: str, store: Store) -> "Kind | None":
    """Return what a model is that is no run, None for a run."""
    path = Path(model)
    if model.startswith("ollama:"):
        return "ollama"
    if path.suffix == ".gguf" or path.is_file():
        return "gguf"
    is_folder = "/" in model or (path.is_dir() and model != "latest" and model not in run_ids(store))
    return "merged" if is_folder else None


def ask_once(speakers: list[Speaker], text: str, sampling: "Sampling") -> dict[str, Any]:
    """Return each speaker's answer to one question, with the settings. Raises ForgetlessError."""
    answers = []
    for s in speakers:
        answer = "".join(s.ask(text, sampling)).strip()
        answers.append({"name": s.name, "model": s.model.label, "text": answer, "stopped": s.stopped})
    return {"prompt": text, "system": speakers[-1].begins_with, **asdict(sampling), "answers": answers}


def chat(speakers: list[Speaker], sampling: "Sampling") -> None:
    """Answer what is typed, or comes through a pipe line by line, until it ends."""
    typed = sys.stdin.isatty()
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # gives input() keys to edit with, and what was typed before
    screen = Screen(speakers, sampling)
    for s in speakers:
        screen.say(f"{s.name}: {s.model.label}")
    if typed:
        screen.say(f"{HELP} Ctrl-C stops an answer.")
    while True:
        try:
            line = input("> " if typed else "").strip()
        except EOFError:
            break
        except KeyboardInterrupt:
            if not typed:
                raise
            screen.say(f"\n{HELP}")
            continue
        command = re.fullmatch(r"/(\w+)(?:\s+(.*))?", line)
        if command and command[1] == "exit":
            return
        if command:
            screen.say(_obey(speakers, command[1], command[2]))
        elif line:
            try:
                screen.answer(line)
            except KeyboardInterrupt:  # between two answers
                screen.say("Stopped.")
            except ForgetlessError as error:  # too long a question, or a server that went away: the chat goes on
                screen.say(f"forgetless: {error}")
    if typed:
        print()


def _obey(speakers: list[Speaker], command: str, text: str | None) -> str:
    """Carry out a command, and return what to say of it."""
    if command == "clear":
        for s in speakers:
            s.turns = []
        return "A new conversation begins."
    if command == "system":
        for s in speakers:
            s.system = s.system if text is None else text
        system = speakers[-1].begins_with
        return (
            f"The system prompt is: {visible(system)}" if system else "There is no system prompt but the model's own."
        )
    return f"There is no command /{command}. {HELP}"


class Screen:
    """Shows answers as they are written: on a wide terminal a base's and a tuned model's side by side, else one below
    the other. Ctrl-C stops the answer that is being written, or, where it is the only question (`once`), is raised."""

    def __init__(
        self, speakers: list[Speaker], sampling: "Sampling", once: bool = False, console: Console | None = None
    ) -> None:
        self.speakers, self.sampling, self.once = speakers, sampling, once
        self.console = console or SafeConsole(highlight=False)
        self.notes = SafeConsole(stderr=True, highlight=False)

    def say(self, text: str) -> None:
        self.notes.print(Text(text, "dim"), soft_wrap=True)

    def answer(self, text: str) -> None:
        """Let every speaker answer a question, one after the other. Raises ForgetlessError."""
        if len(self.speakers) > 1 and self.console.is_terminal and self.console.width >= WIDE:
            self._side_by_side(text)
        else:
            self._below_each_other(text)
        for s in self.speakers:
            if s.note:
                self.say(f"{s.name}: {s.note}" if len(self.speakers) > 1 else s.note)

    def _below_each_other(self, text: str) -> None:
        for number, s in enumerate(self.speakers):
            if len(self.speakers) > 1:
                heading = Text(f"{s.name}: {s.model.label}", "bold")
                self.console.print(*(["\n"] if number else []), heading, sep="", soft_wrap=True)
            try:
                self._follow(s, text, lambda piece: self.console.out(visible(piece), end="", highlight=False))
            finally:
                self.console.print()

    def _side_by_side(self, text: str) -> None:
        written = ["" for _ in self.speakers]
        rows = max(1, self.console.height - 4)
        with Live(get_renderable=lambda: self._columns(written, rows), console=self.console, transient=True):
            for number, s in enumerate(self.speakers):

                def show(piece: str, number: int = number) -> None:
                    written[number] += piece

                self._follow(s, text, show)
        self.console.print(self._columns(written))

    def _follow(self, speaker: Speaker, text: str, show: Callable[[str], None]) -> None:
        try:
            with contextlib.closing(speaker.ask(text, self.sampling)) as pieces:
                for piece in pieces:
                    show(piece)
        except KeyboardInterrupt:
            if self.once:
                raise
            speaker.note += "Stopped."

    def _columns(self, written: list[str], rows: int | None = None) -> Table:
        """Return the answers beside each other; with `rows`, the last so many lines of each."""
        table = Table.grid(expand=True, padding=(0, 2))
        cells = [Text(visible(answer)) for answer in written]
        if rows:
            width = self.console.width // 2 - 4
            cells = [Text("\n").join(list(cell.wrap(self.console, width))[-rows:]) for cell in cells]
        for _ in self.speakers:
            table.add_column(ratio=1, overflow="fold")
        table.add_row(*(Text(f"{s.name}: {s.model.label}", "bold") for s in self.speakers))
        table.add_row(*cells)
        return table
