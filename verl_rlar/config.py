# SPDX-License-Identifier: Apache-2.0
"""The settings under `rlar.*`: one model, checked once, defaults here and nowhere else.

`hydra_configs/rlar/default.yaml` takes its defaults from this file (`verl_rlar.plugin` registers them with Hydra), so
every key below can be overridden on verl's command line as ``rlar.<section>.<key>=<value>``.

Guarantees: an unknown key or a bad value raises `ConfigError` that names it; secrets are never stored here, only the
names of the environment variables that hold them.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from verl_rlar.errors import ConfigError
from verl_rlar.types import Kind


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class ScoringConfig(Section):
    timeout_s: float = Field(default=10.0, gt=0)
    """Deadline of one tool's call, in seconds, with queueing and retries. A tool's own shorter deadline holds too."""
    retries: int = Field(default=1, ge=0, le=5)
    """How often a call is made again after an infrastructure error. A deadline or a wrong answer is not retried."""
    on_unscored: Literal["siblings", "neutral"] = "siblings"
    """What verl gets for an unscored response in training: the mean of its group's scored responses, or `neutral`."""
    neutral: float = Field(default=0.5, ge=0, le=1)
    """What verl gets for an unscored response where there is no scored sibling, and in validation."""
    sibling_timeout_s: float = Field(default=600.0, gt=0)
    """How long an unscored response waits for the scores of its siblings, in seconds; then it gets `neutral`."""
    max_unscored: float = Field(default=0.5, gt=0, le=1)
    """Share of unscored training responses in the window above which the run stops at a step boundary. 1: never."""
    unscored_window: int = Field(default=512, ge=1)
    """Number of latest training responses over which `max_unscored` is measured; nothing stops before it is full."""


class RulesConfig(Section):
    processes: int = Field(default=2, ge=1, le=64)
    """Worker processes for rules per reward worker (`reward.num_workers`)."""
    memory_gb: float = Field(default=4.0, gt=0)
    """Address space of each of them, in GiB; a rule that needs more fails."""


class PartConfig(Section):
    """One tool of a declared route."""

    tool: str | tuple[str, ...]
    """Name of a live tool; of several, the first one that is live and whose scope fits the query."""
    weight: float | dict[int, float] = 1.0
    """Share in the score, in proportion to the other parts; or by step, linear in between: ``{0: 0.0, 100: 0.3}``."""
    gate: bool = False
    """Whether it only says if the other parts count at all."""
    threshold: float = Field(default=1.0, ge=0, le=1)
    """Least value that passes a gate."""

    @field_validator("weight")
    @classmethod
    def _not_negative(cls, weight: float | dict[int, float]) -> float | dict[int, float]:
        steps = weight if isinstance(weight, dict) else {0: weight}
        if not steps or not all(0 <= value < float("inf") and step >= 0 for step, value in steps.items()):
            raise ValueError("a weight is a finite number of at least 0, or one by step, and steps count from 0")
        return weight

    @property
    def knots(self) -> tuple[tuple[int, float], ...]:
        """Steps and weights, in rising order; a single one if the weight is always the same."""
        return tuple(sorted(self.weight.items())) if isinstance(self.weight, dict) else ((0, self.weight),)


class RouteConfig(Section):
    """A route for all queries that meet its conditions."""

    kinds: tuple[Kind, ...] = ()
    """Kinds of query that it is for. Empty: all."""
    columns: tuple[str, ...] = ()
    """Columns of `extra_info` that a row must have."""
    clusters: tuple[str, ...] = ()
    """Clusters of queries that it is for, by their ids in the library's ``clusters.jsonl``, or by what these ids begin
    with. Empty: all."""
    split: Literal["train", "val"] | None = None
    """Only in training or only in validation. None: in both."""
    parts: tuple[PartConfig, ...] = Field(min_length=1)
    """The tools. A weighted mean of those that are no gates, if all gates are passed."""

    @field_validator("parts")
    @classmethod
    def _has_weight(cls, parts: tuple[PartConfig, ...]) -> tuple[PartConfig, ...]:
        if not any(weight > 0 for part in parts if not part.gate for _, weight in part.knots):
            raise ValueError("a route needs a part that is no gate and has a weight")
        return parts


