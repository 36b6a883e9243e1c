"""Chat templates in the structure of the real ones, written short."""


def chatml(system: str | None, thinks: bool = False) -> str:
    """ChatML with tools, as Qwen and SmolLM have it.

    Args:
        system: the default system message, or None for none.
        thinks: Qwen 3's: thoughts of earlier turns are dropped, and ``enable_thinking=False``
            starts the answer after an empty thought.
    """
    default = "" if system is None else "<|im_start|>system\n" + system + "<|im_end|>\n"
    content = "message['content'] if message['content'] is string else ''"
    if thinks:
        content = f"(({content}).split('</think>')[-1]).lstrip('\\n')"
    generation = "<|im_start|>assistant\n"
    empty = (
        "{% if enable_thinking is defined and enable_thinking is false %}"
        "{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    )
    return (
        "{% if tools %}"
        "{{ '<|im_start|>system\n' }}"
        "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] + '\n\n' }}{% endif %}"
        "{{ '# Tools\n\n<tools>' }}{% for tool in tools %}{{ '\n' + (tool | tojson) }}{% endfor %}"
        "{{ '\n</tools><|im_end|>\n' }}"
        "{% elif messages[0]['role'] == 'system' %}"
        "{{ '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}"
        "{% else %}{{ '" + default + "' }}{% endif %}"
        "{% for message in messages %}"
        "{% if message['role'] == 'tool' %}"
        "{{ '<|im_start|>user\n<tool_response>\n' + message['content'] }}"
        "{{ '\n</tool_response><|im_end|>\n' }}"
        "{% elif not (loop.first and message['role'] == 'system') %}"
        "{{ '<|im_start|>' + message['role'] + '\n' + (" + content + ") }}"
        "{% for call in message['tool_calls'] or [] %}"
        "{{ '\n<tool_call>\n{\"name\": \"' + call['function']['name'] + '\", \"arguments\": ' }}"
        "{{ (call['function']['arguments'] | tojson) + '}\n</tool_call>' }}"
        "{% endfor %}{{ '<|im_end|>\n' }}"
        "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '" + generation + "' }}"
        "" + (empty if thinks else "") + "{% endif %}"
    )


def text_roles(bos: bool) -> str:
    """Tulu's and OLMo's: roles are written as text, and answers end with the end token."""
    return (
        ("{{ bos_token }}" if bos else "")
        + "{% for message in messages %}"
        + "{% if message['role'] == 'assistant' %}"
        + "{{ '<|assistant|>\n' + message['content'] + eos_token }}"
        + "{% if not loop.last %}{{ '\n' }}{% endif %}"
        + "{% else %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '\n' }}{% endif %}"
        + "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
        + "{% endfor %}"
    )


LLAMA3 = (
    "{{ bos_token }}"
    "{% if tools %}{{ '<|start_header_id|>system<|end_header_id|>\n\nEnvironment: ipython\n' }}"
    "{% for tool in tools %}{{ (tool | tojson) + '\n' }}{% endfor %}{{ '<|eot_id|>' }}{% endif %}"
    "{% for message in messages %}"
    "{% if message['tool_calls'] %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{{ '{\"name\": \"' + message['tool_calls'][0]['function']['name'] + '\", \"parameters\": ' }}"
    "{{ (message['tool_calls'][0]['function']['arguments'] | tojson) + '}<|eot_id|>' }}"
    "{% else %}"
    "{% set role = 'ipython' if message['role'] == 'tool' else message['role'] %}"
    "{{ '<|start_header_id|>' + role + '<|end_header_id|>\n\n' }}"
    "{{ (message['content'] | trim) + '<|eot_id|>' }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

_ALTERNATE = (
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
    "{% endif %}"
)

LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}"
    "{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% set rest = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}"
    "{% for message in rest %}" + _ALTERNATE + "{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + (system if loop.first else '') }}"
    "{{ (message['content'] | trim) + ' [/INST]' }}"
    "{% else %}{{ ' ' + (message['content'] | trim) + ' ' + eos_token }}{% endif %}"
    "{% endfor %}"
)

GEMMA = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}"
    + _ALTERNATE
    + "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + (message['content'] | trim) + '<end_of_turn>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)

MISTRAL = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}"
    "{% if tools and loop.last %}"
    "{{ '[AVAILABLE_TOOLS] ' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}{% endif %}"
    "{{ '[INST] ' + message['content'] + '[/INST]' }}"
    "{% elif message['role'] == 'tool' %}"
    "{{ '[TOOL_RESULTS] {\"content\": ' + (message['content'] | tojson) + '}[/TOOL_RESULTS]' }}"
    "{% elif message['tool_calls'] %}"
    "{{ '[TOOL_CALLS] [' }}{% for call in message['tool_calls'] %}"
    "{{ call['function'] | tojson }}{% endfor %}{{ ']' + eos_token }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}"
    "{% endif %}{% endfor %}"
)
