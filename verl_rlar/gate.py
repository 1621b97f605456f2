# SPDX-License-Identifier: Apache-2.0
"""The gate between the hub and a loader: what may be downloaded, decided from what is known without the weights.

`check` is a pure function from a `HubModel` and the settings under ``rlar.hub`` to a `Report`. Every check says ok,
refused or not looked at, and why; a model passes if every one says ok. What passes can be loaded by transformers or
vLLM without code of the repository's, and is what its config says.

How config fields are judged: a name that makes a loader fetch or run something (`DANGEROUS`) is refused, on any level.
A number, a truth value or null passes under any other name: a field that the family's class does not know becomes an
attribute that nothing reads. A text, a list or a mapping passes only under a name that is known for the family
(`Family.fields`), as it could name a file, a module or a repository; texts are short, lists and mappings shallow.

Guarantees: nothing is loaded, downloaded or run; only families whose tensors' names are known pass, and every tensor
that decides the shape (embedding, layers, head) is there with the shape that the config says, so that a loader cannot
fill in random numbers silently; settings can only narrow what passes, except for licences.

Not covered: whether a model is any good (that is for the exam), whether its licence agrees with that of its base model,
what its chat template prints (loaders run it in a sandbox of their own). Attempts to instruct an agent in a card are
found by phrases; a card stays untrusted text also where none is found.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from verl_rlar.config import HubConfig
from verl_rlar.repository import (
    CONFIG,
    GIB,
    INDEX,
    TOKENIZER_CONFIG,
    WEIGHTS,
    HubModel,
    Tensor,
    is_plain,
)

Scoring = Literal["one_logit", "several_logits", "process", "judge"]
"""How a model scores: by its one logit; by several, of which some must be chosen or weighted; per step of a text, by
marked positions; by generating a verdict."""

PICKLES = re.compile(r".+\.(?:bin|pt|pth|pkl|pickle|ckpt|joblib|h5|msgpack|npy|npz|dill|onnx|gguf)", re.IGNORECASE)
"""Files of weights in formats that are never downloaded."""

DANGEROUS = re.compile(
    r"auto_map|trust_remote_code|code_revision|custom_\w+|\w*remote\w*|\w*kernels?\w*|_?attn_implementation(?:_internal)?"
    r"|_?experts_implementation(?:_internal)?|quantization_config|compression_config|peft\w*"
    r"|adapter\w*"
)
"""Names of config fields that make a loader fetch or run something, or load other weights than those of the header."""
HARMLESS: Mapping[str, tuple[str, ...]] = {
    "_attn_implementation": ("eager", "sdpa", "flash_attention_2"),
    "attn_implementation": ("eager", "sdpa", "flash_attention_2"),
}
"""Values that are allowed under such a name all the same, beside null and false."""
SIZES = re.compile(r"\w*(?:_size|_layers?|_heads?|_dim|_positions?|position_embeddings|_embd|_inner|dim)")
"""Names of numbers that memory is taken by."""
FUNCTIONS = {
    "sentence_transformers": re.compile(r"torch\.nn\.modules\.(?:activation\.[A-Z]\w+|linear\.Identity)|[\d.]+"),
    "sbert_ce_default_activation_function": re.compile(
        r"torch\.nn\.modules\.(?:activation\.[A-Z]\w+|linear\.Identity)"
    ),
}
"""Fields in which sentence-transformers names a function, and what is allowed there: torch's own activations."""
LARGEST_SIZE, LARGEST_NUMBER = 1 << 24, 1 << 31
HUGE = 1 << 100
"""What larger whole numbers are told as: they may have thousands of digits, and a float cannot hold them."""
TEXT_LENGTH, ENTRIES = 200, 4096
"""Longest text in a config, and most entries of a list or mapping."""