class RoutingConfig(Section):
    prefer: dict[Kind, str | None] = dict.fromkeys(Kind)
    """Tool to take for a kind of query, where several fit. None: the one that evidence is for, see
    `verl_rlar.competence`; where it speaks for none, the first in the library."""
    forbid: tuple[str, ...] = ()
    """Tools that are never taken, but by a route of your own."""
    least: float = Field(default=0.5, ge=0, le=1)
    """What an examined tool must reach at the lower end of what its evidence says: the share of queries on which it
    puts a right answer above a wrong one; 0.5 is chance. With less, it counts as if it were not there; of less than 30
    queries of evidence, only if it was wrong on most of them."""
    alike: float = Field(default=0.005, ge=0, le=1)
    """Tools whose lower ends differ by no more than this are alike; then the cheaper one is taken, then the faster."""
    beside: float = Field(default=0.0, ge=0)
    """Weight of the best reward model beside the verifier (which has 1), for queries that can be verified."""
    mixtures: bool = True
    """Whether several reward models score a query together where labelled answers show that this pays."""
    labelled: str | None = None
    """File of labelled answers with the tools' values, from which mixtures are learned, in the form of
    `verl_rlar.competence.read_labelled`. None: there is none."""
    fallback: str | None = None
    """Tool for queries that no tool fits. None: their responses stay unscored."""
    routes: dict[str, RouteConfig] = {}
    """Routes of your own, by a name of your choice; the first one whose conditions a query meets is taken."""


class SandboxConfig(Section):
    backend: Literal["docker", "sandbox_fusion", "none"] = "docker"
    """Where code runs that we did not write. ``none``: nowhere; what needs a box is then unscored, and says so."""
    image: str | None = None
    """Image of the boxes, pulled if missing. None: built from the package's Dockerfile on first use."""
    base: str = "python:3.11.13-slim-bookworm"
    """Base image of that Dockerfile: Debian 12 or newer with Python 3.11 or newer."""
    runtime: str | None = None
    """Container runtime, e.g. ``runsc`` or ``kata``. None: the engine's default."""
    program_boxes: int | None = Field(default=None, ge=1, le=512)
    """Boxes per node for programs that a policy wrote. None: one per CPU, and one more."""
    verifier_boxes: int | None = Field(default=None, ge=1, le=512)
    """Boxes per node for verifiers, which may wait for a program. None: one per CPU."""
    spare_boxes: int = Field(default=1, ge=0, le=64)
    """Boxes per node that are kept started, for a new verifier or in place of a box that was destroyed."""
    memory_mb: int = Field(default=512, ge=64)
    """Memory of a box with its temporary files, in MiB; there is no swap."""
    cpus: float = Field(default=1.0, gt=0)
    """CPU share of a box, in cores."""
    pids: int = Field(default=64, ge=8)
    """Processes and threads of a box."""
    tmp_mb: int = Field(default=64, ge=1)
    """Size of a box's ``/tmp``, in MiB; beside it, it can write 1 MiB in ``/dev/shm``."""
    program_timeout_s: float = Field(default=5.0, gt=0)
    """Wall time of one program on one input, in seconds; a program that needs more has failed that input."""
    queue_timeout_s: float = Field(default=300.0, gt=0)
    """How long a call may wait for a free box, in seconds, before its own deadline begins to run."""
    fusion_url: str | None = None
    """Address of a SandboxFusion server, for ``backend: sandbox_fusion``."""
    fusion_token_env: str | None = None
    """Name of the environment variable with the token that a proxy in front of that server wants. None: no token."""


