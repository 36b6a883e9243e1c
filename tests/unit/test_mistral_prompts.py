"""A small member with Mistral's own tokenizer renders its chats by vLLM's renderer for it."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from proxy_vllm.errors import UserError
from proxy_vllm.own_prompts.member_prompts import MemberPrompts

QUESTION = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    mistral_common = pytest.importorskip("mistral_common", reason="mistral_common is missing")
    from vllm.tokenizers.mistral import MistralTokenizer

    source = Path(mistral_common.__file__).parent / "data/tekken_240911.json"
    folder = tmp_path_factory.mktemp("mistral")
    shutil.copy(source, folder / "tekken.json")
    tokenizer = MistralTokenizer.from_pretrained(str(folder))
    prompts = MemberPrompts.__new__(MemberPrompts)
    prompts.base_config = SimpleNamespace(max_model_len=512)
    prompts.configs = {"expert": SimpleNamespace(get_vocab_size=lambda: 131072)}
    prompts.tokenizer = lambda role: tokenizer

    def told(template):
        prompts.proxy = SimpleNamespace(
            chat_template_of=lambda role: template if role == "expert" else None
        )
        return prompts

    return told


def test_its_renderer_makes_the_ids(prompts):
    made = prompts("auto").of_chat(QUESTION, {"add_generation_prompt": True})
    ids = made["proxy_expert_prompt"]
    tokenizer = prompts("auto").tokenizer("expert")
    assert ids == [1, 3, *tokenizer.encode("Hello", add_special_tokens=False), 4]  # [INST] [/INST]


def test_jinja_is_refused_by_name(prompts):
    with pytest.raises(UserError, match=r"expert's chat template fails: Mistral's own .* auto"):
        prompts("{{ messages }}").of_chat(QUESTION, {"add_generation_prompt": True})
