"""Chat templates of the three members: named ones, files, or a member's own.

A template is Jinja over ``messages``, ``add_generation_prompt`` and what a request passes as
``chat_template_kwargs``. Both templates here know ``response_prefix``: the words that every answer
begins with, such as "Answer:".
"""

from pathlib import Path

from proxy_vllm.errors import UserError

AUTO = "auto"

# The texts of all messages, an empty line between them, without any mark of who speaks; then the
# response prefix on a line of its own. This is what a base model reads in the original work.
PLAIN = (
    "{{ bos_token or '' }}"
    "{% for message in messages %}"
    "{{ message['content'] }}{% if not loop.last %}{{ '\\n\\n' }}{% endif %}"
    "{% endfor %}"
    "{% if response_prefix and add_generation_prompt %}{{ '\\n' + response_prefix }}{% endif %}"
)


def _llama_2(after_inst: str) -> str:
    return (
        "{% set ns = namespace(system='') %}"
        "{% for message in messages %}"
        "{% if message['role'] == 'system' %}"
        "{% set ns.system = '<<SYS>>\\n' + message['content'] + '\\n<</SYS>>\\n\\n' %}"
        "{% elif message['role'] == 'assistant' %}"
        "{{ ' ' + message['content'] }}"
        "{% if not loop.last %}{{ ' ' + (eos_token or '') }}{% endif %}"
        "{% else %}"
        "{{ (bos_token or '') + '[INST]" + after_inst + "' + ns.system + message['content'] }}"
        "{{ ' [/INST]' }}{% set ns.system = '' %}"
        "{% endif %}{% endfor %}"
        "{% if response_prefix and add_generation_prompt %}{{ ' ' + response_prefix }}{% endif %}"
    )


NAMED = {
    "plain": PLAIN,
    # Llama 2's own format: "[INST] <<SYS>>\nsystem\n<</SYS>>\n\nuser [/INST] prefix".
    "llama-2": _llama_2(" "),
    # As the original proxy-tuning code writes it (modeling/dexperts.py): no space after [INST].
    "llama-2-paper": _llama_2(""),
}


def resolve_template(role: str, value: str | None) -> str | None:
    """The Jinja text that an option names.

    Args:
        role: whose template it is, for messages.
        value: None, ``auto``, a name in ``NAMED``, a file, or Jinja itself.

    Returns:
        Jinja text; ``auto`` and None as they are.

    Raises:
        UserError: neither a name, nor a file, nor Jinja.
    """
    if value is None or value == AUTO:
        return value
    if value in NAMED:
        return NAMED[value]
    if "{{" in value or "{%" in value:
        return value
    path = Path(value)
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UserError(
            f"--{role}-chat-template {value!r} is neither {AUTO}, {', '.join(NAMED)} nor a file"
            f" that can be read ({reason})"
        ) from None