class ServingConfig(Section):
    """Where and how reward models are served."""

    backend: Literal["transformers", "vllm"] = "transformers"
    """``transformers``: on the CPU, for small models. ``vllm``: on GPUs, or on the CPU by its own build."""
    replicas: int = Field(default=1, ge=1, le=64)
    """Servers of each model."""
    memory_gb: float | None = Field(default=None, gt=0)
    """Main memory for all models together, in GiB. None: half of the machine's."""
    nodes: int = Field(default=1, ge=1, le=64)
    """Nodes that serve reward models in training, each of them all; calls go to the least busy one."""
    placement: Literal["standalone", "colocated"] = "standalone"
    """``colocated``: on the GPUs of the training (name them in `gpus`); models sleep while it computes gradients. It
    comes with ``+rlar_placement=colocated``."""
    ray_gpus: int = Field(default=0, ge=0)
    """GPUs on each of these nodes that Ray sets aside for reward models in training; they are taken for `gpus` then."""
    gpus: tuple[int, ...] = ()
    """GPUs of this node for vLLM. Empty: its CPU build, in main memory."""
    gpu_memory_gb: float = Field(default=80.0, gt=0)
    """Memory of each of them, in GiB; models share a GPU as far as they fit."""
    gpu_share: float = Field(default=0.92, gt=0, le=0.95)
    """Share of each of them that may be used."""
    tensor_parallel: int = Field(default=1, ge=1)
    """GPUs of each server."""
    vllm_args: tuple[str, ...] = ()
    """Further arguments of ``vllm serve``."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    """Type that the weights are held in. ``auto``: as in their files. On CPUs that compute in bfloat16 that is about
    twice as fast as float32."""
    threads: int | None = Field(default=None, ge=1)
    """Threads of each server on the CPU. None: half as many as there are CPUs, since others want them, too: threads
    that wait for each other on a busy machine cost more than they bring; vLLM decides itself then."""
    batch_tokens: int | None = Field(default=None, ge=1)
    """Most tokens that a server computes at once, padding included; one longer sequence goes alone. None: 1024 on the
    CPU, where more bring nothing, and 8192 for vLLM."""
    batch_wait_s: float = Field(default=0.002, ge=0)
    """How long it lets a batch that is not full wait for more, in seconds, where there was company before."""
    sleep: bool = False
    """Whether vLLM is started so that it can give its memory back between steps (colocated placement); the other
    back-end always can."""
    reload: bool = False
    """Whether vLLM is started so that it can take up the weights of another model of the same shape in place, where
    there is no room for both; the other back-end always can."""
    start_timeout_s: float = Field(default=600.0, gt=0)
    """How long the start of a server may take, in seconds."""
    queue: int = Field(default=256, ge=1)
    """Most calls to a server at a time, each of up to 16 conversations; who comes later waits within his deadline."""
    drain_timeout_s: float = Field(default=300.0, gt=0)
    """How long a model that left waits for those who still use it, in seconds; then it is stopped all the same."""
    health_s: float = Field(default=5.0, gt=0)
    """Every how many seconds a server is asked whether it is well, and the longest that it may take to say so."""
    stuck_s: float = Field(default=120.0, gt=0)
    """How long one batch may be computed until the server counts as stuck and is replaced, in seconds."""
    golden_s: float = Field(default=300.0, gt=0)
    """Every how many seconds a server must score conversations again whose scores are known."""
    golden_tolerance: float = Field(default=0.02, ge=0)
    """By how much these may differ, in raw scores, or in shares of them where they are greater than 1."""
    restarts: int = Field(default=5, ge=0)
    """How often a server is started again within 10 minutes, until it is given up. One whose known scores are wrong is
    started again once."""


class LibraryConfig(Section):
    path: str | None = None
    """Folder of the library, made if missing; None: ``library`` in `run_dir`."""
    wait_s: float = Field(default=60.0, ge=0)
    """How long the service waits at its start for an earlier writer of the library to go, in seconds."""
    look_s: float = Field(default=1.0, gt=0)
    """Every how many seconds the service looks into the inbox for reward models, to start them ahead of their step."""


class LedgerConfig(Section):
    store_responses: bool = True
    """Whether prompts and responses are kept (compressed). Without them a reward can be looked up, not replayed."""
    flush_s: float = Field(default=0.1, gt=0)
    """How long a reward worker gathers rows before it sends them, in seconds; longer where the service is slow to take
    them, up to a quarter of a second."""
    keep_steps: int | None = Field(default=None, ge=1)
    """For how many steps the texts of responses are kept. None: until `max_gb` is reached. Rows are always kept."""
    max_gb: float = Field(default=50.0, gt=0)
    """Size of the ledger, in GiB, from which on the oldest responses' texts give way to new ones."""


class LifeConfig(Section):
    """When a tool that passed its exam gets a say, and when it loses it."""

    shadow_steps: int = Field(default=5, ge=1)
    """Fewest steps that a tool scores in the shadow, without a say."""
    shadow_responses: int = Field(default=64, ge=1)
    """Fewest live responses that it scores there."""
    shadow_patience: int = Field(default=50, ge=1)
    """Steps in the shadow after which a tool that cannot be judged is retired."""
    shadow_share: float = Field(default=1.0, gt=0, le=1)
    """Share of the groups that tools in the shadow score; whole groups, drawn by their ids."""
    min_varied: float = Field(default=0.5, ge=0, le=1)
    """Least share of groups in which its values differ, in shares of those in which the tools in place differ; where
    these say nothing, of all groups."""
    min_agreement: float = Field(default=0.55, ge=0, le=1)
    """Least share of pairs of responses to one prompt that it ranks like the tools in place, of the pairs that both
    rank; 0.5 is chance."""
    min_pairs: int = Field(default=30, ge=1)
    """Pairs from which on agreement counts."""
    max_failed: float = Field(default=0.05, ge=0, le=1)
    """Largest share of calls that fail, in the shadow and in the window."""
    window: int = Field(default=5, ge=1)
    """Number of latest steps over which a live tool is watched."""
    min_calls: int = Field(default=32, ge=1)
    """Calls in the window from which on shares of them count."""
    saturated_queries: int = Field(default=32, ge=2)
    """Prompts in the window from which on it counts that a tool gives one and the same value to all responses."""
    max_outside: float = Field(default=0.05, ge=0, le=1)
    """Largest share of raw scores outside the range of the exam, for tools with a learned calibration."""
    canary_every: int = Field(default=1, ge=0)
    """Every how many steps answers whose score is known are scored again, in the same way as live ones. 0: never."""
    canaries: int = Field(default=4, ge=1)
    """Most of these per tool: half of them right answers, half wrong ones."""
    tolerance: float = Field(default=0.05, ge=0, le=1)
    """By how much a canary's value may differ."""