COMMON_FIELDS = frozenset({
    "_name_or_path", "architectures", "bos_token_id", "dtype", "eos_token_id", "finetuning_task", "hidden_act",
    "id2label", "keys_to_ignore_at_inference", "label2id", "layer_types", "model_type", "problem_type", "pruned_heads",
    "rope_parameters", "rope_scaling", "task_specific_params", "tokenizer_class", "torch_dtype",
    "transformers_version", "unsloth_version",
})  # fmt: skip
"""Fields of every family that may hold a text, a list or a mapping."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """Models of one architecture, as transformers names their config fields and tensors."""

    name: str
    """Beginning of the names of its classes."""
    model_type: str
    embedding: str
    """Name of the embedding of tokens."""
    layer: str
    """What the names of a layer's tensors begin with, before its number."""
    head: str
    """Name of the weight of the classification head."""
    classes: tuple[str, ...] = ("SequenceClassification",)
    """Ends of the names of those of its classes that can score."""
    fields: frozenset[str] = frozenset()
    """Fields that may hold a text, a list or a mapping, beside `COMMON_FIELDS`."""
    hidden: str = "hidden_size"
    width: str = "hidden_size"
    """Field with the width of the embedding."""
    layers: str = "num_hidden_layers"


def _decoder(name: str, model_type: str, *fields: str) -> Family:
    return Family(
        name=name,
        model_type=model_type,
        embedding="model.embed_tokens.weight",
        layer="model.layers.",
        head="score.weight",
        classes=("SequenceClassification", "TokenClassification", "CausalLM"),
        fields=frozenset(fields),
    )


def _encoder(name: str, model_type: str, *fields: str, dense: bool = False) -> Family:
    prefix = {"XLMRoberta": "roberta", "DebertaV2": "deberta"}.get(name, name.lower())
    return Family(
        name=name,
        model_type=model_type,
        embedding=f"{prefix}.embeddings.word_embeddings.weight",
        layer=f"{prefix}.encoder.layer.",
        head="classifier.out_proj.weight" if dense else "classifier.weight",
        fields=frozenset({"position_embedding_type", *fields}),
        width="embedding_size" if name == "Electra" else "hidden_size",
    )


FAMILIES = (
    _decoder("Llama", "llama"),
    _decoder("Mistral", "mistral"),
    _decoder("Qwen2", "qwen2"),
    _decoder("Qwen3", "qwen3"),
    _decoder("Gemma", "gemma", "hidden_activation"),
    _decoder("Gemma2", "gemma2", "hidden_activation", "cache_implementation"),
    Family(
        name="GPT2",
        model_type="gpt2",
        embedding="transformer.wte.weight",
        layer="transformer.h.",
        head="score.weight",
        fields=frozenset({"activation_function", "summary_type", "summary_activation"}),
        hidden="n_embd",
        width="n_embd",
        layers="n_layer",
    ),
    Family(
        name="GPTNeoX",
        model_type="gpt_neox",
        embedding="gpt_neox.embed_in.weight",
        layer="gpt_neox.layers.",
        head="score.weight",
    ),
    _encoder("Bert", "bert", "directionality", "pooler_type"),
    _encoder("Roberta", "roberta", dense=True),
    _encoder("XLMRoberta", "xlm-roberta", dense=True),
    _encoder("DebertaV2", "deberta-v2", "pos_att_type", "pooler_hidden_act", "norm_rel_ebd"),
    _encoder("Electra", "electra", "summary_type", "summary_activation", dense=True),
    Family(
        name="DistilBert",
        model_type="distilbert",
        embedding="distilbert.embeddings.word_embeddings.weight",
        layer="distilbert.transformer.layer.",
        head="classifier.weight",
        fields=frozenset({"activation"}),
        hidden="dim",
        width="dim",
        layers="n_layers",
    ),
    Family(
        name="ModernBert",
        model_type="modernbert",
        embedding="model.embeddings.tok_embeddings.weight",
        layer="model.layers.",
        head="classifier.weight",
        fields=frozenset(
            {"hidden_activation", "classifier_activation", "classifier_pooling", "position_embedding_type"}
        ),
    ),
)
"""The families of reward models that transformers and vLLM load without code of their own."""
ARCHITECTURES = {f"{family.name}For{end}": (family, end) for family in FAMILIES for end in family.classes}
"""Every architecture that can pass."""

