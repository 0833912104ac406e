"""What of a DeepSpeed config reaches its engine; test_processes.py holds two processes under it to one."""

from types import SimpleNamespace

import pytest

from rlhf_fast import zero
from rlhf_fast.trainers import learning


def test_the_sizes_of_a_config_are_taken_over_and_the_rest_is_the_trainers():
    given = {
        "train_batch_size": "auto", "gradient_accumulation_steps": "auto", "gradient_clipping": "auto",
        "bf16": {"enabled": False}, "steps_per_print": 10,
        "zero_optimization": {
            "stage": 3, "reduce_bucket_size": 1000, "allgather_bucket_size": "auto", "overlap_comm": True,
            "offload_param": {"device": "none", "nvme_path": None}, "stage3_param_persistence_threshold": 5,
            "contiguous_gradients": True,
        },
    }  # fmt: skip
    found = zero.settings(given)
    assert found["zero_optimization"] == {
        "stage": 3, "reduce_bucket_size": 1000, "overlap_comm": True, "stage3_param_persistence_threshold": 0
    }  # fmt: skip
    assert found["gradient_clipping"] == 0.0
    assert (found["train_micro_batch_size_per_gpu"], found["gradient_accumulation_steps"]) == (1, 1)


def test_stage_1_never_overlaps():
    """DeepSpeed would then look for gradients during backward passes alone, and here they are summed after the last."""
    assert zero.settings({"zero_optimization": {"stage": 1, "overlap_comm": True}})["zero_optimization"] == {
        "stage": 1,
        "overlap_comm": False,
    }


@pytest.mark.parametrize(
    ("section", "rest", "words"),
    [
        ({"stage": 0}, {}, "stage 1, 2 or 3 here, and DeepSpeed was set up for 0"),
        ({"stage": 2, "offload_optimizer": {"device": "cpu"}}, {}, "without offloading: no offload_optimizer to cpu"),
        ({"stage": 3, "offload_param": {"device": "nvme"}}, {}, "without offloading: no offload_param to nvme"),
        ({"stage": 3, "zero_quantized_weights": True}, {}, "cannot do zero_optimization.zero_quantized_weights"),
        ({"stage": 3, "zero_hpz_partition_size": 8}, {}, "cannot do zero_optimization.zero_hpz_partition_size"),
        ({"stage": 2}, {"gradient_clipping": 1.0}, "leave gradient_clipping out of that"),
        ({"stage": 2}, {"gradient_accumulation_steps": 2}, "leave gradient_accumulation_steps out of that"),
        ({"stage": 2}, {"bf16": {"enabled": True}}, "leave bf16 out of that"),
        ({"stage": 2}, {"optimizer": {"type": "Lamb", "params": {}}}, "leave optimizer out of that"),
    ],
)
def test_what_zero_does_not_do_here_is_refused(section, rest, words):
    with pytest.raises(ValueError, match=words):
        zero.settings({"zero_optimization": section} | rest)


def test_a_single_process_is_refused(monkeypatch):
    import accelerate

    plugin = SimpleNamespace(deepspeed_config={"zero_optimization": {"stage": 2}})
    found = SimpleNamespace(
        distributed_type="DEEPSPEED", num_processes=1, gradient_accumulation_steps=1, mixed_precision="no",
        state=SimpleNamespace(deepspeed_plugin=plugin),
    )  # fmt: skip
    monkeypatch.setattr(accelerate, "Accelerator", lambda: found)
    monkeypatch.setattr(learning, "find_spec", lambda name: True)  # with or without deepspeed
    with pytest.raises(ValueError, match="set up for DeepSpeed with one"):
        learning.accelerator()
