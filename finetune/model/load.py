"""Loads the base as configured, freezes it, and attaches the adapter. Nothing is upcast unless the user asks for it."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from finetune.config.settings import EMBEDDED_MODEL, QUANTIZED
from finetune.errors import ConfigError, FinetuneError, MissingModelError, ModelError, Problem
from finetune.model import adapters, parts
from finetune.model.embeddings import new_token_rows, resize_embeddings
from finetune.model.forward import COMPUTE_DTYPE_ATTRIBUTE
from finetune.model.gguf import converted, embedded_file
from finetune.model.installed import require_bitsandbytes
from finetune.model.load_errors import explained
from finetune.model.settle import stored_precision
from finetune.model.targets import choose
from finetune.model.whole import damage, require_quantized, require_weights
from finetune.patches.transformers import keep_scale, unwarmed
from pytest_vram.process_memory import give_back_freed

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from finetune.config.settings import AdapterConfig, ModelConfig

_NO_CODE: dict[str, Any] = {"trust_remote_code": False}
"""Without it, transformers asks at the terminal whether to run a model's own code."""
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def resolve_device(config: ModelConfig) -> torch.device:
    """Return the device to train on.

    Raises:
        ConfigError: a GPU is asked for and there is none.
    """
    present = torch.cuda.is_available()
    if config.device == "cuda" and not present:
        raise ConfigError(
            Problem(
                field="device",
                value="cuda",
                why="this PyTorch sees no GPU",
                remedy="use --device auto, or `--dry-run --gpu CARD` to see what the run needs",
            )
        )
    if config.device == "cpu" or not present:
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def resolve_dtype(config: ModelConfig, device: torch.device) -> torch.dtype:
    """Return the dtype of activations.

    ``auto`` means the dtype that an unquantized base is stored in. For a quantized base it means the best dtype
    that the device supports.
    """
    if config.compute_dtype != "auto":
        return DTYPES[config.compute_dtype]
    if config.precision not in QUANTIZED:
        return DTYPES[config.precision]
    if device.type == "cpu":
        return torch.float32  # 16-bit arithmetic is emulated on most CPUs
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def resolve_path(config: ModelConfig) -> str:
    """Return the folder or hub name that transformers loads from. For an adapter, it is that of its base.

    Raises:
        ModelError: a path does not exist, or the embedded model's wheel is not installed.
    """
    if adapters.is_adapter(config.model):
        base = adapters.base_of(config.model)
        try:
            return resolve_path(dataclasses.replace(config, model=base))
        except MissingModelError as error:
            raise ModelError(
                f"model = {config.model!r}: the base {base!r} that its {adapters.CONFIG_FILE} names is not here "
                f"({error}). Write where the base is into its base_model_name_or_path"
            ) from None
    if config.model == EMBEDDED_MODEL:
        return str(converted(embedded_file()))
    path = Path(config.model).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise MissingModelError(
                f"model = {config.model!r}: no such file. Name a folder, a .gguf file or a hub model"
            )
        return str(converted(path))
    if path.is_dir():
        return str(path)
    if path.exists() or config.model.startswith((".", "/", "~")) or config.model.count("/") > 1:
        raise MissingModelError(
            f"model = {config.model!r}: {'a file' if path.exists() else 'no such folder'}. A model is a folder, a "
            ".gguf file or a hub name"
        )
    return config.model


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """Load the model's tokenizer. If it has no padding token, its end-of-sequence token becomes one.

    Raises:
        ModelError: there is no tokenizer, or it cannot be read.
    """
    from transformers import AutoTokenizer

    own = Path(config.model).expanduser()
    beside = adapters.is_adapter(config.model) and (own / "tokenizer_config.json").is_file()
    tokenizer: PreTrainedTokenizerBase = _loading(
        config, lambda path: AutoTokenizer.from_pretrained(str(own) if beside else path, **_NO_CODE)
    )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def load_config(config: ModelConfig) -> PretrainedConfig:
    """Load the model's configuration, without its weights."""
    from transformers import AutoConfig

    found: PretrainedConfig = _loading(config, lambda path: AutoConfig.from_pretrained(path, **_NO_CODE))
    return found