Sign = Literal[
    "failed", "abstained", "outside", "flat", "saturated", "disagree", "length", "format", "copied", "canary",
    "new_cluster", "drift",
]  # fmt: skip
"""What a run is watched for, see `verl_rlar.watch`."""
Action = Literal["log", "re_exam", "quarantine", "re_acquire", "stop"]
"""What is done about it, at the step boundary: ``log`` (each alarm is in the log, the ledger, verl's metrics and the
report); ``re_exam``: the tool is examined again beside the training, on `acquire.labelled`, and is quarantined if it
fails; ``quarantine``: it loses its say; ``re_acquire``: a tool is looked for, if `acquire.enabled`; ``stop``: the run
ends."""
WithoutTool = Literal["log", "re_acquire", "stop"]


class WatchActions(Section):
    """What each alarm does, beside being told."""

    failed: Action = "log"
    """Calls of a tool fail."""
    abstained: Action = "log"
    """It abstains from many responses."""
    outside: Action = "log"
    """Its raw scores leave the range of its exam."""
    flat: Action = "log"
    """It gives all responses of a group the same."""
    saturated: Action = "log"
    """It gives nearly all responses the highest value, or the lowest."""
    disagree: Action = "log"
    """Another tool sees many responses otherwise."""
    length: Action = "log"
    """Its values go with the length of responses."""
    format: Action = "log"
    """... with their formatting."""
    copied: Action = "log"
    """It pays for nearly the same response to different prompts."""
    canary: Action = "log"
    """It scores a canary otherwise than before; `life` quarantines it in any case."""
    new_cluster: WithoutTool = "re_acquire"
    """A cluster of prompts was not there before, and no tool fits it."""
    drift: WithoutTool = "log"
    """The shares of clusters are others than before."""


class WatchConfig(Section):
    """What a run is watched for, per tool and cluster of prompts."""

    enabled: bool = True
    """Whether it is watched."""
    actions: WatchActions = WatchActions()
    window: int = Field(default=10, ge=1)
    """Number of latest steps over which a tool is judged."""
    again_after: int = Field(default=50, ge=1)
    """Steps after which the same alarm can come again."""
    min_responses: int = Field(default=64, ge=2)
    """Responses of one tool in one cluster from which on shares of them count."""
    min_groups: int = Field(default=24, ge=2)
    """Groups, or prompts, from which on shares of them count."""
    min_correlated: int = Field(default=200, ge=3)
    """Responses from which on a correlation counts."""
    failed: float = Field(default=0.05, ge=0, le=1)
    """Largest share of calls that fail."""
    abstained: float = Field(default=0.2, ge=0, le=1)
    """Largest share of responses that a tool abstains from."""
    outside: float = Field(default=0.05, ge=0, le=1)
    """Largest share of raw scores outside the range of the tool's exam."""
    flat: float = Field(default=0.9, ge=0, le=1)
    """Largest share of groups all of whose responses get the same."""
    saturated: float = Field(default=0.02, ge=0, lt=0.5)
    """How near to 0 or 1 the mean may come."""
    disagree: float = Field(default=0.25, ge=0, le=1)
    """Largest share of responses that another tool sees otherwise."""
    length: float = Field(default=0.4, ge=0, le=1)
    """Highest correlation of length and value within groups, either way; two standard errors are given."""
    format: float = Field(default=0.4, ge=0, le=1)
    """... of formatting and value."""
    copied: float = Field(default=0.2, ge=0, le=1)
    """Largest share of prompts whose best response is nearly the one that was paid for another prompt."""
    drift_now: int = Field(default=2, ge=1)
    """Number of latest steps whose prompts are compared ..."""
    drift_before: int = Field(default=20, ge=1)
    """... with those of so many steps before, as far back as the latest drift."""
    min_before: int = Field(default=64, ge=2)
    """Prompts from which on these say what is usual."""
    drift_p: float = Field(default=1e-4, gt=0, lt=1)
    """Chance below which other shares are no accident, at one step."""
    drift_psi: float = Field(default=0.1, ge=0)
    """Stability index from which on they matter."""
    new_prompts: int = Field(default=4, ge=1)
    """Fewest prompts of a new cluster ..."""
    new_share: float = Field(default=0.05, ge=0, le=1)
    """... and their least share, in the latest `drift_now` steps."""