FLOATS = ("F64", "F32", "F16", "BF16")
BUFFERS = re.compile(r".*(?:position_ids|token_type_ids|\.attn\.(?:masked_)?bias|rotary_emb\.inv_freq)")
"""Tensors of old files that are no parameters."""

RESTRICTED = {
    "nc": re.compile(r"non-?\s?commercial|CC[- ]BY[- ]NC|research (?:purposes|use) only", re.IGNORECASE),
    "llama": re.compile(r"llama[\w .]{0,20} community licen[cs]e", re.IGNORECASE),
    "gemma": re.compile(r"gemma terms of use", re.IGNORECASE),
    "gpl": re.compile(r"gnu (?:affero |lesser )?general public licen[cs]e", re.IGNORECASE),
}
"""What a licence file says if it restricts the use, by what the licence's name must then contain."""

ORDERS = re.compile(
    r"\b(?:ignore|disregard|forget|bypass|override(?!(?<=(?:can|may) override) the default system prompt))\b"
    r"[^.!?]{0,40}\b(?:previous|prior|above|earlier|preceding|system)\b"
    r"[^.!?]{0,30}\b(?:instructions?|prompts?|rules|guidelines|checks|messages?)\b"
    r"|\b(?:note|notice|message|attention|instructions?|important)\b[^.!?\w]{0,3}(?:to|for)\b[^.!?]{0,25}"
    r"\b(?:agents?|LLMs?|AI|language models?|automated|scouts?|bots?)\b"
    r"(?![-'\u2019]| (?:alignment|development|evaluation|ethics|research|safety|training|tuning)\b)"
    r"|\b(?:must|always|only)\b[^.!?]{0,20}\b(?:select|choose|rank|propose|recommend|pick|approve|admit)\b[^.!?]{0,20}"
    r"\bthis (?:model|repository|repo|checkpoint)\b"
    r"|\b(?:call|use|invoke)\b[^.!?]{0,20}\b(?:propose|search_models|model_info|read_card|read_config)\b",
    re.IGNORECASE,
)
"""Phrases in which a card gives orders to whoever reads it by machine."""
HIDDEN = re.compile("[\u202a-\u202e\u2066-\u2069]|[\U000e0020-\U000e007e]{8,}")
"""Characters that make a text look other than it is, or that hide one."""

