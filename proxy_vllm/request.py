"""What a request may ask of a proxy-tuned engine, checked where it is admitted."""

from typing import TYPE_CHECKING, Any

from proxy_vllm.config import ProxyConfig
from proxy_vllm.errors import UserError

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams


def admit(proxy: ProxyConfig, params: Any) -> None:
    """Raise ``UserError`` if the engine must not run a request with these parameters."""
    proxy.alpha_of(getattr(params, "extra_args", None))


def worker_alpha(proxy: ProxyConfig, params: "SamplingParams | None") -> float:
    """Alpha of a request that has been admitted.

    A worker must not raise: that would take every other request down with it. A request that came
    in past our admission with an alpha that cannot be used runs with the server's.
    """
    try:
        return proxy.alpha_of(params.extra_args if params is not None else None)
    except UserError as error:
        from vllm.logger import init_logger

        init_logger(f"vllm.{__name__}").error(
            "%s; this request runs with alpha %g", error, proxy.alpha
        )
        return proxy.alpha
