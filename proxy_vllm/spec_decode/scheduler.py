"""vLLM's scheduler where the expert drafts: which requests draft, and how many tokens a step."""

import time
from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.outputs import DraftTokenIds

from proxy_vllm.config import AUTO_DRAFTS, ProxyConfig
from proxy_vllm.spec_decode.draft_length import DraftLength

logger = init_logger(f"vllm.{__name__}")

# Of a step's bytes, where the cost model does not know the models.
_USUAL_SLOPE = 0.15


class _Lookup:
    """What vLLM indexes by the number of scheduled requests for the number of drafts."""

    def __init__(self, length: DraftLength) -> None:
        self.length = length

    def __getitem__(self, batch: int) -> int:
        return self.length.choose(batch)


class DraftingScheduler(Scheduler):
    """Requests with alpha 0 are the base's alone, of which the expert knows nothing: no drafts."""

    draft_length: DraftLength | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        proxy = ProxyConfig.from_vllm_config(self.vllm_config)
        self._proxy = proxy if proxy.expert_drafts else None
        if proxy.speculative_tokens == AUTO_DRAFTS:
            self.draft_length = DraftLength(self.num_spec_tokens, draft_slope(self.vllm_config))
            self.dynamic_sd_lookup = _Lookup(self.draft_length)  # type: ignore[assignment]
        # When each step under way was scheduled, and of what it is a measure: (batch, drafts).
        self._under_way: dict[int, tuple[float, tuple[int, int] | None]] = {}
        self._last_update = 0.0

    def _drop_drafts(self, request_ids: Any) -> None:
        if self._proxy is None:
            return
        for request in filter(None, map(self.requests.get, request_ids)):
            if request.spec_token_ids and not self._proxy.worker_alpha(
                request.sampling_params, request.lora_request
            ):
                request.spec_token_ids = []

    def _update_after_schedule(self, scheduler_output: SchedulerOutput) -> None:
        if self.draft_length is not None:
            measure = _measured(scheduler_output)
            self._under_way[id(scheduler_output)] = (time.monotonic(), measure)
        super()._update_after_schedule(scheduler_output)
        self._drop_drafts(scheduler_output.num_scheduled_tokens)

    def update_draft_token_ids(self, draft_token_ids: DraftTokenIds) -> None:
        super().update_draft_token_ids(draft_token_ids)
        self._drop_drafts(draft_token_ids.req_ids)

    def update_from_output(
        self, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any
    ) -> dict[int, EngineCoreOutputs]:
        start, measure = self._under_way.pop(id(scheduler_output), (0.0, None))
        if self.draft_length is not None:
            now = time.monotonic()
            if measure is not None:
                # A step that is scheduled ahead begins where the one before it ends.
                seconds = now - max(start, self._last_update)
                self.draft_length.observe_step(*measure, seconds)
            self._last_update = now
        return super().update_from_output(scheduler_output, *args, **kwargs)

    def make_spec_decoding_stats(
        self, stats: Any, num_draft_tokens: int, num_accepted_tokens: int, *args: Any, **kwargs: Any
    ) -> Any:
        if self.draft_length is not None:
            self.draft_length.observe_drafts(num_draft_tokens, num_accepted_tokens)
        return super().make_spec_decoding_stats(
            stats, num_draft_tokens, num_accepted_tokens, *args, **kwargs
        )


def _measured(output: SchedulerOutput) -> tuple[int, int] | None:
    """Batch and drafts of a step that verifies as many tokens as it drafts; None of any other."""
    drafts = output.num_spec_tokens_to_schedule
    batch = len(output.num_scheduled_tokens)
    verified = sum(map(len, output.scheduled_spec_decode_tokens.values()))
    if output.total_num_scheduled_tokens != batch + verified or verified != batch * drafts:
        return None
    return (batch, drafts) if batch else None


def draft_slope(vllm_config: Any) -> float:
    """The expert's share of the bytes that a step of the three reads, by the cost model."""
    from proxy_vllm.composite.member_configs import member_model_configs
    from proxy_vllm.plan.model_size import ElementBytes, model_shape

    proxy = ProxyConfig.from_vllm_config(vllm_config)
    configs = member_model_configs(vllm_config.model_config, proxy)
    try:
        sizes = {
            role: model_shape(config.hf_config.to_dict()).step_weight_bytes(ElementBytes(), 1)
            for role, config in configs.items()
        }
    except Exception as error:  # a family that the cost model does not know
        logger.info("Drafts begin with the usual cost: %s", error)
        return _USUAL_SLOPE
    return sizes["expert"] / sum(sizes.values())
