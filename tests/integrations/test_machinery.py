"""The machinery of rf.patch on a small library of its own: everything or nothing, and back again."""

import subprocess
import sys
from functools import wraps
from importlib import import_module
from threading import Thread
from types import ModuleType

import pytest

import rlhf_fast as rf
from rlhf_fast.integrations import patching
from rlhf_fast.integrations.patching import Peer, Replacement, fingerprint, parameters, release

FILES = {
    "__init__": "__version__ = '1.4.2'",
    "maths": (
        "TABLE = {}\n"
        "def double(x, times=2): return x * times\n"
        "def half(x): return x / 2\n"
        "class Loss:\n    def forward(self, x): return x + 1\n"
        "TABLE['double'] = double\n"
    ),
    "loop": "from .maths import double, double as twice, half\ndef run(x): return double(x), twice(x), half(x)",
    "late": "from .maths import double",
}


def tenfold(original):
    return lambda x, times=2: 10 * original(x, times)


def negative(original):
    return lambda *args: -original(*args)


REPLACEMENTS = {
    "double": Replacement("toy.maths", "double", ("x, times=2",), tenfold, registries=("TABLE",)),
    "half": Replacement("toy.maths", "half", ("x",), negative),
    "forward": Replacement("toy.maths", "Loss.forward", ("self, x",), negative),
}


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """Two small libraries, ``toy`` and ``other``, the same but for their names."""
    monkeypatch.setattr(patching, "PEERS", ("toy", "other", "absent"))
    monkeypatch.setattr(patching, "_APPLIED", [])
    monkeypatch.syspath_prepend(tmp_path)
    for peer in ("toy", "other"):
        (tmp_path / peer).mkdir()
        for name, text in FILES.items():
            (tmp_path / peer / f"{name}.py").write_text(text)
        known(monkeypatch, *REPLACEMENTS, peer=peer)
    yield import_module("toy.loop")
    for name in [name for name in sys.modules if name.split(".")[0] in ("toy", "other")]:
        del sys.modules[name]


def known(monkeypatch, *names, peer="toy", since="1.4", until="2", **changes):
    """Let the module of the peer say that it replaces these, changed as ``changes`` says."""
    module = ModuleType(f"rlhf_fast.integrations.{peer}")
    chosen = [REPLACEMENTS[name]._replace(**changes.get(name, {})) for name in names]
    chosen = [r._replace(module=r.module.replace("toy", peer)) for r in chosen]
    module.PEER = Peer(since, until, tuple(chosen))
    monkeypatch.setitem(sys.modules, module.__name__, module)


def state():
    """What is called when each name is called, in the modules, the class and the table."""
    maths, loop = sys.modules["toy.maths"], sys.modules["toy.loop"]
    own = {k: v for m in (maths, loop) for k, v in vars(m).items() if callable(v)}
    return own | {"forward": maths.Loss.forward, "table": maths.TABLE["double"]}


def test_a_patch_reaches_every_name_and_undo_takes_it_back(toy):
    before = state()
    assert toy.run(3) == (6, 6, 1.5)
    loss = sys.modules["toy.maths"].Loss()
    patch = rf.patch("toy")
    assert toy.run(3) == (60, 60, -1.5)
    assert loss.forward(1) == -2  # an instance that was there before
    assert sys.modules["toy.maths"].TABLE["double"](3) == 60
    assert import_module("toy.late").double(1, 3) == 30
    assert patch.replaced == ("toy.maths.double", "toy.maths.half", "toy.maths.Loss.forward")
    patch.undo()
    assert state() == before
    assert sys.modules["toy.late"].double(1, 3) == 3  # imported while the patch was in force
    assert loss.forward(1) == 2


def test_the_block_ends_it_also_with_an_error(toy):
    with rf.patch("toy") as patch:
        assert toy.run(3)[0] == 60
        assert patch.peer == "toy"
        assert patch.version == "1.4.2"
    assert toy.run(3)[0] == 6
    with pytest.raises(ZeroDivisionError), rf.patch("toy"):
        raise ZeroDivisionError
    assert toy.run(3)[0] == 6
    rf.patch("toy").undo()  # and again


