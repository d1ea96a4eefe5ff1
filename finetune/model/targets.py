"""Chooses the linear layers that get an adapter, each by its full path, and says why the others get none."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from finetune.errors import ConfigError, Problem
from finetune.model.forward import base_model, decoder_of
from finetune.model.layers import experts_of, has_adapter, linear_layers, why_not_plain
from finetune.model.names import ALL_LINEAR, matches, why_no_expression

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import nn

    from finetune.config.settings import AdapterConfig

_EXCLUDED, _NOT_NAMED, _HEAD = "left out by --exclude", "not named by --targets", "the head"
_OUTSIDE = "outside the language model, which is all that text runs through"
_SAVED_WHOLE = re.compile(r"\.(?:original_module$|modules_to_save\.)")
_CROSS = re.compile(r"\.(?:encoder_attn|encdec_attn|crossattention|cross_attn|cross_attention)\.")
_MODALITY = re.compile(r"(?:^|_)(?:visual|vision|image|video|audio|speech|multi_?modal)(?:_|$)")
_UNUSED = "attends to what another model has seen, and text alone has none"


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """The linear layers of a model, by path."""

    adapted: tuple[str, ...]
    """The layers that get an adapter, or have one."""
    left: Mapping[str, str]
    """The layers that get no adapter, with the reason."""
    experts: tuple[str, ...]
    """Modules whose experts are parameters and not linear layers. They get no adapter either."""

    def lines(self) -> tuple[str, ...]:
        """Return the lines for the user: one for the adapter, and one for each reason to leave layers without one."""
        reasons: dict[str, list[str]] = {}
        for path, reason in self.left.items():
            reasons.setdefault(reason, []).append(path)
        if self.experts:
            reasons["experts fused into parameters, which are no linear layers"] = list(self.experts)
        told = [f"adapter on {_counted(self.adapted)}"]
        told += [f"no adapter on {_counted(paths)}: {reason}" for reason, paths in reasons.items()]
        return tuple(told)


def choose(model: nn.Module, config: AdapterConfig) -> Coverage:
    """Choose the layers of a base that get an adapter.

    Args:
        model: a causal language model without adapter.
        config: ``targets`` and ``exclude`` are used. Each is a list of names of layers or of modules around layers. A
            name stands for one or several parts of a path (``q_proj``, ``mlp``, ``layers.0``). A name with characters
            that no path has is a regular expression over the whole path.

    Raises:
        ConfigError: a name matches no linear layer, or none that can have an adapter; or no layer is left.
    """
    reasons = _unfit(model)
    paths = [path for path, _ in linear_layers(model)]
    named = [target for target in config.targets if target != ALL_LINEAR]
    for field, names in (("targets", named), ("exclude", config.exclude)):
        for name in names:
            matched = [path for path in paths if matches(name, path)]
            if not matched:
                raise _unknown(field, name, [path for path in paths if reasons.get(path) is None] or paths)
            why = {reasons.get(path) for path in matched}
            if field == "targets" and None not in why:
                raise ConfigError(
                    Problem(
                        field=field,
                        value=name,
                        why=f"no such layer can have an adapter: {'; '.join(sorted(filter(None, why)))}",
                        remedy="use all-linear, or name other layers",
                    )
                )
    for path in paths:
        if any(matches(name, path) for name in config.exclude):
            reasons.setdefault(path, _EXCLUDED)
        elif ALL_LINEAR not in config.targets and not any(matches(name, path) for name in named):
            reasons.setdefault(path, _NOT_NAMED)
    adapted = tuple(path for path in paths if path not in reasons)
    if not adapted:
        raise ConfigError(
            Problem(
                field="exclude" if config.exclude else "targets",
                value=config.exclude or config.targets,
                why="no linear layer is left that an adapter could be put on",
                remedy="leave fewer layers out" if config.exclude else "train it whole, with --full --precision bf16",
            )
        )
    return Coverage(adapted=adapted, left=_in_order(paths, reasons), experts=_experts(model))


def coverage(model: nn.Module, config: AdapterConfig) -> Coverage:
    """Return the result of :func:`choose`, read from a model that has its adapter."""
    base = base_model(model)
    layers = dict(linear_layers(base))
    reasons = _unfit(base)
    adapted = tuple(path for path, layer in layers.items() if has_adapter(layer))
    left = {}
    for path in layers:
        if path not in adapted:
            excluded = any(matches(name, path) for name in config.exclude)
            left[path] = reasons.get(path, _EXCLUDED if excluded else _NOT_NAMED)
    return Coverage(adapted=adapted, left=left, experts=_experts(base))


def _unfit(base: nn.Module) -> dict[str, str]:
    """Return the linear layers that cannot have an adapter, whatever the settings say."""
    model = base_model(base)
    head, decoder = model.get_output_embeddings(), decoder_of(model)
    plain = why_not_plain(model)
    inside = next((f"{name}." for name, module in model.named_modules() if module is decoder and name), "")
    words = model.get_input_embeddings()
    parts = {
        name: child
        for name, child in (decoder or model).named_children()
        if not any(module is words for module in child.modules())
    }
    senses = [name for name, child in parts.items() if _sees_or_hears(child)]
    if senses:  # a layer that converts images or sound for the text is known by its name only
        senses += [name for name in parts if _MODALITY.search(name)]
    foreign = tuple(f"{inside}{name}." for name in senses)
    reasons = {}
    for path, layer in linear_layers(model):
        if _SAVED_WHOLE.search(path) is not None:
            reasons[path] = "trained whole, as modules_to_save of the adapter says"
        elif layer is head:
            reasons[path] = _HEAD
        elif not path.startswith(inside) or path.startswith(foreign):
            reasons[path] = _OUTSIDE
        elif _CROSS.search(path) is not None:
            reasons[path] = _UNUSED
        elif ".indexer." in path:
            reasons[path] = "chooses what attention looks at, and no gradient goes through a choice"
        elif ".patcher." in path:
            reasons[path] = "chooses which bytes belong together, and no gradient goes through a choice"
        elif ".pooler." in f".{path}.":
            reasons[path] = "a pooler, which the logits do not depend on"
        elif path in plain:
            reasons[path] = plain[path]
    return reasons


def _sees_or_hears(part: nn.Module) -> bool:
    """Return whether a part of a model is for images or sound, because it contains a model that reads no text."""
    modalities = (getattr(module, "input_modalities", "text") for module in part.modules())
    return any(isinstance(kinds, (str, tuple, list)) and "text" not in kinds for kinds in modalities)


def _experts(model: nn.Module) -> tuple[str, ...]:
    return tuple(path for path, _ in experts_of(model))


def _in_order(paths: list[str], reasons: Mapping[str, str]) -> dict[str, str]:
    return {path: reasons[path] for path in paths if path in reasons}


def _unknown(field: str, name: str, paths: list[str]) -> ConfigError:
    """Return the error for a name that no layer has; ``paths`` are the layers that can have an adapter."""
    short = sorted({part for path in paths for part in path.split(".") if not part.isdigit()})
    last = sorted({path.rpartition(".")[2] for path in paths} - {str(n) for n in range(len(paths))})
    near = difflib.get_close_matches(name.lower(), sorted({part.lower() for part in short}), n=3)
    meant = [part for word in near for part in short if part.lower() == word]
    why = "the model has no linear layer of that name" + (f"; did you mean {', '.join(meant)}?" if meant else "")
    if wrong := why_no_expression(name):
        why = f"no regular expression: {wrong}"
    return ConfigError(
        Problem(
            field=field,
            value=name,
            why=why,
            remedy=f"use {'all-linear, or ' if field == 'targets' else ''}one of {', '.join(last)}",
        )
    )


def _counted(paths: Iterable[str]) -> str:
    """Return the paths without the layers' numbers, each with the number of paths that it stands for."""
    kinds = Counter(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", path) for path in paths)
    return ", ".join(kind if count == 1 else f"{kind} ({count})" for kind, count in kinds.items())
