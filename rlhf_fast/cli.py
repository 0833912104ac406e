"""The command line: ``rlhf-fast COMMAND --flag value``; commands.py lists the commands.

Some trainers also run in several processes: ``accelerate launch -m rlhf_fast.cli ppo ...``.
"""

import dataclasses
import importlib
import importlib.util
import json
import os
import re
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from rlhf_fast.commands import COMMANDS, EXTRAS, SOURCES, SWEEP, TRAINERS
from rlhf_fast.flags import Parser, settings, suggestion
from rlhf_fast.trainers.options import option, validate
from rlhf_fast.trainers.run import check_folder


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """Every number of ``generate``."""

    max_new_tokens: int = option(128, "longest response in tokens", low=1)
    temperature: float = option(1.0, "sampling temperature; 0 takes the likeliest token", low=0.0)
    top_k: int = option(0, "sample among the k likeliest tokens; 0 for all", low=0)
    top_p: float = option(1.0, "sample in the smallest set of this probability", above=0.0, high=1.0)
    min_p: float = option(0.0, "leave out tokens less likely than this share of the likeliest", low=0.0, high=1.0)
    batch_size: int = option(32, "prompts at a time", low=1)
    seed: int | None = option(None, "of the responses; a new one each time if absent", low=0, high=2**63 - 1)

    def __post_init__(self) -> None:
        validate(self)


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 1 from ``bench``, 2 for bad input, 130 after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    debug = "--debug" in argv
    argv = [re.sub(r"^--[\w-]+", lambda flag: f"--{flag[0][2:].replace('-', '_')}", a) for a in argv if a != "--debug"]
    name = next(iter(argv), "--help")
    try:
        if name in ("-h", "--help"):
            print(overview())
            return 0
        if name == "--version":
            from rlhf_fast import __version__

            print(f"rlhf_fast {__version__}")
            return 0
        if name not in COMMANDS:
            raise ValueError(f"unknown command {name!r}{suggestion(name, COMMANDS)}; rlhf-fast --help lists them")
        status = run_command(name, argv[1:])
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("rlhf-fast: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # rlhf-fast doctor | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still to be flushed
        return 141
    except (ValueError, TypeError, IndexError, OSError, ImportError, FloatingPointError) as error:
        if debug:
            traceback.print_exc()
        print(f"rlhf-fast: {sentence(error)}", file=sys.stderr)
        return 2
    except Exception as error:
        if debug:
            traceback.print_exc()
        print(f"rlhf-fast: {type(error).__name__}: {sentence(error)} (--debug shows where)", file=sys.stderr)
        return 2
    return status


def overview() -> str:
    """What ``rlhf-fast --help`` prints."""
    lines = ["usage: rlhf-fast COMMAND [--config file.yaml] [--flag value ...] [--debug]", ""]
    lines += [f"  {name:10} {what}" for name, what in COMMANDS.items()]
    return "\n".join([*lines, "", "rlhf-fast COMMAND --help lists the flags of a command."])


def sentence(error: BaseException) -> str:
    """``error`` in one line."""
    if isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] in EXTRAS:
        return f"{error.name} is not installed: pip install 'rlhf-fast[train]'"
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def run_command(name: str, argv: list[str]) -> int:
    """Parse the flags of command ``name`` and run it; 0, or what ``bench`` returns."""
    if name == "doctor":
        Parser(prog="rlhf-fast doctor", description=COMMANDS[name], allow_abbrev=False).parse_args(argv)
        print(doctor())
        return 0
    accepted = SOURCES[name] | ({"sweep": SWEEP} if name in TRAINERS else {})
    sources, config = settings(name, COMMANDS[name], accepted, config_class(name), argv)
    if name == "bench":  # which needs no transformers
        return int(importlib.import_module("rlhf_fast.bench").bench(**sources, config=config))
    quieten()
    alone = "a sweep" if sources.get("sweep") else None if name in TRAINERS else name
    if alone and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(f"{alone} runs in one process: start it without accelerate launch")
    if name == "generate":
        generate(sources, config)
    elif name == "demo":
        importlib.import_module("rlhf_fast.demo").run_demo(config)
    elif name == "evaluate":
        sources["reward"] = None if sources["reward"] is None else reward_functions(sources["reward"])
        importlib.import_module("rlhf_fast.evaluation").evaluate(**sources, config=config)
    else:
        train(name, sources, config)
    return 0


def train(name: str, sources: dict[str, Any], config: Any) -> None:
    """One run of a trainer, or the sweep of many."""
    trainer = getattr(importlib.import_module(f"rlhf_fast.trainers.{name}"), TRAINERS[name])
    resume, plan, folder = (sources.pop(source) for source in ("resume", "sweep", "output_dir"))
    if plan is None:
        check_folder(folder, run=resume)  # before the models are loaded
    if sources.get("reward") is not None:
        sources["reward"] = reward_functions(sources["reward"])

    def make(config: Any, folder: Any) -> Any:
        model = sources["model"]
        rest = {source: value for source, value in sources.items() if source != "model"}
        return trainer(model, **rest, output_dir=folder, config=config)

    if plan is None:
        make(config, folder).train(resume=resume)
    else:
        importlib.import_module("rlhf_fast.sweep").sweep(make, config, plan, folder, resume=resume)


def quieten() -> None:
    """Leave the terminal to our own progress bar and sentences."""
    from transformers.utils import logging

    logging.set_verbosity_error()


