"""The modified worker: validation, memory account, and a runner that carries alpha."""

from typing import Any

from vllm.logger import init_logger
from vllm.utils.mem_utils import format_gib
from vllm.v1.core.kv_cache_utils import get_max_concurrency_for_kv_cache_config
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec
from vllm.v1.worker.gpu_worker import Worker

from proxy_vllm.composite import kv_layout
from proxy_vllm.composite.members import kv_bytes_per_token
from proxy_vllm.config import ProxyConfig, check_vllm_version
from proxy_vllm.errors import UserError
from proxy_vllm.own_prompts.prompts import unsupported_reason

logger = init_logger(f"vllm.{__name__}")


class ProxyWorker(Worker):
    """GPU worker on Model Runner V2; the CPU worker differs in the runner that it makes."""

    kv_cache_specs: dict[str, KVCacheSpec] | None = None
    # Bytes of the KV cache by member; of several block tables, at the most requests they hold.
    kv_bytes: dict[str, int]
    # Drafts of the step before, where the expert drafts.
    num_drafts = 0

    def init_device(self) -> None:
        check_vllm_version()
        ProxyConfig.from_vllm_config(self.vllm_config)
        super().init_device()

    def load_model(self, *args, **kwargs) -> None:
        super().load_model(*args, **kwargs)
        model = self.model_runner.get_model()
        load_format = self.vllm_config.load_config.load_format
        if not model.weights_loaded and load_format != "dummy":
            raise UserError(
                f"--load-format {load_format} does not load the expert and the antiexpert:"
                " use auto, safetensors, pt or dummy"
            )
        if model.proxy_config.fused_head_max_batch > 0:
            if not self.use_v2_model_runner:
                raise UserError("--fused-head-max-batch needs Model Runner V2: leave it out")
            model.prepare_fused_heads()
        held = [f"{role} {format_gib(b)} GiB" for role, b in model.member_weight_bytes.items()]
        shared = [f"{r} those of the {s}" for r, s in model.proxy_config.same_weights.items()]
        logger.info("Weights on rank %d: %s", self.rank, ", ".join(held + shared))

    def reload_weights(self, *args, **kwargs) -> None:
        if self.vllm_config.lora_config is not None:
            raise UserError("weights are not loaded again beside adapters: start another engine")
        super().reload_weights(*args, **kwargs)

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        """The caches of this rank's layers, in the layout that holds more requests."""
        if self.kv_cache_specs is None:
            proxy, reason = ProxyConfig.from_vllm_config(self.vllm_config), None
            if unsupported_reason(self.vllm_config) is None:
                reason = "models read prompts of their own"
            elif proxy.expert_drafts and not self.use_v2_model_runner:
                reason = "drafts on a CPU read one alone"
            self.kv_cache_specs = kv_layout.choose(
                self.vllm_config,
                super().get_kv_cache_spec,
                self.get_supported_kv_cache_layouts(),
                proxy.kv_cache_tables,
                reason,
            )
        return dict(self.kv_cache_specs)

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        super().initialize_from_config(kv_cache_config)
        specs, groups = self.get_kv_cache_spec(), kv_cache_config.kv_cache_groups
        if len(groups) == 1:
            per_token = kv_bytes_per_token(specs)
            tokens = kv_cache_config.num_blocks * groups[0].kv_cache_spec.block_size
            self.kv_bytes = {role: int(b * tokens) for role, b in per_token.items()}
            logger.info(
                "KV cache on rank %d: %d tokens; %s",
                self.rank,
                tokens,
                ", ".join(
                    f"{role} {format_gib(self.kv_bytes[role])} GiB ({b:.0f} bytes a token)"
                    for role, b in per_token.items()
                ),
            )
            return
        per_request = kv_layout.bytes_per_request(self.vllm_config, specs)
        requests = get_max_concurrency_for_kv_cache_config(self.vllm_config, kv_cache_config)
        self.kv_bytes = {role: int(b * requests) for role, b in per_request.items()}
        logger.info(
            "KV cache on rank %d: %.1f requests of %d tokens, in %d block tables; of each, %s",
            self.rank,
            requests,
            self.vllm_config.model_config.max_model_len,
            len(groups),
            ", ".join(f"{role} {format_gib(b)} GiB" for role, b in per_request.items()),
        )

    def compile_or_warm_up_model(self):
        if self.use_v2_model_runner and self.vllm_config.kernel_config.enable_jit_warmup:
            self.model_runner.warm_up_sampler()
        done = super().compile_or_warm_up_model()
        self.model_runner.changed_tokens.reset()
        return done

    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        if scheduler_output.total_num_scheduled_tokens:
            self.num_drafts = scheduler_output.num_spec_tokens_to_schedule
        return super().execute_model(scheduler_output)

    def proxy_stats(self) -> dict[str, Any]:
        """What `/metrics` tells of this worker: see ``proxy_vllm.server.metrics``."""
        compared, changed = self.model_runner.changed_tokens.counts()
        return {
            "rank": self.rank,
            "weights": self.model_runner.get_model().member_weight_bytes,
            "kv_cache": self.kv_bytes,
            "num_drafts": self.num_drafts,
            "compared": compared,
            "changed": changed,
        }

    def _make_model_runner(self):
        if not self.use_v2_model_runner:
            raise UserError(
                "proxy_vllm on a GPU needs vLLM's Model Runner V2, which an option of this server"
                " turns off (vLLM's log names it) or VLLM_USE_V2_MODEL_RUNNER=0 does"
            )
        from proxy_vllm.worker.model_runner import ProxyModelRunner

        return ProxyModelRunner(self.vllm_config, self.device)
