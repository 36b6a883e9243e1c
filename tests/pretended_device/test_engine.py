"""Whole steps of Model Runner V2 on the pretended device, one in flight while another is made.

Tokens are the Transformers loop's, and nothing waits, mixes devices, or changes memory under work
in flight.
"""

from functools import partial

import pytest
import torch
from reference_loop import Trio, greedy
from sampled_reference import (
    PROMPTS,
    ROWS,
    TOKENS,
    assert_logprobs,
    expected_tokens,
    generate,
    params,
    tokens_of,
)

from pretended_device import machine, work
from pretended_device.work import Seen, record, watch

ALL = range(len(ROWS))


@pytest.fixture(scope="module")
def reference(trio) -> Trio:
    return Trio.load(trio["model"], trio["expert"], trio["antiexpert"], torch.float32)


@pytest.fixture(scope="module")
def expected(trio) -> list[list[int]]:
    return expected_tokens(trio)


def assert_quiet(seen: Seen) -> None:
    assert not seen.faults(), "\n".join(seen.faults())
    assert seen.events_waited and seen.kernels, "nothing ran on the pretended device"


class TestOneEngine:
    @pytest.fixture(scope="class")
    def engine(self, trio, expected):
        with machine.engine(**trio) as started:
            assert started[0].llm_engine.vllm_config.max_concurrent_batches == 2
            yield started

    @pytest.fixture(scope="class")
    def llm(self, engine):
        return engine[0]

    def test_greedy_seeds_and_filters_in_one_batch(self, llm, expected):
        with watch() as seen:
            tokens = tokens_of(generate(llm, ALL))
        assert tokens == expected
        assert_quiet(seen)

    def test_requests_that_come_and_go(self, llm, expected):
        """More of them than slots: parameters of a slot change while its last step is in flight."""
        rows = [*ALL, *ALL]
        lengths = [1 + (3 * i) % 7 for i in range(len(rows))]
        prompts = [{"prompt_token_ids": PROMPTS[row]} for row in rows]
        asked = [params(row, max_tokens=n) for row, n in zip(rows, lengths)]
        with watch() as seen:
            outputs = llm.generate(prompts, asked, use_tqdm=False)
        assert tokens_of(outputs) == [expected[row][:n] for row, n in zip(rows, lengths)]
        assert_quiet(seen)

    def test_log_probabilities(self, llm, expected, reference):
        with watch() as seen:
            outputs = generate(llm, ALL, logprobs=3)
        assert tokens_of(outputs) == expected
        for row in ALL:
            assert_logprobs(reference, row, outputs[row], 3)
        assert_quiet(seen)

    def test_explanations(self, llm, expected, reference):
        """Rows that ask beside rows that do not, one of them with log-probabilities."""
        from explained import assert_explained

        from proxy_vllm.explain import explanations

        asked = [params(row) for row in ALL]
        asked[1].logprobs = 2
        for row in (0, 1, 4):
            asked[row].extra_args |= {"proxy_explain": True, "proxy_explain_top": 2 + row}
        prompts = [{"prompt_token_ids": PROMPTS[row]} for row in ALL]
        with watch() as seen:
            outputs = llm.generate(prompts, asked, use_tqdm=False)
        assert tokens_of(outputs) == expected
        for row in (0, 1, 4):
            alpha = asked[row].extra_args["proxy_alpha"]
            found = explanations(outputs[row].outputs[0])
            assert_explained(found, reference, PROMPTS[row], expected[row], alpha, 2 + row)
        assert_quiet(seen)

    def test_members_alone(self, llm, expected, trio):
        """Beside steered rows; with log-probabilities too, which vLLM's sampler draws."""
        alone = {0: "expert", 1: "antiexpert"}
        for fields in ({}, {"logprobs": 2}):
            asked = [params(row, **fields) for row in ALL]
            for row, member in alone.items():
                asked[row].temperature = 0.0
                asked[row].extra_args = {"proxy_member": member}
            prompts = [{"prompt_token_ids": PROMPTS[row]} for row in ALL]
            with watch() as seen:
                outputs = llm.generate(prompts, asked, use_tqdm=False)
            for row, tokens in enumerate(tokens_of(outputs)):
                # The loop over three times the same model is that model.
                if member := alone.get(row):
                    model = Trio.load(*[trio[member]] * 3, torch.float32)
                    assert tokens == greedy(model, PROMPTS[row], TOKENS, 0.0)[0]
                else:
                    assert tokens == expected[row]
            assert_quiet(seen)

    def test_changed_tokens_are_counted_without_a_wait(self, engine, expected):
        llm, runner = engine[:2]
        runner.changed_tokens.every = 1
        try:
            with watch() as seen:
                tokens = tokens_of(generate(llm, ALL))
            compared, changed = runner.changed_tokens.counts()
        finally:
            runner.changed_tokens.every = 0
        assert tokens == expected
        assert_quiet(seen)
        assert 0 < changed < compared == TOKENS * (len(ROWS) - 1)  # one has alpha 0

    def test_prompt_log_probabilities(self, llm, expected):
        with watch() as seen:
            (output,) = generate(llm, [2], prompt_logprobs=2)
        assert tokens_of([output]) == [expected[2]]
        assert len(output.prompt_logprobs) == len(PROMPTS[2])
        assert_quiet(seen)

    def test_penalties_bias_bad_words_and_minimum_tokens(self, llm, expected):
        more = [
            {"presence_penalty": 0.5, "frequency_penalty": 0.1, "repetition_penalty": 1.2},
            {"logit_bias": {5: 100.0}},
            {"bad_words": ["w5 w6"]},
            {"min_tokens": 4, "ignore_eos": False},
            {"allowed_token_ids": [7, 8, 9]},
        ]
        asked = [params(0, **fields) for fields in more] + [params(row) for row in (0, 2)]
        prompts = [{"prompt_token_ids": PROMPTS[row]} for row in (0, 0, 0, 0, 0, 0, 2)]
        with watch() as seen:
            tokens = tokens_of(llm.generate(prompts, asked, use_tqdm=False))
        assert set(tokens[1]) == {5} and set(tokens[4]) <= {7, 8, 9} and len(tokens[3]) >= 4
        assert tokens[-2:] == [expected[0], expected[2]]
        assert_quiet(seen)

    def test_a_grammar_beside_free_rows(self, llm, expected):
        from vllm.sampling_params import StructuredOutputsParams

        choices = ["w5w6w7", "w5w9", "w8w7w7"]
        asked = [params(row) for row in (0, 1, 4)]
        asked[1].structured_outputs = StructuredOutputsParams(choice=choices)
        asked[1].ignore_eos = False
        prompts = [{"prompt_token_ids": PROMPTS[row]} for row in (0, 1, 4)]
        with watch() as seen:
            outputs = llm.generate(prompts, asked, use_tqdm=False)
        assert "".join(outputs[1].outputs[0].text.split()) in choices
        assert tokens_of(outputs)[::2] == [expected[0], expected[4]]
        assert_quiet(seen)

    def test_the_members_as_a_graph(self, engine):
        """A whole decode step of the three, twice: no wait, no copy, every address as before."""
        from vllm.config.compilation import CUDAGraphMode
        from vllm.forward_context import set_forward_context

        runner = engine[1]
        count = 4
        inputs = {
            "input_ids": runner.input_buffers.input_ids[:count],
            "positions": runner.input_buffers.positions[:count],
            **runner.model_state.prepare_dummy_inputs(count, count),
        }
        slots = {
            name: runner.block_tables.get_dummy_slot_mappings(count)[0]
            for group in runner.kv_cache_config.kv_cache_groups
            for name in group.layer_names
        }

        def step() -> None:
            with set_forward_context(
                None,
                runner.vllm_config,
                num_tokens=count,
                cudagraph_runtime_mode=CUDAGraphMode.FULL,
                slot_mapping=slots,
            ):
                runner.model(**inputs)

        with torch.no_grad(), watch() as seen:
            record(step)()
        assert not seen.faults()

    def test_sampling_as_graphs(self, engine, expected):
        llm, runner = engine
        replays = []

        def recorded(work):
            replay = record(work)

            def counted() -> None:
                replays.append(work.args)
                replay()

            return counted

        with torch.no_grad():
            runner.capture_sampler([1, 2, 4, 8], recorded)
        try:
            lengths = [TOKENS - row for row in ALL]
            asked = [params(row, max_tokens=n) for row, n in zip(ALL, lengths)]
            prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
            with watch() as seen:
                tokens = tokens_of(llm.generate(prompts, asked, use_tqdm=False))
            assert tokens == [e[:n] for e, n in zip(expected, lengths)]
            assert_quiet(seen)
            assert len(replays) >= TOKENS - 2
        finally:
            runner.sampler_graphs = None


