"""Files that were made to do harm, or that a disk has changed: refused in one line, quickly, in little memory."""

import io
import json
import lzma
import pickle
import re
import struct
import time
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

import check_params
from models import build_model
from utils.files.checkpoint import CheckpointError, load_checkpoint, load_weights, save_checkpoint
from utils.files.compact import save_compact

STATE = {"epoch": 3, "state_dict": {"w": torch.arange(4.0)}, "acc": 70.7, "best_acc": 71.0}


def refused(path, *words):
    """Load a file that must be refused in one line with its name, within 10 s of computing."""
    start = time.process_time()
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(path)
    assert time.process_time() - start < 10
    text = str(error.value)
    assert text.startswith(str(path)) and "\n" not in text and all(word in text for word in words), text


def compact(path, *, tensors=None, mask=None, values=None, form="halo-compact-1", **more):
    """Write a compact file of one type whose parts need not fit each other."""
    meta = {"format": form, "tensors": tensors or {"w": ["float32", [4]]}, "checkpoint": {}} | more
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("meta.json", json.dumps(meta))
        archive.writestr("float32.mask", lzma.compress(mask if mask is not None else bytes([0b11110000])))
        archive.writestr("float32.values", lzma.compress(values if values is not None else bytes(range(1, 17))))


def test_a_compact_file_by_hand_loads(tmp_path):
    compact(tmp_path / "c")
    planes = np.arange(1, 17, dtype=np.uint8).reshape(4, 4)
    words = np.ascontiguousarray(planes.T).view("<f4")[:, 0]
    assert load_checkpoint(tmp_path / "c")["state_dict"]["w"].tolist() == words.tolist()


BOMB = {"w": ["float32", [1 << 30]]}
COMPACT = {
    "one value for all": ({"values": b"\0\0\x80\x3f"}, "do not fit"),
    "a value too many": ({"values": bytes(20)}, "do not fit"),
    "no value": ({"values": b""}, "do not fit"),
    "a mask too short": ({"mask": b""}, "do not fit"),
    "a mask too long": ({"mask": bytes([0b11110000, 1])}, "do not fit"),
    "bits beyond the tensors": ({"mask": bytes([0b11111000])}, "mask longer"),
    "another format": ({"form": "halo-compact-2"}, "'halo-compact-2'"),
    "no format": ({"form": None}, "None"),
    "a mask that is a bomb": ({"mask": bytes(1 << 26)}, "do not fit"),
    "values that are a bomb": ({"values": bytes(1 << 26)}, "do not fit"),
    "a shape of 1e9": ({"tensors": BOMB}, "134,217,728 elements"),
    "a shape of 1e40": ({"tensors": {"w": ["float32", [10**20, 10**20]]}}, "134,217,728 elements"),
    "a negative shape": ({"tensors": {"w": ["float32", [-4]]}}, "does not say"),
    "no list of tensors": ({"tensors": [1]}, "does not say"),
    "another type": ({"tensors": {"w": ["Tensor", [4]]}}, "does not say"),
    "a part that is missing": ({"tensors": {"w": ["float16", [4]]}}, "lacks a part"),
    "no checkpoint": ({"checkpoint": 3}, "does not say"),
    "an epoch in words": ({"checkpoint": {"epoch": "three"}}, "'epoch'"),
    "an infinite accuracy": ({"checkpoint": {"acc": float("inf")}}, "'acc'"),
}


@pytest.mark.parametrize("name", COMPACT)
def test_compact_files_whose_parts_do_not_fit(tmp_path, name):
    changes, words = COMPACT[name]
    compact(tmp_path / "c", **changes)
    tracemalloc.start()
    refused(tmp_path / "c", words)
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()


