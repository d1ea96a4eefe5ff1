"""Every tensor that bitsandbytes keeps beside a weight is found, however the weight is quantized."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pytest_vram.probe.quantization import quantization_constants


def names(weight: Any, tensors: dict[str, torch.Tensor]) -> list[str]:
    by_id = {id(tensor): name for name, tensor in tensors.items()}
    return [by_id[id(tensor)] for tensor in quantization_constants(weight)]


def test_a_plain_tensor_has_none() -> None:
    assert list(quantization_constants(torch.zeros(2))) == []
    assert list(quantization_constants(torch.nn.Parameter(torch.zeros(2)))) == []
    assert list(quantization_constants(None)) == []


def test_the_scales_of_scales_are_followed() -> None:
    tensors = {name: torch.zeros(1) for name in ("absmax", "code", "offset", "absmax2", "code2", "SCB")}
    inner = SimpleNamespace(absmax=tensors["absmax2"], code=tensors["code2"], offset=None, state2=None)
    state = SimpleNamespace(
        absmax=tensors["absmax"], code=tensors["code"], offset=tensors["offset"], state2=inner, nested=True
    )
    expected = ["absmax", "code", "offset", "absmax2", "code2"]
    assert names(state, tensors) == expected
    assert names(SimpleNamespace(quant_state=state), tensors) == expected
    assert names(SimpleNamespace(quant_state=None, SCB=tensors["SCB"]), tensors) == ["SCB"]
    assert names(SimpleNamespace(SCB=tensors["SCB"], CB=torch.zeros(1)), tensors) == ["SCB"]
    assert names(SimpleNamespace(SCB=None), tensors) == []


@pytest.mark.parametrize("double", [False, True])
def test_a_weight_of_bitsandbytes_is_decoded_from_what_is_found(double: bool) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(64, 64, bias=False, quant_type="nf4", compress_statistics=double).to("cpu")
    found = list(quantization_constants(layer.weight))
    state = layer.weight.quant_state
    assert len(found) == (5 if double else 2)
    assert {id(state.absmax), id(state.code)} <= {id(tensor) for tensor in found}
    assert len({id(tensor) for tensor in found}) == len(found)


def test_a_weight_in_8_bits_has_its_scales() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear8bitLt(32, 16, bias=False, has_fp16_weights=False).to("cpu")
    found = [*quantization_constants(layer.weight), *quantization_constants(layer.state)]
    assert [tensor.shape for tensor in found] == [(16,)]


class AnswersToAll:
    """Like a mock: has an object of its kind under each name. It gives up where a mock goes on for ever."""

    def __init__(self, depth: int = 0) -> None:
        self._depth = depth

    def __getattr__(self, name: str) -> Any:
        assert self._depth < 9, "followed without end"
        return AnswersToAll(self._depth + 1)


@pytest.mark.parametrize("foreign", [AnswersToAll(), SimpleNamespace(code=torch.zeros(1), offset=torch.zeros(1))])
def test_a_state_of_another_library_is_not_followed(foreign: Any) -> None:
    assert list(quantization_constants(foreign)) == []
    assert list(quantization_constants(SimpleNamespace(quant_state=foreign))) == []
