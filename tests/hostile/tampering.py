"""Ways to damage an entry of state, and what becomes of an optimizer that is to load it."""

import copy

import torch

from hf_efcp import OptionError
from tests.optim.helpers import differences, snapshot

NAN, INFINITY = float("nan"), float("inf")


def filled(value, place=-1):
    """The tensor with another number somewhere."""

    def change(t):
        t = t.clone()
        t.view(-1)[place] = value
        return t

    return change


def bit(t):
    """The tensor with one bit that has flipped, the lowest of a number in the middle."""
    t = t.clone().contiguous()
    t.view(-1).view(torch.uint8)[t.nbytes // 2 // t.itemsize * t.itemsize] ^= 1
    return t


def sparse(t):
    return t.to_sparse()


def released(t):
    t = t.clone()
    t.untyped_storage().resize_(0)
    return t


def quantized(t):
    return torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8)


# Of any entry. A bit is noticed by the checksum alone.
KINDS = {
    "meta": lambda t: t.to("meta"),
    "sparse": sparse,
    "quantized": quantized,
    "released": released,
    "shape": lambda t: t[None],
    "list": torch.Tensor.tolist,
    "dtype": lambda t: t.to(torch.complex64),
}
FLOATS = {"NaN": filled(NAN), "infinity": filled(INFINITY), "-infinity": filled(-INFINITY, 0)}


def damages(spec):
    """Name -> what makes numbers that are not allowed of an entry."""
    name, scale = spec.name, spec.name.endswith("_scale")
    if spec.dtype.is_floating_point:
        found = dict(FLOATS)
        if scale or name.startswith("metric_") or name in ("exp_avg_sq", "step"):
            found["negative"] = filled(-1.0, 0) if spec.values.expected[:10] != "finite bou" else (lambda t: t.flip(-1) + t * 0)
        if scale:
            found["huge"] = filled(torch.finfo(spec.dtype).max, 0)
        if name == "step":
            found["between"] = filled(0.5)
        return found
    if spec.dtype == torch.int64:
        return {"negative": filled(-1), "huge": filled(2**62)}
    if spec.dtype == torch.int8:
        return {"-128": filled(-128)}
    if name == "window_indices":
        return {"-1": filled(-1), "of another block": filled(1023), "largest": filled(2**15 - 1, 0)}
    if name == "indices":
        return {"-1": filled(-1), "largest": filled(2**31 - 1, 0), "all the same": lambda t: torch.zeros_like(t)}
    if name == "window_entries":
        return {"index": filled(-1), "index 1000": filled((1000 << 6 | 40) - 2**16, 0)}
    if name == "window_scale":
        return {"not finite": filled(255)}
    if name == "window_p":
        return {"NaN": filled(0x7F), "-NaN": filled(0xFF, 0)}
    return {"-8": lambda t: torch.zeros_like(t)} if spec.values is not None else {}


def outcome(optimizer, params, state_dict, must_name=""):
    """Load and say what became of it: "refused" with nothing changed, or what went wrong."""
    before = snapshot(optimizer, params)
    try:
        optimizer.load_state_dict(state_dict)
    except OptionError as error:
        if changed := differences(before, snapshot(optimizer, params)):
            return f"refused, and {changed[:3]} changed"
        lines = str(error).splitlines()
        return "refused" if len(lines) == 1 and must_name in lines[0] else f"refused by {str(error)!r}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"


def tampered(saved, number, name, change, keep_checksum=False):
    """A copy of a state dict with one entry changed, and its checksum too."""
    result = {**saved, "state": dict(saved["state"]), "efcp": copy.deepcopy(saved["efcp"])}
    result["state"][number] = {**saved["state"][number], name: change(saved["state"][number][name])}
    if not keep_checksum:
        result["efcp"]["checksums"][number].pop(name, None)
    return result
