"""`leantune chat`: a conversation with a trained model, its base beside it when asked."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.live import Live
from rich.table import Table
from rich.text import Text

from leantune.cli.command import TaskOfRun, console, one_command, printable, say
from leantune.cli.conversation import Conversation, Settings
from leantune.cli.terminal import enable_editing, is_interactive, read_entry
from leantune.core.errors import ConfigError, LeantuneError, describe, did_you_mean

_WIDE = 80  # columns of a terminal in which two answers fit beside each other
# Formats of rows that become messages where the tokenizer has a chat template.
_CONVERSATIONS = ("messages", "sharegpt", "alpaca")
_HELP = """\
/base             what the base says to the last question, beside the tuned model's answer
/base on|off      both models answer every question, or the tuned one alone
/system TEXT      the system message from here on; without TEXT: none
/set NAME=VALUE   temperature, max_new_tokens, top_p, seed; without words: show them
/reset            forget the conversation
/save FILE        add the conversation to a jsonl file, as rows that training takes
/help             these lines
/exit             leave (also Ctrl-D); Ctrl-C stops an answer
A line that ends in a backslash goes on in the next one; \"\"\" opens and closes several lines."""


def command(words: list[str]) -> Any:
    """The command `leantune chat`."""
    del words
    return one_command(chat)


def chat(
    model: Annotated[str, typer.Argument(help="A run folder, an adapter folder, or a model without a run.")],
    adapter: TaskOfRun = None,
    mode: Annotated[
        str, typer.Option(metavar="auto|chat|plain", help="chat: through the chat template; plain: continue each text.")
    ] = "auto",
    system: Annotated[str, typer.Option(help="System message.")] = "",
    both: Annotated[bool, typer.Option("--both", help="Show the base's answer to every question, too.")] = False,
    max_new_tokens: Annotated[int, typer.Option(metavar="int", help="Most new tokens of an answer.")] = 256,
    temperature: Annotated[float, typer.Option(metavar="float", help="0 takes the likeliest token each time.")] = 0.0,
    top_p: Annotated[float, typer.Option(metavar="float", help="Draw from this much probability.")] = 1.0,
    seed: Annotated[int, typer.Option(metavar="int", help="Seed of the draws.")] = 0,
) -> None:
    """Answers appear while they are written. A model trained on messages is asked through its chat template with the
    whole conversation; one trained on prompts continues each text by itself. /help lists what can be typed.

    Piped input is read line by line without prompts, and the first line that cannot be done ends it with exit code 1.
    """
    settings = Settings(max_new_tokens, temperature, top_p, seed)
    if mode not in ("auto", "chat", "plain"):
        raise ConfigError(describe("--mode", repr(mode), "auto, chat or plain", "choose one"))
    voices = _open(model, adapter)
    conversation = _conversation(voices, mode)
    session = Session(voices, conversation, settings, both=both, interactive=is_interactive())
    if system:
        session.obey(f"/system {system}")
    if both:
        voices.require_base()
    how = "chat template, whole conversation" if conversation.is_chat else f"plain text, continued; {voices.why}"
    say(f"{voices.name}: {how}. /help lists commands.")
    session.run()


@dataclass
class Voices:
    """The models that answer.

    Attributes:
        name: what was opened.
        tuned: the model that was asked for.
        tokenizer: its tokenizer.
        base: opens the base beside it; None where it is the base.
        trained_on_messages: whether its rows were conversations; None where that is not known.
        template: chat template of the run, where it has one of its own.
        why: says why it is not asked through a chat template.
    """

    name: str
    tuned: Any
    tokenizer: Any
    base: Callable[[], Any] | None = None
    trained_on_messages: bool | None = None
    template: str | None = None
    why: str = field(default="no chat template")

    def require_base(self) -> Callable[[], Any]:
        """How to open the base.

        Raises:
            ConfigError: there is none beside this model.
        """
        if self.base is None:
            raise ConfigError(describe("/base", f"{self.name} is no tuned model", "a run", "give a run folder"))
        return self.base


def _open(name: str, task: str | None) -> Voices:
    """A run (or one of its tasks), an adapter folder, or a model by itself."""
    folder = Path(name)
    if (folder / "config.yaml").is_file() or (folder / "run.json").is_file():
        return _open_run(folder, task)
    say(f"loading {name}")
    if (folder / "adapter_config.json").is_file():
        from leantune.adapters import load
        from leantune.adapters.folder import recorded_base

        base = recorded_base(folder)
        tuned = load(base, folder).eval()
        return Voices(name, tuned, base.tokenizer, tuned.disable_adapter, template=_template_of(folder))
    from leantune.models import load_base

    opened = load_base(name)
    return Voices(name, opened.model, opened.tokenizer)