def config_class(name: str) -> type:
    """The config dataclass of command ``name``; only its own module is imported."""
    if name == "generate":
        return GenerateConfig
    if name == "demo":
        return importlib.import_module("rlhf_fast.demo").DemoConfig  # type: ignore[no-any-return]
    if name == "evaluate":
        return importlib.import_module("rlhf_fast.evaluation.config").EvaluateConfig  # type: ignore[no-any-return]
    if name == "bench":
        return importlib.import_module("rlhf_fast.bench").BenchConfig  # type: ignore[no-any-return]
    module = importlib.import_module(f"rlhf_fast.trainers.{name}")
    return getattr(module, TRAINERS[name].replace("Trainer", "Config"))  # type: ignore[no-any-return]


def reward_functions(text: str) -> Any:
    """What ``text`` names: a reward, or a list of those between its commas, the members of an ensemble."""
    if Path(text).exists() or "," not in text:
        return reward_function(text)
    return [reward_function(part.strip()) for part in text.split(",")]


def reward_function(text: str) -> Any:
    """The function that ``package.module:function`` or ``file.py:function`` names, or ``text`` itself: a model."""
    match = re.fullmatch(r"(.+\.py|[A-Za-z_][\w.]*):([A-Za-z_]\w*)", text)
    if match is None and text.endswith(".py"):
        raise ValueError(f"{text}: name its function as well, {text}:function")
    if match is None or Path(text).exists():
        return text
    place, name = match.groups()
    if place.endswith(".py") and not Path(place).is_file():
        raise ValueError(f"{text}: there is no file {place}")
    try:
        module = file_module(Path(place)) if place.endswith(".py") else installed_module(place)
    except Exception as error:
        raise ValueError(f"{text}: importing {place} raised {type(error).__name__}: {error}") from error
    if not callable(getattr(module, name, None)):
        raise ValueError(f"{text}: {place} has no function {name}")
    return getattr(module, name)


def file_module(path: Path) -> ModuleType:
    """The module in the file ``path``, which finds the modules beside it as a script does."""
    spec = importlib.util.spec_from_file_location(str(path), path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up there
    sys.path.insert(0, str(path.resolve().parent))
    spec.loader.exec_module(module)
    return module


def installed_module(name: str) -> ModuleType:
    """The module ``name``, of the current folder or installed."""
    sys.path.insert(0, str(Path.cwd()))
    return importlib.import_module(name)


def generate(sources: dict[str, Any], config: GenerateConfig) -> None:
    """Write responses to the prompt of the command line and those of the file."""
    from rlhf_fast import data
    from rlhf_fast.generate import generate as write

    output = None if sources["output"] is None else Path(sources["output"])
    records = [] if sources["prompt"] is None else [data.Record({"prompt": sources["prompt"]}, "--prompt")]
    if sources["prompts"] is not None:
        records += data.read_records(sources["prompts"])
    if not records:
        raise ValueError("generate needs --prompt or --prompts")
    if output is not None and output.exists():
        raise ValueError(f"{output} exists already: choose another --output")
    if output is not None and not output.parent.is_dir():
        raise ValueError(f"{output}: there is no folder {output.parent}")
    texts = write(sources["model"], records, tokenizer=sources["tokenizer"], **dataclasses.asdict(config))
    if output is None:
        print("\n".join(texts))
        return
    said = [{"prompt": record["prompt"], "response": text} for record, text in zip(records, texts, strict=True)]
    output.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in said), encoding="utf-8")


def doctor() -> str:
    """Versions; every kernel of every op and whether it serves, waits or is absent; why they stand in that order."""
    from rlhf_fast import dispatch, ops  # noqa: F401 (importing the ops declares them)
    from rlhf_fast.trainers.run import versions

    cuda = dispatch.extension("_cuda")
    built = cuda if isinstance(cuda, str) else f"built with CUDA {cuda.toolkit}, sees {cuda.device_count()} device(s)"
    facts = [f"{package} {found}" for package, found in versions().items()]
    facts += [f"CUDA driver: {dispatch.driver()}", f"CUDA extension: {built}", ""]
    rows = [("op", "device", "kernel", "state")]
    for op in dispatch.CHOICES:
        for device in ("CPU", "CUDA"):
            names = dispatch.candidates(op, device)
            rows += [(op, device, name, kernel_state(op, device, name)) for name in names]
            if dispatch.serving(op, device) == "reference":
                rows.append((op, device, "reference", "serves: plain PyTorch"))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    table = ["  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[3]]) for row in rows]
    guesses = {op: choice for op, choice in dispatch.CHOICES.items() if not choice.measured}
    why = ["", "unmeasured: no GPU has timed the two kernels yet; what speaks for the order:"] if guesses else []
    why += [
        f"{op.ljust(widths[0])}  {' before '.join(choice.order)}: {choice.argument}" for op, choice in guesses.items()
    ]
    return "\n".join([*facts, *table, *why])


def kernel_state(op: str, device: str, name: str) -> str:
    """Whether the kernel ``name`` of ``op`` serves ``device``, waits behind another or is absent."""
    from rlhf_fast import dispatch

    if name in dispatch.ABSENT[op]:
        return f"absent: {dispatch.ABSENT[op][name]}"
    first = dispatch.serving(op, device)
    state = "serves" if first == name else f"ready, {first} comes first"
    if device == "CPU":
        return state
    measured = dispatch.CHOICES[op].measured
    return f"{state} (measured on {measured})" if measured else f"{state} (unmeasured)"


if __name__ == "__main__":
    sys.exit(main())