def test_a_name_of_the_user_is_found_too(toy, monkeypatch):
    mine = ModuleType("my_training_script")
    mine.step = toy.double
    monkeypatch.setitem(sys.modules, "my_training_script", mine)
    with rf.patch("toy"):
        assert mine.step(1) == 20
    assert mine.step(1) == 2


def test_verbose_says_what_was_replaced_where(toy, capsys):
    with rf.patch("toy"):
        assert capsys.readouterr().out == ""
    with rf.patch("toy", verbose=True):
        first, second, third = capsys.readouterr().out.splitlines()
    assert first == "toy 1.4.2: toy.maths.double is rlhf_fast's in toy.maths, toy.loop"
    assert second == "toy 1.4.2: toy.maths.half is rlhf_fast's in toy.maths, toy.loop"
    assert third == "toy 1.4.2: toy.maths.Loss.forward is rlhf_fast's in toy.maths"


def refused(error, sentence, action=lambda: rf.patch("toy")):
    """The action raises this sentence and leaves everything as it is."""
    import_module("toy.loop")
    before, applied = state(), list(patching._APPLIED)
    with pytest.raises(error) as caught:
        action()
    assert str(caught.value) == sentence
    assert state() == before
    assert list(patching._APPLIED) == applied


def test_an_unknown_or_absent_peer(toy):
    refused(
        ValueError,
        "patch: peer must be one of toy, other, absent, got 'liger'",
        lambda: rf.patch("liger"),
    )
    refused(ModuleNotFoundError, "absent is not installed", lambda: rf.patch("absent"))


@pytest.mark.parametrize(("since", "until"), [("1.5", "2"), ("1", "1.4.2")])
def test_an_unknown_version(toy, monkeypatch, since, until):
    known(monkeypatch, *REPLACEMENTS, since=since, until=until)
    refused(RuntimeError, f"toy 1.4.2 is not known: patch takes {since} <= version < {until}")


def test_a_stand_in_and_an_installation_without_a_version_are_not_known(toy, monkeypatch):
    sentence = "toy 0 is not known: patch takes 1.4 <= version < 2"
    monkeypatch.setattr(patching.metadata, "version", lambda peer: None)
    monkeypatch.delattr(sys.modules["toy"], "__version__", raising=False)
    refused(RuntimeError, sentence, lambda: rf.patch("toy"))
    stand_in = ModuleType("toy")  # without a __spec__
    stand_in.maths, stand_in.loop = sys.modules["toy.maths"], sys.modules["toy.loop"]
    monkeypatch.setitem(sys.modules, "toy", stand_in)
    refused(RuntimeError, sentence, lambda: rf.patch("toy"))


def test_a_function_that_has_changed_or_gone(toy, monkeypatch):
    known(monkeypatch, *REPLACEMENTS, forward={"signatures": ("self, x, y",)})
    refused(
        RuntimeError,
        "toy.maths.Loss.forward of toy 1.4.2 takes (self, x), which is not known: nothing was replaced",
    )
    known(monkeypatch, *REPLACEMENTS, half={"name": "third"})
    refused(RuntimeError, "toy 1.4.2 has no toy.maths.third: nothing was replaced")
    known(monkeypatch, *REPLACEMENTS, half={"module": "toy.gone"})
    refused(RuntimeError, "toy 1.4.2 has no toy.gone: nothing was replaced")
    known(monkeypatch, *REPLACEMENTS, forward={"name": "Gone.forward"})
    refused(RuntimeError, "toy 1.4.2 has no toy.maths.Gone.forward: nothing was replaced")


