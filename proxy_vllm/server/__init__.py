"""What stands before vLLM's HTTP application: checks, metrics, a page, and Ray Serve's replicas."""

from argparse import Namespace


def add_middleware(args: Namespace) -> None:
    """Name ours in ``args``: vLLM adds them in each API server; the last sees a request first."""
    ours = ["metrics.MetricsMiddleware", "admission.AdmissionMiddleware"]
    if args.playground:
        ours.append("playground_page.PlaygroundMiddleware")
    args.middleware = [*args.middleware, *(f"{__name__}.{name}" for name in ours)]
