"""Pretrained weights without a long wait where there is no network.

huggingface_hub asks an unreachable server again and again, for a minute. Here one question of a few
seconds decides whether it looks into its cache alone.
"""

import contextlib
import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator

SECONDS = 5.0  # that a server has to answer


@contextlib.contextmanager
def quick_downloads() -> Iterator[bool]:
    """Inside, huggingface_hub reads its cache alone where its server cannot be reached.

    The value of ``with`` says whether it can.
    """
    from huggingface_hub import constants
    before = constants.HF_HUB_OFFLINE
    reachable = not before and reaches(constants.ENDPOINT)
    constants.HF_HUB_OFFLINE = not reachable
    try:
        yield reachable
    finally:
        constants.HF_HUB_OFFLINE = before


def reaches(url: str, seconds: float = SECONDS) -> bool:
    """Whether a server answers in time, by whatever proxy the environment names."""
    answered = threading.Event()

    def ask() -> None:
        try:
            urllib.request.urlopen(url, timeout=seconds).close()
        except urllib.error.HTTPError:
            pass  # an answer
        except OSError as error:  # another library may know a certificate that this one does not
            if not isinstance(getattr(error, "reason", error), ssl.SSLError):
                return
        answered.set()

    # Looking up the host has no timeout of its own: the thread may be left behind.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(seconds)
    return answered.is_set()