def test_a_zip_bomb_is_not_unpacked(tmp_path):
    for name in ("meta.json", "archive/data.pkl"):
        with zipfile.ZipFile(tmp_path / "bomb", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(name, bytes(1 << 26))
        refused(tmp_path / "bomb", "no zip as")


def networks(folder):
    """Write one file of each kind; return their paths."""
    torch.manual_seed(0)
    state = STATE | {"state_dict": build_model("lenet_5", 10).state_dict() | {"count": torch.tensor(7)}}
    save_checkpoint(folder / "checkpoint", state)
    save_compact(folder / "compact", state)
    return [folder / "checkpoint", folder / "compact"]


def test_one_changed_byte_of_the_content_is_noticed(tmp_path):
    """Every member of the zip has a checksum; in a checkpoint torch.load itself would not look at it."""
    for path in networks(tmp_path):
        whole = path.read_bytes()
        with zipfile.ZipFile(path) as archive:
            members = [m for m in archive.infolist() if m.file_size]
        for member in members:
            name, extra = struct.unpack("<HH", whole[member.header_offset + 26 : member.header_offset + 30])
            start = member.header_offset + 30 + name + extra
            changed = bytearray(whole)
            changed[start + member.file_size // 2] ^= 1
            path.write_bytes(changed)
            refused(path, "checksum")


def test_checkpoints_without_checksums_load(tmp_path):
    previous = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(STATE, tmp_path / "zip")
    finally:
        torch.serialization.set_crc32_options(previous)
    torch.save(STATE, tmp_path / "stream", _use_new_zipfile_serialization=False)
    for name in ("zip", "stream"):
        assert load_checkpoint(tmp_path / name)["state_dict"]["w"].tolist() == [0, 1, 2, 3]


def with_w(tensor):
    return STATE | {"state_dict": {"w": tensor}}


class Called:
    """Pickles as a call that torch.load permits."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


CHECKPOINTS = {
    "a stride of 0": (lambda: with_w(torch.zeros(1).expand(1 << 40)), "larger than its data"),
    "a sparse tensor": (lambda: with_w(torch.eye(3).to_sparse()), "sparse"),
    "a sparse tensor by rows": (lambda: with_w(torch.eye(3).to_sparse_csr()), "sparse"),
    "a quantised tensor": (lambda: with_w(torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)), "quantised"),
    "a tensor without data": (lambda: with_w(torch.empty(1 << 40, device="meta")), "no network here has"),
    "an integer key": (lambda: STATE | {"state_dict": {7: torch.ones(1)}}, "by name"),
    "a value of another type": (lambda: STATE | {"state_dict": {"w": "text"}}, "by name"),
    "no number as acc": (lambda: STATE | {"acc": "much"}, "'acc'"),
    "many numbers as acc": (lambda: STATE | {"acc": torch.ones(3)}, "'acc'"),
    "a list as epoch": (lambda: STATE | {"epoch": [1]}, "'epoch'"),
    "a negative epoch": (lambda: STATE | {"epoch": -1}, "'epoch'"),
    "half an epoch": (lambda: STATE | {"epoch": 1.5}, "'epoch'"),
    "bytes out of nothing": (lambda: STATE | {"more": Called(bytearray, 10**10)}, "could run code"),
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints_that_no_network_has_written(tmp_path, name, zipped):
    make, words = CHECKPOINTS[name]
    torch.save(make(), tmp_path / "c", _use_new_zipfile_serialization=zipped)
    refused(tmp_path / "c", words)


@pytest.mark.parametrize(("elements", "size"), [(10**12, 10**12), (5, 4), (3, 3)])
def test_sizes_in_a_checkpoint_are_not_believed(tmp_path, elements, size):
    """Without a look before it, torch.load reads beyond the data that is there."""
    torch.save(STATE, tmp_path / "good")
    with zipfile.ZipFile(tmp_path / "good") as good, zipfile.ZipFile(tmp_path / "bad", "w") as bad:
        for name in good.namelist():
            content = good.read(name)
            if name.endswith("data.pkl"):
                content, of_storage = re.subn(rb"(cpuq.)K\x04t", lambda m: m[1] + integer(elements) + b"t", content)
                content, of_tensor = re.subn(rb"K\x04\x85", lambda m: integer(size) + b"\x85", content)
                assert (of_storage, of_tensor) == (1, 1)
            bad.writestr(name, content)
    refused(tmp_path / "bad", "larger than its data")


@pytest.mark.parametrize("code", [pickle.BINBYTES8, pickle.BINUNICODE8, pickle.FRAME])
def test_lengths_in_a_file_of_an_older_version_are_not_believed(tmp_path, code):
    (tmp_path / "c").write_bytes(pickle.PROTO + b"\x04" + code + struct.pack("<Q", 1 << 46) + b"abc")
    refused(tmp_path / "c", "damaged")


def test_a_list_that_holds_another_twice_and_so_on_is_no_message(tmp_path):
    """As text it would have 2 to the power of 40 brackets."""
    lists, deep = [], []
    for _ in range(40):
        lists, deep = [lists, lists], {"deep": [deep]}
    wide, text = [[0] * 10_000] * 10_000, ["x" * 10**6] * 1000
    for value in (lists, deep, wide, text):
        save_checkpoint(tmp_path / "c", STATE | {"config": {"depth": value}})
        refused(tmp_path / "c", "more than 4,000,000 parts")
    save_checkpoint(tmp_path / "c", STATE | {"history": [dict.fromkeys(map(str, range(27)), 0.5)] * 20_000})
    assert load_checkpoint(tmp_path / "c")["epoch"] == 3


def integer(number):
    """Pickle a whole number, without the head and the end."""
    return pickle.dumps(number, 2)[2:-1]


def test_zips_that_can_be_read_in_two_ways(tmp_path):
    buffer = io.BytesIO()
    torch.save(STATE, buffer)
    for change in ("comment", "twice"):
        (tmp_path / "c").write_bytes(buffer.getvalue())
        with zipfile.ZipFile(tmp_path / "c", "a") as archive:
            if change == "comment":
                archive.comment = b"more"
            else:
                archive.writestr("ARCHIVE/DATA.PKL", b"")
        refused(tmp_path / "c", "no zip as")


def test_whole_numbers_are_no_weights():
    model = nn.Linear(2, 2)
    state = {name: tensor.long() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"x holds weight as torch.int64"):
        load_weights(model, state, path="x")


@pytest.mark.filterwarnings("error")
def test_the_files_of_the_release_and_of_torch_load(tmp_path):
    """Every kind of tensor that a network or an optimizer has, in both formats, with views into one storage."""
    whole = torch.arange(12.0).reshape(3, 4)
    kinds = (torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.uint8, torch.bool)
    tensors = {str(kind): torch.ones(2, dtype=kind) for kind in kinds}
    tensors |= {
        "view": whole[1:, ::2],
        "turned": whole.T,
        "same": whole,
        "empty": torch.empty(0, 3),
        "one": whole[0, 0],
    }
    state = STATE | {"state_dict": nn.ParameterDict({"p": nn.Parameter(torch.ones(2))}).state_dict() | tensors}
    state |= {"size": whole.shape, "device": whole.device, "dtype": whole.dtype, "parameter": nn.Parameter(whole)}
    for zipped in (True, False):
        torch.save(state, tmp_path / "c", _use_new_zipfile_serialization=zipped)
        loaded = load_checkpoint(tmp_path / "c")["state_dict"]
        assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items()) and len(loaded) == 13


def test_a_network_without_weights_is_written_as_a_compact_file(tmp_path, capsys):
    state = build_model("lenet_5", 10).state_dict()
    save_checkpoint(tmp_path / "c", {"state_dict": {name: torch.zeros_like(t) for name, t in state.items()}})
    options = ["-d", "mnist", "-a", "lenet_5", "--no_data", "--checkpoint", tmp_path / "c", "--compact", tmp_path / "s"]
    report = check_params.main(check_params.get_parser().parse_args([*map(str, options)]))
    assert report["prunable_nonzero"] == 0 and report["compact"]["ratio_to_bound"] is None
    assert "of the prunable weights: 0 bytes\n" in capsys.readouterr().out
