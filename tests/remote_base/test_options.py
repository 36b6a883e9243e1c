"""Options of a base elsewhere: what they become, and where they are refused."""

import argparse

import pytest

from proxy_vllm.cli.arguments import add_proxy_arguments, apply_to_namespace
from proxy_vllm.cli.remote_base import remote_base
from proxy_vllm.config import ProxyConfig
from proxy_vllm.errors import UserError

TRIO = ["--expert", "E", "--antiexpert", "A"]


def parse(*options: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_proxy_arguments(parser)
    args = parser.parse_args([*TRIO, *options])
    args.model_tag = None
    return args


def test_options_reach_the_workers():
    options = ("--base-url", "http://h/v1", "--base-model", "M", "--base-mode", "top-k")
    settings = remote_base(parse(*options, "--price", "1,2,0.5", "--base-drafts", "3"))
    assert settings is not None
    assert (settings.url, settings.model, settings.mode) == ("http://h/v1", "M", "top-k")
    assert (settings.price, settings.drafts, settings.top_logprobs) == ("1,2,0.5", 3, 20)
    proxy = ProxyConfig(expert="E", antiexpert="A", remote_base=settings)
    assert ProxyConfig.from_dict(proxy.to_dict()) == proxy
    assert remote_base(parse()) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--base-model", "M"), "--base-model is for a base elsewhere"),
        (("--price", "1,2"), "--price is for a base elsewhere"),
        (("--base-url", "http://h/v1"), "--base-model"),
        (("--base-url", "h", "--base-model", "M"), "a URL is needed"),
    ],
)
def test_options_that_say_nothing_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        remote_base(parse(*options))


def test_an_engine_that_nobody_steers_is_not_started():
    """Benchmarks and Ray Serve would answer as if the antiexpert were the base."""
    args = parse("--base-url", "http://h/v1", "--base-model", "M")
    with pytest.raises(UserError, match="--base-url is for"):
        apply_to_namespace(args)