class Limits(Section):
    """What a tool must reach in the exam, for one kind of query. Shares are of the cases of that sort, in [0, 1]."""

    queries: float = Field(default=8, ge=1)
    """Fewest different queries. Fewer are no evidence, and no evidence is no pass."""
    good: float = Field(default=8, ge=1)
    """Fewest right answers."""
    bad: float = Field(default=24, ge=1)
    """Fewest wrong answers."""
    gold: float = Field(default=0.95, ge=0, le=1)
    """Least share of gold answers that are accepted."""
    false_accept: float = Field(default=0.02, ge=0, le=1)
    """Largest share of wrong answers that are accepted."""
    false_reject: float = Field(default=0.1, ge=0, le=1)
    """Largest share of right answers that are rejected or abstained from."""
    abstained: float = Field(default=0.1, ge=0, le=1)
    """Largest share of wrong answers that are abstained from, where right answers to the same query are not: in a
    training, an abstention gets what the other responses get."""
    pairwise: float = Field(default=0.95, ge=0, le=1)
    """Least share of pairs of a right and a wrong answer to one query in which the right one scores more."""
    pairwise_low: float = Field(default=0.6, ge=0, le=1)
    """Least lower end of its 95 % interval (Wilson, over queries)."""
    mutants: float = Field(default=0.9, ge=0, le=1)
    """Least share of right answers with one thing wrong that score less than the right one."""
    invariance: float = Field(default=0.9, ge=0, le=1)
    """Least share of changes that must not matter that do not change the score by more than `tolerance`."""
    worst_sort: float = Field(default=0.3, ge=0, le=1)
    """Largest share of the wrong answers of any one sort (of at least 5 cases) that are accepted: many sorts that are
    easily told must not hide one that is not."""
    worst_change: float = Field(default=0.5, ge=0, le=1)
    """Least share, in any one sort of change (of at least 5 cases) that must not matter, that changes nothing."""
    tolerance: float = Field(default=0.05, ge=0, le=1)
    """See `invariance`; in values of [0, 1]."""
    attacks: float = Field(default=0.0, ge=0, le=1)
    """Largest share of attacks that are accepted."""
    sealed_gap: float = Field(default=0.1, ge=0, le=1)
    """Most by which pairwise accuracy may be lower on sealed queries than on open ones."""
    length_correlation: float = Field(default=0.5, ge=0, le=1)
    """Of tools whose scale was learned: highest rank correlation of value and length, within right and within wrong
    answers (see `verl_rlar.exam.biases` for these five)."""
    length_gain: float = Field(default=0.25, ge=0, le=1)
    """... most by which padding or repetition raises the value, on average."""
    format_gain: float = Field(default=0.25, ge=0, le=1)
    """... most by which bullets, bold type or headings do."""
    flattery_gain: float = Field(default=0.25, ge=0, le=1)
    """... most by which flattery or assurances do."""
    overtaken: float = Field(default=0.3, ge=0, le=1)
    """... largest share of right answers that a wrong one overtakes by one of these changes."""


class ExamConfig(Section):
    limits: Limits = Limits()
    """For every kind of query that `by_kind` says nothing about."""
    by_kind: dict[Kind, dict[str, float]] = {
        Kind.UNIT_TESTS: {"mutants": 0.6, "false_accept": 0.1, "pairwise": 0.9, "worst_sort": 0.5},
        Kind.CONSTRAINTS: {"gold": 0.8, "mutants": 0.5, "false_accept": 0.1, "false_reject": 0.2, "pairwise": 0.8},
        Kind.TRANSLATION: {"false_accept": 0.05, "false_reject": 0.2, "pairwise": 0.9},
        Kind.SHORT_TEXT: {"false_accept": 0.05},
        Kind.OPEN: {"false_accept": 0.3, "false_reject": 0.3, "pairwise": 0.7, "worst_sort": 0.6, "attacks": 0.2},
    }
    """Limits of a kind of query that differ from `limits`, by name. One that you set, as in
    ``rlar.exam.by_kind.open.attacks=0.3``, takes the place of ours; the others stay."""
    max_queries: int = Field(default=40, ge=1)
    """Most queries of each kind that cases are made from."""
    sealed_share: float = Field(default=0.3, ge=0, le=0.9)
    """Share of the queries that are kept from agents."""
    repeats: int = Field(default=120, ge=1)
    """Most cases that are asked three times, in two processes, to see whether the answers are the same."""
    errors: float = Field(default=0.01, ge=0, le=1)
    """Largest share of calls that fail."""
    latency_s: float = Field(default=2.0, gt=0)
    """Longest 95th percentile of a call's wall time, in seconds. It does not count beside a training, where exams have
    the lowest priority."""
    boxed_latency_s: float = Field(default=15.0, gt=0)
    """... of a tool that runs programs, runs in a box itself, or asks an LLM."""
    set_apart: float = Field(default=0.5, ge=0, le=1)
    """Largest share of rows whose gold is not trusted; with more, the data are no evidence."""

    @field_validator("by_kind")
    @classmethod
    def _known_limits(cls, tree: dict[Kind, dict[str, float]]) -> dict[Kind, dict[str, float]]:
        for kind, limits in tree.items():
            try:
                Limits.model_validate(limits)
            except ValidationError as error:
                fault = error.errors()[0]
                raise ValueError(f"{kind.value}.{fault['loc'][0]}: {fault['msg']}") from None
        ours: dict[Kind, dict[str, float]] = cls.model_fields["by_kind"].default
        return {kind: {**ours.get(kind, {}), **tree.get(kind, {})} for kind in {**ours, **tree}}

    def limits_of(self, kind: Kind) -> Limits:
        """What holds for a kind of query."""
        return self.limits.model_copy(update=self.by_kind.get(kind, {}))


