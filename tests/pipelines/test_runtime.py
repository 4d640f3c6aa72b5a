"""Device and dtype choices."""

from __future__ import annotations

import pytest
import torch

from elastic3d.errors import UserError
from elastic3d.pipelines.runtime import fast_bfloat16, resolve_device, resolve_dtype
from elastic3d.utils.devices import DeviceChoice, DTypeChoice

CPU = torch.device("cpu")


def test_auto_takes_the_best_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert resolve_device("auto") == resolve_device(DeviceChoice.auto) == CPU
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert resolve_device().type == "mps"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device().type == "cuda"


@pytest.mark.parametrize(("count", "name"), [(0, "cuda"), (1, "cuda:1")])
def test_a_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch, count: int, name: str) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    with pytest.raises(UserError, match=f"device is {name}, but PyTorch sees {count} CUDA devices"):
        resolve_device(name)


def test_unknown_device() -> None:
    with pytest.raises(UserError, match="device is 'gpu', expected auto, cpu, cuda or mps"):
        resolve_device("gpu")


@pytest.mark.parametrize(
    ("capabilities", "fast"), [({}, False), ({"amx_bf16": True}, True), ({"avx512_bf16": True}, True)]
)
def test_bf16_where_the_cpu_multiplies_it(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], fast: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert fast_bfloat16(CPU) is fast
    assert resolve_dtype("auto", CPU) is (torch.bfloat16 if fast else torch.float32)


def test_explicit_dtypes() -> None:
    assert resolve_dtype(DTypeChoice.bfloat16, CPU) is torch.bfloat16
    assert resolve_dtype(torch.float32, CPU) is torch.float32
    assert resolve_dtype("float16", torch.device("cuda")) is torch.float16
    with pytest.raises(UserError, match="float16, which a CPU"):
        resolve_dtype("float16", CPU)
    with pytest.raises(UserError, match="dtype is 'half', expected one of auto, float32"):
        resolve_dtype("half", CPU)
