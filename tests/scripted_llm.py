"""An engine that is scripted, so that its timing is known, in the place of ``ProxyLLM``."""

from types import SimpleNamespace

from proxy_vllm.config import ProxyConfig
from proxy_vllm.errors import UserError

PROXY = ProxyConfig(expert="e", antiexpert="a", alpha=1.5)


class ScriptedLLM:
    """Answers ``text`` with ``TEXT`` after as many steps as it has ``max_tokens``.

    It has the few parts of ``ProxyLLM`` that a batch touches.
    """

    def __init__(self, max_num_seqs=4, on_step=lambda llm: None, failing=()):
        self.proxy_config = PROXY
        self.model_config = SimpleNamespace(
            get_diff_sampling_param=dict, served_model_name="steered", model="base"
        )
        self.adapters = {}
        self.request_counter = SimpleNamespace(counter=0)
        scheduler = SimpleNamespace(max_num_seqs=max_num_seqs)
        self.llm_engine = self
        self.vllm_config = SimpleNamespace(scheduler_config=scheduler, lora_config=None)
        self.engine_core = SimpleNamespace(shutdown=lambda: None)
        self.live = {}
        self.steps = self.most_live = self.empty_steps = 0
        self.on_step, self.failing = on_step, failing

    def enqueue(self, prompts, params, use_tqdm, lora_request=None):
        (prompt,), (param,) = prompts, params
        text = prompt if isinstance(prompt, str) else str(prompt["prompt_token_ids"])
        if text == "too long":
            raise UserError("the prompt is longer than the model")
        if text == "poison":
            self.live["half in"] = None
            raise OverflowError("cannot be sent")
        self.live[str(self.request_counter.counter)] = [text, param, param.max_tokens]
        self.request_counter.counter += 1

    def enqueue_chat(self, messages, params, use_tqdm, lora_request=None):
        self.enqueue([" | ".join(m["content"] for m in messages[0])], params, use_tqdm)

    def abort_request(self, request_ids):
        self.live.pop("half in", None)
        for request_id in request_ids:
            self.live.pop(request_id, None)

    def step(self):
        assert "half in" not in self.live
        self.on_step(self)
        self.steps += 1
        self.empty_steps += not self.live
        self.most_live = max(self.most_live, sum(p.n for _, p, _ in self.live.values()))
        done = []
        for request_id, entry in list(self.live.items()):
            entry[2] -= 1
            if entry[2] == 0:
                done.append(self._output(request_id, *self.live.pop(request_id)[:2]))
        return done

    def _output(self, request_id, text, params):
        completion = SimpleNamespace(
            text=text.upper(),
            token_ids=list(range(params.max_tokens)),
            finish_reason="error" if text in self.failing else "length",
            stop_reason=None,
            logprobs=None,
        )
        return SimpleNamespace(
            request_id=request_id,
            finished=True,
            outputs=[completion] * params.n,
            prompt_token_ids=[0] * len(text),
            prompt_logprobs=None,
            kv_transfer_params=None,
        )


def lines(*steps):
    """Numbered lines that take this many steps each."""
    return [(i, {"prompt": f"p{i}", "max_tokens": n}) for i, n in enumerate(steps, start=1)]
