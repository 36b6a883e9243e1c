"""The names under which a request tells us something.

They are keys of ``SamplingParams.extra_args``, and over HTTP of ``vllm_xargs``. Each is defined
beside what it means; this is the list of all.
"""

from collections.abc import Iterable
from difflib import get_close_matches

from proxy_vllm.config import ALPHA_KEY, GUIDANCE_KEY
from proxy_vllm.errors import UserError
from proxy_vllm.explain.request import ALONE_KEY, EXPLAIN_KEYS
from proxy_vllm.member_alone import MEMBER_KEY
from proxy_vllm.own_prompts.prompts import OWN_PROMPT_KEYS, RESOLVED_KEY
from proxy_vllm.plausibility import BETA_KEY

OUR_KEYS = (ALPHA_KEY, BETA_KEY, GUIDANCE_KEY, MEMBER_KEY, *EXPLAIN_KEYS, *OWN_PROMPT_KEYS)

# What our own parts tell each other; requests that set these are refused elsewhere.
_WITHIN = (RESOLVED_KEY, ALONE_KEY)
# What others call the scale of classifier-free guidance, as `_letters` reads it.
_GUIDANCE_ELSEWHERE = ("guidance", "cfg", "cfgscale")


def refuse_misspelled(names: Iterable[str], place: str = "extra_args") -> None:
    """Refuse names that are almost ours, or begin as ours do: a server would pass over them.

    Args:
        names: keys of ``extra_args``; those of others' are let through.
        place: where they stand, for the message.

    Raises:
        UserError: with the right name, or all names where none is close.
    """
    letters = {_letters(key): key for key in OUR_KEYS}
    letters |= dict.fromkeys(_GUIDANCE_ELSEWHERE, GUIDANCE_KEY)
    known = {*OUR_KEYS, *_WITHIN}
    for name in names:
        if name in known:
            continue
        own = _letters(name)
        for found in (
            own,
            f"proxy{own}",
            own.removeprefix("proxy"),
            *get_close_matches(own, letters, 1, 0.85),
        ):
            if found in letters:
                raise UserError(f"{name} in {place} is not known: the name is {letters[found]}")
        if own.startswith("proxy"):
            raise UserError(f"{name} in {place} is not known: there are {', '.join(OUR_KEYS)}")


def _letters(name: str) -> str:
    return "".join(filter(str.isalnum, name)).lower()
