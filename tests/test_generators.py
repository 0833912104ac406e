"""Responses from elsewhere: what a server is given, what is checked of its answer, how its rounding is corrected."""

import copy
import math
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from tiny import accelerate_on, tiny_gpt2, tiny_llama, tiny_tokenizer

import rlhf_fast as rf
from rlhf_fast.generate import Generation, decode
from rlhf_fast.generators import DecodeGenerator, VLLMGenerator, WeightReader, assembled, check_written
from rlhf_fast.trainers import online

TOKENIZER = tiny_tokenizer()
PROMPTS = [{"prompt": f"the {w} was"} for w in ("movie", "plot", "bad", "good", "dull")]


@pytest.fixture(autouse=True)
def on_the_cpu():
    with accelerate_on("cpu"):
        yield


class Server:
    """A copy of the policy in bfloat16, as a server keeps it."""

    def __init__(self):
        self.synced, self.model, self.written = 0, None, []

    def sync(self, policy):
        self.synced, self.model = self.synced + 1, copy.deepcopy(policy).bfloat16()

    def write(self, policy, prompt_ids, prompt_mask, **numbers):
        self.written.append(decode(self.model, prompt_ids, prompt_mask, **numbers))
        return self.written[-1]


def build(kind, generator, **numbers):
    numbers = {"batch_size": 3, "max_new_tokens": 8, "minibatch_size": 3, "learning_rate": 1e-3, "steps": 4} | numbers
    trainer, config = (rf.PPOTrainer, rf.PPOConfig) if kind == "ppo" else (rf.GRPOTrainer, rf.GRPOConfig)
    return trainer(
        tiny_llama(), reward=lambda prompts, responses: [len(r) for r in responses], prompts=PROMPTS,
        tokenizer=TOKENIZER, config=config(**numbers), generator=generator,
    )  # fmt: skip


def updates(trainer, monkeypatch):
    """What ``update`` gets: (rollout, advantages) of each step."""
    seen, update = [], trainer.update
    monkeypatch.setattr(trainer, "update", lambda r, a, *more: (seen.append((r, a)), update(r, a, *more))[1])
    return seen


@pytest.mark.parametrize("kind", ["ppo", "grpo"])
def test_the_decode_loop_is_what_writes_where_no_generator_is_given(kind):
    mine, given = build(kind, None), build(kind, DecodeGenerator())
    assert mine.step(next(mine.batches())) == given.step(next(given.batches()))


@pytest.mark.parametrize("kind", ["ppo", "grpo"])
def test_a_server_has_the_weights_of_every_step_and_its_rounding_is_corrected(kind, monkeypatch):
    server = Server()
    trainer = build(kind, server, importance_cap=1.02)
    seen = updates(trainer, monkeypatch)
    monkeypatch.setattr(online, "corrected", spy := Spy(online.corrected))
    batches = trainer.batches()
    for step in range(2):
        before = copy.deepcopy(trainer.policy)
        stats = trainer.step(next(batches))
        assert server.synced == step + 1
        for theirs, ours in zip(server.model.parameters(), before.parameters(), strict=True):
            assert torch.equal(theirs, ours.bfloat16())
        rollout, advantages = seen[step]
        theirs, mask = server.written[step].logprobs, rollout.mask
        assert torch.equal(rollout.sampler_logprobs, theirs)
        torch.testing.assert_close(rollout.old_logprobs, online.read(before, rollout, trainer.config).logprobs)
        gap = (rollout.old_logprobs - theirs)[mask].double()
        assert stats["mismatch"] == pytest.approx(gap.square().mean().sqrt().item(), rel=1e-5)
        assert stats["mismatch"] > 1e-3  # far above the 1e-7 of the decode loop
        ratio = gap.exp().clamp(max=1.02)
        assert (ratio < 1).any()
        assert (ratio == 1.02).any()
        uncorrected = spy.given[step]
        uncorrected = uncorrected[:, None].expand_as(mask) if uncorrected.dim() == 1 else uncorrected
        torch.testing.assert_close(advantages[mask].double(), uncorrected[mask].double() * ratio, rtol=1e-5, atol=1e-6)


class Spy:
    """A function that notes its first argument."""

    def __init__(self, function):
        self.function, self.given = function, []

    def __call__(self, first, *rest):
        self.given.append(first)
        return self.function(first, *rest)


def test_groups_that_are_drawn_anew_are_written_with_the_same_weights():
    server = Server()
    trainer = build("grpo", server, group_size=2, resample=2)
    trainer.reward = lambda prompts, responses: [1.0] * len(prompts)
    trainer.step(next(trainer.batches()))
    assert server.synced == 1
    assert len(server.written) == 3


def written(**changes):
    good = assembled([[5, 1], [7]], [[-1.0, -2.0], [-0.5]], stop_ids=[1], pad_id=0, device="cpu")
    return good._replace(**changes)


def test_what_a_server_returns_is_put_together():
    found = written()
    assert found.responses.tolist() == [[5, 1], [7, 0]]
    assert found.mask.tolist() == [[True, True], [True, False]]
    assert found.logprobs.tolist() == [[-1.0, -2.0], [-0.5, 0.0]]
    assert found.ended.tolist() == [True, False]
    check_written(found, 2, 2)


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (written(), r"\[3, T\] responses of up to 8 tokens, got \[2, 2\]"),
        (written(mask=torch.ones(2, 3).bool()), r"mask must be \[2, 2\] like its responses, got \[2, 3\]"),
        (written(mask=torch.tensor([[True, True], [False, False]])), "wrote nothing to prompt 2 of 2"),
        (written(logprobs=torch.tensor([[-1.0, math.nan], [0, 0]])), "logprobs of prompt 1 of 2 are above 0 or NaN"),
        (written(logprobs=torch.tensor([[-1.0, -1], [0.5, 0]])), "logprobs of prompt 2 of 2 are above 0 or NaN"),
    ],
)
def test_what_no_generator_may_return_is_named(found, words):
    with pytest.raises(ValueError, match=words):
        check_written(found, 3 if "3, T" in words else 2, 8)