def test_own_prompts(trio, reference):
    from e2e.test_own_prompts import LENGTHS, base_of, params_of, prompts_of

    prompts = [prompts_of(lengths, seed=40 + i) for i, lengths in enumerate(LENGTHS[:6])]
    alphas = [(1.0, 0.5, -1.0)[i % 3] for i in range(len(prompts))]
    with machine.engine(**trio, own_prompts=True) as (llm, _):
        with watch() as seen:
            outputs = llm.generate(
                [{"prompt_token_ids": base_of(p)} for p in prompts],
                [params_of(p, 5, a) for p, a in zip(prompts, alphas)],
                use_tqdm=False,
            )
        for prompt, alpha, output in zip(prompts, alphas, outputs, strict=True):
            assert list(output.outputs[0].token_ids) == greedy(reference, prompt, 5, alpha)[0]
        assert_quiet(seen)


def test_drafts(trio, expected):
    """Drafted with the expert and verified: the tokens of a run without drafts."""
    with machine.engine(**trio, speculative_tokens=2, max_num_batched_tokens=128) as (llm, _):
        with watch() as seen:
            tokens = tokens_of(generate(llm, ALL))
        assert tokens == expected
        assert_quiet(seen)


class DraftGraphs:
    """Stands in for vLLM's manager of graphs: batches of four and eight, of all steps at once."""

    def __init__(self, speculator) -> None:
        self.speculator, self.replays, self.graphs = speculator, [], {}
        speculator._update_draft_decode_metadata = self.update
        for count in (4, 8):
            self.graphs[count] = record(partial(self.draft, count))

    def update(self, metadata, num_reqs: int) -> None:
        """What an attention backend of a GPU does within a graph; a CPU's makes its plan anew."""
        recording, work.state.capture = work.state.capture, None
        seen, work.state.seen = work.state.seen, None
        bound = torch.full((num_reqs,), 200, dtype=torch.int32)
        metadata.update(self.speculator._attn_metadata(self.desc(num_reqs), num_reqs, bound, 0))
        work.state.capture, work.state.seen = recording, seen

    @staticmethod
    def desc(count: int):
        from vllm.config.compilation import CUDAGraphMode
        from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor

        return BatchExecutionDescriptor(CUDAGraphMode.FULL, count, count, uniform_token_count=1)

    def draft(self, count: int) -> None:
        from vllm.v1.worker.gpu.attn_utils import build_slot_mappings_by_layer

        drafts = self.speculator
        slots = drafts.block_tables.slot_mappings[:, :count]
        by_layer = build_slot_mappings_by_layer(slots, drafts.kv_cache_config)
        mode = self.desc(count).cg_mode
        drafts._draft(count, count, {}, by_layer, None, mode, drafts.num_speculative_steps)

    def dispatch(self, num_reqs: int, *_, **__):
        return self.desc(4 if num_reqs <= 4 else 8)

    def specialize_spec_tokens(self, desc, _):
        return desc

    def run_fullgraph(self, desc) -> None:
        self.replays.append(desc.num_reqs)
        self.graphs[desc.num_reqs]()


def test_the_draft_loop_as_one_graph(trio, expected):
    """Rows of padding write no keys, and every address is as it was recorded."""
    settings = {"max_num_batched_tokens": 128, "disable_log_stats": False}
    with machine.engine(**trio, speculative_tokens=3, **settings) as (llm, runner):
        speculator = runner.speculator
        speculator.supports_decode_metadata_update = True
        with torch.no_grad():
            graphs = speculator.graphs = DraftGraphs(speculator)
        lengths = [TOKENS - row for row in ALL]
        asked = [params(row, max_tokens=n) for row, n in zip(ALL, lengths)]
        prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
        with watch() as seen:
            tokens = tokens_of(llm.generate(prompts, asked, use_tqdm=False))
        assert tokens == [e[:n] for e, n in zip(expected, lengths)]
        assert {4, 8} == set(graphs.replays)
        assert sum(m.value for m in llm.get_metrics() if m.name.endswith("accepted_tokens")) > 0
        assert_quiet(seen)
