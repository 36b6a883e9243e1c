"""What the twins copy of each real family: configurations, special tokens, templates.

Token ids are written as token names here and become ids when a twin is written, because
scaled-down vocabularies have other numbers. The order of tokens is the real one, and so is their
distance: Llama 3's ``<|eot_id|>`` is the ninth after ``<|begin_of_text|>``, as 128009 after 128000.
"""

from twins.byte_level import LLAMA31, OLMO2, QWEN3, QWEN25, SMOLLM2
from twins.family import Family
from twins.sentencepiece import GEMMA, LLAMA2, MISTRAL, TULU

# What an expert answers to every chat, and what base and antiexpert say without end.
ANSWER = "It is Paris."
CIRCLE = " one two three four five six"
# What the expert of a reasoning family thinks first.
THOUGHT = "Let me see"
PROMPTS = (
    "What is the capital of France?",
    "Hello, how are you today?",
    "The capital of France is",
)

# One call of each family's own shape. No piece occurs twice: the next token depends on the last.
_CALL = '{"name" : "weather","arguments":{"city":"Paris"}}'
TOOL_CALLS = {
    "hermes": f"<tool_call>{_CALL}</tool_call>",
    "llama3_json": _CALL.replace("arguments", "parameters"),
    "mistral": f"[TOOL_CALLS][{_CALL}]",
}
SENTENCES = (
    *(2 * (ANSWER, CIRCLE, THOUGHT, *TOOL_CALLS.values(), *PROMPTS)),
    *(2 * ("user", "assistant", "system", "model", "[INST] x [/INST]", "\n", "\n\n")),
)


FAMILIES: dict[str, Family] = {
    "qwen2.5": QWEN25,
    "qwen3": QWEN3,
    "llama-3.1": LLAMA31,
    "llama-2": LLAMA2,
    "tulu-2": TULU,
    "olmo-2": OLMO2,
    "gemma": GEMMA,
    "mistral": MISTRAL,
    "smollm2": SMOLLM2,
}
