"""Whether something fits in this machine, before anything of it is allocated."""

from __future__ import annotations

import psutil
import torch

from elastic3d.errors import UserError

GB = 1e9


def machine_memory() -> int:
    """Bytes of main memory, or of the largest GPU where it has more."""
    found = [psutil.virtual_memory().total]
    if torch.cuda.is_available():
        found += [torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())]
    return max(found)


def require_memory(need: float, what: str) -> None:
    """UserError if `need` bytes are more than this machine has at all; `what` needs them."""
    there = machine_memory()
    if need > there:
        raise UserError(
            f"{what} at least {_amount(need)} of memory, expected at most {_amount(there)}, which this machine has"
        )


def _amount(size: float) -> str:
    return f"{size / GB:,.3g} GB" if size < 1e15 else f"{size / 1e12:.3g} TB"
