"""Names that were meant for this package: a near miss is refused, where silence would serve plain.

vLLM's ``additional_config`` and a request's ``extra_args`` take any name, and others have theirs in
them, so only what can hardly mean anything else is a near miss.
"""

import re
from collections.abc import Iterable
from difflib import SequenceMatcher
from functools import lru_cache

from vllm_kvcompress.planning.config import CONFIG_KEY

_LETTERS = "kvcompression"
_BEGINNINGS = ("kvcompress", "vllmkvcompress")
_ALIKE = 0.84
"""Share of the letters that two names have in common, in order: one or two typing errors."""


@lru_cache(maxsize=1024)
def is_near_miss(name: str) -> bool:
    """Whether a name is not ``kv_compression`` but was probably meant for this package."""
    if name == CONFIG_KEY:
        return False
    letters = re.sub(r"[^a-z0-9]", "", name.lower())
    if letters.startswith(_BEGINNINGS):
        return True
    return letters.startswith("kv") and SequenceMatcher(None, letters, _LETTERS).ratio() > _ALIKE


def is_ours(name: object) -> bool:
    """Whether a name is ``kv_compression`` or a near miss."""
    return isinstance(name, str) and (name == CONFIG_KEY or is_near_miss(name))


def check_names(names: Iterable[object]) -> None:
    """Refuse near misses among the names in vLLM's ``additional_config``.

    Raises:
        ValueError: One sentence with the wrong name and the right one.

    """
    for name in names:
        if isinstance(name, str) and is_near_miss(name):
            raise ValueError(
                f'additional_config has "{name}", which nobody reads; compression is set as '
                f'{{"{CONFIG_KEY}": {{"method": "cake", "budget": 1024}}}}'
            )