BODY = fingerprint(tenfold)  # not that of the toy


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"bodies": (BODY,)}, "its body ({}) is not one of those known"),
        ({"bodies": (BODY,), "name": "Gone.forward"}, "it was not found (AttributeError: "),
        ({"bodies": (BODY,), "name": "Loss.gone"}, "it was not found (KeyError: 'gone')"),
        (
            {"bodies": (BODY,), "module": "toy.gone"},
            "it was not found (ModuleNotFoundError: No module named 'toy.gone')",
        ),
    ],
)
def test_a_method_known_by_its_body_may_be_another(toy, monkeypatch, changes, reason):
    """Then it stays as it is, with a warning, and the others are replaced."""
    own = toy.run, sys.modules["toy.maths"].Loss.forward
    known(monkeypatch, *REPLACEMENTS, forward=changes)
    with pytest.warns(UserWarning, match="stays toy's own") as warned:
        patch = rf.patch("toy")
    with patch:
        assert patch.replaced == ("toy.maths.double", "toy.maths.half")
        ((path, why),) = patch.kept.items()
        assert why.startswith(reason.format(fingerprint(own[1])))
        assert [(str(w.message), w.filename) for w in warned] == [
            (f"patch('toy'): {path} stays toy's own: {why}", __file__)
        ]
        assert sys.modules["toy.maths"].Loss.forward is own[1]
        assert toy.run(3) == (60, 60, -1.5)
    known(monkeypatch, *REPLACEMENTS, forward={"bodies": (BODY, fingerprint(own[1]))})
    with rf.patch("toy") as patch:
        assert patch.kept == {}
        assert sys.modules["toy.maths"].Loss().forward(1) == -2


def test_a_body_whose_source_cannot_be_read(toy, monkeypatch):
    known(monkeypatch, *REPLACEMENTS, forward={"bodies": (BODY,)})
    sys.modules["toy.maths"].Loss.forward = len  # nothing of Python's
    with pytest.warns(UserWarning, match=r"toy\.maths\.Loss\.forward stays toy's own"):
        patch = rf.patch("toy")
    patch.undo()
    assert patch.kept == {"toy.maths.Loss.forward": "its source cannot be read"}


def test_a_wrapper_of_somebody_elses_is_another_body(toy, monkeypatch):
    """``functools.wraps`` shows the source of what it wraps: what the wrapper does would be lost."""
    loss = sys.modules["toy.maths"].Loss
    own = loss.forward
    known(monkeypatch, *REPLACEMENTS, forward={"bodies": (fingerprint(own),)})
    loss.forward = wraps(own)(lambda self, x: 100 * own(self, x))
    with pytest.warns(UserWarning, match="its body is wrapped"):
        patch = rf.patch("toy")
    with patch:
        assert patch.kept == {"toy.maths.Loss.forward": "its body is wrapped by somebody else"}
        assert loss().forward(1) == 200


def test_a_warning_that_is_an_error_leaves_everything_as_it_is(toy, monkeypatch):
    known(monkeypatch, *REPLACEMENTS, forward={"bodies": (BODY,)})
    body = fingerprint(sys.modules["toy.maths"].Loss.forward)
    monkeypatch.setattr("warnings.filters", [("error", None, UserWarning, None, 0)])
    refused(
        UserWarning,
        f"patch('toy'): toy.maths.Loss.forward stays toy's own: its body ({body}) is not one of those known",
    )


def test_a_fingerprint_is_of_what_the_body_does(tmp_path, monkeypatch):
    bodies = (
        "    if x:\n        y = f'{x} of'\n        y += '.'\n    return y\n",
        "    # why\n    if x:  # so\n\n      y = f'{x} of'\n      y  +=   '.'\n    return y\n",
        "    if x:\n        y = f'{x} of'\n    y += '.'\n    return y\n",
        "    if x:\n        y = f'{x} on'\n        y += '.'\n    return y\n",
    )
    monkeypatch.syspath_prepend(tmp_path)
    prints = []
    for i, body in enumerate(bodies):
        (tmp_path / f"body_{i}.py").write_text("def f(x):\n" + body)
        prints.append(fingerprint(import_module(f"body_{i}").f))
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3
    assert prints[0] == "31e183b5c62ae497"  # in every version of Python


