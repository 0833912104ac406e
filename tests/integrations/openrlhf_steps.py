"""What test_openrlhf_trainer.py compares: OpenRLHF's own commands, with its functions and with ours.

Started with a folder. Runs that need a process of their own get it from this one, when all is imported.
"""

import gc
import inspect
import json
import multiprocessing
import os
import runpy
import socket
import sys
import time
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

os.environ |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import deepspeed  # noqa: E402
import openrlhf_stand_ins as stand_ins  # noqa: E402
import torch  # noqa: E402
from peers import import_with_stubs, stand_in  # noqa: E402
from tiny import WORDS, tiny_llama, tiny_tokenizer  # noqa: E402
from transformers import set_seed  # noqa: E402

import rlhf_fast as rf  # noqa: E402

stand_in(stand_ins.modules())
MODULES = [
    "openrlhf.trainer.ppo_trainer", "openrlhf.trainer.ray.ppo_actor", "openrlhf.trainer.ray.ppo_critic",
    "openrlhf.trainer.sft_trainer", "openrlhf.trainer.dpo_trainer",
]  # fmt: skip
import_with_stubs(MODULES, "flash_attn", "pylatexenc", "aiohttp")
stand_ins.without_cuda()

import openrlhf.models.loss as loss  # noqa: E402
import openrlhf.models.utils as utils  # noqa: E402
from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker  # noqa: E402

PLACES = {
    "log_probs_from_logits": (utils, "log_probs_from_logits"),
    "compute_entropy": (utils, "compute_entropy"),
    "get_advantages_and_returns": (RemoteExperienceMaker, "get_advantages_and_returns"),
    "PolicyLoss": (loss.PolicyLoss, "forward"),
    "ValueLoss": (loss.ValueLoss, "forward"),
}
REWARD = """
def reward_func(queries, prompts, labels):
    return {"rewards": sum(map(len, queries)) % 7 / 3}
"""
SHARED = """
--ds.attn_implementation eager --logger.wandb.key none --train.batch_size 4 --train.micro_batch_size 2
--train.max_epochs 3 --ckpt.path checkpoints
"""
ONLINE = f"""
{SHARED} --actor.model_name_or_path actor --data.prompt_dataset data.jsonl --data.input_key prompt --data.max_len 64
--actor.num_gpus_per_node 1 --ref.num_gpus_per_node 1 --reward.num_gpus_per_node 1 --critic.num_gpus_per_node 1
--vllm.num_engines 1 --rollout.batch_size 4 --rollout.micro_batch_size 2 --rollout.n_samples_per_prompt 2
--rollout.max_new_tokens 8 --rollout.temperature 0.8 --actor.adam.lr 1e-3 --critic.adam.lr 1e-3
"""
PPO = f"""
{ONLINE} --reward.model_name_or_path reward --critic.save_value_network --actor.entropy_coef 0.01 --actor.dual_clip 1.01
--algo.kl.init_coef 0.05 --algo.advantage.lambd 0.95 --algo.advantage.gamma 0.99 --critic.value_clip 0.1
"""
GRPO = f"""
{ONLINE} --reward.remote_url reward.py --algo.advantage.estimator group_norm --algo.kl.use_loss --algo.kl.estimator k3
--actor.loss_agg_mode seq-mean-token-mean --actor.eps_clip_low_high 0.1 0.15 --train.num_episodes 2
"""
OFFLINE = f"""
{SHARED} --model.model_name_or_path actor --data.dataset data.jsonl --data.max_len 64 --adam.lr 1e-3 --lr_warmup_ratio 0
"""
COMMANDS = {  # the name of each run, and what is written behind `python -m openrlhf.cli.`
    "ppo": f"train_ppo_ray {PPO} --train.num_episodes 2",
    "ppo_bf16": f"train_ppo_ray {PPO} --actor.adam.lr 0 --critic.adam.lr 0 --train.max_epochs 1",
    "grpo": f"train_ppo_ray {GRPO}",
    "sft": f"train_sft {OFFLINE} --data.input_key prompt --data.output_key chosen",
    "dpo": f"train_dpo {OFFLINE} --data.prompt_key prompt --model.nll_loss_coef 0.2",
}
# One after the other in a process. Ray's controller has no process group: a run that needs it comes first.
PROCESSES = (("ppo", "sft", "dpo"), ("grpo",), ("ppo_bf16",))