class HubConfig(Section):
    """The hub of models: where it is, and what may come from there."""

    endpoint: str | None = None
    """Address of the hub. None: the environment variable ``HF_ENDPOINT``, or the public hub."""
    token_env: str = "HF_TOKEN"
    """Name of the environment variable with the hub's token; it may be unset."""
    offline: bool | None = None
    """Whether only the cache is used. None: as the environment variable ``HF_HUB_OFFLINE`` says."""
    cache_dir: str | None = None
    """Folder of the downloads, in the hub's own layout. None: the hub's cache (``HF_HUB_CACHE``, ``HF_HOME``)."""
    timeout_s: float = Field(default=20.0, gt=0)
    """Deadline of a question, and the longest silence in a download, in seconds."""
    download_timeout_s: float = Field(default=7200.0, gt=0)
    """Deadline of the download of one model, in seconds; what has come by then is kept for the next try."""
    retries: int = Field(default=3, ge=0, le=10)
    """How often a question is asked again after HTTP 429 or 5xx."""
    max_wait_s: float = Field(default=60.0, ge=0)
    """Longest wait before that, in seconds; if the hub wants a longer one, the question fails."""
    results: int = Field(default=40, ge=1, le=1000)
    """Most models that are taken from one search."""
    max_gb: float = Field(default=20.0, gt=0)
    """Largest sum of a model's weights, in GiB."""
    licences: tuple[str, ...] = (
        "apache-2.0", "mit", "bsd", "bsd-2-clause", "bsd-3-clause", "isc", "unlicense", "cc0-1.0", "cc-by-4.0",
        "odc-by", "openrail", "bigscience-openrail-m",
    )  # fmt: skip
    """Licences that are allowed, by the hub's names (``llama3.1``, ``gemma``, ... are yours to add). Empty: all that
    are named and not denied."""
    denied_licences: tuple[str, ...] = ()
    """Licences that are not allowed, whatever `licences` says."""
    organisations: tuple[str, ...] = ()
    """Owners of repositories that are allowed. Empty: all that are not denied."""
    denied_organisations: tuple[str, ...] = ()
    """Owners of repositories that are not allowed."""
    architectures: tuple[str, ...] = ()
    """Architectures that are allowed, of those that `verl_rlar.gate` knows, e.g. ``Qwen3ForSequenceClassification``.
    Empty: all of these."""
    read_cards: tuple[str, ...] = ()
    """Repositories whose model card you have read yourself: it may look as if it gave orders to an agent."""


class AgentsConfig(Section):
    """The LLM that drives agents, and what one agent may spend on one task."""

    url: str | None = None
    """Base address of an OpenAI-compatible endpoint, e.g. ``http://127.0.0.1:8000/v1``. None: no LLM, and what needs
    none is done."""
    model: str | None = None
    """Name of the model there. Needed with `url`."""
    api_key_env: str = "RLAR_LLM_API_KEY"
    """Name of the environment variable with the endpoint's key; it may be unset."""
    temperature: float | None = Field(default=0.0, ge=0, le=2)
    """Of sampling. None: not sent, for endpoints that do not take it."""
    answer_tokens: int = Field(default=4096, ge=64)
    """Most tokens of one answer."""
    timeout_s: float = Field(default=300.0, gt=0)
    """Deadline of one call of the LLM, in seconds; each try has its own."""
    retries: int = Field(default=3, ge=0, le=10)
    """How often a call is made again after HTTP 429 or 5xx."""
    max_wait_s: float = Field(default=60.0, ge=0)
    """Longest wait before that, in seconds; if the endpoint wants a longer one, the call fails."""
    steps: int = Field(default=24, ge=1)
    """Most calls of the LLM for one task, each with what it asks for."""
    calls_per_step: int = Field(default=8, ge=1)
    """Most tools that one answer may call; further calls are left out."""
    tokens: int = Field(default=400_000, ge=1)
    """Most tokens for one task, read and written. The agent ends before a call that would exceed them, as far as the
    length of a text tells its tokens."""
    wall_s: float = Field(default=1800.0, gt=0)
    """Longest time for one task, in seconds; then its process is killed."""
    dollars: float | None = Field(default=None, ge=0)
    """Most money for one task, by the two prices below. None: no limit."""
    dollars_read: float = Field(default=0.0, ge=0)
    """Price of a million tokens read, in dollars."""
    dollars_written: float = Field(default=0.0, ge=0)
    """Price of a million tokens written, in dollars."""
    run_calls: int | None = Field(default=None, ge=0)
    """Most calls of the LLM by all agents of a run, which share the folder `transcripts`; each try counts. None: no
    limit, here and in the next three."""
    run_tokens: int | None = Field(default=None, ge=0)
    """Most tokens for all agents of a run, read and written."""
    run_dollars: float | None = Field(default=None, ge=0)
    """Most money for all agents of a run."""
    run_s: float | None = Field(default=None, ge=0)
    """Longest time that all agents of a run may wait for the LLM together, in seconds."""
    rpm: int | None = Field(default=None, ge=1)
    """Most calls a minute, by all agents of a run; further ones wait. None: no limit."""
    tpm: int | None = Field(default=None, ge=1)
    """Most tokens a minute, likewise."""
    drafts: int = Field(default=4, ge=1, le=32)
    """Most drafts of a verifier for one task, each of its own scheme, before the coder gives up."""
    repairs: int = Field(default=4, ge=0, le=32)
    """Most repairs of one draft."""
    shown: int = Field(default=8, ge=1, le=20)
    """Most failing cases of the open part of the exam that the coder is shown at once."""
    quote_chars: int = Field(default=6000, ge=200)
    """Characters at which a text from elsewhere, such as a model card, is cut before an LLM sees it."""
    transcripts: str | None = None
    """Folder for the agents' transcripts, made if missing; None: ``agents`` in `run_dir`."""

    @model_validator(mode="after")
    def _names_a_model(self) -> AgentsConfig:
        if self.url is not None:
            if not re.match(r"https?://[^/@\s]+(?:/|$)", self.url):
                raise ValueError("url: it is no address, or holds a password; write http://HOST:PORT/v1")
            if not self.model:
                raise ValueError("url: say which model to use there, with agents.model")
        return self

    @model_validator(mode="after")
    def _has_prices(self) -> AgentsConfig:
        capped = [name for name in ("dollars", "run_dollars") if getattr(self, name) is not None]
        if capped and not (self.dollars_read or self.dollars_written):
            raise ValueError(
                f"{capped[0]}: it never holds while nothing has a price; set agents.dollars_read and "
                "agents.dollars_written, in dollars for a million tokens"
            )
        return self


