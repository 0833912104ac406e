"""The commands of the command line: what each does, what it works on and which trainer it starts."""

from rlhf_fast.flags import Sources

COMMANDS = {
    "sft": "teach a language model from demonstrations",
    "reward": "train a reward model from pairs, rankings, labelled answers or labelled steps",
    "ppo": "optimise a reward with PPO",
    "rrhf": "learn from several answers to each prompt, ranked by their scores",
    "grpo": "optimise a reward without a critic: GRPO, Dr. GRPO, RLOO, REINFORCE++",
    "dpo": "learn from pairs of answers, without a reward model",
    "distill": "teach a student what a teacher predicts, and what a reward says of it",
    "evaluate": "answer prompts: reward, win rate, KL, BLEU, ROUGE, perplexity, lengths",
    "generate": "write responses to prompts",
    "bench": "measure the ops against their peers and this machine; show what became slower",
    "doctor": "show which implementation serves each op, and the versions",
    "demo": "the three stages on a made-up language, with a report",
}
MODEL = "a folder or a Hub id"
FILES = ".jsonl, .json, .csv or .parquet, also .gz of them"
REWARD = (
    f"a reward model ({MODEL}) or a function, package.module:function or file.py:function; several, with commas "
    "between them, are an ensemble, of which the mean counts"
)
RESUME = ("true goes on with the run in output_dir from its last checkpoint", False)
#: What every command that trains takes besides.
SWEEP = ("a YAML file of config fields to search: a run in output_dir/trial-N for each trial", None)
#: command → what it works on.
SOURCES: dict[str, Sources] = {
    "sft": {
        "model": (f"the model to start from: {MODEL}", ...),
        "data": (f"demonstrations: {FILES}; text, prompt and response, or messages", ...),
        "eval_data": ("held-out demonstrations", None),
        "tokenizer": (f"another tokenizer than the model's: {MODEL}", None),
        "output_dir": ("a new folder for the run and its model", "runs/sft"),
        "resume": RESUME,
    },
    "reward": {
        "model": (f"the model to start from, often the result of sft: {MODEL}", ...),
        "data": (
            f"{FILES}; prompt with chosen and rejected, response and label, responses and scores, or steps and "
            "labels: the columns say what is learned",
            ...,
        ),
        "eval_data": ("held-out records of the same kind", None),
        "calibration_data": ("records whose scores normalise moves to mean 0; data if absent", None),
        "tokenizer": (f"another tokenizer than the model's: {MODEL}", None),
        "output_dir": ("a new folder for the run and its model", "runs/reward"),
        "resume": RESUME,
    },
    "ppo": {
        "model": (f"the policy to start from, often the result of sft: {MODEL}", ...),
        "reward": (REWARD, ...),
        "prompts": (f"prompts: {FILES}", ...),
        "reference": (f"the model that the KL is taken from; the policy as it starts if absent: {MODEL}", None),
        "critic": (f"the model that the critic starts from: {MODEL}", None),
        "tokenizer": (f"another tokenizer than the policy's: {MODEL}", None),
        "output_dir": ("a new folder for the run and its model", "runs/ppo"),
        "resume": RESUME,
    },
    "rrhf": {
        "model": (f"the policy to start from, often the result of sft: {MODEL}", ...),
        "data": (f"answers with scores: {FILES}; prompt, responses and scores", ...),
        "eval_data": ("held-out answers with scores", None),
        "tokenizer": (f"another tokenizer than the model's: {MODEL}", None),
        "output_dir": ("a new folder for the run and its model", "runs/rrhf"),
        "resume": RESUME,
    },
    "grpo": {
        "model": (f"the policy to start from, often the result of sft: {MODEL}", ...),
        "reward": (REWARD, ...),
        "prompts": (f"prompts: {FILES}", ...),
        "reference": (f"the model that the KL is taken from; the policy as it starts if absent: {MODEL}", None),
        "tokenizer": (f"another tokenizer than the policy's: {MODEL}", None),
        "output_dir": ("a new folder for the run and its model", "runs/grpo"),
        "resume": RESUME,
    },
    "dpo": {
        "model": (f"the policy to start from, often the result of sft: {MODEL}", ...),
        "data": (f"pairs: {FILES}; prompt, chosen and rejected", ...),
        "reference": (f"the model to stay close to; the policy as it starts if absent: {MODEL}", None),
        "eval_data": ("held-out pairs", None),
        "tokenizer": (f"another tokenizer than the model's: {MODEL}", None),
        "output_dir": ("a new folder for the run and its model", "runs/dpo"),
        "resume": RESUME,
    },
    "distill": {
        "model": (f"the student to start from: {MODEL}", ...),
        "teacher": (f"the model to learn from, with the student's vocabulary: {MODEL}", ...),
        "data": (f"given responses: {FILES}; text, prompt and response, or messages", None),
        "prompts": (f"prompts that the student answers itself, in place of data: {FILES}", None),
        "reward": (f"a reward model ({MODEL}) or a function, package.module:function or file.py:function", None),
        "eval_data": ("held-out responses", None),
        "tokenizer": (f"another tokenizer than the student's: {MODEL}", None),
        "output_dir": ("a new folder for the run and its model", "runs/distill"),
        "resume": RESUME,
    },
    "evaluate": {
        "model": (f"the model that answers: {MODEL}", ...),
        "prompts": (f"prompts: {FILES}; response or references beside them are compared with", ...),
        "baseline": (f"another model that answers them, too: {MODEL}", None),
        "reward": (f"a reward model ({MODEL}) or a function, package.module:function or file.py:function", None),
        "reference": (f"the model that the KL is taken from; the baseline if absent: {MODEL}", None),
        "checkpoints": ("the folder of a run: reward against KL of each of its checkpoints", None),
        "tokenizer": (f"another tokenizer than the model's: {MODEL}", None),
        "output_dir": ("a new folder for results.json, responses.jsonl and report.html", "runs/evaluate"),
    },
    "generate": {
        "model": (f"the model that writes: {MODEL}", ...),
        "prompt": ("a prompt", None),
        "prompts": (f"prompts: {FILES}", None),
        "output": ("a new .jsonl file for prompts and responses, instead of the terminal", None),
        "tokenizer": (f"another tokenizer than the model's: {MODEL}", None),
    },
    "bench": {
        "op": ("ops with commas between them; all if absent", None),
        "device": ("cpu, cuda, or both with a comma; what there is if absent", None),
        "peers": ("compile, eager, TRL, verl, ... with commas, or none; all that are installed if absent", None),
        "compare": ("results of an earlier run, a .json file or its folder: what became slower", None),
        "out": ("the folder for results, pictures and report.html", "rlhf-fast-bench"),
    },
    "demo": {},
}
#: command → its trainer in rlhf_fast/trainers/<command>.py; the config is named alike.
TRAINERS = {
    "distill": "DistillTrainer",
    "dpo": "DPOTrainer",
    "grpo": "GRPOTrainer",
    "ppo": "PPOTrainer",
    "reward": "RewardTrainer",
    "rrhf": "RRHFTrainer",
    "sft": "SFTTrainer",
}
#: what a sentence about a missing package says to install.
EXTRAS = (
    "transformers", "accelerate", "tokenizers", "safetensors", "yaml", "tqdm", "rich", "matplotlib", "tensorboard",
    "peft",
)  # fmt: skip