def test_a_peer_that_lacks_a_library(toy, monkeypatch, tmp_path):
    (tmp_path / "toy" / "heavy.py").write_text("import no_such_library")
    known(monkeypatch, *REPLACEMENTS, half={"module": "toy.heavy"})
    refused(ModuleNotFoundError, "toy.heavy cannot be imported: No module named 'no_such_library'")


def test_an_error_between_two_functions_takes_the_first_back(toy, monkeypatch):
    class Closed:
        lines = 0

        def write(self, text):
            self.lines += "\n" in text
            if self.lines > 1:
                raise BrokenPipeError("nobody reads")

    monkeypatch.setattr(sys, "stdout", Closed())
    refused(BrokenPipeError, "nobody reads", lambda: rf.patch("toy", verbose=True))
    rf.patch("toy").undo()


def test_a_registry_that_is_gone(toy, monkeypatch):
    known(monkeypatch, *REPLACEMENTS, double={"registries": ("GONE",)})
    refused(RuntimeError, "toy 1.4.2 has no toy.maths.GONE: nothing was replaced")


def test_of_two_threads_one_is_refused(toy, monkeypatch):
    other, found = [], []

    def second():
        try:
            found.append(rf.patch("toy"))
        except RuntimeError as error:
            found.append(str(error))

    def slow(original):
        if not other:
            other.append(Thread(target=second))
            other[0].start()
            other[0].join(timeout=0.2)  # time enough for it to get past a check that does not wait
        return tenfold(original)

    known(monkeypatch, *REPLACEMENTS, double={"replace": slow})
    with rf.patch("toy"):
        other[0].join()
        assert found == ["patch('toy') is in force already: undo it first"]
    assert toy.run(3) == (6, 6, 1.5)


def test_functions_of_other_versions_are_not_looked_for(toy, monkeypatch):
    known(monkeypatch, *REPLACEMENTS, half={"name": "third", "since": "1.5"}, forward={"until": "1.4"})
    with rf.patch("toy") as patch:
        assert patch.replaced == ("toy.maths.double",)


def test_twice(toy):
    with rf.patch("toy"):
        refused(RuntimeError, "patch('toy') is in force already: undo it first")
        assert toy.run(3)[0] == 60


def test_undo_twice_or_out_of_order(toy):
    first = rf.patch("toy")
    second = rf.patch("other")
    refused(RuntimeError, "undo patch('other') before patch('toy'), which is the older one", first.undo)
    second.undo()
    refused(RuntimeError, "patch('other') was undone before", second.undo)
    first.undo()
    assert toy.run(3)[0] == 6


def test_somebody_else_has_replaced_a_function_since(toy):
    patch = rf.patch("toy")
    maths = sys.modules["toy.maths"]
    ours, maths.half = maths.half, abs
    refused(
        RuntimeError,
        "toy.maths.half was replaced by somebody else since: undo that before this patch",
        patch.undo,
    )
    maths.half = ours
    patch.undo()


@pytest.mark.parametrize(
    ("version", "numbers"),
    [
        ("1.10.0", (1, 10, 0)),
        ("2", (2, 0, 0)),
        ("0.9.1.post2", (0, 9, 1)),
        ("1.11rc1", (1, 11, 0)),
        ("3.1+cu13", (3, 1, 0)),
        ("1.0.dev0", (1, 0, 0)),
    ],
)
def test_versions_are_ordered_by_their_numbers(version, numbers):
    assert release(version) == numbers


def test_parameters_are_written_without_types():
    def f(a: int, *, b: float = 1.0, **rest: str) -> None: ...

    assert parameters(f) == "a, *, b=1.0, **rest"


def test_import_brings_no_integration_along():
    brought = "('rlhf_fast.int', 'trl', 'verl', 'openrlhf', 'transformers')"
    code = f"import sys, rlhf_fast; print([m for m in sys.modules if m.startswith({brought})])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