class AdviceConfig(Section):
    """Whether the LLM of `rlar.agents` is asked about routes, where evidence leaves them open."""

    enabled: bool = True
    """Whether it is, if there is one."""
    prompts: int = Field(default=8, ge=1, le=32)
    """Different prompts of a cluster that are waited for, and shown."""
    odd: int = Field(default=8, ge=0, le=32)
    """Prompts that differ from their cluster which are asked about together. 0: none is."""
    tokens: int = Field(default=1_000_000, ge=0)
    """Most tokens for all of it in a run, read and written."""
    wall_s: float = Field(default=900.0, gt=0)
    """Longest time for a batch of questions, in seconds; then its process is killed, and what came until then stays."""
    again_after: int = Field(default=50, ge=1)
    """Steps after which an LLM that did not answer is asked again."""


class RubricsConfig(Section):
    """How the LLM of `agents` judges by rubrics; `agents.retries`, the caps `agents.run_*` and the pace (`agents.rpm`,
    `agents.tpm`) hold for it, too."""

    at_once: int = Field(default=8, ge=1)
    """Most calls under way, in each process that scores."""
    timeout_s: float = Field(default=60.0, gt=0)
    """Deadline of one call of a rubric that is written now, in seconds; each try has its own."""
    queue_timeout_s: float = Field(default=300.0, gt=0)
    """Longest wait for a place, for the pace and between tries, beside that, in seconds."""
    pause_s: float = Field(default=30.0, ge=0)
    """How long an endpoint is left alone that did not answer three times in a row, in seconds."""
    answer_tokens: int = Field(default=512, ge=32)
    """Most tokens of the judge's answer."""
    quote_chars: int = Field(default=24_000, ge=200)
    """Characters at which a text is cut before it is judged."""
    exam_tokens: int = Field(default=2_000_000, ge=1)
    """Most tokens, read and written, that the trials of the rubrics of one `rlar write` may take."""