def _open_run(folder: Path, task: str | None) -> Voices:
    from leantune.cli.comparison import base_of
    from leantune.train import Run
    from leantune.train.folder import template_of

    run = Run.open(folder, task)
    if run.config.task != "causal-lm":
        own = f" --adapter {task}" if task else ""
        got, do = f"trained for {run.config.task}", f"leantune eval {folder} --data FILE{own} scores it"
        raise ConfigError(describe(str(folder), got, "a language model", do))
    say(f"loading {run.config.model} and {run.result}")
    run.load()
    return Voices(
        str(folder),
        run.model,
        run.tokenizer,
        lambda: base_of(run),
        _trained_on_messages(run.summary),
        template_of(folder, run.result),
    )


def _template_of(folder: Path) -> str | None:
    path = folder / "chat_template.jinja"
    return path.read_text(encoding="utf-8") if path.is_file() else None


def _trained_on_messages(summary: dict[str, Any]) -> bool | None:
    """Whether the rows of a run were conversations, or can be asked as such; None when its record does not tell."""
    form = ((summary.get("data") or {}).get("source") or {}).get("format")
    return None if form is None else form in _CONVERSATIONS


def _conversation(voices: Voices, mode: str) -> Conversation:
    has_template = bool(voices.template or voices.tokenizer.chat_template)
    is_chat = mode == "chat" or (mode == "auto" and has_template and voices.trained_on_messages is not False)
    if mode == "plain":
        voices.why = "as --mode plain asks"
    elif has_template and not is_chat:
        voices.why = "its rows were prompts, not messages"
    return Conversation(voices.tokenizer, is_chat, voices.template)


