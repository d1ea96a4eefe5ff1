"""Write a checkpoint whose weights are all zero, so that a program can load a model without downloading it.

The files are sparse, so the zeros take no disk space. ``from_pretrained`` maps safetensors into memory, so they take
memory only when something reads them, and the dry GPU does not copy large tensors.
"""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_vram.errors import VramUsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import torch
    from transformers import PretrainedConfig, PreTrainedModel

SHARD_BYTES = 5 * 10**9
"""The size at which the Hugging Face hub splits checkpoints into files."""

_DTYPE_NAMES = {
    "torch.float64": "F64",
    "torch.float32": "F32",
    "torch.float16": "F16",
    "torch.bfloat16": "BF16",
    "torch.float8_e4m3fn": "F8_E4M3",
    "torch.float8_e5m2": "F8_E5M2",
    "torch.int64": "I64",
    "torch.int32": "I32",
    "torch.int16": "I16",
    "torch.int8": "I8",
    "torch.uint8": "U8",
    "torch.bool": "BOOL",
}


def empty_checkpoint(
    config: PretrainedConfig | Mapping[str, Any] | str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write the folder of a model whose weights are all zero, and return it.

    The tensors have the names, shapes and types that ``save_pretrained`` would write: tied weights once, and fused
    experts one by one. The files are sparse: a checkpoint of 14 GB takes some hundred kilobytes of disk.

    Args:
        config: a transformers configuration, a mapping of its fields (with ``model_type``), a ``config.json``, or the
            folder with one.
        path: the folder to write, created if necessary. An earlier checkpoint in it is replaced.
        dtype: type of the weights; ``None`` takes that of the configuration, or float32 if it has none.
        shard_bytes: the most bytes of tensors in one file.

    Raises:
        VramUsageError: ``config`` is not a configuration, or it describes a model that is already quantized; or
            transformers, which knows the tensors of a model, is not installed.
    """
    settings = _read_config(config)
    if getattr(settings, "quantization_config", None):
        raise VramUsageError(
            f"the configuration of this {settings.model_type} model is quantized already: leave quantization_config out"
            " of it, and hand it to from_pretrained, which then quantizes while loading"
        )
    model = _model_without_memory(settings, dtype)
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("model*.safetensors*"):
        old.unlink()
    shards = _shards(_saved_tensors(model).items(), shard_bytes)
    if len(shards) == 1:
        _write_sparse(folder / "model.safetensors", shards[0])
    else:
        _write_index(folder, shards)
    model.config.architectures = [type(model).__name__]
    setattr(model.config, _type_field(), str(model.dtype).removeprefix("torch."))
    model.config.save_pretrained(folder)
    return folder


def _read_config(config: PretrainedConfig | Mapping[str, Any] | str | os.PathLike[str]) -> PretrainedConfig:
    try:
        from transformers import AutoConfig, PretrainedConfig
    except ModuleNotFoundError as error:
        raise VramUsageError(
            "transformers knows the tensors of a model, and it is not installed here: pip install transformers"
        ) from error
    if isinstance(config, PretrainedConfig):
        return config
    if isinstance(config, str | os.PathLike):
        found = Path(config)
        file = found / "config.json" if found.is_dir() else found
        if not file.is_file():
            raise VramUsageError(f"{os.fspath(config)!r} is neither a config.json nor a folder with one")
        return _read_config(json.loads(file.read_text()))
    fields: dict[str, Any] = {**config}
    model_type = fields.pop("model_type", None)
    if model_type is None:
        raise VramUsageError(f"the configuration has no model_type; its fields are {', '.join(sorted(fields))}")
    try:
        return AutoConfig.for_model(model_type, **fields)
    except ValueError as error:
        raise VramUsageError(f"model_type {model_type!r}: {error}") from error


def _model_without_memory(config: PretrainedConfig, dtype: torch.dtype | str | None) -> PreTrainedModel:
    import torch
    import transformers

    chosen = dtype if dtype is not None else getattr(config, _type_field(), None) or torch.float32
    resolved = getattr(torch, chosen.removeprefix("torch.")) if isinstance(chosen, str) else chosen
    named = [getattr(transformers, name, None) for name in getattr(config, "architectures", None) or ()]
    with torch.device("meta"):
        for model_class in named:
            if model_class is not None:
                return model_class._from_config(config, **{_type_field(): resolved})
        automatic: Any = transformers.AutoModelForCausalLM
        return automatic.from_config(config, **{_type_field(): resolved})


def _type_field() -> str:
    """Return what transformers calls the type of the weights; before 4.56 that was ``torch_dtype``."""
    import transformers

    major, minor = transformers.__version__.split(".")[:2]
    return "dtype" if (int(major), int(minor)) >= (4, 56) else "torch_dtype"


def _saved_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return the tensors that ``save_pretrained`` would write, on the meta device."""
    seen: dict[int, str] = {}
    tensors: dict[str, torch.Tensor] = {}
    tied = set(model.all_tied_weights_keys or ()) if hasattr(model, "all_tied_weights_keys") else set()
    for name, tensor in sorted(model.state_dict(keep_vars=True).items(), key=lambda item: (item[0] in tied, item[0])):
        if id(tensor) not in seen:
            seen[id(tensor)] = name
            tensors[name] = tensor.detach()
    for name in model._keys_to_ignore_on_save or ():
        tensors.pop(name, None)
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # transformers 4 keeps the checkpoint's own layout in memory
        return tensors
    return dict(revert_weight_conversion(model, tensors))


def _shards(tensors: Iterable[tuple[str, torch.Tensor]], limit: int) -> list[dict[str, torch.Tensor]]:
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for name, tensor in tensors:
        if shards[-1] and size + tensor.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    return shards


def _write_index(folder: Path, shards: list[dict[str, torch.Tensor]]) -> None:
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_sparse(folder / file, shard)
        weight_map.update(dict.fromkeys(shard, file))
    total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _write_sparse(file: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a safetensors file of zeros: the header's length in 8 bytes, the header in JSON, then the data.

    The format is described at github.com/huggingface/safetensors.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        kind = _DTYPE_NAMES.get(str(tensor.dtype))
        if kind is None:
            raise VramUsageError(f"{name} has type {tensor.dtype}, which safetensors files cannot hold")
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        out.truncate(8 + len(text) + end)
