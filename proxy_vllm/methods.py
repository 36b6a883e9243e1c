"""Formulas of decoding-time steering, as members in the places of expert and antiexpert.

    logits = base + alpha * (expert - antiexpert)

docs/methods.md has each paper's own formula, and the tests of ``kernels/reference.py`` the proof.
"""

from dataclasses import dataclass
from typing import Any

from proxy_vllm.errors import UserError

_ROLES = ("expert", "antiexpert")


@dataclass(frozen=True)
class Method:
    """One formula.

    Args:
        base_roles: small members that are the base itself, which a user does not name.
        alpha: strength of engines that name none.
        beta: their plausibility threshold; 0 is off.
        guided: the antiexpert is the base on a prompt of its own, and the expert on the base's.
    """

    base_roles: tuple[str, ...] = ()
    alpha: float = 1.0
    beta: float = 0.0
    guided: bool = False

    @property
    def named_roles(self) -> tuple[str, ...]:
        """Small members that a user has to name."""
        return tuple(role for role in _ROLES if role not in self.base_roles)


METHODS = {
    "proxy": Method(),
    "dexperts": Method(),
    "contrastive": Method(base_roles=("expert",), alpha=0.5, beta=0.1),
    "dera": Method(base_roles=("antiexpert",)),
    "cfg": Method(base_roles=_ROLES, alpha=0.5, guided=True),
}


def method_fields(
    method: str,
    expert: str | None,
    antiexpert: str | None,
    alpha: Any = None,
    beta: Any = None,
    adapters: bool = False,
) -> dict[str, Any]:
    """Fields of ``ProxyConfig`` for what a user named; what was left out is the method's default.

    ``adapters``: whether requests may bring the expert as an adapter of the antiexpert.

    Raises:
        UserError: an unknown method, or a member too many or too few for it.
    """
    if method not in METHODS:
        raise UserError(f"--method {method}: there are {', '.join(METHODS)}")
    chosen, given = METHODS[method], {"expert": expert, "antiexpert": antiexpert}
    for role in chosen.base_roles:
        if given[role]:
            raise UserError(f"--method {method}: the {role} is the base itself; leave --{role} out")
        given[role] = ""
    for role in chosen.named_roles:
        if role == "expert" and adapters:
            given[role] = given[role] or ""
        elif not given[role]:
            other = f" (--method {method} needs it)" if method != "proxy" else ""
            raise UserError(f"{role}: a model folder or hub name is needed (--{role} MODEL){other}")
    return {
        "method": method,
        **{role: str(name) for role, name in given.items()},
        "alpha": chosen.alpha if alpha is None else alpha,
        "beta": chosen.beta if beta is None else beta,
    }
