"""What `make docs` does with a link to a file outside of docs/: it becomes a name, and a picture comes along."""

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(!?)\[([^\]]+)\]\((\.\./[^)#]+)([^)]*)\)")
PICTURES = "benchmarks/results/*.png"


def on_files(files: Any, config: Any, **_: Any) -> Any:
    """The site has the pictures of the benchmarks where the repository has them."""
    from mkdocs.structure.files import File

    for path in sorted(ROOT.glob(PICTURES)):
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """``[text](../benchmarks/x.py)`` as ``text (`benchmarks/x.py`)``, or the path alone where that is the text."""
    folder = posixpath.dirname(page.file.src_uri)

    def named(link: re.Match) -> str:
        picture, text, path, _ = link.groups()
        target = posixpath.normpath(posixpath.join("docs", folder, path))
        if target.startswith("docs/"):
            return link[0]
        if picture:
            return f"![{text}]({posixpath.relpath(target, folder or '.')})"
        return f"`{target}`" if text == target else f"{text} (`{target}`)"

    return LINK.sub(named, markdown)
