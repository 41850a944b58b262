"""Damaged and hostile folders of a sharded state: refused with nothing changed, or read as they were saved. No code runs."""

import json
import os
import pickle
import random
import shutil
from pathlib import Path

import pytest
import torch

from hf_efcp import OptionError
from hf_efcp.core.checksums import checksum
from hf_efcp.distributed import dcp_metadata
from hf_efcp.integrations.checkpoints import _find
from tests.data.write_checkpoints import DISTRIBUTED, LARGE, Alone, Shards, read
from tests.distributed.processes import run
from tests.hostile.conftest import Record
from tests.optim.helpers import differences, snapshot

OLD = Path(__file__).parents[1] / "data" / "checkpoints_0.1"
CASE = DISTRIBUTED["ddp_shards"]
FILES = ("index.json", "rank_0.safetensors", "rank_1.safetensors")


class Program:
    """A pickle that makes a file when it is read."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def save(rank, folder):
    two = Shards(*CASE)
    two.train(0, 6)
    two.optimizer.save_shards(folder / "efcp_optim")
    if rank == 0:
        torch.save(two.optimizer.state_dict(), folder / "optimizer.pt")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    run(2, save, folder)
    return folder


def target():
    alone = Alone(*CASE, LARGE)
    alone.train(0, 2)
    return alone.optimizer, alone.params


def outcome(shards, stub, right):
    """Load a folder: "refused" with nothing changed, "survived" with the state that was saved, or what went wrong."""
    optimizer, params = target()
    before = snapshot(optimizer, params)
    optimizer.shard_folder = shards
    try:
        optimizer.load_state_dict(stub)
    except OptionError as error:
        changed = differences(before, snapshot(optimizer, params))
        return "refused" if not changed and len(str(error).splitlines()) == 1 else f"{changed[:3]} changed, {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "survived" if differences(right, snapshot(optimizer, params)) == [] else "another state, without a word"


def loaded(shards, stub):
    optimizer, params = target()
    optimizer.shard_folder = shards
    optimizer.load_state_dict(stub)
    return snapshot(optimizer, params)


def flipped(data, seed=0):
    generator, data = random.Random(seed), bytearray(data)
    for _ in range(64):
        place = generator.randrange(8 * len(data))
        data[place // 8] ^= 1 << place % 8
    return bytes(data)


DAMAGES = {
    "empty": lambda data: b"",
    "half": lambda data: data[: len(data) // 2],
    "cut": lambda data: data[:-100],
    "zeros": lambda data: bytes(len(data)),
    "random": lambda data: random.Random(1).randbytes(len(data)),
    "64 flips": flipped,
    "64 other flips": lambda data: flipped(data, 7),
    "one flip": lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:],
    "longer": lambda data: data + b"more",
}


def damaged(folder, tmp_path, file, change):
    """A copy of a folder with one file changed; None: the file is gone."""
    shutil.rmtree(tmp_path / "copy", ignore_errors=True)
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    if change is None:
        (copy / file).unlink()
    else:
        (copy / file).write_bytes(change((copy / file).read_bytes()))
    return copy


def test_damaged_files(saved, tmp_path):
    stub = torch.load(saved / "optimizer.pt", weights_only=True)
    right = loaded(saved / "efcp_optim", stub)
    old_stub = read(OLD / "ddp_shards/run.pt.gz")["optimizer"]
    old_right = loaded(OLD / "ddp_shards/efcp_optim", old_stub)
    record = Record("damaged files of folders")
    for file in FILES:
        for damage, change in {"gone": None, **DAMAGES}.items():
            shards = damaged(saved / "efcp_optim", tmp_path, file, change)
            record.add(f"{file} {damage}", outcome(shards, stub, right))
    for damage, change in {"gone": None, **DAMAGES}.items():
        if "flip" not in damage:  # files of earlier versions have no checksums
            for file in (".metadata", "__0_0.distcp", "__1_0.distcp"):
                shards = damaged(OLD / "ddp_shards/efcp_optim", tmp_path, file, change)
                record.add(f"old {file} {damage}", outcome(shards, old_stub, old_right))
    record.check(40)


def edited(index, edit):
    index = json.loads(json.dumps(index))
    edit(index["entries"]["0.error"], index["entries"])
    return json.dumps(index).encode()


def test_hostile_indices(saved, tmp_path):
    stub = torch.load(saved / "optimizer.pt", weights_only=True)
    right = loaded(saved / "efcp_optim", stub)
    index = json.loads((saved / "efcp_optim/index.json").read_bytes())
    (tmp_path / "outside").write_bytes(bytes(2**16))
    edits = {
        f"{key}={value!r}": lambda e, _, key=key, value=value: e["parts"][0].update({key: value})
        for key, values in {
            "file": ["../outside", str(tmp_path / "outside"), "", ".", "..", "nowhere", 3, None, "a/b", "index.json"],
            "at": [-1, 2**40, 1.5, "0", None, True],
            "bytes": [-1, 0, 2**62, "x"],
            "start": [[1, 0], [-1, 0], [0], [0, 0, 0], "ab", [10**30, 0], None],
            "shape": [[1], [10**12, 10**12], [-1, -1], [], None],
            "checksum": [0, None, "x", 1.5, True],
        }.items()
        for value in values
    }
    edits |= {
        "shape": lambda e, _: e.update(shape=[10**12]),
        "negative shape": lambda e, _: e.update(shape=[-24, -8]),
        "dtype": lambda e, _: e.update(dtype="int64"),
        "unknown dtype": lambda e, _: e.update(dtype="float7"),
        "no parts": lambda e, _: e.update(parts=[]),
        "a part twice": lambda e, _: e["parts"].append(e["parts"][0]),
        "parts a dict": lambda e, _: e.update(parts={"a": 1}),
        "an entry more": lambda e, all_: all_.update({"0.more": e}),
        "an entry less": lambda e, all_: all_.pop("1.error"),
        "exchanged": lambda e, all_: all_.update({"0.error": all_["1.error"], "1.error": e}),
    }
    contents = {case: edited(index, edit) for case, edit in edits.items()}
    contents |= {
        "a list": b"[]",
        "deep": b"[" * 100_000,
        "a number": b"1" * 10_000,
        "format 99": json.dumps({**index, "format": 99}).encode(),
        "no entries": json.dumps({"format": 1}).encode(),
        "entries a list": json.dumps({"format": 1, "entries": []}).encode(),
        "a pickle": pickle.dumps(Program(tmp_path / "marker")),
    }
    record = Record("hostile indices")
    for case, data in contents.items():
        shards = damaged(saved / "efcp_optim", tmp_path, "index.json", lambda _, data=data: data)
        record.add(case, outcome(shards, stub, right))
    for value in (float("nan"), float("inf")):  # with the right checksum
        shards = damaged(saved / "efcp_optim", tmp_path, "index.json", lambda data: data)
        part = index["entries"]["1.error"]["parts"][0]
        numbers = torch.full(part["shape"], value)
        data = bytearray((shards / part["file"]).read_bytes())
        data[part["at"] : part["at"] + part["bytes"]] = numbers.numpy().tobytes()
        (shards / part["file"]).write_bytes(data)

        sum_ = checksum(numbers)

        def edit(_, all_, sum_=sum_):
            all_["1.error"]["parts"][0]["checksum"] = sum_

        (shards / "index.json").write_bytes(edited(index, edit))
        record.add(f"error {value}", outcome(shards, stub, right))
    assert not (tmp_path / "marker").exists()
    record.check(40)


def pickles(marker, good):
    """Name -> a pickle that is more than values."""

    def asks(module, name, *args):
        return b"\x80\x04c" + f"{module}\n{name}\n".encode() + b"(" + b"".join(pickle.dumps(a, 0)[:-1] for a in args) + b"tR."

    place = "torch.distributed.checkpoint.metadata"
    return {
        "a program": pickle.dumps(Program(marker)),
        "a program in it": good[:-1] + pickle.dumps(Program(marker))[2:],
        "os.mkdir": asks("os", "mkdir", str(marker)),
        "posix.mkdir": asks("posix", "mkdir", str(marker)),
        "eval": asks("builtins", "eval", f"__import__('os').mkdir({str(marker)!r})"),
        "getattr": asks("builtins", "getattr", "a", "b"),
        "torch.load": asks("torch", "load", "nowhere"),
        "torch.ops": asks("torch", "ops"),
        "dotted": asks(place, "os.mkdir", str(marker)),
        "a class of torch": asks("torch.nn", "Linear", 3, 3),
        "writes to a class": b"\x80\x04c" + f"{place}\nMetadata\n".encode() + b"N}X\x01\x00\x00\x00aK\x01s\x86b.",
        "a huge memo": b"\x80\x04Nr\xff\xff\xff\x7f.",
        "another operation": b"\x80\x04cos\nmkdir\n)}\x92.",
        "INST": b"(S'" + str(marker).encode() + b"'\nios\nmkdir\n.",
        "none": pickle.dumps(None),
        "a dict": pickle.dumps({"a": 1}),
    }


def test_programs_in_every_file(saved, tmp_path):
    """.metadata and .distcp of earlier versions, what FSDP2 saves and torch reads, and files of torch.save."""
    marker, record = tmp_path / "marker", Record("programs in files")
    stub, old_stub = torch.load(saved / "optimizer.pt", weights_only=True), read(OLD / "ddp_shards/run.pt.gz")["optimizer"]
    right, old_right = loaded(saved / "efcp_optim", stub), loaded(OLD / "ddp_shards/efcp_optim", old_stub)
    good = (OLD / "ddp_shards/efcp_optim/.metadata").read_bytes()
    for case, data in pickles(marker, good).items():
        shards = damaged(OLD / "ddp_shards/efcp_optim", tmp_path, ".metadata", lambda _, data=data: data)
        record.add(f".metadata: {case}", outcome(shards, old_stub, old_right))
        for ask in (lambda folder: target()[0].choose_as(folder), lambda folder: torch_reads(folder, tmp_path)):
            with pytest.raises(OptionError):
                ask(shards)
    for file in FILES:
        shards = damaged(saved / "efcp_optim", tmp_path, file, lambda _: pickle.dumps(Program(marker)))
        record.add(file, outcome(shards, stub, right))
    torch.save(Program(marker), tmp_path / "program.pt")
    program = (tmp_path / "program.pt").read_bytes()
    for file in ("__0_0.distcp", "__1_0.distcp"):
        shards = damaged(OLD / "ddp_shards/efcp_optim", tmp_path, file, lambda data: program.ljust(len(data), b"\0"))
        record.add(f"old {file}", outcome(shards, old_stub, old_right))
    for file in ("program.pt", "marker.pickle"):
        (tmp_path / "marker.pickle").write_bytes(pickle.dumps(Program(marker)))
        with pytest.raises(OptionError, match="cannot be read"):
            target()[0].choose_as(tmp_path / file)
        record.add(f"choose_as {file}", "refused")
    assert not marker.exists()
    record.check(20)


def torch_reads(folder, tmp_path):
    """What is done before torch.distributed.checkpoint reads the folder `optimizer_0` of a checkpoint."""
    shutil.rmtree(tmp_path / "checkpoint", ignore_errors=True)
    shutil.copytree(folder, tmp_path / "checkpoint/optimizer_0")
    _find([target()[0]], tmp_path / "checkpoint")


def test_values_that_torch_would_unpickle(tmp_path):
    """Of param_groups, in a file of an FSDP2 checkpoint, torch reads pickles; what is there is looked at first."""
    marker, folder = tmp_path / "marker", Path(shutil.copytree(OLD / "fsdp2/dcp", tmp_path / "dcp"))
    torch_reads(folder, tmp_path)
    entries = dcp_metadata.read_metadata(folder)
    values = [part for entry in entries.values() if entry.dtype is None for part in entry.parts]
    assert values
    for part in values:
        torch.save(Program(marker), tmp_path / "program.pt")
        data = (folder / part.file).read_bytes()
        program = (tmp_path / "program.pt").read_bytes()
        (folder / part.file).write_bytes(data[: part.at] + program + data[part.at + len(program) :])
        with pytest.raises(OptionError, match=r"distcp is damaged: .* in it is no plain value"):
            torch_reads(folder, tmp_path)
        (folder / part.file).write_bytes(data)
    assert not marker.exists()
