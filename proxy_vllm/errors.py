"""Errors that a user can mend: the command line shows their text alone, without a traceback."""


class UserError(ValueError):
    """Bad input or set-up. The message names the culprit and the way out, in one line."""


def without_trace(error: BaseException) -> str:
    """An error's text in one line; of a traceback inside it, as Ray and vLLM put there, the end."""
    head, trace, tail = str(error).partition("Traceback (most recent call last)")
    last = tail.strip().splitlines()[-1:] if trace else []
    return " ".join(" ".join([head, *last]).split()) or type(error).__name__
