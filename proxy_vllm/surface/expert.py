"""What a user meets of a trio: its tokenizer, chat template, end tokens and sampling defaults.

The base lends its ability and the expert its behaviour, so all four are the expert's as far as the
base's vocabulary allows. Weights, the vocabulary's size and token ids stay the base's. Everything
is said to vLLM through its own engine arguments (``tokenizer``, ``chat_template``,
``generation_config``), so that every route of vLLM's reads the same. docs/real_pairs.md says why.
"""

import atexit
import json
import shutil
import tempfile
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proxy_vllm.adapters.settings import named_adapters
from proxy_vllm.adapters.surface import lend_surface
from proxy_vllm.checks.tokenizers import disagreements, is_placeholder
from proxy_vllm.config import ROLES, ProxyConfig
from proxy_vllm.errors import UserError
from proxy_vllm.own_prompts.chat_templates import AUTO, resolve_template
from proxy_vllm.surface.member import Member, read_members, token_ids

if TYPE_CHECKING:
    from vllm.config import ModelConfig


# Text by which it shows that two tokenizers begin or cut text differently.
_PROBE = "The year 2024, it's over."


def show_expert(
    kwargs: dict[str, Any],
    configs: "dict[str, ModelConfig]",
    proxy: ProxyConfig,
    *,
    base_chat_template: str | None = None,
    caps_max_tokens: bool = False,
) -> dict[str, Any]:
    """Engine arguments by which an engine shows its users the expert.

    Args:
        kwargs: arguments of ``vllm.LLM`` or of vLLM's server; what the user set is kept.
        configs: vLLM's configuration of each member.
        proxy: ``stop_tokens`` and the small members' chat templates.
        base_chat_template: the option of that name.
        caps_max_tokens: vLLM's server takes ``max_new_tokens`` of a folder that
            ``generation_config`` names for the most that a request may ask for, and of a model for
            its default. Set there, so that the expert's caps nothing.

    Raises:
        UserError: options that exclude each other, or that the members cannot honour.
    """
    from vllm.logger import init_logger

    members = read_members(configs, proxy)
    warnings = lend_surface(members["expert"], named_adapters(kwargs))
    surface = _Surface(dict(kwargs), members, proxy, caps_max_tokens)
    surface.set_end_tokens()
    surface.set_tokenizer()
    surface.set_chat_template(base_chat_template)
    surface.set_generation_config()
    logger = init_logger(f"vllm.{__package__}")
    for warning in (*warnings, *surface.warnings):
        logger.warning("%s", warning)
    logger.info("Users meet %s", "; ".join(surface.told))
    return surface.kwargs