def load_base(config: ModelConfig) -> PreTrainedModel:
    """Load the base, frozen, on its device and in evaluation mode.

    Linear layers (and a mixture's fused experts) are stored as ``config.precision`` says, layer by layer while loading.
    Embeddings, norms and head are stored in the compute dtype. The head, routers, and layers whose weight a fused
    kernel reads are never quantized. A folder that bitsandbytes has quantized already is loaded as it is.

    With ``config.shard`` each rank keeps its part of every quantized weight, and weights that are not quantized stay on
    the CPU. With ``config.offload_base`` the parts are in host memory. :func:`finetune.training.sharded.spread` has to
    be called before the model runs.

    Raises:
        ConfigError: precision and compute dtype do not go together, there is no GPU where one is asked for, or a folder
            that is quantized already is to be sharded.
        ModelError: the model cannot be loaded as configured; the message says what would work.
    """
    from transformers import AutoModelForCausalLM

    device = resolve_device(config)
    compute = resolve_dtype(config, device)
    stored = stored_precision(config)
    settings = _how_to_load(config, stored, device, compute)
    if stored is not None:
        config = dataclasses.replace(config, precision=stored)
    with (
        parts.kept(wanted=config.shard, on_host=config.offload_base),
        unwarmed() if config.shard else contextlib.nullcontext(),
    ):
        model, found = _loading(
            config,
            lambda path: AutoModelForCausalLM.from_pretrained(
                path, output_loading_info=True, ignore_mismatched_sizes=True, **settings
            ),
            weights=True,
        )
    require_weights(model, found, config.model)
    if stored is not None:
        require_quantized(model, config.model, stored)
    model.requires_grad_(False)
    if config.resize_embeddings:
        resize_embeddings(model, len(load_tokenizer(config)))
    model.config.use_cache = False
    keep_scale(model)
    if stored in ("nf4", "fp4"):
        from finetune.model.experts import refuse_misread_layers

        refuse_misread_layers(model, settings["device_map"])
    if config.precision in QUANTIZED:
        from finetune.patches.bitsandbytes import keep_no_inputs, keep_weights_unpacked

        keep_weights_unpacked(model)
        if config.precision == "int8":
            keep_no_inputs(model)
    if config.precision in QUANTIZED and device.type == "cpu":
        _let_go_of_the_file(model)
    if config.precision not in QUANTIZED and settings["dtype"] != compute:
        setattr(model, COMPUTE_DTYPE_ATTRIBUTE, compute)
    loaded: PreTrainedModel = model
    return loaded


def _how_to_load(config: ModelConfig, stored: str | None, device: torch.device, compute: torch.dtype) -> dict[str, Any]:
    """Return the arguments of ``from_pretrained``. ``stored`` is the precision of a base that is quantized already.

    Raises:
        ConfigError: precision and compute dtype do not go together, or a folder that is quantized already is sharded.
    """
    # Weights that are spread over ranks as they are go to the card one layer at a time, when they are sharded.
    where = "cpu" if config.shard and config.precision not in QUANTIZED else str(device)
    settings: dict[str, Any] = {"device_map": {"": where}, "use_safetensors": True, **_NO_CODE}
    if config.attention != "auto":
        settings["attn_implementation"] = config.attention
    settings["dtype"] = DTYPES.get(config.precision, compute)
    if stored is not None and config.shard:
        raise ConfigError(
            Problem(
                field="shard",
                value=True,
                why=f"{config.model} is stored in {stored} already, and would be loaded whole on every card",
                remedy="name the model in 16 bits, which is quantized while it is loaded, or use --no-shard",
            )
        )
    if stored is not None:
        settings |= {"dtype": compute, "config": _computing_in(load_config(config), compute)}
    elif config.precision in QUANTIZED:
        settings["quantization_config"] = _quantization(config, compute)
    elif settings["dtype"] not in (compute, torch.float32):
        raise ConfigError(
            Problem(
                field="compute_dtype",
                value=config.compute_dtype,
                why=f"the base is stored in {config.precision}, which cannot compute in it",
                remedy=f"use --compute-dtype auto or {config.precision}, or --precision fp32",
            )
        )
    return settings


def attach_adapter(model: PreTrainedModel, config: AdapterConfig, *, seed: int, saved: str | None = None) -> nn.Module:
    """Attach a LoRA adapter to the base's linear layers. With ``config.full``, make all weights trainable instead.

    Args:
        model: the base that :func:`load_base` returns.
        config: the settings of the adapter.
        seed: the seed of its initial weights. The state of the global generators does not change.
        saved: the model's name. If it is the folder of an adapter, that adapter is attached as it was saved.

    Returns:
        A ``PeftModel``; with ``config.full`` the model itself.

    Raises:
        ConfigError: no layer has a target's name, or the settings ask to train a quantized base in full.
        ModelError: the saved adapter does not belong to this base.
    """
    if config.full:
        freed: nn.Module = _free(model)
        return freed
    from peft import LoraConfig, get_peft_model

    from finetune.patches.peft import as_named, make_precise, start_magnitudes

    again = saved is not None and adapters.is_adapter(saved)
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=[] if again else list(choose(model, config).adapted),
        lora_dropout=config.dropout,
        use_rslora=config.rslora,
        use_dora=config.dora,
        init_lora_weights="gaussian" if config.init == "gaussian" else True,
        trainable_token_indices=new_token_rows(model),
        task_type="CAUSAL_LM",
    )
    dtype, device = adapter_dtype(model, config), model.get_input_embeddings().weight.device
    cuda = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(seed)
        if again:
            adapted: Any = adapters.load_adapter(model, saved or "", trainable=True, dropout=config.dropout)
        else:
            with as_named():
                adapted = get_peft_model(model, lora, autocast_adapter_dtype=False)
        if config.init == "orthogonal":
            _start_orthogonal(adapted, config.rank)
    for parameter in adapted.parameters():
        if parameter.requires_grad and (parameter.dtype, parameter.device) != (dtype, device):
            parameter.data = parameter.data.to(device, dtype)  # peft puts it where the layer's weight is
    if config.dora:
        make_precise(adapted)
        if not again:
            start_magnitudes(adapted)
    if again:
        adapters.restore(adapted, saved or "")
    return cast("nn.Module", adapted)


