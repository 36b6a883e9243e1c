"""Requests that one member answers by itself (``proxy_member``), to compare with steered answers.

No alpha gives the expert's answer, since the formula has the base in it. A worker carries such a
request as an alpha that no formula has, by the road that alphas take anyway.
"""

import math
from typing import Any

from proxy_vllm.errors import UserError

MEMBER_KEY = "proxy_member"
# What stands for a member in the place of alpha. With alpha 0 the formula is the base alone.
ALPHA_OF_MEMBER = {"base": 0.0, "expert": math.inf, "antiexpert": -math.inf}


def member_of(extra_args: dict[str, Any] | None, others: tuple[str, ...] = ()) -> str | None:
    """Which member alone a request asks for; None for the steered answer.

    Args:
        extra_args: of the request.
        others: keys of steering, which mean nothing to a member alone.

    Raises:
        UserError: no member has that name, or one of ``others`` is named too.
    """
    given = extra_args or {}
    member = given.get(MEMBER_KEY)
    if member is None:
        return None
    if not isinstance(member, str) or member not in ALPHA_OF_MEMBER:
        raise UserError(f"{MEMBER_KEY} is {member!r}: there are {', '.join(ALPHA_OF_MEMBER)}")
    for key in others:
        if given.get(key) is not None:
            raise UserError(f"{key}: {MEMBER_KEY} asks for the {member} as it is; leave one out")
    return member
