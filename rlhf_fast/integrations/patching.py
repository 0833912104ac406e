"""`patch`: put the ops in the place of another library's functions, all of them or none, and take them out again."""

import inspect
import io
import sys
import textwrap
import tokenize
import warnings
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import suppress
from hashlib import sha256
from importlib import import_module, metadata
from importlib.util import find_spec
from threading import RLock
from typing import Any, NamedTuple

#: The libraries that `patch` knows, each with a module here that says what is replaced.
PEERS = ("trl", "openrlhf", "verl")


class Replacement(NamedTuple):
    """One function, class or method of a peer, and what takes its place."""

    module: str  # where it is defined
    name: str  # "function", "Class" or "Class.method"
    signatures: tuple[str, ...]  # its parameters in the versions that are known, see `parameters`
    replace: Callable[[Callable], Any]  # from the original to what takes its place
    since: str = "0"  # the first version that has it here
    until: str = ""  # the first version that no longer has it here
    registries: tuple[str, ...] = ()  # dicts in the same module that hold it too
    bodies: tuple[str, ...] = ()  # where given, `fingerprint` must be one of these, or the peer's own stays


class Peer(NamedTuple):
    """The versions of a library whose conventions are known, and what is replaced in them."""

    since: str  # the first version
    until: str  # the first version that is not known
    replacements: tuple[Replacement, ...]


class Swap(NamedTuple):
    """A function that was found and may be replaced."""

    path: str
    owner: Any  # the module or class that it was taken from
    name: str
    original: Any
    replacement: Any
    registries: tuple[MutableMapping, ...]


#: The patches in force, in the order in which they were applied.
_APPLIED: list["Patch"] = []
_LOCK = RLock()


class Patch:
    """A patch in force: ends with ``undo()``, or with the block of the ``with`` statement that it is used in."""

    def __init__(self, peer: str, version: str, swaps: list[Swap], kept: dict[str, str]) -> None:
        self.peer, self.version, self._swaps = peer, version, swaps
        #: The full names of what was left as it is for its body is not known, each with the reason.
        self.kept = kept

    @property
    def replaced(self) -> tuple[str, ...]:
        """The full names of what was replaced."""
        return tuple(swap.path for swap in self._swaps)

    def undo(self) -> None:
        """Put every original back, also into modules that were imported since.

        Raises:
            RuntimeError: the patch is not in force any more, a later one still is, or somebody else has replaced one of
                its functions since. Then nothing is changed.
        """
        with _LOCK:
            if self not in _APPLIED:
                raise RuntimeError(f"patch({self.peer!r}) was undone before")
            if (last := _APPLIED[-1]) is not self:
                raise RuntimeError(f"undo patch({last.peer!r}) before patch({self.peer!r}), which is the older one")
            for swap in self._swaps:
                if vars(swap.owner).get(swap.name) is not swap.replacement:
                    raise RuntimeError(f"{swap.path} was replaced by somebody else since: undo that before this patch")
            for swap in self._swaps:
                _exchange(swap, swap.replacement, swap.original)
            _APPLIED.remove(self)

    def __enter__(self) -> "Patch":
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


def patch(peer: str, *, verbose: bool = False) -> Patch:
    """Replace functions of TRL, OpenRLHF or verl by the ops here, to be taken back with ``undo()``.

    Each function is replaced where it is defined and in every module that has imported it by name. A copy held
    elsewhere, in a closure, a ``functools.partial`` or a default argument, is not found. What each peer's functions
    do, dtypes, clamps and all, is kept; docs/integrations.md lists the functions and the exceptions.

    Args:
        peer: ``"trl"``, ``"openrlhf"`` or ``"verl"``.
        verbose: print a line for each function with the modules in which it was replaced.

    Returns:
        The patch in force, a context manager too.

    Raises:
        ValueError: an unknown peer.
        ModuleNotFoundError: a peer that is not installed, or one that lacks a library itself.
        RuntimeError: a version, or a function with parameters, that is not known; a peer that is patched already. In
            each case nothing has been replaced.

    Warns:
        UserWarning: a method that is known by its body, where that is another. It stays the peer's own and is in
            ``kept``; the others are replaced, unless warnings are errors.
    """
    with _LOCK:
        return _apply(peer, verbose)


def _apply(peer: str, verbose: bool) -> Patch:
    if peer not in PEERS:
        raise ValueError(f"patch: peer must be one of {', '.join(PEERS)}, got {peer!r}")
    if any(applied.peer == peer for applied in _APPLIED):
        raise RuntimeError(f"patch({peer!r}) is in force already: undo it first")
    if not _installed(peer):
        raise ModuleNotFoundError(f"{peer} is not installed", name=peer)
    known: Peer = import_module(f"rlhf_fast.integrations.{peer}").PEER
    version = _version(peer)
    if not release(known.since) <= release(version) < release(known.until):
        raise RuntimeError(f"{peer} {version} is not known: patch takes {known.since} <= version < {known.until}")
    swaps: list[Swap] = []
    kept: dict[str, str] = {}
    for replacement in known.replacements:
        if not _has(replacement, version):
            continue
        if replacement.bodies and (reason := _unknown(replacement)):
            kept[f"{replacement.module}.{replacement.name}"] = reason
        else:
            swaps.append(_find(peer, version, replacement))
    for path, reason in kept.items():
        warnings.warn(f"patch({peer!r}): {path} stays {peer}'s own: {reason}", stacklevel=3)
    try:
        for swap in swaps:
            places = _exchange(swap, swap.original, swap.replacement)
            if verbose:
                print(f"{peer} {version}: {swap.path} is rlhf_fast's in {', '.join(places)}")
    except BaseException:  # an interrupt too
        for swap in swaps:
            _exchange(swap, swap.replacement, swap.original)
        raise
    _APPLIED.append(applied := Patch(peer, version, swaps, kept))
    return applied