def adapter_dtype(model: PreTrainedModel, config: AdapterConfig) -> torch.dtype:
    """Return the dtype of the adapter: as configured; for ``auto`` bf16 if the base computes in bf16, otherwise fp32.

    ``auto`` never means fp16, whose range is too small for an optimizer's updates.
    """
    if config.adapter_dtype != "auto":
        return DTYPES[config.adapter_dtype]
    compute = getattr(model, COMPUTE_DTYPE_ATTRIBUTE, None) or model.get_input_embeddings().weight.dtype
    return torch.bfloat16 if compute == torch.bfloat16 else torch.float32


def _quantization(config: ModelConfig, compute: torch.dtype) -> Any:
    require_bitsandbytes("precision", config.precision, instead="bf16")
    from finetune.model.experts import EightBitConfig, FourBitConfig
    from finetune.patches.bitsandbytes import silence_casts

    if config.precision == "int8":
        silence_casts()
        return EightBitConfig()
    return FourBitConfig(
        bnb_4bit_quant_type=config.precision,
        bnb_4bit_use_double_quant=config.double_quant,
        bnb_4bit_compute_dtype=compute,
    )


def _computing_in(found: PretrainedConfig, compute: torch.dtype) -> PretrainedConfig:
    """Return the configuration of a quantized model, with the run's compute dtype set for its 4-bit layers."""
    stored = found.quantization_config
    fields = stored if isinstance(stored, dict) else stored.to_dict()
    found.quantization_config = fields | {"bnb_4bit_compute_dtype": str(compute).removeprefix("torch.")}
    return found


def _let_go_of_the_file(model: nn.Module) -> None:
    """Copy the weights that are not quantized out of the memory-mapped checkpoint.

    A single embedding that is a view of the file keeps every page resident that was read while loading, even the pages
    of weights that are quantized now. That is 0.4 GiB for a model of 135 million parameters.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.clone()
    give_back_freed()


def _loading(config: ModelConfig, load: Callable[[str], Any], *, weights: bool = False) -> Any:
    """Call ``load`` with the model's path, and turn its errors into messages that name the setting and the remedy.

    Args:
        config: names the model.
        load: is called with the path or hub name.
        weights: whether ``load`` reads the weights too, so that they may be what is damaged.
    """
    path = resolve_path(config)
    try:
        return load(path)
    except (FinetuneError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of any type: a config.json with a wrong value fails wherever the value is used
        folder = Path(path) if Path(path).is_dir() else None
        base = f" (the base of the adapter {config.model})" if path != config.model else ""
        known = any(words in str(error) for words in ("trust_remote_code", "for this kind of AutoModel"))
        if folder and not known and (found := damage(folder, weights=weights)):
            raise ModelError(f"model = {path!r}{base}: {found}") from error
        said, remedy = explained(error, lambda: str(load_config(config).model_type))
        gone = isinstance(error, OSError) and folder is None and "gated" not in str(error)
        raise (MissingModelError if gone else ModelError)(
            f"model = {path!r}{base}: cannot be loaded: {said} - {remedy}"
        ) from error


def _free(model: PreTrainedModel) -> PreTrainedModel:
    if getattr(model, "hf_quantizer", None) is not None:
        raise ConfigError(
            Problem(
                field="full",
                value=True,
                why="a quantized base cannot be trained",
                remedy="use --precision bf16 or fp32, or leave --full out",
            )
        )
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return model


@torch.no_grad()
def _start_orthogonal(adapted: nn.Module, rank: int) -> None:
    """Draw A and B that are not zero, with B A = 0 (https://datta0.github.io/posts/rethink-lora-init/).

    The rank has to be even. peft's own code draws in the dtype of the base weight, which fails for a quantized base.
    """
    for name, a in adapted.named_parameters():
        if "lora_A" in name:
            b = adapted.get_parameter(name.replace("lora_A", "lora_B"))
            basis = torch.linalg.qr(torch.randn(rank, rank)).Q
            a.copy_((torch.randn(a.shape[1], rank // 2) @ basis[0::2]).T / 10.0)
            b.copy_(torch.randn(b.shape[0], rank // 2) @ basis[1::2] / 10.0)
