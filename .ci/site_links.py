"""What `make docs` does to a page: a link to a file outside of docs/, which the site has not, becomes its name."""

import re
from typing import Any

LINK = re.compile(r"\[([^\]]+)\]\(\.\./([^)#]+)[^)]*\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """``[text](../benchmarks/x.py)`` as ``text (`benchmarks/x.py`)``, or the path alone where that is the text."""

    def named(link: re.Match) -> str:
        text, path = link.groups()
        return f"`{path}`" if text == path else f"{text} (`{path}`)"

    return LINK.sub(named, markdown)
