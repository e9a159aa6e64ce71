"""`leantune chat`: piped and typed, on a run, an adapter and a model; the base beside it; every command."""

from __future__ import annotations

import builtins
import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from leantune.cli import chat, terminal
from leantune.cli.command import printable
from leantune.cli.conversation import Conversation, Settings
from leantune.core.errors import ConfigError

Command = Callable[..., tuple[int, str, str]]
Pipe = Callable[..., tuple[int, str, str]]


@pytest.fixture
def pipe(leantune: Command, monkeypatch: pytest.MonkeyPatch) -> Pipe:
    """`leantune chat` with lines piped in."""

    def run(model: object, *lines: str, options: tuple[object, ...] = ()) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        return leantune("chat", model, "--max-new-tokens", 6, *options)

    return run


@pytest.fixture
def typed(leantune: Command, monkeypatch: pytest.MonkeyPatch) -> Pipe:
    """`leantune chat` with a person at a terminal; an exception in the place of a line is what a key press raises."""

    def run(model: object, *lines: Any, columns: int = 100, options: tuple[object, ...] = ()) -> tuple[int, str, str]:
        waiting = iter(lines)

        def entered(prompt: str = "") -> str:
            line = next(waiting, EOFError())
            if isinstance(line, BaseException):
                raise line
            return str(line)

        monkeypatch.setattr(builtins, "input", entered)
        monkeypatch.setattr(chat, "is_interactive", lambda: True)
        monkeypatch.setenv("COLUMNS", str(columns))
        return leantune("chat", model, "--max-new-tokens", 6, *options)

    return run


def answer_of(leantune: Command, model: Path, prompt: str, *words: object) -> str:
    _, out, _ = leantune("generate", model, "--prompt", prompt, "--max-new-tokens", 6, "--json", *words)
    [pair] = json.loads(out)
    return shown(str(pair["text"]))


def shown(text: str) -> str:
    return printable(text.strip())


def on_lines(*texts: str) -> str:
    return "".join(f"{text}\n" for text in texts)


def test_a_run_on_prompts_continues_each_line_by_itself(trained: Path, pipe: Pipe, leantune: Command) -> None:
    wanted = [answer_of(leantune, trained, f"name {n}:") for n in (1, 2)]
    code, out, err = pipe(trained, "name 1:", "", "name 2:")
    assert code == 0
    assert out == on_lines(*wanted)
    assert "its rows were prompts, not messages" in err


def test_a_run_on_prompts_goes_through_the_template_when_asked(trained: Path, pipe: Pipe, leantune: Command) -> None:
    _, out, err = pipe(trained, "name 1:", options=("--mode", "chat"))
    assert out.strip() == answer_of(leantune, trained, "name 1:", "--chat")
    assert "whole conversation" in err


def test_the_base_answers_beside_it(trained: Path, pipe: Pipe, leantune: Command) -> None:
    tuned, base = (answer_of(leantune, trained, "name 1:", *words) for words in ([], ["--base"]))
    assert tuned != base
    _, out, _ = pipe(trained, "name 1:", "/base")
    assert out == on_lines(tuned, "tuned:", tuned, "base:", base)
    _, out, _ = pipe(trained, "/base on", "name 1:", "/base off", "name 1:")
    assert out == on_lines("tuned:", tuned, "base:", base, tuned)
    _, out, _ = pipe(trained, "name 1:", options=("--both",))
    assert out == on_lines("tuned:", tuned, "base:", base)


def test_two_columns_where_the_terminal_is_wide(trained: Path, typed: Pipe, leantune: Command) -> None:
    tuned, base = (answer_of(leantune, trained, "name 1:", *words).split() for words in ([], ["--base"]))
    _, out, _ = typed(trained, "/base on", "name 1:", "/reset", "/exit", columns=100)
    heading = next(line for line in out.splitlines() if "tuned" in line)
    assert heading.split() == ["tuned", "base"]
    assert set(tuned) | set(base) <= set(out.split())
    _, out, _ = typed(trained, "/base on", "name 1:", columns=60)
    assert "tuned:" in out.splitlines()


def test_a_model_without_a_run(tiny: Path, pipe: Pipe) -> None:
    code, out, err = pipe(tiny, "hello")
    assert code == 0
    assert out.strip()
    assert "chat template" in err
    code, _, err = pipe(tiny, "hello", "/base")
    assert code == 1
    assert "is no tuned model" in err


def test_an_adapter_folder_by_itself(trained: Path, pipe: Pipe, leantune: Command) -> None:
    code, out, _ = pipe(trained / "adapter", "name 1:", options=("--mode", "plain"))
    assert code == 0
    assert out.strip() == answer_of(leantune, trained, "name 1:")


def test_piped_mistakes_end_it_with_code_1(trained: Path, pipe: Pipe) -> None:
    for line, text in (
        ("/bse", "did you mean '/base'?"),
        ("/set heat=1", "unknown"),
        ("/save", "a name"),
        ("/base", "nothing was asked yet"),
        ("/base sideways", "/base on or /base off"),
        ("/system be brief", "no chat template is in use"),
    ):
        code, out, err = pipe(trained, line, "name 1:")
        assert (code, out) == (1, "")
        assert text in err.splitlines()[-1]
    code, _, err = pipe(trained, options=("--mode", "loud"))
    assert (code, "auto, chat or plain" in err) == (1, True)