def test_a_trainer_checks_its_generator():
    class Mute(DecodeGenerator):
        def write(self, policy, prompt_ids, prompt_mask, **numbers):
            found = super().write(policy, prompt_ids, prompt_mask, **numbers)
            return Generation(found.responses, torch.zeros_like(found.mask), found.logprobs, found.ended)

    trainer = build("ppo", Mute())
    with pytest.raises(ValueError, match="the generator wrote nothing to prompt 1 of 3"):
        trainer.step(next(trainer.batches()))


class Engine:
    """As much of ``vllm.LLM`` as is documented and used; one worker, whose model notes what it loads."""

    def __init__(self, **options):
        self.options, self.loaded, self.asked, self.resets = options, {}, [], 0
        module, name = options["worker_extension_cls"].rsplit(".", 1)
        self.worker = getattr(sys.modules[module], name)()
        self.worker.model_runner = SimpleNamespace(model=SimpleNamespace(load_weights=self.load))

    def load(self, weights):
        self.loaded = {name: weight.clone() for name, weight in weights}

    def collective_rpc(self, method, args=()):
        return [getattr(self.worker, method)(*args)]

    def reset_prefix_cache(self):
        self.resets += 1

    def generate(self, prompts, sampling_params, use_tqdm=True):
        self.asked.append((prompts, sampling_params))
        tokens = [(5, 6, 1), (7,)]
        return [
            SimpleNamespace(outputs=[SimpleNamespace(
                token_ids=ids, logprobs=[{t: SimpleNamespace(logprob=-t / 10), 99: None} for t in ids]
            )])
            for ids in tokens
        ]  # fmt: skip


@pytest.fixture
def vllm(monkeypatch):
    """A stand-in for vLLM: what it does itself is not tested here."""
    module = ModuleType("vllm")
    module.LLM, module.SamplingParams = Engine, lambda **given: SimpleNamespace(**given)
    monkeypatch.setitem(sys.modules, "vllm", module)


@pytest.mark.parametrize("share", ["none", "lora"])
def test_vllm_loads_the_weights_of_the_policy(vllm, tmp_path, share):
    from rlhf_fast.sharing import with_adapters

    policy = tiny_llama()
    whole = policy
    if share == "lora":
        policy = with_adapters(policy, rank=2, alpha=4.0, seed=0)
        for name, weight in policy.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight)
        whole = copy.deepcopy(policy).merge_and_unload()
    generator = VLLMGenerator("somewhere", folder=tmp_path, gpu_memory_utilization=0.3)
    generator.sync(policy)
    assert generator.engine.options["gpu_memory_utilization"] == 0.3
    assert generator.engine.loaded.keys() == whole.state_dict().keys()
    assert all(torch.equal(weight, whole.state_dict()[name]) for name, weight in generator.engine.loaded.items())
    assert generator.engine.resets == 1
    assert not list(tmp_path.iterdir())


def test_vllm_is_asked_for_tokens_and_gives_their_logprobs(vllm):
    generator = VLLMGenerator("somewhere")
    ids, mask = torch.tensor([[0, 8, 9], [3, 4, 5]]), torch.tensor([[False, True, True], [True] * 3])
    numbers = {"max_new_tokens": 4, "stop_ids": [1], "pad_id": 0, "temperature": 0.7, "seeds": torch.tensor([11, 12])}
    found = generator.write(None, ids, mask, top_k=0, top_p=1.0, **numbers)
    prompts, asked = generator.engine.asked[0]
    assert prompts == [{"prompt_token_ids": [8, 9]}, {"prompt_token_ids": [3, 4, 5]}]
    assert [params.seed for params in asked] == [11, 12]
    assert {(p.temperature, p.max_tokens, *p.stop_token_ids, p.n, p.logprobs) for p in asked} == {(0.7, 4, 1, 1, 0)}
    assert generator.engine.options["logprobs_mode"] == "processed_logprobs"
    assert found.responses.tolist() == [[5, 6, 1], [7, 0, 0]]
    torch.testing.assert_close(found.logprobs, torch.tensor([[-0.5, -0.6, -0.1], [-0.7, 0, 0]]))
    assert found.ended.tolist() == [True, False]
    for filtered in ({"top_k": 5, "top_p": 1.0}, {"top_k": 0, "top_p": 0.9}):
        with pytest.raises(ValueError, match="turn both off"):
            generator.write(None, ids, mask, **filtered, **numbers)


def test_without_vllm_its_generator_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ModuleNotFoundError, match="pip install vllm"):
        VLLMGenerator("somewhere")


def test_tied_weights_reach_a_worker_once(vllm, tmp_path):
    """As a checkpoint holds them; vLLM ties them again."""
    generator = VLLMGenerator("somewhere", folder=tmp_path)
    generator.sync(tiny_gpt2())
    assert "lm_head.weight" not in generator.engine.loaded
    assert "transformer.wte.weight" in generator.engine.loaded
    assert isinstance(generator.engine.worker, WeightReader)