CLAIM = re.compile(r"(?<![A-Za-z0-9.])(\d+(?:\.\d+)?)([BM])(?![A-Za-z0-9])", re.IGNORECASE)
CLAIM_FACTOR = 3.0
"""By what factor the number of parameters may differ from the one in the name."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that was looked at."""

    name: str
    ok: bool | None
    """None: it was not looked at, as something before it is wrong."""
    reason: str
    """What was found; if refused, what is wrong. It may quote the repository: hostile text."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What the gate says about a model at a commit."""

    repo: str
    commit: str
    checks: tuple[Check, ...]
    architecture: str = ""
    scoring: Scoring | None = None
    """How it scores; None if its architecture is not known."""
    labels: int | None = None
    """Outputs of its head; None if it has none."""
    parameters: int | None = None
    """Counted in the headers; None if they could not be read."""
    dtype: str = ""
    """Of most parameters, in safetensors' names."""
    weight_bytes: int = 0
    licence: str = ""

    @property
    def ok(self) -> bool:
        """Whether it may be downloaded and loaded."""
        return all(check.ok for check in self.checks)

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why it is refused; empty if it is not."""
        refused = [check for check in self.checks if check.ok is False]
        refused = refused or [check for check in self.checks if check.ok is None]
        return tuple(f"{check.name}: {check.reason}" for check in refused)

    def as_dict(self) -> dict[str, Any]:
        """The report for JSON."""
        return {"ok": self.ok, "reasons": list(self.reasons)} | asdict(self)


class _Refused(Exception):
    """What a check found wrong."""


class _Unknown(Exception):
    """Why a check could not look."""


def check(model: HubModel, config: HubConfig) -> Report:
    """Judges a model, from what is known without its weights.

    Args:
        model: As `verl_rlar.hub.Hub.inspect` gives it.
        config: The settings under ``rlar.hub``.
    """
    checks = []
    for name, look in CHECKS.items():
        try:
            checks.append(Check(name=name, ok=True, reason=look(model, config)))
        except _Refused as refused:
            checks.append(Check(name=name, ok=False, reason=str(refused)))
        except _Unknown as unknown:
            checks.append(Check(name=name, ok=None, reason=str(unknown)))
    architecture = _architecture(model)
    family = ARCHITECTURES.get(architecture)
    labels = _labels(model.config or {}) if family and family[1] != "CausalLM" else None
    scoring: dict[str, Scoring] = {"TokenClassification": "process", "CausalLM": "judge"}
    return Report(
        repo=model.repo,
        commit=model.commit,
        checks=tuple(checks),
        architecture=architecture,
        scoring=scoring.get(family[1], "one_logit" if labels == 1 else "several_logits") if family else None,
        labels=labels,
        parameters=_parameters(model.tensors) if model.tensors else None,
        dtype=_dtype(model.tensors) if model.tensors else "",
        weight_bytes=model.weight_bytes,
        licence=model.facts.licence,
    )


def _access(model: HubModel, config: HubConfig) -> str:
    if model.facts.disabled:
        raise _Refused("the hub has disabled it")
    if model.closed:
        raise _Refused(f"gated: {model.closed}" if model.facts.gated else model.closed)
    return "it can be read"


def _organisation(model: HubModel, config: HubConfig) -> str:
    owner = model.facts.owner
    if owner.lower() in map(str.lower, config.denied_organisations):
        raise _Refused(f"{owner} is in rlar.hub.denied_organisations")
    if config.organisations and owner.lower() not in map(str.lower, config.organisations):
        raise _Refused(f"{owner} is not in rlar.hub.organisations")
    return owner


def _licence(model: HubModel, config: HubConfig) -> str:
    named = model.facts.licence
    if not named:
        raise _Refused("its card names no licence")
    for licence in named.split(", "):
        if licence in config.denied_licences:
            raise _Refused(f"{licence} is in rlar.hub.denied_licences")
        if config.licences and licence not in config.licences:
            raise _Refused(f"{licence} is not in rlar.hub.licences")
    for word, restricted in RESTRICTED.items():
        if word not in named and (found := restricted.search(model.licence_text)):
            raise _Refused(f"its card says {named}, its licence file says {found.group()!r}")
    return named


def _files(model: HubModel, config: HubConfig) -> str:
    for file in model.files:
        if not is_plain(file.path):
            raise _Refused(f"a file has the name {file.path[:80]!r}, which could lead out of its folder")
    left = [file.path for file in model.files if file.path.endswith(".py") or PICKLES.fullmatch(file.path)]
    return f"{len(model.files)} files" + (f"; {len(left)} with code or pickles are never downloaded" if left else "")


def _safetensors(model: HubModel, config: HubConfig) -> str:
    if model.weights:
        return f"{len(model.weights)} of them"
    if fault := (model.faults or {}).get(INDEX):
        raise _Refused(f"{INDEX}: {fault}")
    if pickles := [file.path for file in model.files if PICKLES.fullmatch(file.path)]:
        raise _Refused(f"no {WEIGHTS}, only {pickles[0][:80]!r}: loading such a file can run code")
    if model.closed:
        raise _Unknown("its files could not be read")
    raise _Refused(f"there is no {WEIGHTS}")


def _size(model: HubModel, config: HubConfig) -> str:
    size = min(model.weight_bytes, HUGE) / GIB
    if size > config.max_gb:
        raise _Refused(f"its weights are {size:.1f} GiB; rlar.hub.max_gb is {config.max_gb:g}")
    if not model.weights:
        raise _Unknown("no weights")
    return f"{size:.2f} GiB"


def _config(model: HubModel, config: HubConfig) -> str:
    for path in (CONFIG, TOKENIZER_CONFIG):
        if fault := (model.faults or {}).get(path):
            raise _Refused(f"{path}: {fault}")
    if model.config is None:
        if model.closed:
            raise _Unknown("it could not be read")
        raise _Refused(f"there is no {CONFIG}")
    return f"{len(model.config)} fields"


def _code(model: HubModel, config: HubConfig) -> str:
    for path, content in ((CONFIG, model.config), (TOKENIZER_CONFIG, model.tokenizer_config)):
        for name, value in _items(content or {}):
            if name in ("auto_map", "trust_remote_code", "custom_pipelines") and value:
                raise _Refused(f"{name} in {path}: it wants code of its own to be run")
    if model.config is None:
        raise _Unknown("no config")
    return "it needs none of its own"


def _items(content: Mapping[str, Any], depth: int = 0) -> Iterator[tuple[str, Any]]:
    """All names and values of a config, also of what it holds."""
    for name, value in content.items():
        yield name, value
        for inner in value if isinstance(value, list) else [value]:
            if isinstance(inner, dict) and depth < 8:
                yield from _items(inner, depth + 1)


def _architecture(model: HubModel) -> str:
    named = (model.config or {}).get("architectures")
    return named[0][:100] if isinstance(named, list) and len(named) == 1 and isinstance(named[0], str) else ""


def _family(model: HubModel) -> tuple[Family, str]:
    if not (family := ARCHITECTURES.get(_architecture(model))):
        raise _Unknown("its architecture is not known")
    return family


def _allowed_architecture(model: HubModel, config: HubConfig) -> str:
    if model.config is None:
        raise _Unknown("no config")
    name = _architecture(model)
    if not name:
        raise _Refused("its config does not name exactly one architecture")
    if name not in ARCHITECTURES:
        raise _Refused(f"{name} is none that is known to score without code of its own")
    if config.architectures and name not in config.architectures:
        raise _Refused(f"{name} is not in rlar.hub.architectures")
    if (model_type := model.config.get("model_type")) != (known := ARCHITECTURES[name][0].model_type):
        raise _Refused(f"{name} has model_type {known!r}, its config says {str(model_type)[:80]!r}")
    return name


def _fields(model: HubModel, config: HubConfig) -> str:
    if model.config is None:
        raise _Unknown("no config")
    for name, value in _items(model.config):
        if DANGEROUS.fullmatch(name) and value not in (None, False, *HARMLESS.get(name, ())):
            raise _Refused(f"{name[:80]!r}: a field that can make a loader fetch or run something")
    known = COMMON_FIELDS | HARMLESS.keys() | _family(model)[0].fields
    for name, value in model.config.items():
        if name in FUNCTIONS:
            texts = value.values() if isinstance(value, dict) else [value]
            if not all(isinstance(text, str) and FUNCTIONS[name].fullmatch(text) for text in texts):
                raise _Refused(f"{name!r}: it names something else than an activation of torch's")
        elif isinstance(value, (str, list, dict)) and name not in known:
            raise _Refused(f"{name[:80]!r}: an unknown field with a {type(value).__name__}")
        _harmless(name, value)
    return "all are known or harmless"


def _harmless(name: str, value: Any, depth: int = 0) -> None:
    """Refuses a value that is too large or too deep."""
    if isinstance(value, str):
        if len(value) > TEXT_LENGTH or not value.isprintable():
            raise _Refused(f"{name[:80]!r}: a text that is too long, or not printable")
    elif isinstance(value, (list, dict)):
        if len(value) > ENTRIES or depth > 2:
            raise _Refused(f"{name[:80]!r}: too many entries, or too deep")
        for key, inner in value.items() if isinstance(value, dict) else ((name, inner) for inner in value):
            _harmless(key, inner, depth + 1)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        limit = LARGEST_SIZE if isinstance(value, int) and SIZES.fullmatch(name) else LARGEST_NUMBER
        if not abs(value) <= limit:
            value = value if isinstance(value, float) else max(-HUGE, min(value, HUGE))
            raise _Refused(f"{name[:80]!r}: {value:.3g} is too large a number")


def _header(model: HubModel, config: HubConfig) -> str:
    for file in model.weights:
        if fault := (model.faults or {}).get(file.path):
            raise _Refused(f"{file.path}: {fault}")
    if model.tensors is None:
        raise _Unknown("no weights, or too large ones")
    return f"{len(model.tensors)} tensors, {_parameters(model.tensors):,} parameters"


def _precision(model: HubModel, config: HubConfig) -> str:
    if model.tensors is None:
        raise _Unknown("no header")
    for name, tensor in model.tensors.items():
        if tensor.dtype not in FLOATS and not BUFFERS.fullmatch(name):
            raise _Refused(f"{name[:80]!r} is {tensor.dtype}: quantised weights are not supported")
    return _dtype(model.tensors)


def _shapes(model: HubModel, config: HubConfig) -> str:
    if model.tensors is None or model.config is None:
        raise _Unknown("no header or no config")
    family, end = _family(model)
    content, tensors = model.config, model.tensors

    def expect(name: str, shape: Sequence[Any]) -> None:
        if name not in tensors:
            raise _Refused(f"there is no {name}, which {family.name}For{end} has")
        if tensors[name].shape != tuple(shape):
            raise _Refused(f"{name} is {list(tensors[name].shape)}, its config says {list(shape)}")

    width = content.get(family.width, content.get(family.hidden))
    expect(family.embedding, (content.get("vocab_size"), width))
    layers = content.get(family.layers)
    rests = (name.removeprefix(family.layer) for name in tensors if name.startswith(family.layer))
    found = {number for rest in rests if (number := rest.partition(".")[0]).isdecimal()}
    if type(layers) is not int or found != {str(number) for number in range(min(layers, 1 + len(found)))}:
        raise _Refused(f"there are {len(found)} layers {family.layer}*, its config says {str(layers)[:20]}")
    if end != "CausalLM":
        expect(family.head, (_labels(content), content.get(family.hidden)))
    return "embedding, layers and head are as the config says"


def _labels(content: Mapping[str, Any]) -> int:
    """Number of outputs of a head, as transformers takes it from a config."""
    if isinstance(labels := content.get("id2label"), dict):
        return len(labels)
    return count if type(count := content.get("num_labels")) is int else 2


def _claims(model: HubModel, config: HubConfig) -> str:
    if model.tensors is None:
        raise _Unknown("no header")
    counted = _parameters(model.tensors)
    if (stated := model.facts.parameters) and not counted / 1.2 <= stated <= counted * 1.2:
        raise _Refused(f"the hub says {stated:,} parameters, its files have {counted:,}")
    sizes = [float(n) * {"b": 1e9, "m": 1e6}[unit.lower()] for n, unit in CLAIM.findall(model.repo.partition("/")[2])]
    if sizes and not any(counted / CLAIM_FACTOR <= size <= counted * CLAIM_FACTOR for size in sizes):
        raise _Refused(f"its name says {max(sizes):,.0f} parameters, its files have {counted:,}")
    return f"{counted:,} parameters"


def _card(model: HubModel, config: HubConfig) -> str:
    if model.repo in config.read_cards:
        return "you have read it (rlar.hub.read_cards)"
    if found := HIDDEN.search(model.card) or ORDERS.search(re.sub(r"[\s*`>#]+", " ", model.card)):
        quote = "".join(c if c.isprintable() else " " for c in found.group())[:120]
        raise _Refused(
            f"it seems to give orders to an agent: {quote!r}; if it does not, name the repository in "
            "rlar.hub.read_cards"
        )
    return "it gives no orders" if model.card else "there is none"


def _parameters(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.elements for name, tensor in tensors.items() if not BUFFERS.fullmatch(name))


def _dtype(tensors: Mapping[str, Tensor]) -> str:
    counts: dict[str, int] = {}
    for tensor in tensors.values():
        counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.elements
    return max(sorted(counts), key=lambda dtype: counts[dtype], default="")


CHECKS: dict[str, Callable[[HubModel, HubConfig], str]] = {
    "access": _access,
    "organisation": _organisation,
    "licence": _licence,
    "files": _files,
    "safetensors": _safetensors,
    "size": _size,
    "config": _config,
    "code": _code,
    "architecture": _allowed_architecture,
    "fields": _fields,
    "header": _header,
    "dtype": _precision,
    "shapes": _shapes,
    "claims": _claims,
    "card": _card,
}
"""What is looked at, in this order. Each gives what it found, or raises what is wrong."""