def release(version: str) -> tuple[int, ...]:
    """The numbers of a version, ``"1.10.0rc1"`` → ``(1, 10, 0)``: enough to order the releases of a peer."""
    numbers: list[int] = []
    for part in version.split("+")[0].split(".")[:3]:
        digits = part[: next((i for i, c in enumerate(part) if not c.isdigit()), len(part))]
        if not digits:
            break
        numbers.append(int(digits))
        if digits != part:
            break
    return tuple(numbers + [0] * (3 - len(numbers)))


def parameters(function: Callable) -> str:
    """The parameters of a function, or of the ``forward`` of a class, without their types: ``"logits, index, k=1"``."""
    function = function.forward if inspect.isclass(function) else function
    signature = inspect.signature(function)
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=plain, return_annotation=inspect.Signature.empty))[1:-1]


def fingerprint(function: Callable) -> str:
    """Of a function's source without its comments, line breaks and spaces, alike in every version of Python."""
    source = textwrap.dedent(inspect.getsource(function))
    pieces = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in _BLOCKS:
            pieces.append(_BLOCKS[token.type])
        elif token.type not in (tokenize.COMMENT, tokenize.NL):
            pieces.append("".join(token.string.split()))
    return sha256("".join(pieces).encode()).hexdigest()[:16]


_BLOCKS = {tokenize.INDENT: "\n>", tokenize.DEDENT: "\n<", tokenize.NEWLINE: "\n"}


def _unknown(replacement: Replacement) -> str:
    """Why a function that is known by its body cannot be replaced; empty if it can."""
    *classes, name = replacement.name.split(".")
    try:
        owner: Any = import_module(replacement.module)
        for part in classes:
            owner = getattr(owner, part)
        if hasattr(method := vars(owner)[name], "__wrapped__"):  # of which inspect shows the source of what is inside
            return "its body is wrapped by somebody else"
        body = fingerprint(method)
    except (ImportError, RuntimeError, AttributeError, KeyError) as error:
        return f"it was not found ({type(error).__name__}: {error})"
    except (OSError, TypeError):
        return "its source cannot be read"
    return "" if body in replacement.bodies else f"its body ({body}) is not one of those known"


def _has(replacement: Replacement, version: str) -> bool:
    at = release(version)
    return release(replacement.since) <= at and not (replacement.until and at >= release(replacement.until))


def _find(peer: str, version: str, replacement: Replacement) -> Swap:
    """The function of the peer, checked, with what takes its place."""
    path = f"{replacement.module}.{replacement.name}"
    module = _import(peer, replacement.module)
    *classes, name = replacement.name.split(".")
    owner: Any = module
    for part in classes:
        owner = getattr(owner, part, None)
    original = None if owner is None else vars(owner).get(name)
    if original is None:
        raise RuntimeError(f"{peer} {version} has no {path}: nothing was replaced")
    if (found := parameters(original)) not in replacement.signatures:
        raise RuntimeError(f"{path} of {peer} {version} takes ({found}), which is not known: nothing was replaced")
    for registry in replacement.registries:
        if not hasattr(module, registry):
            raise RuntimeError(f"{peer} {version} has no {replacement.module}.{registry}: nothing was replaced")
    registries = tuple(getattr(module, registry) for registry in replacement.registries)
    return Swap(path, owner, name, original, replacement.replace(original), registries)


def _exchange(swap: Swap, old: Any, new: Any) -> list[str]:
    """Put ``new`` wherever ``old`` is held by name, and return the places."""
    if inspect.isclass(swap.owner):
        setattr(swap.owner, swap.name, new)
        places = [swap.owner.__module__]
    else:
        places = []
        for place, names in _modules():
            held = [name for name, value in list(names.items()) if value is old]  # another thread may import
            names.update(dict.fromkeys(held, new))
            places += [place] if held else []
    for registry in swap.registries:
        registry.update({key: new for key, value in list(registry.items()) if value is old})
    return places


def _modules() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every imported module with its names; read past ``__getattr__``, which would import what is lazy."""
    for name, module in list(sys.modules.items()):
        names = getattr(module, "__dict__", None) if module is not None else None
        if isinstance(names, dict) and not name.startswith("rlhf_fast."):
            yield name, names


def _import(peer: str, module: str) -> Any:
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name == module:
            raise RuntimeError(f"{peer} {_version(peer)} has no {module}: nothing was replaced") from error
        raise ModuleNotFoundError(f"{module} cannot be imported: {error}", name=error.name) from error


def _installed(peer: str) -> bool:
    try:
        return find_spec(peer) is not None
    except ValueError:  # imported, but made by hand: a stand-in, whose version will tell
        return True


def _version(peer: str) -> str:
    with suppress(metadata.PackageNotFoundError):
        # What an interrupted installation leaves has no version, whatever the annotation says.
        found: str | None = metadata.version(peer)
        if found:
            return found
    return str(getattr(import_module(peer), "__version__", "0"))