class _Surface:
    """Engine arguments in the making, and what is to be said of them."""

    def __init__(
        self,
        kwargs: dict[str, Any],
        members: dict[str, Member],
        proxy: ProxyConfig,
        caps_max_tokens: bool,
    ) -> None:
        self.kwargs = kwargs
        self.proxy = proxy
        self.caps_max_tokens = caps_max_tokens
        self.members = members
        self.base, self.expert = members["base"], members["expert"]
        self.vocab_size = self.base.config.get_vocab_size()
        self.overrides = kwargs.get("override_generation_config") or {}
        self.source = kwargs.get("generation_config") or AUTO
        self.told: list[str] = []
        self.warnings: list[str] = []
        # Whose tokenizer the engine has; "base" where the user named one.
        self.reader = self.base

    # -- end tokens ------------------------------------------------------------------------------

    def set_end_tokens(self) -> None:
        """Choose the tokens that end an answer, and say which the base cannot write."""
        self.ends: list[int] = []
        self.ends_named_by: dict[int, str] = {}
        named = token_ids(self.overrides.get("eos_token_id"))
        if named:
            self._add_ends(named, "--override-generation-config")
        elif self.source not in (AUTO, "vllm") and (
            named := token_ids(self.user_generation.get("eos_token_id"))
        ):
            self._add_ends(named, "--generation-config")
        else:
            roles = ("expert", "base") if self.proxy.stop_tokens == "both" else ()
            for role in roles or (self.proxy.stop_tokens,):
                self._add_ends(self.members[role].ends, role)

    @cached_property
    def user_generation(self) -> dict[str, Any]:
        """What the folder holds that the user named as ``generation_config``."""
        return self.base.config.try_get_generation_config()

    def _add_ends(self, ids: list[int], source: str) -> None:
        owner = f"the {source}'s" if source in ROLES else f"{source}:"
        member = self.members.get(source, self.expert)
        for index in ids:
            if not 0 <= index < self.vocab_size:
                self.warnings.append(
                    f"{owner} end token {member.named(index)} lies past the base's vocabulary of"
                    f" {self.vocab_size}, so that it is never generated and ends no answer: give"
                    " requests max_tokens or a stop string, or use an expert that was tuned"
                    " without new tokens"
                )
            elif source == "expert" and index in self.conflicts:
                self.warnings.append(
                    f"the expert's end token {member.named(index)} is"
                    f" {self.base.named(index)} in the base's tokenizer and ends no answer"
                )
            elif index not in self.ends_named_by:
                self.ends.append(index)
                self.ends_named_by[index] = source

    @cached_property
    def conflicts(self) -> set[int]:
        """Ids that base and expert give to two tokens."""
        mapped = set(self.proxy.tokenizer_map.get("expert", {}).values())
        return set(disagreements(self.base.names, self.expert.names, mapped))

    # -- tokenizer -------------------------------------------------------------------------------

    def set_tokenizer(self) -> None:
        """Give the engine the expert's tokenizer, if it can read and write for the base too.

        A template's tokens are then tokens of the prompt, parsers of tool calls and reasoning find
        theirs, and text is what the tuned model's would be.
        """
        if self.kwargs.get("skip_tokenizer_init"):
            self.told.append("no tokenizer")
            return
        whose, why = "base", None
        if self.kwargs.get("tokenizer"):
            self._check_named_tokenizer()
            whose = "--tokenizer"
        elif (why := self._unfit()) is None:
            self.reader, whose = self.expert, "expert"
            config = self.expert.config
            self.kwargs["tokenizer"] = config.tokenizer
            self.kwargs["tokenizer_revision"] = config.tokenizer_revision
            if self.kwargs.get("tokenizer_mode") in (None, AUTO):
                self.kwargs["tokenizer_mode"] = config.tokenizer_mode
            self._compare_encoding()
        self._check_primary_end()
        self.told.append(
            f"the {whose}'s tokenizer" + (f" (the expert's {why})" if why else "")
            if whose in ROLES
            else "the tokenizer of --tokenizer"
        )

    def _unfit(self) -> str | None:
        """Why the expert's tokenizer cannot be the engine's."""
        own, base = self.expert.names, self.base.names
        if past := [index for index in own if index >= self.vocab_size]:
            return f"has {self.expert.named(min(past))} past the base's vocabulary"
        if self.conflicts or self.expert.moves:
            return "gives ids to other tokens"
        missing = [
            index
            for index, token in base.items()
            if not is_placeholder(token) and (index not in own or is_placeholder(own[index]))
        ]
        if missing:
            return f"lacks {self.base.named(min(missing))}"
        eos = self.expert.tokenizer.eos_token_id
        if self.proxy.stop_tokens == "base" and eos is not None and eos not in self.ends:
            return "ends answers as --stop-tokens base forbids"
        return None

    def _compare_encoding(self) -> None:
        base, own = (m.tokenizer.encode(_PROBE) for m in (self.base, self.expert))
        if base != own:
            self.warnings.append(
                f"text is read with the expert's tokenizer, which makes {own[:4]} ... of"
                f" {_PROBE!r} where the base's makes {base[:4]} ...: --tokenizer"
                f" {self.base.config.tokenizer} reads it as the base does"
            )

    def _check_named_tokenizer(self) -> None:
        """Refuse ids that kill an engine, or fall to another request, when a prompt has them."""
        if past := [index for index in self.base.names if index >= self.vocab_size]:
            raise UserError(
                f"--tokenizer {self.kwargs['tokenizer']}: {self.base.named(min(past))} lies past"
                f" the base's vocabulary of {self.vocab_size}: name another, or leave it out"
            )

    def _check_primary_end(self) -> None:
        """What vLLM takes for an end in any case must be one by the options too."""
        eos = self.reader.tokenizer.eos_token_id
        if eos in self.ends:
            return
        if eos is None:
            if not self.ends:
                self.warnings.append(
                    "no end token is known, so that answers end at max_tokens or a stop string:"
                    """ name one with --override-generation-config '{"eos_token_id": [...]}'"""
                )
            return
        if eos >= self.vocab_size:
            raise UserError(
                f"the end token {self.reader.named(eos)} of tokenizer"
                f" {self.reader.config.tokenizer!r} lies past the base's vocabulary of"
                f" {self.vocab_size}: name another with --tokenizer"
            )
        if self.proxy.stop_tokens != "both" and set(self.ends_named_by.values()) <= set(ROLES):
            raise UserError(
                f"--stop-tokens {self.proxy.stop_tokens}: the engine reads with the tokenizer"
                f" {self.reader.config.tokenizer!r}, whose {self.reader.named(eos)} ends answers"
                " in any case: leave the option out, or name a tokenizer with --tokenizer"
            )
        self._add_ends([eos], "the tokenizer")

    # -- chat template ---------------------------------------------------------------------------

    def set_chat_template(self, base_chat_template: str | None) -> None:
        """Choose the template that all read, but small members with one of their own."""
        given = self.kwargs.get("chat_template")
        if given is not None and base_chat_template not in (None, AUTO):
            raise UserError("--base-chat-template and --chat-template: give one of them")
        if self.kwargs.get("skip_tokenizer_init"):
            return
        owner: Member | None = None
        if given is not None:
            self.told.append("the template of --chat-template")
        elif base_chat_template not in (None, AUTO):
            self.kwargs["chat_template"] = resolve_template("base", base_chat_template)
            self.told.append(f"the template of --base-chat-template {base_chat_template!r}")
        else:
            owner = self._template_owner(base_chat_template == AUTO)
            if owner is None:
                self.told.append("no chat template (--chat-template names one)")
                return
            self.told.append(f"the {owner.role}'s chat template")
            if owner is not self.reader and owner.template is not None:
                self.kwargs["chat_template"] = owner.template
        self._name_foreign_tokens(owner or self.reader)

    def _template_owner(self, bases: bool) -> Member | None:
        """Whose template the base reads, and who else has none of its own."""
        if bases:
            if not self.base.renders_chats:
                raise UserError(
                    "--base-chat-template auto: the base's tokenizer has no chat template; leave"
                    " the option out for the expert's, or name plain"
                )
            return self.base
        order = [self.expert, self.base]
        # Who tells a small member to read its own template, has the base read its own too.
        if any(self.proxy.chat_template_of(role) is not None for role in ROLES[1:]):
            order.reverse()
        # Mistral's renderer is the tokenizer itself: no other tokenizer can lend its template.
        usable = [m for m in order if m.template is not None or m is self.reader]
        return next((m for m in usable if m.renders_chats), None)

    def _name_foreign_tokens(self, owner: Member) -> None:
        """Name special tokens of the template that a member's tokenizer does not know."""
        from vllm.renderers.chat_utils import load_chat_template

        try:
            text = load_chat_template(self.kwargs.get("chat_template")) or owner.template or ""
        except Exception:
            return  # vLLM says what is wrong with it
        marks = {
            index: token
            for token, index in {**self.expert.added, **owner.added}.items()
            if token in text and not is_placeholder(token)
        }

        def lacking(member: Member) -> str:
            unknown = [i for i, token in marks.items() if member.names.get(i) != token]
            shown = ", ".join(f"{marks[i]!r} ({i})" for i in sorted(unknown)[:4])
            return shown + (", ..." if len(unknown) > 4 else "")

        if shown := lacking(self.reader):
            self.warnings.append(
                f"the chat template writes {shown}, which the base's tokenizer lacks, so that all"
                " models read them as pieces of text: have the expert alone read it, with"
                " --expert-chat-template auto --base-chat-template plain"
            )
            return
        for role in ("base", "antiexpert"):
            member = self.members[role]
            own = role != "base" and self.proxy.chat_template_of(role) is not None
            if member is not self.reader and not own and (shown := lacking(member)):
                self.warnings.append(
                    f"the chat template writes {shown}, which the {role}'s tokenizer lacks: it"
                    f" reads them untrained; --{role}-chat-template plain gives it a prompt without"
                )

    # -- sampling defaults -----------------------------------------------------------------------

    def set_generation_config(self) -> None:
        """Write what vLLM is to read as the model's generation_config.json."""
        if self.source == AUTO:
            fields, whose = dict(self.expert.generation), "the expert's"
        elif self.source == "vllm":
            fields, whose = {}, "vLLM's"
        else:
            fields, whose = dict(self.user_generation), f"--generation-config {self.source}'s"
        fields.pop("eos_token_id", None)
        # A default must not make every request one that is refused.
        if self.proxy.remote_base is not None and fields.pop("repetition_penalty", 1) != 1:
            self.warnings.append(
                f"{whose} sampling defaults have a repetition_penalty, which is left out: it needs"
                " the base's whole distribution, of which an endpoint reports the top"
            )
        self.told.append(f"{whose} sampling defaults")
        shown = ", ".join(
            f"{self._named_end(index)} of {self.ends_named_by[index]}" for index in self.ends
        )
        self.told.append(f"end tokens {shown or 'none'}")
        if self._is_what_vllm_reads(fields):
            return
        if self.source == AUTO and self.caps_max_tokens:
            fields.pop("max_new_tokens", None)
        self.kwargs["generation_config"] = _folder({**fields, "eos_token_id": sorted(self.ends)})

    def _named_end(self, index: int) -> str:
        return self.expert.named(index) if index in self.expert.names else self.base.named(index)

    def _is_what_vllm_reads(self, fields: dict[str, Any]) -> bool:
        """Whether vLLM finds the same without us."""
        read = dict(self.base.generation if self.source in (AUTO, "vllm") else self.user_generation)
        ends = set(token_ids(read.pop("eos_token_id", None)))
        if self.reader.tokenizer is not None:
            ends.update(token_ids(self.reader.tokenizer.eos_token_id))
        return ends == set(self.ends) and (self.source == "vllm" or read == fields)


def _folder(fields: dict[str, Any]) -> str:
    """A folder with a generation_config.json of these fields, which lasts as long as the process.

    vLLM reads end tokens from a folder alone: ``override_generation_config`` reaches sampling
    defaults only.
    """
    folder = tempfile.mkdtemp(prefix="proxy_vllm_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    text = json.dumps(fields, indent=2, sort_keys=True, default=str)
    Path(folder, "generation_config.json").write_text(text, encoding="utf-8")
    return folder
