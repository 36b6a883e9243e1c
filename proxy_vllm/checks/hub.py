"""Tell in seconds why a model of the Hugging Face hub cannot be had.

vLLM asks the hub many times before it loads a model, repeats what fails, and says "invalid
repository ID" to all of it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from proxy_vllm.checks.folders import what_it_is
from proxy_vllm.errors import UserError, one_line

# The files by which vLLM knows a model: Hugging Face's form and Mistral's.
CONFIG_FILES = ("config.json", "params.json")
# Seconds to wait for the hub's answer, once.
_TIMEOUT = 10
_DOWNLOADED = "HF_HUB_OFFLINE=1 uses what is downloaded already"


def check_hub(
    role: str, name: str, revision: str | None = None, token: bool | str | None = None
) -> None:
    """Refuse a hub name that is unknown, gated, no model, or out of reach.

    What is downloaded already is used without the hub, as vLLM does. Addresses of other stores
    (``s3://...``, ModelScope's names) are left to vLLM.

    Raises:
        UserError: naming the member, what the hub said, and the way out.
    """
    import vllm.envs
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError

    if "://" in name or vllm.envs.VLLM_USE_MODELSCOPE:
        return

    def is_downloaded() -> bool:
        found = (try_to_load_from_cache(name, file, revision=revision) for file in CONFIG_FILES)
        return any(isinstance(path, str) for path in found)

    with _naming(role, name, revision):
        if is_downloaded():
            return
        if constants.HF_HUB_OFFLINE:
            raise UserError(
                f"{role} {name!r} is neither a folder nor a downloaded model, and HF_HUB_OFFLINE"
                " is set: unset it, or name a folder"
            )
        for file in CONFIG_FILES:
            try:
                _ask(name, file, revision, token)
                return
            except EntryNotFoundError:
                continue
        found = what_it_is(_files(name, revision, token))
        raise UserError(f"{role} {name!r}: {found}")


def check_data_set(role: str, name: str) -> None:
    """Refuse the hub name of a data set that is unknown, gated or out of reach.

    Raises:
        UserError: naming what asked for it, what the hub said, and the way out.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError

    if constants.HF_HUB_OFFLINE:
        return
    url = hf_hub_url(name, "README.md", repo_type="dataset")
    with _naming(role, name, None, kind="data set", instead="give a task file with local data"):
        try:
            get_hf_file_metadata(url, timeout=_TIMEOUT)
        except EntryNotFoundError:
            return


def _ask(name: str, file: str, revision: str | None, token: bool | str | None) -> None:
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    url = hf_hub_url(name, file, revision=revision)
    get_hf_file_metadata(url, token=token, timeout=_TIMEOUT)


def _files(name: str, revision: str | None, token: bool | str | None) -> list[str]:
    from huggingface_hub import HfApi

    siblings: Any = HfApi().model_info(name, revision=revision, token=token, timeout=_TIMEOUT)
    return [file.rfilename for file in siblings.siblings or []]


@contextmanager
def _naming(
    role: str,
    name: str,
    revision: str | None,
    kind: str = "model",
    instead: str = "name a folder",
) -> Iterator[None]:
    """Turn the hub's errors into one line that names the member and the way out."""
    from huggingface_hub import constants, errors

    hub = constants.ENDPOINT
    who = f"{role} {name!r}"
    try:
        yield
    except UserError:
        raise
    except errors.HFValidationError as error:
        reason = one_line(error).removesuffix(" Use `repo_type` argument if needed.")
        raise UserError(f"{who} is neither a folder nor a name of the hub: {reason}") from None
    except errors.GatedRepoError:
        raise UserError(
            f"{who} is gated: accept its terms at {hub}/{name}, and log in with `hf auth login` or"
            " HF_TOKEN as the account that did"
        ) from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"{who}: {hub} has no such {kind}, or it is private: check the name; for a private"
            f" {kind} log in with `hf auth login` or HF_TOKEN"
        ) from None
    except errors.RevisionNotFoundError:
        raise UserError(
            f"{who} has no revision {revision!r}: name a branch, tag or commit"
        ) from None
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "an error")
        if status in (401, 403):
            way_out = "the token is not accepted: log in anew with `hf auth login`, or set HF_TOKEN"
        elif status == 429:
            way_out = f"too many requests: wait, or log in with `hf auth login`; {_DOWNLOADED}"
        else:
            way_out = f"the hub is in trouble: try again later; {_DOWNLOADED}"
        raise UserError(f"{who}: {hub} answers {status}: {way_out}") from None
    except Exception as error:
        # Whatever the HTTP client raises where no answer comes: names, refusals, time-outs, TLS.
        raise UserError(
            f"{who}: {hub} cannot be reached ({one_line(error)[:200]}): check the network and"
            f" HF_ENDPOINT, or {instead}; {_DOWNLOADED}"
        ) from None