class Session:
    """The loop: read an entry, obey or answer it.

    Args:
        voices: the models.
        conversation: what was said.
        settings: how answers are written.
        both: whether the base answers too.
        interactive: a person is typing; mistakes are then told and the loop goes on.
    """

    def __init__(
        self, voices: Voices, conversation: Conversation, settings: Settings, *, both: bool, interactive: bool
    ) -> None:
        self.voices = voices
        self.conversation = conversation
        self.settings = settings
        self.both = both
        self.interactive = interactive
        self.out = console()
        self.commands: dict[str, Callable[[str], None]] = {
            "/base": self._base,
            "/exit": self._exit,
            "/help": self._help,
            "/quit": self._exit,
            "/reset": self._reset,
            "/save": self._save,
            "/set": self._set,
            "/system": self._system,
        }
        self.over = False

    def run(self) -> None:
        """Until the input ends or /exit."""
        if self.interactive:
            enable_editing()
        while not self.over:
            try:
                entry = read_entry(prompts=self.interactive)
                if entry is None:
                    break
                if entry.strip():
                    self.take(entry)
            except KeyboardInterrupt:
                if not self.interactive:
                    raise
                say("\n(/exit or Ctrl-D leaves)")
            except (LeantuneError, OSError) as error:
                if not self.interactive:
                    raise
                self.out.print(Text(str(error), style="red"), soft_wrap=True)
        if self.interactive and not self.over:
            self.out.print()

    def take(self, entry: str) -> None:
        """Obey a command, or answer a question."""
        if entry.startswith("/"):
            self.obey(entry)
        else:
            self.answer(entry)

    def obey(self, entry: str) -> None:
        """Carry out a command.

        Raises:
            LeantuneError: it is unknown, or cannot be done.
        """
        name, _, words = entry.strip().partition(" ")
        if name not in self.commands:
            raise ConfigError(describe(name, "no such command", did_you_mean(name, self.commands), "/help lists them"))
        self.commands[name](words.strip())

    def answer(self, question: str) -> None:
        """Answer a question, and remember both."""
        prompt = self.conversation.prompt(question)
        if self.both:
            tuned, _ = self._compare(prompt, None)
        else:
            tuned = self._say(self.voices.tuned, prompt)
        self.conversation.turns.append((question, tuned))

    # Answers

    def _pieces(self, model: Any, prompt: list[int]) -> Iterator[str]:
        from leantune.evaluate import stream

        chosen = self.settings
        yield from stream(
            model,
            self.voices.tokenizer,
            prompt,
            max_new_tokens=chosen.max_new_tokens,
            temperature=chosen.temperature,
            top_p=chosen.top_p,
            seed=chosen.seed + len(self.conversation.turns),
        )

    def _write(self, model: Any, prompt: list[int], show: Callable[[str], None]) -> str:
        """One answer, each piece shown as it comes; Ctrl-C keeps what was written."""
        parts: list[str] = []
        with self._stoppable(), closing(self._pieces(model, prompt)) as pieces:  # type: ignore[type-var]
            for piece in pieces:
                # White space before the first word is of the format, not of the answer.
                piece = piece if "".join(parts).strip() else piece.lstrip()
                if piece:
                    parts.append(piece)
                    show(piece)
        return "".join(parts).rstrip()

    @contextmanager
    def _stoppable(self) -> Iterator[None]:
        try:
            yield
        except KeyboardInterrupt:
            if not self.interactive:
                raise
            say(" [stopped]")

    def _say(self, model: Any, prompt: list[int]) -> str:
        text = self._write(model, prompt, _print_piece)
        _print_piece("\n\n" if self.interactive else "\n")
        return text

    def _compare(self, prompt: list[int], known: str | None) -> tuple[str, str]:
        """Both answers; the tuned one is written anew unless it is known."""
        if self.interactive and shutil.get_terminal_size().columns >= _WIDE:
            return self._compare_beside(prompt, known)
        titled: dict[str, str] = {}
        for title in ("tuned", "base"):
            self.out.print(Text(f"{title}:", style="bold green" if title == "tuned" else "bold dim"))
            if title == "tuned" and known is not None:
                self.out.print(Text(printable(known)), soft_wrap=True)
                titled[title] = known
            elif title == "tuned":
                titled[title] = self._say(self.voices.tuned, prompt)
            else:
                with self.voices.require_base()() as base:
                    titled[title] = self._say(base, prompt)
        return titled["tuned"], titled["base"]

    def _compare_beside(self, prompt: list[int], known: str | None) -> tuple[str, str]:
        shown = {"tuned": known or "", "base": ""}
        with Live(_columns(shown), console=self.out, transient=True, vertical_overflow="ellipsis") as live:

            def grow(title: str) -> Callable[[str], None]:
                def show(piece: str) -> None:
                    shown[title] += piece
                    live.update(_columns(shown))

                return show

            if known is None:
                shown["tuned"] = self._write(self.voices.tuned, prompt, grow("tuned"))
            with self.voices.require_base()() as base:
                shown["base"] = self._write(base, prompt, grow("base"))
        self.out.print(_columns(shown))
        self.out.print()
        return shown["tuned"], shown["base"]

    # Commands

    def _base(self, words: str) -> None:
        self.voices.require_base()
        if words in ("on", "off"):
            self.both = words == "on"
            say("both models answer from here on" if self.both else "the tuned model answers alone from here on")
        elif words:
            raise ConfigError(describe(f"/base {words}", "unknown", "/base, /base on or /base off", "choose one"))
        elif not self.conversation.turns:
            raise ConfigError(describe("/base", "nothing was asked yet", "a question to ask the base", "ask one"))
        else:
            question, answer = self.conversation.turns[-1]
            self._compare(self.conversation.prompt(question, before=len(self.conversation.turns) - 1), answer)

    def _set(self, words: str) -> None:
        self.settings = self.settings.changed(words)
        say(str(self.settings))

    def _system(self, words: str) -> None:
        if not self.conversation.is_chat:
            raise ConfigError(
                describe(
                    "/system", "no chat template is in use", "a chat", "put it into the prompt, or use --mode chat"
                )
            )
        self.conversation.system = words
        say("system message set" if words else "no system message")

    def _reset(self, words: str) -> None:
        del words
        self.conversation.turns.clear()
        say("the conversation is forgotten")

    def _save(self, words: str) -> None:
        if not words:
            raise ConfigError(describe("/save", "no file", "a name", "/save FILE.jsonl"))
        rows = self.conversation.save(Path(words).expanduser())
        say(f"{rows} row{'s' if rows > 1 else ''} added to {words}")

    def _help(self, words: str) -> None:
        del words
        self.out.print(Text(_HELP))

    def _exit(self, words: str) -> None:
        del words
        self.over = True


def _print_piece(piece: str) -> None:
    sys.stdout.write(printable(piece))
    sys.stdout.flush()


_ANSWER_STYLES: dict[Literal["tuned", "base"], str] = {"tuned": "", "base": "dim"}


def _columns(shown: dict[str, str]) -> Table:
    table = Table(box=None, expand=True, padding=(0, 2, 0, 0), header_style="bold")
    for title in ("tuned", "base"):
        table.add_column(title, ratio=1)
    table.add_row(*(Text(printable(shown[title]), style=style) for title, style in _ANSWER_STYLES.items()))
    return table
