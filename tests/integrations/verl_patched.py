"""The patch as verl's workers get it: a module that VERL_USE_EXTERNAL_MODULES names. Here calls are counted too."""

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import rlhf_fast as rf
from rlhf_fast.integrations import verl as integration

CALLS: Counter[str] = Counter()


def counted(replacement: Any) -> Any:
    """The same replacement, whose calls are counted."""

    def replace(original: Callable) -> Callable:
        ours = replacement.replace(original)

        @functools.wraps(ours)
        def call(*args: Any, **kwargs: Any) -> Any:
            CALLS[replacement.name] += 1
            return ours(*args, **kwargs)

        return call

    return replacement._replace(replace=replace)


integration.PEER = integration.PEER._replace(replacements=tuple(map(counted, integration.PEER.replacements)))
PATCH = rf.patch("verl")
