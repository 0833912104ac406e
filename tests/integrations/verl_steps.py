"""What test_verl_trainer.py compares: a few steps of verl's own trainers, each with and without ``rf.patch("verl")``.

Started with a folder, in which it leaves ``results.pt``. verl's configs, trainers, worker groups, workers, FSDP engine,
agent loops, rewards and logger are its own, on the CPU. Stood in for are what it needs and this machine lacks: Ray
(verl_ray.py), TransferQueue (verl_queue.py), vLLM and the accelerator (verl_rollout.py), and below flash-attn's
attention and pinned memory.
"""

import json
import os
import random
import sys
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
torch.set_num_threads(1)

import peers  # noqa: E402
import verl_queue  # noqa: E402
import verl_ray  # noqa: E402
from tiny import tiny_llama, tiny_tokenizer  # noqa: E402
from transformers import PreTrainedModel  # noqa: E402
from transformers.models.qwen2_vl import modeling_qwen2_vl  # noqa: E402

NAMES = random.Random()


def stand_in() -> None:
    """For what verl asks of the machine. Before verl is imported."""
    peers.stand_in(verl_ray.modules() | verl_queue.modules())
    sys.meta_path.append(peers.Stubs("aiohttp", "uvicorn", "fastapi"))  # servers; nobody starts one
    sys.modules["trl"] = None  # verl 0.9.1 asks an installed TRL for what newer ones lack
    modeling_qwen2_vl.Qwen2VLCausalLMOutputWithPast = dict  # nor have newer transformers this; it is for images
    # The newer trainer gives rows random names, and verl_queue.py lists them in their order.
    uuid.uuid4 = lambda: uuid.UUID(int=NAMES.getrandbits(128), version=4)
    check = PreTrainedModel._check_and_adjust_attn_implementation

    def without_flash(self: Any, wanted: str | None, *args: Any, **kwargs: Any) -> str:
        return check(self, "sdpa" if wanted == "flash_attention_2" else wanted, *args, **kwargs)

    PreTrainedModel._check_and_adjust_attn_implementation = without_flash
    torch.Tensor.pin_memory = lambda self, *_: self
    # Engines are registered for accelerators only; VERL_ENGINE_DEVICE is verl's own way to take another's.
    os.environ |= {"VERL_ENGINE_DEVICE": "cuda", "VERL_USE_EXTERNAL_MODULES": "verl_patched"}
    os.environ |= {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


stand_in()

import verl.plugin.platform  # noqa: E402
import verl_patched  # noqa: E402
import verl_rollout  # noqa: E402

verl.plugin.platform.set_platform(verl_rollout.Cpu())
verl_rollout.register()

import verl.trainer.main_ppo  # noqa: E402
import verl.trainer.main_ppo_v0  # noqa: E402
import verl.trainer.sft_trainer  # noqa: E402
from datasets import Dataset  # noqa: E402
from hydra import compose, initialize_config_module  # noqa: E402

import rlhf_fast as rf  # noqa: E402

PROMPTS = ["the movie", "a great plot", "I like", "not very fun", "this dull movie", "the plot is", "I hate", "awful"]
ACTOR, REF, ROLLOUT = (f"actor_rollout_ref.{name}" for name in ("actor", "ref", "rollout"))
FLOAT32 = "{param_dtype: fp32, reduce_dtype: fp32}"
ADAM = "{eps: 0.01}"  # with the usual 1e-8 it makes whole steps of the rounding of gradients that are 0
TRAINER = {
    "trainer.total_epochs": 3,
    "trainer.total_training_steps": 3,
    "trainer.n_gpus_per_node": 1,
    "trainer.device": "cpu",
    "trainer.logger": "[file]",
    "trainer.resume_mode": "disable",
    "trainer.default_local_dir": "checkpoints",
}
PPO = TRAINER | {
    "data.train_batch_size": 8,
    "trainer.val_before_train": False,
    "data.train_files": "prompts.parquet",
    "data.val_files": "prompts.parquet",
    "data.max_prompt_length": 32,
    "data.max_response_length": 8,
    "data.dataloader_num_workers": 0,
    "data.filter_overlong_prompts": False,
    "actor_rollout_ref.model.path": "model",
    "reward.num_workers": 1,
    "reward.custom_reward_function.path": verl_rollout.__file__,
    f"{ROLLOUT}.name": verl_rollout.NAME,
    f"{ROLLOUT}.tensor_model_parallel_size": 1,
    f"{ROLLOUT}.agent.num_workers": 1,
    f"{ROLLOUT}.log_prob_micro_batch_size_per_gpu": 4,
    f"{REF}.log_prob_micro_batch_size_per_gpu": 4,
    f"{REF}.fsdp_config.use_torch_compile": False,
    f"+{REF}.fsdp_config.mixed_precision": FLOAT32,
    f"{ACTOR}.strategy": "fsdp2",
    f"{ACTOR}.ppo_epochs": 2,
    f"{ACTOR}.ppo_mini_batch_size": 4,
    f"{ACTOR}.ppo_micro_batch_size_per_gpu": 2,
    f"{ACTOR}.entropy_coeff": 0.01,
    f"{ACTOR}.optim.lr": 1e-2,
    f"{ACTOR}.optim.override_optimizer_config": ADAM,
    f"{ACTOR}.fsdp_config.use_torch_compile": False,
    f"+{ACTOR}.fsdp_config.mixed_precision": FLOAT32,
    "critic.strategy": "fsdp2",
    "critic.model.path": "model",
    "critic.ppo_epochs": 2,
    "critic.ppo_mini_batch_size": 4,
    "critic.ppo_micro_batch_size_per_gpu": 2,
    "critic.optim.lr": 5e-3,
    "critic.optim.override_optimizer_config": ADAM,
    "critic.fsdp.use_torch_compile": False,
    "+critic.fsdp.mixed_precision": FLOAT32,
}
#: RayPPOTrainer on padded rows, and the newer PPOTrainer on packed ones.
LEGACY = PPO | {
    "trainer.use_v1": False,
    "actor_rollout_ref.model.use_remove_padding": False,
    "critic.model.use_remove_padding": False,
    "critic.cliprange_value": 0.1,
    "algorithm.lam": 0.95,
    f"{ACTOR}.use_kl_loss": True,
    f"{ACTOR}.kl_loss_coef": 0.1,
}
V1 = PPO | {
    "trainer.use_v1": True,
    "actor_rollout_ref.model.use_remove_padding": True,
    "critic.model.use_remove_padding": True,
    "critic.loss_agg_mode": "seq-mean-token-sum",
    "algorithm.use_kl_in_reward": True,
    "algorithm.gamma": 0.99,
    "algorithm.lam": 0.9,
    f"{ROLLOUT}.temperature": 0.7,
    f"{ACTOR}.loss_agg_mode": "seq-mean-token-mean",
    f"{ACTOR}.clip_ratio_low": 0.05,
    f"{ACTOR}.clip_ratio_high": 0.1,
    f"{ACTOR}.clip_ratio_c": 1.2,
    f"{ACTOR}.entropy_from_logits_with_chunking": True,
}
SFT = TRAINER | {
    "data.train_batch_size": 4,
    "data.train_files": "messages.parquet",
    "data.micro_batch_size_per_gpu": 2,
    "data.use_dynamic_bsz": False,
    "data.num_workers": 0,
    "model.path": "model",
    "optim.lr": 1e-2,
    "optim.override_optimizer_config": ADAM,
    "engine.strategy": "fsdp2",
    "engine.use_torch_compile": False,
    "+engine.mixed_precision": FLOAT32,
}


def prepare() -> None:
    """A model and data, in this folder."""
    tokenizer = tiny_tokenizer(chat=True)
    tokenizer.save_pretrained("model")
    tiny_llama(tokenizer, num_hidden_layers=1).save_pretrained("model")
    asked = [[{"role": "user", "content": text}] for text in PROMPTS]
    rest = {"data_source": "here", "reward_model": {"ground_truth": "aeiou"}}
    rows = [{"prompt": prompt, "extra_info": {"index": i}} | rest for i, prompt in enumerate(asked)]
    Dataset.from_list(rows).to_parquet("prompts.parquet")
    rows = [{"messages": [*prompt, {"role": "assistant", "content": "it was good"}]} for prompt in asked]
    Dataset.from_list(rows).to_parquet("messages.parquet")


def config(name: str, options: dict[str, Any]) -> Any:
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose(name, overrides=[f"{key}={value}" for key, value in options.items()])


def ppo(options: dict[str, Any]) -> dict[str, torch.nn.Module]:
    verl_rollout.MODELS.clear()
    verl_ray.ACTORS.clear()
    new = options["trainer.use_v1"]
    runner = verl.trainer.main_ppo.TaskRunnerV1 if new else verl.trainer.main_ppo_v0.TaskRunner
    runner.remote().run.remote(config("ppo_trainer", options))
    roles = next(a._instance.worker_dict for a in verl_ray.ACTORS if hasattr(a._instance, "worker_dict"))
    return {"actor": roles["actor_rollout_ref"].actor.engine.module, "critic": roles["critic"].engine.module}


def sft(options: dict[str, Any]) -> dict[str, torch.nn.Module]:
    trainer = verl.trainer.sft_trainer.SFTTrainer(config("sft_trainer_engine", options))
    trainer.fit()
    return {"model": trainer.engine.module}


RUNS = {"legacy": (ppo, LEGACY), "v1": (ppo, V1), "sft": (sft, SFT)}


def steps(name: str, log: str) -> dict[str, Any]:
    """What one trainer logs, its parameters at the end, and how often each of ours was called."""
    torch.manual_seed(0)
    random.seed(0)
    NAMES.seed(0)
    np.random.seed(0)
    verl_patched.CALLS.clear()
    os.environ["VERL_FILE_LOGGER_PATH"] = log
    train, options = RUNS[name]
    parameters = {
        f"{role}.{key}": value.full_tensor().clone()
        for role, model in train(options).items()
        for key, value in model.state_dict().items()
    }
    metrics = [json.loads(line)["data"] for line in Path(log).read_text().splitlines()]
    return {"metrics": metrics, "parameters": parameters, "calls": dict(verl_patched.CALLS)}


def main(folder: str) -> None:
    os.chdir(folder)
    prepare()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    results, patch = {}, verl_patched.PATCH  # in force since verl was imported
    for name in RUNS:
        with patch:
            ours = steps(name, f"{name}.ours.jsonl")
        results[name] = {"verl": steps(name, f"{name}.verl.jsonl"), "ours": ours}
        patch = rf.patch("verl")
    patch.undo()
    torch.save(results, "results.pt")


if __name__ == "__main__":
    main(sys.argv[1])
