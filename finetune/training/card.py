"""Writes README.md of the result: what it is, how to load it, its figures, and the settings that reproduce it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finetune.config import yaml_file
from finetune.config.settings import QUANTIZED
from finetune.disk.run_log import clock

if TYPE_CHECKING:
    from finetune.config.settings import RunConfig

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The figures of a run, as ``summary.json`` keeps them."""

    adapter: str
    """Folder of the result."""
    merged: str | None
    """Folder of the merged model."""
    merged_into: str | None
    """What the adapter was merged into: quantized-base or full-base."""
    steps: int
    """Number of optimizer steps."""
    tokens: int
    """Number of tokens that went through the model in training."""
    targets: int
    """Number of tokens that the training loss was taken on."""
    train_seconds: float
    """Time in training steps, those before an interruption included."""
    tokens_per_second: float
    """``tokens / train_seconds``."""
    train_loss: float | None
    """Training loss of the last step, in nats per target."""
    held_out_loss_before: float | None
    """Held-out loss before the first step, in nats per target; None without held-out rows."""
    held_out_loss_after: float | None
    """Held-out loss after the last step, in nats per target; None without held-out rows."""
    held_out_targets: int
    """Number of held-out tokens that the loss is taken on."""
    question: str | None
    """The question that was asked before and after training."""
    answer_before: str | None
    """The answer of the base model."""
    answer_after: str | None
    """The answer of the fine-tuned model."""
    peak_rss_bytes: int
    """Largest resident set of the process that finished the run."""
    peak_allocated_bytes: int | None
    """Largest allocation on the GPU; None on a CPU."""
    trained_parameters: int
    """How many numbers were trained."""
    adapter_bytes: int
    """Size of the result's weights on disk."""
    device: str
    """Kind of device."""
    threads: int
    """Number of CPU threads."""
    versions: dict[str, str]
    """Versions of the packages that computed."""
    settings: dict[str, Any]
    """Every setting of the run."""
    layers: tuple[str, ...] = ()
    """Lines that say which layers got an adapter, and which got none and why; empty if all weights were trained."""


def model_card(summary: Summary, config: RunConfig, *, merged: bool) -> str:
    """Return the model card, in the hub's format.

    Args:
        summary: the run's figures.
        config: the run's settings.
        merged: write the card of the merged model instead of the adapter's.
    """
    whole = merged or config.adapter.full
    head = ["---", f"library_name: {'transformers' if whole else 'peft'}", "pipeline_tag: text-generation"]
    if _HUB_NAME.fullmatch(config.model.model):
        head.append(f"base_model: {config.model.model}")
    parts = [
        "\n".join([*head, "---"]),
        f"# {config.model.model}, fine-tuned on {config.data.data}",
        _kind(summary, config, merged=merged),
        f"```python\n{_USE_WHOLE if whole else _use_adapter(config)}\n```",
        "## Figures\n\n| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in _figures(summary)),
    ]
    if summary.question is not None:
        turns = (("Question", summary.question), ("Before", summary.answer_before), ("After", summary.answer_after))
        parts.append("## One answer\n\n" + "\n\n".join(f"**{name}:** {one_line(text)}" for name, text in turns))
    if summary.layers:
        parts.append("## Layers\n\n" + "\n".join(f"* `{line}`" for line in summary.layers))
    parts.append(f"## Settings\n\n```yaml\n{yaml_file.dump(config).rstrip()}\n```")
    return "\n\n".join(parts) + "\n"


def one_line(text: str | None) -> str:
    """Return an answer on one line; "(nothing)" if it is empty."""
    return " ".join((text or "").split()) or "(nothing)"


_USE_WHOLE = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained("."), AutoTokenizer.from_pretrained(".")"""


def _use_adapter(config: RunConfig) -> str:
    chosen = (
        f"model={config.model.model!r}, precision={config.model.precision!r}, double_quant={config.model.double_quant}"
    )
    return (
        "from finetune.config.settings import ModelConfig\nfrom finetune.model.adapters import load_adapter\n"
        "from finetune.model.load import load_base\n\n"
        f"base = load_base(ModelConfig({chosen}))  # the weights that were trained on\n"
        'model = load_adapter(base, ".")'
    )


def _kind(summary: Summary, config: RunConfig, *, merged: bool) -> str:
    made = "Made with `python -m finetune.qlora`."
    if config.adapter.full:
        return f"All weights were trained. {made}"
    adapter = f"LoRA adapter (rank {config.adapter.rank}, alpha {config.adapter.alpha:g})"
    if not merged:
        return f"A {adapter} on a base in {config.model.precision}. {made}"
    if config.model.precision not in QUANTIZED:
        return f"A {adapter}, merged into the weights that it was trained on. {made}"
    base = {
        "quantized-base": "the dequantized weights that it was trained on: the trained model, up to rounding",
        "full-base": (
            "the original weights. It was trained on top of quantized ones and has learned to make up for their error, "
            "which is not there any more: evaluate this model before you use it"
        ),
    }
    return f"A {adapter}, merged into the {summary.merged_into}: {base[summary.merged_into or '']}. {made}"


def _figures(summary: Summary) -> list[tuple[str, str]]:
    return [
        ("optimizer steps", f"{summary.steps:,}"),
        ("tokens", f"{summary.tokens:,} ({summary.targets:,} with loss)"),
        ("held-out loss before", _figure(summary.held_out_loss_before)),
        ("held-out loss after", _figure(summary.held_out_loss_after)),
        ("trained parameters", f"{summary.trained_parameters:,}"),
        ("training time", f"{clock(summary.train_seconds)} ({summary.tokens_per_second:,.0f} tokens/s)"),
        ("device", f"{summary.device}, {summary.threads} CPU threads"),
        ("versions", ", ".join(f"{name} {version}" for name, version in summary.versions.items())),
    ]


def _figure(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4f} nats a token"
