"""vLLM's management of LoRA adapters, for the expert of a composite."""

from typing import Any

import torch
import torch.nn as nn
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.lora.layers import LoRAMappingType
from vllm.lora.lora_model import LoRAModel
from vllm.lora.model_manager import DEFAULT_LANGUAGE_WRAPPER_KEY, LRUCacheLoRAModelManager
from vllm.lora.request import LoRARequest
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
from vllm.platforms import current_platform
from vllm.utils.mem_utils import format_gib
from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

from proxy_vllm.adapters.check import AdapterRules
from proxy_vllm.adapters.settings import rules_of_engine
from proxy_vllm.composite.shared_weights import own_containers

logger = init_logger(f"vllm.{__name__}")


class ExpertAdapters(LRUCacheLoRAModelManager):
    """Adapters in slots beside the expert's layers, but not beside its output head.

    vLLM adds a head's adapter to one row a request, and to logits that all ranks have gathered.
    Here a step may verify drafts, prompts have log-probabilities, and ranks keep their columns.
    """

    supported_lora_modules: list[str]

    def _init_punica_wrapper(self, max_num_batched_tokens: int, vllm_config: VllmConfig) -> None:
        super()._init_punica_wrapper(max_num_batched_tokens, vllm_config)
        if current_platform.is_cpu():
            from proxy_vllm.adapters.cpu_products import ProductsByAdapter

            self.punica_wrapper_mapping[DEFAULT_LANGUAGE_WRAPPER_KEY] = ProductsByAdapter(
                max_num_batched_tokens,
                max_batches=self.max_num_seqs,
                device=self.device,
                lora_config=self.lora_config,
            )

    def _create_lora_modules(self) -> None:
        kept = [name for name in self.supported_lora_modules if name != "lm_head"]
        self.supported_lora_modules = kept
        super()._create_lora_modules()
        if current_platform.is_cpu():
            from proxy_vllm.adapters.cpu_products import ProductsOfLayer

            for layer in self.modules.values():
                if isinstance(getattr(layer, "lora_a_stacked", None), tuple):
                    layer.punica_wrapper = ProductsOfLayer(layer.punica_wrapper, layer)


class ExpertAdapterWorker(LRUCacheWorkerLoRAManager):
    """Loads an adapter once it is known to fit the expert."""

    _manager_cls = ExpertAdapters

    def __init__(
        self, vllm_config: VllmConfig, device: torch.device, expert: Any, rules: AdapterRules
    ) -> None:
        super().__init__(vllm_config, device, expert.embedding_modules)
        self.rules = rules

    def _load_adapter(self, lora_request: LoRARequest) -> LoRAModel:
        self.rules.check(lora_request.lora_name, lora_request.lora_path)
        return super()._load_adapter(lora_request)


class AdapterRunner(LoRAModelRunnerMixin):
    """For a runner: adapters belong to the expert, which vLLM's manager takes for the model."""

    def load_lora_model(
        self, model: nn.Module, vllm_config: VllmConfig, device: torch.device
    ) -> nn.Module:
        expert, config = model.expert, model.member_configs["expert"]
        if model.proxy_config.same_weights:
            own_containers(expert)
        rules = rules_of_engine(vllm_config)
        self.lora_manager = ExpertAdapterWorker(config, device, expert, rules)
        self.lora_manager.create_lora_manager(expert, config)
        logger.info(
            "Adapters: %d slots of rank %d in %d layers of the expert, %s GiB",
            config.lora_config.max_loras,
            config.lora_config.max_lora_rank,
            len(expert.lora_manager.modules),
            format_gib(slot_bytes(expert)),
        )
        return model

    def _set_active_loras(
        self,
        prompt_lora_mapping: tuple[int, ...],
        token_lora_mapping: tuple[int, ...],
        lora_requests: set[LoRARequest],
        mapping_type: LoRAMappingType = LoRAMappingType.LANGUAGE,
    ) -> None:
        """Make ready all adapters of a step, also two of one name.

        Requests go on with their adapter when its name is given to another one, and vLLM takes the
        two for one: the other's rows would then find no slot, and the engine would end.
        """
        wanted = set(token_lora_mapping) - {0} - {r.lora_int_id for r in lora_requests}
        every: Any = lora_requests
        if wanted:
            own = {r.lora_int_id: r for r in self._adapters_of_requests()}
            every = [*lora_requests, *(own[i] for i in wanted if i in own)]
        super()._set_active_loras(prompt_lora_mapping, token_lora_mapping, every, mapping_type)

    def set_adapters_of_drafts(self, *batch: Any) -> None:
        """Lay adapters out for one token of each request in a step's batch."""
        raise NotImplementedError

    def _adapters_of_requests(self) -> list[LoRARequest]:
        """The adapters of all requests that this runner holds."""
        raise NotImplementedError


def slot_bytes(expert: nn.Module) -> int:
    """Bytes of the slots for adapters on this rank."""
    tensors: list[torch.Tensor] = []
    for module in expert.lora_manager.modules.values():
        for stacked in (module.lora_a_stacked, module.lora_b_stacked):
            tensors += [stacked] if isinstance(stacked, torch.Tensor) else list(stacked)
    return sum(tensor.nbytes for tensor in tensors)
