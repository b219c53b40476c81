"""A device that no backend was made for, with numbers: torch's third-party device ("npu" here) written in Python over CPU
tensors. As on MPS there is no float64, and only torch's own operators have anything for it.

What it registers holds for the whole process, so this is a program: ``python -m support.python_device precision...``. It
patches a policy a precision on the device, asks for three chunks, and prints what came of them as a line of JSON.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "npu"


class OnDevice(Tensor):
    """A tensor there: what it holds is a CPU tensor."""

    raw: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls: type, raw: Tensor, requires_grad: bool = False) -> Any:
        made = Tensor._make_wrapper_subclass(
            cls, raw.shape, strides=raw.stride(), storage_offset=raw.storage_offset(), dtype=raw.dtype,
            device=torch.device(NAME, 0), requires_grad=requires_grad,
        )  # fmt: skip
        made.raw = raw
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})

    def data_ptr(self) -> int:
        return self.raw.data_ptr()


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One operator: computed by the CPU, on the device where its operands or its result are."""
    if func.namespace not in ("aten", "prim"):
        raise NotImplementedError(f"{func} has nothing for {NAME}")
    mine = [each for each in tree_leaves((args, kwargs)) if isinstance(each, OnDevice)]
    wanted = kwargs.get("device")
    there = bool(mine) if wanted is None else torch.device(wanted).type == NAME
    if func is torch.ops.aten.copy_.default:  # where it goes decides
        there = isinstance(args[0], OnDevice)
    plain = {**kwargs, **({} if wanted is None else {"device": torch.device("cpu")})}
    plain.pop("pin_memory", None)
    out = func(*tree_map(_lowered, args), **tree_map(_lowered, plain))

    def lifted(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if value.dtype is torch.float64:
            raise TypeError(f"{func}: {NAME} has no float64")
        same = [each for each in mine if each.raw is value]  # in place
        return same[0] if same else OnDevice(value)

    return tree_map(lifted, out) if there else out


def _lowered(value: Any) -> Any:
    return value.raw if isinstance(value, OnDevice) else value


def moved(value: Any) -> Any:
    """Tensors, a module or a batch, there."""
    if isinstance(value, nn.Module):
        for module in value.modules():
            for table in (module._parameters, module._buffers):
                for name, tensor in table.items():
                    if tensor is not None:
                        here = OnDevice(tensor.detach())
                        table[name] = (
                            nn.Parameter(here, requires_grad=False) if table is module._parameters else here
                        )
        return value
    if isinstance(value, dict):
        return {name: moved(each) for name, each in value.items()}
    return OnDevice(value) if isinstance(value, Tensor) else value


def main(precisions: list[str]) -> None:
    _setup_privateuseone_for_python_backend(NAME)
    library = torch.library.Library("_", "IMPL")
    library.fallback(lambda op, *args, **kwargs: run(op, args, kwargs), "PrivateUse1")

    made = torch.tensor  # it asks C++ for the device

    def tensor(*args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        return made(*args, **kwargs) if device is None else made(*args, **kwargs).to(device)

    torch.tensor = tensor

    import smolvla_fast
    from smolvla_fast.model import dense
    from smolvla_fast.patch import engine_of
    from smolvla_fast.patching.inputs import chunk_inputs
    from smolvla_fast.testing.policies import make_noise, make_observation, make_policy

    # On a real device tensors are of torch's own class.
    dense.PLAIN = (*dense.PLAIN, OnDevice)  # type: ignore[assignment]
    torch.set_num_threads(1)

    def chunks_of(precision: str) -> None:
        policy = make_policy("tiny", origin="ours", num_steps=2, num_vlm_layers=2)
        given, noise = make_observation(policy), make_noise(policy)
        stock = policy.predict_action_chunk(dict(given), noise=noise)
        policy, given, noise = moved(policy), moved(given), moved(noise)
        smolvla_fast.patch(policy, precision=precision)
        if precision == "bf16":
            # Without a trial: that judges by a copy of the model in another dtype, and such tensors cannot be cast in place.
            inputs = chunk_inputs(policy, given)
            with torch.no_grad():
                chunks = [engine_of(policy.model).act(policy.model, *inputs, noise).cpu()]
        else:
            chunks = [policy.predict_action_chunk(dict(given), noise=noise).cpu() for _ in range(3)]
        chunks = [each[..., : stock.shape[-1]] for each in chunks]  # without the padding of actions
        errors = [float((each - stock).norm() / stock.norm()) for each in chunks]
        print(json.dumps({"errors": errors, **smolvla_fast.status(policy).to_dict()}))

    for precision in precisions:
        chunks_of(precision)


if __name__ == "__main__":
    main(sys.argv[1:])
