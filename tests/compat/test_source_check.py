"""The check by source finds no fault in the installed vLLM, and names what is taken away."""

from importlib.util import find_spec
from pathlib import Path

import pytest
from source_check import Source, check, reader


@pytest.fixture(scope="module")
def installed():
    (folder,) = find_spec("vllm").submodule_search_locations
    return reader(Path(folder).parent)


def test_the_installed_vllm_has_every_symbol(installed):
    assert list(check(Source(installed))) == []


def test_what_is_taken_away_is_named(installed):
    changes = {
        # An import of ours, an attribute, a parameter that we pass, a call that reaches us, and a
        # parameter that an override of ours does not take.
        "vllm/forward_context.py": ("slot_mapping", "slots_of_layers"),
        "vllm/compilation/cudagraph_pool.py": ("def capture_pool(", "def take_pool("),
        "vllm/v1/core/kv_cache_utils.py": (
            "def hash_block_tokens(",
            "def hash_block_tokens(a, b, ",
        ),
        "vllm/v1/worker/gpu/model_runner.py": ("self.model_state.add_request(", "self.added("),
        "vllm/v1/worker/gpu/model_states/default.py": (
            "def remove_request(self",
            "def remove_request(self, why",
        ),
    }

    def changed(path):
        text = installed(path)
        if path in changes:
            old, new = changes[path]
            assert old in text, path
            text = text.replace(old, new)
        return text

    found = "\n".join(check(Source(changed)))
    for part in (
        "ForwardContext has no slot_mapping",
        "capture_pool is gone",
        "hash_block_tokens needs",
        "does not call self.model_state.add_request",
        "vLLM's remove_request takes why",
    ):
        assert part in found