def test_typed_mistakes_are_told_and_the_loop_goes_on(trained: Path, typed: Pipe) -> None:
    code, out, err = typed(trained, "/bse", KeyboardInterrupt(), "/set seed=3", "/help", EOFError())
    assert code == 0
    assert "did you mean '/base'?" in out
    assert "Ctrl-D leaves" in err
    assert "seed=3" in err
    assert "/save FILE" in out


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(
    trained: Path, typed: Pipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(session: Any, model: Any, prompt: list[int]) -> Iterator[str]:
        yield " half of"
        yield " it"
        raise KeyboardInterrupt

    monkeypatch.setattr(chat.Session, "_pieces", interrupted)
    code, out, err = typed(trained, "name 1:", f"/save {tmp_path / 'talk.jsonl'}")
    assert code == 0
    assert "half of it" in out
    assert "[stopped]" in err
    assert json.loads((tmp_path / "talk.jsonl").read_text()) == {"prompt": "name 1:", "completion": "half of it"}


def test_control_characters_of_a_model_do_not_reach_the_terminal(
    trained: Path, typed: Pipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat.Session, "_pieces", lambda *words: (piece for piece in ["red \x1b[31m", "alert\x07"]))
    for lines in (["name 1:"], ["name 1:", "/base"], ["/base on", "name 1:"]):
        for columns in (60, 100):
            _, out, _ = typed(trained, *lines, columns=columns)
            assert "alert" in out
            assert not {"\x1b", "\x07"} & set(out)


def test_a_conversation_is_asked_with_its_turns_and_saved_as_a_row(tiny: Path, pipe: Pipe, tmp_path: Path) -> None:
    file = tmp_path / "talk.jsonl"
    file.write_text('{"messages": []}', encoding="utf-8")
    code, out, err = pipe(tiny, "/system be brief", "one", "two", f"/save {file}", "/reset", "two", f"/save {file}")
    assert code == 0
    assert "system message set" in err
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()][1:]
    assert [each["role"] for each in rows[0]["messages"]] == ["system", "user", "assistant", "user", "assistant"]
    said = [[each["content"] for each in row["messages"]] for row in rows]
    assert (said[0][:2], said[0][3], said[1][:2]) == (["be brief", "one"], "two", ["be brief", "two"])
    # The same question, with and without a turn before it.
    assert said[0][4] != said[1][2]
    assert out == on_lines(*map(shown, (said[0][2], said[0][4], said[1][2])))


def test_settings_change_the_answer(tiny: Path, pipe: Pipe) -> None:
    lines = ["/set temperature=5 seed=1", "a", "/reset", "a", "/reset", "/set seed=2", "a", "/set max_new_tokens=1"]
    code, out, _ = pipe(tiny, *lines, "/reset", "/set temperature=0", "a")
    assert code == 0
    one, same, other, short = (line.strip() for line in out.split("\n")[:4])
    assert one == same != other
    assert len(short) <= 1


def test_settings_are_checked_all_or_none() -> None:
    settings = Settings()
    changed = settings.changed("temperature=0.7 max_new_tokens=20")
    assert (changed.temperature, changed.max_new_tokens, changed.top_p) == (0.7, 20, 1.0)
    assert settings.changed("") == settings
    for words, text in (
        ("temprature=1", "did you mean 'temperature'?"),
        ("temperature", "unknown"),
        ("seed=1.5", "a whole number"),
        ("top_p=2", "1e-09 to 1"),
        ("max_new_tokens=0", "1 to"),
    ):
        with pytest.raises(ConfigError, match=text):
            settings.changed(words)


def test_the_prompt_is_what_training_sees(tiny: Path) -> None:
    from leantune.models import load_tokenizer

    tokenizer = load_tokenizer(str(tiny))
    talk = Conversation(tokenizer, is_chat=True, system="be brief", turns=[("a", "b"), ("c", "d")])
    wanted = "<s>system\nbe brief</s>\n<s>user\na</s>\n<s>assistant\nb</s>\n<s>user\ne</s>\n<s>assistant\n"
    assert tokenizer.decode(talk.prompt("e", before=1)) == wanted
    own = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    assert tokenizer.decode(Conversation(tokenizer, True, own).prompt("e")) == "[e]"
    assert tokenizer.decode(Conversation(tokenizer, False, turns=[("a", "b")]).prompt("e")) == "e"


@pytest.mark.parametrize(
    ("lines", "entries"),
    [
        (["one", "two"], ["one", "two"]),
        (["one\\", "two\\", "three", "four"], ["one\ntwo\nthree", "four"]),
        (["one\\"], ["one"]),
        (['"""one', "two", 'three"""', "four"], ["one\ntwo\nthree", "four"]),
        (['"""', "  one", "", "two", '"""', "three"], ["  one\n\ntwo", "three"]),
        (['"""never', "closed"], ["never\nclosed"]),
        (['"""at once"""'], ["at once"]),
        (["dos\r"], ["dos"]),
    ],
)
@pytest.mark.parametrize("prompts", [False, True])
def test_entries_of_several_lines(
    lines: list[str], entries: list[str], prompts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    if prompts and "dos\r" in lines:
        pytest.skip("a terminal sends no carriage return")
    found = []
    while (entry := terminal.read_entry(prompts=prompts)) is not None:
        found.append(entry)
    assert found == entries


def test_a_run_of_another_task_is_refused(trained: Path, pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    from leantune.train import Run

    opened = Run.open(trained)
    opened.config.task = "classification"
    monkeypatch.setattr(Run, "open", lambda *_: opened)
    code, _, err = pipe(trained, "hello")
    assert code == 1
    assert "trained for classification" in err
