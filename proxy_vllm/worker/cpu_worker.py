"""The modified worker on a CPU: the V1 runner, or Model Runner V2 in Triton's interpreter."""

# Replaces device calls of PyTorch by no-ops, so it must come before anything that binds them.
import vllm.v1.worker.cpu.shm  # noqa: F401  # isort: skip

from typing import Any, NamedTuple

import numpy as np
import torch
from vllm.distributed import get_pp_group
from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.outputs import SamplerOutput
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata
from vllm.v1.worker.cpu.model_runner import CPUModelRunner as CPUModelRunnerV2
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker

from proxy_vllm.adapters.cpu_products import compile_beside_adapters
from proxy_vllm.adapters.manager import AdapterRunner
from proxy_vllm.config import ProxyConfig
from proxy_vllm.explain.request import without_rows, worker_top
from proxy_vllm.explain.v1_runner import explain_step
from proxy_vllm.spec_decode.v1_runner import count_thoughts_by_position, let_the_expert_draft
from proxy_vllm.worker.changed_tokens import ChangedTokens
from proxy_vllm.worker.gpu_worker import ProxyWorker
from proxy_vllm.worker.model_runner import ProxyModelRunner


class _Known(NamedTuple):
    """What a request asks for, and the parameters that it was read from."""

    params: SamplingParams | None
    steering: tuple[float, float, float]  # alpha, log beta, drop
    top: int  # how many of the likeliest tokens to explain; 0 for none


