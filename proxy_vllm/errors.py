"""Errors that a user can mend: the command line shows their text alone, without a traceback."""

from typing import Any


class UserError(ValueError):
    """Bad input or set-up. The message names the culprit and the way out, in one line."""


def one_line(error: BaseException) -> str:
    """An exception in one line; of pydantic's, what is wrong and not where its manual is."""
    errors = getattr(error, "errors", None)
    text = "; ".join(map(_fault, errors())) if callable(errors) else str(error)
    return " ".join(text.split()) or type(error).__name__


def _fault(found: dict[str, Any]) -> str:
    """One of pydantic's errors: its own of a field, or what a validator said."""
    message, place = str(found["msg"]), found.get("loc")
    if message.startswith("Value error, ") or not place:
        return message.removeprefix("Value error, ")
    return f"{place[0]} is {found.get('input')!r}: {message}"


def without_trace(error: BaseException) -> str:
    """An error's text in one line; of a traceback inside it, as Ray and vLLM put there, the end."""
    head, trace, tail = str(error).partition("Traceback (most recent call last)")
    last = tail.strip().splitlines()[-1:] if trace else []
    return " ".join(" ".join([head, *last]).split()) or type(error).__name__