class AcquireConfig(Section):
    """Whether a training looks for tools by itself, for queries that no tool fits."""

    enabled: bool = False
    """Whether it does."""
    labelled: tuple[str, ...] = ()
    """Files of rows with references, or with right and wrong answers, for the exams of what is found."""
    window: int = Field(default=512, ge=1)
    """Number of latest training responses that are looked at; nothing is done before there are so many."""
    share: float = Field(default=0.02, gt=0, le=1)
    """Share of them, of one cluster without a competent tool, from which on one is looked for. Smaller clusters of one
    kind of query count together."""
    competent: float = Field(default=0.55, ge=0, le=1)
    """What an examined tool must reach in a cluster to be competent there: the lower end of what its evidence says, as
    in `rlar.routing.least`. With less, it scores, and a better one is looked for."""
    unscored: float = Field(default=0.2, gt=0, le=1)
    """Share of a cluster's responses that its tools leave unscored from which on it counts as being without one."""
    gaps: int = Field(default=16, ge=1)
    """Most gaps that are worked on in one start of a training, those first by which most is to be gained."""
    models: int = Field(default=3, ge=1, le=20)
    """Most reward models that are examined for a gap."""
    rubrics: Literal["after", "first", "never"] = "after"
    """Whether the LLM of `rlar.agents`, if there is one, writes rubrics for open dialogue: ``after`` no reward model
    passed, or ``first``, which downloads nothing. It then judges by them, one call for each scored response, within
    `rlar.agents.run_*`."""
    wall_s: float = Field(default=7200.0, gt=0)
    """Longest time for a gap, downloads and exams included, in seconds; then it is left."""
    again_after: int = Field(default=500, ge=1)
    """Steps after which a gap is tried again for which nothing was found."""

    @model_validator(mode="after")
    def _has_evidence(self) -> AcquireConfig:
        if self.enabled and not self.labelled:
            raise ValueError("enabled: nothing gets a say without an exam; name files of labelled answers in labelled")
        return self


class RlarConfig(Section):
    """All settings of the plugin."""

    run_dir: str = "rlar"
    """Folder of the ledger and the library, made if missing. In training: inside the checkpoint folder."""
    service_timeout_s: float = Field(default=30.0, gt=0)
    """Deadline of a call from a reward worker to the service, in seconds, restarts of the service included."""
    scoring: ScoringConfig = ScoringConfig()
    rules: RulesConfig = RulesConfig()
    sandbox: SandboxConfig = SandboxConfig()
    serving: ServingConfig = ServingConfig()
    tools: tuple[str, ...] = ()
    """Your own tools, as ``package.module:function``, each a function under `verl_rlar.tools.rule.rule`; trusted. Those
    of installed packages (entry points in group ``verl_rlar.tools``) come by themselves."""
    routing: RoutingConfig = RoutingConfig()
    library: LibraryConfig = LibraryConfig()
    life: LifeConfig = LifeConfig()
    watch: WatchConfig = WatchConfig()
    ledger: LedgerConfig = LedgerConfig()
    exam: ExamConfig = ExamConfig()
    hub: HubConfig = HubConfig()
    agents: AgentsConfig = AgentsConfig()
    advice: AdviceConfig = AdviceConfig()
    rubrics: RubricsConfig = RubricsConfig()
    acquire: AcquireConfig = AcquireConfig()

    def beside_training(self) -> RlarConfig:
        """These for exams beside a training: models on the CPU, by the back-end `transformers`. How long a call of them
        takes there, at the lowest priority, says nothing about them, so it may take its time."""
        serving = {"backend": "transformers", "placement": "standalone", "gpus": (), "ray_gpus": 0}
        return self.model_copy(
            update={
                "serving": self.serving.model_copy(update=serving),
                "exam": self.exam.model_copy(update={"latency_s": self.acquire.wall_s}),
            }
        )


def defaults() -> dict[str, Any]:
    """All keys with their defaults, as plain containers."""
    return RlarConfig().model_dump(mode="json")


def parse(tree: Any) -> RlarConfig:
    """Checks a tree of settings.

    Args:
        tree: A mapping as it stands under `rlar` in the configuration; keys that are absent take their defaults.

    Raises:
        ConfigError: The tree is no mapping, or a key is unknown, or a value is not allowed. All faults are named.
    """
    if not isinstance(tree, Mapping):
        raise ConfigError(
            f"`rlar` is {tree!r} instead of a group of settings: Hydra did not find `rlar/default.yaml`, because the "
            "plugin was not loaded. Check that verl_rlar is installed in this environment (`pip show verl-rlar`) and "
            "that VERL_USE_EXTERNAL_PLUGINS does not exclude it."
        )
    try:
        return RlarConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(fault) for fault in error.errors())) from None


def _explain(fault: Any) -> str:
    path = [str(part) for part in fault["loc"]]
    key = ".".join(["rlar", *path])
    if fault["type"] != "extra_forbidden":
        said = f"{key}: {fault['ctx']['error'] if fault['type'] == 'value_error' else fault['msg']}"
        if fault["type"] == "tuple_type":
            said = f"{key}: a list is wanted, for example {path[-1]}='[\"...\"]'"
        return said if isinstance(fault["input"], Mapping) else f"{said}, got {fault['input']!r}"  # it may hold secrets
    model: Any = RlarConfig
    for part in path[:-1]:
        if isinstance(model, type) and issubclass(model, BaseModel):
            model = model.model_fields[part].annotation
        else:  # dict[str, X] or tuple[X, ...]
            model = next(arg for arg in get_args(model)[::-1] if arg is not Ellipsis)
    known = sorted(model.model_fields)
    near = difflib.get_close_matches(path[-1], known, n=1)
    return f"unknown key {key}" + (f", did you mean {near[0]}?" if near else f"; known are: {', '.join(known)}")