class ProxyCPUModelRunner(AdapterRunner, CPUModelRunner):
    """vLLM's V1 runner on a CPU, handing each token's alpha to the model."""

    def __init__(self, vllm_config, device: torch.device) -> None:
        super().__init__(vllm_config, device)
        self.proxy_config = ProxyConfig.from_vllm_config(vllm_config)
        self.known: dict[str, _Known] = {}
        if self.proxy_config.expert_drafts:
            let_the_expert_draft(self)
        self.changed_tokens = ChangedTokens(self.proxy_config.changed_tokens_every, device)

    def may_reinitialize_input_batch(self, kv_cache_config: KVCacheConfig) -> None:
        super().may_reinitialize_input_batch(kv_cache_config)
        if self.proxy_config.expert_drafts:
            count_thoughts_by_position(self)

    def set_adapters_of_drafts(self) -> None:
        count = self.input_batch.num_reqs
        self.set_active_loras(self.input_batch, np.ones(count, dtype=np.int32))

    def _adapters_of_requests(self) -> list[LoRARequest]:
        return [r.lora_request for r in self.requests.values() if r.lora_request is not None]

    def _input_fits_in_drafter(self, common_attn_metadata: Any) -> bool:
        """A request at the limit has no slots to draft into, and stops no other."""
        if self.proxy_config.expert_drafts:
            return common_attn_metadata is not None
        return super()._input_fits_in_drafter(common_attn_metadata)

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        if not get_pp_group().is_first_rank:
            # vLLM makes these in its warm-up run, which an eager engine on a CPU leaves out.
            self.intermediate_tensors = self.model.make_empty_intermediate_tensors(
                batch_size=self.max_num_tokens,
                dtype=self.model_config.dtype,
                device=self.device,
            )

    @torch.inference_mode()
    def warming_up_model(self) -> None:
        super().warming_up_model()
        if self.model.compiled and get_pp_group().is_last_rank:
            # vLLM has run many rows; one alone is another shape to Dynamo.
            row = torch.zeros(1, self.model.packed_width, dtype=self.model.hidden_dtype)
            self.model.compute_logits(row)

    def _steering_of(
        self, params: SamplingParams | None, adapter: Any = None
    ) -> tuple[float, float, float]:
        config = self.proxy_config
        alpha = config.alpha if params is None else config.worker_alpha(params, adapter)
        return alpha, *config.plausibility_of(params)

    def _known(self) -> list[_Known]:
        """What each row's request asks for. It is read once, unless its parameters are replaced."""
        if len(self.known) > 2 * self.max_num_reqs:
            self.known = {r: known for r, known in self.known.items() if r in self.requests}
        rows = []
        for req_id in self.input_batch.req_ids:
            request = self.requests[req_id]
            params = request.sampling_params
            known = self.known.get(req_id)
            if known is None or known.params is not params:
                known = _Known(
                    params, self._steering_of(params, request.lora_request), worker_top(params)
                )
                self.known[req_id] = known
            rows.append(known)
        return rows

    def _update_states(self, scheduler_output: SchedulerOutput) -> Any:
        for request in scheduler_output.scheduled_new_reqs:
            if request.sampling_params is not None:
                request.sampling_params = without_rows(request.sampling_params)
        return super()._update_states(scheduler_output)

    def _model_forward(self, *args: Any, positions: torch.Tensor, **kwargs: Any) -> Any:
        known = self._known()
        rows = np.array([row.steering for row in known], dtype=np.float32).reshape(-1, 3)
        tokens = np.diff(self.query_start_loc.np[: len(known) + 1])
        common = torch.tensor([self._steering_of(None)]).T
        steering = common.repeat(1, positions.shape[-1])  # [3, T]
        steering[:, : tokens.sum()] = torch.from_numpy(np.repeat(rows, tokens, axis=0).T)
        self.model.kept_logits = [] if any(row.top for row in known) else None
        self.model.some_alone = bool(np.isinf(rows[:, 0]).any())
        return super()._model_forward(
            *args, positions=positions, alpha=steering[0], plausibility=steering[1:], **kwargs
        )

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        state = self.execute_model_state
        if state is not None and self.changed_tokens.due():
            self._measure_changed_tokens(state.sample_hidden_states, state.spec_decode_metadata)
        return super().sample_tokens(*args, **kwargs)

    @torch.inference_mode()
    def _measure_changed_tokens(self, hidden: torch.Tensor, drafts: Any) -> None:
        count = self.input_batch.num_reqs
        rows = torch.arange(count)
        if drafts is not None:
            # Of drafted positions the first is a token in any case; the others may be rejected.
            rows[1:] += torch.tensor(drafts.num_draft_tokens).cumsum(0)[:-1]
        read = torch.from_numpy(~self.discard_request_mask.np[:count])
        self.changed_tokens.measure(self.model, hidden[rows], read)

    # vLLM draws a token for every row, also for prompts that are not read to their end, and winds a
    # seeded generator back after such a draw by its offset. A CPU's generator has none, and the
    # engine would die (vLLM 0.32.0). Here its whole state is put back, and the winding left out.

    def _unfinished_generators(self) -> dict[int, torch.Generator]:
        """Seeded generators of the rows whose token this step will be discarded, by row."""
        rows = np.flatnonzero(self.discard_request_mask.np[: self.input_batch.num_reqs])
        generators = self.input_batch.generators
        return {row: generators[row] for row in rows.tolist() if row in generators}

    def _sample(
        self, logits: torch.Tensor | None, spec_decode_metadata: SpecDecodeMetadata | None
    ) -> SamplerOutput:
        # Taken now: vLLM computes logits of prompts too, later in the step.
        kept, self.model.kept_logits = self.model.kept_logits, None
        states = [(g, g.get_state()) for g in self._unfinished_generators().values()]
        output = super()._sample(logits, spec_decode_metadata)
        for generator, state in states:
            generator.set_state(state)
        if kept:
            tops = np.array([known.top for known in self._known()])
            output = explain_step(self.model, output, kept, tops, spec_decode_metadata)
        return output

    def _bookkeeping_sync(self, *args: Any, **kwargs: Any) -> Any:
        hidden = self._unfinished_generators()
        for row in hidden:
            del self.input_batch.generators[row]
        try:
            return super()._bookkeeping_sync(*args, **kwargs)
        finally:
            self.input_batch.generators.update(hidden)


class ProxyCPUModelRunnerV2(ProxyModelRunner, CPUModelRunnerV2):
    """Model Runner V2 on a CPU: the GPU's code path for tests."""


class ProxyCPUWorker(ProxyWorker, CPUWorker):
    """CPU worker of a proxy-tuned engine."""

    def init_device(self) -> None:
        super().init_device()
        # vLLM's 16-bit attention uses AMX tiles without asking the system for them (0.32.0). Where
        # no matrix product is large enough that oneDNN has asked, the process ends by SIGILL.
        torch.cpu._init_amx()
        compile_beside_adapters(self.vllm_config)
        # vLLM's CPU worker has no `_make_model_runner`; the runner it made holds no weights yet.
        self.model_runner = self._make_model_runner()

    def _make_model_runner(self):
        runner = ProxyCPUModelRunnerV2 if self.use_v2_model_runner else ProxyCPUModelRunner
        return runner(self.vllm_config, self.device)