def prepare() -> None:
    """The models, the prompts and pairs, and the reward, in the working directory."""
    tokenizer = tiny_tokenizer()
    for name, seed in (("actor", 1), ("reward", 2)):
        tiny_llama(tokenizer, seed=seed).bfloat16().save_pretrained(name)  # as OpenRLHF loads it
        tokenizer.save_pretrained(name)
    rows = [{"prompt": f"the {w} was", "chosen": f" {w}", "rejected": f" not {w} and"} for w in WORDS[:4]]
    Path("data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("reward.py").write_text(REWARD)
    for whose in ("theirs", "ours"):
        Path(whose).mkdir()


def initialize(**options: Any) -> tuple:
    """DeepSpeed's own function, with its option for PyTorch's AdamW: its own would be compiled, for half a minute.

    And in float32, which OpenRLHF's commands have no option for: what differs by 1e-7 may round to another bfloat16,
    and the runs part there. Where no step is taken (``adam.lr 0``) they cannot, and the type is OpenRLHF's.
    """
    config = options["config"]
    if "optimizer" in config:
        config["optimizer"]["params"]["torch_adam"] = True
    if "ppo_bf16" not in sys.argv[-1]:
        config["bf16"]["enabled"] = False
        options["model"].float()
    return INITIALIZE(**options)


def codes(whose: str) -> dict[CodeType, str]:
    """What the functions that are replaced run now."""
    return {inspect.unwrap(getattr(*place)).__code__: f"{whose} {name}" for name, place in PLACES.items()}


def run(whose: str, names: tuple[str, ...]) -> None:
    """Run commands in a row, and write what each says and logs and how often each function was called."""
    with open(f"{whose}/{names[0]}.txt", "w") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    for name in names:
        stand_ins.LOGGED.clear()
        command, *options = COMMANDS[name].split()
        sys.argv = [command, *options, "--ckpt.output_dir", f"{whose}/{name}"]
        with rf.patch("openrlhf") if whose == "ours" else nullcontext():
            calls = counted(command, THEIRS | codes(whose))
        Path(whose, f"{name}.json").write_text(json.dumps({"logged": stand_ins.LOGGED, "calls": calls}))


def counted(command: str, names: dict[CodeType, str]) -> Counter[str]:
    """Run a command of OpenRLHF, and count the calls of what has a name."""
    calls: Counter[str] = Counter()

    def count(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code in names:
            calls[names[frame.f_code]] += 1

    set_seed(0)  # the order of the prompts, which Ray's controller draws before it has seeded anything
    sys.setprofile(count)
    runpy.run_module(f"openrlhf.cli.{command}", run_name="__main__")
    sys.setprofile(None)
    return calls


if __name__ == "__main__":
    os.chdir(sys.argv[1])
    torch.set_num_threads(1)
    INITIALIZE, deepspeed.initialize = deepspeed.initialize, initialize
    THEIRS = codes("theirs")
    torch.compiler.set_stance("force_eager")  # OpenRLHF compiles its entropy: here its body runs as it is written
    # On the CPU DeepSpeed would compile an exchange of its own; gloo does without.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    prepare()
    gc.freeze()  # OpenRLHF collects garbage after each model: not of all that is imported here
    fork = multiprocessing.get_context("fork")
    runs = {(w, names): fork.Process(target=run, args=(w, names)) for names in PROCESSES for w in ("theirs", "ours")}
    for process in runs.values():
        process.start()
    deadline = time.monotonic() + 240
    for process in runs.values():
        process.join(max(0, deadline - time.monotonic()))
    for (whose, names), process in runs.items():
        if process.exitcode != 0:
            process.kill()
            print(whose, names, process.exitcode, Path(whose, f"{names[0]}.txt").read_text()[-4000:])
    sys.exit(any(process.exitcode != 0 for process in runs.values()))
