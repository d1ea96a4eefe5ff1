"""Reads the sizes of a decoder from the fields of its ``config.json``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finetune.errors import ConfigError, Problem

if TYPE_CHECKING:
    from collections.abc import Mapping

_FAMILIES = ("llama", "mistral", "mixtral", "qwen2", "gemma2", "phi3")


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """All matrices of one name: ``count`` of them, each [outputs, inputs]."""

    name: str
    outputs: int
    inputs: int
    count: int

    @property
    def elements(self) -> int:
        """Number of elements of all the matrices together."""
        return self.outputs * self.inputs * self.count


@dataclass(frozen=True, slots=True, kw_only=True)
class Dimensions:
    """The sizes of a decoder built like Llama's: Llama, Mistral, Mixtral, Qwen2, Gemma 2 or Phi-3."""

    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    queries: int
    """Width of a token's queries, all heads together."""
    keys: int
    """Width of a token's keys, all heads together; its values have the same width."""
    norms: int
    """Normalisations in a layer."""
    tied: bool
    """Whether the head and the embedding share one weight."""
    experts: int
    """Experts of a layer; 0 for a dense one."""
    experts_per_token: int
    """Experts that a token goes through; 1 for a dense layer."""
    window: int | None
    """Number of tokens that attention looks back on in every layer; None if it looks at all earlier tokens."""
    biases: int
    """Elements of all biases of a layer."""
    linears: tuple[Linear, ...]
    """The linear layers that can get an adapter: all but the head and the experts."""
    fused: tuple[Linear, ...]
    """The weights of a mixture's experts; empty for a dense model."""

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Dimensions:
        """Read the sizes from the fields of a ``config.json``.

        Raises:
            ConfigError: the model is of a family that the arithmetic does not know.
        """
        family = fields.get("model_type")
        if family not in _FAMILIES:
            raise ConfigError(
                Problem(
                    field="model",
                    value=family,
                    why=f"the arithmetic does not know this family (it knows {', '.join(_FAMILIES)})",
                    remedy="measure the model with --dry-run, which works with every model of transformers",
                )
            )
        hidden, inner, layers = fields["hidden_size"], fields["intermediate_size"], fields["num_hidden_layers"]
        heads = fields["num_attention_heads"]
        head = fields.get("head_dim") or hidden // heads
        queries, keys = heads * head, (fields.get("num_key_value_heads") or heads) * head
        experts = fields.get("num_local_experts", 0) if family == "mixtral" else 0
        return cls(
            vocabulary=fields["vocab_size"],
            hidden=hidden,
            intermediate=inner,
            layers=layers,
            heads=heads,
            queries=queries,
            keys=keys,
            norms=4 if family == "gemma2" else 2,
            tied=bool(fields.get("tie_word_embeddings", family == "gemma2")),
            experts=experts,
            experts_per_token=fields["num_experts_per_tok"] if experts else 1,
            window=_window(family, fields),
            biases=_biases(family, fields, hidden, queries, keys),
            linears=_linears(family, hidden, inner, queries, keys, layers, dense=not experts),
            fused=(
                Linear(name="gate_up_proj", outputs=2 * inner, inputs=hidden, count=experts * layers),
                Linear(name="down_proj", outputs=hidden, inputs=inner, count=experts * layers),
            )
            if experts
            else (),
        )

    @property
    def stored_linears(self) -> tuple[Linear, ...]:
        """The matrices that are stored in ``--precision``."""
        return self.linears + self.fused

    @property
    def largest_matrix(self) -> int:
        """Elements of the largest of these matrices; each expert counts as a matrix of its own."""
        return max(part.outputs * part.inputs for part in self.stored_linears)

    @property
    def tensors(self) -> list[int]:
        """Elements of each parameter of the model. transformers fuses the experts of a layer into one parameter."""
        found = [self.vocabulary * self.hidden] * (1 if self.tied else 2) + [self.hidden] * (
            self.norms * self.layers + 1
        )
        for part in self.linears:
            found += [part.outputs * part.inputs] * part.count
        for part in self.fused:
            found += [part.elements // self.layers] * self.layers
        if self.experts:
            found += [self.experts * self.hidden] * self.layers
        return found + ([self.biases] * self.layers if self.biases else [])

    @property
    def parameters(self) -> int:
        """Number of elements of all parameters. A tied head and its embedding count once."""
        return sum(self.tensors)


def _linears(
    family: str, hidden: int, inner: int, queries: int, keys: int, layers: int, *, dense: bool
) -> tuple[Linear, ...]:
    if family == "phi3":
        sizes = [("qkv_proj", queries + 2 * keys, hidden), ("o_proj", hidden, queries)]
        sizes += [("gate_up_proj", 2 * inner, hidden), ("down_proj", hidden, inner)]
    else:
        sizes = [("q_proj", queries, hidden), ("k_proj", keys, hidden), ("v_proj", keys, hidden)]
        sizes += [("o_proj", hidden, queries)]
        if dense:
            sizes += [("gate_proj", inner, hidden), ("up_proj", inner, hidden), ("down_proj", hidden, inner)]
    return tuple(Linear(name=name, outputs=out, inputs=into, count=layers) for name, out, into in sizes)


def _window(family: str, fields: Mapping[str, Any]) -> int | None:
    if family in ("mistral", "mixtral", "phi3") or fields.get("use_sliding_window"):
        found: int | None = fields.get("sliding_window")
        return found
    return None


def _biases(family: str, fields: Mapping[str, Any], hidden: int, queries: int, keys: int) -> int:
    if family == "qwen2":
        return queries + 2 * keys
    if fields.get("attention_bias"):
        return queries + 2 * keys + hidden
    return 0
