"""What `fedlora --help` and every command's help say."""

from __future__ import annotations

import click
import pytest
import typer.main
from typer.testing import CliRunner

from fedlora.cli import app

GROUP = typer.main.get_command(app)


def commands(group: click.Command, *above: str) -> list[tuple[str, ...]]:
    """The words of every command and of every group."""
    below = group.commands.items() if isinstance(group, click.Group) else ()
    return [above, *(words for name, one in below for words in commands(one, *above, name))]


def shown(words: tuple[str, ...]) -> str:
    result = CliRunner().invoke(app, [*words, "--help"], catch_exceptions=False, env={"COLUMNS": "80"})
    assert result.exit_code == 0
    return result.output


@pytest.mark.parametrize("words", commands(GROUP), ids=lambda words: " ".join(words) or "fedlora")
def test_help_is_whole(words: tuple[str, ...]) -> None:
    text = shown(words)
    assert "\\" not in text
    assert "..." not in text.partition("Commands:")[2]  # where summaries are cut off
    assert text.count("Arguments:") + text.count("arguments:") <= 1
    one = GROUP
    for word in words:
        assert isinstance(one, click.Group)
        one = one.commands[word]
    flat = " ".join(text.split()).replace("- ", "-")  # lines are broken at hyphens too
    for parameter in one.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, parameter.name
            assert parameter.help.replace("- ", "-") in flat, parameter.name


def test_arguments_have_their_words() -> None:
    assert "RUN A run folder. [required]" in " ".join(shown(("report",)).split())
    assert "NAME The node's name: small letters, digits, - and _. [required]" in " ".join(
        shown(("pki", "node")).split()
    )
    assert shown(("report",)) == shown(("report",))
