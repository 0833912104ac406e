"""Who the ops are measured against: the names to ask for them by, how they are loaded, labelled and compiled."""

from collections.abc import Callable, Sequence
from importlib import metadata

import torch

from rlhf_fast.flags import suggestion

#: On a GPU the reductions of the compiled peers are tuned too. (No graphs: they would copy the inputs.)
TUNED = {"mode": "max-autotune-no-cudagraphs"}
#: What a peer is asked for by, which is how its labels begin → the distribution that it comes in, if it is a package.
PEERS: dict[str, str | None] = {
    "eager": None, "compile": None, "reference": None, "pieces": None, "kl_div": None, "vLLM": None,
    "cpp": None, "cuda": None, "triton": None,
    "TRL": "trl", "verl": "verl", "Liger": "liger-kernel", "quack": "quack-kernels", "flash-attn": "flash-attn",
    "FlashInfer": "flashinfer-python", "transformers": "transformers",
}  # fmt: skip


def chosen_peers(text: str | None) -> tuple[str, ...] | None:
    """The names between the commas of ``text``; None, for all, without it, and none of them for ``"none"``.

    Raises ``ValueError`` for a name that is unknown and for a package that is not installed.
    """
    if text is None:
        return None
    named = () if text.strip().lower() == "none" else tuple(name.strip() for name in text.split(","))
    known = {name.lower(): name for name in PEERS}
    for name in named:
        if name.lower() not in known:
            raise ValueError(
                f"unknown peer {name!r}{suggestion(name.lower(), known)}: there are {', '.join(PEERS)}, and none"
            )
        distribution = PEERS[known[name.lower()]]
        if distribution is not None and version(distribution) is None:
            raise ValueError(f"the peer {known[name.lower()]} is not installed: pip install {distribution}")
    return tuple(known[name.lower()] for name in named)


def wanted(label: str, peers: Sequence[str] | None) -> bool:
    """Whether what is labelled so is one of ``peers``; everybody is where that is None."""
    return peers is None or any(label.startswith(name) for name in peers)


def version(distribution: str) -> str | None:
    """That of an installed package; None without it."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def compiled(function: Callable, device: str) -> Callable:
    """``torch.compile`` at its best setting for one shape; anew each time, for it gives up a function after eight."""
    torch.compiler.reset()
    return torch.compile(function, dynamic=False, **(TUNED if device == "cuda" else {}))


def package_or_formula(name: str, distribution: str, load: Callable, formula: Callable | None, notes: dict) -> dict:
    """Label → function of one peer: what ``load`` imports, labelled with its version, else ``formula``, said to be one.

    Why a package that is installed is not used, or why a peer without a formula is missing, goes to ``notes``.
    """
    try:
        return {f"{name} {metadata.version(distribution)}": load()}
    except metadata.PackageNotFoundError:
        why = "not installed"
    except Exception as error:  # a peer may fail in any way; that is its row's business alone
        why = sentence(error)
    if formula is None:
        notes[name] = why
        return {}
    if why != "not installed":
        notes[name] = f"its formula is measured, for {why}"
    return {f"{name}'s formula": formula}


def sentence(error: Exception) -> str:
    """The first line of an error, short."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:110] if lines else ''}"
