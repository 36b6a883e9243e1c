"""Errors that the user can mend. The command line shows their text only, without a traceback."""

from typing import Any


class UserError(ValueError):
    """Bad input or a bad set-up. Its message is one line: what is wrong, and what to do."""


def one_line(error: BaseException) -> str:
    """The text of an exception in one line. Pydantic's links to its manual are left out."""
    errors = getattr(error, "errors", None)
    text = "; ".join(map(_fault, errors())) if callable(errors) else str(error)
    return " ".join(text.split()) or type(error).__name__


def _fault(found: dict[str, Any]) -> str:
    """One error of pydantic, which is about a field or comes from a validator."""
    message, place = str(found["msg"]), found.get("loc")
    if message.startswith("Value error, ") or not place:
        return message.removeprefix("Value error, ")
    return f"{place[0]} is {found.get('input')!r}: {message}"


def without_trace(error: BaseException) -> str:
    """The text of an error in one line.

    Ray and vLLM put whole tracebacks into their messages. Only the last line of one is kept.
    """
    head, trace, tail = str(error).partition("Traceback (most recent call last)")
    last = tail.strip().splitlines()[-1:] if trace else []
    return " ".join(" ".join([head, *last]).split()) or type(error).__name__
