"""Heads that read a score or a value off a backbone: Transformers' own classes where it has them,
the same made here for every other decoder.

A class that is made here has the name Transformers would give it, and its weights have the names of
its family, so that it is loaded, sharded and saved as any other.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)
from transformers.modeling_layers import (
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.modeling_outputs import TokenClassifierOutput
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

REWARD_MODEL = "ForSequenceClassification"
CRITIC = "ForTokenClassification"
AUTO = {REWARD_MODEL: AutoModelForSequenceClassification, CRITIC: AutoModelForTokenClassification}
GENERIC = {REWARD_MODEL: GenericForSequenceClassification, CRITIC: GenericForTokenClassification}
# what a linear map from the last hidden state to a score is called
NAMES = ("score", "classifier", "classification_head", "reward_head", "value_head")
READ_ME = """\
Transformers has no class `{name}`, so it does not load this model as it is. Quatuor does, wherever
a recipe names this folder. With the backbone that Transformers has:

```python
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(folder)
backbone = AutoModel.from_pretrained(folder, dtype="auto").eval()
head = {{}}
for file in Path(folder).glob("*.safetensors"):
    head |= {{k: v for k, v in load_file(file).items() if k.startswith("score.")}}
inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
with torch.no_grad():
    hidden = backbone(**inputs).last_hidden_state
read = torch.nn.functional.linear(hidden, head["score.weight"], head.get("score.bias"))[..., 0]
scores = read[range(len(texts)), inputs["attention_mask"].sum(1) - 1]
```
"""


class OwnHead:
    """Mixin of the classes that are made here."""

    config: Any
    score: nn.Linear

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]  # Transformers' generic class
        # some OPT models project their last hidden state to the embedding's width
        width = getattr(config, "word_embed_proj_dim", self.score.in_features)
        if width != self.score.in_features:
            bias = self.score.bias is not None
            self.score = nn.Linear(width, self.score.out_features, bias=bias)

    @classmethod
    def from_config(cls, config: Any, dtype: Any, trust_remote_code: bool) -> Any:
        """Make a model as Transformers' automatic classes do."""
        assert not trust_remote_code  # code that came with the model has a class of its own
        return cls._from_config(config, dtype=dtype)  # type: ignore[attr-defined]


class OwnCritic(OwnHead):
    """Mixin of critics that are made here."""

    base_model: Any

    def forward(self, input_ids: Tensor, **inputs: Any) -> TokenClassifierOutput:
        """Return values [B,L,1] as `logits`. Transformers' generic class reads attentions too,
        which backbones with a state (Mamba) do not have.
        """
        hidden = self.base_model(input_ids, **inputs).last_hidden_state
        return TokenClassifierOutput(logits=self.score(hidden))


def head_class(kind: str, config: Any) -> Any:
    """Return what loads models of `kind` (REWARD_MODEL or CRITIC) with this config: Transformers'
    automatic class, or a class made here where it has none. That automatic class it is, too, where
    no class can be made; it says what is wrong.
    """
    config_class: Any = type(config)
    return AUTO[kind] if _has_class(kind, config) else _made(kind, config_class)


def _has_class(kind: str, config: Any) -> bool:
    own_code = AUTO[kind].__name__ in (getattr(config, "auto_map", None) or {})
    known = type(config) in AUTO[kind]._model_mapping
    backbone = MODEL_MAPPING.get(type(config), None)
    plain = getattr(backbone, "__name__", "For")  # some have a whole model for a backbone
    return own_code or known or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or "For" in plain


@functools.cache
def _made(kind: str, config_class: Any) -> Any:
    causal = MODEL_FOR_CAUSAL_LM_MAPPING[config_class]
    family = next(c for c in causal.__mro__ if c.__name__.endswith("PreTrainedModel"))
    assert issubclass(family, PreTrainedModel)
    stem = MODEL_MAPPING[config_class].__name__.removesuffix("Model")
    # Llama 4 names the backbone otherwise than its weights are; what is tied to them tells
    tied = getattr(causal, "_tied_weights_keys", None) or {}
    prefix = next(iter(tied.values()), causal.base_model_prefix).partition(".")[0]
    # Transformers tells by the module whether a class's weights have the layout it knows
    body = {"base_model_prefix": prefix, "__module__": causal.__module__}
    own = OwnCritic if kind == CRITIC else OwnHead
    return type(f"{stem}{kind}", (own, GENERIC[kind], family), body)


def made_here(model: Any) -> bool:
    """Tell whether Transformers lacks the model's class."""
    return isinstance(model, OwnHead)


def head_notice(config: Any) -> str:
    """Return what there is to say about a reward model trained with this config; nothing where
    plain Transformers loads it.
    """
    kind = head_class(REWARD_MODEL, config)
    if kind is AUTO[REWARD_MODEL]:
        return ""
    return (
        f"Transformers has no {kind.__name__}: recipes load the exported reward model, and its "
        "README.md says how Transformers reads it"
    )


def write_read_me(model: Any, folder: Path) -> None:
    """Leave beside a model whose class was made here how it is read without it."""
    if made_here(model):
        (folder / "README.md").write_text(READ_ME.format(name=type(model).__name__), "utf-8")


def head_of(model: Any) -> Any:
    """Return the linear map that reads scores or values off the last hidden state; None where a
    model's own code calls it something else.
    """
    return next((getattr(model, name) for name in NAMES if hasattr(model, name)), None)


def renamed_head(auto_class: Any, config: Any) -> dict[str, str]:
    """Return the renamings, for `from_pretrained`, of a head's weights to the name that the class
    has for them.
    """
    kind = auto_class
    if hasattr(kind, "_model_mapping"):
        kind = kind._model_mapping.get(type(config), None)
    generic = kind is None or issubclass(kind, tuple(GENERIC.values()))
    own = "score" if generic or kind.__name__.endswith(REWARD_MODEL) else "classifier"
    return {rf"^{name}\.": f"{own}." for name in NAMES if name != own}
