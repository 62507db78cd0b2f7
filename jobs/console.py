"""What a person sees while a job runs: events, progress bars, tables, one-line errors. Standard output stays for results."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console as RichConsole
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text


class Console:
    """Events and progress go to standard error; `result` alone writes to standard output, so `--json` can be piped."""

    def __init__(self, *, quiet: bool = False, as_json: bool = False) -> None:
        self.quiet = quiet
        self.as_json = as_json
        self._err = RichConsole(stderr=True, highlight=False)
        # a pipe has no width: nothing is cut off there
        self._out = RichConsole(highlight=False, width=None if sys.stdout.isatty() else 240)

    def event(self, text: str) -> None:
        """One line about something that happened."""
        if not self.quiet:
            self._err.print(escape(text), soft_wrap=True)

    def stage(self, text: str) -> None:
        """The heading of a part of a long job."""
        if not self.quiet:
            self._err.print(f"[bold cyan]▸ {escape(text)}[/]", soft_wrap=True)

    def error(self, text: str) -> None:
        """A user's mistake: one line, no traceback, also when quiet."""
        self._err.print(f"[bold red]error:[/] {escape(text)}", soft_wrap=True)

    @contextmanager
    def progress(
        self, description: str, total: int | None, *, rate: str = ""
    ) -> Iterator[Callable[[int], None]]:
        """A bar on a terminal, nothing elsewhere. Yields `advance(count)`. rate: its unit, such as frames/s; "" = not shown."""
        if self.quiet or not sys.stderr.isatty():
            yield lambda count: None
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            *([_Rate(rate)] if rate else []),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self._err, transient=True) as bar:
            task = bar.add_task(description, total=total)
            yield lambda count: bar.advance(task, count)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A table on standard output; numbers are right-aligned."""
        table = Table(title=title, title_justify="left", title_style="bold")
        for i, column in enumerate(columns):
            numeric = bool(rows) and all(isinstance(row[i], int | float) for row in rows)
            table.add_column(column, justify="right" if numeric else "left")
        for row in rows:
            table.add_row(*(_cell(value) for value in row))
        self._out.print(table)

    def result(self, value: Mapping[str, Any] | Sequence[Any]) -> None:
        """The outcome of a command: JSON for machines, aligned lines for people."""
        if self.as_json:
            sys.stdout.write(json.dumps(_finite(value), indent=2, default=str, allow_nan=False) + "\n")
        elif isinstance(value, Mapping):
            for line in _lines(value):
                self._out.print(line, soft_wrap=True)
        else:
            for item in value:
                self._out.print(escape(str(item)), soft_wrap=True)


class _Rate(ProgressColumn):
    """How many a second, of the last half minute."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.1f} {self.unit}" if task.speed else "")


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return escape("" if value is None else str(value))


def _lines(value: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    width = max((len(str(key)) for key in value), default=0)
    for key, item in value.items():
        if isinstance(item, Mapping) and item:
            yield f"{indent}[bold]{escape(str(key))}[/]"
            yield from _lines(item, indent + "  ")
        elif isinstance(item, list | tuple) and item and isinstance(item[0], Mapping):
            yield f"{indent}[bold]{escape(str(key))}[/] ({len(item)})"
            for entry in item[:20]:
                yield f"{indent}  {escape(json.dumps(entry, default=str))}"
        else:
            yield f"{indent}[bold]{escape(str(key)):<{width}}[/]  {_cell(item)}"
