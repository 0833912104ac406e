"""Models and tokenizers from and to folders, or from the Hub: what is wrong with a path is said in one sentence.

Pickled weights are refused: unpickling runs whatever code the file holds.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rlhf_fast.sharded import is_sharded, kind, put, whole

SCALAR = "ForSequenceClassification"
TRAINED = "trained.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")


def is_local(source: str | Path) -> bool:
    """Whether ``source`` means a folder rather than a Hub id: it exists, or looks like a path, or its parent exists."""
    path, name = Path(source), str(source)
    looks = name.startswith((".", "/", "~")) or name.endswith("/") or len(path.parts) > 2 or isinstance(source, Path)
    return looks or path.exists() or (len(path.parts) == 2 and path.parent.is_dir())


def hub_answers() -> bool:
    """Whether the Hub can be reached. Its own readers try for most of a minute, and only then look into their cache."""
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception:  # of whichever HTTP library this release of huggingface_hub uses
        return False
    return True


@contextmanager
def silent() -> Iterator[None]:
    """Neither progress bars nor warnings of transformers: a report of theirs would bury our sentence or our own bar."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode; afterwards every module is in its own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def read(reader: Any, source: str | Path, **options: Any) -> Any:
    """``reader.from_pretrained(source)``, which stays off the network for a local ``source``, or where there is none.

    Raises ``ValueError`` with the first line of what transformers says, after the name of ``source``.
    """
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    from safetensors import SafetensorError

    local = is_local(source)
    here = local or not hub_answers()
    try:
        with silent() if here else nullcontext():  # a download shows its progress
            return reader.from_pretrained(str(Path(source).expanduser()), local_files_only=here, **options)
    except (OSError, ValueError, KeyError, HfHubHTTPError, HFValidationError, SafetensorError) as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    raise ValueError(f"{source} {'cannot be loaded' if local else 'is no folder here'}: {reason}")


def is_scalar(config: Any) -> bool:
    """Whether the model of ``config`` was saved with a scalar head rather than as a language model."""
    return any(name.endswith(SCALAR) for name in config.architectures or [])


def read_config(source: str | Path) -> Any:
    """The configuration of the model at ``source``. Raises ``ValueError`` in one sentence if there is none."""
    from transformers import AutoConfig

    if not isinstance(source, (str, Path)):
        raise TypeError(f"a model must be a path, a Hub id or a module, got {type(source).__name__}")
    if is_local(source):
        check_folder(source)
    return read(AutoConfig, source)


def read_model(model_class: Any, source: str | Path, *, dtype: torch.dtype | str) -> Any:
    """The model of ``model_class`` at ``source``, from safetensors.

    Raises ``ValueError`` if weights are missing, which transformers fills with random numbers, or of another shape.
    """
    strict = {"use_safetensors": True, "ignore_mismatched_sizes": True, "output_loading_info": True}
    model, report = read(model_class, source, dtype=dtype, **strict)
    for name, stored, expected in sorted(report["mismatched_keys"]):
        raise ValueError(f"{source}: {name} is {list(stored)}, and {list(expected)} by config.json")
    missing = sorted(report["missing_keys"])
    if missing:
        raise ValueError(
            f"{source} lacks {len(missing)} weights of a {type(model).__name__}, the first is {missing[0]}"
        )
    return model


def read_tokenizer(source: str | Path) -> Any:
    """The tokenizer at ``source``. Raises ``ValueError`` in one sentence if there is none."""
    from transformers import AutoTokenizer

    folder = Path(source).expanduser()
    if is_local(source):
        _check_is_folder(source, "tokenizer")
        if not any(file for pattern in ("tokenizer*", "vocab*", "*.model") for file in folder.glob(pattern)):
            raise ValueError(f"{source} holds no tokenizer: tokenizer.json is missing")
    return read(AutoTokenizer, source)


def check_folder(source: str | Path) -> None:
    """Raise ``ValueError`` unless the folder ``source`` holds a whole model with its weights in safetensors."""
    folder = Path(source).expanduser()
    _check_is_folder(source, "model")
    if not (folder / "config.json").exists():
        if (folder / "adapter_config.json").exists():
            raise ValueError(f"{source} holds an adapter, not a whole model: merge it into its model and save that")
        raise ValueError(f"{source} holds no model: config.json is missing")
    if any(folder.glob("*.safetensors")):
        return
    pickles = sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
    if pickles:
        raise ValueError(
            f"{source} holds its weights only as pickle ({pickles[0]}), which can run code when it is read: "
            "convert them to safetensors first"
        )
    raise ValueError(f"{source} holds no model: there is no .safetensors file")


def _check_is_folder(source: str | Path, what: str) -> None:
    folder = Path(source).expanduser()
    if not folder.exists():
        raise ValueError(f"{source} holds no {what}: there is no such folder")
    if not folder.is_dir():
        raise ValueError(f"{source} holds no {what}: it is a file, not a folder")


def save(model: Any, tokenizer: Any, folder: str | Path) -> None:
    """Write ``model`` (safetensors) and ``tokenizer`` to ``folder`` in the format of ``save_pretrained``.

    The adapters of a PEFT model are merged into its weights, and also written as they are: trained.safetensors. A
    sharded model must be ``collected``.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    model = whole(model)
    config = unwrap(model).config
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = tokenizer.pad_token_id
    try:
        with silent():
            merged(model).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        if hasattr(model, "merge_and_unload"):
            save_file({n: p.detach() for n, p in _trained(model).items()}, Path(folder) / TRAINED)
    except SafetensorError as error:  # a full disk, say
        raise OSError(f"{folder}: the weights cannot be written: {error}") from error


def merged(model: Any) -> Any:
    """The transformers model inside of ``model``; with the adapters of a PEFT model merged into a copy of it."""
    return copy.deepcopy(model).merge_and_unload() if hasattr(model, "merge_and_unload") else unwrap(model)


def restore(model: Any, folder: str | Path) -> None:
    """Put the weights that ``save`` wrote to ``folder`` into ``model``."""
    from safetensors.torch import load_file

    if hasattr(model, "merge_and_unload"):
        stored = load_file(Path(folder) / TRAINED)
        put(model, {name: stored[name] for name in _trained(model)})
        return
    inner = unwrap(model)
    stored = read_model(kind(inner), folder, dtype="auto").state_dict()
    if is_sharded(inner):
        put(inner, stored)
    else:
        inner.load_state_dict(stored)


def _trained(model: Any) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def unwrap(model: Any) -> Any:
    """The transformers model inside of torch.compile's, DistributedDataParallel's or PEFT's wrapper."""
    while hasattr(model, "_orig_mod") or isinstance(model, nn.parallel.DistributedDataParallel):
        model = model._orig_mod if hasattr(model, "_orig_mod") else model.module
    return model.get_base_model() if hasattr(model, "get_base_model") else model
